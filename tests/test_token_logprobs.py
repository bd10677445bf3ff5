"""token_logprobs and its gradient: every field within its bound on every target; several targets, options, edges."""

import itertools
import math

import numpy as np
import pytest

import gpusoftmax
from tests import inputs, oracle, tolerances
from tests.calls import EVERY_FIELD

N_COLS = [
    1,  # one token: logprob 0, entropy 0
    31,  # less than a warp, less than a vector strip
    300,  # rows of a few vectors, in blocks on the CPU
    4099,  # five chunks of the GPU, three of the CPU; rows of 16-byte vectors never align
]
# The others take the same paths with other conversions: each is a dozen kernels to compile.
DTYPES = [
    np.dtype(np.float32),
    inputs.BFLOAT16,
    *(pytest.param(np.dtype(dtype), marks=pytest.mark.matrix) for dtype in (np.float16, np.float64)),
]
ROW_DTYPE = {"float16": "float32", "bfloat16": "float32", "float32": "float32", "float64": "float64"}


def run(target, logits, tokens, **options):
    """All fields as NumPy arrays; None for those that were not asked for."""
    scores = gpusoftmax.token_logprobs(target.array(logits), target.array(tokens), **options)
    assert isinstance(scores, gpusoftmax.TokenLogprobs)
    return gpusoftmax.TokenLogprobs(*(None if part is None else np.asarray(target.get(part)) for part in scores))


def run_backward(target, logits, tokens, dlogprob, dentropy=None, **options):
    given = [None if array is None else target.array(array) for array in (logits, tokens, dlogprob, dentropy)]
    return target.get(gpusoftmax.token_logprobs_backward(*given, **options))


def check(scores, logits, tokens, temperature=1.0, ignore_index=-100):
    options = {"temperature": temperature, "ignore_index": ignore_index}
    _, _, _, rank, argmax = oracle.token_logprobs(logits, tokens, **options)
    tokens = np.reshape(tokens, (len(logits), -1))
    logprob = scores.logprob.reshape(tokens.shape)
    for j in range(tokens.shape[1]):
        tolerances.check_loss(-logprob[:, j], logits, tokens[:, j], reduction="none", **options)
    assert not (logprob > 0).any()
    tolerances.check_logsumexp(scores.lse, logits, temperature=temperature)
    tolerances.check_entropy(scores.entropy, logits, temperature=temperature)
    assert not (scores.entropy < 0).any()
    assert np.array_equal(scores.rank.reshape(tokens.shape), rank)
    assert np.array_equal(scores.argmax, argmax)


def mixed_tokens(logits):
    """By turns a token that is not masked, the most likely one, and any: it may be masked."""
    kinds = [inputs.targets_unmasked(logits), inputs.targets_at_max(logits), inputs.targets(*logits.shape)]
    return np.choose(np.arange(len(logits)) % 3, kinds)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_cols", N_COLS)
def test_matches_oracle(target, dtype, n_cols):
    logits = inputs.every_family(2, n_cols, dtype, seed=n_cols)
    scores = run(target, logits, mixed_tokens(logits), **EVERY_FIELD)
    assert {part.dtype.name for part in scores} == {ROW_DTYPE[dtype.name], "int64"}
    check(scores, logits, mixed_tokens(logits))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_cols", [31, 4099])
def test_same_bits_as_the_single_operations(target, dtype, n_cols):
    logits = inputs.every_family(1, n_cols, dtype)
    tokens, row_dtype = mixed_tokens(logits), ROW_DTYPE[dtype.name]
    scores = run(target, logits, tokens, **EVERY_FIELD)
    x = target.array(logits)
    log_probs = target.get(gpusoftmax.log_softmax(x, dtype=row_dtype))
    assert scores.logprob.tobytes() == np.take_along_axis(log_probs, tokens[:, None], 1).tobytes()
    assert scores.lse.tobytes() == target.get(gpusoftmax.logsumexp(x)).tobytes()
    loss = target.get(gpusoftmax.cross_entropy(x, target.array(tokens), reduction="none"))
    assert np.array_equal(scores.logprob, -loss, equal_nan=True)


