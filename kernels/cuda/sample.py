"""Sampling from rows of logits on the GPU. kernels/cuda/device/sample.py holds the kernel."""

from gpusoftmax.kernels.cuda.launch import launch_rows
from gpusoftmax.kernels.operands import Labels, Operand, Place, Rows, compute_dtype, noise_scales


def sample(
    rows: Rows, logits: Operand, seeds: Labels, steps: Labels, ids: Labels, temperature: float, place: Place
) -> None:
    scales = noise_scales(temperature, compute_dtype(logits.dtype))
    launch_rows("sample.sample_rows", place, rows, logits, seeds, steps, ids, *scales, passes=1)
