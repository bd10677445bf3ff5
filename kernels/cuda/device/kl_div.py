"""The divergence between two rows of logits and its gradients. The mathematics stands in kernels/cpu/kl_div.py.

    first pass     the maximum and the sum of both rows, chunk by chunk
    second pass    from the last piece to the first: what its columns add to the divergence, and with it q - p
    third pass     only where the target's gradient is written, which needs the divergence

Exponentials are cheap ones (exponential.py). The states of chunks in shared memory: (max, total) of the logits, of the
target's logits, and what the chunk adds to the divergence.
"""

import math

from numpy import int32

from gpusoftmax.kernels.cuda.device._cuda import cuda, device
from gpusoftmax.kernels.cuda.device.arithmetic import (
    add,
    add_pair,
    div,
    divergence,
    half_difference,
    log_ratio,
    log_sum,
    maximum,
    mul,
    number,
    pull_on_target,
    row_inverse,
    short_log_ratio,
    sub,
)
from gpusoftmax.kernels.cuda.device.columns import tell_results
from gpusoftmax.kernels.cuda.device.exponential import anchor, cheap_exp_from, cheap_exp_gap, lowest_of
from gpusoftmax.kernels.cuda.device.exponential_sums import difference_pair
from gpusoftmax.kernels.cuda.device.granules import granule_sum
from gpusoftmax.kernels.cuda.device.memory import (
    VECTOR_BYTES,
    element_size,
    granule_numbers,
    is_null,
    load,
    piece_numbers,
    store,
    stored_in_halves,
    vector_bits,
)
from gpusoftmax.kernels.cuda.device.piece_state import (
    at_maximum,
    gap_params,
    halved,
    is_near,
    of_cheap,
    piece_state,
)
from gpusoftmax.kernels.cuda.device.pieces import chunk_of, own_row, piece_of, slot_of, team_of
from gpusoftmax.kernels.cuda.device.reduce import (
    leads_block,
    publish,
    publish_pair,
    warp_max,
    warp_sum,
    warp_sum_pair,
)
from gpusoftmax.kernels.cuda.device.row_barriers import announce, exchange_states, meet
from gpusoftmax.kernels.cuda.device.row_staging import (
    fetch_last,
    open_row,
    stage_before,
    stage_next,
    sync_slots,
    wait_for_last,
    wait_for_piece,
)
from gpusoftmax.kernels.cuda.device.row_state import above_anchor, as_part, joined, relative, state_place
from gpusoftmax.kernels.cuda.device.row_writer import piece_writer, row_writer
from gpusoftmax.kernels.cuda.device.rows import number_or, row_of
from gpusoftmax.kernels.cuda.device.shared_numbers import get, get_pair, put_pair
from gpusoftmax.kernels.cuda.device.slots import is_granule, read_columns, read_piece
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
from gpusoftmax.kernels.cuda.plan import WARP_SIZE

# Where the states of a chunk have the sums of either row, and what the chunk adds to the divergence.
OF_LOGITS, OF_TARGET, OF_BOTH = 0, 2, 4


# ---------------------------------------------------------------- the first pass


@device
def sums_of_rows(sources, n_cols, team, split, params):
    """(max, total) of the logits and of the target's, if they are one chunk; else those of chunks are published."""
    held, sums = piece_numbers(params[0]), granule_numbers(params[0])
    zero, least = number(params[0], 0.0), number(params[0], -math.inf)
    one, two = (least, zero, zero, zero), (least, zero, zero, zero)
    last_piece = int32((1 << split_piece_bits(split)) - 1)
    announce(split)
    open_row(sources, n_cols, team, split, least)
    meet(split)
    k = int32(0)
    while k < team.n_pieces:
        wait_for_piece(k, team, split)
        piece = piece_of(k, n_cols, team, split, zero)
        at = slot_of(k, team, split, 2)
        read_piece(held, sources[0], at, piece, team, split)
        largest, total = piece_state(held, sums, piece, split, params)
        read_piece(held, sources[1], int32(at + split.slot_bytes), piece, team, split)
        target_largest, target_total = piece_state(held, sums, piece, split, params)
        stage_next(k, sources, n_cols, team, split, least)
        if k & last_piece == 0:
            one, two = (largest, total, zero, zero), (target_largest, target_total, zero, zero)
        else:
            one = joined(one, (largest, total, zero, zero), params)
            two = joined(two, (target_largest, target_total, zero, zero), params)
        if not is_one_chunk(split) and k & last_piece == last_piece:
            chunk = chunk_of(k, team, split)
            publish_pair(state_place(OF_LOGITS, chunk, split, zero), one[0], one[1], team, split)
            publish_pair(state_place(OF_TARGET, chunk, split, zero), two[0], two[1], team, split)
        k = int32(k + 1)
    return (one[0], one[1]), (two[0], two[1])


