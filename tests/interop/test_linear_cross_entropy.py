"""linear_cross_entropy on torch tensors and JAX arrays: torch's BLAS and definition, arrays of both libraries."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import gpusoftmax
from gpusoftmax import _layer
from tests import inputs, tolerances
from tests.interop.test_torch import tensor, values
from tests.test_full_linear_cross_entropy import TELL
from tests.test_linear_cross_entropy import CHUNKS, RETURN, layouts, problem


def run(arrays, convert, back, **options):
    """(loss, dinput, dlinear_weight, dlinear_bias) as NumPy arrays, of (input, linear_weight, target, linear_bias)."""
    x, linear_weight, target, bias = map(convert, arrays)
    result = gpusoftmax.linear_cross_entropy_with_grad(x, linear_weight, target, linear_bias=bias, **options)
    loss = gpusoftmax.linear_cross_entropy(x, linear_weight, target, linear_bias=bias, **options)
    assert all(type(one) is type(x) for one in (*result, loss))
    assert np.array_equal(back(loss), back(result.loss), equal_nan=True)
    return result._replace(**{name: back(one) for name, one in result._asdict().items()})


@pytest.mark.parametrize("dtype", inputs.DTYPES, ids=str)
def test_tensors_in_tensors_out(dtype):
    for shape in ((13, 7, 11), (64, 33, 1000)):
        arrays = problem(*shape, dtype)
        for chunk_size in CHUNKS:
            result = run(arrays, tensor, values, chunk_size=chunk_size)
            assert [one.dtype for one in result[1:]] == 3 * [dtype]
            tolerances.check_linear_cross_entropy(result, *arrays)


@pytest.mark.parametrize("argument", [0, 1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layouts_of_tensors(dtype, argument):
    arrays = list(problem(23, 12, 41, dtype))
    for name, view in layouts(arrays[argument]).items():
        if name in ("columns first", "padded rows", "steps"):  # torch has no others
            base = view if view.base is None else view.base
            strides = [stride // view.itemsize for stride in view.strides]
            t = tensor(base).as_strided(view.shape, strides, (view.ctypes.data - base.ctypes.data) // view.itemsize)
            assert np.array_equal(values(t), view)
            given = [tensor(array) for array in arrays]
            given[argument] = t
            result = gpusoftmax.linear_cross_entropy_with_grad(*given[:3], linear_bias=given[3], chunk_size=5)
            tolerances.check_linear_cross_entropy(tuple(map(values, result)), *arrays)


OPTIONS = list(itertools.product(["mean", "sum", "none"], [0.0, 0.2], [False, True], [-100, 3]))


@pytest.mark.parametrize(("reduction", "smoothing", "has_weight", "ignore_index"), OPTIONS)
def test_torch_defines_it(reduction, smoothing, has_weight, ignore_index):
    """In float64 to 1e-12, with the gradients of torch's own differentiation."""
    arrays = problem(29, 16, 57, np.float64)
    x, linear_weight, target, bias = map(tensor, arrays)
    target = torch.where(target == -100, ignore_index, target)
    options = {
        "linear_bias": bias, "reduction": reduction, "label_smoothing": smoothing, "ignore_index": ignore_index,
        "weight": torch.linspace(0, 2, 57, dtype=torch.float64) if has_weight else None,
    }  # fmt: skip
    result = gpusoftmax.linear_cross_entropy_with_grad(x, linear_weight, target, chunk_size=8, **options)
    leaves = [t.clone().requires_grad_() for t in (x, linear_weight, bias)]
    if hasattr(F, "linear_cross_entropy"):
        loss = F.linear_cross_entropy(leaves[0], leaves[1], target, **{**options, "linear_bias": leaves[2]})
    else:  # before torch 2.13
        logits = F.linear(*leaves)
        del options["linear_bias"]
        loss = F.cross_entropy(logits, target, **options)
    gradients = torch.autograd.grad(loss.sum(), leaves)
    for got, want in zip(result, (loss.detach(), *gradients), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.matrix)])
def test_half_types_as_a_gpu_multiplies_them(monkeypatch, dtype):
    """On a GPU the factors stay half types, and sums over the chunks are float32. Here torch's CPU multiplies them."""
    monkeypatch.setattr(_layer, "_factor_dtype", lambda x: x.dtype)
    arrays = problem(96, 32, 200, dtype)
    exact = [array.astype(np.float64) if array.dtype != np.int64 else array for array in arrays]
    wanted = run(exact, tensor, values)
    for chunk_size in (5, 96):
        result = run(arrays, tensor, values, chunk_size=chunk_size)
        assert result.loss.dtype == np.float32 and result.dinput.dtype == arrays[0].dtype
        unit = float(tolerances.FORMATS[dtype].unit)
        for got, want in zip(result, wanted, strict=True):
            assert np.abs(got.astype(np.float64) - want).max() <= 8 * unit * np.abs(want).max()


def test_labels_that_wrap_around_to_the_index_are_not_ignored():
    """-100 as uint8 is 156, a class here."""
    x, linear_weight, target, bias = problem(23, 12, 200, share_ignored=0)
    target = np.full(23, 156, np.uint8)
    result = run((x, linear_weight, target, bias), tensor, values)
    tolerances.check_linear_cross_entropy(result, x, linear_weight, target, bias)
    assert result.dinput.any()


