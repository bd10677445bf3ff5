"""Log-softmax and its backward."""

from typing import Any

from gpusoftmax import _arrays, _checks


def log_softmax(
    x: Any,
    axis: int | tuple[int, ...] | None = -1,
    *,
    temperature: float = 1.0,
    dtype: Any = None,
    out: Any = None,
) -> Any:
    """Logarithm of the softmax of `x` along `axis`, in nats, without taking the logarithm of a rounded probability.

    The default axis is the last one, -1; None means all axes, as in SciPy (whose default it is).

    Parameters
    ----------
    x, axis, temperature, dtype, out
        As in `softmax`.

    Returns
    -------
    array, the shape, kind and device of `x`
        Log-probabilities, none above 0. A logit of -inf gives -inf. A row that holds NaN, +inf or nothing but -inf is
        NaN.

    Raises
    ------
    TypeError, ValueError
        As `softmax`.

    Notes
    -----
    Confident rows keep their small values: where one logit leads by 30, its log-probability is about -1e-13, not 0.
    For float32 results, log_softmax(x)[target] equals -cross_entropy(x, target, reduction="none") bit for bit.

    Examples
    --------
    >>> import numpy as np
    >>> from gpusoftmax import log_softmax
    >>> log_softmax(np.array([40.0, 0.0]))
    array([-4.24835426e-18, -4.00000000e+01])
    """
    logits = _arrays.logits(x, "x")
    axes = _checks.axes(axis, logits.ndim)
    temperature = _checks.temperature(temperature)
    dtype = None if dtype is None else _checks.dtype_name(dtype)
    log_probs = _arrays.output(out, logits, logits.shape, logits.dtype, dtype)
    _checks.no_partial_overlap(log_probs, logits, "x")
    kernel = _arrays.kernels(logits.place, "log_softmax").log_softmax
    if logits.size:
        _arrays.for_rows(
            lambda rows, x, log_probs: kernel(rows, x, log_probs, temperature, logits.place),
            axes,
            [logits],
            [log_probs],
        )
    return _arrays.result(log_probs, out)


def log_softmax_backward(
    log_probs: Any,
    dlog_probs: Any,
    axis: int | tuple[int, ...] | None = -1,
    *,
    temperature: float = 1.0,
    out: Any = None,
) -> Any:
    """Gradient with respect to the logits of `log_softmax`, from its result and the gradient with respect to that.

    dlogits = (dlog_probs - exp(log_probs) * sum(dlog_probs)) / temperature

    Parameters
    ----------
    log_probs, dlog_probs : array, shape (..., n_cols, ...)
        The log-softmax and the gradient with respect to it: same shape, dtype, library and device; any strides.
    axis, temperature
        As given to `log_softmax`.
    out : array, optional
        Where to write the result; may be `log_probs` or `dlog_probs` itself.

    Returns
    -------
    array, the shape, dtype, kind and device of `log_probs`

    Raises
    ------
    TypeError, ValueError
        As `softmax_backward`.

    Examples
    --------
    >>> import numpy as np
    >>> from gpusoftmax import log_softmax_backward
    >>> log_softmax_backward(np.log([0.25, 0.75]), np.array([1.0, 0.0]))
    array([ 0.75, -0.75])
    """
    log_p = _arrays.logits(log_probs, "log_probs")
    dlog_p = _arrays.logits(dlog_probs, "dlog_probs")
    _checks.same_home(log_p, dlog_p, "log_probs", "dlog_probs")
    _checks.same_dtype(log_p, dlog_p, "log_probs", "dlog_probs")
    _checks.same_shape(dlog_p, log_p.shape, "dlog_probs", "to match log_probs")
    axes = _checks.axes(axis, log_p.ndim)
    temperature = _checks.temperature(temperature)
    dlogits = _arrays.output(out, log_p, log_p.shape, log_p.dtype)
    _checks.no_partial_overlap(dlogits, log_p, "log_probs")
    _checks.no_partial_overlap(dlogits, dlog_p, "dlog_probs")
    kernel = _arrays.kernels(log_p.place, "log_softmax").log_softmax_backward
    if log_p.size:
        _arrays.for_rows(
            lambda rows, p_rows, dp_rows, dlogits: kernel(rows, p_rows, dp_rows, dlogits, temperature, log_p.place),
            axes,
            [log_p, dlog_p],
            [dlogits],
        )
    return _arrays.result(dlogits, out)
