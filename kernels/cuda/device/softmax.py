"""Softmax and its backward. The mathematics stands in kernels/cpu/softmax.py."""

import math

from gpusoftmax.kernels.cuda.device._cuda import device
from gpusoftmax.kernels.cuda.device.arithmetic import inverse_temperature, mul, number, row_inverse, sub
from gpusoftmax.kernels.cuda.device.exponential import (
    anchor,
    cheap_exp_from,
    cheap_exp_gap,
    corrected_inverse,
    exact_exp_gap,
    lowest_of,
    ordered_exp_from,
)
from gpusoftmax.kernels.cuda.device.memory import stored_in_halves
from gpusoftmax.kernels.cuda.device.piece_state import gap_params, halved, is_near
from gpusoftmax.kernels.cuda.device.pieces import own_row, team_of
from gpusoftmax.kernels.cuda.device.row_state import softmax_state_with
from gpusoftmax.kernels.cuda.device.row_sum import row_sum_with
from gpusoftmax.kernels.cuda.device.row_writer import row_writer
from gpusoftmax.kernels.cuda.device.rows import number_of_row, row_of
from gpusoftmax.kernels.cuda.device.transform import unless_empty


def probabilities_with(exp_from, exp_gap):
    @device
    def probabilities(values, others, col, width, numbers):
        half, exponent, lowest, inverse, params = numbers
        scale, scale_low, c, c_low = params
        if is_near(exponent):
            for k in range(width):
                values[k] = mul(exp_from(values[k], exponent, lowest, c, c_low), inverse)
        else:
            for k in range(width):
                values[k] = mul(exp_gap(values[k], half, scale, scale_low, c, c_low), inverse)

    return probabilities


softmax_state = softmax_state_with(leaves_transformed=True)
write_half_probs = row_writer(probabilities_with(cheap_exp_from, cheap_exp_gap), may_find_transformed=True)
write_probs = row_writer(probabilities_with(ordered_exp_from, exact_exp_gap), may_find_transformed=True)


def softmax_rows(rows, split, start, logits, probs, scale, scale_low):
    params = gap_params(scale, scale_low)
    team = team_of(split, 1)
    row = own_row(start, split)
    n_cols = rows.n_cols if row < rows.n_rows else 0
    source = row_of(logits, row, rows)
    target = row_of(probs, row, rows)
    # 1. the first pass: maximum and sum
    row_max, total = softmax_state(source, n_cols, team, split, params)
    # 2. the last pass
    rest = total  # 0 in a row without a maximum, unless there is a NaN
    exponent = anchor(row_max, params[2])
    lowest = lowest_of(exponent, params[2])
    if total == cheap_exp_from(row_max, exponent, lowest, params[2], params[3]):
        # Nothing but one maximum counts. Relative to itself it is exactly 1.
        exponent, total = number(total, math.inf), number(total, 1.0)
    inverse = row_inverse(row_max, total, number(total, 0.0))
    inverse = unless_empty(inverse, row_max, rest, source.through)
    if stored_in_halves(target.pointer):
        numbers = halved(row_max), exponent, lowest, inverse, params
        write_half_probs(target, (source,), n_cols, team, split, numbers, scale)
    else:
        inverse = corrected_inverse(inverse, row_max, exponent, params[3])
        numbers = halved(row_max), exponent, lowest, inverse, params
        write_probs(target, (source,), n_cols, team, split, numbers, scale)


@device
def product(p, dp):
    return mul(p, dp)


@device
def gradients(values, others, col, width, numbers):
    shift, scale = numbers
    for k in range(width):
        values[k] = mul(mul(values[k], sub(others[k], shift)), scale)


dot_of_rows = row_sum_with(product)
write_gradients = row_writer(gradients)


def softmax_backward_rows(rows, split, start, probs, dprobs, dlogits, scale):
    team = team_of(split, 2)
    row = own_row(start, split)
    n_cols = rows.n_cols if row < rows.n_rows else 0
    sources = row_of(probs, row, rows), row_of(dprobs, row, rows)
    # 1. dot = sum_k probs_k dprobs_k
    dot = dot_of_rows(sources, n_cols, team, split, scale)
    # 2. dlogits = probs (dprobs - dot) / T
    write_gradients(row_of(dlogits, row, rows), sources, n_cols, team, split, (dot, scale), scale)


def tempered_softmax_backward_rows(rows, split, start, probs, dprobs, temperatures, dlogits, one):
    """With a temperature for each row."""
    team = team_of(split, 2)
    row = own_row(start, split)
    n_cols = rows.n_cols if row < rows.n_rows else 0
    sources = row_of(probs, row, rows), row_of(dprobs, row, rows)
    dot = dot_of_rows(sources, n_cols, team, split, one)
    scale, _ = inverse_temperature(number_of_row(temperatures, row, rows, one))
    write_gradients(row_of(dlogits, row, rows), sources, n_cols, team, split, (dot, scale), one)
