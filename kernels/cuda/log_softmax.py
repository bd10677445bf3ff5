"""Log-softmax over rows and its backward, on the GPU. kernels/cuda/device/log_softmax.py holds the kernels."""

import numpy as np

from gpusoftmax.kernels.cuda.launch import launch_rows
from gpusoftmax.kernels.operands import Operand, Place, Rows, compute_dtype, scale_of


def log_softmax(rows: Rows, logits: Operand, log_probs: Operand, temperature: float, place: Place) -> None:
    scale = scale_of(2.0, temperature, compute_dtype(logits.dtype, log_probs.dtype))
    launch_rows("log_softmax.log_softmax_rows", place, rows, logits, log_probs, *scale)


def log_softmax_backward(
    rows: Rows, log_probs: Operand, dlog_probs: Operand, dlogits: Operand, temperature: float, place: Place
) -> None:
    scale, _ = scale_of(1.0, temperature, compute_dtype(log_probs.dtype, dlog_probs.dtype, dlogits.dtype))
    launch_rows("log_softmax.log_softmax_backward_rows", place, rows, log_probs, dlog_probs, dlogits, scale, reads=2)


def tempered_log_softmax_backward(
    rows: Rows, log_probs: Operand, dlog_probs: Operand, temperatures: Operand, dlogits: Operand, place: Place
) -> None:
    """log_softmax_backward with a temperature for each row, in the format of the arithmetic."""
    one = np.dtype(temperatures.dtype).type(1)
    arrays = log_probs, dlog_probs, temperatures, dlogits
    launch_rows("log_softmax.tempered_log_softmax_backward_rows", place, rows, *arrays, one, reads=2)
