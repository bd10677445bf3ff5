"""argmax: NumPy's index on every target, dtype and awkward shape, ties and NaN included."""

import numpy as np
import pytest

import gpusoftmax
from gpusoftmax.kernels.cuda import plan
from tests import inputs, oracle
from tests.emulator import emulated_gpu

INF, NAN = np.inf, np.nan
N_COLS = [
    1,  # a row of one class
    31,  # less than a warp, less than a vector strip
    512,  # all that the smallest block holds
    513,  # one more
    4099,  # five chunks of the GPU, three of the CPU; rows of 16-byte vectors never align
]


def check(target, x, axis=-1, **options):
    indices = np.asarray(target.get(gpusoftmax.argmax(target.array(x), axis, **options)))
    assert indices.dtype == np.int64
    np.testing.assert_array_equal(indices, oracle.argmax(x, axis, **options))


@pytest.mark.parametrize("dtype", inputs.DTYPES, ids=str)
@pytest.mark.parametrize("n_cols", N_COLS)
def test_matches_oracle(target, dtype, n_cols):
    check(target, inputs.every_family(2, n_cols, dtype, seed=n_cols))


@pytest.mark.parametrize("n_cols", [3, 40, 300, 4200])
def test_the_first_of_equal_ones(target, n_cols):
    """Two maxima, at any distance: in one lane, in two, in two chunks."""
    columns = sorted({0, 1, 2, 5, 17, 64, 129, 1023, 1024, 1025, 2047, 2048, 4100, n_cols - 1})
    pairs = [(one, other) for one in columns for other in columns if one < other < n_cols]
    x = inputs.make("spread", (len(pairs), n_cols), np.float32)
    for row, (one, other) in zip(x, pairs, strict=True):
        row[[one, other]] = 100
    check(target, x)
    check(target, np.zeros((3, n_cols), np.float32))
    check(target, np.array([[-0.0, 0.0, -0.0] * (n_cols // 3)], np.float32))


@pytest.mark.parametrize(("dtype", "n_cols"), [("float32", 5), ("bfloat16", 300), ("float32", 4200), ("float64", 300)])
def test_special_values(target, dtype, n_cols):
    """The first NaN leads, +inf included; a row of -inf only gives 0."""
    x = inputs.make("spread", (9, n_cols), dtype)
    middle, last = n_cols // 2, n_cols - 1
    x[0, [middle, last]] = NAN
    x[1, middle], x[1, last] = INF, NAN
    x[2, 0], x[2, middle] = NAN, INF
    x[3, [middle, last]] = INF
    x[4] = -INF
    x[5], x[5, last] = -INF, NAN
    x[6] = NAN
    x[7, :last] = -INF
    check(target, x)
    assert target.get(gpusoftmax.argmax(target.array(x))).tolist()[:8] == [
        middle, last, 0, middle, 0, last, 0, last
    ]  # fmt: skip


@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("axis", [0, 1, -1, None])
def test_axes(target, axis, keepdims):
    x = inputs.make("ties", (3, 4, 40), np.float32)
    check(target, x, axis, keepdims=keepdims)
    check(target, x.transpose(2, 0, 1), axis, keepdims=keepdims)  # None: counted in C order, which is not memory's


def test_results_are_what_numpy_gives():
    assert type(gpusoftmax.argmax([1, 3, 3])) is np.int64 and gpusoftmax.argmax([1, 3, 3]) == 1
    assert gpusoftmax.argmax(5.0) == 0 and gpusoftmax.argmax(np.array(2.0), None, keepdims=True).shape == ()
    assert gpusoftmax.argmax(np.array([[False, True]])).tolist() == [1]
    assert gpusoftmax.argmax([[1, 2], [4, 3]], None) == 2
    assert gpusoftmax.argmax(np.zeros((0, 3))).shape == (0,)
    for shape, axis in (((0,), -1), ((3, 0), -1), ((0, 0), 0), ((0, 3), None)):
        with pytest.raises(ValueError, match="at least one element"):
            gpusoftmax.argmax(np.zeros(shape), axis)


def test_out(target):
    x, out = inputs.make("ties", (3, 40), np.float32), np.full(6, -7)
    place = target.array(out[::2])
    assert gpusoftmax.argmax(target.array(x), out=place) is place
    np.testing.assert_array_equal(target.get(place), oracle.argmax(x))
    assert (out[1::2] == -7).all()


def test_out_in_the_memory_of_the_logits():
    """Indices of one row would take the place of another row's logits."""
    x = np.ones((4, 4))
    with pytest.raises(ValueError, match="out shares memory with x"):
        gpusoftmax.argmax(x, out=x.view(np.int64)[0])
    assert (x == 1).all()


@pytest.mark.parametrize("n_cols", [40, 3000])
def test_a_call_that_was_made_before_writes_to_its_own_result(n_cols):
    results = [gpusoftmax.argmax(np.eye(2, n_cols, k)) for k in range(20)]
    assert [result.tolist() for result in results] == [[k, k + 1] for k in range(20)]


def test_chunks_of_several_pieces_and_more_chunks_than_lanes(monkeypatch):
    for most, n_cols in ((4, 9 * 1024 + 3), (40, 35 * 1024)):
        monkeypatch.setattr(plan, "MAX_CHUNKS", most)
        plan.tree_of.cache_clear()
        plan.row_plan.cache_clear()
        try:
            x = np.zeros((3, n_cols), np.float32)
            x[0, [1025, 5000, n_cols - 1]] = 1
            x[1, [4096, 8192]] = 1
            x[2, n_cols - 1] = NAN
            with emulated_gpu("sm_90", track=False) as gpu:
                assert gpu.get(gpusoftmax.argmax(gpu.array(x))).tolist() == [1025, 4096, n_cols - 1]
        finally:
            plan.tree_of.cache_clear()
            plan.row_plan.cache_clear()
