"""How a kernel gets from rows of an array to chunks, along rows or across them.

    along rows     lanes are columns; one row at a time, or parts of one row on several threads
    across rows    lanes are rows, in a copy in the cache: for short rows, which would not fill a vector, and for
                   reductions over an axis that is not the last, where neighbouring rows are neighbours in memory

Every op is three steps, on whatever chunks they are given:

    1. measure   every chunk by itself: its maximum, its sums relative to its own anchor
    2. fold      the states of the chunks, in order, into what the row needs to know
    3. write     every chunk by itself

The chunks of a row and the order of its sums depend on n_cols and the computation format alone (chunks.py). A row has
the same bits in any batch and layout, on any threads, whole or in parts, along or across.
"""

import math
from typing import NamedTuple

import numpy as np
from numba import types
from numba.extending import intrinsic, overload

from gpusoftmax.kernels.cpu.cache import HELPER_OPTIONS, device
from gpusoftmax.kernels.cpu.chunks import CHUNK_COLS, Line
from gpusoftmax.kernels.cpu.job import (
    LINE,
    MEASURED,
    MEASURING,
    NEXT,
    PER_ROW,
    TICKETS,
    WRITING,
    atomic_add,
    draw_item,
    draw_part,
    wait_until_at_least,
)
from gpusoftmax.kernels.cpu.states import FIELDS
from gpusoftmax.kernels.cpu.vector import (
    across,
    advance,
    along,
    as_numbers,
    lanes_of,
    load,
    load_part,
    load_transposed,
    number,
    pointer_to,
    square_of,
    store,
    store_part,
    store_transposed,
)


class Strided(NamedTuple):
    """An Operand as a kernel gets it. The type of `tag`, a scalar, names the storage format."""

    address: int
    outer_stride: int
    inner_stride: int
    col_stride: int
    tag: np.generic


class Here(NamedTuple):
    """The row, or the n_rows neighbouring rows from `row` on, at which a step is working."""

    row: int
    n_rows: int
    n_cols: int
    states: object  # pointer to the states of the chunks
    partials: object  # across rows: memory for two vectors for every lane of a stripe, see chunks.sum_chunk
    zeros: object  # a vector along or across rows, 0 in every lane,
    nothing: object  # and one of -inf: logits that are not there
    zero: object  # 0 as a number of the row: a number along rows, a vector across
    first: object  # Line of the array that is read,
    second: object  # of another one beside it,
    target: object  # of the result,
    home: object  # and of where exponentials stay until they are written
    streamed: bool  # the result is written past the caches


@intrinsic
def row_offset(typingctx, array, row, rows):
    """Where a row starts, in elements. `array` has the strides of an Operand or of Labels."""

    def codegen(context, builder, signature, args):
        array, row, rows = args
        outer_stride, inner_stride = (builder.extract_value(array, k) for k in (1, 2))
        # There is at least one row wherever this is asked; an unsigned division is the cheaper one.
        n_inner = builder.extract_value(rows, 1)
        outer = builder.udiv(row, n_inner)
        inner = builder.sub(row, builder.mul(outer, n_inner))
        return builder.add(builder.mul(outer, outer_stride), builder.mul(inner, inner_stride))

    return types.int64(array, types.int64, rows), codegen


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
def store_per_row(array, rows, here, values, like):
    """Writes the number of a row, or of the row in each lane, to an array of one number per row."""
    lanes = lanes_of(here.zero)
    place = count_of_chunks(here.n_cols) * FIELDS * lanes
    store(here.states, place, values)
    for lane in range(here.n_rows):
        store(element(array, here.row + lane, rows), 0, load(here.states, place + lane, like))


# ---------------------------------------------------------------- along rows


@device
def line_of(array, row, rows, buffer, is_read):
    """The Line of a row: in place where its columns are neighbours, else in the buffer, copied there if it is read."""
    source = element(array, row, rows)
    if array.col_stride == 1:
        return Line(source, 1)
    copy = pointer_to(buffer, array.tag)
    if is_read:
        for col in range(rows.n_cols):
            copy[col] = source[col * array.col_stride]
    return Line(copy, 1)


