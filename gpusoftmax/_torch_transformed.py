"""The functions of _torch_rows.py and _torch_losses.py of logits that go through a transform, see _torch_transform.py.

A value is one call of a kernel, which transforms the logits where it reads them. So is the first derivative where the
kernel has one that brings it back to the logits as they were given; otherwise the gradient with respect to the
transformed logits z is, and operations of torch bring it back. Where it is to be differentiated again, z is made by
operations of torch, and the formulas that autograd knows go on from there; in forward mode and under torch.func so is
the value.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpusoftmax import _torch_losses as losses
from gpusoftmax import _torch_ops as ops
from gpusoftmax import _torch_rows as rows
from gpusoftmax import _torch_transform_ops as kernels
from gpusoftmax._torch_losses import Loss, Tokens
from gpusoftmax._torch_transform import Dims, Through, of_temperature_and_bias, pulled_back, transformed


class Op(NamedTuple):
    """An operation. Its functions take the Call and the logits, and what else they need, see `_Transformed`."""

    value: Callable  # by a kernel
    composed: Callable  # by operations that autograd knows
    dx: Callable  # the gradient with respect to the logits, from kernels
    dz: Callable  # and with respect to the transformed ones, as operations that autograd knows
    value_and_dx: Callable | None = None  # on the CPU, if that is one kernel: for the gradient 1 of the value
    dtarget: Callable | None = None  # the gradient with respect to probabilities of the target, if it has any
    counts: Callable | None = None  # which rows are read for the value, or for given gradients, if not all
    keeps: bool = False  # the value, for dx, dz and dtarget
    takes_temperature: bool = True


class Call(NamedTuple):
    """What is done, beside the logits and their transform."""

    op: Op
    dim: Dims
    options: tuple
    target: Tensor | None = None
    weight: Tensor | None = None
    shares: Tensor | None = None
    row_weight: Tensor | None = None


def softmax(x: Tensor, dim: Dims, through: float | Through, dtype: torch.dtype | None) -> Tensor:
    if type(through) is float:
        return rows.softmax(x, dim, through, dtype)
    return called(Call(_SOFTMAX, dim, (dtype,)), x, through)[0]


def log_softmax(x: Tensor, dim: Dims, through: float | Through, dtype: torch.dtype | None) -> Tensor:
    if type(through) is float:
        return rows.log_softmax(x, dim, through, dtype)
    return called(Call(_LOG_SOFTMAX, dim, (dtype,)), x, through)[0]


def logsumexp(x: Tensor, dim: Dims, keepdim: bool, through: float | Through) -> Tensor:
    """A row that is masked whole has the gradient 0."""
    if type(through) is float:
        return rows.logsumexp(x, dim, keepdim, through)
    return called(Call(_LOGSUMEXP, dim, (keepdim,)), x, through._replace(empty_row="zero"))[0]


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    loss: Loss,
    through: float | Through,
    inplace: bool = False,
) -> Tensor:
    """inplace: with the gradient in the memory of the logits, where one is recorded."""
    if through == 1.0:
        function = losses.cross_entropy_in_place if inplace else losses.cross_entropy
        return function(logits, target, weight, loss)
    if type(through) is float:
        through = Through(through)
    if inplace and losses.can_be_in_place(logits, through.temperatures, through.bias):
        return losses.InPlaceCrossEntropy.apply(logits, target, weight, loss, through)
    losses.check_weight(weight)
    return called(Call(_CROSS_ENTROPY, (ops.class_dim(logits),), loss, target, weight), logits, through)[0]


def token_logprobs(
    logits: Tensor, target: Tensor, tokens: Tokens, through: float | Through
) -> tuple[Tensor | None, ...]:
    """logprob, lse, entropy, rank, argmax."""
    if type(through) is float:
        return losses.token_logprobs(logits, target, tokens._replace(temperature=through))
    made = iter(called(Call(_TOKEN_LOGPROBS, (tokens.dim,), tokens, target), logits, through))
    return tuple([next(made) if wanted else None for wanted in (True, *tokens[3:7])])


def called(call: Call, x: Tensor, through: Through) -> tuple[Tensor, ...]:
    if rows.is_transforming():
        return call.op.composed(call, _read(call, x), through)
    *numbers, temperatures, bias, mask, valid = through
    if rows.recorded(x, *[one for one in (temperatures, bias, call.target, call.shares) if one is not None]):
        beside = temperatures, bias, mask, valid, *call[3:]
        made = _Transformed.apply(call.op, call.dim, call.options, tuple(numbers), x, *beside)
        return made if isinstance(made, tuple) else (made,)
    return call.op.value(call, x, through)


def _read(call: Call, x: Tensor, upstream: tuple[Tensor | None, ...] | None = None) -> Tensor:
    """The logits, with 0 in rows that are not read, whatever these hold. upstream: the gradients they are read for."""
    counts = None if call.op.counts is None else call.op.counts(call, x, upstream)
    return x if counts is None else torch.where(counts.unsqueeze(*call.dim), x, 0)


class _Transformed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, op: Op, dim: Dims, options: tuple, numbers: tuple, x: Tensor, *beside: Tensor | None
    ) -> tuple[Tensor, ...]:
        call, through = Call(op, dim, options, *beside[4:]), Through(*numbers, *beside[:4])
        ctx.dlogits, made = None, None
        if op.value_and_dx is not None and losses.can_look(x):
            # As in _FusedCrossEntropy: on the CPU loss and gradient come from one read.
            *made, ctx.dlogits = op.value_and_dx(call, x, through, _dtype_of_gradient(ctx, x))
        made = tuple(made or op.value(call, x, through))
        ctx.given = op, dim, options, numbers
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[one for one in made if not one.is_floating_point()])
        ctx.save_for_backward(x, *beside, *(made if op.keeps else ()))
        return made

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple:
        if all(one is None for one in upstream):
            return (None,) * 13
        x, *others = ctx.saved_tensors
        beside, made = others[:8], others[8:]
        op, dim, options, numbers = ctx.given
        call, through = Call(op, dim, options, *beside[4:]), Through(*numbers, *beside[:4])
        of_logits, of_target = ctx.needs_input_grad[4:7], ctx.needs_input_grad[9::2]
        dlogits, ctx.dlogits = ctx.dlogits, None
        given = x, through.temperatures, through.bias, call.target, call.shares, *upstream
        is_recorded = rows.recorded(*[one for one in given if one is not None])
        x = _read(call, x, upstream) if is_recorded else x
        dtarget = op.dtarget(call, x, through, made, upstream, is_recorded) if any(of_target) else None
        targets = [dtarget if wanted else None for wanted in of_target]
        if not any(of_logits):
            return *[None] * 9, targets[0], None, targets[1], None
        if is_recorded:
            takes = op.takes_temperature
            z, left, empty = transformed(x, dim, through, takes)
            dz = op.dz(call, z, left, upstream, made)
            dz = dz if empty is None else torch.where(empty, 0, dz)
            dx = pulled_back(dz, x, dim, through, takes)
        else:
            kept = made if dlogits is None else [dlogits]
            dx = op.dx(call, x, through, kept, upstream, _dtype_of_gradient(ctx, x))
        of_others = of_temperature_and_bias(dx, x, dim, through, of_logits[1:])
        return *[None] * 4, dx.to(x.dtype), *of_others, None, None, targets[0], None, targets[1], None


def _dtype_of_gradient(ctx: Any, x: Tensor) -> torch.dtype:
    """Of that of the logits while it is worked on: not rounded to half types if sums are taken of it."""
    return ops.row_dtype(x.dtype) if any(ctx.needs_input_grad[5:7]) else x.dtype


# ---------------------------------------------------------------- softmax, log_softmax, logsumexp


def _softmax_value(call: Call, x: Tensor, through: Through) -> tuple[Tensor]:
    return (kernels.softmax_transformed(x, call.dim, *call.options, *through),)


def _softmax_composed(call: Call, x: Tensor, through: Through) -> tuple[Tensor]:
    z, left, empty = transformed(x, call.dim, through)
    probs = rows.softmax(z, call.dim, left, call.options[0] or x.dtype)
    return (probs if empty is None else torch.where(empty, 0, probs),)


def _softmax_dx(
    call: Call, x: Tensor, through: Through, made: list[Tensor], upstream: tuple[Tensor], dtype: torch.dtype
) -> Tensor:
    if through.is_mask:  # where it is masked, so are the probabilities 0
        return ops.softmax_backward(*made, *upstream, call.dim, through.temperature, dtype)
    dz = ops.softmax_backward(*made, *upstream, call.dim, 1.0, ops.row_dtype(x.dtype))
    return pulled_back(dz, x, call.dim, through)


def _softmax_dz(call: Call, z: Tensor, left: float, upstream: tuple[Tensor], made: list[Tensor]) -> Tensor:
    probs = rows.softmax(z, call.dim, left, None)
    return rows.softmax_backward(probs, upstream[0].to(z.dtype), call.dim, left, z.dtype)


def _log_softmax_value(call: Call, x: Tensor, through: Through) -> tuple[Tensor]:
    return (kernels.log_softmax_transformed(x, call.dim, *call.options, *through),)


def _log_softmax_composed(call: Call, x: Tensor, through: Through) -> tuple[Tensor]:
    z, left, empty = transformed(x, call.dim, through)
    log_probs = rows.log_softmax(z, call.dim, left, call.options[0] or x.dtype)
    return (log_probs if empty is None else torch.where(empty, -torch.inf, log_probs),)


def _log_softmax_dx(
    call: Call, x: Tensor, through: Through, made: list[Tensor], upstream: tuple[Tensor], dtype: torch.dtype
) -> Tensor:
    left = through.temperature if through.is_mask else 1.0
    dz = ops.log_softmax_backward(*made, *upstream, call.dim, left, ops.row_dtype(x.dtype))
    if through.empty_row == "zero":  # rows of which nothing is left
        (log_probs,) = made
        dz = torch.where((log_probs == -torch.inf).all(dim=call.dim, keepdim=True), 0, dz)
    return pulled_back(dz, x, call.dim, through)


def _log_softmax_dz(call: Call, z: Tensor, left: float, upstream: tuple[Tensor], made: list[Tensor]) -> Tensor:
    log_probs = rows.log_softmax(z, call.dim, left, None)
    return rows.log_softmax_backward(log_probs, upstream[0].to(z.dtype), call.dim, left, z.dtype)


def _logsumexp_value(call: Call, x: Tensor, through: Through) -> tuple[Tensor]:
    return (kernels.logsumexp_transformed(x, call.dim, *call.options, *through),)


def _logsumexp_composed(call: Call, x: Tensor, through: Through) -> tuple[Tensor]:
    z, left, empty = transformed(x, call.dim, through)
    lse = rows.logsumexp(z, call.dim, call.options[0], left)
    return (torch.where(empty.reshape(lse.shape), -torch.inf, lse),)


def _logsumexp_dx(
    call: Call, x: Tensor, through: Through, made: list[Tensor], upstream: tuple[Tensor], dtype: torch.dtype
) -> Tensor:
    left = through.temperature if through.is_mask else 1.0
    dlse = upstream[0].reshape(_per_row(x, call.dim)) / left
    return pulled_back(kernels.softmax_transformed(x, call.dim, dlse.dtype, *through).mul_(dlse), x, call.dim, through)


def _logsumexp_dz(call: Call, z: Tensor, left: float, upstream: tuple[Tensor], made: list[Tensor]) -> Tensor:
    return rows.softmax(z, call.dim, left, None) * (upstream[0].reshape(_per_row(z, call.dim)) / left)


def _per_row(x: Tensor, dim: Dims) -> list[int]:
    return [1 if axis in dim else size for axis, size in enumerate(x.shape)]


# ---------------------------------------------------------------- losses


def _cross_entropy_value(call: Call, x: Tensor, through: Through) -> tuple[Tensor]:
    return (kernels.cross_entropy_transformed(x, call.target, call.weight, *call.options, *through),)


def _labelled_rows(call: Call, x: Tensor, upstream: tuple[Tensor | None, ...] | None) -> Tensor:
    return ~losses.is_ignored(call.target, Loss(*call.options).ignore_index)


def _cross_entropy_with_grad(call: Call, x: Tensor, through: Through, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    beside = call.target, call.weight, *call.options
    return kernels.cross_entropy_transformed_with_grad(dtype, x, *beside, *through)


def _cross_entropy_composed(call: Call, x: Tensor, through: Through) -> tuple[Tensor]:
    z, _, empty = transformed(x, call.dim, through, takes_temperature=False)
    loss = Loss(*call.options)
    if empty is None:
        return (losses.cross_entropy(z, call.target, call.weight, loss),)
    of_rows = losses.cross_entropy(z, call.target, call.weight, loss._replace(reduction="none"))
    of_rows = torch.where(empty.reshape(of_rows.shape), 0, of_rows)
    return (losses.reduced(of_rows, call.target, call.weight, loss, z.shape[call.dim[0]]),)


def _cross_entropy_dx(
    call: Call, x: Tensor, through: Through, kept: list[Tensor], upstream: tuple[Tensor], dtype: torch.dtype
) -> Tensor:
    (dloss,), loss = upstream, Loss(*call.options)
    is_one = loss.reduction != "none" and losses.can_look(dloss) and dloss.item() == 1
    if not kept or (kept[0].dtype.itemsize == 2 and not is_one):
        # Half types are rounded only when what comes from above is in them.
        wide = dtype if is_one else ops.row_dtype(dtype)
        _, *kept = kernels.cross_entropy_transformed_with_grad(
            wide, x, call.target, call.weight, *loss._replace(validate=False), *through
        )
    if is_one:
        return kept[0]
    if loss.reduction == "none":
        dloss = torch.where(losses.is_ignored(call.target, loss.ignore_index), 0, dloss).unsqueeze(call.dim[0])
    return kept[0].mul_(dloss)


def _cross_entropy_dz(call: Call, z: Tensor, left: float, upstream: tuple[Tensor], made: list[Tensor]) -> Tensor:
    return losses.graph_of_dlogits(z, call.target, call.weight, upstream[0], Loss(*call.options))


def _token_logprobs_value(call: Call, x: Tensor, through: Through) -> tuple[Tensor, ...]:
    dim, _, *options = call.options
    return tuple(kernels.token_logprobs_transformed(x, call.target, dim, *options, *through))


def _rows_of_tokens(call: Call, x: Tensor, upstream: tuple[Tensor | None, ...] | None) -> Tensor | None:
    tokens = Tokens(*call.options)
    if upstream is None:
        is_of_all = tokens.lse or tokens.entropy
    else:
        _, *others = _gradients_of_tokens(tokens, upstream)
        is_of_all = any(one is not None for one in others)
    return None if is_of_all else losses.rows_of_tokens(call.target, tokens, x)


def _token_logprobs_composed(call: Call, x: Tensor, through: Through) -> tuple[Tensor, ...]:
    tokens = Tokens(*call.options)
    z, left, _ = transformed(x, call.dim, through)
    logprob, _, *others = losses.token_logprobs(z, call.target, tokens._replace(temperature=left, lse=False))
    if tokens.lse or tokens.entropy:  # by itself: nothing comes back to a row that is read for those alone
        alone = call._replace(options=tokens._replace(lse=False, entropy=False, rank=False, argmax=False))
        (logprob,) = _token_logprobs_composed(alone, _read(alone, x), through)
    lse = None
    if tokens.lse:  # by itself: of a row of which nothing is left it has the gradient 0
        of_rows = Call(_LOGSUMEXP, call.dim, (False,))
        (lse,) = _logsumexp_composed(of_rows, x, through._replace(empty_row="zero"))
    return tuple(one for one in (logprob, lse, *others) if one is not None)


def _gradients_of_tokens(tokens: Tokens, upstream: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Those with respect to logprob, lse and entropy."""
    dlogprob, *others = upstream
    return dlogprob, others[0] if tokens.lse else None, others[tokens.lse] if tokens.entropy else None


