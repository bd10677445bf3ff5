"""Explicit SIMD vectors for Numba: the words in which the CPU kernels are written.

    along    lanes are neighbouring columns of one row
    across   lanes are neighbouring rows, all in the same column

A vector fills several registers, so that their instructions interleave and hide each other's latency.
A `tag` or `like` is a value whose type says what is meant: a storage format, a number, one of the two vectors.
Functions take vectors and single numbers alike; a number beside a vector is the same in every lane. What is done with
them stands in memory.py, lanes.py and arithmetic.py.
"""

from llvmlite import ir
from numba import types
from numba.core.registry import cpu_target
from numba.extending import intrinsic, models, register_model

from gpusoftmax.kernels import ieee

_INT32 = ir.IntType(32)


def _register_bytes() -> int:
    """Of the CPU that Numba compiles for: the host, or what NUMBA_CPU_NAME and NUMBA_CPU_FEATURES say."""
    _, _, features = cpu_target.target_context.codegen().magic_tuple()
    features = features.split(",")
    return 64 if "+avx512f" in features else 32 if "+avx2" in features else 16


REGISTER_BYTES = _register_bytes()
# Of a vector along a row: two registers, so that the constants of an exponential and the sums keep theirs (Zen 4,
# logsumexp of 8192 columns: 2 of 512 bits 4.6 ns for 16 logits, 4 of them 4.8; with 64-bit numbers 12.1 and 13.6).
VECTOR_BYTES = {64: 128, 32: 64, 16: 64}[REGISTER_BYTES]
# Across rows: what there is to do for a block of rows is done for more of them.
ACROSS_BYTES = {64: 256, 32: 64, 16: 64}[REGISTER_BYTES]


class Vector(types.Type):
    def __init__(self, element: types.Float, is_across: bool, n_bytes: int | None = None):
        self.element = element
        self.is_across = is_across
        self.lanes = (n_bytes or (ACROSS_BYTES if is_across else VECTOR_BYTES)) * 8 // element.bitwidth
        super().__init__(name=f"Vector({element} x {self.lanes}, {'across' if is_across else 'along'})")


class Way(types.Type):
    """How a kernel walks over rows, see walk.py, with vectors along them that have so many bytes."""

    def __init__(self, way: str, n_bytes: int = VECTOR_BYTES):
        self.way = way
        self.n_bytes = n_bytes
        super().__init__(name=f"Way({way}, {n_bytes})")


register_model(Way)(models.OpaqueModel)


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    def __init__(self, manager, type):
        element = manager.lookup(type.element).get_value_type()
        super().__init__(manager, type, ir.VectorType(element, type.lanes))


def _number_of(like):
    """The type of the numbers in a vector, or of a number."""
    return like.element if isinstance(like, Vector) else like


def _constant(of):
    """An intrinsic whose value follows from its argument's type."""

    @intrinsic
    def constant(typingctx, like):
        value = of(like)
        type = types.boolean if isinstance(value, bool) else types.intp
        return type(like), lambda context, builder, signature, args: context.get_constant(type, value)

    return constant


is_half = _constant(lambda tag: tag in (types.int16, types.uint16))
size_of = _constant(lambda like: like.bitwidth // 8)
lanes_of = _constant(lambda like: like.lanes if isinstance(like, Vector) else 1)
is_across = _constant(lambda like: isinstance(like, Vector) and like.is_across)
# How many columns one vector covers, and how far apart the columns are that one lane of a vector along a row sums.
cols_of = _constant(lambda like: 1 if like.is_across else like.lanes)
stripe_of = _constant(lambda like: VECTOR_BYTES * 8 // like.element.bitwidth if like.is_across else like.lanes)
# How many numbers a register holds: the size of the squares that are transposed or folded.
square_of = _constant(lambda like: REGISTER_BYTES * 8 // _number_of(like).bitwidth)


def first_lanes(builder, count, lanes):
    """A mask of the first `count` lanes; none if it is negative."""
    all_lanes = ir.Constant(count.type, lanes)
    count = builder.trunc(builder.select(builder.icmp_signed("<", count, all_lanes), count, all_lanes), _INT32)
    type = ir.VectorType(_INT32, lanes)
    single = builder.insert_element(ir.Constant(type, ir.Undefined), count, ir.Constant(_INT32, 0))
    counts = builder.shuffle_vector(single, single, ir.Constant(type, None))
    return builder.icmp_signed(">", counts, ir.Constant(type, list(range(lanes))))


def _vector_of_equal_lanes(is_across: bool):
    @intrinsic
    def splat(typingctx, scalar):
        """A vector with the same number in every lane."""
        vector = Vector(scalar, is_across)

        def codegen(context, builder, signature, args):
            return ieee.Arithmetic(builder, context.get_value_type(vector)).splat(args[0])

        return vector(scalar), codegen

    return splat


along = _vector_of_equal_lanes(is_across=False)
across = _vector_of_equal_lanes(is_across=True)


@intrinsic
def along_in(typingctx, way, scalar):
    """`along`, as wide as the way asks for."""
    vector = Vector(scalar, False, way.n_bytes)

    def codegen(context, builder, signature, args):
        return ieee.Arithmetic(builder, context.get_value_type(vector)).splat(args[1])

    return vector(way, scalar), codegen


@intrinsic
def widest(typingctx, vector):
    """A vector of equal lanes in as many registers as across rows: for loops that carry comparisons from vector to
    vector, which wait for each other, and hold no constants.
    """
    wide = vector if vector.is_across else Vector(vector.element, False, ACROSS_BYTES)

    def codegen(context, builder, signature, args):
        if wide is vector:
            return args[0]
        lane = builder.extract_element(args[0], ir.Constant(_INT32, 0))
        return ieee.Arithmetic(builder, context.get_value_type(wide)).splat(lane)

    return wide(vector), codegen


def in_blocks(n_bytes: int):
    """An intrinsic of the way in blocks, see walk.py."""

    @intrinsic
    def way(typingctx):
        return Way("in blocks", n_bytes)(), lambda context, builder, signature, args: context.get_dummy_value()

    return way


@intrinsic
def unless_none(typingctx, other, value):
    """The value, or None if there is no other."""
    if isinstance(other, types.NoneType):
        return other(other, value), lambda context, builder, signature, args: context.get_dummy_value()
    return value(other, value), lambda context, builder, signature, args: args[1]


@intrinsic
def number(typingctx, like, value):
    """A constant in the computation format of `like`."""
    constant = value.literal_value if isinstance(value, types.Literal) else None
    type = _number_of(like)

    def codegen(context, builder, signature, args):
        if constant is not None:
            return context.get_constant(type, constant)
        return context.cast(builder, args[1], signature.args[1], type)

    return type(like, value), codegen


@intrinsic
def column_numbers(typingctx, like):
    """The columns of a vector, from 0 on: 0, 1, 2, ... along a row; 0 in every lane across rows."""

    def codegen(context, builder, signature, args):
        numbers = [0.0 if like.is_across else float(lane) for lane in range(like.lanes)]
        return ir.Constant(context.get_value_type(like), [ir.Constant(args[0].type.element, n) for n in numbers])

    return like(like), codegen
