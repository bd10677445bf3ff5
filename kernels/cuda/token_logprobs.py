"""Log-probabilities of tokens, and what else a read of their rows tells, on the GPU.

kernels/cuda/device/token_logprobs.py holds the kernels; kernels/cpu/token_logprobs.py says what the arguments mean.
"""

from gpusoftmax.kernels.cuda.launch import launch_rows
from gpusoftmax.kernels.operands import Labels, Operand, Place, Rows, scale_of


def token_logprobs(
    rows: Rows,
    logits: Operand,
    labels: Labels,
    logprobs: Operand,
    lse: Operand,
    entropy: Operand,
    ranks: Labels,
    argmax: Labels,
    n_targets: int,
    target_stride: int,
    ignore_index: int,
    temperature: float,
    place: Place,
) -> None:
    launch_rows(
        f"token_logprobs.token_logprobs{'_and_entropy' if entropy.pointer else ''}_rows",
        place,
        rows,
        logits,
        labels,
        logprobs,
        lse,
        entropy,
        ranks,
        argmax,
        n_targets,
        target_stride,
        ignore_index,
        *scale_of(2.0, temperature, logprobs.dtype),
        passes=1,
        side_by_side=False,  # as below
    )


def token_logprobs_backward(
    rows: Rows,
    logits: Operand,
    labels: Labels,
    dlogprobs: Operand,
    dentropy: Operand,
    dlogits: Operand,
    n_targets: int,
    target_stride: int,
    gradient_stride: int,
    ignore_index: int,
    temperature: float,
    place: Place,
) -> None:
    launch_rows(
        f"token_logprobs.logprobs{'_and_entropy' if dentropy.pointer else ''}_backward_rows",
        place,
        rows,
        logits,
        labels,
        dlogprobs,
        dentropy,
        dlogits,
        n_targets,
        target_stride,
        gradient_stride,
        ignore_index,
        *scale_of(2.0, temperature, dlogprobs.dtype),
        side_by_side=False,  # labels beside the numbers that rows tell each other: float16 spilled on sm_75 and sm_80
    )
