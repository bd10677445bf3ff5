"""The most likely tokens of each row with their log-probabilities."""

from typing import Any, NamedTuple

import array_api_compat

from gpusoftmax import _arrays, _checks, _gradients, _replay, _rows, _tokens, _transform
from gpusoftmax.kernels.operands import Labels

_ON_CHIP = 64
"""Tokens of a row that the kernels keep while they read it. To sort the row is quicker for more on a GPU,"""
_SHARE = 8
"""and on a CPU for more than one in so many: there that takes sixteen bytes for each logit, too (Zen 5, 200 of 151936
float16: 0.14 ms, and 23 to sort them; half of them: 15 and 13).
"""


class TopLogprobs(NamedTuple):
    """What `top_logprobs` returns."""

    logprob: Any
    token: Any


def top_logprobs(
    logits: Any,
    k: int,
    target: Any = None,
    *,
    axis: int = -1,
    temperature: Any = 1.0,
    bias: Any = None,
    softcap: float | None = None,
    mask: Any = None,
    n_valid: Any = None,
    ignore_index: int = -100,
    validate: bool | None = None,
) -> TopLogprobs:
    """The `k` most likely tokens of each row with their log-probabilities, in nats; before them the target's.

    A row runs along `axis`, by default the last one. Up to 64 tokens, on the CPU an eighth of the row, are found in the
    read that computes the log-probabilities, and so are more where logits go through anything but one temperature;
    else, for more, rows are sorted by the arrays' own library.

    Parameters
    ----------
    logits : array, shape (..., n_cols, ...)
        float16, bfloat16, float32 or float64, of NumPy, CuPy, torch or JAX, with any strides. Not modified.
    k : int, 1 to n_cols
        How many tokens.
    target : array of integers, the shape of `logits` without `axis`, optional
        A token of each row whose log-probability comes first, whether or not it is among the most likely: what was
        sampled, as vLLM orders it.
    axis, temperature, bias, softcap, mask, n_valid, ignore_index, validate
        As in `token_logprobs`.

    Returns
    -------
    TopLogprobs
        A named tuple of two arrays, of the kind and on the device of `logits`, with the shape of `logits` without
        `axis` and one axis of length k, or 1 + k with a target, at the end:

        logprob : float32 (float64 for float64 logits)
            In descending order; log_softmax(logits / temperature)[token], bit for bit. Differentiable where torch's
            `logits` require grad.
        token : int64
            Of tokens with equal logits the lower comes first. -1 in a row that holds NaN, but for the target.

    Raises
    ------
    IndexError
        A target out of range, see `token_logprobs`.
    TypeError, ValueError
        As `token_logprobs`; also for a `k` that is no int from 1 to n_cols.

    Examples
    --------
    >>> import numpy as np
    >>> from gpusoftmax import top_logprobs
    >>> top = top_logprobs(np.log([[0.5, 0.125, 0.25, 0.125]]), 3)
    >>> np.exp(top.logprob).round(3), top.token
    (array([[0.5  , 0.25 , 0.125]]), array([[0, 2, 1]]))
    """
    try:
        arrays, options = _transform.split(temperature, bias, softcap, mask, n_valid)
        call = _top_logprobs, (logits, target, *arrays), k, axis, ignore_index, validate
        return TopLogprobs(*_replay.call(*call, *options))
    except _arrays.RequiresGrad as refusal:
        argument = refusal.argument
    transform = temperature, bias, softcap, mask, n_valid
    given = logits, k, target, axis, ignore_index, validate
    return TopLogprobs(*_gradients.call("top_logprobs", argument, None, transform, *given))


def _top_logprobs(
    logits, target, temperatures, bias, mask, valid, k, axis, ignore_index, validate, *transform
):  # fmt: skip
    x, labels, axes, ignore_index = _tokens.checked(logits, target, axis, ignore_index, validate, needs_target=False)
    k = _checks.token_count(k, x.shape[axes[0]])
    batch_shape = _rows.without_axes(x, axes)
    dtype = _arrays.compute_dtype(x)
    arrays = temperatures, bias, mask, valid
    x, temperature = _transform.applied(x, axes, dtype, arrays, transform, name="logits")
    _checks.temperature_fits(temperature, dtype)
    if labels is not None:
        _checks.same_shape(labels, batch_shape, "target", f"to match logits {x.shape} without axis {axis}")
    most = max(_ON_CHIP, x.shape[axes[0]] // _SHARE) if x.place.target == "cpu" else _ON_CHIP
    if k > most and x.kind != "device" and x.transform is None:  # logits would be sorted as they were given
        return _sorted(logits, labels, k, x, axes[0], ignore_index, arrays, transform)
    shape = (*batch_shape, k if labels is None else 1 + k)
    logprobs, tokens = _arrays.empty(x, shape, dtype), _arrays.empty(x, shape, "int64")
    kernel = _arrays.kernels(x.place, "top_logprobs").top_logprobs
    per_row = [labels] if labels is not None else []
    per_row += [_rows.part(array, 0) for array in (logprobs, tokens)]
    reads, writes = per_row[:-2], per_row[-2:]

    def rows_of_batch(rows, x_rows, *others):
        *given, logprob_rows, token_rows = others
        label_rows = given[0] if given else Labels(0, 0, 0, 0)
        kernel(rows, x_rows, label_rows, logprob_rows, token_rows, k, ignore_index, temperature, x.place)

    _rows.for_rows(
        rows_of_batch,
        axes,
        [x, *(_rows.per_row(array, axes, x.ndim) for array in reads)],
        [_rows.per_row(array, axes, x.ndim) for array in writes],
    )
    return _arrays.result(logprobs), _arrays.result(tokens)


def _sorted(logits, labels, k, x, axis, ignore_index, arrays, transform):
    """What `top_logprobs` returns, by sorting in the library of the arrays."""
    rows = _in_library(x)
    library = array_api_compat.array_namespace(rows)
    rows = library.moveaxis(rows, axis, -1)
    tokens = library.argsort(rows, axis=-1, descending=True, stable=True)[..., :k]
    tokens = library.where(library.any(library.isnan(rows), axis=-1)[..., None], -1, tokens)
    no_index = -(2**63)  # a token is never ignored here
    logprobs = _tokens.token_logprobs(logits, tokens, *arrays, axis, no_index, *_NOTHING_ELSE, *transform)[0]
    if labels is None:
        return logprobs, tokens
    target = _in_library(labels)  # what the caller gave may be of no library: of DLPack alone
    given = _tokens.token_logprobs(logits, target, *arrays, axis, ignore_index, *_NOTHING_ELSE, *transform)[0]
    of_target = library.asarray(target)[..., None], library.asarray(given)[..., None]
    return (
        library.concat([of_target[1], logprobs], axis=-1),
        library.concat([library.astype(of_target[0], tokens.dtype), tokens], axis=-1),
    )


def _in_library(array):
    return array.owner[0] if array.kind == "jax" else array.owner


_NOTHING_ELSE = (False,) * 5
"""No other result, and no check of labels, of which those of the caller have been checked."""
