"""The memory of arrays on the CPU: where NumPy's is, and new memory that vector instructions and page tables like."""

import ctypes
import math
import mmap
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
    return aligned_at(shape, dtype, math.prod(shape) * dtype.itemsize)[0]


def aligned_at(shape: tuple[int, ...], dtype: np.dtype, size: int) -> tuple[np.ndarray, int]:
    """The same, of so many bytes, and where it starts."""
    memory = np.empty(size + CACHE_LINE, np.uint8)
    start = address(memory)
    offset = -start % CACHE_LINE
    return np.ndarray(shape, dtype, memory, offset), start + offset


LARGE = 1 << 22
"""Bytes, from which NumPy asks for huge pages, too."""
_PAGE = mmap.PAGESIZE


def in_huge_pages(pointer: int, size: int) -> None:
    """Asks for huge pages for new memory that nobody has touched yet, as NumPy does for its own. torch does not.

    Linux backs memory by the page when it is first written, 4 KiB at a time: 1024 x 32768 float32 took 110 ms more.
    """
    if size >= LARGE and _madvise is not None:
        start = -(-pointer // _PAGE) * _PAGE
        _madvise(start, pointer + size - start, mmap.MADV_HUGEPAGE)  # only advice: an error changes nothing


def _find_madvise() -> Callable[[int, int, int], int] | None:
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # another system than Linux
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return function


_madvise = _find_madvise()