@device
def sums_of_chunks(which, team, split, params):
    """(max, total) of a row from the states of its chunks, which lie in shared memory."""
    zero = number(params[0], 0.0)
    largest, chunk = number(params[0], -math.inf), team.lane
    while chunk < split_chunks(split):
        largest = maximum(largest, get(state_place(which, chunk, split, zero), zero))
        chunk = int32(chunk + WARP_SIZE)
    largest = warp_max(largest, WARP_SIZE)
    total, chunk = zero, team.lane
    while chunk < split_chunks(split):
        part_max, part = get_pair(state_place(which, chunk, split, zero), zero)
        total = add(total, as_part(part_max, part, largest, params))
        chunk = int32(chunk + WARP_SIZE)
    return largest, warp_sum(total, WARP_SIZE)


@device
def log_of(largest, total, params):
    """log s, relative to the maximum, as a pair. Its relative error may be large where it is small; what it is off by
    moves all log-ratios alike, which the divergence does not show.
    """
    others, low = difference_pair(total, at_maximum(largest, anchor(largest, params[2]), params))
    return log_sum(relative((largest, number(total, 1.0), others, low), params))


@device
def summary_of(one, two, params):
    """(max, inverse) of the logits, the same of the target's, log s of the latter minus that of the former.

    Exponentials of both refer to powers of two, or those of both to their maxima: there is code for these two alone.
    """
    log, log_low = log_of(one[0], one[1], params)
    target_log, target_log_low = log_of(two[0], two[1], params)
    zero = number(log, 0.0)
    inverse, target_inverse = row_inverse(one[0], one[1], zero), row_inverse(two[0], two[1], zero)
    exponent, target_exponent = anchor(one[0], params[2]), anchor(two[0], params[2])
    if not (is_near(exponent) and is_near(target_exponent)):
        inverse = mul(inverse, above_anchor(one[0], exponent, params))
        target_inverse = mul(target_inverse, above_anchor(two[0], target_exponent, params))
    return one[0], inverse, two[0], target_inverse, add(sub(target_log, log), sub(target_log_low, log_low))


@device
def summary_of_chunks(team, split, params):
    """summary_of rows of several chunks, whose states lie in shared memory. One warp of a block is enough for that."""
    if not is_long(split):  # the row is one warp's
        one = sums_of_chunks(OF_LOGITS, team, split, params)
        return summary_of(one, sums_of_chunks(OF_TARGET, team, split, params), params)
    zero, row = number(params[0], 0.0), split_chunks(split)
    if leads_block():
        one = sums_of_chunks(OF_LOGITS, team, split, params)
        found = summary_of(one, sums_of_chunks(OF_TARGET, team, split, params), params)
        if team.lane == 0:
            put_pair(state_place(0, row, split, zero), found[0], found[1])
            put_pair(state_place(2, row, split, zero), found[2], found[3])
            put_pair(state_place(4, row, split, zero), found[4], zero)
    cuda.syncthreads()  # the numbers are there before any warp reads them
    row_max, inverse = get_pair(state_place(0, row, split, zero), zero)
    target_max, target_inverse = get_pair(state_place(2, row, split, zero), zero)
    return row_max, inverse, target_max, target_inverse, get(state_place(4, row, split, zero), zero)


@device
def numbers_of_rows(sources, n_cols, team, split, scale, scale_low):
    """((half, exponent, inverse) of the logits, the same of the target's, (ahead, ahead_low, log)), see log_ratio."""
    params = of_cheap(gap_params(scale, scale_low))
    one, two = sums_of_rows(sources, n_cols, team, split, params)
    if is_one_chunk(split):
        found = summary_of(one, two, params)
    else:
        exchange_states(split)
        found = summary_of_chunks(team, split, params)
    row_max, inverse, target_max, target_inverse, log = found
    ahead, ahead_low = half_difference(target_max, row_max)
    exponent, target_exponent = anchor(row_max, params[2]), anchor(target_max, params[2])
    if is_near(exponent) and is_near(target_exponent):  # nor is a difference too large then
        ahead, ahead_low = mul(ahead, number(scale, 2.0)), mul(ahead_low, number(scale, 2.0))
    else:
        exponent, target_exponent = number(scale, math.inf), number(scale, math.inf)
    logits, target = (halved(row_max), exponent, inverse), (halved(target_max), target_exponent, target_inverse)
    return logits, target, (ahead, ahead_low, log)


# ---------------------------------------------------------------- the second pass


@device
def probability(x, of_row, is_anchored, params):
    """The exponential of a logit times the last number of its row. is_anchored: what is_near says of the second one."""
    return mul(exponential(x, of_row, is_anchored, params), of_row[2])


