"""cross_entropy as a function that JAX differentiates as often as asked.

Loss and first gradient come from one kernel. Where there is more to differentiate, a gradient of the gradient or that
of a bias or of temperatures, the transform of the logits is written in operations of JAX, and the gradient with respect
to what comes of them, z, is that of _torch_full_loss.py: with the masses g and their sum G, the share S of the target,
and r the weight of a row,

    dz_c = r dloss (p_c (G + 2 z_loss S lse) - g_c)

Where the probabilities of the target are to be differentiated, so is the loss, on log_softmax:

    loss = r (sum_c g_c (lse - z_c) + z_loss S lse^2)
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import gpusoftmax
from gpusoftmax import _checks
from gpusoftmax import _jax_rows as rows
from gpusoftmax._jax_transform import (
    IDENTITY,
    NOTHING,
    Arrays,
    Numbers,
    is_nothing,
    on_one_device,
    options_of,
    transformed,
)


class Given(NamedTuple):
    """Arrays beside the logits, of which those of the transform may have a gradient."""

    target: jax.Array | tuple[jax.Array, jax.Array]
    weight: jax.Array | None
    row_weight: jax.Array | None
    normalizer: jax.Array | None
    transform: Arrays

    @property
    def has_labels(self) -> bool:
        return not isinstance(self.target, tuple) and jnp.issubdtype(self.target.dtype, jnp.integer)


class Loss(NamedTuple):
    """Options. divide_by: a normalizer that is a number."""

    axis: int
    ignore_index: int
    reduction: str
    label_smoothing: float
    z_loss: float
    divide_by: float | None
    transform: Numbers


def _arguments(logits: jax.Array, given: Given, loss: Loss) -> dict[str, Any]:
    """Of the core's functions."""
    logits, given = on_one_device(logits, given)
    *arrays, normalizer, _ = given
    options = loss._asdict()
    divide_by, numbers = options.pop("divide_by"), options.pop("transform")
    return {
        "logits": logits,
        **dict(zip(Given._fields, arrays, strict=False)),
        **options,
        "normalizer": divide_by if normalizer is None else normalizer,
        **options_of(given.transform, numbers),
        "empty_row": numbers.empty_row,
    }


def of_transformed(logits: jax.Array, given: Given, loss: Loss) -> jax.Array:
    """The loss, where the transform of the logits is to be differentiated too."""
    (axis,) = _checks.class_axis(loss.axis, logits.ndim)
    z = transformed(logits, given.transform, (axis,), loss.transform, takes_temperature=False)
    numbers = IDENTITY._replace(empty_row=loss.transform.empty_row)
    return cross_entropy(z, given._replace(transform=NOTHING), loss._replace(transform=numbers))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def cross_entropy(logits, given, loss):
    return gpusoftmax.cross_entropy(**_arguments(logits, given, loss))


def _forward(logits, given, loss):
    if isinstance(logits, jax.core.Tracer):  # the gradient is to be differentiated
        return cross_entropy(logits, given, loss), (logits, given, None)
    if loss.reduction == "none" and _is_half(logits):  # the gradient waits for what comes from above
        return cross_entropy(logits, given, loss), (logits, given, None)
    value, dlogits = gpusoftmax.cross_entropy_with_grad(**_arguments(logits, given, loss))
    return value, (logits, given, dlogits)


def _gradient(loss, saved, dloss):
    (logits, given, dlogits), dloss = saved, jnp.asarray(dloss)
    if isinstance(logits, jax.core.Tracer) or isinstance(dloss, jax.core.Tracer):
        if is_nothing(given.transform, loss.transform):
            return _graph_of_dlogits(logits, dloss, given, loss), None
        return *jax.vjp(lambda logits: of_transformed(logits, given, loss), logits)[1](dloss), None
    if loss.reduction == "none":
        if given.has_labels:
            dloss = jnp.where(_is_ignored(given.target, loss.ignore_index), 0, dloss)
        if _is_half(logits):
            return _anew(logits, given, loss, dloss), None
        dloss = jnp.expand_dims(dloss, loss.axis)
    elif _on_cpu(dloss) and dloss == 1:  # as a rule, and a look waits for nobody
        return dlogits, None
    elif _is_half(logits) and jnp.isfinite(dloss):
        return _anew(logits, given, loss, dloss), None
    return (dlogits * dloss).astype(logits.dtype), None


def _is_half(logits):
    return jnp.finfo(logits.dtype).bits < 32


def _anew(logits, given, loss, dloss):
    """The gradient from above dloss: in float16 small ones have vanished before they meet a loss scale."""
    if loss.reduction != "none":
        return gpusoftmax.cross_entropy_with_grad(**_arguments(logits, given, loss), grad_scale=float(dloss))[1]
    if given.row_weight is not None:
        dloss = jnp.where(given.row_weight == 0, 0, given.row_weight.astype(dloss.dtype) * dloss)
    return gpusoftmax.cross_entropy_with_grad(**_arguments(logits, given._replace(row_weight=dloss), loss))[1]


cross_entropy.defvjp(_forward, _gradient)


def of_soft_target(logits, given, loss):
    """The loss, where the probabilities of the target are to be differentiated too."""
    if not is_nothing(given.transform, loss.transform):
        (axis,) = _checks.class_axis(loss.axis, logits.ndim)
        logits = transformed(logits, given.transform, (axis,), loss.transform, takes_temperature=False)
        numbers = IDENTITY._replace(empty_row=loss.transform.empty_row)
        given, loss = given._replace(transform=NOTHING), loss._replace(transform=numbers)
    labels, soft = given.target if isinstance(given.target, tuple) else (None, given.target)
    return _soft_cross_entropy(logits, soft, given._replace(target=labels), loss)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _soft_cross_entropy(logits, soft, given, loss):
    return gpusoftmax.cross_entropy(**_arguments(logits, _with_soft(given, soft), loss))


