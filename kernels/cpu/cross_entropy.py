"""Cross-entropy over rows of logits and its fused gradient, on the CPU.

For one row x over V classes with row weight r, class weights w (1 where none are given), W = sum_c w_c and label
smoothing eps, in the words of loss_target.py:

    nll       = log s + (max - x_t)                                     = -log_softmax(x)_t, from the row state
    loss      = r ((1 - eps) w_t nll + eps/V (W log s + D) + z)         D = sum_c w_c (max - x_c)
              = r (G log s + sum_c g_c (max - x_c) + z)                 where labels have shares
    z         = z_loss S lse^2
    dlogits_c = u r (p_c (G + 2 z_loss S lse) - g_c) / T

at temperature T: with one, x stands for the logits divided by it, but their differences to the maximum are taken first.

(torch's LossNLL.cpp has eps/V sum_c w_c (lse - x_c), which is the same: no term is negative, so nothing cancels here.)
The distances are summed beside the state, chunk by chunk relative to the chunk's maximum.

u is grad_scale, divided for "mean" by the normaliser: the sum of r w_t over the rows that count, of r alone where
labels have shares. Where the losses are there already, p_c is exp(x_c - lse), and u the gradient with respect to a
row's loss: one read and one write.
"""

from gpusoftmax.kernels.cpu.arithmetic import (
    div,
)
from gpusoftmax.kernels.cpu.cache import device, kernel
from gpusoftmax.kernels.cpu.call import arguments
from gpusoftmax.kernels.cpu.loss_fold import fold, fold_backward
from gpusoftmax.kernels.cpu.loss_measure import measure, measure_and_keep, measure_target_alone
from gpusoftmax.kernels.cpu.loss_rows import Loss, Results
from gpusoftmax.kernels.cpu.loss_target import number_at, times_scale
from gpusoftmax.kernels.cpu.loss_write import write, write_backward, write_nothing
from gpusoftmax.kernels.cpu.rows import nothing_first, save_maxima
from gpusoftmax.kernels.cpu.run import run
from gpusoftmax.kernels.cpu.vector import (
    number,
)
from gpusoftmax.kernels.cpu.walk import walk
from gpusoftmax.kernels.operands import (
    STORAGE,
    Extras,
    Labels,
    Numbers,
    Operand,
    Place,
    Probs,
    Rows,
    Shares,
    scale_of,
    unless_one,
)


def cross_entropy(
    rows: Rows,
    logits: Operand,
    labels: Labels,
    losses: Operand,
    dlogits: Operand,
    weight: Numbers,
    weight_sum: Numbers,
    normaliser: Numbers,
    ignore_index: int,
    label_smoothing: float,
    grad_scale: float,
    place: Place,
    soft: Shares | Probs | None = None,
    extras: Extras | None = None,
    temperature: float = 1.0,
) -> None:
    """The loss of each row and, unless dlogits.pointer is 0, the gradient; dlogits may be the logits themselves.

    weight (n_cols), weight_sum (1) and normaliser (1) are in the computation format; where there are none they stand
    for ones, n_cols and 1. Kernels are compiled without `soft` and `extras` where they are None.
    """
    number_of = STORAGE[weight.dtype]
    with_grad = dlogits.pointer != 0
    run(
        cross_entropy_with_grad_rows if with_grad else cross_entropy_rows,
        rows,
        logits,
        soft.probs if isinstance(soft, Probs) else None,
        dlogits if with_grad else None,
        labels,
        losses,
        weight,
        weight_sum,
        normaliser,
        ignore_index,
        number_of(1.0 - label_smoothing),
        number_of(label_smoothing / rows.n_cols),
        number_of(grad_scale),
        *unless_one(scale_of(1.0, temperature, weight.dtype)),
        *_of_target(soft),
        *_of_extras(extras, number_of),
        keeps_exponentials=with_grad,
        streams=not isinstance(soft, Shares),
        numbers_of_row=soft.count if isinstance(soft, Shares) else 0,
    )


