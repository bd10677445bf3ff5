"""The sum over a row of a function of two arrays, for the backwards: the tree of row_state.py without the maximum."""

from numpy import int32

from gpusoftmax.kernels.cuda.device._cuda import device
from gpusoftmax.kernels.cuda.device.arithmetic import add, add_pair, number
from gpusoftmax.kernels.cuda.device.memory import n_values, piece_numbers
from gpusoftmax.kernels.cuda.device.piece_state import group_sum
from gpusoftmax.kernels.cuda.device.pieces import chunk_of, has_columns, piece_of, slot_of
from gpusoftmax.kernels.cuda.device.reduce import publish, warp_sum, warp_sum_pair
from gpusoftmax.kernels.cuda.device.row_barriers import announce, exchange_states, meet
from gpusoftmax.kernels.cuda.device.row_staging import open_row, stage_next, wait_for_piece
from gpusoftmax.kernels.cuda.device.row_state import state_place
from gpusoftmax.kernels.cuda.device.shared_numbers import get
from gpusoftmax.kernels.cuda.device.slots import read_piece
from gpusoftmax.kernels.cuda.device.split import is_one_chunk, split_chunks, split_lanes, split_piece_bits
from gpusoftmax.kernels.cuda.plan import GROUP, WARP_SIZE


def row_sum_with(term):
    """A device function that sums term(x, y) over the columns of two rows."""

    @device
    def piece_sum(values, others, piece, split, like):
        total = number(like, 0.0)
        for group in range(0, n_values(like), GROUP):
            if has_columns(group, piece, split):
                for k in range(group, group + GROUP):
                    values[k] = term(values[k], others[k])
                total = add(total, group_sum(values, group))
        return warp_sum(total, split_lanes(split))

    @device
    def row_sum(sources, n_cols, team, split, like):
        zero = number(like, 0.0)
        values, others = piece_numbers(like), piece_numbers(like)
        last_piece = int32((1 << split_piece_bits(split)) - 1)
        total, low = zero, zero
        announce(split)
        open_row(sources, n_cols, team, split, zero)
        meet(split)
        k = int32(0)
        while k < team.n_pieces:
            wait_for_piece(k, team, split)
            piece = piece_of(k, n_cols, team, split, like)
            at = slot_of(k, team, split, 2)
            read_piece(values, sources[0], at, piece, team, split)
            read_piece(others, sources[1], int32(at + split.slot_bytes), piece, team, split)
            stage_next(k, sources, n_cols, team, split, zero)
            if k & last_piece == 0:
                total, low = zero, zero
            total, low = add_pair(total, low, piece_sum(values, others, piece, split, like), zero)
            if not is_one_chunk(split) and k & last_piece == last_piece:
                publish(state_place(0, chunk_of(k, team, split), split, zero), add(total, low), team, split)
            k = int32(k + 1)
        if is_one_chunk(split):
            return total
        exchange_states(split)
        total, low = zero, zero
        for chunk in range(team.lane, split_chunks(split), WARP_SIZE):
            total, low = add_pair(total, low, get(state_place(0, chunk, split, zero), zero), zero)
        total, low = warp_sum_pair(total, low)
        return add(total, low)

    return row_sum
