"""The state of a row, for the first pass.

    piece     a lane's columns, then a butterfly over the lanes: the maximum first, so that nothing is rescaled
    chunk     a warp's pieces, joined in order; nearly always one
    row       the states of all chunks, brought to the maximum of the row and added up in a fixed tree: each lane of a
              warp those of its chunks, by their numbers, then a butterfly. One warp of a block does it and tells the
              others. Whoever has computed a chunk, the sums are the same.

A state is (max, total): `total` is the sum of the exponentials, relative to the anchor of the maximum
(exponential.py). Anchors that are powers of two differ by one too, so that nothing is rounded when a chunk joins its
row.

A loss is log1p((ties - 1) + others / exp(max)), where `ties` columns equal the maximum and `others` is the sum over the
rest. A row's sum S holds one maximum, E, at least, and S - E is what its ties and the others add. Where S is 1.5 E or
more, that has at most three times the relative error of S. Where it is less, the chunks that have the maximum of the
row are summed again without it, which keeps the loss of a confident row exact. NaN and infinities take that way too. A
row of one chunk does so while it has the chunk in registers; a longer one finds out when its chunks have met, and
looks again at one of them as a rule.
"""

import math

from numpy import int32, int64

from gpusoftmax.kernels.cuda.device._cuda import cuda, device
from gpusoftmax.kernels.cuda.device.arithmetic import (
    add,
    div,
    exp_gap,
    inverse_sum,
    log_sum,
    maximum,
    mul,
    number,
    power_of_two_ratio,
    reference,
)
from gpusoftmax.kernels.cuda.device.columns import own_states
from gpusoftmax.kernels.cuda.device.distances import distances_one_by_one
from gpusoftmax.kernels.cuda.device.exponential import (
    accurate_exp_from,
    anchor,
    lowest_of,
)
from gpusoftmax.kernels.cuda.device.exponential_sums import quotient_pair, sum_of_lanes, with_part
from gpusoftmax.kernels.cuda.device.memory import granule_numbers, number_size, piece_numbers
from gpusoftmax.kernels.cuda.device.pairs import largest_of_lane, unpack_again
from gpusoftmax.kernels.cuda.device.piece_state import (
    halved,
    is_near,
    is_settled,
    of_cheap,
    piece_sum,
    read_logits,
    second_look,
    settled,
)
from gpusoftmax.kernels.cuda.device.pieces import chunk_of, slot_of
from gpusoftmax.kernels.cuda.device.reduce import (
    any_lane,
    leads_block,
    publish,
    publish_pair,
    warp_max,
    warp_min,
    warp_sum,
)
from gpusoftmax.kernels.cuda.device.row_barriers import announce, exchange_states, meet
from gpusoftmax.kernels.cuda.device.row_staging import fetch_again, open_row, put_back, stage_next, wait_for_piece
from gpusoftmax.kernels.cuda.device.shared_numbers import get, get_pair, put_pair
from gpusoftmax.kernels.cuda.device.slots import are_left_transformed, leave_transformed
from gpusoftmax.kernels.cuda.device.split import (
    is_columns,
    is_long,
    is_one_chunk,
    is_short,
    n_parts,
    own_part,
    remainder,
    split_chunks,
    split_lanes,
    split_piece_bits,
)
from gpusoftmax.kernels.cuda.device.staging import hidden
from gpusoftmax.kernels.cuda.plan import STATE_NUMBERS, WARP_SIZE


@device
def state_place(number_of_state, chunk, split, like):
    """Where a number of a chunk's state lies in shared memory. Behind the last chunk's there is one for the row."""
    return own_states(split, like) + (chunk * STATE_NUMBERS + number_of_state) * number_size(like)


@device
def publish_state(k, state, team, split):
    publish_pair(state_place(0, chunk_of(k, team, split), split, state[0]), state[0], state[1], team, split)


@device
def publish_second_look(k, state, team, split):
    publish_pair(state_place(2, chunk_of(k, team, split), split, state[0]), state[2], state[3], team, split)


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
def as_part(part_max, total, row_max, params):
    """The sum of a part, relative to the anchor of its row."""
    # -inf: the sum is 0, or NaN, and its anchor may be any distance from that of the row.
    if part_max == row_max or part_max == number(total, -math.inf):
        return total
    return mul(total, ratio(part_max, row_max, params))


