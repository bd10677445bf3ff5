"""One block per row: cross-entropy and its fused gradient. The mathematics stands in kernels/cpu/cross_entropy.py.

The small kernels around it, normalise_rows and total_rows, run as one block: their sums have a fixed order.
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
from gpusoftmax.kernels.cuda.device.rows import can_vectorise, column, row_pointer, store_chunk, thread_sum
from gpusoftmax.kernels.cuda.device.transform import transform
from gpusoftmax.kernels.cuda.plan import COLS_PER_THREAD
from gpusoftmax.kernels.operands import NO_BAD_LABEL


@device
def label_index(row, n_inner, outer_stride, inner_stride):
    outer = row // n_inner
    return outer * outer_stride + (row - outer * n_inner) * inner_stride


@device
def weight_of(weight, label, one):
    """The class weight; 1 where the caller gave none. `label` is a class."""
    return one if is_null(weight) else load(weight, label, one)


@device
def smoothing_chunk(held, values, scratch, weight, x_label, first, n_cols, width, factor):
    """Sum of factor w_c (x_c - x_label) over a chunk. `values` is overwritten.

    The factor, eps/V times the scale, is inside: the sum of the bare differences of large logits would overflow.
    """
    zero = number(factor, 0.0)
    for slice in range(COLS_PER_THREAD // width):
        for i in range(width):
            col = column(first, slice, width) + i
            k = slice * width + i
            values[k] = zero
            if col < n_cols:
                difference = mul(sub(held[k], x_label), factor)
                values[k] = mul(weight_of(weight, col, number(zero, 1.0)), difference)
    return block_sum(thread_sum(values, zero), scratch, zero)


@device
def fill_row(pointer, stride, n_cols, value):
    for col in range(cuda.threadIdx.x, n_cols, cuda.blockDim.x):
        store(pointer, col * stride, value)


def cross_entropy_rows(
    n_rows,
    n_inner,
    n_cols,
    logits,
    logits_outer,
    logits_inner,
    logits_col,
    labels,
    labels_outer,
    labels_inner,
    labels_code,
    losses,
    losses_outer,
    losses_inner,
    dlogits,
    dlogits_outer,
    dlogits_inner,
    dlogits_col,
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
    scratch = block_numbers(scale)
    held = thread_numbers(scale)
    values = thread_numbers(scale)
    width = vector_width(logits)
    chunk_cols = COLS_PER_THREAD * cuda.blockDim.x
    upstream = grad_scale if is_null(normaliser) else div(grad_scale, load(normaliser, 0, scale))
    total_weight = number(scale, n_cols) if is_null(weight_sum) else load(weight_sum, 0, scale)
    for row in range(cuda.blockIdx.x, n_rows, cuda.gridDim.x):
        source = row_pointer(logits, row, n_inner, logits_outer, logits_inner)
        target = row_pointer(dlogits, row, n_inner, dlogits_outer, dlogits_inner)
        loss_at = row_pointer(losses, row, n_inner, losses_outer, losses_inner)
        label = load_label(labels, label_index(row, n_inner, labels_outer, labels_inner), labels_code)
        if label == ignore_index or label < 0 or label >= n_cols:
            fill = zero if label == ignore_index else number(scale, math.nan)
            if cuda.threadIdx.x == 0:
                store(loss_at, 0, fill)
            if not is_null(dlogits):
                fill_row(target, dlogits_col, n_cols, fill)
            continue
        vectorised = can_vectorise(source, logits_col, width)
        x_label = transform(load(source, label * logits_col, scale), label, row, params)
        w_label = weight_of(weight, label, one)
        # 1. the state of the row and, for smoothing, d = eps/V sum_c w_c (x_c - x_label)
        state = (number(scale, -math.inf), zero, zero, zero)
        d, d_low = zero, zero
        for first in range(0, n_cols, chunk_cols):
            load_logits(held, source, logits_col, vectorised, first, n_cols, width, row, params)
            state = merge(state, chunk_state(held, scratch, params), scale, scale_low)
            if share != zero:
                part = smoothing_chunk(held, values, scratch, weight, x_label, first, n_cols, width, mul(share, scale))
                d, d_low = add_pair(d, d_low, part, zero)
        log, log_low = log_sum(state)
        nll = negative_log_probability(x_label, state[0], log, log_low, scale, scale_low)
        confident = mul(confidence, w_label)
        loss = mul(confident, nll)
        if share != zero and nll != number(scale, math.inf):  # a masked label: inf already, and d would make it NaN
            loss = add(loss, sub(mul(mul(share, total_weight), nll), add(d, d_low)))
        if cuda.threadIdx.x == 0:
            store(loss_at, 0, loss)
        # 2. the gradient
        if not is_null(dlogits):
            target_vectorised = can_vectorise(target, dlogits_col, width)
            on_label = mul(upstream, confident)
            per_weight = mul(upstream, share)
            on_probs = mul(inverse_sum(state), fma(per_weight, total_weight, on_label))
            for first in range(0, n_cols, chunk_cols):
                logits_again(held, source, logits_col, vectorised, first, n_cols, width, row, params)
                for slice in range(COLS_PER_THREAD // width):
                    for i in range(width):
                        col = column(first, slice, width) + i
                        k = slice * width + i
                        gradient = mul(exp_gap(held[k], state[0], scale, scale_low), on_probs)
                        if share != zero and col < n_cols:
                            gradient = sub(gradient, mul(per_weight, weight_of(weight, col, one)))
                        if col == label:
                            gradient = sub(gradient, on_label)
                        held[k] = gradient
                store_chunk(target, dlogits_col, target_vectorised, held, first, n_cols, width)


def normalise_rows(
    n_rows,
    n_inner,
    n_cols,
    labels,
    labels_outer,
    labels_inner,
    labels_code,
    weight,
    normaliser,
    ignore_index,
    zero,
):
    scratch = block_numbers(zero)
    total, low = zero, zero
    for row in range(cuda.threadIdx.x, n_rows, cuda.blockDim.x):
        label = load_label(labels, label_index(row, n_inner, labels_outer, labels_inner), labels_code)
        if label != ignore_index and label >= 0 and label < n_cols:
            total, low = add_pair(total, low, weight_of(weight, label, number(zero, 1.0)), zero)
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
        store(result, 0, total if is_null(normaliser) else div(total, load(normaliser, 0, zero)))


def find_bad_label_rows(
    n_rows, n_inner, n_cols, labels, labels_outer, labels_inner, labels_code, bad_row, bad_label, ignore_index
):
    scratch = block_numbers(n_rows)
    first = NO_BAD_LABEL
    for row in range(cuda.threadIdx.x, n_rows, cuda.blockDim.x):
        label = load_label(labels, label_index(row, n_inner, labels_outer, labels_inner), labels_code)
        if label != ignore_index and (label < 0 or label >= n_cols):
            first = min(first, row)
    first = first_of_block(first, scratch)
    if cuda.threadIdx.x == 0:
        bad_row[0] = first
        bad_label[0] = NO_BAD_LABEL
        if first != NO_BAD_LABEL:
            bad_label[0] = load_label(labels, label_index(first, n_inner, labels_outer, labels_inner), labels_code)
