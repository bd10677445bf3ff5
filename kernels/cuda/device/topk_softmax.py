"""Softmax over the largest logits of each row, which largest.py finds.

The mathematics stands in kernels/cpu/topk_softmax.py. Probabilities among all columns have the bits of softmax.py.
"""

import math

from numpy import int32, int64

from gpusoftmax.kernels.cuda.device._cuda import cuda, device
from gpusoftmax.kernels.cuda.device.arithmetic import add_pair, div, mul, number, row_inverse
from gpusoftmax.kernels.cuda.device.exponential import (
    anchor,
    cheap_exp_from,
    corrected_inverse,
    exact_exp_gap,
    lowest_of,
    ordered_exp_from,
)
from gpusoftmax.kernels.cuda.device.largest import keep_best, keep_none, largest_with
from gpusoftmax.kernels.cuda.device.memory import load, row_offset, store, store_integer
from gpusoftmax.kernels.cuda.device.piece_state import gap_params, halved, is_near, of_cheap
from gpusoftmax.kernels.cuda.device.pieces import own_row, team_of
from gpusoftmax.kernels.cuda.device.row_state import begin_row, first_pass_with, softmax_row
from gpusoftmax.kernels.cuda.device.rows import row_of
from gpusoftmax.kernels.cuda.device.split import is_long, split_lanes


@device
def write_probability(j, x, col, numbers):
    target, indices, first, half, exponent, lowest, factor, params = numbers
    scale, scale_low, c, c_low = params
    if is_near(exponent):
        e = ordered_exp_from(x, exponent, lowest, c, c_low)
    else:
        e = exact_exp_gap(x, half, scale, scale_low, c, c_low)
    store(target, j, mul(e, factor))
    store_integer(indices.pointer, first + j, int64(col) if factor == factor else int64(-1))


write_largest = largest_with(write_probability)
sums_and_maxima = first_pass_with(second_looks=False, keep=keep_best)


@device
def renormalise(target, k, lane, lanes, like):
    """Divides k exponentials by their sum, each lane some of them; 0 of them where the row is another's."""
    total, low = number(like, 0.0), number(like, 0.0)
    j = int32(0)
    while j < k:  # a range of 64 bits takes three times the instructions, and with a step a division
        total, low = add_pair(total, low, load(target, j, like), number(like, 0.0))
        j = int32(j + 1)
    inverse = div(number(like, 1.0), total)
    cuda.syncwarp()  # every lane has read them all before any writes
    j = lane
    while j < k:
        store(target, j, mul(load(target, j, like), inverse))
        j = int32(j + lanes)


def topk_softmax_rows(rows, split, start, logits, probs, indices, k, renormalize, scale, scale_low):
    params = gap_params(scale, scale_low)
    team = team_of(split, 1)
    row = own_row(start, split)
    exists = row < rows.n_rows
    n_cols = rows.n_cols if exists else 0
    source, target = row_of(logits, row, rows), row_of(probs, row, rows).pointer
    keep_none(split, scale)
    begin_row(source, n_cols, team, split, params)
    state = sums_and_maxima(source, n_cols, team, split, of_cheap(params))
    row_max, total = softmax_row(state, team, split, of_cheap(params))
    exponent = anchor(row_max, params[2])
    lowest = lowest_of(exponent, params[2])
    if total == cheap_exp_from(row_max, exponent, lowest, params[2], params[3]):
        # Nothing but one maximum counts. Relative to itself it is exactly 1.
        exponent, total = number(total, math.inf), number(total, 1.0)
    factor = corrected_inverse(row_inverse(row_max, total, number(total, 0.0)), row_max, exponent, params[3])
    if renormalize != 0 and factor == factor:
        factor = number(total, 1.0)
    numbers = target, indices, row_offset(indices, row, rows), halved(row_max), exponent, lowest, factor, params
    write_largest(source, k, n_cols, exists, row_max, team, split, params, numbers)
    if renormalize != 0:
        # Every thread has written its exponentials before they are added.
        if is_long(split):
            cuda.syncthreads()
        else:
            cuda.syncwarp()
        renormalise(target, int32(k if exists and team.rank == 0 else 0), team.lane, split_lanes(split), scale)
