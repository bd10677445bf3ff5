"""Log-probabilities of tokens with what else a read of their rows tells, and the gradient. The mathematics stands in
kernels/cpu/token_logprobs.py.

The sum of distances (distances.py) goes beside the state of a row (row_state.py): of a piece relative to its own
maximum and anchor, then brought to those of the chunk and of the row; it takes a second look where the state does.
Whoever counts, a number of larger logits is exact.
"""

import math
from typing import NamedTuple

from numpy import int32, int64

from gpusoftmax.kernels.cuda.device._cuda import cuda, device
from gpusoftmax.kernels.cuda.device.arithmetic import (
    add,
    add_pair,
    fma,
    logsumexp_of,
    mul,
    number,
    weighted,
)
from gpusoftmax.kernels.cuda.device.distances import in_nats, second_look_at_distances, sum_and_distances
from gpusoftmax.kernels.cuda.device.exponential import (
    above_floor,
    anchor,
    cheap_exp_from,
    cheap_exp_gap,
    exponent_of_gap,
    half_gap,
    lowest_of,
    negative_log_probability,
)
from gpusoftmax.kernels.cuda.device.memory import (
    granule_numbers,
    integer_of,
    is_null,
    load,
    load_label,
    n_values,
    number_of,
    piece_numbers,
    row_offset,
    store,
    store_integer,
)
from gpusoftmax.kernels.cuda.device.pairs import count_above, largest_of_piece, unpack_again
from gpusoftmax.kernels.cuda.device.piece_state import (
    gap_params,
    halved,
    is_near,
    of_cheap,
    piece_sum,
    read_logits,
    second_look,
)
from gpusoftmax.kernels.cuda.device.pieces import chunk_of, col_of, has_columns, own_row, team_of
from gpusoftmax.kernels.cuda.device.reduce import (
    leads_block,
    publish,
    publish_pair,
    publish_pair_and,
    sum_of_warp,
    warp_count,
    warp_min,
    warp_sum,
)
from gpusoftmax.kernels.cuda.device.row_barriers import announce, meet
from gpusoftmax.kernels.cuda.device.row_staging import open_row, stage_next, wait_for_piece
from gpusoftmax.kernels.cuda.device.row_state import (
    NO_COLUMN,
    first_chunk_with,
    joined,
    loss_numbers_with,
    numbers_for_probs,
    publish_second_look,
    ratio,
    row_place,
    state_place,
)
from gpusoftmax.kernels.cuda.device.row_writer import row_writer
from gpusoftmax.kernels.cuda.device.rows import row_of
from gpusoftmax.kernels.cuda.device.shared_numbers import get, get_pair, put
from gpusoftmax.kernels.cuda.device.split import (
    is_columns,
    is_long,
    is_one_chunk,
    remainder,
    split_chunks,
    split_lanes,
    split_piece_bits,
)
from gpusoftmax.kernels.cuda.device.transform import pulled_back, transformed
from gpusoftmax.kernels.cuda.plan import GROUP, WARP_SIZE


class Targets(NamedTuple):
    """The targets of all rows."""

    labels: object
    count: int
    stride: int
    ignore_index: int


class Asked(NamedTuple):
    """What is asked for of a row besides its state."""

    row: int
    targets: Targets
    rows: object
    is_counted: bool  # the logits above that of the first target
    is_found: bool  # the first column of the maximum


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


@device
def logit_of_first(source, asked, like):
    """The logit of the first target; NaN, which none is above, where it is no class."""
    if asked.row < asked.rows.n_rows:
        label = label_of(asked.row, 0, asked.targets, asked.rows)
        if is_class(label, asked.targets, asked.rows):
            return transformed(load(source.pointer, label * source.stride, like), label, source.through)
    return number(like, math.nan)


@device
def threshold_of(source, asked, team, split, like):
    """What logits are counted above. One warp of a block looks it up for the others."""
    if not is_long(split):
        return logit_of_first(source, asked, like)
    place = row_place(5, int32(0), split, like)
    if leads_block():
        threshold = logit_of_first(source, asked, like)
        if team.lane == 0:
            put(place, threshold)
    cuda.syncthreads()  # it is there before any warp reads it
    return get(place, like)


