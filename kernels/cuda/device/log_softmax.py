"""Log-softmax and its backward. The mathematics stands in kernels/cpu/log_softmax.py."""

from gpusoftmax.kernels.cuda.device._cuda import device
from gpusoftmax.kernels.cuda.device.arithmetic import fma, inverse_temperature, log_sum, mul, number
from gpusoftmax.kernels.cuda.device.exponential import cheap_exp, negative_log_probability
from gpusoftmax.kernels.cuda.device.piece_state import gap_params
from gpusoftmax.kernels.cuda.device.pieces import own_row, team_of
from gpusoftmax.kernels.cuda.device.row_state import loss_numbers_with
from gpusoftmax.kernels.cuda.device.row_sum import row_sum_with
from gpusoftmax.kernels.cuda.device.row_writer import row_writer
from gpusoftmax.kernels.cuda.device.rows import number_of_row, row_of
from gpusoftmax.kernels.cuda.device.transform import unless_empty


@device
def log_probabilities(values, others, col, width, numbers):
    row_max, log, params = numbers
    for k in range(width):
        # Times -1, not negated: LLVM would move a negation behind the conversion to float16, as a subtraction.
        values[k] = mul(negative_log_probability(values[k], row_max, log, params[0]), number(params[0], -1.0))


@device
def finish(state, params):
    """Half the maximum, and log-sum-exp relative to it."""
    log, log_low = log_sum(state)
    return state[0], log, log_low, number(log, 0.0)


log_softmax_numbers, _ = loss_numbers_with(finish)
write_log_probs = row_writer(log_probabilities)


def log_softmax_rows(rows, split, start, logits, log_probs, scale, scale_low):
    params = gap_params(scale, scale_low)
    team = team_of(split, 1)
    row = own_row(start, split)
    n_cols = rows.n_cols if row < rows.n_rows else 0
    source = row_of(logits, row, rows)
    # 1. the first pass: maximum and sum
    row_max, log, log_low, _ = log_softmax_numbers(source, n_cols, team, split, params)
    # 2. the last pass
    log = unless_empty(log, row_max, log_low, source.through)
    row_max = unless_empty(row_max, row_max, log_low, source.through)
    numbers = row_max, log, params
    write_log_probs(row_of(log_probs, row, rows), (source,), n_cols, team, split, numbers, scale)


@device
def second(log_p, dlog_p):
    return dlog_p


@device
def gradients(values, others, col, width, numbers):
    minus_total, scale = numbers
    for k in range(width):
        values[k] = mul(fma(cheap_exp(values[k]), minus_total, others[k]), scale)


total_of_rows = row_sum_with(second)
write_gradients = row_writer(gradients)


def log_softmax_backward_rows(rows, split, start, log_probs, dlog_probs, dlogits, scale):
    team = team_of(split, 2)
    row = own_row(start, split)
    n_cols = rows.n_cols if row < rows.n_rows else 0
    sources = row_of(log_probs, row, rows), row_of(dlog_probs, row, rows)
    # 1. total = sum_k dlog_probs_k
    total = total_of_rows(sources, n_cols, team, split, scale)
    # 2. dlogits = (dlog_probs - exp(log_probs) total) / T
    write_gradients(row_of(dlogits, row, rows), sources, n_cols, team, split, (-total, scale), scale)


def tempered_log_softmax_backward_rows(rows, split, start, log_probs, dlog_probs, temperatures, dlogits, one):
    """With a temperature for each row."""
    team = team_of(split, 2)
    row = own_row(start, split)
    n_cols = rows.n_cols if row < rows.n_rows else 0
    sources = row_of(log_probs, row, rows), row_of(dlog_probs, row, rows)
    total = total_of_rows(sources, n_cols, team, split, one)
    scale, _ = inverse_temperature(number_of_row(temperatures, row, rows, one))
    write_gradients(row_of(dlogits, row, rows), sources, n_cols, team, split, (-total, scale), one)
