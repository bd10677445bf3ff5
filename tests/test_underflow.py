"""What underflows costs a CPU tens of cycles. Logits of -inf, and what fills up a vector past the end, do not."""

import ctypes
import platform
import sys

import ml_dtypes
import numba
import numpy as np
import pytest

import gpusoftmax

UNDERFLOW = 0x10  # FE_UNDERFLOW of glibc on x86
N_ROWS = 64

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="reads the flags of x86 through glibc"
)


@pytest.fixture(autouse=True)
def one_thread():
    """Whose flags are read: the caller's."""
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    yield
    numba.set_num_threads(before)


OPERATIONS = {
    "softmax": lambda x, target: gpusoftmax.softmax(x),
    "log_softmax": lambda x, target: gpusoftmax.log_softmax(x),
    "logsumexp": lambda x, target: gpusoftmax.logsumexp(x),
    "softmax along axis 0": lambda x, target: gpusoftmax.softmax(x.T, axis=0),
    "cross_entropy_with_grad": lambda x, target: gpusoftmax.cross_entropy_with_grad(x, target),
    "token_logprobs": lambda x, target: gpusoftmax.token_logprobs(x, target, return_entropy=True),
    "soft_argmax": lambda x, target: gpusoftmax.soft_argmax(x),
    "topk_softmax": lambda x, target: gpusoftmax.topk_softmax(x, 4),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16], ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("n_cols", [10, 600, 5000])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_masked_logits_do_not_underflow(operation, n_cols, dtype):
    """Rows in blocks have lanes without a row, with whatever was left there: these are rows across and along."""
    x = np.random.default_rng(0).standard_normal((N_ROWS, n_cols)).astype(dtype)
    x[:, 1::4] = -np.inf
    target = np.zeros(N_ROWS, np.int64)
    assert not _underflows(OPERATIONS[operation], x, target)


def test_underflow_is_noticed():
    x = np.zeros((N_ROWS, 600), np.float32)
    x[:, 1::4] = -95  # exp(-95) is subnormal
    assert _underflows(OPERATIONS["softmax"], x, None)


def _underflows(operation, *arguments):
    libm = ctypes.CDLL("libm.so.6")
    operation(*arguments)  # compiled, and what a replay needs is known
    libm.feclearexcept(UNDERFLOW)
    operation(*arguments)
    return libm.fetestexcept(UNDERFLOW) != 0
