"""Cross-entropy and its fused gradient. The mathematics stands in kernels/cpu/cross_entropy.py.

The small kernels around it, normalise_rows, total_rows and find_bad_label_rows, run as one block: their sums have a
fixed order.
"""

import math

from numpy import int32

from gpusoftmax.kernels.cuda.device._cuda import cuda, device
from gpusoftmax.kernels.cuda.device.arithmetic import (
    add,
    add_pair,
    div,
    fma,
    inverse_sum,
    log_sum,
    merge,
    mul,
    number,
    reference,
    sub,
)
from gpusoftmax.kernels.cuda.device.columns import lane_of, lanes_at_once, place_of_column
from gpusoftmax.kernels.cuda.device.exponential import cheap_exp_gap, half_gap, negative_log_probability
from gpusoftmax.kernels.cuda.device.memory import (
    block_numbers,
    is_null,
    load,
    load_label,
    piece_numbers,
    store,
)
from gpusoftmax.kernels.cuda.device.piece_state import gap_params, loss_piece_state
from gpusoftmax.kernels.cuda.device.reduce import (
    block_sum_pair,
    first_of_block,
    next_parts,
    no_parts,
    team_sum,
    warp_sum_pair,
)
from gpusoftmax.kernels.cuda.device.row_state import (
    loss_state,
    max_of_chunks,
    merged_states,
    open_piece,
    publish_number,
    publish_state,
    rows_of_block_with,
    state_place,
)
from gpusoftmax.kernels.cuda.device.rows import (
    announce,
    exchange_states,
    meet,
    open_row,
    own_row,
    row_of,
    row_offset,
    row_writer,
    slot_of,
    stage_next,
    team_of,
)
from gpusoftmax.kernels.cuda.device.split import (
    is_long,
    is_one_chunk,
    split_chunks,
    split_lanes,
    split_piece_bits,
    split_turns,
)
from gpusoftmax.kernels.cuda.device.staging import get, staged
from gpusoftmax.kernels.cuda.device.transform import transform
from gpusoftmax.kernels.cuda.plan import WARP_SIZE
from gpusoftmax.kernels.operands import NO_BAD_LABEL


@device
def label_of(labels, row, rows):
    return load_label(labels.pointer, row_offset(labels, row, rows), labels.code)


@device
def number_at(numbers, index, default):
    """numbers[index], or the default where the caller gave no numbers."""
    return default if is_null(numbers) else load(numbers, index, default)


# ---------------------------------------------------------------- smoothing


@device
def smoothing_piece(source, at, piece, piece_max, weight, factor, row, team, split, params):
    """The sum of factor w_c (max - x_c) over a piece, and that of w_c.

    The factor, eps/V times the scale, is inside: the sum of the bare differences of large logits would overflow. The
    columns come from the slot again, one at a time: with all of a lane's weights beside all of its logits, registers
    run out.
    """
    zero, one = number(factor, 0.0), number(factor, 1.0)
    totals, all_weights = no_parts(zero), no_parts(zero)
    for turn in range(split_turns(split)):
        total, low, weights, weights_low = zero, zero, zero, zero
        for col in range(lane_of(turn, team, split), piece.count, split_lanes(split)):
            x = staged(source.pointer, place_of_column(source, at, col, turn, split), zero)
            x = transform(x, piece.first + col, row, params)
            w = number_at(weight, piece.first + col, one)
            total, low = add_pair(total, low, mul(w, mul(-half_gap(x, reference(piece_max)), factor)), zero)
            weights, weights_low = add_pair(weights, weights_low, w, zero)
        totals, all_weights = next_parts(totals, add(total, low)), next_parts(all_weights, add(weights, weights_low))
    return team_sum(totals, 0, split), team_sum(all_weights, 1, split)


@device
def moved(weights, part_max, new_max, factor):
    """By how much the distances of a part add up to more, when they are measured from a larger maximum than its own."""
    if part_max > number(factor, -math.inf):
        return mul(mul(weights, factor), sub(new_max, part_max))
    # Nothing has moved if there is no column; if -inf alone is there, the sum is infinite already.
    return number(factor, 0.0)


