"""Cross-entropy over rows of logits and its fused gradient, on the GPU. kernels/cuda/device/cross_entropy.py holds the
kernels; what the arguments mean stands in kernels/cpu/cross_entropy.py.
"""

from gpusoftmax.kernels.cuda.launch import launch_rows
from gpusoftmax.kernels.operands import (
    NO_OPERAND,
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
    numbers = weight, weight_sum, normaliser, ignore_index, label_smoothing, grad_scale
    _cross_entropy(rows, logits, labels, losses, dlogits, *numbers, place, soft, extras, None, temperature)


def _cross_entropy(
    rows, logits, labels, losses, dlogits, weight, weight_sum, normaliser, ignore_index, label_smoothing, grad_scale,
    place, soft, extras, dlosses, temperature,
):  # fmt: skip
    """dlosses: what the gradient of each row, of a soft target, is multiplied by besides, or None."""
    number_of = STORAGE[weight.dtype]
    per_logit, low = unless_one(scale_of(1.0, temperature, weight.dtype))
    has_mass = label_smoothing or (extras is not None and extras.correct.pointer)
    launch_rows(
        f"cross_entropy.{'soft_' if soft else 'smoothed_' if has_mass else ''}cross_entropy_rows",
        place,
        rows,
        logits,
        labels,
        *((*_of_target(soft), dlosses) if soft else ()),
        losses,
        *_of_extras(extras, number_of),
        dlogits,
        weight,
        weight_sum,
        normaliser,
        ignore_index,
        *_shares_of_smoothing(rows, label_smoothing, number_of),
        number_of(grad_scale),
        *scale_of(2.0, temperature, weight.dtype),
        None if low is None else per_logit,
        passes=2 if dlogits.pointer else 1,
        side_by_side=soft is None,  # each thread knows the target of its own row
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
    number_of = STORAGE[weight.dtype]
    if isinstance(soft, Probs):  # they have to be summed first: while that is done, the logits are there too
        nothing = Numbers(0, weight.dtype)
        numbers = weight, weight_sum, nothing, ignore_index, label_smoothing, 1.0
        losses = NO_OPERAND._replace(dtype=lse.dtype)
        _cross_entropy(rows, logits, labels, losses, dlogits, *numbers, place, soft, extras, dlosses, 1.0)
        return
    row_weight, z_loss, *_ = _of_extras(extras, number_of)
    launch_rows(
        f"cross_entropy.{'soft_' if soft else ''}cross_entropy_backward_rows",
        place,
        rows,
        logits,
        labels,
        *(soft if soft else ()),
        lse,
        dlosses,
        row_weight,
        z_loss,
        dlogits,
        weight,
        weight_sum,
        ignore_index,
        *_shares_of_smoothing(rows, label_smoothing, number_of),
        *scale_of(2.0, 1.0, weight.dtype),
        side_by_side=soft is None,  # as above
    )


def _of_target(soft: Shares | Probs) -> tuple:
    """(shares, n_labels, label_stride, share_stride, probs)"""
    return (*soft, None) if isinstance(soft, Shares) else (None, 1, 0, 0, soft.probs)


def _of_extras(extras: Extras | None, number_of) -> tuple:
    return (None,) * len(Extras._fields) if extras is None else extras._replace(z_loss=number_of(extras.z_loss))


def _shares_of_smoothing(rows: Rows, label_smoothing: float, number_of) -> tuple:
    """1 - eps and eps/V"""
    return number_of(1.0 - label_smoothing), number_of(label_smoothing / rows.n_cols)
