"""What the loss of a row is measured against: a label, several labels with a share each, or a share for every class.

    q_c    the share of class c: [c = t] for a label t; sum_j v_j [c = t_j] for labels t_j with shares v_j; given
    S      sum_c q_c w_c, with the class weights w (1 where none are given)
    g_c    ((1 - eps) q_c + eps/V) w_c, the mass that the loss has at a class, label smoothing and all
    G      sum_c g_c = (1 - eps) S + eps/V W

`loss` stands for loss_rows.Loss.
"""

import math

from gpusoftmax.kernels.cpu.arithmetic import (
    add,
    fma,
    mul,
)
from gpusoftmax.kernels.cpu.cache import device
from gpusoftmax.kernels.cpu.here import Line
from gpusoftmax.kernels.cpu.memory import (
    load,
    load_cols,
    load_label,
    pointer_to,
)
from gpusoftmax.kernels.cpu.rows import element, number_or, row_offset
from gpusoftmax.kernels.cpu.vector import (
    is_across,
    number,
)

COUNTED, IGNORED, BAD = 1, 0, -1
"""A row that is ignored is not read: loss 0, gradient 0. One with a bad label: loss and gradient NaN."""


@device
def number_at(numbers, index, default):
    """numbers[index], or the default where the caller gave no numbers."""
    return default if numbers == 0 else load(pointer_to(numbers, default), index, default)


@device
def label_of(labels, row, rows):
    return load_label(labels.pointer, row_offset(labels, row, rows), labels.code)


@device
def weight_of_class(label, loss):
    return number_at(loss.weight, label, number(loss.scale, 1.0))


@device
def times_scale(value, scale, scale_low):
    """Of a mass, not of the sum of its distances: that of logits near the limit of the format would overflow."""
    if scale_low is None:
        return value
    return mul(value, scale)


# ---------------------------------------------------------------- does a row count?


@device
def only_label(row, loss):
    """The label of a row that has one; 0 for the others."""
    return only_label_of(row, loss, loss.shares, loss.is_dense)


@device
def only_label_of(row, loss, shares, is_dense):
    if is_dense is None and shares is None:
        return label_of(loss.labels, row, loss.rows)
    return 0


@device
def status_of(label, row, loss):
    """Of a row; its only label is looked up by the caller, who needs it too."""
    if weight_of_row(row, loss, loss.row_weight) == number(loss.scale, 0.0):
        return IGNORED
    return status_of_target(label, row, loss, loss.shares, loss.is_dense)


@device
def weight_of_row(row, loss, row_weight):
    if row_weight is None:
        return number(loss.scale, 1.0)
    return number_or(row_weight, row, loss.rows, number(loss.scale, 1.0))


@device
def status_of_target(label, row, loss, shares, is_dense):
    if is_dense is None:
        if shares is None:
            return status_of_label(label, loss)
        return status_of_several(row, loss)
    return COUNTED


@device
def status_of_label(label, loss):
    if label == loss.ignore_index:
        return IGNORED
    return COUNTED if label >= 0 and label < loss.rows.n_cols else BAD


@device
def status_of_several(row, loss):
    """A bad label is one for the row; a row of which all labels are ignored is ignored."""
    found = IGNORED
    for j in range(loss.n_labels):
        status = status_of_label(label_at(row, j, loss), loss)
        if status == BAD:
            return BAD
        found = max(found, status)
    return found


@device
def unused(status, loss):
    """The loss and the gradient of a row that does not count."""
    return number(loss.scale, 0.0) if status == IGNORED else number(loss.scale, math.nan)


# ---------------------------------------------------------------- labels with shares


@device
def label_at(row, j, loss):
    """Label number j of a row."""
    index = row_offset(loss.labels, row, loss.rows) + j * loss.label_stride
    return load_label(loss.labels.pointer, index, loss.labels.code)


@device
def weighted_share(row, j, label, loss):
    """v_j w_t; a label that is ignored has none."""
    if label == loss.ignore_index:
        return number(loss.scale, 0.0)
    share = load(element(loss.shares, row, loss.rows), j * loss.share_stride, loss.scale)
    return mul(share, weight_of_class(label, loss))


@device
def sum_of_shares(row, loss):
    """S, of a row that counts."""
    total = number(loss.scale, 0.0)
    for j in range(loss.n_labels):
        total = add(total, weighted_share(row, j, label_at(row, j, loss), loss))
    return total


@device
def share_of_label(row, label, loss):
    """The shares of all labels of a row that are this one, times its weight."""
    total = number(loss.scale, 0.0)
    for j in range(loss.n_labels):
        if label_at(row, j, loss) == label:
            total = add(total, weighted_share(row, j, label, loss))
    return total


# ---------------------------------------------------------------- of the columns of a vector


@device
def weights_at(col, left, here, loss):
    """The class weights that belong to the vector at `col`."""
    one = number(loss.scale, 1.0)
    if loss.weight == 0:
        return add(here.zeros, one)
    if is_across(here.zeros):
        return add(here.zeros, number_at(loss.weight, col, one))
    return load_cols(Line(pointer_to(loss.weight, one), 1, 0), col, left, here.zeros)


@device
def shares_at(col, left, here):
    """q_c, where every class has its own."""
    return load_cols(here.second, col, left, here.zeros)


@device
def mass_at(col, left, here, loss):
    """g_c; nothing in particular behind the last column."""
    mass = fma(shares_at(col, left, here), add(here.zeros, loss.confidence), add(here.zeros, loss.share))
    return mul(mass, weights_at(col, left, here, loss))
