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
    row_of,
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
    splat,
    store,
    sub,
)
from gpusoftmax.kernels.operands import Operand, Place, Rows, compute_dtype, scale_of


def softmax(rows: Rows, logits: Operand, probs: Operand, temperature: float, place: Place) -> None:
    scale = scale_of(2.0, temperature, compute_dtype(logits.dtype, probs.dtype))
    for_rows(softmax_rows, rows, logits, probs, *scale)


def softmax_backward(
    rows: Rows, probs: Operand, dprobs: Operand, dlogits: Operand, temperature: float, place: Place
) -> None:
    scale, _ = scale_of(1.0, temperature, compute_dtype(probs.dtype, dprobs.dtype, dlogits.dtype))
    for_rows(softmax_backward_rows, rows, probs, dprobs, dlogits, scale)


@kernel
def softmax_rows(first_row, last_row, rows, logits, probs, scale, scale_low):
    n_cols = rows.n_cols
    params = (scale, scale_low)
    array = new_buffer(scale)
    buffer = buffer_pointer(array, scale)
    for row in range(first_row, last_row):
        source = row_of(logits, row, rows)
        target = row_of(probs, row, rows)
        state = row_state(buffer, source, n_cols, row, params)
        row_max = splat(state[0])
        factor = splat(inverse_sum(state))
        for first in range(0, n_cols, CHUNK_COLS):
            count = min(CHUNK_COLS, n_cols - first)
            logits_again(buffer, source, first, count, n_cols, row, params)
            for k in range(0, padded(count, scale), lanes_of(scale)):
                e = exp_gap(load(buffer, k, scale), row_max, splat(scale), splat(scale_low))
                store(buffer, k, mul(e, factor))
            write_chunk(target, first, buffer, count, scale)
    array[0] = 0.0  # the buffer must outlive the last access through its address


@kernel
def softmax_backward_rows(first_row, last_row, rows, probs, dprobs, dlogits, scale):
    n_cols = rows.n_cols
    zero = number(scale, 0.0)
    lanes = lanes_of(zero)
    p_array = new_buffer(zero)
    dp_array = new_buffer(zero)
    p = buffer_pointer(p_array, zero)
    dp = buffer_pointer(dp_array, zero)
    for row in range(first_row, last_row):
        p_row = row_of(probs, row, rows)
        dp_row = row_of(dprobs, row, rows)
        target = row_of(dlogits, row, rows)
        # 1. dot = sum_k probs_k dprobs_k
        dot, dot_low = zero, zero
        for first in range(0, n_cols, CHUNK_COLS):
            count = min(CHUNK_COLS, n_cols - first)
            read_chunk(p, p_row, first, count, zero)
            read_chunk(dp, dp_row, first, count, zero)
            for k in range(0, padded(count, zero), lanes):
                store(p, k, mul(load(p, k, zero), load(dp, k, zero)))
            part, part_low = sum_chunk(p, padded(count, zero), zero)
            dot, dot_low = add_pair(dot, dot_low, part, part_low)
        shift = splat(add(dot, dot_low))
        # 2. dlogits = probs (dprobs - dot) / T
        for first in range(0, n_cols, CHUNK_COLS):
            count = min(CHUNK_COLS, n_cols - first)
            read_chunk(p, p_row, first, count, zero)
            read_chunk(dp, dp_row, first, count, zero)
            for k in range(0, padded(count, zero), lanes):
                centred = sub(load(dp, k, zero), shift)
                store(p, k, mul(mul(load(p, k, zero), centred), splat(scale)))
            write_chunk(target, first, p, count, zero)
    p_array[0] = 0.0  # the buffers must outlive the last access through their addresses
    dp_array[0] = 0.0
