"""Sampling from rows of logits on the GPU. kernels/cuda/device/sample.py holds the kernels."""

from gpusoftmax.kernels.cuda.launch import launch_rows
from gpusoftmax.kernels.cuda.plan import LARGEST_SCRATCH
from gpusoftmax.kernels.operands import (
    NO_LIMITS,
    Labels,
    Limits,
    Operand,
    Place,
    Rows,
    compute_dtype,
    have_own_numbers,
    limits_in,
    noise_scales,
    own_numbers,
    scale_of,
)


def sample(
    rows: Rows,
    logits: Operand,
    seeds: Labels,
    steps: Labels,
    ids: Labels,
    temperature: float | Operand,
    limits: Limits,
    place: Place,
) -> None:
    compute = compute_dtype(logits.dtype)
    if have_own_numbers(temperature, limits):
        has_limits = int(limits != NO_LIMITS)
        arguments = logits, seeds, steps, ids, *own_numbers(temperature, limits, compute), has_limits
        launch_rows("sample.sample_mixed_rows", place, rows, *arguments, writes_rows=False, scratch=LARGEST_SCRATCH)
        return
    arguments = logits, seeds, steps, ids, *noise_scales(temperature, compute)
    if limits == NO_LIMITS or temperature == 0:
        launch_rows("sample.sample_rows", place, rows, *arguments, passes=1)
    else:
        numbers = *limits_in(limits, temperature, compute), *scale_of(2.0, temperature, compute)
        launch_rows("sample.sample_kept_rows", place, rows, *arguments, *numbers, scratch=LARGEST_SCRATCH)
