"""The state (max, ties, tail, tail_low) of a piece; `gpusoftmax.kernels.formulas` defines it.

A lane's columns are summed up, then a butterfly goes over the lanes: the maximum first, so that nothing is rescaled.

A piece's maximum adds exactly 1 to the sum S over its columns, and S - 1 is what its ties and the others add. Where S
is 1.5 or more, that has at most three times the relative error of S. Where it is less, the sum is taken again without
the maximum, which keeps the loss of a confident row exact. NaN and infinities take that way too.
"""

import math

from numpy import int32

from gpusoftmax.kernels.cuda.device._cuda import cuda, device
from gpusoftmax.kernels.cuda.device.arithmetic import add, maximum, mul, number, reference, sub, tie
from gpusoftmax.kernels.cuda.device.columns import (
    any_of_block,
    lane_of,
    read_lane,
    row_in_block,
    warp_of_block,
    warps_of_block,
)
from gpusoftmax.kernels.cuda.device.exponential import accurate_exp_gap, cheap_exp_gap, gradual_exp_gap, scale_in_base_2
from gpusoftmax.kernels.cuda.device.memory import n_values, number_size, piece_numbers, stored_in_halves
from gpusoftmax.kernels.cuda.device.reduce import any_lane, next_parts, no_parts, team_max, team_sum, warp_sum
from gpusoftmax.kernels.cuda.device.rows import Piece, has_columns, read_piece
from gpusoftmax.kernels.cuda.device.split import (
    is_columns,
    split_lane_bits,
    split_lanes,
    split_row_bits,
    split_turns,
)
from gpusoftmax.kernels.cuda.device.staging import fresh_lane, get, put
from gpusoftmax.kernels.cuda.device.transform import transform
from gpusoftmax.kernels.cuda.plan import GROUP, MAX_THREADS, WARP_SIZE


@device
def gap_params(scale, scale_low):
    """What an exponential of a gap needs to know besides the logit and the maximum."""
    c, c_low = scale_in_base_2(scale, scale_low)
    return scale, scale_low, c, c_low


@device
def read_logits(held, source, at, piece, turn, row, team, split, params):
    """held = a lane's columns through `transform`; padding never becomes a maximum and adds nothing to a sum."""
    read_piece(held, source, at, piece, turn, team, split, number(params[0], -math.inf))
    for j in range(n_values(params[0])):
        held[j] = transform(held[j], piece.first + lane_of(turn, team, split) + j * split_lanes(split), row, params)


@device
def read_turn(held, source, at, piece, turn, row, team, split, params):
    """As read_logits, where one lane's columns have not been held since the piece was opened."""
    if is_columns(split):
        read_logits(held, source, at, piece, turn, row, team, split, params)


@device
def group_sum(values, first):
    """The sum of GROUP values as a balanced tree."""
    low = add(add(values[first], values[first + 1]), add(values[first + 2], values[first + 3]))
    return add(low, add(add(values[first + 4], values[first + 5]), add(values[first + 6], values[first + 7])))


@device
def piece_max(held, source, at, piece, row, team, split, params):
    largest = number(params[0], -math.inf)
    for turn in range(split_turns(split)):
        read_turn(held, source, at, piece, turn, row, team, split, params)
        for group in range(0, n_values(params[0]), GROUP):
            if has_columns(group, piece, split):
                for k in range(group, group + GROUP):
                    largest = maximum(largest, held[k])
    return team_max(largest, 0, split)


@device
def exact_sums(held, values, largest, piece, split, params):
    """(ties, tail) of a piece, by the lanes of a warp: the sum without the maximum."""
    scale, scale_low, _, _ = params
    zero = number(scale, 0.0)
    half = mul(reference(largest), number(scale, 0.5))
    ties, tail = zero, zero
    for group in range(0, n_values(scale), GROUP):
        if has_columns(group, piece, split):
            for k in range(group, group + GROUP):
                values[k] = gradual_exp_gap(held[k], half, scale, scale_low)
                if held[k] == largest:
                    values[k] = zero
            tail = add(tail, group_sum(values, group))
            for k in range(group, group + GROUP):
                values[k] = tie(held[k], largest)
            ties = add(ties, group_sum(values, group))
    ties, tail = warp_sum(ties, split_lanes(split)), warp_sum(tail, split_lanes(split))
    if largest == number(scale, -math.inf):
        ties = zero
    return ties, tail


