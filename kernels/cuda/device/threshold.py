"""From which logit on a row is kept, for top-k, top-p and min-p. What is meant stands in kernels/cpu/threshold.py.

The k-th largest logit of a long row, for small k, is one of the few candidates that a first pass for the maximum leaves
(largest.py), and where the mass of top-p ends among these, two passes confirm it (nucleus.py). Otherwise a row is gone
over once more for each halving of kernels/ordering.py: in shared memory, where it lies, or from global memory again if
it does not fit. Counts and sums of a pass go the way of row_sum.py, chunk by chunk in a fixed tree, through two places
in turn: whoever writes to one of them knows that all have read what was there two passes ago, since a barrier lies
between.
"""

import math
from typing import NamedTuple

from numpy import int32, int64

from gpusoftmax.kernels import ordering
from gpusoftmax.kernels.cuda.device._cuda import device, intrinsic
from gpusoftmax.kernels.cuda.device.arithmetic import Rounded, add, add_pair, formula, maximum, mul, number
from gpusoftmax.kernels.cuda.device.exponential import anchor, cheap_exp_from, cheap_exp_gap, lowest_of
from gpusoftmax.kernels.cuda.device.granules import granule_sum, granules_with
from gpusoftmax.kernels.cuda.device.largest import keep_best, keep_none, kth_largest
from gpusoftmax.kernels.cuda.device.memory import is_null, load, word_of
from gpusoftmax.kernels.cuda.device.noise import distance_of_ratio, scale_of_temperature
from gpusoftmax.kernels.cuda.device.nucleus import nucleus_with
from gpusoftmax.kernels.cuda.device.orders import halfway, n_halvings, of_order, order_of, order_step
from gpusoftmax.kernels.cuda.device.piece_state import gap_params, halved, is_near, of_cheap
from gpusoftmax.kernels.cuda.device.pieces import chunk_of, piece_of, slot_of
from gpusoftmax.kernels.cuda.device.reduce import any_lane, any_thread, publish, warp_max, warp_sum, warp_sum_pair
from gpusoftmax.kernels.cuda.device.row_barriers import announce, exchange_states, meet
from gpusoftmax.kernels.cuda.device.row_staging import open_row, stage_next, sync_slots, wait_for_piece
from gpusoftmax.kernels.cuda.device.row_state import saved_max, state_place
from gpusoftmax.kernels.cuda.device.rows import row_of
from gpusoftmax.kernels.cuda.device.shared_numbers import get
from gpusoftmax.kernels.cuda.device.split import (
    is_columns,
    is_long,
    is_one_chunk,
    is_short,
    split_chunks,
    split_lanes,
    split_piece_bits,
    split_slots,
)
from gpusoftmax.kernels.cuda.plan import MOST_LARGEST, WARP_SIZE

kept_from = formula(ordering.kept_from)
ALL = 2**62
"""More logits than any row has: no limit is reached by so many."""
BEST_PLACE = 2
"""The first of a chunk's numbers in shared memory that nothing here touches."""


def limit_with_own(has_own):
    """A device function: the limit of a row, the same for all threads that share it. all_cols: of the rows that there
    are. has_own: whether rows that go together may have different numbers.
    """

    @device
    def agreed(condition, split):
        """Whether the rows that go together take a step, since one of them needs it."""
        if not has_own or is_long(split):
            return condition
        if is_columns(split):
            return any_thread(condition)
        return any_lane(condition)

    @device
    def limit_of(source, n_cols, all_cols, limits, team, split, params):
        top_k, top_p, from_max = limits
        largest = row_max(source, n_cols, team, split, from_max)
        limit, turn = number(largest, -math.inf), int32(1)
        needed, needs_mass = top_k > 0 and top_k < all_cols, top_p < number(largest, 1.0)
        few, are_found = int32(MOST_LARGEST), False
        if is_long(split) and (needed or needs_mass):
            if needed and top_k < MOST_LARGEST:
                few = int32(top_k)
            kth, are_found = kth_largest(source, few, n_cols, largest, team, split)
            if needed and top_k == few:
                limit = kth
        if agreed(needed, split) and not (are_found and top_k == few):
            wanted, low = top_k if needed else int64(ALL), order_of(limit)
            limit, turn = limit_of_count(source, n_cols, limit, largest, wanted, turn, team, split, None, low, low)
        if agreed(needs_mass, split):
            mass, before = mass_params(largest, params), limit
            total, low = mass_reaching(source, n_cols, limit, turn, team, split, mass)
            wanted_mass, turn = mul(top_p, add(total, low)), int32(turn + 1)
            guess = above = order_of(limit)
            if are_found:
                end, next_larger = nucleus(few, wanted_mass, mass, team, split)
                if end < number(end, math.inf):
                    guess = order_of(end)
                    above = min(order_of(next_larger), order_of(largest) + order_step(source.pointer, largest))
            limit, turn = limit_of_mass(
                source, n_cols, limit, largest, wanted_mass, turn, team, split, mass, guess, above
            )
            if not needs_mass:
                limit = before
        return maximum(limit, add(largest, from_max))

    return limit_of


