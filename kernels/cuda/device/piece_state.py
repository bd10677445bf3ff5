"""The state of a piece, from what the lanes of a warp hold of it in registers; row_state.py says what a state is."""

import math

from numpy import int32

from gpusoftmax.kernels.cuda.device._cuda import device
from gpusoftmax.kernels.cuda.device.arithmetic import (
    add,
    exp_gap,
    maximum,
    mul,
    number,
    reference,
    sub,
    tie,
)
from gpusoftmax.kernels.cuda.device.exponential import (
    anchor,
    cheap_exp_from,
    cheap_exp_gap,
    low_of_cheap,
    lowest_of,
    scale_in_base_2,
    unless_equal,
)
from gpusoftmax.kernels.cuda.device.exponential_sums import begin, difference_pair, end, sum_of_lanes, with_group
from gpusoftmax.kernels.cuda.device.memory import granule_numbers, n_values, vector_bits
from gpusoftmax.kernels.cuda.device.pieces import has_columns, piece_of, slot_of
from gpusoftmax.kernels.cuda.device.reduce import any_lane, warp_max, warp_sum
from gpusoftmax.kernels.cuda.device.slots import read_piece
from gpusoftmax.kernels.cuda.device.split import (
    split_lanes,
)
from gpusoftmax.kernels.cuda.device.transform import left_to_read, transform_runs
from gpusoftmax.kernels.cuda.plan import GROUP


@device
def gap_params(scale, scale_low):
    """What an exponential of a gap needs to know besides the logit and the maximum."""
    c, c_low = scale_in_base_2(scale, scale_low)
    return scale, scale_low, c, c_low


@device
def read_logits(held, source, k, n_cols, team, split, params):
    """held = piece k, transformed; padding never becomes a maximum and adds nothing to a sum."""
    piece = piece_of(k, n_cols, team, split, params[0])
    read_piece(held, source, slot_of(k, team, split, 1), piece, team, split)
    bits, lanes = vector_bits(source.pointer), split_lanes(split)
    col, step = piece.first + (team.lane << bits), lanes << bits
    left = int32(left_to_read(piece, source.through) - (team.lane << bits))
    transform_runs(held, col, 1 << bits, n_values(params[0]) >> bits, step, left, source.through)
    return piece


@device
def group_sum(values, first):
    """The sum of GROUP values as a balanced tree."""
    low = add(add(values[first], values[first + 1]), add(values[first + 2], values[first + 3]))
    return add(low, add(add(values[first + 4], values[first + 5]), add(values[first + 6], values[first + 7])))


@device
def members(values):
    """A group as a tuple."""
    return values[0], values[1], values[2], values[3], values[4], values[5], values[6], values[7]


@device
def group_max(values, first):
    largest = values[first]
    for k in range(first + 1, first + GROUP):
        largest = maximum(largest, values[k])
    return largest


@device
def lane_max(held, piece, split, params):
    """The maximum of this lane's columns."""
    largest = number(params[0], -math.inf)
    for group in range(0, n_values(params[0]), GROUP):
        if has_columns(group, piece, split):
            largest = maximum(largest, group_max(held, group))
    return largest


@device
def piece_max(held, piece, split, params):
    return warp_max(lane_max(held, piece, split, params), split_lanes(split))


def group_sum_with(near, with_maximum=True, lift=0):
    """A device function that sums the exponentials of a group, or of what is less than the maximum, and leaves them in
    `values`. With a lift they are 2^lift times as much, so that terms far below the maximum are not lost.
    """

    @device
    def group_sum_of(values, held, first, largest, exponent, params):
        scale, scale_low, c, c_low = params
        lifted = sub(exponent, number(scale, lift)) if lift else exponent
        lowest, half = lowest_of(lifted, c), halved(largest)
        for k in range(GROUP):
            x = held[first + k]
            if near:
                values[k] = cheap_exp_from(x, lifted, lowest, c, c_low)
            elif lift:
                values[k] = lifted_exp_gap(x, half, scale, scale_low, lift)
            else:
                values[k] = cheap_exp_gap(x, half, scale, scale_low, c, c_low)
            if not with_maximum:
                values[k] = unless_equal(values[k], x, largest)
        return group_sum(values, 0)

    return group_sum_of


