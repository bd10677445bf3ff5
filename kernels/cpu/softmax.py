"""Softmax over rows of logits, and its backward, on the CPU.

    probs_c   = exp((x_c - max) / T) / s          s = sum_c exp((x_c - max) / T)
    dlogits_c = probs_c (dprobs_c - sum_k probs_k dprobs_k) / T

Two passes over a row: its state, chunk by chunk (kernels/cpu/rows.py), then the probabilities.
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
    exp_gap,
    inverse_sum,
    lanes_of,
    load,
    mul,
    number,
    pointer_to,
    splat,
    store,
    sub,
)
from gpusoftmax.kernels.operands import STORAGE, Operand, Place, Rows, compute_dtype, split


def softmax(rows: Rows, logits: Operand, probs: Operand, temperature: float, place: Place) -> None:
    dtype = compute_dtype(logits.dtype, probs.dtype)
    scale = split(2.0 / temperature, dtype)
    for_rows(
        softmax_rows,
        rows.n_rows,
        rows.n_cols,
        rows.n_inner,
        rows.n_cols,
        *logits.words,
        STORAGE[logits.dtype](0),
        *probs.words,
        STORAGE[probs.dtype](0),
        *scale,
    )


def softmax_backward(
    rows: Rows, probs: Operand, dprobs: Operand, dlogits: Operand, temperature: float, place: Place
) -> None:
    dtype = compute_dtype(probs.dtype, dprobs.dtype, dlogits.dtype)
    for_rows(
        softmax_backward_rows,
        rows.n_rows,
        rows.n_cols,
        rows.n_inner,
        rows.n_cols,
        *probs.words,
        STORAGE[probs.dtype](0),
        *dprobs.words,
        STORAGE[dprobs.dtype](0),
        *dlogits.words,
        STORAGE[dlogits.dtype](0),
        split(1.0 / temperature, dtype)[0],
    )


@kernel
def softmax_rows(
    first_row,
    last_row,
    n_inner,
    n_cols,
    logits_address,
    logits_outer,
    logits_inner,
    logits_col,
    logits_tag,
    probs_address,
    probs_outer,
    probs_inner,
    probs_col,
    probs_tag,
    scale,
    scale_low,
):
    logits = pointer_to(logits_address, logits_tag)
    probs = pointer_to(probs_address, probs_tag)
    params = (scale, scale_low)
    array = new_buffer(scale)
    buffer = buffer_pointer(array, scale)
    for row in range(first_row, last_row):
        start = row_offset(row, n_inner, logits_outer, logits_inner)
        target = row_offset(row, n_inner, probs_outer, probs_inner)
        state = row_state(buffer, logits, start, logits_col, n_cols, row, params)
        row_max = splat(state[0])
        factor = splat(inverse_sum(state))
        for col in range(0, n_cols, CHUNK_COLS):
            count = min(CHUNK_COLS, n_cols - col)
            logits_again(buffer, logits, start, logits_col, col, count, n_cols, row, params)
            for k in range(0, padded(count, scale), lanes_of(scale)):
                e = exp_gap(load(buffer, k, scale), row_max, splat(scale), splat(scale_low))
                store(buffer, k, mul(e, factor))
            write_chunk(probs, target + col * probs_col, probs_col, buffer, count, scale)
    array[0] = 0.0  # the buffer must outlive the last access through its address


@kernel
def softmax_backward_rows(
    first_row,
    last_row,
    n_inner,
    n_cols,
    probs_address,
    probs_outer,
    probs_inner,
    probs_col,
    probs_tag,
    dprobs_address,
    dprobs_outer,
    dprobs_inner,
    dprobs_col,
    dprobs_tag,
    dlogits_address,
    dlogits_outer,
    dlogits_inner,
    dlogits_col,
    dlogits_tag,
    inverse_temperature,
):
    zero = number(inverse_temperature, 0.0)
    lanes = lanes_of(zero)
    probs = pointer_to(probs_address, probs_tag)
    dprobs = pointer_to(dprobs_address, dprobs_tag)
    dlogits = pointer_to(dlogits_address, dlogits_tag)
    probs_array = new_buffer(zero)
    dprobs_array = new_buffer(zero)
    p = buffer_pointer(probs_array, zero)
    dp = buffer_pointer(dprobs_array, zero)
    for row in range(first_row, last_row):
        probs_start = row_offset(row, n_inner, probs_outer, probs_inner)
        dprobs_start = row_offset(row, n_inner, dprobs_outer, dprobs_inner)
        dlogits_start = row_offset(row, n_inner, dlogits_outer, dlogits_inner)
        dot = (zero, zero)
        for col in range(0, n_cols, CHUNK_COLS):
            count = min(CHUNK_COLS, n_cols - col)
            read_chunk(p, probs, probs_start + col * probs_col, probs_col, count, zero)
            read_chunk(dp, dprobs, dprobs_start + col * dprobs_col, dprobs_col, count, zero)
            for k in range(0, padded(count, zero), lanes):
                store(p, k, mul(load(p, k, zero), load(dp, k, zero)))
            dot = add_pair(dot[0], dot[1], *sum_chunk(p, padded(count, zero), zero))
        shift = splat(add(dot[0], dot[1]))
        for col in range(0, n_cols, CHUNK_COLS):
            count = min(CHUNK_COLS, n_cols - col)
            read_chunk(p, probs, probs_start + col * probs_col, probs_col, count, zero)
            read_chunk(dp, dprobs, dprobs_start + col * dprobs_col, dprobs_col, count, zero)
            for k in range(0, padded(count, zero), lanes):
                centred = sub(load(dp, k, zero), shift)
                store(p, k, mul(mul(load(p, k, zero), centred), splat(inverse_temperature)))
            write_chunk(dlogits, dlogits_start + col * dlogits_col, dlogits_col, p, count, zero)
    probs_array[0] = 0.0  # the buffers must outlive the last access through their addresses
    dprobs_array[0] = 0.0
