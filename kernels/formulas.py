"""The mathematics of one logit and of one row, written once for the CPU and the GPU.

Every function here emits LLVM instructions through an `Arithmetic` (ieee.py): the same inputs give the same bits
wherever they are evaluated.

A name ending in `_low` holds the rounding error of its partner: `x + x_low` is the value to about twice the precision.

Row state (`State`), for logits x_c and their scaled gaps g_c = (x_c - max) * scale:

    max     the largest logit seen (-inf: none; a NaN never becomes the maximum)
    ties    how many logits equal max
    tail    sum of exp(g_c) over the others, kept as tail + tail_low; a NaN logit makes it NaN

so that the softmax denominator is s = ties + tail and s - 1 = (ties - 1) + tail needs no subtraction of nearly equal
numbers: log(s) = log1p(s - 1) stays exact for rows in which one logit leads by far. The online update is that of
Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, arXiv:1805.02867, algorithm 3.
"""

import math
from typing import NamedTuple

import numpy as np

from gpusoftmax.kernels.ieee import SINGLE, Arithmetic

# ---------------------------------------------------------------- sums without loss


def two_sum(a: Arithmetic, x, y):
    """(s, error) with s = x + y rounded and s + error = x + y exactly. Knuth, TAOCP vol. 2, 4.2.2, theorem B."""
    s = a.add(x, y)
    part = a.sub(s, x)
    return s, a.add(a.sub(x, a.sub(s, part)), a.sub(y, part))


def finite_or_zero(a: Arithmetic, error, of):
    """`error`, or 0 where the number it belongs to is infinite or NaN and the error is a meaningless NaN."""
    return a.select(a.equal(a.sub(of, of), a.number(0)), error, a.number(0))


def add_pair(a: Arithmetic, high, low, x, x_low):
    """(high, low) + (x, x_low) as such a pair; an infinity or NaN in the high parts survives."""
    s, error = two_sum(a, high, x)
    return s, finite_or_zero(a, a.add(a.add(low, x_low), error), s)


def add_pair_normalised(a: Arithmetic, high, low, x, x_low):
    """add_pair, with low within half a unit in the last place of high: after 10^5 additions whose errors have one sign
    it would be so large that it is rounded itself.
    """
    s, error = two_sum(a, *add_pair(a, high, low, x, x_low))
    return s, finite_or_zero(a, error, s)


def kahan_add(a: Arithmetic, total, error, term):
    """Kahan's sum: (total, error) and one more term, where the true sum is total - error. Infinities become NaN."""
    corrected = a.sub(term, error)
    updated = a.add(total, corrected)
    return updated, a.sub(a.sub(updated, total), corrected)


def compensated_add(a: Arithmetic, total, error, term):
    """kahan_add, of which an infinite sum survives."""
    updated, error = kahan_add(a, total, error, term)
    return updated, finite_or_zero(a, error, updated)


# ---------------------------------------------------------------- one logit


def transform(a: Arithmetic, x):
    """A logit as the kernels hold it: halved, so that the gap of the two largest numbers is finite.

    Exact but for the last bit of a subnormal, which no result shows.
    """
    return a.mul(x, a.number(0.5))


def gap(a: Arithmetic, x, y, scale, scale_low):
    """(x - y) * scale as (gap, gap_low): the subtraction and the product keep their rounding errors.

    `scale` is 2 / temperature (the 2 undoes the halving of `transform`). Subtracting first keeps tiny temperatures
    finite: x / 1e-37 alone would overflow.
    """
    difference, error = two_sum(a, x, a.negative(y))
    product = a.mul(difference, scale)
    product_error = a.fma(difference, scale, a.negative(product))
    low = a.fma(error, scale, a.fma(difference, scale_low, product_error))
    return product, finite_or_zero(a, low, product)


def scaled(a: Arithmetic, x, scale, scale_low):
    """x (scale + scale_low), rounded once as nearly as matters: x / temperature, from its inverse as a pair."""
    product = a.mul(x, scale)
    low = a.fma(x, scale_low, a.fma(x, scale, a.negative(product)))
    return a.add(product, finite_or_zero(a, low, product))


