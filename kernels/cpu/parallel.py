"""The threads that share a call, see pool.py and job.py.

Plain threads over kernels that release Python's lock, instead of Numba's parallel loops: concurrent calls from any
number of Python threads are safe (Numba's workqueue layer would abort the process), and so is the child after a fork
(OpenMP's would not be). A thread that has finished looks out for the next call for a while before it sleeps:
back-to-back calls find it awake.
"""

import atexit
import os
import sys
import threading
from collections.abc import Sequence

import numba
from numba.np.ufunc import parallel as numba_threads

from gpusoftmax.kernels.cpu import pool
from gpusoftmax.kernels.cpu.program import Program


def thread_count() -> int:
    """What numba.set_num_threads asked for, else what Numba would use; 1 where there are no POSIX threads to wait."""
    if os.name != "posix":
        return 1
    # Not by numba.get_num_threads: it starts Numba's own threads, which nothing here needs and a fork would not
    # survive, and takes two locks at every call. A child that was forked meanwhile would wait for one of them for ever,
    # and its parent for the other, which processes share.
    return numba_threads._get_num_threads() if numba_threads._is_initialized else numba.config.NUMBA_NUM_THREADS


class _Threads:
    """Those of this process, started as they are needed."""

    def __init__(self):
        self.pool = pool.new_pool()
        self.address = self.pool.ctypes.data
        # What Numba would call in the end, after a look at the types of the arguments.
        self.play = pool.play.compile(pool.PLAY)
        self.has_looked_for_openmp = _has_forked
        self.started: list[threading.Thread] = []
        self.starting = threading.RLock()

    def at_least(self, count: int) -> None:
        with self.starting:
            while len(self.started) < count:
                pool.serve.compile((numba.int64,))
                thread = threading.Thread(target=pool.serve, args=(self.address,), name="gpusoftmax", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # the interpreter is shutting down and starts no threads
                    return
                self.started.append(thread)


_threads: _Threads | None = None
_making = threading.RLock()  # as `starting`: a signal's handler or a finaliser may call while this thread holds it
_has_forked = False


def _the_threads() -> _Threads:
    """One pool for all: threads would go on looking at the memory of another one, which nobody keeps."""
    global _threads
    with _making:
        if _threads is None:
            made = _Threads()
            _threads = _threads or made  # of a call in between
        return _threads


def _after_fork() -> None:
    """The child has the memory of the pool but none of its threads, and perhaps a lock that one of them held."""
    global _threads, _making, _has_forked
    _threads, _making, _has_forked = None, threading.RLock(), True


def _at_exit() -> None:
    if _threads is not None:
        pool.close(_threads.address)
        for thread in _threads.started:
            thread.join(timeout=1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)


def play(program: Program, addresses: Sequence[int], own: int) -> bool:
    """Runs a program on this thread and as many others as it says, in program.own_bytes at `own`; see pool.play."""
    threads = _threads or _the_threads()
    if program.n_threads > 1:
        if not threads.has_looked_for_openmp and "torch" in sys.modules:
            threads.has_looked_for_openmp = True
            pool.use_openmp(threads.pool)
        if program.n_threads - 1 > len(threads.started):
            threads.at_least(program.n_threads - 1)
    return threads.play(threads.address, program.address, program.pack(*addresses), own)