@device
def joined(one, two, params):
    """(max, total, ties, rest) of two parts of a row."""
    largest = maximum(one[0], two[0])
    ties, rest = second_look_as_part(one, largest, params)
    more_ties, more_rest = second_look_as_part(two, largest, params)
    total = add(as_part(one[0], one[1], largest, params), as_part(two[0], two[1], largest, params))
    return largest, total, add(ties, more_ties), add(rest, more_rest)


@device
def second_look_as_part(state, row_max, params):
    """(ties, rest) of a part of a row: all of it is rest where the row has a larger maximum."""
    largest, total, ties, rest = state
    if largest == row_max:
        return ties, rest
    return number(total, 0.0), as_part(largest, total, row_max, params)


@device
def saved_max(chunk, split, like):
    """The maximum of a chunk; -inf where there is no such chunk."""
    return get(state_place(0, chunk, split, like), like) if chunk < split_chunks(split) else number(like, -math.inf)


@device
def saved_total(chunk, row_max, split, params):
    """The sum of a chunk as part of its row; 0 where there is no such chunk."""
    if chunk >= split_chunks(split):
        return number(row_max, 0.0)
    largest, total = get_pair(state_place(0, chunk, split, row_max), row_max)
    return as_part(largest, total, row_max, params)


@device
def saved_second_look(chunk, row_max, split, params):
    """(ties, rest) of a chunk as part of its row; 0 where there is no such chunk."""
    zero = number(row_max, 0.0)
    if chunk >= split_chunks(split):
        return zero, zero
    largest, total = get_pair(state_place(0, chunk, split, row_max), row_max)
    ties, rest = zero, zero
    if largest == row_max:  # the others were not looked at
        ties, rest = get_pair(state_place(2, chunk, split, row_max), row_max)
    return second_look_as_part((largest, total, ties, rest), row_max, params)


@device
def row_sums(team, split, params):
    """(max, total) of the row from the states of its chunks, which lie in shared memory."""
    many = split_chunks(split) > WARP_SIZE  # as a rule there are not, and the loops are passed by
    row_max, chunk = saved_max(team.lane, split, params[0]), int32(team.lane + WARP_SIZE)
    while many and chunk < split_chunks(split):
        row_max = maximum(row_max, saved_max(chunk, split, params[0]))
        chunk = int32(chunk + WARP_SIZE)
    row_max = warp_max(row_max, WARP_SIZE)
    total, low = saved_total(team.lane, row_max, split, params), number(row_max, 0.0)
    chunk = int32(team.lane + WARP_SIZE)
    while many and chunk < split_chunks(split):
        total, low = with_part(total, low, saved_total(chunk, row_max, split, params))
        chunk = int32(chunk + WARP_SIZE)
    return row_max, sum_of_lanes(total, low, WARP_SIZE)


@device
def row_second_look(row_max, team, split, params):
    """(ties, rest) of the row, where all its chunks that have the maximum were looked at again."""
    ties, rest = number(row_max, 0.0), number(row_max, 0.0)
    chunk, step = team.lane, hidden(int32(WARP_SIZE))
    while chunk < split_chunks(split):
        more_ties, more_rest = saved_second_look(chunk, row_max, split, params)
        ties, rest = add(ties, more_ties), add(rest, more_rest)
        chunk = int32(chunk + step)
    return warp_sum(ties, WARP_SIZE), warp_sum(rest, WARP_SIZE)


@device
def state_above(own, held, sums, piece, source, split, params):
    """(max, total) of a piece, given the maximum of this lane's columns."""
    largest = warp_max(own, split_lanes(split))
    unpack_again(held, source, split)
    return largest, piece_sum(held, sums, largest, anchor(largest, params[2]), piece, split, params)


@device
def state_of_piece(held, sums, piece, source, split, params):
    own = largest_of_lane(held, piece, source, split, params)
    return state_above(own, held, sums, piece, source, split, params)


@device
def begin_row(source, n_cols, team, split, params):
    """Before a first pass: the row is on its way. What else is needed of it is better waited for after that."""
    announce(split)
    open_row((source,), n_cols, team, split, number(params[0], -math.inf))


@device
def keep_nothing(k, largest, team, split):
    pass