class Own(NamedTuple):
    """A row's own numbers."""

    is_given: bool  # they are such as can be given for all rows
    temperature: object
    top_k: object
    top_p: object
    min_p: object


@device
def own_numbers_of(row, rows, temperatures, t, top_ks, top_ps, p, min_ps, m):
    """The arguments are those of operands.own_numbers."""
    temperature, top_k, top_p, min_p = t, int64(0), p, m
    if row < rows.n_rows:
        temperature, top_p = own_number(temperatures, row, rows, t), own_number(top_ps, row, rows, p)
        min_p, top_k = own_number(min_ps, row, rows, m), word_of(top_ks, row, rows)
    zero, one = number(t, 0.0), number(t, 1.0)
    is_given = temperature >= zero and temperature < number(t, math.inf)
    is_given = is_given and top_p > zero and top_p <= one and min_p >= zero and min_p <= one
    return Own(is_given, temperature, top_k, top_p, min_p)


@device
def own_number(array, row, rows, of_all):
    """A row's own number, or that of all rows."""
    return of_all if is_null(array.pointer) else load(row_of(array, row, rows).pointer, 0, of_all)


@device
def limit_of_own(source, n_cols, all_cols, own, team, split):
    """The limit that a row's own numbers give; everything is kept at temperature 0, and where they are none."""
    t = own.temperature
    top_k, top_p, from_max = own.top_k, own.top_p, distance_of_ratio(own.min_p, t)
    if not own.is_given or t == number(t, 0.0):
        top_k, top_p, from_max = int64(0), number(t, 1.0), number(t, -math.inf)
    scale, scale_low = scale_of_temperature(number(t, 2.0), t)
    limits, params = (top_k, top_p, from_max), gap_params(scale, scale_low)
    return limit_of_each(source, n_cols, all_cols, limits, team, split, params)


# ---------------------------------------------------------------- passes


@device
def open_again(source, n_cols, team, split, padding):
    """Begins another pass: what did not stay in the slots is fetched again."""
    if not is_short(split) and split_slots(split) < team.n_pieces:
        sync_slots(split)  # every lane has read what the last pass left there
        open_row((source,), n_cols, team, split, padding)


@device
def larger(largest, values, col, width, source, split, numbers):
    for k in range(width):
        largest = maximum(largest, values[k])
    return largest


largest_of_granules = granules_with(larger)


@device
def row_max(source, n_cols, team, split, like):
    """The first pass."""
    least = number(like, -math.inf)
    largest, last_piece = least, int32((1 << split_piece_bits(split)) - 1)
    keep_none(split, like)
    announce(split)
    open_row((source,), n_cols, team, split, least)
    meet(split)
    k = int32(0)
    while k < team.n_pieces:
        wait_for_piece(k, team, split)
        piece = piece_of(k, n_cols, team, split, like)
        at = slot_of(k, team, split, 1)
        of_piece = largest_of_granules(least, source, at, piece, team, split, (), like)
        keep_best(k, of_piece, team, split)
        stage_next(k, (source,), n_cols, team, split, least)
        largest = of_piece if is_long(split) and k & last_piece == 0 else maximum(largest, of_piece)
        if is_long(split) and k & last_piece == last_piece:
            of_chunk = warp_max(largest, WARP_SIZE)
            publish(state_place(0, chunk_of(k, team, split), split, like), of_chunk, team, split)
        k = int32(k + 1)
    if not is_long(split):
        return warp_max(largest, split_lanes(split))
    exchange_states(split)
    largest, chunk = least, team.lane
    while chunk < split_chunks(split):
        largest = maximum(largest, saved_max(chunk, split, like))
        chunk = int32(chunk + WARP_SIZE)
    return warp_max(largest, WARP_SIZE)


