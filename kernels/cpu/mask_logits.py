"""Logits below a limit of their row become -inf, on the CPU. threshold.py finds the limit."""

import math

from gpusoftmax.kernels.cpu.cache import device, kernel
from gpusoftmax.kernels.cpu.call import arguments
from gpusoftmax.kernels.cpu.chunks import write_chunk
from gpusoftmax.kernels.cpu.memory import (
    load_cols,
)
from gpusoftmax.kernels.cpu.rows import chunk_range, save_maxima
from gpusoftmax.kernels.cpu.run import run
from gpusoftmax.kernels.cpu.threshold import kept_from, limit_of, limit_of_own, nothing_measured
from gpusoftmax.kernels.cpu.vector import (
    number,
)
from gpusoftmax.kernels.cpu.walk import walk
from gpusoftmax.kernels.operands import (
    Limits,
    Operand,
    Place,
    Rows,
    compute_dtype,
    have_own_numbers,
    limits_in,
    own_numbers,
    scale_of,
    unless_one,
)


def mask_logits(
    rows: Rows, logits: Operand, masked: Operand, temperature: float | Operand, limits: Limits, place: Place
) -> None:
    """Where rows have their own numbers, nothing is left of one whose numbers are none."""
    compute = compute_dtype(logits.dtype, masked.dtype)
    if have_own_numbers(temperature, limits):
        own = own_numbers(temperature, limits, compute)
        keeps = limits.top_p != 1
        run(mask_mixed_logits_rows, rows, logits, None, masked, *own, whole_rows=True, keeps_exponentials=keeps)
        return
    numbers = *limits_in(limits, temperature, compute), *unless_one(scale_of(1.0, temperature, compute))
    keeps = limits.top_p < 1
    run(mask_logits_rows, rows, logits, None, masked, *numbers, whole_rows=True, keeps_exponentials=keeps)


@kernel
def mask_logits_rows(call):
    way, job, rows, logits, same, masked, top_k, top_p, from_max, scale, low = arguments(call)
    numbers = top_k, top_p, from_max, scale, low
    walk(way, job, rows, logits, same, masked, save_maxima, nothing_measured, limit_of_row, write, numbers, scale)


@kernel
def mask_mixed_logits_rows(call):
    way, job, rows, logits, same, masked, temperatures, t, top_k, top_ps, p, min_ps, m = arguments(call)
    numbers = rows, ((temperatures, t), top_k, (top_ps, p), (min_ps, m))
    walk(way, job, rows, logits, same, masked, save_maxima, nothing_measured, own_limit_of_row, write, numbers, t)


@device
def own_limit_of_row(here, numbers):
    is_given, temperature, limit = limit_of_own(here, *numbers)
    return limit if is_given and temperature > number(limit, 0.0) else number(limit, math.inf)


@device
def limit_of_row(here, numbers):
    top_k, top_p, from_max, scale, low = numbers
    return limit_of(here, top_k, top_p, from_max, scale, low)


@device
def write(here, first, last, limit, numbers):
    for chunk in range(first, last):
        col, count = chunk_range(here, chunk)
        write_chunk(kept, (limit,), here, col, count)


@device
def kept(col, left, here, arguments):
    return kept_from(load_cols(here.first, col, left, here.nothing), arguments[0])
