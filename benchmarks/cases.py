"""What is measured: an op at one shape and dtype, its inputs, what the answer must be, and the bytes it has to move.

A case is a block of a few hundred thousand logits, repeated as often as its rows ask for. So gigabytes are made soon,
and the answer is known: every row's from the block, the mean loss because whole blocks are repeated.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np

from tests import inputs, oracle, tolerances

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
OPS = (
    "softmax",
    "log_softmax",
    "logsumexp",
    "cross_entropy",
    "cross_entropy_with_grad",
    "softmax_backward",
    "token_logprobs",  # with entropies: what a scorer or a reinforcement learner needs
    "token_logprobs_and_rank",
    "top_logprobs",
    "argmax",
    "soft_argmax",
    "sample",
    "sample_top_p",  # of the likeliest columns that have TOP_P of the probability together
    "masked_softmax",  # of logits under a softcap, as grammars and models want it
    "topk_softmax",  # a router of experts
    "logsumexp_state",
    "kl_div_with_grad",  # a student's logits against a teacher's
    "soft_cross_entropy_with_grad",  # with a probability for every class, and z_loss
)
TOP = 20
"""Tokens of top_logprobs: the most that serving APIs give."""
TOP_P = 0.9
EXPERTS = 8
Z_LOSS = 1e-4
SOFTCAP = 30.0
_BLOCK_SIZE = 2**18
_FAR_OFF = {"float16": 2**-8, "bfloat16": 2**-5, "float32": 2**-14, "float64": 2**-40, "int64": 0}
"""Beyond this error, as a part of the largest number in the answer, a provider computes something else."""


class Case(NamedTuple):
    """`inputs` holds the block of each argument, one after the other as the op takes them."""

    op: str
    n_rows: int
    n_cols: int
    dtype: str

    @property
    def numpy_dtype(self) -> np.dtype:
        return BFLOAT16 if self.dtype == "bfloat16" else np.dtype(self.dtype)

    @property
    def block_rows(self) -> int:
        """The rows of the block: a divisor of n_rows."""
        fitting = max(1, min(self.n_rows, _BLOCK_SIZE // self.n_cols))
        return next(count for count in range(fitting, 0, -1) if self.n_rows % count == 0)

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        return _inputs(self)

    @property
    def bytes_moved(self) -> int:
        """Every input read once, every result written once."""
        logits = self.n_rows * self.n_cols * self.numpy_dtype.itemsize
        per_row = (8 if self.dtype == "float64" else 4) * self.n_rows
        labels = 8 * self.n_rows
        return {
            "softmax": 2 * logits,
            "log_softmax": 2 * logits,
            "logsumexp": logits + per_row,
            "cross_entropy": logits + labels,
            "cross_entropy_with_grad": 2 * logits + labels,
            "softmax_backward": 3 * logits,
            "token_logprobs": logits + labels + 2 * per_row,
            "token_logprobs_and_rank": logits + 2 * labels + 2 * per_row,
            "top_logprobs": logits + TOP * (per_row + labels),
            "argmax": logits + labels,
            "soft_argmax": logits + per_row,
            "sample": logits + labels,
            "sample_top_p": logits + labels,
            "masked_softmax": 2 * logits + self.n_rows * self.n_cols,
            "topk_softmax": logits + EXPERTS * (per_row + labels),
            "logsumexp_state": logits + per_row,
            "kl_div_with_grad": 3 * logits,
            "soft_cross_entropy_with_grad": 3 * logits,
        }[self.op]

    def __str__(self) -> str:
        return f"{self.op} {self.n_rows}x{self.n_cols} {self.dtype}"


@functools.lru_cache(maxsize=2)
def _inputs(case: Case) -> dict[str, np.ndarray]:
    shape = (case.block_rows, case.n_cols)
    logits = inputs.make("spread", shape, case.numpy_dtype)
    if case.op == "softmax_backward":
        probs = oracle.softmax(logits).astype(case.numpy_dtype)
        return {"probs": probs, "dprobs": inputs.make("spread", shape, case.numpy_dtype, seed=1)}
    if case.op.startswith(("cross_entropy", "token_logprobs")):
        return {"logits": logits, "target": inputs.targets(*shape)}
    if case.op == "kl_div_with_grad":
        return {"logits": logits, "target_logits": inputs.make("spread", shape, case.numpy_dtype, seed=1)}
    if case.op == "soft_cross_entropy_with_grad":
        teacher = inputs.make("spread", shape, case.numpy_dtype, seed=1)
        return {"logits": logits, "probs": oracle.softmax(teacher).astype(case.numpy_dtype)}
    if case.op == "masked_softmax":
        return {"logits": logits, "mask": np.random.default_rng(1).random(shape) < 0.5}
    return {"logits": logits}


@functools.lru_cache(maxsize=2)
def _answer(case: Case) -> tuple[np.ndarray, ...]:
    """What the op gives for the block, in longdouble: the loss is a mean over all rows, so the gradient is smaller."""
    blocks = tuple(case.inputs.values())
    if case.op == "cross_entropy":
        return (oracle.cross_entropy(*blocks),)
    if case.op == "cross_entropy_with_grad":
        return oracle.cross_entropy(*blocks), oracle.cross_entropy_grad(*blocks, grad_scale=_share(case))
    if case.op == "kl_div_with_grad":
        return oracle.kl_div(*blocks), oracle.kl_div_grads(*blocks, grad_scale=_share(case))[0]
    if case.op == "soft_cross_entropy_with_grad":
        found = oracle.full_cross_entropy(*blocks, z_loss=Z_LOSS)
        return found.loss.mean(), found.dlogits / case.n_rows
    if case.op.startswith("token_logprobs"):
        logprob, _, entropy, rank, _ = oracle.token_logprobs(*blocks)
        return (logprob[:, 0], entropy, rank[:, 0])[: 3 if case.op.endswith("rank") else 2]
    if case.op == "top_logprobs":  # not the tokens: libraries differ in which of equal ones comes first
        return (-np.sort(-oracle.log_softmax(*blocks), axis=1)[:, :TOP],)
    if case.op == "masked_softmax":
        return (_masked_softmax(*blocks),)
    if case.op == "topk_softmax":
        return (oracle.softmax(-np.sort(-blocks[0].astype(np.longdouble), axis=1)[:, :EXPERTS]),)
    return (getattr(oracle, case.op.removesuffix("_state"))(*blocks),)


def _masked_softmax(logits: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return oracle.softmax(np.where(mask, SOFTCAP * np.tanh(logits.astype(np.longdouble) / SOFTCAP), -np.inf))


def _share(case: Case) -> float:
    return case.block_rows / case.n_rows


def worst_error(case: Case, result: object, to_numpy: Callable[[object], np.ndarray]) -> float:
    """The largest error in the first and the last block of a result, as a part of the largest number in it.

    Raises ValueError for an error so large that the result is another one. Samples have no error: they are columns
    that can be drawn, or not.
    """
    if case.op.startswith("sample"):
        return _check_samples(case, _blocks(case, result, to_numpy))
    worst = 0.0
    for got, want in zip(_blocks(case, result, to_numpy), 2 * _answer(case), strict=True):
        error = np.abs(got.astype(np.longdouble) - want).max(initial=0)
        scale = np.abs(want).max(initial=0)
        # Not `error > ...`: NaN is far off, too.
        if not error <= _FAR_OFF[got.dtype.name] * scale:
            raise ValueError(f"its answer is wrong: off by {float(error):.3g} where numbers reach {float(scale):.3g}")
        worst = max(worst, float(error / scale))
    return worst


def hold_to_promise(case: Case, result: object, to_numpy: Callable[[object], np.ndarray]) -> float:
    """Our own result is held to the bounds of the tests; returns the worst error in units in the last place."""
    arguments = tuple(case.inputs.values())
    checks = {
        "cross_entropy": (tolerances.check_loss,),
        "cross_entropy_with_grad": (
            tolerances.check_loss,
            functools.partial(tolerances.check_dlogits, grad_scale=_share(case)),
        ),
        "kl_div_with_grad": (
            tolerances.check_kl_div,
            lambda got, *given: tolerances.check_kl_div_grads(got, None, *given, grad_scale=_share(case)),
        ),
        "soft_cross_entropy_with_grad": (_check_soft_loss, functools.partial(_check_soft_dlogits, case.n_rows)),
        "token_logprobs": (_check_logprob, _check_entropy),
        "token_logprobs_and_rank": (_check_logprob, _check_entropy, _check_rank),
        "top_logprobs": (_check_top,),
        "argmax": (_check_argmax,),
        "sample": (lambda got, logits: 0.0,),  # worst_error has said all
        "sample_top_p": (lambda got, logits: 0.0,),
        "masked_softmax": (_check_masked,),
        "topk_softmax": (_check_experts,),
        "logsumexp_state": (tolerances.check_logsumexp,),
    }.get(case.op, (getattr(tolerances, f"check_{case.op}", None),))
    blocks = _blocks(case, result, to_numpy)
    return max(check(got, *arguments) for check, got in zip(2 * checks, blocks, strict=True))


def _check_soft_loss(got: np.ndarray, logits: np.ndarray, probs: np.ndarray) -> float:
    want = oracle.full_cross_entropy(logits, probs, z_loss=Z_LOSS)
    return _units("soft_cross_entropy_with_grad: loss", np.abs(got - want.loss.mean()), want.terms.mean(), got.dtype)


def _check_soft_dlogits(n_rows: int, got: np.ndarray, logits: np.ndarray, probs: np.ndarray) -> float:
    want = oracle.full_cross_entropy(logits, probs, z_loss=Z_LOSS)
    error = np.abs(got.astype(np.longdouble) - want.dlogits / n_rows).max()
    return _units("soft_cross_entropy_with_grad: dlogits", error, want.upstream.max() / n_rows, got.dtype)


def _units(name: str, error: np.ndarray, scale: np.ndarray, dtype: np.dtype) -> float:
    """An error in units of the last place of the largest number it may be relative to; 40 are promised."""
    units = float(error / (scale * tolerances.FORMATS[dtype.name].unit))
    if not units <= 40:
        raise AssertionError(f"{name}: off by {units} units")
    return units


def _check_logprob(got: np.ndarray, logits: np.ndarray, target: np.ndarray) -> float:
    return tolerances.check_loss(-got, logits, target, reduction="none")


def _check_entropy(got: np.ndarray, logits: np.ndarray, target: np.ndarray) -> float:
    return tolerances.check_entropy(got, logits)


def _check_rank(got: np.ndarray, logits: np.ndarray, target: np.ndarray) -> float:
    if not np.array_equal(got, oracle.token_logprobs(logits, target)[3][:, 0]):
        raise AssertionError("rank: some are wrong")
    return 0.0


def _check_argmax(got: np.ndarray, logits: np.ndarray) -> float:
    if not np.array_equal(got, oracle.argmax(logits)):
        raise AssertionError("argmax: some are wrong")
    return 0.0


def _check_masked(got: np.ndarray, logits: np.ndarray, mask: np.ndarray) -> float:
    """Within what softmax promises, and what the roundings of the softcap do to a difference of two logits."""
    want = _masked_softmax(logits, mask)
    error = tolerances.worst_ulp(got, want)
    if not error <= 24 + 2 * SOFTCAP + 16 * SOFTCAP:
        raise AssertionError(f"masked_softmax: off by {error} ulp")
    return error


def _check_experts(got: np.ndarray, logits: np.ndarray) -> float:
    return tolerances.check_softmax(got, -np.sort(-logits.astype(got.dtype), axis=1)[:, :EXPERTS])


def _check_samples(case: Case, blocks: list[np.ndarray]) -> float:
    """Of spread logits all columns together are likely, and a thousand draws that are all one column are none."""
    logits = case.inputs["logits"].astype(np.float64)
    for columns in blocks:
        in_range = ((columns >= 0) & (columns < case.n_cols)).all()
        if not in_range or not np.isfinite(logits[np.arange(len(logits)), columns]).all():
            raise ValueError("its answer is wrong: a column that cannot be drawn")
        behind = logits.max(axis=1) - logits[np.arange(len(logits)), columns]
        if behind.max() > 40 + np.log(case.n_cols):
            raise ValueError("its answer is wrong: a column that is never drawn")
        if case.op == "sample_top_p":
            weights = np.exp(logits - logits.max(axis=1, keepdims=True))
            before = (weights * (behind[:, None] > logits.max(axis=1, keepdims=True) - logits)).sum(axis=1)
            if (before > (TOP_P + 1e-4) * weights.sum(axis=1)).any():
                raise ValueError("its answer is wrong: a column that is not among the likeliest")
    return 0.0


def _check_top(got: np.ndarray, logits: np.ndarray) -> float:
    """They are losses of the tokens they belong to."""
    tokens = np.argsort(-logits.astype(np.float64), axis=1, kind="stable")[:, :TOP]
    checked = [
        tolerances.check_loss(-got[:, j], logits, tokens[:, j], reduction="none") for j in range(tokens.shape[1])
    ]
    return max(checked)


def _blocks(case: Case, result, to_numpy) -> list[np.ndarray]:
    """The first block of each array of a result, then the last of each."""
    arrays = result if isinstance(result, tuple) else (result,)
    first = [to_numpy(array if _is_number(array) else array[: case.block_rows]) for array in arrays]
    last = [to_numpy(array if _is_number(array) else array[case.n_rows - case.block_rows :]) for array in arrays]
    return first + last


def _is_number(array) -> bool:
    return math.prod(array.shape) == 1 and array.ndim == 0
