"""kl_div and its gradients: within the promised bounds on every target, in every dtype and awkward shape."""

import numpy as np
import pytest

import gpusoftmax
from gpusoftmax.kernels.cuda import plan
from tests import inputs, oracle, tolerances
from tests.emulator import emulated_gpu
from tests.test_regimes import force

INF, NAN = np.inf, np.nan
# One class; less than a warp, less than a vector strip; one more than the smallest block holds; five chunks of the GPU,
# three of the CPU, and rows of 16-byte vectors never align.
N_COLS = (1, 31, 513, 4099)
matrix = pytest.mark.matrix
CASES = [
    pytest.param(dtype, n_cols, marks=[matrix] if dtype == "bfloat16" else [])  # test_bits and test_regimes have it
    for dtype in ("float16", "bfloat16", "float32", "float64")
    for n_cols in N_COLS
]


def pairs(n_cols, dtype, seed=0):
    """(logits, target_logits): unrelated ones of every family, and targets that are ever nearer to the logits."""
    one, two = (inputs.every_family(2, n_cols, dtype, seed + k) for k in range(2))
    three = inputs.every_family(3, n_cols, dtype, seed + 2, without=("huge", "masked"))
    noise = np.random.default_rng(seed).standard_normal(three.shape)
    nearness = np.resize([0.3, 1e-2, 1e-4], (len(three), 1))
    near = (three.astype(np.float64) + nearness * noise).astype(dtype)
    return np.concatenate([one, three]), np.concatenate([two, near])


def kl_div(target, x, y, **options):
    return np.asarray(target.get(gpusoftmax.kl_div(target.array(x), target.array(y), **options)))


def with_grads(target, x, y, **options):
    given = {name: target.array(value) if isinstance(value, np.ndarray) else value for name, value in options.items()}
    return target.get(gpusoftmax.kl_div_with_grad(target.array(x), target.array(y), **given))


@pytest.mark.parametrize(("dtype", "n_cols"), CASES)
def test_matches_oracle(target, dtype, n_cols):
    x, y = pairs(n_cols, dtype, seed=n_cols)
    loss, dlogits, dtarget = with_grads(target, x, y, reduction="none", target_grad=True)
    assert loss.dtype == ("float64" if dtype == "float64" else "float32")
    assert dlogits.dtype == dtarget.dtype == x.dtype
    tolerances.check_kl_div(loss, x, y, reduction="none")
    tolerances.check_kl_div_grads(dlogits, dtarget, x, y, reduction="none")
    assert (loss[~np.isnan(loss)] >= 0).all()


def test_the_divergence_alone_has_the_same_bits(target):
    for shape in ((20, 31), (3, 513)):
        x, y = inputs.make("spread", shape, "float32"), inputs.make("spread", shape, "float32", seed=1)
        loss, _, none = with_grads(target, x, y, reduction="none")
        assert none is None and kl_div(target, x, y, reduction="none").tobytes() == loss.tobytes()


# 1e-37: the maxima alone. 1e30: all columns alike.
@pytest.mark.parametrize("temperature", [1e-37, 3.0, pytest.param(1e30, marks=matrix)])
def test_temperature(target, temperature):
    x, y = pairs(513, "float32")
    loss, dlogits, dtarget = with_grads(
        target, x, y, reduction="none", temperature=temperature, target_grad=True, grad_scale=temperature
    )
    tolerances.check_kl_div(loss, x, y, reduction="none", temperature=temperature)
    options = {"reduction": "none", "temperature": temperature, "grad_scale": temperature}
    tolerances.check_kl_div_grads(dlogits, dtarget, x, y, **options)


@pytest.mark.parametrize("n_cols", [5, 4200])
def test_special_values(target, n_cols):
    """One row alone is touched by each; nothing is left of a class that neither allows."""
    x, y = inputs.make("spread", (12, n_cols), np.float32), inputs.make("spread", (12, n_cols), np.float32, seed=1)
    x[0, 1], y[1, 2], x[2, 0], y[3, -1] = NAN, NAN, INF, INF
    x[4], y[5], x[6], y[6] = -INF, -INF, -INF, -INF
    x[7, 1] = -INF  # which the target allows: infinite
    y[8, 1] = -INF  # which the logits allow: finite
    x[9, 2] = y[9, 2] = -INF
    y[10, 1], x[10, 1] = -1e5, -INF  # so unlikely that it is as good as not allowed
    loss, dlogits, dtarget = with_grads(target, x, y, reduction="none", target_grad=True)
    tolerances.check_kl_div(loss, x, y, reduction="none")
    tolerances.check_kl_div_grads(dlogits, dtarget, x, y, reduction="none")
    assert np.isnan(loss[:7]).all() and np.isposinf(loss[7]) and np.isfinite(loss[8:]).all()
    assert np.isnan(dlogits[:7]).all() and np.isfinite(dlogits[7:]).all() and np.isnan(dtarget[7]).all()
    assert dtarget[8, 1] == dtarget[9, 2] == dlogits[9, 2] == 0 < dlogits[8, 1]