# ---------------------------------------------------------------- the same where a block has rows side by side
#
# Few rows are confident, but most blocks have one: its sum is taken by one warp, which reads what other threads have
# copied. The numbers 0 and 1 of a row tell its maximum and its columns, 2 and 3 are the sums. They lie where columns.py
# exchanges numbers: the barriers of piece_state keep them apart.


@device
def told_place(number_of_row, row, like):
    return (number_of_row * (MAX_THREADS // 2) + row) * number_size(like)


@device
def told(number_of_row, row, like):
    return get(told_place(number_of_row, row, like), like)


@device
def tell_row(largest, confident, piece, split):
    """One thread of each row tells how many columns are to be summed again, and what their maximum is."""
    row = row_in_block(split)
    if int32(cuda.threadIdx.x) >> split_row_bits(split) == 0:
        put(told_place(0, row, largest), largest)
        put(told_place(1, row, largest), int32(piece.count if confident else 0))


@device
def exact_rows(held, values, source, at, piece, own, split, params):
    """The sums of the rows of the block that ask for them. `own` is the row of this thread."""
    rows, lane_mask = int32(1 << split_row_bits(split)), int32(split_lanes(split) - 1)
    at_once = int32(WARP_SIZE >> split_lane_bits(split))
    for first in range(warp_of_block() * at_once, rows, warps_of_block() * at_once):
        place = fresh_lane()
        row, lane = int32(first + (place >> split_lane_bits(split))), int32(place & lane_mask)
        count = get(told_place(1, row, params[0]), int32(0)) if row < rows else int32(0)
        if any_lane(count > 0):
            asked = Piece(piece.first, count)
            largest = told(0, row, params[0]) if row < rows else number(params[0], -math.inf)
            read_lane(held, source, at, asked, row, lane, split, number(params[0], -math.inf))
            for j in range(n_values(params[0])):
                col = piece.first + lane + j * split_lanes(split)
                held[j] = transform(held[j], col, own - row_in_block(split) + row, params)
            ties, tail = exact_sums(held, values, largest, asked, split, params)
            if lane == 0 and count > 0:
                put(told_place(2, row, ties), ties)
                put(told_place(3, row, tail), tail)


def piece_state_with(exp_gap):
    """A device function that computes the state of a piece, given one of the exponentials of exponential.py."""

    @device
    def piece_state(source, held, at, piece, row, team, split, params):
        scale, scale_low, c, c_low = params
        zero, one = number(scale, 0.0), number(scale, 1.0)
        largest = piece_max(held, source, at, piece, row, team, split, params)
        half = mul(reference(largest), number(scale, 0.5))
        values = piece_numbers(scale)
        totals = no_parts(zero)
        for turn in range(split_turns(split)):
            read_turn(held, source, at, piece, turn, row, team, split, params)
            total = zero
            for group in range(0, n_values(scale), GROUP):
                if has_columns(group, piece, split):
                    for k in range(group, group + GROUP):
                        values[k] = exp_gap(held[k], half, scale, scale_low, c, c_low)
                    total = add(total, group_sum(values, group))
            totals = next_parts(totals, total)
        total = team_sum(totals, 1, split)
        ties, tail = one, sub(total, one)
        if piece.count == 0:  # of a row that does not count, or behind the end of one
            ties, tail = zero, zero
        confident = piece.count > 0 and not total >= number(scale, 1.5)
        if is_columns(split):
            tell_row(largest, confident, piece, split)
            if any_of_block(confident, scale):
                exact_rows(held, values, source, at, piece, row, split, params)
                cuda.syncthreads()  # the sums are there, and nobody reads the slots of others any more
                if confident:
                    ties, tail = told(2, row_in_block(split), scale), told(3, row_in_block(split), scale)
        elif any_lane(confident):  # the others of the warp keep what they have
            exact_ties, exact_tail = exact_sums(held, values, largest, piece, split, params)
            if confident:
                ties, tail = exact_ties, exact_tail
        return mul(largest, number(scale, 0.5)), ties, tail, zero

    return piece_state


cheap_piece_state = piece_state_with(cheap_exp_gap)
accurate_piece_state = piece_state_with(accurate_exp_gap)


@device
def loss_piece_state(source, held, at, piece, row, team, split, params):
    """For results that are logarithms. Two bytes a logit leave no time for more than the cheap exponential."""
    if stored_in_halves(source.pointer):
        return cheap_piece_state(source, held, at, piece, row, team, split, params)
    return accurate_piece_state(source, held, at, piece, row, team, split, params)
