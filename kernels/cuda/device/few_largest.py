"""The few largest logits of a row of one piece, in order, by the lanes of a warp that share it.

    key    order of the logit | LAST_COLUMN - column       see kernels/sorting.py

Lanes have their part of the row in registers and sort its keys by eights, which are merged, at last with those of the
other lanes. These are the same instructions for all rows of a warp, whatever their logits are, and for every k: halving
an interval (largest_of_short.py) waits for the slowest row.
"""

from llvmlite import ir
from numpy import int32, int64

from gpusoftmax.kernels import sorting
from gpusoftmax.kernels.cuda.device._cuda import cuda, device, intrinsic, types
from gpusoftmax.kernels.cuda.device.memory import n_values, numbers_on_stack
from gpusoftmax.kernels.cuda.device.orders import of_order, order_of
from gpusoftmax.kernels.cuda.device.pieces import col_of, has_columns
from gpusoftmax.kernels.cuda.device.reduce import FULL_WARP
from gpusoftmax.kernels.cuda.device.split import split_lanes
from gpusoftmax.kernels.cuda.plan import GROUP, WARP_SIZE, values_per_lane

COLUMN_BITS = (WARP_SIZE * values_per_lane("float32")).bit_length() - 1
LAST_COLUMN = (1 << COLUMN_BITS) - 1
"""Of a piece."""


def _key_type(source, like):
    """Orders of sixteen-bit logits are multiples of more than a piece has columns, and so one word holds both."""
    pointer, through = (source.types[source.fields.index(name)] for name in ("pointer", "through"))
    transform = through.types[through.fields.index("transform")]
    is_narrow = pointer.dtype.bitwidth == 16 and isinstance(transform, types.NoneType)
    return types.int32 if is_narrow else types.int64


@intrinsic
def group_keys(typingctx, source, like):
    """Keys of a group of this row's logits; in registers, as `piece_numbers`."""
    type = _key_type(source, like)

    def codegen(context, builder, signature, args):
        return numbers_on_stack(context, builder, type, GROUP)

    return types.CPointer(type)(source, like), codegen


@intrinsic
def order_shift(typingctx, keys):
    """How far the order of a logit stands above its bits in a key; a constant."""
    bits = 0 if keys.dtype.bitwidth == 32 else COLUMN_BITS
    return types.int64(keys), lambda context, builder, *_: context.get_constant(types.int64, bits)


def _loaded(builder, keys):
    return [builder.load(builder.gep(keys, [ir.Constant(ir.IntType(32), k)])) for k in range(GROUP)]


def _stored(builder, found, keys):
    for k, key in enumerate(found):
        builder.store(key, builder.gep(keys, [ir.Constant(ir.IntType(32), k)]))


@intrinsic
def sort(typingctx, keys):
    def codegen(context, builder, signature, args):
        _stored(builder, sorting.in_order(builder, _loaded(builder, args[0]), sorting.SORT), args[0])
        return context.get_dummy_value()

    return types.void(keys), codegen


@intrinsic
def merge(typingctx, keys, others):
    """keys = the largest of both, which are sorted."""

    def codegen(context, builder, signature, args):
        _stored(builder, sorting.merged(builder, *(_loaded(builder, one) for one in args)), args[0])
        return context.get_dummy_value()

    return types.void(keys, others), codegen


@device
def put_group(keys, held, first, source, team, split):
    """keys = those of a group of the lane's logits, in order."""
    for k in range(GROUP):
        col = int64(LAST_COLUMN - col_of(int32(first + k), team, split, source))
        keys[k] = order_of(held[first + k]) << order_shift(keys) | col
    sort(keys)


@device
def put_largest(keys, held, source, piece, team, split):
    """keys = the largest of the row, in order, in every lane that shares it."""
    others = group_keys(source, held[0])
    put_group(keys, held, 0, source, team, split)
    for group in range(GROUP, n_values(held[0]), GROUP):
        if has_columns(group, piece, split):
            put_group(others, held, group, source, team, split)
            merge(keys, others)
    for offset in (1, 2, 4, 8, 16):
        if offset < split_lanes(split):
            for k in range(GROUP):
                others[k] = cuda.shfl_xor_sync(FULL_WARP, keys[k], offset)
            merge(keys, others)


def few_largest_with(write):
    """A device function that calls write(j, logit, column, numbers) for the k largest logits of a row that lanes hold,
    j = 0, 1, ..., each in one of the lanes. k is at most GROUP.
    """

    @device
    def write_few(held, k, exists, source, piece, team, split, numbers):
        like, keys = held[0], group_keys(source, held[0])
        put_largest(keys, held, source, piece, team, split)
        place = team.lane
        while exists and place < k:
            key = keys[0]
            for j in range(1, GROUP):
                key = keys[j] if place == j else key
            order = int64(key) >> COLUMN_BITS << (COLUMN_BITS - order_shift(keys))
            write(int32(place), of_order(order, like), int32(LAST_COLUMN - (key & LAST_COLUMN)), numbers)
            place = int32(place + split_lanes(split))

    return write_few
