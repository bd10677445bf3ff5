"""Softmax over rows of logits, and its backward, on the GPU. kernels/cuda/device/softmax.py holds the kernels."""

from gpusoftmax.kernels.cuda.launch import COUNT, launch, strided
from gpusoftmax.kernels.cuda.plan import row_plan
from gpusoftmax.kernels.operands import Operand, Place, Rows, compute_dtype, split


def softmax(rows: Rows, logits: Operand, probs: Operand, temperature: float, place: Place) -> None:
    dtype = compute_dtype(logits.dtype, probs.dtype)
    launch(
        "softmax.softmax_rows",
        (COUNT, COUNT, COUNT, *strided(logits.dtype), *strided(probs.dtype), dtype, dtype),
        row_plan(rows.n_rows, rows.n_cols),
        (rows.n_rows, rows.n_inner, rows.n_cols, *logits.words, *probs.words, *split(2.0 / temperature, dtype)),
        place,
    )


def softmax_backward(
    rows: Rows, probs: Operand, dprobs: Operand, dlogits: Operand, temperature: float, place: Place
) -> None:
    dtype = compute_dtype(probs.dtype, dprobs.dtype, dlogits.dtype)
    operands = (probs, dprobs, dlogits)
    launch(
        "softmax.softmax_backward_rows",
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
