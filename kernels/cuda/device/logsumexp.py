"""One block per row: log-sum-exp. The mathematics stands in kernels/cpu/logsumexp.py."""

from gpusoftmax.kernels.cuda.device._cuda import cuda
from gpusoftmax.kernels.cuda.device.arithmetic import logsumexp
from gpusoftmax.kernels.cuda.device.memory import block_numbers, store, thread_numbers, vector_width
from gpusoftmax.kernels.cuda.device.row_state import row_state
from gpusoftmax.kernels.cuda.device.rows import can_vectorise, row_pointer


def logsumexp_rows(
    n_rows,
    n_inner,
    n_cols,
    logits,
    logits_outer,
    logits_inner,
    logits_col,
    lse,
    lse_outer,
    lse_inner,
    lse_col,
    scale,
    scale_low,
):
    params = (scale, scale_low)
    scratch = block_numbers(scale)
    held = thread_numbers(scale)
    width = vector_width(logits)
    for row in range(cuda.blockIdx.x, n_rows, cuda.gridDim.x):
        source = row_pointer(logits, row, n_inner, logits_outer, logits_inner)
        vectorised = can_vectorise(source, logits_col, width)
        state = row_state(held, scratch, source, logits_col, vectorised, n_cols, width, row, params)
        if cuda.threadIdx.x == 0:
            store(row_pointer(lse, row, n_inner, lse_outer, lse_inner), 0, logsumexp(state, scale, scale_low))
