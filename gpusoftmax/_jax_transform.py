"""What logits go through before an operation, in operations of JAX, which differentiates these as often as asked.

    u = x / T + bias        z = softcap tanh(u / softcap), -inf where it is masked

The kernels do the same where they read; gradients with respect to z come back through what is written here. Where the
logits are only masked, a temperature for all rows is left for the operation, as in _torch_transform.py.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gpusoftmax import _checks


class Numbers(NamedTuple):
    """What of a transform is no array. `temperature` is 1 where it is one."""

    temperature: float
    softcap: float | None
    n_valid: int | None
    empty_row: str


class Arrays(NamedTuple):
    """What is: the first two may have gradients."""

    temperature: jax.Array | None
    bias: jax.Array | None
    mask: jax.Array | None
    n_valid: jax.Array | None


NOTHING, IDENTITY = Arrays(None, None, None, None), Numbers(1.0, None, None, "nan")


def split(
    temperature: Any, bias: Any, softcap: float | None, mask: Any, n_valid: Any, empty_row: str
) -> tuple[Arrays, Numbers]:
    """The transform that the arguments of an operation stand for."""
    without_gradient(softcap=softcap)
    temperatures = valid = None
    if hasattr(temperature, "shape"):
        temperature, temperatures = 1.0, jnp.asarray(temperature)
    if hasattr(n_valid, "shape"):
        n_valid, valid = None, jnp.asarray(n_valid)
    bias, mask = (None if one is None else jnp.asarray(one) for one in (bias, mask))
    # 0, which is the largest logit for gpusoftmax.softmax, has no gradient.
    numbers = Numbers(_checks.temperature(temperature), softcap, n_valid, empty_row)
    return Arrays(temperatures, bias, mask, valid), numbers


def without_gradient(**given: Any) -> None:
    for name, value in given.items():
        if isinstance(value, jax.core.Tracer):
            raise TypeError(f"{name} is traced by jax, and gets no gradient: pass jax.lax.stop_gradient({name})")


def options_of(arrays: Arrays, numbers: Numbers) -> dict[str, Any]:
    """The arguments of the core's functions."""
    temperature = numbers.temperature if arrays.temperature is None else arrays.temperature
    return {
        "temperature": temperature if _is_array(temperature) else _checks.temperature(temperature),
        "bias": arrays.bias,
        "softcap": numbers.softcap,
        "mask": arrays.mask,
        "n_valid": numbers.n_valid if arrays.n_valid is None else arrays.n_valid,
    }


def _is_array(temperature: Any) -> bool:
    """Not one number, whose value can be asked for."""
    return jnp.ndim(temperature) > 0 or isinstance(temperature, jax.core.Tracer)


def on_one_device(*given: Any) -> tuple:
    """Arrays, or trees of them: what is committed to no device comes to where the rest is, as in JAX's own operations.
    Gradients of sums, for instance, JAX makes on its default device.
    """
    arrays = jax.tree.leaves(given)
    if any(isinstance(one, jax.core.Tracer) for one in arrays):
        return given
    devices = next((one for one in arrays if one.committed), arrays[0]).devices()
    if len(devices) > 1 or all(one.devices() == devices for one in arrays):
        return given
    (device,) = devices
    return jax.tree.map(lambda one: one if one.committed else jax.device_put(one, device), given)


def is_nothing(arrays: Arrays, numbers: Numbers) -> bool:
    return is_temperature(arrays, numbers) and numbers.temperature == 1


def is_temperature(arrays: Arrays, numbers: Numbers) -> bool:
    """Whether there is one temperature and no more."""
    return is_mask(arrays, numbers) and arrays.mask is arrays.n_valid is numbers.n_valid is None


def is_mask(arrays: Arrays, numbers: Numbers) -> bool:
    """Whether logits are only masked and divided by one temperature, which is then left for the operation."""
    return arrays.temperature is arrays.bias is numbers.softcap is None


