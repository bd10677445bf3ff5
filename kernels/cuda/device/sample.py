"""Sampling from rows of logits. The mathematics stands in kernels/cpu/sample.py.

lane     the best column so far, as (high, low, column): its score and its number. Granule by granule, straight from
         the slots; a granule whose columns cannot be better is passed by
warp     after each piece, the best of all lanes: what the next piece is measured by
row      the best of all warps, exchanged through the shared memory of the blocks that share the row
"""

import math

from numpy import int32, int64

from gpusoftmax.kernels.cuda.device._cuda import device
from gpusoftmax.kernels.cuda.device.arithmetic import maximum, number
from gpusoftmax.kernels.cuda.device.memory import VECTOR_BYTES, element_size, granule_numbers, load_label, vector_bits
from gpusoftmax.kernels.cuda.device.noise import (
    column_as_number,
    column_of_number,
    draw_words,
    granule_words,
    lowest,
    score,
    score_bound,
    store_long,
)
from gpusoftmax.kernels.cuda.device.reduce import beats, publish, warp_best
from gpusoftmax.kernels.cuda.device.row_state import state_place
from gpusoftmax.kernels.cuda.device.rows import (
    announce,
    exchange_states,
    is_granule,
    meet,
    open_row,
    own_row,
    piece_of,
    read_columns,
    row_of,
    row_offset,
    slot_of,
    stage_next,
    team_of,
    wait_for_piece,
)
from gpusoftmax.kernels.cuda.device.split import is_long, split_chunks, split_lanes
from gpusoftmax.kernels.cuda.device.staging import get
from gpusoftmax.kernels.cuda.plan import WARP_SIZE
from gpusoftmax.kernels.operands import ONE_VALUE


def sample_rows(rows, split, start, logits, seeds, steps, ids, unit, noise):
    team = team_of(split, 1)
    row = own_row(start, split)
    n_cols, seed, step = int64(0), int64(0), int64(0)
    if row < rows.n_rows:
        n_cols, seed, step = rows.n_cols, word_of(seeds, row, rows), word_of(steps, row, rows)
    best = best_of_row(row_of(logits, row, rows), n_cols, team, split, (seed, step, unit, noise))
    if row < rows.n_rows and team.lane == 0 and team.rank == 0:
        # A score of +inf: the row holds NaN or +inf.
        column = best[2] if best[0] < number(unit, math.inf) else int32(-1)
        store_long(ids.pointer, row_offset(ids, row, rows), int64(column))


@device
def word_of(labels, row, rows):
    """A row's own integer, or the one of all rows."""
    if labels.code == ONE_VALUE:
        return labels.pointer
    return load_label(labels.pointer, row_offset(labels, row, rows), labels.code)


@device
def nothing(like):
    """What every column beats, but for those of logits -inf."""
    return number(like, -math.inf), number(like, 0.0), int32(-1)


@device
def best_of_row(source, n_cols, team, split, draw):
    least = number(draw[2], -math.inf)
    best = nothing(draw[2])
    announce(split)
    open_row((source,), n_cols, team, split, least)
    meet(split)
    k = int32(0)
    while k < team.n_pieces:
        wait_for_piece(k, team, split)
        piece = piece_of(k, n_cols, team, split, least)
        best = warp_best(best_of_piece(best, source, k, piece, team, split, draw), split_lanes(split))
        stage_next(k, (source,), n_cols, team, split, least)
        k = int32(k + 1)
    return best_of_parts(best, team, split) if is_long(split) else best


@device
def best_of_piece(best, source, k, piece, team, split, draw):
    """The best column so far, or a better one among this lane's of a piece."""
    seed, step, unit, noise = draw
    values, words = granule_numbers(unit), granule_words()
    bits, lanes = vector_bits(source.pointer), split_lanes(split)
    width = 1 << bits
    size = element_size(source.pointer)
    place = int32(slot_of(k, team, split, 1) + source.shift * size + team.lane * VECTOR_BYTES)
    as_granule = is_granule(source, place, width)
    col = int32(team.lane << bits)
    while col < piece.count:
        read_columns(values, source, place, width, as_granule)
        draw_words(words, piece.first + col, seed, step, source.pointer)
        limit, promising = maximum(lowest(unit), best[0]), False  # a score of -inf is none
        for i in range(width):
            promising = promising or not score_bound(values[i], words[i], unit, noise) < limit
        if promising:
            for i in range(width):
                high, low = score(values[i], words[i], unit, noise)
                if high > best[0] or (high == best[0] and low > best[1]):
                    best = high, low, int32(piece.first + col + i)
        col, place = int32(col + (lanes << bits)), int32(place + lanes * VECTOR_BYTES)
    return best


@device
def best_of_parts(best, team, split):
    """The best column of a row from those of its warps; the same for all threads."""
    if team.n_pieces > 0:
        publish(state_place(0, team.rank, split, best[0]), best[0], team, split)
        publish(state_place(1, team.rank, split, best[0]), best[1], team, split)
        publish(state_place(2, team.rank, split, best[0]), column_as_number(best[2], best[0]), team, split)
    exchange_states(split)
    part, n_parts = team.lane, min(team.size, split_chunks(split))
    while part < n_parts:
        high = get(state_place(0, part, split, best[0]), best[0])
        low = get(state_place(1, part, split, best[0]), best[0])
        other = high, low, column_of_number(get(state_place(2, part, split, best[0]), best[0]))
        if beats(other, best):
            best = other
        part = int32(part + WARP_SIZE)
    return warp_best(best, WARP_SIZE)
