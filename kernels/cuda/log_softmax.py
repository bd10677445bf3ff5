"""Log-softmax over rows and its backward, on the GPU. kernels/cuda/device/log_softmax.py holds the kernels."""

from gpusoftmax.kernels.cuda.launch import COUNT, launch, strided
from gpusoftmax.kernels.cuda.plan import row_plan
from gpusoftmax.kernels.operands import Operand, Place, Rows, compute_dtype, split


def log_softmax(rows: Rows, logits: Operand, log_probs: Operand, temperature: float, place: Place) -> None:
    dtype = compute_dtype(logits.dtype, log_probs.dtype)
    launch(
        "log_softmax.log_softmax_rows",
        (COUNT, COUNT, COUNT, *strided(logits.dtype), *strided(log_probs.dtype), dtype, dtype),
        row_plan(rows.n_rows, rows.n_cols),
        (rows.n_rows, rows.n_inner, rows.n_cols, *logits.words, *log_probs.words, *split(2.0 / temperature, dtype)),
        place,
    )


def log_softmax_backward(
    rows: Rows, log_probs: Operand, dlog_probs: Operand, dlogits: Operand, temperature: float, place: Place
) -> None:
    dtype = compute_dtype(log_probs.dtype, dlog_probs.dtype, dlogits.dtype)
    operands = (log_probs, dlog_probs, dlogits)
    launch(
        "log_softmax.log_softmax_backward_rows",
        (COUNT, COUNT, COUNT, *(word for operand in operands for word in strided(operand.dtype)), dtype),
        row_plan(rows.n_rows, rows.n_cols),
        (
            rows.n_rows,
            rows.n_inner,
            rows.n_cols,
            *(word for operand in operands for word in operand.words),
            split(1.0 / temperature, dtype)[0],
        ),
        place,
    )
