"""Rows that lie side by side in memory (axis != -1): which take that way, their traffic, bits and results."""

import dataclasses
import mmap
import tempfile

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

import gpusoftmax
from gpusoftmax import _dry_run
from gpusoftmax.kernels.cuda import launch, plan
from gpusoftmax.kernels.cuda.plan import OF_A_BATCH, SECTOR_BYTES, row_plan, tree_of
from tests import inputs, oracle, tolerances
from tests.calls import same_bits
from tests.emulator import emulated_gpu

# Each takes logits, a gradient of their shape, labels, the axis; the logits serve as (log-)probabilities, too.
OPERATIONS = {
    "softmax": lambda x, g, y, axis: (gpusoftmax.softmax(x, axis),),
    "softmax_backward": lambda x, g, y, axis: (gpusoftmax.softmax_backward(x, g, axis),),
    "log_softmax": lambda x, g, y, axis: (gpusoftmax.log_softmax(x, axis),),
    "log_softmax_backward": lambda x, g, y, axis: (gpusoftmax.log_softmax_backward(x, g, axis),),
    "logsumexp": lambda x, g, y, axis: (gpusoftmax.logsumexp(x, axis),),
    "argmax": lambda x, g, y, axis: (gpusoftmax.argmax(x, axis),),
    "soft_argmax": lambda x, g, y, axis: (gpusoftmax.soft_argmax(x, axis),),
    "soft_argmax_backward": lambda x, g, y, axis: _soft_argmax_backward(x, g, axis),
    "cross_entropy": lambda x, g, y, axis: (
        gpusoftmax.cross_entropy(x, y, axis=axis, reduction="none", validate=False),
    ),
    "cross_entropy_with_grad": lambda x, g, y, axis: gpusoftmax.cross_entropy_with_grad(
        x, y, axis=axis, reduction="none", validate=False
    ),
    "smoothed_cross_entropy": lambda x, g, y, axis: gpusoftmax.cross_entropy_with_grad(
        x, y, axis=axis, reduction="none", label_smoothing=0.1, validate=False
    ),
    "kl_div": lambda x, g, y, axis: gpusoftmax.kl_div_with_grad(x, g, axis=axis, reduction="none", target_grad=True),
    "sample": lambda x, g, y, axis: (gpusoftmax.sample(x, axis, rng=y),),
    "top_p_mask_logits": lambda x, g, y, axis: (gpusoftmax.top_p_mask_logits(x, 0.9, axis),),
    "limited_sample": lambda x, g, y, axis: (gpusoftmax.sample(x, axis, rng=y, top_k=40, top_p=0.9),),
}
CHECKS = {
    "softmax": lambda got, x, g, y, axis: tolerances.check_softmax(got[0], x, axis),
    "softmax_backward": lambda got, x, g, y, axis: tolerances.check_softmax_backward(got[0], x, g, axis),
    "log_softmax": lambda got, x, g, y, axis: tolerances.check_log_softmax(got[0], x, axis),
    "log_softmax_backward": lambda got, x, g, y, axis: tolerances.check_log_softmax_backward(got[0], x, g, axis),
    "logsumexp": lambda got, x, g, y, axis: tolerances.check_logsumexp(got[0], x, axis),
    "argmax": lambda got, x, g, y, axis: np.testing.assert_array_equal(got[0], oracle.argmax(x, axis)),
    "soft_argmax_backward": lambda got, x, g, y, axis: tolerances.check_soft_argmax_backward(got[0], x, *got[1:], axis),
    "soft_argmax": lambda got, x, g, y, axis: tolerances.check_soft_argmax(got[0], x, axis),
    "cross_entropy": lambda got, x, g, y, axis: _check_losses(got, x, y, axis, 0.0),
    "cross_entropy_with_grad": lambda got, x, g, y, axis: _check_losses(got, x, y, axis, 0.0),
    "smoothed_cross_entropy": lambda got, x, g, y, axis: _check_losses(got, x, y, axis, 0.1),
    "kl_div": lambda got, x, g, y, axis: _check_divergences(got, x, g, axis),
    "sample": lambda got, x, g, y, axis: np.testing.assert_array_equal(got[0], gpusoftmax.sample(x, axis, rng=y)),
    # As float32: NumPy does not take two NaN of bfloat16 for equal.
    "top_p_mask_logits": lambda got, x, g, y, axis: np.testing.assert_array_equal(
        *(one.astype(np.float32) for one in (got[0], gpusoftmax.top_p_mask_logits(x, 0.9, axis)))
    ),
    "limited_sample": lambda got, x, g, y, axis: np.testing.assert_array_equal(
        got[0], gpusoftmax.sample(x, axis, rng=y, top_k=40, top_p=0.9)
    ),
}


