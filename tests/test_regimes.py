"""The regimes of kernels/cuda/plan.py: which one a shape gets, what it reads and writes; all give the same bits."""

import dataclasses
import mmap
import tempfile

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

import gpusoftmax
from gpusoftmax.kernels.cuda import driver, launch, plan
from gpusoftmax.kernels.cuda.plan import MAX_THREADS, row_plan, tree_of
from tests import inputs, tolerances
from tests.calls import EVERY_FIELD
from tests.emulator import emulated_gpu

OPERATIONS = {
    "softmax": lambda x, y: (gpusoftmax.softmax(x),),
    "softmax_backward": lambda x, y: (gpusoftmax.softmax_backward(x, x),),
    "log_softmax": lambda x, y: (gpusoftmax.log_softmax(x),),
    "log_softmax_backward": lambda x, y: (gpusoftmax.log_softmax_backward(x, x),),
    "logsumexp": lambda x, y: (gpusoftmax.logsumexp(x),),
    "argmax": lambda x, y: (gpusoftmax.argmax(x),),
    "soft_argmax": lambda x, y: (gpusoftmax.soft_argmax(x),),
    "soft_argmax_backward": lambda x, y: (
        gpusoftmax.soft_argmax_backward(x, gpusoftmax.soft_argmax(x), gpusoftmax.logsumexp(x)),
    ),
    "cross_entropy": lambda x, y: gpusoftmax.cross_entropy_with_grad(x, y, reduction="none", validate=False),
    "smoothed_cross_entropy": lambda x, y: gpusoftmax.cross_entropy_with_grad(
        x, y, reduction="none", label_smoothing=0.1, validate=False
    ),
    "soft_cross_entropy": lambda x, y: gpusoftmax.cross_entropy_with_grad(x, x, reduction="none", z_loss=0.01),
    "cross_entropy_backward": lambda x, y: (gpusoftmax.cross_entropy_backward(x, y, *_gradients(x)),),
    "kl_div": lambda x, y: gpusoftmax.kl_div_with_grad(
        x, gpusoftmax.log_softmax(x, temperature=0.7), reduction="none", target_grad=True
    ),
    "token_logprobs": lambda x, y: gpusoftmax.token_logprobs(x, y, **EVERY_FIELD),
    "top_logprobs": lambda x, y: gpusoftmax.top_logprobs(x, 5),
    "topk_softmax": lambda x, y: gpusoftmax.topk_softmax(x, 5),
    "token_logprobs_backward": lambda x, y: (gpusoftmax.token_logprobs_backward(x, y, *_gradients(x)),),
    "sample": lambda x, y: (gpusoftmax.sample(x, rng=y),),
    "top_p_mask_logits": lambda x, y: (gpusoftmax.top_p_mask_logits(x, 0.9),),
    "limited_sample": lambda x, y: (gpusoftmax.sample(x, rng=y, top_k=40, top_p=0.9, min_p=1e-3),),
    "mixed_sample": lambda x, y: (
        gpusoftmax.sample(x, rng=y, temperature=gpusoftmax.logsumexp(x), top_k=y, top_p=0.9),
    ),
}
FIRST_OPERATIONS = {
    *("softmax", "softmax_backward", "log_softmax", "log_softmax_backward", "logsumexp"),
    *("cross_entropy", "smoothed_cross_entropy"),
}


def _gradients(x):
    """Those of two results of a row, taken from the logits."""
    return (gpusoftmax.logsumexp(x),) * 2


def run(name, logits, arch="sm_90", **options):
    """(results, plan, counts of reads of the logits, Stats)"""
    with emulated_gpu(arch, **options) as gpu:
        x, y = gpu.array(logits), gpu.array(inputs.targets(*logits.shape))
        results = [np.asarray(part) for part in gpu.get(OPERATIONS[name](x, y))]
        reads = gpu.reads(x) if options.get("track", True) else None
        return results, gpu.stats[-1].plan, reads, gpu.stats[-1]


# ---------------------------------------------------------------- which one


