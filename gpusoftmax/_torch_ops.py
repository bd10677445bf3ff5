"""The operators of torch's dispatcher, torch.ops.gpusoftmax: what gpusoftmax.torch calls and torch.compile sees.

Each is a call of the core, and says without one what shapes and dtypes it returns. None of them needs to record a
gradient: the autograd functions of _torch_rows.py and _torch_losses.py are around them, which is quicker than
torch.library.custom_op (2026-11-26, a recorded softmax of 8 x 16 on the CPU: 42 us around the core's call, and 59).
Programs that torch.export has made call the operators without them; see `differentiate`. None waits for the device.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import gpusoftmax
from gpusoftmax import _arrays, _replay_torch
from gpusoftmax.cross_entropy import _with_divisor

_LIBRARY = torch.library.Library("gpusoftmax", "FRAGMENT")


def defined_as(arguments: str, fake: Callable, is_of_core: bool = True) -> Callable[[Callable], Callable]:
    """Makes a function an operator of its name, on the CPU and on GPUs. `fake` makes empty results.

    Where the dispatcher would do nothing but call it, it is called at once: the way through the dispatcher takes 7 us
    for a loss. On the CPU a call that was made before is replayed as one of the core's is, if all tensors come first
    and, is_of_core, what is returned is written by calls of the core alone. An operator that writes to its arguments
    takes the dispatcher always, for the version counters.
    """

    def defined(function: Callable) -> Callable:
        name, unrecorded = function.__name__, _unrecorded(function)
        _LIBRARY.define(name + arguments, tags=(torch.Tag.pt2_compliant_tag,))
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(name, unrecorded, key)
        operator = getattr(torch.ops.gpusoftmax, name).default
        torch.library.register_fake(f"gpusoftmax::{name}", _on_one_device(operator._schema, fake), lib=_LIBRARY)
        if operator._schema.is_mutable:
            return operator
        _register_gradient(name)
        n_tensors = _leading_tensors(operator._schema) if is_of_core else 0

        def called_at_once(*given: Any) -> Any:
            return unrecorded(*given) if is_eager(given) else operator(*given)

        def call(*given: Any) -> Any:
            if torch.compiler.is_compiling() or _is_watched():
                return operator(*given)
            if n_tensors and given[0].is_cpu:
                return _replay_torch.call(unrecorded, given[:n_tensors], given[n_tensors:], called_at_once)
            return called_at_once(*given)

        return call

    return defined


def _on_one_device(schema: torch.FunctionSchema, fake: Callable) -> Callable:
    """Where one tensor is on "meta", fake results are made of all, which were memory that nobody had filled."""

    def checked(*given: Any) -> Any:
        pairs = zip(schema.arguments, given, strict=True)
        (first, device), *others = [(argument.name, one.device) for argument, one in pairs if isinstance(one, Tensor)]
        for name, other in others:
            if other != device:
                raise TypeError(
                    f"{first} is on device {device} and {name} on {other}, expected both on one device: move one of "
                    f"them first"
                )
        return fake(*given)

    return checked


class Formula(NamedTuple):
    """How an operator is differentiated that is called by its name, as exported programs call it."""

    setup: Callable
    backward: Callable


_formulas: dict[str, Formula] = {}


def differentiate(name: str, function: type, arguments: Callable[[tuple], tuple] = lambda inputs: inputs) -> None:
    """As a function of autograd is, whose arguments are made of those of the operator."""

    def setup(ctx: Any, inputs: tuple, made: Any) -> None:
        ctx.n_inputs = len(inputs)
        function.setup_context(ctx, arguments(inputs), made)

    def backward(ctx: Any, *upstream: Any) -> tuple:
        gradients = function.backward(ctx, *upstream)
        return *gradients, *[None] * (ctx.n_inputs - len(gradients))

    _formulas[name] = Formula(setup, backward)


def _register_gradient(name: str) -> None:
    def setup(ctx: Any, inputs: tuple, output: Any) -> None:
        if name in _formulas:
            _formulas[name].setup(ctx, inputs, output)

    def backward(ctx: Any, *upstream: Any) -> tuple:
        if name not in _formulas:
            raise NotImplementedError(
                f"the operator gpusoftmax.{name} has no gradient by itself, as in an exported program: differentiate "
                f"the functions of gpusoftmax.torch, and export what is to be differentiated no more"
            )
        return _formulas[name].backward(ctx, *upstream)

    torch.library.register_autograd(f"gpusoftmax::{name}", backward, setup_context=setup, lib=_LIBRARY)


def _leading_tensors(schema: torch.FunctionSchema) -> int:
    """How many arguments are tensors, if these come first; else 0."""
    is_tensor = ["Tensor" in str(argument.type) for argument in schema.arguments]
    count = sum(is_tensor)
    return count if all(is_tensor[:count]) else 0


def _unrecorded(function: Callable) -> Callable:
    """Without a gradient of its own. Inside of an autograd function none is recorded anyway."""

    @functools.wraps(function)
    def called(*given: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(*given)
        with torch.no_grad():
            return function(*given)

    return called


_ORDINARY = (Tensor, torch.nn.Parameter)


def is_eager(given: Sequence[Any]) -> bool:
    """Whether nobody traces, transforms or replaces operations on these: the tensors are memory of a CPU or a GPU."""
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack()
        or torch._ops._len_torch_dispatch_stack_pre_dispatch()
        or torch.jit.is_tracing()
    ):
        return False
    for one in given:
        if isinstance(one, Tensor) and (
            type(one) not in _ORDINARY
            or not (one.is_cpu or one.is_cuda)
            or torch._C._functorch.is_legacy_batchedtensor(one)
            or one._is_zerotensor()
            or torch._is_functional_tensor(one)
        ):
            return False
    return True


def _is_watched() -> bool:
    """Whether somebody is told of every operator: a mode that may put another function in its place, or a profiler."""
    return (
        torch._C._len_torch_function_stack() > 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._ops._len_torch_dispatch_stack_pre_dispatch() > 0
        or torch.autograd._profiler_enabled()
    )


def row_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of a number per row: the format in which such logits are computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---------------------------------------------------------------- rows to rows


def _fake_rows(x, dim, temperature, dtype):
    return x.new_empty(x.shape, dtype=dtype or x.dtype)


def _fake_rows_backward(y, dy, dim, temperature, dtype):
    return y.new_empty(y.shape, dtype=dtype)


@defined_as("(Tensor x, int[] dim, float temperature, ScalarType? dtype) -> Tensor", _fake_rows)
def softmax(x: Tensor, dim: Sequence[int], temperature: float, dtype: torch.dtype | None) -> Tensor:
    return gpusoftmax.softmax(x, axis_of(dim), temperature=temperature, dtype=dtype)


@defined_as(
    "(Tensor probs, Tensor dprobs, int[] dim, float temperature, ScalarType dtype) -> Tensor", _fake_rows_backward
)
def softmax_backward(
    probs: Tensor, dprobs: Tensor, dim: Sequence[int], temperature: float, dtype: torch.dtype
) -> Tensor:
    out = None if dtype == probs.dtype else room_for(probs, dtype)
    return gpusoftmax.softmax_backward(probs, dprobs, axis_of(dim), temperature=temperature, out=out)


@defined_as("(Tensor x, int[] dim, float temperature, ScalarType? dtype) -> Tensor", _fake_rows)
def log_softmax(x: Tensor, dim: Sequence[int], temperature: float, dtype: torch.dtype | None) -> Tensor:
    return gpusoftmax.log_softmax(x, axis_of(dim), temperature=temperature, dtype=dtype)


@defined_as(
    "(Tensor log_probs, Tensor dlog_probs, int[] dim, float temperature, ScalarType dtype) -> Tensor",
    _fake_rows_backward,
)
def log_softmax_backward(
    log_probs: Tensor, dlog_probs: Tensor, dim: Sequence[int], temperature: float, dtype: torch.dtype
) -> Tensor:
    out = None if dtype == log_probs.dtype else room_for(log_probs, dtype)
    return gpusoftmax.log_softmax_backward(log_probs, dlog_probs, axis_of(dim), temperature=temperature, out=out)


def room_for(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A new tensor of the shape of x for a result; in huge pages, as the results that the core makes."""
    return _new(x, x.shape, dtype)


