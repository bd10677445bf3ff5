"""Cross-entropy: the loss, and the loss with its gradient from one kernel."""

from typing import Any

from gpusoftmax import _arrays, _checks, _gradients, _labels, _replay, _transform
from gpusoftmax.kernels.operands import NO_OPERAND, Numbers


def cross_entropy(
    logits: Any,
    target: Any,
    weight: Any = None,
    *,
    axis: int = -1,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    temperature: Any = 1.0,
    bias: Any = None,
    softcap: float | None = None,
    mask: Any = None,
    n_valid: Any = None,
    empty_row: str = "nan",
    validate: bool | None = None,
) -> Any:
    """Negative log-likelihood of `target` under softmax(`logits`), in nats; torch's definition and defaults.

    loss = logsumexp(logits) - logits[target] for each row, where a row runs along `axis`. The default axis is the last
    one, -1; torch's layout (N, C, d1, ...) is axis=1.

    Parameters
    ----------
    logits : array, shape (..., n_cols, ...)
        float16, bfloat16, float32 or float64, of NumPy, CuPy, torch or JAX, with any strides. Not modified.
    target : array of integers, the shape of `logits` without `axis`
        Class of each row, from 0 to n_cols - 1, or `ignore_index`.
    weight : array, shape (n_cols,), optional
        A factor for each class. "mean" then divides by the sum of weight[target] over the rows that count.
    axis : int
        The class axis.
    ignore_index : int
        Rows with this label are not read and have loss 0; "mean" does not count them.
    reduction : "mean", "sum" or "none"
        "none" gives the loss of each row. "mean" is NaN where no row counts.
    label_smoothing : float, 0 to 1
        Share of the probability that is spread evenly over all classes.
    temperature, bias, softcap, mask, n_valid
        What the logits go through before, as in `softmax`. A label that is masked has the loss +inf.
    empty_row : "nan" or "zero"
        What becomes of a row of which nothing is left: NaN, or a loss and a gradient of 0. "mean" counts it.
    validate : bool, optional
        Whether a label that is neither a class nor `ignore_index` raises IndexError. By default it does on the CPU;
        on a GPU it would wait for the device, and such a row gets a NaN loss (and gradient) instead.

    Returns
    -------
    array or NumPy scalar, float32 (float64 for float64 logits)
        A single number for "mean" and "sum", the shape of `target` for "none". Differentiable where torch's `logits`
        require grad, see gpusoftmax.torch.

    Raises
    ------
    IndexError
        A label out of range, see `validate`; nothing has been written.
    TypeError
        `target` not of integers; arrays of different libraries or devices; unsupported dtypes; a `weight` that requires
        grad.
    ValueError
        Shapes that do not match, no classes, or an unknown reduction.

    Notes
    -----
    Computed as log1p(s - 1) + (max - logits[target]) from a row state that never forms s - 1 by subtraction: confident
    rows keep their small losses. The formulas with weights and smoothing stand in kernels/cpu/cross_entropy.py. "mean"
    and "sum" add the rows in order: they depend on the batch, the loss of one row does not.

    Examples
    --------
    >>> import numpy as np
    >>> from gpusoftmax import cross_entropy
    >>> float(cross_entropy(np.zeros((1, 4)), np.array([2])))  # log 4
    1.3862943611198906
    """
    arrays, transform = _transform.split(temperature, bias, softcap, mask, n_valid, empty_row)
    options = axis, ignore_index, reduction, label_smoothing, validate
    placed = logits, target, weight, None, None, *arrays
    try:
        return _replay.call(_cross_entropy, placed, *options, 1.0, False, *transform)[0]
    except _arrays.RequiresGrad as refusal:
        argument = refusal.argument
    transform = temperature, bias, softcap, mask, n_valid, empty_row
    return _gradients.call("cross_entropy", argument, None, transform, logits, target, weight, *options)


def cross_entropy_with_grad(
    logits: Any,
    target: Any,
    weight: Any = None,
    *,
    axis: int = -1,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    temperature: Any = 1.0,
    bias: Any = None,
    softcap: float | None = None,
    mask: Any = None,
    n_valid: Any = None,
    empty_row: str = "nan",
    validate: bool | None = None,
    grad_scale: float = 1.0,
    out: Any = None,
) -> tuple[Any, Any]:
    """`cross_entropy` and its gradient with respect to the logits, from one kernel.

    Parameters
    ----------
    logits, target, weight, axis, ignore_index, reduction, label_smoothing, validate
        As in `cross_entropy`.
    temperature, bias, softcap, mask, n_valid, empty_row
        As in `cross_entropy`. The gradient is that of the logits as they were given; exactly 0 where they are masked.
    grad_scale : float
        Multiplies the gradient (not the loss): the loss scale of mixed-precision training, for instance.
    out : array, optional
        Where to write the gradient, of the shape of `logits`; it decides the dtype. out=logits works in place and
        needs no second array of that size.

    Returns
    -------
    loss : array or NumPy scalar
        As `cross_entropy` returns it.
    dlogits : array, the shape, dtype, kind and device of `logits`
        grad_scale times the gradient of the loss ("none": of the sum of the losses). Exactly 0 in ignored rows.

    Raises
    ------
    IndexError, TypeError, ValueError
        As `cross_entropy`; also for an `out` as in `softmax`, and for torch tensors that require grad.

    Examples
    --------
    >>> import numpy as np
    >>> from gpusoftmax import cross_entropy_with_grad
    >>> loss, dlogits = cross_entropy_with_grad(np.zeros((1, 4)), np.array([2]))
    >>> dlogits
    array([[ 0.25,  0.25, -0.75,  0.25]])
    """
    grad_scale = _checks.scalar(grad_scale, "grad_scale")
    arrays, transform = _transform.split(temperature, bias, softcap, mask, n_valid, empty_row)
    options = axis, ignore_index, reduction, label_smoothing, validate, grad_scale, True
    return _replay.call(_cross_entropy, (logits, target, weight, out, None, *arrays), *options, *transform)


