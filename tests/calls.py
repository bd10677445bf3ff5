"""Every public operation with arguments for it, for the tests that hold for all of them alike."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

import gpusoftmax
from tests import inputs


class Call(NamedTuple):
    """`function(*arrays)`; `rows` names the arguments of shape (..., n_cols), the others have one number per row."""

    function: Callable
    rows: tuple[str, ...]
    others: tuple[str, ...] = ()
    takes_out: bool = True
    per_row: bool = False  # the result has one number per row

    @property
    def arguments(self):
        return (*self.rows, *self.others)


def _top_logprobs(logits, axis=-1, **options):
    return gpusoftmax.top_logprobs(logits, min(8, logits.shape[axis]), axis=axis, **options)


def _topk_softmax(logits, axis=-1, **options):
    return gpusoftmax.topk_softmax(logits, min(8, logits.shape[axis]), axis=axis, **options)


EVERY_FIELD = {"return_lse": True, "return_entropy": True, "return_rank": True, "return_argmax": True}


def sample_with_seeds(logits, seeds, axis=-1):
    return gpusoftmax.sample(logits, axis, rng=(seeds, 3))


def _kl_div_with_grad(logits, target_logits, **options):
    return gpusoftmax.kl_div_with_grad(logits, target_logits, **options)[:2]


CALLS = {
    "softmax": Call(gpusoftmax.softmax, ("x",)),
    "softmax_backward": Call(gpusoftmax.softmax_backward, ("probs", "dprobs")),
    "softmax_jvp": Call(gpusoftmax.softmax_jvp, ("probs", "tangent")),
    "log_softmax": Call(gpusoftmax.log_softmax, ("x",)),
    "log_softmax_backward": Call(gpusoftmax.log_softmax_backward, ("log_probs", "dlog_probs")),
    "logsumexp": Call(gpusoftmax.logsumexp, ("x",), per_row=True),
    "argmax": Call(gpusoftmax.argmax, ("x",), per_row=True),
    "soft_argmax": Call(gpusoftmax.soft_argmax, ("x",), per_row=True),
    "soft_argmax_backward": Call(gpusoftmax.soft_argmax_backward, ("x",), ("expected", "dexpected")),
    "cross_entropy": Call(
        partial(gpusoftmax.cross_entropy, reduction="none"), ("logits",), ("target",), takes_out=False, per_row=True
    ),
    "cross_entropy_with_grad": Call(gpusoftmax.cross_entropy_with_grad, ("logits",), ("target",)),
    "cross_entropy_backward": Call(gpusoftmax.cross_entropy_backward, ("logits",), ("target", "lse", "dloss")),
    "kl_div": Call(
        partial(gpusoftmax.kl_div, reduction="none"), ("logits", "target_logits"), takes_out=False, per_row=True
    ),
    "kl_div_with_grad": Call(_kl_div_with_grad, ("logits", "target_logits")),
    "token_logprobs": Call(
        partial(gpusoftmax.token_logprobs, **EVERY_FIELD), ("logits",), ("target",), takes_out=False, per_row=True
    ),
    "top_logprobs": Call(_top_logprobs, ("logits",), takes_out=False, per_row=True),
    "topk_softmax": Call(_topk_softmax, ("logits",), takes_out=False, per_row=True),
    "token_logprobs_backward": Call(
        gpusoftmax.token_logprobs_backward, ("logits",), ("target", "dlogprob", "dentropy")
    ),
    "sample": Call(sample_with_seeds, ("logits",), ("seeds",), takes_out=False, per_row=True),
    "top_k_mask_logits": Call(partial(gpusoftmax.top_k_mask_logits, top_k=5), ("logits",)),
    "top_p_mask_logits": Call(partial(gpusoftmax.top_p_mask_logits, top_p=0.9), ("logits",)),
}
# Those whose `out` has the shape of the logits: it may be an argument itself.
IN_PLACE = [
    (name, argument) for name, call in CALLS.items() if call.takes_out and not call.per_row for argument in call.rows
]


def arguments(name, shape, dtype, seed=0):
    """NumPy arrays for each argument of a call, by name, in the order in which they are passed."""
    x = inputs.make("spread", shape, dtype, seed)
    gradient = inputs.make("peaked", shape, dtype, seed + 1)
    row_dtype = "float64" if np.dtype(dtype) == np.float64 else "float32"
    expected = np.asarray(gpusoftmax.soft_argmax(x))
    made = {
        "x": x,
        "expected": expected,
        "dexpected": inputs.make("peaked", expected.shape, expected.dtype, seed + 2),
        "logits": x,
        "target_logits": inputs.make("spread", shape, dtype, seed + 3),
        "probs": np.asarray(gpusoftmax.softmax(x)),
        "dprobs": gradient,
        "tangent": gradient,
        "log_probs": np.asarray(gpusoftmax.log_softmax(x)),
        "dlog_probs": gradient,
        "lse": np.asarray(gpusoftmax.logsumexp(x)),
        "dloss": gradient[..., 0].astype(row_dtype),
        "dlogprob": gradient[..., 0].astype(row_dtype),
        "dentropy": gradient[..., -1].astype(row_dtype),
        "target": inputs.targets(int(np.prod(shape[:-1])), shape[-1], share_ignored=0.2, seed=seed).reshape(shape[:-1]),
        "seeds": np.random.default_rng(seed).integers(-(2**63), 2**63, shape[:-1]),
    }
    return {argument: made[argument] for argument in CALLS[name].arguments}


def same_bits(one, two):
    """Results, or tuples of results, that agree in shape, dtype and every bit."""
    if isinstance(one, tuple):
        return len(one) == len(two) and all(same_bits(*pair) for pair in zip(one, two, strict=True))
    one, two = np.asarray(one), np.asarray(two)
    return one.dtype == two.dtype and one.shape == two.shape and one.tobytes() == two.tobytes()


def reshaped(result, shape):
    """Results brought to (*shape, -1), or to `shape` where they have one number per row; scalars as they are."""
    if isinstance(result, tuple):
        return tuple(reshaped(part, shape) for part in result)
    result = np.asarray(result)
    n_rows = int(np.prod(shape))
    if result.ndim == 0:
        return result
    return result.reshape(shape) if result.size == n_rows else result.reshape(*shape, result.size // n_rows)


class Untouched:
    """The buffer behind a NumPy view: asserts at the end that no byte of it (`but_view`: outside the view) changed."""

    def __init__(self, view, but_view=False):
        root = view
        while getattr(root, "base", None) is not None:
            root = root.base
        self.root, self.view, self.but_view = np.asarray(root), view, but_view

    def __enter__(self):
        self.before, self.values = self.root.tobytes(), self.view.copy()
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            if self.but_view:
                result = self.view.copy()
                self.view[...] = self.values
            assert self.root.tobytes() == self.before, "bytes outside the result changed"
            if self.but_view:
                self.view[...] = result
