"""What the operations on tokens share: their checks, and the call that computes log-probabilities of given tokens."""

from typing import NamedTuple

from gpusoftmax import _arrays, _checks, _labels, _rows, _transform
from gpusoftmax.kernels.operands import Labels, Operand

_FIELDS = ("logprob", "lse", "entropy", "rank", "argmax")


def token_logprobs(
    logits, target, temperatures, bias, mask, valid,
    axis, ignore_index, return_lse, return_entropy, return_rank, return_argmax, validate, *transform,
) -> tuple:  # fmt: skip
    """The fields of TokenLogprobs."""
    x, labels, axes, ignore_index = checked(logits, target, axis, ignore_index, validate)
    dtype = _arrays.compute_dtype(x)
    arrays = temperatures, bias, mask, valid
    x, temperature = _transform.applied(x, axes, dtype, arrays, transform, name="logits")
    _checks.temperature_fits(temperature, dtype)
    batch_shape = _rows.without_axes(x, axes)
    per_target, per_row = {"logprob": _arrays.empty(x, labels.shape, dtype)}, {}
    if return_rank:
        per_target["rank"] = _arrays.empty(x, labels.shape, "int64")
    if return_lse:
        per_row["lse"] = _arrays.empty(x, batch_shape, dtype)
    if return_entropy:
        per_row["entropy"] = _arrays.empty(x, batch_shape, dtype)
    if return_argmax:
        per_row["argmax"] = _arrays.empty(x, batch_shape, "int64")
    kernel = _arrays.kernels(x.place, "token_logprobs").token_logprobs

    def call(targets: _Targets, results: dict[str, _arrays.Array]) -> None:
        def rows_of_batch(rows, x_rows, label_rows, *written):
            operands = {name: nothing(name, dtype) for name in _FIELDS}
            operands.update(zip(results, written, strict=True))
            numbers = targets.count, targets.stride, ignore_index, temperature
            kernel(rows, x_rows, label_rows, *operands.values(), *numbers, x.place)

        reads = [x, _rows.per_row(targets.labels, axes, x.ndim)]
        _rows.for_rows(rows_of_batch, axes, reads, [_rows.per_row(array, axes, x.ndim) for array in results.values()])

    several = labels.ndim > len(batch_shape)
    if several and return_rank:  # a kernel counts for one of them
        for j in range(labels.shape[-1]):
            one_of_each = {name: _rows.part(array, j) for name, array in per_target.items()}
            call(_Targets(_rows.part(labels, j), 1, 0), one_of_each)
        if per_row:
            call(
                _Targets(_rows.part(labels, 0), 0, 0),
                {"logprob": _rows.part(per_target["logprob"], 0), **per_row},
            )
    elif several:
        first_of_each = {name: _rows.part(array, 0) for name, array in per_target.items()}
        call(_Targets(_rows.part(labels, 0), labels.shape[-1], labels.strides[-1]), {**first_of_each, **per_row})
    else:
        call(_Targets(labels, 1, 0), {**per_target, **per_row})
    results = {**per_target, **per_row}
    return tuple(_arrays.result(results[name]) if name in results else None for name in _FIELDS)


class _Targets(NamedTuple):
    """Some of the targets of each row: the first of them, how many there are, and how far apart they lie."""

    labels: _arrays.Array
    count: int
    stride: int


def checked(logits, target, axis, ignore_index, validate, needs_target=True):
    """(logits, labels, axes, ignore_index) as kernels take them; labels are None without a target."""
    x = _arrays.logits(logits, "logits")
    axes = _checks.class_axis(axis, x.ndim)
    n_cols = x.shape[axes[0]]
    _checks.class_count(n_cols)
    ignore_index = _checks.ignore_index(ignore_index)
    if target is None and not needs_target:
        return x, None, axes, ignore_index
    labels = _arrays.wrap(target, "target")
    _checks.integer(labels.dtype, "target")
    _checks.same_home(x, labels, "logits", "target")
    _checks.targets(labels, _rows.without_axes(x, axes), f"to match logits {x.shape} without axis {axis}")
    if _labels.are_checked(x, validate):
        rows, all_labels, memory = _rows.all_labels(labels, n_cols)
        _labels.check(x, rows, all_labels, ignore_index)
        del memory  # a copy of the labels, perhaps: held until here
    return x, labels, axes, _labels.index_as_read(ignore_index, labels.dtype)


def nothing(name: str, dtype: str) -> Operand | Labels:
    """What stands for a result or a gradient that was not asked for."""
    return Labels(0, 0, 0, 0) if name in ("rank", "argmax") else Operand(0, 0, 0, 0, dtype)