@device
def distances_of_row(row, lane, split, factor):
    """The sum of distances of all chunks of a row, measured from its maximum, and what its rounding has left."""
    zero = number(factor, 0.0)
    row_max = max_of_chunks(row, lane, split, factor)
    total, low = zero, zero
    for chunk in range(lane, split_chunks(split), WARP_SIZE):
        part_max = get(state_place(0, chunk, row, split, factor), factor)
        distances = get(state_place(3, chunk, row, split, factor), factor)
        weights = get(state_place(4, chunk, row, split, factor), factor)
        total, low = add_pair(total, low, distances, zero)
        total, low = add_pair(total, low, moved(weights, part_max, row_max, factor), zero)
    total, low = warp_sum_pair(total, low)
    return total, low, zero, zero


distances_of_rows = rows_of_block_with(distances_of_row, 1)


@device
def smoothed_state(source, weight, factor, n_cols, row, team, split, params):
    """The state of the row, as loss_state has it, and sum_c factor w_c (max - x_c)."""
    zero = number(factor, 0.0)
    held = piece_numbers(factor)
    state = (number(factor, -math.inf), zero, zero, zero)
    distances, weights = zero, zero
    last_piece = int32((1 << split_piece_bits(split)) - 1)
    announce(split)
    open_row((source,), n_cols, team, split, zero)
    meet(split)
    for k in range(team.n_pieces):
        piece = open_piece(held, source, k, n_cols, row, team, split, params)
        at = slot_of(k, team, split, 1)
        current = loss_piece_state(source, held, at, piece, row, team, split, params)
        current_distances, current_weights = smoothing_piece(
            source, at, piece, current[0], weight, factor, row, team, split, params
        )
        stage_next(k, (source,), n_cols, team, split, zero)
        if k & last_piece == 0:
            state, distances, weights = current, current_distances, current_weights
        else:
            merged = merge(state, current, params[0], params[1])
            distances = add(distances, moved(weights, state[0], merged[0], factor))
            current_distances = add(current_distances, moved(current_weights, current[0], merged[0], factor))
            state, distances, weights = merged, add(distances, current_distances), add(weights, current_weights)
        if not is_one_chunk(split) and k & last_piece == last_piece:
            publish_state(k, state, team, split)
            publish_number(3, k, distances, team, split)
            publish_number(4, k, weights, team, split)
    if is_one_chunk(split):
        return state, distances
    exchange_states(split)
    state = merged_states(team, split, params)
    distances, low, _, _ = distances_of_rows(split, factor, factor)
    return state, add(distances, low)


# ---------------------------------------------------------------- the loss


def gradients_with(smoothed):
    @device
    def gradients(values, others, col, width, numbers):
        row, label, row_max, on_probs, on_label, per_weight, weight, params = numbers
        scale, scale_low, c, c_low = params
        for k in range(width):
            x = transform(values[k], col + k, row, params)
            values[k] = mul(cheap_exp_gap(x, row_max, scale, scale_low, c, c_low), on_probs)
        if smoothed:
            for k in range(width):
                w = number_at(weight, col + k, number(scale, 1.0))
                values[k] = sub(values[k], mul(per_weight, w))
        if label >= col and label < col + width:
            for k in range(width):
                if col + k == label:
                    values[k] = sub(values[k], on_label)

    return gradients


@device
def fill_row(target, n_cols, value, team, split):
    lanes = lanes_at_once(split)
    for col in range(team.rank * lanes + team.lane, n_cols, team.size * lanes):
        store(target.pointer, col * target.stride, value)


