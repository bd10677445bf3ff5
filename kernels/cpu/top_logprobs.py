"""The largest log-probabilities of each row, on the CPU.

A row is walked alone, by one thread, and its k largest logits are kept where the results go (largest.py). With the sum
of the exponentials at hand they become log-probabilities, as in log_softmax.py.
"""

import math
from typing import NamedTuple

from gpusoftmax.kernels.cpu.arithmetic import (
    log_probability,
    log_sum,
)
from gpusoftmax.kernels.cpu.cache import device, kernel
from gpusoftmax.kernels.cpu.call import arguments
from gpusoftmax.kernels.cpu.chunks import sum_of_exponentials
from gpusoftmax.kernels.cpu.largest import find_largest
from gpusoftmax.kernels.cpu.memory import (
    advance,
    load,
    load_label,
    pointer_to,
    store,
)
from gpusoftmax.kernels.cpu.rows import chunk_range, count_of_chunks, element, row_offset, save_maxima
from gpusoftmax.kernels.cpu.run import run
from gpusoftmax.kernels.cpu.states import MAX, fold_state, save_state, saved
from gpusoftmax.kernels.cpu.vector import (
    number,
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
        find_largest(here, col, count, values, columns, top.k, top.scale)


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