def first_pass_with(second_looks, leaves_transformed=False, keep=keep_nothing):
    """A device function that publishes the states of all chunks of a row that has begun; the state of the one chunk is
    its result.

    With second looks, rows that are not known to be confident until their chunks have met have theirs later.
    keep(k, largest, team, split) is told the maximum of each lane's columns of piece k.
    """

    @device
    def first_pass(source, n_cols, team, split, params):
        held, sums = piece_numbers(params[0]), granule_numbers(params[0])
        zero, least = number(params[0], 0.0), number(params[0], -math.inf)
        state = (least, zero, zero, zero)
        last_piece = int32((1 << split_piece_bits(split)) - 1)
        meet(split)
        k = int32(0)
        while k < team.n_pieces:
            wait_for_piece(k, team, split)
            piece = read_logits(held, source, k, n_cols, team, split, params)
            if leaves_transformed and are_left_transformed(source, team, split, zero):
                leave_transformed(held, source, slot_of(k, team, split, 1), team, split)
            stage_next(k, (source,), n_cols, team, split, least)
            own = largest_of_lane(held, piece, source, split, params)
            keep(k, own, team, split)
            largest, total = state_above(own, held, sums, piece, source, split, params)
            ties, rest = zero, zero
            if second_looks and not is_long(split):
                ties, rest = second_look(held, sums, largest, total, piece, split, params)
            if k & last_piece == 0:
                state = largest, total, ties, rest
            else:
                state = joined(state, (largest, total, ties, rest), params)
            if not is_one_chunk(split) and k & last_piece == last_piece:
                publish_state(k, state, team, split)
                if second_looks and not is_long(split):
                    publish_second_look(k, state, team, split)
            k = int32(k + 1)
        return state

    return first_pass


NO_COLUMN = 2**31 - 1


def numbers_beside_with(fetch_beside, beside_piece, joined_beside):
    """A device function for the first pass, over a row that has begun, of an op that sums two more numbers, and may
    look for the first column of the maximum.

    fetch_beside(k, asked, n_cols, team, split, like) starts to read what beside_piece needs besides the logits of piece
    k; beside_piece(source, at, piece, largest, asked, team, split, params) -> (one, two, column) of a piece, from its
    slot, since beside a whole piece registers run out. joined_beside(one, state, other, other_state, row_max, asked,
    params) -> (one, two) of both parts of a row, given their states and the larger maximum.

    Its results are numbers_for_probs; (one, two) of the one chunk, while those of several lie beside their
    states, see `saved_beside`; and the column, which only the part that has it knows: -1 elsewhere.
    """

    @device
    def numbers_beside(source, asked, n_cols, team, split, params):
        params = of_cheap(params)
        zero, least = number(params[0], 0.0), number(params[0], -math.inf)
        held, sums = piece_numbers(zero), granule_numbers(zero)
        state, beside = (least, zero, zero, zero), (zero, zero)
        best, column = least, int32(0)
        last_piece = int32((1 << split_piece_bits(split)) - 1)
        fetch_beside(int32(0), asked, n_cols, team, split, zero)
        meet(split)
        k = int32(0)
        while k < team.n_pieces:
            wait_for_piece(k, team, split)
            fetch_beside(int32(k + 1), asked, n_cols, team, split, zero)
            piece = read_logits(held, source, k, n_cols, team, split, params)
            largest, total = state_of_piece(held, sums, piece, source, split, params)
            ties, rest = zero, zero
            if not is_long(split):
                ties, rest = second_look(held, sums, largest, total, piece, split, params)
            current = largest, total, ties, rest
            at = slot_of(k, team, split, 1)
            one, two, first = beside_piece(source, at, piece, largest, asked, team, split, params)
            stage_next(k, (source,), n_cols, team, split, least)
            if largest > best:
                best, column = largest, first
            if k & last_piece == 0:
                state, beside = current, (one, two)
            else:
                merged = joined(state, current, params)
                beside = joined_beside(beside, state, (one, two), current, merged[0], asked, params)
                state = merged
            if not is_one_chunk(split) and k & last_piece == last_piece:
                publish_state(k, state, team, split)
                if not is_long(split):
                    publish_second_look(k, state, team, split)
                place = state_place(4, chunk_of(k, team, split), split, zero)
                publish_pair(place, beside[0], beside[1], team, split)
            k = int32(k + 1)
        numbers = finished_row(state, source, n_cols, team, split, params)
        if asked.is_found and not is_one_chunk(split):
            row_max = mul(numbers[0], number(zero, 2.0))
            owner = remainder(first_chunk_with(row_max, team, split), team.size)
            column = column if owner == team.rank else int32(-1)
        return numbers, beside, column

    return numbers_beside


