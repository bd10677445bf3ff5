"""The k largest logits of a row one after the other, once its first pass is done: of rows side by side, and where
largest.py finds too many candidates.

A tournament: every part has one candidate, the best of its columns that has not been chosen, and the best candidate of
all parts is chosen, k times. Only the part whose candidate was chosen looks at its columns again, most of which are
still in its slots. Better is: larger, or equal and in a lower column. The table of candidates lies where the states of
the chunks were.

    part 0   part 1   part 2          round 1: part 1's candidate is chosen, and part 1 looks for its next
      7.5      9.0      8.25          round 2: 7.5, 6.5, 8.25: that of part 2 ...
"""

import math

from numpy import int32, int64

from gpusoftmax.kernels.cuda.device._cuda import cuda, device
from gpusoftmax.kernels.cuda.device.arithmetic import number
from gpusoftmax.kernels.cuda.device.granules import granules_with
from gpusoftmax.kernels.cuda.device.memory import granule_numbers, integer_of, load, number_of, number_size
from gpusoftmax.kernels.cuda.device.pieces import piece_of, slot_of
from gpusoftmax.kernels.cuda.device.reduce import FULL_WARP, publish_pair
from gpusoftmax.kernels.cuda.device.row_barriers import exchange_states
from gpusoftmax.kernels.cuda.device.shared_numbers import get_pair
from gpusoftmax.kernels.cuda.device.split import is_long, split_lanes, split_slots
from gpusoftmax.kernels.cuda.device.transform import transformed
from gpusoftmax.kernels.cuda.plan import WARP_SIZE

NO_COLUMN = 2**31 - 1


@device
def is_better(value, col, other, other_col):
    return value > other or (value == other and col < other_col)


@device
def best_of_lanes(value, col, lanes):
    for offset in (16, 8, 4, 2, 1):
        if offset < lanes:
            other = cuda.shfl_xor_sync(FULL_WARP, value, offset)
            other_col = cuda.shfl_xor_sync(FULL_WARP, col, offset)
            if is_better(other, other_col, value, col):
                value, col = other, other_col
    return value, col


@device
def next_of_granule(best, values, col, width, source, split, numbers):
    """The best column so far that comes after a chosen one, or a better one of a granule."""
    after, after_col, n_cols = numbers
    value, at = best
    for k in range(width):
        x, own_col = values[k], int32(col + k)
        is_left = col + k < n_cols and is_better(after, after_col, x, own_col)
        if is_left and is_better(x, own_col, value, at):
            value, at = x, own_col
    return value, at


next_of_granules = granules_with(next_of_granule)


@device
def next_of_part(source, after, after_col, n_cols, team, split, params):
    """The best of this part's columns that come after a chosen one, as (logit, column); NO_COLUMN if there is none."""
    values, like = granule_numbers(params[0]), params[0]
    numbers = after, after_col, n_cols
    best = number(like, -math.inf), int32(NO_COLUMN)
    k = int32(0)
    while k < team.n_pieces:
        piece = piece_of(k, n_cols, team, split, like)
        if int32(k + split_slots(split)) >= team.n_pieces:  # it is still in its slot
            best = next_of_granules(best, source, slot_of(k, team, split, 1), piece, team, split, numbers, like)
        else:
            for within in range(team.lane, piece.count, split_lanes(split)):
                x = load(source.pointer, (piece.first + within) * source.stride, like)
                values[0] = transformed(x, piece.first + within, source.through)
                best = next_of_granule(best, values, piece.first + within, 1, source, split, numbers)
        k = int32(k + 1)
    return best_of_lanes(best[0], best[1], split_lanes(split))


@device
def place_of(part, like):
    return int64(part * 2) * number_size(like)


@device
def publish_candidate(value, col, team, split):
    publish_pair(place_of(team.rank, value), value, number_of(col, value), team, split)


@device
def best_of_parts(team, split, like):
    value, col = number(like, -math.inf), int32(NO_COLUMN)
    for part in range(team.lane, team.size, WARP_SIZE):
        other, other_col = get_pair(place_of(part, like), like)
        if is_better(other, integer_of(other_col), value, col):
            value, col = other, integer_of(other_col)
    return best_of_lanes(value, col, WARP_SIZE)


def tournament_with(write):
    """A device function that calls write(j, logit, column, numbers) for the k largest logits, j = 0, 1, ..., in the
    threads that say so (`writes`).
    """

    @device
    def tournament(source, k, n_cols, writes, team, split, params, numbers):
        like = params[0]
        value, col = next_of_part(source, number(like, math.inf), int32(-1), n_cols, team, split, params)
        if is_long(split):
            exchange_states(split)  # every warp has read the states before candidates take their place
            publish_candidate(value, col, team, split)
        for j in range(k):
            chosen, chosen_col = value, col
            if is_long(split):
                exchange_states(split)  # every candidate is in the table
                chosen, chosen_col = best_of_parts(team, split, like)
            if writes:
                write(j, chosen, chosen_col, numbers)
            if j + 1 < k:
                if is_long(split):
                    exchange_states(split)  # every warp has read the table before a candidate of it is replaced
                if chosen_col == col:
                    value, col = next_of_part(source, chosen, chosen_col, n_cols, team, split, params)
                    if is_long(split):
                        publish_candidate(value, col, team, split)

    return tournament