def inverse_temperature(a: Arithmetic, temperature):
    """1 / temperature as (high, low); NaN unless it is finite and above 0. As operands.scale_of, it is never infinite:
    the product with a logit of 0 must stay 0.
    """
    high = a.div(a.number(1), temperature)
    low = finite_or_zero(a, a.div(a.fma(a.negative(temperature), high, a.number(1)), temperature), high)
    high = a.minimum(high, a.number(2.0**a.format.bias * (2 - 2.0**-a.format.mantissa_bits)))
    is_good = a.builder.and_(a.less(a.number(0), temperature), a.less(temperature, a.number(math.inf)))
    return a.select(is_good, high, a.number(math.nan)), low


def is_near_cap(a: Arithmetic, x, cap):
    """Whether x is so small beside the cap that `near_softcap` is its softcap."""
    return a.less(a.magnitude(x), a.mul(cap, a.number(a.format.tanh_limit)))


def near_softcap(a: Arithmetic, x, cap, inverse):
    """cap tanh(x / cap): x and what is small beside it, so that x / cap need not be exact."""
    u = a.mul(x, inverse)
    square = a.mul(u, u)
    return a.fma(a.mul(x, square), a.polynomial(square, a.format.tanh_terms), x)


def softcap(a: Arithmetic, x, cap, inverse):
    """cap tanh(x / cap) within 3.5 ulp: the identity near 0, and never beyond the cap; inverse: 1 / cap.

    Far from 0 it is cap (1 - e) / (1 + e) with e = exp(-2 |x| / cap), where 1 - e does not cancel.
    """
    e = exp(a, a.mul(a.magnitude(a.div(x, cap)), a.number(-2)), a.number(0))
    far = a.mul(a.div(a.sub(a.number(1), e), a.add(a.number(1), e)), cap)
    far = a.select(a.less(x, a.number(0)), a.negative(far), far)
    return a.select(is_near_cap(a, x, cap), near_softcap(a, x, cap, inverse), far)


def pulled_through_softcap(a: Arithmetic, gradient, capped, inverse):
    """The gradient with respect to x, from that with respect to softcap(x) = capped; inverse: 1 / cap."""
    t = a.mul(capped, inverse)
    return a.mul(gradient, a.fma(a.negative(t), t, a.number(1)))


def pulled_through_mask(a: Arithmetic, pulled, gradient, x):
    """What a gradient has become on its way back; 0 where the logit x is masked, unless it is NaN, as all its row."""
    return a.select(a.equal(x, a.number(-math.inf)), a.mul(gradient, a.number(0)), pulled)


def _reduce(a: Arithmetic, x):
    """(r, n) with x = n ln 2 + r and |r| <= ln(2) / 2 (Cody and Waite); r as a pair, n as the sum of two integers."""
    f = a.format
    shifted = a.fma(x, a.number(1 / math.log(2)), a.number(f.magic))
    n = a.sub(shifted, a.number(f.magic))
    magic_bits = int(np.float32(f.magic).view(np.int32)) if f is SINGLE else int(np.float64(f.magic).view(np.int64))
    exponent = a.builder.sub(a.builder.bitcast(shifted, a.integers), a.integer(magic_bits))
    half = a.builder.ashr(exponent, a.integer(1))
    return a.fma(n, a.number(-f.ln2_high), x), a.mul(n, a.number(-f.ln2_low)), half, a.builder.sub(exponent, half)


def exp(a: Arithmetic, x, x_low):
    """exp(x + x_low) within 0.9 ulp, gradual underflow included; exp(-inf) = 0, exp(NaN) = NaN.

    exp(x) = 2^n (1 + r + r^2 q(r)). Half of 2^n is multiplied in twice: neither factor leaves the normal range.
    """
    f = a.format
    r_high, r_low, half, other_half = _reduce(a, x)
    r = a.add(r_high, r_low)
    # exp(r + x_low) is exp(r) (1 + x_low) as nearly as matters, and 1 + r is near enough to exp(r) for that product.
    correction = a.fma(a.mul(r, r), a.polynomial(r, f.exp_terms), a.fma(x_low, r, x_low))
    result = a.add(a.number(1), a.add(r, correction))
    result = a.mul(a.mul(result, a.power_of_two(half)), a.power_of_two(other_half))
    result = a.select(a.less(x, a.number(f.exp_low)), a.number(0), result)
    return a.select(a.less(a.number(f.exp_high), x), a.number(math.inf), result)


