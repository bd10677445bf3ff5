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

from typing import Any

import torch
from torch import Tensor

from gpusoftmax import _torch_ops as ops

Dims = tuple[int, ...]


def softmax(x: Tensor, dim: Dims, temperature: float, dtype: torch.dtype | None) -> Tensor:
    if x.requires_grad and torch.is_grad_enabled():
        return _Softmax.apply(x, dim, temperature, dtype)
    return ops.softmax(x, dim, temperature, dtype)


def log_softmax(x: Tensor, dim: Dims, temperature: float, dtype: torch.dtype | None) -> Tensor:
    if x.requires_grad and torch.is_grad_enabled():
        return _LogSoftmax.apply(x, dim, temperature, dtype)
    return ops.log_softmax(x, dim, temperature, dtype)


def logsumexp(x: Tensor, dim: Dims, keepdim: bool, temperature: float) -> Tensor:
    if x.requires_grad and torch.is_grad_enabled():
        return _LogSumExp.apply(x, dim, keepdim, temperature)
    return ops.logsumexp(x, dim, keepdim, temperature)


def softmax_backward(probs: Tensor, dprobs: Tensor, dim: Dims, temperature: float, dtype: torch.dtype) -> Tensor:
    """The gradient with respect to the logits, of `dtype`; itself differentiable where gradients are recorded."""
    if torch.is_grad_enabled() and (probs.requires_grad or dprobs.requires_grad):
        return _SoftmaxBackward.apply(probs, dprobs, dim, temperature, dtype)
    return ops.softmax_backward(probs, dprobs, dim, temperature, dtype)


def log_softmax_backward(
    log_probs: Tensor, dlog_probs: Tensor, dim: Dims, temperature: float, dtype: torch.dtype
) -> Tensor:
    """As softmax_backward, for log_softmax."""
    if torch.is_grad_enabled() and (log_probs.requires_grad or dlog_probs.requires_grad):
        return _LogSoftmaxBackward.apply(log_probs, dlog_probs, dim, temperature, dtype)
    return ops.log_softmax_backward(log_probs, dlog_probs, dim, temperature, dtype)


def wide(x: Tensor) -> Tensor:
    """In float32 at least, where sums of many terms lose nothing."""
    return x if x.dtype == torch.float64 else x.float()


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: Dims, temperature: float, dtype: torch.dtype | None) -> Tensor:
        probs = ops.softmax(x, dim, temperature, dtype)
        ctx.save_for_backward(probs)
        ctx.options = dim, temperature, x.dtype
        return probs

    @staticmethod
    def backward(ctx: Any, dprobs: Tensor) -> tuple:
        return softmax_backward(*ctx.saved_tensors, dprobs, *ctx.options), None, None, None


class _LogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: Dims, temperature: float, dtype: torch.dtype | None) -> Tensor:
        log_probs = ops.log_softmax(x, dim, temperature, dtype)
        ctx.save_for_backward(log_probs)
        ctx.options = dim, temperature, x.dtype
        return log_probs

    @staticmethod
    def backward(ctx: Any, dlog_probs: Tensor) -> tuple:
        return log_softmax_backward(*ctx.saved_tensors, dlog_probs, *ctx.options), None, None, None


class _SoftmaxBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, probs: Tensor, dprobs: Tensor, dim: Dims, temperature: float, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(probs, dprobs)
        ctx.options = dim, temperature
        return ops.softmax_backward(probs, dprobs, dim, temperature, dtype)

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> tuple:
        (probs, dprobs), (dim, temperature) = ctx.saved_tensors, ctx.options
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
    @staticmethod
    def forward(
        ctx: Any, log_probs: Tensor, dlog_probs: Tensor, dim: Dims, temperature: float, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(log_probs, dlog_probs)
        ctx.options = dim, temperature
        return ops.log_softmax_backward(log_probs, dlog_probs, dim, temperature, dtype)

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> tuple:
        (log_probs, dlog_probs), (dim, temperature) = ctx.saved_tensors, ctx.options
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
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: Dims, keepdim: bool, temperature: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.options = dim, temperature
        return ops.logsumexp(x, dim, keepdim, temperature)

    @staticmethod
    def backward(ctx: Any, dlse: Tensor) -> tuple:
        (x,), (dim, temperature) = ctx.saved_tensors, ctx.options
        per_row = [1 if axis in dim else size for axis, size in enumerate(x.shape)]
        scale = dlse.reshape(per_row) / temperature
        probs = softmax(x, dim, temperature, dlse.dtype)
        # In place where nobody else has seen the probabilities: a large array less.
        dx = probs * scale if probs.requires_grad else probs.mul_(scale)
        return dx.to(x.dtype), None, None, None
