"""Sampling from rows of logits."""

from typing import Any, NamedTuple

import numpy as np

from gpusoftmax import _arrays, _checks, _gradients, _own_numbers, _replay, _rows, _tokens, _transform
from gpusoftmax.kernels.operands import Limits, one_value


class Sample(NamedTuple):
    """What `sample` returns if more than the columns is asked for; None for what is not."""

    index: Any
    logprob: Any = None
    entropy: Any = None


def sample(
    logits: Any,
    axis: int = -1,
    *,
    temperature: Any = 1.0,
    top_k: Any = None,
    top_p: Any = None,
    min_p: Any = None,
    bias: Any = None,
    softcap: float | None = None,
    mask: Any = None,
    n_valid: Any = None,
    rng: Any,
    return_logprob: bool = False,
    return_entropy: bool = False,
) -> Any:
    """An index for each row of `logits`, drawn with the probabilities of softmax(logits / temperature).

    Rows run along `axis`; the default is the last one, -1. Columns may be left out, in this order, as in vLLM: by
    `top_k`, by `top_p` of what is left, by `min_p`.

    Parameters
    ----------
    logits : array, shape (..., n_cols, ...)
        float16, bfloat16, float32 or float64, of NumPy, CuPy, torch or JAX, with any strides. Not modified.
    axis : int
        The axis of the classes.
    temperature : float or array of floats
        Divides the logits; finite. 0 takes the largest logit, the first of equal ones, whatever the limits. Like the
        limits below, one number for all rows or an array of one for each row (the shape of `logits` without `axis`),
        which lives where `logits` does: requests of different kinds in one batch.
    top_k : int or array of integers, optional
        Only the so many largest logits are drawn. All that equal the last of these are among them. In an array 0 or
        less stands for all.
    top_p : float above 0, at most 1, or array of floats, optional
        Only the fewest largest logits whose probabilities add up to this or more are drawn (nucleus sampling: Holtzman
        et al., arXiv:1904.09751), with all that equal the last of these.
    min_p : float, 0 to 1, or array of floats, optional
        Only columns are drawn whose probability is at least this times the largest (Nguyen et al., arXiv:2407.01082).
    bias, softcap, mask, n_valid
        What the logits go through before, as in `softmax`; columns are left out of what comes of it. At temperature 0
        logits are not divided first. With bias or softcap, temperatures in an array have to be above 0.
    rng : seed or (seed, step)
        Each an int or an array of integers, which has one for each row (the shape of `logits` without `axis`) or a
        single element, and lives where `logits` does. A step is what tells the draws of one seed apart, 0 where none is
        given: the position of a token in its sequence, for instance. In arrays, both may change between the replays of
        a CUDA graph. **Rows of one seed and step get the same noise: for independent draws give each row its own.**
    return_logprob, return_entropy : bool
        Whether to return the log-probability of the column drawn, and the entropy of its row: those of softmax(logits /
        temperature) over all columns, whatever the limits, as `token_logprobs` has them and bit for bit. They cost
        another read of the logits. There are none at temperature 0: NaN for such a row of an array.

    Returns
    -------
    array of int64 (of int32 where JAX has no int64) or NumPy scalar, the shape of `logits` without `axis`
        The column drawn, whose logit is never -inf. -1 for a row that has no softmax: it holds NaN or +inf, or nothing
        but -inf; and for one whose number in an array is none that could be given for all: a temperature of -1.
    Sample
        Instead, where more is asked for: a named tuple of that array as `index`, of `logprob` and of `entropy`, each
        in nats, float32 (float64 for float64 logits), of the same shape, or None. Where the column is -1 the
        log-probability is NaN, and the entropy too unless only a limit of the row is to blame: a `top_p` of 2.

    Raises
    ------
    TypeError
        Unsupported dtypes; arrays of different libraries or devices; an `rng` of another kind.
    ValueError
        Bad axis, temperature, top_k, top_p, min_p or shape of an array; no columns; a log-probability or an entropy at
        temperature 0 for all rows.

    Notes
    -----
    The Gumbel-max trick (Yellott, 1977) reads each logit once and needs no softmax. The noise of a column follows from
    the row's seed and step and the column's number alone, by Philox4x32-10 (Salmon et al., 2011): a row has the same
    sample whatever the batch, its place in it, strides, threads or device, and nearly always in another dtype too.
    kernels/noise.py has the formulas. With top_p, a CPU and a GPU may differ where the probabilities add up to top_p
    within 1e-6.

    Examples
    --------
    >>> import numpy as np
    >>> from gpusoftmax import sample
    >>> logits = np.array([[0.0, -np.inf, 1.0], [np.nan, 0.0, 0.0]])
    >>> seeds = np.array([7, 8])
    >>> sample(logits, rng=(seeds, 0))
    array([ 2, -1])
    >>> sample(logits, temperature=0, rng=0)
    array([ 2, -1])
    """
    more = return_logprob or return_entropy
    # Indices have no gradient.
    arrays, options = _transform.split(_detached(temperature), _detached(bias), softcap, mask, n_valid)
    if more:
        _checks.temperature(options[0])  # of all rows: at 0 there are samples, but no probabilities
    limits = _detached(temperature), top_k, top_p, min_p
    index = _drawn(_detached(logits), axis, *limits, rng, arrays[1:], options[1:])
    if not more:
        return index
    # -1 is no column: its log-probability is NaN, unless it is checked.
    flags = False, return_entropy, False, False, False
    try:
        arrays, options = _transform.split(temperature, bias, softcap, mask, n_valid)
        found = _replay.call(_tokens.token_logprobs, (logits, index, *arrays), axis, _NO_INDEX, *flags, *options)
    except _arrays.RequiresGrad as refusal:
        argument = refusal.argument
        transform = temperature, bias, softcap, mask, n_valid
        given = logits, index, axis, _NO_INDEX, flags[:4], False
        found = _gradients.call("token_logprobs", argument, None, transform, *given)
    return Sample(index, found[0] if return_logprob else None, found[2])