@pytest.mark.parametrize(
    ("n_rows", "n_cols", "dtype", "arch", "passes", "regime"),
    [
        (1000, 1000, "float32", "sm_90", 2, "short"),
        (1000, 8192, "float32", "sm_90", 2, "held"),
        (1000, 32000, "bfloat16", "sm_90", 2, "held"),
        (1000, 50257, "float32", "sm_90", 2, "cluster"),
        (1000, 128256, "bfloat16", "sm_90", 2, "cluster"),
        (1000, 262144, "float32", "sm_90", 2, "cluster"),
        (1000, 524288, "bfloat16", "sm_90", 2, "cluster"),
        (1000, 1048576, "bfloat16", "sm_90", 2, "online"),
        (1000, 524288, "float32", "sm_90", 2, "online"),
        (5500, 1048576, "float32", "sm_90", 1, "held"),
        (1000, 50257, "float32", "sm_80", 2, "online"),
        (1000, 32000, "bfloat16", "sm_80", 2, "held"),
        (1, 32000, "bfloat16", "sm_90", 2, "cluster"),
    ],
)
def test_choice(n_rows, n_cols, dtype, arch, passes, regime):
    chosen = row_plan(n_rows, n_cols, (dtype,), "float32", arch, 132, passes)
    assert chosen.regime == regime
    assert chosen.held == (regime != "online")


@pytest.mark.parametrize(("n_cols", "warps"), [(4096, 1), (5000, 2), (8192, 2), (32000, 4), (1 << 20, 4)])
def test_a_warp_takes_four_chunks_of_a_row_where_there_are_rows_for_all(n_cols, warps):
    many = row_plan(1 << 20, n_cols, ("bfloat16",), "float32", "sm_90", 132, 1)
    assert many.threads == 32 * warps and many.cluster == 1
    few = row_plan(132, n_cols, ("bfloat16",), "float32", "sm_90", 132, 1)
    assert few.threads * few.cluster >= min(256, 32 * tree_of(n_cols, "float32").n_chunks)


def test_rows_are_shared_until_the_device_is_filled_often():
    """The last blocks leave little of it idle: 512 rows would not fill it once."""
    chosen = row_plan(512, 1 << 20, ("bfloat16",), "float32", "sm_90", 132, 1)
    assert chosen.threads == 128 and chosen.blocks >= 3 * 6 * 132
    assert row_plan(2500, 1 << 20, ("bfloat16",), "float32", "sm_90", 132, 1).cluster == 1


def test_clusters_of_16_give_way_to_8_where_they_have_no_room(monkeypatch):
    """On a part of a GPU. Any row has the same bits in either, and the device is asked once."""
    logits, asked = inputs.make("spread", (1, 200_000), np.float32), []
    expected, chosen, _, _ = run("softmax", logits)
    assert chosen.cluster == 16
    with emulated_gpu("sm_90", track=False) as gpu:
        launch = driver.launch

        def refuse_large(kernel, plan, stream, words):
            asked.append(plan.cluster)
            if plan.cluster > 8:
                raise driver.ClusterDoesNotFit
            launch(kernel, plan, stream, words)

        monkeypatch.setattr(driver, "launch", refuse_large)
        x = gpu.array(logits)
        found = [gpu.get(gpusoftmax.softmax(x)) for _ in range(2)]
    assert asked == [16, 8, 8]
    assert found[0].tobytes() == found[1].tobytes() == expected[0].tobytes()


@pytest.mark.gpu
def test_a_whole_gpu_has_room_for_clusters_of_16():
    """Else long rows would be read twice, and nothing would tell."""
    cupy = pytest.importorskip("cupy")
    device = driver.device(0)
    if device.arch not in ("sm_90", "sm_100") or device.multiprocessors < 100:
        pytest.skip("a GPU without clusters of 16, or a part of one")
    gpusoftmax.softmax(cupy.zeros((1, 200_000), "float32"))
    assert device.largest_cluster == 16


