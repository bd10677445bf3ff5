"""The few largest logits of a row of one piece, in order, by the lanes of a warp that share it.

A logit and its column are one integer, a key, of which a larger one is a larger logit, or an equal one in a lower
column:

    order of the logit | LAST_COLUMN - column

Lanes have their part of the row in registers and sort it by eights; of two eights the larger keys are the larger of

    x0 and y7, x1 and y6, ... x7 and y0

which are in order again after three steps of a bitonic sort (Batcher, "Sorting networks and their applications", 1968).
Eights of one lane are merged like this, then those of the lanes. These are the same instructions for all rows of a
warp, whatever their logits are, and for every k: halving an interval (largest_of_short.py) waits for the slowest row.
"""

from llvmlite import ir
from numpy import int32, int64

from gpusoftmax.kernels.cuda.device._cuda import cuda, device, intrinsic, types
from gpusoftmax.kernels.cuda.device.memory import n_values, numbers_on_stack
from gpusoftmax.kernels.cuda.device.pieces import col_of, has_columns
from gpusoftmax.kernels.cuda.device.reduce import FULL_WARP
from gpusoftmax.kernels.cuda.device.split import split_lanes
from gpusoftmax.kernels.cuda.device.threshold import of_order, order_of
from gpusoftmax.kernels.cuda.plan import GROUP, WARP_SIZE, values_per_lane

COLUMN_BITS = (WARP_SIZE * values_per_lane("float32")).bit_length() - 1
LAST_COLUMN = (1 << COLUMN_BITS) - 1
"""Of a piece."""
SORT = (
    *((0, 1), (2, 3), (4, 5), (6, 7), (0, 2), (1, 3), (4, 6), (5, 7), (1, 2), (5, 6)),
    *((0, 4), (1, 5), (2, 6), (3, 7), (2, 4), (3, 5), (1, 2), (3, 4), (5, 6)),
)
"""Which two of eight are put in order, one pair after the other, until all are: Batcher's network."""
BITONIC = tuple((k, k + step) for step in (4, 2, 1) for k in range(GROUP) if not k & step)
"""The same, where they fall and then rise, or the other way round."""


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


def _in_order_by(pairs):
    """An intrinsic: of each pair in turn, the larger key comes first."""

    @intrinsic
    def in_order(typingctx, keys):
        def codegen(context, builder, signature, args):
            places = [builder.gep(args[0], [ir.Constant(ir.IntType(32), k)]) for k in range(GROUP)]
            values = [builder.load(place) for place in places]
            for one, two in pairs:
                x, y = values[one], values[two]
                is_greater = builder.icmp_signed(">", x, y)
                values[one], values[two] = builder.select(is_greater, x, y), builder.select(is_greater, y, x)
            for value, place in zip(values, places, strict=True):
                builder.store(value, place)
            return context.get_dummy_value()

        return types.void(keys), codegen

    return in_order


sort, sort_bitonic = _in_order_by(SORT), _in_order_by(BITONIC)


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
            for k in range(GROUP):
                keys[k] = max(keys[k], others[GROUP - 1 - k])
            sort_bitonic(keys)
    for offset in (1, 2, 4, 8, 16):
        if offset < split_lanes(split):
            for k in range(GROUP):
                others[k] = cuda.shfl_xor_sync(FULL_WARP, keys[k], offset)
            for k in range(GROUP):
                keys[k] = max(keys[k], others[GROUP - 1 - k])
            sort_bitonic(keys)


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
