"""cross_entropy with more than torch's has: row weights, z_loss, soft targets, and what else is told of the rows.

The losses of the rows are one operation of _torch_transformed.py, whose derivative comes from the lse that it has
saved; what becomes of them, a mean for instance, is left to torch. In the words of kernels/cpu/loss_target.py, with the
masses g and their sum G, and r the weight of a row,

    loss = r (G lse - sum_c g_c z_c + z_loss S lse^2)        dz_c = r dloss (p_c (G + 2 z_loss S lse) - g_c)

which is linear in the probabilities q of the target, whose gradient needs the log-probabilities lse - z again:

    dq_c = r dloss w_c ((1 - eps) (lse - z_c) + z_loss lse^2)

A class that cannot be, z_c = -inf, adds nothing to the loss where q_c is 0, so that lse - z_c counts as 0 there: a
masked vocabulary would make NaN of the gradient of whatever softmax the target comes from.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

import gpusoftmax
from gpusoftmax import _checks
from gpusoftmax import _torch_losses as losses
from gpusoftmax import _torch_ops as ops
from gpusoftmax import _torch_rows as rows
from gpusoftmax import _torch_transform_ops as kernels
from gpusoftmax import _torch_transformed as transformed_ops
from gpusoftmax._torch_ops import defined_as
from gpusoftmax._torch_transform import Through, transformed
from gpusoftmax._torch_transform_ops import THROUGH, with_empty_row
from gpusoftmax._torch_transformed import Call, Op
from gpusoftmax.cross_entropy import CrossEntropy


class Options(NamedTuple):
    """Of the losses of rows. The last three say what else is wanted, and whether labels are looked at."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    return_z_loss: bool
    return_correct: bool
    validate: bool | None


class Target(NamedTuple):
    """What the losses are measured against, and their weights."""

    target: Tensor
    shares: Tensor | None
    weight: Tensor | None
    row_weight: Tensor | None


def losses_of_rows(logits: Tensor, given: Target, options: Options, through: float | Through) -> list[Tensor]:
    """The loss, which is differentiable, and the lse of each row; where they are wanted, z_loss and n_correct."""
    check_no_gradients({"weight": given.weight, "row_weight": given.row_weight})
    if type(through) is float:
        through = Through(through)
    target, shares, weight, row_weight = given
    dim = (ops.class_dim(logits),)
    loss, *told = transformed_ops.called(
        Call(_LOSSES, dim, options, target, weight, shares, row_weight), logits, through
    )
    return [loss, *(one.detach() for one in told)]


def check_no_gradients(tensors: dict[str, Tensor | None]) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise TypeError(f"{name} requires grad, and gets no gradient: pass {name}.detach()")


def full_cross_entropy(
    logits: Tensor,
    given: Target,
    options: Options,
    through: float | Through,
    reduction: str,
    normalizer: float | Tensor | None,
    wanted: tuple[bool, bool, bool],
) -> Tensor | CrossEntropy:
    """wanted: whether z_loss, lse and n_correct are to be returned too."""
    _checks.only_for(normalizer is not None, "normalizer", reduction == "mean", reduction)
    dtype = "float64" if logits.dtype == torch.float64 else "float32"
    _checks.factor_fits(options.z_loss, "z_loss", dtype)
    loss, lse, *more = losses_of_rows(logits, given, options, through)
    z_loss = more.pop(0) if options.return_z_loss else None
    if reduction != "none":
        divisor = 1.0
        if reduction == "mean":
            dim = ops.class_dim(logits)
            if isinstance(normalizer, Tensor):
                _checks.one_element(normalizer, "normalizer")
                divisor = normalizer.reshape(())
            else:
                divisor = _checks.normalizer(normalizer)
                if divisor is not None:
                    _checks.divisor_fits(divisor, "normalizer", dtype)
            if divisor is None:
                divisor = divisor_of(dim, logits.shape[dim], given, options.ignore_index, loss.dtype)
        loss, z_loss = (None if one is None else one.sum() / divisor for one in (loss, z_loss))
    if not any(wanted):
        return loss
    return CrossEntropy(loss, z_loss, lse if wanted[1] else None, *more)


