"""exp(x scale) as the kernels need it: a cheap one and accurate ones; to a power of two, or to the maximum of the row.

In base 2, c = scale log2(e), for logits x up to a maximum m. Near 0, where |m c| < 2^16, exponentials refer to 2^N with
N = round(m c):

    cheap      2^(x c - N) by ex2.approx: one fma, which rounds x c - N once           2 instructions
    accurate   2^n p(f) / 2^N,  n = round(x c), f = x c + x c_low - n, p of degree 6    14; 13 where a NaN may be lost

The fma sees the exact product of x and the rounded c. What c lacks, c_low, is a factor of exp(x c_low): as exp(m c_low)
it is common to a sum of cheap exponentials, and what remains is (m - x) c_low, u/4 of the gap at temperature 1. Two
cheap numbers are divided as they are; where accurate ones are divided by a sum of cheap ones, the sum gets the common
factor once (`corrected_inverse`). Errors, with u = 2^-24:

    cheap      5 u + 2 |x c - N| u
    accurate   1.5 u whatever the gap

Two anchors differ by an integer, so that parts of a row are brought to one anchor exactly. Far from 0 the maximum is
subtracted first, with y = (x - m) / 2 (halving keeps the gap of the two largest numbers finite, and the 2 is part of
the scale):

    cheap      2^(y c) by ex2.approx                       5 u + |y c| u        3 instructions
    exact      2^n p(f),  n = round(y c), f = y c - n,     1.5 u               23
               with y's rounding error

Sums are those of cheap exponentials. A log-sum-exp shows at most 5 u (1 - 1/s) of their errors, should all of them lie
on one side; it is allowed 4 u, and 8 u from 2 on. All give 0 for -inf and, if not said otherwise, keep NaN; below
2^-126 they give 0. In float64 all are the formulas' exp_from and exp_gap.
"""

import math

from llvmlite import ir

from gpusoftmax.kernels import formulas, ieee
from gpusoftmax.kernels.cuda.device.arithmetic import formula

LOG2_E = 1.4426950216293335  # log2(e) in float32, and the rest of it
LOG2_E_LOW = 1.925963033500118e-08
MAX = 3.4028234663852886e38
NEAR = 2.0**16  # maxima times scale that have a power of two for an anchor
LEAST_SCALE = 2.0**-118  # below, the logit whose exponential is 2^-127 would overflow
# 2^f = 1 + f q(f) for |f| <= 1/2, minimax: relative error 1.4e-8, with the roundings 1.5 u.
TERMS = (
    0.6931472010849222,
    0.2402265194080856,
    0.055503397742419636,
    0.009617820200043764,
    0.0013395096969478664,
    0.00015564320637948052,
)


def _ex2(a, x):
    """2^x within 2 ulp; subnormal results are flushed to 0."""
    approximate = ir.InlineAsm(ir.FunctionType(a.type, [a.type]), "ex2.approx.ftz.f32 $0, $1;", "=f,f")
    return a.builder.call(approximate, [x])


def _scale_in_base_2(a, scale, scale_low):
    """(c, c_low). An overflowing c would turn a gap of 0 into NaN."""
    if a.format is ieee.DOUBLE:
        return scale, scale_low
    c = a.mul(scale, a.number(LOG2_E))
    low = a.fma(
        scale, a.number(LOG2_E_LOW), a.fma(scale_low, a.number(LOG2_E), a.fma(scale, a.number(LOG2_E), a.negative(c)))
    )
    overflows = a.less(a.number(MAX), c)
    return a.select(overflows, a.number(MAX), c), a.select(overflows, a.number(0), low)


def _half_gap(a, x, max_half):
    return a.fma(x, a.number(0.5), a.negative(max_half))


def _cheap(a, x, max_half, scale, scale_low, c, c_low):
    if a.format is ieee.DOUBLE:
        return formulas.exp_gap(a, formulas.transform(a, x), max_half, scale, scale_low)
    return _ex2(a, a.mul(_half_gap(a, x, max_half), c))


def _power_of_2(a, y, error, c, c_low):
    """2^((y + error)(c + c_low)) for y <= 0."""
    magic = a.number(a.format.magic)
    shifted = a.fma(y, c, magic)
    n = a.sub(shifted, magic)
    f = a.fma(error, c, a.fma(y, c_low, a.fma(y, c, a.negative(n))))
    power = a.fma(a.polynomial(f, TERMS), f, a.number(1))
    exponent = a.builder.shl(a.builder.bitcast(shifted, a.integers), a.integer(a.format.mantissa_bits))
    scale = a.builder.bitcast(a.builder.add(exponent, a.integer(127 << 23)), a.type)
    vanishes = a.less(shifted, a.number(a.format.magic - 126))
    return a.select(vanishes, a.number(0), a.mul(power, scale))


