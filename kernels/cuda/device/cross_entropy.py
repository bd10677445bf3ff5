"""Cross-entropy and its fused gradient. The mathematics stands in kernels/cpu/cross_entropy.py.

The small kernels around it, normalise_rows, total_rows and find_bad_label_rows, run as one block: their sums have a
fixed order.
"""

import math

from numpy import int32, int64

from gpusoftmax.kernels.cuda.device._cuda import cuda, device
from gpusoftmax.kernels.cuda.device.arithmetic import (
    add,
    add_pair,
    div,
    fma,
    inverse_sum,
    log_sum,
    mul,
    number,
    sub,
)
from gpusoftmax.kernels.cuda.device.exponential import (
    anchor,
    cheap_exp_from,
    cheap_exp_gap,
    half_gap,
    lowest_of,
    negative_log_probability,
)
from gpusoftmax.kernels.cuda.device.memory import (
    block_numbers,
    element_size,
    granule_numbers,
    is_null,
    load,
    load_label,
    piece_numbers,
    store,
)
from gpusoftmax.kernels.cuda.device.piece_state import (
    gap_params,
    halved,
    is_near,
    of_cheap,
    piece_state,
    read_logits,
    second_look,
)
from gpusoftmax.kernels.cuda.device.reduce import (
    block_sum_pair,
    first_of_block,
    publish_pair,
    warp_sum,
    warp_sum_pair,
)
from gpusoftmax.kernels.cuda.device.row_state import (
    above_anchor,
    joined,
    loss_numbers_with,
    publish_second_look,
    publish_state,
    state_place,
)
from gpusoftmax.kernels.cuda.device.rows import (
    announce,
    chunk_of,
    meet,
    open_row,
    own_row,
    row_of,
    row_offset,
    row_writer,
    slot_of,
    stage_next,
    team_of,
    wait_for_piece,
)
from gpusoftmax.kernels.cuda.device.shared_numbers import get, get_pair
from gpusoftmax.kernels.cuda.device.split import is_long, is_one_chunk, split_chunks, split_lanes, split_piece_bits
from gpusoftmax.kernels.cuda.device.staging import staged
from gpusoftmax.kernels.cuda.device.transform import pulled_back, transformed, unless_empty
from gpusoftmax.kernels.cuda.plan import WARP_SIZE
from gpusoftmax.kernels.operands import NO_BAD_LABEL


@device
def label_of(labels, row, rows):
    return load_label(labels.pointer, row_offset(labels, row, rows), labels.code)


@device
def number_at(numbers, index, default):
    """numbers[index], or the default where the caller gave no numbers."""
    return default if is_null(numbers) else load(numbers, index, default)


@device
def finish(state, params):
    """Half the maximum, log-sum-exp relative to it, and what turns exponentials into probabilities."""
    log, log_low = log_sum(state)
    row_max = mul(state[0], number(log, 2.0))
    return state[0], log, log_low, div(inverse_sum(state), above_anchor(row_max, anchor(row_max, params[2]), params))


loss_numbers, finished_row = loss_numbers_with(finish)


# ---------------------------------------------------------------- smoothing


@device
def smoothing_piece(source, at, piece, piece_max, weight, factor, team, split, params):
    """The sum of factor w_c (max - x_c) over a piece, and that of w_c.

    The factor, eps/V times the scale, is inside: the sum of the bare differences of large logits would overflow. The
    columns come from the slot again, one at a time: with all of a lane's weights beside all of its logits, registers
    run out.
    """
    zero, one = number(factor, 0.0), number(factor, 1.0)
    total, low, weights, weights_low = zero, zero, zero, zero
    size = element_size(source.pointer)
    for col in range(team.lane, piece.count, split_lanes(split)):
        place = int32(at + (source.shift + col) * size)
        x = transformed(staged(source.pointer, place, zero), piece.first + col, source.through)
        w = number_at(weight, piece.first + col, one)
        total, low = add_pair(total, low, mul(w, mul(-half_gap(x, halved(piece_max)), factor)), zero)
        weights, weights_low = add_pair(weights, weights_low, w, zero)
    return warp_sum(add(total, low), split_lanes(split)), warp_sum(add(weights, weights_low), split_lanes(split))


