"""Explicit SIMD vectors for Numba: the words in which the CPU kernels are written.

A vector holds 64 bytes: 16 float32 or 8 float64 lanes. LLVM maps it to one AVX-512 register, two AVX2 or four NEON
ones; the lanes, and so the bits of every result, are the same. The arithmetic stands in `gpusoftmax.kernels.formulas`.

Kernels take addresses as integers and turn them into typed pointers here (an array argument would cost reference
counting in every loop). A `tag` is a scalar whose type names a storage format, see `gpusoftmax.kernels.conversion`.
"""

import functools

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

from gpusoftmax.kernels import conversion, formulas
from gpusoftmax.kernels.binding import bind

VECTOR_BYTES = 64


class Vector(types.Type):
    def __init__(self, element: types.Float):
        self.element = element
        super().__init__(name=f"Vector({element})")

    @property
    def lanes(self) -> int:
        return VECTOR_BYTES * 8 // self.element.bitwidth


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    def __init__(self, manager, type):
        element = manager.lookup(type.element).get_value_type()
        super().__init__(manager, type, ir.VectorType(element, type.lanes))


STORED_DTYPE = {types.int16: "float16", types.uint16: "bfloat16", types.float32: "float32", types.float64: "float64"}


def _splat(builder, scalar, type):
    single = builder.insert_element(ir.Constant(type, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(single, single, ir.Constant(ir.VectorType(ir.IntType(32), type.count), None))


def _vector_pointer(builder, pointer, element, lanes):
    return builder.bitcast(pointer, ir.VectorType(element, lanes).as_pointer())


# ---------------------------------------------------------------- pointers


@intrinsic
def pointer_to(typingctx, address, tag):
    """A typed pointer from an address."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(tag)(address, tag), codegen


@intrinsic
def advance(typingctx, pointer, offset):
    """pointer + offset, in elements."""
    return pointer(pointer, types.intp), lambda context, builder, signature, args: builder.gep(args[0], [args[1]])


@intrinsic
def address_of(typingctx, array):
    """The address of an array's first element. The array must be used after the last access through it."""

    def codegen(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.ptrtoint(data, context.get_value_type(types.intp))

    return types.intp(array), codegen


@intrinsic
def lanes_of(typingctx, like):
    """How many numbers of this type a vector holds."""
    lanes = Vector(like).lanes

    def codegen(context, builder, signature, args):
        return context.get_constant(types.intp, lanes)

    return types.intp(like), codegen


# ---------------------------------------------------------------- memory


@intrinsic
def load(typingctx, pointer, index, like):
    """The numbers stored at pointer[index:index + lanes], in the computation format of `like`; any alignment."""
    vector = Vector(like)
    dtype = STORED_DTYPE[pointer.dtype]

    def codegen(context, builder, signature, args):
        stored = context.get_value_type(pointer.dtype)
        address = _vector_pointer(builder, builder.gep(args[0], [args[1]]), stored, vector.lanes)
        value = builder.load(address, align=pointer.dtype.bitwidth // 8)
        return conversion.widen(builder, value, dtype, context.get_value_type(vector))

    return vector(pointer, types.intp, like), codegen


@intrinsic
def store(typingctx, pointer, index, vector):
    """Rounds the lanes to the storage format and writes them to pointer[index:index + lanes]; any alignment."""
    dtype = STORED_DTYPE[pointer.dtype]

    def codegen(context, builder, signature, args):
        stored = context.get_value_type(pointer.dtype)
        address = _vector_pointer(builder, builder.gep(args[0], [args[1]]), stored, vector.lanes)
        builder.store(conversion.narrow(builder, args[2], dtype), address, align=pointer.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(pointer, types.intp, vector), codegen


@intrinsic
def load_one(typingctx, pointer, index, like):
    """The number stored at pointer[index]."""
    dtype = STORED_DTYPE[pointer.dtype]

    def codegen(context, builder, signature, args):
        value = builder.load(builder.gep(args[0], [args[1]]), align=pointer.dtype.bitwidth // 8)
        return conversion.widen(builder, value, dtype, context.get_value_type(like))

    return like(pointer, types.intp, like), codegen


@intrinsic
def store_one(typingctx, pointer, index, value):
    """Rounds one number to the storage format and writes it to pointer[index]."""
    dtype = STORED_DTYPE[pointer.dtype]

    def codegen(context, builder, signature, args):
        address = builder.gep(args[0], [args[1]])
        builder.store(conversion.narrow(builder, args[2], dtype), address, align=pointer.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(pointer, types.intp, value), codegen


@intrinsic
def load_label(typingctx, address, index, code):
    """The label number `index` of those at `address`, as int64; see conversion.load_label."""

    def codegen(context, builder, signature, args):
        return conversion.load_label(builder, *args)

    return types.int64(types.int64, types.int64, types.int64), codegen


# ---------------------------------------------------------------- lanes


@intrinsic
def splat(typingctx, scalar):
    """A vector with the same number in every lane."""
    vector = Vector(scalar)

    def codegen(context, builder, signature, args):
        return _splat(builder, args[0], context.get_value_type(vector))

    return vector(scalar), codegen


@intrinsic
def number(typingctx, like, value):
    """A constant in the computation format of `like`."""
    constant = value.literal_value if isinstance(value, types.Literal) else None

    def codegen(context, builder, signature, args):
        if constant is not None:
            return context.get_constant(like, constant)
        return context.cast(builder, args[1], signature.args[1], like)

    return like(like, value), codegen


def _halves(builder, value):
    half = value.type.count // 2
    index = ir.VectorType(ir.IntType(32), half)
    low = builder.shuffle_vector(value, value, ir.Constant(index, list(range(half))))
    high = builder.shuffle_vector(value, value, ir.Constant(index, list(range(half, 2 * half))))
    return low, high


def _horizontal(operation):
    """Folds a vector in halves: lanes 0 1 2 3 4 5 6 7 -> 04 15 26 37 -> 0426 1537 -> one number."""

    @intrinsic
    def fold(typingctx, vector):
        def codegen(context, builder, signature, args):
            value = args[0]
            while value.type.count > 1:
                low, high = _halves(builder, value)
                value = operation(formulas.Arithmetic(builder, low.type), low, high)
            return builder.extract_element(value, ir.Constant(ir.IntType(32), 0))

        return vector.element(vector), codegen

    return fold


horizontal_max = _horizontal(formulas.Arithmetic.maximum)
horizontal_sum = _horizontal(formulas.Arithmetic.add)


# ---------------------------------------------------------------- arithmetic, on vectors and on single numbers

formula = functools.partial(bind, intrinsic, types, formulas.Arithmetic)

add = formula(formulas.Arithmetic.add)
sub = formula(formulas.Arithmetic.sub)
mul = formula(formulas.Arithmetic.mul)
div = formula(formulas.Arithmetic.div)
fma = formula(formulas.Arithmetic.fma)
negative = formula(formulas.Arithmetic.negative)
maximum = formula(formulas.Arithmetic.maximum)
two_sum = formula(formulas.two_sum, n_results=2)
add_pair = formula(formulas.add_pair, n_results=2)
transform_logit = formula(formulas.transform)
finite_or_zero = formula(formulas.finite_or_zero)
gap = formula(formulas.gap, n_results=2)
exp = formula(formulas.exp)
exp_gap = formula(formulas.exp_gap)
tie = formula(formulas.tie)
tail_term = formula(formulas.tail_term)
reference = formula(formulas.reference)
merge = formula(formulas.merge, n_results=4)
inverse_sum = formula(formulas.inverse_sum)
log_sum = formula(formulas.log_sum, n_results=2)
logsumexp = formula(formulas.logsumexp)
negative_log_probability = formula(formulas.negative_log_probability)
