"""Calls on NumPy arrays that were made before, with arrays of the same layout (_recipe.py), on as many threads."""

import contextlib
import functools
import importlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from gpusoftmax import _memory, _recipe
from gpusoftmax._arrays import numpy_dtype
from gpusoftmax._recipe import Read, Recipe, Start

LINE_BYTES = 64
"""Where in a cache line a large array starts decides how it is written."""
_recipes: dict[tuple, Recipe | None] = {}
"""None: takes the ordinary way."""


@functools.cache
def _run() -> Any:
    return importlib.import_module("gpusoftmax.kernels.cpu.run")


def call(function: Callable[..., Any], arrays: tuple, options: tuple) -> Any:
    """Returns function(*arrays, *options), or what it would return. An array that was not given is None."""
    # True is equal to 1.0, but no temperature.
    size = arrays[0].size
    key = [function, options, *map(type, options), threads_for(size)]
    is_large = may_be_streamed(size)
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
            flags = array.flags  # elements that are not aligned are copied first
            key += flags.writeable, flags.aligned
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
        return _record(key, function, arrays, options)
    if known is None or not _recipe.apart(addresses, known.overlaps):
        return function(*arrays, *options)
    for new, shape, dtype in known.made:
        array = new(shape, dtype)
        given.append(array)
        addresses.append(_memory.address(array))
    if not play(known.steps, given, addresses):
        return function(*arrays, *options)
    for number in known.scalars:
        given[number] = given[number][()]
    return results(known, given)


def threads_for(size: int) -> int:
    """How many threads share a call: a recipe is for so many."""
    return _run().threads_for(size)


def may_be_streamed(size: int) -> bool:
    """Whether it may matter to a call on so many logits if a result starts at a cache line."""
    return _run().may_be_streamed(size)


def play(steps: Sequence[Start | Read], arrays: Sequence[Any], addresses: Sequence[int]) -> bool:
    """Does what a recipe says, on these arrays. Whether that was right: what it has read may be another value."""
    start = _run().start
    for step in steps:
        if type(step) is Read:
            if arrays[step.number].item() != step.value:
                return False
        else:
            what, where = step
            start(what, [addresses[number] + offset for number, offset in where])
    return True


def results(known: Recipe, arrays: Sequence[Any]) -> Any:
    if type(known.results) is int:
        return arrays[known.results]
    return tuple([None if number is None else arrays[number] for number in known.results])


def recorded(function: Callable[..., Any], arrays: tuple, options: tuple) -> tuple[Any, Recipe | None]:
    """`_recipe.record` of a call whose kernels run on the CPU."""
    result, recipe = _recipe.record(function, arrays, options, _starts)
    return result, None if recipe is None else recipe._replace(steps=tuple(_in_turn(recipe)))


def _in_turn(recipe: Recipe) -> Iterator[Start | Read]:
    """The steps, with kernels that follow each other on one thread as one. What is read between them is looked at by
    that one, which goes on only if it is as it was, and then here.
    """
    for alone, steps in itertools.groupby(recipe.steps, lambda step: _is_alone(step, recipe)):
        steps = tuple(steps)
        starts = [number for number, step in enumerate(steps) if type(step) is Start]
        is_read_twice = any(type(one) is type(other) is Read for one, other in itertools.pairwise(steps))
        if not alone or len(starts) < 2 or is_read_twice:
            yield from steps
            continue
        calls, expected, where = [], [], []
        for number in starts:
            what, arrays = steps[number]
            before = steps[number - 1] if number and type(steps[number - 1]) is Read else None
            calls.append(what)
            expected.append(None if before is None else before.value)
            where += arrays if before is None else (*arrays, (before.number, 0))
        joined = importlib.import_module("gpusoftmax.kernels.cpu.in_turn").joined
        yield Start(joined(calls, expected), tuple(where))
        yield from (step for step in steps if type(step) is Read)


def _is_alone(step: Start | Read, recipe: Recipe) -> bool:
    """Whether a step is a kernel on one thread, or the reading of an int64 that the call has made."""
    if type(step) is Start:
        return step.what.n_threads <= 1
    made = step.number - recipe.n_given
    return made >= 0 and recipe.made[made][1] == "int64"


def _starts(note: Callable[[Any, Sequence[int]], None]) -> contextlib.AbstractContextManager:
    return _run().recording(lambda start: note(start, start.addresses))


def _record(key: tuple, function: Callable[..., Any], arrays: tuple, options: tuple) -> Any:
    if not _recipe.is_plain(arrays, options):
        return function(*arrays, *options)
    result, recipe = recorded(function, arrays, options)
    _recipe.remember(_recipes, key, None if recipe is None else with_makers(recipe, _memory.aligned, numpy_dtype))
    return result


def with_makers(recipe: Recipe, new: Callable, dtype_of: Callable[[str], Any]) -> Recipe:
    """The recipe with (function, shape, dtype) for what it makes: results are arrays of the caller's library, and what
    nobody sees, if it is small, is memory as NumPy has it, in a fifth of the time.
    """
    seen = recipe.results if isinstance(recipe.results, tuple) else (recipe.results,)
    made = []
    for number, (shape, dtype) in enumerate(recipe.made, recipe.n_given):
        is_seen = number in seen or math.prod(shape) * numpy_dtype(dtype).itemsize > _SMALL
        made.append((new, shape, dtype_of(dtype)) if is_seen else (np.empty, shape, numpy_dtype(dtype)))
    return recipe._replace(made=tuple(made))


_SMALL = 4096
"""Bytes: no kernel writes so few past the caches, wherever they lie."""
