"""Half types as the CPU has them.

float16 on CPUs without instructions for it (x86 before F16C) is widened and narrowed by its bits: LLVM would call
functions of its runtime library, which are in no process of Python, and end the process.

bfloat16 is narrowed by one instruction where there is one (AVX512_BF16) and lanes are columns. It takes subnormal
numbers for 0: vectors that hold one are narrowed by their bits, as all are elsewhere.
"""

from llvmlite import ir
from numba.core.registry import cpu_target

from gpusoftmax.kernels import conversion
from gpusoftmax.kernels.conversion import FLOAT, constant, shaped

_WORD, _HALF_WORD = ir.IntType(32), ir.IntType(16)
_SIGN, _INFINITY = 0x80000000, 0x7F800000
_SHORTER = 13  # bits that the mantissa of a float16 has less than that of a float32
_SMALLEST = 2.0**-14  # of the normal numbers of float16
_LANES = 16  # of float32 in a register of AVX-512
_LANE_NUMBERS = ir.VectorType(_WORD, _LANES)
_SUBNORMAL = 0x20  # as VFPCLASSPS asks for it
_TRIPLE, _, _FEATURES = cpu_target.target_context.codegen().magic_tuple()
_FEATURES = set(_FEATURES.split(","))
HAS_INSTRUCTIONS = _TRIPLE.startswith(("aarch64", "arm64")) or bool({"+f16c", "+avx512f"} & _FEATURES)
HAS_BFLOAT16 = {"+avx512bf16", "+avx512dq"} <= _FEATURES


def widen(builder: ir.IRBuilder, value, dtype: str, compute: ir.Type):
    """conversion.widen."""
    if dtype == "float16" and not HAS_INSTRUCTIONS:
        value, dtype = _widened(builder, value), "float32"
    return conversion.widen(builder, value, dtype, compute)


def widen_unordered(builder: ir.IRBuilder, value, dtype: str, compute: ir.Type):
    """conversion.widen_unordered."""
    if dtype == "float16":
        return widen(builder, value, dtype, compute)
    return conversion.widen_unordered(builder, value, dtype, compute)


def narrow(builder: ir.IRBuilder, value, dtype: str):
    """conversion.narrow."""
    if dtype == "float16" and not HAS_INSTRUCTIONS:
        return _narrowed(builder, conversion.to_float(builder, value))
    if dtype == "bfloat16" and HAS_BFLOAT16 and getattr(value.type, "count", 1) == 2 * _LANES:
        return _narrowed_at_once(builder, conversion.to_float(builder, value))
    return conversion.narrow(builder, value, dtype)


def _narrowed_at_once(builder, value):
    """Of two registers."""
    lower, upper = (
        builder.shuffle_vector(value, value, ir.Constant(_LANE_NUMBERS, list(range(first, first + _LANES))))
        for first in (0, _LANES)
    )
    mask = ir.VectorType(ir.IntType(1), _LANES)
    fpclass = _intrinsic(builder, "llvm.x86.avx512.fpclass.ps.512", mask, [lower.type, _WORD])
    found = [builder.call(fpclass, [one, ir.Constant(_WORD, _SUBNORMAL)]) for one in (lower, upper)]
    found = builder.bitcast(builder.or_(*found), _HALF_WORD)
    pair = ir.VectorType(_HALF_WORD, 2 * _LANES)
    narrow = _intrinsic(builder, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", pair, [lower.type, lower.type])
    with builder.if_else(builder.icmp_unsigned("!=", found, ir.Constant(_HALF_WORD, 0)), likely=False) as (some, none):
        with some:
            by_bits, has_some = conversion.narrow(builder, value, "bfloat16"), builder.block
        with none:
            at_once, has_none = builder.call(narrow, [upper, lower]), builder.block
    result = builder.phi(pair)
    result.add_incoming(by_bits, has_some)
    result.add_incoming(at_once, has_none)
    return result


def _intrinsic(builder, name, result, arguments):
    """One of LLVM's for this CPU. Those with bfloat as a type of its own take words of 16 bits too."""
    known = builder.module.globals.get(name)
    return known or ir.Function(builder.module, ir.FunctionType(result, arguments), name)


def _widened(builder, half):
    word, float_type = shaped(_WORD, half.type), shaped(FLOAT, half.type)
    bits = builder.zext(half, word)
    sign = builder.shl(builder.and_(bits, constant(word, 0x8000)), constant(word, 16))
    size = builder.shl(builder.and_(bits, constant(word, 0x7FFF)), constant(word, _SHORTER))
    exponent = builder.and_(size, constant(word, 0x1F << 23))
    normal = builder.add(size, constant(word, (127 - 15) << 23))
    # Infinity and NaN have the largest exponent in either format.
    beyond = builder.or_(size, constant(word, _INFINITY))
    # Without an exponent the mantissa counts from 0: as one behind the smallest normal number, less that number. No
    # number on the way is so small that a processor could be told to take it for 0.
    small = builder.bitcast(builder.add(normal, constant(word, 1 << 23)), float_type)
    small = builder.bitcast(builder.fsub(small, constant(float_type, _SMALLEST)), word)
    is_small = builder.icmp_unsigned("==", exponent, constant(word, 0))
    is_beyond = builder.icmp_unsigned("==", exponent, constant(word, 0x1F << 23))
    size = builder.select(is_small, small, builder.select(is_beyond, beyond, normal))
    return builder.bitcast(builder.or_(size, sign), float_type)


def _narrowed(builder, value):
    word = shaped(_WORD, value.type)
    bits = builder.bitcast(value, word)
    sign = builder.and_(bits, constant(word, _SIGN))
    size = builder.xor(bits, sign)
    # To even: half a unit of the result, less one where its last bit is 0, carries into what is kept.
    odd = builder.and_(builder.lshr(size, constant(word, _SHORTER)), constant(word, 1))
    normal = builder.add(size, builder.add(odd, constant(word, (1 << (_SHORTER - 1)) - 1)))
    normal = builder.lshr(builder.sub(normal, constant(word, (127 - 15) << 23)), constant(word, _SHORTER))
    # Below the normal numbers the units are those of 0.5 in float32: adding it rounds.
    half = constant(value.type, 0.5)
    small = builder.bitcast(builder.fadd(builder.bitcast(size, value.type), half), word)
    small = builder.sub(small, builder.bitcast(half, word))
    is_small = builder.icmp_unsigned("<", size, constant(word, (127 - 14) << 23))
    is_beyond = builder.icmp_unsigned(">=", size, constant(word, (127 + 16) << 23))
    is_nan = builder.icmp_unsigned(">", size, constant(word, _INFINITY))
    beyond = builder.select(is_nan, constant(word, 0x7E00), constant(word, 0x7C00))
    size = builder.select(is_small, small, builder.select(is_beyond, beyond, normal))
    result = builder.or_(size, builder.lshr(sign, constant(word, 16)))
    return builder.trunc(result, shaped(_HALF_WORD, value.type))
