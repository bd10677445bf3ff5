"""The state (max, ties, tail, tail_low) of a row; `gpusoftmax.kernels.formulas` defines it.

It is made of those of its parts:

    piece     see piece_state.py
    chunk     a warp's pieces, merged in order; nearly always one
    row       the states of all chunks, rescaled to the maximum of the row and added up in a fixed tree: 32 chunks by
              their numbers in a butterfly, then these sums in another. Whoever has computed a chunk, and wherever the
              sums are formed, they are the same.
"""

import math

from numpy import int32

from gpusoftmax.kernels.cuda.device._cuda import cuda, device
from gpusoftmax.kernels.cuda.device.arithmetic import (
    add,
    add_pair,
    maximum,
    merge,
    number,
)
from gpusoftmax.kernels.cuda.device.columns import row_in_block
from gpusoftmax.kernels.cuda.device.memory import number_size, piece_numbers
from gpusoftmax.kernels.cuda.device.piece_state import cheap_piece_state, loss_piece_state, read_logits
from gpusoftmax.kernels.cuda.device.reduce import (
    publish,
    warp_max,
    warp_sum,
    warp_sum_pair,
)
from gpusoftmax.kernels.cuda.device.rows import (
    announce,
    chunk_of,
    exchange_states,
    meet,
    open_row,
    piece_of,
    slot_of,
    stage_next,
    wait_for_piece,
)
from gpusoftmax.kernels.cuda.device.split import (
    is_columns,
    is_one_chunk,
    split_chunks,
    split_piece_bits,
    split_row_bits,
)
from gpusoftmax.kernels.cuda.device.staging import fresh_lane, get, put
from gpusoftmax.kernels.cuda.plan import EXCHANGE_NUMBERS, STATE_NUMBERS, WARP_SIZE


@device
def open_piece(held, source, k, n_cols, row, team, split, params):
    """Waits for piece k and takes it into registers; where a thread is several lanes in turn it stays in its slot."""
    wait_for_piece(k, team, split)
    piece = piece_of(k, n_cols, team, split, params[0])
    if not is_columns(split):
        read_logits(held, source, slot_of(k, team, split, 1), piece, 0, row, team, split, params)
    return piece


# ---------------------------------------------------------------- all chunks of a row


@device
def state_place(number_of_state, chunk, row, split, like):
    """Where a number of a chunk's state lies in shared memory, for the block's row of this number."""
    place = chunk * STATE_NUMBERS + number_of_state
    if is_columns(split):
        place = EXCHANGE_NUMBERS + (place << split_row_bits(split)) + row
    return place * number_size(like)


@device
def publish_number(number_of_state, k, value, team, split):
    """A number of the state of the chunk that ends with piece k."""
    place = state_place(number_of_state, chunk_of(k, team, split), row_in_block(split), split, value)
    publish(place, value, team, split)


@device
def publish_state(k, state, team, split):
    publish_number(0, k, state[0], team, split)
    publish_number(1, k, state[1], team, split)
    publish_number(2, k, add(state[2], state[3]), team, split)


@device
def max_of_chunks(row, lane, split, like):
    row_max = number(like, -math.inf)
    for chunk in range(lane, split_chunks(split), WARP_SIZE):
        row_max = maximum(row_max, get(state_place(0, chunk, row, split, like), like))
    return warp_max(row_max, WARP_SIZE)


@device
def rescaled_group(group, row_max, row, lane, split, params):
    """(ties, tail, tail_low) of 32 chunks, relative to the row's maximum; every lane holds them."""
    zero = number(params[0], 0.0)
    chunk = group * WARP_SIZE + lane
    state = (number(params[0], -math.inf), zero, zero, zero)
    if chunk < split_chunks(split):
        largest = get(state_place(0, chunk, row, split, zero), zero)
        state = (
            largest,
            get(state_place(1, chunk, row, split, zero), zero),
            get(state_place(2, chunk, row, split, zero), zero),
            zero,
        )
    state = merge((row_max, zero, zero, zero), state, params[0], params[1])
    tail, tail_low = warp_sum_pair(state[2], state[3])
    return warp_sum(state[1], WARP_SIZE), tail, tail_low


