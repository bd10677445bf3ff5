"""Sixteen-bit logits two at a time, as they are stored: the maximum of a piece and how many are above a threshold.

For logits that no transform has changed. A pair is packed again from numbers that were unpacked from it, which the
compiler sees: it keeps the words that came from the slot.
"""

import math

from llvmlite import ir
from numpy import int32

from gpusoftmax.kernels import conversion
from gpusoftmax.kernels.cuda.device._cuda import device, intrinsic, types
from gpusoftmax.kernels.cuda.device.arithmetic import add, is_above, maximum, number
from gpusoftmax.kernels.cuda.device.memory import STORED_DTYPE, compiled_for, n_values
from gpusoftmax.kernels.cuda.device.piece_state import lane_max
from gpusoftmax.kernels.cuda.device.pieces import has_columns
from gpusoftmax.kernels.cuda.device.reduce import warp_max
from gpusoftmax.kernels.cuda.device.split import is_long, split_lanes
from gpusoftmax.kernels.cuda.device.staging import hidden
from gpusoftmax.kernels.cuda.plan import GROUP

_WORD, _HALF = ir.IntType(32), ir.IntType(16)
_SIXTEEN = ir.Constant(_WORD, 16)
_COMPARED_FROM = {"float16": 75, "bfloat16": 90}  # the architectures that have `set` of pairs
_ORDERED_FROM = 80  # and `max`


def _is_compiled_from(builder, pointer, architectures):
    architecture = architectures.get(STORED_DTYPE[pointer.dtype])
    return ir.Constant(ir.IntType(1), 0) if architecture is None else compiled_for(builder, architecture)


@intrinsic
def compares_pairs(typingctx, pointer):
    """Whether `pair_above` may be called; a constant."""

    def codegen(context, builder, signature, args):
        return _is_compiled_from(builder, pointer, _COMPARED_FROM)

    return types.boolean(pointer), codegen


@intrinsic
def orders_pairs(typingctx, pointer):
    """Whether `larger_pair` may be called; a constant."""

    def codegen(context, builder, signature, args):
        return _is_compiled_from(builder, pointer, dict.fromkeys(_COMPARED_FROM, _ORDERED_FROM))

    return types.boolean(pointer), codegen


@intrinsic
def pair_of(typingctx, pointer, low, high):
    """Two numbers as they are stored, in a word: they are numbers of the format. 0 for wider formats."""
    dtype = STORED_DTYPE[pointer.dtype]

    def codegen(context, builder, signature, args):
        if dtype not in _COMPARED_FROM:
            return ir.Constant(_WORD, 0)
        if dtype == "float16":
            parts = [builder.zext(conversion.narrow(builder, part, dtype), _WORD) for part in args[1:]]
            return builder.or_(parts[0], builder.shl(parts[1], _SIXTEEN))
        # The upper halves, of float64 too: nothing is rounded.
        parts = [builder.bitcast(conversion.to_float(builder, part), _WORD) for part in args[1:]]
        return builder.or_(builder.lshr(parts[0], _SIXTEEN), builder.and_(parts[1], ir.Constant(_WORD, 0xFFFF0000)))

    return types.int32(pointer, low, high), codegen


@intrinsic
def numbers_of_pair(typingctx, pointer, pair, like):
    dtype = STORED_DTYPE[pointer.dtype]

    def codegen(context, builder, signature, args):
        kind = context.get_value_type(like)
        parts = [builder.trunc(part, _HALF) for part in (args[1], builder.lshr(args[1], _SIXTEEN))]
        if dtype not in _COMPARED_FROM:
            return context.make_tuple(builder, signature.return_type, [ir.Constant(kind, 0)] * 2)
        numbers = [conversion.widen(builder, part, dtype, kind) for part in parts]
        return context.make_tuple(builder, signature.return_type, numbers)

    return types.UniTuple(like, 2)(pointer, types.int32, like), codegen


def _of_pairs(instruction):
    """An intrinsic: an instruction on two pairs, which names their format."""

    def intrinsic_of(typingctx, pointer, x, y):
        dtype = {"float16": "f16x2", "bfloat16": "bf16x2"}.get(STORED_DTYPE[pointer.dtype])

        def codegen(context, builder, signature, args):
            if dtype is None:
                return ir.Constant(_WORD, 0)
            function = ir.FunctionType(_WORD, [_WORD, _WORD])
            text = f"{instruction}.{dtype} $0, $1, $2;"
            return builder.call(ir.InlineAsm(function, text, "=r,r,r"), args[1:])

        return types.int32(pointer, types.int32, types.int32), codegen

    intrinsic_of.__name__ = instruction.replace(".", "_")
    return intrinsic(intrinsic_of)


larger_pair = _of_pairs("max")  # NaN loses against any number
pair_above = _of_pairs("set.gt.u32")  # ones in each half that is larger


@device
def is_as_stored(transform):
    return transform is None


@device
def largest_of_lane(held, piece, source, split, params):
    """The bits of `lane_max`."""
    if not (orders_pairs(source.pointer) and is_as_stored(source.through.transform)):
        return lane_max(held, piece, split, params)
    least = number(params[0], -math.inf)
    largest = pair_of(source.pointer, least, least)
    for group in range(0, n_values(least), GROUP):
        if has_columns(group, piece, split):
            of_group = pair_of(source.pointer, held[group], held[group + 1])
            for k in range(group + 2, group + GROUP, 2):
                of_group = larger_pair(source.pointer, of_group, pair_of(source.pointer, held[k], held[k + 1]))
            largest = larger_pair(source.pointer, largest, of_group)
    low, high = numbers_of_pair(source.pointer, largest, least)
    return maximum(low, high)


@device
def largest_of_piece(held, piece, source, split, params):
    """The bits of `piece_max`."""
    return warp_max(largest_of_lane(held, piece, source, split, params), split_lanes(split))


@device
def unpack_again(held, source, split):
    """Until here nothing needs a long piece's numbers, but its words: half as many registers."""
    if is_long(split) and orders_pairs(source.pointer) and is_as_stored(source.through.transform):
        for k in range(0, n_values(held[0]), 2):
            word = hidden(pair_of(source.pointer, held[k], held[k + 1]))
            held[k], held[k + 1] = numbers_of_pair(source.pointer, word, held[k])


@device
def count_above(held, threshold, piece, source, split):
    """How many of this lane's columns are larger than a threshold, which is one of the row's logits."""
    if not (compares_pairs(source.pointer) and is_as_stored(source.through.transform)):
        total = number(threshold, 0.0)
        for group in range(0, n_values(threshold), GROUP):
            if has_columns(group, piece, split):
                for k in range(group, group + GROUP):
                    total = add(total, is_above(held[k], threshold))
        return int32(total)
    # Of L lower and H upper halves that are larger: minus the sum of the masks, L + 2^16 (H - L).
    thresholds, total = pair_of(source.pointer, threshold, threshold), int32(0)
    for group in range(0, n_values(threshold), GROUP):
        if has_columns(group, piece, split):
            for k in range(group, group + GROUP, 2):
                pair = pair_of(source.pointer, held[k], held[k + 1])
                total = int32(total - pair_above(source.pointer, pair, thresholds))
    return int32(2 * (total & 0xFFFF) + (total >> 16))
