"""Log-probabilities of tokens with what else a read of their rows tells, and the gradient. The mathematics stands in
kernels/cpu/token_logprobs.py.
"""

import math

from numpy import int64

from gpusoftmax.kernels.cuda.device._cuda import device
from gpusoftmax.kernels.cuda.device.arithmetic import add, fma, logsumexp_of, mul, number
from gpusoftmax.kernels.cuda.device.exponential import anchor, lowest_of, negative_log_probability
from gpusoftmax.kernels.cuda.device.memory import is_null, load, row_offset, store, store_integer
from gpusoftmax.kernels.cuda.device.piece_state import gap_params, halved
from gpusoftmax.kernels.cuda.device.pieces import own_row, team_of
from gpusoftmax.kernels.cuda.device.row_writer import row_writer
from gpusoftmax.kernels.cuda.device.rows import row_of
from gpusoftmax.kernels.cuda.device.split import split_lanes
from gpusoftmax.kernels.cuda.device.token_gradient import gradient_of_target, gradients_with
from gpusoftmax.kernels.cuda.device.token_numbers import (
    Asked,
    Targets,
    is_class,
    label_of,
    numbers_and_distances,
    plain_numbers,
    told_mean,
)
from gpusoftmax.kernels.cuda.device.transform import transformed


def token_logprobs_of(token_numbers):
    @device
    def token_logprobs(rows, split, start, logits, targets, results, params):
        logprobs, lse, entropy, ranks, argmax = results
        scale = params[0]
        team = team_of(split, 1)
        row = own_row(start, split)
        exists = row < rows.n_rows
        source = row_of(logits, row, rows)
        is_counted = ranks.pointer != 0
        asked = Asked(row, targets, rows, is_counted, argmax.pointer != 0)
        n_cols = rows.n_cols if exists else 0
        numbers, mean, n_above, column = token_numbers(source, asked, n_cols, team, split, params)
        half, log, log_low, _ = numbers
        if not exists:
            return
        if asked.is_found and team.lane == 0:
            has_nan = half != half
            if column >= 0 and not has_nan:
                store_integer(argmax.pointer, row_offset(argmax, row, rows), int64(column))
            elif has_nan and team.rank == 0:
                store_integer(argmax.pointer, row_offset(argmax, row, rows), -1)
        if team.rank == 0:
            if team.lane == 0 and not is_null(lse.pointer):
                lse_of_row = logsumexp_of(half, log, log_low, scale, params[1])
                store(row_of(lse, row, rows).pointer, 0, lse_of_row)
            if team.lane == 0 and not is_null(entropy.pointer):
                store(row_of(entropy, row, rows).pointer, 0, add(log, add(mean, log_low)))
            for j in range(team.lane, targets.count, split_lanes(split)):
                label = label_of(row, j, targets, rows)
                value, rank = number(scale, 0.0), int64(-1)
                if is_class(label, targets, rows):
                    x = transformed(load(source.pointer, label * source.stride, scale), label, source.through)
                    # Times -1, as in log_softmax.py.
                    value = mul(negative_log_probability(x, half, log, scale), number(scale, -1.0))
                    if value == value:
                        rank = 1 + n_above
                elif label != targets.ignore_index:
                    value = number(scale, math.nan)
                store(row_of(logprobs, row, rows).pointer, j, value)
                if is_counted:
                    store_integer(ranks.pointer, row_offset(ranks, row, rows), rank)

    return token_logprobs


plain_logprobs = token_logprobs_of(plain_numbers)
logprobs_and_entropy = token_logprobs_of(numbers_and_distances)


def token_logprobs_rows(
    rows,
    split,
    start,
    logits,
    labels,
    logprobs,
    lse,
    entropy,
    ranks,
    argmax,
    n_targets,
    target_stride,
    ignore_index,
    scale,
    scale_low,
):
    targets = Targets(labels, n_targets, target_stride, ignore_index)
    results = logprobs, lse, entropy, ranks, argmax
    plain_logprobs(rows, split, start, logits, targets, results, gap_params(scale, scale_low))


