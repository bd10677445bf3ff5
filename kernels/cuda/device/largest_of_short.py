"""The k largest logits of a row of one piece, in order, by the lanes of a warp that share it.

They have the row in registers once more. Halving an interval (kernels/ordering.py) finds a bound that k logits reach
and not many more; these are candidates, as in largest.py, and find their places by counting the better ones. Up to
GROUP of them few_largest.py finds faster, but not of float64, whose keys would not hold a column.
"""

import math

from numpy import int32

from gpusoftmax.kernels.cuda.device._cuda import cuda, device
from gpusoftmax.kernels.cuda.device.arithmetic import number
from gpusoftmax.kernels.cuda.device.few_largest import few_largest_with
from gpusoftmax.kernels.cuda.device.memory import (
    element_size,
    integer_of,
    mantissa_bits,
    n_values,
    number_of,
    number_size,
    piece_numbers,
)
from gpusoftmax.kernels.cuda.device.orders import halfway, of_order, order_of
from gpusoftmax.kernels.cuda.device.piece_state import read_logits
from gpusoftmax.kernels.cuda.device.pieces import col_of, has_columns
from gpusoftmax.kernels.cuda.device.reduce import any_lane, lanes_before, last_of_lanes, n_lanes, warp_count
from gpusoftmax.kernels.cuda.device.row_state import row_place
from gpusoftmax.kernels.cuda.device.shared_numbers import get_pair, put_pair
from gpusoftmax.kernels.cuda.device.split import n_parts, own_part, split_lanes
from gpusoftmax.kernels.cuda.device.staging import staged
from gpusoftmax.kernels.cuda.device.tournament import is_better
from gpusoftmax.kernels.cuda.device.transform import transformed
from gpusoftmax.kernels.cuda.plan import GROUP, LANE_CANDIDATES


@device
def most_candidates(split):
    """How many candidates a row has room for."""
    return int32(LANE_CANDIDATES * split_lanes(split))


@device
def enough_for(k):
    """So many candidates are few enough: looking for a closer bound would take longer."""
    return int32(k + (k >> 2) + 2)


@device
def own_candidate_place(k, split, like):
    """Behind the numbers of the block's rows."""
    return row_place(0, n_parts(split), split, like) + 2 * (own_part(split) * most_candidates(split) + k) * number_size(
        like
    )


@device
def reach_in_group(held, first, bound):
    """A bit for each of a group's numbers that reaches the bound and is not masked."""
    bits = int32(0)
    for j in range(GROUP):
        if held[first + j] >= bound and held[first + j] > number(bound, -math.inf):
            bits = int32(bits | (1 << (first + j)))
    return bits


@device
def reaching(held, bound, piece, split):
    """The same for all of a lane's numbers."""
    bits = int32(0)
    for group in range(0, n_values(bound), GROUP):
        if has_columns(group, piece, split):
            bits = int32(bits | reach_in_group(held, group, bound))
    return bits


@device
def bound_of_row(held, k, row_max, piece, split):
    """A number that k of the row's logits reach and not many more; -inf where only masked ones are left."""
    low = order_of(number(row_max, -math.inf))
    high = order_of(row_max) + 1
    middle, count = max(high - (2 << mantissa_bits(row_max)), low), enough_for(k) + 1
    searches = high > low + 1
    while any_lane(searches):  # the rows of a warp together
        bits = reaching(held, of_order(middle, row_max), piece, split)
        found = warp_count(n_lanes(bits), split_lanes(split))
        if searches:
            if found >= k:
                low, count = middle, found
            else:
                high = middle
        middle = halfway(low, high, 1)
        searches = searches and count > enough_for(k) and middle != low
    return of_order(low, row_max)


@device
def put_candidates(bits, at, source, piece, team, split, like):
    """Puts the candidates of a lane, which it has a bit for each of, from number `at` on."""
    place = int32(team.slots + source.shift * element_size(source.pointer))
    while bits != 0:
        j = int32(cuda.ffs(bits) - 1)
        col = col_of(j, team, split, source)
        x = transformed(
            staged(source.pointer, int32(place + col * element_size(source.pointer)), like), col, source.through
        )
        put_pair(own_candidate_place(at, split, like), x, number_of(int32(col), x))
        bits, at = int32(bits & (bits - 1)), int32(at + 1)


def masked_with(write, place_of):
    """A device function that calls write for what follows the candidates, of which there are fewer than k: the first
    columns that are none, each by one of `n_threads` threads, of which this is number `thread`. place_of: where
    candidate j is.
    """

    @device
    def write_masked(k, count, thread, n_threads, split, like, numbers):
        for col in range(thread, k, n_threads):
            place, is_candidate = int32(count + col), False
            for j in range(count):
                _, stored = get_pair(place_of(j, split, like), like)
                if integer_of(stored) < col:
                    place = int32(place - 1)
                if integer_of(stored) == col:
                    is_candidate = True
            if not is_candidate and place < k:
                write(place, number(like, -math.inf), int32(col), numbers)

    return write_masked


def short_ranking_with(write):
    """A device function that calls write(j, logit, column, numbers) for the k largest logits of a row, j = 0, 1, ...,
    each in one of its lanes; whether it has: it does nothing where a row of the warp has too many candidates or no
    room for enough.
    """
    write_masked, write_few = masked_with(write, own_candidate_place), few_largest_with(write)

    @device
    def write_ranked(k, count, team, split, like, numbers):
        for mine in range(team.lane, count, split_lanes(split)):
            value, stored = get_pair(own_candidate_place(mine, split, like), like)
            col, place = integer_of(stored), int32(0)
            for j in range(count):
                other, stored = get_pair(own_candidate_place(j, split, like), like)
                if is_better(other, integer_of(stored), value, col):
                    place = int32(place + 1)
            if place < k:
                write(place, value, col, numbers)

    @device
    def write_short(source, k, n_cols, exists, row_max, team, split, params, numbers):
        held = piece_numbers(row_max)
        piece = read_logits(held, source, int32(0), n_cols, team, split, params)
        if k <= GROUP and number_size(row_max) == 4:
            write_few(held, k, exists, source, piece, team, split, numbers)
            return True
        if enough_for(k) > most_candidates(split):
            return False
        bits = reaching(held, bound_of_row(held, k, row_max, piece, split), piece, split)
        before = lanes_before(n_lanes(bits), team.lane, split_lanes(split))
        count = last_of_lanes(int32(before + n_lanes(bits)), team.lane, split_lanes(split))
        if any_lane(count > most_candidates(split)):
            return False
        put_candidates(bits, before, source, piece, team, split, row_max)
        cuda.syncwarp()  # the candidates are there before any lane reads them
        if exists:
            write_ranked(k, count, team, split, row_max, numbers)
            if count < k:
                write_masked(k, count, team.lane, split_lanes(split), split, row_max, numbers)
        return True

    return write_short
