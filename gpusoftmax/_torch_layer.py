"""linear_cross_entropy as a function of torch's autograd.

The forward computes the loss and, in the same chunks of logits, the gradients that are asked for: the logits are made
once and never held. The backward multiplies the gradients by what comes from above, one number; for the losses of rows
("none"), which have one each, it goes over the chunks again with them. Half-precision gradients meet it in the same
precision: use a loss scale inside, or "none", where float16 would underflow.

Where the gradient is to be differentiated again, it is taken from torch's own product and our cross_entropy, for which
all logits are held. So is the loss in forward mode and under torch.func, and where the target holds probabilities or
the classes have further axes.
"""

import contextlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import gpusoftmax
from gpusoftmax import _checks, _torch_ops
from gpusoftmax import _torch_full_loss as full
from gpusoftmax import _torch_rows as rows
from gpusoftmax._loss import CrossEntropy
from gpusoftmax._torch_losses import can_look, is_ignored
from gpusoftmax._torch_transform import Through
from gpusoftmax._torch_warnings import warn_once


class Layer(NamedTuple):
    """What has gradients."""

    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None


class Given(NamedTuple):
    """What has none."""

    target: Tensor
    weight: Tensor | None
    row_weight: Tensor | None
    normalizer: Tensor | None


class Options(NamedTuple):
    """divide_by: a normalizer that is a number."""

    ignore_index: int
    reduction: str
    label_smoothing: float
    z_loss: float
    divide_by: float | None
    temperature: float
    softcap: float | None
    return_z_loss: bool
    return_lse: bool
    return_correct: bool
    validate: bool | None
    chunk_size: int | None

    @property
    def told(self) -> tuple[bool, bool, bool]:
        return self.return_z_loss, self.return_lse, self.return_correct


def linear_cross_entropy(layer: Layer, given: Given, options: Options) -> Tensor | CrossEntropy:
    """The loss has gradients, what else is told has none."""
    without_gradients = given._asdict()
    if given.target.is_floating_point():
        del without_gradients["target"]
    full.check_no_gradients(without_gradients)
    if layer.input.ndim < 1 or layer.linear_weight.ndim < 2:
        _checks.layer(tuple(layer.input.shape), tuple(layer.linear_weight.shape))
    if reason := _why_all_logits(layer, given):
        _warn_of_all_logits(reason)
        return _of_all_logits(layer, given, options)
    if rows.recorded(*(tensor for tensor in layer if tensor is not None)):
        loss, *told = _LinearCrossEntropy.apply(*layer, *given, options)
    else:
        loss, _, _, _, *told = _operator(*layer, *given, None, *options, _NO_GRADIENTS)
    if not any(options.told):
        return loss
    told = iter(told)
    return CrossEntropy(loss, *[next(told) if wanted else None for wanted in options.told])


def _why_all_logits(layer: Layer, given: Given) -> str | None:
    if rows.is_transforming():
        return "in forward mode and under torch.func"
    if given.target.is_floating_point():
        return "where target holds probabilities"
    if layer.linear_weight.ndim > 2:
        return "where linear_weight has more axes than those of classes and features"
    return None


def _warn_of_all_logits(reason: str) -> None:
    warn_once(f"linear_cross_entropy holds all logits, not a chunk of rows, {reason}")


_NO_GRADIENTS = (False, False, False)
_N_OPTIONS = len(Options._fields)


def _fake(input, linear_weight, linear_bias, target, weight, row_weight, normalizer, scale, *options):
    wanted, options = options[_N_OPTIONS], Options(*options[:_N_OPTIONS])
    dtype = _torch_ops.row_dtype(input.dtype)
    of_all = target.shape if options.reduction == "none" else ()
    layer = _some(Layer(input, linear_weight, linear_bias))
    made = [input.new_empty(of_all, dtype=dtype)]
    made += [one.new_empty(one.shape if is_wanted else (0,)) for one, is_wanted in zip(layer, wanted, strict=True)]
    for is_wanted, shape, of in zip(options.told, (of_all, target.shape, ()), (dtype, dtype, torch.int64), strict=True):
        if is_wanted:
            made.append(input.new_empty(shape, dtype=of))
    return made


