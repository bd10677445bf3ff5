"""What a loss needs of a whole batch, on the CPU."""

import math

from gpusoftmax.kernels.cpu.arithmetic import (
    add,
    add_pair,
    div,
    mul,
)
from gpusoftmax.kernels.cpu.cache import kernel
from gpusoftmax.kernels.cpu.call import arguments
from gpusoftmax.kernels.cpu.loss_target import label_of, number_at
from gpusoftmax.kernels.cpu.memory import (
    load,
    pointer_to,
    store,
)
from gpusoftmax.kernels.cpu.run import run_alone
from gpusoftmax.kernels.cpu.vector import (
    number,
)
from gpusoftmax.kernels.operands import NO_BAD_LABEL, STORAGE, Labels, Numbers, Place, Rows


def scratch_size(n: int) -> int:
    """How many numbers these functions need room for, in the format of what they add up: none on the CPU."""
    return 0


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
    """normaliser[0] = the sum of weight[label] row_weight over the rows that count; ones where there are no weights.

    `rows` are all labels; n_labels of them in a row belong together, and have one row_weight. Without labels, n_labels
    0, all rows count.
    """
    zero = STORAGE[weight.dtype](0)
    run_alone(normalise_rows, rows, labels, n_labels, weight, row_weight, normaliser, ignore_index, zero)


def total(
    n: int, values: Numbers, normaliser: Numbers, result: Numbers, scratch: Numbers, place: Place, divisor: float = 1.0
) -> None:
    """result[0] = sum(values), in their order, divided by normaliser[0] or, where there is none, by `divisor`."""
    tags = STORAGE[values.dtype](0), STORAGE[result.dtype](0), STORAGE[normaliser.dtype](divisor)
    run_alone(total_rows, n, values, normaliser, result, *tags)


def count(n: int, values: Numbers, result: Numbers, scratch: Numbers, place: Place) -> None:
    """result[0] = sum(values), of int64."""
    run_alone(count_rows, n, values, result)


def find_bad_label(
    rows: Rows, labels: Labels, bad_row: Numbers, bad_label: Numbers, ignore_index: int, place: Place
) -> None:
    """bad_row[0], bad_label[0] (int64) = the first row whose label is neither a class nor ignore_index, and its label.

    NO_BAD_LABEL for both if there is none.
    """
    run_alone(find_bad_label_rows, rows, labels, bad_row, bad_label, ignore_index)


@kernel
def normalise_rows(call):
    _, _, rows, labels, n_labels, weight, row_weight, normaliser, ignore_index, zero = arguments(call)
    total_weight, low = zero, zero
    one = number(zero, 1.0)
    for row in range(rows.n_rows // max(n_labels, 1)):
        of_row = zero if n_labels > 0 else number_at(row_weight, row, one)
        for j in range(n_labels):
            label = label_of(labels, row * n_labels + j, rows)
            if label != ignore_index and label >= 0 and label < rows.n_cols:
                of_row = mul(number_at(weight, label, one), number_at(row_weight, row, one))
        total_weight, low = add_pair(total_weight, low, of_row, zero)
    store(pointer_to(normaliser, zero), 0, add(total_weight, low))


@kernel
def total_rows(call):
    _, _, n, values, normaliser, result, values_tag, result_tag, divisor = arguments(call)
    zero = number(divisor, 0.0)
    total_value, low = zero, zero
    for k in range(n):
        total_value, low = add_pair(total_value, low, load(pointer_to(values, values_tag), k, zero), zero)
    divisor = number_at(normaliser, 0, divisor)
    mean = div(add(total_value, low), divisor)
    if divisor == zero:  # nothing counts: NaN, as 0 / 0 is, even where smoothing has left something to divide
        mean = number(zero, math.nan)
    store(pointer_to(result, result_tag), 0, mean)


@kernel
def count_rows(call):
    _, _, n, values, result = arguments(call)
    total_value = 0
    for k in range(n):
        total_value += pointer_to(values, n)[k]
    pointer_to(result, n)[0] = total_value


@kernel
def find_bad_label_rows(call):
    _, _, rows, labels, bad_row, bad_label, ignore_index = arguments(call)
    first, found = NO_BAD_LABEL, NO_BAD_LABEL
    for row in range(rows.n_rows):
        label = label_of(labels, row, rows)
        if label != ignore_index and (label < 0 or label >= rows.n_cols):
            first, found = row, label
            break
    pointer_to(bad_row, rows.n_rows)[0] = first
    pointer_to(bad_label, rows.n_rows)[0] = found
