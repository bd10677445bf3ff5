"""Random numbers for sampling, as LLVM instructions: the same bits on the CPU and on the GPU.

A column's noise depends on the row's seed and step and on the number of the column, on nothing else. Philox4x32-10
(Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011, doi:10.1145/2063384.2063405)
turns a counter into four words of 32 bits, one for each of four neighbouring columns:

    counter = (column // 4, low and high half of step, 0)          key = (low and high half of seed)

A word k becomes v = (k + 1/2) 2^-32, strictly between 0 and 1, and Gumbel noise g = -log(-log1p(-v)): the column with
the largest x / T + g is a sample of softmax(x / T). Large noise comes from small k, which float32 holds exactly, so
that the winner among a million columns is told from its neighbours. 1 - v is taken from ~k, the number of words above
k: (k + 1/2) 2^-32 itself rounds to 1 for 129 words, and their noise to -inf.

The noise is computed in float32 for logits of every format: its 32 bits of randomness have nothing to give to float64.
"""

import math

from llvmlite import ir

from gpusoftmax.kernels.formulas import log1p, two_sum
from gpusoftmax.kernels.ieee import SINGLE, Arithmetic

WORD, LONG = ir.IntType(32), ir.IntType(64)
COLS_OF_BLOCK = 4
_ROUNDS = 10
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85

# log(1 + f) = f + f^2 q(f) for 1 + f from sqrt(1/2) to sqrt(2): relative error 2^-27.8.
_LOG_TERMS = (
    -0.49999988079071045,
    0.33333325386047363,
    -0.25001582503318787,
    0.20001976191997528,
    -0.16609077155590057,
    0.14181779325008392,
    -0.13242976367473602,
    0.12904690206050873,
    -0.07622108608484268,
)
_SLACK = 1 + 2.0**-16
"""By how much noise is raised in `score_bound`: far more than all rounding errors of `gumbel` together. All 2^32 words
have been tried: their noise is finite and below its bound.
"""


def constant(type: ir.Type, value: int):
    """An integer of this type, or a vector of it in every lane."""
    if isinstance(type, ir.VectorType):
        return ir.Constant(type, [ir.Constant(type.element, value)] * type.count)
    return ir.Constant(type, value)


# ---------------------------------------------------------------- words


def product_of_longs(builder, long, multiplier: int):
    """(high, low) half of the product with a word, all of them low halves of 64 bits, so that no vector is packed."""
    low = builder.and_(long, constant(long.type, 0xFFFFFFFF))
    product = builder.mul(low, constant(long.type, multiplier))
    return builder.lshr(product, constant(long.type, 32)), product


def philox(builder, product, counter, key):
    """Philox4x32-10: four words from a counter of four words and a key of two.

    product: what multiplies two words. Words are values of 32 bits or the low halves of 64 bits, whose high halves mean
    nothing.
    """
    a, b, c, d = counter
    first_key, second_key = key
    for _ in range(_ROUNDS):
        high, low = product(builder, a, _MULTIPLIERS[0])
        other_high, other_low = product(builder, c, _MULTIPLIERS[1])
        a, b = builder.xor(builder.xor(other_high, b), first_key), other_low
        c, d = builder.xor(builder.xor(high, d), second_key), low
        first_key = builder.add(first_key, constant(first_key.type, _KEY_STEPS[0]))
        second_key = builder.add(second_key, constant(second_key.type, _KEY_STEPS[1]))
    return a, b, c, d


# ---------------------------------------------------------------- noise


def _as_single(a: Arithmetic) -> Arithmetic:
    """The arithmetic of float32 in as many lanes."""
    if a.format is SINGLE:
        return a
    single = ir.FloatType()
    return type(a)(a.builder, ir.VectorType(single, a.lanes) if a.lanes else single)


def _as_wide(a: Arithmetic, x):
    return x if a.format is SINGLE else a.builder.fpext(x, a.type)


def _centred(a: Arithmetic, word):
    """word + 1/2"""
    return a.add(a.builder.uitofp(word, a.type), a.number(0.5))


def _parts(a: Arithmetic, x):
    """(n, f) with x = 2^n (1 + f) and 1 + f from sqrt(1/2) to sqrt(2); n an integer, f exact. x is normal."""
    b, least = a.builder, a.integer(SINGLE.sqrt_half_bits)
    above = b.sub(b.bitcast(x, a.integers), least)
    mantissa = b.and_(above, a.integer((1 << SINGLE.mantissa_bits) - 1))
    m = b.bitcast(b.add(mantissa, least), a.type)
    return b.ashr(above, a.integer(SINGLE.mantissa_bits)), a.sub(m, a.number(1))


