"""Logits outside of top-k or top-p become -inf."""

from typing import Any

from gpusoftmax import _arrays, _checks, _own_numbers, _replay, _rows, _transform
from gpusoftmax.kernels.operands import Limits


def top_k_mask_logits(
    logits: Any,
    top_k: Any,
    axis: int | tuple[int, ...] | None = -1,
    *,
    mask: Any = None,
    n_valid: Any = None,
    out: Any = None,
) -> Any:
    """`logits` with -inf for all but the `top_k` largest along `axis`.

    The default axis is the last one, -1; None means all axes. All logits that equal the last of the largest stay, so
    that the result does not depend on their order.

    Parameters
    ----------
    logits : array, shape (..., n_cols, ...)
        float16, bfloat16, float32 or float64, of NumPy, CuPy, torch or JAX, with any strides. Never modified unless it
        is also `out`.
    top_k : int, or array of integers, the shape of `logits` without `axis`
        How many stay; all do if there are no more. One number for all rows, or one for each, where 0 or less stands for
        all.
    axis : int, tuple of int or None
        Along which they are counted. A tuple of axes that no single stride walks costs one copy.
    mask, n_valid
        Which logits there are, as in `softmax`: the others become -inf whatever they hold, and are not counted.
    out : array, optional
        Where to write the result, which is then what is returned. It decides the dtype. It may be `logits` itself.

    Returns
    -------
    array, the shape, dtype, kind and device of `logits`
        NaN stays NaN and is not counted, unless it is masked.

    Raises
    ------
    TypeError
        Unsupported dtype; `top_k` neither int nor array of integers; arrays of another library or device than
        `logits`; a torch tensor that requires grad.
    ValueError
        Bad axis; `top_k` below 1; `out` of the wrong shape, read-only, or overlapping `logits` in part.

    Examples
    --------
    >>> import numpy as np
    >>> from gpusoftmax import top_k_mask_logits
    >>> top_k_mask_logits(np.array([3.0, 1.0, 2.0]), 2)
    array([  3., -inf,   2.])
    """
    return _masked(logits, out, mask, n_valid, axis, 1.0, top_k, None)


def top_p_mask_logits(
    logits: Any,
    top_p: Any,
    axis: int | tuple[int, ...] | None = -1,
    *,
    temperature: Any = 1.0,
    mask: Any = None,
    n_valid: Any = None,
    out: Any = None,
) -> Any:
    """`logits` with -inf for all but the fewest largest whose probabilities add up to `top_p` or more.

    Nucleus sampling: Holtzman et al., arXiv:1904.09751. The default axis is the last one, -1; None means all axes. All
    logits that equal the last of the largest stay.

    Parameters
    ----------
    logits, axis, mask, n_valid, out
        As in `top_k_mask_logits`.
    top_p : float above 0, at most 1, or array of floats, the shape of `logits` without `axis`
        The part of the probability that stays, within 1e-6. One number for all rows, or one for each.
    temperature : float, or array of floats likewise
        Divides the logits for the probabilities; the result is not divided.

    Returns
    -------
    array, the shape, dtype, kind and device of `logits`
        NaN stays NaN and is not counted. A row that holds +inf, and so has no probabilities, stays as it is. Of a row
        whose own number is none that could be given for all rows, a `top_p` of 2, no finite logit stays.

    Raises
    ------
    TypeError, ValueError
        As `top_k_mask_logits`; bad temperature or `top_p`.

    Examples
    --------
    >>> import numpy as np
    >>> from gpusoftmax import top_p_mask_logits
    >>> top_p_mask_logits(np.log([0.6, 0.1, 0.3]), 0.8).round(1)
    array([-0.5, -inf, -1.2])
    """
    return _masked(logits, out, mask, n_valid, axis, temperature, None, top_p)


def _masked(logits, out, mask, n_valid, axis, temperature, top_k, top_p):
    (_, _, mask, valid), transform = _transform.split(1.0, None, None, mask, n_valid)
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    arrays, of_all = zip(*(_own_numbers.split(one, name) for name, one in given.items()), strict=True)
    return _replay.call(_mask, (logits, out, mask, valid, *arrays), axis, *of_all, *transform)


def _mask(logits, out, mask, valid, temperatures, top_ks, top_ps, axis, temperature, top_k, top_p, *transform):
    x = _arrays.logits(logits, "logits")
    axes = _checks.axes(axis, x.ndim)
    masked = _arrays.output(out, x, x.shape, x.dtype)
    dtype = _arrays.compute_dtype(x, masked)
    numbers = {
        "temperature": _own_numbers.floats(temperatures, "temperature", x, axes, dtype, masked)
        or _checks.temperature(temperature),
        "top_k": _own_numbers.integers(top_ks, "top_k", x, axes, masked) or _checks.top_k(top_k),
        "top_p": _own_numbers.floats(top_ps, "top_p", x, axes, dtype, masked) or _checks.top_p(top_p),
    }
    arrays = {name: one for name, one in numbers.items() if isinstance(one, _arrays.Array)}
    if temperatures is None:
        _checks.temperature_fits(numbers["temperature"], dtype)
    x, _ = _transform.applied(x, axes, dtype, (None, None, mask, valid), transform, masked, "logits")
    _checks.no_partial_overlap(masked, x, "logits")
    kernel = _arrays.kernels(x.place, "mask_logits").mask_logits

    def rows_of_batch(rows, x_rows, *others):
        *given, masked_rows = others
        own = {**numbers, **dict(zip(arrays, given, strict=True))}
        kernel(rows, x_rows, masked_rows, own["temperature"], Limits(own["top_k"], own["top_p"]), x.place)

    if x.size:
        _rows.for_rows(rows_of_batch, axes, [x, *arrays.values()], [masked])
    return _arrays.result(masked, out)
