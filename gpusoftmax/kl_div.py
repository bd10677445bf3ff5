"""The Kullback-Leibler divergence between the softmaxes of two arrays of logits, and its gradients."""

import math
from typing import Any, NamedTuple

from gpusoftmax import _arrays, _checks, _gradients, _replay, _rows, _totals, _transform
from gpusoftmax._loss import normalizer_array, split_normalizer
from gpusoftmax.kernels.operands import NO_OPERAND, Numbers


class KlDivWithGrad(NamedTuple):
    """What `kl_div_with_grad` returns."""

    loss: Any
    dlogits: Any
    dtarget_logits: Any


def kl_div(
    logits: Any,
    target_logits: Any,
    *,
    axis: int = -1,
    temperature: float = 1.0,
    row_weight: Any = None,
    reduction: str = "mean",
    normalizer: Any = None,
) -> Any:
    """KL(p || q) in nats, of p = softmax(target_logits / temperature) from q = softmax(logits / temperature).

    For each row, sum over c of p_c (log p_c - log q_c): how many nats are lost where a student with `logits` stands for
    a teacher with `target_logits`. torch's kl_div(log_softmax(logits), log_softmax(target_logits), log_target=True),
    summed over the class axis, in one kernel.

    Parameters
    ----------
    logits, target_logits : array, shape (..., n_cols, ...)
        Those of the student and of the teacher: float16, bfloat16, float32 or float64, of NumPy, CuPy, torch or JAX,
        with any strides; same shape, dtype, library and device. Not modified.
    axis : int
        The class axis, by default the last one.
    temperature : float
        Divides both. The divergence is not multiplied by its square, as distillation often has it: do that to the
        result, or by grad_scale.
    row_weight : array, the shape of `logits` without `axis`, optional
        A factor for each row. A row whose weight is 0 is not read: its loss and gradients are 0 whatever it holds.
    reduction : "mean", "sum" or "none"
        "mean" divides the sum over the rows by their number, or by the sum of `row_weight` (torch's "batchmean");
        "none" gives the loss of each row.
    normalizer : float, or array with one element, optional
        What "mean" divides by instead: the number of rows of a whole gradient accumulation, for instance. An array is
        read on its device.

    Returns
    -------
    array or NumPy scalar, float32 (float64 for float64 logits)
        A single number for "mean" and "sum", the shape of `logits` without `axis` for "none". Never negative unless a
        weight is, exactly 0 for equal rows. +inf where a logit is -inf and the target's class has a probability; NaN
        for a row that holds NaN, +inf or nothing but -inf in either array. Differentiable with respect to both where
        torch tensors require grad, see gpusoftmax.torch.

    Raises
    ------
    TypeError
        Arrays of different dtypes, libraries or devices; unsupported dtypes; a `row_weight` or `normalizer` that
        requires grad.
    ValueError
        Shapes that do not match, no classes, an unknown reduction, a bad temperature; a `normalizer` that is not above
        0, or given without "mean".

    Notes
    -----
    Computed as sum over c of p_c (d_c + expm1(-d_c)) with d_c = log p_c - log q_c, where no term is negative. So the
    relative error stays small where the rows are nearly equal and sum of p_c d_c would cancel: for float32 down to
    divergences of about 1e-9. Each array is read once where a row can be held on the chip, twice where it cannot.

    A row has the same bits whatever the batch around it. "mean" and "sum" add the rows in order.

    Source: S. Kullback and R. A. Leibler, "On Information and Sufficiency", Annals of Mathematical Statistics 22, 1951;
    for distillation G. Hinton, O. Vinyals and J. Dean, arXiv:1503.02531.

    Examples
    --------
    >>> import numpy as np
    >>> from gpusoftmax import kl_div
    >>> float(kl_div(np.float32([[0, 0]]), np.float32([[0, -np.inf]])))  # log 2
    0.6931471824645996
    """
    normalizers, number = split_normalizer(normalizer)
    placed = logits, target_logits, row_weight, None, normalizers
    try:
        options = axis, _transform.number(temperature, "temperature"), reduction, number
        return _replay.call(_kl_div, placed, *options, 1.0, False, False)[0]
    except _arrays.RequiresGrad as refusal:
        argument = refusal.argument
    return _gradients.call(
        "kl_div", argument, None, (), logits, target_logits, axis, temperature, row_weight, reduction, normalizer
    )


def kl_div_with_grad(
    logits: Any,
    target_logits: Any,
    *,
    axis: int = -1,
    temperature: float = 1.0,
    row_weight: Any = None,
    reduction: str = "mean",
    normalizer: Any = None,
    target_grad: bool = False,
    grad_scale: float = 1.0,
    out: Any = None,
) -> KlDivWithGrad:
    """`kl_div` and its gradients.

    Parameters
    ----------
    logits, target_logits, axis, temperature, row_weight, reduction, normalizer
        As in `kl_div`.
    target_grad : bool
        Whether the gradient with respect to the target's logits is computed too, by a kernel of its own.
    grad_scale : float
        Multiplies the gradients (not the loss).
    out : array, optional
        Where to write the gradient with respect to `logits`, of their shape; it decides the dtype. It may be `logits`
        or `target_logits` itself.

    Returns
    -------
    loss : array or NumPy scalar
        As `kl_div` returns it.
    dlogits : array, the shape, dtype, kind and device of `logits`
        u (q - p) / temperature, with u the row's weight times grad_scale, over what "mean" divides by.
    dtarget_logits : array or None, the same
        u p (log p - log q - KL) / temperature; NaN for a row whose divergence is infinite.

    Raises
    ------
    TypeError, ValueError
        As `kl_div`; also for an `out` as in `softmax`, and for torch tensors that require grad.

    Examples
    --------
    >>> import numpy as np
    >>> from gpusoftmax import kl_div_with_grad
    >>> kl_div_with_grad(np.float32([[0, 0]]), np.float32([[0, -np.inf]])).dlogits
    array([[-0.5,  0.5]], dtype=float32)
    """
    grad_scale = _checks.grad_scale(grad_scale)
    normalizers, number = split_normalizer(normalizer)
    placed = logits, target_logits, row_weight, out, normalizers
    options = axis, _transform.number(temperature, "temperature"), reduction, number
    found = _replay.call(_kl_div, placed, *options, grad_scale, True, bool(target_grad))
    return KlDivWithGrad(*found)


