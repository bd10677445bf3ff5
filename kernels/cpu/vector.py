"""Explicit SIMD vectors for Numba: the words in which the CPU kernels are written.

    along    lanes are neighbouring columns of one row
    across   lanes are neighbouring rows, all in the same column

A vector fills several registers, so that their instructions interleave and hide each other's latency.
A `tag` or `like` is a value whose type says what is meant: a storage format, a number, one of the two vectors.
Functions take vectors and single numbers alike; a number beside a vector is the same in every lane. The arithmetic
stands in `gpusoftmax.kernels.formulas`. Kernels take addresses as integers and turn them into typed pointers here: an
array argument would cost reference counting in every loop.
"""

import functools
import math

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.registry import cpu_target
from numba.extending import intrinsic, models, register_model

from gpusoftmax.kernels import conversion, formulas
from gpusoftmax.kernels.binding import bind

CACHE_LINE = 64


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


STORED_DTYPE = {types.int16: "float16", types.uint16: "bfloat16", types.float32: "float32", types.float64: "float64"}
_INT32 = ir.IntType(32)


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


# ---------------------------------------------------------------- memory


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
        return conversion.widen(builder, value, dtype, context.get_value_type(like))

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
        builder.store(conversion.narrow(builder, args[2], dtype), address, align=pointer.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(pointer, types.intp, value), codegen


def _first_lanes(builder, count, lanes):
    """A mask of the first `count` lanes; none if it is negative."""
    all_lanes = ir.Constant(count.type, lanes)
    count = builder.trunc(builder.select(builder.icmp_signed("<", count, all_lanes), count, all_lanes), _INT32)
    type = ir.VectorType(_INT32, lanes)
    single = builder.insert_element(ir.Constant(type, ir.Undefined), count, ir.Constant(_INT32, 0))
    counts = builder.shuffle_vector(single, single, ir.Constant(type, None))
    return builder.icmp_signed(">", counts, ir.Constant(type, list(range(lanes))))


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
    return builder.select(mask, conversion.widen(builder, value, STORED_DTYPE[storage.dtype], padding.type), padding)


def _store_masked(context, builder, address, mask, value, storage):
    type = ir.VectorType(context.get_value_type(storage.dtype), mask.type.count)
    align = ir.Constant(_INT32, storage.dtype.bitwidth // 8)
    stored = conversion.narrow(builder, value, STORED_DTYPE[storage.dtype])
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
            mask = _first_lanes(builder, args[2], padding.lanes)
            return _load_masked(context, builder, address, mask, args[3], pointer)
        stored = _stored_type(context, pointer, padding)
        value = builder.load(builder.bitcast(address, stored.as_pointer()), align=pointer.dtype.bitwidth // 8)
        return conversion.widen(builder, value, STORED_DTYPE[pointer.dtype], args[3].type)

    return padding(line, types.intp, left, padding), codegen


@intrinsic
def load_unordered(typingctx, line, col, like):
    """The vector at column `col` of a Line, along a row with its lanes in any order."""
    pointer = line.types[0]
    widen = conversion.widen if like.is_across else conversion.widen_unordered

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
                _store_masked(context, builder, address, _first_lanes(builder, args[2], vector.lanes), args[3], pointer)
            else:
                stored = conversion.narrow(builder, args[3], STORED_DTYPE[pointer.dtype])
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
        stored = conversion.narrow(builder, args[2], STORED_DTYPE[line.types[0].dtype])
        address = builder.gep(builder.extract_value(args[0], 0), [args[1]])
        store = builder.store(stored, builder.bitcast(address, stored.type.as_pointer()), align=CACHE_LINE)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(_INT32, 1)]))
        return context.get_dummy_value()

    return types.void(line, types.intp, vector), codegen


@intrinsic
def load_part(typingctx, pointer, index, count, padding):
    """The first `count` lanes at pointer[index]; nothing beyond is read, the others are those of `padding`."""

    def codegen(context, builder, signature, args):
        mask = _first_lanes(builder, args[2], padding.lanes)
        return _load_masked(context, builder, builder.gep(args[0], [args[1]]), mask, args[3], pointer)

    return padding(pointer, types.intp, types.intp, padding), codegen


