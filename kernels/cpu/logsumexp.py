"""Log-sum-exp over rows of logits on the CPU: max / T + log s, one pass over the row."""

from gpusoftmax.kernels.cpu.arithmetic import (
    logsumexp as logsumexp_of_state,
)
from gpusoftmax.kernels.cpu.cache import device, kernel
from gpusoftmax.kernels.cpu.call import arguments
from gpusoftmax.kernels.cpu.chunks import sum_of_exponentials
from gpusoftmax.kernels.cpu.rows import chunk_range, count_of_chunks, save_maxima, store_per_row
from gpusoftmax.kernels.cpu.run import run
from gpusoftmax.kernels.cpu.states import MAX, fold_state, save_state, saved
from gpusoftmax.kernels.cpu.walk import walk
from gpusoftmax.kernels.operands import Operand, Place, Rows, compute_dtype, scale_of, unless_one


def logsumexp(rows: Rows, logits: Operand, lse: Operand, temperature: float, place: Place) -> None:
    scale = scale_of(1.0, temperature, compute_dtype(logits.dtype, lse.dtype))
    run(logsumexp_rows, rows, logits, None, None, lse, *unless_one(scale))


@kernel
def logsumexp_rows(call):
    way, job, rows, logits, same, none, lse, scale, scale_low = arguments(call)
    numbers = rows, lse, scale, scale_low
    walk(way, job, rows, logits, same, none, save_maxima, measure, fold, write, numbers, scale)


@device
def measure(here, first, last, numbers):
    _, _, scale, scale_low = numbers
    for chunk in range(first, last):
        col, count = chunk_range(here, chunk)
        largest = saved(here.states, chunk, MAX, here.zero)
        sums = sum_of_exponentials(here, False, largest, largest, col, count, scale, scale_low, False)
        save_state(here.states, chunk, sums)


@device
def fold(here, numbers):
    _, _, scale, scale_low = numbers
    state, _ = fold_state(here.states, count_of_chunks(here.n_cols), here.zero, scale, scale_low)
    return logsumexp_of_state(state, scale, scale_low)


@device
def write(here, first, last, summary, numbers):
    rows, lse, _, _ = numbers
    if first == 0:
        store_per_row(lse, rows, here, summary, numbers[2])
