"""Integer and floating point arithmetic."""

import numpy as np

from tests.emulator import native
from tests.emulator.approximations import FUNCTIONS, approximate, rounded, upper_half
from tests.emulator.errors import Unsupported
from tests.emulator.instructions.registry import assign, ordinary, rounding_of
from tests.emulator.integers import divide, multiply_high
from tests.emulator.ptx_types import TYPES, PtxType, f32, i64, u32
from tests.emulator.rounding import (
    arithmetic,
    canonical_nan,
    flush,
    fma,
    min_max,
    round_to_odd,
    saturate,
    two_sum_error,
)

NVIDIA_NAN_TYPES = ("f32", "f16", "f16x2", "f32x2")


def elementwise(m, ins, function, count, ptx_type=None, operation=None):
    """d = function(sources), with .ftz, .sat, .relu and NVIDIA's NaN for floats.

    operation names the same function in native.py, if it is there.
    """
    ptx_type = ptx_type or ins.type
    if len(ins.args) != count + 1:
        raise Unsupported(str(ins))
    d = m.destination(ins.args[0], ptx_type, rounding_of(ins))
    sources = [m.source(arg, ptx_type) for arg in ins.args[1:]]
    ftz, relu = ins.has("ftz") and ptx_type.name in ("f32", "f32x2"), ins.has("relu")
    sat, nan = ins.has("sat") and ptx_type.is_float, ptx_type.name in NVIDIA_NAN_TYPES
    if ftz or sat or relu:
        return _adorned(d, sources, function, ftz, sat, relu, nan)
    if operation and (run := native.bind(operation, d, sources)):
        return run
    if isinstance(function, np.ufunc) and isinstance(d, np.ndarray) and count == 2:
        return _in_place(d, *sources, function, nan)
    if nan:
        return assign(d, lambda s: canonical_nan(function(*[x[s] for x in sources])))
    return assign(d, lambda s: function(*[x[s] for x in sources]))


def _in_place(d, a, b, function, nan):
    """The usual case: a ufunc that writes straight into the register."""

    def run(lanes):
        if type(lanes) is slice:
            result = d[lanes]
            function(a[lanes], b[lanes], out=result)
            if nan:
                canonical_nan(result)
        else:
            result = function(a[lanes], b[lanes])
            d[lanes] = canonical_nan(result) if nan else result

    return run


def _adorned(d, sources, function, ftz, sat, relu, nan):
    def run(lanes):
        values = [x[lanes] for x in sources]
        if ftz:
            values = [flush(x) for x in values]
        result = function(*values)
        if ftz:
            result = flush(result)
        if sat:
            result = saturate(result)
        if relu:
            result = np.where(result < 0, result.dtype.type(0), result)
        d[lanes] = canonical_nan(result) if nan else result

    return run


def _rounded(m, ins):
    """add, sub, mul or div of floats; bfloat16 is computed in float64 and rounded when it is written."""
    mode = rounding_of(ins) if ins.type.kind == "f" else "rn"
    operation = ins.base if mode == "rn" else None
    return elementwise(m, ins, arithmetic(ins.base, mode), 2, operation=operation)


def with_carry(m, ins):
    """add.cc, addc, sub.cc, subc, mad.cc, madc"""
    ptx_type, base = ins.type, ins.base
    unsigned = TYPES[f"u{ptx_type.bits}"]
    dtype = unsigned.dtype
    d, sources = m.destination(ins.args[0], unsigned), [m.source(arg, ptx_type) for arg in ins.args[1:]]
    carry_in, carry_out, subtract = base in ("addc", "subc", "madc"), ins.has("cc"), base.startswith("sub")

    def run(lanes):
        values = [x[lanes] for x in sources]
        if base.startswith("mad"):
            product = multiply_high(*values[:2]) if ins.has("hi") else values[0] * values[1]
            values = [product, values[2]]
        a, b = (m.spread(x.view(dtype), lanes) for x in values)
        carry = m.carry[lanes].astype(dtype) if carry_in else dtype.type(0)
        if subtract:
            partial = a - b
            result = partial - carry
            over = (a < b) | (partial < carry)
        else:
            partial = a + b
            result = partial + carry
            over = (partial < a) | (result < partial)
        d[lanes] = result
        if carry_out:
            m.carry[lanes] = over

    return run


@ordinary("add", "sub", "addc", "subc")
def add(m, ins):
    if ins.has("cc") or ins.base.endswith("c"):
        return with_carry(m, ins)
    if ins.type.is_float:
        return _rounded(m, ins)
    if ins.has("sat"):
        sign = 1 if ins.base == "add" else -1
        low, high = -(2**31), 2**31 - 1
        return elementwise(m, ins, lambda a, b: np.clip(a.astype(i64) + sign * b.astype(i64), low, high), 2)
    return elementwise(m, ins, np.add if ins.base == "add" else np.subtract, 2)


def _integer_product(ins):
    """(type of the result, function) for .lo, .hi and .wide"""
    ptx_type = ins.type
    if ins.has("hi"):
        return ptx_type, multiply_high
    if ins.has("wide"):
        wide = TYPES[("s" if ptx_type.kind == "s" else "u") + str(ptx_type.bits * 2)]
        return wide, lambda a, b: a.astype(wide.dtype) * b.astype(wide.dtype)
    return ptx_type, np.multiply


