"""The first of the largest logits of a row, on the CPU.

A NaN leads every number and the first NaN every other one, as in NumPy. Places are counted inside a chunk, and the
chunks by themselves: both are numbers that float32 holds exactly, so that vectors of the computation format carry them.
"""

from gpusoftmax.kernels.cpu.arithmetic import (
    add,
    leading,
)
from gpusoftmax.kernels.cpu.cache import device, kernel
from gpusoftmax.kernels.cpu.call import arguments
from gpusoftmax.kernels.cpu.chunks import CHUNK_COLS
from gpusoftmax.kernels.cpu.lanes import (
    leading_per_row,
)
from gpusoftmax.kernels.cpu.memory import (
    load,
    load_cols,
    pointer_to,
    prefetch_to_read,
    store,
)
from gpusoftmax.kernels.cpu.rows import chunk_range, count_of_chunks, nothing_first, row_offset
from gpusoftmax.kernels.cpu.run import run
from gpusoftmax.kernels.cpu.states import FIELDS, MAX, OWN, save, saved
from gpusoftmax.kernels.cpu.vector import (
    cols_of,
    column_numbers,
    is_across,
    lanes_of,
    number,
    widest,
)
from gpusoftmax.kernels.cpu.walk import walk
from gpusoftmax.kernels.operands import STORAGE, Labels, Operand, Place, Rows, compute_dtype

PLACE = OWN  # of the maximum, in its chunk


def argmax(rows: Rows, logits: Operand, indices: Labels, place: Place) -> None:
    """indices, which are int64, = the column of the first maximum of each row."""
    run(argmax_rows, rows, logits, None, None, indices, STORAGE[compute_dtype(logits.dtype)](0), in_blocks=False)


@kernel
def argmax_rows(call):
    way, job, rows, logits, same, none, indices, like = arguments(call)
    walk(way, job, rows, logits, same, none, nothing_first, measure, fold, write, (rows, indices, like), like)


@device
def measure(here, first, last, numbers):
    for chunk in range(first, last):
        col, count = chunk_range(here, chunk)
        best, place = first_maximum(here, col, count, numbers[2])
        save(here.states, chunk, MAX, best)
        save(here.states, chunk, PLACE, place)


@device
def first_maximum(here, first, count, like):
    """(maximum, place) of `count` columns: numbers along a row, vectors across rows."""
    nothing = widest(here.nothing)
    cols = cols_of(nothing)
    best, place = nothing, column_numbers(nothing)  # a row of -inf only: place 0
    at, step = place, number(like, cols)
    full = count - count % cols
    for col in range(first, first + full, cols):
        if is_across(here.zeros):  # along rows it costs time
            prefetch_to_read(here.ahead.first, col, here.zeros)
        best, place = leading(best, place, load_cols(here.first, col, None, nothing), at)
        at = add(at, step)
    if full < count:
        best, place = leading(best, place, load_cols(here.first, first + full, count - full, nothing), at)
    return leading_per_row(best, place)


@device
def fold(here, numbers):
    """(chunk, place) of the maximum of the row."""
    best, place = saved(here.states, 0, MAX, here.zero), saved(here.states, 0, PLACE, here.zero)
    chunk = here.zero
    for k in range(1, count_of_chunks(here.n_cols)):
        x = saved(here.states, k, MAX, here.zero)
        _, place = leading(best, place, x, saved(here.states, k, PLACE, here.zero))
        best, chunk = leading(best, chunk, x, add(here.zero, number(numbers[2], k)))
    return chunk, place


@device
def write(here, first, last, summary, numbers):
    if first != 0:
        return
    rows, indices, like = numbers
    chunk, place = summary
    lanes = lanes_of(here.zero)
    kept = count_of_chunks(here.n_cols) * FIELDS * lanes
    store(here.states, kept, chunk)
    store(here.states, kept + lanes, place)
    target = pointer_to(indices.pointer, indices.pointer)
    for lane in range(here.n_rows):
        before, within = load(here.states, kept + lane, like), load(here.states, kept + lanes + lane, like)
        target[row_offset(indices, here.row + lane, rows)] = int(before) * CHUNK_COLS + int(within)
