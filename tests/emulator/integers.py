"""Integer operations that NumPy lacks or defines differently, on arrays of one integer dtype."""

import numpy as np

from tests.emulator.ptx_types import i64, u8, u32, u64


def multiply_high(a, b):
    """The upper half of the product."""
    if a.itemsize < 8:
        wide = i64 if a.dtype.kind == "i" else u64
        return ((a.astype(wide) * b.astype(wide)) >> wide(8 * a.itemsize)).astype(a.dtype)
    x, y = a.view(u64), b.view(u64)
    half, bits = u64(0xFFFFFFFF), u64(32)
    x_low, x_high, y_low, y_high = x & half, x >> bits, y & half, y >> bits
    low = x_low * y_low
    middle = x_high * y_low + (low >> bits)
    cross = x_low * y_high + (middle & half)
    high = x_high * y_high + (middle >> bits) + (cross >> bits)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, y, u64(0)) - np.where(b < 0, x, u64(0))
    return high.view(a.dtype)


def divide(a, b, remainder):
    """C semantics; x / 0 is all ones and x % 0 is x (the hardware's results, unspecified in PTX)."""
    a, b = np.broadcast_arrays(a, b)
    if a.dtype.kind == "u":
        zero = b == 0
        quotient = a // np.where(zero, a.dtype.type(1), b)
        quotient = np.where(zero, ~a.dtype.type(0), quotient)
        return np.where(zero, a, a - quotient * b) if remainder else quotient
    unsigned = a.dtype.str.replace("i", "u")
    size_a, size_b = np.where(a < 0, -a, a).view(unsigned), np.where(b < 0, -b, b).view(unsigned)
    quotient = divide(size_a, size_b, False).view(a.dtype)
    quotient = np.where((a < 0) != (b < 0), -quotient, quotient)
    quotient = np.where(b == 0, a.dtype.type(-1), quotient)
    return np.where(b == 0, a, a - quotient * b) if remainder else quotient


def shift(name, a, b):
    """shl or shr, amounts clamped to the width."""
    width = 8 * a.itemsize
    beyond = b >= width
    amount = np.where(beyond, width - 1, b).astype(a.dtype)
    if name == "shl":
        return np.where(beyond, a.dtype.type(0), a << amount)
    result = a >> amount
    return result if a.dtype.kind == "i" else np.where(beyond, a.dtype.type(0), result)


def popcount(x):
    return np.bitwise_count(x).astype(u32)


def leading_zeros(x):
    filled = x.astype(u64)
    for bits in (1, 2, 4, 8, 16, 32):
        filled = filled | (filled >> u64(bits))
    return u32(8 * x.itemsize) - popcount(filled)


def reverse_bits(x):
    bits = np.unpackbits(np.ascontiguousarray(x).view(u8).reshape(-1, x.itemsize), axis=1, bitorder="little")
    return np.packbits(bits[:, ::-1], axis=1, bitorder="little").copy().view(x.dtype).reshape(-1)
