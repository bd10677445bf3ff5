"""One block per row: cross-entropy and its fused gradient. The mathematics stands in kernels/cpu/cross_entropy.py.

The small kernels around it, normalise_rows, total_rows and find_bad_label_rows, run as one block: their sums have a
fixed order.
"""

import math

from gpusoftmax.kernels.cuda.device._cuda import cuda, device
from gpusoftmax.kernels.cuda.device.arithmetic import (
    add,
    add_pair,
    div,
    exp_gap,
    fma,
    inverse_sum,
    log_sum,
    merge,
    mul,
    negative_log_probability,
    number,
    reference,
    sub,
)
from gpusoftmax.kernels.cuda.device.memory import (
    block_numbers,
    is_null,
    load,
    load_label,
    store,
    thread_numbers,
    vector_width,
)
from gpusoftmax.kernels.cuda.device.reduce import block_sum, block_sum_pair, first_of_block
from gpusoftmax.kernels.cuda.device.row_state import chunk_state, load_logits, logits_again
from gpusoftmax.kernels.cuda.device.rows import column, row_of, row_offset, store_chunk, thread_sum
from gpusoftmax.kernels.cuda.device.transform import transform
from gpusoftmax.kernels.cuda.plan import COLS_PER_THREAD
from gpusoftmax.kernels.operands import NO_BAD_LABEL


@device
def label_of(labels, row, rows):
    return load_label(labels.pointer, row_offset(labels, row, rows), labels.code)


@device
def number_at(numbers, index, default):
    """numbers[index], or the default where the caller gave no numbers."""
    return default if is_null(numbers) else load(numbers, index, default)


