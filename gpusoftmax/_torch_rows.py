"""softmax, log_softmax and logsumexp as functions of torch's autograd, which differentiates them as often as asked.

With p = softmax(x / T), f = p (g - s) / T its backward for the gradient g, s = sum(p g), and a gradient h with respect
to f, the backward of the backward is

    dg = p (h - sum(p h)) / T                        the same product, for the Jacobian of softmax is symmetric
    dp = ((g - s) h - g sum(p h)) / T                from where softmax goes on as before

and with y = log_softmax(x / T), f = (g - exp(y) sum(g)) / T,

    dg = (h - sum(exp(y) h)) / T
    dy = -exp(y) h sum(g) / T

The gradient of logsumexp is g p / T, a product of functions that are differentiated already. So are tangents: along v,

    dp = p (v - sum(p v)) / T        dy = (v - sum(exp(y) v)) / T        dlse = sum(p v) / T

The first backward is one kernel; what is beyond it is written in operations of torch, in float32 at least.
"""

import functools
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
    if torch.autograd.forward_ad._current_level < 0:
        if torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            # torch.compile does not see that the argument of a torch.func.grad requires one, and would leave out the
            # backward: what comes of it does.
            return lambda *arguments: function.apply(*[_seen(one) for one in arguments])
        if not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active():
            return _with_context(function).apply
        return function.apply
    return lambda *arguments: forward.apply(*[_Whole(one) if isinstance(one, tuple) else one for one in arguments])


@functools.cache
def _with_context(function: type) -> type:
    """The same function of autograd without the setup_context that torch.func needs: where there is one, `apply` takes
    30 us to bind the arguments to their names.
    """

    def forward(ctx: Any, *given: Any) -> Any:
        made = function.forward(*given)
        function.setup_context(ctx, given, made)
        return made

    methods = {"forward": staticmethod(forward), "backward": staticmethod(function.backward)}
    return type(function.__name__, (torch.autograd.Function,), methods)


def _seen(given: Any) -> Any:
    return given.view_as(given) if isinstance(given, Tensor) and given.is_floating_point() else given


class _Whole:
    """A tuple among the arguments: torch.func would take it apart, and then look for a tangent of each part."""

    def __init__(self, value: tuple):
        self.value = value


def in_forward_mode(function: type, saved: Callable[[list, Any], tuple], jvp: Callable[..., Any]) -> type:
    """A function of autograd as with_tangent needs it where forward mode is on.

    saved(given, made): the tensors among its arguments and results that it saves.
    jvp(ctx, saved, *tangents): in operations that can be differentiated, for tangents are.
    """

    class InForwardMode(function):
        @staticmethod
        def forward(*given: Any) -> Any:
            return function.forward(*_parts(given))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, made: Any) -> None:
            given = _parts(inputs)
            function.setup_context(ctx, given, made)
            ctx.save_for_forward(*saved(given, made))

        @staticmethod
        def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
            # Meanwhile torch leaves all forward mode off, and so would lose what an outer level differentiates.
            with torch.autograd.forward_ad._set_fwd_grad_enabled(True):
                return jvp(ctx, [_primal(one) for one in ctx.saved_tensors], *tangents)

    return InForwardMode


def _parts(given: tuple) -> list:
    return [one.value if isinstance(one, _Whole) else one for one in given]


def _primal(saved: Tensor | None) -> Tensor | None:
    """Without the tangent, of which jvp has been told."""
    if saved is None or not saved.is_floating_point():
        return saved
    if torch._C._functorch.is_batchedtensor(saved):  # vmap has no rule for it
        functorch = torch._C._functorch
        place = functorch.maybe_get_bdim(saved), functorch.maybe_get_level(saved)
        return functorch._add_batch_dim(_primal(functorch.get_unwrapped(saved)), *place)
    return torch.autograd.forward_ad.unpack_dual(saved).primal


def softmax(x: Tensor, dim: Dims, temperature: float, dtype: torch.dtype | None) -> Tensor:
    if recorded(x):
        return with_tangent(_Softmax, _SoftmaxInForwardMode)(x, dim, temperature, dtype)
    return ops.softmax(x, dim, temperature, dtype)


def log_softmax(x: Tensor, dim: Dims, temperature: float, dtype: torch.dtype | None) -> Tensor:
    if recorded(x):
        return with_tangent(_LogSoftmax, _LogSoftmaxInForwardMode)(x, dim, temperature, dtype)
    return ops.log_softmax(x, dim, temperature, dtype)


def logsumexp(x: Tensor, dim: Dims, keepdim: bool, temperature: float) -> Tensor:
    if recorded(x):
        return with_tangent(_LogSumExp, _LogSumExpInForwardMode)(x, dim, keepdim, temperature)
    return ops.logsumexp(x, dim, keepdim, temperature)


