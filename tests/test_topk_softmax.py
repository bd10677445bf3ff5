"""topk_softmax: the columns of a stable sort; probabilities within the bounds of a softmax, or softmax's own bits."""

import numpy as np
import pytest

import gpusoftmax
from tests import inputs, tolerances
from tests.emulator import emulated_gpu

ROW_DTYPE = {"float16": "float32", "bfloat16": "float32", "float32": "float32", "float64": "float64"}
# Experts; less than a warp; one piece; five chunks of the GPU, three of the CPU.
N_COLS = [8, 31, 300, 4099]


def run(target, logits, k, **options):
    top = gpusoftmax.topk_softmax(target.array(logits), k, **options)
    assert isinstance(top, gpusoftmax.TopkSoftmax)
    return gpusoftmax.TopkSoftmax(*(np.asarray(target.get(part)) for part in top))


def largest(logits, k):
    """The columns of the k largest logits of rows without NaN, the lower of equal ones first."""
    return np.argsort(-logits.astype(np.float64), axis=-1, kind="stable")[..., :k]


def check(target, logits, k, **options):
    """Both kinds of probabilities of rows that have a softmax."""
    indices = largest(logits, k)
    renormalised, of_all = (run(target, logits, k, renormalize=flag, **options) for flag in (True, False))
    for top in (renormalised, of_all):
        assert top.probs.dtype == ROW_DTYPE[logits.dtype.name] and top.indices.dtype == np.int64
        assert np.array_equal(top.indices, indices)
    chosen = np.take_along_axis(logits, indices, -1)
    tolerances.check_softmax(renormalised.probs, chosen, **options)
    probs = target.get(gpusoftmax.softmax(target.array(logits), dtype=ROW_DTYPE[logits.dtype.name], **options))
    assert of_all.probs.tobytes() == np.take_along_axis(np.asarray(probs), indices, -1).tobytes()


@pytest.mark.parametrize("dtype", inputs.DTYPES, ids=str)
@pytest.mark.parametrize("n_cols", N_COLS)
def test_columns_and_probabilities(target, dtype, n_cols):
    """Ties, masked columns, huge logits and confident rows among them."""
    check(target, inputs.every_family(2, n_cols, dtype, seed=n_cols), 5)


@pytest.mark.parametrize("k", [1, 2, 8, 9, 31, 63, 64])
def test_number_of_columns(target, k):
    check(target, inputs.make("ties", (3, 64), np.float32), k)
    check(target, np.zeros((2, 64), np.float32), k)  # the sum has the most to round


@pytest.mark.parametrize("n_cols", [64, 128, 129, 256, 512, 513, 1000, 1024])
def test_the_few_largest_of_every_number_of_lanes(target, n_cols):
    """That share a row of the GPU, and of groups of columns in a lane; ties, and signed zeros among them."""
    logits = inputs.make("ties", (9, n_cols), np.float32)
    logits[::2] *= np.where(np.arange(n_cols) % 3, np.float32(0.0), np.float32(-1.0))
    for k in (1, 8):
        assert np.array_equal(run(target, logits, k).indices, largest(logits, k))


def test_experts_take_few_instructions():
    """None of the rows that share a warp waits for another: 384 a row while the k largest were candidates, now 155."""
    logits = inputs.make("spread", (64, 64), np.float32)
    with emulated_gpu("sm_90", track=False) as gpu:
        gpusoftmax.topk_softmax(gpu.array(logits), 8)
        assert gpu.stats[-1].warp_instructions.total() < 200 * len(logits)


def test_more_than_fit_a_warp():
    check_on_cpu = inputs.make("spread", (3, 5000), np.float32)
    top = gpusoftmax.topk_softmax(check_on_cpu, 300)
    assert np.array_equal(top.indices, largest(check_on_cpu, 300))


@pytest.mark.parametrize("temperature", [1e-37, 0.7, 1e30])
def test_temperature(target, temperature):
    check(target, inputs.every_family(2, 300, np.float32), 4, temperature=temperature)


def test_many_rows_of_few_experts(target):
    """Several rows in a warp, many in a block, the last block not full."""
    logits = inputs.make("spread", (1003, 8), np.float32)
    check(target, logits, 2)


def test_far_from_zero(target):
    """Beyond 2^16 exponentials refer to the maximum itself."""
    for offset in (1e6, -1e6, 1e30):
        logits = (inputs.make("spread", (3, 40), np.float32) * 30 + np.float32(offset)).astype(np.float32)
        check(target, logits, 6)


def test_axis(target):
    logits = inputs.make("spread", (2, 40, 3), np.float32)
    rows = np.ascontiguousarray(logits.transpose(0, 2, 1))
    for flag in (True, False):
        along, last = (run(target, x, 4, axis=axis, renormalize=flag) for x, axis in ((logits, 1), (rows, -1)))
        assert along.probs.shape == (2, 3, 4)
        assert along.probs.tobytes() == last.probs.tobytes() and np.array_equal(along.indices, last.indices)


def test_rows_side_by_side(target):
    """A single column each: whole sectors of neighbouring rows are read together on the GPU."""
    logits = inputs.make("ties", (2100, 64), np.float32)
    top = run(target, logits, 1, axis=0)
    assert np.array_equal(top.indices[:, 0], np.argmax(logits, axis=0)) and (top.probs == 1).all()


@pytest.mark.parametrize("renormalize", [True, False])
def test_masked_and_special_rows(target, renormalize):
    logits = np.full((6, 1500), -np.inf, np.float32)
    logits[1, [1400, 7]] = 0  # fewer columns than are asked for
    logits[2], logits[2, 5], logits[2, 6] = 0, np.inf, np.nan
    logits[3], logits[3, 1100] = 0, np.inf
    logits[4], logits[4, 1499] = 0, np.nan
    logits[5] = 1
    top = run(target, logits, 4, renormalize=renormalize)
    without = [-1] * 4
    assert top.indices.tolist() == [without, [7, 1400, 0, 1], without, without, without, [0, 1, 2, 3]]
    assert np.isnan(top.probs[[0, 2, 3, 4]]).all()
    assert top.probs[1].tolist() == [0.5, 0.5, 0, 0]
    np.testing.assert_allclose(top.probs[5], 0.25 if renormalize else 1 / 1500, rtol=1e-6)


def test_probabilities_that_underflow(target):
    """Among all the columns; the others are as small as the arithmetic has them."""
    logits = np.zeros((1, 40), np.float32)
    logits[0, [3, 9]] = 200, 150
    top = run(target, logits, 3)
    assert top.indices.tolist() == [[3, 9, 0]] and top.probs[0, 0] == 1 and top.probs[0, 2] == 0
    tolerances.check_softmax(top.probs, logits[:, [3, 9, 0]])


def test_one_row_and_no_rows(target):
    logits = inputs.make("spread", (40,), np.float32)
    top = run(target, logits, 3)
    assert top.probs.shape == (3,) and top.indices.tolist() == largest(logits, 3).tolist()
    assert run(target, logits.reshape(1, 40)[:0], 3).indices.shape == (0, 3)


@pytest.mark.parametrize("k", [0, 41])
def test_a_bad_number_of_columns(target, k):
    with pytest.raises(ValueError, match=f"k is {k}, expected 1 to 40, the number of columns"):
        run(target, inputs.make("spread", (2, 40), np.float32), k)