def test_equal_rows_have_no_divergence(target):
    x, _ = pairs(513, "float32")
    x = x[np.isfinite(x).all(axis=1)]
    loss, dlogits, dtarget = with_grads(target, x, x.copy(), target_grad=True)
    assert loss == 0 and not dlogits.any() and not dtarget.any()


def test_a_constant_is_no_divergence(target):
    """Exactly representable ones: nothing is lost of the differences."""
    y = np.round(inputs.make("spread", (4, 513), np.float32) * 64) / 64
    x = y + np.float32([[1], [-300], [4096], [0.25]])
    assert (kl_div(target, x, y, reduction="none") <= 1e-12).all()
    y = y + np.float32(1e-3) * inputs.make("spread", y.shape, np.float32, seed=1)
    tolerances.check_kl_div(kl_div(target, x, y, reduction="none"), x, y, reduction="none")


WEIGHTS = np.float32([0.5, 0, 2, 1, 0, 3])


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("n_cols", [31, 1100])
def test_weights_of_rows(target, reduction, n_cols):
    """A row of weight 0 is not read: it may hold anything."""
    x, y = (inputs.make("spread", (6, n_cols), np.float32, seed) for seed in (0, 1))
    x[1], y[4, 3] = NAN, INF
    options = {"row_weight": WEIGHTS, "reduction": reduction, "grad_scale": 1.5}
    loss, dlogits, dtarget = with_grads(target, x, y, target_grad=True, **options)
    x[1], y[4, 3] = 0, 0
    tolerances.check_kl_div_grads(dlogits, dtarget, x, y, **options)
    tolerances.check_kl_div(loss, x, y, row_weight=WEIGHTS, reduction=reduction)
    assert not dlogits[[1, 4]].any() and not dtarget[[1, 4]].any()


def test_mean_divides_by_rows_weights_or_normalizer(target):
    x, y = (inputs.make("spread", (6, 31), np.float32, seed) for seed in (0, 1))
    rows = oracle.kl_div(x, y, reduction="none")
    for options, divisor in (
        ({}, 6),
        ({"row_weight": WEIGHTS}, 6.5),
        ({"normalizer": 40}, 40),
        ({"row_weight": WEIGHTS, "normalizer": target.array(np.float64([16]))}, 16),
        ({"normalizer": target.array(np.float32(16))}, 16),
    ):
        weights = options.get("row_weight", np.ones(6))
        given = {**options, "row_weight": target.array(WEIGHTS)} if "row_weight" in options else options
        loss, dlogits, _ = target.get(gpusoftmax.kl_div_with_grad(target.array(x), target.array(y), **given))
        np.testing.assert_allclose(loss, (weights * rows).sum() / divisor, rtol=1e-6)
        plain = {"row_weight": weights, "normalizer": divisor}
        tolerances.check_kl_div_grads(dlogits, None, x, y, **plain)


def test_a_mean_of_nothing():
    nothing, x = np.zeros((0, 3), np.float32), np.zeros((2, 3), np.float32)
    assert np.isnan(gpusoftmax.kl_div(nothing, nothing)) and gpusoftmax.kl_div(nothing, nothing, reduction="sum") == 0
    loss, dlogits, _ = gpusoftmax.kl_div_with_grad(x, x + 1, row_weight=x[:, 0])
    assert np.isnan(loss) and not dlogits.any()


def test_float64_weights_of_float32_rows_are_those_of_float32():
    x, y = (inputs.make("spread", (6, 31), np.float32, seed) for seed in (0, 1))
    assert gpusoftmax.kl_div(x, y, row_weight=WEIGHTS.astype(float)) == gpusoftmax.kl_div(x, y, row_weight=WEIGHTS)
    assert gpusoftmax.kl_div(x[0], y[0], row_weight=np.float64(2)) == 2 * gpusoftmax.kl_div(x[0], y[0]) / 2


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_axes(target, axis):
    x, y = (inputs.make("spread", (4, 3, 40), np.float32, seed) for seed in (0, 1))
    weights = np.random.default_rng(0).random(np.delete(x.shape, axis), np.float32)
    options = {"axis": axis, "row_weight": weights, "reduction": "none"}
    loss, dlogits, dtarget = with_grads(target, x, y, target_grad=True, **options)
    tolerances.check_kl_div(loss, x, y, **options)
    tolerances.check_kl_div_grads(dlogits, dtarget, x, y, **options)