def test_tensors_that_require_grad():
    """A gradient is never dropped in silence."""
    for k, name in enumerate(("input", "linear_weight", "linear_bias")):
        x, linear_weight, target, bias = map(tensor, problem(5, 4, 6))
        arguments = [x, linear_weight, bias]
        arguments[k] = torch.nn.Parameter(arguments[k])
        x, linear_weight, bias = arguments
        with pytest.raises(TypeError, match=f"^{name} is a tensor that requires grad"):
            gpusoftmax.linear_cross_entropy_with_grad(x, linear_weight, target, linear_bias=bias)
        assert gpusoftmax.linear_cross_entropy(x, linear_weight, target, linear_bias=bias).requires_grad
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                result = gpusoftmax.linear_cross_entropy_with_grad(x, linear_weight, target, linear_bias=bias)
            assert not any(one.requires_grad for one in result)


class _Loss(torch.autograd.Function):
    """How a differentiable function uses it: gradients as autograd needs them, made in the forward pass."""

    @staticmethod
    def forward(ctx, x, linear_weight, bias, target):
        wanted = dict(zip(RETURN, ctx.needs_input_grad, strict=False))
        loss, *gradients = gpusoftmax.linear_cross_entropy_with_grad(
            x, linear_weight, target, linear_bias=bias, **wanted
        )
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx, dloss):
        return *(None if one is None else dloss * one for one in ctx.saved_tensors), None


@pytest.mark.parametrize("frozen", [None, 0, 1, 2])
def test_within_an_autograd_function(frozen):
    x, linear_weight, target, bias = map(tensor, problem(29, 16, 57, np.float64))
    leaves = [t.requires_grad_(k != frozen) for k, t in enumerate((x, linear_weight, bias))]
    (3 * _Loss.apply(*leaves, target)).backward()
    grads = [t.grad for t in leaves]
    for t in leaves:
        t.grad = None
    (3 * F.cross_entropy(F.linear(*leaves), target)).backward()
    for got, leaf in zip(grads, leaves, strict=True):
        assert (got is None) == (not leaf.requires_grad)
        assert got is None or torch.allclose(got, leaf.grad, rtol=1e-12, atol=1e-14)


ALL = {"z_loss": 0.01, "temperature": 0.6, "softcap": 3.0, **TELL}


def flat(result):
    return *result.loss, *result[1:]


@pytest.mark.parametrize("dtype", [np.float64, pytest.param("bfloat16", marks=pytest.mark.matrix)], ids=str)
def test_all_that_a_loss_may_have(dtype):
    """As of NumPy's arrays, which have the tests of it."""
    x, linear_weight, target, bias = problem(29, 16, 57, dtype)
    row_weight = np.random.default_rng(1).uniform(0, 2, 29)
    row_weight[[2, 5]] = 0
    x[[2, 5]] = np.nan
    wanted = gpusoftmax.linear_cross_entropy_with_grad(
        x, linear_weight, target, linear_bias=bias, row_weight=row_weight, normalizer=np.array([7]), **ALL
    )
    x, linear_weight, target, bias = map(tensor, (x, linear_weight, target, bias))
    options = {"linear_bias": bias, "row_weight": tensor(row_weight), "normalizer": torch.tensor([7]), **ALL}
    result = gpusoftmax.linear_cross_entropy_with_grad(x, linear_weight, target, chunk_size=8, **options)
    tolerance = 1e-12 if dtype == np.float64 else 2e-2
    for got, want in zip(flat(result), flat(wanted), strict=True):
        assert isinstance(got, torch.Tensor) and got.shape == want.shape
        np.testing.assert_allclose(values(got).astype(float), want.astype(float), rtol=tolerance, atol=tolerance)
    assert result.loss.n_correct.dtype == torch.int64 and not result.dinput[[2, 5]].any()


# ---------------------------------------------------------------- JAX


def test_all_that_a_loss_may_have_on_jax_arrays():
    x, linear_weight, target, _ = problem(29, 16, 57)
    row_weight = np.random.default_rng(1).uniform(0, 2, 29).astype(np.float32)
    row_weight[[2, 5]] = 0
    x[[2, 5]] = np.nan
    given = {"row_weight": row_weight, "normalizer": np.full(1, 7, np.float32), "z_loss": 0.01, **TELL}
    wanted = gpusoftmax.linear_cross_entropy_with_grad(x, linear_weight, target, chunk_size=8, **given)
    given |= {name: jnp.asarray(given[name]) for name in ("row_weight", "normalizer")}
    result = gpusoftmax.linear_cross_entropy_with_grad(
        *map(jnp.asarray, (x, linear_weight, target)), chunk_size=8, **given
    )
    for got, want in zip(flat(result)[:-1], flat(wanted)[:-1], strict=True):
        assert isinstance(got, jax.Array) and np.array_equal(np.asarray(got), want)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_jax_arrays(dtype):
    arrays = problem(29, 16, 57, dtype)
    result = run(arrays, jnp.asarray, np.asarray, chunk_size=8)
    assert result.dlinear_weight.dtype == (ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype))
    tolerances.check_linear_cross_entropy(result, *arrays)


def test_traced_by_jax():
    x, linear_weight, target, _ = map(jnp.asarray, problem(5, 4, 6))
    with pytest.raises(TypeError, match="^input is traced by jax"):
        jax.jit(lambda x: gpusoftmax.linear_cross_entropy(x, linear_weight, target))(x)


def test_mixed_libraries():
    x, linear_weight, target, bias = problem(5, 4, 6)
    with pytest.raises(
        TypeError, match="input is a NumPy array on the CPU and linear_weight is a torch array on the CPU"
    ):
        gpusoftmax.linear_cross_entropy(x, tensor(linear_weight), target)
    with pytest.raises(TypeError, match="input is a torch array on the CPU and linear_bias is a NumPy array"):
        gpusoftmax.linear_cross_entropy(tensor(x), tensor(linear_weight), tensor(target), linear_bias=bias)
