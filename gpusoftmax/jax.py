"""The softmax family for JAX, differentiable by jax.grad, jax.value_and_grad and jax.vjp, any number of times.

Kernels need arrays that exist, so these functions are for code that is not inside jax.jit or jax.vmap, where they raise
a TypeError. There XLA has jax.nn; jax.pure_callback carries a call of gpusoftmax into compiled code, but copies its
arrays (2026-11-26, softmax of 1024 x 32768 float32 on two cores of a busy EPYC, medians: 42 ms by itself, 91 by jax.nn
under jit, 220 by a callback). Forward-mode differentiation (jax.jvp) is not defined.

softmax, log_softmax and logsumexp have gradients of a bias and of temperatures in arrays, too; what else the logits may
go through, they take as gpusoftmax's functions do.

The formulas are those of _torch_rows.py and _torch_losses.py: the first backward is one kernel, and what is beyond it
is written in operations of JAX; so is what brings a gradient back through a bias, a softcap or temperatures of rows.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import gpusoftmax
from gpusoftmax import _checks
from gpusoftmax._jax_transform import (
    NOTHING,
    Numbers,
    is_mask,
    is_temperature,
    left_of,
    options_of,
    pulled_back,
    split,
    wide,
)

Axis = int | tuple[int, ...] | None


def softmax(
    x: jax.Array,
    axis: Axis = -1,
    *,
    temperature: jax.Array | float = 1.0,
    bias: jax.Array | None = None,
    softcap: float | None = None,
    mask: jax.Array | None = None,
    n_valid: jax.Array | int | None = None,
    empty_row: str = "nan",
) -> jax.Array:
    """gpusoftmax.softmax, differentiable.

    Parameters
    ----------
    x, axis, bias, softcap, mask, n_valid, empty_row
        As in gpusoftmax.softmax. The bias has a gradient; logits that are masked get the gradient 0.
    temperature : float, or array with the shape of `x` without `axis`, or without axes
        Divides the logits; finite and above 0. An array has a gradient.

    Returns
    -------
    jax.Array, the shape, dtype and device of `x`

    Raises
    ------
    TypeError, ValueError
        As gpusoftmax.softmax; TypeError also inside of jax.jit and jax.vmap.

    Examples
    --------
    >>> import jax
    >>> from gpusoftmax.jax import softmax
    >>> print(jax.grad(lambda x: softmax(x)[0])(jax.numpy.zeros(2)))
    [ 0.25 -0.25]
    """
    return _softmax(jnp.asarray(x), *split(temperature, bias, softcap, mask, n_valid, empty_row), axis)


def log_softmax(
    x: jax.Array,
    axis: Axis = -1,
    *,
    temperature: jax.Array | float = 1.0,
    bias: jax.Array | None = None,
    softcap: float | None = None,
    mask: jax.Array | None = None,
    n_valid: jax.Array | int | None = None,
    empty_row: str = "nan",
) -> jax.Array:
    """gpusoftmax.log_softmax, differentiable.

    Parameters
    ----------
    x, axis, temperature
        As in gpusoftmax.softmax.

    Returns
    -------
    jax.Array, the shape, dtype and device of `x`

    Raises
    ------
    TypeError, ValueError
        As `softmax`.

    Examples
    --------
    >>> import jax
    >>> from gpusoftmax.jax import log_softmax
    >>> print(jax.grad(lambda x: log_softmax(x)[0])(jax.numpy.zeros(2)))
    [ 0.5 -0.5]
    """
    return _log_softmax(jnp.asarray(x), *split(temperature, bias, softcap, mask, n_valid, empty_row), axis)


def logsumexp(
    x: jax.Array,
    axis: Axis = -1,
    *,
    keepdims: bool = False,
    temperature: jax.Array | float = 1.0,
    bias: jax.Array | None = None,
    softcap: float | None = None,
    mask: jax.Array | None = None,
    n_valid: jax.Array | int | None = None,
) -> jax.Array:
    """gpusoftmax.logsumexp, differentiable.

    Parameters
    ----------
    x, axis, temperature, bias, softcap, mask, n_valid
        As in `softmax`. A row that is masked whole has the gradient 0.
    keepdims : bool
        Keep the reduced axes with size 1.

    Returns
    -------
    jax.Array, the shape of `x` without the reduced axes
        float32, float64 for float64.

    Raises
    ------
    TypeError, ValueError
        As `softmax`.

    Examples
    --------
    >>> import jax
    >>> from gpusoftmax.jax import logsumexp
    >>> print(jax.grad(logsumexp)(jax.numpy.zeros(4)))
    [0.25 0.25 0.25 0.25]
    """
    return _logsumexp(jnp.asarray(x), *split(temperature, bias, softcap, mask, n_valid, "nan"), axis, keepdims)


def cross_entropy(
    logits: jax.Array,
    target: jax.Array,
    weight: jax.Array | None = None,
    *,
    axis: int = -1,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    row_weight: jax.Array | None = None,
    normalizer: jax.Array | float | None = None,
    temperature: jax.Array | float = 1.0,
    bias: jax.Array | None = None,
    softcap: float | None = None,
    mask: jax.Array | None = None,
    n_valid: jax.Array | int | None = None,
    empty_row: str = "nan",
) -> jax.Array:
    """gpusoftmax.cross_entropy, differentiable with respect to `logits`: loss and gradient come from one kernel.

    Parameters
    ----------
    logits, target, weight, axis, ignore_index, reduction, label_smoothing, z_loss, row_weight, normalizer, temperature,
    bias, softcap, mask, n_valid, empty_row
        As in gpusoftmax.cross_entropy. Only `logits` has a gradient. With soft targets and what stands behind
        `label_smoothing`, it has no second one: gpusoftmax.torch has.

    Returns
    -------
    jax.Array, float32 (float64 for float64 logits)
        A single number for "mean" and "sum", the shape of `target` for "none".

    Raises
    ------
    IndexError, TypeError, ValueError
        As gpusoftmax.cross_entropy; TypeError also inside of jax.jit and jax.vmap, for the gradient of another argument
        than `logits`, and for a second one that is not there.

    Examples
    --------
    >>> import jax
    >>> from gpusoftmax.jax import cross_entropy
    >>> loss, dlogits = jax.value_and_grad(cross_entropy)(jax.numpy.zeros((1, 4)), jax.numpy.array([2]))
    >>> print(dlogits)
    [[ 0.25  0.25 -0.75  0.25]]
    """
    given = {
        "target": _probabilities(target),
        "weight": weight,
        "z_loss": z_loss,
        "row_weight": row_weight,
        "normalizer": normalizer,
        "temperature": temperature,
        "bias": bias,
        "softcap": softcap,
        "mask": mask,
        "n_valid": n_valid,
        "empty_row": empty_row,
    }
    for name, value in given.items():
        if isinstance(value, jax.core.Tracer):
            raise TypeError(f"{name} is traced by jax, and gets no gradient: pass jax.lax.stop_gradient({name})")
    more = tuple((name, _array(value)) for name, value in given.items() if _is_given(name, value))
    target = tuple(map(jnp.asarray, target)) if isinstance(target, tuple) else jnp.asarray(target)
    arrays = jnp.asarray(logits), target, None if weight is None else jnp.asarray(weight)
    return _cross_entropy(*arrays, _Loss(axis, ignore_index, reduction, label_smoothing, more))


# ---------------------------------------------------------------- rows to rows
# What jax.vjp is given from above it hands on as it is, and that may be an array of NumPy.


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _softmax(x, arrays, numbers, axis):
    return gpusoftmax.softmax(x, axis, empty_row=numbers.empty_row, **options_of(arrays, numbers))


def _softmax_forward(x, arrays, numbers, axis):
    probs = _softmax(x, arrays, numbers, axis)
    return probs, (probs, *((None, NOTHING) if is_mask(arrays, numbers) else (x, arrays)))


def _softmax_gradient(numbers, axis, saved, dprobs):
    probs, x, arrays = saved
    dprobs = jnp.asarray(dprobs)
    if x is None:  # where it is masked, so are the probabilities 0
        return _softmax_backward(probs, dprobs, axis, numbers.temperature), None
    dz = _softmax_backward(wide(probs), wide(dprobs), axis, 1.0)
    return pulled_back(dz, x, arrays, _checks.axes(axis, x.ndim), numbers)


_softmax.defvjp(_softmax_forward, _softmax_gradient)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _softmax_backward(probs, dprobs, axis, temperature):
    return gpusoftmax.softmax_backward(probs, dprobs, axis, temperature=temperature)


def _softmax_backward_forward(probs, dprobs, axis, temperature):
    return _softmax_backward(probs, dprobs, axis, temperature), (probs, dprobs)


def _softmax_backward_gradient(axis, temperature, saved, h):
    probs, dprobs = saved
    p, g, wide_h = wide(probs), wide(dprobs), wide(h)
    terms = (g - _sum(p * g, axis)) * wide_h - g * _sum(p * wide_h, axis)
    of_probs = (terms / temperature).astype(probs.dtype)
    return of_probs, _softmax_backward(probs, jnp.asarray(h), axis, temperature)


_softmax_backward.defvjp(_softmax_backward_forward, _softmax_backward_gradient)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _log_softmax(x, arrays, numbers, axis):
    return gpusoftmax.log_softmax(x, axis, empty_row=numbers.empty_row, **options_of(arrays, numbers))


def _log_softmax_forward(x, arrays, numbers, axis):
    log_probs = _log_softmax(x, arrays, numbers, axis)
    return log_probs, (log_probs, *((None, NOTHING) if is_temperature(arrays, numbers) else (x, arrays)))


def _log_softmax_gradient(numbers, axis, saved, dlog_probs):
    log_probs, x, arrays = saved
    dlog_probs = jnp.asarray(dlog_probs)
    if x is None:
        dx = _log_softmax_backward(log_probs, dlog_probs, axis, numbers.temperature)
        return (dx if numbers.empty_row == "nan" else _unless_empty(dx, log_probs, axis)), None
    dz = _log_softmax_backward(wide(log_probs), wide(dlog_probs), axis, left_of(arrays, numbers))
    if numbers.empty_row == "zero":
        dz = _unless_empty(dz, log_probs, axis)
    return pulled_back(dz, x, arrays, _checks.axes(axis, x.ndim), numbers)


_log_softmax.defvjp(_log_softmax_forward, _log_softmax_gradient)


def _unless_empty(dz, log_probs, axis):
    """0 in rows of which nothing is left."""
    is_empty = (log_probs == -jnp.inf).all(axis=_checks.axes(axis, dz.ndim), keepdims=True)
    return jnp.where(is_empty, 0, dz)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _log_softmax_backward(log_probs, dlog_probs, axis, temperature):
    return gpusoftmax.log_softmax_backward(log_probs, dlog_probs, axis, temperature=temperature)


def _log_softmax_backward_forward(log_probs, dlog_probs, axis, temperature):
    return _log_softmax_backward(log_probs, dlog_probs, axis, temperature), (log_probs, dlog_probs)


def _log_softmax_backward_gradient(axis, temperature, saved, h):
    log_probs, dlog_probs = saved
    wide_h = wide(h)
    weighted = jnp.exp(wide(log_probs)) * wide_h
    of_log_probs = -weighted * _sum(wide(dlog_probs), axis) / temperature
    of_dlog_probs = (wide_h - _sum(weighted, axis)) / temperature
    return of_log_probs.astype(log_probs.dtype), of_dlog_probs.astype(dlog_probs.dtype)


_log_softmax_backward.defvjp(_log_softmax_backward_forward, _log_softmax_backward_gradient)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _logsumexp(x, arrays, numbers, axis, keepdims):
    return gpusoftmax.logsumexp(x, axis, keepdims=keepdims, **options_of(arrays, numbers))


def _logsumexp_forward(x, arrays, numbers, axis, keepdims):
    return _logsumexp(x, arrays, numbers, axis, keepdims), (x, arrays)


def _logsumexp_gradient(numbers, axis, keepdims, saved, dlse):
    x, arrays = saved
    axes = _checks.axes(axis, x.ndim)
    per_row = dlse.reshape([1 if one in axes else size for one, size in enumerate(x.shape)])
    if not is_temperature(arrays, numbers):
        numbers = numbers._replace(empty_row="zero")
    probs = _softmax(x.astype(dlse.dtype), arrays, numbers, axis)
    dz = probs * (per_row / left_of(arrays, numbers))
    if is_mask(arrays, numbers):
        return dz.astype(x.dtype), None
    return pulled_back(dz, x, arrays, axes, numbers)


_logsumexp.defvjp(_logsumexp_forward, _logsumexp_gradient)


def _sum(x, axis):
    return x.sum(axis=_checks.axes(axis, x.ndim), keepdims=True)


# ---------------------------------------------------------------- losses


_WITHOUT = {"z_loss": 0.0, "temperature": 1.0, "empty_row": "nan"}


def _is_given(name, value):
    """Whether an option of a loss is more than its default; `target` and `weight` go their own way."""
    is_default = value is None or (not hasattr(value, "shape") and value == _WITHOUT.get(name))
    return name not in ("target", "weight") and not is_default


def _probabilities(target):
    """What of a target might have a gradient."""
    soft = target[1] if isinstance(target, tuple) else target
    return soft if jnp.issubdtype(getattr(soft, "dtype", int), jnp.floating) else None


def _array(value):
    return jnp.asarray(value) if hasattr(value, "shape") else value


class _Loss(NamedTuple):
    axis: int
    ignore_index: int
    reduction: str
    label_smoothing: float
    more: tuple[tuple[str, Any], ...]  # other options, by name

    @property
    def options(self) -> dict[str, Any]:
        *first, more = self
        return {**dict(zip(self._fields, first, strict=False)), **dict(more)}


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _cross_entropy(logits, target, weight, loss):
    return gpusoftmax.cross_entropy(logits, target, weight, **loss.options)


def _cross_entropy_forward(logits, target, weight, loss):
    if isinstance(logits, jax.core.Tracer):  # the gradient is to be differentiated
        return _cross_entropy(logits, target, weight, loss), (logits, target, weight, None)
    value, dlogits = gpusoftmax.cross_entropy_with_grad(logits, target, weight, **loss.options)
    return value, (logits, target, weight, dlogits)


def _cross_entropy_gradient(loss, saved, dloss):
    (logits, target, weight, dlogits), dloss = saved, jnp.asarray(dloss)
    has_labels = not isinstance(target, tuple) and jnp.issubdtype(target.dtype, jnp.integer)
    if dlogits is None or isinstance(dloss, jax.core.Tracer):
        if loss.more or not has_labels:
            what = ", ".join(dict(loss.more)) or "soft targets"
            raise TypeError(
                f"the gradient of cross_entropy with {what} is not differentiable in gpusoftmax.jax: "
                f"gpusoftmax.torch has derivatives of any order"
            )
        return _graph_of_dlogits(logits, target, weight, dloss, loss), None, None
    if loss.reduction == "none":
        if has_labels:
            dloss = jnp.where(target == loss.ignore_index, 0, dloss)
        dloss = jnp.expand_dims(dloss, loss.axis)
    elif _on_cpu(dloss) and dloss == 1:  # as a rule, and a look waits for nobody
        return dlogits, None, None
    return (dlogits * dloss).astype(logits.dtype), None, None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_gradient)


def _on_cpu(x):
    return all(device.platform == "cpu" for device in x.devices())


def _graph_of_dlogits(logits, target, weight, dloss, loss):
    """The gradient with respect to the logits, as a function of these and of dloss that JAX differentiates."""
    (axis,) = _checks.class_axis(loss.axis, logits.ndim)
    dtype, n_cols = dloss.dtype, logits.shape[axis]
    counts = target != loss.ignore_index
    weight = jnp.ones(n_cols, dtype) if weight is None else weight.astype(dtype)
    weight_of_row = weight[jnp.clip(target, 0, n_cols - 1)] * counts
    upstream = dloss / weight_of_row.sum() if loss.reduction == "mean" else dloss
    upstream = jnp.where(counts, upstream, 0)
    share = loss.label_smoothing / n_cols
    of_target = upstream * (1 - loss.label_smoothing) * weight_of_row
    of_all = upstream * share * weight.sum()
    probs = _softmax(logits.astype(dtype), NOTHING, Numbers(1.0, None, None, "nan"), axis)
    each = weight.reshape([n_cols if one == axis else 1 for one in range(logits.ndim)])
    dlogits = probs * jnp.expand_dims(of_target + of_all, axis)
    dlogits -= jax.nn.one_hot(target, n_cols, axis=axis, dtype=dtype) * jnp.expand_dims(of_target, axis)
    dlogits -= jnp.expand_dims(upstream * share, axis) * each
    return jnp.where(jnp.expand_dims(counts, axis), dlogits, 0).astype(logits.dtype)