def cross_entropy_backward(
    rows: Rows,
    logits: Operand,
    labels: Labels,
    lse: Operand,
    dlosses: Operand,
    dlogits: Operand,
    weight: Numbers,
    weight_sum: Numbers,
    ignore_index: int,
    label_smoothing: float,
    place: Place,
    soft: Shares | Probs | None = None,
    extras: Extras | None = None,
) -> None:
    """dlogits, which may be the logits themselves, from the lse of each row and the gradient with respect to its loss.

    lse and dlosses are in the computation format. Of the extras, row_weight and z_loss are read.
    """
    number_of = STORAGE[weight.dtype]
    run(
        cross_entropy_backward_rows,
        rows,
        logits,
        soft.probs if isinstance(soft, Probs) else None,
        dlogits,
        labels,
        lse,
        dlosses,
        weight,
        weight_sum,
        ignore_index,
        number_of(1.0 - label_smoothing),
        number_of(label_smoothing / rows.n_cols),
        *_of_target(soft),
        *_of_extras(extras, number_of),
        streams=not isinstance(soft, Shares),
        numbers_of_row=soft.count if isinstance(soft, Shares) else 0,
    )


def _of_target(soft: Shares | Probs | None) -> tuple:
    """(shares, n_labels, label_stride, share_stride, is_dense)"""
    return (*soft, None) if isinstance(soft, Shares) else (None, 1, 0, 0, None if soft is None else 1)


def _of_extras(extras: Extras | None, number_of) -> tuple:
    return (None,) * len(Extras._fields) if extras is None else extras._replace(z_loss=number_of(extras.z_loss))


@kernel
def cross_entropy_rows(call):
    way, job, logits, second, none, loss = unpacked(call)
    walk(way, job, loss.rows, logits, second, none, save_maxima, measure, fold, write_nothing, loss, loss.share)


@kernel
def cross_entropy_with_grad_rows(call):
    way, job, logits, second, dlogits, loss = unpacked(call)
    walk(way, job, loss.rows, logits, second, dlogits, save_maxima, measure_and_keep, fold, write, loss, loss.share)


@kernel
def cross_entropy_backward_rows(call):
    (
        way, job, rows, logits, second, dlogits, labels, lse, dlosses, weight, weight_sum, ignore_index, confidence,
        share, shares, n_labels, label_stride, share_stride, is_dense, row_weight, z_loss, z_losses, none, correct,
    ) = arguments(call)  # fmt: skip
    one = number(share, 1.0)
    loss = Loss(
        rows, labels, weight, weight_sum, ignore_index, confidence, share, one, None, shares, n_labels, label_stride,
        share_stride, is_dense, row_weight, z_loss, lse, dlosses,
    )  # fmt: skip
    walk(
        way, job, rows, logits, second, dlogits, nothing_first, measure_target_alone, fold_backward, write_backward,
        loss, share,
    )  # fmt: skip


@device
def unpacked(call):
    (
        way, job, rows, logits, second, dlogits, labels, losses, weight, weight_sum, normaliser, ignore_index,
        confidence, share, grad_scale, scale, scale_low, shares, n_labels, label_stride, share_stride, is_dense,
        row_weight, z_loss, z_losses, lse, correct,
    ) = arguments(call)  # fmt: skip
    scale = scale_or_one(scale, scale_low)
    results = Results(losses, z_losses, lse, correct)
    upstream = times_scale(div(grad_scale, number_at(normaliser, 0, number(share, 1.0))), scale, scale_low)
    loss = Loss(
        rows, labels, weight, weight_sum, ignore_index, confidence, share, scale, scale_low, shares, n_labels,
        label_stride, share_stride, is_dense, row_weight, z_loss, results, upstream,
    )  # fmt: skip
    return way, job, logits, second, dlogits, loss


@device
def scale_or_one(scale, scale_low):
    """A scale of 1 is a constant."""
    if scale_low is None:
        return number(scale, 1.0)
    return scale
