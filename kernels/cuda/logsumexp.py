"""Log-sum-exp over rows of logits on the GPU. kernels/cuda/device/logsumexp.py holds the kernel."""

from gpusoftmax.kernels.cuda.launch import COUNT, launch, strided
from gpusoftmax.kernels.cuda.plan import row_plan
from gpusoftmax.kernels.operands import Operand, Place, Rows, compute_dtype, split


def logsumexp(rows: Rows, logits: Operand, lse: Operand, temperature: float, place: Place) -> None:
    dtype = compute_dtype(logits.dtype, lse.dtype)
    launch(
        "logsumexp.logsumexp_rows",
        (COUNT, COUNT, COUNT, *strided(logits.dtype), *strided(lse.dtype), dtype, dtype),
        row_plan(rows.n_rows, rows.n_cols),
        (rows.n_rows, rows.n_inner, rows.n_cols, *logits.words, *lse.words, *split(2.0 / temperature, dtype)),
        place,
    )
