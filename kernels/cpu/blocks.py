"""Blocks of rows: lanes are columns, but the numbers of a row have their lane beside those of other rows.

What a row of a few hundred columns takes is not its columns but its numbers: the logarithm and the divisions that its
sums go through, one after the other, and the folding of its vectors into sums. Here a vector of rows goes through them
at once, as across rows, and no row waits for another one's numbers (chunks.py).
"""

import math

from gpusoftmax.kernels.cpu.cache import device
from gpusoftmax.kernels.cpu.here import Here, Line, Through
from gpusoftmax.kernels.cpu.job import TICKETS, atomic_add, draw_item
from gpusoftmax.kernels.cpu.memory import (
    as_numbers,
    pointer_to,
)
from gpusoftmax.kernels.cpu.rows import ahead_of, count_of_chunks, element
from gpusoftmax.kernels.cpu.vector import (
    across,
    along_in,
    number,
)


@device
def block_at(way, row, n_rows, slot, job, rows, first, second, target, like):
    """Rows from `row` on, neighbours in all arrays, as a step sees them."""
    result = Line(element(target, row, rows), 1, target.inner_stride)
    home = Line(as_numbers(result.pointer, like), 1, result.row_step)
    if job.scratch != 0:  # exponentials do not stay where the result goes
        home = Line(pointer_to(slot + job.scratch, like), 1, job.scratch_cols)
    logits = Line(element(first, row, rows), 1, first.inner_stride)
    other = Line(element(second, row, rows), 1, second.inner_stride)
    return Here(
        row,
        n_rows,
        rows.n_cols,
        pointer_to(slot, like),
        pointer_to(slot + job.partials, like),
        pointer_to(slot + job.stage, like),
        along_in(way, number(like, 0.0)),
        along_in(way, number(like, -math.inf)),
        across(number(like, 0.0)),
        logits,
        other,
        result,
        home,
        ahead_of(logits, other, result, rows.n_cols),
        job.streamed != 0,
        job.streamed == 0 and job.has_target != 0,
        Through(None, number(like, 0.0)),
    )


@device
def rows_in_blocks(way, job, rows, first, second, target, prepare, measure, fold, write, numbers, like):
    n_chunks = count_of_chunks(rows.n_cols)
    per_outer = (rows.n_inner + job.height - 1) // job.height
    n_blocks = rows.n_rows // rows.n_inner * per_outer
    n_items = (n_blocks + job.rows_per_item - 1) // job.rows_per_item
    counters = pointer_to(job.counters, job.counters)
    ticket = atomic_add(counters, TICKETS, 1)
    slot = job.workspace + ticket * job.slot_bytes
    item, share = draw_item(counters, n_items, job.n_threads, ticket, 0)
    while share < job.n_threads:
        for block in range(item * job.rows_per_item, min(n_blocks, (item + 1) * job.rows_per_item)):
            outer = block // per_outer
            inner = (block - outer * per_outer) * job.height
            row, n_rows = outer * rows.n_inner + inner, min(job.height, rows.n_inner - inner)
            here = block_at(way, row, n_rows, slot, job, rows, first, second, target, like)
            prepare(here, 0, n_chunks, numbers)
            measure(here, 0, n_chunks, numbers)
            write(here, 0, n_chunks, fold(here, numbers), numbers)
        item, share = draw_item(counters, n_items, job.n_threads, ticket, share)