def _check_divergences(got, x, g, axis):
    tolerances.check_kl_div(got[0], x, g, axis=axis, reduction="none")
    tolerances.check_kl_div_grads(*got[1:], x, g, axis=axis, reduction="none")


def _soft_argmax_backward(x, g, axis):
    numbers = gpusoftmax.soft_argmax(x, axis), gpusoftmax.logsumexp(g, axis)
    return gpusoftmax.soft_argmax_backward(x, *numbers, axis), *numbers


def _check_losses(got, x, y, axis, label_smoothing):
    options = {"axis": axis, "reduction": "none", "label_smoothing": label_smoothing}
    tolerances.check_loss(got[0], x, y, **options)
    if len(got) == 2:
        tolerances.check_dlogits(got[1], x, y, **options)


def run(name, arrays, axis, arch="sm_90", **options):
    """(results, plan, counts of reads of the logits, Stats)"""
    with emulated_gpu(arch, **options) as gpu:
        given = [gpu.array(array) for array in arrays]
        results = tuple(np.asarray(gpu.get(part)) for part in OPERATIONS[name](*given, axis))
        rows = next(k for k, stats in enumerate(gpu.stats) if stats.plan.regime not in OF_A_BATCH)
        reads = gpu.reads(given[0], rows) if options.get("track", True) else None
        return results, gpu.stats[rows].plan, reads, gpu.stats[rows]


# ---------------------------------------------------------------- which rows


@pytest.mark.parametrize(
    ("shape", "axis", "dtype", "arch", "regime"),
    [
        ((1000, 4096), 0, "float32", "sm_90", "columns"),
        ((64, 1000, 512), 1, "bfloat16", "sm_90", "columns"),
        ((512, 64, 33), 0, "float64", "sm_90", "columns"),
        ((1000, 8), 0, "float32", "sm_90", "columns"),  # a sector of neighbours,
        ((1000, 8), 0, "float16", "sm_90", "short"),  # half of one
        ((1000, 4096), -1, "float32", "sm_90", "held"),
        ((1000, 1), 0, "float32", "sm_90", "short"),
        ((50_000, 4096), 0, "float32", "sm_90", "columns"),
        ((50_000, 32), 0, "float32", "sm_90", "cluster"),  # 4 blocks: less than an eighth of the multiprocessors
        ((2**20, 1024), 0, "float32", "sm_90", "columns"),
        ((2**20, 1024), 0, "float32", "sm_80", "online"),  # the states of all chunks do not fit
    ],
)
def test_choice(shape, axis, dtype, arch, regime):
    (found,) = _dry_run.launches("softmax", shape, dtype, arch, axis=axis)
    assert found.plan.regime == regime