@intrinsic
def store_part(typingctx, pointer, index, vector, count):
    """The first `count` lanes to pointer[index] and on."""

    def codegen(context, builder, signature, args):
        mask = _first_lanes(builder, args[3], vector.lanes)
        _store_masked(context, builder, builder.gep(args[0], [args[1]]), mask, args[2], pointer)
        return context.get_dummy_value()

    return types.void(pointer, types.intp, vector, types.intp), codegen


def _prefetch(for_writing: bool):
    @intrinsic
    def prefetch(typingctx, line, col, like):
        """Fetches the cache lines of the vector at column `col`, which need not exist; only along rows, if there is a
        line.
        """

        def codegen(context, builder, signature, args):
            if not isinstance(line, types.NoneType) and not like.is_across:
                byte = ir.IntType(8).as_pointer()
                first = builder.bitcast(builder.gep(builder.extract_value(args[0], 0), [args[1]]), byte)
                flags = [ir.Constant(_INT32, value) for value in (int(for_writing), 3, 1)]
                function_type = ir.FunctionType(ir.VoidType(), [byte, _INT32, _INT32, _INT32])
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
    cols = _first_lanes(builder, n_cols, lanes)
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
        there = _first_lanes(builder, n_bytes, type.count)
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
        masked = formulas.Arithmetic(builder, args[0].type).number(-math.inf)
        return builder.select(kept, args[0], masked)

    return vector(vector, mask, types.intp, left), codegen


@intrinsic
def load_label(typingctx, address, index, code):
    """The label number `index` of those at `address`, as int64; see conversion.load_label."""

    def codegen(context, builder, signature, args):
        return conversion.load_label(builder, *args)

    return types.int64(types.int64, types.int64, types.int64), codegen


# ---------------------------------------------------------------- lanes


def _vector_of_equal_lanes(is_across: bool):
    @intrinsic
    def splat(typingctx, scalar):
        """A vector with the same number in every lane."""
        vector = Vector(scalar, is_across)

        def codegen(context, builder, signature, args):
            return formulas.Arithmetic(builder, context.get_value_type(vector)).splat(args[0])

        return vector(scalar), codegen

    return splat


along = _vector_of_equal_lanes(is_across=False)
across = _vector_of_equal_lanes(is_across=True)


@intrinsic
def along_in(typingctx, way, scalar):
    """`along`, as wide as the way asks for."""
    vector = Vector(scalar, False, way.n_bytes)

    def codegen(context, builder, signature, args):
        return formulas.Arithmetic(builder, context.get_value_type(vector)).splat(args[1])

    return vector(way, scalar), codegen


def in_blocks(n_bytes: int):
    """An intrinsic of the way in blocks, see walk.py."""

    @intrinsic
    def way(typingctx):
        return Way("in blocks", n_bytes)(), lambda context, builder, signature, args: context.get_dummy_value()

    return way


def _vectors(summary) -> list[bool]:
    """Which members of a fold's result, a tuple or not, are vectors."""
    return [
        isinstance(part, Vector) for part in (summary.types if isinstance(summary, types.BaseTuple) else (summary,))
    ]


