"""linear_cross_entropy and its gradients: bounds, options, chunks, layouts and memory, on NumPy arrays.

Emulated devices multiply no matrices; torch tensors and JAX arrays are in tests/interop.
"""

import itertools
import tracemalloc

import numpy as np
import pytest

import gpusoftmax
from gpusoftmax import _layer
from tests import inputs, oracle, tolerances
from tests.calls import Untouched, same_bits
from tests.emulator import emulated_gpu

F32 = np.dtype(np.float32)
RETURN = ("return_dinput", "return_dlinear_weight", "return_dlinear_bias")


def problem(n_rows, n_features, n_classes, dtype=F32, seed=0, share_ignored=0.2):
    """(input, linear_weight, target, linear_bias): logits of standard deviation 3."""
    rng = np.random.default_rng([seed, n_rows, n_features, n_classes])
    x = 3 * rng.standard_normal((n_rows, n_features))
    linear_weight = rng.standard_normal((n_classes, n_features)) / max(n_features, 1) ** 0.5
    target = inputs.targets(n_rows, n_classes, share_ignored=share_ignored, seed=seed)
    dtype = inputs.BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
    return x.astype(dtype), linear_weight.astype(dtype), target, rng.standard_normal(n_classes).astype(dtype)


def run(x, linear_weight, target, linear_bias=None, **options):
    """With gradients; the loss alone has the same bits."""
    result = gpusoftmax.linear_cross_entropy_with_grad(x, linear_weight, target, linear_bias=linear_bias, **options)
    for name in ("grad_scale", *RETURN):
        options.pop(name, None)
    loss = gpusoftmax.linear_cross_entropy(x, linear_weight, target, linear_bias=linear_bias, **options)
    assert same_bits(loss, result.loss)
    return result


def check(result, x, linear_weight, target, linear_bias=None, **options):
    options.pop("chunk_size", None)
    assert result.loss.dtype == (np.float64 if x.dtype == np.float64 else np.float32)
    for gradient, like in zip(result[1:], (x, linear_weight, linear_bias), strict=True):
        assert (gradient is None) == (like is None)
        assert like is None or (gradient.dtype, gradient.shape) == (like.dtype, like.shape)
    return tolerances.check_linear_cross_entropy(result, x, linear_weight, target, linear_bias, **options)


# ---------------------------------------------------------------- bounds and options

SHAPES = [(13, 7, 11), (1, 1, 1), (5, 64, 300), (64, 33, 1031)]
CHUNKS = [None, 1, 7, 1000]


