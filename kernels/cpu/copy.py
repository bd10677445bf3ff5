"""Copies rows between layouts and formats on the CPU: what the other kernels need where no stride walks a row."""

from gpusoftmax.kernels.cpu.cache import kernel
from gpusoftmax.kernels.cpu.parallel import for_rows
from gpusoftmax.kernels.cpu.rows import CHUNK_COLS, buffer_pointer, new_buffer, read_chunk, row_of, write_chunk
from gpusoftmax.kernels.cpu.vector import number
from gpusoftmax.kernels.operands import STORAGE, Operand, Place, Rows, compute_dtype


def copy(rows: Rows, source: Operand, target: Operand, place: Place) -> None:
    """target = source, rounded to the target's format."""
    for_rows(copy_rows, rows, source, target, STORAGE[compute_dtype(source.dtype, target.dtype)](0))


@kernel
def copy_rows(first_row, last_row, rows, source, target, like):
    array = new_buffer(like)
    buffer = buffer_pointer(array, like)
    for row in range(first_row, last_row):
        for first in range(0, rows.n_cols, CHUNK_COLS):
            count = min(CHUNK_COLS, rows.n_cols - first)
            read_chunk(buffer, row_of(source, row, rows), first, count, number(like, 0.0))
            write_chunk(row_of(target, row, rows), first, buffer, count, like)
    array[0] = 0.0  # the buffer must outlive the last access through its address
