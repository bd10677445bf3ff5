"""Log-sum-exp in parts, on the GPU. kernels/cuda/device/logsumexp_state.py holds the kernels; what the arguments mean
stands in kernels/cpu/logsumexp_state.py.
"""

from gpusoftmax.kernels.cuda.launch import launch, launch_rows
from gpusoftmax.kernels.cuda.plan import warps_plan
from gpusoftmax.kernels.operands import Operand, Place, Rows, scale_of


def measure(rows: Rows, logits: Operand, states: Operand, temperature: float, place: Place) -> None:
    scale = scale_of(2.0, temperature, states.dtype)
    launch_rows(
        "logsumexp_state.measure_rows", place, rows, logits, states, *scale, passes=1, side_by_side=False
    )  # fmt: skip


def fold(rows: Rows, states: Operand, lse: Operand, temperature: float, place: Place) -> None:
    scale = scale_of(2.0, temperature, states.dtype)
    launch("logsumexp_state.fold_rows", warps_plan(rows.n_rows), place, rows, states, lse, *scale)
