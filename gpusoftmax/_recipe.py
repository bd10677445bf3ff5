"""What a call does, recorded, so that later ones with arrays of the same layout do it at once.

What a call does (its checks, its temporary arrays, its kernels and their arguments) follows from its options and from
the layout of its arrays: kind, dtype, shape, strides, place. Addresses take part in two ways:

- an address that a kernel is given is kept as "so many bytes behind element 0 of array number n";
- which arrays are the same memory. A call is replayed if the same of its arrays start at one address, and if the others
  are apart. Whatever overlaps in another way takes the ordinary way, where overlaps are looked at closely.

A call on memory that is neither an argument nor an array it has made itself is not replayed. Values take part where a
call has read one: whether all labels are classes.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from gpusoftmax import _arrays
from gpusoftmax._arrays import Array

MAX_RECIPES = 4096
"""Of one kind of arrays."""
MAX_STEPS = 256
"""Of a recipe, 2 KB each: a call with more, on a batch of many axes that nothing joins, takes the ordinary way."""
_PLAIN = (type(None), bool, int, float, str, type, np.dtype, np.generic)
"""Options whose value cannot change, and which are equal, among those of one type, only if they mean the same."""


class Start(NamedTuple):
    """A kernel is started."""

    what: Any  # gpusoftmax.kernels.cpu.program.Start, or gpusoftmax.kernels.cuda.launch.Launch
    arrays: tuple[tuple[int, int], ...]  # for each of its addresses the number of an array, and bytes behind element 0


class Read(NamedTuple):
    """An int64 that the call has made is read, and was this: if it is another one, the call does something else."""

    number: int
    value: Any


class Recipe(NamedTuple):
    """Arrays are numbered: the arguments that are given, then those that the call makes."""

    steps: tuple[Start | Read, ...]
    overlaps: tuple[tuple[int, int, int, int], ...]  # see _overlaps
    n_given: int
    made: tuple[tuple[tuple[int, ...], str], ...]  # shape and dtype
    written: tuple[int, ...]  # arguments that are results
    results: tuple[int | None, ...] | int  # not a tuple where the call returns none
    scalars: tuple[int, ...]  # results that are returned as NumPy scalars


def apart(addresses: Sequence[int], overlaps: Sequence[tuple[int, int, int, int]]) -> bool:
    """Whether no two arrays share memory, but for those that start at one address."""
    for one, other, low, high in overlaps:
        distance = addresses[one] - addresses[other]
        if distance and low < distance < high:
            return False
    return True


def is_plain(arrays: tuple, options: tuple) -> bool:
    """Whether a call can be recorded: one with arrays that overlap says nothing about those of the same layout."""
    if not all(isinstance(option, _PLAIN) for option in options):
        return False
    try:
        arguments = [_arrays.wrap(array, "an argument") for array in arrays if array is not None]
        return apart([array.pointer for array in arguments], tuple(_overlaps(arguments)))
    except (TypeError, ValueError):  # something that the function itself will complain about
        return False


def record(
    function: Callable[..., Any],
    arrays: tuple,
    options: tuple,
    recording: Callable[[Callable[[Any, Sequence[int]], None]], contextlib.AbstractContextManager],
) -> tuple[Any, Recipe | None]:
    """(function(*arrays, *options), how to do it again, if it can be), of a call that is_plain.

    An array that was not given is None.
    recording(note): while it is entered, note(what, addresses) is called for every kernel that is started.
    """
    given = [array for array in arrays if array is not None]
    arguments = [_arrays.wrap(array, "an argument") for array in given]
    steps: list[Start | Read] = []

    def note(what: Any, addresses: Sequence[int]) -> None:
        # At once: memory that a call has from elsewhere may later become that of an array it makes.
        known = *arguments, *made.arrays
        steps.append(Start(what, tuple(_place(address, known) for address in addresses)))

    def note_read(array: Array, value: Any) -> None:
        number, _ = _place(array.pointer, (*arguments, *made.arrays))
        steps.append(Read(number, value))

    # `made` must not lead to these functions, which lead to it: in a cycle, arrays would outlive their last use.
    with _arrays.recording(note_read) as made, recording(note):
        result = function(*arrays, *options)
    told = result if isinstance(result, tuple) else (result,)
    numbers = tuple(None if one is None else _number(one, given, made) for one in told)
    is_whole = made.is_all and len(steps) <= MAX_STEPS
    if not is_whole or _NOT_OURS in numbers or any(_is_elsewhere(step) for step in steps):
        return result, None
    made_results = [(number, one) for number, one in zip(numbers, told, strict=True) if number is not None]
    return result, Recipe(
        steps=tuple(steps),
        overlaps=tuple(_overlaps(arguments)),
        n_given=len(given),
        made=tuple((array.shape, array.dtype) for array in made.arrays),
        written=tuple(number for number, _ in made_results if number < len(given)),
        results=numbers if isinstance(result, tuple) else numbers[0],
        scalars=tuple(number for number, one in made_results if isinstance(one, np.generic)),
    )


def remember(recipes: dict, key: tuple, recipe: Any) -> None:
    """None: the call takes the ordinary way."""
    if len(recipes) >= MAX_RECIPES:
        recipes.clear()
    recipes[key] = recipe


_NOT_OURS = -1


def _overlaps(arrays: Sequence[Array]) -> Iterator[tuple[int, int, int, int]]:
    """(one, other, low, high) for every two arrays: they overlap if low < address of one - address of other < high."""
    for (one, (low, high)), (other, (other_low, other_high)) in itertools.combinations(
        enumerate(array.reach for array in arrays), 2
    ):
        yield one, other, other_low - high, other_high - low


def _place(address: int, arrays: Sequence[Array]) -> tuple[int, int]:
    """The number of the array that an address lies in, and how far behind its element 0."""
    for number, array in enumerate(arrays):
        low, high = array.span
        if low <= address < high:
            return number, address - array.pointer
    return _NOT_OURS, 0


def _number(one: Any, given: Sequence[Any], made: _arrays.Made) -> int:
    """The number of the array that a result is."""
    for number, array in enumerate(given):
        if array is one:
            return number
    for told, array in made.results:
        if told is one:
            return len(given) + next(k for k, known in enumerate(made.arrays) if known.owner is array.owner)
    return _NOT_OURS


def _is_elsewhere(step: Start | Read) -> bool:
    numbers = [step.number] if isinstance(step, Read) else [number for number, _ in step.arrays]
    return _NOT_OURS in numbers