@pytest.mark.parametrize("place", ["logits", "target_logits"])
@pytest.mark.parametrize("n_cols", [31, pytest.param(1027, marks=matrix)])
def test_in_place(target, place, n_cols):
    x, y = (inputs.make("spread", (20, n_cols), np.float32, seed) for seed in (0, 1))
    expected = with_grads(target, x, y, target_grad=True)
    given = {"logits": target.array(x.copy()), "target_logits": target.array(y.copy())}
    found = gpusoftmax.kl_div_with_grad(**given, target_grad=True, out=given[place])
    assert found.dlogits is given[place]
    for one, other in zip(target.get(found), expected, strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.mark.parametrize("n_cols", [4099, 8192])
def test_in_place_where_rows_are_read_again(monkeypatch, n_cols):
    """What a piece writes may not be what another one has still to read, wherever rows begin."""
    x, y = (inputs.make("spread", (2, n_cols), np.float32, seed) for seed in (0, 1))
    expected = gpusoftmax.kl_div_with_grad(x, y, reduction="none", target_grad=True)
    force(monkeypatch, cluster=1, warps=2, slots=1)
    with emulated_gpu("sm_90", track=False) as gpu:
        logits, target_logits = gpu.array(x), gpu.array(y)
        found = gpusoftmax.kl_div_with_grad(logits, target_logits, reduction="none", target_grad=True)
        assert gpu.stats[-1].plan.split.slots == 1
        apart = gpu.get(found)
        beside = gpu.get(gpusoftmax.kl_div_with_grad(logits, target_logits, reduction="none", out=logits))
    tolerances.check_kl_div_grads(apart.dlogits, apart.dtarget_logits, x, y, reduction="none")
    np.testing.assert_allclose(apart.loss, expected.loss, rtol=1e-5)
    assert beside.loss.tobytes() == apart.loss.tobytes() and beside.dlogits.tobytes() == apart.dlogits.tobytes()


@pytest.mark.parametrize("out_dtype", [pytest.param(dtype, marks=matrix) for dtype in ("bfloat16", "float64")])
def test_dtype_of_the_gradient(out_dtype):
    x, y = (inputs.make("spread", (4, 300), np.float32, seed) for seed in (0, 1))
    out = np.empty(x.shape, inputs.BFLOAT16 if out_dtype == "bfloat16" else out_dtype)
    assert gpusoftmax.kl_div_with_grad(x, y, out=out).dlogits is out
    tolerances.check_kl_div_grads(out, None, x, y)


def test_gradients_are_the_derivatives(target):
    """Central differences, of the oracle: gradients in float32."""
    temperature = 0.7
    x, y = (inputs.make("spread", (2, 31), np.float32, seed) / np.float32(3) for seed in (0, 1))
    _, dlogits, dtarget = with_grads(target, x, y, temperature=temperature, target_grad=True)
    step = np.longdouble(1e-6)
    for col in (0, 17):
        moved = np.zeros(x.shape, np.longdouble)
        moved[:, col] = step
        for one, sides in ((dlogits, (moved, 0)), (dtarget, (0, moved))):
            ends = [
                oracle.kl_div(x + sign * sides[0], y + sign * sides[1], temperature=temperature, reduction="none")
                for sign in (1, -1)
            ]
            np.testing.assert_allclose(one[:, col], (ends[0] - ends[1]) / (2 * step) / 2, rtol=1e-4, atol=1e-8)


def test_chunks_of_several_pieces(monkeypatch):
    """Rows too long for one piece in each chunk, made short by a smaller limit, held and read again."""
    monkeypatch.setattr(plan, "MAX_CHUNKS", 4)
    plan.tree_of.cache_clear()
    plan.row_plan.cache_clear()
    try:
        x, y = (inputs.make("spread", (2, 9 * 1024 + 3), np.float32, seed) for seed in (0, 1))
        results = []
        for slots in (None, 3):
            if slots:
                force(monkeypatch, cluster=1, warps=2, slots=slots)
            with emulated_gpu("sm_90", track=False) as gpu:
                given = gpu.array(x), gpu.array(y)
                results.append(gpu.get(gpusoftmax.kl_div_with_grad(*given, reduction="none", target_grad=True)))
                assert gpu.stats[-1].plan.split.piece_bits == 2
    finally:
        plan.tree_of.cache_clear()
        plan.row_plan.cache_clear()
    tolerances.check_kl_div(results[0].loss, x, y, reduction="none")
    tolerances.check_kl_div_grads(results[0].dlogits, results[0].dtarget_logits, x, y, reduction="none")
    for one, other in zip(*results, strict=True):
        assert one.tobytes() == other.tobytes()
