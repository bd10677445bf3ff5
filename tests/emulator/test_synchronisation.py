"""Threads of the emulator that talk to each other: warps, barriers, shared memory, clusters, atomics, divergence."""

import numpy as np
import pytest

from tests.emulator import emulated_gpu, errors
from tests.emulator.handwritten import HEADER, HandwrittenImage, image, launch

f32, i32, u32, u64 = np.float32, np.int32, np.uint32, np.uint64
SHARED_WORD = ".shared .align 4 .b32 s;"
SHARED_WORDS = ".shared .align 16 .b8 s[1024];"
STORE_R3 = "mad.wide.u32 %rd3, %r0, 4, %rd1; st.global.u32 [%rd3], %r3;"  # y[thread] = %r3
# %r0 counts threads over the grid; %r9 within the block
GLOBAL_INDEX = "mov.u32 %r9, %r0; mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x; mad.lo.u32 %r0, %r1, %r2, %r0;"


def run(body, x=None, count=64, top="", threads=None, gpu_options=None, dtype=u32, **options):
    """Launch a body over x and return y, one word per thread."""
    with emulated_gpu(**(gpu_options or {})) as gpu:
        x = gpu.array(np.zeros(1, u32) if x is None else x)
        y = gpu.empty(count, dtype)
        launch(image(body, top), x, y, threads=threads or count, **options)
        return gpu.get(y)


@pytest.fixture(params=[None, 0, 1], ids=["in order", "seed 0", "seed 1"])
def schedule(request):
    return {"seed": request.param}


# ---- warps

LANES = np.arange(64) & 31


@pytest.mark.parametrize(
    "text, source",
    [
        ("bfly.b32 %r3, %r4, 3, 31", LANES ^ 3),
        ("up.b32 %r3, %r4, 1, 0", np.maximum(LANES - 1, 0)),
        ("down.b32 %r3, %r4, 2, 31", np.where(LANES < 30, LANES + 2, LANES)),
        ("idx.b32 %r3, %r4, 5, 31", np.full(64, 5)),
        ("bfly.b32 %r3, %r4, 4, 0x181f", LANES ^ 4),  # segments of eight lanes
        ("down.b32 %r3, %r4, 7, 0x181f", np.where(LANES % 8 < 1, LANES + 7, LANES)),
    ],
)
def test_shuffles(text, source, schedule):
    body = f"mad.lo.u32 %r4, %r0, 10, 1; shfl.sync.{text}, 0xffffffff; {STORE_R3}"
    warp = np.arange(64) & 32
    assert (run(body, gpu_options=schedule) == (warp + source) * 10 + 1).all()
    target, value, distance, bounds = text.split(", ")  # the same from registers
    moved = f"mov.u32 %r5, {distance}; mov.u32 %r6, {bounds}; " + body.replace(text, f"{target}, {value}, %r5, %r6")
    assert (run(moved, gpu_options=schedule) == (warp + source) * 10 + 1).all()


def test_shuffle_says_whether_the_source_is_in_range():
    body = f"shfl.sync.down.b32 %r4|%p1, %r0, 2, 31, 0xffffffff; selp.u32 %r3, 1, 0, %p1; {STORE_R3}"
    assert (run(body) == (LANES < 30)).all()


