"""The sum over a row of a function of two arrays, for the backwards: the tree of row_state.py without the maximum."""

from numpy import int32

from gpusoftmax.kernels.cuda.device._cuda import device
from gpusoftmax.kernels.cuda.device.arithmetic import add, add_pair, number
from gpusoftmax.kernels.cuda.device.memory import n_values, piece_numbers
from gpusoftmax.kernels.cuda.device.piece_state import group_sum
from gpusoftmax.kernels.cuda.device.reduce import next_parts, no_parts, team_sum, warp_sum_pair
from gpusoftmax.kernels.cuda.device.row_state import publish_number, rows_of_block_with, state_place
from gpusoftmax.kernels.cuda.device.rows import (
    announce,
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
from gpusoftmax.kernels.cuda.device.split import (
    is_columns,
    is_one_chunk,
    split_chunks,
    split_piece_bits,
    split_turns,
)
from gpusoftmax.kernels.cuda.device.staging import get
from gpusoftmax.kernels.cuda.plan import GROUP, WARP_SIZE


@device
def read_pair(values, others, sources, at, piece, turn, team, split, like):
    """A lane's columns of both rows."""
    zero = number(like, 0.0)
    read_piece(values, sources[0], at, piece, turn, team, split, zero)
    read_piece(others, sources[1], at + split.slot_bytes, piece, turn, team, split, zero)


@device
def total_of_row(row, lane, split, like):
    """The sum over the chunks of a row, and what its rounding has left, by the lanes of one warp."""
    zero = number(like, 0.0)
    total, low = zero, zero
    for chunk in range(lane, split_chunks(split), WARP_SIZE):
        total, low = add_pair(total, low, get(state_place(0, chunk, row, split, zero), zero), zero)
    total, low = warp_sum_pair(total, low)
    return total, low, zero, zero


totals_of_rows = rows_of_block_with(total_of_row, 0)


def row_sum_with(term):
    """A device function that sums term(x, y) over the columns of two rows."""

    @device
    def piece_sum(values, others, sources, at, k, piece, team, split, like):
        totals = no_parts(number(like, 0.0))
        for turn in range(split_turns(split)):
            if is_columns(split):  # otherwise they are held since the piece was opened
                read_pair(values, others, sources, at, piece, turn, team, split, like)
            total = number(like, 0.0)
            for group in range(0, n_values(like), GROUP):
                if has_columns(group, piece, split):
                    for j in range(group, group + GROUP):
                        values[j] = term(values[j], others[j])
                    total = add(total, group_sum(values, group))
            totals = next_parts(totals, total)
        return team_sum(totals, k & 1, split)

    @device
    def row_sum(sources, n_cols, team, split, like):
        zero = number(like, 0.0)
        values, others = piece_numbers(like), piece_numbers(like)
        last_piece = int32((1 << split_piece_bits(split)) - 1)
        total, low = zero, zero
        announce(split)
        open_row(sources, n_cols, team, split, like)
        meet(split)
        for k in range(team.n_pieces):
            wait_for_piece(k, team, split)
            piece = piece_of(k, n_cols, team, split, like)
            at = slot_of(k, team, split, 2)
            if not is_columns(split):
                read_pair(values, others, sources, at, piece, 0, team, split, like)
                stage_next(k, sources, n_cols, team, split, like)
            if k & last_piece == 0:
                total, low = zero, zero
            part = piece_sum(values, others, sources, at, k, piece, team, split, like)
            total, low = add_pair(total, low, part, zero)
            if is_columns(split):
                stage_next(k, sources, n_cols, team, split, like)
            if not is_one_chunk(split) and k & last_piece == last_piece:
                publish_number(0, k, add(total, low), team, split)
        if is_one_chunk(split):
            return total
        exchange_states(split)
        total, low, _, _ = totals_of_rows(split, like, zero)
        return add(total, low)

    return row_sum
