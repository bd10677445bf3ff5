"""top_logprobs: the same tokens as a stable sort, and log_softmax's own bits for them, on every target."""

import os
import subprocess
import sys
import textwrap
import time
import tracemalloc

import numpy as np
import pytest

import gpusoftmax
from tests import inputs
from tests.emulator import emulated_gpu

ROW_DTYPE = {"float16": "float32", "bfloat16": "float32", "float32": "float32", "float64": "float64"}
# Less than a warp; one piece; five chunks of the GPU, three of the CPU.
N_COLS = [31, 300, 4099]


def run(target, logits, k, tokens=None, **options):
    given = None if tokens is None else target.array(tokens)
    top = gpusoftmax.top_logprobs(target.array(logits), k, given, **options)
    assert isinstance(top, gpusoftmax.TopLogprobs)
    return gpusoftmax.TopLogprobs(*(np.asarray(target.get(part)) for part in top))


def log_probs(target, logits, **options):
    return target.get(gpusoftmax.log_softmax(target.array(logits), dtype=ROW_DTYPE[logits.dtype.name], **options))


def largest(logits, k):
    """The columns of the k largest logits of rows without NaN, the lower of equal ones first."""
    return np.argsort(-logits.astype(np.float64), axis=-1, kind="stable")[..., :k]


def check(top, logits, expected_logp, k):
    tokens = largest(logits, k)
    assert np.array_equal(top.token, tokens)
    assert top.logprob.tobytes() == np.take_along_axis(expected_logp, tokens, -1).tobytes()


@pytest.mark.parametrize("dtype", inputs.DTYPES, ids=str)
@pytest.mark.parametrize("n_cols", N_COLS)
def test_tokens_and_bits(target, dtype, n_cols):
    """Ties, masked tokens and ascending rows among them."""
    logits = inputs.every_family(2, n_cols, dtype, seed=n_cols)
    top = run(target, logits, 5)
    assert top.logprob.dtype == ROW_DTYPE[dtype.name] and top.token.dtype == np.int64
    check(top, logits, log_probs(target, logits), 5)


@pytest.mark.parametrize("k", [1, 2, 31, 40, 64])
def test_number_of_tokens(target, k):
    logits = inputs.make("ties", (3, 64), np.float32)
    check(run(target, logits, k), logits, log_probs(target, logits), k)


