"""Threads that wait for calls and help with them, without a look at Python: they never need its lock.

    BELL      how many calls have been shared
    SEATS     how many threads may still join the one that is going on; who takes a seat
    LEFT      says so when it leaves
    ENTRY     the kernel's C function, and the address of the call
    BUSY      1: a call is going on. Others run on their own thread alone
    SLEEPING  how many threads wait for the bell asleep

The caller takes the seats that are left away when there is no more to do, and waits for those who had taken one: after
that nobody looks at the call any more. A thread that gets no core takes no seat, so nobody waits for it.
"""

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gpusoftmax.kernels.cpu import openmp
from gpusoftmax.kernels.cpu.cache import device, kernel
from gpusoftmax.kernels.cpu.call import c_function, run_entry
from gpusoftmax.kernels.cpu.job import (
    LINE,
    LOOKS,
    atomic_add,
    atomic_exchange,
    atomic_load,
    atomic_replace,
    atomic_store,
    call_c,
    pause,
    wait_until_at_least,
)
from gpusoftmax.kernels.cpu.memory import (
    address_of,
    pointer_to,
)
from gpusoftmax.kernels.cpu.program import N_PLACES, N_TURNS, OWN, PLACE, PLACES, SIZE, TURN

BELL, SEATS, LEFT, ENTRY, BUSY, SLEEPING, _MUTEX, _CONDITION, _END = (k * 2 * LINE for k in range(9))
CALL = ENTRY + 1
# Addresses of functions, see openmp.py; TAKE_PART as a C function. 0: there are none.
OPENMP, TEAM_SIZE, TAKE_PART = ENTRY + 2, ENTRY + 3, ENTRY + 4
NO_MORE_WORK = LEFT + 1  # when the first thread of OpenMP found nothing more to do
NOT_BEFORE = BUSY + 1  # no call is shared with OpenMP before that time,
TOO_LATE = 1_000_000  # after one that waited so many ns for a thread: it got no core, for no item takes a tenth of it.
PATIENCE = 10  # Waiting takes an eleventh of the time at most.
CLOSED = -(2**62)  # on the bell, or a little more: those who share ring it all the same
# A pthread_mutex_t and a pthread_cond_t have 128 bytes each, more than they take on any system.


def new_pool() -> np.ndarray:
    """The memory of a pool, which has to outlive its threads."""
    pool = np.zeros(_END, np.int64)
    prepare(pool.ctypes.data)
    return pool


def use_openmp(pool: np.ndarray) -> None:
    """Shares calls with the threads of an OpenMP library from now on, if there is one."""
    pool[TAKE_PART] = c_function(take_part, types.int64)
    pool[OPENMP], pool[TEAM_SIZE] = openmp.functions()


def _of_threads(name: str, *fields: int):
    """An intrinsic that calls a function of the C library with fields of the pool; field None: a null pointer."""

    @intrinsic
    def call(typingctx, words):
        def codegen(context, builder, signature, args):
            byte = ir.IntType(8).as_pointer()
            places = [
                ir.Constant(byte, None)
                if field is None
                else builder.bitcast(builder.gep(args[0], [ir.Constant(ir.IntType(64), field)]), byte)
                for field in fields
            ]
            call_c(builder, f"pthread_{name}", *places)
            return context.get_dummy_value()

        return types.void(words), codegen

    return call


_init_mutex = _of_threads("mutex_init", _MUTEX, None)
_init_condition = _of_threads("cond_init", _CONDITION, None)
_lock = _of_threads("mutex_lock", _MUTEX)
_unlock = _of_threads("mutex_unlock", _MUTEX)
_sleep = _of_threads("cond_wait", _CONDITION, _MUTEX)
_wake_one = _of_threads("cond_signal", _CONDITION)


@kernel
def prepare(pool):
    words = pointer_to(pool, pool)
    _init_mutex(words)
    _init_condition(words)


