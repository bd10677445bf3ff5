"""The expected column under the softmax of a row, sum_c c p_c, on the CPU. moments.py holds the mathematics."""

from gpusoftmax.kernels.cpu.cache import device, kernel
from gpusoftmax.kernels.cpu.call import arguments
from gpusoftmax.kernels.cpu.moments import fold_moments, measure_moments, scale_below
from gpusoftmax.kernels.cpu.rows import save_maxima, store_per_row
from gpusoftmax.kernels.cpu.run import run
from gpusoftmax.kernels.cpu.walk import walk
from gpusoftmax.kernels.operands import Operand, Place, Rows, compute_dtype


def soft_argmax(rows: Rows, logits: Operand, expected: Operand, temperature: float, place: Place) -> None:
    scale = scale_below(temperature, compute_dtype(logits.dtype, expected.dtype))
    run(soft_argmax_rows, rows, logits, None, None, expected, *scale)


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
