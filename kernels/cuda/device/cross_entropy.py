"""Cross-entropy and its fused gradient. The mathematics stands in kernels/cpu/cross_entropy.py.

The masses of smoothing and of shares for every class are summed beside the state (row_state.py), with their distances
to the maximum. A few labels with shares are looked up: their distances are taken to the largest of them first, since
the row's maximum is not known before the gradient may have taken the place of the logits.
"""

import math
from typing import NamedTuple

from numpy import int32, int64

from gpusoftmax.kernels.cuda.device._cuda import device
from gpusoftmax.kernels.cuda.device.arithmetic import (
    add,
    add_pair,
    distance_of_mass,
    div,
    fma,
    logsumexp_of,
    mul,
    number,
    row_inverse,
    sub,
)
from gpusoftmax.kernels.cuda.device.exponential import (
    anchor,
    cheap_exp_from,
    cheap_exp_gap,
    lowest_of,
    negative_log_probability,
)
from gpusoftmax.kernels.cuda.device.loss_target import (
    COUNTED,
    IGNORED,
    distances_of_labels,
    less_shares,
    less_shares_of_run,
    logit_of,
    mass_at,
    number_at,
    only_label,
    start_of_probs,
    status_of,
    sum_of_shares,
    unused,
    weight_of_row,
)
from gpusoftmax.kernels.cuda.device.memory import element_size, is_null, load, row_offset, store, store_integer
from gpusoftmax.kernels.cuda.device.piece_state import gap_params, halved, is_near, of_cheap
from gpusoftmax.kernels.cuda.device.pieces import own_row, team_of
from gpusoftmax.kernels.cuda.device.reduce import warp_min, warp_sum, warp_sum_pair
from gpusoftmax.kernels.cuda.device.row_staging import fetch_last
from gpusoftmax.kernels.cuda.device.row_state import (
    NO_COLUMN,
    above_anchor,
    begin_row,
    finished_row,
    numbers_beside_with,
    saved_beside,
    saved_max,
    states_of_chunks,
)
from gpusoftmax.kernels.cuda.device.row_writer import row_writer
from gpusoftmax.kernels.cuda.device.rows import number_or, row_of
from gpusoftmax.kernels.cuda.device.split import is_long, is_one_chunk, split_chunks, split_lanes
from gpusoftmax.kernels.cuda.device.staging import staged
from gpusoftmax.kernels.cuda.device.transform import pulled_back, transformed, unless_empty
from gpusoftmax.kernels.cuda.plan import GROUP, WARP_SIZE


class Loss(NamedTuple):
    """What the loss of rows needs besides their logits."""

    labels: object
    label_stride: int
    n_labels: int
    shares: object  # None unless a row has several labels, which have these shares,
    share_stride: int
    probs: object  # or unless a row has a share for each class
    weight: object
    weight_sum: object
    ignore_index: int
    confidence: object  # 1 - eps
    share: object  # eps/V
    row_weight: object  # None where there are no extras
    z_loss: object


class Results(NamedTuple):
    """Arrays for what is told of each row."""

    losses: object
    z_losses: object
    lse: object
    correct: object


class Asked(NamedTuple):
    """What is asked for of a row besides its state."""

    loss: Loss
    start: int  # where the row begins in `probs`
    is_found: bool  # the first column of the maximum


# ---------------------------------------------------------------- masses at the columns


@device
def mass_of_column(k, column, source, at, piece, largest, asked):
    """(distance, mass, column) of column k of a piece; `column`: the first with the maximum, if that is asked."""
    col = piece.first + k
    x = staged(source.pointer, int32(at + (source.shift + k) * element_size(source.pointer)), largest)
    x = transformed(x, col, source.through)
    mass = mass_at(col, asked.start, asked.loss, asked.loss.probs, largest)
    if asked.is_found and x == largest:
        column = min(column, int32(col))
    return distance_of_mass(mass, x, largest), mass, column


