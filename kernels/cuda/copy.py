"""Copies rows between layouts and formats on the GPU. kernels/cuda/device/copy.py holds the kernel."""

from gpusoftmax.kernels.cuda.launch import COUNT, launch, strided
from gpusoftmax.kernels.cuda.plan import row_plan
from gpusoftmax.kernels.operands import STORAGE, Operand, Place, Rows, compute_dtype


def copy(rows: Rows, source: Operand, target: Operand, place: Place) -> None:
    dtype = compute_dtype(source.dtype, target.dtype)
    launch(
        "copy.copy_rows",
        (COUNT, COUNT, COUNT, *strided(source.dtype), *strided(target.dtype), dtype),
        row_plan(rows.n_rows, rows.n_cols),
        (rows.n_rows, rows.n_inner, rows.n_cols, *source.words, *target.words, STORAGE[dtype](0)),
        place,
    )