@pytest.mark.parametrize(
    ("n_rows", "n_cols", "dtype", "arch", "passes", "rows", "held"),
    [
        (10**6, 100, "float32", "sm_90", 2, 64, True),
        (1000, 100, "float32", "sm_90", 2, 8, True),  # 125 blocks
        (10**6, 500, "float32", "sm_90", 2, 16, True),
        (10**6, 1000, "float32", "sm_90", 2, 8, True),
        (10**6, 1000, "bfloat16", "sm_90", 2, 16, True),
        (10**6, 5000, "float32", "sm_90", 2, 8, True),
        (10**6, 6100, "float32", "sm_90", 2, 8, True),
        (10**6, 8000, "float32", "sm_90", 2, 8, False),
        (10**6, 8000, "float32", "sm_90", 1, 8, True),
        (10**6, 3000, "float64", "sm_90", 2, 4, True),
        (10**6, 1000, "float32", "sm_75", 2, 8, True),
        (10**6, 2100, "float32", "sm_75", 2, 8, False),
    ],
)
def test_rows_of_a_block(n_rows, n_cols, dtype, arch, passes, rows, held):
    """As many as two blocks of a multiprocessor hold, if that is a block for each; or else a sector of them."""
    compute = "float64" if dtype == "float64" else "float32"
    one = row_plan(n_rows, n_cols, (dtype,), compute, arch, 132, passes, neighbours=n_rows)
    assert one.regime == "columns" and 1 << one.split.row_bits == rows and one.held == held


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_86", "sm_90", "sm_120"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_every_plan_can_be_launched(arch, dtype):
    compute = "float64" if dtype == "float64" else "float32"
    limits, itemsize, found = plan.limits_of(arch), np.dtype(dtype).itemsize, 0
    for n_cols in (0, 1, 31, 128, 129, 512, 513, 1025, 5000, 50257, 2**20 + 1, 2**31):
        tree = tree_of(n_cols, compute)
        for n_rows in (16, 300, 2**20, 2**40):
            for sources, passes in ((1, 1), (1, 2), (2, 2)):
                one = row_plan(n_rows, n_cols, (dtype,) * sources, compute, arch, 132, passes, neighbours=n_rows)
                assert one.shared_bytes <= limits.block_bytes and one.chunk_cols == tree.chunk_cols
                if one.regime != "columns":
                    continue
                split, rows, found = one.split, 1 << one.split.row_bits, found + 1
                assert 32 <= one.threads == rows * tree.lanes <= plan.columns_threads(itemsize, compute)
                assert rows * itemsize >= SECTOR_BYTES
                assert split.slot_bytes >= min(n_cols, tree.piece_cols) * itemsize
                assert 0 < one.blocks <= plan.MAX_BLOCKS and one.rows <= min(n_rows, one.blocks * rows)
                assert one.held == (passes == 1 or split.slots == tree.n_chunks << split.piece_bits)
    assert found


def test_all_arrays_lie_so():
    """The logits side by side, and the results not: column by column, as any rows whose columns are no neighbours."""
    logits = inputs.make("spread", (40, 64), np.float32)
    with emulated_gpu("sm_90", track=False) as gpu:
        x, out = gpu.array(logits), gpu.array(np.zeros((64, 40), np.float32).T)
        elsewhere = gpu.get(gpusoftmax.softmax(x, 0, out=out))
        assert gpu.stats[-1].plan.regime == "short"
        probs = gpu.get(gpusoftmax.softmax(x, 0))
        assert gpu.stats[-1].plan.regime == "columns"
    assert same_bits(probs, np.ascontiguousarray(elsewhere))


# ---------------------------------------------------------------- traffic


@pytest.mark.parametrize(
    ("name", "shape", "axis", "dtype"),
    [
        ("softmax", (100, 64), 0, "float32"),
        ("softmax", (2, 700, 32), 1, "bfloat16"),
        ("logsumexp", (2100, 64), 0, "float32"),
        ("softmax_backward", (1100, 16), 0, "float32"),
    ],
)
def test_rows_are_read_once_in_whole_sectors(name, shape, axis, dtype):
    x = inputs.make("spread", shape, dtype, seed=1)
    _, chosen, reads, stats = run(name, (x, x.copy(), np.zeros(1)), axis, multiprocessors=2)
    assert chosen.regime == "columns" and chosen.held
    assert (reads == 1).all()
    moved = stats.read["global"] + stats.written["global"]
    assert moved / (SECTOR_BYTES * sum(stats.sectors.values())) >= 0.95


