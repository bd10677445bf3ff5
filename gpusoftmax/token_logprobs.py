"""Log-probabilities of given tokens, with what else one read of the logits tells of their rows; and the gradient."""

from typing import Any, NamedTuple

from gpusoftmax import _arrays, _checks, _gradients, _replay, _rows, _tokens, _transform


class TokenLogprobs(NamedTuple):
    """What `token_logprobs` returns; None for what was not asked for."""

    logprob: Any
    lse: Any
    entropy: Any
    rank: Any
    argmax: Any


def token_logprobs(
    logits: Any,
    target: Any,
    *,
    axis: int = -1,
    temperature: Any = 1.0,
    bias: Any = None,
    softcap: float | None = None,
    mask: Any = None,
    n_valid: Any = None,
    ignore_index: int = -100,
    return_lse: bool = False,
    return_entropy: bool = False,
    return_rank: bool = False,
    return_argmax: bool = False,
    validate: bool | None = None,
) -> TokenLogprobs:
    """The log-probability of `target` under softmax(`logits` / temperature), in nats, and more from the same read.

    A row runs along `axis`, by default the last one. No probabilities and no other array of the logits' size are made.

    Parameters
    ----------
    logits : array, shape (..., n_cols, ...)
        float16, bfloat16, float32 or float64, of NumPy, CuPy, torch or JAX, with any strides. Not modified.
    target : array of integers, the shape of `logits` without `axis`, or that shape and one more axis at the end
        The token of each row, or several of them: from 0 to n_cols - 1, or `ignore_index`.
    axis : int
        Along which the tokens lie.
    temperature, bias, softcap, mask, n_valid
        What the logits go through before, as in `softmax`: all results are those of what comes of them.
    ignore_index : int
        A target with this value has log-probability 0 and rank -1: padding.
    return_lse, return_entropy, return_rank, return_argmax : bool
        What else to compute.
    validate : bool, optional
        Whether a target that is neither a token nor `ignore_index` raises IndexError. By default it does on the CPU; on
        a GPU it would wait for the device, and such a target gets the log-probability NaN and the rank -1 instead.

    Returns
    -------
    TokenLogprobs
        A named tuple of arrays, of the kind and on the device of `logits`, or None for what was not asked for. Where
        torch's `logits` require grad, the floating ones are differentiable, see gpusoftmax.torch.

        logprob : the shape of `target`, float32 (float64 for float64 logits)
            log_softmax(logits / temperature)[target], bit for bit. Never above 0; -inf for a masked token.
        lse : the shape of `logits` without `axis`
            logsumexp(logits / temperature), bit for bit.
        entropy : likewise
            -sum(p log p) of the row's probabilities p, in nats. NaN where softmax is.
        rank : the shape of `target`, int64
            1 for the most likely token: 1 + how many logits are larger. Tokens with equal logits have equal ranks. -1
            where logprob is NaN or the target is ignored.
        argmax : the shape of `logits` without `axis`, int64
            The most likely token, of several the first; -1 in a row that holds NaN.

    Raises
    ------
    IndexError
        A target out of range, see `validate`.
    TypeError
        `target` not of integers; arrays of different libraries or devices; unsupported dtypes.
    ValueError
        Shapes that do not match, no columns, or a bad temperature.

    Notes
    -----
    The formulas stand in kernels/cpu/token_logprobs.py. All results of a row have the same bits whatever the batch
    around it, its strides and its alignment. vLLM counts ranks as here where no logits are equal, and otherwise by the
    last of the equal ones. With several targets the rank of each takes a read of its own.

    Examples
    --------
    >>> import numpy as np
    >>> from gpusoftmax import token_logprobs
    >>> scores = token_logprobs(np.zeros((1, 4)), np.array([2]), return_entropy=True)
    >>> float(scores.logprob[0]), float(scores.entropy[0])  # log 1/4 and log 4
    (-1.3862943611198906, 1.3862943611198906)
    """
    wanted = return_lse, return_entropy, return_rank, return_argmax
    options = axis, ignore_index, *wanted, validate
    try:
        arrays, transform = _transform.split(temperature, bias, softcap, mask, n_valid)
        return TokenLogprobs(*_replay.call(_tokens.token_logprobs, (logits, target, *arrays), *options, *transform))
    except _arrays.RequiresGrad as refusal:
        argument = refusal.argument
    transform = temperature, bias, softcap, mask, n_valid
    options = axis, ignore_index, wanted, validate
    return TokenLogprobs(*_gradients.call("token_logprobs", argument, None, transform, logits, target, *options))