@device
def group_place(number_of_state, group, split, like):
    """Where a number of a group's sum lies in shared memory: behind the states of the chunks."""
    return state_place(number_of_state, split_chunks(split) + group, 0, split, like)


def rows_of_block_with(merged, result):
    """A device function that returns merged(row, lane, split, numbers), four numbers that the lanes of a warp make of
    the chunks of a row. Where a block has several rows, its warps share them; `result`, 0 or 1, says where each thread
    then finds what belongs to its own.
    """

    @device
    def place(number_of_state, row, split, like):
        return state_place(number_of_state, split_chunks(split) + result, row, split, like)

    @device
    def rows_of_block(split, numbers, like):
        if not is_columns(split):
            return merged(0, cuda.laneid, split, numbers)
        for row in range(cuda.threadIdx.x // WARP_SIZE, 1 << split_row_bits(split), cuda.blockDim.x // WARP_SIZE):
            lane = fresh_lane()
            results = merged(row, lane, split, numbers)
            if lane == 0:
                for i in range(4):
                    put(place(i, row, split, like), results[i])
        cuda.syncthreads()  # every warp's results are there before any thread reads that of its row
        row = row_in_block(split)
        return (
            get(place(0, row, split, like), like),
            get(place(1, row, split, like), like),
            get(place(2, row, split, like), like),
            get(place(3, row, split, like), like),
        )

    return rows_of_block


@device
def state_of_row(row, lane, split, params):
    """The state of a row from those of its chunks, by the lanes of one warp: the tree of merged_states."""
    zero = number(params[0], 0.0)
    row_max = max_of_chunks(row, lane, split, zero)
    if split_chunks(split) <= WARP_SIZE:
        ties, tail, tail_low = rescaled_group(0, row_max, row, lane, split, params)
        return row_max, ties, tail, tail_low
    own_ties, own, own_low = zero, zero, zero
    for group in range((split_chunks(split) + WARP_SIZE - 1) // WARP_SIZE):
        ties, tail, tail_low = rescaled_group(group, row_max, row, lane, split, params)
        if group == lane:
            own_ties = add(own_ties, ties)
            own, own_low = add_pair(own, own_low, tail, tail_low)
    own, own_low = warp_sum_pair(own, own_low)
    return row_max, warp_sum(own_ties, WARP_SIZE), own, own_low


states_of_rows = rows_of_block_with(state_of_row, 0)


@device
def merged_states(team, split, params):
    """The state of the row from those of its chunks, which lie in shared memory; the same for all its threads."""
    zero = number(params[0], 0.0)
    if is_columns(split):
        return states_of_rows(split, params, zero)
    row_max = max_of_chunks(0, team.lane, split, zero)
    n_groups = (split_chunks(split) + WARP_SIZE - 1) // WARP_SIZE
    if n_groups == 1:
        ties, tail, tail_low = rescaled_group(0, row_max, 0, team.lane, split, params)
        return row_max, ties, tail, tail_low
    warp = cuda.threadIdx.x // WARP_SIZE
    for group in range(warp, n_groups, cuda.blockDim.x // WARP_SIZE):
        ties, tail, tail_low = rescaled_group(group, row_max, 0, team.lane, split, params)
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
            piece = open_piece(held, source, k, n_cols, row, team, split, params)
            if not is_columns(split):
                stage_next(k, (source,), n_cols, team, split, zero)
            current = piece_state(source, held, slot_of(k, team, split, 1), piece, row, team, split, params)
            if is_columns(split):
                stage_next(k, (source,), n_cols, team, split, zero)
            if k & last_piece == 0:
                state = current
            else:
                state = merge(state, current, params[0], params[1])
            if not is_one_chunk(split) and k & last_piece == last_piece:
                publish_state(k, state, team, split)
        if is_one_chunk(split):
            return state
        exchange_states(split)
        return merged_states(team, split, params)

    return row_state


softmax_state = row_state_with(cheap_piece_state)
loss_state = row_state_with(loss_piece_state)
