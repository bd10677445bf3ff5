"""Log-sum-exp over rows of logits on the GPU. kernels/cuda/device/logsumexp.py holds the kernel."""

from gpusoftmax.kernels.cuda.launch import launch_rows
from gpusoftmax.kernels.operands import Operand, Place, Rows, compute_dtype, scale_of


def logsumexp(rows: Rows, logits: Operand, lse: Operand, temperature: float, place: Place) -> None:
    scale = scale_of(2.0, temperature, compute_dtype(logits.dtype, lse.dtype))
    launch_rows("logsumexp.logsumexp_rows", place, rows, logits, lse, *scale, passes=1)
