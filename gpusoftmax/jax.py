"""The softmax family for JAX, differentiable by jax.grad, jax.value_and_grad and jax.vjp, any number of times.

Kernels need arrays that exist, so these functions are for code that is not inside jax.jit or jax.vmap, where they raise
a TypeError. There XLA has jax.nn; jax.pure_callback carries a call of gpusoftmax into compiled code, but copies its
arrays (2026-11-26, softmax of 1024 x 32768 float32 on two cores of a busy EPYC, medians: 42 ms by itself, 91 by jax.nn
under jit, 220 by a callback). Forward-mode differentiation (jax.jvp) is not defined.

The logits may go through all that gpusoftmax's functions let them go through; a bias, and temperatures in arrays, have
gradients too.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpusoftmax import _jax_loss, _jax_rows, _jax_transform

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
    return _jax_rows.softmax(
        jnp.asarray(x), *_jax_transform.split(temperature, bias, softcap, mask, n_valid, empty_row), axis
    )


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
    return _jax_rows.log_softmax(
        jnp.asarray(x), *_jax_transform.split(temperature, bias, softcap, mask, n_valid, empty_row), axis
    )


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
    return _jax_rows.logsumexp(
        jnp.asarray(x), *_jax_transform.split(temperature, bias, softcap, mask, n_valid, "nan"), axis, keepdims
    )


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
    """gpusoftmax.cross_entropy, differentiable: loss and gradient come from one kernel.

    Parameters
    ----------
    logits, target, weight, axis, ignore_index, reduction, label_smoothing, z_loss, row_weight, normalizer
        As in gpusoftmax.cross_entropy. Of these `logits` has a gradient, and probabilities in `target` or target[1],
        as JAX's own operations would have it: minus the log-probability of the class, times its weight and what else
        the loss has, but 0 where the logit is masked or -inf. For that, operations of JAX make arrays of the size of
        the logits.
    temperature, bias, softcap, mask, n_valid, empty_row
        As in `softmax`. For the gradient of a bias or of a temperature, operations of JAX make an array of transformed
        logits.

    Returns
    -------
    jax.Array, float32 (float64 for float64 logits)
        A single number for "mean" and "sum", the shape of `target` for "none".

    Raises
    ------
    IndexError, TypeError, ValueError
        As gpusoftmax.cross_entropy; TypeError also inside of jax.jit and jax.vmap, and for a gradient of what has none.

    Examples
    --------
    >>> import jax
    >>> from gpusoftmax.jax import cross_entropy
    >>> loss, dlogits = jax.value_and_grad(cross_entropy)(jax.numpy.zeros((1, 4)), jax.numpy.array([2]))
    >>> print(dlogits)
    [[ 0.25  0.25 -0.75  0.25]]
    """
    _jax_transform.without_gradient(weight=weight, row_weight=row_weight, normalizer=normalizer)
    _jax_transform.without_gradient(label_smoothing=label_smoothing, z_loss=z_loss)
    target = tuple(map(_as_target, target)) if isinstance(target, tuple) else _as_target(target)
    weight, row_weight = (None if one is None else jnp.asarray(one) for one in (weight, row_weight))
    divide_by = None
    if not hasattr(normalizer, "shape"):
        normalizer, divide_by = None, normalizer
    arrays, numbers = _jax_transform.split(temperature, bias, softcap, mask, n_valid, empty_row)
    given = _jax_loss.Given(target, weight, row_weight, None if normalizer is None else jnp.asarray(normalizer), arrays)
    loss = _jax_loss.Loss(axis, ignore_index, reduction, label_smoothing, z_loss, divide_by, numbers)
    is_traced = any(isinstance(one, jax.core.Tracer) for one in (arrays.temperature, arrays.bias))
    function = _jax_loss.of_transformed if is_traced else _jax_loss.cross_entropy
    if isinstance(_probabilities(target), jax.core.Tracer):
        function = _jax_loss.of_soft_target
    return function(jnp.asarray(logits), given, loss)


def _as_target(given: Any) -> jax.Array:
    """Without 64 bits JAX would take the labels 1 and 2^32 + 1 of NumPy for one class."""
    target = jnp.asarray(given)
    is_narrowed = isinstance(given, np.ndarray) and given.dtype.kind in "iu" and target.dtype != given.dtype
    if is_narrowed and not np.array_equal(target, given):
        raise IndexError(
            f"target holds labels that {target.dtype} does not, which JAX makes of them: set jax_enable_x64"
        )
    return target


def _probabilities(target: Any) -> Any:
    """What of a target might have a gradient."""
    soft = target[1] if isinstance(target, tuple) else target
    return soft if jnp.issubdtype(getattr(soft, "dtype", int), jnp.floating) else None