def left_of(arrays: Arrays, numbers: Numbers) -> float:
    return numbers.temperature if is_mask(arrays, numbers) else 1.0


def pulled_back(
    dz: jax.Array, x: jax.Array, arrays: Arrays, axes: tuple[int, ...], numbers: Numbers
) -> tuple[jax.Array, Arrays]:
    """The gradients with respect to x and to the arrays, from that with respect to z."""

    def function(x, temperature, bias):
        return transformed(x, arrays._replace(temperature=temperature, bias=bias), axes, numbers)

    z, pull = jax.vjp(function, x, arrays.temperature, arrays.bias)
    dx, of_temperature, of_bias = pull(dz.astype(z.dtype))
    return dx, NOTHING._replace(temperature=of_temperature, bias=of_bias)


def wide(x: jax.Array) -> jax.Array:
    """In float32 at least, where sums of many terms lose nothing."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def transformed(
    x: jax.Array, arrays: Arrays, axes: tuple[int, ...], numbers: Numbers, takes_temperature: bool = True
) -> jax.Array:
    """z, in float32 at least. takes_temperature: whether one that is all but a mask is left for the operation."""
    kept = _kept(x, arrays, axes, numbers)
    z = wide(x if kept is None else jnp.where(kept, x, 0))
    if arrays.temperature is not None:
        z = _divided(z, _per_row(wide(arrays.temperature), x, axes))
    elif not (takes_temperature and is_mask(arrays, numbers)) and numbers.temperature != 1:
        z = _divided(z, numbers.temperature)
    if arrays.bias is not None:
        z = z + wide(_stretched(arrays.bias, x, axes))
        z = z if kept is None else jnp.where(kept, z, 0)  # whatever the bias is where it is masked
    if numbers.softcap is not None:
        z = numbers.softcap * jnp.tanh(z / numbers.softcap)
    return z if kept is None else jnp.where(kept & (z != -jnp.inf), z, -jnp.inf)  # as in _torch_transform.py


def _divided(x: jax.Array, temperature: jax.Array | float) -> jax.Array:
    """x / T. Where x is infinite T has no weight, and no gradient of NaN."""
    is_finite = jnp.isfinite(x)
    return jnp.where(is_finite, jnp.where(is_finite, x, 0) / temperature, x / jax.lax.stop_gradient(temperature))


def _kept(x: jax.Array, arrays: Arrays, axes: tuple[int, ...], numbers: Numbers) -> jax.Array | None:
    """Which logits are not masked, to be stretched over x; None: all."""
    mask, n_valid = arrays.mask, numbers.n_valid
    if arrays.n_valid is not None:
        n_valid = _per_row(arrays.n_valid, x, axes)
    if mask is None and n_valid is None:
        return None
    sizes = [size if axis in axes else 1 for axis, size in enumerate(x.shape)]
    columns = jnp.arange(math.prod(sizes))
    mask = mask if mask is None else _stretched(mask, x, axes)
    if mask is not None and mask.dtype != jnp.bool_:
        bits = (columns & 31).reshape(sizes).astype(mask.dtype)
        mask = (jnp.take(mask, columns >> 5, axis=axes[0]) >> bits) & 1 != 0
    if n_valid is None:
        return mask
    counts = columns.reshape(sizes) < n_valid
    return counts if mask is None else mask & counts


def _per_row(numbers: jax.Array, x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """One number for each row, to be combined with its columns; or one for all of them."""
    if not numbers.ndim:
        return numbers
    return numbers.reshape([1 if axis in axes else size for axis, size in enumerate(x.shape)])


def _stretched(beside: jax.Array, x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """A bias or mask in as many axes as x, where it may have just those of the columns."""
    if beside.ndim == len(axes):
        sizes = dict(zip(axes, beside.shape, strict=True))
        return beside.reshape([sizes.get(axis, 1) for axis in range(x.ndim)])
    return beside
