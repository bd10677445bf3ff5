"""The gradient of log-probabilities of tokens and of entropies with respect to the logits, a granule at a time."""

import math

from gpusoftmax.kernels.cuda.device._cuda import device
from gpusoftmax.kernels.cuda.device.arithmetic import add, fma, mul, number, weighted
from gpusoftmax.kernels.cuda.device.exponential import cheap_exp_from, cheap_exp_gap
from gpusoftmax.kernels.cuda.device.memory import load
from gpusoftmax.kernels.cuda.device.piece_state import is_near
from gpusoftmax.kernels.cuda.device.rows import row_of
from gpusoftmax.kernels.cuda.device.token_numbers import distance_to, is_class, label_of
from gpusoftmax.kernels.cuda.device.transform import pulled_back


@device
def gradient_of_target(row, j, targets, dlogprobs, stride, rows, like):
    """The gradient with respect to a log-probability; 0 where the target is ignored, NaN where it is out of range."""
    label = label_of(row, j, targets, rows)
    if label == targets.ignore_index:
        return number(like, 0.0)
    if not is_class(label, targets, rows):
        return number(like, math.nan)
    return load(row_of(dlogprobs, row, rows).pointer, j * stride, like)


@device
def add_target(values, col, width, label, gradient):
    if label >= col and label < col + width:
        for k in range(width):
            if col + k == label:
                values[k] = add(values[k], gradient)


def gradients_with(with_entropy):
    @device
    def gradients(values, others, col, width, numbers):
        row, half, exponent, lowest, on_probs, on_distance, ignored, label, gradient, given, params, through = numbers
        scale, scale_low, c, c_low = params
        for k in range(width):
            x = values[k]
            others[k] = x
            if is_near(exponent):
                e = cheap_exp_from(x, exponent, lowest, c, c_low)
            else:
                e = cheap_exp_gap(x, half, scale, scale_low, c, c_low)
            values[k] = mul(e, on_probs)
            if with_entropy:
                values[k] = fma(weighted(e, distance_to(half, x, scale)), on_distance, values[k])
            if ignored == 1:
                values[k] = number(scale, 0.0)
        add_target(values, col, width, label, gradient)
        targets, dlogprobs, stride, per_logprob, rows = given
        for j in range(1, targets.count):
            more = mul(gradient_of_target(row, j, targets, dlogprobs, stride, rows, scale), per_logprob)
            add_target(values, col, width, label_of(row, j, targets, rows), more)
        for k in range(width):
            values[k] = pulled_back(values[k], others[k], through)

    return gradients
