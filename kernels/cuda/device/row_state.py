"""The state (max, ties, tail, tail_low) of a row; `gpusoftmax.kernels.formulas` defines it.

    piece     a lane's columns, then a butterfly over the lanes: the maximum first, so that nothing is rescaled
    chunk     a warp's pieces, merged in order; nearly always one
    row       the states of all chunks, rescaled to the maximum of the row and added up in a fixed tree: 32 chunks by
              their numbers in a butterfly, then these sums in another. Whoever has computed a chunk, and wherever the
              sums are formed, they are the same.

A piece's maximum adds exactly 1 to the sum S over its columns, and S - 1 is what its ties and the others add. Where S
is 1.5 or more, that has at most three times the relative error of S. Where it is less, the sum is taken again without
the maximum, which keeps the loss of a confident row exact. NaN and infinities take that way too.
"""

import math

from numpy import int32

from gpusoftmax.kernels.cuda.device._cuda import cuda, device
from gpusoftmax.kernels.cuda.device.arithmetic import (
    add,
    add_pair,
    maximum,
    merge,
    mul,
    number,
    reference,
    sub,
    tie,
)
from gpusoftmax.kernels.cuda.device.exponential import accurate_exp_gap, cheap_exp_gap, gradual_exp_gap, scale_in_base_2
from gpusoftmax.kernels.cuda.device.memory import n_values, number_size, piece_numbers, stored_in_halves
from gpusoftmax.kernels.cuda.device.reduce import any_lane, publish, warp_max, warp_sum, warp_sum_pair
from gpusoftmax.kernels.cuda.device.rows import (
    announce,
    chunk_of,
    exchange_states,
    has_columns,
    meet,
    open_row,
    piece_of,
    read_piece,
    slot_of,
    stage_next,
    wait_for_piece,
)
from gpusoftmax.kernels.cuda.device.split import is_short, split_chunks, split_lanes, split_piece_bits
from gpusoftmax.kernels.cuda.device.staging import get, put
from gpusoftmax.kernels.cuda.device.transform import transform
from gpusoftmax.kernels.cuda.plan import GROUP, STATE_NUMBERS, WARP_SIZE


@device
def gap_params(scale, scale_low):
    """What an exponential of a gap needs to know besides the logit and the maximum."""
    c, c_low = scale_in_base_2(scale, scale_low)
    return scale, scale_low, c, c_low


@device
def read_logits(held, source, k, n_cols, row, team, split, params):
    """held = piece k through `transform`; padding never becomes a maximum and adds nothing to a sum."""
    piece = piece_of(k, n_cols, team, split, params[0])
    at = slot_of(k, team, split, 1)
    read_piece(held, source, at, piece, team, split, number(params[0], -math.inf))
    for j in range(n_values(params[0])):
        held[j] = transform(held[j], piece.first + team.lane + j * split_lanes(split), row, params)
    return piece


@device
def group_sum(values, first):
    """The sum of GROUP values as a balanced tree."""
    low = add(add(values[first], values[first + 1]), add(values[first + 2], values[first + 3]))
    return add(low, add(add(values[first + 4], values[first + 5]), add(values[first + 6], values[first + 7])))


@device
def piece_max(held, piece, split, params):
    largest = number(params[0], -math.inf)
    for group in range(0, n_values(params[0]), GROUP):
        if has_columns(group, piece, split):
            for k in range(group, group + GROUP):
                largest = maximum(largest, held[k])
    return warp_max(largest, split_lanes(split))


def piece_state_with(exp_gap):
    """A device function that computes the state of a piece, given one of the exponentials of exponential.py."""

    @device
    def piece_state(source, held, piece, split, params):
        scale, scale_low, c, c_low = params
        zero, one = number(scale, 0.0), number(scale, 1.0)
        largest = piece_max(held, piece, split, params)
        half = mul(reference(largest), number(scale, 0.5))
        values = piece_numbers(scale)
        total = zero
        for group in range(0, n_values(scale), GROUP):
            if has_columns(group, piece, split):
                for k in range(group, group + GROUP):
                    values[k] = exp_gap(held[k], half, scale, scale_low, c, c_low)
                total = add(total, group_sum(values, group))
        total = warp_sum(total, split_lanes(split))
        ties, tail = one, sub(total, one)
        confident = not total >= number(scale, 1.5)
        if any_lane(confident):  # the others of the warp keep what they have
            exact_ties, exact_tail = zero, zero
            for group in range(0, n_values(scale), GROUP):
                if has_columns(group, piece, split):
                    for k in range(group, group + GROUP):
                        values[k] = gradual_exp_gap(held[k], half, scale, scale_low)
                        if held[k] == largest:
                            values[k] = zero
                    exact_tail = add(exact_tail, group_sum(values, group))
                    for k in range(group, group + GROUP):
                        values[k] = tie(held[k], largest)
                    exact_ties = add(exact_ties, group_sum(values, group))
            exact_ties, exact_tail = warp_sum(exact_ties, split_lanes(split)), warp_sum(exact_tail, split_lanes(split))
            if confident:
                ties, tail = exact_ties, exact_tail
                if largest == number(scale, -math.inf):
                    ties = zero
        return mul(largest, number(scale, 0.5)), ties, tail, zero

    return piece_state