def _log_of_parts(a: Arithmetic, n, f):
    """n ln 2 + log(1 + f)"""
    rest = a.mul(a.mul(f, f), a.polynomial(f, _LOG_TERMS))
    return a.add(a.fma(a.builder.sitofp(n, a.type), a.number(SINGLE.ln2), f), rest)


def gumbel(a: Arithmetic, word):
    """Gumbel noise from a word, in the format of `a`: from -3.13 to 22.87, within 2^-22 max(1, its magnitude)."""
    single = _as_single(a)
    b, half_words = single.builder, single.integer(32)
    n, f = _parts(single, _centred(single, b.not_(word)))
    n = b.sub(n, half_words)
    # Where 1 - v needs no power of two, f is -v itself: small v keep all their digits.
    v = single.mul(_centred(single, word), single.number(2.0**-32))
    f = single.select(b.icmp_signed("==", n, single.integer(0)), single.negative(v), f)
    exponential = single.negative(_log_of_parts(single, n, f))
    return _as_wide(a, single.negative(_log_of_parts(single, *_parts(single, exponential))))


# ---------------------------------------------------------------- scores


def score_bound(a: Arithmetic, x, word, unit, noise):
    """At least the first number of `score`, and NaN for NaN. Where it matters, at most 0.06 noise more.

    -log v instead of the noise, by a logarithm to base 2 that runs straight from one power of two to the next; k
    instead of k + 1/2.
    """
    single = _as_single(a)
    b = single.builder
    bits = b.bitcast(b.uitofp(word, single.type), single.integers)
    steps = b.sitofp(b.sub(single.integer((127 + 32) << SINGLE.mantissa_bits), bits), single.type)
    per_step = a.mul(noise, a.number(2.0**-SINGLE.mantissa_bits * math.log(2) * _SLACK))
    return a.fma(per_step, _as_wide(a, steps), a.mul(x, unit))


def score(a: Arithmetic, x, word, unit, noise):
    """(high, low): x unit + noise g as an exact sum of two numbers, so that noise is told apart beside large logits.

    +inf for NaN and +inf, which make no distribution; low is 0 wherever high is infinite.
    """
    scaled = a.mul(x, unit)
    high, low = two_sum(a, scaled, a.mul(noise, gumbel(a, word)))
    low = a.select(a.is_infinite(x), a.number(0), low)
    is_nan = a.is_nan(x)
    return a.select(is_nan, a.number(math.inf), high), a.select(is_nan, a.number(0), low)


# ---------------------------------------------------------------- rows with numbers of their own


def _exponent_bias(a: Arithmetic) -> int:
    return (1 << (a.format.integer.width - a.format.mantissa_bits - 2)) - 1


def noise_scales(a: Arithmetic, temperature):
    """(unit, noise) of a temperature, as operands.noise_scales has them: the exponent of the unit is that of the
    temperature, rounded up, taken from 0 and no less than the least normal number's.
    """
    f, b = a.format, a.builder
    bits = b.add(b.bitcast(temperature, a.integers), a.integer((1 << f.mantissa_bits) - 1))
    steps = b.sub(b.lshr(bits, a.integer(f.mantissa_bits)), a.integer(_exponent_bias(a)))
    zero, most = a.integer(0), a.integer(_exponent_bias(a) - 1)
    steps = b.select(b.icmp_signed("<", steps, zero), zero, steps)
    steps = b.select(b.icmp_signed("<", most, steps), most, steps)
    unit = a.power_of_two(b.sub(zero, steps))
    return unit, a.mul(temperature, unit)


def scale_of(a: Arithmetic, numerator, temperature):
    """(high, low) with high + low = numerator / temperature, as operands.scale_of, for numerators of 1 and 2; finite:
    temperatures below the least normal number count as that.
    """
    temperature = a.larger(a.number(2.0 ** (1 - _exponent_bias(a))), temperature)
    high = a.div(numerator, temperature)
    return high, a.div(a.fma(a.negative(high), temperature, numerator), temperature)


def distance_of_ratio(a: Arithmetic, min_p, temperature):
    """temperature log(min_p): so far from the maximum on a probability is less than min_p times the largest."""
    log, _ = log1p(a, a.sub(a.div(a.number(1), min_p), a.number(1)), a.number(0))
    is_none = a.less(min_p, a.number(2.0 ** (1 - _exponent_bias(a))))
    return a.select(is_none, a.number(-math.inf), a.mul(a.negative(log), temperature))