@device
def moved(weights, part_max, new_max, factor):
    """By how much the distances of a part add up to more, when they are measured from a larger maximum than its own."""
    if part_max > number(factor, -math.inf):
        half = number(factor, 0.5)
        return mul(mul(weights, factor), sub(mul(new_max, half), mul(part_max, half)))
    # Nothing has moved if there is no column; if -inf alone is there, the sum is infinite already.
    return number(factor, 0.0)


@device
def merged_distances(row_max, factor, team, split):
    """The sum of distances of all chunks, measured from the maximum of the row."""
    total, low = number(factor, 0.0), number(factor, 0.0)
    for chunk in range(team.lane, split_chunks(split), WARP_SIZE):
        part_max = get(state_place(0, chunk, split, factor), factor)
        distances, weights = get_pair(state_place(4, chunk, split, factor), factor)
        total, low = add_pair(total, low, distances, number(factor, 0.0))
        total, low = add_pair(total, low, moved(weights, part_max, row_max, factor), number(factor, 0.0))
    return warp_sum_pair(total, low)


@device
def smoothed_numbers(source, weight, factor, n_cols, team, split, params):
    """The numbers of the row, as loss_numbers has them, and sum_c factor w_c (max - x_c)."""
    zero, least = number(factor, 0.0), number(factor, -math.inf)
    params = of_cheap(params)
    held, sums = piece_numbers(factor), granule_numbers(factor)
    state = (least, zero, zero, zero)
    distances, weights = zero, zero
    last_piece = int32((1 << split_piece_bits(split)) - 1)
    announce(split)
    open_row((source,), n_cols, team, split, least)
    meet(split)
    k = int32(0)
    while k < team.n_pieces:
        wait_for_piece(k, team, split)
        piece = read_logits(held, source, k, n_cols, team, split, params)
        largest, total = piece_state(held, sums, piece, split, params)
        ties, rest = zero, zero
        if not is_long(split):
            ties, rest = second_look(held, sums, largest, total, piece, split, params)
        current = largest, total, ties, rest
        at = slot_of(k, team, split, 1)
        current_distances, current_weights = smoothing_piece(
            source, at, piece, current[0], weight, factor, team, split, params
        )
        stage_next(k, (source,), n_cols, team, split, least)
        if k & last_piece == 0:
            state, distances, weights = current, current_distances, current_weights
        else:
            merged = joined(state, current, params)
            distances = add(distances, moved(weights, state[0], merged[0], factor))
            current_distances = add(current_distances, moved(current_weights, current[0], merged[0], factor))
            state, distances, weights = merged, add(distances, current_distances), add(weights, current_weights)
        if not is_one_chunk(split) and k & last_piece == last_piece:
            publish_state(k, state, team, split)
            if not is_long(split):
                publish_second_look(k, state, team, split)
            place = state_place(4, chunk_of(k, team, split), split, factor)
            publish_pair(place, distances, weights, team, split)
        k = int32(k + 1)
    numbers = finished_row(state, source, n_cols, team, split, params)
    if is_one_chunk(split):
        return numbers, distances
    distances, low = merged_distances(mul(numbers[0], number(factor, 2.0)), factor, team, split)
    return numbers, add(distances, low)


# ---------------------------------------------------------------- the loss


def gradients_with(smoothed):
    @device
    def gradients(values, others, col, width, numbers):
        label, half, exponent, lowest, on_probs, on_label, per_weight, weight, params, through = numbers
        scale, scale_low, c, c_low = params
        if is_near(exponent):
            for k in range(width):
                others[k] = values[k]
                values[k] = mul(cheap_exp_from(values[k], exponent, lowest, c, c_low), on_probs)
        else:
            for k in range(width):
                others[k] = values[k]
                values[k] = mul(cheap_exp_gap(values[k], half, scale, scale_low, c, c_low), on_probs)
        if label >= col and label < col + width:
            for k in range(width):
                if col + k == label:
                    values[k] = sub(values[k], on_label)
        if smoothed:
            for k in range(width):
                w = number_at(weight, col + k, number(scale, 1.0))
                values[k] = sub(values[k], mul(per_weight, w))
        for k in range(width):
            values[k] = pulled_back(values[k], others[k], through)

    return gradients


