"""top_k_mask_logits and top_p_mask_logits: which logits stay, on every target, dtype and awkward row."""

import os
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

import gpusoftmax
from tests import inputs, oracle
from tests.emulator import emulated_gpu

F32 = np.dtype(np.float32)
top_k, top_p = gpusoftmax.top_k_mask_logits, gpusoftmax.top_p_mask_logits
N_COLS = [1, 31, 513, 4099]


def check(masked, logits, **limits):
    assert masked.dtype == logits.dtype and masked.shape == logits.shape
    for row, found in zip(logits, masked, strict=True):
        kept, doubtful = oracle.kept_columns(row, **limits)
        expected = np.where(kept, row, np.array(-np.inf, row.dtype))
        sure = ~doubtful
        assert found[sure].tobytes() == expected[sure].tobytes()
        # Of the others all that are equal stay or go together.
        assert ((found == row) | (found == -np.inf))[doubtful].all()


@pytest.mark.parametrize("dtype", inputs.DTYPES, ids=str)
@pytest.mark.parametrize("n_cols", N_COLS)
def test_top_k(target, dtype, n_cols):
    logits = inputs.every_family(2, n_cols, dtype, seed=n_cols)
    x = target.array(logits)
    for k in (1, 7, n_cols):
        check(target.get(top_k(x, k)), logits, top_k=k)


@pytest.mark.parametrize("dtype", inputs.DTYPES, ids=str)
@pytest.mark.parametrize("n_cols", N_COLS)
def test_top_p(target, dtype, n_cols):
    logits = inputs.every_family(2, n_cols, dtype, seed=n_cols)
    x = target.array(logits)
    for p, temperature in ((0.9, 1.0), (0.3, 2.5)):
        masked = target.get(top_p(x, p, temperature=temperature))
        check(masked, logits, top_p=p, temperature=temperature)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("n_cols, dtype", [(5000, inputs.BFLOAT16), (20001, F32), (100_003, F32)], ids=str)
