"""Floating point arithmetic rounded exactly as IEEE 754 and the PTX manual say, on NumPy arrays."""

from fractions import Fraction

import numpy as np

from tests.emulator.errors import Unsupported
from tests.emulator.ptx_types import f16, f32, f64, i64, u8, u16, u32, u64

SMALLEST_NORMAL = f32(2.0**-126)
NVIDIA_NAN = {2: u16(0x7FFF), 4: u32(0x7FFFFFFF)}


def canonical_nan(result):
    """NVIDIA's NaN for the results of float32 and float16 arithmetic; a float64 NaN keeps its payload. In place."""
    if result.dtype == f32 and result.ndim == 1:
        if not np.isnan(result.dot(result)):  # the cheapest test: squares never cancel
            return result
    elif result.dtype == f64:
        return result
    nan = np.isnan(result)
    if nan.any():
        if not result.flags.writeable:
            result = result.copy()
        result.view(f"u{result.itemsize}")[nan] = NVIDIA_NAN[result.itemsize]
    return result


def flush(x):
    """Subnormal float32 -> zero of the same sign (.ftz)."""
    small = np.abs(x) < SMALLEST_NORMAL
    return np.where(small, np.copysign(x.dtype.type(0), x), x) if small.any() else x


def saturate(x):
    """Clamp to [0, 1], NaN to 0 (.sat)."""
    one, zero = x.dtype.type(1), x.dtype.type(0)
    return np.where(x > 0, np.minimum(x, one), zero)


def round_to_odd(rounded, error):
    """The float64 sum rounded + error to odd instead of to nearest, so that a second rounding is right."""
    fix = (error != 0) & ((rounded.view(u64) & u64(1)) == 0) & np.isfinite(rounded) & ~np.isnan(error)
    if not fix.any():
        return rounded
    step = np.where((error > 0) == (rounded > 0), i64(1), i64(-1))
    return np.where(fix, (rounded.view(i64) + step).view(f64), rounded)


def two_sum_error(a, b, total):
    """a + b - total exactly, where total = fl(a + b) (Knuth)."""
    t = total - a
    return (a - (total - t)) + (b - t)


def narrow(x, dtype, mode="rn"):
    """float64 -> float32 or float16 in rounding mode rn, rz, rm or rp."""
    result = x.astype(dtype)
    if mode == "rn":
        return result
    back, infinity = result.astype(f64), dtype(np.inf)
    too_low, too_high = back < x, back > x
    if mode == "rm":
        too_low = False
    elif mode == "rp":
        too_high = False
    else:
        too_low, too_high = too_low & (x < 0), too_high & (x > 0)
    result = np.where(too_high, np.nextafter(result, -infinity), result)
    return np.where(too_low, np.nextafter(result, infinity), result)


def to_bfloat16(x, mode="rn"):
    """float -> bfloat16 bits (uint16), rounded once."""
    if x.dtype == f64:  # round to odd in float32 first
        near = x.astype(f32)
        back, bits = near.astype(f64), near.view(u32)
        fix = (back != x) & np.isfinite(x) & (((bits & u32(1)) == 0) | np.isinf(near))
        if fix.any():
            toward = np.where(np.abs(back) < np.abs(x), bits + u32(1), bits - u32(1))
            near = np.where(fix, toward, bits).view(f32)
        x = near
    x = np.ascontiguousarray(x, f32)
    bits = x.view(u32)
    if mode == "rn":
        result = (bits + u32(0x7FFF) + ((bits >> u32(16)) & u32(1))) >> u32(16)
    else:
        result = bits >> u32(16)
        inexact = (bits & u32(0xFFFF)) != 0
        if mode == "rp":
            result = result + (inexact & (x > 0))
        if mode == "rm":
            result = result + (inexact & (x < 0))
    result = result.astype(u16)
    nan = np.isnan(x)
    if nan.any():
        result[nan] = 0x7FFF
    return result


def from_bfloat16(bits):
    return (np.asarray(bits).astype(u32) << u32(16)).view(f32)


def _zero_of_sum(total, a, b, mode):
    """a + b with the sign of an exact 0: rounding down, it is -0 unless both are +0."""
    if mode != "rm":
        return total
    both_plus = (a == 0) & (b == 0) & ~np.signbit(a) & ~np.signbit(b)
    return np.where((total == 0) & ~both_plus, -0.0, total)


def fma(a, b, c, mode="rn"):
    """a * b + c rounded once; arrays of one float dtype. (Plain fma.rn is in native.py.)"""
    dtype = np.result_type(a, b, c).type
    if dtype == f64:
        return directed_float64(lambda x, y, z: x * y + z, a * b + c, mode, a, b, c)
    product, c = a.astype(f64) * b.astype(f64), c.astype(f64)  # the product of two float32 is exact
    total = product + c
    if mode != "rn" or dtype == f16:
        exact = round_to_odd(total, two_sum_error(product, c, total))
        return narrow(_zero_of_sum(exact, product, c, mode), dtype, mode)
    result = total.astype(f32)
    # Rounding twice goes wrong only where the float64 sum lies half-way between two float32: its last 28 bits are 0.
    suspect = (total.view(u64) & u64(0x0FFFFFFF)) == 0
    if suspect.any():
        where = np.flatnonzero(suspect)
        product, c = (np.broadcast_to(x, total.shape)[where] for x in (product, c))
        exact = round_to_odd(total[where], two_sum_error(product, c, total[where]))
        result[where] = exact.astype(f32)
    return result


