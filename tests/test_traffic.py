"""What each op moves in each regime: every byte once where rows are held, and 32-byte sectors that are used whole."""

import dataclasses
import itertools
from functools import partial

import numpy as np
import pytest

import gpusoftmax
from gpusoftmax.kernels.cuda import launch
from gpusoftmax.kernels.cuda.plan import OF_A_BATCH
from tests.calls import CALLS, Call, arguments
from tests.emulator import emulated_gpu
from tests.test_regimes import force

F32 = np.dtype(np.float32)
OPERATIONS = {
    **CALLS,
    "smoothed_cross_entropy": Call(
        partial(gpusoftmax.cross_entropy_with_grad, label_smoothing=0.1, reduction="none"), ("logits",), ("target",)
    ),
}
# They need not keep what they have read.
ONE_PASS = ("logsumexp", "cross_entropy", "cross_entropy_backward", "token_logprobs", "argmax", "soft_argmax", "sample")
# Columns, and (blocks of a row, warps of a block, slots of a warp): how those rows are launched instead.
REGIMES = {
    "short": (1024, None),
    "held": (4 * 1024, (1, 4, 1)),
    "cluster": (4 * 1024, (2, 2, 1)),
    "online": (8 * 1024, (1, 2, 2)),  # of the four pieces of a warp it keeps two
}


def moved(operation, n_cols):
    """How often each element of the rows is read and written, and the sectors' share that is used, array by array."""
    shape = 2, n_cols
    with emulated_gpu("sm_90") as gpu:
        host = {argument: array.copy() for argument, array in _arguments(operation, shape).items()}
        given = {argument: gpu.array(array) for argument, array in host.items()}
        results = operation.function(*given.values())
        results = results if isinstance(results, tuple) else (results,)
        number = next(k for k, stats in enumerate(gpu.stats) if stats.plan.regime not in OF_A_BATCH)
        sources = [given[argument] for argument in operation.rows]
        targets = [array for array in results if array is not None and array.shape == shape]
        reads = [gpu.reads(array, number) for array in sources]
        writes = [gpu.writes(array, number) for array in targets]
        traffic = [gpu.stats[number].traffic[array._allocation.start] for array in sources + targets]
        used = [(one.read + one.written) / (32 * sum(one.sectors.values())) for one in traffic]
        return reads, writes, used, host.get("target")


def _arguments(operation, shape):
    made = arguments(next(name for name, call in CALLS.items() if call.arguments == operation.arguments), shape, F32)
    if "target" in made:
        made["target"] = np.array([5, shape[1] - 3])  # no row is ignored, and so not read
    return made


# What is not in slots these read as often as they need.
MANY_PASSES = ("top_logprobs", "topk_softmax", "top_k_mask_logits", "top_p_mask_logits")
CASES = [
    (name, regime)
    for name, regime in itertools.product(OPERATIONS, REGIMES)
    if regime != "online" or name not in MANY_PASSES
]


@pytest.mark.parametrize(("name", "regime"), CASES)
def test_every_byte_is_moved_once_in_whole_sectors(monkeypatch, name, regime):
    n_cols, launched = REGIMES[regime]
    if launched:
        force(monkeypatch, *launched)
    reads, writes, used, target = moved(OPERATIONS[name], n_cols)
    expected = np.ones((2, n_cols), int)
    if regime == "online" and name not in ONE_PASS:
        pieces = np.arange(n_cols) // 1024
        expected[:, pieces < 4] = 2  # the last pass begins with the slots: what was read last is not read again
    for row, label in enumerate([] if target is None else target):
        if name == "token_logprobs":  # the target's logit, by every thread that counts larger ones
            assert reads[0][row, label] > 1
            reads[0][row, label] = 1
        elif not name.endswith("_backward"):
            reads[0][row, label] -= 1  # the label's logit, by itself
    for counted in reads:
        assert (counted == expected).all()
    for counted in writes:
        assert (counted == 1).all()
    assert bool(writes) == (not OPERATIONS[name].per_row)
    assert min(used) >= 0.95, f"of the sectors that are moved {min(used):.0%} is used"