@ordinary("mul")
def mul(m, ins):
    ptx_type = ins.type
    if ptx_type.is_float:
        return _rounded(m, ins)
    wide, product = _integer_product(ins)
    d, a, b = m.destination(ins.args[0], wide), m.source(ins.args[1], ptx_type), m.source(ins.args[2], ptx_type)
    return assign(d, lambda s: product(a[s], b[s]))


@ordinary("mad", "madc", "fma")
def mad(m, ins):
    ptx_type, mode = ins.type, rounding_of(ins)
    if ins.has("cc") or ins.base == "madc":
        return with_carry(m, ins)
    if ptx_type.kind == "g":
        return elementwise(m, ins, _bfloat16_fma, 3)
    if ptx_type.is_float:
        operation = "fma" if mode == "rn" else None
        return elementwise(m, ins, lambda a, b, c: fma(a, b, c, mode), 3, operation=operation)
    if ins.has("sat"):
        raise Unsupported(str(ins))
    wide, product = _integer_product(ins)
    d, a, b = m.destination(ins.args[0], wide), m.source(ins.args[1], ptx_type), m.source(ins.args[2], ptx_type)
    c = m.source(ins.args[3], wide)
    return assign(d, lambda s: product(a[s], b[s]) + c[s])


def _bfloat16_fma(a, b, c):
    """float64 operands, rounded to odd so that the rounding to bfloat16 is the only one that counts"""
    product = a * b
    total = product + c
    return round_to_odd(total, two_sum_error(product, c, total))


@ordinary("div", "rem")
def div(m, ins):
    if not ins.type.is_float:
        return elementwise(m, ins, lambda a, b: divide(a, b, ins.base == "rem"), 2)
    if ins.has("approx"):
        return elementwise(m, ins, approximate(m, "div", _approximate_quotient), 2)
    if ins.has("full"):
        return elementwise(m, ins, approximate(m, "div", arithmetic("div", "rn")), 2)
    return _rounded(m, ins)


def _approximate_quotient(a, b):
    """div.approx gives 0 for divisors above 2^126"""
    quotient, huge = a / b, (np.abs(b) > 2.0**126) & np.isfinite(b)
    if not huge.any():
        return quotient
    return np.where(huge, np.where(np.isinf(a), f32(np.nan), np.copysign(f32(0), quotient)), quotient)


@ordinary("neg")
def neg(m, ins):
    if not ins.type.is_float:
        return elementwise(m, ins, np.negative, 1)
    return _sign(m, ins, np.bitwise_xor, lambda top: top)


@ordinary("abs")
def absolute(m, ins):
    if not ins.type.is_float:
        return elementwise(m, ins, lambda a: np.where(a < 0, -a, a), 1)
    return _sign(m, ins, np.bitwise_and, np.invert)


def _sign(m, ins, function, mask_of):
    """neg and abs work on the bits, so that NaN and subnormals pass through (unless .ftz)."""
    ptx_type = ins.type
    ftz = ins.has("ftz") and ptx_type.name == "f32"
    raw = PtxType("raw", ptx_type.unsigned, ptx_type.bits, "u", ptx_type.lanes)
    d = m.destination(ins.args[0], raw)
    x = m.source(ins.args[1], ptx_type if ins.args[1][0] == "imm" else raw)
    mask = mask_of(raw.dtype.type(1 << (raw.dtype.itemsize * 8 - 1)))

    def run(lanes):
        value = x[lanes]
        if value.dtype.kind == "f":
            value = value.astype(ptx_type.dtype).view(ptx_type.unsigned)
        if ftz:
            value = flush(value.view(f32)).view(u32)
        d[lanes] = function(value, mask)

    return run


@ordinary("copysign")
def copysign(m, ins):
    return elementwise(m, ins, lambda sign, size: np.copysign(size, sign), 2)


@ordinary("min", "max")
def minimum_maximum(m, ins):
    if not ins.type.is_float:
        return elementwise(m, ins, np.minimum if ins.base == "min" else np.maximum, 2)
    function = min_max(ins.base, ins.has("NaN"), ins.has("xorsign"), ins.has("abs"))
    plain = len(ins.args) == 3 and ins.first("NaN", "xorsign", "abs") is None
    return elementwise(m, ins, function, len(ins.args) - 1, operation=ins.base if plain else None)


@ordinary("sqrt", "rcp")
def root_or_reciprocal(m, ins):
    function = arithmetic(ins.base, rounding_of(ins))
    if ins.type.name == "f64" and ins.has("approx"):
        return elementwise(m, ins, upper_half(function), 1)
    return elementwise(m, ins, approximate(m, ins.base, function) if ins.has("approx") else function, 1)


@ordinary("rsqrt", "ex2", "lg2", "sin", "cos", "tanh")
def approximation(m, ins):
    if ins.type.name == "f64":
        return elementwise(m, ins, upper_half(FUNCTIONS[ins.base]), 1)
    return elementwise(m, ins, approximate(m, ins.base, rounded(ins.base)), 1)
