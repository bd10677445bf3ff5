"""The edge-case table of the design for every operation: what infinities, NaN, extremes and emptiness give.

`run_all` puts one array of logits through all operations; `check_all` compares each with the oracle, which has NaN,
infinities and exact zeros where they belong. What the table says is asserted in plain words besides.
"""

from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest

import gpusoftmax
from tests import inputs, tolerances

INF, NAN = np.inf, np.nan
# Every dtype, with 5 columns: most lanes have none; 300: some lanes have one less than the others; 4200: five chunks of
# the GPU, three of the CPU.
KINDS = [("float16", 5), ("bfloat16", 300), ("bfloat16", 5), ("float32", 300), ("float32", 4200), ("float64", 300)]


class Results(NamedTuple):
    probs: np.ndarray
    log_probs: np.ndarray
    lse: np.ndarray
    loss: np.ndarray
    dlogits: np.ndarray

    def rows(self, which):
        return Results(*(part[which] for part in self))

    def bits(self):
        return [np.ascontiguousarray(part).tobytes() for part in self]


def run_all(target, logits, labels):
    x = target.array(logits)
    parts = (gpusoftmax.softmax(x), gpusoftmax.log_softmax(x), gpusoftmax.logsumexp(x))
    return Results(*(np.asarray(target.get(part)) for part in parts), *run_cross_entropy(target, logits, labels))


def run_cross_entropy(target, logits, labels, label_smoothing=0.0):
    """(loss, gradient)"""
    return target.get(
        gpusoftmax.cross_entropy_with_grad(
            target.array(logits),
            target.array(labels),
            reduction="none",
            label_smoothing=label_smoothing,
            validate=False,
        )
    )


def check_all(results, logits, labels):
    tolerances.check_softmax(results.probs, logits)
    tolerances.check_log_softmax(results.log_probs, logits)
    tolerances.check_logsumexp(results.lse, logits)
    check_cross_entropy(results.loss, results.dlogits, logits, labels)


def check_cross_entropy(loss, dlogits, logits, labels, label_smoothing=0.0):
    tolerances.check_loss(loss, logits, labels, reduction="none", label_smoothing=label_smoothing)
    tolerances.check_dlogits(dlogits, logits, labels, reduction="none", label_smoothing=label_smoothing)


def all_nan(results):
    """Of everything but logsumexp."""
    return all(np.isnan(part).all() for part in results._replace(lse=np.array([NAN], results.lse.dtype)))


def finite_rows(n_rows, n_cols, dtype):
    return inputs.make("spread", (n_rows, n_cols), dtype, seed=n_cols)


# ---------------------------------------------------------------- -inf


