"""What a loss needs of a whole batch.

Sums have a fixed order: each block sums up PART_ROWS rows, in an order of its own, and where there are several blocks,
one more adds up what they have found.
"""

import math

from numpy import int64

from gpusoftmax.kernels.cuda.device._cuda import cuda, device
from gpusoftmax.kernels.cuda.device.arithmetic import add, add_pair, div, mul, number
from gpusoftmax.kernels.cuda.device.loss_target import number_at
from gpusoftmax.kernels.cuda.device.memory import (
    block_numbers,
    is_null,
    load,
    load_label,
    row_offset,
    store,
)
from gpusoftmax.kernels.cuda.device.reduce import block_sum_pair, first_of_block, sum_of_block
from gpusoftmax.kernels.cuda.plan import PART_ROWS
from gpusoftmax.kernels.operands import NO_BAD_LABEL


def block_total_with(read, number_of):
    """A device function that sums number_of(read(k, arguments), k, arguments) for begin <= k < end over the threads
    of a block: (sum, its rounding error).

    Eight turns are read before the first is added: one after the other, each would be waited for.
    """

    @device
    def block_total(begin, end, arguments, scratch, zero):
        total, low = zero, zero
        step = cuda.blockDim.x
        k = begin + cuda.threadIdx.x
        while k + 7 * step < end:
            a, b = read(k, arguments), read(k + step, arguments)
            c, d = read(k + 2 * step, arguments), read(k + 3 * step, arguments)
            e, f = read(k + 4 * step, arguments), read(k + 5 * step, arguments)
            g, h = read(k + 6 * step, arguments), read(k + 7 * step, arguments)
            for value in (a, b, c, d, e, f, g, h):
                total, low = add_pair(total, low, number_of(value, k, arguments), zero)
                k += step
        while k < end:
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


@device
def part_of(n):
    """The rows of this block: [begin, end)."""
    begin = int64(cuda.blockIdx.x) * PART_ROWS
    return begin, min(begin + PART_ROWS, n)


@device
def tell_part(total, parts):
    """Leaves the (sum, error) of this block to `total_parts_of_rows`."""
    store(parts, 2 * cuda.blockIdx.x, total[0])
    store(parts, 2 * cuda.blockIdx.x + 1, total[1])


@device
def tell_mean(total, normaliser, result, divisor):
    zero = number(divisor, 0.0)
    divisor = number_at(normaliser, 0, divisor)
    mean = div(add(total[0], total[1]), divisor)
    if divisor == zero:  # nothing counts: NaN, as 0 / 0 is, even where smoothing has left something to divide
        mean = number(zero, math.nan)
    store(result, 0, mean)


def normalise_rows(rows, labels, n_labels, weight, row_weight, normaliser, ignore_index, parts, zero):
    arguments = rows, labels, n_labels, weight, row_weight, ignore_index, zero
    begin, end = part_of(rows.n_rows // max(n_labels, int64(1)))
    total = total_weight(begin, end, arguments, block_numbers(zero), zero)
    if cuda.threadIdx.x == 0:
        if is_null(parts):
            store(normaliser, 0, add(total[0], total[1]))
        else:
            tell_part(total, parts)


def total_rows(n, values, normaliser, result, parts, divisor):
    zero = number(divisor, 0.0)
    begin, end = part_of(n)
    total = total_value(begin, end, (values, zero), block_numbers(zero), zero)
    if cuda.threadIdx.x == 0:
        if is_null(parts):
            tell_mean(total, normaliser, result, divisor)
        else:
            tell_part(total, parts)


def total_parts_of_rows(n_parts, parts, normaliser, result, divisor):
    zero = number(divisor, 0.0)
    total, low = zero, zero
    for k in range(cuda.threadIdx.x, n_parts, cuda.blockDim.x):
        total, low = add_pair(total, low, load(parts, 2 * k, zero), load(parts, 2 * k + 1, zero))
    total = block_sum_pair(total, low, block_numbers(zero), zero)
    if cuda.threadIdx.x == 0:
        tell_mean(total, normaliser, result, divisor)


def count_rows(n, values, result, parts):
    """Where there are parts, the count of each block goes there: the values of another launch."""
    total = int64(0)
    for k in range(int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x, n, cuda.gridDim.x * cuda.blockDim.x):
        total += values[k]
    total = sum_of_block(total, block_numbers(total))
    if cuda.threadIdx.x == 0:
        if is_null(parts):
            result[0] = total
        else:
            parts[cuda.blockIdx.x] = total


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
