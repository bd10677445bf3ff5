"""Logits below a limit of their row become -inf, on the GPU. kernels/cuda/device/mask_logits.py holds the kernels."""

from gpusoftmax.kernels.cuda.launch import launch_rows
from gpusoftmax.kernels.cuda.plan import LARGEST_SCRATCH
from gpusoftmax.kernels.operands import (
    Limits,
    Operand,
    Place,
    Rows,
    compute_dtype,
    have_own_numbers,
    limits_in,
    own_numbers,
    scale_of,
)


def mask_logits(
    rows: Rows, logits: Operand, masked: Operand, temperature: float | Operand, limits: Limits, place: Place
) -> None:
    compute = compute_dtype(logits.dtype, masked.dtype)
    if have_own_numbers(temperature, limits):
        own = own_numbers(temperature, limits, compute)
        launch_rows("mask_logits.mask_mixed_logits_rows", place, rows, logits, masked, *own, scratch=LARGEST_SCRATCH)
        return
    numbers = *limits_in(limits, temperature, compute), *scale_of(2.0, temperature, compute)
    launch_rows("mask_logits.mask_logits_rows", place, rows, logits, masked, *numbers, scratch=LARGEST_SCRATCH)