@pytest.mark.parametrize(("dtype", "n_cols"), [*KINDS, ("float32", 1)])
def test_row_of_minus_infinity(target, dtype, n_cols):
    logits = finite_rows(3, n_cols, dtype)
    logits[1] = -INF
    labels = np.array([0, n_cols - 1, n_cols // 2])
    results = run_all(target, logits, labels)
    check_all(results, logits, labels)
    assert all_nan(results.rows([1])) and results.lse[1] == -INF
    assert all(np.isfinite(part).all() for part in results.rows([0, 2]))


def survivors(n_cols):
    """True where a logit is finite; each row leaves a different part of the work to do."""
    columns = np.arange(n_cols)
    rows = [columns == k for k in {0, 1, n_cols // 2, n_cols - 1}]
    if n_cols < 1000:
        rows += [columns % 32 == lane for lane in range(32)]  # one lane, column by column
        rows += [columns // 4 % 32 == lane for lane in (0, 13, 31)]  # one lane of float32 vectors
        rows += [columns // 8 % 32 == lane for lane in (0, 13, 31)]  # one lane of vectors of half types
    rows += [columns // 128 % 8 == warp for warp in (0, 4, 7)]  # one warp of float32 vectors
    rows += [columns // 2048 == chunk for chunk in range(3)]  # one chunk of the CPU
    rows += [columns // 1024 == chunk for chunk in range(5)]  # one chunk of the GPU
    rows += [~row for row in rows]
    return np.array([row for row in rows if row.any()])


@pytest.mark.parametrize(("dtype", "n_cols"), [("float32", 5), ("float32", 300), ("bfloat16", 300), ("float32", 4200)])
def test_some_minus_infinity(target, dtype, n_cols):
    kept = survivors(n_cols)
    logits = np.where(kept, finite_rows(*kept.shape, dtype), np.array(-INF, dtype))
    labels = inputs.targets_unmasked(logits)
    results = run_all(target, logits, labels)
    check_all(results, logits, labels)
    assert not results.probs[~kept].any() and not results.dlogits[~kept].any()
    assert (results.log_probs[~kept] == -INF).all()
    assert all(np.isfinite(part).all() for part in (results.probs, results.lse, results.loss, results.dlogits))
    assert np.isfinite(results.log_probs[kept]).all()


def test_masked_chunks_before_a_maximum_of_any_exponent(target):
    """A chunk of nothing but -inf has an anchor too: it must not matter how far it is from that of its row."""
    logits = np.full((258, 2049), -INF, np.float32)  # two chunks of the CPU, three of the GPU
    logits[:, -1] = [*(-np.arange(256) * np.log(2)), -1e6, -1e30]
    lse, probs = target.get((gpusoftmax.logsumexp(target.array(logits)), gpusoftmax.softmax(target.array(logits))))
    assert (np.asarray(lse) == logits[:, -1]).all()
    assert (np.asarray(probs)[:, -1] == 1).all() and (np.asarray(probs)[:, :-1] == 0).all()


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.matrix)])
def test_masked_rows_of_every_structure(target, dtype):
    logits = inputs.make("masked", (11, 4200), dtype)
    labels = inputs.targets_unmasked(logits)
    check_all(run_all(target, logits, labels), logits, labels)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("n_cols", [5, 4200])
def test_logit_of_the_target_is_minus_infinity(target, n_cols, smoothing):
    """The loss is +inf. The gradient is that of any class without probability: -1 at the target."""
    logits = finite_rows(4, n_cols, "float32")
    labels = np.array([0, n_cols - 1, n_cols // 2, 1])
    logits[np.arange(3), labels[:3]] = -INF
    loss, dlogits = run_cross_entropy(target, logits, labels, smoothing)
    check_cross_entropy(loss, dlogits, logits, labels, smoothing)
    assert (loss[:3] == INF).all() and np.isfinite(loss[3])
    assert np.isfinite(dlogits).all()
    if not smoothing:
        assert (dlogits[np.arange(3), labels[:3]] == -1).all()


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
@pytest.mark.parametrize("n_cols", [5, 4200])
def test_smoothing_over_a_masked_class(target, n_cols, smoothing):
    """A share of the probability on a class that has none costs +inf, wherever it is; the gradient stays finite."""
    logits = finite_rows(6, n_cols, "float32")
    masked = [0, 1, n_cols // 2, n_cols - 2, n_cols - 1]
    logits[np.arange(5), masked] = -INF
    logits[0, 2:] = -INF
    labels = inputs.targets_unmasked(logits)
    loss, dlogits = run_cross_entropy(target, logits, labels, smoothing)
    check_cross_entropy(loss, dlogits, logits, labels, smoothing)
    assert (loss[:5] == INF).all() and np.isfinite(loss[5])
    assert np.isfinite(dlogits).all()


# ---------------------------------------------------------------- +inf and NaN


def positions(n_cols):
    return sorted({0, n_cols // 2, n_cols - 1})


@pytest.mark.parametrize(("dtype", "n_cols"), KINDS)
def test_plus_infinity(target, dtype, n_cols):
    first, middle, last = positions(n_cols)
    logits = finite_rows(8, n_cols, dtype)  # the last one stays finite
    logits[[0, 1, 2], [first, middle, last]] = INF
    logits[3, [first, last]] = INF
    logits[4] = INF
    logits[5], logits[5, middle] = -INF, INF
    logits[6, [first, last]] = INF, NAN
    labels = np.array([0, 0, n_cols - 1, 1, 0, 0, 0, 0])  # at the infinity and elsewhere
    results = run_all(target, logits, labels)
    check_all(results, logits, labels)
    assert all_nan(results.rows(slice(7)))
    assert (results.lse[:6] == INF).all() and np.isnan(results.lse[6])
    assert all(np.isfinite(part).all() for part in results.rows([7]))
    loss, dlogits = run_cross_entropy(target, logits, labels, 0.1)
    assert np.isnan(loss[:7]).all() and np.isnan(dlogits[:7]).all() and np.isfinite(loss[7])


@pytest.mark.parametrize(("dtype", "n_cols"), KINDS)
def test_nan_fills_its_row_and_no_other(target, dtype, n_cols):
    where = positions(n_cols)
    logits = finite_rows(2 * len(where) + 1, n_cols, dtype)
    labels = inputs.targets(len(logits), n_cols)
    clean = run_all(target, logits, labels)
    poisoned = logits.copy()
    poisoned[1::2][np.arange(len(where)), where] = NAN
    results = run_all(target, poisoned, labels)
    check_all(results, poisoned, labels)
    assert all_nan(results.rows(slice(1, None, 2))) and np.isnan(results.lse[1::2]).all()
    assert results.rows(slice(None, None, 2)).bits() == clean.rows(slice(None, None, 2)).bits()


@pytest.mark.parametrize("others", [0.0, -INF])
def test_nan_in_every_lane(target, others):
    """One NaN per row, among finite logits and among -inf: no maximum may swallow it."""
    logits = np.full((64, 64), others, np.float32)
    np.fill_diagonal(logits, NAN)
    results = run_all(target, logits, np.arange(64)[::-1].copy())
    assert all_nan(results) and np.isnan(results.lse).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_nan_next_to_a_masked_target(target, smoothing):
    """NaN wins over the infinite loss."""
    logits = np.array([[-INF, NAN, 1], [-INF, 1, INF], [-INF, -INF, NAN]], np.float32)
    loss, dlogits = run_cross_entropy(target, logits, np.zeros(3, np.int64), smoothing)
    assert np.isnan(loss).all() and np.isnan(dlogits).all()


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), np.dtype(np.float64)], ids=str)
@pytest.mark.parametrize("out_dtype", ["float16", "bfloat16"])
def test_any_nan_stays_a_nan_when_it_is_narrowed(dtype, out_dtype):
    """The bits that are cut off may be all that tells it from infinity, and rounding may carry out of its exponent."""
    integer = f"uint{dtype.itemsize * 8}"
    infinity = int(np.array(INF, dtype).view(integer))
    sign = 1 << (dtype.itemsize * 8 - 1)
    nans = [infinity + 1, sign + infinity + 1, sign - 1, 2 * sign - 1]  # smallest and largest payload, both signs
    logits = np.zeros((4, 40), dtype)
    logits[:, 5] = np.array(nans, integer).view(dtype)
    logits[:, -1] = logits[:, 5]  # behind the last whole vector
    assert np.isnan(gpusoftmax.softmax(logits, dtype=out_dtype)).all()


def test_backward_of_special_values(target):
    """What a masked column's -inf and a NaN row turn into on the way back."""
    logits = np.array([[0, -INF, 1, -INF], [0, NAN, 1, 2], [0, 1, 2, 3]], np.float32)
    gradient = finite_rows(3, 4, "float32")
    for forward, backward, check in (
        (gpusoftmax.softmax, gpusoftmax.softmax_backward, tolerances.check_softmax_backward),
        (gpusoftmax.log_softmax, gpusoftmax.log_softmax_backward, tolerances.check_log_softmax_backward),
    ):
        saved = forward(logits)
        dlogits = target.get(backward(target.array(saved), target.array(gradient)))
        check(dlogits, saved, gradient)
        assert np.isfinite(dlogits[[0, 2]]).all() and np.isnan(dlogits[1]).all()
        if forward is gpusoftmax.softmax:
            assert not dlogits[0, [1, 3]].any()
        else:
            assert np.array_equal(dlogits[0, [1, 3]], gradient[0, [1, 3]])


# ---------------------------------------------------------------- no rows, no columns, no axes

EMPTY = [(0,), (0, 4), (2, 0, 3), (0, 0)]


def launches(target):
    return len(target.gpu.stats) if target.name == "emulated" else 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 3)])
def test_empty_batch(target, dtype, shape):
    logits, labels = np.empty(shape, dtype), np.empty(shape[:-1], np.int64)
    results = run_all(target, logits, labels)
    x, y = target.array(logits), target.array(labels)
    backward = [target.get(f(x, x)) for f in (gpusoftmax.softmax_backward, gpusoftmax.log_softmax_backward)]
    for part in (results.probs, results.log_probs, results.dlogits, *backward):
        assert part.shape == shape and part.dtype == dtype
    for part in (results.lse, results.loss):
        assert part.shape == shape[:-1] and part.dtype == np.float32
    assert launches(target) == 0
    # As torch: the mean of no losses is NaN, their sum 0.
    assert np.isnan(target.get(gpusoftmax.cross_entropy(x, y)))
    assert target.get(gpusoftmax.cross_entropy(x, y, reduction="sum")) == 0


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 0), (2, 3, 0)])
def test_no_columns(target, shape):
    x = target.array(np.empty(shape, np.float32))
    for result in (gpusoftmax.softmax(x), gpusoftmax.log_softmax(x), gpusoftmax.softmax(x, temperature=0)):
        assert target.get(result).shape == shape and target.get(result).dtype == np.float32
    for function in (gpusoftmax.softmax_backward, gpusoftmax.log_softmax_backward):
        assert target.get(function(x, x)).shape == shape
    assert launches(target) == 0
    lse = target.get(gpusoftmax.logsumexp(x))
    assert np.shape(lse) == shape[:-1] and (np.asarray(lse) == -INF).all()
    assert target.get(gpusoftmax.logsumexp(x, keepdims=True)).shape == (*shape[:-1], 1)
    with pytest.raises(ValueError, match="0 classes"):
        gpusoftmax.cross_entropy(x, target.array(np.zeros(shape[:-1], np.int64)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_no_columns_of_many_rows_after_others(dtype):
    """What the rows before have left in scratch memory is no part of them."""
    gpusoftmax.logsumexp(np.full((40, 5), NAN, dtype))
    assert (gpusoftmax.logsumexp(np.empty((40, 0), dtype)) == -INF).all()
    gpusoftmax.soft_argmax(np.ones((40, 5), dtype))
    assert np.isnan(gpusoftmax.soft_argmax(np.empty((40, 0), dtype))).all()


@pytest.mark.parametrize("axis", [-1, None])
@pytest.mark.parametrize(
    ("value", "prob", "log_prob", "lse"),
    [(2.5, 1, 0, 2.5), (-INF, NAN, NAN, -INF), (INF, NAN, NAN, INF), (NAN, NAN, NAN, NAN)],
)
def test_array_without_axes(target, axis, value, prob, log_prob, lse):
    x = target.array(np.array(value, np.float32))
    for function, expected in (
        (gpusoftmax.softmax, prob),
        (gpusoftmax.log_softmax, log_prob),
        (gpusoftmax.logsumexp, lse),
    ):
        result = target.get(function(x, axis=axis))
        assert np.shape(result) == () and result.dtype == np.float32
        np.testing.assert_array_equal(result, np.float32(expected))
    if np.isfinite(value):
        one = target.array(np.array(3, np.float32))
        assert target.get(gpusoftmax.softmax_backward(one, one, axis=axis)) == 3 * (3 - 9)
    with pytest.raises(ValueError, match="no axis"):
        gpusoftmax.cross_entropy(x, target.array(np.array(0)))


# ---------------------------------------------------------------- extremes


def extremes(dtype):
    """Rows between the largest numbers of both signs."""
    limit = float(ml_dtypes.finfo(dtype).max)
    rows = [
        [limit, limit, limit, limit],
        [-limit, -limit, -limit, -limit],
        [limit, -limit, 0, 1],
        [-limit, -limit, -limit, -limit / 2],
        [limit, limit, -limit, -INF],
        [-limit, -INF, -INF, -INF],  # the only logit there is, far below any finite stand-in for -inf
    ]
    return np.array(rows).astype(dtype)


@pytest.mark.parametrize("dtype", inputs.DTYPES, ids=str)
def test_numbers_near_the_limit(target, dtype):
    logits = np.concatenate([extremes(dtype)[:4], inputs.make("huge", (6, 4), dtype)])
    labels = np.tile([0, 3], 5)
    check_all(run_all(target, logits, labels), logits, labels)
    labels = inputs.targets_at_max(logits)
    for smoothing in (0.1, 1.0):
        loss, dlogits = run_cross_entropy(target, logits, labels, smoothing)
        check_cross_entropy(loss, dlogits, logits, labels, smoothing)


@pytest.mark.parametrize("dtype", inputs.DTYPES, ids=str)
def test_masked_numbers_near_the_limit(target, dtype):
    logits = extremes(dtype)[4:]
    labels = np.array([1, 0])
    results = run_all(target, logits, labels)
    check_all(results, logits, labels)
    np.testing.assert_array_equal(results.probs.astype(float), [[0.5, 0.5, 0, 0], [1, 0, 0, 0]])


# 0.5: x / T overflows. 1e38: the largest gap there is becomes a small one.
@pytest.mark.parametrize("temperature", [1e-37, 0.5, 1e38])
@pytest.mark.parametrize(
    "dtype",
    [pytest.param(one, marks=pytest.mark.matrix if one == np.float16 else []) for one in inputs.DTYPES],
    ids=str,
)
def test_numbers_near_the_limit_with_temperature(target, dtype, temperature):
    logits = extremes(dtype)
    x = target.array(logits)
    probs, log_probs, lse = (
        target.get(function(x, temperature=temperature))
        for function in (gpusoftmax.softmax, gpusoftmax.log_softmax, gpusoftmax.logsumexp)
    )
    tolerances.check_softmax(probs, logits, temperature=temperature)
    tolerances.check_log_softmax(log_probs, logits, temperature=temperature)
    tolerances.check_logsumexp(lse, logits, temperature=temperature)


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e40, 1e300])
def test_temperature_beyond_the_range_of_float32(target, temperature):
    """1 / T overflows, or is 0 when rounded: still the argmax, or uniform over what is not masked."""
    logits = np.array([[1, 3, 2, -INF], [3, 3, -INF, 3]], np.float32)
    x = target.array(logits)
    third, cold = 1 / 3, temperature < 1
    probs = target.get(gpusoftmax.softmax(x, temperature=temperature))
    np.testing.assert_allclose(probs[0], [0, 1, 0, 0] if cold else [third, third, third, 0], rtol=1e-6)
    np.testing.assert_allclose(probs[1], [third, third, 0, third], rtol=1e-6)
    if cold:  # their results would depend on digits that 1 / T no longer has
        for function in (gpusoftmax.log_softmax, gpusoftmax.logsumexp):
            with pytest.raises(ValueError, match="temperature"):
                function(x, temperature=temperature)


@pytest.mark.parametrize("dtype", inputs.DTYPES, ids=str)
def test_subnormal_logits(target, dtype):
    """They count as the nearly equal numbers that they are, also next to the smallest normal one."""
    smallest = float(ml_dtypes.finfo(dtype).smallest_subnormal)
    logits = (np.array([[0, 1, 2, 3], [-3, 5, 0, -1], [1, 1, 1, 1]]) * smallest).astype(dtype)
    logits[2, 0] = ml_dtypes.finfo(dtype).tiny
    labels = np.array([0, 1, 2])
    results = run_all(target, logits, labels)
    check_all(results, logits, labels)
    if dtype != np.float16:  # whose subnormals are large enough to be seen
        np.testing.assert_allclose(results.probs.astype(float), np.full((3, 4), 0.25), rtol=1e-6)


@pytest.mark.parametrize("dtype", inputs.DTYPES, ids=str)
def test_subnormal_probabilities(target, dtype):
    """From the smallest normal number down to zero; half types are computed in float32 and lose nothing on the way."""
    info = ml_dtypes.finfo(dtype)
    lowest, highest = np.log(float(info.smallest_subnormal)) - 2, np.log(float(info.tiny)) + 2
    below = np.linspace(lowest, highest, 64)
    logits = np.zeros((2, 65))
    logits[0, 1:], logits[1, :-1] = below, below
    logits[1, -1] = 1
    logits = logits.astype(dtype)
    results = run_all(target, logits, np.array([3, 60]))
    check_all(results, logits, np.array([3, 60]))
    assert (results.probs.min(axis=1) == 0).all() and (np.count_nonzero(results.probs, axis=1) > 5).all()
    if dtype == np.float16:
        assert ((results.probs > 0) & (results.probs < info.tiny)).sum() > 20


def test_zeros_of_both_signs_tie(target):
    logits = np.array([[0.0, -0.0, -0.0, 0.0], [-1.0, -0.0, 0.0, -1.0]], np.float32)
    labels = np.array([1, 1])
    results = run_all(target, logits, labels)
    check_all(results, logits, labels)
    assert (results.probs[0] == 0.25).all() and results.probs[1, 1] == results.probs[1, 2]
    assert results.loss[0] == np.float32(np.log(4))
