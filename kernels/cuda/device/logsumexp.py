"""One block per row: log-sum-exp. The mathematics stands in kernels/cpu/logsumexp.py."""

from gpusoftmax.kernels.cuda.device._cuda import cuda
from gpusoftmax.kernels.cuda.device.arithmetic import logsumexp
from gpusoftmax.kernels.cuda.device.memory import block_numbers, store, thread_numbers, vector_width
from gpusoftmax.kernels.cuda.device.row_state import row_state
from gpusoftmax.kernels.cuda.device.rows import row_of


def logsumexp_rows(rows, logits, lse, scale, scale_low):
    scratch = block_numbers(scale)
    held = thread_numbers(scale)
    width = vector_width(logits.pointer)
    for row in range(cuda.blockIdx.x, rows.n_rows, cuda.gridDim.x):
        source = row_of(logits, row, rows, width)
        state = row_state(held, scratch, source, rows.n_cols, width, row, (scale, scale_low))
        if cuda.threadIdx.x == 0:
            store(row_of(lse, row, rows, width).pointer, 0, logsumexp(state, scale, scale_low))
