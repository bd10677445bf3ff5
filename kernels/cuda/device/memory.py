"""Global memory: single elements and 16-byte vectors of every storage format.

A pointer's element type names the format (see `gpusoftmax.kernels.conversion`): int16 holds the bits of a float16,
uint16 those of a bfloat16. Every kernel converts here and nowhere else.
"""

from llvmlite import ir

from gpusoftmax.kernels import conversion
from gpusoftmax.kernels.cuda.device._cuda import intrinsic, types
from gpusoftmax.kernels.cuda.plan import COLS_PER_THREAD, WARP_SIZE

GLOBAL_SPACE, SHARED_SPACE = 1, 3
VECTOR_BYTES = 16
STORED_DTYPE = {types.int16: "float16", types.uint16: "bfloat16", types.float32: "float32", types.float64: "float64"}


def _width(pointer) -> int:
    return VECTOR_BYTES * 8 // pointer.dtype.bitwidth


def _global(builder, pointer, index, type):
    address = builder.bitcast(builder.gep(pointer, [index]), type.as_pointer())
    return builder.addrspacecast(address, type.as_pointer(GLOBAL_SPACE), str(GLOBAL_SPACE))


@intrinsic
def vector_width(typingctx, pointer):
    """How many elements a 16-byte access holds."""

    def codegen(context, builder, signature, args):
        return context.get_constant(types.int64, _width(pointer))

    return types.int64(pointer), codegen


@intrinsic
def advance(typingctx, pointer, offset):
    """pointer + offset, in elements."""
    return pointer(pointer, types.int64), lambda context, builder, signature, args: builder.gep(args[0], [args[1]])


@intrinsic
def is_vector_aligned(typingctx, pointer):
    """Whether a 16-byte access at this pointer is allowed."""

    def codegen(context, builder, signature, args):
        address = builder.ptrtoint(args[0], ir.IntType(64))
        low = builder.and_(address, ir.Constant(ir.IntType(64), VECTOR_BYTES - 1))
        return builder.icmp_unsigned("==", low, ir.Constant(ir.IntType(64), 0))

    return types.boolean(pointer), codegen


@intrinsic
def is_null(typingctx, pointer):
    """Whether the caller passed no array."""

    def codegen(context, builder, signature, args):
        return builder.icmp_unsigned("==", builder.ptrtoint(args[0], ir.IntType(64)), ir.Constant(ir.IntType(64), 0))

    return types.boolean(pointer), codegen