def test_few_of_a_long_row(arch, n_cols, dtype):
    """They are found without going over the row again: along one block, or a cluster, of few chunks or many."""
    logits = inputs.make("spread", (2, n_cols), dtype)
    logits[1, 2 * n_cols // 3 :] = -np.inf  # fewer chunks than are looked for, then
    for k in (1, 50, 64):
        with emulated_gpu(arch) as gpu:
            check(gpu.get(top_k(gpu.array(logits), k)), logits, top_k=k)
            assert gpu.stats[-1].warp_instructions.total() < 100 * logits.size / 32


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("n_cols, dtype", [(20001, inputs.BFLOAT16), (32000, F32)], ids=str)
def test_a_mass_of_few(arch, n_cols, dtype):
    """Where it ends is found among the largest logits, and confirmed by two passes; a larger mass takes more."""
    logits = inputs.make("spread", (2, n_cols), dtype)
    logits[1, :100] = logits[1].max()  # more of one kind than are looked at
    with emulated_gpu(arch) as gpu:
        x = gpu.array(logits[:1])
        for p, most in ((0.3, 100), (0.9, 100), (0.9999, np.inf)):
            check(gpu.get(top_p(x, p)), logits[:1], top_p=p, temperature=1.0)
            assert gpu.stats[-1].warp_instructions.total() < most * n_cols / 32
        check(gpu.get(top_p(gpu.array(logits), 0.9)), logits, top_p=0.9, temperature=1.0)


def test_few_where_too_many_are_equal():
    """More than are looked at, or fewer than are wanted."""
    logits = np.zeros((3, 5000), F32)
    logits[1, ::2] = 1.0
    logits[2, 40:] = -np.inf
    with emulated_gpu() as gpu:
        check(gpu.get(top_k(gpu.array(logits), 50)), logits, top_k=50)


@pytest.mark.parametrize("dtype", [F32, inputs.DTYPES[1]], ids=str)
def test_top_p_of_long_rows(dtype):
    """Of many columns few are left after some halvings, and are gathered (kernels/cpu/threshold.py)."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((1, 70_001))
    far_below = -1000 - 30 * rng.random(normal.shape)
    logits = np.concatenate([normal, 5 * normal, far_below, np.round(normal), np.ones(normal.shape)]).astype(dtype)
    for p in (1e-6, 0.5, 0.9, 0.999, 1 - 2**-20):
        check(top_p(logits, p), logits, top_p=p, temperature=1.0)
    check(top_p(logits, 0.9, temperature=0.1), logits, top_p=0.9, temperature=0.1)


def test_a_limit_of_zero_is_found_like_others():
    """Between it and its neighbours there are more halvings of values than of orders: 2000 in float64."""
    zeros = np.zeros((1, 50_000))
    assert best_time(top_p, zeros, 0.9) < 4 * best_time(top_p, zeros + 1, 0.9)


def best_time(function, *arguments):
    times = []
    for _ in range(7):  # the first compiles
        start = time.perf_counter()
        function(*arguments)
        times.append(time.perf_counter() - start)
    return min(times)


def test_what_stays_is_not_changed(target):
    """Not even the sign of a zero or the digits of a half type."""
    logits = np.array([[-0.0, 0.0, -1.0, 1e-45, -np.inf]], F32)
    masked = target.get(top_k(target.array(logits), 3))
    assert masked.tobytes() == np.array([[-0.0, 0.0, -np.inf, 1e-45, -np.inf]], F32).tobytes()
    assert target.get(top_k(target.array(logits), 9)).tobytes() == logits.tobytes()
    assert target.get(top_p(target.array(logits), 1.0)).tobytes() == logits.tobytes()


@pytest.mark.parametrize("k", [1, 2, 5])
def test_ties_at_the_limit_stay(target, k):
    logits = np.full((3, 3000), -4, F32)
    logits[:, 100::700] = 2.5  # five of them
    masked = target.get(top_k(target.array(logits), k))
    assert ((masked == 2.5) == (logits == 2.5)).all() and np.isneginf(masked[logits != 2.5]).all()
    nearly_all = target.get(top_p(target.array(logits), 0.2))  # the five have 0.53 of the probability
    assert nearly_all.tobytes() == masked.tobytes()


@pytest.mark.parametrize("function, limit", [(top_k, 2), (top_p, 0.5)], ids=["top_k", "top_p"])
def test_special_rows(target, function, limit):
    logits = inputs.make("spread", (5, 700), F32)
    logits[0] = -np.inf
    logits[1, 3], logits[2, 5], logits[3] = np.nan, np.inf, np.nan
    masked = target.get(function(target.array(logits), limit))
    assert np.isneginf(masked[0]).all() and np.isnan(masked[3]).all()
    assert np.isnan(masked[1, 3]) and masked[2, 5] == np.inf
    alone = target.get(function(target.array(logits[4:]), limit))
    assert masked[4].tobytes() == alone[0].tobytes()
    without = np.where(np.isnan(logits[1]), -np.inf, logits[1])
    masked_without = target.get(function(target.array(without[None]), limit))[0]
    assert np.array_equal(np.where(np.isnan(masked[1]), -np.inf, masked[1]), masked_without)
    if function is top_p:
        assert masked[2].tobytes() == logits[2].tobytes()


@pytest.mark.skipif(os.name != "posix", reason="no page that cannot be read")
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_nothing_behind_a_row_with_infinity_is_read(dtype):
    """Its last vector is not full, and behind it memory ends."""
    program = f"""
    import ctypes, mmap
    import numpy as np
    import gpusoftmax
    page, row_bytes = mmap.PAGESIZE, 1001 * np.dtype("{dtype}").itemsize
    n_bytes = -(-row_bytes // page) * page
    memory = mmap.mmap(-1, n_bytes + page)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + n_bytes
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), ctypes.c_size_t(page), 0) == 0
    logits = np.frombuffer(memory, "{dtype}", 1001, n_bytes - row_bytes)[None]
    logits[0, 5] = np.inf
    assert np.array_equal(gpusoftmax.top_p_mask_logits(logits, 0.9), logits)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=300)


def test_axes_and_out():
    logits = inputs.make("spread", (3, 40, 5), F32)
    expected = top_k(np.ascontiguousarray(logits.transpose(0, 2, 1)), 4).transpose(0, 2, 1)
    assert np.array_equal(top_k(logits, 4, axis=1), expected)
    assert np.array_equal(
        top_k(logits, 4, axis=(0, 2)), top_k(logits.transpose(1, 0, 2), 4, axis=(1, 2)).transpose(1, 0, 2)
    )
    out = np.empty(logits.shape, np.float64)
    assert top_k(logits, 4, axis=1, out=out) is out and np.array_equal(out, expected)
    place = logits.copy()
    assert top_p(place, 0.5, out=place) is place and np.array_equal(place, top_p(logits, 0.5))
    assert top_k(np.zeros((0, 4), F32), 2).shape == (0, 4)


