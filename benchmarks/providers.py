"""The libraries that are measured, each with the call that it would be given: the one place to add one.

Equal work on all sides: same inputs, same results, and a result goes into an array that exists already wherever the
library can write into one. No rival can where a loss comes with its gradient: "gpusoftmax, new" allocates as they do.
"""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

import gpusoftmax
from benchmarks.arrays import Arrays
from benchmarks.cases import EXPERTS, SOFTCAP, TOP, TOP_P, Z_LOSS

OURS = "gpusoftmax"
COPY = "copy"
"""A plain copy of as many bytes as the op has to move, by the array library: what the memory can do."""

ONE_NUMBER = "one number"
"""A copy of a single byte: the least that a launch takes."""

BESIDE = {"token_logprobs_and_rank": "logsumexp"}
"""op -> another one of ours that takes a part of its arguments and is timed in turns with it: what the rest costs."""

APART = "SciPy", "NumPy"
"""On the CPU they write several arrays as large as the result for one call. Of 32 MB of third-level cache these leave
nothing but lines that have yet to be written to memory, and whoever comes next waits for that.
"""

DTYPES = "float16", "bfloat16", "float32", "float64"

Calls = dict[str, Callable[[Arrays], Callable[[], Any]]]
"""op -> what makes the call for given arrays."""


class Provider(NamedTuple):
    """`calls` imports the library, which may be missing. `library` names whose arrays it takes, per target."""

    calls: Callable[[], Calls]
    library: dict[str, str]
    dtypes: tuple[str, ...] = DTYPES
    max_cols: int = 2**31 - 1


def _ours() -> Calls:
    def row_dtype(arrays):
        return "float64" if arrays.case.dtype == "float64" else "float32"

    return {
        "softmax": lambda a: partial(gpusoftmax.softmax, a.logits, out=a.result()),
        "log_softmax": lambda a: partial(gpusoftmax.log_softmax, a.logits, out=a.result()),
        "logsumexp": lambda a: partial(gpusoftmax.logsumexp, a.logits, out=a.per_row(row_dtype(a))),
        "cross_entropy": lambda a: partial(gpusoftmax.cross_entropy, a.logits, a.target),
        "cross_entropy_with_grad": lambda a: partial(
            gpusoftmax.cross_entropy_with_grad, a.logits, a.target, out=a.result()
        ),
        "softmax_backward": lambda a: partial(gpusoftmax.softmax_backward, a.probs, a.dprobs, out=a.result()),
        "token_logprobs": lambda a: partial(_our_scores, a.logits, a.target),
        "token_logprobs_and_rank": lambda a: partial(_our_scores, a.logits, a.target, return_rank=True),
        "top_logprobs": lambda a: lambda: gpusoftmax.top_logprobs(a.logits, TOP).logprob,
        "argmax": lambda a: partial(gpusoftmax.argmax, a.logits, out=a.per_row("int64")),
        "soft_argmax": lambda a: partial(gpusoftmax.soft_argmax, a.logits, out=a.per_row(row_dtype(a))),
        "sample": lambda a: partial(gpusoftmax.sample, a.logits, rng=0),
        "sample_top_p": lambda a: partial(gpusoftmax.sample, a.logits, top_p=TOP_P, rng=0),
        "masked_softmax": lambda a: partial(gpusoftmax.softmax, a.logits, softcap=SOFTCAP, mask=a.mask, out=a.result()),
        "topk_softmax": lambda a: lambda: gpusoftmax.topk_softmax(a.logits, EXPERTS).probs,
        "logsumexp_state": lambda a: partial(_our_state, a.logits),
        "kl_div_with_grad": lambda a: partial(_our_divergence, a.logits, a.target_logits, out=a.result()),
        "soft_cross_entropy_with_grad": lambda a: partial(
            gpusoftmax.cross_entropy_with_grad, a.logits, a.probs, z_loss=Z_LOSS, out=a.result()
        ),
    }


def _our_divergence(logits, target_logits, **options):
    return gpusoftmax.kl_div_with_grad(logits, target_logits, **options)[:2]


def _our_state(logits):
    state = gpusoftmax.LogSumExpState.empty(len(logits), like=logits)
    state.update(logits)
    return state.logsumexp()


def _our_scores(logits, target, **options):
    scores = gpusoftmax.token_logprobs(logits, target, return_entropy=True, **options)
    return (scores.logprob, scores.entropy, scores.rank)[: 2 + len(options)]


def _ours_new() -> Calls:
    return {
        "cross_entropy_with_grad": lambda a: partial(gpusoftmax.cross_entropy_with_grad, a.logits, a.target),
        "kl_div_with_grad": lambda a: partial(_our_divergence, a.logits, a.target_logits),
    }


