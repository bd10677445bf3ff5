"""What the loss of a row is measured against: a label, several labels with a share each, or a share for every class.

In the words of kernels/cpu/loss_target.py.
"""

import math
from typing import NamedTuple

from numpy import int32, int64

from gpusoftmax.kernels.cuda.device._cuda import cuda, device
from gpusoftmax.kernels.cuda.device.arithmetic import (
    add,
    add_pair,
    distance_of_mass,
    div,
    fma,
    maximum,
    mul,
    number,
    sub,
)
from gpusoftmax.kernels.cuda.device.memory import (
    advance,
    is_null,
    load,
    load_label,
    load_vector,
    misalignment,
    row_offset,
    vector_bits,
)
from gpusoftmax.kernels.cuda.device.reduce import any_lane, first_lane, lanes_where, warp_max, warp_sum
from gpusoftmax.kernels.cuda.device.rows import number_or, row_of
from gpusoftmax.kernels.cuda.device.split import split_lanes
from gpusoftmax.kernels.cuda.device.transform import transformed
from gpusoftmax.kernels.cuda.plan import WARP_SIZE

COUNTED, IGNORED, BAD = 1, 0, -1
"""A row that is ignored is not read: loss 0, gradient 0. One with a bad label: loss and gradient NaN."""


class Loss(NamedTuple):
    """What the loss of rows needs besides their logits."""

    labels: object
    label_stride: int
    n_labels: int
    shares: object  # None unless a row has several labels, which have these shares,
    share_stride: int
    probs: object  # or unless a row has a share for each class
    weight: object
    weight_sum: object
    ignore_index: int
    confidence: object  # 1 - eps
    share: object  # eps/V
    row_weight: object  # None where there are no extras
    z_loss: object
    per_logit: object  # 1 / temperature; None: it is 1


@device
def number_at(numbers, index, default):
    """numbers[index], or the default where the caller gave no numbers."""
    return default if is_null(numbers) else load(numbers, index, default)


@device
def label_at(row, j, rows, loss):
    """Label number j of a row."""
    index = row_offset(loss.labels, row, rows) + j * loss.label_stride
    return load_label(loss.labels.pointer, index, loss.labels.code)


@device
def tempered(value, per_logit):
    """value / T: of a mass, not of the sum of its distances, which overflows where logits are near the limit of the
    format.
    """
    if per_logit is None:
        return value
    return mul(value, per_logit)


# ---------------------------------------------------------------- does a row count?


@device
def only_label(row, rows, loss):
    """The label of a row that has one; 0 for the others."""
    return only_label_of(row, rows, loss, loss.shares, loss.probs)


@device
def only_label_of(row, rows, loss, shares, probs):
    if shares is None and probs is None:
        return label_at(row, 0, rows, loss)
    return int64(0)


@device
def status_of(label, row, rows, loss, like):
    """Of a row; its only label is looked up by the caller, who needs it too."""
    if weight_of_row(row, rows, loss.row_weight, like) == number(like, 0.0):
        return IGNORED
    return status_of_target(label, row, rows, loss, loss.shares, loss.probs)


@device
def weight_of_row(row, rows, row_weight, like):
    if row_weight is None:
        return number(like, 1.0)
    return number_or(row_weight, row, rows, number(like, 1.0))


@device
def status_of_target(label, row, rows, loss, shares, probs):
    if probs is None:
        if shares is None:
            return status_of_label(label, rows, loss)
        return status_of_several(row, rows, loss)
    return COUNTED


@device
def status_of_label(label, rows, loss):
    if label == loss.ignore_index:
        return IGNORED
    return COUNTED if label >= 0 and label < rows.n_cols else BAD


@device
def status_of_several(row, rows, loss):
    """A bad label is one for the row; a row of which all labels are ignored is ignored."""
    found = IGNORED
    for j in range(loss.n_labels):
        status = status_of_label(label_at(row, j, rows, loss), rows, loss)
        if status == BAD:
            return BAD
        found = max(found, status)
    return found