@pytest.mark.parametrize("wanted", [*itertools.combinations(EVERY_FIELD, 1), (), tuple(EVERY_FIELD)[1:3]])
def test_fields_do_not_depend_on_each_other(target, wanted):
    logits, tokens = inputs.make("spread", (3, 2500), np.float32), np.array([7, 2499, 1030])
    everything = run(target, logits, tokens, **EVERY_FIELD)
    scores = run(target, logits, tokens, **dict.fromkeys(wanted, True))
    for name, part in scores._asdict().items():
        if name == "logprob" or f"return_{name}" in wanted:
            assert part.tobytes() == getattr(everything, name).tobytes()
        else:
            assert part is None


# 1e-37: everything but the maximum vanishes. 1e30: uniform, whatever the logits are.
@pytest.mark.parametrize("temperature", [1e-37, 0.7, 3.0, 1e30])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_temperature(target, dtype, temperature):
    logits = inputs.every_family(2, 300, dtype)
    tokens = mixed_tokens(logits)
    check(run(target, logits, tokens, temperature=temperature, **EVERY_FIELD), logits, tokens, temperature)


# ---------------------------------------------------------------- several targets


@pytest.mark.parametrize(("n_cols", "count"), [(31, 3), (300, 1), (2500, 5), (300, 40)])
def test_several_targets(target, n_cols, count):
    """Each as if it were the only one; the same token may come twice."""
    logits = inputs.make("spread", (5, n_cols), np.float32)
    tokens = np.random.default_rng(0).integers(0, n_cols, (5, count))
    tokens[1], tokens[2, -1] = tokens[1, 0], -100
    scores = run(target, logits, tokens, **EVERY_FIELD)
    check(scores, logits, tokens)
    assert scores.logprob.shape == scores.rank.shape == (5, count) and scores.entropy.shape == (5,)
    for j in (0, count - 1):
        alone = run(target, logits, tokens[:, j], **EVERY_FIELD)
        assert alone.logprob.tobytes() == scores.logprob[:, j].tobytes()
        assert np.array_equal(alone.rank, scores.rank[:, j])
    without_rank = run(target, logits, tokens)
    assert without_rank.logprob.tobytes() == scores.logprob.tobytes()


def test_no_targets(target):
    logits, tokens = inputs.make("spread", (3, 40), np.float32), np.empty((3, 0), np.int64)
    scores = run(target, logits, tokens, **EVERY_FIELD)
    assert scores.logprob.shape == scores.rank.shape == (3, 0)
    tolerances.check_entropy(scores.entropy, logits)


def test_layout_of_targets_and_axis(target):
    """(N, V, L) logits, as torch lays them out, with two targets for each place."""
    logits = inputs.make("spread", (2, 40, 3), np.float32)
    tokens = np.random.default_rng(1).integers(0, 40, (2, 2, 3)).transpose(0, 2, 1)  # strides of their own
    scores = run(target, logits, tokens, axis=1, **EVERY_FIELD)
    assert scores.logprob.shape == (2, 3, 2) and scores.lse.shape == (2, 3)
    rows = np.ascontiguousarray(logits.transpose(0, 2, 1)).reshape(6, 40)
    flat = gpusoftmax.TokenLogprobs(*(part.reshape(6, *part.shape[2:]) for part in scores))
    check(flat, rows, tokens.reshape(6, 2))


def test_one_row(target):
    logits = inputs.make("spread", (40,), np.float32)
    scores = run(target, logits, np.array(3), **EVERY_FIELD)
    assert {part.shape for part in scores} == {()}
    several = run(target, logits, np.array([3, 5]))
    assert several.logprob.shape == (2,) and several.logprob[0] == scores.logprob


# ---------------------------------------------------------------- edge cases


def test_masked_and_special_rows(target):
    logits = np.zeros((6, 1500), np.float32)
    logits[0] = -np.inf
    logits[1, 1100] = np.inf
    logits[2, 1499] = np.nan
    logits[3, :1499] = -np.inf  # one token is left
    logits[4, 5] = np.nan
    logits[4, 7] = np.inf
    tokens = np.array([3, 1100, 3, 1499, 7, 0])
    scores = run(target, logits, tokens, **EVERY_FIELD)
    nan, inf = np.nan, np.inf
    np.testing.assert_array_equal(scores.logprob[:5], [nan, nan, nan, 0, nan])
    np.testing.assert_array_equal(scores.lse[:5], [-inf, inf, nan, 0, nan])
    np.testing.assert_array_equal(scores.entropy[:5], [nan, nan, nan, 0, nan])
    assert scores.rank.tolist() == [-1, -1, -1, 1, -1, 1]
    assert scores.argmax.tolist() == [0, 1100, -1, 1499, -1, 0]
    assert scores.entropy[5] == pytest.approx(math.log(1500), rel=1e-6)