@device
def masses_of_piece(source, at, piece, largest, asked, team, split, params):
    """(distances, mass, first column of the maximum): sum_c g_c (max - x_c) and sum_c g_c of a piece.

    The columns come from the slot again, one at a time: with all of a lane's masses beside all of its logits, registers
    run out.
    """
    zero = number(largest, 0.0)
    distances, low, total, total_low, column = zero, zero, zero, zero, int32(NO_COLUMN)
    lanes = split_lanes(split)
    k = team.lane
    while k < piece.count:
        # Of a few columns, which lose little in a plain sum and whose masses are loaded together.
        distance, part, step = zero, zero, int32(lanes * GROUP)
        if int32(k + step - lanes) < piece.count:
            for j in range(GROUP):
                one, mass, column = mass_of_column(int32(k + j * lanes), column, source, at, piece, largest, asked)
                distance, part = add(distance, one), add(part, mass)
        else:
            distance, part, column = mass_of_column(k, column, source, at, piece, largest, asked)
            step = lanes
        distances, low = add_pair(distances, low, distance, zero)
        total, total_low = add_pair(total, total_low, part, zero)
        k = int32(k + step)
    if asked.is_found:
        column = warp_min(column, lanes)
    return warp_sum(add(distances, low), lanes), warp_sum(add(total, total_low), lanes), column


@device
def moved(mass, part_max, new_max):
    """By how much the distances of a part add up to more, when they are measured from a larger maximum than its own."""
    if part_max > number(mass, -math.inf):
        return distance_of_mass(mass, part_max, new_max)
    # Nothing has moved if there is no column; if -inf alone is there, the sum is infinite already.
    return number(mass, 0.0)


@device
def joined_masses(one, state, other, other_state, row_max, asked, params):
    distances = add(one[0], moved(one[1], state[0], row_max))
    more = add(other[0], moved(other[1], other_state[0], row_max))
    return add(distances, more), add(one[1], other[1])


@device
def merged_masses(row_max, team, split):
    """(distances, mass) of all chunks, measured from the maximum of the row."""
    zero = number(row_max, 0.0)
    total, low, all_mass, all_low = zero, zero, zero, zero
    for chunk in range(team.lane, split_chunks(split), WARP_SIZE):
        distances, mass = saved_beside(chunk, split, row_max)
        total, low = add_pair(total, low, distances, zero)
        total, low = add_pair(total, low, moved(mass, saved_max(chunk, split, row_max), row_max), zero)
        all_mass, all_low = add_pair(all_mass, all_low, mass, zero)
    total, low = warp_sum_pair(total, low)
    all_mass, all_low = warp_sum_pair(all_mass, all_low)
    return add(total, low), add(all_mass, all_low)


numbers_beside = numbers_beside_with(masses_of_piece, joined_masses)


@device
def numbers_and_masses(source, asked, n_cols, team, split, params):
    """(numbers of the row, sum_c g_c (max - x_c), sum_c g_c, first column of the maximum: see numbers_beside)"""
    numbers, (distances, mass), column = numbers_beside(source, asked, n_cols, team, split, params)
    if not is_one_chunk(split):
        distances, mass = merged_masses(mul(numbers[0], number(mass, 2.0)), team, split)
    return numbers, distances, mass, column


# ---------------------------------------------------------------- the target of a row


@device
def mass_of_label(label, row, counts, rows, loss, team, split, like, shares, probs):
    """S; not yet known where every class has a share."""
    if probs is None:
        if shares is None:
            return number_at(loss.weight, label, number(like, 1.0)) if counts else number(like, 1.0)
        return sum_of_shares(row, counts, rows, loss, team, split, like)
    return number(like, 0.0)


@device
def looked_up(label, row, counts, writes_loss, source, rows, loss, team, split, like, shares, probs):
    """The logit of the label, and 0; or what distances_of_labels gives, to whoever writes the loss."""
    nothing = number(like, 0.0)
    if probs is None:
        if shares is None:
            if counts and writes_loss:  # now: the gradient may be written over the logits
                return logit_of(source, label, like), nothing
        elif team.rank == 0:
            return distances_of_labels(row, counts, source, rows, loss, team, split, like)
    return nothing, nothing


