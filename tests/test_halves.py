"""Half types as the CPU kernels convert them, against NumPy's conversions: float16 by its bits, as CPUs without
instructions for it have it, and bfloat16 by an instruction that knows no subnormal numbers.
"""

import ml_dtypes
import numba
import numpy as np
import pytest
from numba import types
from numba.extending import intrinsic

from gpusoftmax.kernels.cpu import halves
from gpusoftmax.kernels.cpu.memory import address_of, load, load_cols, pointer_to, store, store_cols
from gpusoftmax.kernels.cpu.vector import along, cols_of

HALVES = np.arange(2**16, dtype=np.uint16).view(np.float16)


@intrinsic
def _line(typingctx, pointer):
    """A Line of contiguous numbers, as load_cols takes it."""
    result = types.Tuple((pointer, types.intp))

    def codegen(context, builder, signature, args):
        return context.make_tuple(builder, result, (args[0], context.get_constant(types.intp, 1)))

    return result(pointer), codegen


def _convert(source, target, tag_of_source, tag_of_target, zero):
    read, written = pointer_to(address_of(source), tag_of_source), pointer_to(address_of(target), tag_of_target)
    vector = along(zero)
    full = len(source) - len(source) % cols_of(vector)
    for col in range(0, full, cols_of(vector)):
        store_cols(_line(written), col, None, load_cols(_line(read), col, None, vector))
    for col in range(full, len(source)):
        store(written, col, load(read, col, zero))


@pytest.fixture
def converted(monkeypatch):
    monkeypatch.setattr(halves, "HAS_INSTRUCTIONS", False)
    compiled = numba.njit(_convert)

    def convert(source, dtype):
        target = np.empty(source.shape, dtype)
        tags = [np.int16(0) if array.dtype == np.float16 else array.dtype.type(0) for array in (source, target)]
        wide = source.dtype.type(0) if source.dtype != np.float16 else target.dtype.type(0)
        words = [array.view(np.int16) if array.dtype == np.float16 else array for array in (source, target)]
        compiled(*words, *tags, wide)
        return target

    return convert


def _same(one, two):
    return np.array_equal(one, two, equal_nan=True) and np.array_equal(np.signbit(one), np.signbit(two))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n", [2**16, 3])
def test_widened(converted, dtype, n):
    assert _same(converted(HALVES[-n:], dtype), HALVES[-n:].astype(dtype))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_narrowed(converted, dtype):
    """Every half, what lies between two of them, and the neighbours of both; numbers of all sizes."""
    finite = np.sort(HALVES[np.isfinite(HALVES)].astype(dtype))
    ties = np.append((finite[1:] + finite[:-1]) / 2, [65520, -65520]).astype(dtype)
    exact = np.concatenate([HALVES.astype(dtype), ties])
    bits = np.random.default_rng(0).integers(0, 2**64, 10**6, np.uint64).view(dtype)
    with np.errstate(all="ignore"):
        up, down = (np.nextafter(exact, np.array(end, dtype)) for end in (np.inf, -np.inf))
        numbers = np.concatenate([exact, up, down, bits])
        assert _same(converted(numbers, np.float16), numbers.astype(np.float16))


@pytest.mark.parametrize("by_instruction", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_narrowed_to_bfloat16(monkeypatch, by_instruction, mixed):
    """Every bfloat16, its neighbours, what lies halfway to the next one and the neighbours of that; subnormal numbers
    in vectors of their own, or between others.
    """
    if by_instruction and not halves.HAS_BFLOAT16:
        pytest.skip("the CPU has no instruction for it")
    monkeypatch.setattr(halves, "HAS_BFLOAT16", by_instruction)
    upper = np.arange(2**16, dtype=np.uint32)[:, None] << 16
    numbers = (upper + np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)).ravel().view(np.float32)
    if mixed:
        numbers = np.random.default_rng(0).permutation(numbers)
    target = np.empty(numbers.shape, np.uint16)
    compiled = numba.njit(_convert)
    compiled(numbers, target, np.float32(0), np.uint16(0), np.float32(0))
    with np.errstate(all="ignore"):
        expected = numbers.astype(ml_dtypes.bfloat16)
    got = target.view(ml_dtypes.bfloat16)
    is_nan = np.isnan(numbers)
    assert np.array_equal(np.isnan(got), is_nan)
    assert np.array_equal(target[~is_nan], expected.view(np.uint16)[~is_nan])
    assert np.array_equal(np.signbit(got), np.signbit(numbers))
    assert ("vcvtne2ps2bf16" in "".join(compiled.inspect_asm().values())) == by_instruction