@device
def exponential(x, of_row, is_anchored, params):
    half, exponent, _ = of_row
    scale, scale_low, c, c_low = params
    if is_anchored:
        return cheap_exp_from(x, exponent, lowest_of(exponent, c), c, c_low)
    return cheap_exp_gap(x, half, scale, scale_low, c, c_low)


@device
def log_ratio_of(x, y, apart, is_anchored, is_short, scale):
    """d of two logits. is_short: a constant, whether they have sixteen bits."""
    ahead, ahead_low, log = apart
    half = number(scale, 0.5)
    if not is_anchored:
        return log_ratio(mul(x, half), mul(y, half), ahead, ahead_low, scale, log)
    if is_short:
        return short_log_ratio(x, y, ahead, mul(scale, half), log)
    return log_ratio(x, y, ahead, ahead_low, mul(scale, half), log)


def piece_divergence_with(is_anchored):
    @device
    def piece_divergence(sources, at, piece, numbers, team, split, params):
        """What a lane's columns of a piece add, over the inverse of the target's row; one granule after the other: two
        pieces in registers would leave no room to compute in.
        """
        logits, target, apart = numbers
        scale, size = params[0], element_size(sources[0].pointer)
        bits, lanes = vector_bits(sources[0].pointer), split_lanes(split)
        values, others = granule_numbers(scale), granule_numbers(scale)
        one = int32(at + sources[0].shift * size + team.lane * VECTOR_BYTES)
        two = int32(at + split.slot_bytes + sources[1].shift * size + team.lane * VECTOR_BYTES)
        as_granule, others_as_granule = is_granule(sources[0], one, 1 << bits), is_granule(sources[1], two, 1 << bits)
        relative_to_target = div(logits[2], target[2])
        total, first = number(scale, 0.0), int32(0)
        while first < piece.count:
            read_columns(values, sources[0], one, 1 << bits, as_granule)
            read_columns(others, sources[1], two, 1 << bits, others_as_granule)
            for k in range(1 << bits):
                q = mul(exponential(values[k], logits, is_anchored, params), relative_to_target)
                p = exponential(others[k], target, is_anchored, params)
                is_short = stored_in_halves(sources[0].pointer)
                d = log_ratio_of(values[k], others[k], apart, is_anchored, is_short, scale)
                values[k] = divergence(p, q, d)
            total = add(total, granule_sum(values, 1 << bits))
            step = int32(lanes * VECTOR_BYTES)
            first, one, two = int32(first + (lanes << bits)), int32(one + step), int32(two + step)
        return total

    return piece_divergence


near_divergence, far_divergence = piece_divergence_with(is_anchored=True), piece_divergence_with(is_anchored=False)


@device
def changes(values, others, col, width, numbers):
    """q - p, times what each of them is multiplied by."""
    half, exponent, factor, target_half, target_exponent, target_factor, params = numbers
    logits, target = (half, exponent, factor), (target_half, target_exponent, target_factor)
    if is_near(exponent):
        for k in range(width):
            values[k] = sub(probability(values[k], logits, True, params), probability(others[k], target, True, params))
    else:
        for k in range(width):
            values[k] = sub(
                probability(values[k], logits, False, params), probability(others[k], target, False, params)
            )


write_changes = piece_writer(changes, own_columns=True)


@device
def row_divergence(dlogits, is_written, for_all, sources, n_cols, numbers, factor, team, split, params):
    """The divergence, for all threads that share the rows or for those of rank 0; with it, perhaps, its gradient."""
    logits, target, _ = numbers
    zero, least = number(params[0], 0.0), number(params[0], -math.inf)
    results = (
        logits[0], logits[1], mul(logits[2], factor), target[0], target[1], mul(target[2], factor), params
    )  # fmt: skip
    if is_written and is_columns(split):
        tell_results(dlogits, results, team, split)
    last_piece = int32((1 << split_piece_bits(split)) - 1)
    total = zero
    k = int32(team.n_pieces - 1)
    while k >= 0:
        wait_for_last(k, team, split)
        piece = piece_of(k, n_cols, team, split, zero)
        at = slot_of(k, team, split, 2)
        if is_near(logits[1]):
            part = near_divergence(sources, at, piece, numbers, team, split, params)
        else:
            part = far_divergence(sources, at, piece, numbers, team, split, params)
        part = warp_sum(part, split_lanes(split))  # not above: short rows of one warp may go either way
        total = part if k & last_piece == last_piece else add(total, part)
        if not is_one_chunk(split) and k & last_piece == 0:
            publish(state_place(OF_BOTH, chunk_of(k, team, split), split, zero), total, team, split)
        if is_written:
            write_changes(k, dlogits, sources, n_cols, team, split, results, zero)
        stage_before(k, sources, n_cols, team, split, least)
        k = int32(k - 1)
    if not is_one_chunk(split):
        exchange_states(split)
        total, low, chunk = zero, zero, team.lane
        if not for_all and team.rank > 0:
            return zero
        while chunk < split_chunks(split):
            total, low = add_pair(total, low, get(state_place(OF_BOTH, chunk, split, zero), zero), zero)
            chunk = int32(chunk + WARP_SIZE)
        total, low = warp_sum_pair(total, low)
        total = add(total, low)
    # NaN if either row has no probabilities: each of its terms is NaN, or +inf.
    return add(mul(total, target[2]), add(sub(logits[2], logits[2]), sub(target[2], target[2])))


