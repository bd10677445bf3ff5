"""What cross_entropy, its fused gradient and its backward share: the checks of their arguments, and the calls."""

from typing import Any, NamedTuple

import numpy as np

from gpusoftmax import _arrays, _checks, _labels, _loss_rows, _rows, _transform
from gpusoftmax._arrays import Array
from gpusoftmax._loss_rows import LossRows
from gpusoftmax.kernels.operands import NO_LABELS, Labels, Operand, Rows


class CrossEntropy(NamedTuple):
    """What a loss returns if more than the loss is asked for; None for what is not."""

    loss: Any
    z_loss: Any = None
    lse: Any = None
    n_correct: Any = None


def split_target(target: Any) -> tuple[Any, Any]:
    """(target, shares): a pair of arrays is labels with their shares."""
    if not isinstance(target, tuple) or len(target) != 2:
        return target, None
    parts = tuple(_arrays.with_shape(part, f"target[{k}]") for k, part in enumerate(target))
    return parts if all(len(getattr(part, "shape", ())) for part in parts) else (target, None)


def split_normalizer(normalizer: Any) -> tuple[Any, float | None]:
    """(array, number), one of them None."""
    normalizer = _arrays.with_shape(normalizer, "normalizer")
    if normalizer is None or isinstance(normalizer, np.generic) or not hasattr(normalizer, "shape"):
        return None, _checks.normalizer(normalizer)
    array = _arrays.wrap(normalizer, "normalizer")
    if array.dtype not in _checks.INTEGERS:
        return normalizer, None
    return (array.owner if array.kind == "numpy" else normalizer) * 1.0, None  # by its own library, if it is known


def normalizer_array(given: Any, x: Array, x_name: str, dtype: str, gradient: Array | None) -> Array:
    """The array of a normalizer, in the format of the computation."""
    array = _arrays.logits(given, "normalizer")
    _checks.same_home(x, array, x_name, "normalizer")
    _checks.one_element(array, "normalizer")
    if gradient is not None:
        _checks.no_overlap(gradient, array, "normalizer")
    return _rows.contiguous(array, dtype)


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
    arrays = temperatures, bias, mask, valid
    rows, gradient = _checked(logits, given, out, with_grad, options, arrays, transform, takes_temperature=True)
    _checks.only_for(normalizer is not None or divide_by is not None, "normalizer", reduction == "mean", reduction)
    _checks.counts_labels(wants_correct, rows.probs is None and rows.shares is None)

    divisor = None if divisor is None else _arrays.wrap(divisor, "divisor")
    if normalizer is not None:
        normalizer = normalizer_array(normalizer, rows.x, "logits", rows.dtype, gradient)
    over = _loss_rows.sums(rows, reduction, divisor, normalizer, divide_by)
    _checks.scale_fits(grad_scale, over.divide_by, divide_by is not None, rows.dtype)
    wanted = wants_z_loss, wants_lse, wants_correct
    made = _loss_rows.new_results(rows, reduction, wanted, rows.dtype if rows.x.dtype == rows.dtype else "float32")
    _loss_rows.measure(rows, over, made.of_rows, grad_scale, gradient)
    loss, *told = _loss_rows.finished(rows, over, made)
    return loss, None if gradient is None else _arrays.result(gradient, out), *told


def backward(
    logits, target, lse, dloss, weight, out, shares, row_weight, temperatures, bias, mask, valid,
    axis, ignore_index, label_smoothing, validate, z_loss, *transform,
) -> Any:  # fmt: skip
    """The gradient of the losses of rows, from their lse."""
    given = target, weight, shares, row_weight
    options = axis, ignore_index, label_smoothing, z_loss, validate
    arrays = temperatures, bias, mask, valid
    # What is subtracted is the lse, which is rounded anyway.
    rows, gradient = _checked(logits, given, out, True, options, arrays, transform, takes_temperature=False)
    reads = {}
    for name, array in (("lse", lse), ("dloss", dloss)):
        array = _arrays.logits(array, name)
        _checks.same_home(rows.x, array, "logits", name)
        if array.ndim == 0:
            array = array._replace(shape=rows.batch_shape, strides=(0,) * len(rows.batch_shape))
        _checks.same_shape(array, rows.batch_shape, name, "one number for each row")
        _checks.no_overlap(gradient, array, name)
        reads[name] = array if array.dtype == rows.dtype else _rows.contiguous(array, rows.dtype)
    weight_sum = _loss_rows.weight_sum(rows)

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
            _loss_rows.soft(rows, operands),
            _loss_rows.extras(rows, operands),
        )

    _loss_rows.for_rows(rows, call, reads, {}, gradient)
    return _arrays.result(gradient, out)


def _checked(
    logits, given, out, with_grad, options, arrays, transform, takes_temperature
) -> tuple[LossRows, Array | None]:  # fmt: skip
    """The arguments that all have, and the array for the gradient."""
    target, weight, shares, row_weight = given
    axis, ignore_index, label_smoothing, z_loss, validate = options
    x = _arrays.logits(logits, "logits")
    labels = _arrays.wrap(target, "target")
    axes = _checks.class_axis(axis, x.ndim)
    n_cols = x.shape[axes[0]]
    batch_shape = _rows.without_axes(x, axes)
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
    _checks.factor_fits(z_loss, "z_loss", dtype)
    transformed, temperature = _transform.applied(
        x, axes, dtype, arrays, transform, gradient, "logits", takes_temperature
    )
    _checks.temperature_fits(temperature, dtype)
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
        all_rows, all_labels, held = _rows.all_labels(labels, n_cols)
        _labels.check(x, all_rows, all_labels, ignore_index)
        del held  # a copy of the labels, perhaps: held until here
    if labels is not None:
        ignore_index = _labels.index_as_read(ignore_index, labels.dtype)
    weight, row_weight = (None if one is None else _rows.contiguous(one, dtype) for one in (weight, row_weight))
    if shares is not None and shares.dtype != dtype:
        shares = _rows.contiguous(shares, dtype)
    if probs is not None and probs.dtype == "float64" and dtype != "float64":
        probs = _rows.contiguous(probs, dtype)
    numbers = dtype, ignore_index, label_smoothing, z_loss
    rows = LossRows(transformed, axes, *numbers, weight, labels, shares, probs, row_weight, temperature)
    return rows, gradient
