"""Apply softmax or log_softmax to an array in a .npy file that may be larger than the memory.

The file is worked on in pieces of whole rows, and the result appears under its name complete or not at all. Integers
and bools become float64. Elements of type V2, as NumPy saves bfloat16, are read as bfloat16. An array in Fortran order
stays in Fortran order.
"""

# Pieces that lie in one stretch are read and written, not mapped into memory: a mapped file that shrinks, or lies on a
# failing disk, ends the process with SIGBUS, without a word and without removing the temporary file. Rows along another
# axis than the last are scattered, and a system call for each of their parts would take ten times as long as a map.

import argparse
import errno
import io
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.lib import format as npy

from gpusoftmax import _arrays, _checks, _info, _npy, log_softmax, softmax
from gpusoftmax._new_file import check_output, check_space, new_file
from gpusoftmax._npy import Source
from gpusoftmax._progress import Progress, size_text

HELP = "softmax of a .npy file of any size"
_OPERATIONS = {"softmax": softmax, "log_softmax": log_softmax}
_CHUNK_BYTES = 64 * 2**20
"""For a piece of the input and its result, unless a single row needs more."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="IN.npy")
    parser.add_argument("output", metavar="OUT.npy")
    parser.add_argument("--op", choices=_OPERATIONS, required=True)
    parser.add_argument("--axis", type=int, default=-1, help="along which a row runs (default: the last)")
    parser.add_argument("--temperature", type=float, default=1.0, help="divides the logits (default: 1)")
    parser.add_argument("--dtype", choices=_checks.FLOATING, help="of the result (default: that of IN)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default: cpu)")
    parser.add_argument("--force", action="store_true", help="replace OUT.npy if it exists")


def run(arguments: argparse.Namespace) -> None:
    start = time.monotonic()
    with _npy.open_input(arguments.input) as file:
        source = _npy.read_header(file)
        layout = _layout(source, arguments.axis)
        dtype = _result_dtype(source, arguments.dtype)
        convert = _converter(arguments, dtype)
        check_output(arguments.output, [file], arguments.force)
        header = _header(source, dtype)
        check_space(arguments.output, len(header) + source.size * dtype.itemsize)
        with new_file(arguments.output, arguments.force) as target, Progress(arguments.op, source.size) as progress:
            _reserve(target, len(header) + source.size * dtype.itemsize)
            _write(target, 0, memoryview(header))
            done = 0
            for piece in _pieces(layout, _bytes_per_element(source, dtype)):
                logits = piece.read(file, source)
                piece.write(target, len(header), convert(logits))
                done += logits.size
                seconds = time.monotonic() - start
                progress.update(done, f"{size_text(done * source.dtype.itemsize / seconds)}/s")
    shape = " x ".join(map(str, source.shape)) or "one number"
    print(f"{arguments.output}: {arguments.op} of {shape}, {dtype.name}, in {time.monotonic() - start:.1f} s")


# ---------------------------------------------------------------- pieces of whole rows


class _Layout(NamedTuple):
    """The array as it lies in the file, in C order: (n_outer, n_cols, n_inner), rows along the middle."""

    n_outer: int
    n_cols: int
    n_inner: int


class _Piece(NamedTuple):
    """Rows that are worked on at once: outers [first, last) whole, or of a single outer the inners [first, last)."""

    layout: _Layout
    outer: slice
    inner: slice

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.outer.stop - self.outer.start, self.layout.n_cols, self.inner.stop - self.inner.start

    def read(self, file: io.FileIO, source: Source) -> np.ndarray:
        array = _empty(self.shape, source.dtype)
        if self._in_one_stretch:
            _npy.read(file, source.offset + self._first_element(0) * array.itemsize, _bytes(array))
        else:
            for cols, part in self._mapped(file, "r", source.offset, array.dtype):
                array[0, cols] = part
        return array

    def write(self, file: io.FileIO, offset: int, array: np.ndarray) -> None:
        if self._in_one_stretch:
            _write(file, offset + self._first_element(0) * array.itemsize, _bytes(array))
        else:
            for cols, part in self._mapped(file, "r+", offset, array.dtype):
                part[...] = array[0, cols]

    @property
    def _in_one_stretch(self) -> bool:
        return self.shape[2] == self.layout.n_inner

    def _first_element(self, col: int) -> int:
        return (self.outer.start * self.layout.n_cols + col) * self.layout.n_inner + self.inner.start

    def _mapped(self, file: io.FileIO, mode: str, offset: int, dtype: np.dtype) -> Iterator[tuple[slice, np.ndarray]]:
        """The piece in the file, some columns at a time so that a map is no larger than a piece."""
        _, n_cols, n_inner = self.layout
        width = self.shape[2]
        step = max(_CHUNK_BYTES // (n_inner * dtype.itemsize), 1)
        for first in range(0, n_cols, step):
            count = min(step, n_cols - first)
            start = offset + self._first_element(first) * dtype.itemsize
            try:
                flat = np.memmap(file, dtype, mode, start, ((count - 1) * n_inner + width,))
            except ValueError:
                raise ValueError(_npy.SHRUNK.format(file.name)) from None
            strides = (n_inner * dtype.itemsize, dtype.itemsize)
            yield slice(first, first + count), np.lib.stride_tricks.as_strided(flat, (count, width), strides)


def _layout(source: Source, axis: int) -> _Layout:
    (axis,) = _checks.axes(axis, len(source.shape)) or (0,)
    shape = source.shape or (1,)
    if source.fortran_order:  # the same bytes, with the axes counted from the other end, are in C order
        shape, axis = shape[::-1], len(shape) - 1 - axis
    _checks.column_count(shape[axis])
    return _Layout(math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :]))


def _pieces(layout: _Layout, element_bytes: int) -> Iterator[_Piece]:
    """All rows, in pieces of at most _CHUNK_BYTES, or of one row where a row is longer."""
    n_outer, n_cols, n_inner = layout
    if n_outer * n_cols * n_inner == 0:
        return
    rows = max(_CHUNK_BYTES // (n_cols * element_bytes), 1)
    if rows >= n_inner:
        step = rows // n_inner
        for first in range(0, n_outer, step):
            yield _Piece(layout, slice(first, min(first + step, n_outer)), slice(0, n_inner))
        return
    for outer in range(n_outer):
        for first in range(0, n_inner, rows):
            yield _Piece(layout, slice(outer, outer + 1), slice(first, min(first + rows, n_inner)))


def _bytes_per_element(source: Source, dtype: np.dtype) -> int:
    """What an element of a piece takes in memory: as read, as float64 if it is an integer, and as a result."""
    converted = 0 if source.dtype.name in _checks.FLOATING else 8
    return source.dtype.itemsize + converted + dtype.itemsize


def _empty(shape: tuple[int, int, int], dtype: np.dtype) -> np.ndarray:
    wanted = math.prod(shape) * dtype.itemsize
    # Linux promises more memory than there is, and then kills the process that uses it.
    if hasattr(os, "sysconf") and wanted > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        raise MemoryError(f"a piece of {shape[0] * shape[2]} rows needs {size_text(wanted)}, more than there is memory")
    try:
        return np.empty(shape, dtype)
    except MemoryError:
        raise MemoryError(f"no memory for a piece of {shape[0] * shape[2]} rows: {size_text(wanted)}") from None


# ---------------------------------------------------------------- the computation


def _result_dtype(source: Source, requested: str | None) -> np.dtype:
    if requested is not None:
        return _arrays.numpy_dtype(requested)
    return source.dtype.newbyteorder("=") if source.dtype.name in _checks.FLOATING else np.dtype(np.float64)


def _converter(arguments: argparse.Namespace, dtype: np.dtype) -> Callable[[np.ndarray], np.ndarray]:
    """The function from logits to the result, both (n_outer, n_cols, n_inner) in the computer's memory."""
    temperature = _checks.temperature(arguments.temperature)
    operation = _OPERATIONS[arguments.op]
    device, _ = _info.choose_device(arguments.device)
    xp = _arrays.array_module(device)

    def convert(logits: np.ndarray) -> np.ndarray:
        if not logits.dtype.isnative:
            logits = logits.byteswap(inplace=True).view(logits.dtype.newbyteorder("="))
        if xp is not np:
            return operation(xp.asarray(logits), 1, temperature=temperature, dtype=dtype).get()
        if logits.dtype == dtype:
            return operation(logits, 1, temperature=temperature, out=logits)
        return operation(logits, 1, temperature=temperature, dtype=dtype)

    return convert


# ---------------------------------------------------------------- the output file


def _reserve(file: io.FileIO, length: int) -> None:
    """Give the file its length and its disk space now: writing to a map of it must not find the disk full (SIGBUS)."""
    try:
        os.posix_fallocate(file.fileno(), 0, length)
    except AttributeError:  # not on this system
        file.truncate(length)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        file.truncate(length)  # not on this file system


def _header(source: Source, dtype: np.dtype) -> bytes:
    header = io.BytesIO()
    descr = "<V2" if dtype == _arrays.BFLOAT16 else dtype.str
    description = {"descr": descr, "fortran_order": source.fortran_order, "shape": source.shape}
    npy.write_array_header_1_0(header, description)
    return header.getvalue()


def _bytes(array: np.ndarray) -> memoryview:
    return memoryview(array.reshape(-1).view(np.uint8))


def _write(file: io.FileIO, offset: int, rest: memoryview) -> None:
    file.seek(offset)
    while rest:
        rest = rest[file.write(rest) :]
