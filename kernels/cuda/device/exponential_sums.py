"""Sums of exponentials: over the columns of a lane, the lanes of a warp and the chunks of a row.

float32 is added up in balanced trees. In float64 that is not enough for the 4 ulp that tests hold softmax to: exp, the
inverse and the last product take up to 3 of them, and the fifteen additions between the largest exponential of a long
row and its sum are 1 to 2 ulp off in some rows. So what additions lose is kept until the sum of a piece is rounded, and
once more that of the row: they are off by 1 u together. Nor does a log-sum-exp have more than the 2 u that are allowed
near 0 if what others add to a maximum is not rounded on its way to the logarithm.

A lane's total begins above any exponential. What an addition has lost is then what two subtractions find, exactly:
T. J. Dekker, "A floating-point technique for extending the available precision", Numer. Math. 18, 1971.
"""

from gpusoftmax.kernels import formulas, ieee
from gpusoftmax.kernels.cuda.device._cuda import device
from gpusoftmax.kernels.cuda.device.arithmetic import add, add_pair, formula, number
from gpusoftmax.kernels.cuda.device.memory import number_size
from gpusoftmax.kernels.cuda.device.reduce import lanes_sum_pair, warp_sum

ABOVE_ANY = 2.0  # exponentials refer to the maximum, or to a power of two at most sqrt(2) below it


def _begin(a, lift):
    """The total of no columns; exponentials are 2^lift times as large."""
    return a.mul(lift, a.number(ABOVE_ANY)) if a.format is ieee.DOUBLE else a.number(0)


def _with_group(a, total, low, of_group, group):
    """(total, low) and the exponentials of a group, whose sum as a tree is `of_group`."""
    if a.format is not ieee.DOUBLE:
        return a.add(total, of_group), low
    for e in group:
        before, total = total, a.add(total, e)
        low = a.add(low, a.sub(e, a.sub(total, before)))
    return total, low


def _end(a, total, begun):
    return a.sub(total, begun) if a.format is ieee.DOUBLE else total


def _difference_pair(a, x, y):
    """x - y and, in float64, what it was rounded by."""
    return formulas.two_sum(a, x, a.negative(y)) if a.format is ieee.DOUBLE else (a.sub(x, y), a.number(0))


def _quotient_pair(a, x, x_low, y):
    """(x + x_low) / y and, in float64, what it was rounded by."""
    quotient = a.div(x, y)
    if a.format is not ieee.DOUBLE:
        return quotient, a.number(0)
    rest = a.add(a.fma(a.negative(quotient), y, x), x_low)
    return quotient, formulas.finite_or_zero(a, a.div(rest, y), quotient)


begin = formula(_begin)
with_group = formula(_with_group, n_results=2)
end = formula(_end)
difference_pair = formula(_difference_pair, n_results=2)
quotient_pair = formula(_quotient_pair, n_results=2)


@device
def is_double(like):
    return number_size(like) == 8


@device
def with_part(total, low, part):
    """(total, low) and the sum of one more chunk."""
    if is_double(total):
        return add_pair(total, low, part, number(part, 0.0))
    return add(total, part), low


@device
def sum_of_lanes(total, low, lanes):
    """The sum over `lanes` neighbouring lanes, rounded."""
    if is_double(total):
        total, low = lanes_sum_pair(total, low, lanes)
        return add(total, low)
    return warp_sum(total, lanes)
