"""What logits go through before an op: scale, bias, softcap, mask, n_valid, in this order, on every target.

Where the transform rounds nothing, an op must give the bits that it gives for logits transformed beforehand. Otherwise
it is compared with the exact transform in longdouble, whose roundings are allowed for.
"""

from functools import partial

import numpy as np
import pytest

import gpusoftmax
from tests import inputs, oracle
from tests.conftest import Cpu
from tests.emulator import emulated_gpu

INF, NAN = np.inf, np.nan
# A part of a warp; more than a vector strip; more columns than a chunk of the CPU has and than slots of a warp hold.
N_COLS = [5, 300, 4099]
MATRIX = pytest.mark.matrix
"""What else is compiled for these tests: pytest -m matrix."""
ONE_DTYPE = [one if one == np.float32 else pytest.param(one, marks=MATRIX) for one in map(np.dtype, inputs.DTYPES)]
EVERY_FIELD = {"return_lse": True, "return_entropy": True, "return_rank": True, "return_argmax": True}


def options_for(logits, seed=0, *, temperature=True):
    """Every option, one of each kind, for logits of shape (n_rows, n_cols)."""
    rng = np.random.default_rng(seed)
    n_rows, n_cols = logits.shape
    mask = rng.random(logits.shape) < 0.6
    mask[:, n_cols // 2] = True
    found = {
        "bias": rng.normal(size=n_cols).astype(logits.dtype),
        "softcap": 12.0,
        "mask": mask,
        "n_valid": rng.integers(n_cols // 2 + 1, n_cols + 1, n_rows),
    }
    if temperature:
        found["temperature"] = rng.uniform(0.5, 2, n_rows).astype(np.float32)
    return found


def transformed(logits, *, temperature=1.0, bias=None, softcap=None, mask=None, n_valid=None):
    """The transform in longdouble."""
    z = logits.astype(np.longdouble)
    z = z / np.asarray(temperature, np.longdouble).reshape(-1, 1)
    if bias is not None:
        z = z + bias.astype(np.longdouble)
    if softcap is not None:
        z = softcap * np.tanh(z / softcap)
    if mask is not None:
        z = np.where(mask, z, -INF)
    if n_valid is not None:
        z = np.where(np.arange(z.shape[1]) < np.reshape(n_valid, (-1, 1)), z, -INF)
    return z


def slope(logits, *, temperature=1.0, bias=None, softcap=None, mask=None, n_valid=None):
    """The derivative of the transform, 0 where it is masked."""
    z = transformed(logits, temperature=temperature, bias=bias)
    each = np.ones_like(z) / np.asarray(temperature, np.longdouble).reshape(-1, 1)
    if softcap is not None:
        each = each * (1 - np.tanh(z / softcap) ** 2)
    return np.where(transformed(each * 0, mask=mask, n_valid=n_valid) == -INF, 0, each)


def packed(mask):
    """A bit for each column, as grammar engines have it: int32, the lowest bit first."""
    n_words = -(-mask.shape[-1] // 32)
    padded = np.zeros((*mask.shape[:-1], 32 * n_words), bool)
    padded[..., : mask.shape[-1]] = mask
    return np.packbits(padded, axis=-1, bitorder="little").view("<i4")


def on(target, options):
    return {name: target.array(value) if isinstance(value, np.ndarray) else value for name, value in options.items()}


def rounding(z, dtype):
    """What the roundings of a transform do to the difference of two logits, times a handful."""
    unit = 2.0**-53 if dtype == np.float64 else 2.0**-24
    return 8 * unit * float(np.abs(z[np.isfinite(z)]).max(initial=1))


EXACT = {
    "softmax": gpusoftmax.softmax,
    "log_softmax": gpusoftmax.log_softmax,
    "logsumexp": gpusoftmax.logsumexp,
    "argmax": gpusoftmax.argmax,
    "soft_argmax": gpusoftmax.soft_argmax,
    "cross_entropy": partial(gpusoftmax.cross_entropy, reduction="none"),
    "cross_entropy_with_grad": gpusoftmax.cross_entropy_with_grad,
    "token_logprobs": partial(gpusoftmax.token_logprobs, **EVERY_FIELD),
    "top_logprobs": partial(gpusoftmax.top_logprobs, k=5),
}
OPS = [name if name == "softmax" else pytest.param(name, marks=MATRIX) for name in EXACT]
"""Each is a kernel to compile for every way to transform: by default one, and the gradients in the tests below."""
NEEDS_LABELS = {"cross_entropy", "cross_entropy_with_grad", "token_logprobs"}


def bits(target, op, logits, **options):
    """All results of an op, as bytes."""
    labels = [target.array(np.full(logits.shape[0], logits.shape[1] // 2))] if op in NEEDS_LABELS else []
    results = EXACT[op](target.array(logits), *labels, **on(target, options))
    results = results if isinstance(results, tuple) else (results,)
    return [np.asarray(target.get(one)).tobytes() for one in results if one is not None]


@pytest.mark.parametrize("n_cols", N_COLS)
@pytest.mark.parametrize("op", OPS)
def test_a_masked_row_is_the_row_with_infinities(target, op, n_cols):
    logits = inputs.make("spread", (4, n_cols), np.float32, seed=n_cols)
    options = options_for(logits)
    mask, n_valid = options["mask"], options["n_valid"]
    kept = np.where(mask & (np.arange(n_cols) < n_valid[:, None]), logits, -INF).astype(np.float32)
    assert bits(target, op, logits, mask=packed(mask), n_valid=n_valid) == bits(target, op, kept)


@pytest.mark.parametrize("n_cols", [1, 31, 32, 33, 64, 300])
def test_a_mask_of_bits_is_one_of_bools(target, n_cols):
    logits = inputs.make("spread", (4, n_cols), np.float32, seed=n_cols)
    mask = options_for(logits)["mask"]
    # With n_valid it is the kernel of the test before, which asks nothing of masks for whole words.
    in_words = bits(target, "softmax", logits, mask=packed(mask), n_valid=np.full(4, n_cols))
    assert bits(target, "softmax", logits, mask=mask) == in_words


@pytest.mark.parametrize("form", ["bits", "bools"])
def test_masks_of_rows_that_begin_anywhere(target, form):
    """Runs of sixteen-bit logits whose masks lie in two words, in each of the ways that a run can lie, and a last run
    that is shorter.
    """
    n_cols = 2053
    logits = inputs.make("spread", (9, n_cols), "bfloat16")
    mask = np.random.default_rng(1).random(logits.shape) < 0.5
    given = packed(mask) if form == "bits" else mask
    kept = np.where(mask, logits, logits.dtype.type(-INF))
    assert bits(target, "softmax", logits, mask=given) == bits(target, "softmax", kept)
    assert bits(target, "softmax", logits[3:], mask=given[3:]) == bits(target, "softmax", kept[3:])


@pytest.mark.parametrize("op", [name for name in OPS if name != "token_logprobs"])
@pytest.mark.parametrize("dtype", ONE_DTYPE, ids=str)
def test_an_exact_bias_and_scale_are_those_of_the_logits(target, op, dtype):
    """Of one scale for all rows, and of one for each."""
    if op == "cross_entropy_with_grad" and dtype.itemsize == 2:
        op = "cross_entropy"  # the gradients differ: one is rounded to the format of the other logits
    logits = inputs.make("ties", (3, 200), dtype)  # small integers and halves
    logits = np.round(logits.astype(np.float64) * 2).astype(dtype)
    bias = np.arange(200).astype(dtype) % 7
    exact = ((logits.astype(np.float64) / 2) + bias.astype(np.float64)).astype(dtype)
    wide = {"dtype": np.float32} if op in ("softmax", "log_softmax") and dtype.itemsize == 2 else {}
    got = bits(target, op, logits, bias=bias, temperature=2.0, **wide)
    if op == "cross_entropy_with_grad":
        assert got[0] == bits(target, op, exact)[0]  # the gradient is half as large
        half = np.frombuffer(bits(target, op, exact)[1], dtype) / 2
        assert np.array_equal(np.frombuffer(got[1], dtype), half.astype(dtype))
    else:
        assert got == bits(target, op, exact, **wide)
    temperatures = np.full(3, 2, np.float32)
    assert got == bits(target, op, logits, bias=bias, temperature=temperatures, **wide)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_softcap_is_accurate(target, dtype):
    """The log-sum-exp of one column is the logit itself."""
    exponents = np.linspace(-40, 12, 500)
    logits = np.concatenate([2.0**exponents, -(2.0**exponents), [0, INF, -INF, NAN]]).astype(dtype)[:, None]
    for cap in (1.0, 30.0):
        capped = target.get(gpusoftmax.logsumexp(target.array(logits), softcap=cap))
        exact = transformed(logits, softcap=cap)[:, 0]
        assert np.isnan(capped[-1]) and capped[-2] == -cap and capped[-3] == cap
        error = np.abs(capped[:-1] - exact[:-1]) / np.spacing(np.abs(exact[:-1]).astype(dtype))
        assert error.max() <= 3.5
        assert np.abs(capped[:-1]).max() <= cap


def test_options_near_the_limits(target):
    """1 / temperature is subnormal there, and twice the softcap infinite."""
    logits = np.array([[0, 1, 2, 3, -INF]], np.float32)
    x = target.array(logits)
    probs = target.get(gpusoftmax.softmax(x, temperature=2e45, bias=target.array(np.zeros(5, np.float32))))
    assert (probs == [[0.25, 0.25, 0.25, 0.25, 0]]).all()
    far = target.array(np.array([[3e38, 0], [INF, -INF]], np.float32))
    capped = target.get(gpusoftmax.log_softmax(far, softcap=2e38))
    # 2e38 tanh(1.5) is 1.81e38.
    np.testing.assert_allclose(capped, [[0, -1.8103e38], [0, -INF]], rtol=1e-4)
    # 1 / 1e-45 is infinite, and 0 times that no number.
    level = target.array(np.array([[0, -INF, 0, -1]], np.float32))
    probs = target.get(gpusoftmax.softmax(level, temperature=target.array(np.full(1, 1e-45, np.float32))))
    assert (probs == [[0.5, 0, 0.5, 0]]).all()


@pytest.mark.parametrize(
    "dtype", [pytest.param(one, marks=[] if one == np.float32 else MATRIX) for one in inputs.DTYPES]
)
@pytest.mark.parametrize("n_cols", [*(pytest.param(n, marks=MATRIX) for n in (5, 300)), 4099])
def test_everything_at_once(target, dtype, n_cols):
    logits = inputs.make("spread", (4, n_cols), dtype, seed=n_cols)
    options = options_for(logits)
    given, x = on(target, options), target.array(logits)
    z = transformed(logits, **options)
    exact, slack = oracle.softmax(z), rounding(z, dtype)
    half = 2.0 ** -(7 if dtype.name == "bfloat16" else 10) if dtype.itemsize == 2 else 0
    rtol = 60 * slack / 8 + slack + half
    probs = target.get(gpusoftmax.softmax(x, **given)).astype(np.longdouble)
    np.testing.assert_allclose(probs, exact, rtol=rtol, atol=2.0**-24 if half else 1e-36)
    assert (probs[z == -INF] == 0).all()
    lse = target.get(gpusoftmax.logsumexp(x, **given))
    np.testing.assert_allclose(lse, oracle.logsumexp(z), atol=slack, rtol=slack)
    log_probs = target.get(gpusoftmax.log_softmax(x, **given)).astype(np.longdouble)
    np.testing.assert_allclose(log_probs, oracle.log_softmax(z), atol=2 * slack + half, rtol=half + slack)
    labels = np.array([np.flatnonzero(row > -INF)[-1] for row in z])
    weight = np.linspace(0.5, 2, n_cols).astype(logits.dtype)
    loss, dlogits = gpusoftmax.cross_entropy_with_grad(
        x, target.array(labels), target.array(weight), reduction="sum", **given
    )
    w = weight.astype(np.longdouble)[labels]
    nll = -oracle.log_softmax(z)[np.arange(4), labels]
    np.testing.assert_allclose(float(target.get(loss)), float((w * nll).sum()), rtol=slack + 1e-6)
    dz = exact - (np.arange(n_cols) == labels[:, None])
    want = dz * w[:, None] * slope(logits, **options)
    got = target.get(dlogits).astype(np.longdouble)
    np.testing.assert_allclose(got, want, atol=8 * slack, rtol=half)
    assert (got[z == -INF] == 0).all()


def test_gradients_of_tokens(target):
    logits = inputs.make("spread", (4, 300), np.float32)
    options = options_for(logits)
    z = transformed(logits, **options)
    labels = np.array([np.flatnonzero(row > -INF)[3] for row in z])
    dlogprob, dentropy = np.array([1, -2, 0.5, 3], np.float32), np.array([0.5, 1, -1, 2], np.float32)
    arrays = [target.array(one) for one in (logits, labels, dlogprob, dentropy)]
    got = target.get(gpusoftmax.token_logprobs_backward(*arrays, **on(target, options)))
    want = oracle.token_logprobs_backward(z, labels, dlogprob, dentropy) * slope(logits, **options)
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert (got[z == -INF] == 0).all()


def test_gradients_at_a_label_that_cannot_be(target):
    """p - 1 as ever where its logit, or what the bias makes of it, is -inf; 0 where it is masked."""
    logits, labels = np.array([[1, -INF, 0.5, 2], [0, 1, 2, 3]], np.float32), np.array([1, 3])
    bias, mask = np.array([0, 0, 0, -INF], np.float32), np.array([True, False, True, False])
    x, several = target.array(logits), target.array(labels)
    one = target.array(np.array([-1, -1], np.float32))
    for given in ({"bias": bias}, {"mask": mask}):
        want = oracle.softmax(transformed(logits, **given)) - (np.arange(4) == labels[:, None])
        if "mask" in given:
            want[[0, 1], labels] = 0
        given = on(target, given)
        loss, found = map(target.get, gpusoftmax.cross_entropy_with_grad(x, several, reduction="none", **given))
        assert loss[0] == INF
        np.testing.assert_allclose(found, want, atol=1e-6)
        of_tokens = target.get(gpusoftmax.token_logprobs_backward(x, several, one, **given))
        np.testing.assert_allclose(of_tokens, want, atol=1e-6)


def test_gradients_of_soft_argmax(target):
    logits = inputs.make("spread", (4, 300), np.float32)
    options = options_for(logits)
    z = transformed(logits, **options)
    given, x = on(target, options), target.array(logits)
    expected = gpusoftmax.soft_argmax(x, **given)
    np.testing.assert_allclose(target.get(expected), oracle.soft_argmax(z), rtol=1e-5)
    upstream = np.array([1, 2, 3, 4], np.float32)
    got = target.get(gpusoftmax.soft_argmax_backward(x, expected, target.array(upstream), **given))
    want = oracle.soft_argmax_backward(z, oracle.soft_argmax(z), upstream) * slope(logits, **options)
    np.testing.assert_allclose(got, want, atol=2e-3, rtol=1e-3)
    assert (got[z == -INF] == 0).all()


@pytest.mark.parametrize("shape", [(70, 40), *(pytest.param(shape, marks=MATRIX) for shape in ((3, 5000), (2, 64)))])
@pytest.mark.parametrize("op", ["softmax", pytest.param("log_softmax", marks=MATRIX)])
def test_backwards_with_a_temperature_for_each_row(target, op, shape):
    """A row has the bits that it gets from its temperature alone."""
    logits, upstream = inputs.make("spread", shape, np.float32), inputs.make("peaked", shape, np.float32)
    temperature = np.random.default_rng(0).uniform(0.2, 3, shape[0])  # float64: to be rounded to float32
    temperature[:2] = NAN, -1
    result = getattr(gpusoftmax, op)(logits)
    backward = getattr(gpusoftmax, f"{op}_backward")
    given = [target.array(one) for one in (result, upstream, temperature)]
    found = target.get(backward(*given[:2], temperature=given[2]))
    assert np.isnan(found[:2]).all()
    for row in range(2, shape[0]):
        alone = target.array(result[row : row + 1]), target.array(upstream[row : row + 1])
        same_one = float(np.float32(temperature[row]))
        expected = target.get(backward(*alone, temperature=same_one))
        assert expected.tobytes() == found[row : row + 1].tobytes()
        if target.name == "emulated" and row > 4:
            break
    beside = [target.array(np.ascontiguousarray(one.T)) for one in (result, upstream)]  # rows side by side
    np.testing.assert_allclose(target.get(backward(*beside, 0, temperature=given[2])).T, found, rtol=1e-4, atol=1e-6)


@MATRIX
def test_smoothing_under_a_softcap(target):
    logits = inputs.make("spread", (3, 300), np.float32)
    options = {"softcap": 6.0, "temperature": 0.7}
    labels = np.array([1, 299, 7])
    loss, dlogits = gpusoftmax.cross_entropy_with_grad(
        target.array(logits), target.array(labels), label_smoothing=0.2, **options
    )
    z = transformed(logits, **options)
    exact = float(oracle.cross_entropy(z, labels, label_smoothing=0.2))
    np.testing.assert_allclose(float(target.get(loss)), exact, rtol=1e-5)
    want = oracle.cross_entropy_grad(z, labels, label_smoothing=0.2) * slope(logits, **options)
    np.testing.assert_allclose(target.get(dlogits), want, atol=1e-6)


# ---------------------------------------------------------------- temperature 0


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=MATRIX)])
@pytest.mark.parametrize("n_cols", N_COLS)
def test_temperature_0_is_the_argmax(dtype, n_cols):
    logits = inputs.every_family(2, n_cols, dtype, seed=n_cols)
    probs = gpusoftmax.softmax(logits, temperature=0)
    columns = oracle.argmax(logits)
    finite = np.isfinite(logits.max(axis=1))
    assert np.array_equal(probs[finite], (np.arange(n_cols) == columns[:, None])[finite])
    assert np.isnan(probs[~finite]).all()
    options = options_for(logits, temperature=False)
    z = transformed(logits, **{**options, "softcap": None})
    options["softcap"] = 1e6  # changes the order of none
    probs = gpusoftmax.softmax(logits, temperature=0.0, **options)
    some = np.isfinite(z.max(axis=1)) & np.isfinite(logits).any(axis=1)
    assert (probs[some].max(axis=1) == 1).all() and ((probs[some] == 0).sum(axis=1) == n_cols - 1).all()


def test_temperature_0_of_special_rows():
    logits = np.array([[1, 1, 0], [NAN, 1, 2], [-INF] * 3, [INF, 0, 0], [-INF, -1, -1]], np.float32)
    expected = [[1, 0, 0], [NAN] * 3, [NAN] * 3, [NAN] * 3, [0, 1, 0]]
    assert np.array_equal(gpusoftmax.softmax(logits, temperature=0), expected, equal_nan=True)
    zeros = gpusoftmax.softmax(logits[2:3], temperature=0, empty_row="zero")
    assert (zeros == 0).all()
    assert np.array_equal(gpusoftmax.softmax(logits.T, axis=0, temperature=0).T, expected, equal_nan=True)


@pytest.mark.parametrize("n_valid", [0, np.zeros(2, np.uint8), np.array([0, 2])])
@pytest.mark.parametrize(("empty_row", "nothing"), [("nan", NAN), ("zero", 0)])
def test_temperature_0_of_rows_without_columns(n_valid, empty_row, nothing):
    logits = np.array([[3, 2, 1], [1, 2, 3]], np.float32)
    expected = np.where(np.reshape(n_valid, (-1, 1)) > 0, [[0, 1, 0]], np.full((2, 3), nothing))
    for x, axis in ((logits, 1), (logits.T, 0)):
        probs = gpusoftmax.softmax(x, axis, temperature=0, n_valid=n_valid, empty_row=empty_row)
        assert np.array_equal(np.moveaxis(probs, axis, 1), expected, equal_nan=True)


@pytest.mark.parametrize("axis", [(1, 2), (-1, 1), None])
def test_temperature_0_along_several_axes(axis):
    logits = np.random.default_rng(0).permutation(24).astype(np.float32).reshape(2, 3, 4)
    expected = logits == logits.max(axis=axis, keepdims=True)
    assert np.array_equal(gpusoftmax.softmax(logits, axis, temperature=0), expected)


def test_temperature_0_needs_an_addition():
    with emulated_gpu("sm_90") as gpu, pytest.raises(TypeError, match="temperature is 0, which takes an addition"):
        gpusoftmax.softmax(gpu.array(np.zeros((2, 3), np.float32)), temperature=0)


# ---------------------------------------------------------------- rows without anything


@pytest.mark.parametrize("n_cols", [*(pytest.param(n, marks=MATRIX) for n in (5, 300)), 4099])
@pytest.mark.parametrize("smoothing", [0.0, pytest.param(0.1, marks=MATRIX)])
def test_empty_rows(target, n_cols, smoothing):
    logits = inputs.make("spread", (4, n_cols), np.float32)
    mask = np.ones((4, n_cols), bool)
    mask[1] = False
    logits[3, 0] = NAN  # not empty, though nothing else of it is left
    mask[3, 1:] = False
    x = target.array(logits)
    # Those of test_everything_at_once, whose kernels serve here too.
    given = on(target, {**options_for(logits), "mask": mask, "n_valid": np.full(4, n_cols)})
    softmax = partial(gpusoftmax.softmax, x, **given)
    probs = target.get(softmax())
    assert np.isnan(probs[[1, 3]]).all() and np.isfinite(probs[[0, 2]]).all()
    zero = target.get(softmax(empty_row="zero"))
    assert (zero[1] == 0).all() and np.isnan(zero[3]).all()
    assert np.array_equal(zero[[0, 2]], probs[[0, 2]])
    log_probs = target.get(gpusoftmax.log_softmax(x, empty_row="zero", **given))
    assert (log_probs[1] == -INF).all() and np.isnan(log_probs[3]).all()
    assert target.get(gpusoftmax.logsumexp(x, **given))[1] == -INF
    labels = target.array(np.zeros(4, np.int64))
    options = {**given, "reduction": "none", "label_smoothing": smoothing}
    loss, dlogits = map(target.get, gpusoftmax.cross_entropy_with_grad(x, labels, empty_row="zero", **options))
    assert loss[1] == 0 and (dlogits[1] == 0).all()
    assert np.isnan(loss[3]) and np.isnan(dlogits[3]).all()
    assert np.isfinite(loss[0]) and np.isfinite(dlogits[0]).all()
    loss, dlogits = map(target.get, gpusoftmax.cross_entropy_with_grad(x, labels, **options))
    assert np.isnan(loss[1]) and np.isnan(dlogits[1]).all()


def test_no_valid_columns(target):
    logits, n_valid = np.zeros((3, 40), np.float32), np.array([0, 40, 1])
    probs = target.get(gpusoftmax.softmax(target.array(logits), n_valid=target.array(n_valid), empty_row="zero"))
    assert (probs[0] == 0).all() and np.allclose(probs[1], 1 / 40) and probs[2, 0] == 1 and probs[2, 1:].max() == 0


def test_what_is_masked_is_not_looked_at(target):
    """NaN and infinity count for nothing where they are masked."""
    logits = inputs.make("spread", (2, 300), np.float32)
    logits[0, 7], logits[1, 299] = NAN, INF
    mask = np.isfinite(logits)
    probs = target.get(gpusoftmax.softmax(target.array(logits), mask=target.array(mask)))
    assert np.isfinite(probs).all() and (probs[~mask] == 0).all()


def test_a_bad_temperature_makes_its_row_nan(target):
    logits = inputs.make("spread", (6, 40), np.float32)
    # The bias changes nothing; with it, the kernel is that of the tests above.
    options = {"temperature": np.array([1, 0, -1, NAN, INF, 2], np.float32), "bias": np.zeros(40, np.float32)}
    probs = target.get(gpusoftmax.softmax(target.array(logits), **on(target, options)))
    assert np.isnan(probs[1:5]).all() and np.isfinite(probs[[0, 5]]).all()


# ---------------------------------------------------------------- shapes and layouts


def same(target, logits, options, others):
    """Whether two ways to say the same give the same bits."""
    return bits(target, "softmax", logits, **options) == bits(target, "softmax", logits, **others)


def test_shapes_that_are_stretched():
    target = Cpu()  # strides are the public function's: any target will do
    logits = inputs.make("spread", (3, 70), np.float32)
    rng = np.random.default_rng(0)
    mask, bias = rng.random(70) < 0.7, rng.normal(size=70).astype(np.float32)
    # Every option, as in the tests above: their kernel, and one for a mask of bits.
    full = {**options_for(logits), "mask": np.tile(mask, (3, 1)), "bias": np.tile(bias, (3, 1))}
    assert same(target, logits, full, {**full, "mask": mask, "bias": bias})
    assert same(target, logits, full, {**full, "mask": mask[None], "bias": bias[None]})
    assert same(target, logits, full, {**full, "mask": packed(mask), "bias": bias[None]})
    per_row = rng.normal(size=(3, 1)).astype(np.float32)
    assert same(target, logits, {**full, "bias": np.tile(per_row, 70)}, {**full, "bias": per_row})
    assert same(target, logits, {**full, "n_valid": np.full(3, 33)}, {**full, "n_valid": 33})
    assert same(target, logits, {**full, "n_valid": np.full(3, 33)}, {**full, "n_valid": np.full(3, 33, np.uint8)})
    more_than_there_are = np.array([99, 70, 70])
    assert same(target, logits, {**full, "n_valid": more_than_there_are}, {**full, "n_valid": 70})


def test_several_axes():
    """A mask and a bias with the axes of the columns, or with all."""
    x = inputs.make("spread", (2, 5, 14), np.float32)
    rng = np.random.default_rng(0)
    bias, mask = rng.normal(size=(5, 14)).astype(np.float32), rng.random((5, 14)) < 0.7
    others = {"softcap": 12.0, "n_valid": np.array([60, 70]), "temperature": np.array([0.5, 2], np.float32)}
    flat = gpusoftmax.softmax(x.reshape(2, 70), bias=bias.reshape(70), mask=np.tile(mask.reshape(70), (2, 1)), **others)
    for options in (
        {"bias": bias, "mask": mask},
        {"bias": bias[None], "mask": np.tile(mask, (2, 1, 1))},
        {"bias": np.tile(bias, (2, 1, 1)), "mask": mask[None]},
    ):
        probs = gpusoftmax.softmax(x, axis=(1, 2), **options, **others)
        assert probs.tobytes() == flat.tobytes()
    with pytest.raises(ValueError, match=r"^mask has shape \(70,\), expected \(5, 14\), .* or \(2, 5, 14\)"):
        gpusoftmax.softmax(x, axis=(1, 2), mask=mask.reshape(70))


def test_another_axis(target):
    logits = inputs.make("spread", (2, 45, 6), np.float32)
    rng = np.random.default_rng(0)
    mask, bias = rng.random((2, 45, 6)) < 0.8, rng.normal(size=45).astype(np.float32)
    n_valid, temperature = rng.integers(40, 46, (2, 6)), rng.uniform(0.5, 2, (2, 6)).astype(np.float32)
    words = np.moveaxis(packed(np.moveaxis(mask, 1, -1)), -1, 1)
    options = {"bias": bias, "softcap": 12.0, "n_valid": n_valid, "temperature": temperature}
    moved = np.ascontiguousarray(np.moveaxis(logits, 1, -1))
    last = gpusoftmax.softmax(target.array(moved), **on(target, {**options, "mask": np.moveaxis(mask, 1, -1).copy()}))
    last = np.moveaxis(target.get(last), -1, 1)
    for way in (mask, words):
        x = target.array(logits)
        probs = target.get(gpusoftmax.softmax(x, axis=1, **on(target, {**options, "mask": way})))
        np.testing.assert_allclose(probs, last, rtol=1e-5, atol=1e-7)
        assert (probs[~mask] == 0).all()


def test_strides_change_no_bit(target):
    logits = inputs.make("spread", (4, 133), np.float32)
    options = options_for(logits)
    expected = bits(target, "log_softmax", logits, **options)
    everything = {"x": logits, **{name: value for name, value in options.items() if isinstance(value, np.ndarray)}}
    for name, array in everything.items():
        wide = np.zeros((*array.shape[:-1], 2 * array.shape[-1] + 1), array.dtype)
        wide[..., 1::2] = array
        given = {**options, "x": logits, name: wide[..., 1::2]}
        assert bits(target, "log_softmax", given.pop("x"), **given) == expected, name
        backwards = {**options, "x": logits, name: array[::-1].copy()[::-1]}
        assert bits(target, "log_softmax", backwards.pop("x"), **backwards) == expected, name


def test_the_batch_changes_no_bit(target):
    logits = inputs.make("spread", (40, 517), np.float32)
    options = options_for(logits)
    probs = target.get(gpusoftmax.softmax(target.array(logits), **on(target, options)))
    for row in (0, 17, 39):
        own = {
            name: value[row : row + 1] if isinstance(value, np.ndarray) and value.shape[0] == 40 else value
            for name, value in options.items()
        }
        alone = target.get(gpusoftmax.softmax(target.array(logits[row : row + 1]), **on(target, own)))
        assert np.array_equal(alone[0], probs[row])


def test_in_place_and_replayed(target):
    """The second call of a layout replays the first, with other arrays of the same layout."""
    logits = inputs.make("spread", (4, 300), np.float32)
    options = options_for(logits)
    expected = target.get(gpusoftmax.softmax(target.array(logits), **on(target, options)))
    for shift in (0, 1, 2):
        rolled = {
            name: np.roll(value, shift, axis=0) if isinstance(value, np.ndarray) and len(value) == 4 else value
            for name, value in options.items()
        }
        x = target.array(np.roll(logits, shift, axis=0))
        assert gpusoftmax.softmax(x, out=x, **on(target, rolled)) is x
        assert np.array_equal(target.get(x), np.roll(expected, shift, axis=0))


@pytest.mark.parametrize("threads", [1, 2])
def test_long_rows_on_several_threads(threads):
    import numba

    logits = inputs.make("spread", (3, 70001), np.float32)
    options = options_for(logits)
    before = numba.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    try:
        probs = gpusoftmax.softmax(logits, **options)
    finally:
        numba.set_num_threads(before)
    np.testing.assert_allclose(probs, oracle.softmax(transformed(logits, **options)), rtol=1e-4, atol=1e-30)


def test_a_row_of_a_cluster():
    logits = inputs.make("spread", (2, 40003), np.float32)
    options = options_for(logits)
    with emulated_gpu("sm_90", track=False) as gpu:
        given = {name: gpu.array(value) if isinstance(value, np.ndarray) else value for name, value in options.items()}
        probs = gpu.get(gpusoftmax.softmax(gpu.array(logits), **given))
    np.testing.assert_allclose(probs, oracle.softmax(transformed(logits, **options)), rtol=1e-4, atol=1e-30)


# ---------------------------------------------------------------- sampling


def drawn(target, logits, **options):
    seeds = target.array(np.arange(len(logits)))
    return target.get(gpusoftmax.sample(target.array(logits), rng=(seeds, 3), **on(target, options)))


def test_sampling(target):
    """From logits that go through a transform as from those that have gone through it before."""
    logits = inputs.make("ties", (60, 90), np.float32)
    options = options_for(logits)
    mask, n_valid = options["mask"], options["n_valid"]
    bias = np.arange(90, dtype=np.float32) % 5
    kept = np.where(mask & (np.arange(90) < n_valid[:, None]), logits, -INF).astype(np.float32)
    given = {"mask": packed(mask), "n_valid": n_valid}
    unchanged = {"bias": np.zeros(90, np.float32), "temperature": np.ones(60, np.float32)}  # the kernel of those below
    assert np.array_equal(drawn(target, logits, top_k=9, **given, **unchanged), drawn(target, kept, top_k=9))
    halved = (2 * kept + bias).astype(np.float32)
    temperature = np.full(60, 0.5, np.float32)
    own = drawn(target, logits, bias=bias, temperature=temperature, top_k=9, **given)
    assert np.array_equal(own, drawn(target, halved, top_k=9))
    assert np.array_equal(drawn(target, logits, bias=bias, temperature=0, **given), (kept + bias).argmax(axis=1))


@MATRIX
def test_log_probability_of_what_was_drawn(target):
    logits = inputs.make("spread", (6, 90), np.float32)
    options = {**options_for(logits, temperature=False), "temperature": 0.7}
    seeds = target.array(np.arange(6))
    found = gpusoftmax.sample(
        target.array(logits), rng=(seeds, 0), return_logprob=True, return_entropy=True, **on(target, options)
    )
    again = gpusoftmax.token_logprobs(target.array(logits), found.index, return_entropy=True, **on(target, options))
    for one, other in ((found.logprob, again.logprob), (found.entropy, again.entropy)):
        assert np.isfinite(target.get(one)).all() and np.array_equal(target.get(one), target.get(other))


def test_experts(target):
    logits = inputs.make("spread", (5, 64), np.float32)
    bias, mask = np.arange(64, dtype=np.float32) % 3, np.arange(64) % 4 != 0
    kept = np.where(mask, logits + bias, -INF).astype(np.float32)
    given = on(target, {"bias": bias, "mask": mask})
    probs, indices = map(target.get, gpusoftmax.topk_softmax(target.array(logits), 4, **given))
    other, others = map(target.get, gpusoftmax.topk_softmax(target.array(kept), 4))
    assert np.array_equal(indices, others) and np.array_equal(probs, other)
