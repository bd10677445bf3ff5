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

from gpusoftmax import _arrays

_MAX_RECIPES = 4096
_ALIGNMENT = 64
"""Bytes. Whether an array starts at a cache line is part of its layout: large results are then written otherwise."""


class _Recipe(NamedTuple):
    start: Any  # gpusoftmax.kernels.cpu.run.Start
    numbers: tuple[int, ...]  # which of the call's arrays each of the kernel's is
    spans: tuple[int, ...]  # bytes from element 0 of each array to its end
    made: tuple[tuple[int, ...], np.dtype] | None  # the result, where it was not given


_recipes: dict[tuple, _Recipe | None] = {}
"""None: takes the ordinary way."""


@functools.cache
def _cpu(module: str) -> Any:
    return importlib.import_module(f"gpusoftmax.kernels.cpu.{module}")


def call(function: Callable[..., Any], arrays: tuple, options: tuple) -> Any:
    """Returns function(*arrays, *options), or what it would return. An array that was not given is None."""
    key, addresses = [function, _cpu("parallel").thread_count()], []
    for array in arrays:
        if array is None:
            key.append(None)
        elif type(array) is np.ndarray:
            interface = array.__array_interface__
            address, is_read_only = interface["data"]
            addresses.append(address)
            key += array.dtype, interface["shape"], interface["strides"], is_read_only, address % _ALIGNMENT
            key.append(addresses.index(address))  # which other one it is, in a call that works in place
        else:
            return function(*arrays, *options)
    key = (*key, *options, *map(type, options))  # True is equal to 1.0, but no temperature
    try:
        recipe = _recipes.get(key, _recipes)
    except TypeError:  # an option that cannot be a key, which the function will complain about
        return function(*arrays, *options)
    if recipe is _recipes:
        return _record(key, function, arrays, options)
    if recipe is None or not _apart(addresses, recipe.spans):
        return function(*arrays, *options)
    result = arrays[-1]
    if recipe.made:
        result = _arrays.aligned(*recipe.made)
        addresses.append(result.__array_interface__["data"][0])
    _cpu("run").start(recipe.start, [addresses[number] for number in recipe.numbers])
    return result


def _apart(addresses: list[int], spans: tuple[int, ...]) -> bool:
    """Whether any two arrays are either at one address or share no memory."""
    for (one, size), (other, other_size) in itertools.combinations(zip(addresses, spans, strict=False), 2):
        if one != other and one < other + other_size and other < one + size:
            return False
    return True


def _record(key: tuple, function: Callable[..., Any], arrays: tuple, options: tuple) -> Any:
    with _cpu("run").recording() as starts:
        result = function(*arrays, *options)
    if len(_recipes) >= _MAX_RECIPES:
        _recipes.clear()
    _recipes[key] = _recipe(starts, arrays, result)
    return result


def _recipe(starts: list, arrays: tuple, result: Any) -> _Recipe | None:
    plain = [array for array in arrays if array is not None]
    made = None
    if all(result is not array for array in plain):
        made = getattr(result, "shape", None), getattr(result, "dtype", None)
        plain.append(result)
    # A stride of 0 or below: element 0 is not where the memory of the array starts, or it ends elsewhere.
    simple = all(type(array) is np.ndarray and array.size and min(array.strides, default=1) > 0 for array in plain)
    if len(starts) != 1 or not simple:
        return None
    addresses = [array.__array_interface__["data"][0] for array in plain]
    operands = [starts[0].arguments[position].address for position in starts[0].arrays]
    if any(operand not in addresses for operand in operands):
        return None
    spans = tuple(
        array.itemsize + sum(stride * (size - 1) for stride, size in zip(array.strides, array.shape, strict=True))
        for array in plain
    )
    return _Recipe(starts[0], tuple(addresses.index(operand) for operand in operands), spans, made)
