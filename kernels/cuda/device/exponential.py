"""exp((x - max) scale) as the kernels need it: a cheap one, an accurate one, and one within an ulp.

In base 2 with c = scale log2(e), for a logit x, the maximum of its row or chunk and y = (x - max) / 2:

    cheap      2^(y c) by ex2.approx                       5 u + |y c| u                            3 instructions
    accurate   2^n p(f),  n = round(y c), f = y c - n      1.5 u, and the part of y's rounding
               p of degree 6 on |f| <= 1/2                 error that a log-sum-exp could show     18
    exact      the same with all of y's rounding error     1.5 u                                   23

(u = 2^-24; halving keeps the gap of the two largest numbers finite, and the 2 is part of the scale). All three give 0
for -inf and keep NaN; below 2^-126 they give 0. In float64 all are the formulas' exp_gap.

The accurate one sees error = (x/2 - y) - max/2, which is y's rounding error where |x| >= |max|. Elsewhere |y| <= |max|,
so that the error is in the maximum's last places, and no log-sum-exp holds more.
"""

import math

from llvmlite import ir

from gpusoftmax.kernels import formulas
from gpusoftmax.kernels.cuda.device.arithmetic import formula

LOG2_E = 1.4426950216293335  # log2(e) in float32, and the rest of it
LOG2_E_LOW = 1.925963033500118e-08
MAX = 3.4028234663852886e38
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
    if a.format is formulas.DOUBLE:
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
    if a.format is formulas.DOUBLE:
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


def _accurate(a, x, max_half, scale, scale_low, c, c_low):
    if a.format is formulas.DOUBLE:
        return formulas.exp_gap(a, formulas.transform(a, x), max_half, scale, scale_low)
    y = _half_gap(a, x, max_half)
    error = a.sub(_half_gap(a, x, y), max_half)
    return _power_of_2(a, y, error, c, c_low)


def _exact(a, x, max_half, scale, scale_low, c, c_low):
    if a.format is formulas.DOUBLE:
        return formulas.exp_gap(a, formulas.transform(a, x), max_half, scale, scale_low)
    y, error = formulas.two_sum(a, a.mul(x, a.number(0.5)), a.negative(max_half))
    return _power_of_2(a, y, error, c, c_low)


def _gradual(a, x, max_half, scale, scale_low):
    """The formulas' exp_gap, which does not flush: what is left of a confident row may be that small."""
    return formulas.exp_gap(a, formulas.transform(a, x), max_half, scale, scale_low)


def _exp(a, x):
    """exp(x) within 5 u + |x| u; float64 as the formulas' exp."""
    if a.format is formulas.DOUBLE:
        return formulas.exp(a, x, a.number(0))
    return _ex2(a, a.mul(x, a.number(math.log2(math.e))))


def _negative_log_probability(a, x, max_half, log, scale):
    """log s + (max - x) scale: neither term is negative, nothing cancels. Within 1.5 ulp."""
    return a.fma(a.negative(_half_gap(a, x, max_half)), scale, log)


half_gap = formula(_half_gap)
scale_in_base_2 = formula(_scale_in_base_2, n_results=2)
cheap_exp_gap = formula(_cheap)
accurate_exp_gap = formula(_accurate)
exact_exp_gap = formula(_exact)
gradual_exp_gap = formula(_gradual)
cheap_exp = formula(_exp)
negative_log_probability = formula(_negative_log_probability)
