"""The state of a row, for the first pass.

    piece     a lane's columns, then a butterfly over the lanes: the maximum first, so that nothing is rescaled
    chunk     a warp's pieces, joined in order; nearly always one
    row       the states of all chunks, brought to the maximum of the row and added up in a fixed tree: each lane of
              every warp those of its chunks, by their numbers, then a butterfly. Whoever has computed a chunk, the
              sums are the same.

A state is (max, ties, others): `others` is the sum of the exponentials, relative to the anchor of the maximum
(exponential.py), over all columns but those that `ties` counts, which equal the maximum. softmax needs no ties: it
counts 0 and adds all. Anchors that are powers of two differ by one too, so that nothing is rounded when a chunk joins
its row.

A loss is log1p((ties - 1) + others / exp(max)). A piece's sum S holds one maximum, E, at least, and S - E is what its
ties and the others add. Where S is 1.5 E or more, that has at most three times the relative error of S. Where it is
less, the sum is taken again without the maximum, which keeps the loss of a confident row exact. NaN and infinities take
that way too.
"""

import math

from numpy import int32

from gpusoftmax.kernels.cuda.device._cuda import device
from gpusoftmax.kernels.cuda.device.arithmetic import (
    add,
    div,
    exp_gap,
    maximum,
    mul,
    number,
    power_of_two_ratio,
    reference,
    sub,
    tie,
)
from gpusoftmax.kernels.cuda.device.columns import own_states
from gpusoftmax.kernels.cuda.device.exponential import (
    accurate_exp_from,
    anchor,
    cheap_exp_from,
    cheap_exp_gap,
    low_of_cheap,
    lowest_of,
    scale_in_base_2,
    unless_equal,
)
from gpusoftmax.kernels.cuda.device.memory import n_values, number_size, piece_numbers
from gpusoftmax.kernels.cuda.device.reduce import any_lane, publish, warp_max, warp_sum
from gpusoftmax.kernels.cuda.device.rows import (
    announce,
    chunk_of,
    col_of,
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
from gpusoftmax.kernels.cuda.device.split import is_one_chunk, split_chunks, split_lanes, split_piece_bits
from gpusoftmax.kernels.cuda.device.staging import get
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
    read_piece(held, source, slot_of(k, team, split, 1), piece, team, split)
    for j in range(n_values(params[0])):
        held[j] = transform(held[j], piece.first + col_of(j, team, split, source), row, params)
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


def piece_sum_with(with_maximum=True, lift=0):
    """A device function that sums the exponentials of a piece, or of what is less than its maximum. With a lift it is
    2^lift times as much, so that terms far below the maximum are not lost.
    """

    @device
    def piece_sum(held, largest, exponent, piece, split, params):
        scale, scale_low, c, c_low = params
        values = piece_numbers(scale)
        total = number(scale, 0.0)
        if is_near(exponent):
            lifted = sub(exponent, number(scale, lift)) if lift else exponent
            lowest = lowest_of(lifted, c)
            for group in range(0, n_values(scale), GROUP):
                if has_columns(group, piece, split):
                    for k in range(group, group + GROUP):
                        values[k] = cheap_exp_from(held[k], lifted, lowest, c, c_low)
                        if not with_maximum:
                            values[k] = unless_equal(values[k], held[k], largest)
                    total = add(total, group_sum(values, group))
        else:
            half = halved(largest)
            for group in range(0, n_values(scale), GROUP):
                if has_columns(group, piece, split):
                    for k in range(group, group + GROUP):
                        if lift:
                            values[k] = lifted_exp_gap(held[k], half, scale, scale_low, lift)
                        else:
                            values[k] = cheap_exp_gap(held[k], half, scale, scale_low, c, c_low)
                        if not with_maximum:
                            values[k] = unless_equal(values[k], held[k], largest)
                    total = add(total, group_sum(values, group))
        return warp_sum(total, split_lanes(split))

    return piece_sum


LIFT = 64
piece_sum = piece_sum_with()
piece_rest = piece_sum_with(with_maximum=False)
lifted_rest = piece_sum_with(with_maximum=False, lift=LIFT)


@device
def lifted_exp_gap(x, half, scale, scale_low, lift):
    """2^lift exp((x - max) scale), gradual underflow included."""
    return mul(exp_gap(mul(x, number(scale, 0.5)), half, scale, scale_low), number(scale, 2.0**lift))


@device
def of_cheap(params):
    """The parameters for sums, which are those of cheap exponentials."""
    scale, scale_low, c, c_low = params
    return scale, scale_low, c, low_of_cheap(c_low)


@device
def is_near(exponent):
    return exponent < number(exponent, math.inf)


@device
def halved(largest):
    return mul(reference(largest), number(largest, 0.5))


@device
def softmax_piece_state(held, piece, split, params):
    largest = piece_max(held, piece, split, params)
    total = piece_sum(held, largest, anchor(largest, params[2]), piece, split, params)
    return largest, number(total, 0.0), total


@device
def ties_of(held, largest, piece, split):
    total = number(largest, 0.0)
    for group in range(0, n_values(largest), GROUP):
        if has_columns(group, piece, split):
            for k in range(group, group + GROUP):
                total = add(total, tie(held[k], largest))
    return warp_sum(total, split_lanes(split))


@device
def at_maximum(largest, exponent, params):
    """What the maximum itself adds to piece_sum: the same bits."""
    scale, scale_low, c, c_low = params
    if not is_near(exponent):
        return number(scale, 1.0)
    return cheap_exp_from(reference(largest), exponent, lowest_of(exponent, c), c, c_low)


@device
def loss_piece_state(held, piece, split, params):
    scale = params[0]
    zero, least = number(scale, 0.0), number(scale, -math.inf)
    largest = piece_max(held, piece, split, params)
    exponent = anchor(largest, params[2])
    total = piece_sum(held, largest, exponent, piece, split, params)
    own = at_maximum(largest, exponent, params)
    ties, others = number(scale, 1.0), sub(total, own)
    confident = not total >= mul(own, number(scale, 1.5))
    if any_lane(confident):  # the others of the warp keep what they have
        exact_ties = ties_of(held, largest, piece, split)
        rest = piece_rest(held, largest, exponent, piece, split, params)
        tiny = rest < number(scale, 2.0**-60)
        if any_lane(tiny):  # terms that were flushed to 0 may add up to a number that would not be
            lifted = mul(lifted_rest(held, largest, exponent, piece, split, params), number(scale, 2.0**-LIFT))
            if tiny:
                rest = lifted
        if confident:
            ties, others = exact_ties, rest
            if largest == least:
                ties = zero
    return largest, ties, others


# ---------------------------------------------------------------- all chunks of a row


@device
def state_place(number_of_state, chunk, split, like):
    """Where a number of a chunk's state lies in shared memory."""
    return own_states(split, like) + (chunk * STATE_NUMBERS + number_of_state) * number_size(like)


@device
def publish_state(k, state, team, split):
    chunk = chunk_of(k, team, split)
    for i in range(3):
        publish(state_place(i, chunk, split, state[i]), state[i], team, split)


@device
def ratio(part_max, row_max, params):
    """What brings exponentials of the anchor of a part to that of its row."""
    scale, scale_low, c, c_low = params
    part, whole = anchor(part_max, c), anchor(row_max, c)
    if is_near(part) and is_near(whole):
        return power_of_two_ratio(part, whole)
    # The parts' maxima, and what lies between each of them and its anchor.
    half, row_half = mul(part_max, number(scale, 0.5)), halved(row_max)
    factor = exp_gap(half, row_half, scale, scale_low)
    return div(mul(factor, above_anchor(row_max, whole, params)), above_anchor(part_max, part, params))


@device
def above_anchor(largest, exponent, params):
    """The exponential of a maximum."""
    scale, scale_low, c, c_low = params
    if not is_near(exponent):
        return number(scale, 1.0)
    return accurate_exp_from(reference(largest), exponent, lowest_of(exponent, c), c, c_low)


@device
def as_part(state, row_max, params):
    """(ties, others) of a state as part of a row: its ties join the others where the row has a larger maximum."""
    largest, ties, others = state
    if largest == row_max:
        return ties, others
    if ties > number(ties, 0.0):
        others = add(others, mul(ties, above_anchor(largest, anchor(largest, params[2]), params)))
    return number(ties, 0.0), mul(others, ratio(largest, row_max, params))


@device
def joined(one, two, params):
    """The state of two parts of a row."""
    largest = maximum(one[0], two[0])
    ties, others = as_part(one, largest, params)
    more_ties, more_others = as_part(two, largest, params)
    return largest, add(ties, more_ties), add(others, more_others)


@device
def saved_max(chunk, split, like):
    """The maximum of a chunk; -inf where there is no such chunk."""
    return get(state_place(0, chunk, split, like), like) if chunk < split_chunks(split) else number(like, -math.inf)


@device
def saved_part(chunk, row_max, split, params):
    """(ties, others) of a chunk as part of its row; 0 where there is no such chunk."""
    zero = number(row_max, 0.0)
    if chunk >= split_chunks(split):
        return zero, zero
    state = get(state_place(0, chunk, split, zero), zero), get(state_place(1, chunk, split, zero), zero)
    return as_part((state[0], state[1], get(state_place(2, chunk, split, zero), zero)), row_max, params)


@device
def joined_states(team, split, params):
    """The state of the row from those of its chunks, which lie in shared memory; the same for all threads."""
    many = split_chunks(split) > WARP_SIZE  # as a rule there are not, and the loops are passed by
    row_max, chunk = saved_max(team.lane, split, params[0]), int32(team.lane + WARP_SIZE)
    while many and chunk < split_chunks(split):
        row_max = maximum(row_max, saved_max(chunk, split, params[0]))
        chunk = int32(chunk + WARP_SIZE)
    row_max = warp_max(row_max, WARP_SIZE)
    ties, others = saved_part(team.lane, row_max, split, params)
    chunk = int32(team.lane + WARP_SIZE)
    while many and chunk < split_chunks(split):
        more_ties, more_others = saved_part(chunk, row_max, split, params)
        ties, others = add(ties, more_ties), add(others, more_others)
        chunk = int32(chunk + WARP_SIZE)
    return row_max, warp_sum(ties, WARP_SIZE), warp_sum(others, WARP_SIZE)


def row_state_with(piece_state):
    """A device function for the first pass over a row of logits, given what computes the state of a piece."""

    @device
    def row_state(source, n_cols, row, team, split, params):
        """The state of the row, the same for all threads that share it."""
        held = piece_numbers(params[0])
        zero, least = number(params[0], 0.0), number(params[0], -math.inf)
        state = (least, zero, zero)
        last_piece = int32((1 << split_piece_bits(split)) - 1)
        announce(split)
        open_row((source,), n_cols, team, split, least)
        meet(split)
        k = int32(0)
        while k < team.n_pieces:
            wait_for_piece(k, team, split)
            piece = read_logits(held, source, k, n_cols, row, team, split, params)
            stage_next(k, (source,), n_cols, team, split, least)
            current = piece_state(held, piece, split, params)
            if k & last_piece == 0:
                state = current
            else:
                state = joined(state, current, params)
            if not is_one_chunk(split) and k & last_piece == last_piece:
                publish_state(k, state, team, split)
            k = int32(k + 1)
        if is_one_chunk(split):
            return state
        exchange_states(split)
        return joined_states(team, split, params)

    return row_state


softmax_row_state = row_state_with(softmax_piece_state)
loss_row_state = row_state_with(loss_piece_state)


@device
def softmax_state(source, n_cols, row, team, split, params):
    """(max, 0, sum) of a row."""
    return softmax_row_state(source, n_cols, row, team, split, of_cheap(params))


@device
def relative(state, params):
    """The state of `formulas` from that of a row: half the maximum, and the others relative to it."""
    largest, ties, others = state
    own = above_anchor(largest, anchor(largest, params[2]), params)
    return mul(largest, number(largest, 0.5)), ties, div(others, own), number(others, 0.0)


@device
def loss_state(source, n_cols, row, team, split, params):
    params = of_cheap(params)
    return relative(loss_row_state(source, n_cols, row, team, split, params), params)
