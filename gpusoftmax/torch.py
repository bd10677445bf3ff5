"""The softmax family for training with PyTorch: torch's names, arguments and defaults, differentiable.

softmax, log_softmax, logsumexp, cross_entropy, CrossEntropyLoss, linear_cross_entropy and LinearCrossEntropyLoss stand
in for torch's functions of these names (the last two hold all logits in forward mode and under torch.func);
token_logprobs, kl_div and sample are those of gpusoftmax. They are differentiable any number of times, in forward mode
too, and by torch.func (sample is not at all), can be compiled by torch.compile with fullgraph=True, wait for no GPU and
so can be captured in a CUDA graph, and take tensors of any strides without a copy.

softmax, log_softmax, logsumexp, cross_entropy and token_logprobs take what gpusoftmax.softmax may do to the logits
first: temperature, bias, softcap, mask, n_valid. Their derivatives go through it, to bias and temperatures too. The
layers take one temperature and a softcap. Where more memory is taken than was asked for, or than usually is, a warning
says so once, and why.

Sums are computed in float32 whatever the dtype of the logits, float64 in float64. Inside torch.autocast softmax and
log_softmax of half types return float32, as torch's do on a GPU; losses, log-sum-exp and log-probabilities are float32
always, and gradients have the dtype of the logits. The layers take bfloat16 there, as torch's do, but float32 where
torch's take float16.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn._reduction import legacy_get_string

from gpusoftmax import _arrays, _checks, _torch_core, _torch_losses, _torch_ops, _torch_rows
from gpusoftmax import _torch_transformed as transformed
from gpusoftmax._loss import split_target
from gpusoftmax._torch_chunks import chunk_size_of
from gpusoftmax._torch_full_loss import Options, Target, full_cross_entropy
from gpusoftmax._torch_transform import through
from gpusoftmax._torch_warnings import warn_once
from gpusoftmax.token_logprobs import TokenLogprobs

__all__ = [
    "CrossEntropyLoss",
    "LinearCrossEntropyLoss",
    "cross_entropy",
    "kl_div",
    "linear_cross_entropy",
    "log_softmax",
    "logsumexp",
    "sample",
    "softmax",
    "token_logprobs",
]

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def softmax(
    input: Tensor,
    dim: int | Sequence[int] | None,
    _stacklevel: int | torch.dtype = 3,
    dtype: torch.dtype | None = None,
    *,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    mask: Tensor | None = None,
    n_valid: int | Tensor | None = None,
    empty_row: str = "nan",
) -> Tensor:
    """torch.softmax of input / temperature along `dim`, differentiable.

    Parameters
    ----------
    input : tensor, shape (..., n_cols, ...)
        Logits: float16, bfloat16, float32 or float64, with any strides; integers where a `dtype` is given.
    dim : int, sequence of int or None
        Along which the results sum to 1; None means all.
    _stacklevel
        Taken and not used, for calls of torch.nn.functional.softmax. torch.softmax has `dtype` in its place.
    dtype : torch.dtype, optional
        Of the result; by default that of `input`, float32 for half types inside torch.autocast.
    temperature : float, or tensor with the shape of `input` without `dim`, or without axes
        Divides the logits; finite and above 0. Of a tensor no value is looked at, rows where it is not are NaN.
    bias, softcap, mask, n_valid, empty_row
        What the logits go through then, as in gpusoftmax.softmax. Tensors of temperatures and the bias have gradients.

    Returns
    -------
    tensor, the shape and device of `input`

    Raises
    ------
    TypeError, ValueError, IndexError
        As gpusoftmax.softmax; TypeError also for what is no tensor, and for integers without a `dtype`.

    Notes
    -----
    Logits that are masked get the gradient 0. With a bias, a softcap or temperatures of rows operations of torch bring
    the gradient back to `input`; what the other functions have a kernel for is said there.

    Examples
    --------
    >>> import torch
    >>> from gpusoftmax.torch import softmax
    >>> logits = torch.zeros(1, 2, requires_grad=True)
    >>> softmax(logits, dim=-1)[0, 0].backward()
    >>> logits.grad
    tensor([[ 0.2500, -0.2500]])
    """
    x, dtype = _logits(input, _dtype(_stacklevel, dtype))
    dims = _dims(dim, x.ndim)
    given = through(x, dims, temperature, bias, softcap, mask, n_valid, empty_row)
    return transformed.softmax(x, dims, given, dtype)


def log_softmax(
    input: Tensor,
    dim: int | Sequence[int] | None,
    _stacklevel: int | torch.dtype = 3,
    dtype: torch.dtype | None = None,
    *,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    mask: Tensor | None = None,
    n_valid: int | Tensor | None = None,
    empty_row: str = "nan",
) -> Tensor:
    """torch.log_softmax of input / temperature along `dim`, differentiable: confident rows keep their small values.

    Parameters, Returns, Raises
    ---------------------------
    As `softmax`.

    Examples
    --------
    >>> import torch
    >>> from gpusoftmax.torch import log_softmax
    >>> log_softmax(torch.tensor([40.0, 0.0]), dim=-1)
    tensor([-4.2484e-18, -4.0000e+01])
    """
    x, dtype = _logits(input, _dtype(_stacklevel, dtype))
    dims = _dims(dim, x.ndim)
    given = through(x, dims, temperature, bias, softcap, mask, n_valid, empty_row)
    return transformed.log_softmax(x, dims, given, dtype)


def logsumexp(
    input: Tensor,
    dim: int | Sequence[int] | None,
    keepdim: bool = False,
    *,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    mask: Tensor | None = None,
    n_valid: int | Tensor | None = None,
) -> Tensor:
    """torch.logsumexp of input / temperature along `dim`, differentiable.

    Parameters
    ----------
    input, dim, temperature, bias, softcap, mask, n_valid
        As in `softmax`. A row that is masked whole has the gradient 0.
    keepdim : bool
        Keep the reduced axes with size 1.

    Returns
    -------
    tensor, the shape of `input` without `dim`
        float32, float64 for float64 (torch: the dtype of `input`).

    Raises
    ------
    TypeError, ValueError, IndexError
        As `softmax`.

    Examples
    --------
    >>> import torch
    >>> from gpusoftmax.torch import logsumexp
    >>> logits = torch.zeros(4, requires_grad=True)
    >>> logsumexp(logits, dim=0).backward()
    >>> logits.grad
    tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    x, _ = _logits(input, None)
    dims = _dims(dim, x.ndim)
    given = through(x, dims, temperature, bias, softcap, mask, n_valid)
    return transformed.logsumexp(x, dims, bool(keepdim), given)


