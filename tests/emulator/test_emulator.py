"""The emulated GPU as the library sees it: arrays, addresses, streams, devices, launches and counts."""

import gc
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest

from gpusoftmax.kernels.cuda import driver
from gpusoftmax.kernels.cuda.plan import Plan
from tests.emulator import emulated_gpu, errors
from tests.emulator.handwritten import HEADER, HandwrittenImage, image, launch, pointer

f32, i64 = np.float32, np.int64

# y[i] = 2 x[i] for i < n, strides in bytes
SCALE = image(
    """
  mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x; mad.lo.u32 %r0, %r1, %r2, %r0;
  ld.param.u64 %rd4, [n]; ld.param.u64 %rd5, [x_stride]; ld.param.u64 %rd6, [y_stride]; cvt.u64.u32 %rd7, %r0;
  setp.ge.u64 %p0, %rd7, %rd4; @%p0 ret;
  mad.lo.s64 %rd2, %rd7, %rd5, %rd0; mad.lo.s64 %rd3, %rd7, %rd6, %rd1;
  ld.global.f32 %f0, [%rd2]; add.rn.f32 %f1, %f0, %f0; st.global.f32 [%rd3], %f1;""",
    more_params=", .param .u64 n, .param .u64 x_stride, .param .u64 y_stride",
)


def scale(x, y, n=None, x_stride=None, y_stride=None, **options):
    n = len(x) if n is None else n
    x_stride = x.strides[0] if x_stride is None else x_stride
    y_stride = y.strides[0] if y_stride is None else y_stride
    launch(SCALE, x, y, n, x_stride, y_stride, threads=32, blocks=-(-n // 32) or 1, **options)
    return y


@pytest.fixture
def gpu():
    with emulated_gpu() as gpu:
        yield gpu


# ---- arrays


def test_arrays_keep_their_form(gpu):
    base = np.arange(48, dtype=f32).reshape(6, 8)
    base.flags.writeable = False
    for view in (base, base[::2, 1::3], base[::-1, ::-1], base.T, base[2:2], base[3, 4:5].reshape(())):
        array = gpu.array(view)
        assert (array.shape, array.strides, array.dtype) == (view.shape, view.strides, view.dtype)
        interface = array.__cuda_array_interface__
        assert interface["version"] == 3 and interface["stream"] == 7 and interface["data"][1] is True
        assert interface["shape"] == view.shape and interface["strides"] == view.strides
        assert (gpu.get(array) == view).all() and array.ndim == view.ndim and array.size == view.size
    assert pointer(gpu.array(base[2:2])) == 0 and pointer(gpu.array(base)) % 256 == 0
    broadcast = np.broadcast_to(f32(3), (4, 5))
    array = gpu.array(broadcast)
    assert array.strides == (0, 0) and (gpu.get(array) == 3).all()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, f32, np.float64, np.int8, np.uint64, bool])
def test_dtypes_survive(gpu, dtype):
    x = np.array([[0, 1, 1], [1, 0, 1]]).astype(dtype)
    got = gpu.get(gpu.array(x))
    assert got.dtype == x.dtype and (got == x).all()


def test_the_protocol_of_an_array(gpu):
    x = gpu.array(np.array([1.5, 2.5], f32))
    assert len(x) == 2 and x.__dlpack_device__() == (2, 0) and "float32" in repr(x)
    assert gpu.array(np.array(4.5)).item() == 4.5
    empty = x.__gpusoftmax_empty__((2, 3), np.dtype(ml_dtypes.bfloat16))
    assert empty.shape == (2, 3) and empty.strides == (6, 2) and empty.dtype == ml_dtypes.bfloat16
    assert empty.__cuda_array_interface__["data"][1] is False
    with pytest.raises(TypeError, match="gpu.get"):
        np.asarray(x)
    with pytest.raises(TypeError, match="0-d"):
        len(gpu.array(np.array(1.0)))


def test_get_goes_through_tuples(gpu):
    class Pair(NamedTuple):
        loss: object
        count: object

    x = gpu.array(np.ones(2, f32))
    pair = gpu.get(Pair(x, 3))
    assert type(pair) is Pair and (pair.loss == 1).all() and pair.count == 3
    first, (second,) = gpu.get((x, (x,)))
    assert (first == second).all() and gpu.get(f32(2.5)) == 2.5


