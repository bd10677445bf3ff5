"""The expected column under the softmax of a row, and its backward, on the GPU.

kernels/cuda/device/soft_argmax.py holds the kernels.
"""

from gpusoftmax.kernels.cuda.launch import launch_rows
from gpusoftmax.kernels.operands import Operand, Place, Rows, compute_dtype, scale_of


def soft_argmax(rows: Rows, logits: Operand, expected: Operand, temperature: float, place: Place) -> None:
    scale = scale_of(2.0, temperature, compute_dtype(logits.dtype, expected.dtype))
    launch_rows("soft_argmax.soft_argmax_rows", place, rows, logits, expected, *scale, passes=1)


def soft_argmax_backward(
    rows: Rows,
    logits: Operand,
    expected: Operand,
    dexpected: Operand,
    dlogits: Operand,
    temperature: float,
    place: Place,
) -> None:
    scale = scale_of(2.0, temperature, compute_dtype(logits.dtype, expected.dtype, dlogits.dtype))
    launch_rows("soft_argmax.soft_argmax_backward_rows", place, rows, logits, expected, dexpected, dlogits, *scale)