def cross_entropy(
    input: Tensor,
    target: Tensor | tuple[Tensor, Tensor],
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    row_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    mask: Tensor | None = None,
    n_valid: int | Tensor | None = None,
    empty_row: str = "nan",
    return_z_loss: bool = False,
    return_lse: bool = False,
    return_correct: bool = False,
    inplace: bool = False,
) -> Any:
    """torch.nn.functional.cross_entropy, in nats, with one read of the logits for the loss and one for the gradient.

    Parameters
    ----------
    input : tensor, shape (n_cols,), (N, n_cols) or (N, n_cols, d1, ...)
        Logits: float16, bfloat16, float32 or float64, with any strides.
    target : tensor of integers, the shape of `input` without the class dimension
        Class of each row, from 0 to n_cols - 1, or `ignore_index`. Or probabilities of classes: a floating tensor of
        the shape of `input`, or a pair (indices, probabilities) of tensors with one more dimension at the end, for
        rows in which few classes have any. Probabilities have a gradient, too: minus the log-probability of the class,
        times its weight and what else the loss has, but 0 where the logit is masked or -inf.
    weight : tensor, shape (n_cols,), optional
        A factor for each class, which gets no gradient.
    ignore_index : int
        Rows with this label are not read, have loss 0 and gradient 0, and do not count in the mean.
    size_average, reduce : bool, optional
        What torch had before `reduction`: where one of them is given it counts, with torch's warning.
    reduction : "mean", "sum" or "none"
    label_smoothing : float, 0 to 1
        Share of the probability that is spread evenly over all classes.
    z_loss, row_weight, normalizer
        As in gpusoftmax.cross_entropy: z_loss * lse**2 is added to the loss of each row; a factor for each row, which
        gets no gradient; what "mean" divides by instead.
    temperature, bias, softcap, mask, n_valid, empty_row
        What the logits go through before, as in `softmax`; for rows that are masked whole `empty_row="zero"` makes loss
        and gradient 0. The kernel of the loss brings the gradient back to `input`.
    return_z_loss, return_lse, return_correct : bool
        What else to return, from the same read of the logits, detached.
    inplace : bool
        Let the gradient overwrite `input`, where one is recorded: saves an array of its size. The result can then be
        differentiated once, and torch reports whoever else needs the logits. float16 gradients are rounded before they
        meet the scale of a GradScaler. Compiled code, which plans its memory itself, ignores it; so do, with a warning,
        forward mode, torch.func, and what no kernel does so: z_loss, row_weight, normalizer, return_z_loss, return_lse,
        return_correct, probabilities, and logits that are a lazily negated view.

    Returns
    -------
    tensor, float32 (float64 for float64 logits; torch: the dtype of `input`)
        A single number for "mean" and "sum", the shape of the rows for "none".
    gpusoftmax.CrossEntropy
        If more is asked for, a named tuple: loss, z_loss, lse and n_correct, as gpusoftmax.cross_entropy has them.

    Raises
    ------
    IndexError
        On the CPU, a label out of range. On a GPU, where looking would wait, such a row gets a NaN loss and gradient.
    TypeError, ValueError
        As gpusoftmax.cross_entropy; TypeError also for a `weight` or `row_weight` that requires grad, ValueError for a
        leaf `inplace`, or where a temperature or bias requires grad beside it.

    Examples
    --------
    >>> import torch
    >>> from gpusoftmax.torch import cross_entropy
    >>> logits = torch.zeros(1, 4, requires_grad=True)
    >>> cross_entropy(logits, torch.tensor([2])).backward()
    >>> logits.grad
    tensor([[ 0.2500,  0.2500, -0.7500,  0.2500]])
    """
    x, _ = _logits(input, None)
    target, shares = split_target(target)
    _tensor(target, "target")
    for name, one in (("target[1]", shares), ("weight", weight), ("row_weight", row_weight)):
        if one is not None:
            _tensor(one, name)
    given = through(x, (_torch_ops.class_dim(x),), temperature, bias, softcap, mask, n_valid, empty_row)
    wanted = return_z_loss, return_lse, return_correct
    plain = not z_loss and row_weight is normalizer is shares is None and not any(wanted)
    if size_average is not None or reduce is not None:
        reduction = legacy_get_string(size_average, reduce)
    _checks.reduction(reduction)
    ignore_index, label_smoothing = _checks.ignore_index(ignore_index), _checks.label_smoothing(label_smoothing)
    if plain and not target.is_floating_point():
        loss = _torch_losses.Loss(ignore_index, reduction, label_smoothing)
        return transformed.cross_entropy(x, target, weight, loss, given, inplace)
    if inplace and _torch_rows.recorded(x):
        warn_once(
            "cross_entropy(..., inplace=True) takes memory of its own for the gradient with z_loss, row_weight, "
            "normalizer, return_z_loss, return_lse, return_correct and where target holds probabilities"
        )
    options = Options(ignore_index, label_smoothing, _checks.z_loss(z_loss), return_z_loss, return_correct, None)
    target_of_rows = Target(target, shares, weight, row_weight)
    return full_cross_entropy(x, target_of_rows, options, given, reduction, normalizer, wanted)


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss, with its arguments, buffers and state, computed by `cross_entropy`.

    Examples
    --------
    >>> import torch
    >>> from gpusoftmax.torch import CrossEntropyLoss
    >>> CrossEntropyLoss(label_smoothing=0.1)(torch.zeros(1, 4), torch.tensor([2]))
    tensor(1.3863)
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        options = {"ignore_index": self.ignore_index, "reduction": self.reduction}
        return cross_entropy(input, target, self.weight, **options, label_smoothing=self.label_smoothing)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    row_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_z_loss: bool = False,
    return_lse: bool = False,
    return_correct: bool = False,
    chunk_size: int | None = None,
    options: "torch.nn.LinearCrossEntropyOptions | None" = None,
) -> Any:
    """torch.nn.functional.linear_cross_entropy: cross_entropy of the logits input @ linear_weight.T + linear_bias.

    The logits are made a chunk of rows at a time, and become their gradient in place. They are held as a whole,
    with a warning, where the gradient is to be differentiated again, where the target holds probabilities, or where
    the classes have further axes.

    Parameters
    ----------
    input : tensor, shape (..., n_features)
        float16, bfloat16, float32 or float64, with any strides.
    linear_weight : tensor, shape (n_classes, n_features) or (n_classes, d1, ..., n_features), the dtype of `input`
    target : tensor of integers, the shape of `input` without its last axis, then (d1, ...)
        Class of each row, from 0 to n_classes - 1, or `ignore_index`. Or probabilities of classes: a floating tensor,
        with an axis of n_classes before (d1, ...).
    linear_bias : tensor, the shape of `linear_weight` without its last axis, the dtype of `input`, optional
    weight, reduction, label_smoothing
        As in `cross_entropy`.
    ignore_index : int, optional
        As in `cross_entropy`; None stands for -100, as in torch's function.
    z_loss, row_weight, normalizer, temperature, softcap
        As in gpusoftmax.linear_cross_entropy. None of them gets a gradient.
    return_z_loss, return_lse, return_correct : bool
        What else to return, detached.
    chunk_size : int, optional
        Rows whose logits are held at a time; see gpusoftmax.linear_cross_entropy for what is taken by default.
    options : torch.nn.LinearCrossEntropyOptions, optional
        The same as torch has it: `batch_chunk_size` or a `chunking_method`, of which "auto" takes what is taken by
        default. Graphs can be retained, and sums are in float32, float64 in float64, whatever the others are; for those
        that ask for something else a warning says so once.

    Returns
    -------
    tensor, float32 (float64 for float64 input)
        A single number for "mean" and "sum", the shape of a `target` of integers for "none".
    gpusoftmax.CrossEntropy
        If more is asked for, a named tuple: loss, z_loss, lse and n_correct, as gpusoftmax.cross_entropy has them.

    Raises
    ------
    IndexError, TypeError, ValueError
        As gpusoftmax.linear_cross_entropy.

    Examples
    --------
    >>> import torch
    >>> from gpusoftmax.torch import linear_cross_entropy
    >>> head = torch.zeros(4, 3, requires_grad=True)
    >>> linear_cross_entropy(torch.ones(1, 3), head, torch.tensor([2])).backward()
    >>> head.grad[2]
    tensor([-0.7500, -0.7500, -0.7500])
    """
    input, linear_weight, linear_bias = _in_autocast(input, linear_weight, linear_bias)
    wanted = bool(return_z_loss), bool(return_lse), bool(return_correct)
    given = linear_bias, weight, row_weight, normalizer
    ignore_index = -100 if ignore_index is None else ignore_index
    if options is not None:
        if chunk_size is not None:
            raise ValueError("chunk_size and options are given, expected one of them: both say how chunks are made")
        _tensor(input, "input")
        _tensor(linear_weight, "linear_weight")
        chunk_size = chunk_size_of(options, input, linear_weight)
    numbers = ignore_index, reduction, label_smoothing, z_loss, temperature, softcap, wanted
    return _torch_core.linear_cross_entropy(input, linear_weight, target, *given, *numbers, None, chunk_size)