def exp_gap(a: Arithmetic, x, max, scale, scale_low):
    """exp((x - max) * scale)."""
    return exp(a, *gap(a, x, max, scale, scale_low))


def log1p(a: Arithmetic, x, x_low):
    """log(1 + x + x_low) as (log, log_low) for x >= 0, within 0.3 ulp of max(log, 1) and 0.7 ulp of itself.

    1 + x = 2^k c with c in [sqrt(1/2), sqrt(2)), f = c - 1, t = f / (2 + f): log(1 + f) = 2 atanh(t)
    = f - (f^2/2 - t (f^2/2 + t^2 R(t^2))).
    """
    f, b = a.format, a.builder
    shift, bottom = a.integer(f.mantissa_bits), a.integer(f.sqrt_half_bits)
    u, u_low = two_sum(a, a.number(1), x)
    u_low = a.add(u_low, x_low)
    bits = b.bitcast(u, a.integers)
    exponent = b.ashr(b.sub(bits, bottom), shift)
    c = b.bitcast(b.sub(bits, b.shl(exponent, shift)), a.type)
    c_low = a.mul(u_low, a.power_of_two(b.sub(a.integer(0), exponent)))
    k = b.sitofp(exponent, a.type)
    fraction, fraction_low = two_sum(a, a.sub(c, a.number(1)), c_low)
    t = a.div(fraction, a.add(a.number(2), fraction))
    t2 = a.mul(t, t)
    half_square = a.mul(a.mul(fraction, fraction), a.number(0.5))
    series = a.mul(t2, a.polynomial(t2, f.atanh_terms))
    correction = a.sub(half_square, a.mul(t, a.add(half_square, series)))
    low = a.sub(a.div(fraction_low, c), correction)
    high, error = two_sum(a, a.mul(k, a.number(f.ln2_high)), fraction)
    low = a.add(a.fma(k, a.number(f.ln2_low), low), error)
    return two_sum(a, high, low)


# ---------------------------------------------------------------- exponentials without subtracting the maximum


def anchor(a: Arithmetic, max, scale):
    """(shift, exponent): what the exponentials of a part of a row with this maximum refer to, see `exp_from`.

    exp(x scale) = 2^exponent exp(shift scale) exp_from(x). Near 0 the shift is 0 and the anchor a power of two: parts
    of a row are then brought to one anchor without any rounding. Far away it is the maximum, and x - shift is exact
    where it matters: exp(-88) is all that float32 can tell from 0, and x and shift agree in their leading bits.
    """
    f = a.format
    max = reference(a, max)
    y = a.mul(max, scale)
    near = a.less(a.magnitude(y), a.number(2.0**16))
    exponent = a.sub(a.fma(y, a.number(1 / math.log(2)), a.number(f.magic)), a.number(f.magic))
    return a.select(near, a.number(0), max), a.select(near, exponent, a.number(0))


def floor(a: Arithmetic, exponent):
    """Where exp_from starts to be 0: it is not asked for less, -inf included."""
    return a.mul(a.sub(exponent, a.number(a.format.exp_depth)), a.number(a.format.ln2))


def exp_from(a: Arithmetic, x, shift, exponent, floor, scale, scale_low):
    """exp(x scale) / (2^exponent exp(shift scale)) within 0.9 ulp for any x up to about the maximum; NaN stays NaN.

    The logit itself is reduced: x scale = n ln 2 + r, and 2^(n - exponent) exp(r) is the result, so that no rounded
    difference to the maximum enters. M. Dukhan and A. Ablavatski, "The Two-Pass Softmax Algorithm", 2020,
    arXiv:2001.04438, reduce in the same way. scale_low None: the scale is 1.
    """
    return _exp_from(a, x, shift, exponent, floor, scale, scale_low, (1.0, 1.0, *a.format.exp_terms))