@pytest.mark.parametrize("dtype", inputs.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_matches_oracle(dtype, shape, with_bias):
    x, linear_weight, target, bias = problem(*shape, dtype)
    arguments = x, linear_weight, target, bias if with_bias else None
    for chunk_size in CHUNKS:
        check(run(*arguments, chunk_size=chunk_size), *arguments)


# Every pair of values of two options occurs in a row (test_all_pairs_of_options_occur).
DTYPE = ["float16", "bfloat16", "float32", "float64"]
REDUCTION = ["mean", "sum", "none"]
WEIGHT = [False, True]
SMOOTHING = [0.0, 0.1, 1.0]
IGNORED = ["-100", "class 0", "all"]
SCALE = [1.0, 1024.0, -0.5]
OPTIONS = [DTYPE, REDUCTION, WEIGHT, SMOOTHING, IGNORED, SCALE]
CASES = [
    ("float16", "mean", False, 0.0, "-100", 1.0),
    ("float16", "sum", True, 0.1, "class 0", -0.5),
    ("float16", "none", False, 1.0, "all", 1024.0),
    ("bfloat16", "mean", True, 0.1, "all", 1.0),
    ("bfloat16", "sum", False, 1.0, "-100", 1024.0),
    ("bfloat16", "none", True, 0.0, "class 0", -0.5),
    ("float32", "mean", True, 1.0, "class 0", 1024.0),
    ("float32", "sum", False, 0.0, "all", -0.5),
    ("float32", "none", True, 0.1, "-100", 1.0),
    ("float64", "mean", False, 1.0, "-100", -0.5),
    ("float64", "sum", True, 0.0, "all", 1.0),
    ("float64", "none", False, 0.1, "class 0", 1024.0),
    ("float32", "mean", False, 0.1, "-100", 1024.0),
    ("float64", "mean", True, 0.0, "class 0", 1024.0),
    ("float32", "sum", True, 1.0, "class 0", 1.0),
    ("float64", "sum", False, 0.1, "all", -0.5),
]


def test_all_pairs_of_options_occur():
    for one, two in itertools.combinations(range(len(OPTIONS)), 2):
        occurring = {(case[one], case[two]) for case in CASES}
        assert occurring == set(itertools.product(OPTIONS[one], OPTIONS[two]))


@pytest.mark.parametrize(("dtype", "reduction", "has_weight", "smoothing", "ignored", "scale"), CASES)
def test_options(dtype, reduction, has_weight, smoothing, ignored, scale):
    x, linear_weight, target, bias = problem(29, 16, 57, dtype)
    weight = np.linspace(0, 2, 57).astype("float64" if dtype == "float64" else "float32") if has_weight else None
    if ignored == "all":
        target[:] = -100
    options = {
        "weight": weight, "reduction": reduction, "label_smoothing": smoothing,
        "ignore_index": 0 if ignored == "class 0" else -100, "grad_scale": scale,
    }  # fmt: skip
    target = np.where(target == -100, 0, target) if ignored == "class 0" else target
    result = run(x, linear_weight, target, bias, chunk_size=8, **options)
    check(result, x, linear_weight, target, bias, **options)
    if ignored == "all":
        assert np.isnan(result.loss) if reduction == "mean" else not result.loss.any()
        assert not any(gradient.any() for gradient in result[1:])


def test_planted_mistakes_are_rejected():
    arguments = problem(29, 16, 57)
    right = run(*arguments)
    for name in right._fields:
        wrong = np.array(getattr(right, name))
        wrong.flat[np.abs(wrong).argmax()] *= 1.001
        with pytest.raises(AssertionError, match="loss" if name == "loss" else name.replace("linear_", "")):
            check(right._replace(**{name: wrong[()]}), *arguments)


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)))
def test_gradients_as_asked(wanted):
    """Those that are computed have the bits that they have beside the others."""
    arguments = problem(29, 16, 57, "bfloat16")
    full, result = run(*arguments), run(*arguments, **dict(zip(RETURN, wanted, strict=True)))
    for is_wanted, gradient, expected in zip((True, *wanted), result, full, strict=True):
        assert same_bits(gradient, expected) if is_wanted else gradient is None


@pytest.mark.parametrize("dtype", inputs.DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTION)
def test_a_gradient_for_the_loss_of_each_row(dtype, reduction):
    """What backpropagation hands on for reduction "none"."""
    arguments = problem(24, 16, 57, dtype)
    scale = np.random.default_rng(1).standard_normal(24).astype("float64" if dtype == np.float64 else "float32")
    for chunk_size in (None, 7):
        options = {"reduction": reduction, "grad_scale": scale, "chunk_size": chunk_size}
        result = run(*arguments, **options)
        check(result, *arguments, **options)
        x, linear_weight, target, bias = arguments
        shaped = x.reshape(4, 6, 16), linear_weight, target.reshape(4, 6), bias
        again = run(*shaped, **{**options, "grad_scale": scale.reshape(4, 6)[:, ::-1][:, ::-1]})
        assert all(same_bits(one.reshape(other.shape), other) for one, other in zip(again, result, strict=True))
    alone = run(*arguments, **options, return_dinput=False, return_dlinear_weight=False)
    assert same_bits(alone.dlinear_bias, result.dlinear_bias)
    alone = run(*arguments, **options, return_dlinear_weight=False, return_dlinear_bias=False)
    assert same_bits(alone.dinput, result.dinput)


def test_half_types_lose_nothing_but_their_own_rounding():
    """The logits and all sums are float32: as if the inputs had been that, and the gradients were rounded."""
    for dtype in ("float16", "bfloat16"):
        x, linear_weight, target, bias = problem(64, 33, 300, dtype)
        wide = run(*(array.astype(F32) for array in (x, linear_weight)), target, bias.astype(F32), chunk_size=64)
        result = run(x, linear_weight, target, bias, chunk_size=64)
        assert result.loss == pytest.approx(wide.loss, rel=1e-6)
        for gradient, expected in zip(result[1:], wide[1:], strict=True):
            spacing = tolerances.FORMATS[gradient.dtype.name].ulp(expected.astype(np.longdouble))
            assert (np.abs(gradient.astype(np.longdouble) - expected) <= 0.51 * spacing).all()