def piece_sum_with(with_maximum=True, lift=0):
    """A device function that sums the exponentials of a piece; the sums of this lane's groups are left in `sums`."""
    near_sum, far_sum = group_sum_with(True, with_maximum, lift), group_sum_with(False, with_maximum, lift)

    @device
    def piece_sum(held, sums, largest, exponent, piece, split, params):
        values, begun, low = granule_numbers(exponent), begin(number(exponent, 2.0**lift)), number(exponent, 0.0)
        total = begun
        if is_near(exponent):
            for group in range(0, n_values(exponent), GROUP):
                if has_columns(group, piece, split):
                    sums[group // GROUP] = near_sum(values, held, group, largest, exponent, params)
                    total, low = with_group(total, low, sums[group // GROUP], members(values))
        else:
            for group in range(0, n_values(exponent), GROUP):
                if has_columns(group, piece, split):
                    sums[group // GROUP] = far_sum(values, held, group, largest, exponent, params)
                    total, low = with_group(total, low, sums[group // GROUP], members(values))
        return sum_of_lanes(end(total, begun), low, split_lanes(split))

    return piece_sum


LIFT = 64
piece_sum = piece_sum_with()
lifted_rest = piece_sum_with(with_maximum=False, lift=LIFT)
near_rest = group_sum_with(near=True, with_maximum=False)
far_rest = group_sum_with(near=False, with_maximum=False)


@device
def lifted_exp_gap(x, half, scale, scale_low, lift):
    """2^lift exp((x - max) scale), gradual underflow included."""
    return mul(exp_gap(mul(x, number(scale, 0.5)), half, scale, scale_low), number(scale, 2.0**lift))


@device
def of_cheap(params):
    """The parameters for sums, which are those of cheap exponentials."""
    scale, scale_low, c, c_low = params
    return scale, scale_low, c, low_of_cheap(c_low)


@device
def is_near(exponent):
    return exponent < number(exponent, math.inf)


@device
def halved(largest):
    return mul(reference(largest), number(largest, 0.5))


@device
def piece_state(held, sums, piece, split, params):
    largest = piece_max(held, piece, split, params)
    return largest, piece_sum(held, sums, largest, anchor(largest, params[2]), piece, split, params)


@device
def ties_of(held, first, largest):
    """How many columns of a group equal the maximum."""
    total = number(largest, 0.0)
    for k in range(first, first + GROUP):
        total = add(total, tie(held[k], largest))
    return total


@device
def without_maximum(held, sums, largest, exponent, piece, split, params):
    """(ties, rest) of a piece: how many columns equal its maximum, and the sum over the others. Most groups have
    no maximum in any lane and keep their sums.
    """
    ties, rest = number(largest, 0.0), number(largest, 0.0)
    values = granule_numbers(largest)
    for group in range(0, n_values(largest), GROUP):
        reached = has_columns(group, piece, split)
        found = False
        if reached:
            found = group_max(held, group) == largest
        if any_lane(found) and reached:  # the warp's rows may have ended, but all its lanes must be asked
            ties = add(ties, ties_of(held, group, largest))
            if is_near(exponent):
                sums[group // GROUP] = near_rest(values, held, group, largest, exponent, params)
            else:
                sums[group // GROUP] = far_rest(values, held, group, largest, exponent, params)
        if reached:
            rest = add(rest, sums[group // GROUP])
    return warp_sum(ties, split_lanes(split)), warp_sum(rest, split_lanes(split))


@device
def at_maximum(largest, exponent, params):
    """What the maximum itself adds to piece_sum: the same bits."""
    scale, scale_low, c, c_low = params
    if not is_near(exponent):
        return number(scale, 1.0)
    return cheap_exp_from(reference(largest), exponent, lowest_of(exponent, c), c, c_low)


@device
def is_settled(largest, total, params):
    """Whether what a sum has beside one maximum follows from it."""
    own = at_maximum(largest, anchor(largest, params[2]), params)
    return total >= mul(own, number(own, 1.5))


@device
def settled(largest, total, ties, rest, params):
    """(max, ties, others, others_low) from a sum, or from a second look where it does not tell."""
    if is_settled(largest, total, params):
        others, low = difference_pair(total, at_maximum(largest, anchor(largest, params[2]), params))
        return largest, number(total, 1.0), others, low
    return largest, ties, rest, number(total, 0.0)


@device
def second_look(held, sums, largest, total, piece, split, params):
    """(ties, rest) of a piece: how many columns equal its maximum, the sum over the others; 0 where its sum tells."""
    zero = number(total, 0.0)
    ties, rest = zero, zero
    confident = not is_settled(largest, total, params)
    if any_lane(confident):  # the others of the warp keep what they have
        exponent = anchor(largest, params[2])
        exact_ties, exact_rest = without_maximum(held, sums, largest, exponent, piece, split, params)
        tiny = exact_rest < number(zero, 2.0**-60)
        if any_lane(tiny):  # terms that were flushed to 0 may add up to a number that would not be
            lifted = mul(lifted_rest(held, sums, largest, exponent, piece, split, params), number(zero, 2.0**-LIFT))
            if tiny:
                exact_rest = lifted
        if confident:
            rest = exact_rest
            if largest > number(zero, -math.inf):
                ties = exact_ties
    return ties, rest