@pytest.mark.parametrize("n_cols", [31, pytest.param(4099, marks=pytest.mark.matrix)])
def test_what_is_masked_is_left_out(target, n_cols):
    """Bit for bit what comes of -inf there, whatever the logits are."""
    logits = inputs.make("spread", (4, n_cols), F32, seed=n_cols)
    rng = np.random.default_rng(0)
    mask, n_valid = rng.random(logits.shape) < 0.6, rng.integers(n_cols // 2, n_cols, 4)
    there = mask & (np.arange(n_cols) < n_valid[:, None])
    there[3] = mask[3] = False
    kept = np.where(there, logits, -np.inf).astype(F32)
    logits[~there] = np.nan
    given = {"mask": target.array(mask), "n_valid": target.array(n_valid)}
    for function, limit in ((top_k, 7), (top_p, 0.8)):
        x = target.array(logits.copy())
        found = target.get(function(x, limit, **given))
        assert found.tobytes() == target.get(function(target.array(kept), limit)).tobytes()
        assert function(x, limit, out=x, **given) is x
        assert target.get(x).tobytes() == found.tobytes()


OWN = {"top_k": [3, 0, 40, 1, -1, 9999], "top_p": [0.5, 0.9, 1.0, 0.01, 0.3, 0.99]}
TEMPERATURES = [1.0, 2.5, 0.5, 1.0, 3.0, 1.0]


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("n_cols", [5, 31, pytest.param(4099, marks=pytest.mark.matrix)])
def test_rows_with_their_own_numbers(target, n_cols, layout):
    """Bit for bit as if each were alone, with numbers for all rows."""
    logits = inputs.make("spread", (6, n_cols), F32, seed=n_cols)
    axis, x = -1, logits
    if layout == "columns":
        axis, x = 0, np.ascontiguousarray(logits.T)
    for function, name in ((top_k, "top_k"), (top_p, "top_p")):
        limits = np.array(OWN[name], np.int32 if name == "top_k" else F32)
        found = target.get(function(target.array(x), target.array(limits), axis))
        for row, limit in enumerate(OWN[name]):
            alone = function(target.array(logits[row : row + 1]), limit if limit > 0 else n_cols)
            assert np.array_equal(np.moveaxis(found, axis, -1)[row], target.get(alone)[0])
    temperatures = np.array(TEMPERATURES)  # float64, to be rounded
    found = target.get(top_p(target.array(x), 0.7, axis, temperature=target.array(temperatures)))
    for row, of_row, temperature in zip(logits, np.moveaxis(found, axis, -1), TEMPERATURES, strict=True):
        check(np.ascontiguousarray(of_row)[None], row[None], top_p=0.7, temperature=temperature)


def test_own_numbers_that_are_none(target):
    """Nothing finite is left, so that nothing is drawn; other rows are as they would be."""
    logits = inputs.make("spread", (7, 40), F32)
    logits[6, 3] = np.inf
    bad = np.array([0.0, -1.0, np.nan, np.inf, 1.5, 0.9, 2.0], F32)
    of_p = target.get(top_p(target.array(logits), target.array(bad)))
    of_t = target.get(top_p(target.array(logits), 0.9, temperature=target.array(bad)))
    whole = target.get(top_p(target.array(logits[5:6]), 0.9))
    assert np.isneginf(of_p[:5]).all() and np.array_equal(of_p[5], whole[0])
    assert np.isneginf(of_t[:4]).all() and not np.isneginf(of_t[4:6]).all(axis=1).any()
    assert of_p[6, 3] == np.inf and np.isneginf(np.delete(of_p[6], 3)).all()
    assert (target.get(gpusoftmax.sample(target.array(of_p), rng=0))[:5] == -1).all()


def test_one_number_in_an_array():
    logits = inputs.make("spread", (3, 40), F32)
    assert np.array_equal(top_k(logits, np.array([4])), top_k(logits, 4))
    assert np.array_equal(top_p(logits, np.array(0.5)), top_p(logits, 0.5))
    assert np.array_equal(top_k(logits, np.array([1, 2, 3], np.uint8))[2], top_k(logits[2], 3))
    assert np.array_equal(top_k(logits, np.array([4]), axis=None), top_k(logits, 4, axis=None))
    assert top_k(np.zeros((0, 4), F32), np.zeros(0, int)).shape == (0, 4)


def test_own_numbers_that_do_not_fit():
    logits = np.zeros((2, 3))
    with pytest.raises(ValueError, match=r"^top_k has shape \(3,\), expected \(2,\)"):
        top_k(logits, np.ones(3, int))
    with pytest.raises(TypeError, match="^top_k has dtype float64, expected an integer"):
        top_k(logits, np.ones(2))
    with pytest.raises(TypeError, match="^top_p has dtype int64, expected"):
        top_p(logits, np.ones(2, int))
    with pytest.raises(ValueError, match=r"^temperature has shape \(2, 3\)"):
        top_p(logits, 0.5, temperature=np.ones((2, 3)))
    own = np.full(2, 0.5)
    with pytest.raises(ValueError, match="^out shares memory with top_p"):
        top_p(own[:, None], own, out=own[:, None])
