"""Log-probabilities of tokens with what else a read of their rows tells, and the gradient. The mathematics stands in
kernels/cpu/token_logprobs.py.

The sum of distances goes beside the state of a row (row_state.py): of a piece relative to its own maximum and anchor,
then brought to those of the chunk and of the row. Whoever counts, a number of larger logits is exact.
"""

import math
from typing import NamedTuple

from numpy import int32, int64

from gpusoftmax.kernels.cuda.device._cuda import device
from gpusoftmax.kernels.cuda.device.arithmetic import (
    add,
    add_pair,
    fma,
    is_above,
    logsumexp_of,
    mul,
    number,
    weighted,
)
from gpusoftmax.kernels.cuda.device.exponential import (
    anchor,
    cheap_exp_from,
    cheap_exp_gap,
    half_gap,
    lowest_of,
    negative_log_probability,
)
from gpusoftmax.kernels.cuda.device.granules import granules_with
from gpusoftmax.kernels.cuda.device.memory import (
    is_null,
    load,
    load_label,
    store,
    store_integer,
)
from gpusoftmax.kernels.cuda.device.piece_state import (
    gap_params,
    halved,
    is_near,
    of_cheap,
)
from gpusoftmax.kernels.cuda.device.reduce import warp_min, warp_sum, warp_sum_pair
from gpusoftmax.kernels.cuda.device.row_state import (
    NO_COLUMN,
    as_part,
    numbers_beside_with,
    ratio,
    saved_beside,
    state_place,
)
from gpusoftmax.kernels.cuda.device.rows import (
    own_row,
    row_of,
    row_offset,
    row_writer,
    team_of,
)
from gpusoftmax.kernels.cuda.device.shared_numbers import get_pair
from gpusoftmax.kernels.cuda.device.split import (
    is_one_chunk,
    split_chunks,
    split_lanes,
)
from gpusoftmax.kernels.cuda.device.transform import pulled_back, transformed
from gpusoftmax.kernels.cuda.plan import WARP_SIZE


class Asked(NamedTuple):
    """What is asked for of a row besides its state."""

    threshold: object  # above it, logits are counted, if is_counted
    is_counted: bool
    is_found: bool  # the first column of the maximum


class Targets(NamedTuple):
    """The targets of all rows."""

    labels: object
    count: int
    stride: int
    ignore_index: int


@device
def label_of(row, j, targets, rows):
    """Target number j of a row."""
    index = row_offset(targets.labels, row, rows) + j * targets.stride
    return load_label(targets.labels.pointer, index, targets.labels.code)


@device
def is_class(label, targets, rows):
    return label != targets.ignore_index and label >= 0 and label < rows.n_cols


# ---------------------------------------------------------------- the first pass


@device
def distance_to(half, x, scale):
    """(max - x) / T, given half the maximum; the scale is 2 / T."""
    return mul(-half_gap(x, half), scale)


def beside_with(with_entropy):
    """A device function for what is summed, counted and found beside the state of a piece: (distances, above, column)
    of a lane's columns, relative to the piece's maximum and anchor. They come from the slot again, one granule after
    the other: beside a whole piece, registers run out.
    """

    @device
    def beside(result, values, col, width, source, split, numbers):
        largest, exponent, half, lowest, asked, params = numbers
        scale, scale_low, c, c_low = params
        distances, above, column = result
        for k in range(width):
            x = values[k]
            if with_entropy:
                if is_near(exponent):
                    e = cheap_exp_from(x, exponent, lowest, c, c_low)
                else:
                    e = cheap_exp_gap(x, half, scale, scale_low, c, c_low)
                distances = add(distances, weighted(e, distance_to(half, x, scale)))
            if asked.is_counted:
                above = add(above, is_above(x, asked.threshold))
            if asked.is_found and x == largest:
                column = min(column, int32(col + k))
        return distances, above, column

    of_granules = granules_with(beside)

    @device
    def beside_piece(source, at, piece, largest, asked, team, split, params):
        zero, exponent = number(largest, 0.0), anchor(largest, params[2])
        numbers = largest, exponent, halved(largest), lowest_of(exponent, params[2]), asked, params
        result = zero, zero, int32(NO_COLUMN)
        distances, above, column = of_granules(result, source, at, piece, team, split, numbers, zero)
        if with_entropy:
            distances = warp_sum(distances, split_lanes(split))
        if asked.is_counted:
            above = warp_sum(above, split_lanes(split))
        if asked.is_found:
            column = warp_min(column, split_lanes(split))
        return distances, above, column

    return beside_piece


