"""Cross-entropy over rows of logits and its fused gradient, on the CPU.

For one row x with label t, class weights w (1 where none are given), W = sum_c w_c, label smoothing eps over V classes:

    nll       = log s + (max - x_t)                         = -log_softmax(x)_t, from the row state
    loss      = (1 - eps) w_t nll + eps/V (W log s + D)     D = sum_c w_c (max - x_c)
    dlogits_c = u ((1 - eps) w_t (p_c - [c = t]) + eps/V (p_c W - w_c))

(torch's LossNLL.cpp has eps/V sum_c w_c (lse - x_c), which is the same: no term is negative, so nothing cancels here.)
D is summed beside the state, chunk by chunk relative to the chunk's maximum.

u is grad_scale, divided for "mean" by the normaliser: the sum of w_t over the rows that count.

A row whose label is ignore_index is not used: loss 0, gradient 0. A label out of range: loss and gradient NaN.
"""

import math
from typing import NamedTuple

from gpusoftmax.kernels.cpu.cache import device, kernel
from gpusoftmax.kernels.cpu.call import arguments
from gpusoftmax.kernels.cpu.chunks import CHUNK_COLS, sum_chunk, sum_of_exponentials, write_chunk
from gpusoftmax.kernels.cpu.here import Line, index_in, pulled_back_cols, pulled_back_one, unless_empty
from gpusoftmax.kernels.cpu.rows import chunk_range, count_of_chunks, element, row_offset, save_maxima
from gpusoftmax.kernels.cpu.run import run
from gpusoftmax.kernels.cpu.states import (
    FIELDS,
    MAX,
    OWN,
    WRITER,
    chunk_ratio,
    fold_state,
    save,
    save_state,
    saved,
)
from gpusoftmax.kernels.cpu.vector import (
    add,
    add_pair,
    distance,
    div,
    fma,
    is_across,
    lanes_of,
    load,
    load_cols,
    load_label,
    log_probability,
    log_sum,
    mul,
    negative,
    number,
    pointer_to,
    rise_to,
    row_inverse,
    store,
    sub,
)
from gpusoftmax.kernels.cpu.walk import walk
from gpusoftmax.kernels.operands import NO_BAD_LABEL, STORAGE, Labels, Numbers, Operand, Place, Rows


def cross_entropy(
    rows: Rows,
    logits: Operand,
    labels: Labels,
    losses: Operand,
    dlogits: Operand,
    weight: Numbers,
    weight_sum: Numbers,
    normaliser: Numbers,
    ignore_index: int,
    label_smoothing: float,
    grad_scale: float,
    place: Place,
) -> None:
    """The loss of each row and, unless dlogits.pointer is 0, the gradient; dlogits may be the logits themselves.

    weight (n_cols), weight_sum (1) and normaliser (1) are in the computation format; where there are none they stand
    for ones, n_cols and 1.
    """
    number_of = STORAGE[weight.dtype]
    with_grad = dlogits.pointer != 0
    run(
        cross_entropy_with_grad_rows if with_grad else cross_entropy_rows,
        rows,
        logits,
        None,
        dlogits if with_grad else None,
        labels,
        losses,
        weight,
        weight_sum,
        normaliser,
        ignore_index,
        number_of(1.0 - label_smoothing),
        number_of(label_smoothing / rows.n_cols),
        number_of(grad_scale),
        keeps_exponentials=with_grad,
    )


def normalise(
    rows: Rows, labels: Labels, weight: Numbers, normaliser: Numbers, ignore_index: int, place: Place
) -> None:
    """normaliser[0] = the sum of weight[label] over the rows that count; their number where there are no weights."""
    normalise_rows(rows, labels, weight.pointer, normaliser.pointer, ignore_index, STORAGE[weight.dtype](0))


def total(n: int, values: Numbers, normaliser: Numbers, result: Numbers, place: Place) -> None:
    """result[0] = sum(values) / normaliser[0], in the order of the values."""
    tags = STORAGE[values.dtype](0), STORAGE[result.dtype](0), STORAGE[normaliser.dtype](0)
    total_rows(n, values.pointer, normaliser.pointer, result.pointer, *tags)


