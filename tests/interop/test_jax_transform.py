"""gpusoftmax.jax of logits that go through a transform: the answers and gradients of jax.nn, in float64.

What the kernels compute is tested in tests/test_transform.py; here, that it is differentiated.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import gpusoftmax
import gpusoftmax.jax as ours

INF = np.inf
MATRIX = pytest.mark.matrix
PAIRS = {
    "softmax": (ours.softmax, jax.nn.softmax),
    "log_softmax": (ours.log_softmax, jax.nn.log_softmax),
    "logsumexp": (ours.logsumexp, jax.nn.logsumexp),
}


SOME = ["softmax", *(pytest.param(name, marks=MATRIX) for name in list(PAIRS)[1:])]
"""Each is a kernel to compile for every way to transform."""


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def random(*shape, dtype=np.float64, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(dtype))


def everything(rows=3, n_cols=7):
    """Every option, for logits of shape (rows, n_cols); no row is masked whole, and column 2 nowhere."""
    mask = np.random.default_rng(1).random((rows, n_cols)) < 0.6
    mask[:, 2] = True
    return {
        "temperature": jnp.abs(random(rows, seed=2)) + 0.5,
        "bias": random(n_cols, seed=3),
        "softcap": 2.0,
        "mask": jnp.asarray(mask),
        "n_valid": jnp.asarray(n_cols - np.arange(rows) % 3),
    }


def through(x, temperature=1.0, bias=None, softcap=None, mask=None, n_valid=None):
    """The transform along the last axis, as anybody would write it."""
    z = x / (temperature[..., None] if getattr(temperature, "ndim", 0) else temperature)
    z = z if bias is None else z + bias
    z = z if softcap is None else softcap * jnp.tanh(z / softcap)
    z = z if mask is None else jnp.where(mask, z, -INF)
    n_valid = n_valid[..., None] if getattr(n_valid, "ndim", 0) else n_valid
    return z if n_valid is None else jnp.where(jnp.arange(x.shape[-1]) < n_valid, z, -INF)


def packed(mask):
    """A bit for each column along the last axis."""
    padded = np.pad(np.asarray(mask), [(0, 0), (0, -mask.shape[-1] % 32)])
    return jnp.asarray(np.packbits(padded, axis=-1, bitorder="little").view(np.uint32))


def number(result, seed=9):
    """One number of all results that are finite."""
    weights = random(*result.shape, seed=seed)
    return (jnp.where(jnp.isfinite(result), result, 0) * weights).sum()


def agree(name, x, options, wanted, expected=None):
    """Values, and first and second derivatives of the logits and of the options that are wanted."""
    function, theirs = PAIRS[name]
    differentiable = x, *[options[one] for one in wanted]

    def one(x, *given):
        return function(x, **{**options, **dict(zip(wanted, given, strict=True))})

    def two(x, *given):
        return theirs(through(x, **{**(expected or options), **dict(zip(wanted, given, strict=True))}), -1)

    np.testing.assert_allclose(one(*differentiable), two(*differentiable), rtol=1e-12, atol=1e-12)
    every = tuple(range(len(differentiable)))
    slopes = [jax.grad(lambda *given, f=f: number(f(*given)), every) for f in (one, two)]
    for got, exact in zip(*(slope(*differentiable) for slope in slopes), strict=True):
        np.testing.assert_allclose(got, exact, rtol=1e-11, atol=1e-13)
    seconds = [
        jax.grad(lambda *given, f=f: sum((one**2).sum() for one in f(*given)), every)(*differentiable) for f in slopes
    ]
    for got, exact in zip(*seconds, strict=True):
        np.testing.assert_allclose(got, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", SOME)
def test_everything(name):
    agree(name, random(3, 7), everything(), ["temperature", "bias"])


WAYS = {
    "temperature of rows": {"temperature": np.array([0.5, 1.0, 2.0])},
    "one temperature": {"temperature": np.array(0.7)},
    "bias": {"bias": np.linspace(-1, 1, 7), "temperature": 0.7},
    "bias of rows": {"bias": np.linspace(-1, 1, 21).reshape(3, 7)},
    "softcap": {"softcap": 1.5, "temperature": 0.7},
    "mask": {"mask": np.arange(7) % 3 != 0, "temperature": 0.7},
    "n_valid": {"n_valid": np.array([7, 3, 5])},
    "n_valid of all": {"n_valid": 5},
}


@pytest.mark.parametrize("way", [way if "mask" in way else pytest.param(way, marks=MATRIX) for way in WAYS])
@pytest.mark.parametrize("name", SOME)
def test_each_option(name, way):
    options = {key: jnp.asarray(one) if isinstance(one, np.ndarray) else one for key, one in WAYS[way].items()}
    wanted = [key for key in ("temperature", "bias") if isinstance(options.get(key), jax.Array)]
    agree(name, random(3, 7), options, wanted)
    if wanted:  # and without the logits
        f = lambda given: number(PAIRS[name][0](random(3, 7), **{**options, wanted[0]: given}))  # noqa: E731
        check_grads(f, (options[wanted[0]],), order=2, modes=["rev"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SOME)
def test_central_differences(name):
    options = everything()

    def function(x, temperature, bias):
        return number(PAIRS[name][0](x, **{**options, "temperature": temperature, "bias": bias}))

    given = random(3, 7), options["temperature"], options["bias"]
    check_grads(function, given, order=2, modes=["rev"], atol=1e-5, rtol=1e-5)


@MATRIX
@pytest.mark.parametrize("axis", [0, (0, 2), None])
def test_other_axes(axis):
    """Beside several axes, a bias may have their shape."""
    x, axes = random(3, 4, 2), (0, 1, 2) if axis is None else (axis,) if axis == 0 else axis
    sizes = [size if one in axes else 1 for one, size in enumerate(x.shape)]
    bias, rows = random(*[x.shape[one] for one in axes], seed=1), [n for k, n in enumerate(x.shape) if k not in axes]
    temperature = jnp.abs(random(*rows, seed=2)) + 0.5

    def one(x, temperature, bias):
        if axis == (0, 2):  # which no single stride walks
            x, bias = jnp.moveaxis(x, 1, 0), bias
            return jnp.moveaxis(ours.softmax(x, (1, 2), temperature=temperature, bias=bias), 0, 1)
        return ours.softmax(x, axis, temperature=temperature, bias=bias)

    def two(x, temperature, bias):
        per_row = temperature.reshape([1 if k in axes else n for k, n in enumerate(x.shape)])
        return jax.nn.softmax(x / per_row + bias.reshape(sizes), axes)

    np.testing.assert_allclose(one(x, temperature, bias), two(x, temperature, bias), rtol=1e-12)
    both = [jax.grad(lambda *given, f=f: number(f(*given)), (0, 1, 2))(x, temperature, bias) for f in (one, two)]
    for got, exact in zip(*both, strict=True):
        np.testing.assert_allclose(got, exact, rtol=1e-11, atol=1e-13)


@MATRIX
@pytest.mark.parametrize("name", SOME)
def test_bits_are_bools(name):
    x, mask = random(3, 40), jnp.asarray(np.random.default_rng(1).random((3, 40)) < 0.6)
    for words, bools in ((packed(mask).view(jnp.int32), mask), (packed(mask[:1]), mask[0])):
        agree(name, x, {"mask": words, "n_valid": 35}, [], {"mask": bools, "n_valid": 35})


@pytest.mark.parametrize("name", SOME)
def test_values_are_those_of_the_core(name):
    """Bit for bit, whether a gradient is wanted or not, and for arrays of NumPy too."""
    x, options, (function, _) = random(3, 7, dtype=np.float32), everything(), PAIRS[name]
    want = getattr(gpusoftmax, name)(x, **options)
    values = function(x, **options), jax.vjp(lambda x: function(x, **options), x)[0]
    of_numpy = {key: np.asarray(one) if isinstance(one, jax.Array) else one for key, one in options.items()}
    for value in (*values, function(np.asarray(x), **of_numpy)):
        assert value.dtype == jnp.float32 and np.asarray(value).tobytes() == np.asarray(want).tobytes()


@MATRIX
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_types(dtype):
    x, options = random(3, 7).astype(dtype), everything()
    given = x, options["temperature"].astype(jnp.float32), options["bias"].astype(dtype)

    def gradients(softmax, *given):
        def function(x, temperature, bias):
            result = softmax(x, **{**options, "temperature": temperature, "bias": bias})
            return number(result.astype(jnp.float64))

        return jax.grad(function, (0, 1, 2))(*given)

    found = gradients(ours.softmax, *given)
    exact = gradients(lambda x, **o: jax.nn.softmax(through(x, **o), -1), *(one.astype(jnp.float64) for one in given))
    assert [one.dtype for one in found] == [dtype, jnp.float32, dtype]
    for got, want in zip(found, exact, strict=True):
        np.testing.assert_allclose(got.astype(jnp.float64), want, rtol=0.02, atol=5e-3)


@pytest.mark.parametrize("name", SOME)
def test_what_is_masked_has_no_gradient(name):
    """Whatever it holds, and in the second derivative too."""
    options = everything()
    masked = np.asarray(through(jnp.zeros((3, 7)), mask=options["mask"], n_valid=options["n_valid"])) == -INF
    x = np.array(random(3, 7))
    x[masked] = np.resize([np.nan, INF, -INF, 1e300], masked.sum())
    first = jax.grad(
        lambda x, *given: number(PAIRS[name][0](x, **{**options, **dict(zip(WANTED, given, strict=True))}))
    )
    given = [options[one] for one in WANTED]
    slope = first(jnp.asarray(x), *given)
    second = jax.grad(lambda x, *given: (first(x, *given) ** 2).sum(), (0, 1, 2))(jnp.asarray(x), *given)
    for gradient in (slope, second[0]):
        assert np.isfinite(gradient).all() and not gradient[masked].any() and (gradient[:, 2] != 0).all()
    assert all(np.isfinite(one).all() for one in second)


WANTED = "temperature", "bias"


def test_whatever_the_bias_is_where_it_is_masked():
    """Behind a softcap, too, whose slope at NaN is none."""
    x, options = random(3, 7), everything()
    kept = through(jnp.zeros((3, 7)), mask=options["mask"], n_valid=options["n_valid"]) == 0
    bias = jnp.where(kept, options.pop("bias"), jnp.asarray([np.nan, INF, -INF] * 7).reshape(3, 7))
    first = jax.grad(lambda x, bias: ours.softmax(x, bias=bias, **options)[:, 2].sum(), (0, 1))

    def derivatives(bias):
        second = jax.grad(lambda x, bias: sum((one**2).sum() for one in first(x, bias)), (0, 1))
        return *first(x, bias), *second(x, bias)

    for got, want in zip(derivatives(bias), derivatives(jnp.where(kept, bias, 0)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-15)
        assert not got[~kept].any()


def test_logits_of_minus_infinity():
    """Temperatures of rows have a gradient of the others alone."""
    x = jnp.asarray([[0.0, -INF, 1.0, 2.0], [1.0, 2.0, 3.0, -INF]])
    kept = x > -INF

    def slopes(softmax):
        return jax.grad(lambda x, t: number(softmax(x, t)), (0, 1))(x, jnp.asarray([0.5, 2.0]))

    found = slopes(lambda x, t: ours.softmax(x, temperature=t))
    exact = slopes(lambda x, t: jax.nn.softmax(jnp.where(kept, jnp.where(kept, x, 0) / t[:, None], -1e9), -1))
    for got, want in zip(found, exact, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("options", [{}, pytest.param({"softcap": 2.0}, marks=MATRIX)], ids=["mask", "softcap"])
@pytest.mark.parametrize("name", SOME)
def test_rows_of_which_nothing_is_left(name, options):
    x, mask = random(3, 7), np.ones((3, 7), bool)
    mask[1] = False
    function = PAIRS[name][0]
    zero = {} if name == "logsumexp" else {"empty_row": "zero"}
    first = jax.grad(lambda x: number(function(x, mask=mask, **zero, **options)))
    second = jax.grad(lambda x: (first(x) ** 2).sum())
    for gradient in (first(x), second(x)):
        assert np.isfinite(gradient).all() and not gradient[1].any() and gradient[0].all()
    value = function(x, mask=mask, **options)
    assert (value[1] == -INF) if name == "logsumexp" else np.isnan(value[1]).all()
    if not options:  # of logits that are -inf without a mask, too
        gradient = jax.grad(lambda x: number(function(x, **zero)))(jnp.where(mask, x, -INF))
        assert name == "logsumexp" or (not gradient[1].any() and gradient[0].all())


def test_what_is_refused():
    x = random(3, 4)
    for error, message, call in (
        (ValueError, "^softcap is 0", lambda: ours.softmax(x, softcap=0)),
        (ValueError, "^empty_row is 'one'", lambda: ours.log_softmax(x, empty_row="one")),
        (ValueError, "^n_valid is 9", lambda: ours.logsumexp(x, n_valid=9)),
        (ValueError, r"^bias has shape \(3,\)", lambda: ours.softmax(x, bias=jnp.zeros(3))),
        (ValueError, r"^temperature has shape \(2,\)", lambda: ours.softmax(x, temperature=jnp.ones(2))),
        (TypeError, "^mask has dtype float64", lambda: ours.softmax(x, mask=jnp.ones(4))),
        (TypeError, "^x is traced by jax.*outside of jit", lambda: jax.jit(
            lambda bias: ours.softmax(x, bias=bias))(jnp.zeros(4))),
        (TypeError, "^x is traced by jax.*outside of jit", lambda: jax.jit(
            lambda mask: ours.softmax(x, mask=mask))(jnp.ones(4, bool))),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()
