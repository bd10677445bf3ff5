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
    row_offset,
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
    pointer_to,
    splat,
    store,
)
from gpusoftmax.kernels.operands import STORAGE, Operand, Place, Rows, compute_dtype, split


def log_softmax(rows: Rows, logits: Operand, log_probs: Operand, temperature: float, place: Place) -> None:
    dtype = compute_dtype(logits.dtype, log_probs.dtype)
    for_rows(
        log_softmax_rows,
        rows.n_rows,
        rows.n_cols,
        rows.n_inner,
        rows.n_cols,
        *logits.words,
        STORAGE[logits.dtype](0),
        *log_probs.words,
        STORAGE[log_probs.dtype](0),
        *split(2.0 / temperature, dtype),
    )


def log_softmax_backward(
    rows: Rows, log_probs: Operand, dlog_probs: Operand, dlogits: Operand, temperature: float, place: Place
) -> None:
    dtype = compute_dtype(log_probs.dtype, dlog_probs.dtype, dlogits.dtype)
    for_rows(
        log_softmax_backward_rows,
        rows.n_rows,
        rows.n_cols,
        rows.n_inner,
        rows.n_cols,
        *log_probs.words,
        STORAGE[log_probs.dtype](0),
        *dlog_probs.words,
        STORAGE[dlog_probs.dtype](0),
        *dlogits.words,
        STORAGE[dlogits.dtype](0),
        split(1.0 / temperature, dtype)[0],
    )


@kernel
def log_softmax_rows(
    first_row,
    last_row,
    n_inner,
    n_cols,
    logits_address,
    logits_outer,
    logits_inner,
    logits_col,
    logits_tag,
    log_probs_address,
    log_probs_outer,
    log_probs_inner,
    log_probs_col,
    log_probs_tag,
    scale,
    scale_low,
):
    logits = pointer_to(logits_address, logits_tag)
    log_probs = pointer_to(log_probs_address, log_probs_tag)
    params = (scale, scale_low)
    array = new_buffer(scale)
    buffer = buffer_pointer(array, scale)
    for row in range(first_row, last_row):
        start = row_offset(row, n_inner, logits_outer, logits_inner)
        target = row_offset(row, n_inner, log_probs_outer, log_probs_inner)
        state = row_state(buffer, logits, start, logits_col, n_cols, row, params)
        log, log_low = log_sum(state)
        for col in range(0, n_cols, CHUNK_COLS):
            count = min(CHUNK_COLS, n_cols - col)
            logits_again(buffer, logits, start, logits_col, col, count, n_cols, row, params)
            for k in range(0, padded(count, scale), lanes_of(scale)):
                nll = negative_log_probability(
                    load(buffer, k, scale), splat(state[0]), splat(log), splat(log_low), splat(scale), splat(scale_low)
                )
                store(buffer, k, negative(nll))
            write_chunk(log_probs, target + col * log_probs_col, log_probs_col, buffer, count, scale)
    array[0] = 0.0  # the buffer must outlive the last access through its address


@kernel
def log_softmax_backward_rows(
    first_row,
    last_row,
    n_inner,
    n_cols,
    log_probs_address,
    log_probs_outer,
    log_probs_inner,
    log_probs_col,
    log_probs_tag,
    dlog_probs_address,
    dlog_probs_outer,
    dlog_probs_inner,
    dlog_probs_col,
    dlog_probs_tag,
    dlogits_address,
    dlogits_outer,
    dlogits_inner,
    dlogits_col,
    dlogits_tag,
    inverse_temperature,
):
    zero = number(inverse_temperature, 0.0)
    lanes = lanes_of(zero)
    log_probs = pointer_to(log_probs_address, log_probs_tag)
    dlog_probs = pointer_to(dlog_probs_address, dlog_probs_tag)
    dlogits = pointer_to(dlogits_address, dlogits_tag)
    log_p_array = new_buffer(zero)
    dlog_p_array = new_buffer(zero)
    log_p = buffer_pointer(log_p_array, zero)
    dlog_p = buffer_pointer(dlog_p_array, zero)
    for row in range(first_row, last_row):
        log_probs_start = row_offset(row, n_inner, log_probs_outer, log_probs_inner)
        dlog_probs_start = row_offset(row, n_inner, dlog_probs_outer, dlog_probs_inner)
        dlogits_start = row_offset(row, n_inner, dlogits_outer, dlogits_inner)
        total = (zero, zero)
        for col in range(0, n_cols, CHUNK_COLS):
            count = min(CHUNK_COLS, n_cols - col)
            read_chunk(dlog_p, dlog_probs, dlog_probs_start + col * dlog_probs_col, dlog_probs_col, count, zero)
            total = add_pair(total[0], total[1], *sum_chunk(dlog_p, padded(count, zero), zero))
        minus_total = splat(-add(total[0], total[1]))
        for col in range(0, n_cols, CHUNK_COLS):
            count = min(CHUNK_COLS, n_cols - col)
            read_chunk(log_p, log_probs, log_probs_start + col * log_probs_col, log_probs_col, count, zero)
            read_chunk(dlog_p, dlog_probs, dlog_probs_start + col * dlog_probs_col, dlog_probs_col, count, zero)
            for k in range(0, padded(count, zero), lanes):
                gradient = fma(exp(load(log_p, k, zero), splat(zero)), minus_total, load(dlog_p, k, zero))
                store(log_p, k, mul(gradient, splat(inverse_temperature)))
            write_chunk(dlogits, dlogits_start + col * dlogits_col, dlogits_col, log_p, count, zero)
    log_p_array[0] = 0.0  # the buffers must outlive the last access through their addresses
    dlog_p_array[0] = 0.0
