"""What the lanes of a vector come to: its maximum, its sum, which of them are equal, and a number for each row."""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gpusoftmax.kernels import formulas, ieee
from gpusoftmax.kernels.cpu.vector import REGISTER_BYTES, Vector, first_lanes

_INT32 = ir.IntType(32)


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
            of = ieee.Arithmetic(builder, context.get_value_type(x))
            same = of.equal(args[0], of.splat(args[1]) if isinstance(x, Vector) and y is not x else args[1])
            if isinstance(x, Vector):
                if wanted == "all":
                    return _are_all(builder, same, x.lanes)
                mask = builder.bitcast(same, ir.IntType(x.lanes))
                return builder.icmp_unsigned("!=", mask, ir.Constant(mask.type, 0))
            return same

        return types.boolean(x, y), codegen

    return compares


all_equal = _compares("all")
any_equal = _compares("any")


@intrinsic
def all_near_cap(typingctx, x, cap):
    """formulas.is_near_cap of a number, or of all lanes of a vector; the cap is a number."""

    def codegen(context, builder, signature, args):
        of = ieee.Arithmetic(builder, context.get_value_type(x))
        if not isinstance(x, Vector):
            return formulas.is_near_cap(of, *args)
        return _are_all(builder, formulas.is_near_cap(of, args[0], of.splat(args[1])), x.lanes)

    return types.boolean(x, cap), codegen


def _are_all(builder, lanes, count):
    mask = builder.bitcast(lanes, ir.IntType(count))
    return builder.icmp_unsigned("==", mask, ir.Constant(mask.type, 2**count - 1))


@intrinsic
def lanes_not_below(typingctx, vector, least, count):
    """A bit for each of the first `count` lanes that is larger, or where one of both is a NaN."""

    def codegen(context, builder, signature, args):
        of = ieee.Arithmetic(builder, context.get_value_type(vector))
        larger = builder.fcmp_unordered(">", args[0], of.splat(args[1]))
        asked = builder.and_(larger, first_lanes(builder, args[2], vector.lanes))
        mask, long = builder.bitcast(asked, ir.IntType(vector.lanes)), ir.IntType(64)
        return mask if vector.lanes == 64 else builder.zext(mask, long)

    return types.int64(vector, vector.element, types.intp), codegen


@intrinsic
def lanes_equal(typingctx, vector, value):
    """A bit for each lane that equals a number."""

    def codegen(context, builder, signature, args):
        of = ieee.Arithmetic(builder, context.get_value_type(vector))
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
        of = ieee.Arithmetic(builder, value.type)
        numbers = ir.Constant(ir.VectorType(_INT32, vector.lanes), list(range(vector.lanes)))
        lane = builder.trunc(lane, _INT32)
        single = builder.insert_element(ir.Constant(numbers.type, ir.Undefined), lane, ir.Constant(_INT32, 0))
        lanes = builder.shuffle_vector(single, single, ir.Constant(numbers.type, None))
        return of.select(builder.icmp_signed("==", numbers, lanes), of.add(value, of.splat(amount)), value)

    return vector(vector, types.intp, vector.element), codegen


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
                value = operation(ieee.Arithmetic(builder, low.type), low, high)
            return value if vector.is_across else builder.extract_element(value, ir.Constant(_INT32, 0))

        return (vector if vector.is_across else vector.element)(vector), codegen

    return fold


max_per_row = _per_row(ieee.Arithmetic.maximum)
sum_per_row = _per_row(ieee.Arithmetic.add)


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
                value = operation(ieee.Arithmetic(builder, low.type), low, high)
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
            arithmetic = ieee.Arithmetic(builder, type)
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


save_max, fold_max = _to_register(ieee.Arithmetic.maximum), _between_registers(ieee.Arithmetic.maximum)
save_sum, fold_sums = _to_register(ieee.Arithmetic.add), _between_registers(ieee.Arithmetic.add)


@intrinsic
def leading_per_row(typingctx, values, places):
    """(number, place): the lane that leads, folded as `_per_row` folds; across rows every lane is its row's already."""

    def codegen(context, builder, signature, args):
        pair = tuple(args)
        while not values.is_across and pair[0].type.count > 1:
            (x, y), (at, other) = (_halves(builder, part) for part in pair)
            pair = formulas.first_leading(ieee.Arithmetic(builder, x.type), x, at, y, other)
        if not values.is_across:
            pair = tuple(builder.extract_element(part, ir.Constant(_INT32, 0)) for part in pair)
        return context.make_tuple(builder, signature.return_type, pair)

    result = values if values.is_across else values.element
    return types.UniTuple(result, 2)(values, places), codegen
