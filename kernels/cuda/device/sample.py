"""Sampling from rows of logits. The mathematics stands in kernels/cpu/sample.py.

    lane     the best column so far, as (high, low, column): its score and its number. Granule by granule, straight from
             the slots; a granule whose columns cannot be better is passed by
    warp     the best of all lanes, while a granule is not passed by: what the others are measured by. Each lane scores
             that column of its granule whose score may be the largest, until no lane has one left that may be better
    row      the best of all warps, exchanged through the shared memory of the blocks that share the row

Where several rows share a warp, lanes tell each other of their best after a piece: their loops are not alike.
"""

import math

from numpy import int32, int64

from gpusoftmax.kernels.cuda.device._cuda import device
from gpusoftmax.kernels.cuda.device.arithmetic import maximum, minimum, number
from gpusoftmax.kernels.cuda.device.granules import granules_with
from gpusoftmax.kernels.cuda.device.memory import (
    integer_of,
    number_of,
    row_offset,
    store_integer,
    word_of,
)
from gpusoftmax.kernels.cuda.device.noise import (
    draw_words,
    granule_words,
    lowest,
    noise_scales_of,
    score,
    score_bound,
)
from gpusoftmax.kernels.cuda.device.piece_state import gap_params
from gpusoftmax.kernels.cuda.device.pieces import own_row, piece_of, slot_of, team_of
from gpusoftmax.kernels.cuda.device.reduce import any_lane, beats, publish, warp_best
from gpusoftmax.kernels.cuda.device.row_barriers import announce, exchange_states, meet
from gpusoftmax.kernels.cuda.device.row_staging import open_row, stage_next, wait_for_piece
from gpusoftmax.kernels.cuda.device.row_state import state_place
from gpusoftmax.kernels.cuda.device.rows import Piece, row_of
from gpusoftmax.kernels.cuda.device.shared_numbers import get
from gpusoftmax.kernels.cuda.device.split import is_long, split_chunks, split_lanes
from gpusoftmax.kernels.cuda.device.staging import hidden
from gpusoftmax.kernels.cuda.device.threshold import (
    BEST_PLACE,
    kept_from,
    limit_of,
    limit_of_own,
    open_again,
    own_numbers_of,
)
from gpusoftmax.kernels.cuda.plan import WARP_SIZE


def sample_rows(rows, split, start, logits, seeds, steps, ids, unit, noise):
    team = team_of(split, 1)
    row = own_row(start, split)
    n_cols, draw = draw_of(row, rows, seeds, steps, unit, noise)
    source, least = row_of(logits, row, rows), number(unit, -math.inf)
    announce(split)
    open_row((source,), n_cols, team, split, least)
    meet(split)
    store_column(best_of_row(source, n_cols, team, split, draw, None), ids, row, rows, team)


def sample_kept_rows(
    rows, split, start, logits, seeds, steps, ids, unit, noise, top_k, top_p, from_max, scale, scale_low
):
    team = team_of(split, 1)
    row = own_row(start, split)
    n_cols, draw = draw_of(row, rows, seeds, steps, unit, noise)
    source, limits = row_of(logits, row, rows), (top_k, top_p, from_max)
    limit = limit_of(source, n_cols, rows.n_cols, limits, team, split, gap_params(scale, scale_low))
    open_again(source, n_cols, team, split, number(unit, -math.inf))
    store_column(best_of_row(source, n_cols, team, split, draw, limit), ids, row, rows, team)


def sample_mixed_rows(
    rows, split, start, logits, seeds, steps, ids, temperatures, t, top_ks, top_ps, p, min_ps, m, has_limits
):
    team = team_of(split, 1)
    row = own_row(start, split)
    own, least = own_numbers_of(row, rows, temperatures, t, top_ks, top_ps, p, min_ps, m), number(t, -math.inf)
    unit, noise = noise_scales_of(own.temperature)
    n_cols, draw = draw_of(row, rows, seeds, steps, unit, noise)
    source, limit = row_of(logits, row, rows), least
    if has_limits != 0:
        limit = limit_of_own(source, n_cols, rows.n_cols, own, team, split)
        open_again(source, n_cols, team, split, least)
    else:
        announce(split)
        open_row((source,), n_cols, team, split, least)
        meet(split)
    best = best_of_row(source, n_cols, team, split, draw, limit)
    if not own.is_given:
        best = best[0], best[1], int32(-1)
    store_column(best, ids, row, rows, team)