def softmax_backward(probs: Tensor, dprobs: Tensor, dim: Dims, temperature: float, dtype: torch.dtype) -> Tensor:
    """The gradient with respect to the logits, of `dtype`; itself differentiable where gradients are recorded."""
    if recorded(probs, dprobs):
        function = with_tangent(_SoftmaxBackward, _SoftmaxBackwardInForwardMode)
        return function(probs, dprobs, dim, temperature, dtype)
    return ops.softmax_backward(probs, dprobs, dim, temperature, dtype)


def log_softmax_backward(
    log_probs: Tensor, dlog_probs: Tensor, dim: Dims, temperature: float, dtype: torch.dtype
) -> Tensor:
    """As softmax_backward, for log_softmax."""
    if recorded(log_probs, dlog_probs):
        function = with_tangent(_LogSoftmaxBackward, _LogSoftmaxBackwardInForwardMode)
        return function(log_probs, dlog_probs, dim, temperature, dtype)
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


def _softmax_tangent(ctx: Any, saved: list, tangent: Tensor, *_: None) -> Tensor:
    (probs,), (dim, temperature, _) = saved, ctx.options
    return softmax_backward(probs, tangent.to(probs.dtype), dim, temperature, probs.dtype)  # J is symmetric


_SoftmaxInForwardMode = in_forward_mode(_Softmax, lambda given, probs: (probs,), _softmax_tangent)


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


def _log_softmax_tangent(ctx: Any, saved: list, tangent: Tensor, *_: None) -> Tensor:
    (log_probs,), (dim, temperature, _) = saved, ctx.options
    moved = wide(tangent) - (wide(log_probs).exp() * wide(tangent)).sum(dim=dim, keepdim=True)
    return (moved / temperature).to(log_probs.dtype)


_LogSoftmaxInForwardMode = in_forward_mode(_LogSoftmax, lambda given, log_probs: (log_probs,), _log_softmax_tangent)


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


def _softmax_backward_tangent(
    ctx: Any, saved: list, of_probs: Tensor | None, of_dprobs: Tensor | None, *_: None
) -> Tensor:
    (probs, dprobs), (dim, temperature, dtype) = saved, ctx.options
    moved = 0.0
    if of_probs is not None:
        p, g, dp, along = wide(probs), wide(dprobs), wide(of_probs), {"dim": dim, "keepdim": True}
        moved = (dp * (g - (p * g).sum(**along)) - p * (dp * g).sum(**along)) / temperature
    if of_dprobs is not None:
        moved = moved + softmax_backward(probs, of_dprobs.to(probs.dtype), dim, temperature, dtype)
    return moved.to(dtype)


_SoftmaxBackwardInForwardMode = in_forward_mode(
    _SoftmaxBackward, lambda given, made: given[:2], _softmax_backward_tangent
)


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


def _log_softmax_backward_tangent(
    ctx: Any, saved: list, of_log_probs: Tensor | None, of_dlog_probs: Tensor | None, *_: None
) -> Tensor:
    (log_probs, dlog_probs), (dim, temperature, dtype) = saved, ctx.options
    along, probs, moved = {"dim": dim, "keepdim": True}, wide(log_probs).exp(), 0.0
    if of_log_probs is not None:
        moved = -probs * wide(of_log_probs) * wide(dlog_probs).sum(**along)
    if of_dlog_probs is not None:
        moved = moved + wide(of_dlog_probs) - probs * wide(of_dlog_probs).sum(**along)
    return (moved / temperature).to(dtype)


_LogSoftmaxBackwardInForwardMode = in_forward_mode(
    _LogSoftmaxBackward, lambda given, made: given[:2], _log_softmax_backward_tangent
)


class _LogSumExp(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, dim: Dims, keepdim: bool, temperature: float) -> Tensor:
        return ops.logsumexp(x, dim, keepdim, temperature)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, lse: Tensor) -> None:
        x, *ctx.options = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, dlse: Tensor) -> tuple:
        (x,), (dim, _, temperature) = ctx.saved_tensors, ctx.options
        per_row = [1 if axis in dim else size for axis, size in enumerate(x.shape)]
        scale = dlse.reshape(per_row)
        scale = scale if temperature == 1 else scale / temperature
        probs = softmax(x, dim, temperature, dlse.dtype)
        # In place where nobody else has seen the probabilities: a large array less.
        dx = probs * scale if recorded(probs, scale) else probs.mul_(scale)
        return dx.to(x.dtype), None, None, None


def _logsumexp_tangent(ctx: Any, saved: list, tangent: Tensor, *_: None) -> Tensor:
    (x,), (dim, keepdim, temperature) = saved, ctx.options
    probs = softmax(x, dim, temperature, ops.row_dtype(x.dtype))
    products = probs * tangent / temperature
    return products.sum(dim=dim, keepdim=keepdim) if products.ndim else products


_LogSumExpInForwardMode = in_forward_mode(_LogSumExp, lambda given, lse: given[:1], _logsumexp_tangent)

ops.differentiate("softmax", _Softmax)
ops.differentiate("log_softmax", _LogSoftmax)
ops.differentiate("logsumexp", _LogSumExp)
ops.differentiate("softmax_backward", _SoftmaxBackward)
ops.differentiate("log_softmax_backward", _LogSoftmaxBackward)
