"""Floating-point numbers as integers in the same order, for bisection: LLVM instructions for both targets.

A row's k-th largest logit, and the logit from which on the largest ones hold a given part of the probability, are found
by halving an interval of these integers: an exact result from comparisons, counts and sums alone, without sorting. 32
halvings tell any two float32 apart; the logits of 16-bit formats, widened, need about as many as they have bits.
"""

from llvmlite import ir

from gpusoftmax.kernels.ieee import Arithmetic

LONG = ir.IntType(64)
STEPS = {"float16": 1 << 13, "bfloat16": 1 << 16, "float32": 1}
"""Numbers of a format, widened to float32, have orders that are multiples of this."""


def _magnitude_bits(a: Arithmetic) -> int:
    return (1 << (a.format.integer.width - 1)) - 1


def order_of(a: Arithmetic, x):
    """64-bit integers for numbers that are not NaN, or for one: larger for larger ones, 0 for both zeros."""
    b = a.builder
    bits = b.bitcast(x, a.integers)
    magnitude = b.and_(bits, a.integer(_magnitude_bits(a)))
    order = b.select(b.icmp_signed("<", bits, a.integer(0)), b.neg(magnitude), magnitude)
    longs = ir.VectorType(LONG, order.type.count) if isinstance(order.type, ir.VectorType) else LONG
    return order if order.type == longs else b.sext(order, longs)


def of_order(a: Arithmetic, order):
    """The number that has this order."""
    b = a.builder
    if a.integers != LONG:
        order = b.trunc(order, a.integers)
    is_negative = b.icmp_signed("<", order, a.integer(0))
    sign = b.select(is_negative, a.integer(_magnitude_bits(a) + 1), a.integer(0))
    return b.bitcast(b.or_(b.select(is_negative, b.neg(order), order), sign), a.type)


def kept_from(a: Arithmetic, x, limit):
    """x where it is at least the limit, or NaN; else -inf. limit None: x."""
    return x if limit is None else a.select(a.less(x, limit), a.number(-float("inf")), x)