def exact_float64(formula, mode, *args):
    """The slow exact way, one element at a time: formula over Fractions, rounded to float64 in the given mode."""
    args = np.broadcast_arrays(*args)
    out = np.empty(args[0].shape, f64)
    for k in range(out.size):
        out.flat[k] = _round_fraction(formula(*[Fraction(float(x.flat[k])) for x in args]), mode)
    return out


def _round_fraction(exact, mode):
    try:
        near = exact.numerator / exact.denominator
    except OverflowError:
        near = np.inf if exact > 0 else -np.inf
    if near == 0:
        near = np.copysign(0.0, -1.0 if exact < 0 or (exact == 0 and mode == "rm") else 1.0)
    if mode == "rn":
        return near
    if np.isfinite(near):
        back = Fraction(float(near))
    else:
        back = exact + 1 if near > 0 else exact - 1
    if back > exact and (mode == "rm" or (mode == "rz" and exact > 0)):
        return np.nextafter(near, -np.inf)
    if back < exact and (mode == "rp" or (mode == "rz" and exact < 0)):
        return np.nextafter(near, np.inf)
    return near


def directed_float64(formula, nearest, mode, *args):
    """nearest with every finite element computed again in a directed rounding mode."""
    args = np.broadcast_arrays(*args)
    result = np.array(np.broadcast_to(nearest, args[0].shape))
    finite, zero = np.all([np.isfinite(x) for x in args], 0), np.all([x == 0 for x in args], 0)
    again = finite & ~zero & ~((args[-1] == 0) & ~np.isfinite(result))  # not a division by 0
    if again.any():
        result[again] = exact_float64(formula, mode, *[x[again] for x in args])
    return result


def _reciprocal(x):
    return x.dtype.type(1) / x


_NEAREST = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "sqrt": np.sqrt,
    "rcp": _reciprocal,
}
_EXACT = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / y,
    "rcp": lambda x: 1 / x,
}


def arithmetic(name, mode):
    """The function add, sub, mul, div, sqrt or rcp, rounded in the given mode, for arrays of one float dtype."""
    nearest = _NEAREST[name]
    if mode == "rn":
        return nearest

    def directed(*args):
        dtype = args[0].dtype.type
        if dtype == f64:
            if name not in _EXACT:
                raise Unsupported("sqrt.f64 with directed rounding")
            return directed_float64(_EXACT[name], nearest(*args), mode, *args)
        wide = [x.astype(f64) for x in args]
        result = nearest(*wide)
        if name in ("add", "sub"):
            a, b = wide[0], wide[1] if name == "add" else -wide[1]
            result = _zero_of_sum(round_to_odd(result, two_sum_error(a, b, result)), a, b, mode)
        return narrow(result, dtype, mode)

    return directed


def min_max(name, keep_nan=False, xor_sign=False, magnitude=False):
    """min or max of floats: -0 < +0, and NaN only when both are NaN unless keep_nan."""
    if name == "max":
        base = np.maximum if keep_nan else np.fmax
    else:
        base = np.minimum if keep_nan else np.fmin

    def run(a, b, *more):
        sign_a, sign_b = a, b
        if magnitude or xor_sign:
            a, b = np.abs(a), np.abs(b)
        result = base(a, b)
        if not result.all():  # some zero
            zero = (a == 0) & (b == 0)
            signed = (a + b) if name == "max" else -((-a) + (-b))
            result = np.where(zero, signed, result)
        if xor_sign:
            one = result.dtype.type(1)
            sign = np.where(np.signbit(sign_a) ^ np.signbit(sign_b), -one, one)
            result = np.where(np.isnan(result), result, np.copysign(result, sign))
        return run(result, *more) if more else result

    return run


ROUND_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def float_to_integer(x, dtype, mode, from_float64):
    """Round, clamp to the range of dtype, and NaN as the PTX manual says."""
    rounded = ROUND_TO_INTEGER[mode](x.astype(f64))
    info = np.iinfo(dtype)
    below_top = rounded <= float(info.max) if dtype.itemsize < 8 else rounded < float(info.max)
    inside = (rounded >= float(info.min)) & below_top
    result = np.where(inside, rounded, 0).astype(dtype)
    if inside.all():
        return result
    nan = 1 << (dtype.itemsize * 8 - 1) if from_float64 or dtype.itemsize == 8 else 0
    if dtype.kind == "i" and nan:
        nan = info.min
    clamped = np.where(rounded < 0, dtype.type(info.min), dtype.type(info.max))
    return np.where(inside, result, np.where(np.isnan(rounded), dtype.type(nan), clamped))


def integer_to_float(x, ptx_type, mode):
    if ptx_type.kind == "g":
        return to_bfloat16(x.astype(f64), mode)
    dtype = ptx_type.dtype.type
    if mode == "rn" or (x.itemsize < 8 and dtype == f64):
        return x.astype(f32).astype(f16) if dtype == f16 else x.astype(dtype)
    if x.itemsize < 8:
        return narrow(x.astype(f64), dtype, mode)
    return np.array([_directed_integer(int(v), dtype, mode) for v in x], dtype)


def _directed_integer(value, dtype, mode):
    result = dtype(value)
    back = int(result) if np.isfinite(result) else value
    if back > value and (mode == "rm" or (mode == "rz" and value > 0)):
        return np.nextafter(result, dtype(-np.inf))
    if back < value and (mode == "rp" or (mode == "rz" and value < 0)):
        return np.nextafter(result, dtype(np.inf))
    return result


def view_bytes(x):
    """The bytes of a contiguous array."""
    return np.ascontiguousarray(x).reshape(-1).view(u8)