def test_what_is_not_held_is_read_again_and_no_more():
    x = inputs.make("spread", (9000, 8), np.float32, seed=1)
    _, chosen, reads, _ = run("softmax", (x, x, np.zeros(1)), 0, multiprocessors=1)
    assert chosen.regime == "columns" and not chosen.held
    kept = 1024 * (chosen.split.slots - 1) + 9000 % 1024  # the last pieces are still there, and the end is shorter
    assert (reads == 1).sum() == 8 * kept and (reads == 2).sum() == 8 * (9000 - kept)


# ---------------------------------------------------------------- bits and results


def make(n_cols, dtype):
    """Rows of every kind as columns of an array, an odd number of them; gradient and labels, some of which are none."""
    rows = inputs.every_family(4, n_cols, dtype)
    special = inputs.make("spread", (5, n_cols), dtype, seed=1)
    special[0, n_cols // 2], special[1, 0], special[2], special[3, 1::2] = np.nan, np.inf, -np.inf, -np.inf
    logits = np.concatenate([rows, special])
    labels = inputs.targets(len(logits), n_cols, share_ignored=0.2)
    labels[7] = n_cols
    return logits, inputs.make("peaked", logits.shape, dtype, seed=2), labels


def along(results):
    """Rows that lie along axis 0, one after another."""
    return tuple(np.ascontiguousarray(part.T) for part in results)


def with_one_nan(a):
    return np.where(np.isnan(a), np.asarray(np.nan, a.dtype), a)


def check(name, dtype, lengths):
    for n_cols in lengths:
        logits, gradient, labels = make(n_cols, dtype)
        arrays = np.ascontiguousarray(logits.T), np.ascontiguousarray(gradient.T), labels
        expected, _, _, _ = run(name, (logits, gradient, labels), -1, track=False)
        for multiprocessors in (8, 1):  # a sector of rows in a block, and more of them where they fit
            results, chosen, _, _ = run(name, arrays, 0, multiprocessors=multiprocessors, track=False)
            assert chosen.regime == "columns"
            found = along(results)
            if name == "top_p_mask_logits":  # what it keeps of a NaN is a NaN; which one depends on how it is rounded
                found, expected = (tuple(map(with_one_nan, parts)) for parts in (found, expected))
            assert same_bits(found, expected), (n_cols, chosen)
        if n_cols < 1000:
            middle = np.stack([arrays[0], arrays[0][::-1]]), np.stack([arrays[1]] * 2), np.stack([labels] * 2)
            if name in (
                "softmax_backward",
                "log_softmax_backward",
            ):  # to be as exact as promised, they take what the forward gives
                middle = getattr(gpusoftmax, name.removesuffix("_backward"))(middle[0], 1), *middle[1:]
            results, chosen, _, _ = run(name, middle, 1, approx="adversarial", multiprocessors=8, track=False)
            assert chosen.regime == "columns"
            CHECKS[name](results, *middle, 1)


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=pytest.mark.matrix) if one == "kl_div" else one for one in OPERATIONS]
)
def test_rows_have_the_bits_and_results_of_any_layout(name):
    """In one layout as in the other, whatever lies beside them: rows of 4 and 32 lanes and of three chunks, blocks of
    8, 16 and 32 rows.
    """
    check(name, np.float32, (77, 700, 2100))


@pytest.mark.parametrize("name", ["softmax", pytest.param("smoothed_cross_entropy", marks=pytest.mark.matrix)])
def test_rows_of_halves(name):
    check(name, inputs.BFLOAT16, (300, 2100))


@pytest.mark.matrix
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("dtype", inputs.DTYPES, ids=str)
def test_rows_of_every_dtype(name, dtype):
    check(name, dtype, (5, 77, 300, 700, 2100))


@pytest.mark.parametrize("name", ["softmax_backward", pytest.param("smoothed_cross_entropy", marks=pytest.mark.matrix)])
def test_schedule(name):
    """Warps and blocks in an order drawn anew with each seed."""
    logits, gradient, labels = make(2100, np.float32)
    arrays = np.ascontiguousarray(logits.T), np.ascontiguousarray(gradient.T), labels
    results = [run(name, arrays, 0, multiprocessors=1, track=False, seed=seed)[0] for seed in (None, 1, 2)]
    assert same_bits(results[0], results[1]) and same_bits(results[0], results[2])


