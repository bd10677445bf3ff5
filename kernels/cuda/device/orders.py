"""Numbers as integers in the same order, between which an interval can be halved (kernels/ordering.py)."""

from gpusoftmax.kernels import ordering
from gpusoftmax.kernels.cuda.device._cuda import device, intrinsic, types
from gpusoftmax.kernels.cuda.device.arithmetic import Rounded
from gpusoftmax.kernels.cuda.device.memory import STORED_DTYPE


@device
def halfway(low, high, step):
    """Between two orders, down to a multiple of the step; low if there is nothing between them."""
    return ((low & high) + ((low ^ high) >> 1)) & -step  # their sum may take a bit too many


def _order_step(pointer, like):
    return 1 if like == types.float64 else ordering.STEPS[STORED_DTYPE[pointer.dtype]]


@intrinsic
def order_step(typingctx, pointer, like):
    """By how much the orders of two numbers differ at least that are stored as the pointer's and widened to `like`."""
    step = _order_step(pointer, like)
    return types.int64(pointer, like), lambda context, builder, signature, args: context.get_constant(types.int64, step)


@intrinsic
def n_halvings(typingctx, pointer, like):
    """How often the interval of all such orders can be halved."""
    count = like.bitwidth - (_order_step(pointer, like).bit_length() - 1)
    return types.int32(pointer, like), lambda context, builder, signature, args: context.get_constant(
        types.int32, count
    )


@intrinsic
def order_of(typingctx, x):
    def codegen(context, builder, signature, args):
        return ordering.order_of(Rounded(builder, args[0].type), args[0])

    return types.int64(x), codegen


@intrinsic
def of_order(typingctx, order, like):
    def codegen(context, builder, signature, args):
        return ordering.of_order(Rounded(builder, args[1].type), args[0])

    return like(types.int64, like), codegen
