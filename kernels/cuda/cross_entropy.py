"""Cross-entropy over rows of logits and its fused gradient, on the GPU. kernels/cuda/device/cross_entropy.py holds the
kernels; the arguments are those of kernels/cpu/cross_entropy.py.
"""

from gpusoftmax.kernels.cuda.launch import COUNT, launch, strided
from gpusoftmax.kernels.cuda.plan import SINGLE_BLOCK, row_plan
from gpusoftmax.kernels.operands import STORAGE, Operand, Place, Rows, label_code, split

# An address whose integer type the kernel learns from a label code, two strides, the code.
LABELS = ("i64", "i64", "i64", "i64")


def cross_entropy(
    rows: Rows,
    logits: Operand,
    labels: Operand,
    losses: Operand,
    dlogits: Operand,
    *,
    weight: int,
    normaliser: int,
    weight_sum: int,
    ignore_index: int,
    label_smoothing: float,
    grad_scale: float,
    dtype: str,
    place: Place,
) -> None:
    number_of = STORAGE[dtype]
    numbers = f"*{dtype}"
    launch(
        "cross_entropy.cross_entropy_rows",
        (
            *(COUNT, COUNT, COUNT),
            *strided(logits.dtype),
            *LABELS,
            *strided(losses.dtype)[:3],
            *strided(dlogits.dtype),
            *(numbers, numbers, numbers),
            "i64",
            *(dtype, dtype, dtype, dtype, dtype),
        ),
        row_plan(rows.n_rows, rows.n_cols),
        (
            *(rows.n_rows, rows.n_inner, rows.n_cols),
            *logits.words,
            *labels.words[:3],
            label_code(labels.dtype),
            *losses.words[:3],
            *dlogits.words,
            *(weight, normaliser, weight_sum),
            ignore_index,
            number_of(1.0 - label_smoothing),
            number_of(label_smoothing / rows.n_cols),
            number_of(grad_scale),
            *split(2.0, dtype),
        ),
        place,
    )


def normalise(
    rows: Rows, labels: Operand, *, weight: int, normaliser: int, ignore_index: int, dtype: str, place: Place
) -> None:
    launch(
        "cross_entropy.normalise_rows",
        (COUNT, COUNT, COUNT, *LABELS, f"*{dtype}", f"*{dtype}", "i64", dtype),
        SINGLE_BLOCK,
        (
            *(rows.n_rows, rows.n_inner, rows.n_cols),
            *labels.words[:3],
            label_code(labels.dtype),
            *(weight, normaliser),
            ignore_index,
            STORAGE[dtype](0),
        ),
        place,
    )


def total(
    n: int, values: int, result: Operand, *, values_dtype: str, normaliser: int, dtype: str, place: Place
) -> None:
    launch(
        "cross_entropy.total_rows",
        (COUNT, f"*{values_dtype}", f"*{dtype}", f"*{result.dtype}", dtype),
        SINGLE_BLOCK,
        (n, values, normaliser, result.pointer, STORAGE[dtype](0)),
        place,
    )


def find_bad_label(
    rows: Rows, labels: Operand, *, bad_row: int, bad_label: int, ignore_index: int, place: Place
) -> None:
    launch(
        "cross_entropy.find_bad_label_rows",
        (COUNT, COUNT, COUNT, *LABELS, "*int64", "*int64", "i64"),
        SINGLE_BLOCK,
        (
            *(rows.n_rows, rows.n_inner, rows.n_cols),
            *labels.words[:3],
            label_code(labels.dtype),
            *(bad_row, bad_label),
            ignore_index,
        ),
        place,
    )