def token_logprobs_backward(
    logits: Any,
    target: Any,
    dlogprob: Any,
    dentropy: Any = None,
    *,
    axis: int = -1,
    temperature: Any = 1.0,
    bias: Any = None,
    softcap: float | None = None,
    mask: Any = None,
    n_valid: Any = None,
    ignore_index: int = -100,
    validate: bool | None = None,
    out: Any = None,
) -> Any:
    """Gradient with respect to the logits of the `logprob` and the `entropy` of `token_logprobs`, in one kernel.

    For a row with targets t_j, probabilities p and entropy H, the gradients g_j and h with respect to them give
    dlogits_c = (sum_j g_j ([c = t_j] - p_c) - h p_c (log p_c + H)) / temperature.

    Parameters
    ----------
    logits, target, axis, temperature, bias, softcap, mask, n_valid, ignore_index, validate
        As given to `token_logprobs`. The gradient is that of the logits as they were given.
    dlogprob : array, the shape of `target`, or None
        The gradient with respect to the log-probabilities, with any strides, 0 included. None: there is none.
    dentropy : array, the shape of `logits` without `axis`, optional
        The gradient with respect to the entropy.
    out : array, optional
        Where to write the result, of the shape of `logits`; it decides the dtype. out=logits works in place.

    Returns
    -------
    array, the shape, dtype, kind and device of `logits`
        An ignored target adds nothing to it; where all targets of a row are ignored and there is no `dentropy`, the
        row is exactly 0 whatever it holds.

    Raises
    ------
    IndexError, TypeError, ValueError
        As `token_logprobs`; also for an `out` as in `softmax`, and where neither gradient is given.

    Examples
    --------
    >>> import numpy as np
    >>> from gpusoftmax import token_logprobs_backward
    >>> token_logprobs_backward(np.zeros((1, 4)), np.array([2]), np.array([1.0]))
    array([[-0.25, -0.25,  0.75, -0.25]])
    """
    arrays, options = _transform.split(temperature, bias, softcap, mask, n_valid)
    arrays = logits, target, dlogprob, dentropy, out, *arrays
    return _replay.call(_token_logprobs_backward, arrays, axis, ignore_index, validate, *options)


def _token_logprobs_backward(
    logits, target, dlogprob, dentropy, out, temperatures, bias, mask, valid, axis, ignore_index, validate, *transform
):
    x, labels, axes, ignore_index = _tokens.checked(logits, target, axis, ignore_index, validate)
    _checks.any_gradient(dlogprob, dentropy)
    dlogits = _arrays.output(out, x, x.shape, x.dtype)
    _checks.no_partial_overlap(dlogits, x, "logits")
    _checks.no_overlap(dlogits, labels, "target")
    dtype = _arrays.compute_dtype(x, dlogits)
    arrays = temperatures, bias, mask, valid
    x, temperature = _transform.applied(x, axes, dtype, arrays, transform, dlogits, "logits")
    _checks.temperature_fits(temperature, dtype)
    batch_shape = _rows.without_axes(x, axes)
    several = labels.ndim > len(batch_shape)
    gradients = {}
    for name, given, shape in (("dlogprob", dlogprob, labels.shape), ("dentropy", dentropy, batch_shape)):
        if given is not None:
            array = _arrays.logits(given, name)
            _checks.same_home(x, array, "logits", name)
            _checks.same_shape(array, shape, name, "to match what it is the gradient of")
            _checks.no_overlap(dlogits, array, name)
            gradients[name] = array if array.dtype == dtype else _rows.contiguous(array, dtype)
    count = 0 if dlogprob is None else labels.shape[-1] if several else 1
    strides = 0, 0
    reads = {"labels": labels, **gradients}
    if several:
        strides = labels.strides[-1], gradients["dlogprob"].strides[-1] if dlogprob is not None else 0
        reads.update({name: _rows.part(reads[name], 0) for name in reads if name != "dentropy"})
    kernel = _arrays.kernels(x.place, "token_logprobs").token_logprobs_backward

    def rows_of_batch(rows, x_rows, label_rows, *rest):
        *given, dlogits_rows = rest
        operands = {name: _tokens.nothing(name, dtype) for name in ("dlogprob", "dentropy")}
        operands.update(zip(gradients, given, strict=True))
        numbers = count, *strides, ignore_index, temperature
        kernel(rows, x_rows, label_rows, *operands.values(), dlogits_rows, *numbers, x.place)

    _rows.for_rows(
        rows_of_batch, axes, [x, *(_rows.per_row(array, axes, x.ndim) for array in reads.values())], [dlogits]
    )
    return _arrays.result(dlogits, out)