@device
def all_mass(s, mass, all_weights, loss, probs):
    """(S, G), of which one is known."""
    if probs is None:
        return s, fma(loss.share, all_weights, mul(loss.confidence, s))
    one = number(mass, 1.0)
    s = div(sub(mass, mul(loss.share, all_weights)), loss.confidence if loss.confidence > number(mass, 0.0) else one)
    return s, mass


@device
def loss_of_row(found, s, mass, distances, looked, all_weights, smoothed, loss, scale, shares, probs):
    """Without weight of the row and z."""
    half, log, log_low, _ = found
    if probs is None:
        if shares is None:
            value = mul(mul(loss.confidence, s), negative_log_probability(looked[0], half, log, scale))
            if smoothed:
                value = add(value, add(mul(mul(loss.share, all_weights), add(log, log_low)), distances))
            return value
        row_max = mul(half, number(half, 2.0))
        looked_mass = mul(loss.confidence, s)
        distances = add(distances, add(looked[1], distance_of_mass(looked_mass, looked[0], row_max)))
    return fma(mass, add(log, log_low), distances)


@device
def slope_of(s, lse, row_max, rest, source, z_loss):
    """2 z_loss S lse, what z adds to the slope of the lse."""
    if z_loss is None:
        return number(lse, 0.0)
    slope = number(lse, 0.0)
    if z_loss != slope:
        slope = mul(mul(s, lse), mul(z_loss, number(lse, 2.0)))
    return unless_empty(slope, row_max, rest, source.through)


@device
def tell(row, rows, value, s, found, source, results, loss, params, row_weight):
    """Writes the numbers of a row that counts."""
    half, log, log_low, _ = found
    if row_weight is None:
        store(row_of(results.losses, row, rows).pointer, 0, unless_empty(value, half, log_low, source.through))
    else:
        factor = weight_of_row(row, rows, row_weight, value)
        lse = logsumexp_of(half, log, log_low, params[0], params[1])
        z = number(value, 0.0)
        if loss.z_loss != z:
            z = mul(mul(mul(s, loss.z_loss), lse), lse)
        value = unless_empty(mul(add(value, z), factor), half, log_low, source.through)
        if not is_null(results.losses.pointer):
            store(row_of(results.losses, row, rows).pointer, 0, value)
        if not is_null(results.z_losses.pointer):
            z = unless_empty(mul(z, factor), half, log_low, source.through)
            store(row_of(results.z_losses, row, rows).pointer, 0, z)
        if not is_null(results.lse.pointer):
            store(row_of(results.lse, row, rows).pointer, 0, lse)


@device
def tell_unused(row, rows, status, results, like, row_weight):
    """Writes those of a row that does not."""
    value = unused(status, like)
    if row_weight is None:
        store(row_of(results.losses, row, rows).pointer, 0, value)
    else:
        for array in (results.losses, results.z_losses, results.lse):
            if not is_null(array.pointer):
                store(row_of(array, row, rows).pointer, 0, value)
        if results.correct.pointer != 0:
            store_integer(results.correct.pointer, row_offset(results.correct, row, rows), 0)


@device
def is_wanted(correct):
    if correct is None:
        return False
    return correct.pointer != 0


@device
def tell_correct(label, row, rows, column, found, correct, team):
    """Whether the label is the first of the largest logits. None is where the loss is NaN or no logit is left."""
    if correct is not None:
        half, log, _, _ = found
        if correct.pointer != 0 and team.lane == 0 and column >= 0:
            is_correct = column == label and log == log and half > number(half, -math.inf)
            place = row_offset(correct, row, rows)
            store_integer(correct.pointer, place, int64(1) if is_correct else int64(0))


@device
def times(upstream, row, rows, array):
    """The upstream gradient of a row times its number in an array."""
    if array is None:
        return upstream
    return mul(upstream, number_or(array, row, rows, number(upstream, 1.0)))


# ---------------------------------------------------------------- the gradient


@device
def to_exponentials(values, others, width, half, exponent, lowest, factor, params):
    """values[:width] times the factor; the logits stay in `others`."""
    scale, scale_low, c, c_low = params
    if is_near(exponent):
        for k in range(width):
            others[k] = values[k]
            values[k] = mul(cheap_exp_from(values[k], exponent, lowest, c, c_low), factor)
    else:
        for k in range(width):
            others[k] = values[k]
            values[k] = mul(cheap_exp_gap(values[k], half, scale, scale_low, c, c_low), factor)