def _with_divisor(logits: Any, target: Any, weight: Any, out: Any, divisor: Any, *options: Any) -> tuple[Any, Any]:
    """(loss, gradient), for gpusoftmax.torch: the gradient's scale is kept, or comes, as an array on the device.

    divisor: one element in the computation format. "mean" writes the number that it divides by; the others, with which
    gradients are computed anew, read what losses and gradient are divided by.
    """
    arrays, transform = _transform.split(1.0, None, None, None, None)
    return _replay.call(_cross_entropy, (logits, target, weight, out, divisor, *arrays), *options, *transform)


def _cross_entropy(
    logits, target, weight, out, divisor, temperatures, bias, mask, valid,
    axis, ignore_index, reduction, label_smoothing, validate, grad_scale, with_grad, *transform,
):  # fmt: skip
    x = _arrays.logits(logits, "logits")
    labels = _arrays.wrap(target, "target")
    axes = _checks.class_axis(axis, x.ndim)
    n_cols = x.shape[axes[0]]
    batch_shape = _arrays.without_axes(x, axes)
    _checks.integer(labels.dtype, "target")
    _checks.same_home(x, labels, "logits", "target")
    _checks.same_shape(labels, batch_shape, "target", f"to match logits {x.shape} without axis {axis}")
    _checks.class_count(n_cols)
    _checks.reduction(reduction)
    label_smoothing = _checks.label_smoothing(label_smoothing)
    ignore_index = _checks.ignore_index(ignore_index)

    gradient = None
    if with_grad:
        gradient = _arrays.output(out, x, x.shape, x.dtype)
        _checks.no_partial_overlap(gradient, x, "logits")
        _checks.no_overlap(gradient, labels, "target")
    dtype = _arrays.compute_dtype(x, gradient)
    arrays = temperatures, bias, mask, valid
    transformed, _ = _transform.applied(x, axes, dtype, arrays, transform, gradient, "logits", takes_temperature=False)
    loss_dtype = "float64" if x.dtype == "float64" else "float32"
    class_weight = None
    if weight is not None:
        class_weight = _arrays.logits(weight, "weight")
        _checks.same_home(x, class_weight, "logits", "weight")
        _checks.same_shape(class_weight, (n_cols,), "weight", "one factor for each class")
        if with_grad:
            _checks.no_overlap(gradient, class_weight, "weight")
        class_weight = _arrays.contiguous(class_weight, dtype)

    kernels = _arrays.kernels(x.place, "cross_entropy")
    all_rows, all_labels, labels_memory = _arrays.all_labels(labels, n_cols)
    if _labels.are_checked(x, validate):
        _labels.check(x, all_rows, all_labels, ignore_index)

    nothing = Numbers(0, dtype)
    weights = nothing if class_weight is None else _arrays.numbers(class_weight)
    # The small results that later kernels read stay referenced until those have been started.
    weight_sum = _arrays.empty(x, (1,), dtype) if class_weight is not None and label_smoothing else None
    if weight_sum is not None:
        kernels.total(n_cols, weights, nothing, _arrays.numbers(weight_sum), x.place)
    normaliser = None if divisor is None else _arrays.wrap(divisor, "divisor")
    if reduction == "mean":
        normaliser = normaliser or _arrays.empty(x, (1,), dtype)
        kernels.normalise(all_rows, all_labels, weights, _arrays.numbers(normaliser), ignore_index, x.place)
    del labels_memory  # a copy of the labels, perhaps: held until here
    sums = [nothing if array is None else _arrays.numbers(array) for array in (weight_sum, normaliser)]

    def rows_of_batch(rows, x_rows, label_rows, loss_rows, gradient_rows=NO_OPERAND):
        options = ignore_index, label_smoothing, grad_scale
        kernels.cross_entropy(rows, x_rows, label_rows, loss_rows, gradient_rows, weights, *sums, *options, x.place)

    losses = _arrays.empty(x, batch_shape, loss_dtype)
    # Everything is allocated before anything is written: a failure leaves the logits of an in-place call as they were.
    loss = losses if reduction == "none" else _arrays.empty(x, (), loss_dtype)
    _arrays.for_rows(
        rows_of_batch,
        axes,
        [transformed, _arrays.per_row(labels, axes, x.ndim)],
        [_arrays.per_row(losses, axes, x.ndim), *([gradient] if with_grad else [])],
    )
    if reduction != "none":
        kernels.total(losses.size, _arrays.numbers(losses), sums[1], _arrays.numbers(loss), x.place)
    return _arrays.result(loss), None if gradient is None else _arrays.result(gradient, out)
