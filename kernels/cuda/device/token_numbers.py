"""What a first read of a row tells about its tokens: its state, the mean distance to its maximum, the first column of
that, and how many logits are above one target's.

The sum of distances (distances.py) goes beside the state of a row (row_state.py): of a piece relative to its own
maximum and anchor, then brought to those of the chunk and of the row; it takes a second look where the state does.
Whoever counts, a number of larger logits is exact.
"""

import math
from typing import NamedTuple

from numpy import int32, int64

from gpusoftmax.kernels.cuda.device._cuda import cuda, device
from gpusoftmax.kernels.cuda.device.arithmetic import add, add_pair, fma, mul, number
from gpusoftmax.kernels.cuda.device.distances import in_nats, second_look_at_distances, sum_and_distances
from gpusoftmax.kernels.cuda.device.exponential import above_floor, anchor, exponent_of_gap, half_gap
from gpusoftmax.kernels.cuda.device.memory import (
    granule_numbers,
    integer_of,
    load,
    load_label,
    n_values,
    number_of,
    piece_numbers,
    row_offset,
)
from gpusoftmax.kernels.cuda.device.pairs import count_above, largest_of_piece, unpack_again
from gpusoftmax.kernels.cuda.device.piece_state import halved, of_cheap, piece_sum, read_logits, second_look
from gpusoftmax.kernels.cuda.device.pieces import chunk_of, col_of, has_columns
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
from gpusoftmax.kernels.cuda.device.transform import transformed
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
