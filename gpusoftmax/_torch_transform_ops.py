"""The operators of _torch_ops.py for logits that go through more than one temperature on their way.

They are operators of their own, so that a plain call has no arguments more to pass through torch's dispatcher.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import gpusoftmax
from gpusoftmax._torch_ops import (
    axis_of,
    class_dim,
    defined_as,
    fake_logsumexp,
    fake_token_logprobs,
    room_for,
    row_dtype,
)
from gpusoftmax._torch_transform import Through, options_of

THROUGH = (
    "float temperature, float? softcap, SymInt? n_valid, str empty_row, "
    "Tensor? temperatures, Tensor? bias, Tensor? mask, Tensor? valid_of_rows"
)


def with_empty_row(through: Sequence[Any]) -> dict[str, Any]:
    given = Through(*through)
    return {**options_of(given), "empty_row": given.empty_row}


def _rows(name: str) -> Callable[..., Tensor]:
    """The operator of a function that turns rows into rows."""
    function = getattr(gpusoftmax, name)

    def fake(x, dim, dtype, *through):
        return x.new_empty(x.shape, dtype=dtype or x.dtype)

    def transformed(x, dim, dtype, *through):
        return function(x, axis_of(dim), dtype=dtype, **with_empty_row(through))

    transformed.__name__ = f"{name}_transformed"
    return defined_as(f"(Tensor x, int[] dim, ScalarType? dtype, {THROUGH}) -> Tensor", fake)(transformed)


softmax_transformed = _rows("softmax")
log_softmax_transformed = _rows("log_softmax")


@defined_as(f"(Tensor x, int[] dim, bool keepdim, {THROUGH}) -> Tensor", fake_logsumexp)
def logsumexp_transformed(x: Tensor, dim: Sequence[int], keepdim: bool, *through: Any) -> Tensor:
    return gpusoftmax.logsumexp(x, axis_of(dim), keepdims=keepdim, **options_of(Through(*through)))


_LOSS = (
    "Tensor logits, Tensor target, Tensor? weight, int ignore_index, str reduction, float label_smoothing, "
    "bool? validate"
)


def _fake_loss(logits, target, weight, ignore_index, reduction, *options):
    return logits.new_empty(target.shape if reduction == "none" else (), dtype=row_dtype(logits.dtype))


def _loss_options(logits: Tensor, options: Sequence[Any]) -> dict[str, Any]:
    ignore_index, reduction, label_smoothing, validate, *through = options
    return {
        "axis": class_dim(logits),
        "ignore_index": ignore_index,
        "reduction": reduction,
        "label_smoothing": label_smoothing,
        "validate": validate,
        **with_empty_row(through),
    }


@defined_as(f"({_LOSS}, {THROUGH}) -> Tensor", _fake_loss)
def cross_entropy_transformed(logits: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> Tensor:
    return gpusoftmax.cross_entropy(logits, target, weight, **_loss_options(logits, options))


def _fake_loss_with_grad(dtype, logits, *others):
    return _fake_loss(logits, *others), logits.new_empty(logits.shape, dtype=dtype)


@defined_as(f"(ScalarType dtype, {_LOSS}, {THROUGH}) -> (Tensor loss, Tensor dlogits)", _fake_loss_with_grad)
def cross_entropy_transformed_with_grad(
    dtype: torch.dtype, logits: Tensor, target: Tensor, weight: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    out = room_for(logits, dtype)
    return gpusoftmax.cross_entropy_with_grad(logits, target, weight, out=out, **_loss_options(logits, options))


@defined_as(f"({_LOSS.replace('Tensor logits', 'Tensor(a!) logits')}, {THROUGH}) -> Tensor", _fake_loss)
def cross_entropy_transformed_in_place(logits: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> Tensor:
    """The loss; the gradient overwrites the logits."""
    options = _loss_options(logits, options)
    return gpusoftmax.cross_entropy_with_grad(logits, target, weight, out=logits, **options)[0]


def _fake_token_logprobs(logits, target, dim, *options):
    return fake_token_logprobs(logits, target, dim, 1.0, *options[:6])


@defined_as(
    "(Tensor logits, Tensor target, int dim, int ignore_index, bool lse, bool entropy, bool rank, bool argmax, "
    f"bool? validate, {THROUGH}) -> Tensor[]",
    _fake_token_logprobs,
)
def token_logprobs_transformed(
    logits: Tensor, target: Tensor, dim: int, ignore_index: int, *options: Any
) -> list[Tensor]:
    names = "return_lse", "return_entropy", "return_rank", "return_argmax", "validate"
    wanted = dict(zip(names, options[:5], strict=True))
    fields = gpusoftmax.token_logprobs(
        logits, target, axis=dim, ignore_index=ignore_index, **wanted, **options_of(Through(*options[5:]))
    )
    return [field for field in fields if field is not None]


def _fake_token_logprobs_backward(dtype, logits, *others):
    return logits.new_empty(logits.shape, dtype=dtype)


@defined_as(
    "(ScalarType dtype, Tensor logits, Tensor target, Tensor? dlogprob, Tensor? dentropy, int dim, int ignore_index, "
    f"{THROUGH}) -> Tensor",
    _fake_token_logprobs_backward,
)
def token_logprobs_transformed_backward(
    dtype: torch.dtype,
    logits: Tensor,
    target: Tensor,
    dlogprob: Tensor | None,
    dentropy: Tensor | None,
    dim: int,
    ignore_index: int,
    *through: Any,
) -> Tensor:
    options = {"axis": dim, "ignore_index": ignore_index, "validate": False, **options_of(Through(*through))}
    out = room_for(logits, dtype)
    return gpusoftmax.token_logprobs_backward(logits, target, dlogprob, dentropy, out=out, **options)
