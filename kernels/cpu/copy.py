"""Copies rows between layouts and formats on the CPU: what the other kernels need where no stride walks a row."""

from gpusoftmax.kernels.cpu.cache import device, kernel
from gpusoftmax.kernels.cpu.call import arguments
from gpusoftmax.kernels.cpu.chunks import write_chunk
from gpusoftmax.kernels.cpu.memory import (
    load_cols,
)
from gpusoftmax.kernels.cpu.rows import chunk_range, nothing_first
from gpusoftmax.kernels.cpu.run import run
from gpusoftmax.kernels.cpu.walk import walk
from gpusoftmax.kernels.operands import STORAGE, Operand, Place, Rows, compute_dtype


def copy(rows: Rows, source: Operand, target: Operand, place: Place) -> None:
    """target = source, rounded to the target's format."""
    run(copy_rows, rows, source, None, target, STORAGE[compute_dtype(source.dtype, target.dtype)](0))


@kernel
def copy_rows(call):
    way, job, rows, source, same, target, like = arguments(call)
    walk(way, job, rows, source, same, target, nothing_first, nothing_first, nothing_to_fold, write, (), like)


@device
def nothing_to_fold(here, numbers):
    return 0


@device
def write(here, first, last, summary, numbers):
    for chunk in range(first, last):
        col, count = chunk_range(here, chunk)
        write_chunk(unchanged, (), here, col, count)


@device
def unchanged(col, left, here, arguments):
    return load_cols(here.first, col, left, here.zeros)
