"""One block per row: a copy between layouts and formats."""

from gpusoftmax.kernels.cuda.device._cuda import cuda
from gpusoftmax.kernels.cuda.device.arithmetic import number
from gpusoftmax.kernels.cuda.device.memory import thread_numbers, vector_width
from gpusoftmax.kernels.cuda.device.rows import can_vectorise, load_chunk, row_pointer, store_chunk
from gpusoftmax.kernels.cuda.plan import COLS_PER_THREAD


def copy_rows(
    n_rows,
    n_inner,
    n_cols,
    source,
    source_outer,
    source_inner,
    source_col,
    target,
    target_outer,
    target_inner,
    target_col,
    like,
):
    held = thread_numbers(like)
    width = vector_width(source)
    for row in range(cuda.blockIdx.x, n_rows, cuda.gridDim.x):
        read_from = row_pointer(source, row, n_inner, source_outer, source_inner)
        write_to = row_pointer(target, row, n_inner, target_outer, target_inner)
        read_vectorised = can_vectorise(read_from, source_col, width)
        write_vectorised = can_vectorise(write_to, target_col, width)
        for first in range(0, n_cols, COLS_PER_THREAD * cuda.blockDim.x):
            load_chunk(held, read_from, source_col, read_vectorised, first, n_cols, width, number(like, 0.0))
            store_chunk(write_to, target_col, write_vectorised, held, first, n_cols, width)
