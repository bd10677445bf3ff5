"""Copies rows between layouts and formats on the GPU. kernels/cuda/device/copy.py holds the kernel."""

from gpusoftmax.kernels.cuda.launch import launch_rows
from gpusoftmax.kernels.operands import STORAGE, Operand, Place, Rows, compute_dtype


def copy(rows: Rows, source: Operand, target: Operand, place: Place) -> None:
    like = STORAGE[compute_dtype(source.dtype, target.dtype)](0)
    launch_rows("copy.copy_rows", place, rows, source, target, like)
