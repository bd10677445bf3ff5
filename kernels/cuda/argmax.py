"""The first of the largest logits of a row, on the GPU. kernels/cuda/device/argmax.py holds the kernel."""

from gpusoftmax.kernels.cuda.launch import launch_rows
from gpusoftmax.kernels.operands import STORAGE, Labels, Operand, Place, Rows, compute_dtype


def argmax(rows: Rows, logits: Operand, indices: Labels, place: Place) -> None:
    like = STORAGE[compute_dtype(logits.dtype)](0)
    launch_rows("argmax.argmax_rows", place, rows, logits, indices, like, passes=1)
