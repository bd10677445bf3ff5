"""softmax, log_softmax and logsumexp as functions that JAX differentiates as often as asked.

The formulas are those of _torch_rows.py: the first backward is one kernel, and what is beyond it is written in
operations of JAX; so is what brings a gradient back through a bias, a softcap or temperatures of rows.

What jax.vjp is given from above it hands on as it is, and that may be an array of NumPy.
"""

from functools import partial

import jax
import jax.numpy as jnp

import gpusoftmax
from gpusoftmax import _checks
from gpusoftmax._jax_transform import (
    NOTHING,
    is_mask,
    is_temperature,
    left_of,
    on_one_device,
    options_of,
    pulled_back,
    wide,
)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def softmax(x, arrays, numbers, axis):
    x, arrays = on_one_device(x, arrays)
    return gpusoftmax.softmax(x, axis, empty_row=numbers.empty_row, **options_of(arrays, numbers))


def _softmax_forward(x, arrays, numbers, axis):
    probs = softmax(x, arrays, numbers, axis)
    return probs, (probs, *((None, NOTHING) if is_mask(arrays, numbers) else (x, arrays)))


def _softmax_gradient(numbers, axis, saved, dprobs):
    probs, x, arrays = saved
    dprobs = jnp.asarray(dprobs)
    if x is None:  # where it is masked, so are the probabilities 0
        return _softmax_backward(probs, dprobs, axis, numbers.temperature), None
    dz = _softmax_backward(wide(probs), wide(dprobs), axis, 1.0)
    return pulled_back(dz, x, arrays, _checks.axes(axis, x.ndim), numbers)


softmax.defvjp(_softmax_forward, _softmax_gradient)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _softmax_backward(probs, dprobs, axis, temperature):
    return gpusoftmax.softmax_backward(*on_one_device(probs, dprobs), axis, temperature=temperature)


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
def log_softmax(x, arrays, numbers, axis):
    x, arrays = on_one_device(x, arrays)
    return gpusoftmax.log_softmax(x, axis, empty_row=numbers.empty_row, **options_of(arrays, numbers))


def _log_softmax_forward(x, arrays, numbers, axis):
    log_probs = log_softmax(x, arrays, numbers, axis)
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


log_softmax.defvjp(_log_softmax_forward, _log_softmax_gradient)


def _unless_empty(dz, log_probs, axis):
    """0 in rows of which nothing is left."""
    is_empty = (log_probs == -jnp.inf).all(axis=_checks.axes(axis, dz.ndim), keepdims=True)
    return jnp.where(is_empty, 0, dz)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _log_softmax_backward(log_probs, dlog_probs, axis, temperature):
    return gpusoftmax.log_softmax_backward(*on_one_device(log_probs, dlog_probs), axis, temperature=temperature)


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
def logsumexp(x, arrays, numbers, axis, keepdims):
    x, arrays = on_one_device(x, arrays)
    return gpusoftmax.logsumexp(x, axis, keepdims=keepdims, **options_of(arrays, numbers))


def _logsumexp_forward(x, arrays, numbers, axis, keepdims):
    return logsumexp(x, arrays, numbers, axis, keepdims), (x, arrays)


def _logsumexp_gradient(numbers, axis, keepdims, saved, dlse):
    x, arrays = saved
    axes = _checks.axes(axis, x.ndim)
    per_row = dlse.reshape([1 if one in axes else size for one, size in enumerate(x.shape)])
    if not is_temperature(arrays, numbers):
        numbers = numbers._replace(empty_row="zero")
    probs = softmax(x.astype(dlse.dtype), arrays, numbers, axis)
    dz = probs * (per_row / left_of(arrays, numbers))
    if is_mask(arrays, numbers):
        return dz.astype(x.dtype), None
    return pulled_back(dz, x, arrays, axes, numbers)


logsumexp.defvjp(_logsumexp_forward, _logsumexp_gradient)


def _sum(x, axis):
    return x.sum(axis=_checks.axes(axis, x.ndim), keepdims=True)