@device
def _wait_for_bell(words, heard):
    """The number on the bell as soon as it is another one than was heard. Looks for a while before it sleeps."""
    for _ in range(LOOKS):
        if atomic_load(words, BELL) != heard:
            return
        pause()
    _lock(words)
    # Adding 0 reads in the one order of all atomic operations: either this thread sees the bell, or who rang it sees
    # that somebody sleeps.
    atomic_add(words, SLEEPING, 1)
    while atomic_add(words, BELL, 0) == heard:
        _sleep(words)
    atomic_add(words, SLEEPING, -1)
    _unlock(words)


@kernel
def serve(pool):
    """What a thread does that helps. It returns when the pool is closed."""
    words = pointer_to(pool, pool)
    heard = 0
    while heard >= 0:
        _wait_for_bell(words, heard)
        heard = atomic_load(words, BELL)
        seats = atomic_load(words, SEATS)
        while seats > 0:
            if atomic_replace(words, SEATS, seats, seats - 1):
                run_entry(atomic_load(words, ENTRY), atomic_load(words, CALL))
                atomic_add(words, LEFT, 1)
                break
            seats = atomic_load(words, SEATS)


@kernel
def close(pool):
    """Sends the threads home for good: code and memory go when the interpreter ends. Calls are no longer shared."""
    words = pointer_to(pool, pool)
    atomic_store(words, BELL, CLOSED)
    _lock(words)
    for _ in range(atomic_load(words, SLEEPING)):
        _wake_one(words)
    _unlock(words)


@kernel
def take_part(pool):
    """What a thread of OpenMP does."""
    words = pointer_to(pool, pool)
    run_entry(atomic_load(words, ENTRY), atomic_load(words, CALL))
    atomic_replace(words, NO_MORE_WORK, 0, openmp.now())


@device
def _share_with_openmp(words, pool, n_threads):
    atomic_store(words, NO_MORE_WORK, 0)
    openmp.parallel(words[OPENMP], words[TAKE_PART], pool, n_threads)
    now = openmp.now()
    waited = now - words[NO_MORE_WORK]
    if waited > TOO_LATE:
        words[NOT_BEFORE] = now + PATIENCE * waited


@device
def _share_with_own(words, entry, call, n_helpers):
    atomic_store(words, LEFT, 0)
    atomic_store(words, SEATS, n_helpers)
    atomic_add(words, BELL, 1)
    if atomic_add(words, SLEEPING, 0) > 0:
        _lock(words)
        for _ in range(n_helpers):
            _wake_one(words)
        _unlock(words)
    run_entry(entry, call)
    taken = n_helpers - atomic_exchange(words, SEATS, 0)
    wait_until_at_least(words, LEFT, taken)


@device
def _share(words, pool, entry, call, n_helpers):
    """Runs a call on this thread and, unless they are at work on another one, on n_helpers more."""
    if n_helpers > 0 and atomic_replace(words, BUSY, 0, 1):
        atomic_store(words, ENTRY, entry)
        atomic_store(words, CALL, call)
        with_openmp = words[OPENMP] != 0 and openmp.now() >= words[NOT_BEFORE]
        if with_openmp and openmp.team_size(words[TEAM_SIZE]) == n_helpers + 1:
            _share_with_openmp(words, pool, n_helpers + 1)
        else:
            _share_with_own(words, entry, call, n_helpers)
        atomic_store(words, BUSY, 0)
    else:
        run_entry(entry, call)


@kernel
def play(pool, program, addresses, own):
    """Runs a program (program.py) in memory of its `own`; whether it came to its end."""
    words, given = pointer_to(program, program), pointer_to(address_of(addresses), program)
    private = pointer_to(own, own)
    n_places = words[N_PLACES]
    behind = PLACES + PLACE * n_places
    for k in range(words[SIZE]):
        private[k] = words[behind + k]
    for k in range(PLACES, behind, PLACE):
        number = words[k + 1]
        private[words[k]] = (own if number == OWN else given[number]) + words[k + 2]
    for turn in range(0, TURN * words[N_TURNS], TURN):
        entry, address, number = private[turn], private[turn + 1], private[turn + 2]
        if entry != 0:
            _share(pointer_to(pool, pool), pool, entry, address, number)
        elif pointer_to(address, address)[0] != number:
            return False
    return True


PLAY = types.int64, types.int64, numba.typeof(b""), types.int64