def _ours_in_autograd() -> Calls:
    ours = importlib.import_module("gpusoftmax.torch")
    return {
        "cross_entropy_with_grad": lambda a: _torch_loss_and_grad(ours.cross_entropy, a.logits, a.target),
        "kl_div_with_grad": lambda a: _torch_loss_and_grad(ours.kl_div, a.logits, a.target_logits),
        "soft_cross_entropy_with_grad": lambda a: _torch_loss_and_grad(
            partial(ours.cross_entropy, z_loss=Z_LOSS), a.logits, a.probs
        ),
    }


def _torch() -> Calls:
    torch = importlib.import_module("torch")

    def softmax_backward(a):
        backward, dtype = torch.ops.aten._softmax_backward_data, a.probs.dtype
        return partial(backward.out, a.dprobs, a.probs, -1, dtype, grad_input=a.result())

    return {
        "softmax": lambda a: partial(torch.softmax, a.logits, -1, out=a.result()),
        "log_softmax": lambda a: partial(torch.log_softmax, a.logits, -1, out=a.result()),
        "logsumexp": lambda a: partial(torch.logsumexp, a.logits, -1, out=a.per_row()),
        "cross_entropy": lambda a: partial(torch.nn.functional.cross_entropy, a.logits, a.target),
        "cross_entropy_with_grad": lambda a: _torch_loss_and_grad(
            torch.nn.functional.cross_entropy, a.logits, a.target
        ),
        "kl_div_with_grad": lambda a: _torch_loss_and_grad(_torch_divergence, a.logits, a.target_logits),
        "soft_cross_entropy_with_grad": lambda a: _torch_loss_and_grad(_torch_soft_loss, a.logits, a.probs),
        "softmax_backward": softmax_backward,
        "logsumexp_state": lambda a: partial(torch.logsumexp, a.logits, -1, out=a.per_row()),
        **_torch_tokens(torch),
    }


def _torch_tokens(torch, compiled=lambda function: function) -> Calls:
    """What people write: log-probabilities of the whole vocabulary first."""

    def scores(logits, target):
        log_probs = torch.log_softmax(logits.float(), -1)
        return log_probs.gather(-1, target[:, None])[:, 0], -(log_probs.exp() * log_probs).sum(-1)

    def scores_and_rank(logits, target):
        log_probs = torch.log_softmax(logits.float(), -1)
        logprob = log_probs.gather(-1, target[:, None])
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        return logprob[:, 0], entropy, 1 + (log_probs > logprob).sum(-1)

    def top(logits):
        return torch.log_softmax(logits.float(), -1).topk(TOP)[0]

    def soft_argmax(logits):
        return torch.softmax(logits.float(), -1) @ torch.arange(logits.shape[-1], device=logits.device).float()

    def sample(logits):
        return torch.multinomial(torch.softmax(logits.float(), -1), 1)[:, 0]

    def sample_top_p(logits):
        ordered, columns = logits.float().sort(descending=True)
        probs = torch.softmax(ordered, -1)
        probs[probs.cumsum(-1) - probs >= TOP_P] = 0
        return columns.gather(-1, torch.multinomial(probs, 1))[:, 0]

    def masked_softmax(logits, mask):
        capped = SOFTCAP * torch.tanh(logits / SOFTCAP)
        return torch.softmax(capped.masked_fill(~mask, -torch.inf), -1)

    def topk_softmax(logits):
        return torch.softmax(logits.float().topk(EXPERTS)[0], -1)

    soft_argmax, masked_softmax, topk_softmax = map(compiled, (soft_argmax, masked_softmax, topk_softmax))
    scores, scores_and_rank, top = compiled(scores), compiled(scores_and_rank), compiled(top)
    return {
        "token_logprobs": lambda a: partial(scores, a.logits, a.target),
        "token_logprobs_and_rank": lambda a: partial(scores_and_rank, a.logits, a.target),
        "top_logprobs": lambda a: partial(top, a.logits),
        "argmax": lambda a: partial(torch.argmax, a.logits, -1),
        "soft_argmax": lambda a: partial(soft_argmax, a.logits),
        "sample": lambda a: partial(sample, a.logits),
        "sample_top_p": lambda a: partial(sample_top_p, a.logits),
        "masked_softmax": lambda a: partial(masked_softmax, a.logits, a.mask),
        "topk_softmax": lambda a: partial(topk_softmax, a.logits),
    }


def _torch_divergence(logits, target_logits):
    functional = importlib.import_module("torch").nn.functional
    log_probs, target_log_probs = functional.log_softmax(logits, -1), functional.log_softmax(target_logits, -1)
    return functional.kl_div(log_probs, target_log_probs, log_target=True, reduction="batchmean")


