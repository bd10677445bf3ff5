"""Softmax over the largest logits of each row: how a mixture of experts routes its tokens."""

from typing import Any, NamedTuple

from gpusoftmax import _arrays, _checks, _gradients, _replay, _rows, _transform


class TopkSoftmax(NamedTuple):
    """What `topk_softmax` returns."""

    probs: Any
    indices: Any


def topk_softmax(
    logits: Any,
    k: int,
    *,
    axis: int = -1,
    temperature: Any = 1.0,
    bias: Any = None,
    softcap: float | None = None,
    mask: Any = None,
    n_valid: Any = None,
    renormalize: bool = True,
) -> TopkSoftmax:
    """The softmax over the `k` largest logits of each row, and which columns they are.

    A row runs along `axis`, by default the last one. It is read once, and k is small: for each of the k columns a GPU
    looks again at a part of the row, which it has on chip as a rule.

    Parameters
    ----------
    logits : array, shape (..., n_cols, ...)
        float16, bfloat16, float32 or float64, of NumPy, CuPy, torch or JAX, with any strides. Not modified.
    k : int, 1 to n_cols
        How many columns: the experts of a token, for instance.
    axis : int
        The axis along which rows run.
    temperature, bias, softcap, mask, n_valid
        What the logits go through before, as in `softmax`.
    renormalize : bool
        The k probabilities of a row add up to 1, as where vLLM's `topk_softmax` renormalises. False: they are those
        that the columns have among all.

    Returns
    -------
    TopkSoftmax
        A named tuple of two arrays, of the kind and on the device of `logits`, with the shape of `logits` without
        `axis` and one axis of length k at the end:

        probs : float32 (float64 for float64 logits)
            In descending order. Without renormalisation softmax(logits / temperature) in that dtype, bit for bit. NaN
            in a row that has no softmax. Differentiable where torch's `logits` require grad, of which columns that are
            not among the k have the gradient 0 if they are renormalised.
        indices : int64
            The columns; of those with equal logits the lower comes first. -1 in a row that has no softmax: it holds NaN
            or +inf, or nothing but -inf.

    Raises
    ------
    TypeError
        Unsupported dtypes; a `k` that is no int.
    ValueError
        Bad axis or temperature; a `k` that is not from 1 to n_cols.

    Notes
    -----
    The router of sparsely gated mixtures of experts: Shazeer et al., 2017, arXiv:1701.06538, section 2.1 (equations 3
    to 5 without the noise) has the renormalised one; Fedus et al., 2021, arXiv:2101.03961 the other.

    Examples
    --------
    >>> import numpy as np
    >>> from gpusoftmax import topk_softmax
    >>> logits = np.log([[0.5, 0.125, 0.25, 0.125]])
    >>> probs, indices = topk_softmax(logits, 2)
    >>> probs.round(3), indices
    (array([[0.667, 0.333]]), array([[0, 2]]))
    >>> topk_softmax(logits, 2, renormalize=False).probs.round(3)
    array([[0.5 , 0.25]])
    """
    try:
        arrays, options = _transform.split(temperature, bias, softcap, mask, n_valid)
        return TopkSoftmax(*_replay.call(_topk_softmax, (logits, *arrays), k, axis, renormalize, *options))
    except _arrays.RequiresGrad as refusal:
        argument = refusal.argument
    transform = temperature, bias, softcap, mask, n_valid
    return TopkSoftmax(*_gradients.call("topk_softmax", argument, None, transform, logits, k, axis, renormalize))


def _topk_softmax(logits, temperatures, bias, mask, valid, k, axis, renormalize, *options):
    x = _arrays.logits(logits, "logits")
    axes = _checks.class_axis(axis, x.ndim)
    k = _checks.token_count(k, x.shape[axes[0]])
    dtype = _arrays.compute_dtype(x)
    arrays = temperatures, bias, mask, valid
    x, temperature = _transform.applied(x, axes, dtype, arrays, options, name="logits")
    _checks.temperature_fits(temperature, dtype)
    shape = (*_rows.without_axes(x, axes), k)
    probs, indices = _arrays.empty(x, shape, dtype), _arrays.empty(x, shape, "int64")
    kernel = _arrays.kernels(x.place, "topk_softmax").topk_softmax
    _rows.for_rows(
        lambda *rows: kernel(*rows, k, bool(renormalize), temperature, x.place),
        axes,
        [x],
        [_rows.per_row(_rows.part(array, 0), axes, x.ndim) for array in (probs, indices)],
    )
    return _arrays.result(probs), _arrays.result(indices)