# ---------------------------------------------------------------- chunks


def exact_problem(n_rows=50, n_features=24, n_classes=333, dtype=F32):
    """Small integers: logits without rounding, whatever BLAS does."""
    rng = np.random.default_rng(3)
    x, linear_weight = rng.integers(-3, 4, (n_rows, n_features)), rng.integers(-2, 3, (n_classes, n_features))
    target = inputs.targets(n_rows, n_classes, share_ignored=0.2)
    return x.astype(dtype), linear_weight.astype(dtype), target, rng.integers(-4, 5, n_classes).astype(dtype)


@pytest.mark.parametrize("dtype", inputs.DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTION)
def test_the_loss_is_that_of_cross_entropy_whatever_the_chunk(dtype, reduction):
    x, linear_weight, target, bias = exact_problem(dtype=dtype)
    wide = np.float64 if dtype == np.float64 else np.float32
    logits = x.astype(wide) @ linear_weight.astype(wide).T + bias.astype(wide)
    options = {"reduction": reduction, "label_smoothing": 0.1, "weight": np.linspace(0, 2, 333).astype(wide)}
    expected = gpusoftmax.cross_entropy(logits, target, **options)
    for chunk_size in (*CHUNKS, 49, 50):
        result = run(x, linear_weight, target, bias, chunk_size=chunk_size, **options)
        assert same_bits(result.loss, expected)


def test_default_chunks():
    """As many rows as have CHUNK_BYTES, all chunks of nearly one size; at least a row."""

    def sizes(n_rows, n_classes, dtype="float32", target="cpu"):
        size = _layer._chunk_rows(n_rows, n_classes, dtype, None, target)
        return [part.stop - part.start for part in _layer.blocks(n_rows, size)]

    assert sizes(4096, 32768) == [512] * 8
    assert sizes(4096, 32768, "float64") == [256] * 16
    assert sizes(513, 32768) == [257, 256]
    assert sizes(3, 2**25) == [1, 1, 1]
    assert sizes(5, 10) == [5]
    assert sizes(0, 10) == []
    assert sizes(4096, 131072, "bfloat16", "cuda") == [1024] * 4


@pytest.mark.parametrize(
    "option", [{"normalizer": 1e39}, {"grad_scale": -1e39}, {"normalizer": 1e-20, "grad_scale": 1e20}]
)
def test_numbers_that_the_format_cannot_hold(option):
    x, w, target = np.ones((2, 3), np.float32), np.ones((4, 3), np.float32), np.array([0, 1])
    with pytest.raises(ValueError, match="for arithmetic in float32"):
        gpusoftmax.linear_cross_entropy_with_grad(x, w, target, **option)
    wide = [one.astype(np.float64) for one in (x, w)]
    assert np.isfinite(gpusoftmax.linear_cross_entropy_with_grad(*wide, target, **option).dinput).all()


def test_memory():
    """One chunk of logits, a quarter of it beside it, and the results; measured by tracemalloc, which sees NumPy's."""
    n_rows, n_features, n_classes, chunk_size = 300, 32, 4096, 128
    x, linear_weight, target, bias = problem(n_rows, n_features, n_classes)
    for dtype, beside in (("float32", 0), ("float16", n_classes * (n_features + 1) * 4)):
        # Half types: their gradients are summed up beside them, in float32.
        arrays = [x.astype(dtype), linear_weight.astype(dtype), target, bias.astype(dtype)]
        chunk, gradients = chunk_size * n_classes * 4, sum(arrays[k].nbytes for k in (0, 1, 3))
        for function, results in (
            (gpusoftmax.linear_cross_entropy, 0),
            (gpusoftmax.linear_cross_entropy_with_grad, gradients + beside),
        ):
            peaks = []
            for _ in range(2):  # the first call compiles
                tracemalloc.start()
                function(*arrays[:3], linear_bias=arrays[3], chunk_size=chunk_size)
                peaks.append(tracemalloc.get_traced_memory()[1])
                tracemalloc.stop()
            losses = 4 * n_rows
            assert chunk < peaks[1] - results - losses <= 1.25 * chunk, (dtype, function.__name__)


# ---------------------------------------------------------------- layouts and shapes


