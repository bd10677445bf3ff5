"""Cross-entropy and its fused gradient. The mathematics stands in kernels/cpu/cross_entropy.py.

loss_target.py      what the loss of a row is measured against
loss_masses.py      the masses at its columns, summed beside its state
loss_results.py     the loss, and what else is told of a row
loss_gradient.py    the gradient
"""

import math

from numpy import int32, int64

from gpusoftmax.kernels.cuda.device._cuda import device
from gpusoftmax.kernels.cuda.device.arithmetic import div, logsumexp_of, mul, number, row_inverse
from gpusoftmax.kernels.cuda.device.exponential import anchor, lowest_of
from gpusoftmax.kernels.cuda.device.loss_gradient import (
    factors_with,
    fill_row,
    gradients_with,
    slope_of,
    soft_gradients,
    times,
)
from gpusoftmax.kernels.cuda.device.loss_masses import Asked, numbers_and_masses
from gpusoftmax.kernels.cuda.device.loss_results import Results, is_wanted, loss_of_row, tell, tell_correct, tell_unused
from gpusoftmax.kernels.cuda.device.loss_target import (
    COUNTED,
    IGNORED,
    Loss,
    all_mass,
    looked_up,
    mass_of_label,
    number_at,
    only_label,
    row_of_probs,
    status_of,
    tempered,
    unused,
)
from gpusoftmax.kernels.cuda.device.memory import is_null, load
from gpusoftmax.kernels.cuda.device.piece_state import gap_params, halved, of_cheap
from gpusoftmax.kernels.cuda.device.pieces import own_row, team_of
from gpusoftmax.kernels.cuda.device.row_staging import fetch_last
from gpusoftmax.kernels.cuda.device.row_state import above_anchor, begin_row, finished_row, states_of_chunks
from gpusoftmax.kernels.cuda.device.row_writer import row_writer
from gpusoftmax.kernels.cuda.device.rows import row_of
from gpusoftmax.kernels.cuda.device.split import is_long
from gpusoftmax.kernels.cuda.device.staging import hidden


@device
def anew(row):
    """The row. The compiler does not know that it is the same one: what follows from it is computed again where it is
    needed, and has no registers in between.
    """
    return row + int64(hidden(int32(0)))


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
        probs = row_of_probs(row, rows, loss.probs)
        if has_mass:
            asked = Asked(loss, probs, is_wanted(results.correct))
            found, distances, mass, column = numbers_and_masses(source, asked, n_cols, team, split, params)
        else:
            sums = of_cheap(params)
            state = states_of_chunks(source, n_cols, team, split, sums)
            found = finished_row(state, source, n_cols, team, split, sums)
            distances, mass, column = zero, zero, int32(-1)
        half, log, log_low, inverse = found
        all_weights = number_at(loss.weight_sum, 0, number(scale, rows.n_cols))
        s, mass = all_mass(s, mass, all_weights, n_cols, loss, team, split, probs)
        if counts and writes_loss:
            value = loss_of_row(
                found, s, mass, distances, looked, all_weights, has_mass, loss, scale, loss.shares, loss.probs
            )  # fmt: skip
            tell(row, rows, value, s, found, source, results, loss, params, loss.row_weight)
        if has_mass and counts:
            tell_correct(label, row, rows, column, found, results.correct, team)
        # 2. the gradient
        if not is_null(dlogits.pointer):
            upstream = tempered(div(grad_scale, number_at(normaliser, 0, one)), loss.per_logit)
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
                    row, probs, half, exponent, lowest, on_probs, on_share, on_mass, (loss, rows), params,
                    source.through,
                )  # fmt: skip
            else:
                numbers = (
                    label, half, exponent, lowest, on_probs, on_share, on_mass, loss.weight, params, source.through,
                )  # fmt: skip
            if has_mass:
                target = row_of(dlogits, anew(row), rows)
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
        s, mass = all_mass(s, zero, all_weights, n_cols, loss, team, split, loss.probs)
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
                row, loss.probs, half, exponent, lowest, on_probs, on_share, on_mass, (loss, rows), params,
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
    per_logit,
):
    loss = Loss(
        labels, 0, 1, None, 0, None, weight, weight_sum, ignore_index, confidence, share, row_weight, z_loss, per_logit
    )
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
    per_logit,
):
    loss = Loss(
        labels, 0, 1, None, 0, None, weight, weight_sum, ignore_index, confidence, share, row_weight, z_loss, per_logit
    )
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
    per_logit,
):
    loss = Loss(
        labels, label_stride, n_labels, shares, share_stride, probs, weight, weight_sum, ignore_index, confidence,
        share, row_weight, z_loss, per_logit,
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
    loss = Loss(
        labels, 0, 1, None, 0, None, weight, weight_sum, ignore_index, confidence, share, row_weight, z_loss, None
    )
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
        share, row_weight, z_loss, None,
    )  # fmt: skip
    soft_backward(rows, split, start, logits, lse, dlosses, dlogits, loss, gap_params(scale, scale_low))
