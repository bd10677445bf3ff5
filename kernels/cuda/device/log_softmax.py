"""One block per row: log-softmax and its backward. The mathematics stands in kernels/cpu/log_softmax.py."""

from gpusoftmax.kernels.cuda.device._cuda import cuda
from gpusoftmax.kernels.cuda.device.arithmetic import (
    add,
    add_pair,
    exp,
    fma,
    log_sum,
    mul,
    negative_log_probability,
    number,
)
from gpusoftmax.kernels.cuda.device.memory import block_numbers, thread_numbers, vector_width
from gpusoftmax.kernels.cuda.device.reduce import block_sum
from gpusoftmax.kernels.cuda.device.row_state import logits_again, row_state
from gpusoftmax.kernels.cuda.device.rows import can_vectorise, load_chunk, row_pointer, store_chunk, thread_sum
from gpusoftmax.kernels.cuda.plan import COLS_PER_THREAD


def log_softmax_rows(
    n_rows,
    n_inner,
    n_cols,
    logits,
    logits_outer,
    logits_inner,
    logits_col,
    log_probs,
    log_probs_outer,
    log_probs_inner,
    log_probs_col,
    scale,
    scale_low,
):
    params = (scale, scale_low)
    scratch = block_numbers(scale)
    held = thread_numbers(scale)
    width = vector_width(logits)
    for row in range(cuda.blockIdx.x, n_rows, cuda.gridDim.x):
        # 1. the online pass: running maximum and running sum over the chunks
        source = row_pointer(logits, row, n_inner, logits_outer, logits_inner)
        source_vectorised = can_vectorise(source, logits_col, width)
        state = row_state(held, scratch, source, logits_col, source_vectorised, n_cols, width, row, params)
        log, log_low = log_sum(state)
        # 2. the normalise pass
        target = row_pointer(log_probs, row, n_inner, log_probs_outer, log_probs_inner)
        target_vectorised = can_vectorise(target, log_probs_col, width)
        for first in range(0, n_cols, COLS_PER_THREAD * cuda.blockDim.x):
            logits_again(held, source, logits_col, source_vectorised, first, n_cols, width, row, params)
            for k in range(COLS_PER_THREAD):
                held[k] = -negative_log_probability(held[k], state[0], log, log_low, scale, scale_low)
            store_chunk(target, log_probs_col, target_vectorised, held, first, n_cols, width)


def log_softmax_backward_rows(
    n_rows,
    n_inner,
    n_cols,
    log_probs,
    log_probs_outer,
    log_probs_inner,
    log_probs_col,
    dlog_probs,
    dlog_probs_outer,
    dlog_probs_inner,
    dlog_probs_col,
    dlogits,
    dlogits_outer,
    dlogits_inner,
    dlogits_col,
    inverse_temperature,
):
    zero = number(inverse_temperature, 0.0)
    scratch = block_numbers(zero)
    log_p = thread_numbers(zero)
    dlog_p = thread_numbers(zero)
    width = vector_width(log_probs)
    chunk_cols = COLS_PER_THREAD * cuda.blockDim.x
    for row in range(cuda.blockIdx.x, n_rows, cuda.gridDim.x):
        log_p_row = row_pointer(log_probs, row, n_inner, log_probs_outer, log_probs_inner)
        dlog_p_row = row_pointer(dlog_probs, row, n_inner, dlog_probs_outer, dlog_probs_inner)
        target = row_pointer(dlogits, row, n_inner, dlogits_outer, dlogits_inner)
        log_p_vectorised = can_vectorise(log_p_row, log_probs_col, width)
        dlog_p_vectorised = can_vectorise(dlog_p_row, dlog_probs_col, width)
        target_vectorised = can_vectorise(target, dlogits_col, width)
        # 1. total = sum_k dlog_probs_k
        total, total_low = zero, zero
        for first in range(0, n_cols, chunk_cols):
            load_chunk(dlog_p, dlog_p_row, dlog_probs_col, dlog_p_vectorised, first, n_cols, width, zero)
            total, total_low = add_pair(total, total_low, block_sum(thread_sum(dlog_p, zero), scratch, zero), zero)
        minus_total = -add(total, total_low)
        # 2. dlogits = (dlog_probs - exp(log_probs) total) / T
        for first in range(0, n_cols, chunk_cols):
            load_chunk(log_p, log_p_row, log_probs_col, log_p_vectorised, first, n_cols, width, zero)
            load_chunk(dlog_p, dlog_p_row, dlog_probs_col, dlog_p_vectorised, first, n_cols, width, zero)
            for k in range(COLS_PER_THREAD):
                log_p[k] = mul(fma(exp(log_p[k], zero), minus_total, dlog_p[k]), inverse_temperature)
            store_chunk(target, dlogits_col, target_vectorised, log_p, first, n_cols, width)