@pytest.mark.parametrize("compute", ["float32", "float64"])
@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"])
def test_every_plan_can_be_launched(arch, compute):
    """Any shape: threads, blocks, shared memory and clusters are what the device has, and every chunk is somebody's."""
    limits = plan.limits_of(arch)
    formats = ["float64"] if compute == "float64" else ["float16", "float32"]
    for n_cols in (1, 31, 512, 513, 1025, 5000, 50257, 151936, 2**20, 2**20 + 1, 5 * 10**6, 2**31):
        tree = tree_of(n_cols, compute)
        assert tree.n_chunks * tree.chunk_cols >= n_cols > (tree.n_chunks - 1) * tree.chunk_cols
        for n_rows in (1, 16, 300, 2**33):
            for dtype in formats:
                for sources, passes in ((1, 1), (1, 2), (2, 2)):
                    one = row_plan(n_rows, n_cols, (dtype,) * sources, compute, arch, 132, passes)
                    assert one.chunk_cols == tree.chunk_cols
                    assert one.threads <= MAX_THREADS and one.threads % 32 == 0
                    assert 0 < one.blocks <= plan.MAX_BLOCKS and one.blocks % one.cluster == 0
                    assert one.cluster <= limits.cluster
                    assert one.shared_bytes <= limits.block_bytes
                    assert 0 < one.rows <= n_rows


# ---------------------------------------------------------------- traffic


@pytest.mark.parametrize(
    ("name", "n_rows", "n_cols", "dtype"),
    [
        ("softmax", 3, 1024, "float32"),
        ("log_softmax", 2, 4096, "float32"),
        ("cross_entropy", 1, 33 * 1024, "bfloat16"),
        ("logsumexp", 1, 9 * 1024, "bfloat16"),
    ],
)
def test_aligned_rows_are_read_once_in_whole_sectors(name, n_rows, n_cols, dtype):
    logits = inputs.make("spread", (n_rows, n_cols), dtype, seed=1)
    _, chosen, reads, stats = run(name, logits)
    assert chosen.held
    if name == "cross_entropy":  # the label's logit once more
        assert (reads == 2).sum() == n_rows
        reads = np.minimum(reads, 1)
    assert (reads == 1).all()
    moved = stats.read["global"] + stats.written["global"]
    assert moved / (32 * sum(stats.sectors.values())) >= 0.95


@pytest.mark.parametrize(("n_cols", "dtype"), [(1001, "float32"), (5003, "bfloat16")])
def test_rows_at_any_alignment_are_moved_by_16_bytes(n_cols, dtype):
    """No two rows begin at the same distance from a boundary. Granules that two pieces share are read by both."""
    logits = inputs.make("spread", (3, n_cols), dtype, seed=1)
    _, _, reads, stats = run("softmax", logits)
    assert reads.min() == 1 and reads.max() <= 2 and reads.mean() < 1.01
    accesses = {op: count for op, count in stats.instructions.items() if op.startswith(("cp.async.cg", "st.global"))}
    vectors = sum(count for op, count in accesses.items() if ".v4" in op or op.startswith("cp.async"))
    assert vectors > 0.9 * 2 * logits.nbytes / 16


def test_what_is_not_held_is_read_again_and_no_more(monkeypatch):
    """A warp of two slots with four pieces: the first pass leaves two of them, the last one fetches the others."""
    logits = inputs.make("spread", (1, 8 * 1024), "float32", seed=1)
    force(monkeypatch, cluster=1, warps=2, slots=2)
    _, chosen, reads, _ = run("softmax", logits)
    assert chosen.split.slots == 2
    assert (reads == 2).sum() == 4 * 1024 and (reads == 1).sum() == 4 * 1024


# ---------------------------------------------------------------- bits


def force(monkeypatch, cluster, warps, slots):
    """Rows of several chunks are launched like this from now on."""

    def forced(n_rows, n_cols, formats, *rest):
        one = row_plan(n_rows, n_cols, formats, *rest)
        split = one.split._replace(cluster=cluster, slots=slots)
        return dataclasses.replace(
            one,
            threads=warps * 32,
            cluster=cluster,
            blocks=one.rows * cluster,
            shared_bytes=split.first_slot + warps * slots * len(formats) * split.slot_bytes,
            split=split,
        )

    monkeypatch.setattr(launch, "row_plan", forced)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_warp_has_all_chunks_and_the_last_ends_within_a_granule(monkeypatch, dtype):
    """The chunk before it needs that granule, too, where rows begin beside a boundary."""
    logits = inputs.make("spread", (3, 3 * 1024 + 1), dtype, seed=1)
    want, *_ = run("softmax", logits)
    force(monkeypatch, cluster=1, warps=1, slots=4)
    got, *_ = run("softmax", logits)
    assert got[0].tobytes() == want[0].tobytes()


