"""Losses of rows whose arguments have been checked: what "mean" divides by, the kernels, and the sums of the batch.

cross_entropy measures all rows at once, linear_cross_entropy one chunk of them after the other.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from gpusoftmax import _arrays, _checks, _rows, _totals
from gpusoftmax._arrays import Array
from gpusoftmax.kernels.operands import (
    NO_LABELS,
    NO_OPERAND,
    Extras,
    Labels,
    Numbers,
    Operand,
    Probs,
    Rows,
    Shares,
)


class LossRows(NamedTuple):
    """Rows of logits with what their loss is measured against, checked."""

    x: Array
    axes: tuple[int, ...]
    dtype: str  # of the computation
    ignore_index: int
    label_smoothing: float
    z_loss: float
    weight: Array | None
    labels: Array | None  # one of each row, or several along a last axis; None: `probs` has a share for each class
    shares: Array | None  # of several labels
    probs: Array | None
    row_weight: Array | None
    temperature: float = 1.0  # what is left for the kernel: it subtracts the maximum first

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return _rows.without_axes(self.x, self.axes)

    @property
    def n_labels(self) -> int:
        return 1 if self.shares is None else self.labels.shape[-1]

    @property
    def kernels(self) -> Any:
        return _arrays.kernels(self.x.place, "cross_entropy")

    def numbers(self, array: Array | None) -> Numbers:
        return _totals.numbers_of(array, self.dtype)

    def operand(self, operands: dict[str, Operand | Labels], name: str) -> Operand:
        return operands.get(name, Operand(0, 0, 0, 0, self.dtype))


class Sums(NamedTuple):
    """Of all rows of a batch. Kernels read them when they run: hold them until those have been started."""

    weight: Array | None  # of the classes, where labels are smoothed
    divisor: Array | None  # what losses and gradients are divided by: an array of one element,
    divide_by: float  # and a number


class Results(NamedTuple):
    """What is told of a batch, by the names `losses`, `z_losses`, `lses` and `correct`."""

    of_rows: dict[str, Array]
    totals: dict[str, Array]
    rooms: dict[str, Array | None]  # for what is found on the way to the totals


def sums(rows: LossRows, reduction: str, divisor: Array | None, normalizer: Array | None, divide_by: Any) -> Sums:
    """divisor: where "mean" writes what it divides by, or what the others divide by; None if nobody needs to know.
    normalizer, divide_by: what "mean" divides by instead, one of them None.
    """
    weight = weight_sum(rows)
    if divide_by is not None:
        _checks.divisor_fits(divide_by, "normalizer", rows.dtype)
    if reduction == "mean" and normalizer is None and divide_by is None:
        divisor = divisor or _arrays.empty(rows.x, (1,), rows.dtype)
        _normalise(rows, divisor)
    return Sums(weight, normalizer or divisor, divide_by or 1.0)


def new_results(rows: LossRows, reduction: str, wanted: tuple[bool, bool, bool], dtype: str) -> Results:
    """Arrays for the loss, and for z_loss, lse and n_correct where they are wanted.

    All at once: a failure leaves the logits of an in-place call as they were.
    """
    dtypes = {"losses": dtype}
    for name, one, is_wanted in zip(("z_losses", "lses", "correct"), (dtype, dtype, "int64"), wanted, strict=True):
        if is_wanted:
            dtypes[name] = one
    of_rows = {name: _arrays.empty(rows.x, rows.batch_shape, one) for name, one in dtypes.items()}
    added = {"correct"} if reduction == "none" else {"losses", "z_losses", "correct"}
    totals = {name: _arrays.empty(rows.x, (), dtypes[name]) for name in of_rows if name in added}
    size, formats = math.prod(rows.batch_shape), {"correct": "int64"}
    rooms = {name: _totals.scratch(rows.x, size, formats.get(name, rows.dtype)) for name in totals}
    return Results(of_rows, totals, rooms)


def measure(rows: LossRows, over: Sums, of_rows: dict[str, Array], grad_scale: float, gradient: Array | None) -> None:
    """Writes what is told of each of the rows, and where there is room for it their gradient."""
    numbers = rows.numbers(rows.weight), rows.numbers(over.weight), rows.numbers(over.divisor)

    def call(geometry: Rows, operands: dict[str, Operand | Labels]) -> None:
        rows.kernels.cross_entropy(
            geometry,
            operands["logits"],
            operands.get("labels", NO_LABELS),
            operands["losses"],
            operands.get("gradient", NO_OPERAND),
            *numbers,
            rows.ignore_index,
            rows.label_smoothing,
            grad_scale / over.divide_by,
            rows.x.place,
            soft(rows, operands),
            extras(rows, operands),
            rows.temperature,
        )

    for_rows(rows, call, {}, of_rows, gradient)


def finished(rows: LossRows, over: Sums, made: Results) -> list[Any]:
    """Loss, z_loss, lse and n_correct as the caller gets them, None for what is not wanted."""
    for name, total in made.totals.items():
        each = made.of_rows[name]
        if name == "correct":
            _totals.count(each, total, made.rooms[name])
        else:
            _totals.total(each, rows.numbers(over.divisor), total, over.divide_by, made.rooms[name])
    found = {**made.of_rows, **made.totals}
    arrays = [found.get(name) for name in ("losses", "z_losses", "lses", "correct")]
    return [None if array is None else _arrays.result(array) for array in arrays]


def weight_sum(rows: LossRows) -> Array | None:
    """The sum of the class weights, on the device, where it is needed."""
    if rows.weight is None or not rows.label_smoothing:
        return None
    weight_sum = _arrays.empty(rows.x, (1,), rows.dtype)
    _totals.total(rows.weight, rows.numbers(None), weight_sum)
    return weight_sum


def _normalise(rows: LossRows, normaliser: Array) -> None:
    """What "mean" divides by: the weights of the rows that count; where labels have shares, of the classes none."""
    n_cols = rows.x.shape[rows.axes[0]]
    result, row_weight = _arrays.numbers(normaliser), rows.numbers(rows.row_weight)
    geometry, labels, n_labels, held = Rows(math.prod(rows.batch_shape), 1, n_cols), NO_LABELS, 0, None
    if rows.labels is not None:
        n_labels = rows.n_labels
        geometry, labels, held = _rows.all_labels(rows.labels, n_cols)
    weight = rows.numbers(rows.weight if rows.probs is None and rows.shares is None else None)
    room = _totals.scratch(rows.x, math.prod(rows.batch_shape), rows.dtype)
    numbers = weight, row_weight, result, rows.ignore_index, rows.numbers(room)
    _arrays.kernels(rows.x.place, "batch").normalise(geometry, labels, n_labels, *numbers, rows.x.place)
    del held  # a copy of the labels, perhaps: held until here


def soft(rows: LossRows, operands: dict[str, Operand | Labels]) -> Shares | Probs | None:
    if rows.probs is not None:
        return Probs(operands["probs"])
    if rows.shares is None:
        return None
    return Shares(operands["shares"], rows.n_labels, rows.labels.strides[-1], rows.shares.strides[-1])


def extras(rows: LossRows, operands: dict[str, Operand | Labels]) -> Extras | None:
    """None where there is nothing of the kind: kernels are then compiled without."""
    is_soft = rows.probs is not None or rows.shares is not None
    if not (rows.z_loss or is_soft or operands.keys() & {"row_weight", "z_losses", "lses", "correct"}):
        return None
    row_weight, *told = (rows.operand(operands, name) for name in ("row_weight", "z_losses", "lses"))
    return Extras(row_weight, rows.z_loss, *told, operands.get("correct", NO_LABELS))


def for_rows(
    rows: LossRows,
    call: Callable[[Rows, dict[str, Operand | Labels]], None],
    reads: dict[str, Array],
    writes: dict[str, Array],
    gradient: Array | None,
) -> None:
    """call(rows, operands by name) until every row is done. `reads` and `writes` have a number for each row."""
    first = {"labels": rows.labels, "shares": rows.shares}
    if rows.shares is not None:
        first = {name: _rows.part(array, 0) for name, array in first.items()}
    reads = {**first, "row_weight": rows.row_weight, **reads}
    reads = {name: _per_row(rows, array) for name, array in reads.items() if array is not None}
    if rows.probs is not None:
        reads["probs"] = rows.probs
    reads = {"logits": rows.x, **reads}
    writes = {name: _per_row(rows, array) for name, array in writes.items()}
    if gradient is not None:
        writes["gradient"] = gradient
    names = *reads, *writes

    def rows_of_batch(geometry: Rows, *operands: Operand | Labels) -> None:
        call(geometry, dict(zip(names, operands, strict=True)))

    _rows.for_rows(rows_of_batch, rows.axes, list(reads.values()), list(writes.values()))


def _per_row(rows: LossRows, array: Array) -> Array:
    return _rows.per_row(array, rows.axes, rows.x.ndim)