# 2.6e-6 off at most: a hundredth of half a unit in the last place of float16.
_COARSE_EXP = (0.9999992614430034, 0.9999634047610813, 0.5000435867024206, 0.16790907372163846, 0.041458608241949975)


def coarse_exp_from(a: Arithmetic, x, shift, exponent, floor, scale, scale_low):
    """`exp_from` for results of sixteen bits."""
    terms = _COARSE_EXP if a.format is SINGLE else (1.0, 1.0, *a.format.exp_terms)
    return _exp_from(a, x, shift, exponent, floor, scale, scale_low, terms)


def _exp_from(a: Arithmetic, x, shift, exponent, floor, scale, scale_low, terms):
    f = a.format
    x = a.sub(x, shift)
    y = x if scale_low is None else a.mul(x, scale)
    product, y = y, a.larger(floor, y)
    # Added to y / ln 2, this leaves the biased exponent of 2^(n - exponent + lift) in the low bits.
    magic = a.sub(a.number(f.magic + f.bias + f.exp_lift), exponent)
    shifted = a.fma(y, a.kept(1 / math.log(2)), magic)
    n = a.sub(shifted, magic)
    r = a.fma(n, a.kept(-f.ln2), y)
    r = a.fma(n, a.kept(-f.ln2_rest), r)
    if scale_low is not None:
        low = a.fma(x, scale_low, a.fma(x, scale, a.negative(product)))
        r = a.add(r, a.select(a.less(product, floor), a.number(0), low))
    drop = 2.0**-f.exp_lift
    result = a.polynomial(r, tuple(drop * term for term in terms), a.kept)
    power = a.builder.shl(a.builder.bitcast(shifted, a.integers), a.integer(f.mantissa_bits))
    return a.mul(result, a.builder.bitcast(power, a.type))


def inverse_pair(a: Arithmetic, sum, low):
    """1 / (sum + low) as (inverse, inverse_low)."""
    s = a.add(sum, low)
    rest = a.sub(low, a.sub(s, sum))
    inverse = a.div(a.number(1), s)
    error = a.fma(a.negative(inverse), s, a.number(1))
    return inverse, a.mul(inverse, a.sub(error, a.mul(inverse, rest)))


def ratio_of_anchors(a: Arithmetic, shift, exponent, other_shift, other_exponent, scale, scale_low):
    """What the exponentials of one anchor are multiplied by to refer to another, not much smaller one."""
    f = a.format
    steps = a.sub(exponent, other_exponent)
    difference, low = gap(a, shift, other_shift, scale, a.number(0) if scale_low is None else scale_low)
    # Of one infinity to the other it would be NaN; here a vector's other rows may have shifts that differ.
    difference = a.select(a.equal(shift, other_shift), a.number(0), difference)
    product = a.mul(steps, a.number(f.ln2))
    total, error = two_sum(a, difference, product)
    low = a.add(low, a.fma(steps, a.number(f.ln2), a.negative(product)))
    low = finite_or_zero(a, a.add(a.fma(steps, a.number(f.ln2_rest), low), error), total)
    total, low = two_sum(a, total, low)  # the terms are large, and so is what they leave behind
    return exp(a, total, finite_or_zero(a, low, total))


def power_of_two_ratio(a: Arithmetic, exponent, other_exponent):
    """`ratio_of_anchors` where both shifts are equal: exact, but for underflow."""
    f = a.format
    steps = a.larger(a.number(-f.exp_depth), a.sub(exponent, other_exponent))
    shifted = a.add(steps, a.number(f.magic + f.bias + f.exp_lift))
    power = a.builder.shl(a.builder.bitcast(shifted, a.integers), a.integer(f.mantissa_bits))
    return a.mul(a.number(2.0**-f.exp_lift), a.builder.bitcast(power, a.type))


# ---------------------------------------------------------------- one row


class State(NamedTuple):
    """See the module's docstring."""

    max: object
    ties: object
    tail: object
    tail_low: object


def tie(a: Arithmetic, x, max):
    """1 where the logit equals the maximum, else 0."""
    return a.select(a.equal(x, max), a.number(1), a.number(0))


