"""Widening and narrowing between storage and computation formats, as LLVM instructions for one value or a vector.

float16 and bfloat16 travel as their bit patterns. Numba tells them apart by the sign of the integer that holds them:
an int16 is a float16, a uint16 is a bfloat16 (its bits are the upper half of a float32).
"""

from llvmlite import ir

from gpusoftmax.kernels.operands import LABELS, TOO_LARGE

HALF = ir.HalfType()
FLOAT = ir.FloatType()
DOUBLE = ir.DoubleType()


def shaped(element: ir.Type, like: ir.Type) -> ir.Type:
    return ir.VectorType(element, like.count) if isinstance(like, ir.VectorType) else element


def constant(type: ir.Type, value):
    if isinstance(type, ir.VectorType):
        return ir.Constant(type, [ir.Constant(type.element, value)] * type.count)
    return ir.Constant(type, value)


def _is_double(type: ir.Type) -> bool:
    return isinstance(type.element if isinstance(type, ir.VectorType) else type, ir.DoubleType)


def widen(builder: ir.IRBuilder, value, dtype: str, compute: ir.Type):
    """A stored value (bits for the half types) as a number of type `compute`: exact."""
    if dtype == "bfloat16":
        wide = builder.zext(value, shaped(ir.IntType(32), value.type))
        value = builder.bitcast(builder.shl(wide, constant(wide.type, 16)), shaped(FLOAT, value.type))
    elif dtype == "float16":
        value = builder.fpext(builder.bitcast(value, shaped(HALF, value.type)), shaped(FLOAT, value.type))
    if _is_double(compute) and not _is_double(value.type):
        value = builder.fpext(value, compute)
    return value


def widen_unordered(builder: ir.IRBuilder, value, dtype: str, compute: ir.Type):
    """`widen` of a vector, its lanes in any order: two bfloat16 are halves of a word, which need not be moved apart."""
    if dtype != "bfloat16" or _is_double(compute):
        return widen(builder, value, dtype, compute)
    words = builder.bitcast(value, ir.VectorType(ir.IntType(32), value.type.count // 2))
    lower = builder.shl(words, constant(words.type, 16))
    upper = builder.and_(words, constant(words.type, 0xFFFF0000))
    both = ir.Constant(ir.VectorType(ir.IntType(32), value.type.count), list(range(value.type.count)))
    return builder.bitcast(builder.shuffle_vector(lower, upper, both), shaped(FLOAT, value.type))


def narrow(builder: ir.IRBuilder, value, dtype: str):
    """A number in storage format, rounded once to nearest even."""
    if dtype == "float64":
        return builder.fpext(value, shaped(DOUBLE, value.type)) if not _is_double(value.type) else value
    if dtype == "float32":
        return builder.fptrunc(value, shaped(FLOAT, value.type)) if _is_double(value.type) else value
    value = to_float(builder, value)
    bits_type = shaped(ir.IntType(16), value.type)
    if dtype == "float16":
        return builder.bitcast(builder.fptrunc(value, shaped(HALF, value.type)), bits_type)
    bits = builder.bitcast(value, shaped(ir.IntType(32), value.type))
    sixteen, one = constant(bits.type, 16), constant(bits.type, 1)
    even = builder.and_(builder.lshr(bits, sixteen), one)
    rounded = builder.add(bits, builder.add(even, constant(bits.type, 0x7FFF)))
    # Rounding could carry a NaN's payload into infinity.
    quiet = builder.or_(bits, constant(bits.type, 0x00400000))
    bits = builder.select(builder.fcmp_unordered("uno", value, value), quiet, rounded)
    if not isinstance(bits.type, ir.VectorType):
        return builder.trunc(builder.lshr(bits, sixteen), bits_type)
    # Where there are vectors, one shuffle takes the upper halves of two registers.
    halves = builder.bitcast(bits, ir.VectorType(ir.IntType(16), 2 * bits.type.count))
    upper = ir.Constant(ir.VectorType(ir.IntType(32), bits.type.count), [2 * k + 1 for k in range(bits.type.count)])
    return builder.shuffle_vector(halves, halves, upper)


def to_float(builder: ir.IRBuilder, value):
    """double -> float, rounded to odd: a second rounding to a half type then acts as if it were the only one."""
    if not _is_double(value.type):
        return value
    float_type = shaped(FLOAT, value.type)
    nearest = builder.fptrunc(value, float_type)
    back = builder.fpext(nearest, value.type)
    bits = builder.bitcast(nearest, shaped(ir.IntType(32), value.type))
    long = shaped(ir.IntType(64), value.type)
    positive = constant(long, (1 << 63) - 1)
    # Magnitudes compare as integers: one step back where rounding went away from zero.
    too_far = builder.icmp_unsigned(
        ">",
        builder.and_(builder.bitcast(back, long), positive),
        builder.and_(builder.bitcast(value, long), positive),
    )
    truncated = builder.select(too_far, builder.sub(bits, constant(bits.type, 1)), bits)
    inexact = builder.fcmp_ordered("!=", back, value)
    odd = builder.or_(truncated, constant(bits.type, 1))
    return builder.bitcast(builder.select(inexact, odd, bits), float_type)


def load_label(builder: ir.IRBuilder, address, index, code, address_space: int = 0):
    """The label number `index` of those at `address`, as int64; a uint64 that does not fit becomes TOO_LARGE.

    The integer type is chosen at run time, by `label_code`: the branch is the same for every row and saves compiling
    each kernel eight times.
    """
    long = ir.IntType(64)
    at = builder.add(address, builder.shl(index, builder.lshr(code, ir.Constant(long, 1))))
    end = builder.append_basic_block("label.end")
    unknown = builder.block
    switch = builder.switch(code, end)
    loaded = [(ir.Constant(long, -1), unknown)]
    for number, dtype in enumerate(LABELS):
        block = builder.append_basic_block(f"label.{dtype}")
        switch.add_case(ir.Constant(long, number), block)
        builder.position_at_end(block)
        stored = ir.IntType(8 << (number // 2))
        value = builder.load(builder.inttoptr(at, stored.as_pointer(address_space)), align=stored.width // 8)
        unsigned = dtype.startswith("u")
        if stored.width < 64:
            value = builder.zext(value, long) if unsigned else builder.sext(value, long)
        elif unsigned:
            too_large = builder.icmp_signed("<", value, ir.Constant(long, 0))
            value = builder.select(too_large, ir.Constant(long, TOO_LARGE), value)
        loaded.append((value, builder.block))
        builder.branch(end)
    builder.position_at_end(end)
    label = builder.phi(long)
    for value, block in loaded:
        label.add_incoming(value, block)
    return label