@pytest.mark.parametrize(("largest", "temperature"), [(3.4e38, 1.0), (5.0, 1e-38)])
def test_chunks_further_apart_than_the_largest_number(target, largest, temperature):
    """Their exponentials are 0, and so is what their distances add to the entropy."""
    logits = np.full((2, 4099), -largest, np.float32)
    logits[:, 1] = largest
    logits[1, 4098] = 0
    tokens, dentropy = np.array([1, 1]), np.ones(2, np.float32)
    scores = run(target, logits, tokens, temperature=temperature, **EVERY_FIELD)
    assert (scores.entropy == 0).all() and (scores.logprob == 0).all()
    got = run_backward(target, logits, tokens, np.ones(2, np.float32), dentropy, temperature=temperature)
    assert (got == 0).all()


def test_every_placement_of_masks_is_finite(target):
    logits = inputs.make("masked", (11, 4099), np.float32)  # one row for each structure
    tokens = inputs.targets_unmasked(logits)
    scores = run(target, logits, tokens, **EVERY_FIELD)
    assert np.isfinite(scores.logprob).all() and np.isfinite(scores.entropy).all()
    check(scores, logits, tokens)


def test_ties_take_the_first_column_and_the_best_rank(target):
    logits = np.zeros((4, 5000), np.float32)
    logits[1, [4999, 70, 3000]] = 2
    logits[2, [1024, 1023]] = 1
    logits[3, 2048:] = -0.0  # equal to 0
    scores = run(target, logits, np.array([4999, 4999, 0, 4000]), return_rank=True, return_argmax=True)
    assert scores.argmax.tolist() == [0, 70, 1023, 0]
    assert scores.rank.tolist() == [1, 1, 3, 1]


def test_ignored_and_bad_targets(target):
    logits = inputs.make("spread", (4, 300), np.float32)
    logits[1] = np.nan
    tokens = np.array([299, -100, 300, -1])
    scores = run(target, logits, tokens, validate=False, **EVERY_FIELD)
    np.testing.assert_array_equal(scores.logprob[1:], [0, np.nan, np.nan])
    assert scores.rank.tolist()[1:] == [-1, -1, -1]
    assert np.isfinite(scores.entropy[[0, 2, 3]]).all()  # they are the row's
    with pytest.raises(IndexError, match=r"target\[2\] .* is 300, expected a class from 0 to 299"):
        run(target, logits, tokens, validate=True)


def test_uniform_row_has_the_largest_entropy(target):
    for n_cols in (2, 1000, 4099):
        scores = run(target, np.full((1, n_cols), 3.25, np.float32), np.array([0]), return_entropy=True)
        assert scores.entropy[0] == pytest.approx(math.log(n_cols), rel=1e-6)
        assert scores.entropy[0] == -scores.logprob[0]


def test_empty_batch(target):
    scores = run(target, np.empty((0, 7), np.float32), np.empty(0, np.int64), **EVERY_FIELD)
    assert all(part.shape == (0,) for part in scores)


# ---------------------------------------------------------------- the gradient


def gradients(logits, seed=0):
    rng = np.random.default_rng(seed)
    dtype = ROW_DTYPE[logits.dtype.name]
    return rng.standard_normal(len(logits)).astype(dtype), rng.standard_normal(len(logits)).astype(dtype)


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_cols", N_COLS)
def test_gradient_matches_oracle(target, dtype, n_cols, with_entropy):
    logits = inputs.every_family(1, n_cols, dtype, seed=n_cols)
    tokens, (dlogprob, dentropy) = mixed_tokens(logits), gradients(logits)
    tokens[2] = -100
    dentropy = dentropy if with_entropy else None
    got = run_backward(target, logits, tokens, dlogprob, dentropy)
    assert got.dtype == logits.dtype
    tolerances.check_token_logprobs_backward(got, logits, tokens, dlogprob, dentropy)
    if not with_entropy:
        assert not got[2].any()


