"""What a loss needs of a whole batch, on the GPU. kernels/cuda/device/batch.py holds the kernels; what the arguments
mean stands in kernels/cpu/batch.py.
"""

from gpusoftmax.kernels.cuda.launch import launch
from gpusoftmax.kernels.cuda.plan import SINGLE_BLOCK, n_parts, parts_plan
from gpusoftmax.kernels.operands import STORAGE, Labels, Numbers, Place, Rows


def scratch_size(n: int) -> int:
    parts = n_parts(n)
    return 2 * parts if parts > 1 else 0


def normalise(
    rows: Rows,
    labels: Labels,
    n_labels: int,
    weight: Numbers,
    row_weight: Numbers,
    normaliser: Numbers,
    ignore_index: int,
    scratch: Numbers,
    place: Place,
) -> None:
    zero, n = STORAGE[weight.dtype](0), rows.n_rows // max(n_labels, 1)
    arguments = rows, labels, n_labels, weight, row_weight, normaliser, ignore_index, scratch, zero
    launch("batch.normalise_rows", parts_plan(n), place, *arguments)
    if scratch.pointer:
        none = Numbers(0, normaliser.dtype)
        launch("batch.total_parts_of_rows", SINGLE_BLOCK, place, n_parts(n), scratch, none, normaliser, zero + 1)


def total(
    n: int, values: Numbers, normaliser: Numbers, result: Numbers, scratch: Numbers, place: Place, divisor: float = 1.0
) -> None:
    number = STORAGE[normaliser.dtype](divisor)
    launch("batch.total_rows", parts_plan(n), place, n, values, normaliser, result, scratch, number)
    if scratch.pointer:
        launch("batch.total_parts_of_rows", SINGLE_BLOCK, place, n_parts(n), scratch, normaliser, result, number)


def count(n: int, values: Numbers, result: Numbers, scratch: Numbers, place: Place) -> None:
    launch("batch.count_rows", parts_plan(n), place, n, values, result, scratch)
    if scratch.pointer:
        launch("batch.count_rows", SINGLE_BLOCK, place, n_parts(n), scratch, result, Numbers(0, scratch.dtype))


def find_bad_label(
    rows: Rows, labels: Labels, bad_row: Numbers, bad_label: Numbers, ignore_index: int, place: Place
) -> None:
    launch("batch.find_bad_label_rows", SINGLE_BLOCK, place, rows, labels, bad_row, bad_label, ignore_index)
