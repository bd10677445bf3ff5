"""Cross-entropy over rows of logits and its fused gradient, on the CPU.

For one row x with label t, class weights w (1 where none are given), W = sum_c w_c, label smoothing eps over V classes:

    nll       = log s + (max - x_t)                         = -log_softmax(x)_t, from the row state
    loss      = (1 - eps) w_t nll + eps/V (W log s + D)     D = sum_c w_c (max - x_c)
    dlogits_c = u ((1 - eps) w_t (p_c - [c = t]) + eps/V (p_c W - w_c))

(torch's LossNLL.cpp has eps/V sum_c w_c (lse - x_c), which is the same: no term is negative, so nothing cancels here.)
D is summed beside the state in the same pass: where a chunk raises the maximum, what came before moves with it.

u is grad_scale, divided for "mean" by the
normaliser: the sum of w_t over the rows that count.

A row whose label is ignore_index is not read: loss 0, gradient 0. A label out of range: loss and gradient NaN.
"""

import math

from gpusoftmax.kernels.cpu.cache import device, kernel
from gpusoftmax.kernels.cpu.parallel import for_rows
from gpusoftmax.kernels.cpu.rows import (
    CHUNK_COLS,
    buffer_pointer,
    chunk_state,
    logits_again,
    new_buffer,
    padded,
    read_logits,
    row_of,
    row_offset,
    sum_chunk,
    write_chunk,
)
from gpusoftmax.kernels.cpu.transform import transform
from gpusoftmax.kernels.cpu.vector import (
    add,
    add_pair,
    div,
    exp_gap,
    fma,
    inverse_sum,
    lanes_of,
    load,
    load_label,
    load_one,
    log_sum,
    merge,
    mul,
    negative_log_probability,
    number,
    pointer_to,
    reference,
    splat,
    store,
    store_one,
    sub,
)
from gpusoftmax.kernels.operands import NO_BAD_LABEL, STORAGE, Labels, Numbers, Operand, Place, Rows, scale_of


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
    for_rows(
        cross_entropy_rows,
        rows,
        logits,
        labels,
        losses,
        dlogits,
        weight,
        weight_sum,
        normaliser,
        ignore_index,
        number_of(1.0 - label_smoothing),
        number_of(label_smoothing / rows.n_cols),
        number_of(grad_scale),
        *scale_of(2.0, 1.0, weight.dtype),
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


@device
def label_of(labels, row, rows):
    return load_label(labels.pointer, row_offset(labels, row, rows), labels.code)


@device
def number_at(numbers, index, default):
    """numbers[index], or the default where the caller gave no numbers."""
    return default if numbers == 0 else load_one(pointer_to(numbers, default), index, default)


@device
def smoothing_chunk(buffer, other, weight, row_max, first, count, factor):
    """(sum, low) of factor w_c (row_max - x_c) over a chunk, then the same of w_c. `other` is overwritten.

    The factor, eps/V times the scale, is inside: the sum of the bare differences of large logits would overflow.
    """
    zero, one = number(factor, 0.0), number(factor, 1.0)
    for k in range(0, padded(count, factor), lanes_of(factor)):
        store(other, k, mul(sub(splat(reference(row_max)), load(buffer, k, factor)), splat(factor)))
    if weight != 0:
        for k in range(count):
            store_one(other, k, mul(number_at(weight, first + k, one), load_one(other, k, factor)))
    for k in range(count, padded(count, factor)):
        store_one(other, k, zero)
    distances = sum_chunk(other, padded(count, factor), factor)
    if weight == 0:
        return distances, (number(factor, float(count)), zero)
    for k in range(count):
        store_one(other, k, number_at(weight, first + k, one))
    return distances, sum_chunk(other, padded(count, factor), factor)


@kernel
def cross_entropy_rows(
    first_row,
    last_row,
    rows,
    logits,
    labels,
    losses,
    dlogits,
    weight,
    weight_sum,
    normaliser,
    ignore_index,
    confidence,
    share,
    grad_scale,
    scale,
    scale_low,
):
    n_cols = rows.n_cols
    params = (scale, scale_low)
    zero = number(scale, 0.0)
    one = number(scale, 1.0)
    array = new_buffer(scale)
    other_array = new_buffer(scale)
    buffer = buffer_pointer(array, scale)
    other = buffer_pointer(other_array, scale)
    with_gradient = dlogits.address != 0
    upstream = div(grad_scale, number_at(normaliser, 0, one))
    total_weight = number_at(weight_sum, 0, number(scale, float(n_cols)))
    for row in range(first_row, last_row):
        source = row_of(logits, row, rows)
        target = row_of(dlogits, row, rows)
        loss_at = row_of(losses, row, rows).pointer
        label = label_of(labels, row, rows)
        if label == ignore_index or label < 0 or label >= n_cols:
            fill = zero if label == ignore_index else number(scale, math.nan)
            store_one(loss_at, 0, fill)
            if with_gradient:
                for col in range(n_cols):
                    store_one(target.pointer, col * target.stride, fill)
            continue
        x_label = transform(load_one(source.pointer, label * source.stride, scale), label, row, params)
        w_label = number_at(weight, label, one)
        # 1. the state of the row and, for smoothing, d = eps/V D
        state = (number(scale, -math.inf), zero, zero, zero)
        d, d_low = zero, zero
        seen, seen_low = zero, zero  # the weights of the chunks so far
        for first in range(0, n_cols, CHUNK_COLS):
            count = min(CHUNK_COLS, n_cols - first)
            read_logits(buffer, source, first, count, row, params)
            before = state[0]
            state = merge(state, chunk_state(buffer, padded(count, scale), scale, scale_low), scale, scale_low)
            if share != zero:
                factor = mul(share, scale)
                # Nothing has moved if no logit came before; if -inf alone did, D is infinite already.
                rise = sub(state[0], before) if before > number(scale, -math.inf) else zero
                d, d_low = add_pair(d, d_low, mul(mul(add(seen, seen_low), factor), rise), zero)
                distances, weights = smoothing_chunk(buffer, other, weight, state[0], first, count, factor)
                d, d_low = add_pair(d, d_low, distances[0], distances[1])
                seen, seen_low = add_pair(seen, seen_low, weights[0], weights[1])
        log, log_low = log_sum(state)
        nll = negative_log_probability(x_label, state[0], log, log_low, scale, scale_low)
        confident = mul(confidence, w_label)
        loss = mul(confident, nll)
        if share != zero:
            loss = add(loss, add(mul(mul(share, total_weight), add(log, log_low)), add(d, d_low)))
        store_one(loss_at, 0, loss)
        # 2. the gradient
        if with_gradient:
            on_label = mul(upstream, confident)
            per_weight = mul(upstream, share)
            on_probs = splat(mul(inverse_sum(state), fma(per_weight, total_weight, on_label)))
            for first in range(0, n_cols, CHUNK_COLS):
                count = min(CHUNK_COLS, n_cols - first)
                logits_again(buffer, source, first, count, n_cols, row, params)
                for k in range(0, padded(count, scale), lanes_of(scale)):
                    e = exp_gap(load(buffer, k, scale), splat(state[0]), splat(scale), splat(scale_low))
                    store(buffer, k, mul(e, on_probs))
                if share != zero:
                    for k in range(count):
                        w = number_at(weight, first + k, one)
                        store_one(buffer, k, sub(load_one(buffer, k, scale), mul(per_weight, w)))
                if first <= label and label < first + count:
                    store_one(buffer, label - first, sub(load_one(buffer, label - first, scale), on_label))
                write_chunk(target, first, buffer, count, scale)
    array[0] = 0.0  # the buffers must outlive the last access through their addresses
    other_array[0] = 0.0


@kernel
def normalise_rows(rows, labels, weight, normaliser, ignore_index, zero):
    total_weight, low = zero, zero
    for row in range(rows.n_rows):
        label = label_of(labels, row, rows)
        if label != ignore_index and label >= 0 and label < rows.n_cols:
            total_weight, low = add_pair(total_weight, low, number_at(weight, label, number(zero, 1.0)), zero)
    store_one(pointer_to(normaliser, zero), 0, add(total_weight, low))


@kernel
def total_rows(n, values, normaliser, result, values_tag, result_tag, zero):
    total_value, low = zero, zero
    for k in range(n):
        total_value, low = add_pair(total_value, low, load_one(pointer_to(values, values_tag), k, zero), zero)
    divisor = number_at(normaliser, 0, number(zero, 1.0))
    mean = div(add(total_value, low), divisor)
    if divisor == zero:  # nothing counts: NaN, as 0 / 0 is, even where smoothing has left something to divide
        mean = number(zero, math.nan)
    store_one(pointer_to(result, result_tag), 0, mean)


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