# ---------------------------------------------------------------- what `explain` says of it


def beside(shape):
    """What a call of logits of this shape may be given beside them."""
    rng = np.random.default_rng(0)
    n_rows, n_cols = shape
    return {
        "bits": rng.integers(-(2**31), 2**31, (n_rows, -(-n_cols // 32))).astype(np.int32),
        "bools of all rows": rng.random(n_cols) < 0.8,
        "of columns": rng.standard_normal(n_cols, F32),
        "of logits": rng.standard_normal(shape, F32),
        "of rows": 0.5 + rng.random(n_rows, F32),
        "labels": np.array([5, n_cols - 3], np.int32),
    }


EXPLAINED = {
    "a mask of bits, a bias, a temperature for each row": (
        "softmax",
        {"mask": "bits", "bias": "of columns", "temperature": "of rows"},
        {},
    ),
    "a bias for each logit, a mask of all rows, columns that do not count": (
        "logsumexp",
        {"mask": "bools of all rows", "bias": "of logits"},
        {"n_valid": 3001},
    ),
    "weights and what a loss tells": (
        "cross_entropy",
        {"target": "labels", "weight": "of columns", "row_weight": "of rows"},
        {"reduction": "none", "z_loss": 0.1, "return_lse": True, "return_z_loss": True, "return_correct": True},
    ),
}


def call_and_explain(op, arrays, options, shape):
    """(the emulated GPU, its arrays by argument, what is explained) of a call with arrays of `beside`."""
    host = {name: beside(shape)[made] for name, made in arrays.items()}
    explained = gpusoftmax.explain(op, shape, arch="sm_90", **host, **options)
    with emulated_gpu("sm_90") as gpu:
        given = {name: gpu.array(array) for name, array in host.items()}
        logits = gpu.array(np.random.default_rng(1).standard_normal(shape, F32))
        getattr(gpusoftmax, op)(logits, **given, **options)
    return gpu, {"logits": logits, **given}, explained


@pytest.fixture
def without_the_assembler(monkeypatch):
    monkeypatch.setattr("gpusoftmax.kernels.cuda.compile.resources", lambda image: (64, 0))  # half a second each


@pytest.mark.parametrize("case", EXPLAINED)
def test_explained_bytes_are_those_that_are_moved(case, without_the_assembler):
    """Each byte of each array that a launch reads or writes, once: rows are held."""
    gpu, _, explained = call_and_explain(*EXPLAINED[case], shape=(2, 4096))
    moved = {"read": 0, "write": 0}
    for stats in (stats for stats in gpu.stats if stats.plan.regime not in OF_A_BATCH):
        assert stats.plan.regime == "held"
        for traffic in stats.traffic.values():
            for direction in moved:
                moved[direction] += int((traffic.counts(direction, np.arange(traffic.size)) > 0).sum())
    assert 2 * explained["row"]["read"] + explained["shared"] == moved["read"]
    assert 2 * explained["row"]["written"] == moved["write"]
    assert explained["row"]["once"]


def test_explained_bytes_of_rows_that_are_read_twice(monkeypatch, without_the_assembler):
    """A mask is read again with its row, but for what of the logits stays; a bias of all rows is in a cache."""
    n_cols, launched = REGIMES["online"]
    force(monkeypatch, *launched)
    forced = launch.row_plan
    monkeypatch.setattr(launch, "row_plan", lambda *given: dataclasses.replace(forced(*given), held=False))
    gpu, given, explained = call_and_explain(*EXPLAINED[next(iter(EXPLAINED))], shape=(2, n_cols))
    lanes = 32 // 4  # that ask for a word, each for its sixteen bytes of logits
    mask_bytes = 4 * int(gpu.reads(given["mask"]).sum()) // lanes
    assert mask_bytes == 2 * given["mask"].size * 4
    logits_bytes, temperature_bytes = 4 * int(gpu.reads(given["logits"]).sum()), 4 * 2
    assert 2 * explained["row"]["read"] == logits_bytes + mask_bytes + temperature_bytes
    assert explained["shared"] == 4 * n_cols and not explained["row"]["once"]
