"""The expected index under the softmax, and its backward."""

from typing import Any

from gpusoftmax import _arrays, _checks, _gradients, _replay, _rows, _transform


def soft_argmax(
    x: Any,
    axis: int = -1,
    *,
    temperature: Any = 1.0,
    bias: Any = None,
    softcap: float | None = None,
    mask: Any = None,
    n_valid: Any = None,
    keepdims: bool = False,
    dtype: Any = None,
    out: Any = None,
) -> Any:
    """The expected index under the softmax of `x` along `axis`: sum over c of c softmax(x / temperature)_c.

    It tends to the argmax as the temperature tends to 0, and has a gradient at any other one.

    Parameters
    ----------
    x : array, shape (..., n_cols, ...)
        As in `softmax`.
    axis : int
        One axis, by default the last one.
    temperature, bias, softcap, mask, n_valid
        What `x` goes through before, as in `softmax`.
    keepdims : bool
        Keep the reduced axis with size 1.
    dtype : dtype, optional
        Of the result; by default float32, float64 for float64.
    out : array, optional
        Where to write the result, which is then what is returned. It decides the dtype.

    Returns
    -------
    array or NumPy scalar, the shape of `x` without the reduced axis
        Between 0 and n_cols - 1. Exactly c (rounded to the dtype) where column c has all the probability. NaN for a row
        without columns, and for one that holds NaN, +inf or nothing but -inf. Of a torch tensor that requires grad it
        is differentiable, any number of times.

    Raises
    ------
    TypeError, ValueError
        As `softmax`; also for several axes or None.

    Notes
    -----
    One read of `x`. The relative error is (24 + 3 d) 2^-24 at most, d a mean of (max - x) / temperature over the
    columns (2^-53 for float64); columns whose probability is below 2^-126 may count as 0.

    Examples
    --------
    >>> import numpy as np
    >>> from gpusoftmax import soft_argmax
    >>> soft_argmax(np.array([[0.0, 0.0, -np.inf, 0.0, 0.0], [-np.inf, -np.inf, -np.inf, 1.0, -np.inf]]))
    array([2., 3.])
    """
    try:
        arrays, options = _transform.split(temperature, bias, softcap, mask, n_valid)
        return _replay.call(_soft_argmax, (x, out, *arrays), axis, keepdims, dtype, *options)
    except _arrays.RequiresGrad as refusal:
        argument = refusal.argument
    transform = temperature, bias, softcap, mask, n_valid
    return _gradients.call("soft_argmax", argument, out, transform, x, axis, keepdims, dtype)


def _soft_argmax(x, out, temperatures, bias, mask, valid, axis, keepdims, dtype, *options):
    logits = _arrays.logits(x, "x")
    axes = _checks.one_axis(axis, logits.ndim)
    dtype = None if dtype is None else _checks.dtype_name(dtype)
    row_dtype = "float64" if logits.dtype == "float64" else "float32"
    expected = _arrays.output(out, logits, _rows.without_axes(logits, axes, keepdims), row_dtype, dtype)
    _checks.no_partial_overlap(expected, logits, "x")
    arrays, compute_dtype = (temperatures, bias, mask, valid), _arrays.compute_dtype(logits, expected)
    logits, temperature = _transform.applied(logits, axes, compute_dtype, arrays, options, expected)
    kernel = _arrays.kernels(logits.place, "soft_argmax").soft_argmax
    per_row = _rows.per_row(expected, axes, logits.ndim)
    _rows.for_rows(lambda *rows: kernel(*rows, temperature, logits.place), axes, [logits], [per_row])
    return _arrays.result(expected, out)


def soft_argmax_backward(
    x: Any,
    expected: Any,
    dexpected: Any,
    axis: int = -1,
    *,
    temperature: Any = 1.0,
    bias: Any = None,
    softcap: float | None = None,
    mask: Any = None,
    n_valid: Any = None,
    out: Any = None,
) -> Any:
    """Gradient with respect to `x` of `soft_argmax`, from its result and the gradient with respect to that.

    dx_c = dexpected p_c (c - expected) / temperature, where p = softmax(x / temperature) is computed anew.

    Parameters
    ----------
    x : array, shape (..., n_cols, ...)
        As given to `soft_argmax`.
    expected, dexpected : array, the shape of `x` without `axis`
        The result of `soft_argmax` and the gradient with respect to it: same dtype, library and device as each other,
        library and device those of `x`; any strides.
    axis, temperature, bias, softcap, mask, n_valid
        As given to `soft_argmax`. The gradient is that of `x` as it was given.
    out : array, optional
        Where to write the result; may be `x` itself.

    Returns
    -------
    array, the shape, dtype, kind and device of `x`

    Raises
    ------
    TypeError, ValueError
        As `soft_argmax`; also when the arrays differ in shape, dtype, library or device.

    Notes
    -----
    One read of `x` where a row can be held, and one write.

    Examples
    --------
    >>> import numpy as np
    >>> from gpusoftmax import soft_argmax_backward
    >>> soft_argmax_backward(np.zeros(3), np.array(1.0), np.array(3.0))
    array([-1.,  0.,  1.])
    """
    arrays, options = _transform.split(temperature, bias, softcap, mask, n_valid)
    return _replay.call(_soft_argmax_backward, (x, expected, dexpected, out, *arrays), axis, *options)


def _soft_argmax_backward(x, expected, dexpected, out, temperatures, bias, mask, valid, axis, *options):
    logits, mean, gradient = (
        _arrays.logits(array, name) for array, name in ((x, "x"), (expected, "expected"), (dexpected, "dexpected"))
    )
    axes = _checks.one_axis(axis, logits.ndim)
    batch_shape = _rows.without_axes(logits, axes)
    for array, name in ((mean, "expected"), (gradient, "dexpected")):
        _checks.same_home(logits, array, "x", name)
        _checks.same_shape(array, batch_shape, name, f"to match x {logits.shape} without axis {axis}")
    _checks.same_dtype(mean, gradient, "expected", "dexpected")
    result = _arrays.output(out, logits, logits.shape, logits.dtype)
    arrays, dtype = (temperatures, bias, mask, valid), _arrays.compute_dtype(logits, mean, result)
    logits, temperature = _transform.applied(logits, axes, dtype, arrays, options, result)
    _checks.temperature_fits(temperature, dtype)
    _checks.no_partial_overlap(result, logits, "x")
    _checks.no_overlap(result, mean, "expected")
    _checks.no_overlap(result, gradient, "dexpected")
    kernel = _arrays.kernels(logits.place, "soft_argmax").soft_argmax_backward
    per_row = [_rows.per_row(array, axes, logits.ndim) for array in (mean, gradient)]
    if logits.size:
        _rows.for_rows(lambda *rows: kernel(*rows, temperature, logits.place), axes, [logits, *per_row], [result])
    return _arrays.result(result, out)