def _soft_forward(logits, soft, given, loss):
    return _soft_cross_entropy(logits, soft, given, loss), (logits, soft, given)


def _soft_gradient(loss, saved, dloss):
    *differentiated, given = saved
    _, pull = jax.vjp(lambda logits, soft: _composed(logits, _with_soft(given, soft), loss), *differentiated)
    return *pull(jnp.asarray(dloss)), None


_soft_cross_entropy.defvjp(_soft_forward, _soft_gradient)


def _with_soft(given, soft):
    return given._replace(target=soft if given.target is None else (given.target, soft))


def _composed(logits, given, loss):
    """The loss of logits that go through nothing, in operations that JAX differentiates."""
    (axis,) = _checks.class_axis(loss.axis, logits.ndim)
    z = rows.wide(logits)
    of = _masses(z, given, loss, axis, z.dtype)
    z = jnp.where(jnp.expand_dims(of.counts, axis), z, 0)  # whatever a row holds that does not count
    cannot_be = z == -jnp.inf
    masses = jnp.where(cannot_be, jax.lax.stop_gradient(of.of_classes), of.of_classes)
    nats = jnp.where(cannot_be & (masses == 0), 0, -rows.log_softmax(z, NOTHING, IDENTITY, axis))
    losses = (masses * nats).sum(axis)
    if loss.z_loss:
        losses = losses + loss.z_loss * of.of_target * rows.logsumexp(z, NOTHING, IDENTITY, axis, False) ** 2
    losses = jnp.where(of.counts, of.of_rows * losses, 0)
    return losses if loss.reduction == "none" else losses.sum() / of.divisor


def _on_cpu(x):
    return all(device.platform == "cpu" for device in x.devices())


def _graph_of_dlogits(logits, dloss, given, loss):
    """The gradient with respect to the logits, which go through nothing, as a function of these and of dloss that JAX
    differentiates.
    """
    (axis,) = _checks.class_axis(loss.axis, logits.ndim)
    of, dtype = _masses(logits, given, loss, axis, dloss.dtype), dloss.dtype
    upstream = jnp.where(of.counts, of.of_rows * (dloss / of.divisor), 0)

    z = jnp.where(jnp.expand_dims(of.counts, axis), logits, 0).astype(dtype)  # whatever a row holds that does not count
    slope = of.of_classes.sum(axis)
    if loss.z_loss:
        slope = slope + 2 * loss.z_loss * of.of_target * rows.logsumexp(z, NOTHING, IDENTITY, axis, False)
    dz = rows.softmax(z, NOTHING, IDENTITY, axis) * jnp.expand_dims(slope, axis) - of.of_classes
    dz = jnp.where(jnp.expand_dims(of.counts, axis), jnp.expand_dims(upstream, axis) * dz, 0)
    return dz.astype(logits.dtype)


class _Masses(NamedTuple):
    of_classes: jax.Array  # g, as the classes of the logits lie
    of_target: jax.Array  # S
    of_rows: jax.Array  # r
    counts: jax.Array  # rows that do
    divisor: jax.Array | float


def _masses(logits, given, loss, axis, dtype):
    q, counts = _shares(logits, given, loss, axis, dtype)
    n_cols = logits.shape[axis]
    w = jnp.ones(n_cols, dtype) if given.weight is None else given.weight.astype(dtype)
    w = w.reshape([n_cols if one == axis else 1 for one in range(logits.ndim)])
    r = jnp.ones(counts.shape, dtype) if given.row_weight is None else given.row_weight.astype(dtype)
    counts = counts & (r != 0)
    of_target, divisor = (q * w).sum(axis), 1.0
    if loss.reduction == "mean":
        if given.normalizer is not None:
            divisor = given.normalizer.astype(dtype).reshape(())
        elif loss.divide_by is not None:
            divisor = loss.divide_by
        else:
            divisor = jnp.where(counts, r * of_target if given.has_labels else r, 0).sum()
    if loss.transform.empty_row == "zero":  # a mean has counted such rows
        counts = counts & (logits != -jnp.inf).any(axis)
    return _Masses(((1 - loss.label_smoothing) * q + loss.label_smoothing / n_cols) * w, of_target, r, counts, divisor)


def _shares(logits, given, loss, axis, dtype):
    """(the share of each class in the target of its row, which rows count)."""
    n_cols, batch = logits.shape[axis], [size for one, size in enumerate(logits.shape) if one != axis]
    if isinstance(given.target, tuple):
        labels, shares = given.target
        of_labels = _one_hot(labels, n_cols, axis, dtype)  # those of a row lie along the last axis
        is_ignored = _is_ignored(labels, loss.ignore_index)
        shares = jnp.where(is_ignored, 0, shares.astype(dtype))
        return (of_labels * jnp.expand_dims(shares, axis)).sum(-1), ~is_ignored.all(-1)
    if given.has_labels:
        return _one_hot(given.target, n_cols, axis, dtype), ~_is_ignored(given.target, loss.ignore_index)
    return given.target.astype(dtype), jnp.ones(batch, bool)


def _is_ignored(labels, ignore_index):
    """Which labels are ignore_index: JAX would compare bytes with what it wraps around to, or fail."""
    limits = jnp.iinfo(labels.dtype)
    if not limits.min <= ignore_index <= limits.max:
        return jnp.zeros(labels.shape, bool)
    return labels == ignore_index


def _one_hot(labels, n_cols, axis, dtype):
    """Of labels that may be in fewer bits than the classes need: JAX would count these in as few."""
    return jax.nn.one_hot(labels.astype(jnp.int32), n_cols, axis=axis, dtype=dtype)
