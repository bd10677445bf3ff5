"""Calls on torch tensors on the CPU that were made before: as in _replay_cpu.py, at the addresses of the tensors."""

import functools
import sys
from collections.abc import Callable
from typing import Any

from gpusoftmax import _arrays, _memory, _recipe, _replay_cpu
from gpusoftmax._replay_cpu import OnCpu

_recipes: dict[tuple, OnCpu | None] = {}
"""None: takes the ordinary way."""


def call(
    function: Callable[..., Any], arrays: tuple, options: tuple, otherwise: Callable[..., Any] | None = None
) -> Any:
    """Returns function(*arrays, *options), or what it would return. An array that was not given is None.

    otherwise: what is called instead of it on tensors that it has to look at closer.
    """
    if _arrays.is_recording():  # an operator of gpusoftmax.torch, of which this is a part
        return function(*arrays, *options)
    torch = sys.modules["torch"]
    layout = _layout(torch, function, arrays, options)
    if layout is None:
        return (otherwise or function)(*arrays, *options)
    key, given, addresses = layout
    try:
        known = _recipes.get(key, _recipes)
    except TypeError:  # an option that cannot be a key, which the function will complain about
        known = None
    if known is _recipes:
        if otherwise is not None:  # an operator's options are plain, as its schema has them
            function, options = _with_options(function, options), ()
        return _replay_cpu.record(_recipes, key, function, arrays, options, _maker)
    if known is None or not _recipe.apart(addresses, known.overlaps):
        return function(*arrays, *options)
    for new in known.made:
        tensor, address = new()
        if not address:  # a mode in which tensors are fake or functional; or nothing is in it
            return function(*arrays, *options)
        given.append(tensor)
        addresses.append(address)
    if not _replay_cpu.play(known.program, addresses):
        return function(*arrays, *options)
    for number in known.written:
        torch.autograd.graph.increment_version(given[number])
    return _replay_cpu.results(known, given)


def _with_options(function: Callable[..., Any], options: tuple) -> Callable[..., Any]:
    return lambda *arrays: function(*arrays, *options)


def _layout(torch: Any, function: Callable, arrays: tuple, options: tuple) -> tuple[tuple, list, list[int]] | None:
    """What decides what a call does, the tensors and their addresses; None where the function has to look closer:

    at tensors that are traced, differentiated, vectorised, negated, sparse, nested, elsewhere or of a class of their
    own.
    """
    if torch.autograd.forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return None
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        return None
    recorded = torch.is_grad_enabled()
    key = [function, options, *map(type, options)]
    given, addresses = [], []
    n_logits = 0  # of whichever tensor has most: logits do not come first everywhere
    for array in arrays:
        if array is None:
            key.append(None)
            continue
        if type(array) is not torch.Tensor and type(array) is not torch.nn.Parameter:
            return None
        if not array.is_cpu or array.layout is not torch.strided or array.is_nested or array.is_neg():
            return None
        if array.requires_grad and recorded:
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
        n_logits = max(n_logits, array.numel())
    if _replay_cpu.add_schedule(key, n_logits):
        key += [address % _replay_cpu.LINE_BYTES for address in addresses]
    return tuple(key), given, addresses


def _maker(shape: tuple[int, ...], dtype: str, n_bytes: int) -> Callable[[], tuple[Any, int]]:
    """Of tensors and their addresses, 0 for one that has none."""
    torch = sys.modules["torch"]
    # In half the time that torch.empty takes.
    strides = torch.empty(shape, device="meta").stride()
    empty = functools.partial(
        torch.empty_strided, tuple(shape), strides, dtype=getattr(torch, dtype), device=torch.device("cpu")
    )
    is_large = n_bytes >= _memory.LARGE

    def new() -> tuple[Any, int]:
        tensor = empty()
        address = tensor.data_ptr() if type(tensor) is torch.Tensor else 0
        if is_large and address:
            _memory.in_huge_pages(address, n_bytes)
        return tensor, address

    return new
