"""The bits of a row depend on that row alone: not on its batch, its place in memory, threads, schedules or the time.

Of the logits' values nothing is asked here but that they make every rounding count; what the results should be is
asked elsewhere. Layouts of short rows are in test_layouts.py.
"""

import numba
import numpy as np
import pytest

import gpusoftmax
from gpusoftmax import _replay_cpu, _rowwise
from gpusoftmax.kernels.cpu import parallel, small
from gpusoftmax.kernels.cpu import run as run_module
from gpusoftmax.kernels.cpu.chunks import CHUNK_COLS
from gpusoftmax.kernels.cpu.job import Job
from gpusoftmax.kernels.cpu.walk import ACROSS, ALONG, IN_BLOCKS
from gpusoftmax.kernels.operands import Operand, Rows
from tests import inputs
from tests.calls import EVERY_FIELD
from tests.conftest import Emulated
from tests.emulator import emulated_gpu


def soft_cross_entropy(x, g, y):
    """Every class with a share, the logits' own probabilities, and all extras."""
    options = {"row_weight": gpusoftmax.logsumexp(g), "z_loss": 0.01, "label_smoothing": 0.1, "return_lse": True}
    told, dlogits = gpusoftmax.cross_entropy_with_grad(x, gpusoftmax.softmax(g), reduction="none", **options)
    return told.loss, told.lse, dlogits


# Each takes logits, a gradient of their shape and one label per row, and returns a tuple of arrays of rows.
OPERATIONS = {
    "softmax": lambda x, g, y: (gpusoftmax.softmax(x),),
    "softmax_backward": lambda x, g, y: (gpusoftmax.softmax_backward(x, g),),
    "log_softmax": lambda x, g, y: (gpusoftmax.log_softmax(x),),
    "log_softmax_backward": lambda x, g, y: (gpusoftmax.log_softmax_backward(x, g),),
    "logsumexp": lambda x, g, y: (gpusoftmax.logsumexp(x),),
    "argmax": lambda x, g, y: (gpusoftmax.argmax(x),),
    "soft_argmax": lambda x, g, y: (gpusoftmax.soft_argmax(x),),
    "soft_argmax_backward": lambda x, g, y: (
        gpusoftmax.soft_argmax_backward(x, gpusoftmax.soft_argmax(x), gpusoftmax.logsumexp(g)),
    ),
    "cross_entropy": lambda x, g, y: gpusoftmax.cross_entropy_with_grad(
        x, y, reduction="none", label_smoothing=0.1, validate=False
    ),
    "soft_cross_entropy": lambda x, g, y: soft_cross_entropy(x, g, y),
    "cross_entropy_backward": lambda x, g, y: (
        gpusoftmax.cross_entropy_backward(
            x, y, gpusoftmax.logsumexp(x), gpusoftmax.logsumexp(g), label_smoothing=0.1, validate=False
        ),
    ),
    "kl_div": lambda x, g, y: gpusoftmax.kl_div_with_grad(x, g, reduction="none")[:2],
    "token_logprobs": lambda x, g, y: gpusoftmax.token_logprobs(x, y, **EVERY_FIELD, validate=False),
    "top_logprobs": lambda x, g, y: gpusoftmax.top_logprobs(x, min(5, x.shape[-1])),
    "topk_softmax": lambda x, g, y: gpusoftmax.topk_softmax(x, min(5, x.shape[-1])),
    "token_logprobs_backward": lambda x, g, y: (
        gpusoftmax.token_logprobs_backward(x, y, gpusoftmax.logsumexp(g), gpusoftmax.logsumexp(g), validate=False),
    ),
    "sample": lambda x, g, y: (gpusoftmax.sample(x, rng=y),),
    "top_p_mask_logits": lambda x, g, y: (gpusoftmax.top_p_mask_logits(x, 0.9),),
    "limited_sample": lambda x, g, y: (gpusoftmax.sample(x, rng=y, top_k=40, top_p=0.9, min_p=1e-3),),
    "mixed_sample": lambda x, g, y: (
        gpusoftmax.sample(x, rng=y, temperature=gpusoftmax.logsumexp(x), top_k=y, top_p=0.9),
    ),
}
NEVER_IN_BLOCKS = ("argmax", "soft_argmax", "soft_argmax_backward", "kl_div")
# dtype, n_cols, n_rows: every dtype; a few lanes, half a warp, and five chunks of the GPU, which are three of the CPU.
KINDS = [("float32", 31, 64), ("float16", 300, 7), ("float64", 33, 7), ("bfloat16", 4097, 4)]