def gradients_with(has_mass):
    @device
    def gradients(values, others, col, width, numbers):
        label, half, exponent, lowest, on_probs, on_label, on_mass, weight, params, through = numbers
        to_exponentials(values, others, width, half, exponent, lowest, on_probs, params)
        if label >= col and label < col + width:
            for k in range(width):
                if col + k == label:
                    values[k] = sub(values[k], on_label)
        if has_mass:
            for k in range(width):
                w = number_at(weight, col + k, number(half, 1.0))
                values[k] = sub(values[k], mul(on_mass, w))
        for k in range(width):
            values[k] = pulled_back(values[k], others[k], through)

    return gradients


def soft_gradients_with(less_shares):
    @device
    def soft_gradients(values, others, col, width, numbers):
        row, start, half, exponent, lowest, on_probs, on_share, on_mass, (loss, rows), params, through = numbers
        to_exponentials(values, others, width, half, exponent, lowest, on_probs, params)
        less_shares(values, col, width, row, rows, loss, on_share, half, loss.shares)
        for k in range(width):
            mass = mass_at(col + k, start, loss, loss.probs, half)
            values[k] = pulled_back(sub(values[k], mul(on_mass, mass)), others[k], through)

    return soft_gradients


soft_gradients = soft_gradients_with(less_shares), soft_gradients_with(less_shares_of_run)


@device
def fill_row(target, n_cols, value, team, split):
    for col in range(team.rank * split_lanes(split) + team.lane, n_cols, team.size * split_lanes(split)):
        store(target.pointer, col * target.stride, value)


@device
def plus_slope(mass, upstream, slope, z_loss):
    if z_loss is None:
        return mass
    return fma(upstream, slope, mass)


def factors_with(is_soft):
    @device
    def factors(s, mass, all_weights, slope, upstream, inverse, row_max, rest, loss, through):
        """(on_probs, on_share, on_mass): what probabilities, the shares of labels and masses are multiplied by."""
        inverse = unless_empty(inverse, row_max, rest, through)
        if is_soft:
            upstream = unless_empty(upstream, row_max, rest, through)
            on_probs = mul(inverse, plus_slope(mul(upstream, mass), upstream, slope, loss.z_loss))
            return on_probs, mul(upstream, loss.confidence), upstream
        on_label = mul(upstream, unless_empty(mul(loss.confidence, s), row_max, rest, through))
        on_mass = unless_empty(mul(upstream, loss.share), row_max, rest, through)
        on_probs = mul(inverse, plus_slope(fma(on_mass, all_weights, on_label), upstream, slope, loss.z_loss))
        return on_probs, on_label, on_mass

    return factors


