"""Masses at the columns of a row, of smoothing and of shares for every class, summed beside its state (row_state.py)
with their distances to the maximum.
"""

import math
from typing import NamedTuple

from numpy import int32

from gpusoftmax.kernels.cuda.device._cuda import device
from gpusoftmax.kernels.cuda.device.arithmetic import add, add_pair, distance_of_mass, mul, number
from gpusoftmax.kernels.cuda.device.granules import granule_sum, granules_with
from gpusoftmax.kernels.cuda.device.loss_target import Loss, masses_of_run, tempered
from gpusoftmax.kernels.cuda.device.memory import LINE_BYTES, element_size, granule_numbers, prefetch
from gpusoftmax.kernels.cuda.device.pieces import piece_of
from gpusoftmax.kernels.cuda.device.reduce import warp_min, warp_sum, warp_sum_pair
from gpusoftmax.kernels.cuda.device.row_state import NO_COLUMN, numbers_beside_with, saved_beside, saved_max
from gpusoftmax.kernels.cuda.device.split import is_one_chunk, split_chunks, split_lanes
from gpusoftmax.kernels.cuda.plan import WARP_SIZE


class Asked(NamedTuple):
    """What is asked for of a row besides its state."""

    loss: Loss
    probs: object  # the row of probs, or None
    is_found: bool  # the first column of the maximum


@device
def fetch_masses(k, asked, n_cols, team, split, like):
    fetch_probs(k, asked.probs, n_cols, team, split, like)


@device
def fetch_probs(k, probs, n_cols, team, split, like):
    """Starts to read the probabilities of piece k, if there is one. They are not staged: who needs them would wait for
    memory at each granule.
    """
    if probs is None:
        return
    line = LINE_BYTES // element_size(probs.pointer)
    if k < team.n_pieces and probs.stride == 1:
        piece = piece_of(k, n_cols, team, split, like)
        if team.lane * line < piece.count:
            prefetch(probs.pointer, piece.first + team.lane * line)


@device
def add_masses(result, values, col, width, source, split, numbers):
    """The masses of a granule, which lose little in a plain sum, and their distances."""
    distances, low, total, total_low, column = result
    end, largest, asked = numbers
    masses = granule_numbers(largest)
    masses_of_run(masses, col, width, int32(end - int32(col)), asked.loss, asked.probs)
    if asked.is_found:
        for k in range(width):
            if values[k] == largest:
                column = min(column, int32(col + k))
    for k in range(width):
        values[k] = distance_of_mass(tempered(masses[k], asked.loss.per_logit), values[k], largest)
    zero = number(largest, 0.0)
    distances, low = add_pair(distances, low, granule_sum(values, width), zero)
    total, total_low = add_pair(total, total_low, granule_sum(masses, width), zero)
    return distances, low, total, total_low, column


masses_of_granules = granules_with(add_masses)


@device
def masses_of_piece(source, at, piece, largest, asked, team, split, params):
    """(distances, mass, first column of the maximum): sum_c g_c (max - x_c) / T and sum_c g_c of a piece.

    The columns come from the slot again, a granule at a time: with all of a lane's masses beside all of its logits,
    registers run out.
    """
    zero = number(largest, 0.0)
    nothing, numbers = (zero, zero, zero, zero, int32(NO_COLUMN)), (int32(piece.first + piece.count), largest, asked)
    found = masses_of_granules(nothing, source, at, piece, team, split, numbers, largest)
    distances, low, total, total_low, column = found
    lanes = split_lanes(split)
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


numbers_beside = numbers_beside_with(fetch_masses, masses_of_piece, joined_masses)


@device
def numbers_and_masses(source, asked, n_cols, team, split, params):
    """(numbers of the row, sum_c g_c (max - x_c) / T, sum_c g_c, first column of the maximum: see numbers_beside)"""
    numbers, (distances, mass), column = numbers_beside(source, asked, n_cols, team, split, params)
    if not is_one_chunk(split):
        distances, mass = merged_masses(mul(numbers[0], number(mass, 2.0)), asked.loss, team, split)
    return numbers, distances, mass, column
