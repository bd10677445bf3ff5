"""The first of the largest logits of a row. What leads, and why places are numbers, stands in kernels/cpu/argmax.py.

Who is compared with whom:

    piece     a lane's columns in order, then a butterfly over the lanes
    chunk     its pieces, in order
    row       the chunks, dealt out to the lanes of every warp, then a butterfly
"""

import math

from numpy import int32, int64

from gpusoftmax.kernels.cuda.device._cuda import cuda, device
from gpusoftmax.kernels.cuda.device.arithmetic import add, first_leading, leading, number
from gpusoftmax.kernels.cuda.device.memory import n_values, piece_numbers, row_offset, store_integer
from gpusoftmax.kernels.cuda.device.piece_state import read_logits
from gpusoftmax.kernels.cuda.device.pieces import chunk_of, col_of, has_columns, own_row, team_of
from gpusoftmax.kernels.cuda.device.reduce import FULL_WARP, publish
from gpusoftmax.kernels.cuda.device.row_barriers import announce, exchange_states, meet
from gpusoftmax.kernels.cuda.device.row_staging import open_row, stage_next, wait_for_piece
from gpusoftmax.kernels.cuda.device.row_state import saved_max, state_place
from gpusoftmax.kernels.cuda.device.rows import row_of
from gpusoftmax.kernels.cuda.device.shared_numbers import get
from gpusoftmax.kernels.cuda.device.split import is_one_chunk, split_chunks, split_lanes, split_piece_bits
from gpusoftmax.kernels.cuda.plan import GROUP, WARP_SIZE


@device
def warp_leading(value, place, lanes):
    """(value, place) of the lane that leads, of `lanes` neighbouring ones."""
    for offset in (16, 8, 4, 2, 1):
        if offset < lanes:
            other = cuda.shfl_xor_sync(FULL_WARP, value, offset)
            value, place = first_leading(value, place, other, cuda.shfl_xor_sync(FULL_WARP, place, offset))
    return value, place


@device
def piece_maximum(held, source, piece, team, split, like):
    """(maximum, place in the piece)"""
    best, which = number(like, -math.inf), number(like, 0.0)  # a lane of -inf only: its first column
    for group in range(0, n_values(like), GROUP):
        if has_columns(group, piece, split):
            for k in range(group, group + GROUP):
                best, which = leading(best, which, held[k], number(like, k))
    place = number(like, col_of(int32(which), team, split, source))
    return warp_leading(best, place, split_lanes(split))


@device
def row_maximum(team, split, like):
    """The number of the chunk whose maximum leads, from those in shared memory; the same for all threads."""
    best, which = saved_max(team.lane, split, like), number(like, team.lane)
    chunk = int32(team.lane + WARP_SIZE)
    while chunk < split_chunks(split):
        best, which = leading(best, which, saved_max(chunk, split, like), number(like, chunk))
        chunk = int32(chunk + WARP_SIZE)
    _, which = warp_leading(best, which, WARP_SIZE)
    return int32(which)


@device
def first_maximum(source, n_cols, team, split, like):
    """The column of the first maximum of the row, the same for all threads that share it."""
    held, params = piece_numbers(like), (like,)
    least, zero = number(like, -math.inf), number(like, 0.0)
    best, place = least, zero
    last_piece = int32((1 << split_piece_bits(split)) - 1)
    piece_cols = int32(split_lanes(split) * n_values(like))
    announce(split)
    open_row((source,), n_cols, team, split, least)
    meet(split)
    k = int32(0)
    while k < team.n_pieces:
        wait_for_piece(k, team, split)
        piece = read_logits(held, source, k, n_cols, team, split, params)
        stage_next(k, (source,), n_cols, team, split, least)
        current, at = piece_maximum(held, source, piece, team, split, like)
        within = k & last_piece
        if within == 0:
            best, place = current, at
        else:
            best, place = leading(best, place, current, add(at, number(like, int32(within * piece_cols))))
        if not is_one_chunk(split) and within == last_piece:
            chunk = chunk_of(k, team, split)
            publish(state_place(0, chunk, split, like), best, team, split)
            publish(state_place(1, chunk, split, like), place, team, split)
        k = int32(k + 1)
    if is_one_chunk(split):
        return int64(place)
    exchange_states(split)
    chunk = row_maximum(team, split, like)
    chunk_cols = int64(piece_cols) << split_piece_bits(split)
    return chunk * chunk_cols + int64(get(state_place(1, chunk, split, like), like))


def argmax_rows(rows, split, start, logits, indices, like):
    team = team_of(split, 1)
    row = own_row(start, split)
    n_cols = rows.n_cols if row < rows.n_rows else 0
    col = first_maximum(row_of(logits, row, rows), n_cols, team, split, like)
    if row < rows.n_rows and team.lane == 0 and team.rank == 0:
        store_integer(indices.pointer, row_offset(indices, row, rows), col)
