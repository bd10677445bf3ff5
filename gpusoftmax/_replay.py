"""Calls that were made before, with arrays of the same layout (_recipe.py); here those on a GPU.

A replayed call starts its kernels in a quarter of the time. One that waits for the device is not replayed.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gpusoftmax import _arrays, _compilers, _recipe, _replay_cpu, _replay_torch
from gpusoftmax.kernels.forks import import_module
from gpusoftmax.kernels.operands import Place

if TYPE_CHECKING:
    from gpusoftmax.kernels.cuda import driver
    from gpusoftmax.kernels.cuda.launch import Launch
    from gpusoftmax.kernels.cuda.plan import Plan

_WIDEST_ACCESS = 16
"""Bytes. The alignment of an array, up to this, is part of its layout: a kernel may be chosen by it."""


class _Start(NamedTuple):
    """A kernel to start. Word `position` is the address of array `number`, plus an offset in bytes."""

    kernel: Any  # as driver.load returns it
    plan: Plan
    words: tuple
    addresses: tuple[tuple[int, int, int], ...]  # (position, number, offset)


class _OnGpu(NamedTuple):
    """A recipe with all that it takes on a device."""

    place: Place
    device: driver.Device
    starts: tuple[_Start, ...]
    made: tuple[tuple[tuple[int, ...], np.dtype], ...]
    recipe: _recipe.Recipe


_UNKNOWN = object()
_recipes: dict[tuple, _OnGpu | None] = {}
"""None: cannot be replayed."""


@_compilers.opaque
def call(function: Callable[..., Any], arrays: tuple, *options: Any) -> Any:
    """Returns function(*arrays, *options), or what it would return. An array that was not given is None."""
    if _compilers.follows():
        return _compilers.unfollowed(function, *arrays, *options)
    if type(arrays[0]) is np.ndarray:
        return _replay_cpu.call(function, arrays, options)
    if _arrays.is_torch_on_cpu(arrays[0]):
        return _replay_torch.call(function, arrays, options)
    try:
        given, pointers, key = _layout(function, arrays, options)
        known = _recipes.get(key, _UNKNOWN)
    except (TypeError, ValueError):  # not for the GPU, or something that the function itself will complain about
        known = None
    if known is None:
        return function(*arrays, *options)
    driver = _cuda("driver")
    if known is _UNKNOWN or known.device is not driver.device(known.place.device):
        return record(key, function, arrays, options)
    if not _recipe.apart(pointers, known.recipe.overlaps):
        return function(*arrays, *options)
    return _replay(known, given, pointers, driver.launch)


@functools.cache
def _cuda(module: str) -> Any:
    """A module of the GPU's host half, which is imported with the first array on one."""
    return import_module(f"gpusoftmax.kernels.cuda.{module}")


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


def _replay(known: _OnGpu, arrays: list[Any], pointers: list[int], launch: Callable[..., None]) -> Any:
    """`arrays` and `pointers` are the arguments'; those that the call makes are added."""
    place, _, starts, made, recipe = known
    if made:
        _arrays.make_beside(arrays, pointers, made, place)
    for kernel, plan, words, addresses in starts:
        words = list(words)
        for position, number, offset in addresses:
            words[position] = pointers[number] + offset
        launch(kernel, plan, place.stream, tuple(words))
    for number in recipe.written:
        _arrays.written(arrays[number])
    results = recipe.results
    if type(results) is int:
        return arrays[results]
    return tuple([None if number is None else arrays[number] for number in results])


def record(key: tuple, function: Callable[..., Any], arrays: tuple, options: tuple) -> Any:
    if not _recipe.is_plain(arrays, options):
        return function(*arrays, *options)
    result, recipe = _recipe.record(function, arrays, options, _launches)
    waits = recipe is None or any(isinstance(step, _recipe.Read) for step in recipe.steps)
    place = _arrays.wrap(arrays[0], "an argument").place
    _recipe.remember(_recipes, key, None if waits else _on_gpu(recipe, place))
    return result


def _launches(note: Callable[[Launch, Sequence[int]], None]) -> contextlib.AbstractContextManager:
    return _cuda("launch").recording(lambda launch: note(launch, [launch.words[k] for k in _addresses(launch)]))


def _addresses(launch: Launch) -> list[int]:
    """The positions of the words that are addresses: 0 is none, and stays."""
    return [position for position in launch.addresses if launch.words[position]]


def _on_gpu(recipe: _recipe.Recipe, place: Place) -> _OnGpu:
    driver = _cuda("driver")
    device = driver.device(place.device)
    starts = []
    for launch, where in recipe.steps:
        addresses = tuple((position, *one) for position, one in zip(_addresses(launch), where, strict=True))
        kernel = driver.load(launch.image, device, place.stream)
        starts.append(_Start(kernel, launch.plan, launch.words, addresses))
    made = tuple((shape, _arrays.numpy_dtype(dtype)) for shape, dtype in recipe.made)
    return _OnGpu(place, device, tuple(starts), made, recipe)
