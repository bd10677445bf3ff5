"""Reading .npy files that nobody vouches for. Nothing that a header claims is believed before it fits the file."""

import io
import math
import os
import stat
import warnings
from typing import NamedTuple

import numpy as np
from numpy.lib import format as npy

from gpusoftmax import _arrays, _checks

SHRUNK = "{}: became shorter while it was read"
_MAX_HEADER = 64 * 2**10
_MAX_DIMS = 64
"""NumPy's own limit."""


class Source(NamedTuple):
    """What the header of a .npy file says, checked against the length of the file."""

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype
    offset: int
    """Of the first element in the file."""

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def open_input(path: str) -> io.FileIO:
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for somebody to write to it
        raise ValueError(f"{path}: not a regular file, expected a .npy file")
    return open(path, "rb", buffering=0)


def read_header(file: io.FileIO) -> Source:
    """Read and check the header. Nothing that it claims is believed before it fits the length of the file."""
    name = file.name
    # NumPy parses a bounded copy: a header that claims to be 4 GiB long is cut short and refused.
    start = io.BytesIO(file.read(_MAX_HEADER))
    if start.getvalue()[:2] == b"PK":
        raise ValueError(f"{name}: an .npz archive, expected a .npy file: extract one of its arrays first")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on headers written by Python 2
            version = npy.read_magic(start)
            readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
            if version not in readers:
                raise ValueError(f"its format version is {version[0]}.{version[1]}, expected 1.0 or 2.0")
            shape, fortran_order, dtype = readers[version](start)
    except Exception as error:  # a hostile header raises anything: TokenError, TypeError, MemoryError, ...
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{name}: not a readable .npy file: {reason[:200]}") from error
    if len(shape) > _MAX_DIMS or any(type(length) is not int or not 0 <= length < 2**63 for length in shape):
        raise ValueError(
            f"{name}: its header has the shape {str(shape)[:200]}, expected up to {_MAX_DIMS} lengths >= 0"
        )
    if dtype == np.dtype("V2"):
        dtype = _arrays.BFLOAT16
    if dtype.shape or dtype.name not in (*_checks.FLOATING, *_checks.INTEGERS, "bool"):
        raise ValueError(
            f"{name}: its elements are {str(dtype)[:200]}, expected {', '.join(_checks.FLOATING)}, integers or bool"
        )
    source = Source(shape, fortran_order, dtype, start.tell())
    expected = source.offset + source.size * dtype.itemsize
    actual = os.fstat(file.fileno()).st_size
    if actual != expected:
        raise ValueError(
            f"{name}: is {'shorter' if actual < expected else 'longer'} than its header says: {actual} bytes, "
            f"expected {expected} for {dtype.name} of shape {str(shape)[:200]}"
        )
    return source


def read(file: io.FileIO, offset: int, rest: memoryview) -> None:
    file.seek(offset)
    while rest:
        count = file.readinto(rest)
        if not count:
            raise ValueError(SHRUNK.format(file.name))
        rest = rest[count:]
