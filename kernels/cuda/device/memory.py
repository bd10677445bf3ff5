"""Global memory: single elements and 16-byte vectors of every storage format.

A pointer's element type names the format (see `gpusoftmax.kernels.conversion`): int16 holds the bits of a float16,
uint16 those of a bfloat16. Every kernel converts here and nowhere else.
"""

from llvmlite import ir

from gpusoftmax.kernels import conversion
from gpusoftmax.kernels.cuda.device._cuda import device, intrinsic, types
from gpusoftmax.kernels.cuda.plan import WARP_SIZE, values_per_lane
from gpusoftmax.kernels.operands import ONE_VALUE

GLOBAL_SPACE, SHARED_SPACE = 1, 3
VECTOR_BYTES, LINE_BYTES = 16, 128
MAX_RUNS = 8  # values_per_lane numbers of the computation format
STORED_DTYPE = {types.int16: "float16", types.uint16: "bfloat16", types.float32: "float32", types.float64: "float64"}


def _width(pointer) -> int:
    return VECTOR_BYTES * 8 // pointer.dtype.bitwidth


def compiled_for(builder, architecture):
    """Whether the PTX is made for sm_<architecture> or later: a constant by the time there is PTX.

    Helpers are compiled once for all architectures; NVVM answers `__nvvm_reflect` and drops the branch not taken.
    """
    module, name = builder.module, "__nvvm_reflect"
    question = module.globals.get("gpusoftmax_architecture")
    if question is None:
        text = bytearray(b"__CUDA_ARCH\0")
        question = ir.GlobalVariable(module, ir.ArrayType(ir.IntType(8), len(text)), "gpusoftmax_architecture")
        question.global_constant, question.linkage = True, "private"
        question.initializer = ir.Constant(question.value_type, text)
    word, byte = ir.IntType(32), ir.IntType(8).as_pointer()
    reflect = module.globals.get(name) or ir.Function(module, ir.FunctionType(word, [byte]), name)
    answer = builder.call(reflect, [builder.bitcast(question, byte)])
    return builder.icmp_signed(">=", answer, ir.Constant(word, architecture * 10))


def global_address(builder, pointer, index, type):
    """The address of pointer[index] in global memory, as a pointer to `type`."""
    address = builder.bitcast(builder.gep(pointer, [index]), type.as_pointer())
    return builder.addrspacecast(address, type.as_pointer(GLOBAL_SPACE), str(GLOBAL_SPACE))


@intrinsic
def vector_width(typingctx, pointer):
    """How many elements a 16-byte access holds."""

    def codegen(context, builder, signature, args):
        return context.get_constant(types.int64, _width(pointer))

    return types.int64(pointer), codegen


@intrinsic
def stored_in_halves(typingctx, pointer):
    """Whether the elements have sixteen bits; a constant."""

    def codegen(context, builder, signature, args):
        return context.get_constant(types.boolean, pointer.dtype.bitwidth == 16)

    return types.boolean(pointer), codegen


@intrinsic
def vector_bits(typingctx, pointer):
    """log2(vector_width)."""

    def codegen(context, builder, signature, args):
        return context.get_constant(types.int32, _width(pointer).bit_length() - 1)

    return types.int32(pointer), codegen


@intrinsic
def advance(typingctx, pointer, offset):
    """pointer + offset, in elements."""
    return pointer(pointer, types.int64), lambda context, builder, signature, args: builder.gep(args[0], [args[1]])