def _new(x: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """On the CPU made by the core, which notes it where a call is recorded."""
    if not x.is_cpu:
        return torch.empty(shape, dtype=dtype, device=x.device)
    name = str(dtype).removeprefix("torch.")
    return _arrays.result(_arrays.empty(_arrays.wrap(x, "an argument"), shape, name))


def axis_of(dim: Sequence[int]) -> tuple[int, ...] | int:
    """One axis as a number, with which calls are replayed. A tensor without axes has none to name."""
    return tuple(dim) if len(dim) > 1 else dim[0] if dim else -1


def fake_logsumexp(x, dim, keepdim, *transform):
    shape = [1 if axis in dim else size for axis, size in enumerate(x.shape) if keepdim or axis not in dim]
    return x.new_empty(shape, dtype=row_dtype(x.dtype))


@defined_as("(Tensor x, int[] dim, bool keepdim, float temperature) -> Tensor", fake_logsumexp)
def logsumexp(x: Tensor, dim: Sequence[int], keepdim: bool, temperature: float) -> Tensor:
    return gpusoftmax.logsumexp(x, axis_of(dim), keepdims=keepdim, temperature=temperature)


# ---------------------------------------------------------------- losses

_LOSS = "Tensor target, Tensor? weight, int ignore_index, str reduction, float label_smoothing, bool? validate"


def class_dim(logits: Tensor) -> int:
    return min(1, logits.ndim - 1)


def _fake_loss(logits, target, reduction):
    return logits.new_empty(target.shape if reduction == "none" else (), dtype=row_dtype(logits.dtype))


def _new_divisor(logits: Tensor, reduction: str) -> Tensor:
    """Where "mean" writes what it divides by; the other reductions divide by 1."""
    dtype = row_dtype(logits.dtype)
    return _new(logits, (1,), dtype) if reduction == "mean" else torch.ones(1, dtype=dtype, device=logits.device)


def _fake_cross_entropy(logits, target, weight, ignore_index, reduction, label_smoothing, validate):
    return _fake_loss(logits, target, reduction), logits.new_empty((1,), dtype=row_dtype(logits.dtype))


@defined_as(f"(Tensor logits, {_LOSS}) -> (Tensor loss, Tensor divisor)", _fake_cross_entropy)
def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    validate: bool | None,
) -> tuple[Tensor, Tensor]:
    divisor = _new_divisor(logits, reduction)
    options = class_dim(logits), ignore_index, reduction, label_smoothing, validate, 1.0, False
    loss, _ = _with_divisor(logits, target, weight, None, divisor, *options)
    return loss, divisor


