"""One block per row: a copy between layouts and formats."""

from gpusoftmax.kernels.cuda.device._cuda import cuda
from gpusoftmax.kernels.cuda.device.arithmetic import number
from gpusoftmax.kernels.cuda.device.memory import thread_numbers, vector_width
from gpusoftmax.kernels.cuda.device.rows import load_chunk, row_of, store_chunk
from gpusoftmax.kernels.cuda.plan import COLS_PER_THREAD


def copy_rows(rows, source, target, like):
    held = thread_numbers(like)
    width = vector_width(source.pointer)
    for row in range(cuda.blockIdx.x, rows.n_rows, cuda.gridDim.x):
        read_from = row_of(source, row, rows, width)
        write_to = row_of(target, row, rows, width)
        for first in range(0, rows.n_cols, COLS_PER_THREAD * cuda.blockDim.x):
            load_chunk(held, read_from, first, rows.n_cols, width, number(like, 0.0))
            store_chunk(write_to, held, first, rows.n_cols, width)
