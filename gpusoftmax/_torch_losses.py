"""cross_entropy and token_logprobs as functions of torch's autograd, which differentiates them as often as asked.

In the words of kernels/cpu/cross_entropy.py, with u the gradient with respect to the loss of a row (what comes from
above, for "mean" divided by the sum of the weights),

    dlogits_c = u (a (p_c - [c = t]) + b (p_c W - w_c))        a = (1 - eps) w_t        b = eps / V

comes from one of two kernels. On a GPU and when compiled, the backward computes it from the logits, with u read from
the device: one read and one write, nothing is rounded before u is in it, and the forward only reads. On the CPU, where
what comes from above can be looked at and is 1 as a rule, loss and gradient come from one read in the forward. Where it
is not 1, float32 and float64 are multiplied, and half types computed anew: in float16 small gradients would have
vanished before they met the loss scale.

Where the gradient is to be differentiated again, the same formula is written in operations of torch on p = softmax,
which _torch_rows.py differentiates. The gradient of token_logprobs likewise, by the formula that stands at
gpusoftmax.token_logprobs_backward.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpusoftmax import _torch_ops as ops
from gpusoftmax import _torch_rows as rows
from gpusoftmax import _torch_transform_ops as transformed_ops
from gpusoftmax._torch_warnings import warn_once


class Loss(NamedTuple):
    """Options of cross_entropy."""

    ignore_index: int
    reduction: str
    label_smoothing: float
    validate: bool | None = None


def cross_entropy(logits: Tensor, target: Tensor, weight: Tensor | None, loss: Loss) -> Tensor:
    check_weight(weight)
    if not rows.recorded(logits):
        return ops.cross_entropy(logits, target, weight, *loss)[0]
    backward_alone = torch.autograd.forward_ad._current_level < 0
    if backward_alone and can_look(logits):
        return _FusedCrossEntropy.apply(logits, target, weight, loss)
    return rows.with_tangent(_CrossEntropy, _CrossEntropyInForwardMode)(logits, target, weight, loss)[0]


def cross_entropy_in_place(logits: Tensor, target: Tensor, weight: Tensor | None, loss: Loss) -> Tensor:
    """As cross_entropy, with the gradient in the memory of the logits, where one is recorded."""
    if not can_be_in_place(logits):
        return cross_entropy(logits, target, weight, loss)
    check_weight(weight)
    return InPlaceCrossEntropy.apply(logits, target, weight, loss, None)


def can_be_in_place(logits: Tensor, *others: Tensor | None) -> bool:
    """Whether there is a gradient to overwrite the logits, and nobody but them wants it."""
    if not rows.recorded(logits) or torch.compiler.is_compiling():
        return False
    if rows.is_transforming():
        warn_once("cross_entropy(..., inplace=True) leaves the logits alone in forward mode and under torch.func")
        return False
    if logits.is_neg():
        warn_once("cross_entropy(..., inplace=True) takes memory of its own for the gradient of a lazily negated view")
        return False
    memory = logits if logits._base is None else logits._base
    if memory.is_leaf and memory.requires_grad:
        raise ValueError(
            "input is a leaf that requires grad, or a view of one, whose values inplace=True would overwrite: expected "
            "the result of other operations, or inplace=False"
        )
    if any(one is not None and one.requires_grad for one in others):
        raise ValueError(
            "temperature or bias requires grad, and with inplace=True there is a gradient for input alone: "
            "inplace=False, or pass it .detach()"
        )
    return True


def check_weight(weight: Tensor | None) -> None:
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        raise TypeError("weight requires grad, and class weights get no gradient: pass weight.detach()")


def can_look(tensor: Tensor) -> bool:
    """Whether the tensor has values, and nobody waits when Python looks at them: no tracer, no transformation."""
    return ops.is_eager((tensor,)) and tensor.is_cpu


class _CrossEntropy(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, target: Tensor, weight: Tensor | None, loss: Loss) -> tuple[Tensor, Tensor]:
        return ops.cross_entropy(logits, target, weight, *loss)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, outputs: tuple[Tensor, Tensor]) -> None:
        logits, target, weight, ctx.loss = inputs
        _, divisor = outputs
        ctx.mark_non_differentiable(divisor)
        ctx.save_for_backward(logits, target, weight, divisor)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, _: None) -> tuple:
        logits, target, weight, divisor = ctx.saved_tensors
        if rows.recorded(logits, dloss):
            return graph_of_dlogits(logits, target, weight, dloss, ctx.loss), None, None, None
        return _dlogits(logits, target, weight, divisor, dloss, ctx.loss), None, None, None


def _cross_entropy_tangent(ctx: Any, saved: list, tangent: Tensor, *_: None) -> tuple[Tensor, None]:
    logits, target, weight, divisor = saved
    dim, of_rows = ops.class_dim(logits), ctx.loss.reduction == "none"
    dloss = torch.ones(target.shape if of_rows else (), dtype=divisor.dtype, device=logits.device)
    moved = graph_of_dlogits(rows.wide(logits), target, weight, dloss, ctx.loss) * tangent
    return moved.sum(dim=dim) if of_rows else moved.sum(), None


_CrossEntropyInForwardMode = rows.in_forward_mode(
    _CrossEntropy, lambda given, made: (*given[:3], made[1]), _cross_entropy_tangent
)


ops.differentiate("cross_entropy", _CrossEntropy, lambda inputs: (*inputs[:3], Loss(*inputs[3:])))


class _FusedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, weight: Tensor | None, loss: Loss) -> Tensor:
        value, ctx.dlogits, divisor = ops.cross_entropy_with_grad(logits, target, weight, *loss)
        ctx.save_for_backward(logits, target, weight, divisor)
        ctx.loss = loss
        return value

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple:
        # Handed out once: whoever gets it may write into it. The next backward of a retained graph computes it anew.
        # What was saved is looked at only where it is needed: by now the logits may have been written over.
        loss = ctx.loss
        if torch.is_grad_enabled() or rows.recorded(dloss):
            logits, target, weight, _ = ctx.saved_tensors
            return graph_of_dlogits(logits, target, weight, dloss, loss), None, None, None
        dlogits, ctx.dlogits = ctx.dlogits, None
        as_it_is = loss.reduction != "none" and can_look(dloss) and dloss.item() == 1
        if dlogits is None or not as_it_is and dlogits.dtype in (torch.float16, torch.bfloat16):
            dlogits = _dlogits(*ctx.saved_tensors, dloss, loss)
        elif not as_it_is:
            target = ctx.saved_tensors[1] if loss.reduction == "none" else None
            dlogits = _times(dlogits, dloss, target, loss.ignore_index)
        return dlogits, None, None, None


def _dlogits(
    logits: Tensor, target: Tensor, weight: Tensor | None, divisor: Tensor, dloss: Tensor, loss: Loss
) -> Tensor:
    """The gradient with respect to the logits, from these. Eager float32 and float64 on the CPU get the bits of
    _FusedCrossEntropy.
    """
    ignore_index, reduction, label_smoothing, _ = loss
    options = logits, target, weight, ignore_index, label_smoothing
    if can_look(logits) and logits.dtype in (torch.float32, torch.float64):
        dlogits = ops.cross_entropy_backward(divisor, *options, logits.dtype)
        return _times(dlogits, dloss, target if reduction == "none" else None, ignore_index)
    if reduction != "none":
        return ops.cross_entropy_backward(divisor / dloss, *options, logits.dtype)
    if weight is None and not label_smoothing:
        # Minus the log-probabilities of the labels, whose backward takes a number for each row.
        dim = ops.class_dim(logits)
        return ops.token_logprobs_backward(logits, target, -dloss, None, dim, 1.0, ignore_index)
    dlogits = ops.cross_entropy_backward(divisor, *options, dloss.dtype)
    return dlogits.mul_(_per_row(dloss, logits, target, ignore_index)).to(logits.dtype)


class InPlaceCrossEntropy(torch.autograd.Function):
    """through: a Through of _torch_transform.py, if the logits go through more than nothing."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, weight: Tensor | None, loss: Loss, through: Any) -> Tensor:
        if through is None:
            value = ops.cross_entropy_in_place(logits, target, weight, *loss)
        else:
            value = transformed_ops.cross_entropy_transformed_in_place(logits, target, weight, *loss, *through)
        ctx.dlogits = logits.detach()
        ctx.version = ctx.dlogits._version
        if loss.reduction == "none":
            ctx.save_for_backward(target)
        ctx.loss = loss
        return value

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple:
        dlogits, ctx.dlogits = ctx.dlogits, None
        if torch.is_grad_enabled() or dlogits is None:
            raise RuntimeError(
                "cross_entropy(..., inplace=True) was differentiated twice, but its logits are gone: inplace=False"
            )
        if dlogits._version != ctx.version:
            raise RuntimeError(
                "the logits of cross_entropy(..., inplace=True), which hold its gradient, were written to before the "
                "backward: leave them alone, or inplace=False"
            )
        target = ctx.saved_tensors[0] if ctx.loss.reduction == "none" else None
        return _times(dlogits, dloss, target, ctx.loss.ignore_index), None, None, None, None