_NO_INDEX = -(2**63)
"""No column is ignored."""


def _detached(array):
    return array.detach() if getattr(array, "requires_grad", False) else array


def _drawn(logits, axis, temperature, top_k, top_p, min_p, rng, beside, transform):
    seed, step = _checks.rng(rng)
    if type(logits) is np.ndarray:  # an array is no option: what differs by it alone is replayed
        seed, step = (np.asarray(_signed(one)) if type(one) is int else one for one in (seed, step))
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    arrays, of_all = zip(*(_own_numbers.split(one, name) for name, one in given.items()), strict=True)
    if int in (type(seed), type(step)):
        return _sample(logits, seed, step, *arrays, *beside, axis, *of_all, *transform)
    return _replay.call(_sample, (logits, seed, step, *arrays, *beside), axis, *of_all, *transform)


def _signed(value: int) -> int:
    return one_value(value).pointer


def _sample(
    logits, seed, step, temperatures, top_ks, top_ps, min_ps, bias, mask, valid,
    axis, temperature, top_k, top_p, min_p, *transform,
):  # fmt: skip
    x = _arrays.logits(logits, "logits")
    axes = _checks.class_axis(axis, x.ndim)
    _checks.class_count(x.shape[axes[0]])
    compute = _arrays.compute_dtype(x)
    numbers = {
        "seed": _own_numbers.integers(seed, "seed", x, axes),
        "step": _own_numbers.integers(step, "step", x, axes),
        "temperature": _own_numbers.floats(temperatures, "temperature", x, axes, compute)
        or _checks.temperature_or_zero(temperature, compute),
        "top_k": _own_numbers.integers(top_ks, "top_k", x, axes) or _checks.top_k(top_k),
        "top_p": _own_numbers.floats(top_ps, "top_p", x, axes, compute) or _checks.top_p(top_p),
        "min_p": _own_numbers.floats(min_ps, "min_p", x, axes, compute) or _checks.min_p(min_p),
    }
    first = None, 1.0
    if (bias is not None or transform[0] is not None) and numbers["temperature"] != 0:  # softcap
        # Divided first, the logits are drawn from at temperature 1.
        first = (temperatures, 1.0) if temperatures is not None else (None, temperature)
        numbers["temperature"] = 1.0
    x, _ = _transform.applied(x, axes, compute, (first[0], bias, mask, valid), (first[1], *transform), name="logits")
    arrays = {name: one for name, one in numbers.items() if isinstance(one, _arrays.Array)}
    ids = _arrays.empty(x, _rows.without_axes(x, axes), "int64")
    kernel = _arrays.kernels(x.place, "sample").sample

    def rows_of_batch(rows, x_rows, *others):
        *given, id_rows = others
        own = {**numbers, **dict(zip(arrays, given, strict=True))}
        limits = Limits(own["top_k"], own["top_p"], own["min_p"])
        kernel(rows, x_rows, own["seed"], own["step"], id_rows, own["temperature"], limits, x.place)

    _rows.for_rows(rows_of_batch, axes, [x, *arrays.values()], [_rows.per_row(ids, axes, x.ndim)])
    return _arrays.result(ids)
