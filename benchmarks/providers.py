"""What is measured: for each op its inputs, its check against the oracle, its bytes, and the libraries that have it.

Equal work on all sides: same inputs, same outputs, and every provider writes into an array that exists already.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

import gpusoftmax
from tests import inputs, tolerances


class Case(NamedTuple):
    """One op at one shape: provider -> a call that returns the result, the check of a result, bytes moved."""

    calls: dict[str, Callable[[], np.ndarray]]
    check: Callable[[np.ndarray], float]
    bytes_moved: int


def softmax(n_rows: int, n_cols: int, dtype: str) -> Case:
    logits = inputs.make("spread", (n_rows, n_cols), dtype)
    ours, theirs = np.empty_like(logits), np.empty_like(logits)

    def numpy_softmax() -> np.ndarray:
        np.subtract(logits, logits.max(axis=-1, keepdims=True), out=theirs)
        np.exp(theirs, out=theirs)
        return np.divide(theirs, theirs.sum(axis=-1, keepdims=True), out=theirs)

    return Case(
        calls={"gpusoftmax": lambda: gpusoftmax.softmax(logits, out=ours), "numpy": numpy_softmax},
        check=lambda probs: tolerances.check_softmax(probs, logits),
        bytes_moved=2 * logits.nbytes,
    )


OPS = {"softmax": softmax}