# (blocks of a row, warps of a block, slots of a warp), for 18 chunks: held by one block, read twice by one block, a
# cluster that holds the row, clusters of 8 and 16, and one that holds a part of it.
WAYS = [(1, 8, 3), (1, 4, 1), (2, 3, 3), (8, 2, 2), (16, 1, 2), (4, 2, 1)]


def in_either_format(name):
    """bfloat16 by default for the first ops, float32 for the others: other tests compile these kernels too."""
    usual = "bfloat16" if name in FIRST_OPERATIONS else "float32"
    for dtype in ("bfloat16", "float32"):
        yield pytest.param(name, dtype, marks=[] if dtype == usual else pytest.mark.matrix)


@pytest.mark.parametrize(("name", "dtype"), [case for name in OPERATIONS for case in in_either_format(name)])
def test_regimes_agree(monkeypatch, name, dtype):
    """One tree of chunks: whoever computes them, and whether they are held or read again.

    The second and the third row are confident, the third with its maximum in two chunks: those are looked at again.
    """
    logits = inputs.make("spread", (3, 17 * 1024 + 77), dtype, seed=2)
    logits[1:, 5000] = 60
    logits[2, 17 * 1024 + 5] = 60
    expected = None
    for cluster, warps, slots in WAYS:
        force(monkeypatch, cluster, warps, slots)
        results, chosen, _, _ = run(name, logits, track=False)
        assert chosen.cluster == cluster and chosen.threads == 32 * warps
        found = [part.tobytes() for part in results]
        expected = expected or found
        assert found == expected, (cluster, warps, slots)


def test_distances_do_not_depend_on_who_has_met_a_masked_logit(monkeypatch):
    """Whoever has, gives exponents a floor from there on."""
    logits = inputs.make("spread", (2, 17 * 1024 + 77), "bfloat16", seed=2)
    logits[0, 3000] = -np.inf
    found = []
    for cluster, warps, slots in WAYS:
        force(monkeypatch, cluster, warps, slots)
        results, _, _, _ = run("token_logprobs", logits, track=False)
        found.append([part.tobytes() for part in results])
    assert found.count(found[0]) == len(WAYS)
    tolerances.check_entropy(results[2], logits)


@pytest.mark.parametrize("softcap", [None, 9.0])
def test_columns_from_n_valid_on_are_not_read(monkeypatch, softcap):
    """Whoever has them, and where the row is read twice: they are -inf in the slots."""
    n_cols, n_valid = 17 * 1024 + 77, np.array([5005, 17 * 1024 + 70])
    logits = inputs.make("spread", (2, n_cols), "float32", seed=4)
    logits[:, n_valid[1] :] = np.nan
    logits[0, n_valid[0] :] = np.nan
    found = []
    for cluster, warps, slots in WAYS:
        force(monkeypatch, cluster, warps, slots)
        with emulated_gpu("sm_90") as gpu:
            x = gpu.array(logits)
            probs = gpu.get(gpusoftmax.softmax(x, n_valid=gpu.array(n_valid), softcap=softcap))
            reads = gpu.reads(x)
        for row, count in enumerate(n_valid):
            assert (reads[row, :count] >= 1).all() and (reads[row, count:] == 0).all(), (cluster, warps, slots)
            assert (probs[row, count:] == 0).all() and probs[row].sum() == pytest.approx(1)
        found.append(probs.tobytes())
    assert found.count(found[0]) == len(WAYS)


