"""Calls so small that finding out what they are costs more than doing it: NumPy arrays straight to a kernel.

The kernels are those of the ops, along rows, with their few numbers of scratch memory at hand.
"""

from collections.abc import Callable

import numpy as np
from numba import types

from gpusoftmax.kernels.cpu.cache import device, kernel
from gpusoftmax.kernels.cpu.chunks import CHUNK_COLS
from gpusoftmax.kernels.cpu.job import LINE, NEXT, Job
from gpusoftmax.kernels.cpu.log_softmax import log_softmax_of_rows
from gpusoftmax.kernels.cpu.rows import Strided
from gpusoftmax.kernels.cpu.softmax import softmax_of_rows
from gpusoftmax.kernels.cpu.states import FIELDS
from gpusoftmax.kernels.cpu.vector import address_of, on_stack, way_along
from gpusoftmax.kernels.operands import Rows

COUNTERS, STATES = NEXT + LINE, 2 * FIELDS  # literals to Numba


@kernel
def small_softmax(x, out):
    return _run(softmax_of_rows, x, out)


@kernel
def small_log_softmax(x, out):
    return _run(log_softmax_of_rows, x, out)


@device
def _run(of_rows, x, out):
    """Whether it has been done: not for arrays that overlap in part, of different shapes, or of rows of many chunks."""
    n_rows, n_cols = x.shape
    source, target = address_of(x), address_of(out)
    distance = source - target
    overlap = distance != 0 and abs(distance) < x.nbytes
    if out.shape != x.shape or overlap or n_cols > CHUNK_COLS or x.size == 0:
        return False
    counters = on_stack(COUNTERS)
    job = Job(counters, on_stack(STATES), 1, n_rows, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1)
    one = x.dtype.type(1)
    rows = Rows(n_rows, n_rows, n_cols)
    lines = Strided(source, 0, n_cols, 1, one), Strided(target, 0, n_cols, 1, one)
    of_rows(way_along(), job, rows, lines[0], lines[0], lines[1], one, None)
    return x.size + out.size > 0  # they must outlive the last access through their addresses


_KERNELS = {"softmax": small_softmax, "log_softmax": small_log_softmax}


def dispatcher(op: str) -> Callable[[np.ndarray, np.ndarray], bool] | None:
    """The kernel of an op, if there is one. Whatever is not two C-contiguous, aligned, writable 2-D arrays of one of
    these dtypes is a TypeError.
    """
    chosen = _KERNELS.get(op)
    if chosen is not None:
        for dtype in (types.float32, types.float64):
            chosen.compile((types.Array(dtype, 2, "C"),) * 2)
        chosen.disable_compile()
    return chosen