@pytest.mark.parametrize(("n_cols", "k"), [(64, 8), (300, 20), (1000, 64), (1100, 64), (4099, 64), (20011, 20)])
def test_candidates(target, n_cols, k):
    """As many as are wanted and a few more; equal ones; too many, so that it is done without them; too few, so that
    masked tokens follow; all of them neighbours.
    """
    logits = inputs.make("spread", (5, n_cols), np.float32)
    logits[1] = np.round(logits[1])
    logits[2] = 3
    logits[2, n_cols - k // 2 :] = 4
    allowed = np.random.default_rng(n_cols).permutation(n_cols)[: k // 2]
    logits[3], logits[3, allowed] = -np.inf, logits[0, allowed]
    logits[3, 1] = 2.5
    logits[4] = np.sort(logits[4])
    check(run(target, logits, k), logits, log_probs(target, logits), k)


@pytest.mark.parametrize("value", [-np.inf, -5.0])
def test_candidates_of_float64_far_below_the_first(target, value):
    """The search for a bound goes down by steps that double, to the end of what 64 bits hold."""
    logits = np.full((1, 513), value)
    logits[0, 3] = 1
    check(run(target, logits, 2), logits, log_probs(target, logits), 2)


def test_columns_from_n_valid_on_are_no_candidates():
    """Also of a piece that has left its slot, and comes from memory again: a warp has one more of them than slots."""
    logits = np.zeros((14, 9217), np.float32)
    logits[:, 100], logits[:, 101] = 1, 50
    with emulated_gpu("sm_90", multiprocessors=2, track=False) as gpu:
        top = gpusoftmax.top_logprobs(gpu.array(logits), 1, n_valid=101)
        split = gpu.stats[-1].plan.split
        assert split.slots < -(-split.n_chunks // (gpu.stats[-1].plan.threads // 32))
        assert (gpu.get(top.token) == 100).all()
        np.testing.assert_allclose(gpu.get(top.logprob), 1 - np.log(np.e + 100), rtol=1e-6)


@pytest.mark.parametrize("n_cols", [300, 5000])
def test_rows_of_nan(target, n_cols):
    """Fewer numbers than tokens, and all but one."""
    logits = inputs.make("spread", (2, n_cols), np.float32)
    logits[0, 7:], logits[1, n_cols - 9] = np.nan, np.nan
    top = run(target, logits, 20)
    assert (top.token == -1).all() and np.isnan(top.logprob).all()


@pytest.mark.skipif(os.name != "posix", reason="no page that cannot be read")
@pytest.mark.parametrize("dtype, n_cols", [("float32", 8), ("float32", 500), ("float16", 20)])
def test_nothing_behind_a_row_of_nan_is_read(dtype, n_cols):
    """Those that arithmetic makes on x86 have a sign and are sorted below -inf, which fills up a vector."""
    program = f"""
    import ctypes, mmap
    import numpy as np
    import gpusoftmax
    page, row_bytes = mmap.PAGESIZE, {n_cols} * np.dtype("{dtype}").itemsize
    memory = mmap.mmap(-1, 2 * page)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + page
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), ctypes.c_size_t(page), 0) == 0
    logits = np.frombuffer(memory, "{dtype}", {n_cols}, page - row_bytes)[None]
    logits[:] = np.copysign(np.nan, -1)
    assert (gpusoftmax.top_logprobs(logits, 8).token == -1).all()
    assert (gpusoftmax.topk_softmax(logits, 1).indices == -1).all()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=300)


@pytest.mark.parametrize("n_cols", [300, 5000])
def test_target_comes_first(target, n_cols):
    logits = inputs.make("spread", (4, n_cols), np.float32)
    tokens = np.array([3, n_cols - 1, int(largest(logits, 1)[2, 0]), -100])
    top = run(target, logits, 3, tokens)
    logp = log_probs(target, logits)
    assert top.token[:, 0].tolist() == tokens.tolist()
    assert top.logprob[:3, 0].tobytes() == logp[np.arange(3), tokens[:3]].tobytes() and top.logprob[3, 0] == 0
    check(gpusoftmax.TopLogprobs(top.logprob[:, 1:].copy(), top.token[:, 1:]), logits, logp, 3)


def test_temperature_and_axis(target):
    logits = inputs.make("spread", (2, 40, 3), np.float32)
    top = run(target, logits, 4, axis=1, temperature=0.7)
    rows = np.ascontiguousarray(logits.transpose(0, 2, 1))
    logp = np.ascontiguousarray(log_probs(target, logits, axis=1, temperature=0.7).transpose(0, 2, 1))
    check(top, rows, logp, 4)


def test_rows_side_by_side(target):
    """A single token each: whole sectors of neighbouring rows are read together on the GPU."""
    logits = inputs.make("ties", (2100, 64), np.float32)
    top = run(target, logits, 1, axis=0)
    assert np.array_equal(top.token[:, 0], np.argmax(logits, axis=0))


def test_masked_and_special_rows(target):
    logits = np.full((5, 1500), -np.inf, np.float32)
    logits[1, [1400, 7]] = 0  # fewer tokens than are asked for
    logits[2], logits[2, 5], logits[2, 6] = 0, np.inf, np.nan
    logits[3], logits[3, 1100] = 0, np.inf
    logits[4] = 1
    top = run(target, logits, 4)
    assert top.token.tolist() == [[0, 1, 2, 3], [7, 1400, 0, 1], [-1] * 4, [1100, 0, 1, 2], [0, 1, 2, 3]]
    assert np.isnan(top.logprob[[0, 2, 3]]).all()
    assert np.array_equal(top.logprob[1], np.float32([-np.log(2), -np.log(2), -np.inf, -np.inf]))


def test_maximum_in_any_chunk_warp_and_lane(target):
    n_cols = 5000
    places = [0, 1, 31, 32, 255, 1023, 1024, 2047, 2048, 3071, 4095, 4096, 4999]
    logits = inputs.make("spread", (len(places), n_cols), np.float32)
    logits[np.arange(len(places)), places] = 100
    assert run(target, logits, 2).token[:, 0].tolist() == places


def test_a_bad_target(target):
    logits = inputs.make("spread", (2, 40), np.float32)
    top = run(target, logits, 2, np.array([40, 3]), validate=False)
    assert np.isnan(top.logprob[0, 0]) and np.isfinite(top.logprob[1]).all()
    with pytest.raises(IndexError, match=r"target\[0\] .* is 40, expected a class from 0 to 39"):
        run(target, logits, 2, np.array([40, 3]), validate=True)


@pytest.mark.parametrize("dtype", inputs.DTYPES, ids=str)
def test_more_tokens_than_the_kernels_keep(dtype):
    logits = inputs.make("ties", (3, 300), dtype)
    logits[1, 4] = np.nan
    tokens = np.array([3, 7, -100])
    top = gpusoftmax.top_logprobs(logits, 100, tokens)
    fewer = gpusoftmax.top_logprobs(logits, 64, tokens)
    assert top.token.shape == (3, 101) and top.logprob.dtype == fewer.logprob.dtype
    assert np.array_equal(top.token[:, :65], fewer.token) and np.array_equal(top.token[0, 1:], largest(logits, 100)[0])
    assert np.array_equal(top.logprob[:, :65], fewer.logprob, equal_nan=True)


@pytest.mark.parametrize("dtype", inputs.DTYPES, ids=str)
def test_rows_are_not_sorted_for_a_few_of_many(dtype):
    """On the CPU: the results are those of rows that are, and nothing of the size of the logits is made."""
    logits = np.concatenate([inputs.make(family, (2, 5000), dtype) for family in ("ties", "sorted", "masked")])
    logits[1, 4] = np.nan
    sorted_rows, top = gpusoftmax.top_logprobs(logits, 626), gpusoftmax.top_logprobs(logits, 625)
    tracemalloc.start()
    try:
        gpusoftmax.top_logprobs(logits, 625)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - top.token.nbytes - top.logprob.nbytes < 4 * logits.size
    for found, expected in zip(top, sorted_rows, strict=True):
        assert np.array_equal(found, expected[:, :625], equal_nan=True)


@pytest.mark.parametrize("k", [64, 100])
def test_more_tokens_of_what_logits_go_through(k):
    logits = inputs.make("spread", (4, 300), np.float32)
    logits[2, 7] = np.nan  # masked, and no token of its row is missing for it
    bias = np.random.default_rng(0).normal(0, 9, 300).astype(np.float32)
    mask = np.random.default_rng(1).random(logits.shape) < 0.8
    mask[2, 7] = False
    through = np.where(mask & (np.arange(300) < 250), logits + bias, np.float32(-np.inf))
    top = gpusoftmax.top_logprobs(logits, k, bias=bias, mask=mask, n_valid=250)
    expected = gpusoftmax.top_logprobs(through, k)
    assert np.array_equal(top.token, expected.token) and np.array_equal(top.token, largest(through, k))
    assert top.logprob.tobytes() == expected.logprob.tobytes()
    top = gpusoftmax.top_logprobs(logits, k, temperature=np.float32([1, np.nan, 1, -1]))
    assert (top.token == -1).all(axis=1).tolist() == [False, True, True, True]


@pytest.mark.parametrize("dtype", inputs.DTYPES, ids=str)
@pytest.mark.parametrize("k", [128, 129, 130, 2100])
def test_many_tokens_of_what_logits_go_through(dtype, k):
    """They are kept as a heap (kernels/cpu/largest.py)."""
    logits = np.concatenate([inputs.make(family, (2, 2100), dtype) for family in ("ties", "sorted", "masked", "flat")])
    through = {"mask": np.ones(2100, bool)}
    top = gpusoftmax.top_logprobs(logits, k, **through)
    assert np.array_equal(top.token, largest(logits, k))
    expected = gpusoftmax.token_logprobs(logits, top.token).logprob
    assert top.logprob.tobytes() == expected.tobytes()
    logits[0, 3], logits[1] = np.nan, np.nan
    top = gpusoftmax.top_logprobs(logits, k, **through)
    assert (top.token[:2] == -1).all() and np.isnan(top.logprob[:2]).all()
    assert np.array_equal(top.token[2:], largest(logits[2:], k))


def test_many_tokens_take_no_more_time_than_the_row():
    """In ascending order each logit had moved all that were kept."""
    logits, bias = np.arange(40_000, dtype=np.float32)[None], np.zeros(40_000, np.float32)
    times = {64: [], 2000: []}
    for _ in range(7):  # the first compiles
        for k, of_k in times.items():
            start = time.perf_counter()
            gpusoftmax.top_logprobs(logits, k, bias=bias)
            of_k.append(time.perf_counter() - start)
    assert min(times[2000]) < 5 * min(times[64])


def test_an_ignored_class_is_a_token_like_others():
    logits = np.array([[3.0, 2.0, 1.0] + [0.0] * 97])
    for k in (2, 100):
        top = gpusoftmax.top_logprobs(logits, k, np.array([0]), ignore_index=0)
        assert top.logprob[0, 0] == 0 and top.logprob[0, 1] < 0


class OfDlpackAlone:
    def __init__(self, array):
        self.__dlpack__, self.__dlpack_device__ = array.__dlpack__, array.__dlpack_device__


@pytest.mark.parametrize("k", [2, 100])
def test_targets_of_no_array_library(k):
    logits, tokens = inputs.make("spread", (3, 100), np.float32), np.array([5, 0, 99])
    top = gpusoftmax.top_logprobs(OfDlpackAlone(logits), k, OfDlpackAlone(tokens))
    expected = gpusoftmax.top_logprobs(logits, k, tokens)
    assert np.array_equal(top.token, expected.token) and np.array_equal(top.logprob, expected.logprob)


def test_one_row_and_no_rows(target):
    logits = inputs.make("spread", (40,), np.float32)
    top = run(target, logits, 3)
    assert top.token.shape == (3,) and top.token.tolist() == largest(logits, 3).tolist()
    assert run(target, logits.reshape(1, 40)[:0], 3).token.shape == (0, 3)