def sum_reaching_with(add_granule):
    """A device function for a pass: (total, low) of what the logits that are at least a limit add up to."""

    sum_of_granules = granules_with(add_granule)

    @device
    def sum_reaching(source, n_cols, limit, turn, team, split, mass):
        zero = number(limit, 0.0)
        last_piece = int32((1 << split_piece_bits(split)) - 1)
        least, place = number(zero, -math.inf), int32(turn & 1)
        total, low = zero, zero
        open_again(source, n_cols, team, split, least)
        k = int32(0)
        while k < team.n_pieces:
            wait_for_piece(k, team, split)
            piece = piece_of(k, n_cols, team, split, zero)
            at = slot_of(k, team, split, 1)
            part = sum_of_granules(zero, source, at, piece, team, split, (limit, mass), zero)
            stage_next(k, (source,), n_cols, team, split, least)
            if k & last_piece == 0:
                total, low = zero, zero
            total, low = add_pair(total, low, warp_sum(part, split_lanes(split)), zero)
            if not is_one_chunk(split) and k & last_piece == last_piece:
                publish(state_place(place, chunk_of(k, team, split), split, zero), add(total, low), team, split)
            k = int32(k + 1)
        if is_one_chunk(split):
            return total, low
        exchange_states(split)
        total, low = zero, zero
        for chunk in range(team.lane, split_chunks(split), WARP_SIZE):
            total, low = add_pair(total, low, get(state_place(place, chunk, split, zero), zero), zero)
        return warp_sum_pair(total, low)

    return sum_reaching


@device
def add_count(total, values, col, width, source, split, numbers):
    limit, _ = numbers
    for k in range(width):
        total = add(total, where_reaching(values[k], limit, number(limit, 1.0)))
    return total


@device
def add_mass(total, values, col, width, source, split, numbers):
    limit, (half, exponent, lowest, scale, scale_low, c, c_low) = numbers
    if is_near(exponent):
        for k in range(width):
            values[k] = where_reaching(values[k], limit, cheap_exp_from(values[k], exponent, lowest, c, c_low))
    else:
        for k in range(width):
            e = cheap_exp_gap(values[k], half, scale, scale_low, c, c_low)
            values[k] = where_reaching(values[k], limit, e)
    return add(total, granule_sum(values, width))


count_reaching = sum_reaching_with(add_count)
mass_reaching = sum_reaching_with(add_mass)


@device
def mass_of(x, mass):
    """The exponential of one logit, as `add_mass` adds them up."""
    half, exponent, lowest, scale, scale_low, c, c_low = mass
    if is_near(exponent):
        return cheap_exp_from(x, exponent, lowest, c, c_low)
    return cheap_exp_gap(x, half, scale, scale_low, c, c_low)


nucleus = nucleus_with(mass_of)


@device
def mass_params(largest, params):
    """What the exponentials of a row refer to."""
    scale, scale_low, c, c_low = of_cheap(params)
    exponent = anchor(largest, c)
    return halved(largest), exponent, lowest_of(exponent, c), scale, scale_low, c, c_low


# ---------------------------------------------------------------- halvings


def limit_with(sum_reaching, surplus):
    """A device function that finds the largest number whose sum is wanted or more; any, where it is exactly that.

    guess, above: orders of what is probably that number and of the next larger logit of the row, which are tried first;
    that of the limit where there is no guess.
    """

    @device
    def limit_with_sum(source, n_cols, limit, largest, wanted, turn, team, split, mass, guess, above):
        step = order_step(source.pointer, largest)
        low, high = order_of(limit), order_of(largest) + step
        left = int32(n_halvings(source.pointer, largest) + 2)
        # Rows that share a warp, or a block that fills its slots together, are gone over until the last one is done.
        while left > 0 and (is_columns(split) or any_lane(halfway(low, high, step) != low)):
            middle = halfway(low, high, step)
            if low < guess and guess < high:
                middle = guess
            elif low < above and above < high:
                middle = above
            total, total_low = sum_reaching(source, n_cols, of_order(middle, largest), turn, team, split, mass)
            if middle != low:
                more = surplus(total, total_low, wanted)
                if more >= 0:
                    low = middle
                if more <= 0:
                    high = middle + step if more == 0 else middle
            if low == guess and high == above:  # there is no logit between them
                high = low + step
            left, turn = int32(left - 1), int32(turn + 1)
        return of_order(low, largest), turn

    return limit_with_sum


@device
def count_surplus(total, low, wanted):
    return int64(total) + int64(low) - wanted


@device
def mass_surplus(total, low, wanted):
    return int64(1) if add(total, low) >= wanted else int64(-1)


limit_of_count = limit_with(count_reaching, count_surplus)
limit_of_mass = limit_with(mass_reaching, mass_surplus)
limit_of = limit_with_own(has_own=False)
limit_of_each = limit_with_own(has_own=True)


# ---------------------------------------------------------------- instructions


@intrinsic
def where_reaching(typingctx, x, limit, y):
    """y where x is at least the limit, else 0."""

    def codegen(context, builder, signature, args):
        a = Rounded(builder, args[0].type)
        return a.select(builder.fcmp_ordered(">=", args[0], args[1]), args[2], a.number(0))

    return x(x, limit, x), codegen
