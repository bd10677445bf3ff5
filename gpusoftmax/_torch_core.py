"""The functions of the core, with its arguments and defaults, for tensors that require grad."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import gpusoftmax
from gpusoftmax import _arrays, _checks, _torch_expected, _torch_kl, _torch_layer, _torch_losses, _torch_rows
from gpusoftmax import _torch_full_loss as full
from gpusoftmax import _torch_transformed as transformed
from gpusoftmax._torch_ops import row_dtype
from gpusoftmax._torch_transform import Through, options_of, per_row, through


def softmax(x: Tensor, axis: Any, dtype: Any, transform: tuple) -> Tensor:
    _tensors(x=x)
    axes = _checks.axes(axis, x.ndim)
    return transformed.softmax(x, axes, through(x, axes, *transform), _dtype(dtype))


def log_softmax(x: Tensor, axis: Any, dtype: Any, transform: tuple) -> Tensor:
    _tensors(x=x)
    axes = _checks.axes(axis, x.ndim)
    return transformed.log_softmax(x, axes, through(x, axes, *transform), _dtype(dtype))


def softmax_backward(probs: Tensor, dprobs: Tensor, names: tuple[str, str], axis: Any, temperature: Any) -> Tensor:
    _tensors(**dict(zip(names, (probs, dprobs), strict=True)))
    return _backward(_torch_rows.softmax_backward, probs, dprobs, axis, temperature)


def log_softmax_backward(log_probs: Tensor, dlog_probs: Tensor, axis: Any, temperature: Any) -> Tensor:
    _tensors(log_probs=log_probs, dlog_probs=dlog_probs)
    return _backward(_torch_rows.log_softmax_backward, log_probs, dlog_probs, axis, temperature)


def _backward(function: Callable[..., Tensor], y: Tensor, dy: Tensor, axis: Any, temperature: Any) -> Tensor:
    axes = _checks.axes(axis, y.ndim)
    given = through(y, axes, temperature, None, None, None, None)
    if type(given) is float:
        return function(y, dy, axes, given, y.dtype)
    undivided = function(y, dy, axes, 1.0, row_dtype(y.dtype))
    return (undivided / per_row(given.temperatures, y, axes)).to(y.dtype)


def logsumexp(x: Tensor, axis: Any, keepdims: bool, dtype: Any, transform: tuple) -> Tensor:
    _tensors(x=x)
    dtype = _dtype(dtype)
    x = x.double() if dtype == torch.float64 else x  # which is also what it is computed in
    axes = _checks.axes(axis, x.ndim)
    lse = transformed.logsumexp(x, axes, bool(keepdims), through(x, axes, *transform))
    return lse if dtype is None else lse.to(dtype)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    axis: Any,
    ignore_index: Any,
    reduction: Any,
    label_smoothing: Any,
    validate: bool | None,
    more: tuple,
    transform: tuple,
) -> Any:
    """more: shares, row_weight, normalizer, z_loss, and whether z_loss, lse and n_correct are wanted."""
    shares, row_weight, normalizer, z_loss, wanted = more
    others = {"weight": weight, "target[1]": shares, "row_weight": row_weight}
    _tensors(logits=logits, target=target, **{name: one for name, one in others.items() if one is not None})
    (axis,) = _checks.class_axis(axis, logits.ndim)
    given = through(logits, (axis,), *transform)
    if logits.ndim > 1:
        if shares is None and target.is_floating_point() and target.ndim == logits.ndim:
            target = target.movedim(axis, 1)
        logits = logits.movedim(axis, 1)  # torch's place for the classes
        if type(given) is not float:
            given = given.moved(axis, 1, logits.ndim)
    _checks.reduction(reduction)
    ignore_index, label_smoothing = _checks.ignore_index(ignore_index), _checks.label_smoothing(label_smoothing)
    is_soft = shares is not None or target.is_floating_point()
    if is_soft or row_weight is not None or normalizer is not None or z_loss or any(wanted):
        options = full.Options(ignore_index, label_smoothing, _checks.z_loss(z_loss), wanted[0], wanted[2], validate)
        target_of_rows = full.Target(target, shares, weight, row_weight)
        return full.full_cross_entropy(logits, target_of_rows, options, given, reduction, normalizer, wanted)
    loss = _torch_losses.Loss(ignore_index, reduction, label_smoothing, validate)
    return transformed.cross_entropy(logits, target, weight, loss, given)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    row_weight: Tensor | None,
    normalizer: Any,
    ignore_index: Any,
    reduction: Any,
    label_smoothing: Any,
    z_loss: Any,
    temperature: Any,
    softcap: Any,
    wanted: tuple[bool, bool, bool],
    validate: bool | None,
    chunk_size: Any,
) -> Any:
    """wanted: whether z_loss, lse and n_correct are."""
    others = {"linear_bias": linear_bias, "weight": weight, "row_weight": row_weight}
    given = {name: one for name, one in others.items() if one is not None}
    _tensors(input=input, linear_weight=linear_weight, target=target, **given)
    _checks.reduction(reduction)
    _checks.only_for(normalizer is not None, "normalizer", reduction == "mean", reduction)
    is_tensor = isinstance(normalizer, Tensor)
    if isinstance(temperature, Tensor):
        full.check_no_gradients({"temperature": temperature})
    options = _torch_layer.Options(
        _checks.ignore_index(ignore_index),
        reduction,
        _checks.label_smoothing(label_smoothing),
        _checks.z_loss(z_loss),
        None if is_tensor else _checks.normalizer(normalizer),
        _checks.temperature(temperature),
        _checks.softcap(softcap),
        *wanted,
        validate,
        _checks.chunk_size(chunk_size),
    )
    layer = _torch_layer.Layer(input, linear_weight, linear_bias)
    without = _torch_layer.Given(target, weight, row_weight, normalizer if is_tensor else None)
    return _torch_layer.linear_cross_entropy(layer, without, options)


def kl_div(
    logits: Tensor,
    target_logits: Tensor,
    axis: Any,
    temperature: Any,
    row_weight: Tensor | None,
    reduction: Any,
    normalizer: Any,
) -> Tensor:
    _tensors(logits=logits, target_logits=target_logits, row_weight=logits if row_weight is None else row_weight)
    if isinstance(temperature, Tensor):
        full.check_no_gradients({"temperature": temperature})
    (axis,) = _checks.class_axis(axis, logits.ndim)
    _checks.reduction(reduction)
    is_tensor = isinstance(normalizer, Tensor)
    number = None if is_tensor or normalizer is None else _checks.normalizer(normalizer)
    options = _torch_kl.Divergence(axis, _checks.temperature(temperature), reduction, number)
    return _torch_kl.kl_div(logits, target_logits, row_weight, normalizer if is_tensor else None, options)


def token_logprobs(
    logits: Tensor,
    target: Tensor,
    axis: Any,
    ignore_index: Any,
    wanted: tuple[bool, bool, bool, bool],
    validate: bool | None,
    transform: tuple,
) -> tuple[Tensor | None, ...]:
    _tensors(logits=logits, target=target)
    (axis,) = _checks.class_axis(axis, logits.ndim)
    tokens = _torch_losses.Tokens(axis, 1.0, _checks.ignore_index(ignore_index), *map(bool, wanted), validate)
    return transformed.token_logprobs(logits, target, tokens, through(logits, (axis,), *transform))


def top_logprobs(
    logits: Tensor, k: Any, target: Tensor | None, axis: Any, ignore_index: Any, validate: bool | None, transform: tuple
) -> tuple[Tensor, Tensor]:
    """(logprob, token)."""
    _tensors(logits=logits, target=logits if target is None else target)
    (axis,) = _checks.class_axis(axis, logits.ndim)
    given = _through(logits, (axis,), transform)
    with torch.no_grad():
        token = gpusoftmax.top_logprobs(
            logits, k, target, axis=axis, ignore_index=ignore_index, validate=validate, **options_of(given)
        ).token
    several = token if target is None else token[..., 1:]
    nothing_else = (False,) * 4
    logprob = token_logprobs(logits, several, axis, _NO_INDEX, nothing_else, False, transform)[0]
    if target is not None:
        of_target = token_logprobs(logits, target, axis, ignore_index, nothing_else, False, transform)[0]
        logprob = torch.cat([of_target.unsqueeze(-1), logprob], -1)
    return logprob, token


_NO_INDEX = -(2**63)
"""No token is ignored."""


def soft_argmax(x: Tensor, axis: Any, keepdims: bool, dtype: Any, transform: tuple) -> Tensor:
    _tensors(x=x)
    axes = _checks.one_axis(axis, x.ndim)
    return _torch_expected.soft_argmax(x, axes, bool(keepdims), _dtype(dtype), _through(x, axes, transform))


def spatial_softmax(features: Tensor, dtype: Any, transform: tuple) -> Tensor:
    _tensors(features=features)
    _checks.image_width(features.shape, "features")
    given = _through(features, (features.ndim - 2, features.ndim - 1), transform)
    return _torch_expected.spatial_softmax(features, _dtype(dtype), given)


def topk_softmax(logits: Tensor, k: Any, axis: Any, renormalize: bool, transform: tuple) -> tuple[Tensor, ...]:
    """(probs, indices)."""
    _tensors(logits=logits)
    (axis,) = _checks.class_axis(axis, logits.ndim)
    k = _checks.token_count(k, logits.shape[axis])
    return _torch_expected.topk_softmax(logits, k, (axis,), bool(renormalize), _through(logits, (axis,), transform))


def _through(x: Tensor, axes: tuple[int, ...], transform: tuple) -> Through:
    given = through(x, axes, *transform)
    return Through(given) if type(given) is float else given


def _dtype(dtype: Any) -> torch.dtype | None:
    return None if dtype is None else getattr(torch, _checks.dtype_name(dtype))


def _tensors(**arguments: Any) -> None:
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}, expected a torch tensor as the other arguments are")
        _arrays.not_nested(value, name)