@device
def unused(status, like):
    """The loss and the gradient of a row that does not count."""
    return number(like, 0.0) if status == IGNORED else number(like, math.nan)


# ---------------------------------------------------------------- labels with shares


@device
def weighted_share(row, j, label, rows, loss, like):
    """v_j w_t; a label that is ignored has none."""
    if label == loss.ignore_index:
        return number(like, 0.0)
    share = load(row_of(loss.shares, row, rows).pointer, j * loss.share_stride, like)
    return mul(share, number_at(loss.weight, label, number(like, 1.0)))


@device
def sum_of_shares(row, counts, rows, loss, team, split, like):
    """S, for all lanes of a part; 0 for a row that does not count."""
    total = number(like, 0.0)
    for j in range(team.lane, loss.n_labels if counts else int64(0), split_lanes(split)):
        total = add(total, weighted_share(row, j, label_at(row, j, rows, loss), rows, loss, like))
    return warp_sum(total, split_lanes(split))


@device
def distances_of_labels(row, counts, source, rows, loss, team, split, like):
    """(largest, distances): the largest logit that a label has, and sum_j (1 - eps) v_j w_t (largest - x_t) / T.

    Read before the gradient, which may take the place of the logits, is written; the row's maximum is not known yet.
    """
    n_labels = loss.n_labels if counts else int64(0)
    largest = number(like, -math.inf)
    for j in range(team.lane, n_labels, split_lanes(split)):
        label = label_at(row, j, rows, loss)
        if label != loss.ignore_index:
            largest = maximum(largest, logit_of(source, label, like))
    largest = warp_max(largest, split_lanes(split))
    total = number(like, 0.0)
    for j in range(team.lane, n_labels, split_lanes(split)):
        label = label_at(row, j, rows, loss)
        if label != loss.ignore_index:
            mass = mul(loss.confidence, weighted_share(row, j, label, rows, loss, like))
            mass = tempered(mass, loss.per_logit)
            total = add(total, distance_of_mass(mass, logit_of(source, label, like), largest))
    return largest, warp_sum(total, split_lanes(split))


@device
def logit_of(source, label, like):
    """The logit of a label, transformed."""
    return transformed(load(source.pointer, label * source.stride, like), label, source.through)


@device
def less_shares(values, col, width, row, rows, loss, on_share, like, shares):
    """Takes on_share v_j w_t from the columns that are labels."""
    if shares is None:
        return
    for j in range(loss.n_labels):
        less_share(values, col, width, row, j, rows, loss, on_share, like)


@device
def less_share(values, col, width, row, j, rows, loss, on_share, like):
    label = label_at(row, j, rows, loss)
    if label >= col and label < col + width:
        taken = mul(on_share, weighted_share(row, j, label, rows, loss, like))
        for k in range(width):
            if col + k == label:
                values[k] = add(values[k], -taken)


@device
def less_shares_of_run(values, col, width, row, rows, loss, on_share, like, shares):
    """less_shares of a whole warp, which hardly ever meets a label: its lanes look for them together."""
    if shares is None:
        return
    lane = int32(cuda.laneid)
    first = col - int64(lane * width)
    for begin in range(0, loss.n_labels, WARP_SIZE):
        meets = False
        if begin + lane < loss.n_labels:
            label = label_at(row, begin + lane, rows, loss)
            meets = label >= first and label < first + WARP_SIZE * width
        met = lanes_where(meets)
        while met != 0:
            less_share(values, col, width, row, begin + first_lane(met), rows, loss, on_share, like)
            met = int32(met & (met - 1))


# ---------------------------------------------------------------- the mass at a column


@device
def row_of_probs(row, rows, probs):
    if probs is None:
        return None
    return row_of(probs, row, rows)


