"""Calls on NumPy arrays that were made before, with arrays of the same layout: the same kernel at other addresses.

What an op on rows does follows from its options, the layout of its arrays and the number of threads. So the first call
is recorded, and later ones of the same layout start its kernel at once. Whatever is more than one kernel on exactly
the arrays of the call takes the ordinary way.
"""

import functools
import importlib
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from gpusoftmax import _memory

_MAX_RECIPES = 4096
_ALIGNMENT = 64
"""Bytes. Whether an array starts at a cache line is part of its layout: large results are then written otherwise."""


class _Recipe(NamedTuple):
    """The arrays of a call are numbered; a result that the call makes comes last."""

    start: Any  # gpusoftmax.kernels.cpu.run.Start
    numbers: tuple[int, ...]  # which of them each of the kernel's arrays is
    overlaps: tuple[tuple[int, int, int, int], ...]  # two arrays share memory if the distance of the first to
    # the second, in bytes, lies between these two numbers
    made: tuple[tuple[int, ...], np.dtype] | None  # the result, where it was not given


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
            key += array.dtype, array.shape, array.strides, address % _ALIGNMENT, addresses.index(address)
            key.append(array.flags.writeable)
        else:
            return function(*arrays, *options)
    key = tuple(key)
    try:
        recipe = _recipes.get(key, _recipes)
    except TypeError:  # an option that cannot be a key, which the function will complain about
        return function(*arrays, *options)
    if recipe is _recipes:
        return _record(key, function, arrays, options)
    if recipe is None:
        return function(*arrays, *options)
    for one, other, low, high in recipe.overlaps:
        distance = addresses[one] - addresses[other]
        if distance and low < distance < high:
            return function(*arrays, *options)
    result = arrays[-1]
    if recipe.made:
        result = _memory.aligned(*recipe.made)
        addresses.append(_memory.address(result))
    run.start(recipe.start, [addresses[number] for number in recipe.numbers])
    return result


def _record(key: tuple, function: Callable[..., Any], arrays: tuple, options: tuple) -> Any:
    with _cpu("run").recording() as starts:
        result = function(*arrays, *options)
    if len(_recipes) >= _MAX_RECIPES:
        _recipes.clear()
    _recipes[key] = _recipe(starts, arrays, result)
    return result


def _recipe(starts: list, arrays: tuple, result: Any) -> _Recipe | None:
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
    )
