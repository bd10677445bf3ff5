"""The formulas of two rows: how far one distribution is from another. As in formulas.py."""

import math

from gpusoftmax.kernels.formulas import finite_or_zero, two_sum
from gpusoftmax.kernels.ieee import Arithmetic


def half_difference(a: Arithmetic, y, x):
    """(y - x) / 2 as a pair; halved, so that the difference of the two largest numbers is finite."""
    return two_sum(a, a.mul(y, a.number(0.5)), a.mul(x, a.number(-0.5)))


def log_ratio(a: Arithmetic, x, y, ahead, ahead_low, scale, log):
    """d = log p - log q, from the logit y of p and the logit x of q.

    (ahead, ahead_low): the maximum of the row of p minus that of q; log: log s of the former, relative to its maximum,
    minus that of the latter. The scale is 1 / temperature. All may be halved but log, with twice the scale, where a
    difference could be too large. Rows that differ by a constant lose nothing: the differences keep their rounding
    errors. NaN where both logits are -inf.
    """
    difference, low = two_sum(a, y, a.negative(x))
    low = finite_or_zero(a, low, difference)
    return a.fma(a.add(a.sub(difference, ahead), a.sub(low, ahead_low)), scale, a.negative(log))


def short_log_ratio(a: Arithmetic, x, y, ahead, scale, log):
    """`log_ratio` for logits of sixteen bits, whose differences are exact in float32, as a rule."""
    return a.fma(a.sub(a.sub(y, x), ahead), scale, a.negative(log))


def excess(a: Arithmetic, d):
    """d + expm1(-d), never negative and without its cancellation; for |d| <= 1."""
    return a.mul(a.mul(d, d), a.polynomial(d, a.format.excess_terms))


def is_small(a: Arithmetic, d):
    """Whether `excess` is meant for d."""
    return a.builder.fcmp_ordered("<=", a.magnitude(d), a.number(1))


def divergence(a: Arithmetic, p, q, d):
    """p d - p + q: what a class adds to the divergence of p from q, not negative.

    Where p and q are close to each other it is p (d + expm1(-d)); elsewhere no two terms nearly cancel. A class without
    p adds q whatever d is. p and q may both be multiplied by something above 0.
    """
    far = a.fma(p, a.sub(d, a.number(1)), q)
    far = a.select(a.equal(p, a.number(0)), q, far)
    return a.select(is_small(a, d), a.mul(p, excess(a, d)), far)


def pull_on_target(a: Arithmetic, p, d, divergence):
    """p (d - divergence): the gradient of a divergence with respect to the logits of p.

    0 where p is; NaN in a row whose divergence is infinite.
    """
    nothing = a.builder.and_(a.equal(p, a.number(0)), a.less(divergence, a.number(math.inf)))
    return a.select(nothing, a.number(0), a.mul(p, a.sub(d, a.add(divergence, a.sub(divergence, divergence)))))
