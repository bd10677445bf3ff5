"""The emulator against a GPU: same PTX, same inputs, equal bits, but for approximate instructions (pytest -m gpu).

Results that approximate instructions take part in are held to what those are documented to be off by.

A wrong emulator would hide what it should find, so these are the first tests to run wherever there is a device.
"""

import ml_dtypes
import numpy as np
import pytest

import gpusoftmax
from gpusoftmax.kernels.cuda import driver
from tests.emulator import emulated_gpu
from tests.emulator.approximations import BOUND
from tests.emulator.handwritten import emulate, image, instruction_image, launch, packed

pytestmark = pytest.mark.gpu

f16, f32, f64 = np.float16, np.float32, np.float64
i32, i64, u16, u32, u64 = np.int32, np.int64, np.uint16, np.uint32, np.uint64


@pytest.fixture(scope="module")
def cupy():
    import cupy

    return cupy


@pytest.fixture(scope="module")
def arch():
    return driver.device(0).arch


def run_on_gpu(cupy, kernel_image, x, out_bytes, threads, blocks=1, **options):
    """What a kernel writes to y, as bytes."""
    stream = cupy.cuda.Stream()
    with stream:
        source, result = cupy.asarray(x), cupy.zeros(max(out_bytes, 1), np.uint8)
        launch(kernel_image, source, result, threads=threads, blocks=blocks, stream=stream.ptr, **options)
        return result.get()[:out_bytes]


# ---------------------------------------------------------------- one instruction at a time


def values(dtype, seed, count=4000):
    """Bit patterns of every kind, ordinary numbers, and the values at which roundings and conversions turn."""
    dtype, random = np.dtype(dtype), np.random.default_rng(seed)
    bits = np.frombuffer(random.bytes(count * dtype.itemsize), f"u{dtype.itemsize}").copy()
    if dtype.kind in "ui":
        return np.concatenate([bits, [0, 1, 2**31 - 1, 2**31, 2**32 - 1]]).astype(bits.dtype).view(dtype)
    turns = [0, -0.0, np.inf, -np.inf, np.nan, 1, -1, 0.5, 1.5, 2.5, -0.5, 65504, 65519, 65520, 2**31, -(2.0**31)]
    tiny = np.finfo(dtype).tiny
    subnormal = [tiny, -tiny, tiny / 2, tiny * 0.75, -tiny / 4]
    with np.errstate(over="ignore"):
        ordinary = random.standard_normal(count).astype(dtype)
        wide = (random.standard_normal(count) * 2.0 ** random.integers(-140, 120, count)).astype(dtype)
        return np.concatenate([bits.view(dtype), ordinary, wide, np.array([*turns, *subnormal], dtype)])


def inputs(dtypes, text):
    columns = [values(dtype, seed) for seed, dtype in enumerate(dtypes)]
    length = min(map(len, columns))
    columns = [column[:length] for column in columns]
    if len(columns) == 3 and columns[0].dtype.kind == "f":  # cancellation
        with np.errstate(all="ignore"):
            a, b, c = columns
            c[::5] = -(a[::5] * b[::5])
    if text.startswith(("div.s", "rem.u")):  # PTX leaves open what x / 0 is: an H100 has 0 % 0 = -1 in 64 bits, 0 in 32
        columns[1] = np.where(columns[1] == 0, columns[1].dtype.type(3), columns[1])
    return columns


