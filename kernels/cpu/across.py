"""Across rows: lanes are rows, in a copy in the cache."""

import math

from gpusoftmax.kernels.cpu.cache import device
from gpusoftmax.kernels.cpu.here import Ahead, Here, Line, Through
from gpusoftmax.kernels.cpu.job import TICKETS, atomic_add, draw_item
from gpusoftmax.kernels.cpu.memory import (
    advance,
    load,
    load_part,
    load_transposed,
    pointer_to,
    store,
    store_part,
    store_transposed,
    stream_cols,
)
from gpusoftmax.kernels.cpu.rows import count_of_chunks, element
from gpusoftmax.kernels.cpu.vector import (
    across,
    lanes_of,
    number,
    square_of,
)


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
def copy_out(array, row, n_rows, rows, buffer, streamed, like):
    """What copy_in does, the other way round; streamed: past the caches, which only full columns can be."""
    lanes = lanes_of(across(like))
    zeros = across(number(like, 0.0))
    target = element(array, row, rows)
    copy = pointer_to(buffer, like)
    neighbours = row // rows.n_inner == (row + n_rows - 1) // rows.n_inner
    if streamed and neighbours and n_rows == lanes:
        for col in range(rows.n_cols):
            stream_cols(Line(target, 1, 0), col * array.col_stride, load(copy, col * lanes, zeros))
    elif neighbours and array.inner_stride == 1 and n_rows == lanes:
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
def lines_behind(array, row, n_rows, rows):
    """The n_rows rows behind these, a column's share of them for each column, see Here.ahead; if they are neighbours
    in memory.
    """
    if array.inner_stride == 1:
        return Line(advance(element(array, row, rows), n_rows), array.col_stride, 0)
    if array.col_stride == 1 and array.inner_stride == rows.n_cols:
        return Line(element(array, row + n_rows, rows), n_rows, 0)
    return Line(element(array, row, rows), 0, 0)


@device
def across_rows(way, job, rows, first, second, target, prepare, measure, fold, write, numbers, like):
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
    copy, second_copy = slot + job.first_copy, slot + job.second_copy
    item, share = draw_item(counters, n_items, job.n_threads, ticket, 0)
    while share < job.n_threads:
        for block in range(item * job.rows_per_item, min(n_blocks, (item + 1) * job.rows_per_item)):
            outer = block // per_outer
            inner = (block - outer * per_outer) * lanes
            row = outer * n_neighbours + inner
            n_rows = min(lanes, n_neighbours - inner)
            copy_in(first, row, n_rows, rows, copy, like)
            if job.has_second:
                copy_in(second, row, n_rows, rows, second_copy, like)
            line = Line(pointer_to(copy, like), lanes, 1)
            here = Here(
                row,
                n_rows,
                rows.n_cols,
                pointer_to(slot, like),
                pointer_to(slot + job.partials, like),
                None,
                zero,
                across(number(like, -math.inf)),
                zero,
                line,
                Line(pointer_to(second_copy, like), lanes, 1),
                line,
                line,
                Ahead(
                    lines_behind(first, row, n_rows, rows),
                    lines_behind(second, row, n_rows, rows),
                    lines_behind(target, row, n_rows, rows),
                ),
                False,
                job.streamed == 0 and job.has_target != 0,
                Through(None, number(like, 0.0)),
            )
            prepare(here, 0, n_chunks, numbers)
            measure(here, 0, n_chunks, numbers)
            write(here, 0, n_chunks, fold(here, numbers), numbers)
            if job.has_target:
                copy_out(target, row, n_rows, rows, copy, job.streamed != 0, like)
        item, share = draw_item(counters, n_items, job.n_threads, ticket, share)
