"""JAX arrays: eager arrays in, JAX arrays out; traced ones are refused, and so is `out`."""

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpusoftmax
from tests import inputs, tolerances
from tests.calls import CALLS, arguments

F32 = np.dtype(np.float32)
X = inputs.make("spread", (3, 40), F32)
ROW_OPS = [gpusoftmax.softmax, gpusoftmax.log_softmax, gpusoftmax.logsumexp]
DTYPES = [dtype for dtype in inputs.DTYPES if dtype != np.float64]  # JAX has no float64 unless asked


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_arrays_in_arrays_out(name, dtype):
    arrays = arguments(name, (6, 40), dtype)
    arrays = {argument: a.astype(np.int32) if a.dtype == np.int64 else a for argument, a in arrays.items()}
    placed = [jnp.asarray(array) for array in arrays.values()]
    result, expected = CALLS[name].function(*placed), CALLS[name].function(*arrays.values())
    results = result if isinstance(result, tuple) else (result,)
    for got, want in zip(results, expected if isinstance(expected, tuple) else (expected,), strict=True):
        assert isinstance(got, jax.Array) and got.devices() == placed[0].devices() and not got.weak_type
        want = np.asarray(want)
        want = want.astype(np.int32) if want.dtype == np.int64 else want  # JAX has no int64 either
        assert got.dtype == want.dtype and got.shape == want.shape
        assert np.asarray(got).tobytes() == want.tobytes()
    for array, original in zip(placed, arrays.values(), strict=True):
        assert np.asarray(array).tobytes() == original.tobytes()


def test_float64():
    with jax.enable_x64(True):
        x = jnp.asarray(X.astype(np.float64))
        for function in ROW_OPS:
            result = function(x)
            assert isinstance(result, jax.Array) and result.dtype == np.float64
            assert np.asarray(result).tobytes() == function(X.astype(np.float64)).tobytes()
            assert function(jnp.asarray(X), dtype="float64").dtype == np.float64


def test_float64_where_jax_has_none():
    """JAX would make float32 of it, which is not what was asked for."""
    with jax.enable_x64(False):
        for function in ROW_OPS:
            with pytest.raises(TypeError, match="^dtype .*float64.*x64"):
                function(jnp.asarray(X), dtype="float64")
    with jax.enable_x64(True):
        made_there = jnp.asarray(X.astype(np.float64))
    with jax.enable_x64(False):
        for function in ROW_OPS:
            with pytest.raises(TypeError, match="^x .*float64.*x64"):
                function(made_there)


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.bfloat16, jnp.float16, np.float16, jnp.float32])
def test_dtype(dtype):
    for function in ROW_OPS:
        result = function(jnp.asarray(X), dtype=dtype)
        assert isinstance(result, jax.Array) and result.dtype == jnp.dtype(dtype)
        assert np.asarray(result).tobytes() == np.asarray(function(X, dtype=dtype)).tobytes()


def test_results_are_ordinary_arrays():
    """They can be computed with, differentiated through and donated; they share nothing with later results."""
    first = gpusoftmax.softmax(jnp.asarray(X))
    kept = np.array(first)
    for _ in range(5):
        gpusoftmax.softmax(jnp.asarray(X[::-1]))
    assert np.array_equal(first, kept)
    doubled = jax.jit(lambda p: p * 2, donate_argnums=0)(gpusoftmax.softmax(jnp.asarray(X)))
    np.testing.assert_array_equal(doubled, 2 * kept)
    assert jax.grad(lambda p: (p**2).sum())(gpusoftmax.softmax(jnp.asarray(X))).shape == X.shape