def _exact(a, x, max_half, scale, scale_low, c, c_low):
    if a.format is ieee.DOUBLE:
        return formulas.exp_gap(a, formulas.transform(a, x), max_half, scale, scale_low)
    y, error = formulas.two_sum(a, a.mul(x, a.number(0.5)), a.negative(max_half))
    return _power_of_2(a, y, error, c, c_low)


def _exp(a, x):
    """exp(x) within 5 u + |x| u; float64 as the formulas' exp."""
    if a.format is ieee.DOUBLE:
        return formulas.exp(a, x, a.number(0))
    return _ex2(a, a.mul(x, a.number(math.log2(math.e))))


def _negative_log_probability(a, x, max_half, log, scale):
    """log s + (max - x) scale: neither term is negative, nothing cancels. Within 1.5 ulp."""
    return a.fma(a.negative(_half_gap(a, x, max_half)), scale, log)


# ---------------------------------------------------------------- anchored at a power of two


def _per_logit(a, c):
    """What a whole logit is multiplied by: c is for halved ones."""
    return a.mul(c, a.number(0.5))


def _anchor(a, max, c):
    """The exponent of the power of two that exponentials of logits up to `max` refer to; inf: to the maximum itself."""
    max, per_logit, magic = formulas.reference(a, max), _per_logit(a, c), a.number(a.format.magic)
    y = a.mul(max, per_logit)
    in_base_2 = a.mul(y, a.number(1 / math.log(2))) if a.format is ieee.DOUBLE else y
    exponent = a.sub(a.add(in_base_2, magic), magic)
    near = a.builder.and_(a.less(a.magnitude(y), a.number(NEAR)), a.less(a.number(LEAST_SCALE), per_logit))
    return a.select(near, exponent, a.number(math.inf))


def _lowest(a, exponent, c):
    """The logit from which on accurate exponentials are 0."""
    if a.format is ieee.DOUBLE:
        return formulas.floor(a, exponent)
    return a.div(a.sub(exponent, a.number(127)), _per_logit(a, c))


def _double_from(a, x, exponent, lowest, c, c_low):
    return formulas.exp_from(a, x, a.number(0), exponent, lowest, _per_logit(a, c), _per_logit(a, c_low))


def _cheap_from(a, x, exponent, lowest, c, c_low):
    if a.format is ieee.DOUBLE:
        return _double_from(a, x, exponent, lowest, c, c_low)
    return _ex2(a, a.fma(x, _per_logit(a, c), a.negative(exponent)))


def _in_base_2(a, c):
    return a.mul(c, a.number(1 / math.log(2))) if a.format is ieee.DOUBLE else c


def _above_floor(a, exponent):
    """The exponent, or a finite one where it is -inf: its product with the exponential is 0."""
    return a.maximum(exponent, a.number(-(2.0**100)))


def _exponent_from(a, x, exponent, c):
    """log2 of cheap_exp_from."""
    return a.fma(x, _per_logit(a, _in_base_2(a, c)), a.negative(exponent))


def _exponent_of_gap(a, x, max_half, c):
    """log2 of cheap_exp_gap."""
    return a.mul(_half_gap(a, x, max_half), _in_base_2(a, c))


def _low_of_cheap(a, c_low):
    """The c_low of cheap exponentials, for accurate ones that are compared with them."""
    return c_low if a.format is ieee.DOUBLE else a.number(0)


def _power_from(a, x, exponent, c, c_low):
    """2^(x (c + c_low) / 2 - exponent) for x from `lowest` on, where it is 0."""
    magic = a.sub(a.number(a.format.magic + 127), exponent)
    shifted = a.fma(x, _per_logit(a, c), magic)
    n = a.sub(shifted, magic)
    f = a.fma(x, _per_logit(a, c_low), a.fma(x, _per_logit(a, c), a.negative(n)))
    power = a.builder.shl(a.builder.bitcast(shifted, a.integers), a.integer(a.format.mantissa_bits))
    return a.mul(a.fma(a.polynomial(f, TERMS), f, a.number(1)), a.builder.bitcast(power, a.type))


def _accurate_from(a, x, exponent, lowest, c, c_low):
    if a.format is ieee.DOUBLE:
        return _double_from(a, x, exponent, lowest, c, c_low)
    return _power_from(a, a.select(a.less(x, lowest), lowest, x), exponent, c, c_low)


def _ordered_from(a, x, exponent, lowest, c, c_low):
    if a.format is ieee.DOUBLE:
        return _double_from(a, x, exponent, lowest, c, c_low)
    return _power_from(a, a.maximum(x, lowest), exponent, c, c_low)


