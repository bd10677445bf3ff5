"""Calls on NumPy arrays that were made before, with arrays of the same layout (_recipe.py), on as many threads."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gpusoftmax import _memory, _recipe
from gpusoftmax._arrays import numpy_dtype
from gpusoftmax._recipe import Recipe, Start
from gpusoftmax.kernels.forks import import_module
from gpusoftmax.kernels.operands import SMALL

if TYPE_CHECKING:
    from gpusoftmax.kernels.cpu.program import Program

LINE_BYTES = 64
"""Where in a cache line a large array starts decides how it is written."""
_SMALL = 4096
"""Bytes: no kernel writes so few past the caches, wherever they lie."""


class OnCpu(NamedTuple):
    """A recipe, ready to be followed. Arrays are numbered: those that are given, then those that are made."""

    program: Program
    overlaps: tuple[tuple[int, int, int, int], ...]  # of _recipe.Recipe
    made: tuple[Callable[[], tuple[Any, int]], ...]  # each gives an array and its address
    written: tuple[int, ...]
    results: tuple[int | None, ...] | int
    scalars: tuple[int, ...]


_recipes: dict[tuple, OnCpu | None] = {}
"""None: takes the ordinary way."""


@functools.cache
def _run() -> Any:
    return import_module("gpusoftmax.kernels.cpu.run")


def call(function: Callable[..., Any], arrays: tuple, options: tuple) -> Any:
    """Returns function(*arrays, *options), or what it would return. An array that was not given is None."""
    # True is equal to 1.0, but no temperature.
    key = [function, options, *map(type, options)]
    is_large = add_schedule(key, arrays[0].size)
    given, addresses = [], []
    for array in arrays:
        if array is None:
            key.append(None)
        elif type(array) is np.ndarray:
            address = _memory.address(array)
            given.append(array)
            addresses.append(address)
            # And which other one it is, in a call that works in place.
            key += array.dtype, array.shape, array.strides, addresses.index(address)
            key.append(array.flags.writeable)
            if is_large:
                key.append(address % LINE_BYTES)
        else:
            return function(*arrays, *options)
    key = tuple(key)
    try:
        known = _recipes.get(key, _recipes)
    except TypeError:  # an option that cannot be a key, which the function will complain about
        known = None
    if known is _recipes:
        return record(_recipes, key, function, arrays, options, _maker)
    if known is None or not _recipe.apart(addresses, known.overlaps):
        return function(*arrays, *options)
    for new in known.made:
        array, address = new()
        given.append(array)
        addresses.append(address)
    if not play(known.program, addresses):
        return function(*arrays, *options)
    for number in known.scalars:
        given[number] = given[number][()]
    return results(known, given)


def add_schedule(key: list, size: int) -> bool:
    """Adds how many threads share a call on so many logits: a recipe is for these. Whether it may matter to the call if
    a result starts at a cache line.
    """
    if size <= SMALL:
        return False
    run = _run()
    key.append(run.threads_for(size))
    return run.may_be_streamed(size)


def play(program: Program, addresses: Sequence[int]) -> bool:
    """Does what a recipe says, on arrays at these addresses. Whether that was right: what it has read may be another
    value.
    """
    return _run().play(program, addresses)


def results(known: OnCpu, arrays: Sequence[Any]) -> Any:
    if type(known.results) is int:
        return arrays[known.results]
    return tuple([None if number is None else arrays[number] for number in known.results])


def record(recipes: dict, key: tuple, function: Callable, arrays: tuple, options: tuple, maker: Callable) -> Any:
    """function(*arrays, *options), whose recipe is kept. maker(shape, dtype, n_bytes): of arrays for the caller."""
    if not _recipe.is_plain(arrays, options):
        return function(*arrays, *options)
    result, recipe = _recipe.record(function, arrays, options, _starts)
    _recipe.remember(recipes, key, None if recipe is None else _on_cpu(recipe, maker))
    return result


def _maker(shape: tuple[int, ...], dtype: str, n_bytes: int) -> Callable[[], tuple[np.ndarray, int]]:
    return functools.partial(_memory.aligned_at, shape, numpy_dtype(dtype), n_bytes)


def _new_scalar(dtype: np.dtype) -> tuple[np.ndarray, int]:
    array = np.empty((), dtype)
    return array, _memory.address(array)


def _starts(note: Callable[[Any, Sequence[int]], None]) -> contextlib.AbstractContextManager:
    return _run().recording(lambda start: note(start, start.addresses))


def _on_cpu(recipe: Recipe, maker: Callable) -> OnCpu:
    """What nobody sees, if it is small, lies in the program's own memory: an array takes longer to make than to fill.
    Of what becomes a scalar nobody sees the array.
    """
    program = import_module("gpusoftmax.kernels.cpu.program")
    seen = recipe.results if isinstance(recipe.results, tuple) else (recipe.results,)
    places = {number: (number, 0) for number in range(recipe.n_given)}
    made, own_bytes = [], 0
    for number, (shape, dtype) in enumerate(recipe.made, recipe.n_given):
        n_bytes = math.prod(shape) * numpy_dtype(dtype).itemsize
        if number not in seen and n_bytes <= _SMALL:
            places[number] = program.OWN, own_bytes
            own_bytes += -(-n_bytes // LINE_BYTES) * LINE_BYTES
            continue
        places[number] = recipe.n_given + len(made), 0
        if number in recipe.scalars:
            made.append(functools.partial(_new_scalar, numpy_dtype(dtype)))
        else:
            made.append(maker(shape, dtype, n_bytes))

    def placed(number: int, offset: int = 0) -> tuple[int, int]:
        array, start = places[number]
        return array, start + offset

    steps = []
    for step in recipe.steps:
        if isinstance(step, Start):
            steps.append((step.what, [placed(*where) for where in step.arrays]))
        else:
            steps.append((program.Expect(step.value), [placed(step.number)]))
    results = tuple(None if number is None else places[number][0] for number in seen)
    return OnCpu(
        program=program.assemble(steps, recipe.n_given + len(made), own_bytes),
        overlaps=recipe.overlaps,
        made=tuple(made),
        written=recipe.written,
        results=results if isinstance(recipe.results, tuple) else results[0],
        scalars=tuple(places[number][0] for number in recipe.scalars),
    )