@device
def place_of(row, slot, job, rows, first, second, target, like):
    """Where a row is at work; its slot is the address of its scratch memory."""
    stage = slot + job.stage
    zero = number(like, 0.0)
    result = line_of(target, row, rows, stage, False)
    home = pointer_to(slot + job.scratch, like) if job.scratch != 0 else as_numbers(result.pointer, like)
    return Here(
        row,
        1,
        rows.n_cols,
        pointer_to(slot, like),
        None,
        along(zero),
        along(number(like, -math.inf)),
        zero,
        line_of(first, row, rows, stage + job.stage_bytes, True),
        line_of(second, row, rows, stage + 2 * job.stage_bytes, job.has_second != 0),
        result,
        Line(home, 1),
        job.streamed != 0,
    )


@device
def along_rows(job, rows, first, second, target, measure, fold, write, numbers, like):
    """Rows one by one, from several threads, or the parts of one row after the other."""
    n_chunks = count_of_chunks(rows.n_cols)
    counters = pointer_to(job.counters, job.counters)
    ticket = atomic_add(counters, TICKETS, 1)
    split = job.parts > 1
    n_items = (rows.n_rows + job.rows_per_item - 1) // job.rows_per_item
    folded = -1
    share, row, step = 0, 0, 0
    while True:
        first_chunk, last_chunk = 0, n_chunks
        if split:
            # All parts of a row are measured, then all are written; then the next row.
            word = NEXT + job.n_threads * LINE + row * PER_ROW
            part = draw_part(counters, word + step, job.parts, ticket, job.n_threads)
            if part == job.parts:
                row, step = (row + 1, MEASURING) if step == WRITING else (row, WRITING)
                if row == rows.n_rows:
                    break
                continue
            first_chunk, last_chunk = n_chunks * part // job.parts, n_chunks * (part + 1) // job.parts
            first_row, last_row = row, row + 1
            if step == WRITING:
                wait_until_at_least(counters, word + MEASURED, job.parts)
        else:
            item, share = draw_item(counters, n_items, job.n_threads, ticket, share)
            if share == job.n_threads:
                break
            first_row, last_row = item * job.rows_per_item, min(rows.n_rows, (item + 1) * job.rows_per_item)
        for this_row in range(first_row, last_row):
            slot = job.workspace + (this_row if split else ticket) * job.slot_bytes
            here = place_of(this_row, slot, job, rows, first, second, target, like)
            if not split or step == MEASURING:
                measure(here, first_chunk, last_chunk, numbers)
            if not split or step == WRITING:
                if this_row != folded:
                    summary = fold(here, numbers)
                    folded = this_row
                write(here, first_chunk, last_chunk, summary, numbers)
                if job.has_target and target.col_stride != 1:
                    to = element(target, this_row, rows)
                    for col in range(rows.n_cols):
                        to[col * target.col_stride] = here.target.pointer[col]
        if split and step == MEASURING:
            atomic_add(counters, word + MEASURED, 1)


# ---------------------------------------------------------------- across rows


@device
def copy_in(array, row, n_rows, rows, buffer, like):
    """Copies n_rows rows to the buffer, column by column with the rows as lanes, in the computation format."""
    lanes = lanes_of(across(like))
    zeros = across(number(like, 0.0))
    source = element(array, row, rows)
    copy = pointer_to(buffer, like)
    neighbours = row // rows.n_inner == (row + n_rows - 1) // rows.n_inner
    if neighbours and array.inner_stride == 1 and n_rows == lanes:
        for col in range(rows.n_cols):
            store(copy, col * lanes, load(source, col * array.col_stride, zeros))
    elif neighbours and array.inner_stride == 1:
        for col in range(rows.n_cols):
            store(copy, col * lanes, load_part(source, col * array.col_stride, n_rows, zeros))
    elif neighbours and array.col_stride == 1:
        side = square_of(like)
        for above in range(0, n_rows, side):
            corner = advance(source, above * array.inner_stride)
            height = min(side, n_rows - above)
            for col in range(0, rows.n_cols, side):
                square = advance(copy, col * lanes + above)
                width = min(side, rows.n_cols - col)
                load_transposed(advance(corner, col), array.inner_stride, height, width, square, lanes)
    else:
        for lane in range(n_rows):
            source = element(array, row + lane, rows)
            for col in range(rows.n_cols):
                store(copy, col * lanes + lane, load(source, col * array.col_stride, like))