def test_the_host_array_is_not_the_device_array(gpu):
    host = np.ones(4, f32)
    x = gpu.array(host)
    scale(x, x)
    assert (host == 1).all() and (gpu.get(x) == 2).all()


@pytest.mark.parametrize("view", [np.s_[:], np.s_[::3], np.s_[::-1], np.s_[70:2:-2], np.s_[5:6]])
def test_strided_kernels(gpu, view):
    host = np.random.default_rng(0).standard_normal(100).astype(f32)[view]
    result = np.zeros(300, f32)[1::3][: len(host)]
    y = scale(gpu.array(host), gpu.array(result))
    assert (gpu.get(y) == 2 * host).all()


def test_views_of_one_base_share_their_memory(gpu):
    base = np.arange(20, dtype=f32)
    even, odd, whole = gpu.array(base[::2]), gpu.array(base[1::2]), gpu.array(base)
    assert pointer(odd) - pointer(even) == 4 and pointer(whole) == pointer(even)
    scale(even, odd)
    result = gpu.get(whole)
    assert (result[1::2] == 2 * base[::2]).all() and (result[::2] == base[::2]).all()


def test_bases_of_other_kinds(gpu):
    raw = bytearray(np.arange(10, dtype=f32).tobytes())
    tail = np.frombuffer(raw, f32, offset=8)
    x, whole = gpu.array(tail), gpu.array(np.frombuffer(raw, np.uint8))
    assert pointer(x) == pointer(whole) + 8 and (gpu.get(x) == tail).all()
    rows = np.lib.stride_tricks.as_strided(np.arange(8, dtype=f32), (3, 4), (8, 4))
    assert (gpu.get(gpu.array(rows)) == rows).all()


def test_an_odd_place_in_the_base_is_kept(gpu):
    base = np.zeros(41, np.uint8)
    x = gpu.array(base[1:].view(f32))
    assert pointer(x) % 4 == 1
    with pytest.raises(errors.Misaligned, match=r"4-byte access .* by thread 0 of block 0.*ld.global.f32"):
        scale(x, gpu.empty(10, f32))


