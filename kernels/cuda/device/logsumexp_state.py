"""Log-sum-exp in parts: the states of chunks, and rows from such states.

What a state is stands in kernels/cpu/logsumexp_state.py. Here a chunk is measured as any other row of as many columns:
the bits of its state depend on its own columns alone. Log-sum-exp of a whole row cuts it into other pieces.

A warp folds a row: each lane the chunks of its number, 32 further on, and so on in order, then a butterfly.
"""

import math

from numpy import int64

from gpusoftmax.kernels.cuda.device._cuda import cuda, device
from gpusoftmax.kernels.cuda.device.arithmetic import (
    add,
    add_pair,
    anchor_of_formulas,
    div,
    exp_from,
    finite_or_zero,
    floor,
    fma,
    logsumexp,
    maximum,
    mul,
    negative,
    number,
    power_of_two_ratio,
    ratio_of_anchors,
    tied_total,
    where_finite,
)
from gpusoftmax.kernels.cuda.device.memory import load, store
from gpusoftmax.kernels.cuda.device.piece_state import gap_params
from gpusoftmax.kernels.cuda.device.pieces import own_row, team_of
from gpusoftmax.kernels.cuda.device.reduce import warp_max, warp_sum_pair
from gpusoftmax.kernels.cuda.device.row_state import loss_numbers_with
from gpusoftmax.kernels.cuda.device.rows import row_of
from gpusoftmax.kernels.cuda.plan import WARP_SIZE
from gpusoftmax.kernels.operands import STATE_NUMBERS

MAX, SUM, LOW, TIES = range(STATE_NUMBERS)


@device
def at_maximum(half, shift, exponent, scale, scale_low):
    """The exponential of a maximum, halved as the scale is doubled, relative to its anchor."""
    e = exp_from(half, shift, exponent, floor(exponent), scale, scale_low)
    return where_finite(half, e, number(scale, 1.0))


@device
def state_of_chunk(state, params):
    """From the state of `formulas`, whose sum is relative to the maximum."""
    half, ties, tail, tail_low = state
    shift, exponent = anchor_of_formulas(half, params[0])
    own = at_maximum(half, shift, exponent, params[0], params[1])
    total = mul(tail, own)
    low = finite_or_zero(fma(tail_low, own, fma(tail, own, negative(total))), total)
    return mul(half, number(half, 2.0)), total, low, ties


numbers_of_chunk, _ = loss_numbers_with(state_of_chunk)


def measure_rows(rows, split, start, logits, states, scale, scale_low):
    params = gap_params(scale, scale_low)
    team = team_of(split, 1)
    row = own_row(start, split)
    n_cols = rows.n_cols if row < rows.n_rows else 0
    numbers = numbers_of_chunk(row_of(logits, row, rows), n_cols, team, split, params)
    if row < rows.n_rows and team.lane == 0 and team.rank == 0:
        target = row_of(states, row, rows).pointer
        for field in range(STATE_NUMBERS):
            store(target, field, numbers[field])


@device
def ratio(shift, exponent, other_shift, other_exponent, scale, scale_low):
    """What brings exponentials from one anchor to another."""
    if shift == other_shift:
        return power_of_two_ratio(exponent, other_exponent)
    return ratio_of_anchors(shift, exponent, other_shift, other_exponent, scale, scale_low)


@device
def half_max(states, chunk, like):
    return mul(load(states, chunk * STATE_NUMBERS + MAX, like), number(like, 0.5))


@device
def folded(states, n_chunks, lane, scale, scale_low):
    """The state of `formulas` of a row, the same for all lanes."""
    zero, largest = number(scale, 0.0), number(scale, -math.inf)
    for chunk in range(lane, n_chunks, WARP_SIZE):
        largest = maximum(largest, half_max(states, chunk, scale))
    largest = warp_max(largest, WARP_SIZE)
    shift, exponent = anchor_of_formulas(largest, scale)
    others, low, ties, ties_low = zero, zero, zero, zero
    for chunk in range(lane, n_chunks, WARP_SIZE):
        own_max = half_max(states, chunk, scale)
        own_shift, own_exponent = anchor_of_formulas(own_max, scale)
        own = exp_from(own_max, own_shift, own_exponent, floor(own_exponent), scale, scale_low)
        factor = number(scale, 1.0)
        if own_max > number(scale, -math.inf):  # else the sum is 0, or NaN, whatever it refers to
            factor = ratio(own_shift, own_exponent, shift, exponent, scale, scale_low)
        place = chunk * STATE_NUMBERS
        # What tied inside the chunk ties in the row too, or joins the others.
        own_ties = load(states, place + TIES, scale)
        ties, ties_low, joining = tied_total(ties, ties_low, own_ties, own, own_max, largest)
        part, part_low = load(states, place + SUM, scale), load(states, place + LOW, scale)
        others, low = add_pair(others, low, mul(part, factor), mul(part_low, factor))
        others, low = add_pair(others, low, mul(joining, factor), zero)
    others, low = warp_sum_pair(others, low)
    at_max = at_maximum(largest, shift, exponent, scale, scale_low)
    tail = div(others, at_max)
    rest = add(fma(negative(tail), at_max, others), low)
    ties, ties_low = warp_sum_pair(ties, ties_low)
    return largest, ties, tail, add(finite_or_zero(div(rest, at_max), tail), ties_low)


def fold_rows(rows, states, lse, scale, scale_low):
    warps = cuda.blockDim.x // WARP_SIZE
    row = int64(cuda.blockIdx.x) * warps + cuda.threadIdx.x // WARP_SIZE
    if row < rows.n_rows:
        lane = int64(cuda.laneid)
        state = folded(row_of(states, row, rows).pointer, rows.n_cols // STATE_NUMBERS, lane, scale, scale_low)
        if lane == 0:
            store(row_of(lse, row, rows).pointer, 0, logsumexp(state, scale, scale_low))