def _kl_div(
    logits, target_logits, row_weight, out, normalizers,
    axis, temperature, reduction, normalizer, grad_scale, with_grad, target_grad,
):  # fmt: skip
    x, y = _arrays.logits(logits, "logits"), _arrays.logits(target_logits, "target_logits")
    axes = _checks.class_axis(axis, x.ndim)
    n_cols, batch_shape = x.shape[axes[0]], _rows.without_axes(x, axes)
    _checks.same_home(x, y, "logits", "target_logits")
    _checks.same_dtype(x, y, "logits", "target_logits")
    _checks.same_shape(y, x.shape, "target_logits", "to match logits")
    _checks.class_count(n_cols)
    _checks.reduction(reduction)
    temperature = _checks.temperature(temperature)
    has_normalizer = normalizer is not None or normalizers is not None
    _checks.only_for(has_normalizer, "normalizer", reduction == "mean", reduction)

    gradient = None
    if with_grad:
        gradient = _arrays.output(out, x, x.shape, x.dtype)
        _checks.no_partial_overlap(gradient, x, "logits")
        _checks.no_partial_overlap(gradient, y, "target_logits")
    dtype = _arrays.compute_dtype(x, gradient)
    _checks.temperature_fits(temperature, dtype)
    if normalizer is not None:
        _checks.divisor_fits(normalizer, "normalizer", dtype)
    weights = None if row_weight is None else _row_weights(row_weight, x, batch_shape, axis, gradient, dtype)
    kernels = _arrays.kernels(x.place, "kl_div")

    # What "mean" divides by: a number, or an array of one. The small results that later kernels read stay referenced
    # until those have been started.
    nothing = Numbers(0, dtype)
    divisor, divisors = 1.0, None
    if reduction == "mean" and normalizers is not None:
        divisors = normalizer_array(normalizers, x, "logits", dtype, gradient)
    elif reduction == "mean" and (normalizer is not None or weights is None):
        divisor = float(math.prod(batch_shape)) if normalizer is None else normalizer
    elif reduction == "mean":
        divisors = _arrays.empty(x, (1,), dtype)
        _totals.total(weights, nothing, divisors)
    normaliser = nothing if divisors is None else _arrays.numbers(divisors)
    upstream = 0.0  # no rows
    if divisor:
        _checks.scale_fits(grad_scale, divisor, normalizer is not None, dtype)
        upstream = grad_scale / divisor

    loss_dtype = "float64" if x.dtype == "float64" else "float32"
    losses = _arrays.empty(x, batch_shape, loss_dtype)
    # Everything is allocated before anything is written: a failure leaves the logits of an in-place call as they were.
    loss = losses if reduction == "none" else _arrays.empty(x, (), loss_dtype)
    room = None if reduction == "none" else _totals.scratch(x, losses.size, dtype)
    dtarget = _arrays.empty(x, x.shape, x.dtype) if target_grad else None
    reads = [x, y] if weights is None else [x, y, _rows.per_row(weights, axes, x.ndim)]
    no_weights, no_gradient = NO_OPERAND._replace(dtype=dtype), NO_OPERAND._replace(dtype=x.dtype)

    def target_gradients(rows, x_rows, y_rows, *rest):
        weight_rows = rest[0] if weights is not None else no_weights
        kernels.kl_div_target_grad(
            rows, x_rows, y_rows, weight_rows, rest[-1], normaliser, upstream, temperature, x.place
        )  # fmt: skip

    def divergences(rows, x_rows, y_rows, *rest):
        rest = rest if weights is not None else (no_weights, *rest)
        rest = rest if with_grad else (*rest, no_gradient)
        kernels.kl_div(rows, x_rows, y_rows, *rest, normaliser, upstream, temperature, x.place)

    if target_grad:  # first: the other gradient may be written over what is read
        _rows.for_rows(target_gradients, axes, reads, [dtarget])
    per_row = _rows.per_row(losses, axes, x.ndim)
    _rows.for_rows(divergences, axes, reads, [per_row, gradient] if with_grad else [per_row])
    if reduction != "none":
        _totals.total(losses, normaliser, loss, divisor, room)
    return (
        _arrays.result(loss),
        None if gradient is None else _arrays.result(gradient, out),
        None if dtarget is None else _arrays.result(dtarget),
    )


def _row_weights(row_weight, x, batch_shape, axis, gradient, dtype):
    """The weights of rows for the kernels: C-contiguous, in the computation format."""
    weights = _arrays.logits(row_weight, "row_weight")
    _checks.same_home(x, weights, "logits", "row_weight")
    _checks.same_shape(weights, batch_shape, "row_weight", f"to match logits {x.shape} without axis {axis}")
    if gradient is not None:
        _checks.no_overlap(gradient, weights, "row_weight")
    return _rows.contiguous(weights, dtype)