def set_ties_apart(a: Arithmetic, e, x, others, max):
    """(e, others): a logit of exponential e that equals the maximum is not added, any other is counted. max None: all
    are added.
    """
    if max is None:
        return e, others
    differs = a.differs(x, max)
    return a.select(differs, e, a.number(0)), a.select(differs, a.add(others, a.number(1)), others)


def tied_total(a: Arithmetic, ties, ties_low, own_ties, own, own_max, max):
    """(ties, ties_low, joining): the ties of one more part of a row, where its maximum is the row's; else what they
    add, `own` each, to the tail. In float32 a number alone counts to 2^24, and loses one in 2^12 by 2^26.
    """
    same, zero = a.equal(own_max, max), a.number(0)
    ties, ties_low = add_pair_normalised(a, ties, ties_low, a.select(same, own_ties, zero), zero)
    return ties, ties_low, a.select(same, zero, a.mul(own_ties, own))


def where_finite(a: Arithmetic, of, x, otherwise):
    """x, or `otherwise` where `of` is infinite."""
    return a.select(a.is_infinite(of), otherwise, x)


def distance(a: Arithmetic, x, max, scale):
    """(max - x) scale. Halved in between: they may lie further apart than the largest number."""
    max = reference(a, max)
    return a.mul(a.fma(x, a.number(-0.5), a.mul(max, a.number(0.5))), a.mul(scale, a.number(2)))


def _bounded(a: Arithmetic, distance):
    """A distance, or a finite one where it is infinite: its exponential is 0."""
    return a.minimum(distance, a.number(2.0**100))


def weighted(a: Arithmetic, e, distance):
    """e times a distance, and 0 where e is."""
    return a.mul(e, _bounded(a, distance))


def weighted_distance(a: Arithmetic, e, x, max, scale, scale_low):
    """weighted(e, (max - x) scale) for the exponential e of x. scale_low None: the scale is 1."""
    if scale_low is None:
        return weighted(a, e, a.sub(max, x))
    return weighted(a, e, distance(a, x, max, scale))


def finite_distance(a: Arithmetic, x, shift, floor, max, scale, scale_low):
    """(max - x) scale, and some finite number where the exponential of x, see exp_from, is 0."""
    if scale_low is None:  # shift is 0 or the maximum: nothing is rounded twice
        return a.sub(a.sub(reference(a, max), shift), a.larger(floor, a.sub(x, shift)))
    return _bounded(a, distance(a, x, max, scale))


def distance_of_mass(a: Arithmetic, mass, x, max):
    """mass (max - x), and 0 where the mass is, whatever the logit. The mass is inside: the bare difference of large
    logits would overflow.
    """
    half = a.fma(x, a.number(-0.5), a.mul(reference(a, max), a.number(0.5)))
    return a.select(a.equal(mass, a.number(0)), a.number(0), a.mul(half, a.mul(mass, a.number(2))))


def weighted_nats(a: Arithmetic, mass, nats):
    """mass nats, and 0 where the mass is and the nats are infinite: of a class that cannot be, and has no weight."""
    cannot_be = a.builder.and_(a.equal(mass, a.number(0)), a.equal(nats, a.number(math.inf)))
    return a.select(cannot_be, a.number(0), a.mul(mass, nats))


def is_above(a: Arithmetic, x, threshold):
    """1 where x is larger than the threshold, else 0."""
    return a.select(a.less(threshold, x), a.number(1), a.number(0))


def counted_above(a: Arithmetic, count, x, threshold):
    """count, and one more where x is larger than the threshold: one instruction behind the comparison."""
    return a.select(a.less(threshold, x), a.add(count, a.number(1)), count)


def rise_to(a: Arithmetic, own_max, max, scale):
    """By how much distances to one maximum, times scale, grow when they are taken to a larger one. Not where it is
    -inf: they are infinite already.
    """
    return a.select(a.equal(own_max, a.number(-math.inf)), a.number(0), distance(a, own_max, max, scale))