def test_far_apart_rows_of_a_huge_base(gpu):
    distance = (1 << 31) + 512
    base = np.zeros(2 * distance, np.uint8)  # never touched but for two elements
    rows = base.view(f32)[:: distance // 4]
    rows[:] = 3, 5
    y = scale(gpu.array(rows), gpu.empty(2, f32))
    assert (gpu.get(y) == [6, 10]).all()


# ---- accesses that must not be


def test_outside_the_view(gpu):
    base = np.arange(20, dtype=f32)
    x, y = gpu.array(base[4:12]), gpu.empty(20, f32)
    with pytest.raises(errors.OutOfBounds, match=r"byte 48 of the base of array 0 float32\[8\], outside the view"):
        scale(x, y, n=9)
    with pytest.raises(errors.OutOfBounds, match="outside the view"):
        scale(gpu.array(np.ones(1, f32)), x, n=8, x_stride=0, y_stride=8)
    every_second = gpu.array(np.arange(20, dtype=f32)[::2])
    with pytest.raises(errors.OutOfBounds, match="byte 4 of the base"):
        scale(every_second, y, x_stride=4)


def test_outside_every_array(gpu):
    x, y = gpu.array(np.zeros(100, f32), name="logits"), gpu.empty(128, f32)
    with pytest.raises(errors.OutOfBounds, match=r"0 bytes past the end of logits \(400 bytes\)"):
        scale(x, y, n=101)
    with pytest.raises(errors.OutOfBounds, match="4 bytes before the start of logits"):
        scale(x, y, n=2, x_stride=-4)
    with pytest.raises(errors.OutOfBounds, match="null pointer"):
        scale(0, y, n=1, x_stride=4)


def test_bytes_outside_the_views_are_checked(gpu):
    base = np.zeros(20, f32)
    x = gpu.array(base[4:12])
    x._allocation.data[2] ^= 1  # no kernel can do this unseen
    with pytest.raises(errors.OutsideChanged, match=r"byte 2 of array 0 float32\[8\]"):
        gpu.get(x)
    x._allocation.data[2] ^= 1
    with pytest.raises(errors.OutsideChanged, match="second"), emulated_gpu() as other:
        y = other.array(base[::2], name="second")
        y._allocation.data[5] ^= 1
        del y
        gc.collect()


def test_read_only_arrays(gpu):
    x, host = gpu.array(np.ones(4, f32)), np.ones(4, f32)
    host.flags.writeable = False
    with pytest.raises(errors.ReadOnlyWrite, match="write to read-only array 1"):
        scale(x, gpu.array(host))
    base = np.ones(8, f32)
    front = base[:4]
    front.flags.writeable = False
    front, back = gpu.array(front), gpu.array(base[4:])
    scale(front, back)
    with pytest.raises(errors.ReadOnlyWrite):
        scale(back, front)


def test_uninitialised_memory(gpu):
    x, empty = gpu.array(np.ones(8, f32)), gpu.empty(8, f32)
    with pytest.raises(errors.UninitialisedRead, match=r"uninitialised empty 1 float32\[8\].*ld.global.f32"):
        scale(empty, x)
    scale(x, empty, n=7)
    with pytest.raises(errors.UninitialisedRead, match=r"element \(7,\) of empty 1"):
        gpu.get(empty)
    scale(x, empty)
    assert (gpu.get(empty) == 2).all()


def test_freed_memory(gpu):
    x, y, z = gpu.array(np.ones(8, f32), name="first"), gpu.empty(8, f32), gpu.array(np.ones(8, f32))
    address = pointer(x)
    del x
    gc.collect()
    with pytest.raises(errors.FreedMemory, match="lies in first, which has been freed"):
        scale(address, y, n=8, x_stride=4)
    gpu.free(z)
    with pytest.raises(errors.FreedMemory):
        gpu.get(z)
    with pytest.raises(errors.FreedMemory):
        scale(z, y)


# reads through a pointer that lies in memory
INDIRECT = image("ld.global.u64 %rd2, [%rd0]; ld.global.f32 %f0, [%rd2]; st.global.f32 [%rd1], %f0;")


def test_pointers_in_memory(gpu):
    x, y = gpu.array(np.array([3], f32)), gpu.empty(1, f32)
    launch(INDIRECT, gpu.array(np.array([pointer(x)])), y, threads=1)
    assert gpu.get(y) == 3
    table = gpu.array(np.array([pointer(x)]))
    gpu.free(x)
    with pytest.raises(errors.FreedMemory, match="has been freed"):
        launch(INDIRECT, table, y, threads=1)


# ---- streams and devices


def test_foreign_streams(gpu):
    x, y = gpu.array(np.ones(4, f32)), gpu.empty(4, f32)
    with pytest.raises(errors.ForeignStream, match=r"on stream 9, its arrays are on \[7\]"):
        scale(x, y, stream=9)
    with gpu.stream(9):
        on_nine = gpu.array(np.ones(4, f32))
        assert on_nine.__cuda_array_interface__["stream"] == 9
    scale(on_nine, on_nine, stream=9)
    assert gpu.array(np.ones(1), stream=12).__cuda_array_interface__["stream"] == 12
    assert gpu.current_stream == 7 and gpu.stats[-1].stream == 9
    empty = on_nine.__gpusoftmax_empty__(3, f32)
    assert empty.__cuda_array_interface__["stream"] == 9


def test_memory_of_another_device():
    with emulated_gpu(devices=2) as gpu:
        x, y = gpu.array(np.ones(4, f32)), gpu.array(np.ones(4, f32), device=1)
        assert y.__dlpack_device__() == (2, 1) and driver.device(1).ordinal == 1
        with pytest.raises(errors.ForeignMemory, match="lies on device 1, used on device 0 by parameter 1"):
            scale(x, y)
        with pytest.raises(errors.ForeignMemory, match="lies on device 0, used on device 1"):
            launch(INDIRECT, gpu.array(np.array([pointer(x)]), device=1), y, threads=1, device=1)
        scale(y, y.__gpusoftmax_empty__(4, f32), device=1)
        assert gpu.stats[-1].device == 1


# ---- the driver's place


def test_three_functions_are_replaced_and_restored():
    before = dict(vars(driver))
    with pytest.raises(KeyError), emulated_gpu("sm_80", multiprocessors=4) as gpu:
        changed = {name for name, value in vars(driver).items() if before.get(name) is not value}
        assert changed == {"device", "load", "launch"}
        assert vars(driver.device(0)) == vars(driver.Device(0, "sm_80", 4)) and gpu.arch == "sm_80"
        raise KeyError
    assert {name: value for name, value in vars(driver).items() if before[name] is not value} == {}


def test_architectures():
    with emulated_gpu("sm_86") as gpu:
        x = gpu.array(np.ones(4, f32))
        body = "st.global.f32 [%rd1], 0f3F800000;"
        launch(image(body, arch="sm_80"), x, x)
        for arch in ("sm_90", "sm_75", "sm_89"):
            with pytest.raises(errors.WrongArchitecture):
                launch(image(body, arch=arch), x, x)
        wrong = image(body, arch="sm_86")
        wrong.ptx = wrong.ptx.replace(".target sm_80", ".target sm_90")
        with pytest.raises(errors.WrongArchitecture, match="PTX for sm_90"):
            launch(wrong, x, x)
        with pytest.raises(errors.InvalidLaunch, match="cluster"):
            launch(image(body, arch="sm_80"), x, x, blocks=2, cluster=2)
        with pytest.raises(errors.InvalidLaunch, match="120000 bytes of shared memory, sm_86 has 101376"):
            launch(image(body, arch="sm_80"), x, x, shared=120_000)


def test_launches_that_the_driver_would_refuse(gpu):
    x = gpu.array(np.ones(4, f32))
    for options in ({"threads": 0}, {"threads": 1025}, {"blocks": 0}, {"blocks": 3, "cluster": 2}, {"cluster": 32}):
        with pytest.raises(errors.InvalidLaunch):
            launch(SCALE, x, x, 4, 4, 4, **options)
    with pytest.raises(errors.InvalidLaunch, match="takes 5 parameters, got 2"):
        launch(SCALE, x, x)
    with pytest.raises(errors.InvalidLaunch, match="parameter 2: .* has 4 bytes, the kernel's has 8"):
        launch(SCALE, x, x, np.int32(4), 4, 4)
    with pytest.raises(errors.InvalidLaunch, match="neither an int nor a NumPy scalar"):
        driver.launch(
            driver.load(SCALE, driver.device(0), 7),
            Plan("handwritten", 32, 1, 0),
            7,
            (pointer(x), pointer(x), 4, 4, 4.0),
        )
    bounded = image("ret;")
    bounded.ptx = bounded.ptx.replace(")\n{", ")").replace(".param .u64 y) {", ".param .u64 y) .maxntid 64, 1, 1 {")
    launch(bounded, x, x, threads=64)
    with pytest.raises(errors.InvalidLaunch, match="compiled for at most"):
        launch(bounded, x, x, threads=96)


def test_scalar_parameters(gpu):
    body = "ld.param.f32 %f0, [a]; ld.param.f64 %fd0, [b]; st.global.f32 [%rd1], %f0; st.global.f64 [%rd1+8], %fd0;"
    kernel = image(body, more_params=", .param .f32 a, .param .f64 b")
    y = gpu.empty(2, np.float64)
    launch(kernel, y, y, f32(1.5), np.float64(-2.5), threads=1)
    raw = np.zeros(2)
    y._allocation.state[:16] = 1  # four bytes stay unwritten
    raw = gpu.get(y)
    assert raw[:1].view(f32)[0] == 1.5 and raw[1] == -2.5


def test_variables_of_a_kernel(gpu):
    top = """
.global .align 4 .f32 table[4] = {0f3F800000, 0f40000000, 0f40400000, 0f40800000};
.global .align 8 .u64 address = generic(table);
.const .align 4 .u32 fixed[2] = {7, 9};
.global .align 4 .u32 counter;"""
    body = """
  ld.global.u64 %rd2, [address]; mad.wide.u32 %rd2, %r0, 4, %rd2; ld.f32 %f0, [%rd2]; mad.wide.u32 %rd3, %r0, 4, %rd1;
  ld.const.u32 %r1, [fixed+4]; cvt.rn.f32.u32 %f1, %r1; add.f32 %f0, %f0, %f1; st.global.f32 [%rd3], %f0;
  atom.global.add.u32 %r2, [counter], 1;"""
    y = gpu.empty(4, f32)
    launch(image(body, top), y, y, threads=4)
    assert (gpu.get(y) == [10, 11, 12, 13]).all()
    written = image("mov.u64 %rd2, fixed; cvta.const.u64 %rd2, %rd2; st.u32 [%rd2], %r0;", top)
    with pytest.raises(errors.ReadOnlyWrite, match="const variable fixed"):
        launch(written, y, y, threads=4)


def test_unknown_instructions(gpu):
    x = gpu.array(np.ones(4, f32))
    with pytest.raises(errors.Unsupported, match="wgmma.fence"):
        launch(image("wgmma.fence.sync.aligned;"), x, x)
    with pytest.raises(errors.ParseError, match="line 5"):
        launch(HandwrittenImage(HEADER.format(target="sm_90") + "\n?"), x, x)


# ---- what is counted


def test_counts_of_a_launch(gpu):
    x, y = gpu.array(np.zeros(128, f32)), gpu.empty(128, f32)
    launch(SCALE, x, y, 128, 4, 4, threads=128)
    stats = gpu.stats[-1]
    assert len(gpu.stats) == 1 and stats.entry == "kernel" and stats.plan.threads == 128 and stats.blocks == 1
    assert stats.read["global"] == stats.written["global"] == 512
    assert stats.sectors["ld"] == 16 and stats.lines["ld"] == 4 and stats.requests["ld"] == 4
    assert stats.buffers["array 0 float32[128]"].read == 512 and stats.buffers["array 0 float32[128]"].written == 0
    assert (gpu.reads(x) == 1).all() and not gpu.writes(x).any()
    assert (gpu.writes(y) == 1).all() and not gpu.reads(y).any()
    assert stats.instructions["add.rn.f32"] == 128 and stats.warp_instructions["add.rn.f32"] == 4
    assert "sectors" in repr(stats)
    scale(x, y, n=32, x_stride=128 // 8)
    assert gpu.stats[-1].sectors["ld"] == 16 and gpu.stats[0].requests["ld"] == 4
    assert gpu.reads(x, launch=0).sum() == 128 and gpu.reads(x).sum() == 32
    gpu.reset_stats()
    assert gpu.stats == []


def test_counts_follow_the_strides(gpu):
    base = np.arange(24, dtype=f32)
    x = gpu.array(base[::-2])
    scale(x, gpu.empty(12, f32), n=5)
    assert gpu.reads(x).tolist() == [1] * 5 + [0] * 7
    broadcast = gpu.array(np.broadcast_to(base[:1], (6,)))
    scale(broadcast, gpu.empty(6, f32))
    assert gpu.reads(broadcast).tolist() == [6] * 6
    bystander = gpu.array(np.ones((2, 3)))
    assert gpu.reads(bystander).shape == (2, 3) and not gpu.reads(bystander).any()


def test_untracked_launches_are_not_counted():
    with emulated_gpu(track=False) as gpu:
        x = gpu.array(np.ones(4, f32))
        scale(x, x)
        assert gpu.stats[-1].read["global"] == 16
        with pytest.raises(errors.EmulatorError, match="track=True"):
            gpu.reads(x)


def test_results_do_not_depend_on_batches():
    host = np.random.default_rng(0).standard_normal(1000).astype(f32)
    seen = set()
    for options in ({"max_lanes": 32}, {"max_lanes": 96}, {}, {"seed": 1}, {"seed": 2}):
        with emulated_gpu(**options) as gpu:
            y = scale(gpu.array(host), gpu.empty(1000, f32))
            stats = gpu.stats[-1]
            seen.add((gpu.get(y).tobytes(), stats.sectors["ld"], sum(stats.instructions.values())))
    assert len(seen) == 1


def test_options_are_checked():
    with pytest.raises(ValueError, match="approx must be"):
        emulated_gpu(approx="fast")
