"""IEEE arithmetic in LLVM instructions: the constants of two formats, and the operations that formulas are made of.

An `Arithmetic` stands for one number per thread (CUDA) or per vector lane (CPU). All operations are IEEE additions,
multiplications and fused multiply-adds, rounded to nearest, in a fixed order: the same inputs give the same bits
wherever they are evaluated, and no compiler may contract them.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from llvmlite import ir


class Format(NamedTuple):
    """Constants of one IEEE format."""

    integer: ir.IntType
    mantissa_bits: int
    magic: float  # 1.5 * 2^mantissa_bits: adding it leaves round(x) in the low bits
    exp_low: float  # exp() of anything smaller rounds to 0
    exp_high: float  # exp() of anything larger overflows
    ln2_high: float  # leading bits of ln 2: n * ln2_high is exact for every exponent n
    ln2_low: float
    exp_terms: tuple[float, ...]  # q in exp(r) = 1 + r + r^2 q(r) for |r| <= ln(2) / 2, minimax
    atanh_terms: tuple[float, ...]  # R in 2 atanh(t) = 2 t + t^3 R(t^2), Taylor, for t^2 <= 0.0295
    sqrt_half_bits: int
    ln2: float  # ln 2 in this format: n * ln2 cancels the leading bits of what it is taken from exactly
    ln2_rest: float
    tanh_limit: float
    tanh_terms: tuple[float, ...]  # q in tanh(u) = u + u^3 q(u^2) for |u| < tanh_limit
    excess_terms: tuple[float, ...]  # q in d + expm1(-d) = d^2 q(d) for |d| <= 1, interpolated likewise

    @property
    def bias(self) -> int:
        """Of exponents: that of 2^n is stored as n + bias."""
        return (1 << (self.integer.width - self.mantissa_bits - 2)) - 1

    @property
    def exp_lift(self) -> int:
        """exp_from works 2^lift higher, so that only its last product can underflow."""
        return self.mantissa_bits + 1

    @property
    def exp_depth(self) -> int:
        """exp_from of 2^-depth and less is 0. Down there 2^(n + lift) is 0 itself: nothing underflows on the way, which
        would take CPUs fifty cycles for every vector with a logit that is masked.
        """
        return self.bias + self.exp_lift


def _taylor_of_atanh(n_terms: int) -> tuple[float, ...]:
    return tuple(2.0 / (2 * k + 3) for k in range(n_terms))


SINGLE = Format(
    integer=ir.IntType(32),
    mantissa_bits=23,
    magic=1.5 * 2.0**23,
    exp_low=-105.0,
    exp_high=88.73,
    ln2_high=0.693145751953125,
    ln2_low=1.428606820309417e-06,
    # Relative error of exp 3.1e-9: 0.05 ulp.
    exp_terms=(
        0.49999993411583143,
        0.1666652009884532,
        0.04166839439518766,
        0.008368781244270684,
        0.0013814458253665167,
    ),
    atanh_terms=_taylor_of_atanh(5),
    sqrt_half_bits=0x3F3504F3,
    ln2=0.693147182464599609375,
    ln2_rest=-1.904654299957768e-09,
    # Minimax, relative error 5.5e-8.
    tanh_limit=1.0,
    tanh_terms=(
        -0.3333298677849443,
        0.13326408862240174,
        -0.053498707057731354,
        0.02035975823560698,
        -0.00625933828703225,
        0.0010582642893443297,
    ),
    # Relative error 1.8e-8.
    excess_terms=(
        0.49999999781421683,
        -0.16666666646842135,
        0.04166673659523746,
        -0.00833333967591706,
        0.0013885396911807102,
        -0.00019838101968683888,
        2.535851224463976e-05,
        -2.8062802582276946e-06,
    ),
)
DOUBLE = Format(
    integer=ir.IntType(64),
    mantissa_bits=52,
    magic=1.5 * 2.0**52,
    exp_low=-746.0,
    exp_high=709.79,
    ln2_high=6.93147180369123816490e-01,
    ln2_low=1.90821492927058770002e-10,
    # Relative error of exp 3.7e-18: 0.03 ulp.
    exp_terms=(
        0.5000000000000011,
        0.1666666666666641,
        0.04166666666652916,
        0.008333333333495624,
        0.0013888888943929063,
        0.00019841269504790245,
        2.4801492756586997e-05,
        2.7557587304149152e-06,
        2.7630380694573526e-07,
        2.4999980969002898e-08,
    ),
    atanh_terms=_taylor_of_atanh(11),
    sqrt_half_bits=0x3FE6A09E667F3BCD,
    ln2=0.693147180559945286226764,
    ln2_rest=2.319046813846299558e-17,
    # Interpolated at Chebyshev's points, relative error 6.5e-20.
    tanh_limit=0.55,
    tanh_terms=(
        -0.333333333333333333,
        0.133333333333333121,
        -0.0539682539682203745,
        0.0218694885340739077,
        -0.00886323546314680007,
        0.00359212676996263471,
        -0.00145581909715135121,
        0.0005899052969492733,
        -0.000238472724801525213,
        0.0000945513305292485787,
        -0.0000337208011204631624,
        7.87427434534441824e-6,
    ),
    # Relative error 3.2e-17.
    excess_terms=(
        0.5,
        -0.16666666666666666,
        0.04166666666666609,
        -0.008333333333333299,
        0.0013888888888981404,
        -0.00019841269841324198,
        2.4801587246096818e-05,
        -2.7557319191381816e-06,
        2.755733506893373e-07,
        -2.5052117695907823e-08,
        2.0874435575864273e-09,
        -1.6057679623801638e-10,
        1.1639194124150522e-11,
        -7.746178593018827e-13,
    ),
)


class Arithmetic:
    """IEEE operations on values of one LLVM type: float, double, or a vector of either.

    LLVM keeps plain fadd and fmul apart unless it is told otherwise, which the CPU compiler is not; a target whose
    compiler contracts them overrides the operations.
    """

    def __init__(self, builder: ir.IRBuilder, type: ir.Type):
        self.builder = builder
        self.type = type
        self.lanes = type.count if isinstance(type, ir.VectorType) else None
        element = type.element if self.lanes else type
        self.format = DOUBLE if isinstance(element, ir.DoubleType) else SINGLE
        self.integers = ir.VectorType(self.format.integer, self.lanes) if self.lanes else self.format.integer

    def add(self, x, y):
        return self.builder.fadd(x, y)

    def sub(self, x, y):
        return self.builder.fsub(x, y)

    def mul(self, x, y):
        return self.builder.fmul(x, y)

    def div(self, x, y):
        return self.builder.fdiv(x, y)

    def fma(self, x, y, z):
        """x * y + z, rounded once."""
        suffix = "f64" if self.format is DOUBLE else "f32"
        return self.call(f"llvm.fma.v{self.lanes}{suffix}" if self.lanes else f"llvm.fma.{suffix}", x, y, z)

    def splat(self, scalar):
        """One number in every lane."""
        first = self.builder.insert_element(
            ir.Constant(self.type, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0)
        )
        everywhere = ir.Constant(ir.VectorType(ir.IntType(32), self.lanes), None)
        return self.builder.shuffle_vector(first, first, everywhere)

    def call(self, name, *arguments):
        function_type = ir.FunctionType(self.type, [argument.type for argument in arguments])
        module = self.builder.module
        function = module.globals.get(name) or ir.Function(module, function_type, name)
        return self.builder.call(function, arguments)

    def number(self, value: float):
        return self._constant(self.type, float(np.float32(value)) if self.format is SINGLE else float(value))

    def integer(self, value: int):
        return self._constant(self.integers, value)

    def kept(self, value: float):
        """A number for a loop, which should stay in a register there; a target knows how to see to that."""
        return self.number(value)

    def _constant(self, type, value):
        if self.lanes:
            return ir.Constant(type, [ir.Constant(type.element, value)] * self.lanes)
        return ir.Constant(type, value)

    def negative(self, x):
        return self.builder.fsub(self.number(-0.0), x)

    def magnitude(self, x):
        bits = self.builder.bitcast(x, self.integers)
        sign = self.integer((1 << (self.format.integer.width - 1)) - 1)
        return self.builder.bitcast(self.builder.and_(bits, sign), self.type)

    def equal(self, x, y):
        return self.builder.fcmp_ordered("==", x, y)

    def differs(self, x, y):
        return self.builder.fcmp_unordered("!=", x, y)

    def less(self, x, y):
        return self.builder.fcmp_ordered("<", x, y)

    def is_nan(self, x):
        return self.builder.fcmp_unordered("uno", x, x)

    def is_infinite(self, x):
        return self.equal(self.magnitude(x), self.number(math.inf))

    def select(self, condition, x, y):
        return self.builder.select(condition, x, y)

    def maximum(self, x, y):
        """The larger one; a NaN in y loses against x."""
        return self.select(self.less(x, y), y, x)

    def larger(self, x, y):
        """The larger one; a NaN in y wins."""
        return self.select(self.builder.fcmp_ordered(">", x, y), x, y)

    def minimum(self, x, y):
        """The smaller one; y if either is a NaN."""
        return self.select(self.less(x, y), x, y)

    def polynomial(self, x, coefficients, number: Callable | None = None):
        """Horner's rule; the coefficient of the lowest power comes first. number: `kept` in a loop."""
        number = number or self.number
        result = number(coefficients[-1])
        for coefficient in coefficients[-2::-1]:
            result = self.fma(result, x, number(coefficient))
        return result

    def power_of_two(self, exponent):
        """2^exponent as a number; `exponent` is an integer in the normal range."""
        bias = self.integer(self.format.bias)
        shift = self.integer(self.format.mantissa_bits)
        return self.builder.bitcast(self.builder.shl(self.builder.add(exponent, bias), shift), self.type)
