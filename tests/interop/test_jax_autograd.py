"""gpusoftmax.jax: JAX's answers, gradients of any order outside of jit, and clear errors inside."""

import doctest
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import gpusoftmax
import gpusoftmax.jax as ours

PUBLIC = ["softmax", "log_softmax", "logsumexp", "cross_entropy"]


def random(*shape, dtype=np.float64, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(dtype))


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


ROW_OPS = {
    "softmax": (ours.softmax, jax.nn.softmax),
    "log_softmax": (ours.log_softmax, jax.nn.log_softmax),
    "logsumexp": (ours.logsumexp, jax.nn.logsumexp),
}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("axis", [0, -1, (0, 2), None])
@pytest.mark.parametrize("name", ROW_OPS)
def test_row_ops(name, axis, temperature):
    """The values and both derivatives of JAX's functions, and central differences."""
    function, theirs = ROW_OPS[name]
    x, upstream = random(3, 4, 2), random(3, 4, 2, seed=1)
    every = (0, 1, 2) if axis is None else axis

    def one(x):
        return function(x, axis, temperature=temperature)

    def two(x):
        return theirs(x / temperature, every)

    np.testing.assert_allclose(one(x), two(x), rtol=1e-12, atol=1e-12)
    upstream = upstream[tuple(slice(size) for size in two(x).shape)] if two(x).ndim == 3 else jnp.ones(two(x).shape)
    results = [jax.vjp(each, x)[1](upstream)[0] for each in (one, two)]
    np.testing.assert_allclose(*results, rtol=1e-12, atol=1e-12)
    # From nested jax.grad, the second derivatives along a direction.
    direction = random(3, 4, 2, seed=2)
    seconds = [
        jax.grad(lambda x, each=each: (jax.grad(lambda x: (each(x) ** 2).sum())(x) * direction).sum())(x)
        for each in (one, two)
    ]
    np.testing.assert_allclose(*seconds, rtol=1e-10, atol=1e-12)
    check_grads(one, (x,), order=2, modes=["rev"], atol=1e-5, rtol=1e-5)


def test_logsumexp_keeps_dimensions():
    x = random(3, 4)
    assert ours.logsumexp(x, keepdims=True).shape == (3, 1)
    gradient = jax.grad(lambda x: ours.logsumexp(x, 0, keepdims=True).sum())(x)
    np.testing.assert_allclose(gradient, jax.nn.softmax(x, 0), rtol=1e-12)