@device
def first_with(held, value, piece, team, split, source):
    """The first column of a piece that has this value."""
    first = int32(NO_COLUMN)
    for j in range(n_values(value)):
        k = n_values(value) - 1 - j
        if has_columns(k // GROUP * GROUP, piece, split) and held[k] == value:
            first = int32(k)
    if first != NO_COLUMN:
        first = int32(piece.first + col_of(first, team, split, source))
    return warp_min(first, split_lanes(split))


@device
def distances_as_part(distances, largest, total, row_max, params):
    """The distances of a part as those of its row: measured from a larger maximum, and relative to its anchor."""
    if largest == row_max:
        return distances
    if not largest > number(row_max, -math.inf):
        return number(row_max, 0.0)
    rise = -above_floor(exponent_of_gap(largest, halved(row_max), params[2]))
    return mul(fma(total, rise, distances), ratio(largest, row_max, params))


@device
def merged_distances(row_max, team, split, params):
    """The distances of all chunks, as those of the row."""
    total, low = number(row_max, 0.0), number(row_max, 0.0)
    for chunk in range(team.lane, split_chunks(split), WARP_SIZE):
        largest, exponentials = get_pair(state_place(0, chunk, split, row_max), row_max)
        distances = get(state_place(4, chunk, split, row_max), row_max)
        part = distances_as_part(distances, largest, exponentials, row_max, params)
        total, low = add_pair(total, low, part, number(row_max, 0.0))
    return warp_sum(add(total, low), WARP_SIZE)


@device
def merged_count(team, split, like):
    """How many logits of the row are above the threshold, from the counts of its parts, see `publish_count`."""
    total = int64(0)
    for rank in range(team.lane, min(team.size, split_chunks(split)), WARP_SIZE):
        total += int64(integer_of(get(state_place(5, rank, split, like), like)))
    return sum_of_warp(total)


@device
def publish_count(count, team, split, like):
    """Beside the state of the first of this part's chunks."""
    if team.n_pieces > 0:
        publish(state_place(5, team.rank, split, like), number_of(count, like), team, split)


def token_numbers_with(with_entropy):
    """A device function for the first pass; `with_entropy` is a constant, since the other has less work."""
    _, finished_row = loss_numbers_with(numbers_for_probs, with_entropy)

    @device
    def state_of_piece(held, sums, is_finite, piece, source, split, params):
        """(its state, its distances, is_finite as in `sum_and_distances`)"""
        largest = largest_of_piece(held, piece, source, split, params)
        unpack_again(held, source, split)
        if with_entropy:
            total, distances, is_finite = sum_and_distances(held, sums, largest, is_finite, piece, split, params)
        else:
            total = piece_sum(held, sums, largest, anchor(largest, params[2]), piece, split, params)
            distances = number(largest, 0.0)
        ties, rest = number(largest, 0.0), number(largest, 0.0)
        if not is_long(split):
            ties, rest = second_look(held, sums, largest, total, piece, split, params)
            if with_entropy:
                distances = second_look_at_distances(held, largest, total, distances, piece, split, params)
        return (largest, total, ties, rest), distances, is_finite

    @device
    def joined_distances(one, state, other, other_state, row_max, params):
        if not with_entropy:
            return one
        one = distances_as_part(one, state[0], state[1], row_max, params)
        return add(one, distances_as_part(other, other_state[0], other_state[1], row_max, params))

    @device
    def first_pass(source, asked, n_cols, team, split, params):
        """(state, distances) of the one chunk, while those of several lie in shared memory; how many columns of this
        part are above the threshold, and the first of them that has its maximum.
        """
        zero, least = number(params[0], 0.0), number(params[0], -math.inf)
        held, sums = piece_numbers(zero), granule_numbers(zero)
        state, distances = (least, zero, zero, zero), zero
        count, best, column, is_finite = int32(0), least, int32(0), True
        last_piece = int32((1 << split_piece_bits(split)) - 1)
        announce(split)
        open_row((source,), n_cols, team, split, least)
        meet(split)
        threshold = zero
        if asked.is_counted:
            threshold = threshold_of(source, asked, team, split, zero)  # while the row is under way
        k = int32(0)
        while k < team.n_pieces:
            wait_for_piece(k, team, split)
            piece = read_logits(held, source, k, n_cols, team, split, params)
            stage_next(k, (source,), n_cols, team, split, least)
            if asked.is_counted:  # first, while the words of pairs are in registers
                count = int32(count + count_above(held, threshold, piece, source, split))
            current, more, is_finite = state_of_piece(held, sums, is_finite, piece, source, split, params)
            # Where a warp has several rows, all of its lanes take part.
            if asked.is_found and (is_one_chunk(split) or current[0] > best):
                first = first_with(held, current[0], piece, team, split, source)
                if current[0] > best:
                    best, column = current[0], first
            if k & last_piece == 0:
                state, distances = current, more
            else:
                merged = joined(state, current, params)
                distances = joined_distances(distances, state, more, current, merged[0], params)
                state = merged
            if not is_one_chunk(split) and k & last_piece == last_piece:
                place = state_place(0, chunk_of(k, team, split), split, zero)
                if with_entropy:
                    publish_pair_and(place, state[0], state[1], 4, distances, team, split)
                else:
                    publish_pair(place, state[0], state[1], team, split)
                if not is_long(split):
                    publish_second_look(k, state, team, split)
            k = int32(k + 1)
        if asked.is_counted:
            count = warp_count(count, split_lanes(split))
            if not is_one_chunk(split):
                publish_count(count, team, split, zero)
        return state, distances, count, column

    @device
    def token_numbers(source, asked, n_cols, team, split, params):
        """(numbers, D, count, column): the numbers of the row that `numbers_for_probs` gives, to all its threads; to
        the leading warp of a block the mean distance in nats and, if they are asked for, how many logits are above the
        threshold; and the first column of the maximum, which only the part that holds it knows: -1 elsewhere.
        """
        params = of_cheap(params)
        state, distances, count, column = first_pass(source, asked, n_cols, team, split, params)
        numbers = finished_row(state, source, n_cols, team, split, params)
        row_max, above_threshold = mul(numbers[0], number(numbers[0], 2.0)), int64(count)
        if not is_one_chunk(split):
            if leads_row(split):
                if with_entropy:
                    distances = merged_distances(row_max, team, split, params)
                if asked.is_counted:
                    above_threshold = merged_count(team, split, row_max)
            if asked.is_found:
                owner = remainder(first_chunk_with(row_max, team, split), team.size)
                column = column if owner == team.rank else int32(-1)
        return numbers, in_nats(mul(distances, numbers[3])), above_threshold, column

    return token_numbers


@device
def leads_row(split):
    """Whether this warp is the one of its block that does for a row what one warp is enough for."""
    return is_columns(split) or leads_block()


plain_numbers = token_numbers_with(with_entropy=False)
numbers_and_distances = token_numbers_with(with_entropy=True)


@device
def told_mean(mean, split):
    """What the leading warp of a block knows, for all threads of the row."""
    if not is_long(split):
        return mean
    place = row_place(4, int32(0), split, mean)
    cuda.syncthreads()  # every warp has read what lay there before
    if cuda.threadIdx.x == 0:
        put(place, mean)
    cuda.syncthreads()  # it is there before any warp reads it
    return get(place, mean)


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
