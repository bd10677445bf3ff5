"""One block per row: softmax and its backward. The mathematics stands in kernels/cpu/softmax.py."""

from gpusoftmax.kernels.cuda.device._cuda import cuda
from gpusoftmax.kernels.cuda.device.arithmetic import add, add_pair, exp_gap, inverse_sum, mul, number, sub
from gpusoftmax.kernels.cuda.device.memory import block_numbers, thread_numbers, vector_width
from gpusoftmax.kernels.cuda.device.reduce import block_sum
from gpusoftmax.kernels.cuda.device.row_state import logits_again, row_state
from gpusoftmax.kernels.cuda.device.rows import can_vectorise, load_chunk, row_pointer, store_chunk, thread_sum
from gpusoftmax.kernels.cuda.plan import COLS_PER_THREAD


def softmax_rows(
    n_rows,
    n_inner,
    n_cols,
    logits,
    logits_outer,
    logits_inner,
    logits_col,
    probs,
    probs_outer,
    probs_inner,
    probs_col,
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
        factor = inverse_sum(state)
        # 2. the normalise pass
        target = row_pointer(probs, row, n_inner, probs_outer, probs_inner)
        target_vectorised = can_vectorise(target, probs_col, width)
        for first in range(0, n_cols, COLS_PER_THREAD * cuda.blockDim.x):
            logits_again(held, source, logits_col, source_vectorised, first, n_cols, width, row, params)
            for k in range(COLS_PER_THREAD):
                held[k] = mul(exp_gap(held[k], state[0], scale, scale_low), factor)
            store_chunk(target, probs_col, target_vectorised, held, first, n_cols, width)


def softmax_backward_rows(
    n_rows,
    n_inner,
    n_cols,
    probs,
    probs_outer,
    probs_inner,
    probs_col,
    dprobs,
    dprobs_outer,
    dprobs_inner,
    dprobs_col,
    dlogits,
    dlogits_outer,
    dlogits_inner,
    dlogits_col,
    inverse_temperature,
):
    zero = number(inverse_temperature, 0.0)
    scratch = block_numbers(zero)
    p = thread_numbers(zero)
    dp = thread_numbers(zero)
    width = vector_width(probs)
    chunk_cols = COLS_PER_THREAD * cuda.blockDim.x
    for row in range(cuda.blockIdx.x, n_rows, cuda.gridDim.x):
        p_row = row_pointer(probs, row, n_inner, probs_outer, probs_inner)
        dp_row = row_pointer(dprobs, row, n_inner, dprobs_outer, dprobs_inner)
        target = row_pointer(dlogits, row, n_inner, dlogits_outer, dlogits_inner)
        p_vectorised = can_vectorise(p_row, probs_col, width)
        dp_vectorised = can_vectorise(dp_row, dprobs_col, width)
        target_vectorised = can_vectorise(target, dlogits_col, width)
        # 1. dot = sum_k probs_k dprobs_k
        dot, dot_low = zero, zero
        for first in range(0, n_cols, chunk_cols):
            load_chunk(p, p_row, probs_col, p_vectorised, first, n_cols, width, zero)
            load_chunk(dp, dp_row, dprobs_col, dp_vectorised, first, n_cols, width, zero)
            for k in range(COLS_PER_THREAD):
                p[k] = mul(p[k], dp[k])
            dot, dot_low = add_pair(dot, dot_low, block_sum(thread_sum(p, zero), scratch, zero), zero)
        shift = add(dot, dot_low)
        # 2. dlogits = probs (dprobs - dot) / T
        for first in range(0, n_cols, chunk_cols):
            load_chunk(p, p_row, probs_col, p_vectorised, first, n_cols, width, zero)
            load_chunk(dp, dp_row, dprobs_col, dp_vectorised, first, n_cols, width, zero)
            for k in range(COLS_PER_THREAD):
                p[k] = mul(mul(p[k], sub(dp[k], shift)), inverse_temperature)
            store_chunk(target, dlogits_col, target_vectorised, p, first, n_cols, width)