def _torch_soft_loss(logits, probs):
    functional = importlib.import_module("torch").nn.functional
    return functional.cross_entropy(logits, probs) + Z_LOSS * logits.logsumexp(-1).square().mean()


def _torch_loss_and_grad(function, logits, target):
    torch = importlib.import_module("torch")
    logits = logits.detach().requires_grad_()

    def forward_and_backward():
        loss = function(logits, target)
        return loss, torch.autograd.grad(loss, logits)[0]

    return forward_and_backward


def _torch_compile() -> Calls:
    """Compiled for each shape: what torch.compile does unless it is told that shapes vary. It allocates its results."""
    torch = importlib.import_module("torch")
    torch._dynamo.config.recompile_limit = 1000  # after eight shapes it would give up and run eagerly
    compiled = partial(torch.compile, dynamic=False)
    softmax = compiled(lambda logits: torch.softmax(logits, -1))
    log_softmax = compiled(lambda logits: torch.log_softmax(logits, -1))
    logsumexp = compiled(lambda logits: torch.logsumexp(logits, -1))
    cross_entropy = compiled(lambda logits, target: torch.nn.functional.cross_entropy(logits, target))
    return {
        "softmax": lambda a: partial(softmax, a.logits),
        "log_softmax": lambda a: partial(log_softmax, a.logits),
        "logsumexp": lambda a: partial(logsumexp, a.logits),
        "cross_entropy": lambda a: partial(cross_entropy, a.logits, a.target),
        "cross_entropy_with_grad": lambda a: _torch_loss_and_grad(cross_entropy, a.logits, a.target),
        "kl_div_with_grad": lambda a: _torch_loss_and_grad(compiled(_torch_divergence), a.logits, a.target_logits),
        **_torch_tokens(torch, compiled),
    }


def _scipy() -> Calls:
    return _special(importlib.import_module("scipy.special"))


def _cupy() -> Calls:
    return _special(importlib.import_module("cupyx.scipy.special"))


def _special(special) -> Calls:
    return {
        "softmax": lambda a: partial(special.softmax, a.logits, -1),
        "log_softmax": lambda a: partial(special.log_softmax, a.logits, -1),
        "logsumexp": lambda a: partial(special.logsumexp, a.logits, -1),
    }


