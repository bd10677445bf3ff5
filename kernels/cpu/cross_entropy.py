"""Cross-entropy over rows of logits and its fused gradient, on the CPU.

For one row x with label t, class weights w (1 where none are given), W = sum_c w_c, label smoothing eps over V classes:

    nll       = log s + (max - x_t)                         = -log_softmax(x)_t, from the row state
    loss      = (1 - eps) w_t nll + eps/V (W nll - d)       d = sum_c w_c (x_c - x_t)
    dlogits_c = u ((1 - eps) w_t (p_c - [c = t]) + eps/V (p_c W - w_c))

(torch's LossNLL.cpp defines the smoothed loss as eps/V sum_c w_c (lse - x_c), which is the same without d's benefit:
x_t is read first, so that a common offset of the logits cancels exactly.) u is grad_scale, divided for "mean" by the
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
    splat,
    store,
    store_one,
    sub,
)
from gpusoftmax.kernels.operands import NO_BAD_LABEL, STORAGE, Operand, Place, Rows, label_code, split


def cross_entropy(
    rows: Rows,
    logits: Operand,
    labels: Operand,
    losses: Operand,
    dlogits: Operand,
    *,
    weight: int,
    normaliser: int,
    weight_sum: int,
    ignore_index: int,
    label_smoothing: float,
    grad_scale: float,
    dtype: str,
    place: Place,
) -> None:
    """The loss of each row and, unless dlogits.pointer is 0, the gradient; dlogits may be the logits themselves.

    weight (n_cols,), normaliser (1,) and weight_sum (1,) are addresses of contiguous numbers of `dtype`, the
    computation format; 0 stands for ones, for 1 and for n_cols.
    """
    number_of = STORAGE[dtype]
    for_rows(
        cross_entropy_rows,
        rows.n_rows,
        rows.n_cols,
        rows.n_inner,
        rows.n_cols,
        *logits.words,
        STORAGE[logits.dtype](0),
        *labels.words[:3],
        label_code(labels.dtype),
        *losses.words[:3],
        STORAGE[losses.dtype](0),
        *dlogits.words,
        STORAGE[dlogits.dtype](0),
        weight,
        normaliser,
        weight_sum,
        ignore_index,
        number_of(1.0 - label_smoothing),
        number_of(label_smoothing / rows.n_cols),
        number_of(grad_scale),
        *split(2.0, dtype),
    )


def normalise(
    rows: Rows, labels: Operand, *, weight: int, normaliser: int, ignore_index: int, dtype: str, place: Place
) -> None:
    """normaliser[0] = the sum of weight[label] over the rows that count; their number if weight is 0."""
    normalise_rows(
        rows.n_rows,
        rows.n_inner,
        rows.n_cols,
        *labels.words[:3],
        label_code(labels.dtype),
        weight,
        normaliser,
        ignore_index,
        STORAGE[dtype](0),
    )


def total(
    n: int, values: int, result: Operand, *, values_dtype: str, normaliser: int, dtype: str, place: Place
) -> None:
    """result = sum(values) / normaliser[0], in the order of the values; normaliser 0 stands for 1."""
    total_rows(
        n, values, STORAGE[values_dtype](0), normaliser, result.pointer, STORAGE[result.dtype](0), STORAGE[dtype](0)
    )


def find_bad_label(
    rows: Rows, labels: Operand, *, bad_row: int, bad_label: int, ignore_index: int, place: Place
) -> None:
    """bad_row[0], bad_label[0] (int64) = the first row whose label is neither a class nor ignore_index, and its label.

    NO_BAD_LABEL for both if there is none.
    """
    size = (rows.n_rows, rows.n_inner, rows.n_cols)
    code = label_code(labels.dtype)
    find_bad_label_rows(*size, *labels.words[:3], code, bad_row, bad_label, ignore_index)


@device
def smoothing_chunk(buffer, other, weight, x_label, first, count, factor):
    """Sum of factor w_c (x_c - x_label) over a chunk as (sum, low). `other` is overwritten.

    The factor, eps/V times the scale, is inside: the sum of the bare differences of large logits would overflow.
    """
    zero = number(factor, 0.0)
    lanes = lanes_of(factor)
    for k in range(0, padded(count, factor), lanes):
        store(other, k, mul(sub(load(buffer, k, factor), splat(x_label)), splat(factor)))
    if weight != 0:
        for k in range(count):
            w = load_one(pointer_to(weight, factor), first + k, factor)
            store_one(other, k, mul(w, load_one(other, k, factor)))
    for k in range(count, padded(count, factor)):
        store_one(other, k, zero)
    return sum_chunk(other, padded(count, factor), factor)


@kernel
def cross_entropy_rows(
    first_row,
    last_row,
    n_inner,
    n_cols,
    logits_address,
    logits_outer,
    logits_inner,
    logits_col,
    logits_tag,
    labels,
    labels_outer,
    labels_inner,
    labels_code,
    losses_address,
    losses_outer,
    losses_inner,
    losses_tag,
    dlogits_address,
    dlogits_outer,
    dlogits_inner,
    dlogits_col,
    dlogits_tag,
    weight,
    normaliser,
    weight_sum,
    ignore_index,
    confidence,
    share,
    grad_scale,
    scale,
    scale_low,
):
    params = (scale, scale_low)
    zero = number(scale, 0.0)
    one = number(scale, 1.0)
    lanes = lanes_of(scale)
    logits = pointer_to(logits_address, logits_tag)
    losses = pointer_to(losses_address, losses_tag)
    dlogits = pointer_to(dlogits_address, dlogits_tag)
    array = new_buffer(scale)
    buffer = buffer_pointer(array, scale)
    other_array = new_buffer(scale)
    other = buffer_pointer(other_array, scale)
    upstream = grad_scale
    if normaliser != 0:
        upstream = div(grad_scale, load_one(pointer_to(normaliser, scale), 0, scale))
    total_weight = number(scale, float(n_cols))
    if weight_sum != 0:
        total_weight = load_one(pointer_to(weight_sum, scale), 0, scale)
    for row in range(first_row, last_row):
        start = row_offset(row, n_inner, logits_outer, logits_inner)
        target = row_offset(row, n_inner, dlogits_outer, dlogits_inner)
        loss_at = row_offset(row, n_inner, losses_outer, losses_inner)
        label = load_label(labels, row_offset(row, n_inner, labels_outer, labels_inner), labels_code)
        if label == ignore_index or label < 0 or label >= n_cols:
            fill = zero if label == ignore_index else number(scale, math.nan)
            store_one(losses, loss_at, fill)
            if dlogits_address != 0:
                for col in range(n_cols):
                    store_one(dlogits, target + col * dlogits_col, fill)
            continue
        x_label = transform(load_one(logits, start + label * logits_col, scale), label, row, params)
        w_label = one
        if weight != 0:
            w_label = load_one(pointer_to(weight, scale), label, scale)
        # 1. the state of the row and, for smoothing, d = eps/V sum_c w_c (x_c - x_label)
        state = (number(scale, -math.inf), zero, zero, zero)
        d, d_low = zero, zero
        for first in range(0, n_cols, CHUNK_COLS):
            count = min(CHUNK_COLS, n_cols - first)
            read_logits(buffer, logits, start, logits_col, first, count, row, params)
            state = merge(state, chunk_state(buffer, padded(count, scale), scale, scale_low), scale, scale_low)
            if share != zero:
                part, part_low = smoothing_chunk(buffer, other, weight, x_label, first, count, mul(share, scale))
                d, d_low = add_pair(d, d_low, part, part_low)
        log, log_low = log_sum(state)
        nll = negative_log_probability(x_label, state[0], log, log_low, scale, scale_low)
        confident = mul(confidence, w_label)
        loss = mul(confident, nll)
        if share != zero and nll != number(scale, math.inf):  # a masked label: inf already, and d would make it NaN
            loss = add(loss, sub(mul(mul(share, total_weight), nll), add(d, d_low)))
        store_one(losses, loss_at, loss)
        # 2. the gradient
        if dlogits_address != 0:
            on_label = mul(upstream, confident)
            per_weight = mul(upstream, share)
            on_probs = splat(mul(inverse_sum(state), fma(per_weight, total_weight, on_label)))
            for first in range(0, n_cols, CHUNK_COLS):
                count = min(CHUNK_COLS, n_cols - first)
                logits_again(buffer, logits, start, logits_col, first, count, n_cols, row, params)
                for k in range(0, padded(count, scale), lanes):
                    e = exp_gap(load(buffer, k, scale), splat(state[0]), splat(scale), splat(scale_low))
                    store(buffer, k, mul(e, on_probs))
                if share != zero:
                    for k in range(count):
                        w = one
                        if weight != 0:
                            w = load_one(pointer_to(weight, scale), first + k, scale)
                        store_one(buffer, k, sub(load_one(buffer, k, scale), mul(per_weight, w)))
                if first <= label and label < first + count:
                    store_one(buffer, label - first, sub(load_one(buffer, label - first, scale), on_label))
                write_chunk(dlogits, target + first * dlogits_col, dlogits_col, buffer, count, scale)
    array[0] = 0.0  # the buffers must outlive the last access through their addresses
    other_array[0] = 0.0


@kernel
def normalise_rows(
    n_rows, n_inner, n_cols, labels, labels_outer, labels_inner, labels_code, weight, normaliser, ignore_index, zero
):
    count = 0
    sum_, low = zero, zero
    for row in range(n_rows):
        label = load_label(labels, row_offset(row, n_inner, labels_outer, labels_inner), labels_code)
        if label != ignore_index and label >= 0 and label < n_cols:
            count += 1
            if weight != 0:
                sum_, low = add_pair(sum_, low, load_one(pointer_to(weight, zero), label, zero), zero)
    result = add(sum_, low)
    if weight == 0:
        result = number(zero, float(count))
    store_one(pointer_to(normaliser, zero), 0, result)


@kernel
def total_rows(n, values_address, values_tag, normaliser, result_address, result_tag, zero):
    values = pointer_to(values_address, values_tag)
    sum_, low = zero, zero
    for k in range(n):
        sum_, low = add_pair(sum_, low, load_one(values, k, zero), zero)
    result = add(sum_, low)
    if normaliser != 0:
        result = div(result, load_one(pointer_to(normaliser, zero), 0, zero))
    store_one(pointer_to(result_address, result_tag), 0, result)


@kernel
def find_bad_label_rows(
    n_rows, n_inner, n_cols, labels, labels_outer, labels_inner, labels_code, bad_row, bad_label, ignore_index
):
    first, found = NO_BAD_LABEL, NO_BAD_LABEL
    for row in range(n_rows):
        label = load_label(labels, row_offset(row, n_inner, labels_outer, labels_inner), labels_code)
        if label != ignore_index and (label < 0 or label >= n_cols):
            first, found = row, label
            break
    pointer_to(bad_row, n_rows)[0] = first
    pointer_to(bad_label, n_rows)[0] = found
