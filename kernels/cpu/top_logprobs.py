"""The largest log-probabilities of each row, on the CPU.

A row is walked alone, by one thread: its k largest logits so far lie in order where the results go, and a vector of
columns is looked at closer only if one of them is larger than the last of these. Equal logits stay in the order of
their columns. With the sum of the exponentials at hand the logits become log-probabilities, as in log_softmax.py.
"""

import math
from typing import NamedTuple

from gpusoftmax.kernels.cpu.cache import device, kernel
from gpusoftmax.kernels.cpu.call import arguments
from gpusoftmax.kernels.cpu.chunks import sum_of_exponentials
from gpusoftmax.kernels.cpu.rows import chunk_range, count_of_chunks, element, row_offset, save_maxima
from gpusoftmax.kernels.cpu.run import run
from gpusoftmax.kernels.cpu.states import MAX, fold_state, save_state, saved
from gpusoftmax.kernels.cpu.vector import (
    advance,
    lanes_not_below,
    load,
    load_cols,
    load_label,
    log_probability,
    log_sum,
    lowest_bit,
    number,
    pointer_to,
    store,
    stripe_of,
)
from gpusoftmax.kernels.cpu.walk import walk
from gpusoftmax.kernels.operands import Labels, Operand, Place, Rows, scale_of, unless_one


def top_logprobs(
    rows: Rows,
    logits: Operand,
    labels: Labels,
    logprobs: Operand,
    tokens: Labels,
    k: int,
    ignore_index: int,
    temperature: float,
    place: Place,
) -> None:
    """Of each row the k largest log-probabilities and their columns (int64), side by side; where the labels have a
    pointer, those of the label before them.
    """
    scale = unless_one(scale_of(1.0, temperature, logprobs.dtype))
    run(
        top_logprobs_rows, rows, logits, None, None, labels, logprobs, tokens, k, ignore_index, *scale, whole_rows=True
    )  # fmt: skip


class Top(NamedTuple):
    """What the steps need besides the logits."""

    rows: Rows
    labels: Labels
    logprobs: object
    tokens: Labels
    k: int
    ignore_index: int
    scale: object
    scale_low: object


@kernel
def top_logprobs_rows(call):
    way, job, rows, logits, same, none, labels, logprobs, tokens, k, ignore_index, scale, scale_low = arguments(call)
    top = Top(rows, labels, logprobs, tokens, k, ignore_index, scale, scale_low)
    walk(way, job, rows, logits, same, none, prepare, measure, fold, write, top, scale)


@device
def results_of(here, top):
    """Where a row's k values and columns begin."""
    behind = 1 if top.labels.pointer != 0 else 0
    values = advance(element(top.logprobs, here.row, top.rows), behind)
    columns = advance(pointer_to(top.tokens.pointer, here.row), row_offset(top.tokens, here.row, top.rows) + behind)
    return values, columns


# ---------------------------------------------------------------- 1. measure


@device
def prepare(here, first, last, top):
    save_maxima(here, first, last, top)
    values, columns = results_of(here, top)
    for chunk in range(first, last):
        col, count = chunk_range(here, chunk)
        if chunk == 0:
            for j in range(top.k):
                store(values, j, number(top.scale, math.nan))
                columns[j] = -1
        take_largest(here, col, count, values, columns, top)


@device
def take_largest(here, first, count, values, columns, top):
    """The k largest of the columns before and of these; a NaN stands for none yet."""
    step = stripe_of(here.zeros)
    full = first + count - count % step
    for col in range(first, full, step):
        take_from_vector(here, col, load_cols(here.first, col, None, here.nothing), step, values, columns, top)
    left = first + count - full
    if left > 0:
        take_from_vector(here, full, load_cols(here.first, full, left, here.nothing), left, values, columns, top)


@device
def take_from_vector(here, col, vector, count, values, columns, top):
    least = load(values, top.k - 1, top.scale)
    candidates = lanes_not_below(vector, least, count)
    while candidates != 0:
        lane = lowest_bit(candidates)
        candidates &= candidates - 1
        x = load(here.first.pointer, col + lane, top.scale)
        if comes_before(x, load(values, top.k - 1, top.scale)):
            insert(values, columns, x, col + lane, top)


@device
def comes_before(x, other):
    return x > other or other != other


@device
def insert(values, columns, x, col, top):
    j = top.k - 1
    while j > 0 and comes_before(x, load(values, j - 1, top.scale)):
        store(values, j, load(values, j - 1, top.scale))
        columns[j] = columns[j - 1]
        j -= 1
    store(values, j, x)
    columns[j] = col


@device
def measure(here, first, last, top):
    for chunk in range(first, last):
        col, count = chunk_range(here, chunk)
        largest = saved(here.states, chunk, MAX, here.zero)
        sums = sum_of_exponentials(here, False, largest, largest, col, count, top.scale, top.scale_low, False)
        save_state(here.states, chunk, sums)


# ---------------------------------------------------------------- 2. fold, 3. write


@device
def fold(here, top):
    state, _ = fold_state(here.states, count_of_chunks(here.n_cols), here.zero, top.scale, top.scale_low)
    log, _ = log_sum(state)
    return state[0], log, state[2]


@device
def write(here, first, last, summary, top):
    largest, log, tail = summary
    values, columns = results_of(here, top)
    for j in range(top.k):
        store(values, j, log_probability(load(values, j, top.scale), largest, log, top.scale))
        if tail != tail:  # the row holds a NaN
            columns[j] = -1
    if top.labels.pointer != 0:
        label = load_label(top.labels.pointer, row_offset(top.labels, here.row, top.rows), top.labels.code)
        value = number(top.scale, 0.0)
        if label != top.ignore_index and label >= 0 and label < here.n_cols:
            value = log_probability(load(here.first.pointer, label, top.scale), largest, log, top.scale)
        elif label != top.ignore_index:
            value = number(top.scale, math.nan)
        store(values, -1, value)
        advance(columns, -1)[0] = label