def test_votes_and_matches(schedule):
    x = np.random.default_rng(3).integers(0, 4, 64).astype(u32)
    warps = x.reshape(2, 32)
    load = "mad.wide.u32 %rd2, %r0, 4, %rd0; ld.global.u32 %r4, [%rd2]; setp.gt.u32 %p1, %r4, 1;"

    def vote(text):
        return run(f"{load} {text} {STORE_R3}", x, gpu_options=schedule)

    def mask(condition):
        return np.repeat([sum(1 << k for k in range(32) if row[k]) for row in condition], 32)

    assert (vote("vote.sync.ballot.b32 %r3, %p1, 0xffffffff;") == mask(warps > 1)).all()
    for name, expected in {"any": True, "all": False, "uni": False}.items():
        assert (vote(f"vote.sync.{name}.pred %p2, %p1, 0xffffffff; selp.u32 %r3, 1, 0, %p2;") == expected).all()
    same = [sum(1 << k for k in range(32) if warps[t // 32, k] == x[t]) for t in range(64)]
    assert (vote("match.any.sync.b32 %r3, %r4, 0xffffffff;") == same).all()
    assert (vote("redux.sync.add.u32 %r3, %r4, 0xffffffff;") == np.repeat(warps.sum(1), 32)).all()
    assert (vote("activemask.b32 %r3;") == 0xFFFFFFFF).all() or schedule["seed"] is not None
    assert (vote("elect.sync %r5|%p2, 0xffffffff; selp.u32 %r3, 1, 0, %p2;") == (LANES == 0)).all()


def test_warp_operations_wait_for_their_members(schedule):
    body = f"""and.b32 %r4, %r0, 1; setp.eq.u32 %p1, %r4, 0; @%p1 bra EVEN;
  mov.u32 %r5, 100; bra.uni MEET;
EVEN: mov.u32 %r5, 200; shfl.sync.bfly.b32 %r5, %r0, 2, 31, 0x55555555;
MEET: bar.warp.sync 0xffffffff; shfl.sync.bfly.b32 %r3, %r5, 1, 31, 0xffffffff; {STORE_R3}"""
    thread = np.arange(64)
    expected = np.where(thread % 2 == 1, (thread ^ 1) ^ 2, 100)
    assert (run(body, gpu_options=schedule) == expected).all()
    with pytest.raises(errors.BarrierError, match="not in its own member mask"):
        run("shfl.sync.bfly.b32 %r3, %r0, 1, 31, 0x0000fffe;")


# ---- blocks

REVERSE = f"""mov.u32 %r1, s; mad.lo.u32 %r2, %r0, 4, %r1; st.shared.u32 [%r2], %r0;
  SYNC
  sub.u32 %r4, 255, %r0; mad.lo.u32 %r2, %r4, 4, %r1; ld.shared.u32 %r3, [%r2]; {STORE_R3}"""


def test_a_missing_barrier_is_a_race(schedule):
    with_barrier = run(REVERSE.replace("SYNC", "bar.sync 0;"), count=256, top=SHARED_WORDS, gpu_options=schedule)
    assert (with_barrier == np.arange(256)[::-1]).all()
    with pytest.raises((errors.SharedRace, errors.UninitialisedRead)):
        run(REVERSE.replace("SYNC", ""), count=256, top=SHARED_WORDS, gpu_options=schedule)


NEIGHBOUR = f"""mov.u32 %r1, s; mad.lo.u32 %r2, %r0, 4, %r1; st.shared.u32 [%r2], %r0;
  SYNC
  xor.b32 %r4, %r0, 1; mad.lo.u32 %r5, %r4, 4, %r1; ld.shared.u32 %r3, [%r5]; {STORE_R3}"""


def test_a_missing_barrier_of_a_warp_is_a_race():
    """A random schedule looks for it, as warps may run their lanes apart: a shuffle or a vote orders no memory."""
    shuffle, sync = "shfl.sync.bfly.b32 %r6, %r0, 1, 31, 0xffffffff;", "bar.warp.sync 0xffffffff;"
    again = NEIGHBOUR.replace("SYNC", sync) + "st.shared.u32 [%r2], %r0;"  # what the neighbour may not have read yet
    for seed in range(3):
        for body in (NEIGHBOUR.replace("SYNC", sync), again.replace("st.global", sync + "st.global")):
            got = run(body, top=SHARED_WORDS, gpu_options={"seed": seed})
            assert (got == np.arange(64) ^ 1).all()
        for body in (NEIGHBOUR.replace("SYNC", ""), NEIGHBOUR.replace("SYNC", shuffle), again):
            with pytest.raises((errors.SharedRace, errors.UninitialisedRead)):
                run(body, top=SHARED_WORDS, gpu_options={"seed": seed})
    with pytest.raises(errors.SharedRace, match="written by lane . and read by lane . of one warp with no barrier"):
        run(NEIGHBOUR.replace("SYNC", shuffle), top=SHARED_WORDS, gpu_options={"seed": 0})


def test_lanes_of_a_warp_may_run_apart():
    """With a random schedule: what a lane finds in memory then depends on it."""
    body = f"""mad.wide.u32 %rd2, %r0, 4, %rd0; st.global.u32 [%rd2], %r0;
  xor.b32 %r4, %r0, 1; mad.wide.u32 %rd2, %r4, 4, %rd0; ld.global.u32 %r3, [%rd2]; {STORE_R3}"""
    x = np.full(64, 1000, u32)
    found = [run(body, x, gpu_options={"seed": seed}) for seed in (None, *range(20))]
    assert (found[0] == np.arange(64) ^ 1).all()
    assert any((one == 1000).any() for one in found)


def test_the_race_is_described():
    with pytest.raises(errors.SharedRace, match="written by warp 7 and read by warp 0 with no barrier between"):
        run(REVERSE.replace("SYNC", ""), count=256, top=SHARED_WORDS)
    with pytest.raises(errors.SharedRace, match="written by warps 0 and 1 at the same instruction"):
        run("st.shared.u32 [s], %r0;", top=SHARED_WORD)
    # a second round overwrites what slow warps may still read
    again = REVERSE.replace("SYNC", "bar.sync 0;") + "mad.lo.u32 %r2, %r0, 4, %r1; st.shared.u32 [%r2], %r0;"
    with pytest.raises(errors.SharedRace, match="read by warp . and written by warp"):
        run(again, count=256, top=SHARED_WORDS)
    assert len(run(again, count=256, top=SHARED_WORDS, gpu_options={"check_race": False})) == 256


def test_shared_memory_is_checked():
    two = ".shared .align 4 .b8 s[64]; .shared .align 4 .b8 u[64];"
    fill = "mov.u32 %r1, s; and.b32 %r8, %r0, 15; mad.lo.u32 %r2, %r8, 4, %r1; st.shared.u32 [%r2], %r8;"
    keep = "mov.u32 %r7, u; st.shared.u32 [%r7], 0;"
    with pytest.raises(errors.OutOfBounds, match="between shared variables .*offset 64 of 64 bytes"):
        run(fill + keep + f"ld.shared.u32 %r3, [%r2+4]; {STORE_R3}", count=32, top=two)
    with pytest.raises(errors.OutOfBounds, match="outside shared memory"):
        run(fill + keep + "ld.shared.u32 %r3, [%r2+99999];", count=32, top=two)
    with pytest.raises(errors.UninitialisedRead, match="uninitialised shared memory"):
        run("ld.shared.u32 %r3, [s];", count=32, top=SHARED_WORD)
    with pytest.raises(errors.Misaligned, match="misaligned .shared"):
        run(fill + "ld.shared.u32 %r3, [%r1+2];", count=32, top=two)


def test_dynamic_shared_memory():
    top = ".extern .shared .align 16 .b8 dynamic[];"
    body = f"""mov.u32 %r1, dynamic; mad.lo.u32 %r2, %r0, 4, %r1; st.shared.u32 [%r2], %r0; bar.sync 0;
  xor.b32 %r4, %r0, 63; mad.lo.u32 %r2, %r4, 4, %r1; ld.shared.u32 %r3, [%r2]; {STORE_R3}"""
    assert (run(body, top=top, shared=256) == np.arange(64)[::-1]).all()
    with pytest.raises(errors.OutOfBounds):
        run(body, top=top, shared=128)


def test_local_memory():
    stack = ".local .align 8 .b8 stack[32]; mov.u64 %rd4, stack;"
    body = f"""{stack} cvta.local.u64 %rd5, %rd4; st.local.u32 [%rd4+8], %r0; st.u32 [%rd5+12], 7;
  ld.u32 %r4, [%rd5+8]; ld.local.u32 %r5, [%rd4+12]; add.u32 %r3, %r4, %r5; {STORE_R3}"""
    assert (run(body) == np.arange(64) + 7).all()
    with pytest.raises(errors.UninitialisedRead, match="uninitialised local memory"):
        run(f"{stack} ld.local.u32 %r3, [%rd4];")
    with pytest.raises(errors.OutOfBounds, match="local"):
        run(f"{stack} st.local.u32 [%rd4+32], %r0;")


def test_block_barriers(schedule):
    body = f"""setp.lt.u32 %p1, %r0, 32; @%p1 bra PRODUCER;
  bar.sync 1, 64; ld.shared.u32 %r3, [s]; bra END;
PRODUCER: mov.u32 %r3, 5; setp.eq.u32 %p2, %r0, 0; @%p2 st.shared.u32 [s], 1000; bar.arrive 1, 64;
END: {STORE_R3}"""
    assert (run(body, top=SHARED_WORD, gpu_options=schedule) == np.where(np.arange(64) < 32, 5, 1000)).all()
    body = f"setp.gt.u32 %p1, %r0, 9; bar.red.popc.u32 %r3, 0, %p1; {STORE_R3}"
    assert (run(body, gpu_options=schedule) == 54).all()
    for name, expected in {"and": 0, "or": 1}.items():
        body = f"setp.gt.u32 %p1, %r0, 9; bar.red.{name}.pred %p2, 0, %p1; selp.u32 %r3, 1, 0, %p2; {STORE_R3}"
        assert (run(body, gpu_options=schedule) == expected).all()


def test_barriers_that_do_not_meet():
    with pytest.raises(errors.BarrierError, match="different aligned"):
        run("setp.ge.u32 %p1, %r0, 40; @%p1 bra X; bar.sync 0; ret; X: bar.sync 0;")
    with pytest.raises(errors.Deadlock, match="64 threads at .bar.sync 1, 96"):
        run("bar.sync 1, 96;")
    with emulated_gpu() as gpu:
        x = gpu.array(np.zeros(1, u32))
        launch(image("setp.ge.u32 %p1, %r0, 40; @%p1 exit; bar.sync 0; st.global.u32 [%rd1], 1;"), x, x, threads=64)
        assert gpu.stats[-1].early_exit_barriers == 1


def test_endless_loops():
    with pytest.raises(errors.Timeout, match="32 threads at"):
        run("L: add.u32 %r3, %r3, 1; bra L;", count=32, gpu_options={"max_steps": 3000})
    # thread 0 spins until a later thread sets the flag
    body = """setp.eq.u32 %p1, %r0, 40; @%p1 bra SET; setp.ne.u32 %p2, %r0, 0; @%p2 ret;
SPIN: atom.global.add.u32 %r4, [%rd0], 0; setp.eq.u32 %p3, %r4, 0; @%p3 bra SPIN; st.global.u32 [%rd1], 5; ret;
SET: atom.global.exch.b32 %r4, [%rd0], 1;"""
    assert run(body, count=1, threads=64) == 5


def test_divergent_loops(schedule):
    """Collatz: every lane its own number of rounds."""
    body = f"""{GLOBAL_INDEX} add.u32 %r4, %r0, 1; mov.u32 %r3, 0;
LOOP: setp.eq.u32 %p1, %r4, 1; @%p1 bra DONE; and.b32 %r5, %r4, 1; setp.eq.u32 %p2, %r5, 0;
  @%p2 shr.u32 %r4, %r4, 1; @!%p2 mad.lo.u32 %r4, %r4, 3, 1; add.u32 %r3, %r3, 1; bra LOOP;
DONE: {STORE_R3}"""

    def rounds(n):
        count = 0
        while n != 1:
            n, count = (n // 2 if n % 2 == 0 else 3 * n + 1), count + 1
        return count

    got = run(body, count=192, threads=64, blocks=3, gpu_options=schedule)
    assert got.tolist() == [rounds(n + 1) for n in range(192)]


def test_jump_tables_and_calls(schedule):
    body = f"""TABLE: .branchtargets L0, L1, L2;
  and.b32 %r1, %r0, 3; min.u32 %r1, %r1, 2; brx.idx %r1, TABLE;
L0: mov.u32 %r3, 10; bra.uni OUT;
L1: mov.u32 %r3, 20; bra.uni OUT;
L2: mov.u32 %r3, 30;
OUT: {STORE_R3}"""
    assert (run(body, gpu_options=schedule) == np.tile([10, 20, 30, 30], 16)).all()
    function = """
.func (.param .b32 result) f(.param .b32 a, .param .align 8 .b8 pair[16]) {
  .reg .b32 %r<4>; .reg .b64 %rd<2>; .reg .pred %p;
  ld.param.u32 %r0, [a]; ld.param.u64 %rd0, [pair+8]; cvt.u32.u64 %r1, %rd0; setp.lt.u32 %p, %r0, 10; @%p bra SMALL;
  add.u32 %r2, %r0, %r1; st.param.b32 [result], %r2; ret;
SMALL: st.param.b32 [result+0], %r1; ret;
}"""
    call = f"""mov.u64 %rd4, 1000;
  {{ .param .b32 p0; .param .align 8 .b8 p1[16]; .param .b32 r0; st.param.b32 [p0+0], %r0; st.param.b64 [p1+8], %rd4;
  call.uni (r0), f, (p0, p1); ld.param.b32 %r3, [r0+0]; }} {STORE_R3}"""
    thread = np.arange(64)
    expected = np.where(thread < 10, 1000, thread + 1000)
    assert (run(call, top=function, gpu_options=schedule) == expected).all()


def test_traps():
    with pytest.raises(errors.Trap, match="thread 3 of block 0"):
        run("setp.eq.u32 %p1, %r0, 3; @%p1 trap;")


# ---- memory


def test_atomics(schedule):
    x = np.random.default_rng(2).integers(-1000, 1000, 256).astype(i32)
    body = f"""{GLOBAL_INDEX} mad.wide.u32 %rd2, %r0, 4, %rd0; ld.global.s32 %r4, [%rd2]; cvt.rn.f32.s32 %f0, %r4;
  red.global.add.s32 [%rd1], %r4; red.global.max.s32 [%rd1+4], %r4; red.global.min.s32 [%rd1+8], %r4;
  red.global.and.b32 [%rd1+12], %r4; red.global.or.b32 [%rd1+16], %r4; red.global.xor.b32 [%rd1+20], %r4;
  atom.global.exch.b32 %r5, [%rd1+24], %r0; atom.global.cas.b32 %r5, [%rd1+28], -5, 77;
  red.global.add.f32 [%rd1+32], %f0; atom.global.inc.u32 %r5, [%rd1+36], 99;
  mov.u32 %r6, s; and.b32 %r7, %r4, 7; mad.lo.u32 %r6, %r7, 4, %r6;
  setp.lt.u32 %p1, %r9, 8; mov.u32 %r8, s; mad.lo.u32 %r8, %r9, 4, %r8; @%p1 st.shared.u32 [%r8], 0; bar.sync 0;
  atom.shared.add.u32 %r5, [%r6], 1; bar.sync 0;
  mad.wide.u32 %rd3, %r9, 4, %rd1; @%p1 ld.shared.u32 %r5, [%r8]; @%p1 red.global.add.u32 [%rd3+40], %r5;"""
    start = np.zeros(18, i32)
    start[3], start[6:8] = -1, (-1, -5)
    with emulated_gpu(**schedule) as gpu:
        y = gpu.array(start)
        launch(image(body, SHARED_WORDS), gpu.array(x), y, threads=64, blocks=4)
        got = gpu.get(y)
    reductions = [np.bitwise_and, np.bitwise_or, np.bitwise_xor]
    assert got[:6].tolist() == [x.sum(), max(x.max(), 0), min(x.min(), 0), *(f.reduce(x) for f in reductions)]
    assert 0 <= got[6] < 256 and got[7] == 77 and got[8:9].view(f32)[0] == x.sum() and got[9] == 256 % 100
    assert (got[10:] == np.bincount(x & 7, minlength=8)).all()


def test_vector_and_narrow_accesses():
    x = np.arange(256, dtype=u32).reshape(64, 4)
    body = """mad.wide.u32 %rd2, %r0, 16, %rd0; mad.wide.u32 %rd3, %r0, 16, %rd1;
  ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd2]; ld.global.cs.v2.b64 {%rd4, %rd5}, [%rd2];
  ld.global.u8 %r5, [%rd2+1]; ld.global.s16 %r6, [%rd2+2]; add.u32 %r1, %r1, %r5; add.u32 %r1, %r1, %r6;
  cvt.u32.u64 %r7, %rd5; sub.u32 %r7, %r7, %r3; add.u32 %r2, %r2, %r7;
  st.global.v4.b32 [%rd3], {%r1, %r2, %r3, %r4};"""
    assert (run(body, x, count=256, threads=64).reshape(64, 4) == x).all()


def test_noncoherent_reads_of_written_memory():
    body = f"""mad.wide.u32 %rd2, %r0, 4, %rd0; st.global.u32 [%rd2], %r0; ld.global{{}}.u32 %r3, [%rd2]; {STORE_R3}"""
    x = np.zeros(64, u32)
    assert (run(body.format(""), x) == np.arange(64)).all()
    with pytest.raises(errors.NonCoherentRead):
        run(body.format(".nc"), x)
    before = f"mad.wide.u32 %rd2, %r0, 4, %rd0; ld.global.nc.u32 %r3, [%rd2]; st.global.u32 [%rd2], %r0; {STORE_R3}"
    assert (run(before, x) == 0).all()


def test_generic_addresses():
    body = f"""mov.u64 %rd4, s; cvta.shared.u64 %rd4, %rd4; mad.wide.u32 %rd5, %r0, 4, %rd4; st.u32 [%rd5], %r0;
  and.b32 %r4, %r0, 1; setp.eq.u32 %p1, %r4, 0; mad.wide.u32 %rd2, %r0, 4, %rd0; selp.b64 %rd6, %rd5, %rd2, %p1;
  ld.u32 %r3, [%rd6]; isspacep.shared %p2, %rd6; @!%p2 add.u32 %r3, %r3, 1000; {STORE_R3}"""
    thread = np.arange(64)
    got = run(body, np.arange(64, dtype=u32) * 2, top=SHARED_WORDS)
    assert (got == np.where(thread % 2 == 0, thread, thread * 2 + 1000)).all()


ASYNC = """mov.u32 %r1, s; mad.lo.u32 %r2, %r0, 16, %r1; mul.wide.u32 %rd4, %r0, 16;
  add.u64 %rd2, %rd0, %rd4; add.u64 %rd3, %rd1, %rd4;
  cp.async.cg.shared.global [%r2], [%rd2], 16SIZE; cp.async.commit_group;
  WAIT
  xor.b32 %r3, %r0, 63; mad.lo.u32 %r3, %r3, 16, %r1; ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r3];
  st.global.v4.b32 [%rd3], {%r4, %r5, %r6, %r7};"""


def asynchronous(wait, size=""):
    x = np.arange(256, dtype=u32)
    body = ASYNC.replace("WAIT", wait).replace("SIZE", size)
    return run(body, x, count=256, top=SHARED_WORDS, threads=64).reshape(64, 4)[::-1]


def test_asynchronous_copies():
    x = np.arange(256).reshape(64, 4)
    assert (asynchronous("cp.async.wait_group 0; bar.sync 0;") == x).all()
    partly = asynchronous("cp.async.wait_all; bar.sync 0;", ", 8")
    assert (partly[:, :2] == x[:, :2]).all() and not partly[:, 2:].any()
    for wait in ("bar.sync 0;", "cp.async.wait_group 1; bar.sync 0;"):
        with pytest.raises(errors.UninitialisedRead, match="not waited for"):
            asynchronous(wait)
    for too_late in ("cp.async.wait_all;", "bar.sync 0; cp.async.wait_all;"):
        with pytest.raises(errors.SharedRace):
            asynchronous(too_late)


def test_what_is_copied_may_not_be_written_before_it_arrives():
    """With a random schedule, results depend on it."""
    x = np.arange(256, dtype=u32)
    body = ASYNC.replace("SIZE", "").replace("WAIT", "st.global.u32 [%rd2], 1000; cp.async.wait_all; bar.sync 0;")
    found = [
        run(body, x, count=256, top=SHARED_WORDS, threads=64, gpu_options={"seed": seed}).reshape(64, 4)[::-1]
        for seed in (None, 0)
    ]
    assert (found[0] == x.reshape(64, 4)).all()
    assert (found[1][:, 0] == 1000).all() and (found[1][:, 1:] == x.reshape(64, 4)[:, 1:]).all()


def test_hints_do_nothing():
    body = f"""createpolicy.fractional.L2::evict_first.b64 %rd4, 1.0; prefetch.global.L2 [%rd0]; griddepcontrol.wait;
  fence.acq_rel.gpu; membar.gl; nanosleep.u32 20; ld.global.nc.L1::no_allocate.L2::128B.u32 %r3, [%rd0];
  ld.global.L2::cache_hint.u32 %r4, [%rd0], %rd4; ld.relaxed.gpu.global.u32 %r5, [%rd0];
  ld.volatile.global.u32 %r6, [%rd0]; griddepcontrol.launch_dependents; {STORE_R3}"""
    assert (run(body, np.array([9], u32)) == 9).all()


# ---- the grid and clusters


def test_special_registers():
    body = """mov.u32 %r1, %cluster_ctarank; mov.u32 %r2, %clusterid.x; mov.u32 %r3, %nclusterid.x;
  mov.u32 %r4, %cluster_nctaid.x; mov.u32 %r5, %ctaid.x; mov.u32 %r6, %nctaid.x; mov.u32 %r7, %laneid;
  mov.u32 %r8, %lanemask_lt; mov.u32 %r10, %ntid.x; mov.u32 %r11, %ntid.y; mov.u32 %r12, %ctaid.y;
  mad.lo.u32 %r9, %r5, %r10, %r0; mul.wide.u32 %rd2, %r9, 32; add.u64 %rd2, %rd2, %rd1;
  sub.u32 %r11, %r11, 1; add.u32 %r8, %r8, %r11; add.u32 %r8, %r8, %r12;
  st.global.v4.u32 [%rd2], {%r1, %r2, %r3, %r4}; st.global.v4.u32 [%rd2+16], {%r5, %r6, %r7, %r8};
  bar.sync 0; shfl.sync.down.b32 %r13, %r0, 1, 31, 0xffffffff;"""
    block, thread = np.divmod(np.arange(600), 100)
    expected = [block % 2, block // 2, 3, 2, block, 6, thread % 32, (1 << thread % 32) - 1]
    for lanes in (32, 256, 1000, 4096):
        got = run(body, count=4800, threads=100, blocks=6, cluster=2, gpu_options={"max_lanes": lanes})
        got = got.reshape(600, 8).T
        for k, column in enumerate(expected):
            assert (got[k] == column).all()


CLUSTER = f"""{GLOBAL_INDEX} mov.u32 %r1, s; setp.eq.u32 %p1, %r9, 0; mov.u32 %r4, %cluster_ctarank;
  add.u32 %r5, %r0, 7; @%p1 st.shared.u32 [%r1], %r5;
  BEFORE
  xor.b32 %r6, %r4, 1; mapa.shared::cluster.u32 %r2, %r1, %r6; ld.shared::cluster.u32 %r3, [%r2];
  AFTER
  {STORE_R3}"""
CLUSTER_BARRIER = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"


def cluster(before, after, **gpu_options):
    body = CLUSTER.replace("BEFORE", before).replace("AFTER", after)
    return run(body, count=256, top=SHARED_WORD, threads=64, blocks=4, cluster=2, gpu_options=gpu_options)


def test_distributed_shared_memory(schedule):
    expected = np.repeat([64, 0, 192, 128], 64) + 7
    assert (cluster(CLUSTER_BARRIER, CLUSTER_BARRIER, **schedule) == expected).all()
    with pytest.raises((errors.ClusterError, errors.UninitialisedRead)):
        cluster("", CLUSTER_BARRIER, **schedule)
    with pytest.raises(errors.ClusterError, match="may exit before|has exited"):
        cluster(CLUSTER_BARRIER, "", **schedule)
    with pytest.raises(errors.BarrierError, match="twice without a wait"):
        run(f"barrier.cluster.arrive; {CLUSTER_BARRIER}", gpu_options=schedule)
    with pytest.raises(errors.BarrierError, match="different aligned"):
        branch = "setp.ge.u32 %p2, %r0, 40; @%p2 bra X; barrier.cluster.arrive.aligned; bra Y;"
        run(f"{branch} X: barrier.cluster.arrive.aligned; Y: barrier.cluster.wait.aligned;", gpu_options=schedule)
    with pytest.raises(errors.BarrierError, match="without an arrive"):
        run("barrier.cluster.wait;", gpu_options=schedule)


def test_what_was_read_before_a_barrier_of_the_cluster(schedule):
    """A warp may write what it alone has read since."""
    body = f"""{GLOBAL_INDEX} mov.u32 %r1, s; setp.eq.u32 %p1, %r9, 0; mov.u32 %r4, 5; @%p1 st.shared.u32 [%r1], %r4;
      bar.sync 0; ld.shared.u32 %r3, [%r1]; BARRIER setp.ge.u32 %p2, %r9, 32; @%p2 bra DONE;
      ld.shared.u32 %r3, [%r1]; bar.warp.sync 0xffffffff; @%p1 st.shared.u32 [%r1], %r3;
      DONE: {STORE_R3}"""
    options = {"count": 256, "top": SHARED_WORD, "threads": 64, "blocks": 4, "cluster": 2, "gpu_options": schedule}
    assert (run(body.replace("BARRIER", CLUSTER_BARRIER), **options) == 5).all()
    with pytest.raises(errors.SharedRace, match="read by"):
        run(body.replace("BARRIER", ""), **options)


def test_ranks_outside_the_cluster():
    body = CLUSTER.replace("BEFORE", "").replace("AFTER", "")
    with pytest.raises(errors.ClusterError, match="rank 1 in a cluster of 1"):
        run(body, count=64, top=SHARED_WORD)


def test_a_required_cluster_size():
    text = HEADER.format(target="sm_90") + ".visible .entry kernel(.param .u64 x) .reqnctapercluster 2 { ret; }"
    with emulated_gpu() as gpu:
        x = gpu.array(np.zeros(1))
        launch(HandwrittenImage(text), x, blocks=4, cluster=2)
        with pytest.raises(errors.InvalidLaunch, match="clusters of"):
            launch(HandwrittenImage(text), x, blocks=4)
