"""logsumexp: within the promised bounds of the exact result on every target, dtype and awkward shape."""

import math

import numpy as np
import pytest

import gpusoftmax
from tests import inputs, oracle, tolerances
from tests.emulator import emulated_gpu

N_COLS = [
    1,  # a row of one class: the logit itself
    31,  # less than a warp, less than a vector strip
    512,  # all that the smallest block holds
    513,  # one more
    4099,  # five chunks of the GPU, three of the CPU; rows of 16-byte vectors never align
]
ROW_DTYPE = {"float16": "float32", "bfloat16": "float32", "float32": "float32", "float64": "float64"}


@pytest.mark.parametrize("dtype", inputs.DTYPES, ids=str)
@pytest.mark.parametrize("n_cols", N_COLS)
def test_matches_oracle(target, dtype, n_cols):
    logits = inputs.every_family(2, n_cols, dtype, seed=n_cols)
    lse = target.get(gpusoftmax.logsumexp(target.array(logits)))
    assert lse.dtype == ROW_DTYPE[dtype.name]
    tolerances.check_logsumexp(lse, logits)
    if n_cols == 1:
        assert np.array_equal(lse, logits[:, 0].astype(lse.dtype))


def test_float64_near_zero_on_the_emulator():
    """Logits that are log-probabilities: the maximum and the logarithm cancel, and show what the sum is off by."""
    logits = np.concatenate(
        [
            inputs.make(family, (8, 4099), "float64", seed=seed)
            for family in ("spread", "flat", "sorted", "ties", "confident")
            for seed in range(3)
        ]
    )
    logits -= oracle.logsumexp(logits, keepdims=True).astype(np.float64)
    with emulated_gpu("sm_90", track=False) as gpu:
        lse = gpu.get(gpusoftmax.logsumexp(gpu.array(logits)))
    assert tolerances.check_logsumexp(lse, logits) < 1  # of the 2 ulp allowed; 0.58 seen, 1.15 with plain sums


# 1e-37: lse is about 1e38, and infinite for a maximum beyond 34. 1e30: log(n_cols), whatever the logits are.
@pytest.mark.parametrize("temperature", [1e-37, 0.7, 3.0, 1e30])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_temperature(target, dtype, temperature):
    logits = inputs.every_family(2, 300, dtype)
    lse = target.get(gpusoftmax.logsumexp(target.array(logits), temperature=temperature))
    tolerances.check_logsumexp(lse, logits, temperature=temperature)


@pytest.mark.parametrize("out_dtype", inputs.DTYPES, ids=str)
@pytest.mark.parametrize("dtype", ["float16", pytest.param("float64", marks=pytest.mark.matrix)])
def test_dtype_of_the_result(dtype, out_dtype):
    logits = inputs.make("spread", (2, 100), dtype)
    lse = gpusoftmax.logsumexp(logits, dtype=out_dtype)
    assert lse.dtype == out_dtype
    tolerances.check_logsumexp(lse, logits)
    out = np.empty(2, out_dtype)
    assert gpusoftmax.logsumexp(logits, out=out) is out
    assert np.array_equal(out, lse)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_long_sums_of_half_types_do_not_stall(target, dtype):
    """A float16 sum of ones stops at 2048, a bfloat16 one at 256."""
    logits = np.zeros((1, 65536), dtype)
    lse = target.get(gpusoftmax.logsumexp(target.array(logits)))
    tolerances.check_logsumexp(lse, logits)
    assert lse[0] == np.float32(math.log(65536))


@pytest.mark.parametrize("keepdims", [False, True])
def test_keepdims(target, keepdims):
    logits = inputs.make("spread", (2, 3, 40), np.float32)
    lse = target.get(gpusoftmax.logsumexp(target.array(logits), axis=1, keepdims=keepdims))
    assert lse.shape == ((2, 1, 40) if keepdims else (2, 40))
    tolerances.check_logsumexp(lse, logits, axis=1, keepdims=keepdims)


def test_row_near_zero_keeps_its_digits(target):
    """max = -log V: the two terms of max + log s nearly cancel, and the bound is 2 ulp of 1."""
    logits = np.full((1, 1000), -math.log(1000))
    assert abs(float(target.get(gpusoftmax.logsumexp(target.array(logits)))[0])) < 1e-15


def test_a_row_with_infinity_beside_one_whose_chunks_lie_far_apart(target):
    """Rows of two chunks that lie side by side: the second row's chunks have shifts that differ, the first has +inf."""
    logits = np.zeros((2049, 16), np.float32)
    logits[0, 0], logits[2048, 1] = math.inf, 1e5
    lse = target.get(gpusoftmax.logsumexp(target.array(logits), axis=0))
    assert lse[0] == math.inf
    assert lse[1] == np.float32(1e5)
