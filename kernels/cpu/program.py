"""Calls of kernels, one after the other, as one: Python starts it once, with the addresses of its arrays.

A program is words of 8 bytes:

    head      the number of turns, of places, and of the words behind these
    places    PLACE words for each address behind them: which word it is; the number of an array that is given, or OWN;
              and how many bytes behind that it lies
    turns     TURN words for each: a kernel's C function, its call, and how many threads help with it; or 0, the address
              of an int64, and what that has to be: if it is another one, nothing more is done
    calls     see call.py

Turns and calls are copied into the memory that a run has to itself, where arrays that nobody else sees, and the scratch
memory of the kernels, come behind them: OWN is the start of it.
"""

import functools
import itertools
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from gpusoftmax.kernels.cpu.call import WORKSPACE
from gpusoftmax.kernels.cpu.memory import CACHE_LINE

N_TURNS, N_PLACES, SIZE = range(3)
PLACES = 3
PLACE, TURN = 3, 3
OWN = -1
_LINE_WORDS = CACHE_LINE // 8


class Start(NamedTuple):
    """A call of a kernel, laid out: all of it that follows from the layout of its arrays."""

    entry: int  # address of the kernel's C function
    block: np.ndarray  # call.py
    positions: tuple[int, ...]  # the words that are addresses of arrays, which follow in this order
    addresses: tuple[int, ...]
    n_threads: int
    workspace_bytes: int


class Expect(NamedTuple):
    """An int64 has to be this."""

    value: int


class Program(NamedTuple):
    words: np.ndarray
    address: int
    pack: Callable[..., bytes]  # the addresses of the arrays that are given
    n_threads: int  # the most that take part in a turn
    own_bytes: int


def assemble(
    steps: Sequence[tuple[Start | Expect, Sequence[tuple[int, int]]]], n_given: int, own_bytes: int = 0
) -> Program:
    """The program of these steps. Beside each its addresses: (number of an array, bytes behind it), or OWN and bytes
    behind the start of the arrays that nobody else sees, which take own_bytes.
    """
    turns, places, calls = [], [], []
    size = _whole_lines(TURN * len(steps))
    for turn, (step, where) in zip(range(0, TURN * len(steps), TURN), steps, strict=True):
        if isinstance(step, Expect):
            turns += 0, 0, step.value
            places.append((turn + 1, *where[0]))
            continue
        turns += step.entry, 0, step.n_threads - 1
        places += [(size + position, *one) for position, one in zip(step.positions, where, strict=True)]
        calls.append((turn + 1, size, step))
        size = _whole_lines(size + step.block.size)
    arrays, scratch = 8 * size, 8 * _whole_lines(size + -(-own_bytes // 8))
    places = [(word, number, offset + arrays * (number == OWN)) for word, number, offset in places]
    for word, first, _ in calls:
        places += (word, OWN, 8 * first), (first + WORKSPACE, OWN, scratch)
    behind = PLACES + PLACE * len(places)
    words = np.zeros(behind + size, np.int64)
    words[: behind + len(turns)] = [len(steps), len(places), size, *itertools.chain.from_iterable(places), *turns]
    for _, first, call in calls:
        words[behind + first : behind + first + call.block.size] = call.block
    starts = [call for _, _, call in calls]
    return Program(
        words=words,
        address=words.ctypes.data,
        pack=_words(n_given).pack,
        n_threads=max((call.n_threads for call in starts), default=0),
        own_bytes=scratch + max((call.workspace_bytes for call in starts), default=0),
    )


@functools.cache
def _words(count: int) -> struct.Struct:
    return struct.Struct(f"{count}q")


def _whole_lines(words: int) -> int:
    return -(-words // _LINE_WORDS) * _LINE_WORDS