def find_bad_label(
    rows: Rows, labels: Labels, bad_row: Numbers, bad_label: Numbers, ignore_index: int, place: Place
) -> None:
    """bad_row[0], bad_label[0] (int64) = the first row whose label is neither a class nor ignore_index, and its label.

    NO_BAD_LABEL for both if there is none.
    """
    find_bad_label_rows(rows, labels, bad_row.pointer, bad_label.pointer, ignore_index)


class Loss(NamedTuple):
    """What the steps need besides the logits."""

    rows: Rows
    labels: Labels
    losses: object
    weight: int  # addresses of numbers in the computation format, 0: none
    weight_sum: int
    normaliser: int
    ignore_index: int
    confidence: object  # 1 - eps
    share: object  # eps/V
    grad_scale: object
    scale: object  # 1


class Gradient(NamedTuple):
    """What the gradient of a row, or of one row per lane, is made of, see `gradient_of`."""

    shift: object
    exponent: object
    on_probs: object
    on_label: object
    on_weight: object


# What is kept of a chunk beside its state,
LOGIT, DISTANCE, DISTANCE_LOW, WEIGHT = range(OWN, OWN + 4)
# and of a row, where the chunks end.
LABEL_LOGIT, LABEL_WEIGHT, ROW_LOSS = range(3)
# When a chunk is written: the label's exponential, and what the gradient of the label's logit is made of.
LABEL_EXP, ON_PROBS, ON_LABEL = range(WRITER, WRITER + 3)


@kernel
def cross_entropy_rows(call):
    way, job, logits, none, loss = unpacked(call)
    walk(way, job, loss.rows, logits, logits, none, save_maxima, measure, fold, write_nothing, loss, loss.share)


@kernel
def cross_entropy_with_grad_rows(call):
    way, job, logits, dlogits, loss = unpacked(call)
    walk(way, job, loss.rows, logits, logits, dlogits, save_maxima, measure_and_keep, fold, write, loss, loss.share)


@device
def unpacked(call):
    (
        way, job, rows, logits, same, dlogits, labels, losses, weight, weight_sum, normaliser, ignore_index,
        confidence, share, grad_scale,
    ) = arguments(call)  # fmt: skip
    one = number(share, 1.0)
    loss = Loss(
        rows, labels, losses, weight, weight_sum, normaliser, ignore_index, confidence, share, grad_scale, one
    )  # fmt: skip
    return way, job, logits, dlogits, loss


@device
def label_of(labels, row, rows):
    return load_label(labels.pointer, row_offset(labels, row, rows), labels.code)


@device
def number_at(numbers, index, default):
    """numbers[index], or the default where the caller gave no numbers."""
    return default if numbers == 0 else load(pointer_to(numbers, default), index, default)


@device
def counts(label, loss):
    return label != loss.ignore_index and label >= 0 and label < loss.rows.n_cols


# ---------------------------------------------------------------- 1. measure


@device
def measure(here, first, last, loss):
    measure_chunks(here, False, first, last, loss)


@device
def measure_and_keep(here, first, last, loss):
    measure_chunks(here, True, first, last, loss)


@device
def measure_chunks(here, is_kept, first, last, loss):
    lanes = lanes_of(here.zero)
    if lanes == 1 and not counts(label_of(loss.labels, here.row, loss.rows), loss):
        return  # a row that is not used is not read
    for chunk in range(first, last):
        col, count = chunk_range(here, chunk)
        for lane in range(here.n_rows):  # before exponentials take the place of the logits
            label = label_of(loss.labels, here.row + lane, loss.rows)
            if col <= label and label < col + count:
                x = load(here.first.pointer, index_in(here.first, lane, label), loss.scale)
                store(here.states, (chunk * FIELDS + LOGIT) * lanes + lane, x)
        largest = saved(here.states, chunk, MAX, here.zero)
        if loss.share != number(loss.scale, 0.0):
            measure_smoothing(here, chunk, largest, col, count, loss)
        sums = sum_of_exponentials(here, is_kept, largest, largest, col, count, loss.scale, None, False)
        save_state(here.states, chunk, sums)


@device
def measure_smoothing(here, chunk, largest, first, count, loss):
    total, low, _, _ = sum_chunk(weighted_distance, here, (loss, largest), first, count)
    save(here.states, chunk, DISTANCE, total)
    save(here.states, chunk, DISTANCE_LOW, low)
    weights = add(here.zero, number(loss.scale, count))
    if loss.weight != 0:
        weights, _, _, _ = sum_chunk(only_weight, here, (loss,), first, count)
    save(here.states, chunk, WEIGHT, weights)


