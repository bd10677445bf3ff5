"""Cross-entropy over rows of logits and its fused gradient, on the GPU. kernels/cuda/device/cross_entropy.py holds the
kernels; what the arguments mean stands in kernels/cpu/cross_entropy.py.
"""

from gpusoftmax.kernels.cuda.launch import launch, launch_rows
from gpusoftmax.kernels.cuda.plan import SINGLE_BLOCK
from gpusoftmax.kernels.operands import STORAGE, Labels, Numbers, Operand, Place, Rows, scale_of


def cross_entropy(
    rows: Rows,
    logits: Operand,
    labels: Labels,
    losses: Operand,
    dlogits: Operand,
    weight: Numbers,
    weight_sum: Numbers,
    normaliser: Numbers,
    ignore_index: int,
    label_smoothing: float,
    grad_scale: float,
    place: Place,
) -> None:
    number_of = STORAGE[weight.dtype]
    launch_rows(
        f"cross_entropy.{'smoothed_' if label_smoothing else ''}cross_entropy_rows",
        place,
        rows,
        logits,
        labels,
        losses,
        dlogits,
        weight,
        weight_sum,
        normaliser,
        ignore_index,
        number_of(1.0 - label_smoothing),
        number_of(label_smoothing / rows.n_cols),
        number_of(grad_scale),
        *scale_of(2.0, 1.0, weight.dtype),
        passes=2 if dlogits.pointer else 1,
    )


def normalise(
    rows: Rows, labels: Labels, weight: Numbers, normaliser: Numbers, ignore_index: int, place: Place
) -> None:
    zero = STORAGE[weight.dtype](0)
    launch("cross_entropy.normalise_rows", SINGLE_BLOCK, place, rows, labels, weight, normaliser, ignore_index, zero)


def total(n: int, values: Numbers, normaliser: Numbers, result: Numbers, place: Place) -> None:
    zero = STORAGE[normaliser.dtype](0)
    launch("cross_entropy.total_rows", SINGLE_BLOCK, place, n, values, normaliser, result, zero)


def find_bad_label(
    rows: Rows, labels: Labels, bad_row: Numbers, bad_label: Numbers, ignore_index: int, place: Place
) -> None:
    launch("cross_entropy.find_bad_label_rows", SINGLE_BLOCK, place, rows, labels, bad_row, bad_label, ignore_index)
