"""Log-sum-exp."""

from typing import Any

from gpusoftmax import _arrays, _checks, _gradients, _replay, _rows, _transform


def logsumexp(
    x: Any,
    axis: int | tuple[int, ...] | None = -1,
    *,
    keepdims: bool = False,
    temperature: Any = 1.0,
    bias: Any = None,
    softcap: float | None = None,
    mask: Any = None,
    n_valid: Any = None,
    dtype: Any = None,
    out: Any = None,
) -> Any:
    """log(sum(exp(x / temperature))) along `axis`, in nats, without overflow.

    The default axis is the last one, -1; None means all axes, as in SciPy (whose default it is).

    Parameters
    ----------
    x, axis, temperature, bias, softcap, mask, n_valid
        As in `softmax`.
    keepdims : bool
        Keep the reduced axes with size 1.
    dtype : dtype, optional
        Of the result; by default float32, float64 for float64 (half types would lose most of the digits).
    out : array, optional
        Where to write the result, which is then what is returned. It decides the dtype.

    Returns
    -------
    array or NumPy scalar, the shape of `x` without the reduced axes
        -inf for a row without columns or with nothing but -inf; +inf for a row that holds +inf; NaN for one with NaN.

    Raises
    ------
    TypeError, ValueError
        As `softmax`.

    Examples
    --------
    >>> import numpy as np
    >>> from gpusoftmax import logsumexp
    >>> float(logsumexp(np.array([1000.0, 1000.0])) - 1000.0)
    0.69314718055989...
    """
    try:
        arrays, options = _transform.split(temperature, bias, softcap, mask, n_valid)
        return _replay.call(_logsumexp, (x, out, *arrays), axis, keepdims, dtype, *options)
    except _arrays.RequiresGrad as refusal:
        argument = refusal.argument
    transform = temperature, bias, softcap, mask, n_valid
    return _gradients.call("logsumexp", argument, out, transform, x, axis, keepdims, dtype)


def _logsumexp(x, out, temperatures, bias, mask, valid, axis, keepdims, dtype, *options):
    logits = _arrays.logits(x, "x")
    axes = _checks.axes(axis, logits.ndim)
    dtype = None if dtype is None else _checks.dtype_name(dtype)
    row_dtype = "float64" if logits.dtype == "float64" else "float32"
    shape = _rows.without_axes(logits, axes, keepdims)
    lse = _arrays.output(out, logits, shape, row_dtype, dtype)
    compute_dtype = _arrays.compute_dtype(logits, lse)
    arrays = temperatures, bias, mask, valid
    logits, temperature = _transform.applied(logits, axes, compute_dtype, arrays, options, lse)
    _checks.temperature_fits(temperature, compute_dtype)
    _checks.no_partial_overlap(lse, logits, "x")
    kernel = _arrays.kernels(logits.place, "logsumexp").logsumexp
    per_row = _rows.per_row(lse, axes, logits.ndim)
    _rows.for_rows(lambda *rows: kernel(*rows, temperature, logits.place), axes, [logits], [per_row])
    return _arrays.result(lse, out)
