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
from gpusoftmax.kernels.cuda.device.rows import load_chunk, row_of, store_chunk, thread_sum
from gpusoftmax.kernels.cuda.plan import COLS_PER_THREAD


def log_softmax_rows(rows, logits, log_probs, scale, scale_low):
    n_cols = rows.n_cols
    params = (scale, scale_low)
    scratch = block_numbers(scale)
    held = thread_numbers(scale)
    width = vector_width(logits.pointer)
    for row in range(cuda.blockIdx.x, rows.n_rows, cuda.gridDim.x):
        source = row_of(logits, row, rows, width)
        target = row_of(log_probs, row, rows, width)
        # 1. the online pass: running maximum and running sum over the chunks
        state = row_state(held, scratch, source, n_cols, width, row, params)
        log, log_low = log_sum(state)
        # 2. the normalise pass
        for first in range(0, n_cols, COLS_PER_THREAD * cuda.blockDim.x):
            logits_again(held, source, first, n_cols, width, row, params)
            for k in range(COLS_PER_THREAD):
                held[k] = -negative_log_probability(held[k], state[0], log, log_low, scale, scale_low)
            store_chunk(target, held, first, n_cols, width)


def log_softmax_backward_rows(rows, log_probs, dlog_probs, dlogits, scale):
    n_cols = rows.n_cols
    zero = number(scale, 0.0)
    scratch = block_numbers(zero)
    log_p = thread_numbers(zero)
    dlog_p = thread_numbers(zero)
    width = vector_width(log_probs.pointer)
    for row in range(cuda.blockIdx.x, rows.n_rows, cuda.gridDim.x):
        log_p_row = row_of(log_probs, row, rows, width)
        dlog_p_row = row_of(dlog_probs, row, rows, width)
        target = row_of(dlogits, row, rows, width)
        # 1. total = sum_k dlog_probs_k
        total, total_low = zero, zero
        for first in range(0, n_cols, COLS_PER_THREAD * cuda.blockDim.x):
            load_chunk(dlog_p, dlog_p_row, first, n_cols, width, zero)
            total, total_low = add_pair(total, total_low, block_sum(thread_sum(dlog_p, zero), scratch, zero), zero)
        minus_total = -add(total, total_low)
        # 2. dlogits = (dlog_probs - exp(log_probs) total) / T
        for first in range(0, n_cols, COLS_PER_THREAD * cuda.blockDim.x):
            load_chunk(log_p, log_p_row, first, n_cols, width, zero)
            load_chunk(dlog_p, dlog_p_row, first, n_cols, width, zero)
            for k in range(COLS_PER_THREAD):
                log_p[k] = mul(fma(exp(log_p[k], zero), minus_total, dlog_p[k]), scale)
            store_chunk(target, log_p, first, n_cols, width)