def _numpy() -> Calls:
    def softmax(logits, out):
        np.subtract(logits, logits.max(axis=-1, keepdims=True), out=out)
        np.exp(out, out=out)
        return np.divide(out, out.sum(axis=-1, keepdims=True), out=out)

    def log_softmax(logits, out):
        np.subtract(logits, logsumexp(logits)[:, None], out=out)
        return out

    def logsumexp(logits):
        row_max = logits.max(axis=-1)
        return row_max + np.log(np.exp(logits - row_max[:, None]).sum(axis=-1))

    def cross_entropy(logits, target):
        return (logsumexp(logits) - logits[np.arange(len(target)), target]).mean()

    def cross_entropy_with_grad(logits, target, out):
        log_softmax(logits, out)
        rows = np.arange(len(target))
        loss = -out[rows, target].mean()
        np.exp(out, out=out)
        out[rows, target] -= 1
        return loss, np.divide(out, len(target), out=out)

    def softmax_backward(probs, dprobs, out):
        np.multiply(probs, dprobs, out=out)
        dot = out.sum(axis=-1, keepdims=True)
        np.subtract(dprobs, dot, out=out)
        return np.multiply(out, probs, out=out)

    def soft_cross_entropy_with_grad(logits, probs, out):
        lse = logsumexp(logits)[:, None]
        loss = ((lse - logits) * probs).sum(axis=-1) + Z_LOSS * lse[:, 0] ** 2
        np.exp(logits - lse, out=out)
        out *= probs.sum(axis=-1, keepdims=True) + 2 * Z_LOSS * lse
        out -= probs
        out /= len(logits)
        return loss.mean(), out

    def kl_div_with_grad(logits, target_logits, out):
        log_probs, target_log_probs = log_softmax(logits, out), log_softmax(target_logits, np.empty_like(out))
        target_probs = np.exp(target_log_probs)
        loss = (target_probs * np.subtract(target_log_probs, log_probs, out=target_log_probs)).sum() / len(logits)
        np.subtract(np.exp(out, out=out), target_probs, out=out)
        return loss, np.divide(out, len(logits), out=out)

    def token_logprobs(logits, target, out):
        log_softmax(logits, out)
        logprob = out[np.arange(len(target)), target]
        return logprob, -(np.exp(out) * out).sum(axis=-1)

    def token_logprobs_and_rank(logits, target, out):
        logprob, entropy = token_logprobs(logits, target, out)
        return logprob, entropy, 1 + (out > logprob[:, None]).sum(axis=-1)

    def top_logprobs(logits, out):
        log_softmax(logits, out)
        return -np.sort(-np.partition(out, -TOP, axis=-1)[:, -TOP:], axis=-1)

    def masked_softmax(logits, mask, out):
        return softmax(np.where(mask, SOFTCAP * np.tanh(logits / SOFTCAP), -np.inf), out)

    def sample_top_p(logits, out):
        columns = np.argsort(-logits, axis=-1)
        probs = softmax(np.take_along_axis(logits, columns, -1), out)
        kept = np.where(probs.cumsum(axis=-1) - probs < TOP_P, probs, 0).cumsum(axis=-1)
        drawn = (kept < np.random.default_rng(0).random((len(kept), 1)) * kept[:, -1:]).sum(axis=-1)
        return columns[np.arange(len(columns)), drawn]

    def topk_softmax(logits):
        largest = -np.sort(-np.partition(logits, -EXPERTS, axis=-1)[:, -EXPERTS:], axis=-1)
        return softmax(largest, largest)

    return {
        "masked_softmax": lambda a: partial(masked_softmax, a.logits, a.mask, a.result()),
        "topk_softmax": lambda a: partial(topk_softmax, a.logits),
        "logsumexp_state": lambda a: partial(logsumexp, a.logits),
        "token_logprobs": lambda a: partial(token_logprobs, a.logits, a.target, a.result()),
        "token_logprobs_and_rank": lambda a: partial(token_logprobs_and_rank, a.logits, a.target, a.result()),
        "top_logprobs": lambda a: partial(top_logprobs, a.logits, a.result()),
        "argmax": lambda a: partial(np.argmax, a.logits, -1),
        "soft_argmax": lambda a: (
            lambda: softmax(a.logits, a.result()) @ np.arange(a.logits.shape[1], dtype=a.logits.dtype)
        ),
        "sample": lambda a: lambda: np.argmax(a.logits + np.random.default_rng(0).gumbel(size=a.logits.shape), axis=-1),
        "sample_top_p": lambda a: partial(sample_top_p, a.logits, a.result()),
        "softmax": lambda a: partial(softmax, a.logits, a.result()),
        "log_softmax": lambda a: partial(log_softmax, a.logits, a.result()),
        "logsumexp": lambda a: partial(logsumexp, a.logits),
        "cross_entropy": lambda a: partial(cross_entropy, a.logits, a.target),
        "cross_entropy_with_grad": lambda a: partial(cross_entropy_with_grad, a.logits, a.target, a.result()),
        "softmax_backward": lambda a: partial(softmax_backward, a.probs, a.dprobs, a.result()),
        "kl_div_with_grad": lambda a: partial(kl_div_with_grad, a.logits, a.target_logits, a.result()),
        "soft_cross_entropy_with_grad": lambda a: partial(soft_cross_entropy_with_grad, a.logits, a.probs, a.result()),
    }


def _liger() -> Calls:
    operations = importlib.import_module("liger_kernel.ops.softmax")
    functional = importlib.import_module("liger_kernel.transformers.functional")

    def loss_and_grad(a):
        return _torch_loss_and_grad(
            functional.liger_cross_entropy, a.logits, a.target
        )  # its gradient overwrites the logits

    return {
        "softmax": lambda a: partial(operations.LigerSoftmaxFunction.apply, a.logits),
        "cross_entropy": lambda a: partial(functional.liger_cross_entropy, a.logits, a.target),
        "cross_entropy_with_grad": loss_and_grad,
    }


def _triton() -> Calls:
    fused = importlib.import_module("benchmarks.triton_softmax")
    return {"softmax": lambda a: partial(fused.softmax, a.logits, a.result())}


_ANY = {"cpu": "numpy", "gpu": ""}
_TORCH = {"cpu": "torch", "gpu": "torch"}
PROVIDERS = {
    OURS: Provider(_ours, _ANY),
    "gpusoftmax, new": Provider(_ours_new, _ANY),
    "gpusoftmax.torch": Provider(_ours_in_autograd, _TORCH),
    "torch": Provider(_torch, _TORCH),
    "torch.compile": Provider(_torch_compile, {"gpu": "torch"}),
    "SciPy": Provider(_scipy, {"cpu": "numpy"}, dtypes=("float32", "float64")),
    "NumPy": Provider(_numpy, {"cpu": "numpy"}, dtypes=("float32", "float64")),
    "CuPy": Provider(_cupy, {"gpu": "cupy"}, dtypes=("float16", "float32", "float64")),
    "Liger": Provider(_liger, {"gpu": "torch"}, dtypes=("float16", "bfloat16", "float32")),
    # One block holds a row: more columns than this do not fit into its registers, and Triton takes minutes over them.
    "Triton": Provider(_triton, {"gpu": "torch"}, dtypes=("float16", "bfloat16", "float32"), max_cols=65536),
}
