"""softmax, log_softmax and logsumexp as functions of torch's autograd, which differentiates them as often as asked.

With p = softmax(x / T), f = p (g - s) / T its backward for the gradient g, s = sum(p g), and a gradient h with respect
to f, the backward of the backward is

    dg = p (h - sum(p h)) / T                        the same product, for the Jacobian of softmax is symmetric
    dp = ((g - s) h - g sum(p h)) / T                from where softmax goes on as before

and with y = log_softmax(x / T), f = (g - exp(y) sum(g)) / T,

    dg = (h - sum(exp(y) h)) / T
    dy = -exp(y) h sum(g) / T

The gradient of logsumexp is g p / T, a product of functions that are differentiated already.

The first backward is one kernel; what is beyond it is written in operations of torch, in float32 at least.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpusoftmax import _torch_ops as ops

Dims = tuple[int, ...]


def recorded(*tensors: Tensor) -> bool:
    """Whether torch wants to know of what is computed from these: for a gradient, or for what tensors do not tell.

    Or, in a backward, for a batch of gradients (is_grads_batched): as little can be written in place then.
    """
    if is_transforming():
        return True
    if torch.is_grad_enabled():
        return any(tensor.requires_grad for tensor in tensors)
    return not torch.compiler.is_compiling() and any(map(torch._C._functorch.is_legacy_batchedtensor, tensors))


def is_transforming() -> bool:
    """Whether forward mode is on, of which no tensor tells, or torch.func, of whose levels they tell the innermost."""
    return torch.autograd.forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def with_tangent(function: type, forward: type) -> Callable[..., Any]:
    """How to call a function of autograd: with forward mode where that is on. torch.compile takes none that has it."""
    return (function if torch.autograd.forward_ad._current_level < 0 else forward).apply


def softmax(x: Tensor, dim: Dims, temperature: float, dtype: torch.dtype | None) -> Tensor:
    if recorded(x):
        return with_tangent(_Softmax, _SoftmaxWithTangent)(x, dim, temperature, dtype)
    return ops.softmax(x, dim, temperature, dtype)


def log_softmax(x: Tensor, dim: Dims, temperature: float, dtype: torch.dtype | None) -> Tensor:
    if recorded(x):
        return with_tangent(_LogSoftmax, _LogSoftmaxWithTangent)(x, dim, temperature, dtype)
    return ops.log_softmax(x, dim, temperature, dtype)


def logsumexp(x: Tensor, dim: Dims, keepdim: bool, temperature: float) -> Tensor:
    if recorded(x):
        return with_tangent(_LogSumExp, _LogSumExpWithTangent)(x, dim, keepdim, temperature)
    return ops.logsumexp(x, dim, keepdim, temperature)


def softmax_backward(probs: Tensor, dprobs: Tensor, dim: Dims, temperature: float, dtype: torch.dtype) -> Tensor:
    """The gradient with respect to the logits, of `dtype`; itself differentiable where gradients are recorded."""
    if recorded(probs, dprobs):
        return _SoftmaxBackward.apply(probs, dprobs, dim, temperature, dtype)
    return ops.softmax_backward(probs, dprobs, dim, temperature, dtype)


def log_softmax_backward(
    log_probs: Tensor, dlog_probs: Tensor, dim: Dims, temperature: float, dtype: torch.dtype
) -> Tensor:
    """As softmax_backward, for log_softmax."""
    if recorded(log_probs, dlog_probs):
        return _LogSoftmaxBackward.apply(log_probs, dlog_probs, dim, temperature, dtype)
    return ops.log_softmax_backward(log_probs, dlog_probs, dim, temperature, dtype)


def wide(x: Tensor) -> Tensor:
    """In float32 at least, where sums of many terms lose nothing."""
    return x if x.dtype == torch.float64 else x.float()


class _Softmax(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, dim: Dims, temperature: float, dtype: torch.dtype | None) -> Tensor:
        return ops.softmax(x, dim, temperature, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, probs: Tensor) -> None:
        x, dim, temperature, _ = inputs
        ctx.save_for_backward(probs)
        ctx.options = dim, temperature, x.dtype

    @staticmethod
    def backward(ctx: Any, dprobs: Tensor) -> tuple:
        return softmax_backward(*ctx.saved_tensors, dprobs, *ctx.options), None, None, None


class _SoftmaxWithTangent(_Softmax):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, probs: Tensor) -> None:
        _Softmax.setup_context(ctx, inputs, probs)
        ctx.save_for_forward(probs)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        (probs,), (dim, temperature, _) = ctx.saved_tensors, ctx.options
        return ops.softmax_backward(probs, tangent.to(probs.dtype), dim, temperature, probs.dtype)  # J is symmetric


class _LogSoftmax(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, dim: Dims, temperature: float, dtype: torch.dtype | None) -> Tensor:
        return ops.log_softmax(x, dim, temperature, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, log_probs: Tensor) -> None:
        x, dim, temperature, _ = inputs
        ctx.save_for_backward(log_probs)
        ctx.options = dim, temperature, x.dtype

    @staticmethod
    def backward(ctx: Any, dlog_probs: Tensor) -> tuple:
        return log_softmax_backward(*ctx.saved_tensors, dlog_probs, *ctx.options), None, None, None


class _LogSoftmaxWithTangent(_LogSoftmax):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, log_probs: Tensor) -> None:
        _LogSoftmax.setup_context(ctx, inputs, log_probs)
        ctx.save_for_forward(log_probs)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        (log_probs,), (dim, temperature, _) = ctx.saved_tensors, ctx.options
        moved = wide(tangent) - (wide(log_probs).exp() * wide(tangent)).sum(dim=dim, keepdim=True)
        return (moved / temperature).to(log_probs.dtype)


class _SoftmaxBackward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(probs: Tensor, dprobs: Tensor, dim: Dims, temperature: float, dtype: torch.dtype) -> Tensor:
        return ops.softmax_backward(probs, dprobs, dim, temperature, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        probs, dprobs, *ctx.options = inputs
        ctx.save_for_backward(probs, dprobs)

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> tuple:
        (probs, dprobs), (dim, temperature, _) = ctx.saved_tensors, ctx.options
        of_probs = of_dprobs = None
        if ctx.needs_input_grad[0]:
            p, g, wide_h = wide(probs), wide(dprobs), wide(h)
            along = {"dim": dim, "keepdim": True}
            terms = (g - (p * g).sum(**along)) * wide_h - g * (p * wide_h).sum(**along)
            of_probs = (terms / temperature).to(probs.dtype)
        if ctx.needs_input_grad[1]:
            of_dprobs = softmax_backward(probs, h.to(probs.dtype), dim, temperature, dprobs.dtype)
        return of_probs, of_dprobs, None, None, None


class _LogSoftmaxBackward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(log_probs: Tensor, dlog_probs: Tensor, dim: Dims, temperature: float, dtype: torch.dtype) -> Tensor:
        return ops.log_softmax_backward(log_probs, dlog_probs, dim, temperature, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        log_probs, dlog_probs, *ctx.options = inputs
        ctx.save_for_backward(log_probs, dlog_probs)

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> tuple:
        (log_probs, dlog_probs), (dim, temperature, _) = ctx.saved_tensors, ctx.options
        wide_h = wide(h)
        weighted = wide(log_probs).exp() * wide_h
        of_log_probs = of_dlog_probs = None
        if ctx.needs_input_grad[0]:
            total = wide(dlog_probs).sum(dim=dim, keepdim=True)
            of_log_probs = (-weighted * total / temperature).to(log_probs.dtype)
        if ctx.needs_input_grad[1]:
            total = weighted.sum(dim=dim, keepdim=True)
            of_dlog_probs = ((wide_h - total) / temperature).to(dlog_probs.dtype)
        return of_log_probs, of_dlog_probs, None, None, None


class _LogSumExp(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, dim: Dims, keepdim: bool, temperature: float) -> Tensor:
        return ops.logsumexp(x, dim, keepdim, temperature)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, lse: Tensor) -> None:
        x, dim, _, temperature = inputs
        ctx.save_for_backward(x)
        ctx.options = dim, temperature

    @staticmethod
    def backward(ctx: Any, dlse: Tensor) -> tuple:
        (x,), (dim, temperature) = ctx.saved_tensors, ctx.options
        per_row = [1 if axis in dim else size for axis, size in enumerate(x.shape)]
        scale = dlse.reshape(per_row) / temperature
        probs = softmax(x, dim, temperature, dlse.dtype)
        # In place where nobody else has seen the probabilities: a large array less.
        dx = probs * scale if recorded(probs, scale) else probs.mul_(scale)
        return dx.to(x.dtype), None, None, None


class _LogSumExpWithTangent(_LogSumExp):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, lse: Tensor) -> None:
        _LogSumExp.setup_context(ctx, inputs, lse)
        ctx.save_for_forward(inputs[0], lse)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        (x, lse), (dim, temperature) = ctx.saved_tensors, ctx.options
        probs = ops.softmax(x, dim, temperature, lse.dtype)
        return ((probs * tangent).sum(dim=dim) / temperature).reshape(lse.shape).to(lse.dtype)