@device
def weighted_distance(col, left, ties, here, arguments):
    """eps/V w_c (max - x_c). The factor is inside: the sum of the bare differences of large logits would overflow."""
    loss, largest = arguments
    x = load_cols(here.first, col, left, add(here.zeros, largest))
    return mul(distance(x, largest, loss.share), weights_at(col, left, here, loss)), ties, None


@device
def only_weight(col, left, ties, here, arguments):
    return weights_at(col, left, here, arguments[0]), ties, None


@device
def weights_at(col, left, here, loss):
    """The class weights that belong to the vector at `col`."""
    one = number(loss.scale, 1.0)
    if loss.weight == 0:
        return add(here.zeros, one)
    if is_across(here.zeros):
        return add(here.zeros, number_at(loss.weight, col, one))
    return load_cols(Line(pointer_to(loss.weight, one), 1, 0), col, left, here.zeros)


# ---------------------------------------------------------------- 2. fold


@device
def fold(here, loss):
    one = number(loss.scale, 1.0)
    lanes = lanes_of(here.zero)
    n_chunks = count_of_chunks(here.n_cols)
    of_row = n_chunks * FIELDS
    for lane in range(here.n_rows):
        label = label_of(loss.labels, here.row + lane, loss.rows)
        logit, weight = number(loss.scale, 0.0), one
        if counts(label, loss):
            logit = load(here.states, (label // CHUNK_COLS * FIELDS + LOGIT) * lanes + lane, one)
            weight = number_at(loss.weight, label, one)
        store(here.states, (of_row + LABEL_LOGIT) * lanes + lane, logit)
        store(here.states, (of_row + LABEL_WEIGHT) * lanes + lane, weight)
    state, row = fold_state(here.states, n_chunks, here.zero, loss.scale, None)
    largest = state[0]
    log, log_low = log_sum(state)
    nll = negative(log_probability(saved(here.states, n_chunks, LABEL_LOGIT, here.zero), largest, log, loss.scale))
    confident = mul(saved(here.states, n_chunks, LABEL_WEIGHT, here.zero), loss.confidence)
    confident = unless_empty(confident, largest, log_low, here.through)
    value = mul(confident, nll)
    total_weight = number_at(loss.weight_sum, 0, number(loss.scale, here.n_cols))
    if loss.share != number(loss.scale, 0.0):
        value = add(value, fold_smoothing(here, n_chunks, largest, add(log, log_low), total_weight, loss))
    save(here.states, n_chunks, ROW_LOSS, unless_empty(value, largest, log_low, here.through))
    upstream = div(loss.grad_scale, number_at(loss.normaliser, 0, one))
    on_label = mul(confident, upstream)
    store_losses(here, (of_row + ROW_LOSS) * lanes, loss)
    on_weight = unless_empty(mul(upstream, loss.share), largest, log_low, here.through)
    inverse = unless_empty(row_inverse(largest, row.sum, row.low), largest, log_low, here.through)
    return Gradient(
        row.shift, row.exponent, mul(inverse, fma(total_weight, on_weight, on_label)), on_label, on_weight
    )  # fmt: skip


@device
def fold_smoothing(here, n_chunks, largest, log, total_weight, loss):
    """eps/V (W log s + D), with D brought from the maxima of the chunks to that of the row."""
    d, d_low = here.zero, here.zero
    for chunk in range(n_chunks):
        own = saved(here.states, chunk, MAX, here.zero)
        part = saved(here.states, chunk, DISTANCE, here.zero)
        d, d_low = add_pair(d, d_low, part, saved(here.states, chunk, DISTANCE_LOW, here.zero))
        rise = mul(saved(here.states, chunk, WEIGHT, here.zero), rise_to(own, largest, loss.share))
        d, d_low = add_pair(d, d_low, rise, here.zero)
    return add(mul(log, mul(loss.share, total_weight)), add(d, d_low))


@device
def store_losses(here, index, loss):
    for lane in range(here.n_rows):
        label = label_of(loss.labels, here.row + lane, loss.rows)
        value = load(here.states, index + lane, loss.scale)
        if not counts(label, loss):
            value = unused(label, loss)
        store(element(loss.losses, here.row + lane, loss.rows), 0, value)


@device
def unused(label, loss):
    """The loss and the gradient of a row that does not count."""
    return number(loss.scale, 0.0) if label == loss.ignore_index else number(loss.scale, math.nan)


# ---------------------------------------------------------------- 3. write


@device
def write_nothing(here, first, last, summary, loss):
    pass


@device
def write(here, first, last, gradient, loss):
    lanes = lanes_of(here.zero)
    for chunk in range(first, last):
        col, count = chunk_range(here, chunk)
        ratio = chunk_ratio(here.states, chunk, gradient.shift, gradient.exponent, here.zero, loss.scale, None)
        factor = mul(ratio, gradient.on_probs)
        save(here.states, chunk, ON_PROBS, factor)
        save(here.states, chunk, ON_LABEL, gradient.on_label)
        for lane in range(here.n_rows):  # before the gradient takes the place of the exponentials
            label = label_of(loss.labels, here.row + lane, loss.rows)
            if col <= label and label < col + count:
                e = load(here.home.pointer, index_in(here.home, lane, label), loss.scale)
                store(here.states, (chunk * FIELDS + LABEL_EXP) * lanes + lane, e)
        if lanes > 1 or counts(label_of(loss.labels, here.row, loss.rows), loss):
            write_chunk(gradient_of, (factor, gradient.on_weight, loss), here, col, count)
        for lane in range(here.n_rows):
            label = label_of(loss.labels, here.row + lane, loss.rows)
            if not counts(label, loss):
                for k in range(col, col + count):
                    store(here.target.pointer, index_in(here.target, lane, k), unused(label, loss))
            elif col <= label and label < col + count:
                e = load(here.states, (chunk * FIELDS + LABEL_EXP) * lanes + lane, loss.scale)
                value = mul(e, load(here.states, (chunk * FIELDS + ON_PROBS) * lanes + lane, loss.scale))
                weight = number_at(loss.weight, label, loss.scale)
                value = sub(value, mul(gradient.on_weight, weight))
                value = sub(value, load(here.states, (chunk * FIELDS + ON_LABEL) * lanes + lane, loss.scale))
                value = pulled_back_one(value, label, lane, here)
                store(here.target.pointer, index_in(here.target, lane, label), value)


@device
def gradient_of(col, left, here, arguments):
    """exp(x_c) on_probs - on_weight w_c; on_label is taken from the label's column afterwards."""
    factor, on_weight, loss = arguments
    value = mul(load_cols(here.home, col, left, here.zeros), factor)
    if loss.share != number(loss.scale, 0.0):
        value = sub(value, mul(weights_at(col, left, here, loss), on_weight))
    return pulled_back_cols(value, col, left, here)


# ---------------------------------------------------------------- around the rows


@kernel
def normalise_rows(rows, labels, weight, normaliser, ignore_index, zero):
    total_weight, low = zero, zero
    for row in range(rows.n_rows):
        label = label_of(labels, row, rows)
        if label != ignore_index and label >= 0 and label < rows.n_cols:
            total_weight, low = add_pair(total_weight, low, number_at(weight, label, number(zero, 1.0)), zero)
    store(pointer_to(normaliser, zero), 0, add(total_weight, low))


@kernel
def total_rows(n, values, normaliser, result, values_tag, result_tag, zero):
    total_value, low = zero, zero
    for k in range(n):
        total_value, low = add_pair(total_value, low, load(pointer_to(values, values_tag), k, zero), zero)
    divisor = number_at(normaliser, 0, number(zero, 1.0))
    mean = div(add(total_value, low), divisor)
    if divisor == zero:  # nothing counts: NaN, as 0 / 0 is, even where smoothing has left something to divide
        mean = number(zero, math.nan)
    store(pointer_to(result, result_tag), 0, mean)


@kernel
def find_bad_label_rows(rows, labels, bad_row, bad_label, ignore_index):
    first, found = NO_BAD_LABEL, NO_BAD_LABEL
    for row in range(rows.n_rows):
        label = label_of(labels, row, rows)
        if label != ignore_index and (label < 0 or label >= rows.n_cols):
            first, found = row, label
            break
    pointer_to(bad_row, rows.n_rows)[0] = first
    pointer_to(bad_label, rows.n_rows)[0] = found