@device
def smoothing_chunk(held, values, scratch, weight, row_max, first, n_cols, width, factor):
    """The sum of factor w_c (row_max - x_c) over a chunk, and that of w_c. `values` is overwritten.

    The factor, eps/V times the scale, is inside: the sum of the bare differences of large logits would overflow.
    """
    zero, one = number(factor, 0.0), number(factor, 1.0)
    for slice in range(COLS_PER_THREAD // width):
        for i in range(width):
            col = column(first, slice, width) + i
            k = slice * width + i
            values[k] = zero
            if col < n_cols:
                values[k] = mul(number_at(weight, col, one), mul(sub(reference(row_max), held[k]), factor))
    distances = block_sum(thread_sum(values, zero), scratch, zero)
    for slice in range(COLS_PER_THREAD // width):
        for i in range(width):
            col = column(first, slice, width) + i
            values[slice * width + i] = number_at(weight, col, one) if col < n_cols else zero
    return distances, block_sum(thread_sum(values, zero), scratch, zero)


@device
def fill_row(row, n_cols, value):
    for col in range(cuda.threadIdx.x, n_cols, cuda.blockDim.x):
        store(row.pointer, col * row.stride, value)


def cross_entropy_rows(
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
    scratch = block_numbers(scale)
    held = thread_numbers(scale)
    values = thread_numbers(scale)
    width = vector_width(logits.pointer)
    chunk_cols = COLS_PER_THREAD * cuda.blockDim.x
    with_gradient = not is_null(dlogits.pointer)
    upstream = div(grad_scale, number_at(normaliser, 0, one))
    total_weight = number_at(weight_sum, 0, number(scale, n_cols))
    for row in range(cuda.blockIdx.x, rows.n_rows, cuda.gridDim.x):
        source = row_of(logits, row, rows, width)
        target = row_of(dlogits, row, rows, width)
        loss_at = row_of(losses, row, rows, width).pointer
        label = label_of(labels, row, rows)
        if label == ignore_index or label < 0 or label >= n_cols:  # the same for the whole block
            fill = zero if label == ignore_index else number(scale, math.nan)
            if cuda.threadIdx.x == 0:
                store(loss_at, 0, fill)
            if with_gradient:
                fill_row(target, n_cols, fill)
            continue
        x_label = transform(load(source.pointer, label * source.stride, scale), label, row, params)
        w_label = number_at(weight, label, one)
        # 1. the state of the row and, for smoothing, d = eps/V sum_c w_c (max - x_c)
        state = (number(scale, -math.inf), zero, zero, zero)
        d, d_low = zero, zero
        seen, seen_low = zero, zero  # the weights of the chunks so far
        for first in range(0, n_cols, chunk_cols):
            load_logits(held, source, first, n_cols, width, row, params)
            before = state[0]
            state = merge(state, chunk_state(held, scratch, params), scale, scale_low)
            if share != zero:
                factor = mul(share, scale)
                # Nothing has moved if no logit came before; if -inf alone did, the sum is infinite already.
                rise = sub(state[0], before) if before > number(scale, -math.inf) else zero
                d, d_low = add_pair(d, d_low, mul(mul(add(seen, seen_low), factor), rise), zero)
                distances, weights = smoothing_chunk(
                    held, values, scratch, weight, state[0], first, n_cols, width, factor
                )
                d, d_low = add_pair(d, d_low, distances, zero)
                seen, seen_low = add_pair(seen, seen_low, weights, zero)
        log, log_low = log_sum(state)
        nll = negative_log_probability(x_label, state[0], log, log_low, scale, scale_low)
        confident = mul(confidence, w_label)
        loss = mul(confident, nll)
        if share != zero:
            loss = add(loss, add(mul(mul(share, total_weight), add(log, log_low)), add(d, d_low)))
        if cuda.threadIdx.x == 0:
            store(loss_at, 0, loss)
        # 2. the gradient
        if with_gradient:
            on_label = mul(upstream, confident)
            per_weight = mul(upstream, share)
            on_probs = mul(inverse_sum(state), fma(per_weight, total_weight, on_label))
            for first in range(0, n_cols, chunk_cols):
                logits_again(held, source, first, n_cols, width, row, params)
                for slice in range(COLS_PER_THREAD // width):
                    for i in range(width):
                        col = column(first, slice, width) + i
                        k = slice * width + i
                        gradient = mul(exp_gap(held[k], state[0], scale, scale_low), on_probs)
                        if share != zero and col < n_cols:
                            gradient = sub(gradient, mul(per_weight, number_at(weight, col, one)))
                        if col == label:
                            gradient = sub(gradient, on_label)
                        held[k] = gradient
                store_chunk(target, held, first, n_cols, width)


def normalise_rows(rows, labels, weight, normaliser, ignore_index, zero):
    scratch = block_numbers(zero)
    total, low = zero, zero
    for row in range(cuda.threadIdx.x, rows.n_rows, cuda.blockDim.x):
        label = label_of(labels, row, rows)
        if label != ignore_index and label >= 0 and label < rows.n_cols:
            total, low = add_pair(total, low, number_at(weight, label, number(zero, 1.0)), zero)
    total = block_sum_pair(total, low, scratch, zero)
    if cuda.threadIdx.x == 0:
        store(normaliser, 0, total)


def total_rows(n, values, normaliser, result, zero):
    scratch = block_numbers(zero)
    total, low = zero, zero
    for k in range(cuda.threadIdx.x, n, cuda.blockDim.x):
        total, low = add_pair(total, low, load(values, k, zero), zero)
    total = block_sum_pair(total, low, scratch, zero)
    if cuda.threadIdx.x == 0:
        divisor = number_at(normaliser, 0, number(zero, 1.0))
        mean = div(total, divisor)
        if divisor == zero:  # nothing counts: NaN, as 0 / 0 is, even where smoothing has left something to divide
            mean = number(zero, math.nan)
        store(result, 0, mean)


def find_bad_label_rows(rows, labels, bad_row, bad_label, ignore_index):
    scratch = block_numbers(ignore_index)
    first = NO_BAD_LABEL
    for row in range(cuda.threadIdx.x, rows.n_rows, cuda.blockDim.x):
        label = label_of(labels, row, rows)
        if label != ignore_index and (label < 0 or label >= rows.n_cols):
            first = min(first, row)
    first = first_of_block(first, scratch)
    if cuda.threadIdx.x == 0:
        bad_row[0] = first
        bad_label[0] = NO_BAD_LABEL if first == NO_BAD_LABEL else label_of(labels, first, rows)