@device
def saved_beside(chunk, split, like):
    return get_pair(state_place(4, chunk, split, like), like)


@device
def first_chunk_with(row_max, team, split):
    """The first chunk whose maximum is that of the row."""
    first = int32(NO_COLUMN)
    for chunk in range(team.lane, split_chunks(split), WARP_SIZE):
        if saved_max(chunk, split, row_max) == row_max:
            first = min(first, int32(chunk))
    return warp_min(first, WARP_SIZE)


states_of_chunks = first_pass_with(second_looks=True)


@device
def has_chunk_with(row_max, team, split):
    """Whether a chunk of this warp has the maximum of the row."""
    found, turn, step = False, team.lane, hidden(int32(WARP_SIZE))
    while int32(team.rank + turn * team.size) < split_chunks(split):
        if saved_max(int32(team.rank + turn * team.size), split, row_max) == row_max:
            found = True
        turn = int32(turn + step)
    return any_lane(found)


def look_again_with(with_distances):
    """A device function for the second look at those of this warp's chunks that have the maximum of the row: at what
    else they sum up and, where they have distances (distances.py), at these.
    """

    @device
    def look_again(source, n_cols, row_max, team, split, params):
        held, sums = piece_numbers(row_max), granule_numbers(row_max)
        zero = number(row_max, 0.0)
        state, distances = (row_max, zero, zero, zero), zero
        last_piece = int32((1 << split_piece_bits(split)) - 1)
        k = int32(0) if has_chunk_with(row_max, team, split) else team.n_pieces  # most warps have none
        while k < team.n_pieces:
            if saved_max(chunk_of(k, team, split), split, row_max) == row_max:
                fetch_again(k, source, n_cols, team, split, number(row_max, -math.inf))
                piece = read_logits(held, source, k, n_cols, team, split, params)
                largest, total = state_of_piece(held, sums, piece, source, split, params)
                ties, rest = second_look(held, sums, largest, total, piece, split, params)
                if k & last_piece == 0:
                    state, distances = (largest, total, ties, rest), zero
                else:
                    state = joined(state, (largest, total, ties, rest), params)
                if with_distances:
                    distances = add(distances, distances_one_by_one(held, row_max, piece, split, params))
                if k & last_piece == last_piece:
                    publish_second_look(k, state, team, split)
                    if with_distances:
                        publish(state_place(4, chunk_of(k, team, split), split, zero), distances, team, split)
                put_back(k, source, n_cols, team, split, number(row_max, -math.inf))
            k = int32(k + 1)

    return look_again


@device
def softmax_row(state, team, split, params):
    """(max, sum) of a row whose chunks have been summed; `state`: of the one chunk."""
    largest, total, _, _ = state
    if is_one_chunk(split):
        return largest, total
    exchange_states(split)
    if is_columns(split):
        return row_sums(team, split, params)
    at = state_place(0, split_chunks(split), split, total)
    if leads_block():
        largest, total = row_sums(team, split, params)
        if team.lane == 0:
            put_pair(at, largest, total)
    cuda.syncthreads()  # the sums are there before any warp reads them
    return get_pair(at, total)


def softmax_state_with(leaves_transformed):
    """A device function: (max, sum) of a row, the same for all threads that share it.

    leaves_transformed: only a writer that may find them so reads the slots afterwards (rows.are_left_transformed).
    """
    sums_of_chunks = first_pass_with(second_looks=False, leaves_transformed=leaves_transformed)

    @device
    def softmax_state(source, n_cols, team, split, params):
        params = of_cheap(params)
        begin_row(source, n_cols, team, split, params)
        return softmax_row(sums_of_chunks(source, n_cols, team, split, params), team, split, params)

    return softmax_state


softmax_state = softmax_state_with(leaves_transformed=False)


@device
def relative(state, params):
    """The state of `formulas` from that of a row: half the maximum, and the others relative to it."""
    largest, ties, others, others_low = state
    tail, tail_low = quotient_pair(others, others_low, above_anchor(largest, anchor(largest, params[2]), params))
    return mul(largest, number(largest, 0.5)), ties, tail, tail_low


