"""Log-sum-exp in parts, on the CPU: the states of chunks, whoever measures them, and the rows that they make up.

A state is four numbers (max, sum, low, ties) of the chunk's logits x_c: `ties` of them are known to equal the maximum,
and sum + low is the sum of exp(x_c / T) over the others, relative to the anchor of the maximum (formulas.anchor). They
are what logsumexp.py knows of a chunk, and folded in the same way: a row has the same bits in parts.
"""

import math

import numpy as np

from gpusoftmax.kernels.cpu.arithmetic import (
    logsumexp as logsumexp_of_state,
)
from gpusoftmax.kernels.cpu.cache import device, kernel
from gpusoftmax.kernels.cpu.call import arguments
from gpusoftmax.kernels.cpu.chunks import CHUNK_COLS, sum_of_exponentials
from gpusoftmax.kernels.cpu.memory import (
    load,
)
from gpusoftmax.kernels.cpu.rows import count_of_chunks, nothing_first, save_maxima, store_per_row
from gpusoftmax.kernels.cpu.run import run
from gpusoftmax.kernels.cpu.states import LOW, MAX, SUM, TIES, fold_state, save, save_state, saved
from gpusoftmax.kernels.cpu.vector import (
    number,
)
from gpusoftmax.kernels.cpu.walk import walk
from gpusoftmax.kernels.operands import STATE_COLS, STATE_NUMBERS, Operand, Place, Rows, scale_of, unless_one

assert CHUNK_COLS == STATE_COLS, "a state is that of a chunk"


def measure(rows: Rows, logits: Operand, states: Operand, temperature: float, place: Place) -> None:
    """states[row, :4] = the state of a row of at most STATE_COLS columns."""
    size = np.dtype(states.dtype).itemsize
    numbers = [states._replace(pointer=states.pointer + field * size) for field in range(STATE_NUMBERS)]
    run(measure_rows, rows, logits, None, None, *numbers, *unless_one(scale_of(1.0, temperature, states.dtype)))


def fold(rows: Rows, states: Operand, lse: Operand, temperature: float, place: Place) -> None:
    """lse[row] = log-sum-exp of the chunks whose states are the columns of states[row], four for each."""
    rows = rows._replace(n_cols=rows.n_cols // STATE_NUMBERS * CHUNK_COLS)  # those of the logits
    scale = unless_one(scale_of(1.0, temperature, states.dtype))
    run(fold_rows, rows, states, None, None, lse, *scale, only_along=True)


# ---------------------------------------------------------------- a chunk for each row


@kernel
def measure_rows(call):
    way, job, rows, logits, same, none, largest, total, low, ties, scale, scale_low = arguments(call)
    numbers = rows, (largest, total, low, ties), scale, scale_low
    walk(way, job, rows, logits, same, none, save_maxima, measure_chunk, state_of_chunk, write_state, numbers, scale)


@device
def measure_chunk(here, first, last, numbers):
    _, _, scale, scale_low = numbers
    largest = saved(here.states, 0, MAX, here.zero)
    sums = sum_of_exponentials(here, False, largest, largest, 0, here.n_cols, scale, scale_low, False)
    save_state(here.states, 0, sums)


@device
def state_of_chunk(here, numbers):
    total, low = saved(here.states, 0, SUM, here.zero), saved(here.states, 0, LOW, here.zero)
    return saved(here.states, 0, MAX, here.zero), total, low, saved(here.states, 0, TIES, here.zero)


@device
def write_state(here, first, last, summary, numbers):
    rows, states, scale, _ = numbers
    for field in range(STATE_NUMBERS):
        store_per_row(states[field], rows, here, summary[field], scale)


# ---------------------------------------------------------------- chunks for each row


@kernel
def fold_rows(call):
    way, job, rows, states, same, none, lse, scale, scale_low = arguments(call)
    numbers = rows, lse, scale, scale_low
    walk(way, job, rows, states, same, none, nothing_first, take_states, row_of_chunks, write_row, numbers, scale)


@device
def take_states(here, first, last, numbers):
    for chunk in range(first, last):
        for field in range(STATE_NUMBERS):
            value = number(here.zero, -math.inf if field == MAX else 0.0)  # of a row without columns
            if here.n_cols > 0:
                value = load(here.first.pointer, chunk * STATE_NUMBERS + field, here.zero)
            save(here.states, chunk, field, value)


@device
def row_of_chunks(here, numbers):
    _, _, scale, scale_low = numbers
    state, _ = fold_state(here.states, count_of_chunks(here.n_cols), here.zero, scale, scale_low)
    return logsumexp_of_state(state, scale, scale_low)


@device
def write_row(here, first, last, summary, numbers):
    rows, lse, scale, _ = numbers
    if first == 0:
        store_per_row(lse, rows, here, summary, scale)