def test_jax_agrees():
    x = jnp.asarray(X.reshape(2, 6, 10))
    for axis in (1, -1, (0, 2), None):
        every = tuple(range(3)) if axis is None else axis
        np.testing.assert_allclose(gpusoftmax.softmax(x, axis), jax.nn.softmax(x, every), rtol=1e-5)
        np.testing.assert_allclose(gpusoftmax.log_softmax(x, axis), jax.nn.log_softmax(x, every), rtol=1e-5, atol=1e-6)
        expected = jax.nn.logsumexp(x, every)
        lse = gpusoftmax.logsumexp(x, axis)
        np.testing.assert_allclose(lse, expected, rtol=1e-5)
        assert isinstance(lse, jax.Array) and lse.shape == expected.shape


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_cross_entropy(reduction):
    x = inputs.make("spread", (4, 9, 3), F32)
    labels = inputs.targets(12, 9, share_ignored=0.25, dtype=np.int32).reshape(4, 3)
    weight = np.linspace(0.5, 2, 9, dtype=F32)
    options = {"axis": 1, "reduction": reduction, "label_smoothing": 0.1}
    loss, dlogits = gpusoftmax.cross_entropy_with_grad(*map(jnp.asarray, (x, labels, weight)), **options)
    assert isinstance(loss, jax.Array) and isinstance(dlogits, jax.Array)
    tolerances.check_loss(np.asarray(loss), x, labels, weight, **options)
    tolerances.check_dlogits(np.asarray(dlogits), x, labels, weight, **options)
    lighter = gpusoftmax.cross_entropy(*map(jnp.asarray, (x, labels, weight.astype(inputs.BFLOAT16))), **options)
    tolerances.check_loss(np.asarray(lighter), x, labels, weight.astype(inputs.BFLOAT16), **options)
    with pytest.raises(IndexError, match=r"^target\[2\] \(counted in C order\) is 9"):
        gpusoftmax.cross_entropy(jnp.asarray(X[:, :9]), jnp.array([0, 1, 9]))


def test_one_number_and_nothing():
    for function, expected in zip(ROW_OPS, (1, 0, 2), strict=True):
        result = function(jnp.float32(2))
        assert isinstance(result, jax.Array) and result.shape == () and result == expected
    assert gpusoftmax.softmax(jnp.zeros((0, 3))).shape == (0, 3)
    assert gpusoftmax.softmax(jnp.zeros((3, 0))).shape == (3, 0)
    assert (gpusoftmax.logsumexp(jnp.zeros((3, 0))) == -jnp.inf).all()


@pytest.mark.parametrize(
    "transformed",
    [
        lambda function: jax.jit(function)(jnp.asarray(X)),
        lambda function: jax.grad(lambda x: function(x).sum())(jnp.asarray(X)),
        lambda function: jax.vmap(function)(jnp.asarray(X)),
        lambda function: jax.eval_shape(function, jnp.asarray(X)),
        lambda function: jax.make_jaxpr(function)(jnp.asarray(X)),
    ],
    ids=["jit", "grad", "vmap", "eval_shape", "make_jaxpr"],
)
@pytest.mark.parametrize("function", ROW_OPS)
def test_traced_arrays(transformed, function):
    with pytest.raises(TypeError) as raised:
        transformed(function)
    message = str(raised.value)
    assert message.startswith("x is traced by jax") and "jit" in message and "jax.nn" in message


def test_traced_temperature():
    for function in ROW_OPS:
        with pytest.raises(TypeError, match="^temperature is traced by jax"):
            jax.jit(lambda temperature, function=function: function(jnp.asarray(X), temperature=temperature))(0.5)


def test_traced_labels():
    x = jnp.asarray(X)
    with pytest.raises(TypeError, match="^target is traced by jax"):
        jax.jit(lambda labels: gpusoftmax.cross_entropy(x, labels))(jnp.array([1, 2, 3]))


def test_out():
    x = jnp.asarray(X)
    for out in (jnp.zeros_like(x), np.zeros_like(X), x):
        for function in (gpusoftmax.softmax, gpusoftmax.log_softmax):
            with pytest.raises(TypeError, match="^out is not supported for JAX arrays, which are immutable"):
                function(x, out=out)
        with pytest.raises(TypeError, match="^out is not supported for JAX arrays"):
            gpusoftmax.cross_entropy_with_grad(x, jnp.array([1, 2, 3]), out=out)
    with pytest.raises(TypeError, match="a NumPy array on the CPU and out is a JAX array on the CPU"):
        gpusoftmax.softmax(X, out=x)
    view = np.asarray(x)  # JAX's memory: NumPy marks it read-only
    with pytest.raises(ValueError, match="^out is read-only"):
        gpusoftmax.softmax(X, out=view)
    assert np.array_equal(x, X)


@pytest.mark.parametrize("dtype", [np.int32, np.bool_, np.complex64, jnp.float8_e4m3fn])
def test_refused_dtypes(dtype):
    with pytest.raises(TypeError, match="^x has dtype .*, expected one of float16, bfloat16, float32, float64"):
        gpusoftmax.softmax(jnp.ones((3, 4), dtype))


