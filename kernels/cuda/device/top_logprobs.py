"""The largest log-probabilities of each row, which largest.py finds."""

import math

from numpy import int64

from gpusoftmax.kernels.cuda.device._cuda import device
from gpusoftmax.kernels.cuda.device.arithmetic import log_sum, mul, number
from gpusoftmax.kernels.cuda.device.exponential import negative_log_probability
from gpusoftmax.kernels.cuda.device.largest import keep_best, keep_none, largest_with
from gpusoftmax.kernels.cuda.device.memory import load, load_label, row_offset, store, store_integer
from gpusoftmax.kernels.cuda.device.piece_state import gap_params, of_cheap
from gpusoftmax.kernels.cuda.device.pieces import own_row, team_of
from gpusoftmax.kernels.cuda.device.row_state import begin_row, first_pass_with, loss_numbers_with
from gpusoftmax.kernels.cuda.device.rows import row_of
from gpusoftmax.kernels.cuda.device.transform import transformed


@device
def finish(state, params):
    """Half the maximum, log-sum-exp relative to it, and whether the row holds a NaN."""
    log, _ = log_sum(state)
    has_nan = number(log, 1.0 if state[2] != state[2] else 0.0)
    return state[0], log, has_nan, has_nan


_, finished_row = loss_numbers_with(finish)
states_and_maxima = first_pass_with(second_looks=True, keep=keep_best)


@device
def write_logprob(j, x, col, numbers):
    target, tokens, first, place, half, log, has_nan, scale = numbers
    store(target, place + j, mul(negative_log_probability(x, half, log, scale), number(scale, -1.0)))
    store_integer(tokens.pointer, first + j, int64(col) if has_nan == number(scale, 0.0) else int64(-1))


write_largest = largest_with(write_logprob)


def top_logprobs_rows(rows, split, start, logits, labels, logprobs, tokens, k, ignore_index, scale, scale_low):
    params = gap_params(scale, scale_low)
    team = team_of(split, 1)
    row = own_row(start, split)
    exists = row < rows.n_rows
    n_cols = rows.n_cols if exists else 0
    source = row_of(logits, row, rows)
    writes = exists and team.rank == 0 and team.lane == 0
    keep_none(split, scale)
    begin_row(source, n_cols, team, split, params)
    state = states_and_maxima(source, n_cols, team, split, of_cheap(params))
    half, log, has_nan, _ = finished_row(state, source, n_cols, team, split, of_cheap(params))
    target, first = row_of(logprobs, row, rows).pointer, row_offset(tokens, row, rows)
    if labels.pointer != 0:
        if writes:
            label, value = load_label(labels.pointer, row_offset(labels, row, rows), labels.code), number(scale, 0.0)
            if label != ignore_index:
                value = number(scale, math.nan)
                if label >= 0 and label < rows.n_cols:
                    x = transformed(load(source.pointer, label * source.stride, scale), label, source.through)
                    # Times -1, as in log_softmax.py.
                    value = mul(negative_log_probability(x, half, log, scale), number(scale, -1.0))
            store(target, 0, value)
            store_integer(tokens.pointer, first, label)
        first += 1
    numbers = target, tokens, first, first - row_offset(tokens, row, rows), half, log, has_nan, scale
    row_max = mul(half, number(scale, 2.0))
    write_largest(source, k, n_cols, exists, row_max, team, split, params, numbers)
