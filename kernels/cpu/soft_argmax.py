"""The expected column under the softmax of a row, sum_c c p_c, and its backward, on the CPU.

moments.py holds the mathematics.
"""

from gpusoftmax.kernels.cpu.cache import device, kernel
from gpusoftmax.kernels.cpu.call import arguments
from gpusoftmax.kernels.cpu.moments import (
    Pull,
    fold_exponentials,
    fold_moments,
    measure_exponentials,
    measure_moments,
    scale_below,
    write_gradients,
)
from gpusoftmax.kernels.cpu.rows import number_of_row, save_maxima, store_per_row
from gpusoftmax.kernels.cpu.run import run
from gpusoftmax.kernels.cpu.walk import walk
from gpusoftmax.kernels.operands import Operand, Place, Rows, compute_dtype, scale_of, unless_one


def soft_argmax(rows: Rows, logits: Operand, expected: Operand, temperature: float, place: Place) -> None:
    scale = scale_below(temperature, compute_dtype(logits.dtype, expected.dtype))
    run(soft_argmax_rows, rows, logits, None, None, expected, *scale, in_blocks=False)


def soft_argmax_backward(
    rows: Rows,
    logits: Operand,
    expected: Operand,
    dexpected: Operand,
    dlogits: Operand,
    temperature: float,
    place: Place,
) -> None:
    scale = unless_one(scale_of(1.0, temperature, compute_dtype(logits.dtype, expected.dtype, dlogits.dtype)))
    numbers = expected, dexpected, *scale
    run(soft_argmax_backward_rows, rows, logits, None, dlogits, *numbers, keeps_exponentials=True, in_blocks=False)


@kernel
def soft_argmax_rows(call):
    way, job, rows, logits, same, none, expected, scale, scale_low = arguments(call)
    numbers = rows, expected, scale, scale_low
    walk(way, job, rows, logits, same, none, save_maxima, measure, fold, write, numbers, scale)


@device
def measure(here, first, last, numbers):
    _, _, scale, scale_low = numbers
    measure_moments(here, first, last, None, scale, scale_low)


@device
def fold(here, numbers):
    _, _, scale, scale_low = numbers
    place, _ = fold_moments(here, None, scale, scale_low)
    return place


@device
def write(here, first, last, summary, numbers):
    rows, expected, scale, _ = numbers
    if first == 0:
        store_per_row(expected, rows, here, summary, scale)


@kernel
def soft_argmax_backward_rows(call):
    way, job, rows, logits, same, dlogits, expected, dexpected, scale, scale_low = arguments(call)
    numbers = rows, expected, dexpected, scale, scale_low
    walk(way, job, rows, logits, same, dlogits, save_maxima, measure_row, fold_pull, write_row, numbers, scale)


@device
def measure_row(here, first, last, numbers):
    _, _, _, scale, scale_low = numbers
    measure_exponentials(here, first, last, scale, scale_low)


@device
def fold_pull(here, numbers):
    rows, expected, dexpected, scale, scale_low = numbers
    shift, exponent, factor = fold_exponentials(here, scale, scale_low)
    place = number_of_row(expected, rows, here, 0, scale)
    upstream = number_of_row(dexpected, rows, here, 1, scale)
    return Pull(shift, exponent, factor, place, upstream, here.zero, here.zero)


@device
def write_row(here, first, last, summary, numbers):
    _, _, _, scale, scale_low = numbers
    write_gradients(here, first, last, summary, None, scale, scale_low)
