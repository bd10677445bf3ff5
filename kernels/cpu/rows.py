"""How the CPU kernels walk a row: chunk by chunk through a small buffer of numbers in computation format.

    row      | chunk 0          | chunk 1          | chunk 2   |           CHUNK_COLS columns each, the last one shorter
    buffer   | lanes 0..15 of column 0, 16, 32, ... | -inf padding |       one chunk at a time, in the L1 cache

The chunks of a row, the lanes of a chunk and the order in which they are summed depend on n_cols and the computation
format alone, so a row has the same bits in any batch, on any thread, at any alignment.
"""

import math
from typing import NamedTuple

import numpy as np

from gpusoftmax.kernels.cpu.cache import device
from gpusoftmax.kernels.cpu.transform import transform
from gpusoftmax.kernels.cpu.vector import (
    add,
    address_of,
    advance,
    finite_or_zero,
    horizontal_max,
    horizontal_sum,
    lanes_of,
    load,
    load_one,
    maximum,
    merge,
    number,
    pointer_to,
    reference,
    splat,
    store,
    store_one,
    sub,
    tail_term,
    tie,
)

# 8 KiB of float32: four such buffers and what the hardware prefetches still fit a 32 KiB L1 cache.
CHUNK_COLS = 2048
# The sums run over four vectors at a time: three additions in a tree, one compensated.
STRIP = 4


@device
def new_buffer(like):
    """An uninitialised array for one chunk. The caller keeps it alive while it is used through its address."""
    return np.empty(CHUNK_COLS + STRIP * lanes_of(like), np.float64)


@device
def buffer_pointer(buffer, like):
    return pointer_to(address_of(buffer), like)


class Strided(NamedTuple):
    """An Operand as a kernel gets it. The type of `tag`, a scalar, names the storage format."""

    address: int
    outer_stride: int
    inner_stride: int
    col_stride: int
    tag: np.generic


class Row(NamedTuple):
    """One row of an array: column c lies at pointer[c * stride]."""

    pointer: object
    stride: int


@device
def row_offset(array, row, rows):
    """Where a row starts, in elements. `array` has the strides of an Operand or of Labels."""
    return (row // rows.n_inner) * array.outer_stride + (row % rows.n_inner) * array.inner_stride


@device
def row_of(array, row, rows):
    return Row(advance(pointer_to(array.address, array.tag), row_offset(array, row, rows)), array.col_stride)


@device
def padded(count, like):
    """`count` rounded up to whole strips of vectors."""
    strip = STRIP * lanes_of(like)
    return (count + strip - 1) // strip * strip


@device
def read_chunk(buffer, row, first, count, padding):
    """buffer[:count] = the numbers of columns first..first + count; the rest of the last strip is `padding`."""
    lanes = lanes_of(padding)
    col = 0
    if row.stride == 1:
        while col + lanes <= count:
            store(buffer, col, load(row.pointer, first + col, padding))
            col += lanes
    while col < count:
        store_one(buffer, col, load_one(row.pointer, (first + col) * row.stride, padding))
        col += 1
    while col < padded(count, padding):
        store_one(buffer, col, padding)
        col += 1


@device
def write_chunk(row, first, buffer, count, like):
    """Columns first..first + count of the row = buffer[:count], rounded to the storage format."""
    lanes = lanes_of(like)
    col = 0
    if row.stride == 1:
        while col + lanes <= count:
            store(row.pointer, first + col, load(buffer, col, like))
            col += lanes
    while col < count:
        store_one(row.pointer, (first + col) * row.stride, load_one(buffer, col, like))
        col += 1


@device
def read_logits(buffer, logits, first, count, row, params):
    """read_chunk through `transform`. The padding adds nothing to a maximum or a sum."""
    like = params[0]
    read_chunk(buffer, logits, first, count, number(like, -math.inf))
    col = 0
    while col < padded(count, like):
        store(buffer, col, transform(load(buffer, col, like), first + col, row, params))
        col += lanes_of(like)


@device
def compensated_add(total, error, term):
    """Kahan's sum, lane by lane: the true sum is total - error."""
    corrected = sub(term, error)
    updated = add(total, corrected)
    return updated, finite_or_zero(sub(sub(updated, total), corrected), updated)


@device
def sum_chunk(buffer, count, like):
    """The sum of a chunk as (sum, low). `count` is a whole number of strips."""
    lanes = lanes_of(like)
    total = splat(number(like, 0.0))
    error = total
    col = 0
    while col < count:
        pair = add(load(buffer, col, like), load(buffer, col + lanes, like))
        other = add(load(buffer, col + 2 * lanes, like), load(buffer, col + 3 * lanes, like))
        total, error = compensated_add(total, error, add(pair, other))
        col += STRIP * lanes
    return horizontal_sum(total), -horizontal_sum(error)


@device
def chunk_state(buffer, count, scale, scale_low):
    """The row state (max, ties, tail, tail_low) of one chunk. `count` is a whole number of strips."""
    lanes = lanes_of(scale)
    largest = splat(number(scale, -math.inf))
    col = 0
    while col < count:
        largest = maximum(largest, load(buffer, col, scale))
        col += lanes
    row_max = horizontal_max(largest)
    shift = splat(reference(row_max))
    factor = splat(scale)
    factor_low = splat(scale_low)
    ties = splat(number(scale, 0.0))
    tail = ties
    error = ties
    col = 0
    while col < count:
        a = load(buffer, col, scale)
        b = load(buffer, col + lanes, scale)
        c = load(buffer, col + 2 * lanes, scale)
        d = load(buffer, col + 3 * lanes, scale)
        ties = add(ties, add(add(tie(a, shift), tie(b, shift)), add(tie(c, shift), tie(d, shift))))
        pair = add(tail_term(a, shift, factor, factor_low), tail_term(b, shift, factor, factor_low))
        other = add(tail_term(c, shift, factor, factor_low), tail_term(d, shift, factor, factor_low))
        tail, error = compensated_add(tail, error, add(pair, other))
        col += STRIP * lanes
    ties_of_chunk = horizontal_sum(ties)
    if row_max == number(scale, -math.inf):
        ties_of_chunk = number(scale, 0.0)  # 0 stood in for the maximum; nothing may tie with it
    return row_max, ties_of_chunk, horizontal_sum(tail), -horizontal_sum(error)


@device
def row_state(buffer, logits, n_cols, row, params):
    """The state of a whole row, chunks merged in order. A row of one chunk stays in the buffer."""
    scale, scale_low = params
    zero = number(scale, 0.0)
    state = (number(scale, -math.inf), zero, zero, zero)
    for first in range(0, n_cols, CHUNK_COLS):
        count = min(CHUNK_COLS, n_cols - first)
        read_logits(buffer, logits, first, count, row, params)
        state = merge(state, chunk_state(buffer, padded(count, scale), scale, scale_low), scale, scale_low)
    return state


@device
def logits_again(buffer, logits, first, count, n_cols, row, params):
    """Fills the buffer with a chunk for the second pass, unless row_state has left it there."""
    if n_cols > CHUNK_COLS:
        read_logits(buffer, logits, first, count, row, params)