@pytest.mark.parametrize("name", ["softmax_backward", "smoothed_cross_entropy"])
@pytest.mark.parametrize("most", [4, 40])
def test_chunks_of_several_pieces_and_many_chunks(monkeypatch, name, most):
    """As above, with chunks of four pieces, and with more chunks than a warp has lanes."""
    monkeypatch.setattr(plan, "MAX_CHUNKS", most)
    caches = plan.tree_of, row_plan
    for cache in caches:
        cache.cache_clear()
    try:
        x = inputs.make("spread", (8, 10_003 if most == 4 else 34_000), np.float32, seed=4)
        arrays = x, x.copy(), inputs.targets(*x.shape)
        expected, _, _, _ = run(name, arrays, -1, track=False)
        columns = np.ascontiguousarray(x.T), np.ascontiguousarray(x.T), arrays[2]
        results, chosen, _, _ = run(name, columns, 0, multiprocessors=1, track=False)
    finally:
        for cache in caches:
            cache.cache_clear()
    assert chosen.regime == "columns" and (chosen.split.piece_bits == 2) == (most == 4)
    assert same_bits(along(results), expected)


def test_in_place_and_a_small_grid(monkeypatch):
    """Rows that are read twice, in launches of two blocks."""
    x = inputs.make("spread", (9000, 33), np.float32, seed=1)
    expected, _, _, _ = run("softmax", (x, x, np.zeros(1)), 0, multiprocessors=1, track=False)

    def few(n_rows, *rest):
        one = row_plan(n_rows, *rest)
        return dataclasses.replace(one, blocks=min(one.blocks, 2), rows=min(one.rows, 16))

    monkeypatch.setattr(launch, "row_plan", few)
    with emulated_gpu("sm_90", multiprocessors=1, track=False) as gpu:
        place = gpu.array(x.copy())
        probs = gpu.get(gpusoftmax.softmax(place, 0, out=place))
        assert [stats.plan.blocks for stats in gpu.stats] == [2, 2, 1] and not gpu.stats[0].plan.held
    assert same_bits(probs, expected[0])


def test_columns_far_apart():
    """2^28 elements from column to column, in a file of which only the touched pages exist."""
    columns, distance = inputs.make("spread", (20, 40), "float16", seed=5), 2**28 + 8
    with tempfile.TemporaryFile() as file:
        file.truncate(2 * (19 * distance + 40))
        memory = np.frombuffer(mmap.mmap(file.fileno(), 0), np.float16)
        apart = as_strided(memory, columns.shape, (2 * distance, 2))
        apart[...] = columns
        with emulated_gpu("sm_90", track=False) as gpu:
            x = gpu.array(apart)
            probs = gpu.get(gpusoftmax.softmax(x, 0, out=x))
            assert gpu.stats[-1].plan.regime == "columns"
    tolerances.check_softmax(probs, columns, 0)


@pytest.mark.parametrize("arch", ["sm_75", pytest.param("sm_80", marks=pytest.mark.matrix)])
def test_other_architectures(arch):
    """Without asynchronous copies, and with them."""
    x = inputs.make("spread", (600, 41), np.float32, seed=1)
    results, chosen, _, _ = run("softmax", (x, x, np.zeros(1)), 0, arch, track=False)
    assert chosen.regime == "columns"
    expected, _, _, _ = run("softmax", (np.ascontiguousarray(x.T),) * 2 + (np.zeros(1),), -1, arch, track=False)
    assert same_bits(along(results), expected)


@pytest.mark.parametrize("out_dtype", ["bfloat16", pytest.param("float64", marks=pytest.mark.matrix)])
def test_results_of_another_dtype(out_dtype):
    x = inputs.make("spread", (300, 41), np.float32, seed=1)
    with emulated_gpu("sm_90", track=False) as gpu:
        probs = gpu.get(gpusoftmax.softmax(gpu.array(x), 0, dtype=out_dtype))
        assert gpu.stats[-1].plan.regime == "columns"
    tolerances.check_softmax(probs, x, 0)
