"""Calls on torch tensors on the CPU that were made before: as in _replay_cpu.py, at the addresses of the tensors."""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from gpusoftmax import _memory, _replay_cpu


class _Recipe(NamedTuple):
    numpy: Any  # of _replay_cpu, for NumPy arrays at the same addresses
    made: tuple[tuple[int, ...], Any] | None  # shape and dtype of the result, where it was not given


_recipes: dict[tuple, _Recipe | None] = {}
"""None: takes the ordinary way."""


def call(function: Callable[..., Any], arrays: tuple, options: tuple) -> Any:
    """Returns function(*arrays, *options), or what it would return. An array that was not given is None."""
    torch = sys.modules["torch"]
    layout = _layout(torch, function, arrays, options)
    if layout is None:
        return function(*arrays, *options)
    key, addresses = layout
    try:
        recipe = _recipes.get(key, _recipes)
    except TypeError:  # an option that cannot be a key, which the function will complain about
        return function(*arrays, *options)
    if recipe is _recipes:
        return _record(torch, key, function, arrays, options)
    if recipe is None or not _replay_cpu.apart(addresses, recipe.numpy.overlaps):
        return function(*arrays, *options)
    if recipe.made:
        shape, dtype = recipe.made
        result = torch.empty(shape, dtype=dtype, device="cpu")
        if type(result) is not torch.Tensor:  # a mode in which tensors are fake
            return function(*arrays, *options)
        addresses.append(result.data_ptr())
        _memory.in_huge_pages(addresses[-1], result.nbytes)
    _replay_cpu.start(recipe.numpy, addresses)
    if not recipe.made:
        result = arrays[recipe.numpy.given]
        torch.autograd.graph.increment_version(result)
    return result


def _layout(torch: Any, function: Callable, arrays: tuple, options: tuple) -> tuple[tuple, list[int]] | None:
    """What decides what a call does, and the addresses of the tensors; None where the function has to look closer:

    at tensors that are traced, differentiated, vectorised, negated, sparse, elsewhere or of a class of their own.
    """
    if torch.autograd.forward_ad._current_level >= 0 or torch.jit.is_tracing() or torch.compiler.is_compiling():
        return None
    recorded = torch.is_grad_enabled()
    key, addresses = [function, options, *map(type, options), _replay_cpu.threads_for(arrays[0].numel())], []
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
        addresses.append(address)
        key += array.dtype, array.shape, array.stride(), address % _replay_cpu.ALIGNMENT, addresses.index(address)
    return tuple(key), addresses


def _record(torch: Any, key: tuple, function: Callable, arrays: tuple, options: tuple) -> Any:
    with _replay_cpu.recording() as starts:
        result = function(*arrays, *options)
    if len(_recipes) >= _replay_cpu.MAX_RECIPES:
        _recipes.clear()
    _recipes[key] = None
    if type(result) is torch.Tensor:
        views = [None if array is None else _as_numpy(torch, array) for array in arrays]
        given = next((number for number, array in enumerate(arrays) if array is result), None)
        recipe = _replay_cpu.recipe(starts, views, _as_numpy(torch, result) if given is None else views[given])
        if recipe is not None:
            _recipes[key] = _Recipe(recipe, None if recipe.made is None else (result.shape, result.dtype))
    return result


def _as_numpy(torch: Any, tensor: Any) -> np.ndarray:
    """The same memory; bfloat16, which NumPy has not, as integers."""
    tensor = tensor.detach()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
