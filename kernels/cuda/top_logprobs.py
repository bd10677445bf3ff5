"""The largest log-probabilities of each row, on the GPU. kernels/cuda/device/top_logprobs.py holds the kernel."""

from gpusoftmax.kernels.cuda.launch import launch_rows
from gpusoftmax.kernels.cuda.plan import LARGEST_SCRATCH
from gpusoftmax.kernels.operands import Labels, Operand, Place, Rows, scale_of


def top_logprobs(
    rows: Rows,
    logits: Operand,
    labels: Labels,
    logprobs: Operand,
    tokens: Labels,
    k: int,
    ignore_index: int,
    temperature: float,
    place: Place,
) -> None:
    scale = scale_of(2.0, temperature, logprobs.dtype)
    arguments = rows, logits, labels, logprobs, tokens, k, ignore_index, *scale
    # One pass: of a long row only the lanes of the largest logits are looked at again.
    launch_rows(
        "top_logprobs.top_logprobs_rows", place, *arguments, passes=1, side_by_side=k == 1, scratch=LARGEST_SCRATCH
    )
