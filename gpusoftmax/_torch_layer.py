"""linear_cross_entropy as a function of torch's autograd.

The forward computes the loss and, in the same chunks of logits, the gradients that are asked for: the logits are made
once and never held. The backward multiplies the gradients by what comes from above, one number; for the losses of rows
("none"), which have one each, it goes over the chunks again with them. Half-precision gradients meet it in the same
precision: use a loss scale inside, or "none", where float16 would underflow.

Where the gradient is to be differentiated again, it is taken from torch's own product and our cross_entropy, for which
all logits are held.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import gpusoftmax
from gpusoftmax import _torch_losses, _torch_ops
from gpusoftmax import _torch_rows as rows


class Layer(NamedTuple):
    """Options of linear_cross_entropy."""

    ignore_index: int
    reduction: str
    label_smoothing: float
    chunk_size: int | None


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    layer: Layer,
) -> Tensor:
    _torch_losses.check_weight(weight)
    tensors = input, linear_weight, linear_bias
    if not rows.recorded(*(tensor for tensor in tensors if tensor is not None)):
        return _operator(input, linear_weight, target, linear_bias, weight, None, *layer, (False, False, False))[0]
    return _LinearCrossEntropy.apply(*tensors, target, weight, layer)


def _fake(
    input,
    linear_weight,
    target,
    linear_bias,
    weight,
    scale,
    ignore_index,
    reduction,
    label_smoothing,
    chunk_size,
    wanted,
):
    loss = input.new_empty(target.shape if reduction == "none" else (), dtype=_torch_ops.row_dtype(input.dtype))
    given = input, linear_weight, linear_bias
    return loss, *(
        one.new_empty(one.shape if is_wanted else (0,)) for one, is_wanted in zip(_some(given), wanted, strict=True)
    )


def _some(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """The tensors; the first stands for one that is not there, of which nothing is wanted."""
    return [tensors[0] if tensor is None else tensor for tensor in tensors]


@_torch_ops.defined_as(
    "(Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias, Tensor? weight, Tensor? scale, "
    "int ignore_index, str reduction, float label_smoothing, int? chunk_size, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
)
def linear_cross_entropy_with_grad(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    chunk_size: int | None,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, gradients of input, linear_weight and linear_bias); a gradient that is not wanted has no element."""
    options = {
        "linear_bias": linear_bias,
        "weight": weight,
        "ignore_index": ignore_index,
        "reduction": reduction,
        "label_smoothing": label_smoothing,
        "chunk_size": chunk_size,
    }
    if any(wanted):
        names = ("return_dinput", "return_dlinear_weight", "return_dlinear_bias")
        options |= {**dict(zip(names, wanted, strict=True)), "grad_scale": 1.0 if scale is None else scale}
        loss, *gradients = gpusoftmax.linear_cross_entropy_with_grad(input, linear_weight, target, **options)
    else:
        loss, gradients = gpusoftmax.linear_cross_entropy(input, linear_weight, target, **options), (None,) * 3
    given = _some((input, linear_weight, linear_bias))
    return loss, *(one.new_empty(0) if grad is None else grad for one, grad in zip(given, gradients, strict=True))


_operator = linear_cross_entropy_with_grad


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        layer: Layer,
    ) -> Tensor:
        ctx.layer, ctx.wanted = layer, tuple(ctx.needs_input_grad[:3])
        ctx.save_for_backward(input, linear_weight, linear_bias, target, weight)
        of_rows = layer.reduction == "none"
        wanted = (False, False, False) if of_rows else ctx.wanted
        loss, *gradients = _operator(input, linear_weight, target, linear_bias, weight, None, *layer, wanted)
        ctx.gradients = None if of_rows else gradients
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple:
        input, linear_weight, linear_bias, target, weight = ctx.saved_tensors
        if rows.recorded(input, linear_weight, dloss):
            return *_graph_of_gradients(ctx, dloss), None, None, None
        # Handed out once: whoever gets them may write into them. The next backward of a retained graph goes over the
        # chunks again.
        gradients, ctx.gradients = ctx.gradients, None
        of_rows = ctx.layer.reduction == "none"
        if gradients is None:
            scale = dloss.contiguous() if of_rows else None
            arrays = input, linear_weight, target, linear_bias, weight, scale
            _, *gradients = _operator(*arrays, *ctx.layer, ctx.wanted)
        if not of_rows and not (_torch_losses.can_look(dloss) and float(dloss) == 1):
            for gradient in gradients:
                gradient.mul_(dloss)
        found = (gradient if wanted else None for gradient, wanted in zip(gradients, ctx.wanted, strict=True))
        return *found, None, None, None


def _graph_of_gradients(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients as results of operations that torch can differentiate."""
    input, linear_weight, linear_bias, target, weight = ctx.saved_tensors
    layer = ctx.layer
    logits = torch.nn.functional.linear(input, linear_weight, linear_bias)
    loss = _torch_losses.cross_entropy(
        logits.reshape(-1, logits.shape[-1]),
        target.reshape(-1),
        weight,
        _torch_losses.Loss(layer.ignore_index, layer.reduction, layer.label_smoothing),
    )
    given = input, linear_weight, linear_bias
    wanted = [tensor for tensor, is_wanted in zip(given, ctx.wanted, strict=True) if is_wanted]
    found = iter(torch.autograd.grad(loss, wanted, dloss.reshape(loss.shape), create_graph=True))
    return tuple(next(found) if is_wanted else None for is_wanted in ctx.wanted)