@device
def fill_row(target, n_cols, value, team, split):
    for col in range(team.rank * split_lanes(split) + team.lane, n_cols, team.size * split_lanes(split)):
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
                x_label = transformed(load(source.pointer, label * source.stride, scale), label, source.through)
        # 1. the sums of the row and, for smoothing, d = eps/V sum_c w_c (max - x_c)
        if smoothed:
            factor = mul(share, scale)
            found, d = smoothed_numbers(source, weight, factor, n_cols, team, split, params)
        else:
            found, d = loss_numbers(source, n_cols, team, split, params), zero
        half, log, log_low, inverse = found
        total_weight = number_at(weight_sum, 0, number(scale, rows.n_cols))
        confident = unless_empty(mul(confidence, w_label), half, log_low, source.through)
        if counts and writes_loss:
            loss = mul(confident, negative_log_probability(x_label, half, log, scale))
            if smoothed:
                loss = add(loss, add(mul(mul(share, total_weight), add(log, log_low)), d))
            store(row_of(losses, row, rows).pointer, 0, unless_empty(loss, half, log_low, source.through))
        # 2. the gradient
        if not is_null(dlogits.pointer):
            upstream = div(grad_scale, number_at(normaliser, 0, one))
            on_label = mul(upstream, confident)
            per_weight = unless_empty(mul(upstream, share), half, log_low, source.through)
            inverse = unless_empty(inverse, half, log_low, source.through)
            on_probs = mul(inverse, fma(per_weight, total_weight, on_label))
            row_max = mul(half, number(scale, 2.0))
            exponent = anchor(row_max, params[2])
            lowest = lowest_of(exponent, params[2])
            numbers = (
                label, halved(row_max), exponent, lowest, on_probs, on_label, per_weight, weight, params,
                source.through,
            )  # fmt: skip
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


def block_total_with(read, number_of):
    """A device function that sums number_of(read(k, arguments), arguments) for k below n over the threads of a block.

    Eight turns are read before the first is added: one after the other, each would be waited for.
    """

    @device
    def block_total(n, arguments, scratch, zero):
        total, low = zero, zero
        step = cuda.blockDim.x
        k = int64(cuda.threadIdx.x)
        while k + 7 * step < n:
            a, b = read(k, arguments), read(k + step, arguments)
            c, d = read(k + 2 * step, arguments), read(k + 3 * step, arguments)
            e, f = read(k + 4 * step, arguments), read(k + 5 * step, arguments)
            g, h = read(k + 6 * step, arguments), read(k + 7 * step, arguments)
            for value in (a, b, c, d, e, f, g, h):
                total, low = add_pair(total, low, number_of(value, arguments), zero)
            k += 8 * step
        while k < n:
            total, low = add_pair(total, low, number_of(read(k, arguments), arguments), zero)
            k += step
        return block_sum_pair(total, low, scratch, zero)

    return block_total


@device
def read_label(row, arguments):
    rows, labels, weight, ignore_index, zero = arguments
    return label_of(labels, row, rows)


@device
def weight_of_label(label, arguments):
    rows, labels, weight, ignore_index, zero = arguments
    if label != ignore_index and label >= 0 and label < rows.n_cols:
        return number_at(weight, label, number(zero, 1.0))
    return zero


@device
def read_loss(row, arguments):
    values, zero = arguments
    return load(values, row, zero)


@device
def loss_itself(loss, arguments):
    return loss


total_weight_of_rows = block_total_with(read_label, weight_of_label)
total_loss_of_rows = block_total_with(read_loss, loss_itself)


def normalise_rows(rows, labels, weight, normaliser, ignore_index, zero):
    arguments = rows, labels, weight, ignore_index, zero
    total = total_weight_of_rows(rows.n_rows, arguments, block_numbers(zero), zero)
    if cuda.threadIdx.x == 0:
        store(normaliser, 0, total)


def total_rows(n, values, normaliser, result, zero):
    total = total_loss_of_rows(n, (values, zero), block_numbers(zero), zero)
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
