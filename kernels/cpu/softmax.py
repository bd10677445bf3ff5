"""Softmax over rows of logits, and its backward, on the CPU.

    probs_c   = exp((x_c - max) / T) / s          s = sum_c exp((x_c - max) / T)
    dlogits_c = probs_c (dprobs_c - sum_k probs_k dprobs_k) / T

Softmax reads a row once: the exponentials stay where the probabilities go, and are multiplied there by 1 / s.
"""

import numpy as np

from gpusoftmax.kernels.cpu.arithmetic import (
    add,
    fma,
    inverse_pair,
    inverse_temperature,
    mul,
    sub,
)
from gpusoftmax.kernels.cpu.cache import device, kernel
from gpusoftmax.kernels.cpu.call import arguments
from gpusoftmax.kernels.cpu.chunks import fetch_both, sum_chunk, sum_of_exponentials, write_chunk
from gpusoftmax.kernels.cpu.here import unless_empty
from gpusoftmax.kernels.cpu.memory import (
    load_cols,
)
from gpusoftmax.kernels.cpu.rows import chunk_range, count_of_chunks, nothing_first, number_of_row, save_maxima
from gpusoftmax.kernels.cpu.run import run
from gpusoftmax.kernels.cpu.states import LOW, MAX, SUM, chunk_ratio, fold_sum, row_max, save, saved, sum_of_saved
from gpusoftmax.kernels.cpu.vector import (
    is_half,
)
from gpusoftmax.kernels.cpu.walk import walk
from gpusoftmax.kernels.operands import Operand, Place, Rows, compute_dtype, scale_of, unless_one


def softmax(rows: Rows, logits: Operand, probs: Operand, temperature: float, place: Place) -> None:
    scale = scale_of(1.0, temperature, compute_dtype(logits.dtype, probs.dtype))
    run(softmax_rows, rows, logits, None, probs, *unless_one(scale), keeps_exponentials=True)


def softmax_backward(
    rows: Rows, probs: Operand, dprobs: Operand, dlogits: Operand, temperature: float, place: Place
) -> None:
    scale, _ = scale_of(1.0, temperature, compute_dtype(probs.dtype, dprobs.dtype, dlogits.dtype))
    run(softmax_backward_rows, rows, probs, dprobs, dlogits, scale)


def tempered_softmax_backward(
    rows: Rows, probs: Operand, dprobs: Operand, temperatures: Operand, dlogits: Operand, place: Place
) -> None:
    """softmax_backward with a temperature for each row, in the format of the arithmetic."""
    one = np.dtype(temperatures.dtype).type(1)
    run(tempered_softmax_backward_rows, rows, probs, dprobs, dlogits, temperatures, one, in_blocks=False)


@kernel
def softmax_rows(call):
    softmax_of_rows(*arguments(call))


@device
def softmax_of_rows(way, job, rows, logits, same, probs, scale, scale_low):
    numbers = scale, scale_low, probs.tag
    walk(way, job, rows, logits, same, probs, save_maxima, sum_exponentials, total, probabilities, numbers, scale)


@device
def sum_exponentials(here, first, last, numbers):
    scale, scale_low, tag = numbers
    for chunk in range(first, last):
        col, count = chunk_range(here, chunk)
        largest = saved(here.states, chunk, MAX, here.zero)
        total, low, _, _ = sum_of_exponentials(here, True, largest, None, col, count, scale, scale_low, is_half(tag))
        save(here.states, chunk, SUM, total)
        save(here.states, chunk, LOW, low)


@device
def total(here, numbers):
    scale, scale_low, _ = numbers
    n_chunks = count_of_chunks(here.n_cols)
    row = fold_sum(here.states, n_chunks, here.zero, scale, scale_low)
    inverse, inverse_low = inverse_pair(row.sum, row.low)
    largest = row_max(here.states, n_chunks, here.zero)
    inverse = unless_empty(inverse, largest, row.sum, here.through)
    return row.shift, row.exponent, inverse, unless_empty(inverse_low, largest, row.sum, here.through)


@device
def probabilities(here, first, last, summary, numbers):
    scale, scale_low, tag = numbers
    shift, exponent, inverse, inverse_low = summary
    for chunk in range(first, last):
        col, count = chunk_range(here, chunk)
        factor = chunk_ratio(here.states, chunk, shift, exponent, here.zero, scale, scale_low)
        write_chunk(scaled, (mul(factor, inverse), mul(factor, inverse_low), tag), here, col, count)


@device
def scaled(col, left, here, arguments):
    factor, factor_low, tag = arguments
    e = load_cols(here.home, col, left, here.zeros)
    return mul(e, factor) if is_half(tag) else fma(e, factor, mul(e, factor_low))


@kernel
def softmax_backward_rows(call):
    way, job, rows, probs, dprobs, dlogits, scale = arguments(call)
    walk(way, job, rows, probs, dprobs, dlogits, nothing_first, sum_products, dot, gradient, (scale,), scale)


@kernel
def tempered_softmax_backward_rows(call):
    way, job, rows, probs, dprobs, dlogits, temperatures, one = arguments(call)
    numbers = rows, temperatures, one
    walk(way, job, rows, probs, dprobs, dlogits, nothing_first, sum_products, dot_and_scale, tempered, numbers, one)


@device
def dot_and_scale(here, numbers):
    rows, temperatures, one = numbers
    return dot(here, numbers), inverse_temperature(number_of_row(temperatures, rows, here, 0, one))[0]


@device
def tempered(here, first, last, summary, numbers):
    for chunk in range(first, last):
        col, count = chunk_range(here, chunk)
        write_chunk(centred, summary, here, col, count)


@device
def sum_products(here, first, last, numbers):
    for chunk in range(first, last):
        col, count = chunk_range(here, chunk)
        total, low, _, _ = sum_chunk(product, here, (), col, count)
        save(here.states, chunk, SUM, total)
        save(here.states, chunk, LOW, low)


@device
def product(col, left, others, here, arguments):
    fetch_both(here, col)
    p = load_cols(here.first, col, left, here.zeros)
    return mul(p, load_cols(here.second, col, left, here.zeros)), others, None


@device
def dot(here, numbers):
    total, low = sum_of_saved(here.states, count_of_chunks(here.n_cols), here.zero)
    return add(total, low)


@device
def gradient(here, first, last, summary, numbers):
    for chunk in range(first, last):
        col, count = chunk_range(here, chunk)
        write_chunk(centred, (summary, numbers[0]), here, col, count)


@device
def centred(col, left, here, arguments):
    shift, scale = arguments
    p = load_cols(here.first, col, left, here.zeros)
    dp = load_cols(here.second, col, left, here.zeros)
    return mul(mul(p, sub(dp, shift)), scale)
