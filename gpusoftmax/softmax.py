"""Softmax and the products with its Jacobian."""

from typing import Any

from gpusoftmax import _arrays, _checks, _gradients, _largest, _replay, _rowwise, _transform


def softmax(
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
    """Softmax of `x` along `axis`: exp(x / temperature) divided by its sum.

    On the way there, a bias may be added to the logits, a bound be put on them, and a mask leave some of them out. The
    default axis is the last one, -1; None means all axes, as in SciPy (whose default it is).

    Parameters
    ----------
    x : array, shape (..., n_cols, ...)
        Logits: float16, bfloat16, float32 or float64, of NumPy, CuPy, torch or JAX, with any strides. Integers, bools
        and lists become float64. Half types are computed in float32. Never modified unless it is also `out`.
    axis : int, tuple of int or None
        Along which the results sum to 1. A tuple of axes that no single stride walks costs one copy.
    temperature : float, or array with the shape of `x` without `axis`
        Divides the logits; finite and above 0. An array has one for each row, and rows where it is not are NaN. A
        single 0 stands for the argmax: all the probability is where the largest logit is, the first of equal ones
        (but for logits that lie less than 4e-37 below it, 1e-298 in float64, which keep some).
    bias : array, optional
        Is added next: one for each column, shape (n_cols,), or the shape of `x`, where sizes of 1 stand for all.
    softcap : float, optional
        Bounds what comes of that: softcap * tanh(logit / softcap).
    mask : array of bool, or of int32 with a bit for each column, optional
        True, or 1, keeps a logit; the others count as -inf, last of all. Shaped as `bias`; with bits, the axis has
        ceil(n_cols / 32) words, and the lowest bit of a word is its first column, as grammar engines have it.
    n_valid : int, or array of integers with the shape of `x` without `axis`, optional
        How many columns of each row count, from the first on: of a padded vocabulary, or of rows of unequal lengths.
    empty_row : "nan" or "zero"
        What becomes of a row of which nothing is left: NaN, or zeros.
    dtype : dtype, optional
        Of the result; by default that of `x`. float64 is also computed in float64.
    out : array, optional
        Where to write the result, which is then what is returned. It decides the dtype. It may be `x` itself.

    Returns
    -------
    array, the shape, kind and device of `x`
        Probabilities. A logit of -inf gives exactly 0. A row that holds NaN, +inf or nothing but -inf is NaN. Of a
        torch tensor that requires grad they are differentiable, see gpusoftmax.torch.

    Raises
    ------
    TypeError
        Unsupported dtype; `out` of another library or device than `x`; `out` and a different `dtype`; `out` where a
        torch tensor requires grad.
    ValueError
        Bad axis, temperature, softcap or n_valid; `bias` or `mask` of the wrong shape; axes that no single stride walks
        with a temperature of 0 or of each row, bias, softcap, mask or n_valid; `out` of the wrong shape, read-only, or
        overlapping `x` in part or anything else that is read.

    Notes
    -----
    The row that is read goes through scale, bias, softcap and mask on its way into registers, and whatever is not given
    costs nothing. With bias, softcap or a temperature for each row a logit is divided by the temperature first, which
    may overflow; else the maximum is subtracted before, so that the smallest temperature overflows nothing.

    A row has the same bits whatever the batch around it, its strides and its alignment. One pass finds maximum and sum
    together: Milakov and Gimelshein, arXiv:1805.02867, algorithm 3.

    Examples
    --------
    >>> import numpy as np
    >>> from gpusoftmax import softmax
    >>> softmax(np.array([[0.0, 0.0], [1.0, -np.inf]]))
    array([[0.5, 0.5],
           [1. , 0. ]])
    """
    result = _rowwise.small("softmax", x, axis, dtype, out, temperature, bias, softcap, mask, n_valid, empty_row)
    if result is not None:
        return result
    transform = temperature, bias, softcap, mask, n_valid, empty_row
    try:
        temperature = _transform.number(temperature, "temperature")
        if _checks.is_zero(temperature) and _arrays.logits(x, "x").size:
            # Of the columns up to the first of the largest, none but this one is as large. A row without has none.
            arrays, options = _transform.split(1.0, bias, softcap, mask, n_valid)
            first = _replay.call(_largest.along_axes, (x, None, *arrays), axis, False, *options)
            n_valid = _arrays.next_integer(first, n_valid)
        through = temperature, bias, softcap, mask, n_valid, empty_row
        return _rowwise.forward("softmax", x, axis, dtype, out, through, any_temperature=True)
    except _arrays.RequiresGrad as refusal:
        argument = refusal.argument
    return _gradients.call("softmax", argument, out, transform, x, axis, dtype)


def softmax_backward(
    probs: Any,
    dprobs: Any,
    axis: int | tuple[int, ...] | None = -1,
    *,
    temperature: Any = 1.0,
    out: Any = None,
) -> Any:
    """Gradient with respect to the logits of `softmax`, from its result and the gradient with respect to that.

    dlogits = probs * (dprobs - sum(probs * dprobs)) / temperature: the product of dprobs with the Jacobian, whose entry
    (i, j), the derivative of probs_i with respect to logit j, is probs_i ([i = j] - probs_j) / temperature. It is not
    formed.

    Parameters
    ----------
    probs, dprobs : array, shape (..., n_cols, ...)
        The softmax and the gradient with respect to it: same shape, dtype, library and device; any strides.
    axis, temperature
        As given to `softmax`; a temperature for each row makes the row NaN where it is not finite and above 0.
    out : array, optional
        Where to write the result; may be `probs` or `dprobs` itself.

    Returns
    -------
    array, the shape, dtype, kind and device of `probs`

    Raises
    ------
    TypeError, ValueError
        As `softmax`; also when `probs` and `dprobs` differ in shape, dtype, library or device.

    Notes
    -----
    What else `softmax` may have done to the logits: a bias changes nothing here, and what was masked has the
    probability and so the gradient 0. Under a softcap the result is to be multiplied by 1 - (z / softcap)^2, where z
    are the logits after it: one pass more, by the arrays' own library, which gpusoftmax.torch adds by itself.

    Examples
    --------
    >>> import numpy as np
    >>> from gpusoftmax import softmax_backward
    >>> softmax_backward(np.array([0.5, 0.5]), np.array([1.0, 0.0]))
    array([ 0.25, -0.25])
    """
    names = ("probs", "dprobs")
    try:
        return _rowwise.backward("softmax", probs, dprobs, names, axis, temperature, out)
    except _arrays.RequiresGrad as refusal:
        argument = refusal.argument
    return _gradients.call("softmax_backward", argument, out, (), probs, dprobs, names, axis, temperature)


def softmax_jvp(
    probs: Any,
    tangent: Any,
    axis: int | tuple[int, ...] | None = -1,
    *,
    temperature: Any = 1.0,
    out: Any = None,
) -> Any:
    """How the result of `softmax` changes when its logits move along `tangent`: forward-mode differentiation.

    dprobs = J tangent, with the Jacobian J = (diag(probs) - probs probs^T) / temperature. J is symmetric, so this is
    the product that `softmax_backward` computes, by the same kernel and with the same bits.

    Parameters
    ----------
    probs, tangent : array, shape (..., n_cols, ...)
        The softmax and the direction of the logits: same shape, dtype, library and device; any strides.
    axis, temperature
        As given to `softmax`.
    out : array, optional
        Where to write the result; may be `probs` or `tangent` itself.

    Returns
    -------
    array, the shape, dtype, kind and device of `probs`

    Raises
    ------
    TypeError, ValueError
        As `softmax_backward`.

    Examples
    --------
    >>> import numpy as np
    >>> from gpusoftmax import softmax_jvp
    >>> softmax_jvp(np.array([0.5, 0.5]), np.array([1.0, 0.0]))
    array([ 0.25, -0.25])
    """
    names = ("probs", "tangent")
    try:
        return _rowwise.backward("softmax", probs, tangent, names, axis, temperature, out)
    except _arrays.RequiresGrad as refusal:
        argument = refusal.argument
    return _gradients.call("softmax_backward", argument, out, (), probs, tangent, names, axis, temperature)
