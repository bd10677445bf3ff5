"""Softmax over the largest logits of each row, on the GPU. kernels/cuda/device/topk_softmax.py holds the kernel; what
the arguments mean stands in kernels/cpu/topk_softmax.py.
"""

from gpusoftmax.kernels.cuda.launch import launch_rows
from gpusoftmax.kernels.cuda.plan import LARGEST_SCRATCH
from gpusoftmax.kernels.operands import Labels, Operand, Place, Rows, scale_of


def topk_softmax(
    rows: Rows,
    logits: Operand,
    probs: Operand,
    indices: Labels,
    k: int,
    renormalize: bool,
    temperature: float,
    place: Place,
) -> None:
    scale = scale_of(2.0, temperature, probs.dtype)
    arguments = rows, logits, probs, indices, k, int(renormalize), *scale
    # One pass: of a long row only the lanes of the largest logits are looked at again.
    launch_rows(
        "topk_softmax.topk_softmax_rows", place, *arguments, passes=1, side_by_side=k == 1, scratch=LARGEST_SCRATCH
    )
