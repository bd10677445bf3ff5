"""linear_cross_entropy with all that cross_entropy has more than torch: by definition, and bit for bit beside it.

Options come in a pairwise covering set. Each transform of the logits is kernels to compile, and so is each dtype: by
default one of the transforms in float64, and float32 without, as other tests have it; the rest under the marker
`matrix`.
"""

import tracemalloc

import numpy as np
import pytest

import gpusoftmax
from gpusoftmax import CrossEntropy, linear_cross_entropy, linear_cross_entropy_with_grad
from tests import inputs, oracle
from tests.calls import Untouched, same_bits
from tests.test_full_cross_entropy import covering_cases
from tests.test_linear_cross_entropy import exact_problem, problem

MATRIX = pytest.mark.matrix
TELL = {"return_z_loss": True, "return_lse": True, "return_correct": True}

WEIGHT = [False, True]
ROW_WEIGHT = [None, "row", "row, some 0"]
SMOOTHING = [0.0, 0.1]
Z_LOSS = [0.0, 0.01]
REDUCTION = ["none", "sum", "mean", "mean of a number", "mean of an array"]
THROUGH = [(1.0, None), (1.7, None), (1.0, 4.0), (0.6, 3.0)]  # temperature, softcap
CHUNK = [None, 1, 7, 1000]
SCALE = ["1", "a number", "rows"]
CASES = [
    pytest.param(case, marks=[] if case[5] == THROUGH[3] else MATRIX, id="-".join(map(str, case)))
    for case in covering_cases([WEIGHT, ROW_WEIGHT, SMOOTHING, Z_LOSS, REDUCTION, THROUGH, CHUNK, SCALE])
]
N_ROWS, N_FEATURES, N_CLASSES = 29, 16, 57
NORMALIZER = 12.5


def wide(dtype):
    return np.float64 if dtype == "float64" else np.float32


def options_of(case, dtype):
    """(options of the call, what the gradients are multiplied by)"""
    has_weight, row_weight, smoothing, z_loss, reduction, (temperature, softcap), chunk_size, scale = case
    rng = np.random.default_rng(2)
    of_rows = rng.uniform(0.1, 3, N_ROWS)
    if row_weight == "row, some 0":
        of_rows[rng.random(N_ROWS) < 0.3] = 0
    scale = {"1": 1.0, "a number": -0.5, "rows": rng.standard_normal(N_ROWS).astype(wide(dtype))}[scale]
    normalizers = {"mean of a number": NORMALIZER, "mean of an array": np.array([NORMALIZER])}
    return {
        "weight": np.linspace(0, 2, N_CLASSES).astype(wide(dtype)) if has_weight else None,
        "row_weight": None if row_weight is None else of_rows.astype(wide(dtype)),
        "label_smoothing": smoothing, "z_loss": z_loss, "temperature": temperature, "softcap": softcap,
        "reduction": reduction[:4], "normalizer": normalizers.get(reduction), "chunk_size": chunk_size,
    }, scale  # fmt: skip


def expected(x, linear_weight, target, bias, options, scale):
    """(CrossEntropy, gradients, what each of these is as large as) by definition, in extended precision."""
    x, layer, bias = (array.astype(np.longdouble) for array in (x, linear_weight, bias))
    temperature, softcap = options["temperature"], options["softcap"]
    z, slope = (x @ layer.T + bias) / temperature, 1 / temperature
    if softcap is not None:
        z = softcap * np.tanh(z / softcap)
        slope = slope * (1 - (z / softcap) ** 2)
    own = {name: options[name] for name in ("row_weight", "label_smoothing", "z_loss")}
    full = oracle.full_cross_entropy(z, target, options["weight"], **own)
    divisor = np.longdouble(1)
    if options["reduction"] == "mean":
        divisor = np.longdouble(NORMALIZER) if options["normalizer"] is not None else counted(target, options)
    loss, z_loss = full.loss, full.z_loss
    if options["reduction"] != "none":
        loss, z_loss = loss.sum() / divisor, z_loss.sum() / divisor
    dlogits = full.dlogits * slope * np.reshape(scale, (-1, 1)) / divisor
    factors = layer, x, np.ones((len(x), 1))
    gradients = [dlogits @ factors[0], *(dlogits.T @ factor for factor in factors[1:])]
    sizes = [np.abs(dlogits) @ np.abs(factors[0]), *(np.abs(dlogits).T @ np.abs(factor) for factor in factors[1:])]
    return CrossEntropy(loss, z_loss, full.lse, full.n_correct), gradients, [one.max() for one in sizes]


