"""log_softmax and its backward: within the promised bounds of the exact result on every target, dtype and shape."""

import math

import numpy as np
import pytest

import gpusoftmax
from tests import inputs, tolerances

N_COLS = [
    1,  # a row of one class: exactly 0
    31,  # less than a warp, less than a vector strip
    512,  # all that the smallest block holds
    4099,  # five chunks of the GPU, three of the CPU; rows of 16-byte vectors never align
]


@pytest.mark.parametrize("dtype", inputs.DTYPES, ids=str)
@pytest.mark.parametrize("n_cols", N_COLS)
def test_matches_oracle(target, dtype, n_cols):
    logits = inputs.every_family(2, n_cols, dtype, seed=n_cols)
    log_probs = target.get(gpusoftmax.log_softmax(target.array(logits)))
    assert log_probs.dtype == logits.dtype
    tolerances.check_log_softmax(log_probs, logits)
    assert log_probs.max() <= 0


# 1e-37: x / T alone overflows float32, so the maximum must be subtracted first. 1e30: every row becomes uniform.
@pytest.mark.parametrize("temperature", [1e-37, 0.7, 3.0, 1e30])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_temperature(target, dtype, temperature):
    logits = inputs.every_family(2, 300, dtype)
    log_probs = target.get(gpusoftmax.log_softmax(target.array(logits), temperature=temperature))
    tolerances.check_log_softmax(log_probs, logits, temperature=temperature)


@pytest.mark.parametrize("dtype", inputs.DTYPES, ids=str)
@pytest.mark.parametrize("n_cols", N_COLS)
def test_backward_matches_oracle(target, dtype, n_cols):
    log_probs = gpusoftmax.log_softmax(inputs.every_family(1, n_cols, dtype, seed=n_cols))
    dlog_probs = inputs.make("peaked", log_probs.shape, dtype, seed=2)
    dlogits = target.get(gpusoftmax.log_softmax_backward(target.array(log_probs), target.array(dlog_probs)))
    assert dlogits.dtype == log_probs.dtype
    tolerances.check_log_softmax_backward(dlogits, log_probs, dlog_probs)


@pytest.mark.parametrize("temperature", [0.25, 3.0])
def test_backward_with_temperature(target, temperature):
    log_probs = gpusoftmax.log_softmax(inputs.make("spread", (3, 300), np.float32), temperature=temperature)
    dlog_probs = inputs.make("peaked", (3, 300), np.float32, seed=2)
    dlogits = target.get(
        gpusoftmax.log_softmax_backward(target.array(log_probs), target.array(dlog_probs), temperature=temperature)
    )
    tolerances.check_log_softmax_backward(dlogits, log_probs, dlog_probs, temperature=temperature)


@pytest.mark.parametrize("out_dtype", inputs.DTYPES, ids=str)
@pytest.mark.parametrize("dtype", ["float16", pytest.param("float64", marks=pytest.mark.matrix)])
def test_dtype_of_the_result(dtype, out_dtype):
    logits = inputs.make("spread", (2, 100), dtype)
    log_probs = gpusoftmax.log_softmax(logits, dtype=out_dtype)
    assert log_probs.dtype == out_dtype
    tolerances.check_log_softmax(log_probs, logits)


@pytest.mark.parametrize("gap", [5, 20, 30, 80])  # at 20, 1 - p has no correct digit left in float32; at 30 it is 0
@pytest.mark.parametrize("dtype", inputs.DTYPES, ids=str)
def test_confident_rows_keep_their_small_values(target, dtype, gap):
    logits = np.zeros((1, 1000), dtype)
    logits[0, 500] = gap
    smallest = target.get(gpusoftmax.log_softmax(target.array(logits)))[0, 500]
    # A bfloat16 holds 8 bits, a float16 nothing below 2^-24.
    relative = {"bfloat16": 2**-8, "float16": 2**-11}.get(dtype.name, 1e-5)
    truth = -math.log1p(999 * math.exp(-gap))
    assert float(smallest) == pytest.approx(truth, rel=relative, abs=2**-25 if dtype == np.float16 else 0)


def test_common_shift_moves_no_result_by_more_than_an_ulp(target):
    """The logits stay exact, and their differences too."""
    logits = np.random.default_rng(0).integers(-8, 8, (4, 100)).astype(np.float32)
    shifted = gpusoftmax.log_softmax(target.array(logits + np.float32(1024)))
    unshifted = target.get(gpusoftmax.log_softmax(target.array(logits)))
    np.testing.assert_array_max_ulp(unshifted, target.get(shifted), maxulp=0 if target.name == "cpu" else 1)
