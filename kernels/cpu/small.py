"""Calls so small that finding out what they are costs more than doing it: NumPy arrays straight to a kernel.

The kernels are those of the ops, in blocks of rows, with their little scratch memory on the stack. Numba would take
every array apart and count its references. Here a kernel looks into the objects itself, as far as NumPy's C interface
has laid them open since version 1 (PyArrayObject_fields and PyArray_Descr), and so keeps Python's lock.
"""

import ctypes
import functools
import sys
from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba import int32, int64, types, uint8
from numba.extending import NativeValue, intrinsic, models, register_model, unbox

from gpusoftmax.kernels.cpu.cache import device, kernel
from gpusoftmax.kernels.cpu.chunks import CHUNK_COLS, REGISTERS
from gpusoftmax.kernels.cpu.job import LINE, NEXT, TICKETS, Job
from gpusoftmax.kernels.cpu.log_softmax import log_softmax_of_rows
from gpusoftmax.kernels.cpu.memory import (
    on_stack,
    pointer_to,
)
from gpusoftmax.kernels.cpu.rows import Strided
from gpusoftmax.kernels.cpu.softmax import softmax_of_rows
from gpusoftmax.kernels.cpu.states import FIELDS
from gpusoftmax.kernels.cpu.vector import (
    ACROSS_BYTES,
    REGISTER_BYTES,
    VECTOR_BYTES,
    across,
    in_blocks,
    lanes_of,
    size_of,
)
from gpusoftmax.kernels.operands import SMALL, Rows

# Where the fields of an array and of its dtype lie behind the header of a Python object.
HEADER = object.__basicsize__
DATA, N_DIMS, SHAPE, DTYPE, FLAGS = HEADER, HEADER + 8, HEADER + 16, HEADER + 40, HEADER + 48
BYTE_ORDER, NATIVE = HEADER + 10, ord("=")
# C-contiguous and aligned; and writable.
READABLE, WRITABLE = 0x101, 0x501
# Scratch memory: the states of a chunk and of the row, registers of rows, numbers of rows; in words.
PARTIALS = 2 * FIELDS * ACROSS_BYTES
STAGE = PARTIALS + REGISTERS * (ACROSS_BYTES // 4) * REGISTER_BYTES
SCRATCH = (STAGE + FIELDS * ACROSS_BYTES) // 8
COUNTERS = NEXT + LINE
# A row that fits one register takes a quarter of the instructions there: 8 x 16 0.15 us instead of 0.33.
wide, narrow = in_blocks(VECTOR_BYTES), in_blocks(REGISTER_BYTES)

kernel_with_lock = functools.partial(kernel, releases_lock=False)


class ArrayObject(types.Type):
    """A NumPy array of such numbers, as the address where the Python object lies. Whoever calls holds it."""

    def __init__(self, number: types.Float):
        self.number = number
        super().__init__(name=f"ArrayObject({number})")


@register_model(ArrayObject)
class _ArrayObjectModel(models.PrimitiveModel):
    def __init__(self, manager, type):
        super().__init__(manager, type, ir.IntType(64))


@unbox(ArrayObject)
def _unbox_array_object(type, object, context):
    return NativeValue(context.builder.ptrtoint(object, ir.IntType(64)))


@intrinsic
def place_of(typingctx, array):
    """The address of an ArrayObject."""
    return types.int64(array), lambda context, builder, signature, args: args[0]


@intrinsic
def one_in(typingctx, array):
    """1 in the format of an ArrayObject."""
    number = array.number
    return number(array), lambda context, builder, signature, args: context.get_constant(number, 1)


@kernel_with_lock
def small_softmax(x, out):
    return run_on(softmax_of_rows, place_of(x), place_of(out), one_in(x))


@kernel_with_lock
def small_log_softmax(x, out):
    return run_on(log_softmax_of_rows, place_of(x), place_of(out), one_in(x))


@device
def word(place):
    return pointer_to(place, int64(0))[0]


@device
def half_word(place):
    return pointer_to(place, int32(0))[0]


@device
def is_plain(array, dtype, flags):
    """Whether an array has rows, this dtype and these flags."""
    return word(array + DTYPE) == dtype and half_word(array + N_DIMS) == 2 and half_word(array + FLAGS) & flags == flags


@device
def run_on(of_rows, x, out, one):
    """Whether it has been done: not unless both are small arrays of rows in C order, of one shape and native dtype,
    that are the same or do not overlap, and the rows are of one chunk.
    """
    dtype = word(x + DTYPE)
    native = pointer_to(dtype + BYTE_ORDER, uint8(0))[0] == NATIVE
    if not (native and is_plain(x, dtype, READABLE) and is_plain(out, dtype, WRITABLE)):
        return False
    shape, same = word(x + SHAPE), word(out + SHAPE)
    n_rows, n_cols = word(shape), word(shape + 8)
    if word(same) != n_rows or word(same + 8) != n_cols or n_cols > CHUNK_COLS or not 0 < n_rows * n_cols <= SMALL:
        return False
    source, target = word(x + DATA), word(out + DATA)
    if source != target and abs(source - target) < n_rows * n_cols * size_of(one):
        return False
    counters = on_stack(COUNTERS)
    pointer_to(counters, counters)[TICKETS] = 0
    pointer_to(counters, counters)[NEXT] = 0
    height = lanes_of(across(one))
    job = Job(counters, on_stack(SCRATCH), 1, n_rows, 1, height, 0, PARTIALS, 0, 0, STAGE, 0, 0, 0, 0, 0, 1)
    rows = Rows(n_rows, n_rows, n_cols)
    logits, result = Strided(source, 0, n_cols, 1, one, None), Strided(target, 0, n_cols, 1, one, None)
    if n_cols * size_of(one) <= REGISTER_BYTES:
        of_rows(narrow(), job, rows, logits, logits, result, one, None)
    else:
        of_rows(wide(), job, rows, logits, logits, result, one, None)
    return True


_KERNELS = {"softmax": small_softmax, "log_softmax": small_log_softmax}
_NUMBERS = {"f": types.float32, "d": types.float64}


def function(op: str, char: str) -> Callable[[np.ndarray, np.ndarray], bool] | None:
    """The kernel of an op, if there is one for arrays whose dtype has this `char`: a function of two of them."""
    if op not in _KERNELS or char not in _NUMBERS or not _is_laid_out():
        return None
    return _KERNELS[op].compile((ArrayObject(_NUMBERS[char]),) * 2)


def _is_laid_out() -> bool:
    """Whether an array looks as it is expected to."""
    if sys.implementation.name != "cpython":
        return False

    def read(type, address):
        return type.from_address(address).value

    probe = np.empty((2, 3), np.float32)
    place, dtype = id(probe), id(probe.dtype)
    return (
        read(ctypes.c_int64, place + DATA) == probe.ctypes.data
        and read(ctypes.c_int32, place + N_DIMS) == probe.ndim
        and read(ctypes.c_int64, place + DTYPE) == dtype
        and read(ctypes.c_int32, place + FLAGS) & WRITABLE == WRITABLE
        and read(ctypes.c_uint8, dtype + BYTE_ORDER) == NATIVE
        and tuple((ctypes.c_int64 * 2).from_address(read(ctypes.c_int64, place + SHAPE))) == probe.shape
    )