@device
def row_place(number_of_row, part, split, like):
    """Where the block has one of STATE_NUMBERS numbers of a row in shared memory: that of a part of it where rows are
    short, else the one row.
    """
    if is_short(split):
        slots = int64(n_parts(split)) * split.slot_bytes
        return slots + (part * STATE_NUMBERS + number_of_row) * number_size(like)
    return state_place(number_of_row, split_chunks(split), split, like)


@device
def tell_row(numbers, part, split):
    """Writes four numbers of a row for other threads of the block."""
    put_pair(row_place(0, part, split, numbers[0]), numbers[0], numbers[1])
    put_pair(row_place(2, part, split, numbers[0]), numbers[2], numbers[3])


@device
def told_row(part, split, like):
    one, two = get_pair(row_place(0, part, split, like), like)
    three, four = get_pair(row_place(2, part, split, like), like)
    return one, two, three, four


def loss_numbers_with(finish, with_distances=False):
    """A device function for the first pass of a loss: finish(state, params), four numbers, for all threads of a row;
    and what it does when the chunks have met.

    `state` is that of `formulas`. Divisions and logarithms cost as much for one row as for thirty-two: those of a block
    are finished side by side by its first warp, one in each lane.
    """

    look_again = look_again_with(with_distances)

    @device
    def finished(largest, total, ties, rest, params):
        return finish(relative(settled(largest, total, ties, rest, params), params), params)

    @device
    def finished_short_row(state, team, split, params):
        if team.lane == 0:
            tell_row(state, own_part(split), split)
        cuda.syncthreads()  # the states are there before any are read
        part = int32(cuda.threadIdx.x)
        if part < n_parts(split):
            largest, total, ties, rest = told_row(part, split, params[0])
            tell_row(finished(largest, total, ties, rest, params), part, split)
        cuda.syncthreads()  # the rows are finished before any warp goes on with its own
        return told_row(own_part(split), split, params[0])

    @device
    def finished_columns(team, split, params):
        row_max, total = row_sums(team, split, params)
        ties, rest = number(total, 0.0), number(total, 0.0)
        if not is_settled(row_max, total, params):  # the same for the warp, whose row it is
            ties, rest = row_second_look(row_max, team, split, params)
        return finished(row_max, total, ties, rest, params)

    @device
    def finished_long_row(source, n_cols, team, split, params):
        zero, part = number(params[0], 0.0), int32(0)
        if leads_block():
            row_max, total = row_sums(team, split, params)
            numbers = finished(row_max, total, zero, zero, params)
            if team.lane == 0:
                tell_row(numbers, part, split)
                is_last = number(zero, 1.0 if is_settled(row_max, total, params) else 0.0)
                put_pair(row_place(4, part, split, zero), row_max, is_last)
        cuda.syncthreads()  # the row is finished before any warp reads of it
        row_max, is_last = get_pair(row_place(4, part, split, zero), zero)
        if is_last == zero:
            look_again(source, n_cols, row_max, team, split, params)
            exchange_states(split)
            if leads_block():
                ties, rest = row_second_look(row_max, team, split, params)
                numbers = finish(relative((row_max, ties, rest, number(rest, 0.0)), params), params)
                if team.lane == 0:
                    tell_row(numbers, part, split)
            cuda.syncthreads()  # as above
        return told_row(part, split, zero)

    @device
    def finished_row(state, source, n_cols, team, split, params):
        """`state`: of the one chunk; those of several are in shared memory."""
        if is_short(split):
            return finished_short_row(state, team, split, params)
        if is_one_chunk(split):
            return finished(*state, params)
        exchange_states(split)
        if is_columns(split):
            return finished_columns(team, split, params)
        return finished_long_row(source, n_cols, team, split, params)

    @device
    def loss_numbers(source, n_cols, team, split, params):
        params = of_cheap(params)
        begin_row(source, n_cols, team, split, params)
        state = states_of_chunks(source, n_cols, team, split, params)
        return finished_row(state, source, n_cols, team, split, params)

    return loss_numbers, finished_row


@device
def numbers_for_probs(state, params):
    """Half the maximum, NaN where the row holds a NaN; log-sum-exp relative to it; what makes probabilities of the
    exponentials.
    """
    log, log_low = log_sum(state)
    row_max = mul(state[0], number(log, 2.0))
    inverse = div(inverse_sum(state), above_anchor(row_max, anchor(row_max, params[2]), params))
    half = number(log, math.nan) if state[2] != state[2] else state[0]
    return half, log, log_low, inverse


_, finished_row = loss_numbers_with(numbers_for_probs)