@pytest.mark.parametrize("temperature", [0.7, 3.0])
def test_gradient_with_temperature(target, temperature):
    logits = inputs.every_family(1, 2500, np.float32)
    tokens, (dlogprob, dentropy) = mixed_tokens(logits), gradients(logits)
    got = run_backward(target, logits, tokens, dlogprob, dentropy, temperature=temperature)
    tolerances.check_token_logprobs_backward(got, logits, tokens, dlogprob, dentropy, temperature=temperature)


@pytest.mark.parametrize(("n_rows", "n_cols"), [(3, 31), (40, 31), (3, 300), (40, 300), (2, 2500)])
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.matrix)])
def test_gradient_of_several_targets(target, dtype, n_rows, n_cols):
    logits = inputs.make("spread", (n_rows, n_cols), dtype)
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, n_cols, (n_rows, 4))
    tokens[0], tokens[1, 1:3] = tokens[0, 0], -100
    dlogprob, (_, dentropy) = rng.standard_normal((n_rows, 4)).astype(np.float32), gradients(logits)
    for slope in (None, dentropy):
        got = run_backward(target, logits, tokens, dlogprob, slope)
        tolerances.check_token_logprobs_backward(got, logits, tokens, dlogprob, slope)


def test_gradient_by_finite_differences():
    logits = inputs.make("spread", (3, 12), np.float64)
    tokens, (dlogprob, dentropy) = np.array([0, 5, 11]), gradients(logits)

    def value(x):
        scores = gpusoftmax.token_logprobs(x, tokens, temperature=0.8, return_entropy=True)
        return (scores.logprob * dlogprob).sum() + (scores.entropy * dentropy).sum()

    got = gpusoftmax.token_logprobs_backward(logits, tokens, dlogprob, dentropy, temperature=0.8)
    for place in np.ndindex(logits.shape):
        step = np.zeros_like(logits)
        step[place] = 1e-5
        assert got[place] == pytest.approx((value(logits + step) - value(logits - step)) / 2e-5, abs=1e-8)


def test_gradient_of_the_entropy_alone(target):
    logits = inputs.make("spread", (3, 300), np.float32)
    tokens, (_, dentropy) = np.array([1, 2, 3]), gradients(logits)
    got = run_backward(target, logits, tokens, None, dentropy)
    tolerances.check_token_logprobs_backward(got, logits, tokens, np.zeros(3), dentropy)
    with pytest.raises(ValueError, match="expected at least one of the gradients"):
        run_backward(target, logits, tokens, None)


def test_gradients_of_any_stride_and_in_place(target):
    logits, tokens = inputs.make("spread", (6, 2500), np.float32), np.array([1, 2, 3, 4, 5, -100])
    ones = np.broadcast_to(np.float32(1), 6)
    expected = run_backward(target, logits, tokens, np.ones(6, np.float32), np.ones(6, np.float32))
    place = target.array(logits.copy())
    got = gpusoftmax.token_logprobs_backward(
        place, target.array(tokens), target.array(ones), target.array(ones), out=place
    )
    assert got is place and target.get(got).tobytes() == expected.tobytes()


def test_gradient_in_another_dtype_is_converted():
    logits, tokens = inputs.make("spread", (3, 40), np.float16), np.array([1, 2, 3])
    dlogprob, dentropy = (part.astype(np.float64) for part in gradients(logits))
    got = gpusoftmax.token_logprobs_backward(logits, tokens, dlogprob, dentropy)
    tolerances.check_token_logprobs_backward(
        got, logits, tokens, dlogprob.astype(np.float32), dentropy.astype(np.float32)
    )


def test_ignored_rows_have_no_gradient_whatever_they_hold(target):
    logits = inputs.make("spread", (4, 40), np.float32)
    logits[1:3] = [[np.nan], [np.inf]]
    got = run_backward(target, logits, np.array([1, -100, -100, 2]), np.full(4, np.nan, np.float32))
    assert not got[1:3].any() and np.isnan(got[[0, 3]]).all()


def test_shapes_that_do_not_match():
    logits = np.zeros((3, 4), np.float32)
    with pytest.raises(ValueError, match=r"target has shape \(4,\), expected \(3,\) or \(3, 'K'\) to match logits"):
        gpusoftmax.token_logprobs(logits, np.zeros(4, int))
    with pytest.raises(ValueError, match=r"dlogprob has shape \(3, 1\), expected \(3,\) to match"):
        gpusoftmax.token_logprobs_backward(logits, np.zeros(3, int), np.zeros((3, 1)))
