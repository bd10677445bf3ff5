"""Numbers as integers in the order of their values (kernels/ordering.py): what lies between two of them, and which
lanes of a vector do.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gpusoftmax.kernels import ieee, ordering
from gpusoftmax.kernels.cpu.arithmetic import add, mul, sub
from gpusoftmax.kernels.cpu.cache import device
from gpusoftmax.kernels.cpu.memory import STORED_DTYPE
from gpusoftmax.kernels.cpu.vector import first_lanes


@device
def between(low, high, step, by_value, part):
    """An order between two, low if there is none. Dividing by value, if by_value is above 0, takes fewer steps between
    numbers of one size.
    """
    if by_value > 0:
        x = of_order(low, part)
        middle = order_of(add(x, mul(part, sub(of_order(high, part), x)))) & -step
        if middle > low and middle < high:
            return middle
    return halfway(low, high, step)


@device
def halfway(low, high, step):
    """Between two orders, down to a multiple of the step; low if there is nothing between them."""
    return ((low & high) + ((low ^ high) >> 1)) & -step  # their sum may take a bit too many


@intrinsic
def order_of(typingctx, x):
    def codegen(context, builder, signature, args):
        return ordering.order_of(ieee.Arithmetic(builder, args[0].type), args[0])

    return types.int64(x), codegen


@intrinsic
def of_order(typingctx, order, like):
    def codegen(context, builder, signature, args):
        return ordering.of_order(ieee.Arithmetic(builder, args[1].type), args[0])

    return like(types.int64, like), codegen


@intrinsic
def order_step(typingctx, pointer, like):
    """By how much the orders of two numbers differ at least that are stored as the pointer's and widened to `like`."""
    step = 1 if like == types.float64 else ordering.STEPS[STORED_DTYPE[pointer.dtype]]

    def codegen(context, builder, signature, args):
        return context.get_constant(types.int64, step)

    return types.int64(pointer, like), codegen


@intrinsic
def lanes_reaching(typingctx, x, limit):
    """How many lanes of x are at least the limit."""

    def codegen(context, builder, signature, args):
        reaching = builder.fcmp_ordered(">=", args[0], ieee.Arithmetic(builder, args[0].type).splat(args[1]))
        count = builder.ctpop(builder.bitcast(reaching, ir.IntType(x.lanes)))
        return count if count.type == ordering.LONG else builder.zext(count, ordering.LONG)

    return types.int64(x, limit), codegen


@intrinsic
def lanes_between(typingctx, x, low, high, count):
    """A bit for each of the first `count` lanes of x that is at least low and less than high, if that is a number."""

    def codegen(context, builder, signature, args):
        a = ieee.Arithmetic(builder, args[0].type)
        reaching = builder.fcmp_ordered(">=", args[0], a.splat(args[1]))
        between = builder.and_(reaching, builder.fcmp_unordered("<", args[0], a.splat(args[2])))
        between = builder.and_(between, first_lanes(builder, args[3], x.lanes))
        mask = builder.bitcast(between, ir.IntType(x.lanes))
        return mask if mask.type == ordering.LONG else builder.zext(mask, ordering.LONG)

    return types.int64(x, low, high, types.intp), codegen


@intrinsic
def where_reaching(typingctx, x, limit, y):
    """y in the lanes in which x is at least the limit, 0 in the others."""

    def codegen(context, builder, signature, args):
        a = ieee.Arithmetic(builder, args[0].type)
        return a.select(builder.fcmp_ordered(">=", args[0], a.splat(args[1])), args[2], a.number(0))

    return x(x, limit, x), codegen
