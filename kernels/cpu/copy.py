"""Copies rows between layouts and formats on the CPU: what the other kernels need where no stride walks a row."""

from gpusoftmax.kernels.cpu.cache import kernel
from gpusoftmax.kernels.cpu.parallel import for_rows
from gpusoftmax.kernels.cpu.rows import CHUNK_COLS, buffer_pointer, new_buffer, read_chunk, row_offset, write_chunk
from gpusoftmax.kernels.cpu.vector import number, pointer_to
from gpusoftmax.kernels.operands import STORAGE, Operand, Place, Rows, compute_dtype


def copy(rows: Rows, source: Operand, target: Operand, place: Place) -> None:
    """target = source, rounded to the target's format."""
    for_rows(
        copy_rows,
        rows.n_rows,
        rows.n_cols,
        rows.n_inner,
        rows.n_cols,
        *source.words,
        STORAGE[source.dtype](0),
        *target.words,
        STORAGE[target.dtype](0),
        STORAGE[compute_dtype(source.dtype, target.dtype)](0),
    )


@kernel
def copy_rows(
    first_row,
    last_row,
    n_inner,
    n_cols,
    source_address,
    source_outer,
    source_inner,
    source_col,
    source_tag,
    target_address,
    target_outer,
    target_inner,
    target_col,
    target_tag,
    like,
):
    source = pointer_to(source_address, source_tag)
    target = pointer_to(target_address, target_tag)
    array = new_buffer(like)
    buffer = buffer_pointer(array, like)
    for row in range(first_row, last_row):
        read_from = row_offset(row, n_inner, source_outer, source_inner)
        write_to = row_offset(row, n_inner, target_outer, target_inner)
        for first in range(0, n_cols, CHUNK_COLS):
            count = min(CHUNK_COLS, n_cols - first)
            read_chunk(buffer, source, read_from + first * source_col, source_col, count, number(like, 0.0))
            write_chunk(target, write_to + first * target_col, target_col, buffer, count, like)
    array[0] = 0.0  # the buffer must outlive the last access through its address
