"""Numbers that each row has for itself, or all rows together: temperatures, limits, seeds."""

from typing import Any

from gpusoftmax import _arrays, _checks, _rows
from gpusoftmax._arrays import Array
from gpusoftmax.kernels.operands import Labels, one_value


def split(given: Any, name: str) -> tuple[Any, Any]:
    """(array, None), or (None, what is given for all rows)."""
    given = _arrays.with_shape(given, name)
    return (given, None) if getattr(given, "shape", ()) else (None, given)


def integers(
    given: Any, name: str, logits: Array, axes: tuple[int, ...], result: Array | None = None
) -> Array | Labels | None:
    """Integers as the kernels take them, or as an array to be walked beside the logits; None for none.

    result: what is written while these are read.
    """
    if given is None:
        return None
    if type(given) is int:
        return one_value(given)
    array = _arrays.wrap(given, name)
    _checks.seeds(array, name, _rows.without_axes(logits, axes))
    _check_place(array, name, logits, result)
    if array.dtype == "uint64":
        array = array._replace(dtype="int64")  # the same bits
    return _beside(array, logits, axes)


def floats(
    given: Any, name: str, logits: Array, axes: tuple[int, ...], dtype: str, result: Array | None = None
) -> Array | None:
    """Numbers of rows in the format of the arithmetic, to be walked beside the logits; None for none."""
    if given is None:
        return None
    array = _arrays.wrap(given, name)
    _checks.number_of_rows(array, name, _rows.without_axes(logits, axes))
    _check_place(array, name, logits, result)
    return _beside(array if array.dtype == dtype else _rows.contiguous(array, dtype), logits, axes)


def _check_place(array: Array, name: str, logits: Array, result: Array | None) -> None:
    _checks.same_home(logits, array, "logits", name)
    if result is not None:
        _checks.no_overlap(result, array, name)


def _beside(array: Array, logits: Array, axes: tuple[int, ...]) -> Array:
    if array.size == 1:
        return array._replace(strides=(0,) * logits.ndim)
    return _rows.per_row(array, axes, logits.ndim)