@pytest.mark.parametrize(("dtype", "softcap"), [("bfloat16", None), ("float32", 9.0)])
def test_transformed_logits_are_left_where_they_stay(monkeypatch, dtype, softcap):
    """They go through their transform once where a row is held, and twice where it is read twice or lies elsewhere."""
    n_cols = 17 * 1024 + 80
    logits = inputs.make("spread", (2, n_cols + 8), dtype, seed=5)
    mask = np.random.default_rng(5).random((2, n_cols)) < 0.5
    found = []
    for cluster, warps, slots in WAYS:
        force(monkeypatch, cluster, warps, slots)
        for shift in (0, 3):
            with emulated_gpu("sm_90", track=False) as gpu:
                x = gpu.array(np.roll(logits, shift, axis=1)[:, shift : shift + n_cols])
                probs = gpu.get(gpusoftmax.softmax(x, mask=gpu.array(mask), softcap=softcap))
            found.append(np.ascontiguousarray(probs).tobytes())
    assert found.count(found[0]) == len(found)
    assert (probs[~mask] == 0).all() and (probs[mask] > 0).any()


@pytest.mark.parametrize("name", OPERATIONS)
def test_schedule_of_a_cluster(monkeypatch, name):
    """Warps and blocks in an order drawn anew with each seed; slots are filled twice."""
    logits = inputs.make("spread", (1, 11 * 1024 + 5), "float32", seed=3)
    force(monkeypatch, cluster=2, warps=2, slots=2)
    results = [run(name, logits, track=False, seed=seed)[0] for seed in (None, 1)]
    assert [part.tobytes() for part in results[0]] == [part.tobytes() for part in results[1]]


def test_a_row_is_looked_at_again_where_it_is_confident(monkeypatch):
    """Only the chunk that has the maximum, and only where its sum does not tell: it has left its slot, and is back for
    the last pass.
    """
    logits = inputs.make("flat", (2, 8 * 1024), "float32", seed=1)
    logits[1, 1500] = 40
    force(monkeypatch, cluster=1, warps=2, slots=2)
    results, _, reads, _ = run("log_softmax", logits)
    again = np.arange(8 * 1024) // 1024
    # Of the four pieces of a warp, two are read twice; the second row's second chunk once more, and what it displaced.
    assert (reads[0] == np.where(again < 4, 2, 1)).all()
    assert (reads[1] == np.select([again == 1, again == 5, again < 4], [3, 2, 2], 1)).all()
    tolerances.check_log_softmax(results[0], logits)


def test_chunks_of_several_pieces(monkeypatch):
    """Rows too long for a chunk per piece, made short by a smaller limit: sums as accurate, every logit counted."""
    monkeypatch.setattr(plan, "MAX_CHUNKS", 4)
    plan.tree_of.cache_clear()
    row_plan.cache_clear()
    try:
        logits = inputs.make("spread", (3, 9 * 1024 + 3), "float32", seed=4)
        logits[2, 3333] = 60
        target = inputs.targets(*logits.shape)
        with emulated_gpu("sm_90", track=False) as gpu:
            x = gpu.array(logits)
            lse = gpu.get(gpusoftmax.logsumexp(x))
            scores = gpu.get(gpusoftmax.token_logprobs(x, gpu.array(target), **EVERY_FIELD))
            chosen = gpu.stats[-1].plan
    finally:
        plan.tree_of.cache_clear()
        row_plan.cache_clear()
    assert chosen.split.piece_bits == 2
    tolerances.check_logsumexp(lse, logits)
    tolerances.check_entropy(scores[2], logits)
    assert np.array_equal(scores[3], 1 + (logits > logits[np.arange(3), target][:, None]).sum(axis=1))
    assert np.array_equal(scores[4], logits.argmax(axis=1))


@pytest.mark.parametrize("n_cols", [200, 2000])
def test_rows_far_apart(n_cols):
    """2^31 elements apart, in a file of which only the touched pages exist, read and written in place."""
    rows, distance = inputs.make("spread", (2, n_cols), "float16", seed=5), 2**31 + 8
    with tempfile.TemporaryFile() as file:
        file.truncate(2 * (distance + n_cols))
        memory = np.frombuffer(mmap.mmap(file.fileno(), 0), np.float16)
        apart = as_strided(memory, rows.shape, (2 * distance, 2))
        apart[...] = rows
        with emulated_gpu("sm_90", track=False) as gpu:
            x = gpu.array(apart)
            probs = gpu.get(gpusoftmax.softmax(x, out=x))
    tolerances.check_softmax(probs, rows)