# ---------------------------------------------------------------- scale and softcap


def _of_one_sign(a, high, low):
    """A positive pair as one whose low part is above 0: an infinity times both is that infinity.

    The least number instead of 0 breaks ties of products that are subnormal. Below it there is no high part.
    """
    least = a.builder.bitcast(a.integer(1), a.type)
    one = a.builder.sub(a.builder.bitcast(high, a.integers), a.integer(1))
    lowered = a.builder.and_(a.less(low, a.number(0)), a.less(least, high))
    below = a.select(lowered, a.builder.bitcast(one, a.type), high)
    low = a.add(low, a.sub(high, below))
    return below, a.select(a.less(least, low), low, least)


def _scaled(a, x, high, low):
    """x (high + low), rounded once as nearly as matters; the pair is `of_one_sign`."""
    return a.fma(x, high, a.mul(x, low))


def _reciprocal(a, x):
    """1 / x within 1 ulp; subnormal results are flushed to 0."""
    approximate = ir.InlineAsm(ir.FunctionType(a.type, [a.type]), "rcp.approx.ftz.f32 $0, $1;", "=f,f")
    return a.builder.call(approximate, [x])


def _inverse_cap(a, cap):
    """1 / cap; finite, so that 0 is capped to 0."""
    inverse = a.div(a.number(1), cap)
    return inverse if a.format is ieee.DOUBLE else a.minimum(inverse, a.number(MAX))


def _size(a, x):
    """|x|, which an instruction takes for nothing."""
    return a.call("llvm.nvvm.fabs.f", x)


def _size_for_cap(a, x):
    """|x|: from the cap on, `softcap` takes an exponential. 0 in float64, whose formula does not ask."""
    return a.number(0) if a.format is ieee.DOUBLE else _size(a, x)


def _near_softcap(a, x, cap, inverse):
    """Of float32 numbers that are smaller than the cap; of any in float64."""
    if a.format is ieee.DOUBLE:
        return formulas.softcap(a, x, cap, inverse)
    return formulas.near_softcap(a, x, cap, inverse)


def _softcap(a, x, cap, inverse):
    """cap tanh(x / cap) within 3 ulp. Far from 0 it is cap - 2 cap e / (1 + e), e = exp(-2 |x| / cap): the errors of e
    count a third at 1, and less beyond.
    """
    near = _near_softcap(a, x, cap, inverse)
    if a.format is ieee.DOUBLE:
        return near
    e = _ex2(a, a.mul(_size(a, x), a.mul(inverse, a.number(-2 * math.log2(math.e)))))
    # -2 e, not -2 cap, which may overflow.
    far = a.fma(a.mul(a.mul(e, a.number(-2)), _reciprocal(a, a.add(a.number(1), e))), cap, cap)
    far = a.select(a.less(x, a.number(0)), a.negative(far), far)
    return a.select(a.less(_size(a, x), cap), near, far)


def _unless_equal(a, e, x, max):
    """e, or 0 where the logit equals the maximum."""
    return a.select(a.equal(x, max), a.number(0), e)


def _corrected(a, inverse, max, exponent, c_low):
    """1 / sum where the sum is of cheap exponentials, which lack c_low, for use with accurate ones, which do not."""
    if a.format is ieee.DOUBLE:
        return inverse
    z = a.mul(a.mul(formulas.reference(a, max), _per_logit(a, c_low)), a.number(-math.log(2)))
    factor = a.fma(z, a.fma(z, a.number(0.5), a.number(1)), a.number(1))
    return a.select(a.less(exponent, a.number(math.inf)), a.mul(inverse, factor), inverse)


half_gap = formula(_half_gap)
scale_in_base_2 = formula(_scale_in_base_2, n_results=2)
cheap_exp_gap = formula(_cheap)
exact_exp_gap = formula(_exact)
cheap_exp = formula(_exp)
negative_log_probability = formula(_negative_log_probability)
anchor = formula(_anchor)
lowest_of = formula(_lowest)
cheap_exp_from = formula(_cheap_from)
accurate_exp_from = formula(_accurate_from)
above_floor = formula(_above_floor)
exponent_from = formula(_exponent_from)
exponent_of_gap = formula(_exponent_of_gap)
low_of_cheap = formula(_low_of_cheap)
ordered_exp_from = formula(_ordered_from)
of_one_sign = formula(_of_one_sign, n_results=2)
scaled = formula(_scaled)
inverse_cap = formula(_inverse_cap)
size_for_cap = formula(_size_for_cap)
near_softcap = formula(_near_softcap)
softcap = formula(_softcap)
pulled_through_softcap = formula(formulas.pulled_through_softcap)
unless_equal = formula(_unless_equal)
corrected_inverse = formula(_corrected)