def _token_logprobs_dx(
    call: Call,
    x: Tensor,
    through: Through,
    made: list[Tensor],
    upstream: tuple[Tensor | None, ...],
    dtype: torch.dtype,
) -> Tensor:
    tokens = Tokens(*call.options)
    dlogprob, dlse, dentropy = _gradients_of_tokens(tokens, upstream)
    wide = dtype if dlse is None else dlse.dtype
    dx = None
    if dlogprob is not None or dentropy is not None:
        beside = call.target, dlogprob, dentropy, tokens.dim, tokens.ignore_index
        dx = kernels.token_logprobs_transformed_backward(wide, x, *beside, *through)
    if dlse is not None:
        of_lse = _logsumexp_dx(call, x, through._replace(empty_row="zero"), made, (dlse,), dtype)
        dx = of_lse if dx is None else of_lse.add_(dx)
    return dx


def _token_logprobs_dz(
    call: Call, z: Tensor, left: float, upstream: tuple[Tensor | None, ...], made: list[Tensor]
) -> Tensor:
    tokens = Tokens(*call.options)._replace(temperature=left)
    dlogprob, dlse, dentropy = _gradients_of_tokens(tokens, upstream)
    dz = losses.graph_of_tokens(z, call.target, dlogprob, None, dentropy, tokens)
    if dlse is None:
        return dz
    empty = (z == -torch.inf).all(dim=call.dim, keepdim=True)
    of_lse = torch.where(empty, 0, _logsumexp_dz(call, z.masked_fill(empty, 0), left, (dlse,), made))
    return of_lse if dz is None else dz + of_lse


_SOFTMAX = Op(_softmax_value, _softmax_composed, _softmax_dx, _softmax_dz, keeps=True)
_LOG_SOFTMAX = Op(_log_softmax_value, _log_softmax_composed, _log_softmax_dx, _log_softmax_dz, keeps=True)
_LOGSUMEXP = Op(_logsumexp_value, _logsumexp_composed, _logsumexp_dx, _logsumexp_dz)
_CROSS_ENTROPY = Op(
    _cross_entropy_value,
    _cross_entropy_composed,
    _cross_entropy_dx,
    _cross_entropy_dz,
    value_and_dx=_cross_entropy_with_grad,
    counts=_labelled_rows,
    takes_temperature=False,
)
_TOKEN_LOGPROBS = Op(
    _token_logprobs_value,
    _token_logprobs_composed,
    _token_logprobs_dx,
    _token_logprobs_dz,
    counts=_rows_of_tokens,
)