def divisor_of(dim: int, n_cols: int, given: Target, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """What "mean" divides by: the weights of the rows that count."""
    target, shares, weight, row_weight = given
    if shares is None and target.is_floating_point():
        counts = target.new_ones([size for axis, size in enumerate(target.shape) if axis != dim], dtype=dtype)
    elif shares is not None:
        counts = (~losses.is_ignored(target, ignore_index)).any(-1).to(dtype)
    else:
        counts = (~losses.is_ignored(target, ignore_index)).to(dtype)
        if weight is not None:
            counts = counts * weight.to(dtype)[target.long().clamp(0, n_cols - 1)]
    return (counts if row_weight is None else counts * row_weight.to(dtype)).sum()


# ---------------------------------------------------------------- kernels

_LOSS = "int ignore_index, float label_smoothing, float z_loss"


def _batch(logits: Tensor) -> list[int]:
    dim = ops.class_dim(logits)
    return [size for axis, size in enumerate(logits.shape) if axis != dim]


def _fake_losses(logits, target, shares, weight, row_weight, *options):
    *_, return_z_loss, return_correct, _ = options[:6]
    dtype = ops.row_dtype(logits.dtype)
    made = [logits.new_empty(_batch(logits), dtype=dtype) for _ in range(2 + return_z_loss)]
    return made + [logits.new_empty((), dtype=torch.int64)] * return_correct


@defined_as(
    f"(Tensor logits, Tensor target, Tensor? shares, Tensor? weight, Tensor? row_weight, {_LOSS}, bool return_z_loss, "
    f"bool return_correct, bool? validate, {THROUGH}) -> Tensor[]",
    _fake_losses,
)
def losses_of_weighted_rows(
    logits: Tensor,
    target: Tensor,
    shares: Tensor | None,
    weight: Tensor | None,
    row_weight: Tensor | None,
    *options: Any,
) -> list[Tensor]:
    own = Options(*options[:6])
    told = gpusoftmax.cross_entropy(
        logits, target if shares is None else (target, shares), weight, axis=ops.class_dim(logits), reduction="none",
        row_weight=row_weight, return_lse=True, **own._asdict(), **with_empty_row(options[6:]),
    )  # fmt: skip
    return [one for one in (told.loss, told.lse, told.z_loss, told.n_correct) if one is not None]


def _fake_losses_backward(dtype, logits, *others):
    return logits.new_empty(logits.shape, dtype=dtype)


@defined_as(
    "(ScalarType dtype, Tensor logits, Tensor target, Tensor? shares, Tensor? weight, Tensor? row_weight, Tensor lse, "
    f"Tensor dloss, {_LOSS}, {THROUGH}) -> Tensor",
    _fake_losses_backward,
)
def losses_of_weighted_rows_backward(
    dtype: torch.dtype,
    logits: Tensor,
    target: Tensor,
    shares: Tensor | None,
    weight: Tensor | None,
    row_weight: Tensor | None,
    lse: Tensor,
    dloss: Tensor,
    *options: Any,
) -> Tensor:
    ignore_index, label_smoothing, z_loss, *through = options
    return gpusoftmax.cross_entropy_backward(
        logits, target if shares is None else (target, shares), lse, dloss, weight, axis=ops.class_dim(logits),
        ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss, row_weight=row_weight,
        validate=False, out=ops.room_for(logits, dtype), **with_empty_row(through),
    )  # fmt: skip


# ---------------------------------------------------------------- as an operation of _torch_transformed.py


def _target_of(call: Call) -> Target:
    return Target(call.target, call.shares, call.weight, call.row_weight)


def _value(call: Call, x: Tensor, through: Through) -> tuple[Tensor, ...]:
    return tuple(losses_of_weighted_rows(x, *_target_of(call), *call.options, *through))


def _dx(
    call: Call, x: Tensor, through: Through, made: list[Tensor], upstream: tuple[Tensor | None, ...], dtype: torch.dtype
) -> Tensor:
    beside = *_target_of(call), made[1], upstream[0], *call.options[:3]
    return losses_of_weighted_rows_backward(dtype, x, *beside, *through)


def _rows_that_count(call: Call, x: Tensor, upstream: tuple[Tensor | None, ...] | None) -> Tensor | None:
    target, shares, _, row_weight = _target_of(call)
    counts = None if row_weight is None else row_weight != 0
    if shares is None and target.is_floating_point():
        return counts
    labelled = ~losses.is_ignored(target, Options(*call.options).ignore_index)
    labelled = labelled if shares is None else labelled.any(-1)
    return labelled if counts is None else labelled & counts


class _Masses(NamedTuple):
    """Of all classes, as the classes of z lie; of rows, with one axis less."""

    at_classes: Tensor  # r g
    of_rows: Tensor  # r G
    of_target: Tensor  # r S
    counts: Tensor  # rows that do
    is_bad: Tensor  # rows with a label that is no class


def _masses(call: Call, z: Tensor) -> _Masses:
    target, shares, weight, row_weight = _target_of(call)
    options, (dim,) = Options(*call.options), call.dim
    n_cols, dtype, batch = z.shape[dim], z.dtype, _batch(z)
    counts = z.new_ones(batch, dtype=torch.bool)
    is_bad = ~counts
    if shares is None and target.is_floating_point():
        q = target.to(dtype)
    else:
        several = target.long() if shares is not None else target.long().unsqueeze(-1)
        is_ignored = losses.is_ignored(several, options.ignore_index)
        is_class = (several >= 0) & (several < n_cols)
        counts, is_bad = ~is_ignored.all(-1), (~is_ignored & ~is_class).any(-1)
        of_labels = z.new_ones(()) if shares is None else shares.to(dtype)
        of_labels = torch.where(is_ignored | ~is_class, 0, of_labels)
        columns = several.clamp(0, n_cols - 1).movedim(-1, dim)
        q = torch.zeros_like(z).scatter_add(dim, columns, of_labels.movedim(-1, dim))
    w = z.new_ones(n_cols) if weight is None else weight.to(dtype)
    w = w.reshape(_along(dim, z))
    r = z.new_ones(batch) if row_weight is None else row_weight.to(dtype)
    counts = counts & (r != 0)
    r = torch.where(counts, r, 0)
    q = torch.where(counts.unsqueeze(dim), q, 0)
    mass = ((1 - options.label_smoothing) * q + options.label_smoothing / n_cols) * w * r.unsqueeze(dim)
    return _Masses(mass, mass.sum(dim), (q * w).sum(dim) * r, counts, is_bad & counts)


def _along(dim: int, x: Tensor) -> list[int]:
    """The shape of one number for each class, to be combined with rows."""
    return [size if axis == dim else 1 for axis, size in enumerate(x.shape)]


def _dz(call: Call, z: Tensor, left: float, upstream: tuple[Tensor | None, ...], made: list[Tensor]) -> Tensor:
    (dim,), options, masses = call.dim, Options(*call.options), _masses(call, z)
    z = torch.where(masses.counts.unsqueeze(dim), z, 0)  # whatever a row holds that does not count
    slope = masses.of_rows
    if options.z_loss:
        slope = slope + 2 * options.z_loss * masses.of_target * rows.logsumexp(z, (dim,), False, 1.0)
    dloss = torch.where(masses.is_bad, torch.nan, torch.where(masses.counts, upstream[0], 0))
    probs = rows.softmax(z, (dim,), 1.0, None)
    return dloss.unsqueeze(dim) * (probs * slope.unsqueeze(dim) - masses.at_classes)


def _composed(call: Call, x: Tensor, through: Through) -> tuple[Tensor, ...]:
    (dim,), options = call.dim, Options(*call.options)
    z, _, empty = transformed(x, call.dim, through, takes_temperature=False)
    masses = _masses(call, z)
    z = torch.where(masses.counts.unsqueeze(dim), z, 0)
    lse = rows.logsumexp(z, (dim,), False, 1.0)
    cannot_be = z == -torch.inf
    # Of a row of which nothing is left the target's gradient is NaN, as the loss.
    without_slope = cannot_be & (lse != -torch.inf).unsqueeze(dim)
    mass = torch.where(without_slope, masses.at_classes.detach(), masses.at_classes)
    nats = torch.where(cannot_be & (mass == 0), 0, -rows.log_softmax(z, (dim,), 1.0, None))
    # Without one it is 0, whatever the row holds.
    z_loss = options.z_loss * masses.of_target * lse.square() if options.z_loss else torch.zeros_like(lse)
    loss = torch.where(masses.is_bad, torch.nan, (nats * mass).sum(dim) + z_loss)
    told = [loss, torch.where(masses.counts, lse, 0), *([z_loss] if options.return_z_loss else [])]
    if empty is not None:
        # As kernels tell it: nothing of the loss, and -inf for the lse.
        told = [torch.where(empty.squeeze(dim), -torch.inf if k == 1 else 0, one) for k, one in enumerate(told)]
    if options.return_correct:
        # In 64 bits: torch compares no uint16 and wider with others.
        is_correct = masses.counts & told[1].isfinite() & (z.argmax(dim) == call.target.long())
        told.append(is_correct.sum())
    return tuple(told)


def _dtarget(
    call: Call,
    x: Tensor,
    through: Through,
    made: list[Tensor],
    upstream: tuple[Tensor | None, ...],
    is_recorded: bool,
) -> Tensor:
    (dim,), options = call.dim, Options(*call.options)
    target, shares, weight, row_weight = _target_of(call)
    along = dim if shares is None else -1
    counts = None if row_weight is None else (row_weight != 0).unsqueeze(along)
    labels = None if shares is None else target.long()
    if labels is not None:
        is_label = ~losses.is_ignored(labels, options.ignore_index)
        counts = is_label if counts is None else counts & is_label
    log_probs, lse = (_scores_that_are_recorded if is_recorded else _scores)(call, x, through, made, counts)
    if through.empty_row == "zero":
        is_left = (lse != -torch.inf).unsqueeze(along)
        counts = is_left if counts is None else counts & is_left

    dloss = upstream[0] if row_weight is None else upstream[0] * row_weight.to(lse.dtype)
    if labels is not None:
        is_bad = (is_label & ((labels < 0) | (labels >= x.shape[dim]))).any(-1)
        dloss = torch.where(is_bad, torch.nan, dloss)
    # In the memory of the log-probabilities, where nobody else has seen them: large arrays less.
    into = {} if is_recorded else {"out": log_probs}
    dtarget = torch.nan_to_num(log_probs, nan=torch.nan, posinf=torch.inf, neginf=0.0, **into)
    dtarget = torch.mul(dtarget, ((options.label_smoothing - 1) * dloss).unsqueeze(along), **into)
    if options.z_loss:
        dtarget = torch.add(dtarget, (options.z_loss * dloss * lse.square()).unsqueeze(along), **into)
    if weight is not None:
        w = weight.to(lse.dtype)
        w = w.reshape(_along(dim, x)) if labels is None else w[labels.clamp(0, x.shape[dim] - 1)]
        dtarget = torch.mul(dtarget, w, **into)
    if counts is not None:
        dtarget = torch.where(counts, dtarget, dtarget.new_zeros(()), **into)
    return dtarget.to((target if shares is None else shares).dtype)


def _scores(
    call: Call, x: Tensor, through: Through, made: list[Tensor], counts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The log-probabilities of the classes that have one in the target, as they lie there, and the lse of the rows."""
    if call.shares is None:
        return kernels.log_softmax_transformed(x, call.dim, ops.row_dtype(x.dtype), *through), made[1]
    options = *call.dim, Options(*call.options).ignore_index, *_NOTHING_ELSE, *through
    return kernels.token_logprobs_transformed(x, call.target, *options)[0], made[1]


def _scores_that_are_recorded(
    call: Call, x: Tensor, through: Through, made: list[Tensor], counts: Tensor | None
) -> tuple[Tensor, Tensor]:
    z, _, empty = transformed(x, call.dim, through, takes_temperature=False)
    if counts is not None:
        z = torch.where(counts if call.shares is None else counts.any(-1).unsqueeze(*call.dim), z, 0)
    lse = rows.logsumexp(z, call.dim, False, 1.0)
    if empty is not None:
        lse = torch.where(empty.squeeze(*call.dim), -torch.inf, lse)
    if call.shares is None:
        return rows.log_softmax(z, call.dim, 1.0, None), lse
    tokens = losses.Tokens(*call.dim, 1.0, Options(*call.options).ignore_index, *_NOTHING_ELSE)
    return losses.token_logprobs(z, call.target, tokens)[0], lse


_NOTHING_ELSE = (False,) * 5
"""What token_logprobs may tell beside the log-probabilities, and do: no label is looked at twice."""

_LOSSES = Op(
    _value, _composed, _dx, _dz, dtarget=_dtarget, counts=_rows_that_count, keeps=True, takes_temperature=False
)