def make(n_rows, n_cols, dtype):
    """Logits, gradient and labels. The logits serve as (log-)probabilities too: bits need no sensible values."""
    logits = inputs.make("spread", (n_rows, n_cols), dtype, seed=n_cols)
    gradient = inputs.make("peaked", (n_rows, n_cols), dtype, seed=1)
    return logits, gradient, inputs.targets(n_rows, n_cols)


def run(target, name, *arrays):
    return tuple(np.asarray(part) for part in target.get(OPERATIONS[name](*map(target.array, arrays))))


def bits(results, rows=np.s_[:]):
    return [part[rows].tobytes() for part in results]


# ---------------------------------------------------------------- batch and neighbours


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize(("dtype", "n_cols", "n_rows"), KINDS)
def test_batch(target, name, dtype, n_cols, n_rows):
    """A row alone, first, in the middle or last in batches of 2, 3, 4, 7 and 64."""
    arrays = make(n_rows, n_cols, dtype)
    results = run(target, name, *arrays)
    for first, last in ((0, 1), (n_rows - 1, n_rows), (1, 3), (n_rows // 2 - 1, n_rows // 2 + 2), (2, min(9, n_rows))):
        part = run(target, name, *(array[first:last] for array in arrays))
        assert bits(part) == bits(results, np.s_[first:last])


@pytest.mark.parametrize(
    "dtype",
    [
        "float32",
        "bfloat16",
        *(pytest.param(dtype, marks=pytest.mark.matrix) for dtype in ("float16", "float64")),  # as those two
    ],
)
def test_batch_around_the_chunks_of_the_cpu(dtype):
    """2048 columns go through its buffer at a time, 16 or 32 of them in a strip of vectors."""
    for n_cols in (15, 16, 17, 63, 64, 65, 2047, 2048, 2049, 4095, 4096, 4097):
        arrays = make(7, n_cols, dtype)
        for name in OPERATIONS:
            results = run_on_cpu(name, *arrays)
            for first, last in ((0, 1), (4, 5), (6, 7), (2, 5)):
                part = run_on_cpu(name, *(array[first:last] for array in arrays))
                assert bits(part) == bits(results, np.s_[first:last]), (name, n_cols)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("n_cols", [10, 64, 300])
def test_few_neighbours_along_the_inner_batch_axis(name, n_cols):
    """Three of five rows each time: the outer axis is walked as the inner one."""
    logits, gradient, labels = make(200, n_cols, "float32")
    expected = run_on_cpu(name, logits, gradient, labels)
    of_three = [array.reshape(40, 5, *array.shape[1:])[:, :3] for array in (logits, gradient, labels)]
    results = run_on_cpu(name, *of_three)
    chosen = np.arange(200).reshape(40, 5)[:, :3].ravel()
    assert bits([part.reshape(120, *part.shape[2:]) for part in results]) == bits(expected, chosen)


@pytest.mark.parametrize("name", OPERATIONS)
def test_neighbours(target, name):
    """Every other row turns into something that must be handled apart."""
    logits, gradient, labels = make(9, 300, "float32")
    clean = run(target, name, logits, gradient, labels)
    logits, gradient, labels = logits.copy(), gradient.copy(), labels.copy()
    logits[1], logits[3], logits[5, 150] = np.nan, np.inf, -np.inf
    logits[7] *= 1000
    gradient[1], gradient[3], labels[5], labels[7] = np.inf, np.nan, 10**9, -100
    results = run(target, name, logits, gradient, labels)
    assert bits(results, np.s_[::2]) == bits(clean, np.s_[::2])
    assert bits(results, np.s_[1::2]) != bits(clean, np.s_[1::2])


# ---------------------------------------------------------------- memory


def placed(array, offset, gap):
    """The rows of an array, `offset` elements behind a 16-byte boundary and `gap` elements apart; NaN around them."""
    n_rows, n_cols = array.shape
    itemsize = array.dtype.itemsize
    raw = np.full((n_rows * (n_cols + gap) + offset) * itemsize + 32, 0xFF, np.uint8)
    start = -raw.ctypes.data % 16 + offset * itemsize
    rows = raw[start : start + n_rows * (n_cols + gap) * itemsize].view(array.dtype).reshape(n_rows, n_cols + gap)
    rows[:, :n_cols] = array
    return rows[:, :n_cols]


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize(
    ("dtype", "n_cols", "per_vector"), [("float16", 300, 8), ("bfloat16", 4097, 8), ("float64", 33, 2)]
)
def test_alignment_and_row_stride(target, name, dtype, n_cols, per_vector):
    """16-byte accesses are possible in all rows, in none or in some."""
    logits, gradient, labels = make(4, n_cols, dtype)
    expected = run(target, name, logits, gradient, labels)
    for offset, gap in ((0, -n_cols % per_vector), (1, -n_cols % per_vector), (per_vector - 1, 3)):
        x, g = placed(logits, offset, gap), placed(gradient, offset, gap)
        assert bits(run(target, name, x, g, labels)) == bits(expected), f"offset {offset}, gap {gap}"


@pytest.mark.parametrize("name", ["softmax", "softmax_backward", "log_softmax", "log_softmax_backward"])
@pytest.mark.parametrize(("dtype", "n_cols"), [("float16", 300), ("bfloat16", 4097)])
def test_alignment_of_the_result(target, name, dtype, n_cols):
    """Reads and writes choose their widths apart from each other."""
    logits, gradient, _ = make(4, n_cols, dtype)
    backward = name.endswith("backward")
    arrays = [target.array(array) for array in ((logits, gradient) if backward else (logits,))]
    function = getattr(gpusoftmax, name)
    expected = target.get(function(*arrays))
    for offset, gap in ((1, 0), (0, 3), (0, -n_cols % 8)):
        out = target.array(placed(np.zeros_like(logits), offset, gap))
        function(*arrays, out=out)
        assert target.get(out).tobytes() == expected.tobytes(), f"offset {offset}, gap {gap}"
    place = target.array(logits.copy())
    assert target.get(function(place, *arrays[1:], out=place)).tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_column_stride(target, name, dtype):
    """Contiguous rows, every other column of an array, or rows that are columns of one; the axis is always the last."""
    arrays = make(4, 4097, dtype)
    expected = run(target, name, *arrays)
    spread_out = [np.repeat(array, 2, axis=1)[:, ::2] for array in arrays[:2]]
    assert bits(run(target, name, *spread_out, arrays[2])) == bits(expected)
    columns = [np.asfortranarray(array) for array in arrays[:2]]
    assert bits(run(target, name, *columns, arrays[2])) == bits(expected)


# ---------------------------------------------------------------- one row, several operations


@pytest.mark.parametrize("family", sorted(inputs.FAMILIES))
def test_log_softmax_at_the_target_is_minus_the_loss(target, family):
    """Also where losses are tiny (confident) and where they are infinite (masked, huge)."""
    for n_cols in (31, 4099):
        logits = inputs.make(family, (4, n_cols), np.float32)
        labels = np.array([0, n_cols - 1, *inputs.targets_at_max(logits)[2:]])
        x, y = target.array(logits), target.array(labels)
        loss = target.get(gpusoftmax.cross_entropy(x, y, reduction="none"))
        log_probs = target.get(gpusoftmax.log_softmax(x))
        assert log_probs[np.arange(4), labels].tobytes() == (-loss).tobytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_log_softmax_at_the_target_is_minus_the_loss_in_other_dtypes(dtype):
    """For results of one dtype: half types have float32 losses."""
    logits = inputs.every_family(2, 4099, dtype)
    labels = inputs.targets(*logits.shape)
    loss = gpusoftmax.cross_entropy(logits, labels, reduction="none")
    log_probs = gpusoftmax.log_softmax(logits, dtype=loss.dtype)
    assert log_probs[np.arange(len(labels)), labels].tobytes() == (-loss).tobytes()


@pytest.mark.parametrize("temperature", [0.7, 3.0])
def test_the_loss_at_a_temperature_has_the_bits_of_the_log_probability(target, temperature):
    """All of them subtract the maximum before they divide."""
    logits = inputs.every_family(2, 4099, "float32")
    labels = inputs.targets(*logits.shape)
    x, y = target.array(logits), target.array(labels)
    told = gpusoftmax.cross_entropy(x, y, reduction="none", temperature=temperature, return_lse=True)
    log_probs = target.get(gpusoftmax.log_softmax(x, temperature=temperature))
    assert log_probs[np.arange(len(labels)), labels].tobytes() == (-target.get(told.loss)).tobytes()
    lse = gpusoftmax.logsumexp(x, temperature=temperature)
    assert target.get(lse).tobytes() == target.get(told.lse).tobytes()


def test_a_weight_of_one_and_a_smoothing_of_zero_change_no_bit(target):
    logits, _, labels = make(4, 300, "float32")
    x, y = target.array(logits), target.array(labels)
    plain = target.get(gpusoftmax.cross_entropy_with_grad(x, y, reduction="none"))
    ones = target.array(np.ones(300, np.float32))
    weighted = target.get(gpusoftmax.cross_entropy_with_grad(x, y, ones, reduction="none", label_smoothing=0.0))
    assert bits(map(np.asarray, plain)) == bits(map(np.asarray, weighted))


# ---------------------------------------------------------------- who computes it, and when


@pytest.mark.parametrize("name", OPERATIONS)
def test_repetition(target, name):
    arrays = make(4, 300, "float32")
    first = bits(run(target, name, *arrays))
    for _ in range(100 if target.name == "cpu" else 3):
        assert bits(run(target, name, *arrays)) == first


@pytest.fixture
def numba_threads():
    """The number of threads that Numba had before the test is the one it has afterwards."""
    before = numba.get_num_threads()
    yield before
    numba.set_num_threads(before)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_number_of_threads(numba_threads, reduction):
    """With enough logits for all of Numba's threads (and too many for one)."""
    n_rows = numba_threads * run_module.LOGITS_PER_THREAD // 1000 + 3
    arrays = make(n_rows, 1000, "float32")
    x, _, y = arrays

    def everything():
        results = [run_on_cpu(name, *arrays) for name in OPERATIONS]
        return [bits(result) for result in results] + [
            np.asarray(part).tobytes() for part in gpusoftmax.cross_entropy_with_grad(x, y, reduction=reduction)
        ]

    expected = everything()
    for n_threads in range(1, numba_threads + 1):
        numba.set_num_threads(n_threads)
        assert everything() == expected


def run_on_cpu(name, *arrays):
    return tuple(np.asarray(part) for part in OPERATIONS[name](*arrays))


@pytest.fixture
def threads(monkeypatch):
    """A function that lets every call, however small, be shared by so many threads."""

    def share(n_threads):
        monkeypatch.setattr(_rowwise, "small", lambda *_: None)
        monkeypatch.setattr(run_module, "LOGITS_PER_THREAD", 1)
        monkeypatch.setattr(run_module, "LOGITS_PER_ITEM", 1)
        monkeypatch.setattr(run_module, "CHUNKS_PER_PART", 1)
        monkeypatch.setattr(parallel, "thread_count", lambda: n_threads)

    return share


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("n_threads", [2, 3, 7])
@pytest.mark.parametrize(
    "shape",
    [(37, 2049), (2, 9000), (200, 17), (300, 70)],
    ids=["whole rows", "parts of rows", "across rows", "in blocks"],
)
def test_shared_by_threads(threads, name, n_threads, shape):
    """However many there are, and whichever of them draws an item."""
    arrays = make(*shape, "bfloat16" if shape[0] == 37 else "float32")
    expected = bits(run_on_cpu(name, *arrays))
    threads(n_threads)
    for _ in range(3):
        assert bits(run_on_cpu(name, *arrays)) == expected


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_small_calls(name, dtype):
    """They go straight to a kernel of their own."""
    function = getattr(gpusoftmax, name)
    for n_cols in (1, 4, 8, 9, 16, 17, 32, 33, 64, 65, 300, 2048):
        logits = inputs.make("spread", (70, n_cols), dtype)
        expected = function(logits)
        for n_rows in (n_rows for n_rows in (1, 2, 7, 16, 70) if n_rows * n_cols <= 4096):
            out, place = np.full((n_rows, n_cols), 7, dtype), logits[:n_rows].copy()
            assert function(logits[:n_rows], out=out) is out
            assert function(place, out=place) is place
            assert out.tobytes() == place.tobytes() == expected[:n_rows].tobytes(), (n_rows, n_cols)


def test_arrays_that_a_kernel_for_small_calls_leaves_alone():
    kernel = small.function("softmax", "f")
    x = inputs.make("spread", (6, 8), "float32")
    memory = np.zeros(60, np.float32)
    assert kernel(x, np.zeros_like(x))
    others = [x.astype(">f4"), x[None], x[0], np.asfortranarray(x), x[:, ::2], x[:0], x[:, :0]]
    pairs = [(other, np.zeros_like(other)) for other in others]
    pairs += [(x, np.zeros(shape, np.float32)) for shape in ((6, 9), (7, 8), (48,))]
    pairs += [(x, np.zeros_like(x, order="F")), (x, np.zeros(x.shape)), (x, np.zeros(x.shape, ">f4"))]
    pairs += [(memory[:48].reshape(6, 8), memory[1:49].reshape(6, 8)), (np.zeros((2, 2049), np.float32),) * 2]
    read_only, unaligned = np.zeros_like(x), np.zeros(193, np.uint8)[1:].view(np.float32).reshape(6, 8)
    read_only.flags.writeable = False
    pairs += [(x, read_only), (x, unaligned), (unaligned, np.zeros_like(x))]
    for logits, out in pairs:
        before = out.tobytes()
        assert not kernel(logits, out)
        assert out.tobytes() == before


def test_parts_of_rows_that_are_folded_late(threads):
    """A thread that folds a row while another one already writes it reads what was measured. It takes many calls."""
    arrays = make(2, 30_000, "float32")
    expected = bits(run_on_cpu("cross_entropy", *arrays))
    for n_threads in (2, 3, 7):
        threads(n_threads)
        _replay_cpu._recipes.clear()
        assert all(bits(run_on_cpu("cross_entropy", *arrays)) == expected for _ in range(150)), n_threads


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("n_cols", [1, 5, 64, 100, 2048, 4500])
def test_ways_to_walk_rows(monkeypatch, name, n_cols):
    """Along rows, across them and in blocks sum in the same order."""
    monkeypatch.setattr(_rowwise, "small", lambda *_: None)
    arrays = make(70, n_cols, "float32")
    ways = [ALONG, ACROSS] + ([IN_BLOCKS] if n_cols <= CHUNK_COLS and name not in NEVER_IN_BLOCKS else [])
    results = []
    for way in ways:
        monkeypatch.setattr(run_module, "_way", lambda *_, way=way: way)
        _replay_cpu._recipes.clear()
        results.append(bits(run_on_cpu(name, *arrays)))
    _replay_cpu._recipes.clear()
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "cross_entropy", "softmax_backward"])
@pytest.mark.parametrize(
    ("n_cols", "dtype"), [(128, "float32"), (4096, "float32"), (2999, "float32"), (2999, "bfloat16")]
)
def test_results_written_past_the_caches(monkeypatch, name, n_cols, dtype):
    arrays = make(20, n_cols, dtype)
    monkeypatch.setattr(_rowwise, "small", lambda *_: None)
    expected = bits(run_on_cpu(name, *arrays))
    monkeypatch.setattr(run_module, "STREAM_BYTES", 0)
    monkeypatch.setattr(run_module, "LATE_STREAM_BYTES", 0)
    monkeypatch.setattr(run_module, "LONG_ROW_BYTES", 0)
    laid_out, plan = [], run_module.plan
    monkeypatch.setattr(run_module, "plan", lambda *a: laid_out.append(plan(*a)) or laid_out[-1])
    _replay_cpu._recipes.clear()
    assert bits(run_on_cpu(name, *arrays)) == expected
    _replay_cpu._recipes.clear()
    assert laid_out[0].block[Job._fields.index("streamed")] == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("n_cols", [100, 2090])  # in blocks, and along in two chunks