def counted(target, options):
    each = np.where(target == -100, 0, np.ones(len(target), np.longdouble))
    if options["row_weight"] is not None:
        each = each * options["row_weight"]
    return (each if options["weight"] is None else each * options["weight"][np.maximum(target, 0)]).sum()


def close(got, want, tolerance):
    assert np.abs(got.astype(np.longdouble) - want).max() <= tolerance


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("dtype", "unit"),
    [("float64", 1e-13)]
    + [pytest.param(*one, marks=MATRIX) for one in (("float32", 1e-6), ("bfloat16", 1e-6), ("float16", 1e-6))],
)
def test_options(case, dtype, unit):
    check(case, dtype, unit)


def check(case, dtype, unit):
    """Half types are as accurate as float32, but that the gradients are rounded in the end."""
    x, linear_weight, target, bias = problem(N_ROWS, N_FEATURES, N_CLASSES, dtype)
    options, scale = options_of(case, dtype)
    result = linear_cross_entropy_with_grad(
        x, linear_weight, target, linear_bias=bias, grad_scale=scale, **options, **TELL
    )
    told, gradients, sizes = expected(x, linear_weight, target, bias, options, scale)
    for name in ("loss", "z_loss", "lse"):
        want = np.asarray(getattr(told, name))
        got = getattr(result.loss, name)
        assert got.dtype == wide(dtype) and got.shape == want.shape
        close(got, want, 10 * unit * max(1, np.abs(want).max()))
    assert result.loss.n_correct.dtype == np.int64 and result.loss.n_correct == told.n_correct
    rounding = {"bfloat16": 2.0**-8, "float16": 2.0**-11}.get(dtype, 0)
    for got, want, size in zip(result[1:], gradients, sizes, strict=True):
        assert got.dtype == x.dtype
        close(got.reshape(want.shape), want, 10 * unit * size + rounding * np.abs(want).max())
    alone = linear_cross_entropy(x, linear_weight, target, linear_bias=bias, **options, **TELL)
    assert same_bits(tuple(alone), tuple(result.loss))
    assert same_bits(linear_cross_entropy(x, linear_weight, target, linear_bias=bias, **options), alone.loss)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("dtype", ["float64", pytest.param("bfloat16", marks=MATRIX)])
def test_what_is_told_is_that_of_cross_entropy_whatever_the_chunk(dtype, reduction):
    """Small integers: logits without rounding, whatever BLAS does."""
    x, linear_weight, target, bias = exact_problem(dtype=inputs.BFLOAT16 if dtype == "bfloat16" else dtype)
    logits = x.astype(wide(dtype)) @ linear_weight.astype(wide(dtype)).T + bias.astype(wide(dtype))
    target = np.where(np.arange(len(target)) % 3 == 0, logits.argmax(1), target)
    row_weight = np.random.default_rng(5).uniform(0, 2, len(x)).astype(wide(dtype))
    options = {"reduction": reduction, "row_weight": row_weight, "z_loss": 0.01, "temperature": 0.6, "softcap": 3.0}
    want = gpusoftmax.cross_entropy(logits, target, **options, **TELL)
    assert want.n_correct > 0
    for chunk_size in (None, 1, 7, 49, 50):
        result = linear_cross_entropy_with_grad(
            x, linear_weight, target, linear_bias=bias, chunk_size=chunk_size, **options, **TELL
        )
        assert same_bits(tuple(result.loss), tuple(want))


