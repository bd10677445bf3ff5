"""softmax and softmax_backward: within the promised bounds on every target, dtype and awkward shape."""

import numpy as np
import pytest

import gpusoftmax
from tests import inputs, tolerances

N_COLS = [
    1,  # a row of one class: exactly 1
    31,  # less than a warp, less than a vector strip
    513,  # one more than the smallest block holds
    4096,  # a whole chunk of the GPU, two of the CPU
    4099,  # a chunk and three columns: 16-byte rows never align
]
GOAL_ULP = 4  # design goal for float32 and float64, met by both targets


@pytest.mark.parametrize("dtype", inputs.DTYPES)
@pytest.mark.parametrize("n_cols", N_COLS)
def test_matches_oracle(target, dtype, n_cols):
    for family in inputs.FAMILIES:
        logits = inputs.make(family, (3, n_cols), dtype, seed=n_cols)
        probs = target.get(gpusoftmax.softmax(target.array(logits)))
        assert probs.dtype == logits.dtype
        tolerances.check_softmax(probs, logits)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n_cols", [10, 1000, 20000])
@pytest.mark.parametrize("family", ["spread", "peaked", "flat", "sorted"])
def test_meets_the_goal_of_four_ulp(target, dtype, n_cols, family):
    logits = inputs.make(family, (2, n_cols), dtype, seed=1)
    tolerances.check_softmax(target.get(gpusoftmax.softmax(target.array(logits))), logits, ulp=GOAL_ULP)


@pytest.mark.parametrize("temperature", [1e-37, 0.7, 3.0, 1e30])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_temperature(target, dtype, temperature):
    logits = inputs.make("spread", (2, 300), dtype)
    probs = target.get(gpusoftmax.softmax(target.array(logits), temperature=temperature))
    tolerances.check_softmax(probs, logits, temperature=temperature)


@pytest.mark.parametrize("dtype", inputs.DTYPES)
@pytest.mark.parametrize("n_cols", N_COLS)
def test_backward_matches_oracle(target, dtype, n_cols):
    probs = gpusoftmax.softmax(inputs.make("spread", (3, n_cols), dtype))
    dprobs = inputs.make("peaked", (3, n_cols), dtype, seed=2)
    dlogits = target.get(gpusoftmax.softmax_backward(target.array(probs), target.array(dprobs)))
    assert dlogits.dtype == probs.dtype
    tolerances.check_softmax_backward(dlogits, probs, dprobs)


@pytest.mark.parametrize("out_dtype", inputs.DTYPES)
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_dtype_of_the_result(dtype, out_dtype):
    logits = inputs.make("spread", (2, 100), dtype)
    probs = gpusoftmax.softmax(logits, dtype=out_dtype)
    assert probs.dtype.name == out_dtype
    tolerances.check_softmax(probs, logits)


def test_shift_of_a_power_of_two_changes_no_bit():
    logits = np.random.default_rng(0).integers(-8, 8, (4, 100)).astype(np.float32)
    assert np.array_equal(gpusoftmax.softmax(logits), gpusoftmax.softmax(logits + np.float32(1024)))
