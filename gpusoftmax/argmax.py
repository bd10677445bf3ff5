"""The column of the largest logit."""

from typing import Any

from gpusoftmax import _arrays, _largest, _replay, _transform


def argmax(
    x: Any,
    axis: int | None = -1,
    *,
    keepdims: bool = False,
    temperature: Any = 1.0,
    bias: Any = None,
    softcap: float | None = None,
    mask: Any = None,
    n_valid: Any = None,
    out: Any = None,
) -> Any:
    """The index of the largest element of `x` along `axis`: the next token of greedy decoding.

    The default axis is the last one, -1; None means the flattened array, as in NumPy (whose default it is).

    Parameters
    ----------
    x : array, shape (..., n_cols, ...)
        As in `softmax`.
    axis : int or None
        Along which to look. None: the index counts elements in C order.
    keepdims : bool
        Keep the reduced axes with size 1.
    temperature, bias, softcap, mask, n_valid
        What `x` goes through before, as in `softmax`.
    out : array of int64, optional
        Where to write the result, which is then what is returned.

    Returns
    -------
    array of int64 or NumPy scalar, the shape of `x` without the reduced axis
        Of equal elements the first counts, and the first NaN before all numbers, as in NumPy and torch. 0 for a row of
        nothing but -inf.

    Raises
    ------
    TypeError
        As `softmax`; also for several axes, and for an `out` that is not int64.
    ValueError
        As `softmax`; also for rows without elements.

    Notes
    -----
    One read of `x`, whatever its strides.

    Examples
    --------
    >>> import numpy as np
    >>> from gpusoftmax import argmax
    >>> argmax(np.array([[0.0, 3.0, 3.0], [2.0, 1.0, np.nan]]))
    array([1, 2])
    """
    arrays, options = _transform.split(temperature, bias, softcap, mask, n_valid)
    try:
        return _replay.call(_largest.argmax, (x, out, *arrays), axis, keepdims, *options)
    except _arrays.RequiresGrad as refusal:
        if refusal.argument != "x":
            raise
        return _replay.call(
            _largest.argmax, (x.detach(), out, *arrays), axis, keepdims, *options
        )  # indices have no gradient