def _times(dlogits: Tensor, dloss: Tensor, target: Tensor | None, ignore_index: int) -> Tensor:
    """dlogits, multiplied in place by one number, or, where there are targets, by one for each row."""
    if target is not None:
        return dlogits.mul_(_per_row(dloss, dlogits, target, ignore_index))
    return dlogits if can_look(dloss) and dloss.item() == 1 else dlogits.mul_(dloss)


def _per_row(dloss: Tensor, logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """The gradients with respect to the losses, to be multiplied with rows; ignored rows stay 0 whatever theirs is."""
    return torch.where(is_ignored(target, ignore_index), 0, dloss).unsqueeze(ops.class_dim(logits))


def is_ignored(labels: Tensor, ignore_index: int) -> Tensor:
    """Which labels are ignore_index, in 64 bits as for kernels: torch compares bytes with what it wraps around to."""
    return labels.long() == ignore_index


def graph_of_dlogits(logits: Tensor, target: Tensor, weight: Tensor | None, dloss: Tensor, loss: Loss) -> Tensor:
    """The gradient with respect to the logits, as a function of these and of dloss that autograd knows."""
    dim, dtype = ops.class_dim(logits), dloss.dtype
    n_cols = logits.shape[dim]
    target = target.long()
    counts = ~is_ignored(target, loss.ignore_index)
    logits = torch.where(counts.unsqueeze(dim), logits, 0)  # whatever a row holds that does not count
    is_class = (target >= 0) & (target < n_cols)
    column = target.clamp(0, n_cols - 1)
    weight_of_row = counts.to(dtype) if weight is None else weight.to(dtype)[column] * counts
    upstream = dloss / weight_of_row.sum() if loss.reduction == "mean" else dloss
    upstream = torch.where(counts, upstream, 0)
    upstream = torch.where(counts & ~is_class, torch.nan, upstream)  # as the kernels have it on a GPU
    share = loss.label_smoothing / n_cols
    of_target = upstream * (1 - loss.label_smoothing) * weight_of_row
    of_all = upstream * share * (n_cols if weight is None else weight.to(dtype).sum())
    probs = rows.softmax(logits, (dim,), 1.0, dtype)
    dlogits = probs * (of_target + of_all).unsqueeze(dim)
    dlogits = dlogits.scatter_add(dim, column.unsqueeze(dim), -of_target.unsqueeze(dim))
    if share:
        each = torch.ones(n_cols, dtype=dtype, device=logits.device) if weight is None else weight.to(dtype)
        each = each.reshape([n_cols if axis == dim else 1 for axis in range(logits.ndim)])
        dlogits = dlogits - (upstream * share).unsqueeze(dim) * each
    return torch.where(counts.unsqueeze(dim), dlogits, 0).to(logits.dtype)


def reduced(of_rows: Tensor, target: Tensor, weight: Tensor | None, loss: Loss, n_cols: int) -> Tensor:
    """The losses of rows as `loss` has them."""
    if loss.reduction != "mean":
        return of_rows.sum() if loss.reduction == "sum" else of_rows
    counts = ~is_ignored(target, loss.ignore_index)
    if weight is None:
        return of_rows.sum() / counts.sum()
    return of_rows.sum() / (weight.to(of_rows.dtype)[target.long().clamp(0, n_cols - 1)] * counts).sum()


# ---------------------------------------------------------------- tokens


class Tokens(NamedTuple):
    """Options of token_logprobs; four of them say what is wanted beside the log-probabilities."""

    dim: int
    temperature: float
    ignore_index: int
    lse: bool
    entropy: bool
    rank: bool
    argmax: bool
    validate: bool | None = None


def token_logprobs(logits: Tensor, target: Tensor, tokens: Tokens) -> tuple[Tensor | None, ...]:
    """logprob, lse, entropy, rank, argmax."""
    if rows.recorded(logits):
        made = rows.with_tangent(_TokenLogprobs, _TokenLogprobsInForwardMode)(logits, target, tokens)
    else:
        made = ops.token_logprobs(logits, target, *tokens)
    made = iter(made)
    return tuple([next(made) if wanted else None for wanted in (True, *tokens[3:7])])


class _TokenLogprobs(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, target: Tensor, tokens: Tokens) -> tuple[Tensor, ...]:
        return tuple(ops.token_logprobs(logits, target, *tokens))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, made: tuple[Tensor, ...]) -> None:
        logits, target, tokens = inputs
        ctx.save_for_backward(logits, target)
        ctx.tokens = tokens
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*made[1 + tokens.lse + tokens.entropy :])

    @staticmethod
    def backward(ctx: Any, dlogprob: Tensor | None, *others: Tensor | None) -> tuple:
        (logits, target), tokens = ctx.saved_tensors, ctx.tokens
        dlse = others[0] if tokens.lse else None
        dentropy = others[tokens.lse] if tokens.entropy else None
        dim, temperature, ignore_index = tokens[:3]
        if rows.recorded(logits, *(one for one in (dlogprob, dlse, dentropy) if one is not None)):
            return graph_of_tokens(logits, target, dlogprob, dlse, dentropy, tokens), None, None
        dlogits = None
        if dlogprob is not None or dentropy is not None:
            dlogits = ops.token_logprobs_backward(logits, target, dlogprob, dentropy, dim, temperature, ignore_index)
        if dlse is not None:
            probs = ops.softmax(logits, (dim,), temperature, dlse.dtype)
            of_lse = probs.mul_((dlse / temperature).unsqueeze(dim))
            dlogits = (of_lse if dlogits is None else of_lse.add_(dlogits)).to(logits.dtype)
        return dlogits, None, None


