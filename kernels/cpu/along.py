"""Along rows: lanes are columns. One row at a time, or parts of one row on several threads."""

import math

from gpusoftmax.kernels.cpu.cache import device
from gpusoftmax.kernels.cpu.here import Ahead, Here, Line, where_given
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
from gpusoftmax.kernels.cpu.memory import (
    as_numbers,
    pointer_to,
)
from gpusoftmax.kernels.cpu.rows import ahead_of, count_of_chunks, element
from gpusoftmax.kernels.cpu.transform import through_of, transformed_line
from gpusoftmax.kernels.cpu.vector import (
    along,
    number,
)


@device
def line_of(array, row, rows, buffer, is_read):
    """The Line of a row: in place where its columns are neighbours, else in the buffer, copied there if it is read."""
    source = element(array, row, rows)
    if array.col_stride == 1:
        return Line(source, 1, 0)
    copy = pointer_to(buffer, array.tag)
    if is_read:
        for col in range(rows.n_cols):
            copy[col] = source[col * array.col_stride]
    return Line(copy, 1, 0)


def _transformed_logits(array, transform, row, rows, buffer, like):
    return transformed_line(array, transform, row, rows, buffer, like)


def _logits_as_they_are(array, transform, row, rows, buffer, like):
    return line_of(array, row, rows, buffer, True)


# The Line of the array that is read first; transformed, a row lies in the buffer.
line_of_logits = where_given("transform", _transformed_logits, _logits_as_they_are)


def _next_row(ahead, array, transform, row, rows):
    return Ahead(Line(element(array, min(row + 1, rows.n_rows - 1), rows), 1, 0), ahead.second, ahead.target)


def _same_row(ahead, array, transform, row, rows):
    return ahead


# What is transformed has been read, to the end of the row.
ahead_of_logits = where_given("transform", _next_row, _same_row)


@device
def place_of(row, slot, job, rows, first, second, target, like):
    """Where a row is at work; its slot is the address of its scratch memory."""
    zero = number(like, 0.0)
    result = line_of(target, row, rows, slot + job.target_copy, False)
    logits = line_of_logits(first, first.transform, row, rows, slot + job.first_copy, like)
    other = line_of(second, row, rows, slot + job.second_copy, job.has_second != 0)
    home = pointer_to(slot + job.scratch, like) if job.scratch != 0 else as_numbers(result.pointer, like)
    return Here(
        row,
        1,
        rows.n_cols,
        pointer_to(slot, like),
        None,
        None,
        along(zero),
        along(number(like, -math.inf)),
        zero,
        logits,
        other,
        result,
        Line(home, 1, 0),
        ahead_of_logits(ahead_of(logits, other, result, rows.n_cols), first, first.transform, row, rows),
        job.streamed != 0,
        job.streamed == 0 and job.has_target != 0,
        through_of(first.transform, row, rows, like),
    )


@device
def along_rows(way, job, rows, first, second, target, prepare, measure, fold, write, numbers, like):
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
                for chunk in range(first_chunk, last_chunk):
                    prepare(here, chunk, chunk + 1, numbers)
                    measure(here, chunk, chunk + 1, numbers)
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
