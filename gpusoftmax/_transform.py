"""What logits go through before an operation on their rows, as users give it: scale, bias, softcap, mask."""

from typing import Any

from gpusoftmax import _arrays, _checks, _rows
from gpusoftmax._arrays import Array
from gpusoftmax.kernels.operands import Transform, one_value, scale_of

_LEAST = 2.0**-1000
"""Temperature 0 for a kernel, which multiplies differences to the maximum by its inverse, or by the largest number of
the format: float32 logits have to be 4e-37 below the maximum (104 / 3e38) to have no probability.
"""


def split(
    temperature: Any, bias: Any, softcap: Any, mask: Any, n_valid: Any, empty_row: str = "nan"
) -> tuple[tuple, tuple]:
    """(arrays, options), as a call that is replayed has them apart."""
    temperatures, valid_of_rows = None, None
    temperature, n_valid = _arrays.with_shape(temperature, "temperature"), _arrays.with_shape(n_valid, "n_valid")
    if getattr(temperature, "shape", ()):
        temperature, temperatures = 1.0, temperature
    if getattr(n_valid, "shape", ()):
        n_valid, valid_of_rows = None, n_valid
    temperature, n_valid = number(temperature, "temperature"), number(n_valid, "n_valid")
    return (temperatures, bias, mask, valid_of_rows), (temperature, softcap, n_valid, empty_row)


def number(given: Any, name: str) -> Any:
    """Of an array without axes its value, which may be another one at the next call."""
    if getattr(given, "ndim", 1) or not hasattr(given, "item"):
        return given
    _arrays.wrap(given, name)  # unless it is traced, or has a gradient that would be lost
    return given.item()


def applied(
    x: Array, axes: tuple[int, ...], dtype: str, arrays: tuple, options: tuple, result: Array | None = None,
    name: str = "x", takes_temperature: bool = True, takes_zero: bool = False,
) -> tuple[Array, float]:  # fmt: skip
    """(the logits with what they go through, the temperature that is left for the kernel).

    dtype: of the computation. result: an array of the caller's that the call writes. takes_temperature: whether the
    kernel does: it can subtract the maximum first, so that the smallest temperatures overflow nothing. takes_zero: 0
    is such a one, and divides nothing.
    """
    temperatures, bias, mask, valid_of_rows = arrays
    temperature, softcap, n_valid, empty_row = options
    is_zero = takes_zero and _checks.is_zero(temperature)
    temperature, softcap = _LEAST if is_zero else _checks.temperature(temperature), _checks.softcap(softcap)
    empty_row = _checks.one_of(empty_row, ("nan", "zero"), "empty_row")
    batch_shape = _rows.without_axes(x, axes)
    n_cols = _rows.column_count(x, axes)
    scale, rows_temperature = None, None
    if temperatures is not None:
        rows_temperature = temperatures_of_rows(temperatures, x, axes, dtype, name, result)
    elif temperature != 1.0 and not is_zero and (bias is not None or softcap is not None or not takes_temperature):
        scale, temperature = scale_of(1.0, temperature, dtype), 1.0
    if bias is not None:
        bias = _beside(_arrays.logits(bias, "bias"), x, "bias", name, result)
        if bias.dtype == "float64" != dtype:  # kernels widen what they read, and narrow nothing
            bias = _rows.contiguous(bias, dtype)
        bias = bias._replace(strides=_checks.stretched(bias, x, axes, n_cols, "bias"))
    if mask is not None:
        mask = _arrays.wrap(mask, "mask")
        _checks.mask_dtype(mask, axes)
        mask = _beside(mask, x, "mask", name, result)
        per_word = 1 if mask.dtype == "bool" else 32
        strides = _checks.stretched(mask, x, axes, -(-n_cols // per_word), "mask")
        mask = mask._replace(strides=strides, dtype="bool" if per_word == 1 else "bits")
    if valid_of_rows is not None:
        valid = _arrays.wrap(valid_of_rows, "n_valid")
        _checks.integer(valid.dtype, "n_valid", "numbers of columns")
        valid = _beside(valid, x, "n_valid", name, result)
        _checks.same_shape(valid, batch_shape, "n_valid", "one for each row, or a single int")
        valid = _rows.per_row(valid, axes, x.ndim)
    else:
        valid = None if n_valid is None else one_value(_checks.valid_count(n_valid, n_cols))
    if softcap is not None:
        _checks.divisor_fits(softcap, "softcap", dtype)
    cap = None if softcap is None else _arrays.numpy_dtype(dtype).type(softcap)
    zero_rows = True if empty_row == "zero" else None
    fields = scale, rows_temperature, bias, cap, mask, valid, zero_rows
    if any(field is not None for field in fields):
        x = x._replace(transform=Transform(*fields))
    return x, temperature


def temperatures_of_rows(
    given: Any, x: Array, axes: tuple[int, ...], dtype: str, x_name: str, result: Array | None
) -> Array:
    """One for each row of x, in the format of the computation, to be walked beside x."""
    array = _beside(_arrays.logits(given, "temperature"), x, "temperature", x_name, result)
    batch_shape = _rows.without_axes(x, axes)
    _checks.same_shape(array, batch_shape, "temperature", "one for each row, or a single number")
    if array.dtype != dtype:
        array = _rows.contiguous(array, dtype)
    return _rows.per_row(array, axes, x.ndim)


def _beside(array: Array, x: Array, name: str, x_name: str, result: Array | None) -> Array:
    _checks.same_home(x, array, x_name, name)
    if result is not None:
        _checks.no_overlap(result, array, name)
    return array
