"""Whether labels are classes: the one check that looks at values; and which rows take no part."""

from typing import Any

import numpy as np

from gpusoftmax import _arrays, _checks
from gpusoftmax._arrays import Array
from gpusoftmax.kernels.operands import LABELS, NO_BAD_LABEL, TOO_LARGE, Labels, Rows


def are_checked(x: Array, validate: bool | None) -> bool:
    """By default where that waits for nobody: on a GPU the kernels turn a bad label into NaN instead."""
    return x.place.target == "cpu" if validate is None else validate


def check(x: Array, rows: Rows, labels: Labels, ignore_index: int) -> None:
    """IndexError naming the first of all labels (see _rows.all_labels) that is neither a class nor ignore_index."""
    bad_row, bad_label = _arrays.empty(x, (1,), "int64"), _arrays.empty(x, (1,), "int64")
    kernels = _arrays.kernels(x.place, "batch")
    found = _arrays.numbers(bad_row), _arrays.numbers(bad_label)
    kernels.find_bad_label(rows, labels, *found, index_as_read(ignore_index, LABELS[labels.code]), x.place)
    row = _arrays.to_python(bad_row)
    if row != NO_BAD_LABEL:
        raise _checks.bad_label(row, _arrays.to_python(bad_label), rows.n_cols, ignore_index)


def index_as_read(ignore_index: int, dtype: str) -> int:
    """ignore_index beside labels of this dtype as the kernels read them: where these may be TOO_LARGE, -1 is none."""
    return -1 if ignore_index == TOO_LARGE and dtype == "uint64" else ignore_index


def idle_rows(labels: Array, ignore_index: int, row_weight: Array | None) -> Any | None:
    """Which rows have ignore_index or the weight 0, by the labels' library. None where it is known that none has; on a
    GPU that would wait for the device.
    """
    limits, found = np.iinfo(labels.dtype), None
    if limits.min <= ignore_index <= limits.max:  # torch would compare with what the index wraps around to
        found = labels.library_array == ignore_index
    if row_weight is not None:
        unweighted = row_weight.library_array == 0
        found = unweighted if found is None else found | unweighted
    return None if found is None or (labels.place.target == "cpu" and not bool(found.any())) else found