def test_only_what_is_asked_for():
    arguments = problem(5, 4, 6)[:3]
    for name, field in zip(TELL, CrossEntropy._fields[1:], strict=True):
        told = linear_cross_entropy(*arguments, **{name: True})
        assert [one for one in CrossEntropy._fields[1:] if getattr(told, one) is not None] == [field]
        loss, dinput, _, _ = linear_cross_entropy_with_grad(*arguments, **{name: True})
        assert same_bits(loss.loss, told.loss) and dinput.shape == (5, 4)
    assert isinstance(linear_cross_entropy_with_grad(*arguments).loss, np.float32)


@pytest.mark.parametrize("labels_say_nothing", [False, True])
def test_rows_of_weight_zero_take_no_part_whatever_they_hold(labels_say_nothing):
    """Neither does one with a weight that is 0 in the format of the computation."""
    x, linear_weight, target, bias = problem(23, 12, 41, share_ignored=0.2)
    row_weight = np.ones(23)
    row_weight[[2, 7, 8]] = 0, -0.0, 1e-60
    options = {"row_weight": row_weight, "linear_bias": bias, "chunk_size": 5, **TELL}
    want = linear_cross_entropy_with_grad(x, linear_weight, target, **options)
    x[[2, 7, 8]] = [[np.nan], [np.inf], [-np.inf]]
    if labels_say_nothing:  # no row has the index that is ignored
        target[target == -100] = 3
        ignored = problem(23, 12, 41, share_ignored=0.2)[2] == -100
        options["row_weight"] = np.where(ignored, 0, row_weight)
    result = linear_cross_entropy_with_grad(x, linear_weight, target, **options)
    assert same_bits(tuple(result[1:]), tuple(want[1:])) and same_bits(tuple(result.loss), tuple(want.loss))
    assert not result.dinput[[2, 7, 8]].any() and not result.loss.lse[[2, 7, 8]].any()


def test_parts_of_a_batch_add_up():
    """Gradient accumulation: with the weight of all tokens as normalizer, parts give what the whole batch does."""
    x, linear_weight, target, bias = problem(24, 12, 41, np.float64)
    row_weight = np.random.default_rng(1).uniform(0, 2, 24)
    row_weight[4] = 0
    options = {"linear_bias": bias, "z_loss": 0.01, "temperature": 0.6, "softcap": 3.0, **TELL}
    whole = linear_cross_entropy_with_grad(x, linear_weight, target, row_weight=row_weight, **options)
    options["normalizer"] = row_weight[target != -100].sum()
    parts = [
        linear_cross_entropy_with_grad(
            x[part], linear_weight, target[part], row_weight=row_weight[part], chunk_size=4, **options
        )
        for part in (slice(0, 9), slice(9, 24))
    ]
    for name in ("loss", "z_loss"):
        got = sum(getattr(part.loss, name) for part in parts)
        np.testing.assert_allclose(got, getattr(whole.loss, name), rtol=1e-13)
    np.testing.assert_allclose(np.concatenate([part.dinput for part in parts]), whole.dinput, rtol=0, atol=1e-14)
    for name in ("dlinear_weight", "dlinear_bias"):
        np.testing.assert_allclose(sum(getattr(part, name) for part in parts), getattr(whole, name), rtol=0, atol=1e-13)


def test_a_normalizer_of_any_kind():
    arguments = problem(9, 4, 6, np.float64)[:3]
    want = linear_cross_entropy_with_grad(*arguments, normalizer=7)
    for normalizer in (np.float32(7), np.array(7), np.array([7]), np.full((1, 1), 7, np.float32)):
        result = linear_cross_entropy_with_grad(*arguments, normalizer=normalizer)
        for one, other in zip(result[:3], want[:3], strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-15)


def test_numbers_without_axes():
    """A temperature in an array is a number; one row without a batch has one weight."""
    x, linear_weight, target, bias = problem(1, 12, 41, np.float64)
    flat = {
        "linear_bias": bias,
        "temperature": 0.6,
        "softcap": 3.0,
        "row_weight": np.array([2.0]),
        "reduction": "sum",
        **TELL,
    }
    want = linear_cross_entropy_with_grad(x, linear_weight, target, **flat)
    given = {**flat, "temperature": np.array(0.6), "row_weight": np.float64(2)}
    result = linear_cross_entropy_with_grad(x[0], linear_weight, target[0], **given)
    assert result.loss.lse.shape == ()
    for one, other in zip((*result.loss, *result[1:]), (*want.loss, *want[1:]), strict=True):
        assert same_bits(one, other.reshape(np.shape(one)))


