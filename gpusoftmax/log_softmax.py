"""Log-softmax and its backward."""

from typing import Any

from gpusoftmax import _arrays, _gradients, _rowwise


def log_softmax(
    x: Any,
    axis: int | tuple[int, ...] | None = -1,
    *,
    temperature: Any = 1.0,
    bias: Any = None,
    softcap: float | None = None,
    mask: Any = None,
    n_valid: Any = None,
    empty_row: str = "nan",
    dtype: Any = None,
    out: Any = None,
) -> Any:
    """Logarithm of the softmax of `x` along `axis`, in nats, without taking the logarithm of a rounded probability.

    The default axis is the last one, -1; None means all axes, as in SciPy (whose default it is).

    Parameters
    ----------
    x, axis, temperature, bias, softcap, mask, n_valid, dtype, out
        As in `softmax`.
    empty_row : "nan" or "zero"
        What becomes of a row of which nothing is left: NaN, or -inf, the logarithm of zero.

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
    result = _rowwise.small("log_softmax", x, axis, dtype, out, temperature, bias, softcap, mask, n_valid, empty_row)
    if result is not None:
        return result
    transform = temperature, bias, softcap, mask, n_valid, empty_row
    try:
        return _rowwise.forward("log_softmax", x, axis, dtype, out, transform)
    except _arrays.RequiresGrad as refusal:
        argument = refusal.argument
    return _gradients.call("log_softmax", argument, out, transform, x, axis, dtype)


def log_softmax_backward(
    log_probs: Any,
    dlog_probs: Any,
    axis: int | tuple[int, ...] | None = -1,
    *,
    temperature: Any = 1.0,
    out: Any = None,
) -> Any:
    """Gradient with respect to the logits of `log_softmax`, from its result and the gradient with respect to that.

    dlogits = (dlog_probs - exp(log_probs) * sum(dlog_probs)) / temperature

    Parameters
    ----------
    log_probs, dlog_probs : array, shape (..., n_cols, ...)
        The log-softmax and the gradient with respect to it: same shape, dtype, library and device; any strides.
    axis, temperature
        As given to `log_softmax`; a temperature for each row makes the row NaN where it is not finite and above 0.
    out : array, optional
        Where to write the result; may be `log_probs` or `dlog_probs` itself.

    Returns
    -------
    array, the shape, dtype, kind and device of `log_probs`

    Raises
    ------
    TypeError, ValueError
        As `softmax_backward`.

    Notes
    -----
    A column that was masked, whose log-probability is -inf, gets dlog_probs / temperature, as one of any other -inf: to
    be set to 0 by the caller. Its dlog_probs counts in the sum, too. For a softcap see `softmax_backward`.

    Examples
    --------
    >>> import numpy as np
    >>> from gpusoftmax import log_softmax_backward
    >>> log_softmax_backward(np.log([0.25, 0.75]), np.array([1.0, 0.0]))
    array([ 0.75, -0.75])
    """
    names = ("log_probs", "dlog_probs")
    try:
        return _rowwise.backward("log_softmax", log_probs, dlog_probs, names, axis, temperature, out)
    except _arrays.RequiresGrad as refusal:
        argument = refusal.argument
    return _gradients.call("log_softmax_backward", argument, out, (), log_probs, dlog_probs, axis, temperature)