HALVES = np.arange(65536, dtype=u16)
F32, F64 = (f32,), (f64,)
PAIRS = ("f16x2", "bf16x2")
EXACT = [
    *[
        (f"{op}.{mode}.f32 {{d}}, {{a}}, {{b}};", F32 * 2, f32)
        for op in ("add", "sub", "mul")
        for mode in ("rn", "rz", "rm")
    ],
    *[(f"{op}.rn.f64 {{d}}, {{a}}, {{b}};", F64 * 2, f64) for op in ("add", "sub", "mul", "div")],
    *[(f"fma.{mode}.f32 {{d}}, {{a}}, {{b}}, {{c}};", F32 * 3, f32) for mode in ("rn", "rz", "rm", "rp")],
    ("fma.rn.ftz.f32 {d}, {a}, {b}, {c};", F32 * 3, f32),
    ("fma.rn.f64 {d}, {a}, {b}, {c};", F64 * 3, f64),
    ("div.rn.f32 {d}, {a}, {b};", F32 * 2, f32),
    ("sqrt.rn.f32 {d}, {a};", F32, f32),
    ("rcp.rn.f32 {d}, {a};", F32, f32),
    ("add.ftz.f32 {d}, {a}, {b};", F32 * 2, f32),
    ("add.sat.f32 {d}, {a}, {b};", F32 * 2, f32),
    *[(f"{op}{nan}.f32 {{d}}, {{a}}, {{b}};", F32 * 2, f32) for op in ("min", "max") for nan in ("", ".NaN")],
    *[(f"{op}.f64 {{d}}, {{a}}, {{b}};", F64 * 2, f64) for op in ("min", "max")],
    *[(f"{op}.f32 {{d}}, {{a}};", F32, f32) for op in ("neg", "abs")],
    *[(f"cvt.{mode}.f32.f64 {{d}}, {{a}};", F64, f32) for mode in ("rn", "rz", "rm", "rp")],
    ("cvt.f64.f32 {d}, {a};", F32, f64),
    ("cvt.rn.f16.f32 {d}, {a};", F32, u16),
    ("cvt.rn.bf16.f32 {d}, {a};", F32, u16),
    ("cvt.rn.f16.f64 {d}, {a};", F64, u16),
    ("cvt.rn.bf16x2.f32 {d}, {a}, {b};", F32 * 2, u32),
    ("cvt.rn.f16x2.f32 {d}, {a}, {b};", F32 * 2, u32),
    *[(f"cvt.{mode}.s32.f32 {{d}}, {{a}};", F32, i32) for mode in ("rni", "rzi", "rmi", "rpi")],
    *[(f"cvt.{mode}.f32.f32 {{d}}, {{a}};", F32, f32) for mode in ("rni", "rzi", "rmi", "rpi")],
    ("cvt.rzi.u32.f32 {d}, {a};", F32, u32),
    ("cvt.rni.s64.f64 {d}, {a};", F64, i64),
    ("cvt.rzi.s32.f64 {d}, {a};", F64, i32),
    ("cvt.rn.f32.s32 {d}, {a};", (i32,), f32),
    ("cvt.rn.f32.u64 {d}, {a};", (u64,), f32),
    ("cvt.rn.f64.s64 {d}, {a};", (i64,), f64),
    ("cvt.sat.s8.s32 {d}, {a};", (i32,), i32),
    *[
        (f"setp.{op}.f32 %p1, {{a}}, {{b}}; selp.f32 {{d}}, {{a}}, {{b}}, %p1;", F32 * 2, f32)
        for op in ("eq", "ne", "lt", "ge", "equ", "neu", "ltu", "geu", "num", "nan")
    ],
    *[(f"{op}.{pair} {{d}}, {{a}}, {{b}};", (u32, u32), u32) for op in ("max", "set.gt.u32") for pair in PAIRS],
    ("setp.lt.f64 %p1, {a}, {b}; selp.f64 {d}, {a}, {b}, %p1;", F64 * 2, f64),
    ("setp.hi.u32 %p1, {a}, {b}; selp.b32 {d}, {a}, {b}, %p1;", (u32, u32), u32),
    ("shl.b32 {d}, {a}, {b};", (u32, u32), u32),
    ("and.b32 %r4, {b}, 63; shl.b32 {d}, {a}, %r4;", (u32, u32), u32),
    ("and.b32 %r4, {b}, 63; shr.s32 {d}, {a}, %r4;", (u32, u32), u32),
    ("shf.l.wrap.b32 {d}, {a}, {b}, {b};", (u32, u32), u32),
    ("shf.r.clamp.b32 {d}, {a}, {b}, 40;", (u32, u32), u32),
    ("shf.r.wrap.b32 {d}, {a}, {b}, {a};", (u32, u32), u32),
    ("lop3.b32 {d}, {a}, {b}, {c}, 0xe8;", (u32,) * 3, u32),
    ("prmt.b32 {d}, {a}, {b}, {c};", (u32,) * 3, u32),
    ("prmt.b32 {d}, {a}, {b}, 0x5432;", (u32,) * 2, u32),
    ("bfe.u32 {d}, {a}, {b}, {c};", (u32,) * 3, u32),
    ("bfe.s32 {d}, {a}, {b}, {c};", (u32,) * 3, u32),
    ("bfi.b32 {d}, {a}, {b}, {c}, 9;", (u32,) * 3, u32),
    ("popc.b32 {d}, {a};", (u32,), u32),
    ("clz.b32 {d}, {a};", (u32,), u32),
    ("brev.b32 {d}, {a};", (u32,), u32),
    ("mul.hi.s32 {d}, {a}, {b};", (u32,) * 2, u32),
    ("mul.hi.u64 {d}, {a}, {b};", (u64,) * 2, u64),
    ("mul.wide.s32 {d}, {a}, {b};", (u32,) * 2, u64),
    ("mad.lo.cc.u32 %r4, {a}, {b}, {c}; madc.hi.u32 {d}, {a}, {b}, 0;", (u32,) * 3, u32),
    ("div.s32 {d}, {a}, {b};", (i32, i32), i32),
    ("rem.u64 {d}, {a}, {b};", (u64, u64), u64),
]
EXACT_HALVES = [
    ("cvt.f32.f16 {d}, {a};", f32),
    ("cvt.f32.bf16 {d}, {a};", f32),
    ("cvt.f64.f16 {d}, {a};", f64),
    ("add.f16 {d}, {a}, {b};", u16),
    ("mul.f16 {d}, {a}, {b};", u16),
    ("fma.rn.f16 {d}, {a}, {b}, {b};", u16),
    ("fma.rn.bf16 {d}, {a}, {b}, {a};", u16),
    ("max.f16 {d}, {a}, {b};", u16),
    ("max.bf16 {d}, {a}, {b};", u16),
]