def losses_with(has_mass, is_soft):
    """The body of the kernels. `has_mass`, there may be mass at every column, and `is_soft`, labels or classes have
    shares, are constants: the plain kernel has half the numbers to hold.
    """
    write_gradients = row_writer(*soft_gradients) if is_soft else row_writer(gradients_with(has_mass))
    factors = factors_with(is_soft)

    @device
    def losses_of_rows(rows, split, start, logits, dlosses, dlogits, normaliser, grad_scale, loss, results, params):
        scale = params[0]
        zero, one = number(scale, 0.0), number(scale, 1.0)
        team = team_of(split, 1)
        writes_loss = team.rank == 0 and team.lane == 0
        row = own_row(start, split)
        exists = row < rows.n_rows
        label = only_label(row, rows, loss) if exists else int64(0)
        status = status_of(label, row, rows, loss, scale) if exists else IGNORED
        counts = status == COUNTED  # the same for the whole team
        source = row_of(logits, row, rows)
        target = row_of(dlogits, row, rows)
        if exists and not counts:
            if writes_loss:
                tell_unused(row, rows, status, results, scale, loss.row_weight)
            if not is_null(dlogits.pointer):
                fill_row(target, rows.n_cols, unused(status, scale), team, split)
        if is_long(split) and not counts:
            return
        n_cols = rows.n_cols if counts else 0
        begin_row(source, n_cols, team, split, params)
        s = mass_of_label(label, row, counts, rows, loss, team, split, scale, loss.shares, loss.probs)
        looked = looked_up(
            label, row, counts, writes_loss, source, rows, loss, team, split, scale, loss.shares, loss.probs
        )  # fmt: skip
        # 1. the sums of the row
        row = row if exists else int64(0)
        begin = start_of_probs(row, rows, loss.probs)
        if has_mass:
            asked = Asked(loss, begin, is_wanted(results.correct))
            found, distances, mass, column = numbers_and_masses(source, asked, n_cols, team, split, params)
        else:
            sums = of_cheap(params)
            state = states_of_chunks(source, n_cols, team, split, sums)
            found = finished_row(state, source, n_cols, team, split, sums)
            distances, mass, column = zero, zero, int32(-1)
        half, log, log_low, inverse = found
        all_weights = number_at(loss.weight_sum, 0, number(scale, rows.n_cols))
        s, mass = all_mass(s, mass, all_weights, loss, loss.probs)
        if counts and writes_loss:
            value = loss_of_row(
                found, s, mass, distances, looked, all_weights, has_mass, loss, scale, loss.shares, loss.probs
            )  # fmt: skip
            tell(row, rows, value, s, found, source, results, loss, params, loss.row_weight)
        if has_mass and counts:
            tell_correct(label, row, rows, column, found, results.correct, team)
        # 2. the gradient
        if not is_null(dlogits.pointer):
            upstream = div(grad_scale, number_at(normaliser, 0, one))
            upstream = times(upstream, row, rows, loss.row_weight)
            upstream = times(upstream, row, rows, dlosses)
            row_max = mul(half, number(scale, 2.0))
            lse = logsumexp_of(half, log, log_low, params[0], params[1])
            slope = slope_of(s, lse, half, log_low, source, loss.z_loss)
            on_probs, on_share, on_mass = factors(
                s, mass, all_weights, slope, upstream, inverse, half, log_low, loss, source.through
            )
            exponent = anchor(row_max, params[2])
            lowest = lowest_of(exponent, params[2])
            half = halved(row_max)
            if is_soft:
                numbers = (
                    row, begin, half, exponent, lowest, on_probs, on_share, on_mass, (loss, rows), params,
                    source.through,
                )  # fmt: skip
            else:
                numbers = (
                    label, half, exponent, lowest, on_probs, on_share, on_mass, loss.weight, params, source.through,
                )  # fmt: skip
            write_gradients(target, (source,), n_cols, team, split, numbers, scale)

    return losses_of_rows


def backward_with(is_soft):
    """The body of the kernels that know the lse of their rows. Shares of every class would have to be summed."""
    write_gradients = row_writer(*soft_gradients) if is_soft else row_writer(gradients_with(True))
    factors = factors_with(is_soft)

    @device
    def backward(rows, split, start, logits, lse, dlosses, dlogits, loss, params):
        scale = params[0]
        zero = number(scale, 0.0)
        team = team_of(split, 1)
        row = own_row(start, split)
        exists = row < rows.n_rows
        label = only_label(row, rows, loss) if exists else int64(0)
        status = status_of(label, row, rows, loss, scale) if exists else IGNORED
        counts = status == COUNTED
        source = row_of(logits, row, rows)
        target = row_of(dlogits, row, rows)
        if exists and not counts:
            fill_row(target, rows.n_cols, unused(status, scale), team, split)
        if is_long(split) and not counts:
            return
        n_cols = rows.n_cols if counts else 0
        s = mass_of_label(label, row, counts, rows, loss, team, split, scale, loss.shares, loss.probs)
        row = row if exists else int64(0)
        all_weights = number_at(loss.weight_sum, 0, number(scale, rows.n_cols))
        s, mass = all_mass(s, zero, all_weights, loss, loss.probs)
        of_row = load(row_of(lse, row, rows).pointer, 0, scale)
        exponent = anchor(of_row, params[2])
        lowest = lowest_of(exponent, params[2])
        inverse = row_inverse(of_row, above_anchor(of_row, exponent, params), mul(of_row, zero))
        upstream = times(number(scale, 1.0), row, rows, loss.row_weight)
        upstream = times(upstream, row, rows, dlosses)
        slope = slope_of(s, of_row, of_row, zero, source, loss.z_loss)
        on_probs, on_share, on_mass = factors(
            s, mass, all_weights, slope, upstream, inverse, of_row, zero, loss, source.through
        )
        half = halved(of_row)
        if is_soft:
            numbers = (
                row, int64(0), half, exponent, lowest, on_probs, on_share, on_mass, (loss, rows), params,
                source.through,
            )  # fmt: skip
        else:
            numbers = (
                label, half, exponent, lowest, on_probs, on_share, on_mass, loss.weight, params, source.through,
            )  # fmt: skip
        fetch_last((source,), n_cols, team, split, number(scale, -math.inf))
        write_gradients(target, (source,), n_cols, team, split, numbers, scale)

    return backward


