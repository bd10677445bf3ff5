"""One block per row: softmax and its backward. The mathematics stands in kernels/cpu/softmax.py."""

from gpusoftmax.kernels.cuda.device._cuda import cuda
from gpusoftmax.kernels.cuda.device.arithmetic import add, add_pair, exp_gap, inverse_sum, mul, number, sub
from gpusoftmax.kernels.cuda.device.memory import block_numbers, thread_numbers, vector_width
from gpusoftmax.kernels.cuda.device.reduce import block_sum
from gpusoftmax.kernels.cuda.device.row_state import logits_again, row_state
from gpusoftmax.kernels.cuda.device.rows import load_chunk, row_of, store_chunk, thread_sum
from gpusoftmax.kernels.cuda.plan import COLS_PER_THREAD


def softmax_rows(rows, logits, probs, scale, scale_low):
    n_cols = rows.n_cols
    params = (scale, scale_low)
    scratch = block_numbers(scale)
    held = thread_numbers(scale)
    width = vector_width(logits.pointer)
    for row in range(cuda.blockIdx.x, rows.n_rows, cuda.gridDim.x):
        source = row_of(logits, row, rows, width)
        target = row_of(probs, row, rows, width)
        # 1. the online pass: running maximum and running sum over the chunks
        state = row_state(held, scratch, source, n_cols, width, row, params)
        factor = inverse_sum(state)
        # 2. the normalise pass
        for first in range(0, n_cols, COLS_PER_THREAD * cuda.blockDim.x):
            logits_again(held, source, first, n_cols, width, row, params)
            for k in range(COLS_PER_THREAD):
                held[k] = mul(exp_gap(held[k], state[0], scale, scale_low), factor)
            store_chunk(target, held, first, n_cols, width)


def softmax_backward_rows(rows, probs, dprobs, dlogits, scale):
    n_cols = rows.n_cols
    zero = number(scale, 0.0)
    scratch = block_numbers(zero)
    p = thread_numbers(zero)
    dp = thread_numbers(zero)
    width = vector_width(probs.pointer)
    for row in range(cuda.blockIdx.x, rows.n_rows, cuda.gridDim.x):
        p_row = row_of(probs, row, rows, width)
        dp_row = row_of(dprobs, row, rows, width)
        target = row_of(dlogits, row, rows, width)
        # 1. dot = sum_k probs_k dprobs_k
        dot, dot_low = zero, zero
        for first in range(0, n_cols, COLS_PER_THREAD * cuda.blockDim.x):
            load_chunk(p, p_row, first, n_cols, width, zero)
            load_chunk(dp, dp_row, first, n_cols, width, zero)
            for k in range(COLS_PER_THREAD):
                p[k] = mul(p[k], dp[k])
            dot, dot_low = add_pair(dot, dot_low, block_sum(thread_sum(p, zero), scratch, zero), zero)
        shift = add(dot, dot_low)
        # 2. dlogits = probs (dprobs - dot) / T
        for first in range(0, n_cols, COLS_PER_THREAD * cuda.blockDim.x):
            load_chunk(p, p_row, first, n_cols, width, zero)
            load_chunk(dp, dp_row, first, n_cols, width, zero)
            for k in range(COLS_PER_THREAD):
                p[k] = mul(mul(p[k], sub(dp[k], shift)), scale)
            store_chunk(target, p, first, n_cols, width)
