"""Rows of arrays as the steps of an op see them, whichever way they are walked (walk.py)."""

from typing import NamedTuple

import numpy as np

from gpusoftmax.kernels.cpu.cache import device
from gpusoftmax.kernels.cpu.chunks import CHUNK_COLS, chunk_max
from gpusoftmax.kernels.cpu.here import Ahead, line_from
from gpusoftmax.kernels.cpu.memory import (
    advance,
    load,
    pointer_to,
    store,
)
from gpusoftmax.kernels.cpu.states import FIELDS, MAX, save, saved
from gpusoftmax.kernels.cpu.vector import (
    lanes_of,
)
from gpusoftmax.kernels.operands import Transform


class Strided(NamedTuple):
    """An Operand as a kernel gets it. The type of `tag`, a scalar, names the storage format."""

    address: int
    outer_stride: int
    inner_stride: int
    col_stride: int
    tag: np.generic
    transform: Transform | None


class Address(int):
    """Of contiguous numbers, for a kernel; 0: there are none."""


@device
def row_offset(array, row, rows):
    """Where a row starts, in elements. `array` has the strides of an Operand or of Labels."""
    if rows.n_inner >= rows.n_rows:  # one batch axis, the usual case: spares a division
        return row * array.inner_stride
    outer = row // rows.n_inner
    return outer * array.outer_stride + (row - outer * rows.n_inner) * array.inner_stride


@device
def element(array, row, rows):
    """A pointer to column 0 of a row."""
    return advance(pointer_to(array.address, array.tag), row_offset(array, row, rows))


@device
def count_of_chunks(n_cols):
    """At least one: a row without columns has a state too."""
    return max(1, (n_cols + CHUNK_COLS - 1) // CHUNK_COLS)


@device
def chunk_range(here, chunk):
    """(first column, number of columns) of a chunk."""
    first = chunk * CHUNK_COLS
    return first, min(CHUNK_COLS, here.n_cols - first)


@device
def ahead_of(first, second, target, n_cols):
    """What follows the columns of rows that lie along. The maximum of the next chunk comes before its exponentials, in
    a tenth of their time: of a whole chunk the last columns have to be fetched earlier still.
    """
    distance = max(CHUNK_COLS, 2 * min(n_cols, CHUNK_COLS))
    return Ahead(line_from(first, distance), line_from(second, distance), line_from(target, CHUNK_COLS))


@device
def save_maxima(here, first, last, numbers):
    """Step 0 of an op that refers its exponentials to the maximum of a chunk."""
    for chunk in range(first, last):
        col, count = chunk_range(here, chunk)
        save(here.states, chunk, MAX, chunk_max(here, col, count))


@device
def nothing_first(here, first, last, numbers):
    """Step 0 of an op that does not."""


@device
def store_per_row(array, rows, here, values, like):
    """Writes the number of a row, or of the row in each lane, to an array of one number per row."""
    lanes = lanes_of(here.zero)
    place = count_of_chunks(here.n_cols) * FIELDS * lanes
    store(here.states, place, values)
    for lane in range(here.n_rows):
        store(element(array, here.row + lane, rows), 0, load(here.states, place + lane, like))


@device
def number_or(array, row, rows, default):
    """The number that an array has for a row, or the default where the caller gave no array."""
    return default if array.address == 0 else load(element(array, row, rows), 0, default)


@device
def number_of_row(array, rows, here, field, like):
    """The number of a row, or of the row in each lane, from an array of one number per row."""
    lanes, n_chunks = lanes_of(here.zero), count_of_chunks(here.n_cols)
    for lane in range(here.n_rows):
        value = load(element(array, here.row + lane, rows), 0, like)
        store(here.states, (n_chunks * FIELDS + field) * lanes + lane, value)
    return saved(here.states, n_chunks, field, here.zero)
