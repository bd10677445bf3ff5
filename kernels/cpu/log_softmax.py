"""Log-softmax over rows of logits, and its backward, on the CPU.

    log_probs_c = (x_c - max) / T - log s                    log s = log1p((ties - 1) + tail)
    dlogits_c   = (dlog_probs_c - exp(log_probs_c) sum_k dlog_probs_k) / T

The two terms of the first line are not positive: nothing cancels. The loss is computed by the same formula from the
same row state, so log_probs[target] is -loss bit for bit.
"""

import numpy as np

from gpusoftmax.kernels.cpu.arithmetic import (
    add,
    exp,
    fma,
    inverse_temperature,
    log_probability,
    log_sum,
    mul,
    negative,
)
from gpusoftmax.kernels.cpu.cache import device, kernel
from gpusoftmax.kernels.cpu.call import arguments
from gpusoftmax.kernels.cpu.chunks import fetch_both, sum_chunk, sum_of_exponentials, write_chunk
from gpusoftmax.kernels.cpu.here import unless_empty
from gpusoftmax.kernels.cpu.memory import (
    load_cols,
)
from gpusoftmax.kernels.cpu.rows import chunk_range, count_of_chunks, nothing_first, number_of_row, save_maxima
from gpusoftmax.kernels.cpu.run import run
from gpusoftmax.kernels.cpu.states import LOW, MAX, SUM, fold_state, save, save_state, saved, sum_of_saved
from gpusoftmax.kernels.cpu.vector import (
    is_across,
    is_half,
)
from gpusoftmax.kernels.cpu.walk import walk
from gpusoftmax.kernels.operands import Operand, Place, Rows, compute_dtype, scale_of, unless_one


def log_softmax(rows: Rows, logits: Operand, log_probs: Operand, temperature: float, place: Place) -> None:
    scale = scale_of(1.0, temperature, compute_dtype(logits.dtype, log_probs.dtype))
    run(log_softmax_rows, rows, logits, None, log_probs, *unless_one(scale))


def log_softmax_backward(
    rows: Rows, log_probs: Operand, dlog_probs: Operand, dlogits: Operand, temperature: float, place: Place
) -> None:
    scale, _ = scale_of(1.0, temperature, compute_dtype(log_probs.dtype, dlog_probs.dtype, dlogits.dtype))
    run(log_softmax_backward_rows, rows, log_probs, dlog_probs, dlogits, scale)


def tempered_log_softmax_backward(
    rows: Rows, log_probs: Operand, dlog_probs: Operand, temperatures: Operand, dlogits: Operand, place: Place
) -> None:
    """log_softmax_backward with a temperature for each row, in the format of the arithmetic."""
    one = np.dtype(temperatures.dtype).type(1)
    run(tempered_log_softmax_backward_rows, rows, log_probs, dlog_probs, dlogits, temperatures, one, in_blocks=False)


@kernel
def log_softmax_rows(call):
    log_softmax_of_rows(*arguments(call))


@device
def log_softmax_of_rows(way, job, rows, logits, same, log_probs, scale, scale_low):
    numbers = scale, scale_low, log_probs.tag
    walk(way, job, rows, logits, same, log_probs, save_maxima, measure, fold, write, numbers, scale)


@device
def measure(here, first, last, numbers):
    scale, scale_low, tag = numbers
    for chunk in range(first, last):
        col, count = chunk_range(here, chunk)
        largest = saved(here.states, chunk, MAX, here.zero)
        sums = sum_of_exponentials(here, False, largest, largest, col, count, scale, scale_low, is_half(tag), True)
        save_state(here.states, chunk, sums)


@device
def fold(here, numbers):
    scale, scale_low, _ = numbers
    state, _ = fold_state(here.states, count_of_chunks(here.n_cols), here.zero, scale, scale_low)
    log, log_low = log_sum(state)
    largest = unless_empty(state[0], state[0], log_low, here.through)
    return largest, unless_empty(log, state[0], log_low, here.through)


@device
def write(here, first, last, summary, numbers):
    for chunk in range(first, last):
        col, count = chunk_range(here, chunk)
        write_chunk(log_probabilities, (*summary, numbers[0]), here, col, count)


@device
def log_probabilities(col, left, here, arguments):
    largest, log, scale = arguments
    return log_probability(load_cols(here.first, col, left, here.zeros), largest, log, scale)


@kernel
def log_softmax_backward_rows(call):
    way, job, rows, log_probs, dlog_probs, dlogits, scale = arguments(call)
    walk(way, job, rows, log_probs, dlog_probs, dlogits, nothing_first, sum_gradient, total, gradient, (scale,), scale)


@kernel
def tempered_log_softmax_backward_rows(call):
    way, job, rows, log_probs, dlog_probs, dlogits, temperatures, one = arguments(call)
    numbers = rows, temperatures, one
    walk(way, job, rows, log_probs, dlog_probs, dlogits, nothing_first, sum_gradient, total_and_scale, tempered,
         numbers, one)  # fmt: skip


@device
def total_and_scale(here, numbers):
    rows, temperatures, one = numbers
    return negative(total(here, numbers)), inverse_temperature(number_of_row(temperatures, rows, here, 0, one))[0]


@device
def tempered(here, first, last, summary, numbers):
    for chunk in range(first, last):
        col, count = chunk_range(here, chunk)
        write_chunk(centred, summary, here, col, count)


@device
def sum_gradient(here, first, last, numbers):
    for chunk in range(first, last):
        col, count = chunk_range(here, chunk)
        total, low, _, _ = sum_chunk(upstream, here, (), col, count)
        save(here.states, chunk, SUM, total)
        save(here.states, chunk, LOW, low)


@device
def upstream(col, left, others, here, arguments):
    if is_across(here.zeros):  # along rows it costs a tenth of the time
        fetch_both(here, col)
    return load_cols(here.second, col, left, here.zeros), others, None


@device
def total(here, numbers):
    total, low = sum_of_saved(here.states, count_of_chunks(here.n_cols), here.zero)
    return add(total, low)


@device
def gradient(here, first, last, summary, numbers):
    for chunk in range(first, last):
        col, count = chunk_range(here, chunk)
        write_chunk(centred, (negative(summary), numbers[0]), here, col, count)


@device
def centred(col, left, here, arguments):
    minus_total, scale = arguments
    probs = exp(load_cols(here.first, col, left, here.zeros), here.zeros)
    return mul(fma(probs, minus_total, load_cols(here.second, col, left, here.zeros)), scale)
