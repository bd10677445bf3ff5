"""What a loss needs of a whole batch. Each kernel runs as one block: sums have a fixed order."""

import math

from numpy import int64

from gpusoftmax.kernels.cuda.device._cuda import cuda, device
from gpusoftmax.kernels.cuda.device.arithmetic import add_pair, div, mul, number
from gpusoftmax.kernels.cuda.device.loss_target import number_at
from gpusoftmax.kernels.cuda.device.memory import block_numbers, load, load_label, row_offset, store
from gpusoftmax.kernels.cuda.device.reduce import block_sum_pair, first_of_block, sum_of_block
from gpusoftmax.kernels.operands import NO_BAD_LABEL


def block_total_with(read, number_of):
    """A device function that sums number_of(read(k, arguments), k, arguments) for k below n over the threads of a
    block.

    Eight turns are read before the first is added: one after the other, each would be waited for.
    """

    @device
    def block_total(n, arguments, scratch, zero):
        total, low = zero, zero
        step = cuda.blockDim.x
        k = int64(cuda.threadIdx.x)
        while k + 7 * step < n:
            a, b = read(k, arguments), read(k + step, arguments)
            c, d = read(k + 2 * step, arguments), read(k + 3 * step, arguments)
            e, f = read(k + 4 * step, arguments), read(k + 5 * step, arguments)
            g, h = read(k + 6 * step, arguments), read(k + 7 * step, arguments)
            for value in (a, b, c, d, e, f, g, h):
                total, low = add_pair(total, low, number_of(value, k, arguments), zero)
                k += step
        while k < n:
            total, low = add_pair(total, low, number_of(read(k, arguments), k, arguments), zero)
            k += step
        return block_sum_pair(total, low, scratch, zero)

    return block_total


@device
def label_of(labels, k, rows):
    return load_label(labels.pointer, row_offset(labels, k, rows), labels.code)


@device
def read_label(row, arguments):
    """The first label of a row."""
    rows, labels, n_labels, weight, row_weight, ignore_index, zero = arguments
    return label_of(labels, row * n_labels, rows) if n_labels > 0 else int64(0)


@device
def weight_of_row(label, row, arguments):
    """What a row counts for: one of whose labels is a class, where there are labels."""
    rows, labels, n_labels, weight, row_weight, ignore_index, zero = arguments
    one = number(zero, 1.0)
    of_row = number_at(row_weight, row, one)
    found = zero if n_labels > 0 else of_row
    j = int64(0)
    while j < n_labels:
        if j > 0:
            label = label_of(labels, row * n_labels + j, rows)
        if label != ignore_index and label >= 0 and label < rows.n_cols:
            found = mul(number_at(weight, label, one), of_row)
        j += 1
    return found


@device
def read_value(k, arguments):
    values, zero = arguments
    return load(values, k, zero)


@device
def value_itself(value, k, arguments):
    return value


total_weight = block_total_with(read_label, weight_of_row)
total_value = block_total_with(read_value, value_itself)


def normalise_rows(rows, labels, n_labels, weight, row_weight, normaliser, ignore_index, zero):
    arguments = rows, labels, n_labels, weight, row_weight, ignore_index, zero
    n_rows = rows.n_rows // max(n_labels, int64(1))
    total = total_weight(n_rows, arguments, block_numbers(zero), zero)
    if cuda.threadIdx.x == 0:
        store(normaliser, 0, total)


def total_rows(n, values, normaliser, result, divisor):
    zero = number(divisor, 0.0)
    total = total_value(n, (values, zero), block_numbers(zero), zero)
    if cuda.threadIdx.x == 0:
        divisor = number_at(normaliser, 0, divisor)
        mean = div(total, divisor)
        if divisor == zero:  # nothing counts: NaN, as 0 / 0 is, even where smoothing has left something to divide
            mean = number(zero, math.nan)
        store(result, 0, mean)


def count_rows(n, values, result):
    total = int64(0)
    for k in range(cuda.threadIdx.x, n, cuda.blockDim.x):
        total += values[k]
    total = sum_of_block(total, block_numbers(total))
    if cuda.threadIdx.x == 0:
        result[0] = total


def find_bad_label_rows(rows, labels, bad_row, bad_label, ignore_index):
    scratch = block_numbers(ignore_index)
    first = NO_BAD_LABEL
    for row in range(cuda.threadIdx.x, rows.n_rows, cuda.blockDim.x):
        label = label_of(labels, row, rows)
        if label != ignore_index and (label < 0 or label >= rows.n_cols):
            first = min(first, row)
    first = first_of_block(first, scratch)
    if cuda.threadIdx.x == 0:
        bad_row[0] = first
        bad_label[0] = NO_BAD_LABEL if first == NO_BAD_LABEL else label_of(labels, first, rows)