plain_losses = losses_with(has_mass=False, is_soft=False)
smoothed_losses = losses_with(has_mass=True, is_soft=False)
soft_losses = losses_with(has_mass=True, is_soft=True)
hard_backward = backward_with(is_soft=False)
soft_backward = backward_with(is_soft=True)


def cross_entropy_rows(
    rows,
    split,
    start,
    logits,
    labels,
    losses,
    row_weight,
    z_loss,
    z_losses,
    lse,
    correct,
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
    loss = Loss(labels, 0, 1, None, 0, None, weight, weight_sum, ignore_index, confidence, share, row_weight, z_loss)
    results, params = Results(losses, z_losses, lse, correct), gap_params(scale, scale_low)
    plain_losses(rows, split, start, logits, None, dlogits, normaliser, grad_scale, loss, results, params)


def smoothed_cross_entropy_rows(
    rows,
    split,
    start,
    logits,
    labels,
    losses,
    row_weight,
    z_loss,
    z_losses,
    lse,
    correct,
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
    loss = Loss(labels, 0, 1, None, 0, None, weight, weight_sum, ignore_index, confidence, share, row_weight, z_loss)
    results, params = Results(losses, z_losses, lse, correct), gap_params(scale, scale_low)
    smoothed_losses(rows, split, start, logits, None, dlogits, normaliser, grad_scale, loss, results, params)


def soft_cross_entropy_rows(
    rows,
    split,
    start,
    logits,
    labels,
    shares,
    n_labels,
    label_stride,
    share_stride,
    probs,
    dlosses,
    losses,
    row_weight,
    z_loss,
    z_losses,
    lse,
    correct,
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
    loss = Loss(
        labels, label_stride, n_labels, shares, share_stride, probs, weight, weight_sum, ignore_index, confidence,
        share, row_weight, z_loss,
    )  # fmt: skip
    results, params = Results(losses, z_losses, lse, correct), gap_params(scale, scale_low)
    soft_losses(rows, split, start, logits, dlosses, dlogits, normaliser, grad_scale, loss, results, params)


def cross_entropy_backward_rows(
    rows,
    split,
    start,
    logits,
    labels,
    lse,
    dlosses,
    row_weight,
    z_loss,
    dlogits,
    weight,
    weight_sum,
    ignore_index,
    confidence,
    share,
    scale,
    scale_low,
):
    loss = Loss(labels, 0, 1, None, 0, None, weight, weight_sum, ignore_index, confidence, share, row_weight, z_loss)
    hard_backward(rows, split, start, logits, lse, dlosses, dlogits, loss, gap_params(scale, scale_low))


def soft_cross_entropy_backward_rows(
    rows,
    split,
    start,
    logits,
    labels,
    shares,
    n_labels,
    label_stride,
    share_stride,
    lse,
    dlosses,
    row_weight,
    z_loss,
    dlogits,
    weight,
    weight_sum,
    ignore_index,
    confidence,
    share,
    scale,
    scale_low,
):
    loss = Loss(
        labels, label_stride, n_labels, shares, share_stride, None, weight, weight_sum, ignore_index, confidence,
        share, row_weight, z_loss,
    )  # fmt: skip
    soft_backward(rows, split, start, logits, lse, dlosses, dlogits, loss, gap_params(scale, scale_low))
