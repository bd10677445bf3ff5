"""Log-softmax over rows of logits, and its backward, on the CPU.

    log_probs_c = -(log s + (max - x_c) / T)                 log s = log1p((ties - 1) + tail)
    dlogits_c   = (dlog_probs_c - exp(log_probs_c) sum_k dlog_probs_k) / T

The bracket is a sum of two terms that are not negative: nothing cancels. The loss is computed by the same formula from
the same row state, so log_probs[target] is -loss bit for bit.
"""

from gpusoftmax.kernels.cpu.cache import kernel
from gpusoftmax.kernels.cpu.parallel import for_rows
from gpusoftmax.kernels.cpu.rows import (
    CHUNK_COLS,
    buffer_pointer,
    logits_again,
    new_buffer,
    padded,
    read_chunk,
    row_of,
    row_state,
    sum_chunk,
    write_chunk,
)
from gpusoftmax.kernels.cpu.vector import (
    add,
    add_pair,
    exp,
    fma,
    lanes_of,
    load,
    log_sum,
    mul,
    negative,
    negative_log_probability,
    number,
    splat,
    store,
)
from gpusoftmax.kernels.operands import Operand, Place, Rows, compute_dtype, scale_of


def log_softmax(rows: Rows, logits: Operand, log_probs: Operand, temperature: float, place: Place) -> None:
    scale = scale_of(2.0, temperature, compute_dtype(logits.dtype, log_probs.dtype))
    for_rows(log_softmax_rows, rows, logits, log_probs, *scale)


def log_softmax_backward(
    rows: Rows, log_probs: Operand, dlog_probs: Operand, dlogits: Operand, temperature: float, place: Place
) -> None:
    scale, _ = scale_of(1.0, temperature, compute_dtype(log_probs.dtype, dlog_probs.dtype, dlogits.dtype))
    for_rows(log_softmax_backward_rows, rows, log_probs, dlog_probs, dlogits, scale)


@kernel
def log_softmax_rows(first_row, last_row, rows, logits, log_probs, scale, scale_low):
    n_cols = rows.n_cols
    params = (scale, scale_low)
    array = new_buffer(scale)
    buffer = buffer_pointer(array, scale)
    for row in range(first_row, last_row):
        source = row_of(logits, row, rows)
        target = row_of(log_probs, row, rows)
        state = row_state(buffer, source, n_cols, row, params)
        log, log_low = log_sum(state)
        for first in range(0, n_cols, CHUNK_COLS):
            count = min(CHUNK_COLS, n_cols - first)
            logits_again(buffer, source, first, count, n_cols, row, params)
            for k in range(0, padded(count, scale), lanes_of(scale)):
                nll = negative_log_probability(
                    load(buffer, k, scale), splat(state[0]), splat(log), splat(log_low), splat(scale), splat(scale_low)
                )
                store(buffer, k, negative(nll))
            write_chunk(target, first, buffer, count, scale)
    array[0] = 0.0  # the buffer must outlive the last access through its address


@kernel
def log_softmax_backward_rows(first_row, last_row, rows, log_probs, dlog_probs, dlogits, scale):
    n_cols = rows.n_cols
    zero = number(scale, 0.0)
    log_p_array = new_buffer(zero)
    dlog_p_array = new_buffer(zero)
    log_p = buffer_pointer(log_p_array, zero)
    dlog_p = buffer_pointer(dlog_p_array, zero)
    for row in range(first_row, last_row):
        log_p_row = row_of(log_probs, row, rows)
        dlog_p_row = row_of(dlog_probs, row, rows)
        target = row_of(dlogits, row, rows)
        # 1. total = sum_k dlog_probs_k
        total, total_low = zero, zero
        for first in range(0, n_cols, CHUNK_COLS):
            count = min(CHUNK_COLS, n_cols - first)
            read_chunk(dlog_p, dlog_p_row, first, count, zero)
            part, part_low = sum_chunk(dlog_p, padded(count, zero), zero)
            total, total_low = add_pair(total, total_low, part, part_low)
        minus_total = splat(-add(total, total_low))
        # 2. dlogits = (dlog_probs - exp(log_probs) total) / T
        for first in range(0, n_cols, CHUNK_COLS):
            count = min(CHUNK_COLS, n_cols - first)
            read_chunk(log_p, log_p_row, first, count, zero)
            read_chunk(dlog_p, dlog_p_row, first, count, zero)
            for k in range(0, padded(count, zero), lanes_of(zero)):
                gradient = fma(exp(load(log_p, k, zero), splat(zero)), minus_total, load(dlog_p, k, zero))
                store(log_p, k, mul(gradient, splat(scale)))
            write_chunk(target, first, log_p, count, zero)
    log_p_array[0] = 0.0  # the buffers must outlive the last access through their addresses
    dlog_p_array[0] = 0.0
