"""What a loss needs of a whole batch, on the GPU. kernels/cuda/device/batch.py holds the kernels; what the arguments
mean stands in kernels/cpu/batch.py.
"""

from gpusoftmax.kernels.cuda.launch import launch
from gpusoftmax.kernels.cuda.plan import SINGLE_BLOCK
from gpusoftmax.kernels.operands import STORAGE, Labels, Numbers, Place, Rows


def normalise(
    rows: Rows,
    labels: Labels,
    n_labels: int,
    weight: Numbers,
    row_weight: Numbers,
    normaliser: Numbers,
    ignore_index: int,
    place: Place,
) -> None:
    zero = STORAGE[weight.dtype](0)
    arguments = rows, labels, n_labels, weight, row_weight, normaliser, ignore_index, zero
    launch("batch.normalise_rows", SINGLE_BLOCK, place, *arguments)


def total(n: int, values: Numbers, normaliser: Numbers, result: Numbers, place: Place, divisor: float = 1.0) -> None:
    number = STORAGE[normaliser.dtype](divisor)
    launch("batch.total_rows", SINGLE_BLOCK, place, n, values, normaliser, result, number)


def count(n: int, values: Numbers, result: Numbers, place: Place) -> None:
    launch("batch.count_rows", SINGLE_BLOCK, place, n, values, result)


def find_bad_label(
    rows: Rows, labels: Labels, bad_row: Numbers, bad_label: Numbers, ignore_index: int, place: Place
) -> None:
    launch("batch.find_bad_label_rows", SINGLE_BLOCK, place, rows, labels, bad_row, bad_label, ignore_index)
