"""Softmax over the k largest logits of each row, on the CPU.

    probs_j = exp((x_j - max) / T) / s        x_0 >= x_1 >= ... >= x_(k-1) the largest logits

where s is the sum of the exponentials over these k or, if they are not renormalised, over all columns. A row is read
once, by one thread; its largest logits are kept where the results go (largest.py).
"""

import math
from typing import NamedTuple

from gpusoftmax.kernels.cpu.arithmetic import (
    add_pair,
    exp_from,
    floor,
    fma,
    inverse_pair,
    mul,
)
from gpusoftmax.kernels.cpu.cache import device, kernel
from gpusoftmax.kernels.cpu.call import arguments
from gpusoftmax.kernels.cpu.chunks import CHUNK_COLS, sum_of_exponentials
from gpusoftmax.kernels.cpu.largest import find_largest
from gpusoftmax.kernels.cpu.memory import (
    advance,
    load,
    pointer_to,
    store,
)
from gpusoftmax.kernels.cpu.rows import chunk_range, count_of_chunks, element, row_offset, save_maxima
from gpusoftmax.kernels.cpu.run import run
from gpusoftmax.kernels.cpu.states import LOW, MAX, SUM, anchor_of_chunk, fold_sum, row_max, save, saved
from gpusoftmax.kernels.cpu.states import chunk_ratio as ratio_of_chunk
from gpusoftmax.kernels.cpu.vector import (
    number,
    size_of,
)
from gpusoftmax.kernels.cpu.walk import walk
from gpusoftmax.kernels.operands import Labels, Operand, Place, Rows, scale_of, unless_one


def topk_softmax(
    rows: Rows,
    logits: Operand,
    probs: Operand,
    indices: Labels,
    k: int,
    renormalize: bool,
    temperature: float,
    place: Place,
) -> None:
    """Of each row the probabilities of the k largest logits and their columns (int64), side by side; -1 for the columns
    where the row has no softmax.
    """
    scale = unless_one(scale_of(1.0, temperature, probs.dtype))
    run(
        topk_softmax_rows, rows, logits, None, None, probs, indices, k, int(renormalize), *scale, whole_rows=True
    )  # fmt: skip


class Top(NamedTuple):
    """What the steps need besides the logits."""

    rows: Rows
    probs: object
    indices: Labels
    k: int
    renormalize: int
    scale: object
    scale_low: object


@kernel
def topk_softmax_rows(call):
    way, job, rows, logits, same, none, probs, indices, k, renormalize, scale, scale_low = arguments(call)
    top = Top(rows, probs, indices, k, renormalize, scale, scale_low)
    walk(way, job, rows, logits, same, none, prepare, measure, fold, write, top, scale)


@device
def results_of(here, top):
    """Where a row's k values and columns begin."""
    columns = advance(pointer_to(top.indices.pointer, here.row), row_offset(top.indices, here.row, top.rows))
    return element(top.probs, here.row, top.rows), columns


# ---------------------------------------------------------------- 1. measure


@device
def prepare(here, first, last, top):
    save_maxima(here, first, last, top)
    values, columns = results_of(here, top)
    for chunk in range(first, last):
        col, count = chunk_range(here, chunk)
        find_largest(here, col, count, values, columns, top.k, top.scale)


@device
def measure(here, first, last, top):
    for chunk in range(first, last):
        col, count = chunk_range(here, chunk)
        largest = saved(here.states, chunk, MAX, here.zero)
        total, low, _, _ = sum_of_exponentials(
            here, False, largest, None, col, count, top.scale, top.scale_low, False
        )  # fmt: skip
        save(here.states, chunk, SUM, total)
        save(here.states, chunk, LOW, low)


# ---------------------------------------------------------------- 2. fold, 3. write


@device
def fold(here, top):
    return fold_sum(here.states, count_of_chunks(here.n_cols), here.zero, top.scale, top.scale_low)


@device
def write(here, first, last, row, top):
    values, columns = results_of(here, top)
    inverse, inverse_low = inverse_pair(row.sum, row.low)
    if inverse != inverse or row_max(here.states, count_of_chunks(here.n_cols), here.zero) == -math.inf:
        for j in range(top.k):
            store(values, j, number(top.scale, math.nan))
            columns[j] = -1
        return
    shift, exponent, factor = in_chunk(here, 0, row, top)
    for j in range(top.k):
        if count_of_chunks(here.n_cols) > 1:
            shift, exponent, factor = in_chunk(here, columns[j] // CHUNK_COLS, row, top)
        e = exp_from(load(values, j, top.scale), shift, exponent, floor(exponent), top.scale, top.scale_low)
        if top.renormalize:
            store(values, j, mul(e, factor))
        else:
            store(values, j, fma(e, mul(factor, inverse), mul(e, mul(factor, inverse_low))))
    if top.renormalize:
        inverse, inverse_low = inverse_pair(*sum_of(values, top.k, here.zero))
        for j in range(top.k):
            e = load(values, j, top.scale)
            store(values, j, fma(e, inverse, mul(e, inverse_low)))


@device
def in_chunk(here, chunk, row, top):
    """(shift, exponent, factor) of the exponentials of a chunk, as the softmax of the whole row has them: relative to
    the anchor of the chunk first.
    """
    shift, exponent = anchor_of_chunk(saved(here.states, chunk, MAX, here.zero), row.shift, row.exponent, top.scale)
    factor = ratio_of_chunk(here.states, chunk, row.shift, row.exponent, here.zero, top.scale, top.scale_low)
    return shift, exponent, factor


@device
def sum_of(values, k, zero):
    """The sum of k numbers as (high, low)."""
    if size_of(zero) == 4:  # in float64, which takes a fifth of the time of a chain of pairs
        total = 0.0
        for j in range(k):
            total += load(values, j, zero)
        high = number(zero, total)
        return high, number(zero, total - high)
    high, low = zero, zero
    for j in range(k):
        high, low = add_pair(high, low, load(values, j, zero), zero)
    return high, low
