"""Across rows: lanes are rows, in a copy in the cache."""

import math

from gpusoftmax.kernels.cpu.cache import device
from gpusoftmax.kernels.cpu.here import Here, Line, Through
from gpusoftmax.kernels.cpu.job import TICKETS, atomic_add, draw_item
from gpusoftmax.kernels.cpu.memory import (
    advance,
    load,
    load_part,
    load_transposed,
    pointer_to,
    prefetch_to_read,
    prefetch_to_write,
    store,
    store_part,
    store_transposed,
)
from gpusoftmax.kernels.cpu.rows import count_of_chunks, element
from gpusoftmax.kernels.cpu.vector import (
    across,
    along,
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
def fetch_next(array, row, n_rows, rows, for_result, like):
    """Asks for the rows behind these, as many, if they follow in memory: they come while these are computed."""
    if array.col_stride != 1 or array.inner_stride != rows.n_cols:
        return
    line, zeros = Line(element(array, row + n_rows, rows), 1, 0), along(number(like, 0.0))
    for col in range(0, n_rows * rows.n_cols, lanes_of(zeros)):
        if for_result:
            prefetch_to_write(line, col, zeros)
        else:
            prefetch_to_read(line, col, zeros)


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
                fetch_next(second, row, n_rows, rows, False, like)
            fetch_next(first, row, n_rows, rows, False, like)
            if job.has_target:
                fetch_next(target, row, n_rows, rows, True, like)
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
                line,
                Line(pointer_to(copy + job.stage_bytes, like), lanes, 1),
                line,
                line,
                False,
                False,
                Through(None, number(like, 0.0)),
            )
            prepare(here, 0, n_chunks, numbers)
            measure(here, 0, n_chunks, numbers)
            write(here, 0, n_chunks, fold(here, numbers), numbers)
            if job.has_target:
                copy_out(target, row, n_rows, rows, copy, like)
        item, share = draw_item(counters, n_items, job.n_threads, ticket, share)