@intrinsic
def element_size(typingctx, pointer):
    """Bytes of an element."""

    def codegen(context, builder, signature, args):
        return context.get_constant(types.int64, pointer.dtype.bitwidth // 8)

    return types.int64(pointer), codegen


@intrinsic
def misalignment(typingctx, pointer):
    """How many elements lie between the last 16-byte boundary and this pointer."""
    size = pointer.dtype.bitwidth // 8

    def codegen(context, builder, signature, args):
        long = ir.IntType(64)
        low = builder.and_(builder.ptrtoint(args[0], long), ir.Constant(long, VECTOR_BYTES - 1))
        return builder.lshr(low, ir.Constant(long, size.bit_length() - 1))

    return types.int64(pointer), codegen


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
        value = builder.load(global_address(builder, args[0], args[1], stored), align=pointer.dtype.bitwidth // 8)
        return conversion.widen(builder, value, dtype, context.get_value_type(like))

    return like(pointer, types.int64, like), codegen


@intrinsic
def load_stored(typingctx, pointer, index):
    """The element at pointer[index] as it is stored."""

    def codegen(context, builder, signature, args):
        address = global_address(builder, args[0], args[1], context.get_value_type(pointer.dtype))
        return builder.load(address, align=pointer.dtype.bitwidth // 8)

    return pointer.dtype(pointer, types.int64), codegen


@intrinsic
def load_vector(typingctx, pointer, index, values):
    """values[:vector_width] = pointer[index:], sixteen aligned bytes."""
    dtype = STORED_DTYPE[pointer.dtype]

    def codegen(context, builder, signature, args):
        stored = context.get_value_type(pointer.dtype)
        address = global_address(builder, args[0], args[1], vector_type(stored))
        lanes = lanes_of_vector(builder, builder.load(address, align=VECTOR_BYTES), stored)
        for k, lane in enumerate(lanes):
            number = conversion.widen(builder, lane, dtype, context.get_value_type(values.dtype))
            builder.store(number, builder.gep(args[2], [ir.Constant(ir.IntType(64), k)]))
        return context.get_dummy_value()

    return types.void(pointer, types.int64, values), codegen


@intrinsic
def load_bytes(typingctx, pointer, index, count):
    """The 2, 4 or 8 (a literal) aligned bytes from pointer[index] on, in one access; the first is the lowest."""
    if not isinstance(count, types.IntegerLiteral):
        return None  # Numba asks again with the literal
    n_bytes = count.literal_value

    def codegen(context, builder, signature, args):
        address = global_address(builder, args[0], args[1], ir.IntType(8 * n_bytes))
        return builder.zext(builder.load(address, align=n_bytes), ir.IntType(64))

    return types.uint64(pointer, types.int64, count), codegen


@intrinsic
def prefetch(typingctx, pointer, index):
    """The line of pointer[index] on its way into the second-level cache; nobody waits for it."""

    def codegen(context, builder, signature, args):
        address = builder.ptrtoint(global_address(builder, args[0], args[1], ir.IntType(8)), ir.IntType(64))
        function = ir.FunctionType(ir.VoidType(), [address.type])
        builder.call(ir.InlineAsm(function, "prefetch.global.L2 [$0];", "l", True), [address])
        return context.get_dummy_value()

    return types.void(pointer, types.int64), codegen


@intrinsic
def store(typingctx, pointer, index, value):
    """pointer[index] = value, rounded once to the storage format."""
    dtype = STORED_DTYPE[pointer.dtype]

    def codegen(context, builder, signature, args):
        stored = context.get_value_type(pointer.dtype)
        address = global_address(builder, args[0], args[1], stored)
        builder.store(conversion.narrow(builder, args[2], dtype), address, align=pointer.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(pointer, types.int64, value), codegen


def vector_type(stored):
    """Half types travel in pairs, as words: NVVM splits a vector of sixteen-bit lanes into several accesses."""
    if isinstance(stored, ir.IntType):
        return ir.VectorType(ir.IntType(32), VECTOR_BYTES // 4)
    return ir.VectorType(stored, 4 if isinstance(stored, ir.FloatType) else 2)


def lanes_of_vector(builder, vector, stored):
    """The stored values of a vector of `vector_type`."""
    lanes = [builder.extract_element(vector, ir.Constant(ir.IntType(32), k)) for k in range(vector.type.count)]
    if not isinstance(stored, ir.IntType):
        return lanes
    sixteen = ir.Constant(ir.IntType(32), 16)
    return [builder.trunc(part, stored) for word in lanes for part in (word, builder.lshr(word, sixteen))]


def _narrow_pair(builder, low, high, dtype):
    """Two numbers as one word of a half type, each rounded once: one instruction where there is one (sm_80)."""
    word, sixteen = ir.IntType(32), ir.Constant(ir.IntType(32), 16)

    def halves():
        parts = [builder.zext(conversion.narrow(builder, part, dtype), word) for part in (low, high)]
        return builder.or_(parts[0], builder.shl(parts[1], sixteen))

    if not isinstance(low.type, ir.FloatType):
        return halves()
    with builder.if_else(compiled_for(builder, 80)) as (at_once, apart):
        with at_once:
            name = {"float16": "f16x2", "bfloat16": "bf16x2"}[dtype]
            function = ir.FunctionType(word, [low.type, low.type])
            convert = ir.InlineAsm(function, f"cvt.rn.{name}.f32 $0, $2, $1;", "=r,f,f")
            both, first = builder.call(convert, [low, high]), builder.block
        with apart:
            each, second = halves(), builder.block
    result = builder.phi(word)
    result.add_incoming(both, first)
    result.add_incoming(each, second)
    return result


def vector_of(builder, context, pointer, values):
    """The numbers at `values`, each rounded once, as the sixteen bytes that a pointer's elements are."""
    width, dtype = _width(pointer), STORED_DTYPE[pointer.dtype]
    numbers = [builder.load(builder.gep(values, [ir.Constant(ir.IntType(64), k)])) for k in range(width)]
    if width == VECTOR_BYTES // 2:
        pairs = zip(numbers[::2], numbers[1::2], strict=True)
        lanes = [_narrow_pair(builder, low, high, dtype) for low, high in pairs]
    else:
        lanes = [conversion.narrow(builder, number, dtype) for number in numbers]
    vector = ir.Constant(vector_type(context.get_value_type(pointer.dtype)), ir.Undefined)
    for k, lane in enumerate(lanes):
        vector = builder.insert_element(vector, lane, ir.Constant(ir.IntType(32), k))
    return vector


@intrinsic
def store_vector(typingctx, pointer, index, values):
    """pointer[index : index + vector_width] = values, each rounded once, written in one 16-byte access."""

    def codegen(context, builder, signature, args):
        vector = vector_of(builder, context, pointer, args[2])
        builder.store(vector, global_address(builder, args[0], args[1], vector.type), align=VECTOR_BYTES)
        return context.get_dummy_value()

    return types.void(pointer, types.int64, values), codegen


@intrinsic
def load_label(typingctx, address, index, code):
    """The label number `index` of those at `address`, as int64; see conversion.load_label."""

    def codegen(context, builder, signature, args):
        return conversion.load_label(builder, *args, address_space=GLOBAL_SPACE)

    return types.int64(types.int64, types.int64, types.int64), codegen


@intrinsic
def number_of(typingctx, integer, like):
    """A number of the computation format that stands for an int32, as `integer_of` reads it: its bits, or its value."""

    def codegen(context, builder, signature, args):
        type = context.get_value_type(like)
        return builder.bitcast(args[0], type) if like.bitwidth == 32 else builder.sitofp(args[0], type)

    return like(types.int32, like), codegen


@intrinsic
def integer_of(typingctx, number):
    """The int32 for which a number stands."""

    def codegen(context, builder, signature, args):
        type = ir.IntType(32)
        return builder.bitcast(args[0], type) if number.bitwidth == 32 else builder.fptosi(args[0], type)

    return types.int32(number), codegen


@intrinsic
def store_integer(typingctx, address, index, value):
    """The int64 number `index` of those at `address` = value."""

    def codegen(context, builder, signature, args):
        long = ir.IntType(64)
        at = builder.add(args[0], builder.shl(args[1], ir.Constant(long, 3)))
        builder.store(args[2], builder.inttoptr(at, long.as_pointer(GLOBAL_SPACE)), align=8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


# ---------------------------------------------------------------- memory of one thread and of one block


def numbers_on_stack(context, builder, like, length):
    element = context.get_value_type(like)
    with builder.goto_entry_block():
        array = builder.alloca(ir.ArrayType(element, length))
    return builder.bitcast(array, element.as_pointer())


@intrinsic
def piece_numbers(typingctx, like):
    """A thread's numbers of a piece. They live in registers: every index is a constant once loops are unrolled."""

    def codegen(context, builder, signature, args):
        return numbers_on_stack(context, builder, like, values_per_lane(like.name))

    return types.CPointer(like)(like), codegen


@intrinsic
def granule_numbers(typingctx, like):
    """As many numbers as sixteen bytes of any format hold; in registers, as those of `piece_numbers`."""

    def codegen(context, builder, signature, args):
        return numbers_on_stack(context, builder, like, VECTOR_BYTES // 2)

    return types.CPointer(like)(like), codegen


@intrinsic
def run_flags(typingctx, like):
    """A word for each run of sixteen bytes that a lane holds of a piece, whatever the format; in registers."""

    def codegen(context, builder, signature, args):
        return numbers_on_stack(context, builder, types.uint64, MAX_RUNS)

    return types.CPointer(types.uint64)(like), codegen


@intrinsic
def number_size(typingctx, like):
    """Bytes of a number in computation format."""
    return types.int64(like), lambda context, builder, signature, args: context.get_constant(
        types.int64, like.bitwidth // 8
    )


@intrinsic
def mantissa_bits(typingctx, like):
    """Bits of a number of the computation format that do not tell its power of two."""
    bits = 23 if like.bitwidth == 32 else 52
    return types.int64(like), lambda context, builder, signature, args: context.get_constant(types.int64, bits)


@intrinsic
def n_values(typingctx, like):
    """plan.values_per_lane, a constant."""

    def codegen(context, builder, signature, args):
        return context.get_constant(types.int64, values_per_lane(like.name))

    return types.int64(like), codegen


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


@device
def row_offset(array, row, rows):
    """Where a row starts, in elements. `array` has the strides of an Operand or of Labels."""
    if rows.n_inner >= rows.n_rows:  # one batch axis, the usual case: spares a division of some hundred instructions
        return row * array.inner_stride
    outer = row // rows.n_inner
    return outer * array.outer_stride + (row - outer * rows.n_inner) * array.inner_stride


@device
def word_of(labels, row, rows):
    """A row's own integer, or the one of all rows."""
    if labels.code == ONE_VALUE:
        return labels.pointer
    return load_label(labels.pointer, row_offset(labels, row, rows), labels.code)
