"""Calls on a GPU that were made before, with arrays of the same layout: the same kernels with other addresses.

What a call does (its checks, its temporary arrays, its kernels and their arguments) follows from its options and from
the layout of its arrays: kind, dtype, shape, strides, device and stream. So the first call is recorded, and later ones
of the same layout start the recorded kernels at once, in a quarter of the time. Addresses take part in two ways:

- a word of a launch that is an address is kept as "so many bytes behind element 0 of array number n";
- which arrays are the same memory. A call is replayed if the same of its arrays start at one address, and if the others
  are apart. Whatever overlaps in another way takes the ordinary way, where overlaps are looked at closely.

A call that waits for the device, or works on memory that is neither an argument nor an array it has made itself, is not
replayed.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gpusoftmax import _arrays, _replay_cpu, _replay_torch
from gpusoftmax._arrays import Array
from gpusoftmax.kernels.operands import Place

if TYPE_CHECKING:
    from gpusoftmax.kernels.cuda import driver, launch
    from gpusoftmax.kernels.cuda.plan import Plan

_MAX_RECIPES = 4096
_WIDEST_ACCESS = 16
"""Bytes. The alignment of an array, up to this, is part of its layout: a kernel may be chosen by it."""
_PLAIN = (type(None), bool, int, float, str, type, np.dtype)
"""Options whose value cannot change, and which are equal, among those of one type, only if they mean the same."""


class _Start(NamedTuple):
    """A kernel to start. Word `position` is the address of array `number`, plus an offset in bytes."""

    kernel: Any  # as driver.load returns it
    plan: Plan
    words: tuple
    addresses: tuple[tuple[int, int, int], ...]  # (position, number, offset)


class _Recipe(NamedTuple):
    """What a call does. Arrays are numbered: the arguments, then those that the call makes."""

    place: Place
    device: driver.Device
    overlaps: tuple[tuple[int, int, int, int], ...]  # see _overlaps
    made: tuple[tuple[tuple[int, ...], np.dtype], ...]  # shape and dtype
    starts: tuple[_Start, ...]
    written: tuple[int, ...]  # numbers of arguments that are results
    results: tuple[int | None, ...] | int  # numbers; not a tuple where the call returns none


_UNKNOWN = object()
_recipes: dict[tuple, _Recipe | None] = {}
"""None: cannot be replayed."""


def call(function: Callable[..., Any], arrays: tuple, *options: Any) -> Any:
    """Returns function(*arrays, *options), or what it would return. An array that was not given is None."""
    if type(arrays[0]) is np.ndarray:
        return _replay_cpu.call(function, arrays, options)
    if _arrays.is_torch_on_cpu(arrays[0]):
        return _replay_torch.call(function, arrays, options)
    try:
        given, pointers, key = _layout(function, arrays, options)
        recipe = _recipes.get(key, _UNKNOWN)
    except (TypeError, ValueError):  # not for the GPU, or something that the function itself will complain about
        return function(*arrays, *options)
    driver = _cuda("driver")
    if recipe is _UNKNOWN or (recipe and recipe.device is not driver.device(recipe.place.device)):
        return _record(key, given, function, arrays, options)
    if recipe is None or not _apart(pointers, recipe.overlaps):
        return function(*arrays, *options)
    return _replay(recipe, given, pointers, driver.launch)


@functools.cache
def _cuda(module: str) -> Any:
    """A module of the GPU's host half, which is imported with the first array on one."""
    return importlib.import_module(f"gpusoftmax.kernels.cuda.{module}")


def _layout(function, arrays: tuple, options: tuple) -> tuple[list[Any], list[int], tuple]:
    """The arrays that are given, their addresses, and all else that decides what the call does.

    TypeError for arrays that are not on a GPU.
    """
    given, pointers = [], []
    key = [function, options, *map(type, options)]
    for array in arrays:
        if array is None:
            key.append(None)
        else:
            layout, pointer = _arrays.on_gpu(array)
            given.append(array)
            pointers.append(pointer)
            # Which other one starts at the same address, and whether it may be accessed by vectors.
            key += layout, pointers.index(pointer), pointer % _WIDEST_ACCESS
    return given, pointers, tuple(key)


def _overlaps(arrays: Sequence[Array]) -> Iterator[tuple[int, int, int, int]]:
    """(one, other, low, high) for every two arrays: they overlap if low < address of one - address of other < high."""
    for (one, (low, high)), (other, (other_low, other_high)) in itertools.combinations(
        enumerate(array.reach for array in arrays), 2
    ):
        yield one, other, other_low - high, other_high - low


def _apart(pointers: Sequence[int], overlaps: Sequence[tuple[int, int, int, int]]) -> bool:
    """Whether no two arrays share memory, but for those that start at one address."""
    for one, other, low, high in overlaps:
        distance = pointers[one] - pointers[other]
        if distance and low < distance < high:
            return False
    return True


def _replay(recipe: _Recipe, arrays: list[Any], pointers: list[int], launch: Callable[..., None]) -> Any:
    """`arrays` and `pointers` are the arguments'; those that the call makes are added."""
    place, _, _, made, starts, written, results = recipe
    if made:
        _arrays.make_beside(arrays, pointers, made, place)
    for kernel, plan, words, addresses in starts:
        words = list(words)
        for position, number, offset in addresses:
            words[position] = pointers[number] + offset
        launch(kernel, plan, place.stream, tuple(words))
    for number in written:
        _arrays.written(arrays[number])
    if type(results) is int:
        return arrays[results]
    return tuple([None if number is None else arrays[number] for number in results])


def _record(key: tuple, given: list[Any], function, arrays: tuple, options: tuple) -> Any:
    arguments = [_arrays.wrap(array, "an argument") for array in given]
    overlaps = tuple(_overlaps(arguments))
    plain = all(isinstance(option, _PLAIN) for option in options)
    if not plain or not _apart([array.pointer for array in arguments], overlaps):
        return function(*arrays, *options)
    with _arrays.recording() as made, _cuda("launch").recording() as launches:
        result = function(*arrays, *options)
    everything = [*arguments, *made.arrays]
    results = result if isinstance(result, tuple) else (result,)
    place, driver = arguments[0].place, _cuda("driver")
    device = driver.device(place.device)
    starts = [_located(one, driver.load(one.image, device, place.stream), everything) for one in launches]
    numbers = [None if one is None else _number([array.owner is one for array in everything]) for one in results]
    if len(_recipes) >= _MAX_RECIPES:
        _recipes.clear()
    if made.waited or None in starts or _NOT_OURS in numbers:
        _recipes[key] = None
    else:
        shapes = tuple((array.shape, _arrays.numpy_dtype(array.dtype)) for array in made.arrays)
        written = tuple(number for number in numbers if number is not None and number < len(arguments))
        numbers = tuple(numbers) if isinstance(result, tuple) else numbers[0]
        _recipes[key] = _Recipe(place, device, overlaps, shapes, tuple(starts), written, numbers)
    return result


def _located(start: launch.Launch, kernel: Any, arrays: Sequence[Array]) -> _Start | None:
    """The launch of `kernel` with its addresses told by the arrays that they lie in; None if one lies in none."""
    addresses = []
    for position in start.addresses:
        address = start.words[position]
        if address:
            number = _number([array.span[0] <= address < array.span[1] for array in arrays])
            if number == _NOT_OURS:
                return None
            addresses.append((position, number, address - arrays[number].pointer))
    return _Start(kernel, start.plan, start.words, tuple(addresses))


_NOT_OURS = -1


def _number(is_it: list[bool]) -> int:
    """The number of the array that it is."""
    return is_it.index(True) if True in is_it else _NOT_OURS
