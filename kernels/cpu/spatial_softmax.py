"""Expected coordinates under the softmax over the pixels of an image, and their backward, on the CPU.

moments.py holds the mathematics.

A place j along a line of `width` pixels has the coordinate linspace(-1, 1, width)[j] = (2 j - last) / last with
last = width - 1. That is linear: the expected coordinate is that of the expected place. The same holds for lines.
"""

from gpusoftmax.kernels.cpu.arithmetic import (
    coordinate,
    per_place_of,
    place_of,
)
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
from gpusoftmax.kernels.cpu.vector import (
    number,
)
from gpusoftmax.kernels.cpu.walk import walk
from gpusoftmax.kernels.operands import Operand, Place, Rows, compute_dtype, scale_of, unless_one


def spatial_softmax(
    rows: Rows, features: Operand, x: Operand, y: Operand, width: int, temperature: float, place: Place
) -> None:
    """x and y = the coordinates along the lines and across them, one number per row each."""
    scale = scale_below(temperature, compute_dtype(features.dtype, x.dtype))
    run(spatial_softmax_rows, rows, features, None, None, x, y, width, *scale, in_blocks=False)


def spatial_softmax_backward(
    rows: Rows,
    features: Operand,
    x: Operand,
    y: Operand,
    dx: Operand,
    dy: Operand,
    dfeatures: Operand,
    width: int,
    temperature: float,
    place: Place,
) -> None:
    scale = unless_one(scale_of(1.0, temperature, compute_dtype(features.dtype, x.dtype, dfeatures.dtype)))
    numbers = x, y, dx, dy, width, *scale
    run(
        spatial_softmax_backward_rows,
        rows,
        features,
        None,
        dfeatures,
        *numbers,
        keeps_exponentials=True,
        in_blocks=False,
    )


@kernel
def spatial_softmax_rows(call):
    way, job, rows, features, same, none, x, y, width, scale, scale_low = arguments(call)
    numbers = rows, x, y, width, scale, scale_low
    walk(way, job, rows, features, same, none, save_maxima, measure, fold, write, numbers, scale)


@device
def measure(here, first, last, numbers):
    _, _, _, width, scale, scale_low = numbers
    measure_moments(here, first, last, width, scale, scale_low)


@device
def fold(here, numbers):
    _, _, _, width, scale, scale_low = numbers
    place, line = fold_moments(here, width, scale, scale_low)
    last_place, last_line = number(scale, width - 1), number(scale, here.n_cols // width - 1)
    return coordinate(place, last_place), coordinate(line, last_line)


@device
def write(here, first, last, summary, numbers):
    rows, x, y, _, scale, _ = numbers
    if first == 0:
        store_per_row(x, rows, here, summary[0], scale)
        store_per_row(y, rows, here, summary[1], scale)


@kernel
def spatial_softmax_backward_rows(call):
    way, job, rows, features, same, dfeatures, x, y, dx, dy, width, scale, scale_low = arguments(call)
    numbers = rows, x, y, dx, dy, width, scale, scale_low
    walk(way, job, rows, features, same, dfeatures, save_maxima, measure_row, fold_pull, write_row, numbers, scale)


@device
def measure_row(here, first, last, numbers):
    _, _, _, _, _, _, scale, scale_low = numbers
    measure_exponentials(here, first, last, scale, scale_low)


@device
def fold_pull(here, numbers):
    rows, x, y, dx, dy, width, scale, scale_low = numbers
    shift, exponent, factor = fold_exponentials(here, scale, scale_low)
    last_place, last_line = number(scale, width - 1), number(scale, here.n_cols // width - 1)
    place = place_of(number_of_row(x, rows, here, 0, scale), last_place)
    line = place_of(number_of_row(y, rows, here, 1, scale), last_line)
    per_place = per_place_of(number_of_row(dx, rows, here, 2, scale), last_place)
    per_line = per_place_of(number_of_row(dy, rows, here, 3, scale), last_line)
    return Pull(shift, exponent, factor, place, per_place, line, per_line)


@device
def write_row(here, first, last, summary, numbers):
    _, _, _, _, _, width, scale, scale_low = numbers
    write_gradients(here, first, last, summary, width, scale, scale_low)
