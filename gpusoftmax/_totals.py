"""Sums over all rows of a batch, in a fixed order."""

from gpusoftmax import _arrays
from gpusoftmax._arrays import Array
from gpusoftmax.kernels.operands import Numbers


def total(values: Array, normaliser: Numbers, result: Array, divisor: float = 1.0, room: Array | None = None) -> None:
    """result[0] = sum(values), divided by normaliser[0] or, where there is none, by `divisor`.

    room: what `scratch` gave, where nothing may be allocated any more.
    """
    room = room or scratch(values, values.size, normaliser.dtype)
    numbers = _arrays.numbers(values), normaliser, _arrays.numbers(result), numbers_of(room, normaliser.dtype)
    _arrays.kernels(values.place, "batch").total(values.size, *numbers, values.place, divisor)


def count(values: Array, result: Array, room: Array | None = None) -> None:
    """result[0] = sum(values), of int64."""
    room = room or scratch(values, values.size, "int64")
    numbers = _arrays.numbers(values), _arrays.numbers(result), numbers_of(room, "int64")
    _arrays.kernels(values.place, "batch").count(values.size, *numbers, values.place)


def scratch(like: Array, n: int, dtype: str) -> Array | None:
    """Room for what the kernels find on the way to a number of n rows; None if they need none. Hold it until they have
    been started.
    """
    size = _arrays.kernels(like.place, "batch").scratch_size(n)
    return _arrays.empty(like, (size,), dtype) if size else None


def numbers_of(array: Array | None, dtype: str) -> Numbers:
    return Numbers(0, dtype) if array is None else _arrays.numbers(array)