@device
def copy_out(array, row, n_rows, rows, buffer, like):
    """What copy_in does, the other way round."""
    lanes = lanes_of(across(like))
    zeros = across(number(like, 0.0))
    target = element(array, row, rows)
    copy = pointer_to(buffer, like)
    neighbours = row // rows.n_inner == (row + n_rows - 1) // rows.n_inner
    if neighbours and array.inner_stride == 1 and n_rows == lanes:
        for col in range(rows.n_cols):
            store(target, col * array.col_stride, load(copy, col * lanes, zeros))
    elif neighbours and array.inner_stride == 1:
        for col in range(rows.n_cols):
            store_part(target, col * array.col_stride, load(copy, col * lanes, zeros), n_rows)
    elif neighbours and array.col_stride == 1:
        side = square_of(like)
        for above in range(0, n_rows, side):
            corner = advance(target, above * array.inner_stride)
            height = min(side, n_rows - above)
            for col in range(0, rows.n_cols, side):
                square = advance(copy, col * lanes + above)
                width = min(side, rows.n_cols - col)
                store_transposed(square, lanes, advance(corner, col), array.inner_stride, height, width)
    else:
        for lane in range(n_rows):
            target = element(array, row + lane, rows)
            for col in range(rows.n_cols):
                store(target, col * array.col_stride, load(copy, col * lanes + lane, like))


@device
def across_rows(job, rows, first, second, target, measure, fold, write, numbers, like):
    """Blocks of rows, by way of copies in the cache; the result takes the place of the first array there."""
    zero = across(number(like, 0.0))
    lanes = lanes_of(zero)
    n_chunks = count_of_chunks(rows.n_cols)
    # A block does not run on into the next outer index if there are neighbours enough to fill it.
    n_neighbours = rows.n_inner if rows.n_inner >= lanes else rows.n_rows
    per_outer = (n_neighbours + lanes - 1) // lanes
    n_blocks = rows.n_rows // n_neighbours * per_outer
    n_items = (n_blocks + job.rows_per_item - 1) // job.rows_per_item
    counters = pointer_to(job.counters, job.counters)
    ticket = atomic_add(counters, TICKETS, 1)
    slot = job.workspace + ticket * job.slot_bytes
    copy = slot + job.stage
    item, share = draw_item(counters, n_items, job.n_threads, ticket, 0)
    while share < job.n_threads:
        for block in range(item * job.rows_per_item, min(n_blocks, (item + 1) * job.rows_per_item)):
            outer = block // per_outer
            inner = (block - outer * per_outer) * lanes
            row = outer * n_neighbours + inner
            n_rows = min(lanes, n_neighbours - inner)
            copy_in(first, row, n_rows, rows, copy, like)
            if job.has_second:
                copy_in(second, row, n_rows, rows, copy + job.stage_bytes, like)
            line = Line(pointer_to(copy, like), lanes)
            here = Here(
                row,
                n_rows,
                rows.n_cols,
                pointer_to(slot, like),
                pointer_to(slot + job.partials, like),
                zero,
                across(number(like, -math.inf)),
                zero,
                line,
                Line(pointer_to(copy + job.stage_bytes, like), lanes),
                line,
                line,
                False,
            )
            measure(here, 0, n_chunks, numbers)
            write(here, 0, n_chunks, fold(here, numbers), numbers)
            if job.has_target:
                copy_out(target, row, n_rows, rows, copy, like)
        item, share = draw_item(counters, n_items, job.n_threads, ticket, share)


def walk(is_across, job, rows, first, second, target, measure, fold, write, numbers, like):
    """Runs the three steps over this thread's share of the rows, along (is_across: None) or across them (1).

    measure(here, first, last, numbers), fold(here, numbers) -> summary, write(here, first, last, summary, numbers):
    `first` and `last` are chunks, `numbers` what else the op's functions need. An op that reads one array gives it as
    `second` too, one whose result is a number per row also as `target`.
    """
    raise NotImplementedError("called from kernels only")


@overload(walk, jit_options=HELPER_OPTIONS)
def _walk(is_across, job, rows, first, second, target, measure, fold, write, numbers, like):
    chosen = along_rows if isinstance(is_across, types.NoneType) else across_rows

    def walk_chosen(is_across, job, rows, first, second, target, measure, fold, write, numbers, like):
        chosen(job, rows, first, second, target, measure, fold, write, numbers, like)

    return walk_chosen
