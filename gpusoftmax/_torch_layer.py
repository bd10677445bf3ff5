"""linear_cross_entropy as a function of torch's autograd.

The forward computes the loss and, in the same chunks of logits, the gradients that are asked for: the logits are made
once and never held. The backward multiplies the gradients by what comes from above, one number; for the losses of rows
("none"), which have one each, it goes over the chunks again with them. Half-precision gradients meet it in the same
precision: use a loss scale inside, or "none", where float16 would underflow.

Where the gradient is to be differentiated again, it is taken from torch's own product and our cross_entropy, for which
all logits are held. In forward mode and under torch.func so is the loss.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import gpusoftmax
from gpusoftmax import _torch_full_loss as full
from gpusoftmax import _torch_ops
from gpusoftmax import _torch_rows as rows
from gpusoftmax._loss import CrossEntropy
from gpusoftmax._torch_losses import can_look, is_ignored
from gpusoftmax._torch_transform import Through


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
    full.check_no_gradients(given._asdict())
    if rows.is_transforming():
        return _of_all_logits(layer, given, options)
    if rows.recorded(*(tensor for tensor in layer if tensor is not None)):
        loss, *told = _LinearCrossEntropy.apply(*layer, *given, options)
    else:
        loss, _, _, _, *told = _operator(*layer, *given, None, *options, _NO_GRADIENTS)
    if not any(options.told):
        return loss
    told = iter(told)
    return CrossEntropy(loss, *[next(told) if wanted else None for wanted in options.told])


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
        ctx.save_for_backward(*tensors)
        of_rows = options.reduction == "none"
        loss, *made = _operator(*tensors, None, *options, _NO_GRADIENTS if of_rows else ctx.wanted)
        ctx.gradients = None if of_rows else made[:3]
        ctx.mark_non_differentiable(*made[3:])
        return loss, *made[3:]

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, *_: Tensor | None) -> tuple:
        saved = ctx.saved_tensors  # once: a checkpoint gives them out no second time
        layer, given = Layer(*saved[:3]), Given(*saved[3:])
        if rows.recorded(*(tensor for tensor in layer if tensor is not None), dloss):
            return *_graph_of_gradients(ctx, layer, given, dloss), *[None] * 5
        # Handed out once: whoever gets them may write into them. The next backward of a retained graph goes over the
        # chunks again.
        gradients, ctx.gradients = ctx.gradients, None
        of_rows = ctx.options.reduction == "none"
        if gradients is None:
            gradients = _gradients(layer, given, dloss.contiguous() if of_rows else None, ctx.options, ctx.wanted)
        if not of_rows and not (can_look(dloss) and float(dloss) == 1):
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
    is_kept = torch.is_grad_enabled()  # not for a batch of gradients that nobody differentiates
    with torch.enable_grad():
        # Views, of which none comes from another one: where the input does from the weights, as embeddings that share
        # them do, their gradient would have that of the input in it.
        layer = Layer(*(None if tensor is None else tensor.view_as(tensor) for tensor in layer))
        loss = _of_all_logits(layer, given, silent)
    wanted = [tensor for tensor, is_wanted in zip(layer, ctx.wanted, strict=True) if is_wanted]
    found = iter(torch.autograd.grad(loss, wanted, dloss, create_graph=is_kept))
    return tuple(next(found) if is_wanted else None for is_wanted in ctx.wanted)


def _of_all_logits(layer: Layer, given: Given, options: Options) -> Tensor | CrossEntropy:
    """The loss, and what else is told, by operations that torch can differentiate."""
    idle = is_ignored(given.target, options.ignore_index)
    if given.row_weight is not None:
        idle = idle | (given.row_weight == 0)
    # Such rows take no part whatever they hold; in the product a NaN would.
    features = torch.where(idle.unsqueeze(-1), 0, layer.input)
    logits = torch.nn.functional.linear(features, layer.linear_weight, layer.linear_bias)
    row_weight = None if given.row_weight is None else given.row_weight.reshape(-1)
    told = full.full_cross_entropy(
        logits.reshape(-1, logits.shape[-1]),
        full.Target(given.target.reshape(-1), None, given.weight, row_weight),
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
    shape = given.target.shape
    if not any(options.told):
        return told.reshape(shape) if options.reduction == "none" else told
    return CrossEntropy(*[one if one is None or not one.ndim else one.reshape(shape) for one in told])
