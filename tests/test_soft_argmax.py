"""soft_argmax: within the promised bounds of the exact result on every target, dtype and awkward shape."""

import numpy as np
import pytest

import gpusoftmax
from tests import inputs, tolerances

INF, NAN = np.inf, np.nan
N_COLS = [
    1,  # a row of one class: 0
    31,  # less than a warp, less than a vector strip
    512,  # all that the smallest block holds
    513,  # one more
    4099,  # five chunks of the GPU, three of the CPU; rows of 16-byte vectors never align
]
ROW_DTYPE = {"float16": "float32", "bfloat16": "float32", "float32": "float32", "float64": "float64"}


def soft_argmax(target, x, *arguments, **options):
    return np.asarray(target.get(gpusoftmax.soft_argmax(target.array(x), *arguments, **options)))


@pytest.mark.parametrize("dtype", inputs.DTYPES, ids=str)
@pytest.mark.parametrize("n_cols", N_COLS)
def test_matches_oracle(target, dtype, n_cols):
    logits = inputs.every_family(2, n_cols, dtype, seed=n_cols)
    expected = soft_argmax(target, logits)
    assert expected.dtype == ROW_DTYPE[dtype.name]
    tolerances.check_soft_argmax(expected, logits)


# 1e-37: the mean of the maxima alone. 1e30: all columns alike. 1e38: gaps near the largest number are small ones.
@pytest.mark.parametrize("temperature", [1e-37, 0.7, 3.0, 1e30, 1e38])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_temperature(target, dtype, temperature):
    logits = inputs.every_family(2, 300, dtype)
    tolerances.check_soft_argmax(soft_argmax(target, logits, temperature=temperature), logits, temperature=temperature)


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e40])
def test_temperature_beyond_the_range_of_float32(target, temperature):
    logits = np.array([[1, 3, 2, -INF, -4], [3, 3, -INF, 3, 2]], np.float32)
    expected = [1, 4 / 3] if temperature < 1 else [1.75, 2]
    np.testing.assert_allclose(soft_argmax(target, logits, temperature=temperature), expected, rtol=1e-6)


@pytest.mark.parametrize(("dtype", "n_cols"), [("float32", 5), ("bfloat16", 300), ("float32", 4200), ("float64", 300)])
def test_a_certain_column(target, dtype, n_cols):
    """Whatever its logit: all others are masked, or too far below to be told from it."""
    columns = np.unique(np.linspace(0, n_cols - 1, 40).astype(int))
    logits = np.full((len(columns), n_cols), -INF).astype(dtype)
    logits[np.arange(len(columns)), columns] = inputs.make("spread", (len(columns),), dtype)
    assert np.array_equal(soft_argmax(target, logits), columns)
    assert np.array_equal(soft_argmax(target, logits, temperature=0.3), columns)
    logits = np.zeros_like(logits)
    logits[np.arange(len(columns)), columns] = 2000
    assert np.array_equal(soft_argmax(target, logits), columns)


def test_a_leading_first_column_leaves_what_the_others_add(target):
    """The result is tiny and relatively exact, as the loss of a confident row is."""
    logits = np.zeros((5, 300), np.float32)
    logits[:, 0] = [1, 20, 40, 60, 75]
    expected = soft_argmax(target, logits)
    assert (expected > 0).all() and expected[-1] < 1e-26
    tolerances.check_soft_argmax(expected, logits)


@pytest.mark.parametrize(("dtype", "n_cols"), [("float32", 5), ("bfloat16", 300), ("float32", 4200)])
def test_special_values(target, dtype, n_cols):
    logits = inputs.make("spread", (8, n_cols), dtype)
    logits[0, n_cols // 2], logits[1, 0], logits[2, -1] = NAN, NAN, INF
    logits[3], logits[4] = -INF, INF
    logits[5, 0], logits[5, -1] = INF, NAN
    logits[6, : n_cols // 2] = -INF
    expected = soft_argmax(target, logits)
    assert np.isnan(expected[:6]).all() and np.isfinite(expected[6:]).all()
    tolerances.check_soft_argmax(expected, logits)


def test_whole_chunks_masked_beside_logits_far_from_0(target):
    for offset in (-3e4, 3e4, -1e30):
        logits = np.full((2, 4200), -INF, np.float32)
        logits[0, 4100:], logits[1, 2100:2110] = offset, offset
        expected = soft_argmax(target, logits)
        assert np.array_equal(expected, np.float32([4149.5, 2104.5]))


@pytest.mark.parametrize("keepdims", [False, True])
def test_axes(target, keepdims):
    logits = inputs.make("spread", (2, 3, 40), np.float32)
    for axis in (0, 1, -1):
        expected = soft_argmax(target, logits, axis, keepdims=keepdims)
        tolerances.check_soft_argmax(expected, logits, axis, keepdims=keepdims)


@pytest.mark.parametrize("out_dtype", inputs.DTYPES, ids=str)
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_dtype_of_the_result(dtype, out_dtype):
    logits = inputs.make("spread", (2, 100), dtype)
    expected = gpusoftmax.soft_argmax(logits, dtype=out_dtype)
    assert expected.dtype == out_dtype
    tolerances.check_soft_argmax(expected, logits)
    out = np.empty(2, out_dtype)
    assert gpusoftmax.soft_argmax(logits, out=out) is out
    assert np.array_equal(out, expected)


def test_results_are_what_numpy_gives():
    assert type(gpusoftmax.soft_argmax([1, 1, 1])) is np.float64 and gpusoftmax.soft_argmax([1, 1, 1]) == 1
    assert gpusoftmax.soft_argmax(5.0) == 0
    assert gpusoftmax.soft_argmax(np.zeros((0, 3))).shape == (0,)
    assert np.isnan(gpusoftmax.soft_argmax(np.zeros((2, 0)))).tolist() == [True, True]


def test_very_long_rows():
    """Columns beyond 2^24, which float32 cannot count one by one."""
    logits = np.full((1, 2**24 + 5001), -INF, np.float16)
    logits[0, -1] = 3
    assert gpusoftmax.soft_argmax(logits)[0] == np.float32(2**24 + 5000)
    logits[0, [0, -5001]] = 3
    want = (2**24 + 5000 + 2**24) / 3
    assert abs(gpusoftmax.soft_argmax(logits)[0] - want) <= 24 * 2.0**-24 * want
