"""Calls on torch tensors on the CPU that were made before: as in _replay_cpu.py, at the addresses of the tensors."""

import sys
from collections.abc import Callable
from typing import Any

from gpusoftmax import _memory, _recipe, _replay_cpu
from gpusoftmax._recipe import Recipe

_recipes: dict[tuple, Recipe | None] = {}
"""None: takes the ordinary way."""


def call(function: Callable[..., Any], arrays: tuple, options: tuple) -> Any:
    """Returns function(*arrays, *options), or what it would return. An array that was not given is None."""
    torch = sys.modules["torch"]
    layout = _layout(torch, function, arrays, options)
    if layout is None:
        return function(*arrays, *options)
    key, given, addresses = layout
    try:
        known = _recipes.get(key, _recipes)
    except TypeError:  # an option that cannot be a key, which the function will complain about
        known = None
    if known is _recipes:
        return _record(torch, key, function, arrays, options)
    if known is None or not _recipe.apart(addresses, known.overlaps):
        return function(*arrays, *options)
    for new, shape, dtype in known.made:
        array = new(shape, dtype)
        if new is _empty:
            address = array.data_ptr() if type(array) is torch.Tensor else 0
            if not address:  # a mode in which tensors are fake or functional; or nothing is in it
                return function(*arrays, *options)
            _memory.in_huge_pages(address, array.nbytes)
        else:
            address = _memory.address(array)
        given.append(array)
        addresses.append(address)
    if not _replay_cpu.play(known.steps, given, addresses):
        return function(*arrays, *options)
    for number in known.written:
        torch.autograd.graph.increment_version(given[number])
    return _replay_cpu.results(known, given)


def _layout(torch: Any, function: Callable, arrays: tuple, options: tuple) -> tuple[tuple, list, list[int]] | None:
    """What decides what a call does, the tensors and their addresses; None where the function has to look closer:

    at tensors that are traced, differentiated, vectorised, negated, sparse, elsewhere or of a class of their own.
    """
    if torch.autograd.forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return None
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        return None
    recorded = torch.is_grad_enabled()
    size = arrays[0].numel()
    key = [function, options, *map(type, options), _replay_cpu.threads_for(size)]
    is_large = _replay_cpu.may_be_streamed(size)
    given, addresses = [], []
    for array in arrays:
        if array is None:
            key.append(None)
            continue
        if type(array) is not torch.Tensor and type(array) is not torch.nn.Parameter:
            return None
        if not array.is_cpu or array.layout is not torch.strided or array.is_neg() or array.requires_grad and recorded:
            return None
        try:
            address = array.data_ptr()
        except RuntimeError:  # what functorch's wrappers do
            return None
        if not address:
            return None
        given.append(array)
        addresses.append(address)
        key += array.dtype, array.shape, array.stride(), addresses.index(address)
        if is_large:
            key.append(address % _replay_cpu.LINE_BYTES)
    return tuple(key), given, addresses


def _record(torch: Any, key: tuple, function: Callable, arrays: tuple, options: tuple) -> Any:
    if not _recipe.is_plain(arrays, options):
        return function(*arrays, *options)
    result, recipe = _replay_cpu.recorded(function, arrays, options)
    if recipe is not None:
        recipe = _replay_cpu.with_makers(recipe, _empty, lambda name: getattr(torch, name))
    _recipe.remember(_recipes, key, recipe)
    return result


def _empty(shape: tuple[int, ...], dtype: Any) -> Any:
    return sys.modules["torch"].empty(shape, dtype=dtype, device="cpu")
