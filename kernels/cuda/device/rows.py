"""Which thread holds which column, and how a chunk of a row gets into and out of its registers.

A chunk is threads x COLS_PER_THREAD columns. Thread t holds `width` neighbouring columns (16 bytes of the input's
format) of each of the chunk's COLS_PER_THREAD / width slices:

    slice 0                                    slice 1
    t=0          t=1          ...  t=T-1       t=0          ...
    0 .. w-1     w .. 2w-1         .. Tw-1     Tw .. Tw+w-1

The map depends on n_cols and the format alone. Whether a row happens to be contiguous and 16-byte aligned only decides
if a slice is moved by one access or column by column: a row has the same bits wherever it lies.
"""

from typing import NamedTuple

from gpusoftmax.kernels.cuda.device._cuda import cuda, device
from gpusoftmax.kernels.cuda.device.arithmetic import add, number
from gpusoftmax.kernels.cuda.device.memory import (
    advance,
    is_vector_aligned,
    load,
    load_vector,
    store,
    store_vector,
    vector_width,
)
from gpusoftmax.kernels.cuda.plan import COLS_PER_THREAD


class Strided(NamedTuple):
    """An Operand as a kernel gets it. The pointer's type names the storage format."""

    pointer: object
    outer_stride: int
    inner_stride: int
    col_stride: int


class Row(NamedTuple):
    """One row of an array: column c lies at pointer[c * stride]; `vectorised`: 16-byte accesses are allowed."""

    pointer: object
    stride: int
    vectorised: bool


@device
def row_offset(array, row, rows):
    """Where a row starts, in elements. `array` has the strides of an Operand or of Labels."""
    outer = row // rows.n_inner
    return outer * array.outer_stride + (row - outer * rows.n_inner) * array.inner_stride


@device
def row_of(array, row, rows, width):
    """A row whose columns are dealt out in pieces of `width`. The same for all threads of a block."""
    pointer = advance(array.pointer, row_offset(array, row, rows))
    vectorised = array.col_stride == 1 and vector_width(pointer) == width and is_vector_aligned(pointer)
    return Row(pointer, array.col_stride, vectorised)


@device
def column(first, slice, width):
    """The first column of this thread's part of a slice of the chunk that starts at `first`."""
    return first + (slice * cuda.blockDim.x + cuda.threadIdx.x) * width


@device
def load_chunk(held, row, first, n_cols, width, padding):
    """held = this thread's columns of the chunk that starts at `first`; `padding` beyond the end of the row."""
    for slice in range(COLS_PER_THREAD // width):
        col = column(first, slice, width)
        k = slice * width
        if row.vectorised and col + width <= n_cols:
            load_vector(row.pointer, col, held, k)
        else:
            for i in range(width):
                held[k + i] = load(row.pointer, (col + i) * row.stride, padding) if col + i < n_cols else padding


@device
def store_chunk(row, held, first, n_cols, width):
    """The columns of the chunk that lie inside the row, from registers to memory."""
    for slice in range(COLS_PER_THREAD // width):
        col = column(first, slice, width)
        k = slice * width
        if row.vectorised and col + width <= n_cols:
            store_vector(row.pointer, col, held, k)
        else:
            for i in range(width):
                if col + i < n_cols:
                    store(row.pointer, (col + i) * row.stride, held[k + i])


@device
def thread_sum(values, like):
    """The sum of a thread's COLS_PER_THREAD values as a balanced tree over groups of four."""
    total = number(like, 0.0)
    for k in range(0, COLS_PER_THREAD, 8):
        low = add(add(values[k], values[k + 1]), add(values[k + 2], values[k + 3]))
        high = add(add(values[k + 4], values[k + 5]), add(values[k + 6], values[k + 7]))
        total = add(total, add(low, high))
    return total
