"""The memory of NumPy arrays: where it is, and new memory that vector instructions like."""

import ctypes
import math
import sys
from collections.abc import Callable

import numpy as np

CACHE_LINE = 64
_HEADER_BYTES = object.__basicsize__


def _address_in_object(array: np.ndarray) -> int:
    return ctypes.c_size_t.from_address(id(array) + _HEADER_BYTES).value


def _address_by_interface(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def _address_getter() -> Callable[[np.ndarray], int]:
    """PyArrayObject begins with the address of its data (numpy/ndarraytypes.h). Asking NumPy takes five times as long,
    1 us: as long as a small call. Elsewhere than on CPython an object's id is not where it lies.
    """
    if sys.implementation.name != "cpython":
        return _address_by_interface
    probe = np.empty(1)
    same = _address_in_object(probe) == _address_by_interface(probe)
    return _address_in_object if same else _address_by_interface


address = _address_getter()
"""Where element 0 of a NumPy array lies."""


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A new NumPy array that starts at a cache line, as vector instructions like it; NumPy's own start at 16 bytes."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + CACHE_LINE, np.uint8)
    offset = -address(memory) % CACHE_LINE
    return np.ndarray(shape, dtype, memory, offset)