def _token_logprobs_tangent(ctx: Any, saved: list, tangent: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    (logits, target), tokens = saved, ctx.tokens
    dim, temperature, dtype = tokens.dim, tokens.temperature, ops.row_dtype(logits.dtype)
    probs, moved = rows.softmax(logits, (dim,), temperature, dtype), tangent.to(dtype) / temperature
    of_lse = (probs * moved).sum(dim)
    several = target.ndim == logits.ndim
    targets = (target if several else target.unsqueeze(-1)).long()
    columns = targets.clamp(0, logits.shape[dim] - 1).movedim(-1, dim)
    of_targets = moved.gather(dim, columns).movedim(dim, -1) - of_lse.unsqueeze(-1)
    of_targets = torch.where(is_ignored(targets, tokens.ignore_index), 0, of_targets)
    made = [of_targets if several else of_targets.squeeze(-1)]
    if tokens.lse:
        made.append(of_lse)
    if tokens.entropy:
        terms = _entropy_terms(probs, rows.log_softmax(logits, (dim,), temperature, dtype))
        entropy = -terms.sum(dim, keepdim=True)
        made.append(-((terms + probs * entropy) * moved).sum(dim))
    return *made, *[None] * (tokens.rank + tokens.argmax)


_TokenLogprobsInForwardMode = rows.in_forward_mode(
    _TokenLogprobs, lambda given, made: given[:2], _token_logprobs_tangent
)


def rows_of_tokens(target: Tensor, tokens: Tokens, logits: Tensor) -> Tensor:
    """Which rows have a target that counts."""
    counts = ~is_ignored(target, tokens.ignore_index)
    return counts.any(-1) if target.ndim == logits.ndim else counts


def _entropy_terms(probs: Tensor, log_probs: Tensor) -> Tensor:
    return probs * torch.where(probs > 0, log_probs, 0)  # 0 log 0 = 0


def graph_of_tokens(
    logits: Tensor,
    target: Tensor,
    dlogprob: Tensor | None,
    dlse: Tensor | None,
    dentropy: Tensor | None,
    tokens: Tokens,
) -> Tensor | None:
    """As graph_of_dlogits, for token_logprobs."""
    given = [one for one in (dlogprob, dlse, dentropy) if one is not None]
    if not given:
        return None
    dim, temperature, dtype = tokens.dim % logits.ndim, tokens.temperature, given[0].dtype
    if dlse is dentropy is None:  # whatever a row holds that is not asked for
        logits = torch.where(rows_of_tokens(target, tokens, logits).unsqueeze(dim), logits, 0)
    probs = rows.softmax(logits, (dim,), temperature, dtype)
    of_row = probs.new_zeros([size for axis, size in enumerate(logits.shape) if axis != dim])
    if dlse is not None:
        of_row = of_row + dlse
    at_targets = None
    if dlogprob is not None:
        target = target.long()
        several = target.ndim == logits.ndim
        targets, of_targets = (one if several else one.unsqueeze(-1) for one in (target, dlogprob))
        counts = ~is_ignored(targets, tokens.ignore_index)
        is_class = (targets >= 0) & (targets < logits.shape[dim])
        of_targets = torch.where(counts, of_targets, 0)
        of_targets = torch.where(counts & ~is_class, torch.nan, of_targets)
        of_row = of_row - of_targets.sum(-1)
        columns = targets.clamp(0, logits.shape[dim] - 1)
        at_targets = columns.movedim(-1, dim), of_targets.movedim(-1, dim)
    dlogits = probs * of_row.unsqueeze(dim)
    if at_targets is not None:
        dlogits = dlogits.scatter_add(dim, *at_targets)
    if dentropy is not None:
        log_probs = rows.log_softmax(logits, (dim,), temperature, dtype)
        terms = _entropy_terms(probs, log_probs)
        entropy = -terms.sum(dim, keepdim=True)
        dlogits = dlogits - dentropy.unsqueeze(dim) * (terms + probs * entropy)
    return (dlogits / temperature).to(logits.dtype)