def their_cross_entropy(logits, target, weight, axis, ignore_index, reduction, label_smoothing):
    """By one-hot labels, in JAX's operations."""
    n_cols = logits.shape[axis]
    counts = target != ignore_index
    weight = jnp.ones(n_cols) if weight is None else weight
    classes = jnp.where(counts, target, 0)
    shares = (1 - label_smoothing) * jax.nn.one_hot(classes, n_cols) + label_smoothing / n_cols
    losses = -(shares * weight * jax.nn.log_softmax(jnp.moveaxis(logits, axis, -1))).sum(-1) * counts
    if reduction == "mean":
        return losses.sum() / (weight[classes] * counts).sum()
    return losses.sum() if reduction == "sum" else losses


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("axis", "weighted", "smoothing"), list(itertools.product((1, -1), (False, True), (0.0, 0.1))))
def test_cross_entropy(reduction, axis, weighted, smoothing):
    shape = (3, 5, 2) if axis == 1 else (3, 2, 5)
    x, target = random(*shape), jnp.asarray([[0, 4], [1, -7], [2, 2]])
    weight = jnp.linspace(0.5, 2, 5) if weighted else None
    options = {"axis": axis, "ignore_index": -7, "reduction": reduction, "label_smoothing": smoothing}

    def one(x):
        return ours.cross_entropy(x, target, weight, **options)

    def two(x):
        return their_cross_entropy(x, target, weight, **options)

    np.testing.assert_allclose(one(x), two(x), rtol=1e-12, atol=1e-12)
    for scale in (1.0, 3.0):
        results = [jax.vjp(each, x)[1](scale * jnp.ones_like(two(x)))[0] for each in (one, two)]
        np.testing.assert_allclose(*results, rtol=1e-12, atol=1e-12)
    seconds = [
        jax.grad(lambda x, each=each: (jax.grad(lambda x: (each(x) ** 2).sum())(x) ** 2).sum())(x)
        for each in (one, two)
    ]
    np.testing.assert_allclose(*seconds, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_first_gradients_are_those_of_the_kernels(dtype):
    x, target = random(6, 40).astype(dtype), jnp.arange(6)
    probs, upstream = gpusoftmax.softmax(x), random(6, 40, seed=1).astype(dtype)
    gradient = jax.vjp(ours.softmax, x)[1](upstream)[0]
    assert gradient.dtype == dtype
    assert np.asarray(gradient).tobytes() == np.asarray(gpusoftmax.softmax_backward(probs, upstream)).tobytes()
    loss, dlogits = jax.value_and_grad(ours.cross_entropy)(x, target)
    expected = gpusoftmax.cross_entropy_with_grad(x, target)
    assert loss == expected[0] and np.asarray(dlogits).tobytes() == np.asarray(expected[1]).tobytes()
    assert jax.grad(lambda x: ours.logsumexp(x).sum())(x).dtype == dtype
    assert jax.grad(lambda x: ours.log_softmax(x)[0, 0])(x).dtype == dtype


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_loss_scales_come_in_before_half_types_are_rounded(reduction, dtype):
    """Gradients of one of many rows lie below what float16 can tell from 0."""
    x, target = 3 * random(50, 40).astype(dtype), jnp.arange(50) % 40
    options = {"reduction": reduction, "row_weight": jnp.linspace(0, 2.0**-17, 50).astype(dtype)}
    options.update({"normalizer": 1.0} if reduction == "mean" else {})
    upstream = 65536.0 if reduction == "mean" else 65536.0 * jnp.abs(random(50, dtype=np.float32, seed=1))

    def scaled(x, cross_entropy=ours.cross_entropy):
        return (cross_entropy(x, target, **options) * upstream).sum()

    with jax.numpy_dtype_promotion("strict"):
        gradient = jax.grad(scaled)(x)
    exact = jax.grad(partial(scaled, cross_entropy=their_whole_cross_entropy))(x.astype(jnp.float64)).astype(dtype)
    assert gradient.dtype == dtype and (gradient == exact).mean() > 0.99
    limits = {"rtol": float(jnp.finfo(dtype).eps), "atol": float(jnp.finfo(dtype).smallest_subnormal)}
    np.testing.assert_allclose(gradient.astype(jnp.float64), exact.astype(jnp.float64), **limits)


TARGETS = "labels", "shares", "probs"
OPTIONS = {
    "z_loss": {"z_loss": 0.01, "row_weight": np.array([0.5, 0, 2, 1])},
    "transform": {"temperature": np.array([0.5, 1, 2, 1]), "bias": np.arange(7.0), "softcap": 3.0},
    "mask": {"mask": np.arange(28).reshape(4, 7) % 5 != 0, "n_valid": 6, "empty_row": "zero"},
    "normalizer": {"normalizer": np.array(3.0)},
}


WHOLE = [*itertools.product(("z_loss", "transform", "mask"), ("mean", "none"), TARGETS)]
WHOLE += [("normalizer", "mean", target) for target in TARGETS]
BY_DEFAULT = [("z_loss", "none", "labels"), ("transform", "mean", "shares"), ("mask", "none", "probs")]
BY_DEFAULT += [("normalizer", "mean", "labels")]


@pytest.mark.parametrize(
    ("name", "reduction", "target"),
    [pytest.param(*case, marks=[] if case in BY_DEFAULT else pytest.mark.matrix) for case in WHOLE],
)
def test_whole_losses(name, reduction, target):
    """Every option of the core: its loss, and its gradient times what comes from above."""
    logits = random(4, 7)
    labels = jnp.array([1, 2, 3, -100])
    shares = jnp.array([[1, 2], [2, 4], [3, 1], [-100, -100]]), jnp.full((4, 2), 0.5)
    target = {"labels": labels, "shares": shares, "probs": jax.nn.softmax(random(4, 7, seed=1))}[target]
    options = {key: jnp.asarray(one) if isinstance(one, np.ndarray) else one for key, one in OPTIONS[name].items()}
    options["reduction"] = reduction
    upstream = 2.0 if reduction == "mean" else np.array([2.0, 3, 4, 5])
    loss, vjp = jax.vjp(lambda x: ours.cross_entropy(x, target, **options), logits)
    want, dlogits = gpusoftmax.cross_entropy_with_grad(logits, target, **options)
    assert loss.tobytes() == want.tobytes()
    (got,) = vjp(jnp.asarray(upstream) * jnp.ones(loss.shape))
    upstream = upstream if reduction == "mean" else upstream[:, None]
    np.testing.assert_allclose(got, upstream * dlogits, rtol=1e-15)


def their_whole_cross_entropy(logits, target, temperature=1.0, bias=None, **options):
    """The same of every target, in JAX's operations."""
    n_cols, softcap, z_loss = logits.shape[1], options.get("softcap"), options.get("z_loss", 0.0)
    z = logits / (temperature[:, None] if jnp.ndim(temperature) else temperature)
    z = z if bias is None else z + bias
    z = softcap * jnp.tanh(z / softcap) if softcap else z
    counts = jnp.ones(len(z), bool)
    if isinstance(target, tuple):
        q, counts = (jax.nn.one_hot(target[0], n_cols) * target[1][..., None]).sum(1), (target[0] != -100).any(1)
    elif target.ndim == 1:
        q, counts = jax.nn.one_hot(target, n_cols), target != -100
    else:
        q = target
    if "mask" in options:
        z = jnp.where(options["mask"] & (jnp.arange(n_cols) < options["n_valid"]), z, -1e9)
    smoothing, w = options.get("label_smoothing", 0.0), options.get("weight", jnp.ones(n_cols))
    r = options.get("row_weight", jnp.ones(len(z))) * counts
    mass, of_target = ((1 - smoothing) * q + smoothing / n_cols) * w, (q * w).sum(1)
    losses = -(mass * jax.nn.log_softmax(z)).sum(1) + z_loss * of_target * jax.nn.logsumexp(z, 1) ** 2
    losses = jnp.where(r != 0, r * losses, 0)
    if options["reduction"] == "none":
        return losses
    divisor = (r * of_target if not isinstance(target, tuple) and target.ndim == 1 else r).sum()
    return losses.sum() / options.get("normalizer", divisor)


SECONDS = {
    **OPTIONS,
    "z_loss": {**OPTIONS["z_loss"], "label_smoothing": 0.1, "weight": np.linspace(0.5, 2, 7)},
    "mask": {"mask": np.arange(28).reshape(4, 7) % 5 != 0, "n_valid": 6},
}
OF_SECONDS = [("z_loss", "none", "labels"), ("transform", "mean", "shares"), ("normalizer", "mean", "labels")]


@pytest.mark.parametrize(
    ("name", "reduction", "target"),
    [pytest.param(*case, marks=[] if case in OF_SECONDS else pytest.mark.matrix) for case in WHOLE],
)
def test_whole_losses_are_differentiable_twice(name, reduction, target):
    """Of the logits, and of the bias and the temperatures where there are some."""
    kept = np.arange(28).reshape(4, 7) % 5 != 0
    kept[:, 6] = False
    labels = jnp.asarray([*kept[:3].argmax(1), -100])
    shares = jnp.stack([labels, jnp.array([2, 2, 2, -100])], 1), jnp.full((4, 2), 0.5)
    probs = jax.nn.softmax(random(4, 7, seed=1)) * kept
    target = {"labels": labels, "shares": shares, "probs": probs}[target]
    options = {key: jnp.asarray(one) if isinstance(one, np.ndarray) else one for key, one in SECONDS[name].items()}
    options["reduction"] = reduction
    wanted = [key for key in ("temperature", "bias") if key in options]
    given = random(4, 7), *[options[key] for key in wanted]

    def loss(function, *given):
        result = function(given[0], target, **{**options, **dict(zip(wanted, given[1:], strict=True))})
        return (result * jnp.arange(1.0, 5)).sum() if reduction == "none" else result**2

    every = tuple(range(len(given)))
    both = [partial(loss, function) for function in (ours.cross_entropy, their_whole_cross_entropy)]
    slopes = [jax.grad(one, every) for one in both]
    seconds = [jax.grad(lambda *given, f=f: sum((one**2).sum() for one in f(*given)), every) for f in slopes]
    for ways in (slopes, seconds):
        for got, exact in zip(*(way(*given) for way in ways), strict=True):
            np.testing.assert_allclose(got, exact, rtol=1e-9, atol=1e-11)
    # Of the logits alone, which takes the kernel for the first one.
    alone = [jax.grad(lambda x, f=f: (jax.grad(lambda x: f(x, *given[1:]))(x) ** 2).sum())(given[0]) for f in both]
    np.testing.assert_allclose(*alone, rtol=1e-9, atol=1e-11)


OF_SOFT = [("z_loss", "mean", "probs"), ("transform", "none", "shares"), ("normalizer", "mean", "probs")]


@pytest.mark.parametrize(
    ("name", "reduction", "target"),
    [pytest.param(*case, marks=[] if case in OF_SOFT else pytest.mark.matrix) for case in WHOLE if case[2] != "labels"],
)
def test_probabilities_of_the_target_have_gradients(name, reduction, target):
    """Of any order, with those of the logits, of the bias and of the temperatures, or alone."""
    kept = np.arange(28).reshape(4, 7) % 5 != 0
    kept[:, 6] = False
    labels = jnp.stack([jnp.asarray([*kept[:3].argmax(1), -100]), jnp.array([2, 2, 2, -100])], 1)
    soft = jnp.abs(random(4, 2, seed=1)) if target == "shares" else jax.nn.softmax(random(4, 7, seed=1)) * kept
    options = {key: jnp.asarray(one) if isinstance(one, np.ndarray) else one for key, one in SECONDS[name].items()}
    options["reduction"] = reduction
    wanted = [key for key in ("temperature", "bias") if key in options]
    given = soft, random(4, 7), *[options[key] for key in wanted]

    def loss(function, soft, logits, *others):
        soft = (labels, soft) if target == "shares" else soft
        result = function(logits, soft, **{**options, **dict(zip(wanted, others, strict=True))})
        return (result * jnp.arange(1.0, 5)).sum() if reduction == "none" else result**2

    both = [partial(loss, function) for function in (ours.cross_entropy, their_whole_cross_entropy)]
    counted = np.ones(soft.shape, bool) if name != "mask" or target == "shares" else kept  # where it is masked it is 0
    for every in ((0,), tuple(range(len(given)))):
        slopes = [jax.grad(one, every) for one in both]
        seconds = [
            jax.grad(lambda *given, f=f: (f(*given)[0] ** 2 * counted).sum() + (f(*given)[-1] ** 3).sum(), every)
            for f in slopes
        ]
        for ways in (slopes, seconds) if name != "mask" else (slopes,):
            (got, *gots), (exact, *exacts) = (way(*given) for way in ways)
            np.testing.assert_allclose(got[counted], exact[counted], rtol=1e-9, atol=1e-11)
            assert not got[~counted].any()
            for one, other in zip(gots, exacts, strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-11)


def test_a_target_that_is_computed():
    """As where a student learns from a teacher that learns too: optax.softmax_cross_entropy, of half types too."""
    for dtype, tolerance in ((jnp.float64, 1e-12), (jnp.float32, 1e-5), (jnp.bfloat16, 0.02)):
        x, y = random(4, 7, dtype=dtype), random(4, 7, seed=1, dtype=dtype)
        x = x.at[0, 2].set(-np.inf)
        y = y.at[0, 2].set(-np.inf)  # a class that cannot be has no part in it
        found = jax.grad(lambda x, y: ours.cross_entropy(x, ours.softmax(y), reduction="sum"), (0, 1))(x, y)
        x, y = (jnp.where(one == -np.inf, -1e9, one.astype(jnp.float64)) for one in (x, y))
        exact = jax.grad(lambda x, y: -(jax.nn.softmax(y) * jax.nn.log_softmax(x)).sum(), (0, 1))(x, y)
        for got, want in zip(found, exact, strict=True):
            assert got.dtype == dtype
            np.testing.assert_allclose(got.astype(jnp.float64), want, rtol=tolerance, atol=tolerance)


def test_rows_that_do_not_count_have_no_second_gradient():
    """Of weight 0, ignored, or masked whole: whatever they hold."""
    x = random(4, 7).at[0].set(np.nan).at[1].set(np.inf)
    mask = jnp.ones((4, 7), bool).at[2].set(False)
    options = {"row_weight": jnp.array([0.0, 1, 1, 1]), "mask": mask, "z_loss": 0.1, "empty_row": "zero"}

    def function(x):
        return ours.cross_entropy(x, jnp.array([1, -100, 2, 3]), reduction="sum", **options)

    first = jax.grad(function)
    for gradient in (first(x), jax.grad(lambda x: (first(x) ** 2).sum())(x)):
        assert np.isfinite(gradient).all() and not gradient[:3].any() and gradient[3].all()


def test_a_step_of_training():
    """The loss falls, and the parameters are those of JAX's own step."""
    features, target = random(16, 8), jnp.arange(16) % 4
    parameters = theirs = random(8, 4, seed=1)
    losses = []
    for _ in range(5):
        loss, gradient = jax.value_and_grad(lambda w: ours.cross_entropy(features @ w, target))(parameters)
        parameters -= 0.5 * gradient
        losses.append(float(loss))
        gradient = jax.grad(lambda w: their_cross_entropy(features @ w, target, None, -1, -100, "mean", 0.0))(theirs)
        theirs -= 0.5 * gradient
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    np.testing.assert_allclose(parameters, theirs, rtol=1e-10)


def test_ignored_rows_have_no_gradient():
    x = jnp.asarray([[0.0, 1.0], [np.nan, 0.0]])
    gradient = jax.vjp(lambda x: ours.cross_entropy(x, jnp.array([1, -100]), reduction="none"), x)[1](
        jnp.asarray([1.0, np.inf])
    )[0]
    assert np.isfinite(gradient[0]).all() and not gradient[1].any()


@pytest.mark.parametrize(("n_cols", "label"), [(256, 156), (300, 3)], ids=["-100 wrapped around", "256 more"])
def test_bytes_as_labels(n_cols, label):
    x, made = random(2, n_cols), []
    for target in (jnp.array([label, 7], dtype) for dtype in (jnp.uint8, jnp.int32)):
        first = jax.grad(lambda x, target=target: ours.cross_entropy(x, target, reduction="none").sum() * 1.5)
        made.append((first(x), jax.grad(lambda x, first=first: (first(x) ** 2).sum())(x)))
    for one, other in zip(*made, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("label", [2**32 + 1, 2**32 - 100, 2**40])
def test_labels_that_jax_would_narrow(label):
    """Not to a class, nor to ignore_index."""
    x, labels = random(3, 4, dtype=np.float32), np.array([0, label, 1])
    with jax.enable_x64(False):
        for target in (labels, (labels[:, None], np.ones((3, 1), np.float32))):
            with pytest.raises(IndexError, match="^target holds labels that int32 does not.*jax_enable_x64"):
                ours.cross_entropy(x, target)
        assert ours.cross_entropy(x, np.array([0, -100, 1])) == ours.cross_entropy(x, jnp.array([0, -100, 1]))
    with pytest.raises(IndexError, match=rf"^target\[1\] .* is {label}"):
        ours.cross_entropy(x, labels)


@pytest.mark.parametrize("ignore_index", [-(2**63), 2**40])
def test_an_index_that_no_label_can_be(ignore_index):
    with jax.enable_x64(False):
        x, target, options = jnp.float32([[0, 1], [2, 0]]), jnp.array([0, 1]), {"reduction": "none"}
        one, other = (
            jax.grad(lambda x, index=index: ours.cross_entropy(x, target, ignore_index=index, **options).sum())(x)
            for index in (ignore_index, -100)
        )
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "transformed",
    [
        lambda f, x: jax.jit(f)(x),
        lambda f, x: jax.jit(jax.grad(f))(x),
        lambda f, x: jax.grad(jax.jit(f))(x),
        lambda f, x: jax.grad(jax.checkpoint(f))(x),
        lambda f, x: jax.vmap(f)(x),
    ],
    ids=["jit", "jit of grad", "grad of jit", "checkpoint", "vmap"],
)
@pytest.mark.parametrize("name", PUBLIC)
def test_compiled(name, transformed):
    def function(x):
        if name == "cross_entropy":
            return ours.cross_entropy(x, jnp.zeros(x.shape[:-1], int))
        return getattr(ours, name)(x).sum()

    with pytest.raises(TypeError) as raised:
        transformed(function, random(3, 4))
    message = str(raised.value)
    assert "is traced by jax" in message and "outside of jit" in message and "jax.nn" in message


def test_class_weights_have_no_gradient():
    x, target = random(3, 4), jnp.arange(3)
    with pytest.raises(TypeError, match=r"^weight is traced by jax.*stop_gradient"):
        jax.grad(lambda weight: ours.cross_entropy(x, target, weight))(jnp.ones(4))


@pytest.mark.parametrize("option", ["softcap", "label_smoothing", "z_loss"])
def test_options_without_gradient(option):
    with pytest.raises(TypeError, match=f"^{option} is traced by jax.*stop_gradient"):
        jax.grad(lambda value: ours.cross_entropy(random(3, 4), jnp.arange(3), **{option: value}))(0.5)


@pytest.mark.parametrize("name", PUBLIC)
def test_temperature_0_has_no_gradient(name):
    """Whatever kind of number it is."""
    others = [jnp.arange(3)] if name == "cross_entropy" else []
    for zero in (0.0, np.float32(0), jnp.zeros(())):
        function = partial(getattr(ours, name), random(3, 4), *others)
        slope = jax.grad(lambda temperature, function=function: function(temperature=temperature).sum())
        # For the gradient of a temperature, losses divide in operations of JAX.
        for call in [lambda zero, function=function: function(temperature=zero)] + [slope] * (name != "cross_entropy"):
            with pytest.raises(ValueError, match=r"^temperature is 0\.0, expected a finite number above 0"):
                call(zero)


def test_errors_are_those_of_the_core():
    x = random(3, 4)
    with pytest.raises(IndexError, match=r"^target\[1\] .* is 4"):
        jax.grad(ours.cross_entropy)(x, jnp.array([0, 4, 1]))
    with pytest.raises(ValueError, match="^temperature is 0"):
        ours.softmax(x, temperature=0)


@pytest.mark.parametrize("name", PUBLIC)
def test_docstrings(name):
    with jax.enable_x64(False):
        finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner()
        for test in finder.find(getattr(ours, name), name, globs={}):
            runner.run(test)
    assert runner.tries and not runner.failures
