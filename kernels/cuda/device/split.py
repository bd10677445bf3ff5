"""How rows are split, as a kernel sees it: plan.Short, plan.Long or plan.Columns.

The argument's type is a specialisation. What one of them does not have is a constant here, so that one source gives
kernels for short rows without anything of the others.
"""

from gpusoftmax.kernels.cuda.device._cuda import cuda, device, intrinsic, types
from gpusoftmax.kernels.cuda.plan import WARP_SIZE, Columns, Long, Short


def _is(kind):
    """An intrinsic: whether the split is of this kind, a constant."""

    def is_kind(typingctx, split):
        def codegen(context, builder, signature, args):
            return context.get_constant(types.boolean, split.instance_class is kind)

        return types.boolean(split), codegen

    is_kind.__name__ = f"is_{kind.__name__.lower()}"
    return intrinsic(is_kind)


def _field(name, constant):
    """An intrinsic: the field `name` of the split, or the constant if its type has no such field."""

    def field(typingctx, split):
        fields = split.instance_class._fields

        def codegen(context, builder, signature, args):
            if name in fields:
                return builder.extract_value(args[0], fields.index(name))
            return context.get_constant(types.int32, constant)

        return types.int32(split), codegen

    field.__name__ = f"split_{name}"
    return intrinsic(field)


def _unsigned(operation):
    """An intrinsic on two numbers that are not negative, in 32 bits: Python's rules for signs take twice as long, and
    Numba divides in 64 bits.
    """

    def intrinsic_of(typingctx, x, y):
        def codegen(context, builder, signature, args):
            return getattr(builder, operation)(*args)

        return types.int32(types.int32, types.int32), codegen

    intrinsic_of.__name__ = operation
    return intrinsic(intrinsic_of)


quotient = _unsigned("udiv")
remainder = _unsigned("urem")
shifted_up = _unsigned("shl")
shifted_down = _unsigned("lshr")


is_short = _is(Short)
is_long = _is(Long)
is_columns = _is(Columns)

split_lanes = _field("lanes", WARP_SIZE)
split_chunks = _field("n_chunks", 1)
split_piece_bits = _field("piece_bits", 0)
split_cluster = _field("cluster", 1)
split_slots = _field("slots", 1)
split_first_slot = _field("first_slot", 0)
split_row_bits = _field("row_bits", 0)
split_lane_bits = _field("lane_bits", WARP_SIZE.bit_length() - 1)


@device
def own_part(split):
    """The number of this thread's part of the block: a warp, or a part of one."""
    return shifted_down(cuda.threadIdx.x, split_lane_bits(split))


@device
def n_parts(split):
    """How many parts the block has."""
    return shifted_down(cuda.blockDim.x, split_lane_bits(split))


@device
def is_one_chunk(split):
    """Whether the state of a row's first chunk is that of the row."""
    return is_short(split) or (is_columns(split) and split_chunks(split) == 1)
