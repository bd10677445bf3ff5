"""What a call on the CPU takes of memory beside its results."""

import tracemalloc

import numpy as np
import pytest

import gpusoftmax
from gpusoftmax.kernels.cpu import run
from tests import inputs

N_COLS = 1 << 17
FEW = 0.2
"""Bytes for each column that the states of the chunks, and what lies between slots, take at most."""
X = inputs.make("spread", (1, 2 * N_COLS), "float16", seed=3)
LAYOUTS = {
    "as it is": (X[:, :N_COLS], {}),
    "reversed": (X[:, :N_COLS][:, ::-1], {}),
    "every other column": (X[:, ::2], {}),
    "n_valid": (X[:, :N_COLS], {"n_valid": N_COLS - 9}),
    "mask": (X[:, :N_COLS], {"mask": np.ones((1, N_COLS), bool)}),
    "float64": (X[:, :N_COLS].astype(np.float64)[:, ::-1], {}),
}
# Bytes for each column: of a copy in the format of the logits, or of the computation where they are transformed.
COPIES = {"as it is": 0, "reversed": 2, "every other column": 2, "n_valid": 4, "mask": 4, "float64": 8}


@pytest.fixture
def bytes_for_each_column(monkeypatch):
    """Of the scratch memory of a call on one row."""

    def of_call(call):
        sizes, workspace = [], run._workspace
        with monkeypatch.context() as patch:
            patch.setattr(run, "_workspace", lambda size: (sizes.append(size), workspace(size))[1])
            call()
        return max(sizes) / N_COLS

    return of_call


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_is_copied_once_if_at_all(layout, bytes_for_each_column):
    """Not three times, in eight bytes for each column: that was twelve times a row of float16."""
    x, options = LAYOUTS[layout]
    found = bytes_for_each_column(lambda: gpusoftmax.logsumexp(x, **options))
    assert COPIES[layout] <= found <= COPIES[layout] + FEW


def test_results_of_other_strides_take_a_copy_in_their_format(bytes_for_each_column):
    x, out = X[:, :N_COLS], np.empty((1, 2 * N_COLS), np.float16)[:, ::2]
    found = bytes_for_each_column(lambda: gpusoftmax.log_softmax(x, out=out))
    assert 2 <= found <= 2 + FEW
    assert np.array_equal(out, gpusoftmax.log_softmax(x))


def test_both_arrays_that_are_read_take_a_copy_each(bytes_for_each_column):
    found = bytes_for_each_column(lambda: gpusoftmax.kl_div(X[:, ::2], X[:, 1::2]))
    assert 2 + 2 <= found <= 2 + 2 + FEW


def test_very_much_memory_is_not_kept_for_the_next_call(monkeypatch):
    kept = run._Kept()
    monkeypatch.setattr(run, "_kept", kept)
    monkeypatch.setattr(run, "KEPT_BYTES", 1 << 16)
    x = LAYOUTS["reversed"][0]
    expected = gpusoftmax.logsumexp(np.ascontiguousarray(x))
    small = kept.memory
    assert small[0].size > 0
    assert np.array_equal(gpusoftmax.logsumexp(x), expected)
    assert kept.memory is small


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_axes_that_no_stride_walks_cost_one_copy(name):
    x, call = inputs.make("spread", (64, 33, 64), np.float32), getattr(gpusoftmax, name)
    expected = call(np.ascontiguousarray(x.swapaxes(0, 1)), axis=(1, 2)).swapaxes(0, 1)  # and compiles
    call(x, axis=(0, 2))
    tracemalloc.start()
    try:
        result = call(x, axis=(0, 2))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2.1 * x.nbytes  # the result and the copy
    assert np.array_equal(result, expected)