@device
def masses_of_run(masses, col, width, left, loss, probs):
    """masses[:width] = g_c of the columns col, col + 1, ... but for the label's part: eps/V w_c, or
    ((1 - eps) q_c + eps/V) w_c; 0 from column `left` of the run on.
    """
    if probs is None:
        for k in range(width):
            masses[k] = loss.share
    else:
        load_run(masses, probs, col, width, left)
        for k in range(width):
            masses[k] = fma(masses[k], loss.confidence, loss.share)
    if not is_null(loss.weight):
        for k in range(width):
            if k < left:
                masses[k] = mul(masses[k], load(loss.weight, col + k, masses[k]))
    if left < width:
        for k in range(width):
            if k >= left:
                masses[k] = number(masses[k], 0.0)


@device
def load_run(values, source, col, width, left):
    """values[:width] = a row's columns col, col + 1, ..., by granules where they are some; none from column `left` of
    the run on.
    """
    bits = vector_bits(source.pointer)
    # Not source.shift, the same number: with it a few loads of a warp came in two parts (float32: 131 instead of 128).
    behind = int32(int32(col) + int32(misalignment(source.pointer))) & int32((1 << bits) - 1)
    if source.stride == 1 and behind == 0 and width >= 1 << bits and left >= width:
        for j in range(width >> bits):
            load_vector(source.pointer, col + (j << bits), advance(values, j << bits))
    else:
        for k in range(width):
            if k < left:
                values[k] = load(source.pointer, (col + k) * source.stride, values[k])


# ---------------------------------------------------------------- all of the mass


@device
def mass_of_label(label, row, counts, rows, loss, team, split, like, shares, probs):
    """S; not yet known where every class has a share."""
    if probs is None:
        if shares is None:
            return number_at(loss.weight, label, number(like, 1.0)) if counts else number(like, 1.0)
        return sum_of_shares(row, counts, rows, loss, team, split, like)
    return number(like, 0.0)


@device
def looked_up(label, row, counts, writes_loss, source, rows, loss, team, split, like, shares, probs):
    """The logit of the label, and 0; or what distances_of_labels gives, to whoever writes the loss."""
    nothing = number(like, 0.0)
    if probs is None:
        if shares is None:
            if counts and writes_loss:  # now: the gradient may be written over the logits
                return logit_of(source, label, like), nothing
        elif team.rank == 0:
            return distances_of_labels(row, counts, source, rows, loss, team, split, like)
    return nothing, nothing


@device
def all_mass(s, mass, all_weights, n_cols, loss, team, split, probs):
    """(S, G), of which one is known. n_cols: 0 in a row that does not count."""
    if probs is None:
        return s, fma(loss.share, all_weights, mul(loss.confidence, s))
    return sum_of_probs(mass, all_weights, n_cols, loss, team, split, probs, loss.z_loss), mass


@device
def sum_of_probs(mass, all_weights, n_cols, loss, team, split, probs, z_loss):
    """S, which z alone takes: from G, or read anew in rows where smoothing has most of G, or all of it. Of one half a
    bit is lost; 1 - eps = 1/1000, or classes of a thousandth of the mean weight, had a loss 4e-6 or 3e-5 off.
    """
    zero = number(mass, 0.0)
    if z_loss is None or z_loss == zero:
        return zero
    smoothed = mul(loss.share, all_weights)
    rest = sub(mass, smoothed)
    is_lost = loss.confidence < number(mass, 0.5) or not maximum(rest, -rest) >= maximum(smoothed, -smoothed)
    s = div(rest, loss.confidence)
    if any_lane(is_lost):  # the rows of a warp together
        total, low = zero, zero
        for col in range(int64(team.lane), int64(n_cols if is_lost else 0), split_lanes(split)):
            q = load(probs.pointer, col * probs.stride, mass)
            total, low = add_pair(total, low, mul(q, number_at(loss.weight, col, number(mass, 1.0))), zero)
        total = warp_sum(add(total, low), split_lanes(split))
        if is_lost:
            s = total
    return s
