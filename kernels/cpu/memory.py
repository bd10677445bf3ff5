"""Numbers and vectors in memory: typed pointers, loads and stores in any storage format, parts of vectors, squares.

Kernels take addresses as integers and turn them into typed pointers here: an array argument would cost reference
counting in every loop.
"""

import math

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gpusoftmax.kernels import conversion, ieee
from gpusoftmax.kernels.cpu import halves
from gpusoftmax.kernels.cpu.vector import REGISTER_BYTES, Vector, first_lanes

_INT32 = ir.IntType(32)
CACHE_LINE = 64
STORED_DTYPE = {types.int16: "float16", types.uint16: "bfloat16", types.float32: "float32", types.float64: "float64"}


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
def on_stack(typingctx, count):
    """The address of `count` words of 8 bytes that last until the kernel returns; `count` is a literal."""
    if not isinstance(count, types.IntegerLiteral):
        return None  # Numba asks again with the literal

    def codegen(context, builder, signature, args):
        with builder.goto_entry_block():
            address = builder.alloca(ir.ArrayType(ir.IntType(64), count.literal_value))
        address.align = CACHE_LINE
        return builder.ptrtoint(address, ir.IntType(64))

    return types.int64(count), codegen


@intrinsic
def as_numbers(typingctx, pointer, like):
    """The same address as a pointer to numbers of the computation format: meant for where `holds_numbers` is true."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(like)(pointer, like), codegen


@intrinsic
def holds_numbers(typingctx, pointer, like):
    """Whether what lies at the pointer is in the computation format; a constant."""
    same = pointer.dtype == like

    def codegen(context, builder, signature, args):
        return context.get_constant(types.boolean, same)

    return types.boolean(pointer, like), codegen


def _stored_type(context, pointer, like):
    """The LLVM type of what one access moves: a vector where `like` is one."""
    element = context.get_value_type(pointer.dtype)
    return ir.VectorType(element, like.lanes) if isinstance(like, Vector) else element


def _at(builder, pointer, index, type):
    return builder.bitcast(builder.gep(pointer, [index]), type.as_pointer())


@intrinsic
def load(typingctx, pointer, index, like):
    """The number at pointer[index], or the vector from there on: whichever `like` is, None too; any alignment."""
    dtype = STORED_DTYPE[pointer.dtype]

    def codegen(context, builder, signature, args):
        if isinstance(like, types.NoneType):
            return context.get_dummy_value()
        address = _at(builder, args[0], args[1], _stored_type(context, pointer, like))
        value = builder.load(address, align=pointer.dtype.bitwidth // 8)
        return halves.widen(builder, value, dtype, context.get_value_type(like))

    return like(pointer, types.intp, like), codegen


@intrinsic
def store(typingctx, pointer, index, value):
    """Rounds a number or a vector to the storage format and writes it to pointer[index] and on, None nowhere; any
    alignment.
    """
    dtype = STORED_DTYPE[pointer.dtype]

    def codegen(context, builder, signature, args):
        if isinstance(value, types.NoneType):
            return context.get_dummy_value()
        address = _at(builder, args[0], args[1], _stored_type(context, pointer, value))
        builder.store(halves.narrow(builder, args[2], dtype), address, align=pointer.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(pointer, types.intp, value), codegen


def _masked(builder, name, type, *arguments):
    element = str(type.element)
    suffix = f"v{type.count}{ {'float': 'f32', 'double': 'f64'}.get(element, element) }.p0"
    result = type if name == "load" else ir.VoidType()
    function_type = ir.FunctionType(result, [argument.type for argument in arguments])
    module, name = builder.module, f"llvm.masked.{name}.{suffix}"
    return builder.call(module.globals.get(name) or ir.Function(module, function_type, name), arguments)


def _load_masked(context, builder, address, mask, padding, storage):
    """The lanes at `address` that the mask names; nothing else is read, the other lanes are those of `padding`."""
    type = ir.VectorType(context.get_value_type(storage.dtype), mask.type.count)
    align = ir.Constant(_INT32, storage.dtype.bitwidth // 8)
    address = builder.bitcast(address, type.as_pointer())
    value = _masked(builder, "load", type, address, align, mask, ir.Constant(type, None))
    return builder.select(mask, halves.widen(builder, value, STORED_DTYPE[storage.dtype], padding.type), padding)


def _store_masked(context, builder, address, mask, value, storage):
    type = ir.VectorType(context.get_value_type(storage.dtype), mask.type.count)
    align = ir.Constant(_INT32, storage.dtype.bitwidth // 8)
    stored = halves.narrow(builder, value, STORED_DTYPE[storage.dtype])
    _masked(builder, "store", type, stored, builder.bitcast(address, type.as_pointer()), align, mask)


@intrinsic
def load_cols(typingctx, line, col, left, padding):
    """The vector at column `col` of a Line. Along a row `left` counts the columns from there to the end: nothing beyond
    is read, and the lanes there are those of `padding`; None if they fill a vector.
    """
    pointer = line.types[0]

    def codegen(context, builder, signature, args):
        first, step = (builder.extract_value(args[0], k) for k in range(2))
        address = builder.gep(first, [builder.mul(args[1], step) if padding.is_across else args[1]])
        if not padding.is_across and not isinstance(left, types.NoneType):
            mask = first_lanes(builder, args[2], padding.lanes)
            return _load_masked(context, builder, address, mask, args[3], pointer)
        stored = _stored_type(context, pointer, padding)
        value = builder.load(builder.bitcast(address, stored.as_pointer()), align=pointer.dtype.bitwidth // 8)
        return halves.widen(builder, value, STORED_DTYPE[pointer.dtype], args[3].type)

    return padding(line, types.intp, left, padding), codegen


@intrinsic
def load_unordered(typingctx, line, col, like):
    """The vector at column `col` of a Line, along a row with its lanes in any order."""
    pointer = line.types[0]
    widen = halves.widen if like.is_across else halves.widen_unordered

    def codegen(context, builder, signature, args):
        first, step = (builder.extract_value(args[0], k) for k in range(2))
        address = builder.gep(first, [builder.mul(args[1], step) if like.is_across else args[1]])
        stored = _stored_type(context, pointer, like)
        value = builder.load(builder.bitcast(address, stored.as_pointer()), align=pointer.dtype.bitwidth // 8)
        return widen(builder, value, STORED_DTYPE[pointer.dtype], context.get_value_type(like))

    return like(line, types.intp, like), codegen


@intrinsic
def store_cols(typingctx, line, col, left, vector):
    """The vector to column `col` and on, see load_cols; nowhere if `line` is None."""

    def codegen(context, builder, signature, args):
        if not isinstance(line, types.NoneType):
            pointer = line.types[0]
            first, step = (builder.extract_value(args[0], k) for k in range(2))
            address = builder.gep(first, [builder.mul(args[1], step) if vector.is_across else args[1]])
            if not vector.is_across and not isinstance(left, types.NoneType):
                _store_masked(context, builder, address, first_lanes(builder, args[2], vector.lanes), args[3], pointer)
            else:
                stored = halves.narrow(builder, args[3], STORED_DTYPE[pointer.dtype])
                address = builder.bitcast(address, stored.type.as_pointer())
                builder.store(stored, address, align=pointer.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(line, types.intp, left, vector), codegen


@intrinsic
def cols_before_line(typingctx, line, col):
    """How many columns from `col` on lie before the next cache line begins; 0 if one begins there."""
    size = line.types[0].dtype.bitwidth // 8

    def codegen(context, builder, signature, args):
        word = ir.IntType(64)
        address = builder.ptrtoint(builder.gep(builder.extract_value(args[0], 0), [args[1]]), word)
        ahead = builder.and_(builder.neg(address), ir.Constant(word, CACHE_LINE - 1))
        return builder.lshr(ahead, ir.Constant(word, size.bit_length() - 1))

    return types.intp(line, types.intp), codegen


@intrinsic
def stream_cols(typingctx, line, col, vector):
    """store_cols of a whole vector past the caches; it must start at a cache line."""

    def codegen(context, builder, signature, args):
        stored = halves.narrow(builder, args[2], STORED_DTYPE[line.types[0].dtype])
        address = builder.gep(builder.extract_value(args[0], 0), [args[1]])
        store = builder.store(stored, builder.bitcast(address, stored.type.as_pointer()), align=CACHE_LINE)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(_INT32, 1)]))
        return context.get_dummy_value()

    return types.void(line, types.intp, vector), codegen


@intrinsic
def load_part(typingctx, pointer, index, count, padding):
    """The first `count` lanes at pointer[index]; nothing beyond is read, the others are those of `padding`."""

    def codegen(context, builder, signature, args):
        mask = first_lanes(builder, args[2], padding.lanes)
        return _load_masked(context, builder, builder.gep(args[0], [args[1]]), mask, args[3], pointer)

    return padding(pointer, types.intp, types.intp, padding), codegen


@intrinsic
def store_part(typingctx, pointer, index, vector, count):
    """The first `count` lanes to pointer[index] and on."""

    def codegen(context, builder, signature, args):
        mask = first_lanes(builder, args[3], vector.lanes)
        _store_masked(context, builder, builder.gep(args[0], [args[1]]), mask, args[2], pointer)
        return context.get_dummy_value()

    return types.void(pointer, types.intp, vector, types.intp), codegen


def _prefetch(for_writing: bool):
    @intrinsic
    def prefetch(typingctx, line, col, like):
        """Fetches the cache lines of the vector at column `col`, which need not exist, if there is a line."""

        def codegen(context, builder, signature, args):
            if not isinstance(line, types.NoneType):
                pointer, step = builder.extract_value(args[0], 0), builder.extract_value(args[0], 1)
                index = builder.mul(args[1], step) if like.is_across else args[1]
                first = builder.bitcast(builder.gep(pointer, [index]), ir.IntType(8).as_pointer())
                flags = [ir.Constant(_INT32, value) for value in (int(for_writing), 3, 1)]
                function_type = ir.FunctionType(ir.VoidType(), [first.type, _INT32, _INT32, _INT32])
                module, name = builder.module, "llvm.prefetch.p0"
                function = module.globals.get(name) or ir.Function(module, function_type, name)
                for offset in range(0, like.lanes * line.types[0].dtype.bitwidth // 8, CACHE_LINE):
                    builder.call(function, [builder.gep(first, [ir.Constant(_INT32, offset)]), *flags])
            return context.get_dummy_value()

        return types.void(line, types.intp, like), codegen

    return prefetch


prefetch_to_read = _prefetch(for_writing=False)
prefetch_to_write = _prefetch(for_writing=True)


def _transposed(builder, vectors):
    """A square of vectors with rows and columns swapped: each round interleaves the halves of the list."""
    lanes, half = len(vectors), len(vectors) // 2
    index = ir.VectorType(_INT32, lanes)
    low = ir.Constant(index, [lane // 2 + lanes * (lane % 2) for lane in range(lanes)])
    high = ir.Constant(index, [half + lane // 2 + lanes * (lane % 2) for lane in range(lanes)])
    for _ in range(lanes.bit_length() - 1):
        pairs = zip(vectors[:half], vectors[half:], strict=True)
        vectors = [builder.shuffle_vector(*pair, mask) for pair in pairs for mask in (low, high)]
    return vectors


def _row_masks(builder, lanes, n_rows, n_cols):
    """For every row of a square its first n_cols lanes, none for rows from n_rows on."""
    cols = first_lanes(builder, n_cols, lanes)
    for row in range(lanes):
        within = builder.icmp_signed("<", ir.Constant(n_rows.type, row), n_rows)
        yield builder.select(within, cols, ir.Constant(cols.type, None))


@intrinsic
def load_transposed(typingctx, pointer, stride, n_rows, n_cols, copy, pitch):
    """copy[col * pitch + row] = pointer[row * stride + col] for n_rows rows and n_cols columns of a square.

    The rest of the square is set to 0.
    """
    lanes = REGISTER_BYTES * 8 // copy.dtype.bitwidth

    def codegen(context, builder, signature, args):
        source, stride, n_rows, n_cols, copy, pitch = args
        zeros = ir.Constant(ir.VectorType(context.get_value_type(signature.args[4].dtype), lanes), None)
        rows = []
        for mask in _row_masks(builder, lanes, n_rows, n_cols):
            rows.append(_load_masked(context, builder, source, mask, zeros, pointer))
            source = builder.gep(source, [stride])
        for value in _transposed(builder, rows):
            address = builder.bitcast(copy, value.type.as_pointer())
            builder.store(value, address, align=signature.args[4].dtype.bitwidth // 8)
            copy = builder.gep(copy, [pitch])
        return context.get_dummy_value()

    return types.void(pointer, types.intp, types.intp, types.intp, copy, types.intp), codegen


@intrinsic
def store_transposed(typingctx, copy, pitch, pointer, stride, n_rows, n_cols):
    """pointer[row * stride + col] = copy[col * pitch + row] for n_rows rows and n_cols columns of a square."""
    lanes = REGISTER_BYTES * 8 // copy.dtype.bitwidth

    def codegen(context, builder, signature, args):
        copy, pitch, target, stride, n_rows, n_cols = args
        number = signature.args[0].dtype
        type = ir.VectorType(context.get_value_type(number), lanes)
        cols = []
        for _ in range(lanes):
            cols.append(builder.load(builder.bitcast(copy, type.as_pointer()), align=number.bitwidth // 8))
            copy = builder.gep(copy, [pitch])
        masks = _row_masks(builder, lanes, n_rows, n_cols)
        for value, mask in zip(_transposed(builder, cols), masks, strict=True):
            _store_masked(context, builder, target, mask, value, pointer)
            target = builder.gep(target, [stride])
        return context.get_dummy_value()

    return types.void(copy, types.intp, pointer, types.intp, types.intp, types.intp), codegen


@intrinsic
def has_bits(typingctx, pointer):
    """Whether a mask has a bit for each column, not a byte; a constant."""

    def codegen(context, builder, signature, args):
        return context.get_constant(types.boolean, pointer.dtype == types.uint32)

    return types.boolean(pointer), codegen


@intrinsic
def where_kept(typingctx, vector, mask, col, left):
    """A vector along a row with -inf in the lanes that the mask leaves out. `left` is as in load_cols; with bits, a
    vector of eight lanes or more begins at a whole byte of them.
    """
    lanes, per_byte = vector.lanes, 8 if mask.dtype == types.uint32 else 1

    def codegen(context, builder, signature, args):
        byte, word = ir.IntType(8), ir.IntType(64)
        count = ir.Constant(word, lanes) if isinstance(left, types.NoneType) else args[3]
        first = builder.udiv(args[2], ir.Constant(word, per_byte))
        address = builder.gep(builder.bitcast(args[1], byte.as_pointer()), [first])
        type = ir.VectorType(byte, max(lanes // per_byte, 1))
        n_bytes = builder.udiv(builder.add(count, ir.Constant(word, per_byte - 1)), ir.Constant(word, per_byte))
        there = first_lanes(builder, n_bytes, type.count)
        arguments = builder.bitcast(address, type.as_pointer()), ir.Constant(_INT32, 1), there, ir.Constant(type, None)
        found = _masked(builder, "load", type, *arguments)
        if per_byte == 1:
            kept = builder.icmp_unsigned("!=", found, ir.Constant(type, None))
        else:
            bits = builder.bitcast(found, ir.IntType(8 * type.count))
            if lanes < 8:  # a part of the byte
                within = builder.trunc(builder.and_(args[2], ir.Constant(word, 7)), bits.type)
                bits = builder.trunc(builder.lshr(bits, within), ir.IntType(lanes))
            kept = builder.bitcast(bits, ir.VectorType(ir.IntType(1), lanes))
        masked = ieee.Arithmetic(builder, args[0].type).number(-math.inf)
        return builder.select(kept, args[0], masked)

    return vector(vector, mask, types.intp, left), codegen


@intrinsic
def load_label(typingctx, address, index, code):
    """The label number `index` of those at `address`, as int64; see conversion.load_label."""

    def codegen(context, builder, signature, args):
        return conversion.load_label(builder, *args)

    return types.int64(types.int64, types.int64, types.int64), codegen


@intrinsic
def numbers_on_stack(typingctx, count, like):
    """A pointer to `count` (a literal) numbers, uninitialised, that last until the calling function returns."""
    if not isinstance(count, types.IntegerLiteral):
        return None  # Numba asks again with the literal

    def codegen(context, builder, signature, args):
        element = context.get_value_type(like)
        with builder.goto_entry_block():
            memory = builder.alloca(ir.ArrayType(element, count.literal_value))
            memory.align = CACHE_LINE
        return builder.bitcast(memory, element.as_pointer())

    return types.CPointer(like)(count, like), codegen
