"""Softmax over rows of logits, and its backward, on the GPU. kernels/cuda/device/softmax.py holds the kernels."""

import numpy as np

from gpusoftmax.kernels.cuda.launch import launch_rows
from gpusoftmax.kernels.operands import Operand, Place, Rows, compute_dtype, scale_of


def softmax(rows: Rows, logits: Operand, probs: Operand, temperature: float, place: Place) -> None:
    scale = scale_of(2.0, temperature, compute_dtype(logits.dtype, probs.dtype))
    launch_rows("softmax.softmax_rows", place, rows, logits, probs, *scale)


def softmax_backward(
    rows: Rows, probs: Operand, dprobs: Operand, dlogits: Operand, temperature: float, place: Place
) -> None:
    scale, _ = scale_of(1.0, temperature, compute_dtype(probs.dtype, dprobs.dtype, dlogits.dtype))
    launch_rows("softmax.softmax_backward_rows", place, rows, probs, dprobs, dlogits, scale, reads=2)


def tempered_softmax_backward(
    rows: Rows, probs: Operand, dprobs: Operand, temperatures: Operand, dlogits: Operand, place: Place
) -> None:
    """softmax_backward with a temperature for each row, in the format of the arithmetic."""
    one = np.dtype(temperatures.dtype).type(1)
    arrays = probs, dprobs, temperatures, dlogits
    launch_rows("softmax.tempered_softmax_backward_rows", place, rows, *arrays, one, reads=2)