class LinearCrossEntropyLoss(torch.nn.Module):
    """The last layer of a classifier and its loss: torch.nn.LinearCrossEntropyLoss, computed by `linear_cross_entropy`.

    The layer is `linear`, a torch.nn.Linear: parameters and state have torch's names. `out_features` are the axes that
    follow that of the classes, (d1, ...). What the loss has more is given
    as to `linear_cross_entropy`: `row_weight` and `normalizer`, which follow the batch, where it is called.

    Examples
    --------
    >>> import torch
    >>> from gpusoftmax.torch import LinearCrossEntropyLoss
    >>> loss_of = LinearCrossEntropyLoss(3, 4, bias=True)
    >>> loss_of(torch.ones(2, 3), torch.tensor([2, 0])).backward()
    >>> loss_of.linear.weight.grad.shape
    torch.Size([4, 3])
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: Sequence[int] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        temperature: float = 1.0,
        softcap: float | None = None,
        return_z_loss: bool = False,
        return_lse: bool = False,
        return_correct: bool = False,
        chunk_size: int | None = None,
        options: "torch.nn.LinearCrossEntropyOptions | None" = None,
    ):
        super().__init__()
        n_outputs = math.prod(out_features, start=num_classes)
        self.linear = torch.nn.Linear(in_features, n_outputs, bias=bias, device=device, dtype=dtype)
        self.num_classes, self.out_features = num_classes, tuple(out_features)
        self.register_buffer("weight", weight)
        self.reduction, self.ignore_index = reduction, ignore_index
        self.label_smoothing, self.chunk_size, self.options = label_smoothing, chunk_size, options
        self.z_loss, self.temperature, self.softcap = z_loss, temperature, softcap
        self.return_z_loss, self.return_lse, self.return_correct = return_z_loss, return_lse, return_correct

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        row_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Any:
        outputs, bias = (self.num_classes, *self.out_features), self.linear.bias
        return linear_cross_entropy(
            input,
            self.linear.weight.reshape(*outputs, self.linear.in_features),
            target,
            linear_bias=None if bias is None else bias.reshape(outputs),
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            row_weight=row_weight,
            normalizer=normalizer,
            temperature=self.temperature,
            softcap=self.softcap,
            return_z_loss=self.return_z_loss,
            return_lse=self.return_lse,
            return_correct=self.return_correct,
            chunk_size=self.chunk_size,
            options=self.options,
        )

    def extra_repr(self) -> str:
        of_linear = f"in_features={self.linear.in_features}", f"bias={self.linear.bias is not None}"
        return ", ".join([*of_linear, *(f"{name}={getattr(self, name)}" for name in _SHOWN)])


_SHOWN = (
    *("num_classes", "out_features", "reduction", "ignore_index", "label_smoothing", "z_loss", "temperature"),
    *("softcap", "return_z_loss", "return_lse", "return_correct", "chunk_size", "options"),
)


def kl_div(
    input: Tensor,
    target_logits: Tensor,
    dim: int = -1,
    *,
    temperature: float = 1.0,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    normalizer: Tensor | float | None = None,
) -> Tensor:
    """gpusoftmax.kl_div, of the softmax of `target_logits` from that of `input` along `dim`, differentiable in both.

    What torch has as kl_div(log_softmax(input, dim), log_softmax(target_logits, dim), log_target=True), summed along
    `dim`; "mean" is torch's "batchmean".

    Parameters
    ----------
    input, target_logits : tensor, shape (..., n_cols, ...)
        Logits of the student and of the teacher, of the same shape and dtype.
    dim : int
        Along which the classes lie.
    temperature, row_weight, reduction, normalizer
        As in gpusoftmax.kl_div.

    Returns
    -------
    tensor
        float32, float64 for float64: one number, or with "none" the shape of `input` without `dim`.

    Raises
    ------
    TypeError, ValueError
        As gpusoftmax.kl_div.

    Examples
    --------
    >>> import torch
    >>> from gpusoftmax.torch import kl_div
    >>> logits = torch.zeros(1, 2, requires_grad=True)
    >>> kl_div(logits, torch.tensor([[0.0, -torch.inf]])).backward()
    >>> logits.grad
    tensor([[-0.5000,  0.5000]])
    """
    return _torch_core.kl_div(input, target_logits, dim, temperature, row_weight, reduction, normalizer)


def token_logprobs(
    logits: Tensor,
    target: Tensor,
    dim: int = -1,
    *,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    mask: Tensor | None = None,
    n_valid: int | Tensor | None = None,
    ignore_index: int = -100,
    return_lse: bool = False,
    return_entropy: bool = False,
    return_rank: bool = False,
    return_argmax: bool = False,
) -> TokenLogprobs:
    """gpusoftmax.token_logprobs, differentiable: log-probabilities of tokens for policy gradients and distillation.

    Parameters
    ----------
    logits, target, ignore_index, return_lse, return_entropy, return_rank, return_argmax
        As in gpusoftmax.token_logprobs.
    dim : int
        Along which the tokens lie.
    temperature, bias, softcap, mask, n_valid
        What the logits go through before, as in `softmax`. A kernel brings the gradient back to `logits`, that of `lse`
        alone as in `softmax`.

    Returns
    -------
    TokenLogprobs
        A named tuple of tensors: logprob, lse and entropy have gradients, rank and argmax are integers.

    Raises
    ------
    IndexError, TypeError, ValueError
        As gpusoftmax.token_logprobs.

    Examples
    --------
    >>> import torch
    >>> from gpusoftmax.torch import token_logprobs
    >>> logits = torch.zeros(1, 4, requires_grad=True)
    >>> scores = token_logprobs(logits, torch.tensor([2]), return_entropy=True)
    >>> (scores.logprob + 0.01 * scores.entropy).sum().backward()
    >>> logits.grad
    tensor([[-0.2500, -0.2500,  0.7500, -0.2500]])
    """
    x, _ = _logits(logits, None, "logits")
    _tensor(target, "target")
    (axis,) = _checks.class_axis(dim, x.ndim)
    given = through(x, (axis,), temperature, bias, softcap, mask, n_valid)
    wanted = bool(return_lse), bool(return_entropy), bool(return_rank), bool(return_argmax)
    tokens = _torch_losses.Tokens(axis, 1.0, _checks.ignore_index(ignore_index), *wanted)
    return TokenLogprobs(*transformed.token_logprobs(x, target, tokens, given))


def sample(
    logits: Tensor,
    dim: int = -1,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    rng: Any,
) -> Tensor:
    """gpusoftmax.sample, for code that is compiled: indices, which have no gradient.

    Parameters
    ----------
    logits, temperature, top_k, top_p, min_p, rng
        As in gpusoftmax.sample; a number in a tensor without axes is that of all rows.
    dim : int
        The axis of the classes.

    Returns
    -------
    tensor of int64, the shape of `logits` without `dim`

    Raises
    ------
    TypeError, ValueError
        As gpusoftmax.sample.

    Examples
    --------
    >>> import torch
    >>> from gpusoftmax.torch import sample
    >>> sample(torch.tensor([[0.0, 9.0, 1.0]]), temperature=0, rng=0)
    tensor([1])
    """
    x, _ = _logits(logits, None, "logits")
    (axis,) = _checks.class_axis(dim, x.ndim)
    seed, step = _checks.rng(rng)
    tensors = [None if type(one) is int else one for one in (seed, step)]
    numbers = [_signed(one) if type(one) is int else 0 for one in (seed, step)]
    batch = [size for each, size in enumerate(x.shape) if each != axis]
    limits = temperature, top_k, top_p, min_p
    of_rows = [_of_rows(one, batch) if isinstance(one, Tensor) else None for one in limits]
    temperature, top_k, top_p, min_p = [None if isinstance(one, Tensor) else one for one in limits]
    temperature, top_p, min_p = [None if one is None else float(one) for one in (temperature, top_p, min_p)]
    return _torch_ops.sample(x.detach(), *tensors, *numbers, axis, *of_rows, temperature, top_k, top_p, min_p)


def _of_rows(given: Tensor, batch: list[int]) -> Tensor:
    """One for each row, without a gradient."""
    return (given if given.ndim else given.expand(batch)).detach()


def _in_autocast(*layer: Any) -> tuple:
    """Inside torch.autocast all in one format, as torch's products of matrices take them: inputs may be in half types,
    and parameters are not.
    """
    kind = layer[0].device.type if isinstance(layer[0], Tensor) else "cpu"
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return layer
    # Not float16: gradients would be rounded to it before they meet the scale of a GradScaler.
    dtype = torch.bfloat16 if torch.get_autocast_dtype(kind) == torch.bfloat16 else torch.float32
    narrow = (torch.float16, torch.bfloat16, torch.float32)
    return tuple(one.to(dtype) if isinstance(one, Tensor) and one.dtype in narrow else one for one in layer)


def _tensor(given: Any, name: str) -> None:
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} is a {type(given).__name__}, expected a torch tensor: gpusoftmax takes other arrays")
    _arrays.not_nested(given, name)


def _dims(dim: int | Sequence[int] | None, ndim: int) -> tuple[int, ...]:
    if ndim == 0 and isinstance(dim, tuple | list) and len(dim) == 1:  # torch gives a number one axis, too
        (dim,) = dim
    return _checks.axes(dim, ndim)


def _signed(value: int) -> int:
    """The same 64 bits as a signed integer."""
    return value - 2**64 if value >= 2**63 else value


def _dtype(third: int | torch.dtype, fourth: torch.dtype | None) -> torch.dtype | None:
    """What was given as one: to torch.softmax as its third argument, to torch.nn.functional.softmax as its fourth."""
    dtype = third if fourth is None and not isinstance(third, int) else fourth
    dtype = torch.float64 if dtype is float else dtype  # as torch has it
    if dtype not in (None, *_FLOATING):
        raise TypeError(f"dtype is {dtype!r}, expected one of {', '.join(map(str, _FLOATING))}")
    return dtype


def _logits(given: Tensor, dtype: torch.dtype | None, name: str = "input") -> tuple[Tensor, torch.dtype | None]:
    """The logits as the kernels take them, and the dtype of a result that has their shape: None means theirs."""
    _tensor(given, name)
    if given.dtype not in _FLOATING:
        if dtype is None or given.dtype.is_complex:
            _checks.floating(str(given.dtype).removeprefix("torch."), name)
        given = given.to(dtype)
    half = dtype is None and given.dtype in (torch.float16, torch.bfloat16)
    if half and torch.amp.is_autocast_available(given.device.type) and torch.is_autocast_enabled(given.device.type):
        dtype = torch.float32
    return given, dtype
