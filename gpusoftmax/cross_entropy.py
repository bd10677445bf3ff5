"""Cross-entropy: the loss, and the loss with its gradient from one kernel; and the gradient where the lse is known."""

from typing import Any

from gpusoftmax import _arrays, _checks, _gradients, _loss, _replay, _transform
from gpusoftmax._loss import CrossEntropy


def cross_entropy(
    logits: Any,
    target: Any,
    weight: Any = None,
    *,
    axis: int = -1,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    row_weight: Any = None,
    normalizer: Any = None,
    temperature: Any = 1.0,
    bias: Any = None,
    softcap: float | None = None,
    mask: Any = None,
    n_valid: Any = None,
    empty_row: str = "nan",
    return_z_loss: bool = False,
    return_lse: bool = False,
    return_correct: bool = False,
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
        Class of each row, from 0 to n_cols - 1, or `ignore_index`. Or soft targets: a floating array of the shape of
        `logits`, the probability of each class; or, where few classes have any, a pair (indices, probabilities) of
        arrays with the shape of `logits` without `axis` and one more axis at the end. They need not add up to 1.
    weight : array, shape (n_cols,), optional
        A factor for each class. "mean" then divides by the sum of weight[target] over the rows that count; with soft
        targets it does not, as in torch.
    axis : int
        The class axis.
    ignore_index : int
        Rows with this label are not read and have loss 0; "mean" does not count them. Among the indices of a soft
        target, it is none of the classes.
    reduction : "mean", "sum" or "none"
        "none" gives the loss of each row. "mean" is NaN where no row counts.
    label_smoothing : float, 0 to 1
        Share of the probability that is spread evenly over all classes.
    z_loss : float
        Adds z_loss * lse**2 to the loss of a row, with its weights: row_weight and weight[target], or for a soft target
        the sum over the classes of probability times weight.
    row_weight : array, the shape of `logits` without `axis`, optional
        A factor for each row, gradient included. "mean" divides by its sum, times weight[target]. A row of weight 0 is
        not read.
    normalizer : float, or array of one element, optional
        What "mean" divides by instead: the number of tokens in all parts of a batch, for instance.
    temperature, bias, softcap, mask, n_valid
        What the logits go through before, as in `softmax`. A label that is masked has the loss +inf.
    empty_row : "nan" or "zero"
        What becomes of a row of which nothing is left: NaN, or a loss and a gradient of 0. "mean" counts it.
    return_z_loss, return_lse, return_correct : bool
        What else to return, from the same read of the logits.
    validate : bool, optional
        Whether a label that is neither a class nor `ignore_index` raises IndexError. By default it does on the CPU;
        on a GPU it would wait for the device, and such a row gets a NaN loss (and gradient) instead.

    Returns
    -------
    array or NumPy scalar, float32 (float64 for float64 logits)
        The loss: a single number for "mean" and "sum", the shape of the rows for "none". Differentiable where torch's
        `logits`, or probabilities of the `target`, require grad, see gpusoftmax.torch.
    CrossEntropy
        If more is asked for, a named tuple: the loss; the part of it that is z_loss; lse, the logsumexp of each row, 0
        where it is ignored; n_correct, an int64, of how many rows that count the label is the first of the largest
        logits (of none whose loss is NaN).

    Raises
    ------
    IndexError
        A label out of range, see `validate`; nothing has been written.
    TypeError
        `target` neither of integers nor a soft target; arrays of different libraries or devices; unsupported dtypes; a
        `weight` that requires grad.
    ValueError
        Shapes that do not match, no classes, an unknown reduction, a `normalizer` without "mean", or `return_correct`
        with a soft target.

    Notes
    -----
    Computed as log1p(s - 1) + (max - logits[target]) from a row state that never forms s - 1 by subtraction: confident
    rows keep their small losses. The formulas with everything else stand in kernels/cpu/cross_entropy.py. "mean" and
    "sum" add the rows in order: they depend on the batch, the loss of one row does not.

    Examples
    --------
    >>> import numpy as np
    >>> from gpusoftmax import cross_entropy
    >>> float(cross_entropy(np.zeros((1, 4)), np.array([2])))  # log 4
    1.3862943611198906
    """
    target, shares = _loss.split_target(target)
    normalizer, divide_by = _loss.split_normalizer(normalizer)
    wanted = bool(return_z_loss), bool(return_lse), bool(return_correct)
    options = axis, ignore_index, reduction, label_smoothing, validate
    more = z_loss, divide_by, *wanted
    try:
        arrays, transform = _transform.split(temperature, bias, softcap, mask, n_valid, empty_row)
        placed = logits, target, weight, None, None, shares, row_weight, normalizer, *arrays
        loss, _, *told = _replay.call(_loss.loss_and_gradient, placed, *options, 1.0, False, *more, *transform)
        return CrossEntropy(loss, *told) if any(wanted) else loss
    except _arrays.RequiresGrad as refusal:
        argument = refusal.argument
    transform = temperature, bias, softcap, mask, n_valid, empty_row
    more = shares, row_weight, divide_by if normalizer is None else normalizer, z_loss, wanted
    return _gradients.call("cross_entropy", argument, None, transform, logits, target, weight, *options, more)


def cross_entropy_with_grad(
    logits: Any,
    target: Any,
    weight: Any = None,
    *,
    axis: int = -1,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    row_weight: Any = None,
    normalizer: Any = None,
    temperature: Any = 1.0,
    bias: Any = None,
    softcap: float | None = None,
    mask: Any = None,
    n_valid: Any = None,
    empty_row: str = "nan",
    return_z_loss: bool = False,
    return_lse: bool = False,
    return_correct: bool = False,
    validate: bool | None = None,
    grad_scale: float = 1.0,
    out: Any = None,
) -> tuple[Any, Any]:
    """`cross_entropy` and its gradient with respect to the logits, from one kernel.

    Parameters
    ----------
    logits, target, weight, axis, ignore_index, reduction, label_smoothing, z_loss, row_weight, normalizer, validate
        As in `cross_entropy`.
    temperature, bias, softcap, mask, n_valid, empty_row
        As in `cross_entropy`. The gradient is that of the logits as they were given; exactly 0 where they are masked,
        and beside a mask or n_valid where they come to -inf; elsewhere p - 1 at a label whose logit is -inf.
    return_z_loss, return_lse, return_correct : bool
        As in `cross_entropy`, whose named tuple then takes the place of the loss.
    grad_scale : float
        Multiplies the gradient (not the loss): the loss scale of mixed-precision training, for instance.
    out : array, optional
        Where to write the gradient, of the shape of `logits`; it decides the dtype. out=logits works in place and
        needs no second array of that size.

    Returns
    -------
    loss : array, NumPy scalar or CrossEntropy
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
    grad_scale = _checks.grad_scale(grad_scale)
    target, shares = _loss.split_target(target)
    normalizer, divide_by = _loss.split_normalizer(normalizer)
    arrays, transform = _transform.split(temperature, bias, softcap, mask, n_valid, empty_row)
    wanted = bool(return_z_loss), bool(return_lse), bool(return_correct)
    options = axis, ignore_index, reduction, label_smoothing, validate, grad_scale, True, z_loss, divide_by, *wanted
    placed = logits, target, weight, out, None, shares, row_weight, normalizer, *arrays
    loss, dlogits, *told = _replay.call(_loss.loss_and_gradient, placed, *options, *transform)
    return CrossEntropy(loss, *told) if any(wanted) else loss, dlogits


def cross_entropy_backward(
    logits: Any,
    target: Any,
    lse: Any,
    dloss: Any,
    weight: Any = None,
    *,
    axis: int = -1,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    row_weight: Any = None,
    temperature: Any = 1.0,
    bias: Any = None,
    softcap: float | None = None,
    mask: Any = None,
    n_valid: Any = None,
    empty_row: str = "nan",
    validate: bool | None = None,
    out: Any = None,
) -> Any:
    """Gradient with respect to the logits of `cross_entropy`, from the lse that it has returned: one read, one write.

    dlogits = dloss * (softmax(logits) - onehot(target)) for each row, where softmax(logits) = exp(logits - lse).

    Parameters
    ----------
    logits, target, weight, axis, ignore_index, label_smoothing, z_loss, row_weight
        As given to `cross_entropy`.
    lse : array, the shape of `logits` without `axis`
        What `cross_entropy` has returned, with `return_lse`.
    dloss : array, the shape of `logits` without `axis`, or of no dimensions
        The gradient with respect to the losses of the rows, as reduction "none" gives them, with any strides, 0
        included: that of a mean is the same for all rows.
    temperature, bias, softcap, mask, n_valid, empty_row, validate
        As given to `cross_entropy`. The gradient is that of the logits as they were given.
    out : array, optional
        Where to write the result, of the shape of `logits`; it decides the dtype. out=logits works in place.

    Returns
    -------
    array, the shape, dtype, kind and device of `logits`
        Exactly 0 in ignored rows.

    Raises
    ------
    IndexError, TypeError, ValueError
        As `cross_entropy`; also for an `out` as in `softmax`.

    Notes
    -----
    An lse is rounded to its format: probabilities have a relative error of up to half a unit in the last place of the
    lse. `cross_entropy_with_grad` does not round it.

    Examples
    --------
    >>> import numpy as np
    >>> from gpusoftmax import cross_entropy, cross_entropy_backward
    >>> logits, target = np.zeros((1, 4)), np.array([2])
    >>> lse = cross_entropy(logits, target, return_lse=True).lse
    >>> cross_entropy_backward(logits, target, lse, np.array(1.0)).round(12)
    array([[ 0.25,  0.25, -0.75,  0.25]])
    """
    target, shares = _loss.split_target(target)
    arrays, transform = _transform.split(temperature, bias, softcap, mask, n_valid, empty_row)
    placed = logits, target, lse, dloss, weight, out, shares, row_weight, *arrays
    return _replay.call(_loss.backward, placed, axis, ignore_index, label_smoothing, validate, z_loss, *transform)


def _with_divisor(logits: Any, target: Any, weight: Any, out: Any, divisor: Any, *options: Any) -> tuple[Any, Any]:
    """(loss, gradient), for gpusoftmax.torch: the gradient's scale is kept, or comes, as an array on the device.

    divisor: one element in the computation format. "mean" writes the number that it divides by; the others, with which
    gradients are computed anew, read what losses and gradient are divided by.
    """
    arrays, transform = _transform.split(1.0, None, None, None, None)
    placed = logits, target, weight, out, divisor, None, None, None, *arrays
    return _replay.call(_loss.loss_and_gradient, placed, *options, 0.0, None, False, False, False, *transform)[:2]
