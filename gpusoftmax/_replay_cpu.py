"""Calls on NumPy arrays that were made before, with arrays of the same layout: the same kernel at other addresses.

What an op on rows does follows from its options, the layout of its arrays and the number of threads. So the first call
is recorded, and later ones of the same layout start its kernel at once. Whatever is more than one kernel on exactly
the arrays of the call takes the ordinary way.
"""

import functools
import importlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from gpusoftmax import _memory

MAX_RECIPES = 4096
ALIGNMENT = 64
"""Bytes. Whether an array starts at a cache line is part of its layout: large results are then written otherwise."""


class _Recipe(NamedTuple):
    """The arrays of a call are numbered; a result that the call makes comes last."""

    start: Any  # gpusoftmax.kernels.cpu.run.Start
    numbers: tuple[int, ...]  # which of them each of the kernel's arrays is
    overlaps: tuple[tuple[int, int, int, int], ...]  # two arrays share memory if the distance of the first to
    # the second, in bytes, lies between these two numbers
    made: tuple[tuple[int, ...], np.dtype] | None  # the result, where it was not given
    given: int | None  # which argument it is, where it was


_recipes: dict[tuple, _Recipe | None] = {}
"""None: takes the ordinary way."""


@functools.cache
def _cpu(module: str) -> Any:
    return importlib.import_module(f"gpusoftmax.kernels.cpu.{module}")


def call(function: Callable[..., Any], arrays: tuple, options: tuple) -> Any:
    """Returns function(*arrays, *options), or what it would return. An array that was not given is None."""
    run = _cpu("run")
    # True is equal to 1.0, but no temperature.
    key, addresses = [function, options, *map(type, options), run.threads_for(arrays[0].size)], []
    for array in arrays:
        if array is None:
            key.append(None)
        elif type(array) is np.ndarray:
            address = _memory.address(array)
            addresses.append(address)
            # And which other one it is, in a call that works in place.
            key += array.dtype, array.shape, array.strides, address % ALIGNMENT, addresses.index(address)
            key.append(array.flags.writeable)
        else:
            return function(*arrays, *options)
    key = tuple(key)
    try:
        known = _recipes.get(key, _recipes)
    except TypeError:  # an option that cannot be a key, which the function will complain about
        return function(*arrays, *options)
    if known is _recipes:
        return _record(key, function, arrays, options)
    if known is None or not apart(addresses, known.overlaps):
        return function(*arrays, *options)
    if known.made:
        result = _memory.aligned(*known.made)
        addresses.append(_memory.address(result))
    else:
        result = arrays[known.given]
    start(known, addresses)
    return result


def threads_for(size: int) -> int:
    """How many threads share a call: a recipe is for so many."""
    return _cpu("run").threads_for(size)


def apart(addresses: list[int], overlaps: Sequence[tuple[int, int, int, int]]) -> bool:
    """Whether no two arrays share memory, but for those that start at one address."""
    for one, other, low, high in overlaps:
        distance = addresses[one] - addresses[other]
        if distance and low < distance < high:
            return False
    return True


def start(known: "_Recipe", addresses: list[int]) -> None:
    """The kernel of a recipe, on arrays at these addresses."""
    _cpu("run").start(known.start, [addresses[number] for number in known.numbers])


def recording() -> Any:
    """A context that gives the list of what this thread starts in it."""
    return _cpu("run").recording()


def _record(key: tuple, function: Callable[..., Any], arrays: tuple, options: tuple) -> Any:
    with recording() as starts:
        result = function(*arrays, *options)
    if len(_recipes) >= MAX_RECIPES:
        _recipes.clear()
    _recipes[key] = recipe(starts, arrays, result)
    return result


def recipe(starts: list, arrays: Sequence, result: Any) -> _Recipe | None:
    """What was started, if a later call of the same layout may start it at once."""
    given = [array for array in arrays if array is not None]
    plain = given if any(result is array for array in given) else [*given, result]
    # A stride of 0 or below: element 0 is not where the memory of the array starts, or it ends elsewhere.
    simple = all(type(array) is np.ndarray and array.size and min(array.strides, default=1) > 0 for array in plain)
    if len(starts) != 1 or not simple:
        return None
    addresses = [_memory.address(array) for array in plain]
    if any(operand not in addresses for operand in starts[0].addresses):
        return None
    spans = [
        array.itemsize + sum(stride * (size - 1) for stride, size in zip(array.strides, array.shape, strict=True))
        for array in given
    ]
    return _Recipe(
        start=starts[0],
        numbers=tuple(addresses.index(operand) for operand in starts[0].addresses),
        overlaps=tuple(
            (one, other, -spans[one], spans[other]) for one, other in itertools.combinations(range(len(given)), 2)
        ),
        made=None if plain is given else (result.shape, result.dtype),
        given=next((number for number, array in enumerate(arrays) if array is result), None),
    )
