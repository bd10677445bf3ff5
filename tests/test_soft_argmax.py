"""soft_argmax and its backward: within the promised bounds on every target, in every dtype and awkward shape."""

import numpy as np
import pytest

import gpusoftmax
from gpusoftmax.kernels.cuda import plan
from tests import inputs, tolerances
from tests.emulator import emulated_gpu

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


# ---------------------------------------------------------------- backward


def backward(target, x, *arguments, **options):
    arrays = [target.array(np.asarray(array)) for array in arguments[:2]]
    return np.asarray(target.get(gpusoftmax.soft_argmax_backward(target.array(x), *arrays, *arguments[2:], **options)))


def forward_and_upstream(logits, axis=-1, **options):
    expected = np.asarray(gpusoftmax.soft_argmax(logits, axis, **options))
    return expected, inputs.make("peaked", (*expected.shape, 4), expected.dtype, seed=1)[..., 0]


@pytest.mark.parametrize("dtype", inputs.DTYPES, ids=str)
@pytest.mark.parametrize("n_cols", N_COLS)
def test_backward_matches_oracle(target, dtype, n_cols):
    logits = inputs.every_family(2, n_cols, dtype, seed=n_cols)
    expected, upstream = forward_and_upstream(logits)
    dlogits = backward(target, logits, expected, upstream)
    assert dlogits.dtype == dtype
    tolerances.check_soft_argmax_backward(dlogits, logits, expected, upstream)


@pytest.mark.parametrize("temperature", [0.7, 3.0, 1e30])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_temperature_of_the_backward(target, dtype, temperature):
    logits = inputs.every_family(2, 300, dtype)
    expected, upstream = forward_and_upstream(logits, temperature=temperature)
    dlogits = backward(target, logits, expected, upstream, temperature=temperature)
    tolerances.check_soft_argmax_backward(dlogits, logits, expected, upstream, temperature=temperature)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_backward_is_the_derivative(target, temperature):
    """Central differences in float64."""
    logits = inputs.make("spread", (3, 40), np.float64) / 3
    expected, upstream = forward_and_upstream(logits, temperature=temperature)
    dlogits = backward(target, logits, expected, upstream, temperature=temperature)
    step, found = 1e-5, np.empty_like(logits)
    for col in range(logits.shape[1]):
        moved = np.zeros_like(logits)
        moved[:, col] = step
        ends = [gpusoftmax.soft_argmax(logits + sign * moved, temperature=temperature) for sign in (1, -1)]
        found[:, col] = upstream * (ends[0] - ends[1]) / (2 * step)
    np.testing.assert_allclose(dlogits, found, rtol=1e-6, atol=1e-6 * np.abs(found).max())


def test_special_values_of_the_backward(target):
    logits = inputs.make("spread", (6, 300), np.float32)
    logits[0, 7], logits[1, 0], logits[2], logits[3] = NAN, INF, -INF, INF
    logits[4, 1::2] = -INF
    expected, upstream = forward_and_upstream(logits)
    dlogits = backward(target, logits, expected, upstream)
    assert np.isnan(dlogits[:4]).all() and np.isfinite(dlogits[4:]).all() and not dlogits[4, 1::2].any()
    tolerances.check_soft_argmax_backward(dlogits, logits, expected, upstream)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_axes_of_the_backward(target, axis):
    logits = inputs.make("spread", (2, 3, 40), np.float32)
    expected, upstream = forward_and_upstream(logits, axis)
    dlogits = backward(target, logits, expected, upstream, axis)
    tolerances.check_soft_argmax_backward(dlogits, logits, expected, upstream, axis)


@pytest.mark.parametrize("out_dtype", inputs.DTYPES, ids=str)
def test_dtype_of_the_gradient(out_dtype):
    logits = inputs.make("spread", (4, 300), np.float32)
    expected, upstream = forward_and_upstream(logits)
    out = np.empty(logits.shape, out_dtype)
    assert gpusoftmax.soft_argmax_backward(logits, expected, upstream, out=out) is out
    tolerances.check_soft_argmax_backward(out, logits, expected, upstream)


def test_backward_without_columns():
    for shape in ((0, 3), (2, 0)):
        nothing = np.zeros(shape[:1])
        assert gpusoftmax.soft_argmax_backward(np.zeros(shape), nothing, nothing).shape == shape


# ---------------------------------------------------------------- many chunks, and chunks of several pieces


@pytest.mark.parametrize("most, n_cols", [(4, 9 * 1024 + 3), (40, 35 * 1024)])
def test_chunks_of_several_pieces_and_more_chunks_than_lanes(monkeypatch, most, n_cols):
    """Rows too long for one piece in each chunk, or one chunk for each lane, made short by a smaller limit."""
    monkeypatch.setattr(plan, "MAX_CHUNKS", most)
    plan.tree_of.cache_clear()
    plan.row_plan.cache_clear()
    try:
        logits = inputs.make("spread", (2, n_cols), np.float32, seed=4)
        logits[1, : n_cols // 2] = -INF
        images = logits[:, : n_cols // 64 * 64].reshape(2, 64, -1).copy()
        expected, upstream = forward_and_upstream(logits)
        with emulated_gpu("sm_90", track=False) as gpu:
            x, maps = gpu.array(logits), gpu.array(images)
            found = gpu.get(gpusoftmax.soft_argmax(x))
            assert (gpu.stats[-1].plan.split.piece_bits == 2) == (most == 4)
            points = gpusoftmax.spatial_softmax(maps)
            dlogits = gpu.get(gpusoftmax.soft_argmax_backward(x, gpu.array(expected), gpu.array(upstream)))
            dfeatures = gpu.get(gpusoftmax.spatial_softmax_backward(maps, points, points))
            points = gpu.get(points)
    finally:
        plan.tree_of.cache_clear()
        plan.row_plan.cache_clear()
    tolerances.check_soft_argmax(found, logits)
    tolerances.check_soft_argmax_backward(dlogits, logits, expected, upstream)
    tolerances.check_spatial_softmax(points, images)
    tolerances.check_spatial_softmax_backward(dfeatures, images, points, points)
