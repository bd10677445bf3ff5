"""What cross_entropy, its fused gradient and its backward share: the checks of their arguments, and the calls."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from gpusoftmax import _arrays, _checks, _labels, _transform
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


class _Rows(NamedTuple):
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

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return _arrays.without_axes(self.x, self.axes)

    @property
    def n_labels(self) -> int:
        return 1 if self.shares is None else self.labels.shape[-1]

    @property
    def kernels(self) -> Any:
        return _arrays.kernels(self.x.place, "cross_entropy")

    @property
    def of_batch(self) -> Any:
        return _arrays.kernels(self.x.place, "batch")

    def numbers(self, array: Array | None) -> Numbers:
        return Numbers(0, self.dtype) if array is None else _arrays.numbers(array)

    def operand(self, operands: dict[str, Operand | Labels], name: str) -> Operand:
        return operands.get(name, Operand(0, 0, 0, 0, self.dtype))


def split_target(target: Any) -> tuple[Any, Any]:
    """(target, shares): a pair of arrays is labels with their shares."""
    if isinstance(target, tuple) and len(target) == 2 and all(len(getattr(part, "shape", ())) for part in target):
        return target
    return target, None


def split_normalizer(normalizer: Any) -> tuple[Any, float | None]:
    """(array, number), one of them None."""
    if normalizer is None or isinstance(normalizer, np.generic) or not hasattr(normalizer, "shape"):
        return None, _checks.normalizer(normalizer)
    is_integer = _arrays.wrap(normalizer, "normalizer").dtype in _checks.INTEGERS
    return normalizer * 1.0 if is_integer else normalizer, None  # by its own library


def loss_and_gradient(
    logits, target, weight, out, divisor, shares, row_weight, normalizer, temperatures, bias, mask, valid,
    axis, ignore_index, reduction, label_smoothing, validate, grad_scale, with_grad, z_loss, divide_by, wants_z_loss,
    wants_lse, wants_correct, *transform,
) -> tuple:  # fmt: skip
    """(loss, gradient, z_loss, lse, n_correct), None for what is not wanted.

    divisor: for gpusoftmax.torch, which keeps the gradient's scale, or brings it, as an array of one element in the
    computation format. "mean" writes the number that it divides by; the others read what losses and gradient are
    divided by.
    """
    reduction = _checks.reduction(reduction)
    given = target, weight, shares, row_weight
    options = axis, ignore_index, label_smoothing, z_loss, validate
    rows, gradient = _checked(logits, given, out, with_grad, options, (temperatures, bias, mask, valid), transform)
    x, batch_shape, dtype, kernels = rows.x, rows.batch_shape, rows.dtype, rows.kernels
    _checks.only_for(normalizer is not None or divide_by is not None, "normalizer", reduction == "mean", reduction)
    _checks.counts_labels(wants_correct, rows.probs is None and rows.shares is None)

    # The small results that later kernels read stay referenced until those have been started.
    weight_sum = _weight_sum(rows)
    normaliser = None if divisor is None else _arrays.wrap(divisor, "divisor")
    if normalizer is not None:
        normaliser = _arrays.wrap(normalizer, "normalizer")
        _checks.same_home(x, normaliser, "logits", "normalizer")
        _checks.one_element(normaliser, "normalizer")
        if gradient is not None:
            _checks.no_overlap(gradient, normaliser, "normalizer")
        normaliser = _arrays.contiguous(normaliser, dtype)
    elif reduction == "mean" and divide_by is None:
        normaliser = normaliser or _arrays.empty(x, (1,), dtype)
        _normalise(rows, normaliser)
    divide_by = divide_by or 1.0
    sums = rows.numbers(weight_sum), rows.numbers(normaliser)

    losses = _arrays.empty(x, batch_shape, dtype if x.dtype == dtype else "float32")
    per_row = {"losses": losses}
    if wants_z_loss:
        per_row["z_losses"] = _arrays.empty(x, batch_shape, losses.dtype)
    if wants_lse:
        per_row["lses"] = _arrays.empty(x, batch_shape, losses.dtype)
    if wants_correct:
        per_row["correct"] = _arrays.empty(x, batch_shape, "int64")
    # Everything is allocated before anything is written: a failure leaves the logits of an in-place call as they were.
    totals = {}
    if reduction != "none":
        totals = {name: _arrays.empty(x, (), losses.dtype) for name in per_row if name in ("losses", "z_losses")}
    n_correct = _arrays.empty(x, (), "int64") if wants_correct else None

    def call(geometry: Rows, operands: dict[str, Operand | Labels]) -> None:
        kernels.cross_entropy(
            geometry,
            operands["logits"],
            operands.get("labels", NO_LABELS),
            operands["losses"],
            operands.get("gradient", NO_OPERAND),
            rows.numbers(rows.weight),
            *sums,
            rows.ignore_index,
            rows.label_smoothing,
            grad_scale / divide_by,
            x.place,
            _soft(rows, operands),
            _extras(rows, operands),
        )

    _for_rows(rows, call, {}, per_row, gradient)
    for name, total in totals.items():
        numbers = _arrays.numbers(per_row[name]), sums[1], _arrays.numbers(total)
        rows.of_batch.total(losses.size, *numbers, x.place, divide_by)
    if wants_correct:
        rows.of_batch.count(losses.size, _arrays.numbers(per_row["correct"]), _arrays.numbers(n_correct), x.place)
    results = {**per_row, **totals, "correct": n_correct}
    told = [results.get(name) for name in ("losses", "z_losses", "lses", "correct")]
    loss, *told = (None if array is None else _arrays.result(array) for array in told)
    return loss, None if gradient is None else _arrays.result(gradient, out), *told


def backward(
    logits, target, lse, dloss, weight, out, shares, row_weight, temperatures, bias, mask, valid,
    axis, ignore_index, label_smoothing, validate, z_loss, *transform,
) -> Any:  # fmt: skip
    """The gradient of the losses of rows, from their lse."""
    given = target, weight, shares, row_weight
    options = axis, ignore_index, label_smoothing, z_loss, validate
    rows, gradient = _checked(logits, given, out, True, options, (temperatures, bias, mask, valid), transform)
    reads = {}
    for name, array in (("lse", lse), ("dloss", dloss)):
        array = _arrays.logits(array, name)
        _checks.same_home(rows.x, array, "logits", name)
        if array.ndim == 0:
            array = array._replace(shape=rows.batch_shape, strides=(0,) * len(rows.batch_shape))
        _checks.same_shape(array, rows.batch_shape, name, "one number for each row")
        _checks.no_overlap(gradient, array, name)
        reads[name] = array if array.dtype == rows.dtype else _arrays.contiguous(array, rows.dtype)
    weight_sum = _weight_sum(rows)

    def call(geometry: Rows, operands: dict[str, Operand | Labels]) -> None:
        rows.kernels.cross_entropy_backward(
            geometry,
            operands["logits"],
            operands.get("labels", NO_LABELS),
            operands["lse"],
            operands["dloss"],
            operands["gradient"],
            rows.numbers(rows.weight),
            rows.numbers(weight_sum),
            rows.ignore_index,
            rows.label_smoothing,
            rows.x.place,
            _soft(rows, operands),
            _extras(rows, operands),
        )

    _for_rows(rows, call, reads, {}, gradient)
    return _arrays.result(gradient, out)


def _checked(logits, given, out, with_grad, options, arrays, transform) -> tuple[_Rows, Array | None]:
    """The arguments that all have, and the array for the gradient."""
    target, weight, shares, row_weight = given
    axis, ignore_index, label_smoothing, z_loss, validate = options
    x = _arrays.logits(logits, "logits")
    labels = _arrays.wrap(target, "target")
    axes = _checks.class_axis(axis, x.ndim)
    n_cols = x.shape[axes[0]]
    batch_shape = _arrays.without_axes(x, axes)
    reason = f"to match logits {x.shape} without axis {axis}"
    probs = None
    if shares is not None:
        shares = _arrays.logits(shares, "target[1]")
        _checks.integer(labels.dtype, "target[0]")
        _checks.shares(labels, shares, batch_shape, reason)
    elif labels.dtype in _checks.FLOATING and labels.shape == x.shape and x.ndim:
        labels, probs = None, labels
    else:
        _checks.integer(labels.dtype, "target", "class indices, or probabilities of the shape of logits")
        _checks.same_shape(labels, batch_shape, "target", reason)
    for array, name in ((labels, "target"), (probs, "target"), (shares, "target[1]")):
        if array is not None:
            _checks.same_home(x, array, "logits", name)
    _checks.class_count(n_cols)
    label_smoothing = _checks.label_smoothing(label_smoothing)
    ignore_index = _checks.ignore_index(ignore_index)
    z_loss = _checks.z_loss(z_loss)

    gradient = None
    if with_grad:
        gradient = _arrays.output(out, x, x.shape, x.dtype)
        _checks.no_partial_overlap(gradient, x, "logits")
    dtype = _arrays.compute_dtype(x, gradient)
    transformed, _ = _transform.applied(x, axes, dtype, arrays, transform, gradient, "logits", takes_temperature=False)
    if weight is not None:
        weight = _arrays.logits(weight, "weight")
        _checks.same_home(x, weight, "logits", "weight")
        _checks.same_shape(weight, (n_cols,), "weight", "one factor for each class")
    if row_weight is not None:
        row_weight = _arrays.logits(row_weight, "row_weight")
        _checks.same_home(x, row_weight, "logits", "row_weight")
        _checks.same_shape(row_weight, batch_shape, "row_weight", "one factor for each row")
    if with_grad:
        read = (
            (labels, "target"),
            (probs, "target"),
            (shares, "target[1]"),
            (weight, "weight"),
            (row_weight, "row_weight"),
        )
        for array, name in read:
            if array is not None:
                _checks.no_overlap(gradient, array, name)
    if labels is not None and _labels.are_checked(x, validate):
        all_rows, all_labels, held = _arrays.all_labels(labels, n_cols)
        _labels.check(x, all_rows, all_labels, ignore_index)
        del held  # a copy of the labels, perhaps: held until here
    weight, row_weight = (None if one is None else _arrays.contiguous(one, dtype) for one in (weight, row_weight))
    if shares is not None and shares.dtype != dtype:
        shares = _arrays.contiguous(shares, dtype)
    if probs is not None and probs.dtype == "float64" and dtype != "float64":
        probs = _arrays.contiguous(probs, dtype)
    numbers = dtype, ignore_index, label_smoothing, z_loss
    return _Rows(transformed, axes, *numbers, weight, labels, shares, probs, row_weight), gradient


def _weight_sum(rows: _Rows) -> Array | None:
    """The sum of the class weights, on the device, where it is needed."""
    if rows.weight is None or not rows.label_smoothing:
        return None
    weight_sum = _arrays.empty(rows.x, (1,), rows.dtype)
    numbers = rows.numbers(rows.weight), rows.numbers(None), _arrays.numbers(weight_sum)
    rows.of_batch.total(rows.weight.size, *numbers, rows.x.place)
    return weight_sum


def _normalise(rows: _Rows, normaliser: Array) -> None:
    """What "mean" divides by: the weights of the rows that count; where labels have shares, of the classes none."""
    n_cols = rows.x.shape[rows.axes[0]]
    result, row_weight = _arrays.numbers(normaliser), rows.numbers(rows.row_weight)
    geometry, labels, n_labels, held = Rows(math.prod(rows.batch_shape), 1, n_cols), NO_LABELS, 0, None
    if rows.labels is not None:
        n_labels = rows.n_labels
        geometry, labels, held = _arrays.all_labels(rows.labels, n_cols)
    weight = rows.numbers(rows.weight if rows.probs is None and rows.shares is None else None)
    place = rows.x.place
    rows.of_batch.normalise(geometry, labels, n_labels, weight, row_weight, result, rows.ignore_index, place)
    del held  # a copy of the labels, perhaps: held until here


def _soft(rows: _Rows, operands: dict[str, Operand | Labels]) -> Shares | Probs | None:
    if rows.probs is not None:
        return Probs(operands["probs"])
    if rows.shares is None:
        return None
    return Shares(operands["shares"], rows.n_labels, rows.labels.strides[-1], rows.shares.strides[-1])


def _extras(rows: _Rows, operands: dict[str, Operand | Labels]) -> Extras | None:
    """None where there is nothing of the kind: kernels are then compiled without."""
    is_soft = rows.probs is not None or rows.shares is not None
    if not (rows.z_loss or is_soft or operands.keys() & {"row_weight", "z_losses", "lses", "correct"}):
        return None
    row_weight, *told = (rows.operand(operands, name) for name in ("row_weight", "z_losses", "lses"))
    return Extras(row_weight, rows.z_loss, *told, operands.get("correct", NO_LABELS))


def _for_rows(
    rows: _Rows,
    call: Callable[[Rows, dict[str, Operand | Labels]], None],
    reads: dict[str, Array],
    writes: dict[str, Array],
    gradient: Array | None,
) -> None:
    """call(rows, operands by name) until every row is done. `reads` and `writes` have a number for each row."""
    first = {"labels": rows.labels, "shares": rows.shares}
    if rows.shares is not None:
        first = {name: _arrays.part(array, 0) for name, array in first.items()}
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

    _arrays.for_rows(rows_of_batch, rows.axes, list(reads.values()), list(writes.values()))


def _per_row(rows: _Rows, array: Array) -> Array:
    return _arrays.per_row(array, rows.axes, rows.x.ndim)
