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


class Everything(NamedTuple):
    """A call with every array that a function takes, at once: what each of them is, see _MADE, and options."""

    function: Callable
    arrays: dict[str, str | tuple[str, str]]
    options: dict


N_ROWS, N_COLS = 12, 40
_MADE = {
    "logits": lambda rng: 5 * rng.standard_normal((N_ROWS, N_COLS), np.float32),
    "close": lambda rng: rng.standard_normal((N_ROWS, N_COLS), np.float32) / 2,
    "probs": lambda rng: rng.dirichlet(np.ones(N_COLS), N_ROWS).astype(np.float32),
    "images": lambda rng: 5 * rng.standard_normal((N_ROWS, 5, 8), np.float32),
    "points": lambda rng: rng.random((N_ROWS, 2), np.float32),
    "of columns": lambda rng: 0.25 + rng.random(N_COLS),  # float64, which is rounded first
    "of rows": lambda rng: 0.25 + rng.random(N_ROWS, np.float32),
    "doubles": lambda rng: 0.25 + rng.random(N_ROWS),
    "parts": lambda rng: rng.random(N_ROWS, np.float32),
    "most": lambda rng: 1 - rng.random(N_ROWS, np.float32) / 4,
    "one": lambda rng: 1 + rng.random((1, 1)),
    "pixels": lambda rng: rng.random((5, 8)) < 0.8,
    "bools": lambda rng: rng.random((N_ROWS, N_COLS)) < 0.8,
    "bits": lambda rng: rng.integers(-(2**31), 2**31, (N_ROWS, 2)).astype(np.int32),
    "counts": lambda rng: rng.integers(0, N_COLS + 1, N_ROWS, np.uint8),
    "label": lambda rng: np.where(rng.random(N_ROWS) < 0.2, -100, rng.integers(0, N_COLS, N_ROWS)),
    "labels": lambda rng: rng.integers(0, N_COLS, (N_ROWS, 6), np.int32)[:, ::-2],
    "shares": lambda rng: rng.random((3, N_ROWS)).T,
    "seeds": lambda rng: rng.integers(-(2**63), 2**63, N_ROWS),
    "few": lambda rng: rng.integers(0, 9, N_ROWS),
}
_THROUGH = {"temperature": "of rows", "bias": "of columns", "mask": "bits", "n_valid": "counts"}
_LOSS = {"label_smoothing": 0.1, "z_loss": 0.01}
_WEIGHTED = {"weight": "of columns", "row_weight": "doubles", **_THROUGH}
_TOLD = {"return_z_loss": True, "return_lse": True}
_SHARED = {"target": ("labels", "shares"), "row_weight": "of rows", "normalizer": "one"}


def _sample(logits, seeds, steps, **arrays):
    return gpusoftmax.sample(logits, rng=(seeds, steps), **arrays)


EVERYTHING = {
    "softmax": Everything(gpusoftmax.softmax, {"x": "logits", **_THROUGH}, {"empty_row": "zero"}),
    "log_softmax": Everything(gpusoftmax.log_softmax, {"x": "logits", **_THROUGH, "mask": "bools"}, {"softcap": 9.0}),
    "logsumexp": Everything(gpusoftmax.logsumexp, {"x": "logits", **_THROUGH}, {}),
    "argmax": Everything(gpusoftmax.argmax, {"x": "close", **_THROUGH}, {}),
    "soft_argmax": Everything(gpusoftmax.soft_argmax, {"x": "logits", **_THROUGH}, {}),
    "softmax_backward": Everything(
        gpusoftmax.softmax_backward, {"probs": "probs", "dprobs": "logits", "temperature": "doubles"}, {}
    ),
    "log_softmax_backward": Everything(
        gpusoftmax.log_softmax_backward,
        {"log_probs": "logits", "dlog_probs": "logits", "temperature": "of rows"},
        {},
    ),
    "soft_argmax_backward": Everything(
        gpusoftmax.soft_argmax_backward,
        {"x": "logits", "expected": "of rows", "dexpected": "of rows", **_THROUGH},
        {},
    ),
    "spatial_softmax": Everything(
        gpusoftmax.spatial_softmax, {"features": "images", "temperature": "of rows", "mask": "pixels"}, {}
    ),
    "spatial_softmax_backward": Everything(
        gpusoftmax.spatial_softmax_backward,
        {
            "features": "images",
            "coordinates": "points",
            "dcoordinates": "points",
            "temperature": "of rows",
            "mask": "pixels",
        },
        {},
    ),
    "cross_entropy": Everything(
        gpusoftmax.cross_entropy,
        {"logits": "logits", "target": "label", **_WEIGHTED, "normalizer": "one"},
        {**_LOSS, **_TOLD, "return_correct": True},
    ),
    "cross_entropy_with_grad": Everything(
        gpusoftmax.cross_entropy_with_grad, {"logits": "logits", "target": "label", **_WEIGHTED}, _LOSS
    ),
    "cross_entropy_with_grad of shares": Everything(
        gpusoftmax.cross_entropy_with_grad, {"logits": "logits", **_SHARED}, _LOSS
    ),
    "cross_entropy_with_grad of probs": Everything(
        gpusoftmax.cross_entropy_with_grad,
        {"logits": "logits", "target": "probs", "weight": "of columns", "row_weight": "doubles"},
        _TOLD,
    ),
    "cross_entropy_backward": Everything(
        gpusoftmax.cross_entropy_backward,
        {"logits": "logits", "target": "label", "lse": "of rows", "dloss": "doubles", **_WEIGHTED},
        _LOSS,
    ),
    "kl_div_with_grad": Everything(
        gpusoftmax.kl_div_with_grad,
        {"logits": "logits", "target_logits": "logits", "row_weight": "doubles"},
        {"target_grad": True},
    ),
    "token_logprobs": Everything(
        gpusoftmax.token_logprobs, {"logits": "logits", "target": "labels", **_THROUGH}, EVERY_FIELD
    ),
    "token_logprobs_backward": Everything(
        gpusoftmax.token_logprobs_backward,
        {"logits": "logits", "target": "labels", "dlogprob": "shares", "dentropy": "of rows", **_THROUGH},
        {},
    ),
    "top_logprobs": Everything(gpusoftmax.top_logprobs, {"logits": "logits", "target": "label", **_THROUGH}, {"k": 5}),
    "topk_softmax": Everything(gpusoftmax.topk_softmax, {"logits": "logits", **_THROUGH}, {"k": 5}),
    "sample": Everything(
        _sample,
        {
            "logits": "close",
            "seeds": "seeds",
            "steps": "few",
            **_THROUGH,
            "top_k": "few",
            "top_p": "most",
            "min_p": "parts",
        },
        {},
    ),
    "top_k_mask_logits": Everything(
        gpusoftmax.top_k_mask_logits,
        {"logits": "logits", "top_k": "few", "mask": "bools", "n_valid": "counts"},
        {},
    ),
    "top_p_mask_logits": Everything(
        gpusoftmax.top_p_mask_logits,
        {"logits": "logits", "top_p": "parts", "temperature": "of rows", "mask": "bits", "n_valid": "counts"},
        {},
    ),
}


def with_everything(name, seed=0):
    """NumPy arrays for each argument of a call of EVERYTHING, by name; a pair of them for a target with shares."""
    rng = np.random.default_rng(seed)
    return {
        argument: tuple(_MADE[one](rng) for one in made) if isinstance(made, tuple) else _MADE[made](rng)
        for argument, made in EVERYTHING[name].arrays.items()
    }


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