def layouts(matrix):
    """The same values otherwise in memory."""
    wide = np.zeros((2 * matrix.shape[0], 3 * matrix.shape[1]), matrix.dtype)
    wide[1::2, ::3] = matrix
    reversed_ = matrix[::-1, ::-1].copy()[::-1, ::-1]
    padded = np.zeros((matrix.shape[0], matrix.shape[1] + 3), matrix.dtype)
    padded[:, 1:-2] = matrix
    unaligned = np.zeros(matrix.nbytes + 1, np.uint8)[1:].view(matrix.dtype).reshape(matrix.shape)
    unaligned[...] = matrix
    read_only = matrix.copy()
    read_only.flags.writeable = False
    return {
        "columns first": np.asfortranarray(matrix), "steps": wide[1::2, ::3], "reversed": reversed_,
        "padded rows": padded[:, 1:-2], "unaligned": unaligned, "read-only": read_only,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("argument", [0, 1])
def test_layouts(dtype, argument):
    arguments = list(problem(23, 12, 41, dtype))
    for view in layouts(arguments[argument]).values():
        given = list(arguments)
        given[argument] = view
        with Untouched(view):
            check(run(*given, chunk_size=5), *arguments)


def test_stretched_arguments():
    x, linear_weight, target, bias = problem(23, 12, 41)
    given = (
        np.broadcast_to(x[:1], x.shape),
        linear_weight,
        np.broadcast_to(target[:1], 23),
        np.broadcast_to(bias[0], 41),
    )
    check(run(*given), *given)
    given = x, np.broadcast_to(linear_weight[:1], linear_weight.shape), target[::-1], bias[::-1]
    check(run(*given, chunk_size=4), *given)


@pytest.mark.parametrize("reduction", REDUCTION)
def test_any_batch_shape(reduction):
    x, linear_weight, target, bias = problem(24, 12, 41)
    flat = run(x, linear_weight, target, bias, reduction=reduction)
    for shape in ((2, 3, 4), (24, 1), (1, 24)):
        result = run(x.reshape(*shape, 12), linear_weight, target.reshape(shape), bias, reduction=reduction)
        assert result.dinput.shape == (*shape, 12) and result.loss.shape == (shape if reduction == "none" else ())
        for one, other in zip(result, flat, strict=True):
            assert same_bits(one.reshape(other.shape), other)
    swapped = x.reshape(4, 6, 12).swapaxes(0, 1), linear_weight, target.reshape(4, 6).T, bias
    check(run(*swapped, reduction=reduction), *swapped, reduction=reduction)


def test_one_row_without_batch():
    x, linear_weight, target, bias = problem(1, 12, 41)
    given = x[0], linear_weight, target[0], bias
    result = run(*given, reduction="none")
    assert result.loss.shape == () and result.dinput.shape == (12,)
    check(result, *given, reduction="none")


@pytest.mark.parametrize("reduction", REDUCTION)
def test_empty_batch(reduction):
    x, linear_weight, target, bias = problem(0, 12, 41)
    result = run(x, linear_weight, target, bias, reduction=reduction)
    assert result.dinput.shape == (0, 12) and not result.dlinear_weight.any() and not result.dlinear_bias.any()
    expected = {"mean": np.nan, "sum": 0.0, "none": np.zeros(0)}[reduction]
    np.testing.assert_array_equal(result.loss, expected)


def test_no_features():
    """All logits are 0, or the bias."""
    x, linear_weight, target, bias = problem(5, 0, 41)
    check(run(x, linear_weight, target), x, linear_weight, target)
    result = run(x, linear_weight, target, bias)
    tolerances.check_loss(result.loss, np.broadcast_to(bias, (5, 41)), target)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint16", "int32", "uint64"])
def test_label_dtypes(dtype):
    x, linear_weight, target, bias = problem(23, 12, 41, share_ignored=0)
    target = target.astype(dtype)
    for ignore_index in (-100, 40, 2**40):
        options = {"ignore_index": ignore_index, "chunk_size": 5}
        check(run(x, linear_weight, target, bias, **options), x, linear_weight, target, bias, **options)


def test_integers_and_lists_are_float64():
    x, linear_weight, target, bias = exact_problem(5, 3, 4, np.int64)
    result = run(x.tolist(), linear_weight, target, bias)
    assert result.loss.dtype == result.dinput.dtype == np.float64
    tolerances.check_linear_cross_entropy(result, x.astype(float), linear_weight, target, bias)


# ---------------------------------------------------------------- what rows hold


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_ignored_rows_take_no_part_whatever_they_hold(dtype):
    x, linear_weight, target, bias = problem(23, 12, 41, dtype, share_ignored=0.3)
    ignored = target == -100
    expected = run(x, linear_weight, target, bias, chunk_size=5)
    x[ignored] = [[np.nan], [np.inf], [-np.inf]] * (ignored.sum() // 3) + [[np.nan]] * (ignored.sum() % 3)
    result = run(x, linear_weight, target, bias, chunk_size=5)
    assert ignored.any() and same_bits(tuple(result), tuple(expected))
    assert not result.dinput[ignored].any()


def test_ignored_rows_take_no_part_whatever_comes_from_above():
    x, linear_weight, target, bias = problem(23, 12, 41, share_ignored=0.3)
    scale = np.random.default_rng(1).standard_normal(23).astype(F32)
    expected = run(x, linear_weight, target, bias, grad_scale=scale, chunk_size=5)
    scale[target == -100] = np.nan
    with Untouched(scale):
        result = run(x, linear_weight, target, bias, grad_scale=scale, chunk_size=5)
    assert same_bits(tuple(result), tuple(expected)) and not result.dinput[target == -100].any()


def test_nan_stays_in_its_row():
    x, linear_weight, target, bias = problem(23, 12, 41, share_ignored=0)
    x[4, 2] = np.nan
    result = run(x, linear_weight, target, bias, reduction="none", chunk_size=5)
    others = np.arange(23) != 4
    assert np.isnan(result.loss[4]) and np.isnan(result.dinput[4]).all() and np.isnan(result.dlinear_weight).all()
    assert np.isfinite(result.loss[others]).all() and np.isfinite(result.dinput[others]).all()


def test_masked_classes():
    """A bias of -inf takes a class out."""
    x, linear_weight, target, bias = problem(23, 12, 41)
    bias[7:20] = -np.inf
    target[(target >= 7) & (target < 20)] = 3
    result = run(x, linear_weight, target, bias)
    kept = np.r_[0:7, 20:41]
    smaller = x, linear_weight[kept], np.where(target >= 20, target - 13, target), bias[kept]
    check(result._replace(dlinear_weight=result.dlinear_weight[kept], dlinear_bias=result.dlinear_bias[kept]), *smaller)
    assert not result.dlinear_weight[7:20].any() and not result.dlinear_bias[7:20].any()


@pytest.mark.parametrize("label", [-1, 41, 2**40])
def test_labels_out_of_range(label):
    x, linear_weight, target, bias = problem(23, 12, 41, share_ignored=0)
    target[[9, 11]] = label
    for function in (gpusoftmax.linear_cross_entropy, gpusoftmax.linear_cross_entropy_with_grad):
        with pytest.raises(IndexError, match=rf"^target\[9\] .* is {label}, expected a class from 0 to 40"):
            function(x, linear_weight, target, linear_bias=bias)
    result = run(x, linear_weight, target, bias, validate=False, chunk_size=4, reduction="none")
    bad = np.isin(np.arange(23), [9, 11])
    assert np.array_equal(np.isnan(result.loss), bad) and np.isnan(result.dlinear_weight).all()
    assert np.array_equal(np.isnan(result.dinput).all(axis=1), bad)


def test_arrays_that_multiply_no_matrices():
    with emulated_gpu("sm_90", track=False) as gpu:
        x, linear_weight, target, _ = (gpu.array(array) for array in problem(3, 4, 5))
        with pytest.raises(
            TypeError, match="^input is a CUDA array on GPU 0 of a library that is not known to multiply"
        ):
            gpusoftmax.linear_cross_entropy(x, linear_weight, target)


def test_oracle_against_differences():
    """The gradients are the slopes of the loss."""
    x, linear_weight, target, bias = problem(5, 3, 4, np.float64)
    options = {"label_smoothing": 0.1, "weight": np.array([0.5, 1, 2, 3])}
    _, *gradients = oracle.linear_cross_entropy(x, linear_weight, target, bias, **options)
    arrays, step = (x, linear_weight, bias), 1e-5
    for array, gradient in zip(arrays, gradients, strict=True):
        for index in np.ndindex(array.shape):
            before, ends = array[index], []
            for moved in (before + step, before - step):
                array[index] = moved
                ends.append(oracle.linear_cross_entropy(x, linear_weight, target, bias, **options)[0])
            array[index] = before
            assert float((ends[0] - ends[1]) / (2 * step)) == pytest.approx(float(gradient[index]), abs=1e-8)
