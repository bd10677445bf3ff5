"""softmax and softmax_backward: within the promised bounds on every target, dtype and awkward shape."""

import numpy as np
import pytest

import gpusoftmax
from tests import inputs, tolerances
from tests.emulator import emulated_gpu

N_COLS = [
    1,  # a row of one class: exactly 1
    31,  # less than a warp, less than a vector strip
    513,  # one more than the smallest block holds
    4096,  # four whole chunks of the GPU, two of the CPU
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


@pytest.mark.parametrize("family", ["peaked", "sorted"])
def test_float64_meets_the_goal_on_the_emulator(family):
    """Nothing else asks that of it by default. Fifteen additions, each rounded, put some of these rows 1.7 ulp off."""
    logits = np.concatenate([inputs.make(family, (8, 4099), "float64", seed=seed) for seed in range(3)])
    with emulated_gpu("sm_90", track=False) as gpu:
        probs = gpu.get(gpusoftmax.softmax(gpu.array(logits)))
    tolerances.check_softmax(probs, logits, ulp=GOAL_ULP)


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


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_products_with_the_jacobian(temperature):
    """Both against central differences of the softmax itself, in float64, along every unit vector."""
    rng, step = np.random.default_rng(0), 1e-5
    logits, direction = rng.normal(size=(2, 9)), rng.normal(size=(2, 9))
    probs = gpusoftmax.softmax(logits, temperature=temperature)

    def derivative(along):
        ahead, behind = (gpusoftmax.softmax(logits + sign * step * along, temperature=temperature) for sign in (1, -1))
        return (ahead - behind) / (2 * step)

    jvp = gpusoftmax.softmax_jvp(probs, direction, temperature=temperature)
    np.testing.assert_allclose(jvp, derivative(direction), atol=1e-9)
    columns = [(derivative(np.eye(9)[j]) * direction).sum(axis=1) for j in range(9)]  # direction times column j of J
    backward = gpusoftmax.softmax_backward(probs, direction, temperature=temperature)
    np.testing.assert_allclose(backward, np.stack(columns, axis=1), atol=1e-9)
    assert np.array_equal(jvp, backward)


@pytest.mark.parametrize("out_dtype", inputs.DTYPES)
@pytest.mark.parametrize("dtype", ["float16", pytest.param("float64", marks=pytest.mark.matrix)])
def test_dtype_of_the_result(dtype, out_dtype):
    logits = inputs.make("spread", (2, 100), dtype)
    probs = gpusoftmax.softmax(logits, dtype=out_dtype)
    assert probs.dtype.name == out_dtype
    tolerances.check_softmax(probs, logits)


@pytest.mark.parametrize("offset", [-3e4, 1e4, 2.0**20, -1e30])
def test_common_offset(target, offset):
    """Near 0 and far away, where logits are reduced in different ways."""
    logits = (inputs.make("spread", (4, 100), "float32") + np.float32(offset)).astype(np.float32)
    tolerances.check_softmax(target.get(gpusoftmax.softmax(target.array(logits))), logits, ulp=GOAL_ULP)


def test_rows_whose_chunks_are_near_and_far(target):
    """The anchors of the chunks of one row are of both kinds."""
    logits = inputs.make("spread", (3, 7000), "float32")
    logits[0, 3000] = 65536.5
    logits[0, 100] = logits[0, 5000] = 65530.25
    logits[1, :2048] = -1e6
    logits[2] -= np.float32(7e4)
    for function, check in (
        (gpusoftmax.softmax, tolerances.check_softmax),
        (gpusoftmax.log_softmax, tolerances.check_log_softmax),
        (gpusoftmax.logsumexp, tolerances.check_logsumexp),
    ):
        check(target.get(function(target.array(logits))), logits)


@pytest.mark.parametrize("function", [gpusoftmax.softmax, gpusoftmax.log_softmax])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_small_calls(function, dtype):
    """Two plain arrays go straight to a kernel: the same bits, in place too, and the same errors."""
    logits = inputs.make("spread", (8, 16), dtype)
    expected = function(logits)
    out = np.empty_like(logits)
    assert function(logits, out=out) is out and np.array_equal(out, expected)
    in_place = logits.copy()
    function(in_place, out=in_place)
    assert np.array_equal(in_place, expected)
    with pytest.raises(ValueError, match="shape"):
        function(logits, out=np.empty((8, 15), dtype))
    with pytest.raises(ValueError, match="overlaps"):
        both = np.zeros((9, 16), dtype)
        function(both[:8], out=both[1:])
    out.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        function(logits, out=out)


@pytest.mark.parametrize("function", [gpusoftmax.softmax, gpusoftmax.log_softmax, gpusoftmax.logsumexp])
def test_out_is_what_later_calls_return_too(function):
    """Calls that were made before take a shorter way."""
    logits = inputs.make("spread", (300, 64), "float32")
    out = np.empty_like(function(logits, axis=0))
    for _ in range(3):
        assert function(logits, axis=0, out=out) is out
