"""kl_div as a function of torch's autograd, which differentiates it with respect to both arrays, as often as asked.

With w the weight of a row times the gradient from above (for "mean" over what it divides by), the gradients are those
of kernels/cpu/kl_div.py, by its kernels: w (q - p) / T and w p (d - KL) / T. Where they are to be differentiated again,
the same is written in operations of torch on softmax and log_softmax, which _torch_rows.py differentiates.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

import gpusoftmax
from gpusoftmax import _torch_ops as ops
from gpusoftmax import _torch_rows as rows


class Divergence(NamedTuple):
    """Options of kl_div; `number` is a normalizer that is no tensor."""

    dim: int
    temperature: float
    reduction: str
    number: float | None


def kl_div(
    logits: Tensor, target_logits: Tensor, row_weight: Tensor | None, normalizer: Tensor | None, options: Divergence
) -> Tensor:
    for name, one in (("row_weight", row_weight), ("normalizer", normalizer)):
        if one is not None and one.requires_grad and torch.is_grad_enabled():
            raise TypeError(f"{name} requires grad, and gets no gradient: pass {name}.detach()")
    if not rows.recorded(logits, target_logits):
        return kl_div_of_rows(logits, target_logits, row_weight, normalizer, *options)
    return rows.with_tangent(_KlDiv, _KlDivInForwardMode)(logits, target_logits, row_weight, normalizer, options)


def _fake_kl_div(logits, target_logits, row_weight, normalizer, dim, temperature, reduction, number):
    batch = [size for axis, size in enumerate(logits.shape) if axis != dim]
    return logits.new_empty(batch if reduction == "none" else (), dtype=ops.row_dtype(logits.dtype))


@ops.defined_as(
    "(Tensor logits, Tensor target_logits, Tensor? row_weight, Tensor? normalizer, int dim, float temperature, "
    "str reduction, float? number) -> Tensor",
    _fake_kl_div,
)
def kl_div_of_rows(
    logits: Tensor,
    target_logits: Tensor,
    row_weight: Tensor | None,
    normalizer: Tensor | None,
    dim: int,
    temperature: float,
    reduction: str,
    number: float | None,
) -> Tensor:
    given = {"axis": dim, "temperature": temperature, "row_weight": row_weight, "reduction": reduction}
    return gpusoftmax.kl_div(logits, target_logits, **given, normalizer=number if normalizer is None else normalizer)


def _fake_kl_div_backward(logits, target_logits, row_weight, dim, temperature, target_grad):
    return logits.new_empty(logits.shape), logits.new_empty(logits.shape if target_grad else (0,))


@ops.defined_as(
    "(Tensor logits, Tensor target_logits, Tensor row_weight, int dim, float temperature, bool target_grad)"
    " -> (Tensor, Tensor)",
    _fake_kl_div_backward,
)
def kl_div_backward(
    logits: Tensor, target_logits: Tensor, row_weight: Tensor, dim: int, temperature: float, target_grad: bool
) -> tuple[Tensor, Tensor]:
    """Of the sum of the divergences times the weights. Without target_grad the second one is empty."""
    given = {"axis": dim, "temperature": temperature, "row_weight": row_weight, "target_grad": target_grad}
    _, dlogits, dtarget = gpusoftmax.kl_div_with_grad(logits, target_logits, **given, reduction="sum")
    return dlogits, logits.new_empty(0) if dtarget is None else dtarget


class _KlDiv(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        logits: Tensor, target_logits: Tensor, row_weight: Tensor | None, normalizer: Tensor | None, options: Divergence
    ) -> Tensor:
        return kl_div_of_rows(logits, target_logits, row_weight, normalizer, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, loss: Tensor) -> None:
        *tensors, ctx.options = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple:
        logits, target_logits, row_weight, normalizer = ctx.saved_tensors
        upstream = _upstream(dloss, logits, row_weight, normalizer, ctx.options)
        if rows.recorded(logits, target_logits, dloss):
            dlogits, dtarget = _graph_of_gradients(logits, target_logits, row_weight, upstream, ctx.options)
        else:
            options = ctx.options.dim, ctx.options.temperature, ctx.needs_input_grad[1]
            dlogits, dtarget = kl_div_backward(logits, target_logits, upstream, *options)
        needed, target_needed, *_ = ctx.needs_input_grad
        return dlogits if needed else None, dtarget if target_needed else None, None, None, None


def _kl_div_tangent(ctx: Any, saved: list, tangent: Tensor | None, target_tangent: Tensor | None, *_: None) -> Tensor:
    logits, target_logits, row_weight, normalizer = saved
    logits, target_logits = rows.wide(logits), rows.wide(target_logits)
    one = torch.ones((), dtype=logits.dtype, device=logits.device)
    upstream = _upstream(one, logits, row_weight, normalizer, ctx.options)
    both = _graph_of_gradients(logits, target_logits, row_weight, upstream, ctx.options)
    moved = torch.zeros_like(logits)
    for gradient, of in zip(both, (tangent, target_tangent), strict=True):
        if of is not None:
            moved = moved + gradient * of
    return moved.sum(dim=ctx.options.dim) if ctx.options.reduction == "none" else moved.sum()


_KlDivInForwardMode = rows.in_forward_mode(_KlDiv, lambda given, loss: given[:4], _kl_div_tangent)


def _upstream(
    dloss: Tensor, logits: Tensor, row_weight: Tensor | None, normalizer: Tensor | None, options: Divergence
) -> Tensor:
    """What each row's divergence is multiplied by, in the format of dloss."""
    batch = [size for axis, size in enumerate(logits.shape) if axis != options.dim]
    if options.reduction == "mean":
        if normalizer is not None:
            divisor = normalizer.reshape(()).to(dloss.dtype)
        elif options.number is not None:
            divisor = options.number
        else:
            divisor = logits.numel() // logits.shape[options.dim] if row_weight is None else row_weight.sum()
        dloss = dloss / divisor
    weighted = dloss if row_weight is None else row_weight.to(dloss.dtype) * dloss
    return weighted.expand(batch)


def _graph_of_gradients(
    logits: Tensor, target_logits: Tensor, row_weight: Tensor | None, upstream: Tensor, options: Divergence
) -> tuple[Tensor, Tensor]:
    """Both gradients, as functions of the logits and of upstream that autograd knows."""
    dim, temperature, dtype = options.dim, options.temperature, upstream.dtype
    of_rows = (dim,), temperature, dtype
    counts = None if row_weight is None else (row_weight != 0).unsqueeze(dim)
    if counts is not None:  # a row of weight 0 may hold anything, of which a derivative would be NaN
        logits, target_logits = torch.where(counts, logits, 0), torch.where(counts, target_logits, 0)
    q, p = rows.softmax(logits, *of_rows), rows.softmax(target_logits, *of_rows)
    d = rows.log_softmax(target_logits, *of_rows) - rows.log_softmax(logits, *of_rows)
    d = torch.where(p > 0, d, 0)  # 0 log 0 = 0
    divergence = (p * d).sum(dim, keepdim=True)
    factor = (upstream / temperature).unsqueeze(dim)
    dlogits, dtarget = factor * (q - p), factor * p * (d - divergence)
    if counts is not None:  # whatever comes from above
        dlogits, dtarget = torch.where(counts, dlogits, 0), torch.where(counts, dtarget, 0)
    return dlogits.to(logits.dtype), dtarget.to(target_logits.dtype)