# ---------------------------------------------------------------- all chunks of a row


@device
def state_place(number_of_state, chunk, like):
    """Where a number of a chunk's state lies in shared memory."""
    return (chunk * STATE_NUMBERS + number_of_state) * number_size(like)


@device
def publish_state(k, state, team, split):
    chunk = chunk_of(k, team, split)
    publish(state_place(0, chunk, state[0]), state[0], team, split)
    publish(state_place(1, chunk, state[0]), state[1], team, split)
    publish(state_place(2, chunk, state[0]), add(state[2], state[3]), team, split)


@device
def rescaled_group(group, row_max, team, split, params):
    """(ties, tail, tail_low) of 32 chunks, relative to the row's maximum; every lane holds them."""
    zero = number(params[0], 0.0)
    chunk = group * WARP_SIZE + team.lane
    state = (number(params[0], -math.inf), zero, zero, zero)
    if chunk < split_chunks(split):
        largest = get(state_place(0, chunk, zero), zero)
        state = (
            largest,
            get(state_place(1, chunk, zero), zero),
            get(state_place(2, chunk, zero), zero),
            zero,
        )
    state = merge((row_max, zero, zero, zero), state, params[0], params[1])
    tail, tail_low = warp_sum_pair(state[2], state[3])
    return warp_sum(state[1], WARP_SIZE), tail, tail_low


@device
def group_place(number_of_state, group, split, like):
    """Where a number of a group's sum lies in shared memory: behind the states of the chunks."""
    return state_place(number_of_state, split_chunks(split) + group, like)


@device
def merged_states(team, split, params):
    """The state of the row from those of its chunks, which lie in shared memory; the same for all threads."""
    zero = number(params[0], 0.0)
    row_max = number(params[0], -math.inf)
    for chunk in range(team.lane, split_chunks(split), WARP_SIZE):
        row_max = maximum(row_max, get(state_place(0, chunk, zero), zero))
    row_max = warp_max(row_max, WARP_SIZE)
    n_groups = (split_chunks(split) + WARP_SIZE - 1) // WARP_SIZE
    if n_groups == 1:
        ties, tail, tail_low = rescaled_group(0, row_max, team, split, params)
        return row_max, ties, tail, tail_low
    warp = cuda.threadIdx.x // WARP_SIZE
    for group in range(warp, n_groups, cuda.blockDim.x // WARP_SIZE):
        ties, tail, tail_low = rescaled_group(group, row_max, team, split, params)
        if team.lane == 0:
            put(group_place(0, group, split, zero), ties)
            put(group_place(1, group, split, zero), tail)
            put(group_place(2, group, split, zero), tail_low)
    cuda.syncthreads()  # the sums of all groups are in shared memory before any warp reads them
    ties, tail, tail_low = zero, zero, zero
    for group in range(team.lane, n_groups, WARP_SIZE):
        ties = add(ties, get(group_place(0, group, split, zero), zero))
        part = get(group_place(1, group, split, zero), zero)
        part_low = get(group_place(2, group, split, zero), zero)
        tail, tail_low = add_pair(tail, tail_low, part, part_low)
    tail, tail_low = warp_sum_pair(tail, tail_low)
    return row_max, warp_sum(ties, WARP_SIZE), tail, tail_low


def row_state_with(piece_state):
    """A device function for the first pass over a row of logits, given what computes the state of a piece."""

    @device
    def row_state(source, n_cols, row, team, split, params):
        """The state of the row, the same for all threads that share it."""
        held = piece_numbers(params[0])
        zero = number(params[0], 0.0)
        state = (number(params[0], -math.inf), zero, zero, zero)
        last_piece = int32((1 << split_piece_bits(split)) - 1)
        announce(split)
        open_row((source,), n_cols, team, split, zero)
        meet(split)
        for k in range(team.n_pieces):
            wait_for_piece(k, team, split)
            piece = read_logits(held, source, k, n_cols, row, team, split, params)
            stage_next(k, (source,), n_cols, team, split, zero)
            current = piece_state(source, held, piece, split, params)
            if k & last_piece == 0:
                state = current
            else:
                state = merge(state, current, params[0], params[1])
            if not is_short(split) and k & last_piece == last_piece:
                publish_state(k, state, team, split)
        if is_short(split):
            return state
        exchange_states(split)
        return merged_states(team, split, params)

    return row_state


cheap_piece_state = piece_state_with(cheap_exp_gap)
accurate_piece_state = piece_state_with(accurate_exp_gap)


@device
def loss_piece_state(source, held, piece, split, params):
    """For results that are logarithms. Two bytes a logit leave no time for more than the cheap exponential."""
    if stored_in_halves(source.pointer):
        return cheap_piece_state(source, held, piece, split, params)
    return accurate_piece_state(source, held, piece, split, params)


softmax_state = row_state_with(cheap_piece_state)
loss_state = row_state_with(loss_piece_state)
