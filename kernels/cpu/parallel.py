"""The threads that share a call, see job.py.

Plain threads over kernels that release the GIL, instead of Numba's parallel loops: concurrent calls from any number of
Python threads are safe (Numba's workqueue layer would abort the process), and so is the child after a fork (OpenMP's
would not be). A thread that has finished looks out for the next call for a while before it sleeps: back-to-back calls
find it awake.
"""

import collections
import contextlib
import os
import threading
from collections.abc import Callable

import numba
import numpy as np
from numba.np.ufunc import parallel as numba_threads

from gpusoftmax.kernels.cpu.cache import kernel
from gpusoftmax.kernels.cpu.job import NOBODYS_BELL, Job, n_counters, wait_until_other_than
from gpusoftmax.kernels.cpu.vector import pointer_to

# Looks at the bell before a thread sleeps: a fraction of a millisecond, a few times what waking it costs. Nearly all of
# them leave the core to whoever wants it: a thread that only spins costs the next library's threads a slice of 4 ms.
SPINS = 3000


def thread_count() -> int:
    """What numba.set_num_threads asked for, else what Numba would use."""
    # get_num_threads starts Numba's own threads, which nothing here needs and a fork would not survive.
    return numba.get_num_threads() if numba_threads._is_initialized else numba.config.NUMBA_NUM_THREADS


@kernel
def wait_for_bell(bell, seen, spins):
    """The number on the bell as soon as it is not `seen` any more, or `seen` after a while."""
    return wait_until_other_than(pointer_to(bell, bell), 0, seen, spins)


class _Pool:
    """Threads that help with the call of the moment. None is ever waited for before it has drawn an item."""

    def __init__(self):
        self.bell = np.zeros(1, np.int64)
        self.address = self.bell.ctypes.data
        self.epoch = 0
        self.call = None
        self.busy = threading.Lock()  # held by that call
        self.n_threads = 0
        self.sleeping = collections.deque()  # the alarms of threads that sleep

    def invite(self, call: Callable, n_threads: int) -> None:
        """Lets n_threads others run `call` too as soon as the bell shows the next epoch; `call` rings it."""
        self.call = call
        self.epoch += 1
        while self.n_threads < n_threads:
            try:
                threading.Thread(target=self._help, name="gpusoftmax", daemon=True).start()
            except RuntimeError:  # the interpreter is shutting down and starts no threads
                break
            self.n_threads += 1
        for _ in range(n_threads):
            if self.sleeping:
                self.sleeping.pop().release()

    def _help(self) -> None:
        seen = 0
        alarm = threading.Lock()
        alarm.acquire()
        while True:
            now = wait_for_bell(self.address, seen, SPINS)
            if now == seen:
                self.sleeping.append(alarm)
                alarm.acquire()  # until `invite` releases it
                continue
            seen, call = now, self.call
            if call is not None:
                with contextlib.suppress(Exception):  # nothing to compile with, say: the caller meets it as well
                    call()


_pool = _Pool()


def _after_fork() -> None:
    """The child has the pool's books but none of its threads."""
    global _pool
    _pool = _Pool()


os.register_at_fork(after_in_child=_after_fork)


def start(entry: Callable, is_across: int | None, layout: tuple, arguments: list, n_threads: int, n_split: int) -> None:
    """Runs a compiled kernel on this thread and, unless they are at work on another call, on others of the pool.

    layout: the fields of a Job that follow n_threads. n_split: how many rows are split into parts.
    """
    counters = np.zeros(n_counters(n_threads, n_split), np.int64)
    address = counters.__array_interface__["data"][0]
    pool = _pool
    if n_threads == 1 or not pool.busy.acquire(blocking=False):
        entry(is_across, Job(address, address + 8 * NOBODYS_BELL, 0, 1, *layout), *arguments)
        return
    try:
        job = Job(address, pool.address, pool.epoch + 1, n_threads, *layout)

        def call():
            entry(is_across, job, *arguments)
            return counters  # must outlive the call

        try:
            pool.invite(call, n_threads - 1)
            call()
        except BaseException:  # an interrupt: the others write into arrays that the caller is about to let go of
            call()
            raise
    finally:
        pool.call = None
        pool.busy.release()


_compiled: dict[tuple, Callable] = {}


def compiled(kernel: Callable, is_across: int | None, arguments: tuple) -> Callable:
    """The compiled code for arguments of these types, looked up by us: Numba takes 100 us to find out the types."""
    formats = (getattr(argument, "tag", argument).__class__ for argument in arguments)
    key = kernel, is_across, *formats
    entry = _compiled.get(key)
    if entry is None:
        job = Job(*[0] * len(Job._fields))
        entry = _compiled[key] = kernel.compile(tuple(map(numba.typeof, (is_across, job, *arguments))))
    return entry
