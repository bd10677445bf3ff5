"""Masses at the columns of a row, of smoothing and of shares for every class, summed beside its state (row_state.py)
with their distances to the maximum.
"""

import math
from typing import NamedTuple

from numpy import int32

from gpusoftmax.kernels.cuda.device._cuda import device
from gpusoftmax.kernels.cuda.device.arithmetic import add, add_pair, distance_of_mass, mul, number
from gpusoftmax.kernels.cuda.device.loss_target import Loss, mass_at, tempered
from gpusoftmax.kernels.cuda.device.memory import element_size
from gpusoftmax.kernels.cuda.device.reduce import warp_min, warp_sum, warp_sum_pair
from gpusoftmax.kernels.cuda.device.row_state import NO_COLUMN, numbers_beside_with, saved_beside, saved_max
from gpusoftmax.kernels.cuda.device.split import is_one_chunk, split_chunks, split_lanes
from gpusoftmax.kernels.cuda.device.staging import staged
from gpusoftmax.kernels.cuda.device.transform import transformed
from gpusoftmax.kernels.cuda.plan import GROUP, WARP_SIZE


class Asked(NamedTuple):
    """What is asked for of a row besides its state."""

    loss: Loss
    start: int  # where the row begins in `probs`
    is_found: bool  # the first column of the maximum


@device
def mass_of_column(k, column, source, at, piece, largest, asked):
    """(distance, mass, column) of column k of a piece; `column`: the first with the maximum, if that is asked."""
    col = piece.first + k
    x = staged(source.pointer, int32(at + (source.shift + k) * element_size(source.pointer)), largest)
    x = transformed(x, col, source.through)
    mass = mass_at(col, asked.start, asked.loss, asked.loss.probs, largest)
    if asked.is_found and x == largest:
        column = min(column, int32(col))
    return distance_of_mass(tempered(mass, asked.loss.per_logit), x, largest), mass, column


@device
def masses_of_piece(source, at, piece, largest, asked, team, split, params):
    """(distances, mass, first column of the maximum): sum_c g_c (max - x_c) / T and sum_c g_c of a piece.

    The columns come from the slot again, one at a time: with all of a lane's masses beside all of its logits, registers
    run out.
    """
    zero = number(largest, 0.0)
    distances, low, total, total_low, column = zero, zero, zero, zero, int32(NO_COLUMN)
    lanes = split_lanes(split)
    k = team.lane
    while k < piece.count:
        # Of a few columns, which lose little in a plain sum and whose masses are loaded together.
        distance, part, step = zero, zero, int32(lanes * GROUP)
        if int32(k + step - lanes) < piece.count:
            for j in range(GROUP):
                one, mass, column = mass_of_column(int32(k + j * lanes), column, source, at, piece, largest, asked)
                distance, part = add(distance, one), add(part, mass)
        else:
            distance, part, column = mass_of_column(k, column, source, at, piece, largest, asked)
            step = lanes
        distances, low = add_pair(distances, low, distance, zero)
        total, total_low = add_pair(total, total_low, part, zero)
        k = int32(k + step)
    if asked.is_found:
        column = warp_min(column, lanes)
    return warp_sum(add(distances, low), lanes), warp_sum(add(total, total_low), lanes), column


@device
def moved(mass, part_max, new_max, loss):
    """By how much the distances of a part add up to more, when they are measured from a larger maximum than its own."""
    if part_max > number(mass, -math.inf):
        return distance_of_mass(tempered(mass, loss.per_logit), part_max, new_max)
    # Nothing has moved if there is no column; if -inf alone is there, the sum is infinite already.
    return number(mass, 0.0)


@device
def joined_masses(one, state, other, other_state, row_max, asked, params):
    distances = add(one[0], moved(one[1], state[0], row_max, asked.loss))
    more = add(other[0], moved(other[1], other_state[0], row_max, asked.loss))
    return add(distances, more), add(one[1], other[1])


@device
def merged_masses(row_max, loss, team, split):
    """(distances, mass) of all chunks, measured from the maximum of the row."""
    zero = number(row_max, 0.0)
    total, low, all_mass, all_low = zero, zero, zero, zero
    for chunk in range(team.lane, split_chunks(split), WARP_SIZE):
        distances, mass = saved_beside(chunk, split, row_max)
        total, low = add_pair(total, low, distances, zero)
        total, low = add_pair(total, low, moved(mass, saved_max(chunk, split, row_max), row_max, loss), zero)
        all_mass, all_low = add_pair(all_mass, all_low, mass, zero)
    total, low = warp_sum_pair(total, low)
    all_mass, all_low = warp_sum_pair(all_mass, all_low)
    return add(total, low), add(all_mass, all_low)


numbers_beside = numbers_beside_with(masses_of_piece, joined_masses)


@device
def numbers_and_masses(source, asked, n_cols, team, split, params):
    """(numbers of the row, sum_c g_c (max - x_c) / T, sum_c g_c, first column of the maximum: see numbers_beside)"""
    numbers, (distances, mass), column = numbers_beside(source, asked, n_cols, team, split, params)
    if not is_one_chunk(split):
        distances, mass = merged_masses(mul(numbers[0], number(mass, 2.0)), asked.loss, team, split)
    return numbers, distances, mass, column