def _fake_cross_entropy_backward(divisor, logits, target, weight, ignore_index, label_smoothing, dtype):
    return logits.new_empty(logits.shape, dtype=dtype)


@defined_as(
    "(Tensor divisor, Tensor logits, Tensor target, Tensor? weight, int ignore_index, float label_smoothing, "
    "ScalarType dtype) -> Tensor",
    _fake_cross_entropy_backward,
)
def cross_entropy_backward(
    divisor: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of the sum of the losses / divisor. Labels have been looked at when the loss was computed."""
    out = room_for(logits, dtype)
    options = class_dim(logits), ignore_index, "none", label_smoothing, False, 1.0, True
    _, dlogits = _with_divisor(logits, target, weight, out, divisor, *options)
    return dlogits


def _fake_cross_entropy_with_grad(logits, target, weight, ignore_index, reduction, label_smoothing, validate):
    divisor = logits.new_empty((1,), dtype=row_dtype(logits.dtype))
    return _fake_loss(logits, target, reduction), logits.new_empty(logits.shape), divisor


@defined_as(f"(Tensor logits, {_LOSS}) -> (Tensor loss, Tensor dlogits, Tensor divisor)", _fake_cross_entropy_with_grad)
def cross_entropy_with_grad(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    validate: bool | None,
) -> tuple[Tensor, Tensor, Tensor]:
    divisor = _new_divisor(logits, reduction)
    options = class_dim(logits), ignore_index, reduction, label_smoothing, validate, 1.0, True
    return *_with_divisor(logits, target, weight, None, divisor, *options), divisor


def _fake_cross_entropy_in_place(logits, target, weight, ignore_index, reduction, label_smoothing, validate):
    return _fake_loss(logits, target, reduction)


@defined_as(f"(Tensor(a!) logits, {_LOSS}) -> Tensor", _fake_cross_entropy_in_place)
def cross_entropy_in_place(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    validate: bool | None,
) -> Tensor:
    """The loss; the gradient overwrites the logits."""
    loss, _ = gpusoftmax.cross_entropy_with_grad(
        logits,
        target,
        weight,
        axis=class_dim(logits),
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        validate=validate,
        out=logits,
    )
    return loss


# ---------------------------------------------------------------- tokens


def fake_token_logprobs(logits, target, dim, temperature, ignore_index, lse, entropy, rank, argmax, validate):
    batch = [size for axis, size in enumerate(logits.shape) if axis != dim]
    dtype = row_dtype(logits.dtype)
    wanted = (True, target.shape, dtype), (lse, batch, dtype), (entropy, batch, dtype)
    wanted += (rank, target.shape, torch.int64), (argmax, batch, torch.int64)
    return [logits.new_empty(shape, dtype=dtype) for given, shape, dtype in wanted if given]


@defined_as(
    "(Tensor logits, Tensor target, int dim, float temperature, int ignore_index, bool lse, bool entropy, bool rank, "
    "bool argmax, bool? validate) -> Tensor[]",
    fake_token_logprobs,
)
def token_logprobs(
    logits: Tensor, target: Tensor, dim: int, temperature: float, ignore_index: int, *wanted: Any
) -> tuple[Tensor, ...]:
    """What was asked for of TokenLogprobs, in that order."""
    names = "return_lse", "return_entropy", "return_rank", "return_argmax", "validate"
    options = {"axis": dim, "temperature": temperature, "ignore_index": ignore_index}
    fields = gpusoftmax.token_logprobs(logits, target, **options, **dict(zip(names, wanted, strict=True)))
    return tuple([field for field in fields if field is not None])


def _batch_of_token_logprobs(
    info: Any, in_dims: Sequence[Any], logits: Tensor, target: Tensor, dim: int, *options: Any
) -> tuple[list[Tensor], list[int]]:
    """Under vmap, which has no rule of its own for lists of tensors."""
    logits, target = (
        one.expand(info.batch_size, *one.shape) if at is None else one.movedim(at, 0)
        for one, at in zip((logits, target), in_dims, strict=False)
    )
    made = token_logprobs(logits, target, dim + 1, *options)
    return made, [0] * len(made)


torch.library.register_vmap("gpusoftmax::token_logprobs", _batch_of_token_logprobs, lib=_LIBRARY)


def _fake_token_logprobs_backward(logits, target, dlogprob, dentropy, dim, temperature, ignore_index):
    return logits.new_empty(logits.shape)


@defined_as(
    "(Tensor logits, Tensor target, Tensor? dlogprob, Tensor? dentropy, int dim, float temperature, int ignore_index)"
    " -> Tensor",
    _fake_token_logprobs_backward,
)
def token_logprobs_backward(
    logits: Tensor,
    target: Tensor,
    dlogprob: Tensor | None,
    dentropy: Tensor | None,
    dim: int,
    temperature: float,
    ignore_index: int,
) -> Tensor:
    options = {"axis": dim, "temperature": temperature, "ignore_index": ignore_index, "validate": False}
    return gpusoftmax.token_logprobs_backward(logits, target, dlogprob, dentropy, **options)


def _fake_sample(logits, seed, step, seed_number, step_number, dim, *limits):
    batch = [size for axis, size in enumerate(logits.shape) if axis != dim]
    return logits.new_empty(batch, dtype=torch.int64)


@defined_as(
    "(Tensor logits, Tensor? seed, Tensor? step, SymInt seed_number, SymInt step_number, int dim, "
    "Tensor? temperatures, Tensor? top_ks, Tensor? top_ps, Tensor? min_ps, float? temperature, SymInt? top_k, "
    "float? top_p, float? min_p) -> Tensor",
    _fake_sample,
)
def sample(
    logits: Tensor, seed: Tensor | None, step: Tensor | None, seed_number: int, step_number: int, dim: int, *limits: Any
) -> Tensor:
    """The numbers count where there is no tensor."""
    given = [one if of_rows is None else of_rows for of_rows, one in zip(limits[:4], limits[4:], strict=True)]
    names = "temperature", "top_k", "top_p", "min_p"
    rng = (seed_number if seed is None else seed, step_number if step is None else step)
    return gpusoftmax.sample(logits, dim, **dict(zip(names, given, strict=True)), rng=rng)
