"""The formulas of expected positions: along a row, and in an image. As in formulas.py."""

from gpusoftmax.kernels.formulas import add_pair, exp_from, floor, reference
from gpusoftmax.kernels.ieee import Arithmetic


def exp_below(a: Arithmetic, x, max, scale, scale_low):
    """exp((x - max) / T) for the largest of some logits, exactly 1 at the maximum itself.

    The scale is 2 / T and acts on half the difference, which is finite; scale_low None: T is 1 and so is the scale.
    Within 1 ulp + |x - max| / T u, since the difference is rounded.
    """
    max, zero = reference(a, max), a.number(0)
    if scale_low is not None:
        x, max = a.fma(x, a.number(0.5), a.mul(max, a.number(-0.5))), zero
    return exp_from(a, x, max, zero, floor(a, zero), scale, scale_low)


def line_and_place(a: Arithmetic, column, before, width, inverse):
    """(line, place) of a column of an image whose lines have `width` columns and lie one behind the other.

    Columns and lines are counted from the first column of a part, whose own line has `before` columns from there on;
    the place is that in its line. inverse: 1 / width. All others are integers, up to 2^22 for a width and 2^21 for a
    column, so that none is rounded to a wrong line: (column + 1/2) / width - 1/2 is 1 / (2 width) away from any tie.
    """
    beyond = a.sub(column, before)
    middle = a.fma(a.add(beyond, a.number(0.5)), inverse, a.number(-0.5))
    magic = a.number(a.format.magic)
    lines = a.sub(a.add(middle, magic), magic)  # -1 in the part's own line
    return a.add(lines, a.number(1)), a.fma(a.negative(lines), width, beyond)


def moved_moment(a: Arithmetic, moment, moment_low, total, total_low, by):
    """sum (k + by) e_k as a pair, from sum k e_k and sum e_k."""
    product = a.mul(total, by)
    error = a.fma(total, by, a.negative(product))
    return add_pair(a, moment, moment_low, product, a.fma(total_low, by, error))


def ratio_of_pairs(a: Arithmetic, x, x_low, y, y_low):
    """(x + x_low) / (y + y_low), rounded once as nearly as matters."""
    q = a.div(x, y)
    rest = a.add(a.fma(a.negative(q), y, x), a.fma(a.negative(q), y_low, x_low))
    return a.add(q, a.div(rest, y))


def coordinate(a: Arithmetic, place, last):
    """linspace(-1, 1, last + 1) at a place between 0 and `last`; 0 where there is only one."""
    return a.div(a.fma(place, a.number(2), a.negative(last)), a.larger(last, a.number(1)))


def place_of(a: Arithmetic, coordinate, last):
    """The place that has a coordinate: what `coordinate` turns into it."""
    return a.mul(a.fma(coordinate, a.larger(last, a.number(1)), last), a.number(0.5))


def per_place_of(a: Arithmetic, dcoordinate, last):
    """The gradient with respect to a place, from that with respect to its coordinate."""
    return a.div(a.mul(dcoordinate, a.number(2)), a.larger(last, a.number(1)))
