"""Runs a kernel over rows on the threads Numba is set to use.

Plain threads over kernels that release the GIL, instead of Numba's parallel loops: concurrent calls from any number of
Python threads are safe (Numba's workqueue layer would abort the process), and so is the child after a fork (OpenMP's
would not be).
"""

import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numba
from numba.np.ufunc import parallel

from gpusoftmax.kernels.cpu.rows import Strided
from gpusoftmax.kernels.operands import STORAGE, Numbers, Operand, Rows

# Handing work to a thread and waiting for it costs 30-60 us, about the time one core needs for this many logits.
LOGITS_PER_THREAD = 32768


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(numba.config.NUMBA_NUM_THREADS, thread_name_prefix="gpusoftmax")


# The child of a fork has the executor's books but none of its threads.
os.register_at_fork(after_in_child=_pool.cache_clear)


def _thread_count() -> int:
    """What numba.set_num_threads asked for, else what Numba would use."""
    # get_num_threads starts Numba's own threads, which nothing here needs and a fork would not survive.
    return numba.get_num_threads() if parallel._is_initialized else numba.config.NUMBA_NUM_THREADS


def for_rows(kernel: Callable, rows: Rows, *arguments) -> None:
    """kernel(first_row, last_row, rows, *arguments) over contiguous parts of the rows, one part per thread."""
    arguments = (rows, *map(_for_kernel, arguments))
    n_parts = min(_thread_count(), rows.n_rows, rows.n_rows * rows.n_cols // LOGITS_PER_THREAD)
    if n_parts <= 1:
        kernel(0, rows.n_rows, *arguments)
        return
    bounds = [rows.n_rows * part // n_parts for part in range(n_parts + 1)]
    others: list[Future] = []
    try:
        for first, last in itertools.pairwise(bounds[1:]):
            try:
                others.append(_pool().submit(kernel, first, last, *arguments))
            except RuntimeError:  # the interpreter is shutting down and starts no threads
                kernel(first, rows.n_rows, *arguments)
                break
        kernel(bounds[0], bounds[1], *arguments)
    except BaseException:
        for other in others:
            other.cancel()
        raise
    finally:
        _wait(others)
    for other in others:
        other.result()


def _wait(parts: list[Future]) -> None:
    """Returns when every part has ended, whatever interrupts: they write into arrays that the caller then frees."""
    interrupt = None
    while True:
        try:
            wait(parts)
            break
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


def _for_kernel(argument):
    """An argument in the form that compiled code takes: no strings."""
    if isinstance(argument, Operand):
        *numbers, dtype = argument
        return Strided(*numbers, STORAGE[dtype](0))
    return argument.pointer if isinstance(argument, Numbers) else argument
