"""The distances to the maximum that an entropy needs, D = sum_c e_c (max - x_c) / T, of a piece in registers.

In base 2, where an exponential is e_c = 2^g_c (exponential.py) and the maximum has the exponent g, distances are
g - g_c, and of a sum over columns

    D = g sum_c e_c - sum_c e_c g_c

so that a column takes one fma more than its exponential. Exponents refer to a power of two: |g| <= 1/2, and what the
two terms lose to each other is u/2 of the sum, the maximum's own share included. An entropy bears that where the others
are half as much as the maximum or more. Elsewhere the distances are taken one by one: then the maximum adds exactly 0.
"""

import math

from gpusoftmax.kernels.cuda.device._cuda import device
from gpusoftmax.kernels.cuda.device.arithmetic import add, fma, mul, number, reference, sub
from gpusoftmax.kernels.cuda.device.exponential import (
    above_floor,
    anchor,
    cheap_exp_from,
    cheap_exp_gap,
    exponent_from,
    exponent_of_gap,
    lowest_of,
)
from gpusoftmax.kernels.cuda.device.exponential_sums import begin, end, sum_of_lanes, with_group
from gpusoftmax.kernels.cuda.device.memory import granule_numbers, n_values
from gpusoftmax.kernels.cuda.device.piece_state import group_sum, halved, is_near, is_settled, members
from gpusoftmax.kernels.cuda.device.pieces import has_columns
from gpusoftmax.kernels.cuda.device.reduce import any_lane, warp_sum
from gpusoftmax.kernels.cuda.device.split import is_long, split_lanes
from gpusoftmax.kernels.cuda.plan import GROUP

LN_2 = math.log(2)


@device
def in_nats(distance):
    return mul(distance, number(distance, LN_2))


@device
def exponent_of_maximum(largest, exponent, params):
    """g."""
    if is_near(exponent):
        return exponent_from(reference(largest), exponent, params[2])
    return number(exponent, 0.0)


def group_sums_with(near, floored=True):
    @device
    def group_sums(values, held, first, largest, exponent, params):
        """(sum e, sum e g) of a group, whose exponentials are left in `values`."""
        scale, scale_low, c, c_low = params
        lowest, half = lowest_of(exponent, c), halved(largest)
        exponents = number(scale, 0.0)
        for k in range(GROUP):
            x = held[first + k]
            if near:
                values[k], g = cheap_exp_from(x, exponent, lowest, c, c_low), exponent_from(x, exponent, c)
            else:
                values[k], g = cheap_exp_gap(x, half, scale, scale_low, c, c_low), exponent_of_gap(x, half, c)
            exponents = fma(values[k], above_floor(g) if floored else g, exponents)
        return group_sum(values, 0), exponents

    return group_sums


def piece_sums_with(group_sums):
    @device
    def piece_sums(held, sums, largest, exponent, piece, split, params):
        values, begun, low = granule_numbers(largest), begin(number(largest, 1.0)), number(largest, 0.0)
        total, exponents = begun, number(largest, 0.0)
        for group in range(0, n_values(largest), GROUP):
            if has_columns(group, piece, split):
                sums[group // GROUP], more = group_sums(values, held, group, largest, exponent, params)
                total, low = with_group(total, low, sums[group // GROUP], members(values))
                exponents = add(exponents, more)
        return end(total, begun), low, exponents

    return piece_sums


swift_sums = piece_sums_with(group_sums_with(near=True, floored=False))
near_sums = piece_sums_with(group_sums_with(near=True))
far_sums = piece_sums_with(group_sums_with(near=False))


@device
def sum_and_distances(held, sums, largest, is_finite, piece, split, params):
    """(sum e, D, is_finite) of a piece. Its sum and those of this lane's groups have the bits that piece_sum gives.

    A logit of -inf has 0 times infinity for a product, unless exponents have a floor, one instruction for each column.
    A long row goes without until it meets one: `is_finite`, from piece to piece. No bit depends on that.
    """
    exponent = anchor(largest, params[2])
    top = exponent_of_maximum(largest, exponent, params)
    if is_long(split) and is_finite and is_near(exponent):
        total, low, exponents = swift_sums(held, sums, largest, exponent, piece, split, params)
        total, exponents = sum_of_lanes(total, low, split_lanes(split)), warp_sum(exponents, split_lanes(split))
        if exponents == exponents:
            return total, fma(top, total, -exponents), True
    if is_near(exponent):
        total, low, exponents = near_sums(held, sums, largest, exponent, piece, split, params)
    else:
        total, low, exponents = far_sums(held, sums, largest, exponent, piece, split, params)
    # Not above: short rows of one warp may go either way.
    total, exponents = sum_of_lanes(total, low, split_lanes(split)), warp_sum(exponents, split_lanes(split))
    return total, fma(top, total, -exponents), False


def group_distances_with(near):
    @device
    def group_distances(held, first, largest, exponent, params):
        """D of a group, from the distances of its columns."""
        scale, scale_low, c, c_low = params
        lowest, half = lowest_of(exponent, c), halved(largest)
        top, total = exponent_of_maximum(largest, exponent, params), number(scale, 0.0)
        for k in range(first, first + GROUP):
            x = held[k]
            if near:
                e = cheap_exp_from(x, exponent, lowest, c, c_low)
                total = fma(e, sub(top, above_floor(exponent_from(x, exponent, c))), total)
            else:
                e = cheap_exp_gap(x, half, scale, scale_low, c, c_low)
                total = fma(e, -above_floor(exponent_of_gap(x, half, c)), total)
        return total

    return group_distances


near_distances, far_distances = group_distances_with(near=True), group_distances_with(near=False)


@device
def distances_one_by_one(held, largest, piece, split, params):
    """D of a piece, relative to the anchor of `largest`, which need not be its own maximum."""
    exponent, total = anchor(largest, params[2]), number(largest, 0.0)
    for group in range(0, n_values(largest), GROUP):
        if has_columns(group, piece, split):
            if is_near(exponent):
                total = add(total, near_distances(held, group, largest, exponent, params))
            else:
                total = add(total, far_distances(held, group, largest, exponent, params))
    return warp_sum(total, split_lanes(split))


@device
def second_look_at_distances(held, largest, total, distances, piece, split, params):
    """D of a piece as it is, or one by one where the sum tells too little of it."""
    confident = not is_settled(largest, total, params)
    if any_lane(confident):  # the others of the warp keep what they have
        exact = distances_one_by_one(held, largest, piece, split, params)
        if confident:
            distances = exact
    return distances