def test_temperatures_of_rows():
    with pytest.raises(TypeError, match="^temperature is array.*, expected one number"):
        linear_cross_entropy(*problem(3, 4, 5)[:3], temperature=np.ones(3, np.float32))


def test_any_batch_shape_and_layout():
    x, linear_weight, target, bias = problem(24, 12, 41)
    row_weight = np.random.default_rng(1).uniform(0, 2, 24).astype(np.float32)
    options = {"linear_bias": bias, "reduction": "none", "chunk_size": 5, **TELL}
    flat = linear_cross_entropy_with_grad(x, linear_weight, target, row_weight=row_weight, **options)
    x, target = x.reshape(4, 6, 12), target.reshape(4, 6)
    spread = np.zeros((12, 4), np.float32)[::2].T
    spread[...] = row_weight.reshape(4, 6)
    with Untouched(spread), Untouched(x):
        result = linear_cross_entropy_with_grad(x, linear_weight, target, row_weight=spread, **options)
    assert result.loss.loss.shape == result.loss.z_loss.shape == result.loss.lse.shape == (4, 6)
    for one, other in zip((*result.loss, *result[1:]), (*flat.loss, *flat[1:]), strict=True):
        assert same_bits(one.reshape(other.shape), other)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_empty_batch(reduction):
    x, linear_weight, target, _ = problem(0, 12, 41)
    options = {"row_weight": np.zeros(0, np.float32), "z_loss": 0.1, "softcap": 5.0, **TELL}
    told, dinput, dweight, _ = linear_cross_entropy_with_grad(x, linear_weight, target, reduction=reduction, **options)
    wanted = {"mean": np.nan, "sum": 0.0, "none": np.zeros(0)}[reduction]
    np.testing.assert_array_equal(told.loss, wanted)
    np.testing.assert_array_equal(told.z_loss, wanted)
    assert told.lse.shape == (0,) and told.n_correct == 0 and dinput.shape == (0, 12) and not dweight.any()


def test_all_rows_of_weight_zero():
    """The mean of nothing is NaN, its gradient 0."""
    arguments = problem(5, 4, 6)[:3]
    told, dinput, dweight, _ = linear_cross_entropy_with_grad(*arguments, row_weight=np.zeros(5, np.float32), **TELL)
    assert np.isnan(told.loss) and told.n_correct == 0 and not dinput.any() and not dweight.any()


def test_a_label_out_of_range():
    x, linear_weight, target, _ = problem(23, 12, 41, share_ignored=0)
    target[9] = 41
    options = {"reduction": "none", "validate": False, "z_loss": 0.1, "chunk_size": 4, **TELL}
    result = linear_cross_entropy_with_grad(x, linear_weight, target, **options)
    bad = np.arange(23) == 9
    assert np.array_equal(np.isnan(result.loss.loss), bad)
    assert np.array_equal(np.isnan(result.dinput).all(axis=1), bad) and np.isfinite(result.loss.lse).sum() >= 22


def test_memory():
    """One chunk of logits, a quarter of it beside it, and what is told: nothing else for all these options."""
    n_rows, n_features, n_classes, chunk_size = 300, 32, 4096, 128
    x, linear_weight, target, bias = problem(n_rows, n_features, n_classes)
    row_weight = np.linspace(0, 2, n_rows).astype(np.float32)
    options = {"linear_bias": bias, "row_weight": row_weight, "z_loss": 0.1, **TELL}
    results, told, peaks = x.nbytes + linear_weight.nbytes + bias.nbytes, (3 * 4 + 8) * n_rows, []
    for _ in range(2):  # the first call compiles
        tracemalloc.start()
        linear_cross_entropy_with_grad(x, linear_weight, target, chunk_size=chunk_size, **options)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    chunk = chunk_size * n_classes * 4
    assert chunk < peaks[1] - results - told <= 1.25 * chunk