@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("op", ["cross_entropy_with_grad", "cross_entropy_backward"])
def test_labels_in_rows_written_past_the_caches(monkeypatch, dtype, n_cols, offset, op):
    """A label's column is written twice, wherever it stands: the first and the last of a vector, a chunk, a row."""
    monkeypatch.setattr(_rowwise, "small", lambda *_: None)
    labels = np.unique([*range(70), *range(2040, 2060), *range(n_cols - 40, n_cols)])
    labels = labels[labels < n_cols]
    logits, memory = make(len(labels), n_cols, dtype)[0], np.zeros((len(labels) * n_cols + 64, 2), np.uint64)
    out = memory.view(logits.dtype).ravel()[-memory.ctypes.data % 64 // logits.itemsize + offset :]
    out = out[: logits.size].reshape(logits.shape)
    lse, dloss = gpusoftmax.logsumexp(logits), np.full(len(labels), 0.7, np.float32)

    def run_op():
        if op == "cross_entropy_backward":
            gpusoftmax.cross_entropy_backward(logits, labels, lse, dloss, out=out)
        else:
            gpusoftmax.cross_entropy_with_grad(logits, labels, reduction="none", out=out)
        return out.tobytes()

    expected = run_op()
    for name in ("STREAM_BYTES", "LATE_STREAM_BYTES", "LONG_ROW_BYTES"):
        monkeypatch.setattr(run_module, name, 0)
    laid_out, plan = [], run_module.plan
    monkeypatch.setattr(run_module, "plan", lambda *a: laid_out.append(plan(*a)) or laid_out[-1])
    _replay_cpu._recipes.clear()
    out.fill(0)
    result = run_op()
    _replay_cpu._recipes.clear()
    assert any(one.block[Job._fields.index("streamed")] for one in laid_out)
    assert result == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("n_rows", [192, 224])  # whole blocks of rows, and a part of one at the end
def test_columns_written_past_the_caches(monkeypatch, dtype, n_rows):
    """Into the middle of an array, whose other elements stay as they are."""
    x = np.ascontiguousarray(np.moveaxis(make(2 * n_rows, 37, dtype)[0].reshape(2, n_rows, 37), 1, 2))
    lines = np.zeros((2, 37, 64 + n_rows + 64), x.dtype)
    expected, canaries = lines[..., 64:-64], (lines[..., :64], lines[..., -64:])
    expected[...] = gpusoftmax.softmax(x, axis=1)
    result = np.zeros(lines.nbytes + 64, np.uint8)
    result = result[-result.ctypes.data % 64 :][: lines.nbytes].view(x.dtype).reshape(lines.shape)
    monkeypatch.setattr(run_module, "STREAM_BYTES", 0)
    laid_out, plan = [], run_module.plan
    monkeypatch.setattr(run_module, "plan", lambda *a: laid_out.append(plan(*a)) or laid_out[-1])
    _replay_cpu._recipes.clear()
    gpusoftmax.softmax(x, axis=1, out=result[..., 64:-64])
    _replay_cpu._recipes.clear()
    assert laid_out[0].block[Job._fields.index("streamed")] == 1
    assert result.tobytes() == lines.tobytes() and not any(part.any() for part in canaries)


def test_columns_of_half_a_line_are_not_written_past_the_caches(monkeypatch):
    """Registers of 32 bytes and less take 16 rows at a time: of 16 bits these are half a cache line."""
    monkeypatch.setattr(run_module, "STREAM_BYTES", 0)
    rows = Rows(n_rows=64, n_cols=8, n_inner=64)
    for n_bytes, dtype, expected in (
        (256, "float32", True), (256, "bfloat16", True), (64, "float32", True), (64, "bfloat16", False),
    ):  # fmt: skip
        monkeypatch.setattr(run_module, "ACROSS_BYTES", n_bytes)
        target = Operand(0, 0, 1, 64, dtype)
        assert run_module._is_streamed(rows, ACROSS, target, np.float32(0), True) is expected


def on_gpu(name, arrays, arch="sm_90", **options):
    with emulated_gpu(arch, track=False, **options) as gpu:
        return bits(run(Emulated(gpu), name, *arrays))


@pytest.mark.parametrize("name", ["logsumexp", "softmax_backward", "cross_entropy"])  # all reductions of the kernels
def test_schedule_of_warps_and_blocks(name):
    """Two chunks and eight warps per row, whose order is drawn anew with each seed."""
    arrays = make(2, 4200, "float32")
    expected = on_gpu(name, arrays)
    for seed in (1, 2):
        assert on_gpu(name, arrays, seed=seed) == expected


def test_schedule_of_the_sums_over_rows():
    """mean and sum add up in an order that the number of rows alone decides."""
    logits, _, labels = make(96, 3, "float32")
    results = set()
    for seed in (None, 1, 2):
        with emulated_gpu("sm_90", seed=seed, track=False, max_lanes=1024) as gpu:
            x, y = gpu.array(logits), gpu.array(labels)
            losses = [gpu.get(gpusoftmax.cross_entropy(x, y, reduction=reduction)) for reduction in ("mean", "sum")]
            results.add(tuple(loss.tobytes() for loss in losses))
    assert len(results) == 1


@pytest.mark.parametrize("arch", ["sm_75", "sm_80"])
def test_other_architectures(arch):
    """Each is batch-invariant by itself; nothing is promised between them."""
    logits, gradient, labels = make(7, 600, "float32")
    (whole,) = on_gpu("softmax", (logits, gradient, labels), arch)
    row = np.frombuffer(whole, np.float32).reshape(logits.shape)[4:5]
    assert on_gpu("softmax", (logits[4:5], gradient[4:5], labels[4:5]), arch) == [row.tobytes()]
    strided = np.repeat(logits, 2, axis=1)[:, ::2]
    assert on_gpu("softmax", (strided, gradient, labels), arch) == [whole]