@intrinsic
def save_lanes(typingctx, pointer, summary):
    """Writes the vectors of a fold's result to memory, one after the other."""

    def codegen(context, builder, signature, args):
        is_tuple = isinstance(summary, types.BaseTuple)
        for k, is_vector in enumerate(_vectors(summary)):
            if is_vector:
                value = builder.extract_value(args[1], k) if is_tuple else args[1]
                place = builder.gep(args[0], [ir.Constant(_INT32, k * value.type.count)])
                builder.store(value, builder.bitcast(place, value.type.as_pointer()), align=pointer.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(pointer, summary), codegen


@intrinsic
def saved_lane(typingctx, pointer, lane, summary):
    """The result of a fold as one row has it: a number for every vector that `save_lanes` has written."""
    are_vectors = _vectors(summary)
    if isinstance(summary, types.BaseTuple):
        members = [part.element if isinstance(part, Vector) else part for part in summary.types]
        result = types.BaseTuple.from_types(members, getattr(summary, "instance_class", None))
    else:
        result = summary.element if are_vectors[0] else summary

    def codegen(context, builder, signature, args):
        is_tuple = isinstance(summary, types.BaseTuple)
        parts = [builder.extract_value(args[2], k) for k in range(len(are_vectors))] if is_tuple else [args[2]]
        for k, is_vector in enumerate(are_vectors):
            if is_vector:
                place = builder.add(args[1], ir.Constant(args[1].type, k * parts[k].type.count))
                parts[k] = builder.load(builder.gep(args[0], [place]), align=pointer.dtype.bitwidth // 8)
        return context.make_tuple(builder, result, parts) if is_tuple else parts[0]

    return result(pointer, types.intp, summary), codegen


def _compares(wanted):
    @intrinsic
    def compares(typingctx, x, y):
        """Whether two numbers, or `wanted` lanes of two vectors, are equal; a number is in every lane."""

        def codegen(context, builder, signature, args):
            of = formulas.Arithmetic(builder, context.get_value_type(x))
            same = of.equal(args[0], of.splat(args[1]) if isinstance(x, Vector) and y is not x else args[1])
            if isinstance(x, Vector):
                mask = builder.bitcast(same, ir.IntType(x.lanes))
                if wanted == "all":
                    return builder.icmp_unsigned("==", mask, ir.Constant(mask.type, 2**x.lanes - 1))
                return builder.icmp_unsigned("!=", mask, ir.Constant(mask.type, 0))
            return same

        return types.boolean(x, y), codegen

    return compares


all_equal = _compares("all")
any_equal = _compares("any")


@intrinsic
def unless_none(typingctx, other, value):
    """The value, or None if there is no other."""
    if isinstance(other, types.NoneType):
        return other(other, value), lambda context, builder, signature, args: context.get_dummy_value()
    return value(other, value), lambda context, builder, signature, args: args[1]


@intrinsic
def lanes_not_below(typingctx, vector, least, count):
    """A bit for each of the first `count` lanes that is larger, or where one of both is a NaN."""

    def codegen(context, builder, signature, args):
        of = formulas.Arithmetic(builder, context.get_value_type(vector))
        larger = builder.fcmp_unordered(">", args[0], of.splat(args[1]))
        asked = builder.and_(larger, _first_lanes(builder, args[2], vector.lanes))
        mask, long = builder.bitcast(asked, ir.IntType(vector.lanes)), ir.IntType(64)
        return mask if vector.lanes == 64 else builder.zext(mask, long)

    return types.int64(vector, vector.element, types.intp), codegen


@intrinsic
def lanes_equal(typingctx, vector, value):
    """A bit for each lane that equals a number."""

    def codegen(context, builder, signature, args):
        of = formulas.Arithmetic(builder, context.get_value_type(vector))
        mask, long = builder.bitcast(of.equal(args[0], of.splat(args[1])), ir.IntType(vector.lanes)), ir.IntType(64)
        return mask if vector.lanes == 64 else builder.zext(mask, long)

    return types.int64(vector, vector.element), codegen


@intrinsic
def lowest_bit(typingctx, mask):
    """The position of the lowest bit that is set."""

    def codegen(context, builder, signature, args):
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), codegen


@intrinsic
def add_at(typingctx, vector, lane, amount):
    """The vector with an amount added in one lane."""

    def codegen(context, builder, signature, args):
        value, lane, amount = args
        of = formulas.Arithmetic(builder, value.type)
        numbers = ir.Constant(ir.VectorType(_INT32, vector.lanes), list(range(vector.lanes)))
        lane = builder.trunc(lane, _INT32)
        single = builder.insert_element(ir.Constant(numbers.type, ir.Undefined), lane, ir.Constant(_INT32, 0))
        lanes = builder.shuffle_vector(single, single, ir.Constant(numbers.type, None))
        return of.select(builder.icmp_signed("==", numbers, lanes), of.add(value, of.splat(amount)), value)

    return vector(vector, types.intp, vector.element), codegen


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


def _halves(builder, value):
    half = value.type.count // 2
    index = ir.VectorType(ir.IntType(32), half)
    low = builder.shuffle_vector(value, value, ir.Constant(index, list(range(half))))
    high = builder.shuffle_vector(value, value, ir.Constant(index, list(range(half, 2 * half))))
    return low, high


def _per_row(operation):
    """Folds a vector along a row in halves: lanes 0 1 2 3 4 5 6 7 -> 04 15 26 37 -> 0426 1537 -> one number. Across
    rows every lane is its row's number already. None stays None.
    """

    @intrinsic
    def fold(typingctx, vector):
        if isinstance(vector, types.NoneType):
            return vector(vector), lambda context, builder, signature, args: context.get_dummy_value()

        def codegen(context, builder, signature, args):
            value = args[0]
            while not vector.is_across and value.type.count > 1:
                low, high = _halves(builder, value)
                value = operation(formulas.Arithmetic(builder, low.type), low, high)
            return value if vector.is_across else builder.extract_element(value, ir.Constant(_INT32, 0))

        return (vector if vector.is_across else vector.element)(vector), codegen

    return fold


max_per_row = _per_row(formulas.Arithmetic.maximum)
sum_per_row = _per_row(formulas.Arithmetic.add)


def _to_register(operation):
    """The first half of `_per_row`: a vector along a row, folded until one register holds it, goes to the pointer."""

    @intrinsic
    def fold(typingctx, pointer, vector):
        if isinstance(vector, types.NoneType):
            return types.void(pointer, vector), lambda context, builder, signature, args: context.get_dummy_value()

        def codegen(context, builder, signature, args):
            value = args[1]
            while value.type.count > REGISTER_BYTES * 8 // vector.element.bitwidth:
                low, high = _halves(builder, value)
                value = operation(formulas.Arithmetic(builder, low.type), low, high)
            address = builder.bitcast(args[0], value.type.as_pointer())
            builder.store(value, address, align=pointer.dtype.bitwidth // 8)
            return context.get_dummy_value()

        return types.void(pointer, vector), codegen

    return fold


def _between_registers(operation):
    """The second half of `_per_row`, for as many rows at once as a register has lanes: the registers of the rows lie
    one after another, and what each is folded into goes to one more, a row in each lane.

    What is left of two rows shares a register before it is folded again: 0123 and abcd -> 01ab, 23cd -> one operation.
    """

    @intrinsic
    def fold(typingctx, pointer, target):
        lanes = REGISTER_BYTES * 8 // pointer.dtype.bitwidth
        align = pointer.dtype.bitwidth // 8

        def codegen(context, builder, signature, args):
            type, index = ir.VectorType(context.get_value_type(pointer.dtype), lanes), ir.VectorType(_INT32, lanes)
            arithmetic = formulas.Arithmetic(builder, type)
            first, result = (builder.bitcast(address, type.as_pointer()) for address in args)
            rows = [builder.load(builder.gep(first, [ir.Constant(_INT32, row)]), align=align) for row in range(lanes)]
            while len(rows) > 1:
                size = len(rows) // 2  # of a half of what is left of a row
                low = [row + lane for lane in range(0, lanes, 2 * size) for row in (0, lanes)]
                low = [lane + k for lane in low for k in range(size)]
                masks = [ir.Constant(index, [lane + half for lane in low]) for half in (0, size)]
                pairs = zip(rows[:size], rows[size:], strict=True)
                rows = [operation(arithmetic, *(builder.shuffle_vector(*two, mask) for mask in masks)) for two in pairs]
            builder.store(rows[0], result, align=align)
            return context.get_dummy_value()

        return types.void(pointer, pointer), codegen

    return fold


save_max, fold_max = _to_register(formulas.Arithmetic.maximum), _between_registers(formulas.Arithmetic.maximum)
save_sum, fold_sums = _to_register(formulas.Arithmetic.add), _between_registers(formulas.Arithmetic.add)


# ---------------------------------------------------------------- arithmetic, on vectors and on single numbers


class _Arithmetic(formulas.Arithmetic):
    def kept(self, value: float):
        """LLVM prefers loading a constant again in every step of a loop. What comes out of an assembler statement, even
        one without instructions, is no constant to it. Where there are 32 registers.
        """
        if not self.lanes or REGISTER_BYTES != 64:
            return self.number(value)
        element = self.type.element
        constant = ir.Constant(element, float(np.float32(value)) if self.format is formulas.SINGLE else value)
        number = self.builder.asm(ir.FunctionType(element, [element]), "", "=x,0", [constant], side_effect=False)
        number.attributes.add("readnone")
        number.attributes.add("nounwind")
        return self.splat(number)


formula = functools.partial(bind, intrinsic, types, _Arithmetic)

add = formula(formulas.Arithmetic.add)
sub = formula(formulas.Arithmetic.sub)
mul = formula(formulas.Arithmetic.mul)
div = formula(formulas.Arithmetic.div)
fma = formula(formulas.Arithmetic.fma)
negative = formula(formulas.Arithmetic.negative)
maximum = formula(formulas.Arithmetic.maximum)
compensated_add = formula(formulas.compensated_add, n_results=2)
add_pair = formula(formulas.add_pair, n_results=2)
finite_or_zero = formula(formulas.finite_or_zero)
where_finite = formula(formulas.where_finite)
anchor = formula(formulas.anchor, n_results=2)
floor = formula(formulas.floor)
exp_from = formula(formulas.exp_from)
coarse_exp_from = formula(formulas.coarse_exp_from)
inverse_pair = formula(formulas.inverse_pair, n_results=2)
ratio_of_anchors = formula(formulas.ratio_of_anchors)
power_of_two_ratio = formula(formulas.power_of_two_ratio)
exp = formula(formulas.exp)
set_ties_apart = formula(formulas.set_ties_apart, n_results=2)
tied_total = formula(formulas.tied_total, n_results=2)
log_sum = formula(formulas.log_sum, n_results=2)
distance = formula(formulas.distance)
weighted_distance = formula(formulas.weighted_distance)
distance_of_mass = formula(formulas.distance_of_mass)
is_above = formula(formulas.is_above)
rise_to = formula(formulas.rise_to)
row_inverse = formula(formulas.row_inverse)
scaled = formula(formulas.scaled)
inverse_temperature = formula(formulas.inverse_temperature, n_results=2)
softcap = formula(formulas.softcap)
pulled_through_softcap = formula(formulas.pulled_through_softcap)
pulled_through_mask = formula(formulas.pulled_through_mask)
zero_where_empty = formula(formulas.zero_where_empty)
log_probability = formula(formulas.log_probability)
logsumexp = formula(formulas.logsumexp)
leading = formula(formulas.leading, n_results=2)
exp_below = formula(formulas.exp_below)
line_and_place = formula(formulas.line_and_place, n_results=2)
moved_moment = formula(formulas.moved_moment, n_results=2)
ratio_of_pairs = formula(formulas.ratio_of_pairs)
coordinate = formula(formulas.coordinate)
place_of = formula(formulas.place_of)
per_place_of = formula(formulas.per_place_of)
half_difference = formula(formulas.half_difference, n_results=2)
log_ratio = formula(formulas.log_ratio)
divergence = formula(formulas.divergence)
pull_on_target = formula(formulas.pull_on_target)


# ---------------------------------------------------------------- columns and their numbers


@intrinsic
def column_numbers(typingctx, like):
    """The columns of a vector, from 0 on: 0, 1, 2, ... along a row; 0 in every lane across rows."""

    def codegen(context, builder, signature, args):
        numbers = [0.0 if like.is_across else float(lane) for lane in range(like.lanes)]
        return ir.Constant(context.get_value_type(like), [ir.Constant(args[0].type.element, n) for n in numbers])

    return like(like), codegen


@intrinsic
def leading_per_row(typingctx, values, places):
    """(number, place): the lane that leads, folded as `_per_row` folds; across rows every lane is its row's already."""

    def codegen(context, builder, signature, args):
        pair = tuple(args)
        while not values.is_across and pair[0].type.count > 1:
            (x, y), (at, other) = (_halves(builder, part) for part in pair)
            pair = formulas.first_leading(formulas.Arithmetic(builder, x.type), x, at, y, other)
        if not values.is_across:
            pair = tuple(builder.extract_element(part, ir.Constant(_INT32, 0)) for part in pair)
        return context.make_tuple(builder, signature.return_type, pair)

    result = values if values.is_across else values.element
    return types.UniTuple(result, 2)(values, places), codegen


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