def _some(layer: Layer) -> list[Tensor]:
    """The tensors; the first stands for one that is not there, of which nothing is wanted."""
    return [layer.input if tensor is None else tensor for tensor in layer]


@_torch_ops.defined_as(
    "(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight, Tensor? row_weight, "
    "Tensor? normalizer, Tensor? scale, int ignore_index, str reduction, float label_smoothing, float z_loss, "
    "float? divide_by, float temperature, float? softcap, bool return_z_loss, bool return_lse, bool return_correct, "
    "bool? validate, int? chunk_size, bool[] wanted) -> Tensor[]",
    _fake,
    is_of_core=False,  # products of matrices are not
)
def linear_cross_entropy_with_grad(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    row_weight: Tensor | None,
    normalizer: Tensor | None,
    scale: Tensor | None,
    *options: Any,
) -> list[Tensor]:
    """The loss, the gradients of input, linear_weight and linear_bias, of which one that is not wanted has no element;
    and what else is told.
    """
    wanted, options = options[_N_OPTIONS], Options(*options[:_N_OPTIONS])._asdict()
    divide_by = options.pop("divide_by")
    options |= {
        "linear_bias": linear_bias,
        "weight": weight,
        "row_weight": row_weight,
        "normalizer": divide_by if normalizer is None else normalizer,
    }
    if any(wanted):
        names = ("return_dinput", "return_dlinear_weight", "return_dlinear_bias")
        options |= {**dict(zip(names, wanted, strict=True)), "grad_scale": 1.0 if scale is None else scale}
        told, *gradients = gpusoftmax.linear_cross_entropy_with_grad(input, linear_weight, target, **options)
    else:
        told, gradients = gpusoftmax.linear_cross_entropy(input, linear_weight, target, **options), (None,) * 3
    loss, *told = told if isinstance(told, CrossEntropy) else (told,)
    layer = _some(Layer(input, linear_weight, linear_bias))
    gradients = [one.new_empty(0) if grad is None else grad for one, grad in zip(layer, gradients, strict=True)]
    return [loss, *gradients, *(one for one in told if one is not None)]


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
        row_weight: Tensor | None,
        normalizer: Tensor | None,
        options: Options,
    ) -> tuple[Tensor, ...]:
        tensors = input, linear_weight, linear_bias, target, weight, row_weight, normalizer
        ctx.options, ctx.wanted = options, tuple(ctx.needs_input_grad[:3])
        of_rows = options.reduction == "none"
        loss, *made = _operator(*tensors, None, *options, _NO_GRADIENTS if of_rows else ctx.wanted)
        gradients = None if of_rows else made[:3]
        # Beside what is saved, compiled autograd does not find what a compiled forward has kept.
        ctx.gradients, saved = (None, gradients or ()) if torch.compiler.is_compiling() else (gradients, ())
        ctx.save_for_backward(*tensors, *saved)
        ctx.mark_non_differentiable(*made[3:])
        return loss, *made[3:]

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, *_: Tensor | None) -> tuple:
        saved = ctx.saved_tensors  # once: a checkpoint gives them out no second time
        layer, given = Layer(*saved[:3]), Given(*saved[3:7])
        if rows.recorded(*(tensor for tensor in layer if tensor is not None), dloss):
            return *_graph_of_gradients(ctx, layer, given, dloss), *[None] * 5
        # Handed out once: whoever gets them may write into them. The next backward of a retained graph goes over the
        # chunks again.
        gradients, ctx.gradients = saved[7:] or ctx.gradients, None
        of_rows = ctx.options.reduction == "none"
        if gradients is None:
            gradients = _gradients(layer, given, dloss.contiguous() if of_rows else None, ctx.options, ctx.wanted)
        if not of_rows and not (can_look(dloss) and float(dloss) == 1):
            if torch.compiler.is_compiling():  # what is saved stays as it is, and memory is not planned here
                gradients = [gradient * dloss for gradient in gradients]
            else:
                for gradient in gradients:
                    gradient.mul_(dloss)
        found = (gradient if wanted else None for gradient, wanted in zip(gradients, ctx.wanted, strict=True))
        return *found, *[None] * 5


