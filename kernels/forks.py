"""What a fork waits for.

A child has the locks that other threads held in its parent, but none of these threads: it would wait for ever. So a
fork takes the locks first, in the order in which calls do.
"""

import importlib
import logging  # noqa: F401  before our own hook is set, which then runs first: an import may want the lock of logging's
import os
import threading
from types import ModuleType

_importing = threading.RLock()
_locks = [_importing]
_held: list = []


def import_module(name: str) -> ModuleType:
    """A module of kernels. With the first one comes Numba, and each module has a lock while it is imported."""
    with _importing:
        return importlib.import_module(name)


def forks_wait_for(lock) -> None:
    """The last one in the order: whoever holds it imports no kernels."""
    _locks.append(lock)


def _before() -> None:
    for lock in _locks:  # more of them, if an import that was waited for has added some
        lock.acquire()
        _held.append(lock)


def _after() -> None:
    while _held:
        _held.pop().release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_after)
