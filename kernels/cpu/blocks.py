"""Blocks of rows: measured and written along rows, one by one, but folded across them, a row in each lane.

What a row of a few hundred columns takes is not its columns but its numbers: the logarithm and the divisions that its
sums go through, one after the other. Here a vector of rows goes through them at once.

    states of rows            FIELDS numbers of a row side by side, as along rows
    transposed                a vector of rows for each field, as across rows: fold(), and lane by lane back again
"""

import math

from gpusoftmax.kernels.cpu.cache import device
from gpusoftmax.kernels.cpu.chunks import Line
from gpusoftmax.kernels.cpu.job import TICKETS, atomic_add, draw_item
from gpusoftmax.kernels.cpu.rows import Here, element
from gpusoftmax.kernels.cpu.states import FIELDS, MEASURED_FIELDS
from gpusoftmax.kernels.cpu.vector import (
    across,
    advance,
    along,
    as_numbers,
    lanes_of,
    load_transposed,
    number,
    pointer_to,
    save_lanes,
    saved_lane,
    square_of,
)

RECORD = 2 * FIELDS  # of a row: its one chunk, and what an op keeps of the row


@device
def row_at(row, k, slot, job, rows, first, second, target, like):
    """A row, number k of its block, as a step sees it."""
    zero = number(like, 0.0)
    result = Line(element(target, row, rows), 1)
    kept = as_numbers(result.pointer, like)
    if job.scratch != 0:  # exponentials do not stay where the result goes
        kept = pointer_to(slot + job.scratch + k * job.scratch_bytes, like)
    return Here(
        row,
        1,
        rows.n_cols,
        advance(pointer_to(slot + job.partials, like), k * RECORD),
        None,
        along(zero),
        along(number(like, -math.inf)),
        zero,
        Line(element(first, row, rows), 1),
        Line(element(second, row, rows), 1),
        result,
        Line(kept, 1),
        job.streamed != 0,
    )


@device
def transpose(states, block, count, like):
    """block[field * lanes + row] = states[row * RECORD + field]"""
    side = square_of(like)
    lanes = lanes_of(across(like))
    for row in range(0, count, side):
        for field in range(0, MEASURED_FIELDS, side):
            source = advance(states, row * RECORD + field)
            square = advance(block, field * lanes + row)
            load_transposed(source, RECORD, min(side, count - row), min(side, MEASURED_FIELDS - field), square, lanes)


@device
def rows_in_blocks(job, rows, first, second, target, prepare, measure, fold, write, numbers, like):
    zero = across(number(like, 0.0))
    nothing = across(number(like, -math.inf))
    n_items = (rows.n_rows + job.rows_per_item - 1) // job.rows_per_item
    counters = pointer_to(job.counters, job.counters)
    ticket = atomic_add(counters, TICKETS, 1)
    slot = job.workspace + ticket * job.slot_bytes
    block = pointer_to(slot, like)
    states, summaries = pointer_to(slot + job.partials, like), pointer_to(slot + job.stage, like)
    item, share = draw_item(counters, n_items, job.n_threads, ticket, 0)
    while share < job.n_threads:
        last = min(rows.n_rows, (item + 1) * job.rows_per_item)
        for start in range(item * job.rows_per_item, last, job.height):
            count = min(job.height, last - start)
            for k in range(count):
                prepare(row_at(start + k, k, slot, job, rows, first, second, target, like), 0, 1, numbers)
            for k in range(count):
                measure(row_at(start + k, k, slot, job, rows, first, second, target, like), 0, 1, numbers)
            transpose(states, block, count, like)
            here = row_at(start, 0, slot, job, rows, first, second, target, like)
            lines = here.first, here.second, here.target, here.home
            together = Here(start, count, rows.n_cols, block, None, zero, nothing, zero, *lines, False)
            summary = fold(together, numbers)
            save_lanes(summaries, summary)
            for k in range(count):
                here = row_at(start + k, k, slot, job, rows, first, second, target, like)
                write(here, 0, 1, saved_lane(summaries, k, summary), numbers)
        item, share = draw_item(counters, n_items, job.n_threads, ticket, share)