def token_logprobs_and_entropy_rows(
    rows,
    split,
    start,
    logits,
    labels,
    logprobs,
    lse,
    entropy,
    ranks,
    argmax,
    n_targets,
    target_stride,
    ignore_index,
    scale,
    scale_low,
):
    targets = Targets(labels, n_targets, target_stride, ignore_index)
    results = logprobs, lse, entropy, ranks, argmax
    logprobs_and_entropy(rows, split, start, logits, targets, results, gap_params(scale, scale_low))


def backward_with(token_numbers, with_entropy):
    write_gradients = row_writer(gradients_with(with_entropy))

    @device
    def backward(rows, split, start, logits, targets, dlogprobs, dentropy, dlogits, stride, params):
        scale = params[0]
        zero = number(scale, 0.0)
        team = team_of(split, 1)
        row = own_row(start, split)
        exists = row < rows.n_rows
        n_cols = rows.n_cols if exists else 0
        source = row_of(logits, row, rows)
        per_logprob = mul(scale, number(scale, 0.5))  # 1 / T
        # 1. the gradients of the row's numbers, before its own is written, and what its probabilities are made of
        total, n_counted = zero, int64(0)
        label, gradient, slope = int64(-1), zero, zero
        if exists:
            for j in range(targets.count):
                total = add(total, gradient_of_target(row, j, targets, dlogprobs, stride, rows, scale))
                n_counted += 1 if label_of(row, j, targets, rows) != targets.ignore_index else 0
            if targets.count > 0:
                label = label_of(row, 0, targets, rows)
                gradient = mul(gradient_of_target(row, 0, targets, dlogprobs, stride, rows, scale), per_logprob)
            if with_entropy:
                slope = load(row_of(dentropy, row, rows).pointer, 0, scale)
        asked = Asked(row, targets, rows, False, False)
        found, mean, _, _ = token_numbers(source, asked, n_cols, team, split, params)
        if with_entropy:
            total = fma(slope, told_mean(mean, split), total)
        # 2. the gradient
        half, _, _, inverse = found
        row_max = mul(half, number(scale, 2.0))
        exponent = anchor(row_max, params[2])
        inverse = mul(inverse, per_logprob)
        ignored = int64(1 if n_counted == 0 and not with_entropy else 0)
        numbers = (
            row,
            halved(row_max),
            exponent,
            lowest_of(exponent, params[2]),
            mul(-total, inverse),
            mul(slope, inverse),
            ignored,
            label,
            gradient,
            (targets, dlogprobs, stride, per_logprob, rows),
            params,
            source.through,
        )
        write_gradients(row_of(dlogits, row, rows), (source,), n_cols, team, split, numbers, scale)

    return backward


plain_backward = backward_with(plain_numbers, with_entropy=False)
backward_of_both = backward_with(numbers_and_distances, with_entropy=True)


def logprobs_backward_rows(
    rows,
    split,
    start,
    logits,
    labels,
    dlogprobs,
    dentropy,
    dlogits,
    n_targets,
    target_stride,
    gradient_stride,
    ignore_index,
    scale,
    scale_low,
):
    targets = Targets(labels, n_targets, target_stride, ignore_index)
    params = gap_params(scale, scale_low)
    plain_backward(rows, split, start, logits, targets, dlogprobs, dentropy, dlogits, gradient_stride, params)


def logprobs_and_entropy_backward_rows(
    rows,
    split,
    start,
    logits,
    labels,
    dlogprobs,
    dentropy,
    dlogits,
    n_targets,
    target_stride,
    gradient_stride,
    ignore_index,
    scale,
    scale_low,
):
    targets = Targets(labels, n_targets, target_stride, ignore_index)
    params = gap_params(scale, scale_low)
    backward_of_both(rows, split, start, logits, targets, dlogprobs, dentropy, dlogits, gradient_stride, params)