# ---------------------------------------------------------------- the kernels


@device
def factor_of(weight, upstream, normaliser, scale):
    """What q - p, or p (d - KL), is multiplied by."""
    divisor = number(scale, 1.0) if is_null(normaliser) else load(normaliser, 0, scale)
    return mul(mul(weight, div(upstream, divisor)), mul(scale, number(scale, 0.5)))


@device
def clear_row(target, n_cols, zero, team, split):
    for col in range(team.rank * split_lanes(split) + team.lane, n_cols, team.size * split_lanes(split)):
        store(target.pointer, col * target.stride, zero)


@device
def row_of_task(weight, rows, start, split, like):
    """(row, whether it exists, its weight): 0 for one that does not."""
    row = own_row(start, split)
    exists = row < rows.n_rows
    return row, exists, number_or(weight, row, rows, number(like, 1.0)) if exists else number(like, 0.0)


def kl_div_rows(
    rows, split, start, logits, target_logits, weight, losses, dlogits, normaliser, upstream, scale, scale_low
):  # fmt: skip
    zero, team = number(scale, 0.0), team_of(split, 2)
    row, exists, row_weight = row_of_task(weight, rows, start, split, scale)
    counts = row_weight != zero  # the same for the whole team
    writes_loss, writes_row = team.rank == 0 and team.lane == 0, not is_null(dlogits.pointer)
    target = row_of(dlogits, row, rows)
    if exists and not counts:
        if writes_loss:
            store(row_of(losses, row, rows).pointer, 0, zero)
        if writes_row:
            clear_row(target, rows.n_cols, zero, team, split)
    if is_long(split) and not counts:
        return
    sources = row_of(logits, row, rows), row_of(target_logits, row, rows)
    n_cols = rows.n_cols if counts else 0
    numbers = numbers_of_rows(sources, n_cols, team, split, scale, scale_low)
    params, factor = gap_params(scale, scale_low), factor_of(row_weight, upstream, normaliser, scale)
    found = row_divergence(target, writes_row, False, sources, n_cols, numbers, factor, team, split, params)
    if counts and writes_loss:
        store(row_of(losses, row, rows).pointer, 0, mul(found, row_weight))


@device
def pulls(values, others, col, width, numbers):
    """p (d - KL), times what it is multiplied by."""
    half, exponent, factor, ahead, ahead_low, log, of_row, params = numbers
    target, apart = (half, exponent, factor), (ahead, ahead_low, log)
    if is_near(exponent):
        for k in range(width):
            d = log_ratio_of(values[k], others[k], apart, True, False, params[0])
            values[k] = pull_on_target(probability(others[k], target, True, params), d, of_row)
    else:
        for k in range(width):
            d = log_ratio_of(values[k], others[k], apart, False, False, params[0])
            values[k] = pull_on_target(probability(others[k], target, False, params), d, of_row)


write_pulls = row_writer(pulls)


def kl_div_target_grad_rows(
    rows, split, start, logits, target_logits, weight, dtarget, normaliser, upstream, scale, scale_low
):  # fmt: skip
    zero, team = number(scale, 0.0), team_of(split, 2)
    row, exists, row_weight = row_of_task(weight, rows, start, split, scale)
    counts = row_weight != zero
    target = row_of(dtarget, row, rows)
    if exists and not counts:
        clear_row(target, rows.n_cols, zero, team, split)
    if is_long(split) and not counts:
        return
    sources = row_of(logits, row, rows), row_of(target_logits, row, rows)
    n_cols = rows.n_cols if counts else 0
    numbers = numbers_of_rows(sources, n_cols, team, split, scale, scale_low)
    params, factor = gap_params(scale, scale_low), factor_of(row_weight, upstream, normaliser, scale)
    found = row_divergence(target, False, True, sources, n_cols, numbers, factor, team, split, params)
    if not is_short(split) and split_slots(split) < team.n_pieces:
        sync_slots(split)  # every lane has read the slots, in which the first pieces are now
        fetch_last(sources, n_cols, team, split, number(scale, -math.inf))
    _, (half, exponent, inverse), (ahead, ahead_low, log) = numbers
    results = half, exponent, mul(inverse, factor), ahead, ahead_low, log, found, params
    write_pulls(target, sources, n_cols, team, split, results, zero)