def test_mixed_with_numpy():
    x, labels = jnp.asarray(X), np.array([1, 2, 3])
    for call, one, two in (
        (lambda: gpusoftmax.softmax_backward(x, X), "probs is a JAX array", "dprobs is a NumPy array"),
        (lambda: gpusoftmax.cross_entropy(x, labels), "logits is a JAX array", "target is a NumPy array"),
        (lambda: gpusoftmax.cross_entropy(X, jnp.asarray(labels)), "logits is a NumPy array", "target is a JAX array"),
        (lambda: gpusoftmax.cross_entropy(x, jnp.asarray(labels), X[0]), "logits is a JAX", "weight is a NumPy array"),
    ):
        with pytest.raises(TypeError, match="expected both from one library on one device") as raised:
            call()
        assert one in str(raised.value) and two in str(raised.value)


def test_mixed_with_torch():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match="probs is a JAX array on the CPU and dprobs is a torch array on the CPU"):
        gpusoftmax.softmax_backward(jnp.asarray(X), torch.from_numpy(X))


def run_on_two_devices(program):
    """A program in a process of its own, where the CPU counts as two devices: the default one is `one`."""
    program = "import jax, gpusoftmax\none, two = jax.devices('cpu')\n" + textwrap.dedent(program) + "\nprint('done')"
    completed = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert completed.stdout == "done\n", completed.stderr


def test_results_are_committed_to_a_device_where_the_input_is():
    """JAX moves those that are not to the device of what they are combined with."""
    run_on_two_devices("""
        x, labels = jax.numpy.zeros((2, 3)), jax.numpy.array([1, 2])
        there = jax.device_put(x, two)
        for result in (gpusoftmax.softmax(x), gpusoftmax.cross_entropy_with_grad(x, labels)[1]):
            assert result.devices() == {one} and not result.committed
            assert (result + there).devices() == {two}
        assert gpusoftmax.softmax(there).committed
        with jax.default_device(two):
            assert gpusoftmax.softmax(x).devices() == {one}
    """)


def test_gradients_on_another_device():
    """JAX makes what comes from above, and what is given as numbers or arrays of NumPy, on its default device."""
    run_on_two_devices("""
        import numpy as np
        import gpusoftmax.jax as ours

        x, labels = jax.device_put(np.zeros((2, 3), np.float32), two), np.array([1, 2])
        options = {"bias": np.ones(3, np.float32), "mask": np.ones(3, bool), "n_valid": labels + 1}
        loss = lambda x, **given: ours.cross_entropy(x, labels, **given)
        for function in (ours.softmax, ours.log_softmax, ours.logsumexp, loss):
            first = jax.grad(lambda x, **given: function(x, **given).sum())
            for given in ({}, options):
                assert first(x, **given).devices() == {two}
                assert jax.grad(lambda x: first(x, **given)[0, 0])(x).devices() == {two}
        half = jax.grad(lambda x: ours.cross_entropy(x, labels, reduction="none").sum())(x.astype(np.float16))
        assert half.devices() == {two}
        committed = jax.device_put(labels, two)
        assert ours.cross_entropy(np.zeros((2, 3), np.float32), committed).devices() == {two}
        try:
            ours.cross_entropy(x, jax.device_put(labels, one))
        except TypeError as error:
            assert "expected both from one library on one device" in str(error)
        else:
            raise AssertionError("no error")
    """)


def test_several_devices():
    """Results stay on the device of the input; arrays of two devices do not mix, and one on both is refused."""
    run_on_two_devices("""
        def error(function, *arrays):
            try:
                function(*arrays)
            except TypeError as error:
                return str(error)
            raise AssertionError("no error")

        for device in (one, two):
            x = jax.device_put(jax.numpy.zeros((2, 3)), device)
            labels = jax.device_put(jax.numpy.array([1, 2]), device)
            for result in (gpusoftmax.softmax(x), *gpusoftmax.cross_entropy_with_grad(x, labels)):
                assert result.devices() == {device}, result.devices()
        x, y = jax.device_put(x, one), jax.device_put(x, two)
        for pair in ((x, y), (y, x)):
            message = error(gpusoftmax.softmax_backward, *pair)
            assert "one library on one device" in message and message.count("JAX array on the CPU") == 2, message
        mesh = jax.sharding.Mesh([one, two], "rows")
        spread = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows")))
        message = error(gpusoftmax.softmax, spread)
        assert message.startswith("x ") and "2 devices" in message, message
    """)