def is_nan(result, text):
    """Where a result, perhaps given as bits of half precision, is NaN."""
    if result.dtype.kind == "f":
        return np.isnan(result)
    halves = result.view(u16)
    if ".bf16" in text.split()[0]:
        return np.isnan(halves.view(ml_dtypes.bfloat16))
    return np.isnan(halves.view(f16)) if ".f16" in text.split()[0] else np.zeros(halves.shape, bool)


def both(cupy, arch, text, columns, output):
    """(emulator's results, GPU's results)"""
    kernel_image = instruction_image(text, [column.dtype for column in columns], output, len(columns[0]), arch)
    count, size = len(columns[0]), np.dtype(output).itemsize
    on_gpu = run_on_gpu(cupy, kernel_image, packed(*columns), count * size, threads=64, blocks=-(-count // 64))
    return emulate(text, columns, output, arch), on_gpu.view(output)


def assert_equal_bits(ours, theirs, columns, text):
    """Equal bits. NaN of float64 and halves, or of a sign changed, may carry any payload: the manual leaves it open."""
    nan = is_nan(ours, text) & is_nan(theirs, text)
    ours, theirs = ours.view(f"u{ours.itemsize}"), theirs.view(f"u{theirs.itemsize}")
    if nan.shape != ours.shape:  # two halves in a word
        ours, theirs = ours.view(u16), theirs.view(u16)
    is_open = ours.itemsize != 4 or text.startswith(("neg", "abs"))
    wrong = np.flatnonzero((ours != theirs) & ~(nan & is_open))
    if len(wrong):
        k = wrong[0]
        row = k * len(columns[0]) // len(ours)
        given = [hex(int(column.view(f"u{column.itemsize}")[row])) for column in columns]
        pytest.fail(f"{text}: {len(wrong)} of {len(ours)} differ; {given}: emulator {ours[k]:#x}, GPU {theirs[k]:#x}")


@pytest.mark.parametrize(
    "text, dtypes, output", EXACT, ids=[case[0].partition("{d}")[0] + case[0][-20:] for case in EXACT]
)
def test_exact_instructions(cupy, arch, text, dtypes, output):
    columns = inputs(dtypes, text)
    assert_equal_bits(*both(cupy, arch, text, columns, output), columns, text)


@pytest.mark.parametrize("text, output", EXACT_HALVES, ids=[case[0].partition(" ")[0] for case in EXACT_HALVES])
def test_exact_instructions_on_halves(cupy, arch, text, output):
    columns = (HALVES, np.random.default_rng(0).permutation(HALVES))
    assert_equal_bits(*both(cupy, arch, text, columns, output), columns, text)


APPROXIMATE = [
    "ex2.approx.ftz",
    "ex2.approx",
    "rcp.approx.ftz",
    "sqrt.approx",
    "rsqrt.approx",
    "lg2.approx",
    "tanh.approx",
]


@pytest.mark.parametrize("name", APPROXIMATE)
def test_approximate_instructions_keep_their_bound(cupy, arch, name):
    random = np.random.default_rng(1)
    if name.startswith("ex2"):
        x = np.concatenate([random.uniform(-126, 127.9, 200_000), random.uniform(-2, 2, 100_000)])
    elif name.startswith("lg2"):  # near 1 the bound is absolute
        x = 2.0 ** np.concatenate([random.uniform(-120, -1, 100_000), random.uniform(1, 120, 100_000)])
    else:
        x = random.uniform(0.25, 4, 200_000) * 4.0 ** random.integers(-20, 20, 200_000)
    columns, text = (x.astype(f32),), f"{name}.f32 {{d}}, {{a}};"
    ours, theirs = both(cupy, arch, text, columns, f32)
    distance = np.abs(ours.view(i32).astype(i64) - theirs.view(i32))
    print(f"{name}: at most {distance.max()} ulp")
    assert distance.max() <= BOUND[name.partition(".")[0]]


@pytest.mark.parametrize("name", ["div.approx.f32", "div.full.f32"])
def test_approximate_divisions_keep_their_bound(cupy, arch, name):
    random = np.random.default_rng(2)
    columns = tuple((random.uniform(0.25, 4, (2, 200_000)) * 4.0 ** random.integers(-20, 20, 200_000)).astype(f32))
    ours, theirs = both(cupy, arch, f"{name} {{d}}, {{a}}, {{b}};", columns, f32)
    assert np.abs(ours.view(i32).astype(i64) - theirs.view(i32)).max() <= BOUND["div"]


@pytest.mark.parametrize("name", ["ex2.approx.ftz", "ex2.approx", "rcp.approx.ftz", "lg2.approx", "sqrt.approx"])
def test_approximate_instructions_on_special_values(cupy, arch, name):
    x = np.array([0, -0.0, np.inf, -np.inf, np.nan, 1, -1, 1e-40, -1e-40, -200, 200, 128], f32)
    text = f"{name}.f32 {{d}}, {{a}};"
    ours, theirs = both(cupy, arch, text, (x,), f32)
    plain = np.isfinite(ours) & (ours != 0)
    assert_equal_bits(ours[~plain], theirs[~plain], (x[~plain],), text)
    assert np.abs(ours.view(i32).astype(i64) - theirs.view(i32))[plain].max(initial=0) <= BOUND[name.partition(".")[0]]


# ---------------------------------------------------------------- threads that talk to each other

STORE = "mad.wide.u32 %rd3, %r0, 16, %rd1; st.global.v4.b32 [%rd3], {%r10, %r11, %r12, %r13};"
LOAD = "mad.wide.u32 %rd2, %r0, 16, %rd0; ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%rd2];"
SHARED = ".shared .align 16 .b8 s[4096];"
EXCHANGES = {
    "shfl": """shfl.sync.bfly.b32 %r10, %r4, 3, 31, -1; shfl.sync.up.b32 %r11, %r4, 2, 0, -1;
  shfl.sync.down.b32 %r12|%p1, %r4, 5, 0x181f, -1; selp.b32 %r8, 1, 2, %p1; add.u32 %r12, %r12, %r8;
  and.b32 %r8, %r5, 31; shfl.sync.idx.b32 %r13, %r4, %r8, 31, -1;""",
    "vote": """setp.gt.s32 %p1, %r4, 0; vote.sync.ballot.b32 %r10, %p1, -1; vote.sync.any.pred %p2, %p1, -1;
  vote.sync.all.pred %p3, %p1, -1; vote.sync.uni.pred %p4, %p1, -1; selp.b32 %r11, 1, 0, %p2;
  @%p3 add.u32 %r11, %r11, 2; @%p4 add.u32 %r11, %r11, 4; and.b32 %r8, %r5, 3;
  match.any.sync.b32 %r12, %r8, -1; redux.sync.add.s32 %r13, %r8, -1;""",
    "bar": """setp.gt.s32 %p1, %r4, 0; bar.red.popc.u32 %r10, 0, %p1; bar.red.and.pred %p2, 0, %p1;
  bar.red.or.pred %p3, 0, %p1; selp.b32 %r11, 1, 0, %p2; @%p3 add.u32 %r11, %r11, 2;
  mov.u32 %r12, 0; mov.u32 %r13, 0;""",
    "shared memory": """mov.u32 %r1, s; mad.lo.u32 %r2, %r0, 16, %r1; st.shared.v4.b32 [%r2], {%r4, %r5, %r6, %r7};
  bar.sync 0; xor.b32 %r3, %r0, 97; mad.lo.u32 %r3, %r3, 16, %r1; ld.shared.v2.b32 {%r10, %r11}, [%r3+8];
  ld.shared.s8 %r12, [%r3+1]; ld.shared.u16 %r13, [%r3+6];""",
    "global memory": """ld.global.v2.b64 {%rd4, %rd5}, [%rd2]; cvt.u32.u64 %r10, %rd5; ld.global.nc.s16 %r11, [%rd2+2];
  ld.global.u8 %r12, [%rd2+7]; ld.u32 %r13, [%rd2+12];""",
    "atomics": """mov.u32 %r1, s; setp.eq.u32 %p1, %r0, 0; @%p1 st.shared.v4.b32 [%r1], {%r0, %r0, %r0, %r0};
  bar.sync 0; and.b32 %r8, %r4, 255; red.shared.add.u32 [%r1], %r8; red.shared.max.s32 [%r1+4], %r4;
  red.shared.xor.b32 [%r1+8], %r5;
  bar.sync 0; ld.shared.v4.b32 {%r10, %r11, %r12, %r13}, [%r1];""",
    "divergence": """mov.u32 %r10, 0; and.b32 %r8, %r4, 15;
L: setp.eq.u32 %p1, %r8, 0; @%p1 bra M; add.u32 %r10, %r10, %r8; sub.u32 %r8, %r8, 1; bra L;
M: and.b32 %r9, %r0, 1; setp.eq.u32 %p2, %r9, 0; @%p2 bra N; shfl.sync.bfly.b32 %r10, %r10, 2, 31, 0xaaaaaaaa;
N: bar.warp.sync -1; shfl.sync.bfly.b32 %r11, %r10, 1, 31, -1; mov.u32 %r12, %lanemask_le; mov.u32 %r13, %laneid;""",
}


@pytest.mark.parametrize("name", EXCHANGES)
def test_exchanges(cupy, arch, name):
    x = np.random.default_rng(4).integers(-(2**31), 2**31, (256, 4)).astype(i32)
    kernel_image = image(LOAD + EXCHANGES[name] + STORE, top=SHARED, arch=arch)
    theirs = run_on_gpu(cupy, kernel_image, x, 4096, threads=256).view(u32)
    with emulated_gpu(arch) as gpu:
        y = gpu.empty(1024, u32)
        launch(kernel_image, gpu.array(x), y, threads=256)
        ours = gpu.get(y)
    assert (ours == theirs).all(), np.flatnonzero(ours != theirs)[:10]


# ---------------------------------------------------------------- the library's own kernels


def _softmax(x, labels):
    return gpusoftmax.softmax(x, temperature=0.7)


def _log_softmax(x, labels):
    return gpusoftmax.log_softmax(x)


def _logsumexp(x, labels):
    return gpusoftmax.logsumexp(x)


def _argmax(x, labels):
    return gpusoftmax.argmax(x)


def _soft_argmax(x, labels):
    return gpusoftmax.soft_argmax(x)


def _spatial_softmax(x, labels):
    return gpusoftmax.spatial_softmax(x)


def _soft_argmax_backward(x, labels):
    expected = gpusoftmax.soft_argmax(x)
    return gpusoftmax.soft_argmax_backward(x, expected, expected)


def _spatial_softmax_backward(x, labels):
    points = gpusoftmax.spatial_softmax(x)
    return gpusoftmax.spatial_softmax_backward(x, points, points)


def _softmax_backward(x, labels):
    return gpusoftmax.softmax_backward(x, x)


def _cross_entropy(x, labels):
    return gpusoftmax.cross_entropy(x, labels, reduction="none", label_smoothing=0.1)


def _cross_entropy_with_grad(x, labels):
    return gpusoftmax.cross_entropy_with_grad(x, labels, ignore_index=3)


CALLS = [
    _softmax,
    _log_softmax,
    _logsumexp,
    _argmax,
    _soft_argmax,
    _spatial_softmax,
    _soft_argmax_backward,
    _spatial_softmax_backward,
    _softmax_backward,
    _cross_entropy,
    _cross_entropy_with_grad,
]


# What results of float32 kernels may be off by is relative to these magnitudes: where terms cancel, to the terms.


def _of_itself(result, x):
    return np.abs(result)


def _of_itself_or_one(result, x):
    return np.maximum(np.abs(result), 1)


def _of_loss_and_gradient(result, x):
    """The gradient is below 0 at labels alone: a probability minus 1, over the number of rows."""
    return np.abs(result) + ((result < 0) / len(x) if result.ndim == 2 else 0)


def _of_gradient_on_map(result, x):
    """Of an expected position, whose own gradient comes from above: a probability times terms of up to 1."""
    return _probabilities(x, None)


def _of_gradient_on_row(result, x):
    return _probabilities(x, -1) * x.shape[1] ** 2


def _probabilities(x, axis):
    exponentials = np.exp(x.astype(f64) - x.max(axis=axis, keepdims=True))
    return exponentials / exponentials.sum(axis=axis, keepdims=True)


SCALES = {
    _softmax: _of_itself,
    _log_softmax: _of_itself,
    _logsumexp: _of_itself_or_one,
    _soft_argmax: _of_itself,
    _spatial_softmax: _of_itself_or_one,
    _soft_argmax_backward: _of_gradient_on_row,
    _spatial_softmax_backward: _of_gradient_on_map,
    _cross_entropy: _of_itself,
    _cross_entropy_with_grad: _of_loss_and_gradient,
}
"""Kernels that have approximate instructions in float32; all others, and all of float64, have equal bits."""
APART = 8 * 2.0**-23
"""Between two runs of the emulator, one with every approximate instruction off by its bound, half of that was seen."""


@pytest.mark.parametrize("shape", [(5, 7), (3, 1000), (2, 4099), (2, 50_257)])
@pytest.mark.parametrize("dtype", [f16, f32, f64])
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__[1:])
def test_library_kernels(cupy, arch, call, dtype, shape):
    """One public call on both."""
    random = np.random.default_rng(0)
    x = (random.standard_normal(shape) * 5).astype(dtype)
    x[0, 1] = -np.inf
    labels = random.integers(0, shape[1], shape[0])
    with emulated_gpu(arch) as gpu:
        ours = gpu.get(call(gpu.array(x), gpu.array(labels)))
    theirs = call(cupy.asarray(x), cupy.asarray(labels))
    pairs = zip(ours, theirs, strict=True) if isinstance(ours, tuple) else [(ours, theirs)]
    for mine, other in pairs:
        other = cupy.asnumpy(other)
        assert mine.dtype == other.dtype and mine.shape == other.shape
        if dtype == f64 or mine.dtype.kind != "f" or call not in SCALES:
            assert np.array_equal(mine.view(f"u{mine.itemsize}"), other.view(f"u{other.itemsize}"))
            continue
        with np.errstate(invalid="ignore"):
            apart = np.abs(mine.astype(f64) - other)
            if mine.dtype == f16:
                tolerance = np.maximum(np.spacing(np.abs(mine)).astype(f64), 2.0**-24)
            else:
                tolerance = APART * SCALES[call](mine.astype(f64), x) + np.finfo(f32).tiny
        assert (np.isnan(mine) == np.isnan(other)).all()
        same = np.isnan(mine) | (mine == other)
        print(f"{mine.dtype}: at most {np.where(same, 0, apart / tolerance).max():.3g} of what is allowed")
        assert (same | (apart <= tolerance)).all()
