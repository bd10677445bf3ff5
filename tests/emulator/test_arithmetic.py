"""The emulator's instructions against exact rational arithmetic and against NumPy."""

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from tests.emulator.handwritten import emulate
from tests.emulator.rounding import from_bfloat16, to_bfloat16

f16, f32, f64 = np.float16, np.float32, np.float64
i8, i32, i64, u32, u64 = np.int8, np.int32, np.int64, np.uint32, np.uint64
bf16 = ml_dtypes.bfloat16


@pytest.fixture(autouse=True)
def quiet_numpy():
    with np.errstate(all="ignore"):
        yield


def special_floats(count=1500, seed=5):
    """Random bit patterns, ordinary numbers, and the values at which conversions and roundings turn."""
    random = np.random.default_rng(seed)
    turns = [0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 65504, 65519, 65520, 3.3895e38, 0.5, 1.5, 2.5, -0.5, 1e30]
    return np.concatenate(
        [
            random.integers(0, 2**32, count, dtype=u32).view(f32),
            random.standard_normal(count).astype(f32),
            (random.standard_normal(count) * 70000).astype(f32),
            np.array([*turns, 2**31, -(2.0**31)], f32),
        ]
    )


def same(got, expected):
    """Equal bits, or both NaN."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.dtype == expected.dtype and got.shape == expected.shape
    equal = got.view(f"u{got.itemsize}") == expected.view(f"u{expected.itemsize}")
    if got.dtype.kind == "f":
        equal |= np.isnan(got) & np.isnan(expected)
    assert equal.all(), (np.flatnonzero(~equal)[:5], got[~equal][:5], expected[~equal][:5])


def flushed(x):
    return np.where(np.abs(x) < f32(2.0**-126), np.copysign(f32(0), x), x)


def rounded(exact, dtype, mode="rn"):
    """A Fraction rounded to a float dtype, by searching among its neighbours."""
    near = dtype(float(exact))
    if not np.isfinite(near):
        return near
    around = [np.nextafter(near, dtype(-np.inf)), near, np.nextafter(near, dtype(np.inf))]
    around = [x for x in around if np.isfinite(x)]
    if mode == "rm":
        around = [x for x in around if Fraction(float(x)) <= exact]
    if mode == "rp":
        around = [x for x in around if Fraction(float(x)) >= exact]
    if mode == "rz":
        around = [x for x in around if abs(Fraction(float(x))) <= abs(exact)]
    even = f"u{np.dtype(dtype).itemsize}"
    return min(around, key=lambda x: (abs(Fraction(float(x)) - exact), int(x.view(even)) & 1))


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("dtype, suffix", [(f32, "f32"), (f64, "f64")])
def test_arithmetic_is_rounded_exactly(dtype, suffix, mode):
    random = np.random.default_rng(10)
    count = 200
    a, b = random.standard_normal((2, count)).astype(dtype)
    c = (-(a * b) * (1 + random.integers(-2, 3, count) * np.finfo(dtype).eps)).astype(dtype)  # cancellation
    c[::3] = random.standard_normal(len(c[::3])).astype(dtype) * dtype(2.0**-40)
    formulas = {
        f"fma.{mode}.{suffix} {{d}}, {{a}}, {{b}}, {{c}};": lambda x, y, z: x * y + z,
        f"add.{mode}.{suffix} {{d}}, {{a}}, {{c}};": lambda x, y, z: x + z,
        f"sub.{mode}.{suffix} {{d}}, {{a}}, {{c}};": lambda x, y, z: x - z,
        f"mul.{mode}.{suffix} {{d}}, {{a}}, {{b}};": lambda x, y, z: x * y,
        f"div.{mode}.{suffix} {{d}}, {{a}}, {{b}};": lambda x, y, z: x / y,
    }
    for text, formula in formulas.items():
        exact = [formula(*(Fraction(float(v)) for v in row)) for row in zip(a, b, c, strict=True)]
        got = emulate(text, (a, b, c), dtype)
        expected = np.array([rounded(q, dtype, mode) for q in exact], dtype)
        assert (got == expected).all(), text


def test_fma_of_extreme_and_special_values():
    for dtype, suffix in ((f32, "f32"), (f64, "f64")):
        tiny, huge = np.finfo(dtype).smallest_subnormal, np.finfo(dtype).max
        last_step = Fraction(float(huge)) - Fraction(float(np.nextafter(huge, dtype(0))))
        overflow = Fraction(float(huge)) + last_step / 2
        values = np.array([0, -0.0, 1, -1, tiny, -tiny, huge, -huge, np.inf, -np.inf, np.nan, 1 + 2.0**-20], dtype)
        a, b, c = (x.reshape(-1) for x in np.meshgrid(values, values, values))
        got = emulate(f"fma.rn.{suffix} {{d}}, {{a}}, {{b}}, {{c}};", (a, b, c), dtype)
        for x, y, z, r in zip(a, b, c, got, strict=True):
            if not (np.isfinite(x) and np.isfinite(y)):
                plain = float(x) * float(y) + float(z)
                assert r == plain or (np.isnan(r) and np.isnan(plain))
            elif not np.isfinite(z):
                assert r == z or (np.isnan(r) and np.isnan(z))
            else:
                exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
                assert np.isinf(r) if abs(exact) >= overflow else r == rounded(exact, dtype)


def test_float_semantics():
    x = special_floats(300)
    y = np.roll(x, 7)
    nan = np.isnan(x) | np.isnan(y)

    def run(text):
        return emulate(text, (x, y), f32)

    same(run("add.f32 {d}, {a}, {b};"), x + y)
    same(run("add.ftz.f32 {d}, {a}, {b};"), flushed(flushed(x) + flushed(y)))
    same(run("div.rn.f32 {d}, {a}, {b};"), x / y)
    same(run("sqrt.rn.ftz.f32 {d}, {a};"), np.sqrt(flushed(x)))
    same(run("max.f32 {d}, {a}, {b};"), np.fmax(x, y))
    same(run("min.NaN.f32 {d}, {a}, {b};"), np.minimum(x, y))
    assert np.isnan(run("max.NaN.f32 {d}, {a}, {b};")[nan]).all()
    total = run("add.f32 {d}, {a}, {b};")
    assert (total.view(u32)[np.isnan(total)] == 0x7FFFFFFF).all()
    same(run("neg.f32 {d}, {a};"), -x)
    same(run("abs.ftz.f32 {d}, {a};"), flushed(np.abs(x)))
    same(run("add.sat.f32 {d}, {a}, {b};"), np.where(nan, 0, np.clip(np.nan_to_num(x + y), 0, 1)).astype(f32))
    e = run("ex2.approx.ftz.f32 {d}, {a};")
    same(e, flushed(np.exp2(flushed(x).astype(f64)).astype(f32)))
    same(run("lg2.approx.f32 {d}, {a};"), np.log2(x.astype(f64)).astype(f32))
    zeros, others = np.array([0.0, -0.0, -0.0, 0.0], f32), np.array([-0.0, 0.0, -0.0, 0.0], f32)
    same(emulate("max.f32 {d}, {a}, {b};", (zeros, others), f32), np.array([0, 0, -0.0, 0], f32))
    same(emulate("min.f32 {d}, {a}, {b};", (zeros, others), f32), np.array([-0.0, -0.0, -0.0, 0], f32))


def test_signs_of_zero():
    """As on an H100: an exact 0 is +0, rounded down -0, but for the sum of two zeros of one sign."""
    a, b = np.array([0.0, 0.0, -0.0, -0.0, 3.0], f32), np.array([0.0, -0.0, 0.0, -0.0, -3.0], f32)
    for mode, different in (("rn", 0.0), ("rz", 0.0), ("rm", -0.0), ("rp", 0.0)):
        expected = np.array([0.0, different, different, -0.0, different], f32)
        same(emulate(f"add.{mode}.f32 {{d}}, {{a}}, {{b}};", (a, b), f32), expected)
        same(emulate(f"sub.{mode}.f32 {{d}}, {{a}}, {{b}};", (a, -b), f32), expected)
        same(emulate(f"fma.{mode}.f32 {{d}}, {{a}}, 0f3F800000, {{b}};", (a, b), f32), expected)


def test_nan_of_conversions():
    """As on an H100: what fits of the payload goes from float64 and bfloat16 to float32, nothing from float16."""
    x = np.array([0x7FF92C0B321CE233, 0xFFF8000020000000], u64)
    for mode in ("rn", "rz", "rm", "rp"):
        got = emulate(f"cvt.{mode}.f32.f64 {{d}}, {{a}};", (x.view(f64),), f32)
        assert list(got.view(u32)) == [0x7FC96059, 0xFFC00001]
    halves = np.array([0x7F81, 0xFFC0], np.uint16)
    assert list(emulate("cvt.f32.bf16 {d}, {a};", (halves,), f32).view(u32)) == [0x7F810000, 0xFFC00000]
    assert list(emulate("cvt.f32.f16 {d}, {a};", (halves,), f32).view(u32)) == [0x7FFFFFFF, 0x7FFFFFFF]


def test_comparisons():
    x = special_floats(200)
    y = np.where(np.arange(len(x)) % 3 == 0, x, np.roll(x, 7))
    nan = np.isnan(x) | np.isnan(y)
    expected = {
        "eq": x == y,
        "ne": (x < y) | (x > y),
        "lt": x < y,
        "leu": ~(x > y),
        "equ": ~((x < y) | (x > y)),
        "neu": x != y,
        "geu": ~(x < y),
        "num": ~nan,
        "nan": nan,
    }
    for name, result in expected.items():
        text = f"setp.{name}.f32 %p1, {{a}}, {{b}}; selp.f32 {{d}}, 0f3F800000, 0f00000000, %p1;"
        same(emulate(text, (x, y), f32), result.astype(f32))
    text = (
        "setp.gt.f32 %p2, {a}, 0f00000000; setp.lt.and.f32 %p1|%p3, {a}, {b}, %p2;"
        "selp.f32 {d}, 0f3F800000, 0f40000000, %p1; @%p3 mov.f32 {d}, 0f40400000;"
    )
    both = np.where((x < y) & (x > 0), 1, np.where(~(x < y) & (x > 0), 3, 2)).astype(f32)
    same(emulate(text, (x, y), f32), both)
    n = np.random.default_rng(1).integers(-3, 3, 300).astype(i32)
    for name, result in {"lt.s32": n < np.roll(n, 1), "lt.u32": n.view(u32) < np.roll(n, 1).view(u32)}.items():
        text = f"setp.{name} %p1, {{a}}, {{b}}; selp.b32 {{d}}, 1, 0, %p1;"
        same(emulate(text, (n, np.roll(n, 1)), i32), result.astype(i32))


def test_conversions_to_integers():
    x = special_floats()
    for mode, function in {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}.items():
        whole = np.nan_to_num(function(x.astype(f64)), nan=0, posinf=1e300, neginf=-1e300)
        got = emulate(f"cvt.{mode}.s32.f32 {{d}}, {{a}};", (x,), i32)
        same(got, np.clip(whole, -(2**31), 2**31 - 1).astype(i32))
        same(emulate(f"cvt.{mode}.f32.f32 {{d}}, {{a}};", (x,), f32), function(x))
    got = emulate("cvt.rzi.u8.f32 {d}, {a};", (x,), u32)
    same(got, np.clip(np.nan_to_num(np.trunc(x), nan=0, posinf=1e30, neginf=-1), 0, 255).astype(u32))
    same(emulate("cvt.sat.f32.f32 {d}, {a};", (x,), f32), np.abs(np.nan_to_num(np.clip(x, 0, 1))))


def test_conversions_from_integers_and_float64():
    n = np.random.default_rng(9).integers(-(2**63), 2**63, 300)
    same(emulate("cvt.rn.f32.s64 {d}, {a};", (n,), f32), n.astype(f32))
    same(emulate("cvt.s16.s64 %r4, {a}; cvt.s32.s8 {d}, %r4;", (n,), i32), n.astype(i8).astype(i32))
    same(emulate("cvt.sat.s8.s64 {d}, {a};", (n >> 55,), i32), np.clip(n >> 55, -128, 127).astype(i32))
    random = np.random.default_rng(7)
    spread = random.standard_normal(600) * 2.0 ** random.integers(-160, 140, 600)
    x = np.concatenate([special_floats(300).astype(f64), spread])
    number = ~np.isnan(x)
    same(emulate("cvt.rn.f32.f64 {d}, {a};", (x,), f32), x.astype(f32))
    assert (emulate("cvt.rm.f32.f64 {d}, {a};", (x,), f32).astype(f64) <= x)[number].all()
    assert (emulate("cvt.rp.f32.f64 {d}, {a};", (x,), f32).astype(f64) >= x)[number].all()
    assert (np.abs(emulate("cvt.rz.f32.f64 {d}, {a};", (x,), f32).astype(f64)) <= np.abs(x))[number].all()


def test_conversions_of_halves():
    x = special_floats()
    number = ~np.isnan(x)
    same(emulate("cvt.rn.f16.f32 {d}, {a};", (x,), f16), x.astype(f16))
    expected = x.astype(bf16).view(np.uint16)
    got = emulate("cvt.rn.bf16.f32 {d}, {a};", (x,), np.uint16)
    assert (got[number] == expected[number]).all() and (got[~number] == 0x7FFF).all()
    got = emulate("mov.f32 %f1, 0f3F800000; cvt.rn.bf16x2.f32 {d}, %f1, {a};", (x,), u32)
    assert (got >> 16 == 0x3F80).all() and ((got & 0xFFFF)[number] == expected[number]).all()
    got = emulate("mov.f32 %f1, 0f3F800000; cvt.rn.f16x2.f32 {d}, {a}, %f1;", (x,), u32)
    assert (got & 0xFFFF == 0x3C00).all()
    same((got >> 16).astype(np.uint16).view(f16), x.astype(f16))
    bits = np.arange(65536, dtype=np.uint16)
    same(emulate("cvt.f32.f16 {d}, {a};", (bits.view(f16),), f32), bits.view(f16).astype(f32))
    same(emulate("cvt.f32.bf16 {d}, {a};", (bits,), f32), bits.view(bf16).astype(f32))


def test_bfloat16_helpers_agree_with_ml_dtypes():
    x = special_floats()
    number = ~np.isnan(x)
    assert (to_bfloat16(x)[number] == x.astype(bf16).view(np.uint16)[number]).all()
    same(from_bfloat16(np.arange(65536, dtype=np.uint16)), np.arange(65536, dtype=np.uint16).view(bf16).astype(f32))
    midpoint = f64(1 + 2.0**-8) + 2.0**-40  # a float64 that float32 would take for a tie
    assert to_bfloat16(np.array([midpoint])) == 0x3F81


def test_arithmetic_of_halves():
    pairs = np.random.default_rng(6).integers(0, 2**32, 1500, dtype=u32)
    text = (
        "mov.b32 {{%h0, %h1}}, {a}; mul.f16 %h2, %h0, %h1; add.f16x2 %r2, {a}, {a}; max.f16 %h4, %h0, %h1;"
        "mov.b32 {{%h5, %h6}}, %r2; mov.b64 {d}, {{%h2, %h4, %h5, %h6}};"
    )
    got = emulate(text, (pairs,), u64).view(f16).reshape(-1, 4)
    u, v = pairs.view(f16).reshape(-1, 2).T
    same(got[:, 0].copy(), (u.astype(f64) * v).astype(f16))
    same(got[:, 1].copy(), np.fmax(u, v))
    same(got[:, 2].copy(), (u.astype(f64) * 2).astype(f16))
    got = emulate("fma.rn.bf16x2 {d}, {a}, {a}, {a};", (pairs,), u32).view(bf16).astype(f64)
    for x, r in zip(pairs.view(bf16).astype(f64), got, strict=True):
        exact = x * x + x
        if not np.isfinite(exact) or not 2.0**-126 < abs(exact) < 2.0**127:
            continue
        exact, ulp = Fraction(x) * Fraction(x) + Fraction(x), Fraction(2) ** (math.frexp(float(r))[1] - 8)
        assert abs(Fraction(float(r)) - exact) <= ulp / 2
    same(
        emulate("tanh.approx.f16 %h2, {a}; neg.f16 {d}, %h2;", (u.copy(),), f16),
        -np.tanh(u.astype(f64)).astype(f16),
    )


def test_comparisons_of_pairs():
    """A mask for each half; the larger of both halves, where a NaN loses."""
    words = np.random.default_rng(7).integers(0, 2**32, (2, 1500), dtype=u32)
    words[1, ::3] = words[0, ::3]
    words[1, 1::5] = words[0, 1::5] ^ 0x7F800000  # other exponents, or NaN, in one half
    for name, dtype in (("f16x2", f16), ("bf16x2", bf16)):
        x, y = (word.view(dtype).astype(f32) for word in words)
        got = emulate(f"set.gt.u32.{name} {{d}}, {{a}}, {{b}};", tuple(words), u32)
        same(got.view(np.uint16), np.where(x > y, 0xFFFF, 0).astype(np.uint16))
        got = emulate(f"max.{name} {{d}}, {{a}}, {{b}};", tuple(words), u32).view(dtype).astype(f32)
        same(got, np.fmax(x, y))


def _words(values, dtype=u32):
    mask = 2 ** (8 * np.dtype(dtype).itemsize) - 1
    return np.array([int(value) & mask for value in values], dtype)


def _signed(value):
    return (value & 0xFFFFFFFF ^ 0x80000000) - 0x80000000


def test_integer_arithmetic():
    low, high = np.random.default_rng(11).integers(0, 2**32, (2, 300), dtype=u32)
    pairs = list(zip(map(int, low), map(int, high), strict=True))

    def check(text, function, dtype=u32):
        same(emulate(text, (low, high), dtype), _words([function(x, y) for x, y in pairs], dtype))

    check("mul.hi.s32 {d}, {a}, {b};", lambda x, y: _signed(x) * _signed(y) >> 32)
    check("mul.wide.u32 {d}, {a}, {b};", lambda x, y: x * y, u64)
    check("mad.wide.s32 {d}, {a}, {b}, 7;", lambda x, y: _signed(x) * _signed(y) + 7, u64)
    check("mad.lo.cc.u32 %r4, {a}, {b}, {a}; madc.hi.u32 {d}, {a}, {b}, 0;", lambda x, y: (x * y + x) >> 32)
    check("add.cc.u32 %r4, {a}, {b}; addc.u32 {d}, {a}, {a};", lambda x, y: 2 * x + ((x + y) >> 32))
    check("sub.cc.u32 %r4, {a}, {b}; subc.u32 {d}, {b}, {a};", lambda x, y: y - x - (x < y))
    check("div.u32 {d}, {a}, {b};", lambda x, y: x // y)
    check("rem.s32 {d}, {a}, {b};", lambda x, y: int(math.fmod(_signed(x), _signed(y))))
    check("slct.s32.s32 {d}, {a}, {b}, {a};", lambda x, y: x if _signed(x) >= 0 else y)
    check("mov.b64 {d}, {{{b}, {a}}};", lambda x, y: x << 32 | y, u64)
    check("popc.b32 {d}, {a};", lambda x, y: x.bit_count())
    check("clz.b32 {d}, {a};", lambda x, y: 32 - x.bit_length())
    check("brev.b32 {d}, {a};", lambda x, y: int(f"{x:032b}"[::-1], 2))
    check("bfind.u32 {d}, {a};", lambda x, y: x.bit_length() - 1)
    check("bfind.shiftamt.u32 {d}, {a};", lambda x, y: 32 - x.bit_length() if x else -1)
    wide = np.random.default_rng(12).integers(-(2**63), 2**63, 300)
    other = np.roll(wide, 1)
    expected = [int(x) * int(y) >> 64 for x, y in zip(wide, other, strict=True)]
    same(emulate("mul.hi.s64 {d}, {a}, {b};", (wide, other), u64), _words(expected, u64))


def _bfe_signed(x, start, length):
    if length == 0:
        return 0
    sign = x >> min(start + length - 1, 31) & 1
    bits = [(x >> (start + k)) & 1 if k < length and start + k <= 31 else sign for k in range(32)]
    return sum(bit << k for k, bit in enumerate(bits))


def test_bit_fields_and_shifts():
    low, high = np.random.default_rng(11).integers(0, 2**32, (2, 200), dtype=u32)
    pairs = list(zip(map(int, low), map(int, high), strict=True))

    def check(text, function, dtype=u32):
        same(emulate(text, (low, high), dtype), _words([function(x, y) for x, y in pairs], dtype))

    check("prmt.b32 {d}, {a}, {b}, 0x5432;", lambda x, y: (y << 32 | x) >> 16)
    chosen = "mov.u32 %r4, 0x910A; prmt.b32 {d}, {a}, {b}, %r4;"  # 9 and A spread the sign of bytes 1 and 2
    signs = ((lambda x: 0xFF * (x >> 15 & 1)), (lambda x: 0xFF * (x >> 23 & 1)))
    check(chosen, lambda x, y: signs[0](x) << 24 | (x >> 8 & 255) << 16 | (x & 255) << 8 | signs[1](x))
    check("lop3.b32 {d}, {a}, {b}, 0xff00ff00, 0xe8;", lambda x, y: x & y | x & 0xFF00FF00 | y & 0xFF00FF00)
    for start, length in [(0, 0), (0, 7), (5, 1), (5, 32), (31, 1), (31, 7), (40, 7), (5, 60)]:
        mask = ((1 << length) - 1) << start & 0xFFFFFFFF
        field = f"{start}, {length}"
        check(f"bfe.u32 {{d}}, {{a}}, {field};", lambda x, y, s=start, n=length: (x >> s) & ((1 << n) - 1))
        check(f"bfe.s32 {{d}}, {{a}}, {field};", lambda x, y, s=start, n=length: _bfe_signed(x, s, n))
        check(f"bfi.b32 {{d}}, {{a}}, {{b}}, {field};", lambda x, y, m=mask, s=start: y & ~m | (x << s) & m)
    for amount in (0, 1, 31, 32, 40):
        check(f"shf.l.wrap.b32 {{d}}, {{a}}, {{b}}, {amount};", lambda x, y, n=amount: (y << 32 | x) << (n & 31) >> 32)
        check(f"shf.r.clamp.b32 {{d}}, {{a}}, {{b}}, {amount};", lambda x, y, n=amount: (y << 32 | x) >> min(n, 32))
        check(f"mov.u32 %r4, {amount}; shl.b32 {{d}}, {{a}}, %r4;", lambda x, y, n=amount: x << n)
        check(f"mov.u32 %r4, {amount}; shr.s32 {{d}}, {{a}}, %r4;", lambda x, y, n=amount: _signed(x) >> n)


def test_adversarial_approximations_stay_within_their_bound():
    x = np.linspace(-20, 20, 256).astype(f32)
    x[0], x[7] = 0, x[9]
    text = "ex2.approx.ftz.f32 {d}, {a};"
    exact = emulate(text, (x,), f32)
    moved = emulate(text, (x,), f32, approx="adversarial", approx_seed=3)
    again = emulate(text, (x,), f32, approx="adversarial", approx_seed=3)
    other = emulate(text, (x,), f32, approx="adversarial", approx_seed=4)
    step = np.abs(moved.view(i32).astype(i64) - exact.view(i32))
    assert (moved == again).all() and (moved != other).any() and moved[7] == moved[9] and moved[0] == 1
    assert step.max() == 2 and (step > 0).mean() > 0.5
    x = np.linspace(0.1, 20, 256).astype(f32)
    steps = emulate("rcp.approx.ftz.f32 {d}, {a};", (x,), f32, approx="adversarial").view(i32) - (1 / x).view(i32)
    assert np.abs(steps).max() == 1


def test_ordinary_arithmetic_ignores_the_adversary():
    x = special_floats(100)
    for text in ("fma.rn.f32 {d}, {a}, {a}, {a};", "div.rn.f32 {d}, {a}, {b};", "sqrt.rn.f32 {d}, {a};"):
        columns = (x, np.roll(x, 1))
        same(emulate(text, columns, f32), emulate(text, columns, f32, approx="adversarial"))