@device
def distances_as_part(distances, largest, total, row_max, params):
    """The distances of a part as those of its row: measured from a larger maximum, and relative to its anchor."""
    if largest == row_max:
        return distances
    if not largest > number(row_max, -math.inf):
        return number(row_max, 0.0)
    rise = distance_to(halved(row_max), largest, params[0])
    return add(mul(distances, ratio(largest, row_max, params)), mul(as_part(largest, total, row_max, params), rise))


@device
def merged_distances(row_max, team, split, params):
    """The distances of all chunks, as those of the row."""
    total, low = number(row_max, 0.0), number(row_max, 0.0)
    for chunk in range(team.lane, split_chunks(split), WARP_SIZE):
        largest, exponentials = get_pair(state_place(0, chunk, split, row_max), row_max)
        distances, _ = saved_beside(chunk, split, row_max)
        part = distances_as_part(distances, largest, exponentials, row_max, params)
        total, low = add_pair(total, low, part, number(row_max, 0.0))
    total, low = warp_sum_pair(total, low)
    return add(total, low)


@device
def merged_above(team, split, like):
    """How many logits of the row are counted, as a pair: float32 holds no more than 2^24 of them."""
    total, low = number(like, 0.0), number(like, 0.0)
    for chunk in range(team.lane, split_chunks(split), WARP_SIZE):
        _, above = saved_beside(chunk, split, like)
        total, low = add_pair(total, low, above, number(like, 0.0))
    return warp_sum_pair(total, low)


def token_numbers_with(with_entropy):
    """A device function for the first pass; `with_entropy` is a constant, since the other has half the work."""

    @device
    def joined_beside(one, state, other, other_state, row_max, asked, params):
        distances, more = one[0], other[0]
        if with_entropy:
            distances = distances_as_part(distances, state[0], state[1], row_max, params)
            more = distances_as_part(more, other_state[0], other_state[1], row_max, params)
        return add(distances, more), add(one[1], other[1])

    numbers_beside = numbers_beside_with(beside_with(with_entropy), joined_beside)

    @device
    def token_numbers(source, asked, n_cols, team, split, params):
        """(numbers, D, above, column): the numbers of the row that `finish` gives, the mean distance, how many logits
        are larger than the threshold, as a pair, and the first column of the maximum, which only the part that holds it
        knows: -1 elsewhere.
        """
        numbers, (distances, above), column = numbers_beside(source, asked, n_cols, team, split, params)
        above_low = number(above, 0.0)
        if not is_one_chunk(split):
            if with_entropy:
                distances = merged_distances(mul(numbers[0], number(above, 2.0)), team, split, of_cheap(params))
            if asked.is_counted:
                above, above_low = merged_above(team, split, above)
        return numbers, mul(distances, numbers[3]), (above, above_low), column

    return token_numbers


plain_numbers = token_numbers_with(with_entropy=False)
numbers_and_distances = token_numbers_with(with_entropy=True)


# ---------------------------------------------------------------- results of a row


def token_logprobs_of(token_numbers):
    @device
    def token_logprobs(rows, split, start, logits, targets, results, params):
        logprobs, lse, entropy, ranks, argmax = results
        scale = params[0]
        team = team_of(split, 1)
        row = own_row(start, split)
        exists = row < rows.n_rows
        source = row_of(logits, row, rows)
        threshold = number(scale, math.nan)
        is_counted = ranks.pointer != 0
        if is_counted and exists:
            label = label_of(row, 0, targets, rows)
            if is_class(label, targets, rows):
                threshold = transformed(load(source.pointer, label * source.stride, scale), label, source.through)
        asked = Asked(threshold, is_counted, argmax.pointer != 0)
        n_cols = rows.n_cols if exists else 0
        numbers, mean, above, column = token_numbers(source, asked, n_cols, team, split, params)
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
                        rank = 1 + int64(above[0]) + int64(above[1])
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


# ---------------------------------------------------------------- the gradient


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
        asked = Asked(zero, False, False)
        found, mean, _, _ = token_numbers(source, asked, n_cols, team, split, params)
        if with_entropy:
            total = fma(slope, mean, total)
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
