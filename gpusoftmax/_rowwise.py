"""The shared body of operations that turn rows of logits into rows of the same shape, and of their backwards."""

import functools
from collections.abc import Callable
from typing import Any

from numpy import ndarray

from gpusoftmax import _arrays, _checks, _memory, _replay, _rows, _transform
from gpusoftmax.kernels.forks import import_module
from gpusoftmax.kernels.operands import SMALL


@functools.cache
def _small_kernel(op: str, char: str) -> Callable | None:
    return import_module("gpusoftmax.kernels.cpu.small").function(op, char)


def small(
    op: str, x: Any, axis: Any, dtype: Any, out: Any,
    temperature: Any, bias: Any, softcap: Any, mask: Any, n_valid: Any, empty_row: Any,
) -> ndarray | None:  # fmt: skip
    """What `forward` gives, if it is little and plain enough that nothing should come before it, else None.

    Here only what a kernel cannot ask: every line costs a tenth of such a call.
    """
    if (
        type(x) is not ndarray
        or not (out is None or type(out) is ndarray)
        or type(axis) is not int
        or axis != -1
        or type(temperature) is not float
        or temperature != 1
        or not (dtype is bias is softcap is mask is n_valid is None)
        or type(empty_row) is not str
        or empty_row != "nan"
    ):
        return None
    kernel = _small_kernel(op, x.dtype.char)
    if kernel is None:
        return None
    if out is not None:
        return out if kernel(x, out) else None
    if x.size > SMALL:
        return None
    result = _memory.aligned(x.shape, x.dtype)
    return result if kernel(x, result) else None


def forward(op: str, x: Any, axis: Any, dtype: Any, out: Any, transform: tuple, any_temperature: bool = False) -> Any:
    """Calls `op` of the kernels of the same name on x and a result of its shape.

    transform: the arguments of _transform.split. any_temperature: the result is right, if only the maximum counts, even
    where 2 / temperature overflows.
    """
    arrays, options = _transform.split(*transform)
    dtype = None if dtype is None else _checks.dtype_name(dtype)
    return _replay.call(_forward, (x, out, *arrays), op, axis, dtype, any_temperature, *options)


def _forward(x, out, temperatures, bias, mask, valid, op, axis, dtype, any_temperature, *options):
    logits = _arrays.logits(x, "x")
    axes = _checks.axes(axis, logits.ndim)
    result = _arrays.output(out, logits, logits.shape, logits.dtype, dtype)
    arrays = temperatures, bias, mask, valid
    logits, temperature = _transform.applied(
        logits, axes, _arrays.compute_dtype(logits, result), arrays, options, result, takes_zero=any_temperature
    )  # fmt: skip
    if not any_temperature:
        _checks.temperature_fits(temperature, _arrays.compute_dtype(logits, result))
    _checks.no_partial_overlap(result, logits, "x")
    kernel = getattr(_arrays.kernels(logits.place, op), op)
    if logits.size:
        _rows.for_rows(lambda *rows: kernel(*rows, temperature, logits.place), axes, [logits], [result])
    return _arrays.result(result, out)


def backward(op: str, y: Any, dy: Any, names: tuple[str, str], axis: Any, temperature: Any, out: Any) -> Any:
    """Calls `op`_backward of the kernels of `op` on the op's result y, the gradient dy and a result of their shape.

    names: of y and dy, in messages.
    """
    (temperatures, *_), (temperature, *_) = _transform.split(temperature, None, None, None, None)
    return _replay.call(_backward, (y, dy, out, temperatures), op, *names, axis, temperature)


def _backward(y, dy, out, temperatures, op, y_name, dy_name, axis, temperature):
    value, gradient = _arrays.logits(y, y_name), _arrays.logits(dy, dy_name)
    _checks.same_home(value, gradient, y_name, dy_name)
    _checks.same_dtype(value, gradient, y_name, dy_name)
    _checks.same_shape(gradient, value.shape, dy_name, f"to match {y_name}")
    axes = _checks.axes(axis, value.ndim)
    temperature = _checks.temperature(temperature)
    result = _arrays.output(out, value, value.shape, value.dtype)
    dtype = _arrays.compute_dtype(value, result)
    _checks.temperature_fits(temperature, dtype)
    _checks.no_partial_overlap(result, value, y_name)
    _checks.no_partial_overlap(result, gradient, dy_name)
    kernels, place = _arrays.kernels(value.place, op), value.place
    reads, call = [value, gradient], getattr(kernels, f"{op}_backward")
    numbers = (temperature, place)
    if temperatures is not None:
        reads.append(_transform.temperatures_of_rows(temperatures, value, axes, dtype, y_name, result))
        call, numbers = getattr(kernels, f"tempered_{op}_backward"), (place,)
    if value.size:
        _rows.for_rows(lambda *rows: call(*rows, *numbers), axes, reads, [result])
    return _arrays.result(result, out)