def _gradients(
    layer: Layer, given: Given, scale: Tensor | None, options: Options, wanted: Sequence[bool]
) -> list[Tensor]:
    options = options._replace(return_z_loss=False, return_lse=False, return_correct=False, validate=False)
    return _operator(*layer, *given, scale, *options, wanted)[1:]


def _graph_of_gradients(ctx: Any, layer: Layer, given: Given, dloss: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients as results of operations that torch can differentiate."""
    silent = ctx.options._replace(return_z_loss=False, return_lse=False, return_correct=False, validate=False)
    _warn_of_all_logits("where its gradient is differentiated again, or asked for in a batch")
    is_kept = torch.is_grad_enabled()  # not for a batch of gradients that nobody differentiates
    with torch.enable_grad():
        # Views, of which none comes from another one: where the input does from the weights, as embeddings that share
        # them do, their gradient would have that of the input in it.
        layer = Layer(*(None if tensor is None else tensor.view_as(tensor) for tensor in layer))
        loss = _of_all_logits(layer, given, silent)
    wanted = [tensor for tensor, is_wanted in zip(layer, ctx.wanted, strict=True) if is_wanted]
    with _without_autocast(layer.input):
        found = iter(torch.autograd.grad(loss, wanted, dloss, create_graph=is_kept))
    return tuple(next(found) if is_wanted else None for is_wanted in ctx.wanted)


def _without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """For torch's own products, to be in the format that the layer has come in: autocast would take float16 there."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext()


def _of_all_logits(layer: Layer, given: Given, options: Options) -> Tensor | CrossEntropy:
    """The loss, and what else is told, by operations that torch can differentiate."""
    features, weight, bias = layer
    target, row_weight = given.target, given.row_weight
    batch, (n_classes, *axes, _) = features.shape[:-1], weight.shape
    n_of_axes = math.prod(axes)

    def by_rows(classes: Tensor) -> Tensor:
        """(*batch, n_classes, *axes) as (n_rows, n_classes)."""
        return classes.reshape(-1, n_classes, n_of_axes).movedim(1, 2).reshape(-1, n_classes)

    shape = (*batch, *axes)
    is_soft = target.is_floating_point()
    expected = (*batch, n_classes, *axes) if is_soft else shape
    _checks.same_shape(weight, (n_classes, *axes, *features.shape[-1:]), "linear_weight", "to match input")
    _checks.same_shape(target, expected, "target", "to match input and linear_weight")
    if bias is not None:
        _checks.same_shape(bias, (n_classes, *axes), "linear_bias", "to match linear_weight")
    idle = None if is_soft else is_ignored(target, options.ignore_index)
    if row_weight is not None:
        _checks.same_shape(row_weight, shape, "row_weight", "to match input and linear_weight")
        idle = row_weight == 0 if idle is None else idle | (row_weight == 0)
        row_weight = row_weight.reshape(-1)
    if idle is not None:  # such rows take no part whatever they hold; in the product a NaN would
        features = torch.where(idle.reshape(*batch, n_of_axes).all(-1, keepdim=True), 0, features)
    with _without_autocast(features):
        logits = torch.nn.functional.linear(
            features, weight.reshape(-1, weight.shape[-1]), None if bias is None else bias.reshape(-1)
        )
    told = full.full_cross_entropy(
        by_rows(logits),
        full.Target(by_rows(target) if is_soft else target.reshape(-1), None, given.weight, row_weight),
        full.Options(
            options.ignore_index,
            options.label_smoothing,
            options.z_loss,
            options.return_z_loss,
            options.return_correct,
            options.validate,
        ),
        Through(options.temperature, options.softcap),
        options.reduction,
        options.divide_by if given.normalizer is None else given.normalizer,
        options.told,
    )
    if not any(options.told):
        return told.reshape(shape) if options.reduction == "none" else told
    return CrossEntropy(*[one if one is None or not one.ndim else one.reshape(shape) for one in told])