def row_inverse(a: Arithmetic, max, sum, low):
    """1 / (sum + low), the factor that turns exponentials into probabilities. NaN for +inf or nothing but -inf."""
    inverse = a.div(a.number(1), a.add(sum, low))
    return a.select(a.is_infinite(max), a.number(math.nan), inverse)


def zero_where_empty(a: Arithmetic, value, max, rest):
    """The value; 0 where a row has no maximum and, `rest` being 0 then, no NaN either: it is masked whole."""
    is_empty = a.builder.and_(a.equal(max, a.number(-math.inf)), a.equal(rest, a.number(0)))
    return a.select(is_empty, a.number(0), value)


def log_probability(a: Arithmetic, x, max, log, scale):
    """(x - max) scale - log: two terms that are not positive, so that nothing cancels.

    Half the difference is taken twice: that of the two largest numbers is finite.
    """
    half = a.fma(x, a.number(0.5), a.mul(max, a.number(-0.5)))
    return a.fma(half, a.mul(scale, a.number(2)), a.negative(log))


def reference(a: Arithmetic, max):
    """What to subtract from logits whose maximum is `max`: 0 where there is none, since -inf - -inf is NaN."""
    return a.select(a.equal(max, a.number(-math.inf)), a.number(0), max)


def inverse_sum(a: Arithmetic, state: State):
    """1 / s, the factor that turns exp(gap) into a probability. A row that holds +inf has none: NaN."""
    state = State(*state)
    s = a.add(state.ties, a.add(state.tail, state.tail_low))
    return a.select(a.equal(state.max, a.number(math.inf)), a.number(math.nan), a.div(a.number(1), s))


def log_sum(a: Arithmetic, state: State):
    """(log s, log_low): log-sum-exp relative to the maximum. Where the row holds +inf or only -inf, it is NaN, and
    log_low is the tail: it tells whether there is a NaN.
    """
    state = State(*state)
    others, error = two_sum(a, a.sub(state.ties, a.number(1)), state.tail)
    high, low = log1p(a, others, a.add(error, state.tail_low))
    no_maximum = a.is_infinite(state.max)
    return a.select(no_maximum, a.number(math.nan), high), a.select(no_maximum, state.tail, low)


def logsumexp(a: Arithmetic, state: State, scale, scale_low):
    """max * scale + log s, rounded once; the maximum itself where it is infinite, NaN where the row holds a NaN."""
    state = State(*state)
    log, log_low = log_sum(a, state)
    extreme = a.add(state.max, a.mul(state.tail, a.number(0)))
    return a.select(a.is_infinite(state.max), extreme, logsumexp_of(a, state.max, log, log_low, scale, scale_low))


def logsumexp_of(a: Arithmetic, max, log, log_low, scale, scale_low):
    """max * scale + log + log_low, rounded once; the maximum itself where it is infinite."""
    offset = a.mul(max, scale)
    offset_low = a.fma(max, a.number(0) if scale_low is None else scale_low, a.fma(max, scale, a.negative(offset)))
    high, low = add_pair(a, offset, finite_or_zero(a, offset_low, offset), log, log_low)
    return a.select(a.is_infinite(max), max, a.add(high, low))


# ---------------------------------------------------------------- which one is the largest


def leading(a: Arithmetic, best, place, x, at):
    """(best, place) of the numbers so far and one more, x, at a place behind theirs. The first NaN leads."""
    ahead = a.builder.and_(a.builder.fcmp_unordered(">", x, best), a.builder.fcmp_ordered("ord", best, best))
    return a.select(ahead, x, best), a.select(ahead, at, place)


def first_leading(a: Arithmetic, x, at, y, other):
    """(number, place): the one of x at `at` and y at `other` that leads; of equal ones that at the lower place."""
    b = a.builder
    y_ahead = b.and_(b.fcmp_unordered(">", y, x), b.fcmp_ordered("ord", x, x))
    x_ahead = b.and_(b.fcmp_unordered(">", x, y), b.fcmp_ordered("ord", y, y))
    chosen = b.or_(y_ahead, b.and_(b.not_(x_ahead), a.less(other, at)))
    return a.select(chosen, y, x), a.select(chosen, other, at)