@device
def draw_of(row, rows, seeds, steps, unit, noise):
    """(n_cols, what decides the scores of a row); no columns and no seed past the last row."""
    if row < rows.n_rows:
        return rows.n_cols, (word_of(seeds, row, rows), word_of(steps, row, rows), unit, noise)
    return int64(0), (int64(0), int64(0), unit, noise)


@device
def store_column(best, ids, row, rows, team):
    if row < rows.n_rows and team.lane == 0 and team.rank == 0:
        # A score of +inf: the row holds NaN or +inf.
        column = best[2] if best[0] < number(best[0], math.inf) else int32(-1)
        store_integer(ids.pointer, row_offset(ids, row, rows), int64(column))


@device
def better_of(best, values, col, width, source, split, numbers):
    """The best column so far, or a better one of a granule."""
    (seed, step, unit, noise), limit = numbers
    words = granule_words()
    draw_words(words, col, seed, step, source.pointer)
    least, promising = maximum(lowest(unit), best[0]), False  # a score of -inf is none
    for k in range(width):
        values[k] = kept_from(values[k], limit)
        promising = promising | (not score_bound(values[k], words[k], unit, noise) < least)  # without a branch for each
    is_alone = split_lanes(split) == WARP_SIZE  # in its warp a row is: all lanes have the best of all
    if is_alone:
        promising = any_lane(promising)
    left = int32(width)  # where the temperature is none, no bound is ever below another one
    while promising and left > 0:
        best, others = likeliest_of(best, values, words, col, width, unit, noise)
        if is_alone:
            best = warp_best(best, WARP_SIZE)
        promising = not others < maximum(lowest(unit), best[0])
        if is_alone:
            promising = any_lane(promising)
        left = int32(left - 1)
    return best


@device
def likeliest_of(best, values, words, col, width, unit, noise):
    """The best column so far, or that of a granule whose score may be the largest, which is taken out of the granule;
    and what bounds the scores of the others.
    """
    x, word, place, top = values[0], words[0], int32(0), no_less(values[0], words[0], unit, noise)
    others = number(unit, -math.inf)
    for k in range(1, width):
        bound = no_less(values[k], words[k], unit, noise)
        others = maximum(others, minimum(top, bound))
        if top < bound:
            x, word, place, top = values[k], words[k], int32(k), bound
    for k in range(width):
        if k == place:
            values[k] = number(unit, -math.inf)
    high, low = score(x, word, unit, noise)
    this = high, low, int32(col + place)
    return this if beats(this, best) else best, others


@device
def no_less(x, word, unit, noise):
    """`score_bound`, and +inf for NaN, as its score is."""
    return minimum(number(unit, math.inf), score_bound(x, word, unit, noise))


best_of_granules = granules_with(better_of)


@device
def best_of_row(source, n_cols, team, split, draw, limit):
    """The best column of a row that has been opened, of those whose logits are at least the limit (None: of all)."""
    unit = draw[2]
    least = number(unit, -math.inf)
    best = least, number(unit, 0.0), int32(-1)
    k = int32(0)
    while k < team.n_pieces:
        wait_for_piece(k, team, split)
        piece = piece_of(k, n_cols, team, split, unit)
        piece = Piece(piece.first, hidden(piece.count), piece.left)  # or each granule would count them again
        at = slot_of(k, team, split, 1)
        best = best_of_granules(best, source, at, piece, team, split, (draw, limit), unit)
        if not is_long(split):
            best = warp_best(best, split_lanes(split))
        stage_next(k, (source,), n_cols, team, split, least)
        k = int32(k + 1)
    return best_of_parts(best, team, split) if is_long(split) else best


@device
def best_of_parts(best, team, split):
    """The best column of a row from those of its warps; the same for all threads."""
    if team.n_pieces > 0:
        publish(state_place(BEST_PLACE, team.rank, split, best[0]), best[0], team, split)
        publish(state_place(BEST_PLACE + 1, team.rank, split, best[0]), best[1], team, split)
        publish(state_place(BEST_PLACE + 2, team.rank, split, best[0]), number_of(best[2], best[0]), team, split)
    exchange_states(split)
    part, n_parts = team.lane, min(team.size, split_chunks(split))
    while part < n_parts:
        high = get(state_place(BEST_PLACE, part, split, best[0]), best[0])
        low = get(state_place(BEST_PLACE + 1, part, split, best[0]), best[0])
        other = high, low, integer_of(get(state_place(BEST_PLACE + 2, part, split, best[0]), best[0]))
        if beats(other, best):
            best = other
        part = int32(part + WARP_SIZE)
    return warp_best(best, WARP_SIZE)