@intrinsic
def load(typingctx, pointer, index, like):
    """The number at pointer[index], in the computation format of `like`."""
    dtype = STORED_DTYPE[pointer.dtype]

    def codegen(context, builder, signature, args):
        stored = context.get_value_type(pointer.dtype)
        value = builder.load(_global(builder, args[0], args[1], stored), align=pointer.dtype.bitwidth // 8)
        return conversion.widen(builder, value, dtype, context.get_value_type(like))

    return like(pointer, types.int64, like), codegen


@intrinsic
def store(typingctx, pointer, index, value):
    """pointer[index] = value, rounded once to the storage format."""
    dtype = STORED_DTYPE[pointer.dtype]

    def codegen(context, builder, signature, args):
        stored = context.get_value_type(pointer.dtype)
        address = _global(builder, args[0], args[1], stored)
        builder.store(conversion.narrow(builder, args[2], dtype), address, align=pointer.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(pointer, types.int64, value), codegen


def _vector_type(stored, width):
    """Half types travel in pairs, as words: NVVM splits a vector of sixteen-bit lanes into several accesses."""
    if isinstance(stored, ir.IntType):
        return ir.VectorType(ir.IntType(32), VECTOR_BYTES // 4)
    return ir.VectorType(stored, width)


def _lanes(builder, vector, stored):
    lanes = [builder.extract_element(vector, ir.Constant(ir.IntType(32), k)) for k in range(vector.type.count)]
    if not isinstance(stored, ir.IntType):
        return lanes
    sixteen = ir.Constant(ir.IntType(32), 16)
    return [builder.trunc(part, stored) for word in lanes for part in (word, builder.lshr(word, sixteen))]


def _from_lanes(builder, lanes, type):
    if isinstance(type.element, ir.IntType):
        sixteen = ir.Constant(ir.IntType(32), 16)
        words = [builder.zext(lane, ir.IntType(32)) for lane in lanes]
        lanes = [
            builder.or_(low, builder.shl(high, sixteen)) for low, high in zip(words[::2], words[1::2], strict=True)
        ]
    vector = ir.Constant(type, ir.Undefined)
    for k, lane in enumerate(lanes):
        vector = builder.insert_element(vector, lane, ir.Constant(ir.IntType(32), k))
    return vector


@intrinsic
def load_vector(typingctx, pointer, index, held, first):
    """held[first:] = the `vector_width` numbers at pointer[index:], read in one 16-byte access."""
    width = _width(pointer)
    dtype = STORED_DTYPE[pointer.dtype]

    def codegen(context, builder, signature, args):
        stored = context.get_value_type(pointer.dtype)
        vector = _global(builder, args[0], args[1], _vector_type(stored, width))
        compute = context.get_value_type(held.dtype)
        for k, lane in enumerate(_lanes(builder, builder.load(vector, align=VECTOR_BYTES), stored)):
            slot = builder.gep(args[2], [builder.add(args[3], ir.Constant(ir.IntType(64), k))])
            builder.store(conversion.widen(builder, lane, dtype, compute), slot)
        return context.get_dummy_value()

    return types.void(pointer, types.int64, held, types.int64), codegen


@intrinsic
def store_vector(typingctx, pointer, index, held, first):
    """pointer[index : index + vector_width] = held[first:], each rounded once, written in one 16-byte access."""
    width = _width(pointer)
    dtype = STORED_DTYPE[pointer.dtype]

    def codegen(context, builder, signature, args):
        slots = [builder.gep(args[2], [builder.add(args[3], ir.Constant(ir.IntType(64), k))]) for k in range(width)]
        lanes = [conversion.narrow(builder, builder.load(slot), dtype) for slot in slots]
        type = _vector_type(context.get_value_type(pointer.dtype), width)
        address = _global(builder, args[0], args[1], type)
        builder.store(_from_lanes(builder, lanes, type), address, align=VECTOR_BYTES)
        return context.get_dummy_value()

    return types.void(pointer, types.int64, held, types.int64), codegen


@intrinsic
def load_label(typingctx, address, index, code):
    """The label number `index` of those at `address`, as int64; see conversion.load_label."""

    def codegen(context, builder, signature, args):
        return conversion.load_label(builder, *args, address_space=GLOBAL_SPACE)

    return types.int64(types.int64, types.int64, types.int64), codegen


# ---------------------------------------------------------------- memory of one thread and of one block


@intrinsic
def thread_numbers(typingctx, like):
    """COLS_PER_THREAD numbers per thread. They live in registers: every index is a constant once loops are unrolled."""

    def codegen(context, builder, signature, args):
        type = ir.ArrayType(context.get_value_type(like), COLS_PER_THREAD)
        with builder.goto_entry_block():
            array = builder.alloca(type)
        return builder.bitcast(array, context.get_value_type(like).as_pointer())

    return types.CPointer(like)(like), codegen


@intrinsic
def block_numbers(typingctx, like):
    """One number per warp, shared by the block: scratch for reduce.py. Each call in a kernel makes its own."""

    def codegen(context, builder, signature, args):
        element = context.get_value_type(like)
        name = builder.module.get_unique_name("block_numbers")
        array = ir.GlobalVariable(builder.module, ir.ArrayType(element, WARP_SIZE), name, SHARED_SPACE)
        array.linkage = "internal"
        array.initializer = ir.Constant(array.value_type, ir.Undefined)
        array.align = 8
        first = builder.bitcast(array, element.as_pointer(SHARED_SPACE))
        return builder.addrspacecast(first, element.as_pointer())

    return types.CPointer(like)(like), codegen