def losses_with(smoothed):
    """The body of the kernels; `smoothed` is a constant, since the other kernel has half the numbers to hold."""
    write_gradients = row_writer(gradients_with(smoothed))

    @device
    def losses_of_rows(rows, split, start, logits, labels, losses, dlogits, given, params):
        weight, weight_sum, normaliser, ignore_index, confidence, share, grad_scale = given
        scale = params[0]
        zero, one = number(scale, 0.0), number(scale, 1.0)
        team = team_of(split, 1)
        writes_loss = team.rank == 0 and team.lane == 0
        row = own_row(start, split)
        exists = row < rows.n_rows
        label = label_of(labels, row, rows) if exists else ignore_index
        counts = label != ignore_index and label >= 0 and label < rows.n_cols  # the same for the whole team
        source = row_of(logits, row, rows)
        target = row_of(dlogits, row, rows)
        if exists and not counts:
            fill = zero if label == ignore_index else number(scale, math.nan)
            if writes_loss:
                store(row_of(losses, row, rows).pointer, 0, fill)
            if not is_null(dlogits.pointer):
                fill_row(target, rows.n_cols, fill, team, split)
        if is_long(split) and not counts:
            return
        n_cols = rows.n_cols if counts else 0
        x_label, w_label = zero, one
        if counts:
            w_label = number_at(weight, label, one)
            if writes_loss:  # now: the gradient may be written over the logits
                x_label = transform(load(source.pointer, label * source.stride, scale), label, row, params)
        # 1. the state of the row and, for smoothing, d = eps/V sum_c w_c (max - x_c)
        if smoothed:
            factor = mul(share, scale)
            state, d = smoothed_state(source, weight, factor, n_cols, row, team, split, params)
        else:
            state, d = loss_state(source, n_cols, row, team, split, params), zero
        total_weight = number_at(weight_sum, 0, number(scale, rows.n_cols))
        confident = mul(confidence, w_label)
        if counts and writes_loss:
            log, log_low = log_sum(state)
            loss = mul(confident, negative_log_probability(x_label, state[0], log, scale))
            if smoothed:
                loss = add(loss, add(mul(mul(share, total_weight), add(log, log_low)), d))
            store(row_of(losses, row, rows).pointer, 0, loss)
        # 2. the gradient
        if not is_null(dlogits.pointer):
            upstream = div(grad_scale, number_at(normaliser, 0, one))
            on_label = mul(upstream, confident)
            per_weight = mul(upstream, share)
            on_probs = mul(inverse_sum(state), fma(per_weight, total_weight, on_label))
            numbers = row, label, reference(state[0]), on_probs, on_label, per_weight, weight, params
            write_gradients(target, (source,), n_cols, team, split, numbers, scale)

    return losses_of_rows


plain_losses = losses_with(smoothed=False)
smoothed_losses = losses_with(smoothed=True)


def cross_entropy_rows(
    rows,
    split,
    start,
    logits,
    labels,
    losses,
    dlogits,
    weight,
    weight_sum,
    normaliser,
    ignore_index,
    confidence,
    share,
    grad_scale,
    scale,
    scale_low,
):
    given = weight, weight_sum, normaliser, ignore_index, confidence, share, grad_scale
    plain_losses(rows, split, start, logits, labels, losses, dlogits, given, gap_params(scale, scale_low))


def smoothed_cross_entropy_rows(
    rows,
    split,
    start,
    logits,
    labels,
    losses,
    dlogits,
    weight,
    weight_sum,
    normaliser,
    ignore_index,
    confidence,
    share,
    grad_scale,
    scale,
    scale_low,
):
    given = weight, weight_sum, normaliser, ignore_index, confidence, share, grad_scale
    smoothed_losses(rows, split, start, logits, labels, losses, dlogits, given, gap_params(scale, scale_low))


def normalise_rows(rows, labels, weight, normaliser, ignore_index, zero):
    scratch = block_numbers(zero)
    total, low = zero, zero
    for row in range(cuda.threadIdx.x, rows.n_rows, cuda.blockDim.x):
        label = label_of(labels, row, rows)
        if label != ignore_index and label >= 0 and label < rows.n_cols:
            total, low = add_pair(total, low, number_at(weight, label, number(zero, 1.0)), zero)
    total = block_sum_pair(total, low, scratch, zero)
    if cuda.threadIdx.x == 0:
        store(normaliser, 0, total)


def total_rows(n, values, normaliser, result, zero):
    scratch = block_numbers(zero)
    total, low = zero, zero
    for k in range(cuda.threadIdx.x, n, cuda.blockDim.x):
        total, low = add_pair(total, low, load(values, k, zero), zero)
    total = block_sum_pair(total, low, scratch, zero)
    if cuda.threadIdx.x == 0:
        divisor = number_at(normaliser, 0, number(zero, 1.0))
        mean = div(total, divisor)
        if divisor == zero:  # nothing counts: NaN, as 0 / 0 is, even where smoothing has left something to divide
            mean = number(zero, math.nan)
        store(result, 0, mean)


def find_bad_label_rows(rows, labels, bad_row, bad_label, ignore_index):
    scratch = block_numbers(ignore_index)
    first = NO_BAD_LABEL
    for row in range(cuda.threadIdx.x, rows.n_rows, cuda.blockDim.x):
        label = label_of(labels, row, rows)
        if label != ignore_index and (label < 0 or label >= rows.n_cols):
            first = min(first, row)
    first = first_of_block(first, scratch)
    if cuda.threadIdx.x == 0:
        bad_row[0] = first
        bad_label[0] = NO_BAD_LABEL if first == NO_BAD_LABEL else label_of(labels, first, rows)
