"""The bug museum: mutants of the library, each with one mistake of a kind that others have shipped, and what sees it.

A mutant is the library with a few words of its source replaced. It is loaded beside the real one, its kernels are
compiled anew, and it is called through the public functions: on the CPU, on the emulated GPU, or (for mistakes that
machine code shows best) to look at the PTX. `check` is a test of the result, by a comparison rule of tolerances.py, of
bits, by the emulator or by the codegen contract. It must pass with the real library and raise with the mutant, in the
words `says`: otherwise the tests would not notice the mistake either.
"""

import contextlib
import functools
import importlib
import importlib.machinery
import importlib.util
import mmap
import re
import sys
import tempfile
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

from gpusoftmax.kernels.cpu import cache as cpu_cache
from gpusoftmax.kernels.cuda import cache as cuda_cache
from gpusoftmax.kernels.cuda import driver
from gpusoftmax.kernels.cuda.plan import MAX_THREADS, REGISTERS
from tests import codegen, inputs, tolerances
from tests.emulator import emulated_gpu, errors

# What the mistakes are kinds of, with one place where each was found.
KINDS = {
    "32-bit offsets": "pytorch/pytorch#111484",
    "rows beyond the grid": "NVIDIA/cudf#10368",
    "label past the last class": "pytorch/pytorch#106467",
    "negative label": "pytorch/pytorch#12670",
    "narrow labels": "urvashik/knnlm#6",
    "denominator of the mean": "pytorch/pytorch#70348",
    "ignored row that poisons": "pytorch/pytorch#73205",
    "-inf minus -inf": "flashinfer-ai/flashinfer#4401",
    "NaN and infinities lost": "intel/torch-xpu-ops#5022",
    "finite stand-in for -inf": "flashinfer-ai/flashinfer#4267",
    "cancellation": "pytorch/pytorch#11752",
    "low precision": "sonos/tract#2586",
    "overflow": "a division by a small temperature before the maximum is subtracted",
    "strides": "NVIDIA/TransformerEngine#2734",
    "strides of a gradient": "ROCm/TransformerEngine#623",
    "gradient of a reduction": "linkedin/Liger-Kernel#968",
    "in place": "unslothai/unsloth#5002",
    "read-only arrays": "pytorch/pytorch#32868",
    "empty arrays": "pytorch/pytorch#17256",
    "streams": "pytorch/pytorch#150217",
    "current device": "triton-lang/triton#2441",
    "online sum": "the rescaling in Milakov and Gimelshein, arXiv:1805.02867",
    "last columns": "the tail of any kernel that works in blocks",
    "barriers": "scratch memory that is used twice",
    "batch invariance": "thinking-machines-lab/batch_invariant_ops#13",
    "fast math": "numba/numba#2919",
    "label smoothing": "eps over another number of classes",
    "seeds of rows": "flashinfer-ai/flashinfer@fb28d72: kernels read the first seed of an array alone",
    "zero probability drawn": "pytorch/pytorch#48841",
    "machine code": "registers that spill, float64 in float32 kernels",
}


# ---- mutants


class Edit(NamedTuple):
    """Replace `old`, which occurs once in the source of a module, by `new`."""

    module: str
    old: str
    new: str


class Mutant(NamedTuple):
    """`compiles`: the kernels that the mistake becomes a part of; none for mistakes on the host's side."""

    name: str
    kind: str
    check: Callable
    raises: type[Exception]
    says: str
    edits: tuple[Edit, ...]
    compiles: tuple[str, ...] = ()


# They hold what the emulator and `mutated` replace, and nothing that a mutant changes.
SHARED = {module.__name__ for module in (driver, cuda_cache, cpu_cache)} | {"gpusoftmax.kernels.cache_directory"}


@contextlib.contextmanager
def mutated(*edits, compiles=()):
    """The library with these edits, as the module `gpusoftmax`; outside of the context nothing has changed.

    Kernels named in `compiles` are not looked up in the caches; those compiled here are never stored.
    """
    names = [name for name in sys.modules if name.partition(".")[0] == "gpusoftmax"]
    real = {name: sys.modules[name] for name in names}
    for name in real.keys() - SHARED:
        del sys.modules[name]
    finder = _Finder(edits)
    sys.meta_path.insert(0, finder)
    try:
        with _caches_without(compiles):
            yield importlib.import_module("gpusoftmax")
        unused = {edit.module for edit in edits} - sys.modules.keys()
        assert not unused, f"never imported: {unused}"
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == "gpusoftmax"]:
            del sys.modules[name]
        sys.modules.update(real)


class _Finder:
    """Finds edited modules before Python's own finders do."""

    def __init__(self, edits):
        self.edits = edits

    def find_spec(self, name, path=None, target=None):
        edits = [edit for edit in self.edits if edit.module == name]
        if not edits:
            return None
        file = importlib.machinery.PathFinder.find_spec(name, path).origin
        return importlib.util.spec_from_file_location(name, file, loader=_EditedSource(name, file, edits))


class _EditedSource(importlib.machinery.SourceFileLoader):
    def __init__(self, name, file, edits):
        super().__init__(name, file)
        self.edits = edits

    def get_code(self, name):
        text = self.get_data(self.path).decode()
        for edit in self.edits:
            assert text.count(edit.old) == 1, f"{name} holds {edit.old!r} {text.count(edit.old)} times"
            text = text.replace(edit.old, edit.new)
        return compile(text, self.path, "exec")


@contextlib.contextmanager
def _caches_without(kernels):
    load, get_key = cpu_cache._KernelCache.load_overload, cuda_cache.key

    def load_others(self, *args):
        return None if self._function.__name__ in kernels else load(self, *args)

    def key_of_others(kernel, *args):
        return "" if kernel.partition(".")[2] in kernels else get_key(kernel, *args)

    with contextlib.ExitStack() as stack:
        for owner, name, function in (
            (cpu_cache._KernelCache, "load_overload", load_others),
            (cpu_cache._KernelCache, "save_overload", lambda *_: None),
            (cuda_cache, "key", key_of_others),
            (cuda_cache, "put", lambda *_: None),
        ):
            stack.enter_context(mock.patch.object(owner, name, function))
        yield


# ---- checks: functions of a library


def _random(*shape, dtype=np.float32, seed=0):
    return inputs.make("spread", shape, dtype, seed)


def _module(library, name):
    """A module of the same library, mutant or not."""
    return importlib.import_module(f"{library.__name__}.{name}")


def _same_bits(one, two, what):
    assert np.asarray(one).tobytes() == np.asarray(two).tobytes(), f"bits differ: {what}"


def _emulated(call, *arrays, **options):
    """The result of a call on the emulated GPU."""
    with emulated_gpu("sm_90", track=False, **options) as gpu:
        return gpu.get(call(*(gpu.array(array) for array in arrays)))


def _lse_of(family, n_cols, **options):
    def check(library):
        logits = inputs.make(family, (6, n_cols), np.float32, **options)
        tolerances.check_logsumexp(library.logsumexp(logits), logits)

    return check


def samples_of_rows_alone(library):
    logits, seeds = inputs.make("flat", (6, 300), np.float32), np.arange(6)
    together = library.sample(logits, rng=seeds).tolist()
    alone = [int(library.sample(row, rng=seed)) for row, seed in zip(logits, seeds.tolist(), strict=True)]
    assert together == alone, "samples differ from those of rows alone"


def samples_beside_an_offset(library):
    logits = np.zeros((100, 1000), np.float32)
    found = [library.sample(logits + offset, rng=np.arange(100)) for offset in (0, 2.0**24)]
    assert np.array_equal(*found), "an offset changes the samples"


def samples_of_masked_rows(library):
    """One column that is not masked, behind more of them than a vector has."""
    logits = np.full((3, 3000), -np.inf, np.float32)
    logits[:, -1] = -5
    logits[2] = -np.inf
    assert library.sample(logits, rng=0).tolist() == [2999, 2999, -1], "a column without a probability is drawn"


def _log_softmax_of(family, n_cols):
    def check(library):
        logits = inputs.make(family, (6, n_cols), np.float32)
        tolerances.check_log_softmax(library.log_softmax(logits), logits)

    return check


def lse_of_a_masked_row_beside_others(library):
    """Side by side, so that one vector has them all; of one the chunks lie far apart."""
    logits = np.zeros((2049, 16), np.float32)
    logits[:, 0], logits[2048, 1] = -np.inf, 1e5
    tolerances.check_logsumexp(library.logsumexp(logits, axis=0), logits, axis=0)


def lse_of_many_rising_chunks(library):
    """Every chunk of the CPU raises the maximum by as much: the first one is rescaled 511 times."""
    logits = np.linspace(-15, -13, 2**20, dtype=np.float32)  # the result is near 0, where it shows every bit
    tolerances.check_logsumexp(library.logsumexp(logits), logits)


def lse_with_nan(library):
    logits = _random(4, 40)
    logits[1, 17] = np.nan
    tolerances.check_logsumexp(library.logsumexp(logits), logits)


def lse_below_a_sentinel(library):
    logits = np.random.default_rng(0).uniform(-2e5, -1e5, (4, 40)).astype(np.float32)
    tolerances.check_logsumexp(library.logsumexp(logits), logits)


def lse_of_bfloat16(library):
    logits = _random(4, 20000, dtype=inputs.BFLOAT16)
    tolerances.check_logsumexp(library.logsumexp(logits), logits)


def lse_in_bfloat16(library):
    logits = _random(40, 100)
    tolerances.check_logsumexp(library.logsumexp(logits, dtype="bfloat16"), logits)


def lse_far_apart(library):
    """Two rows 2^32 elements apart, in a file of which only the touched pages exist."""
    rows, distance = _random(2, 100), 2**32
    with tempfile.TemporaryFile() as file:
        file.truncate(4 * (distance + 100))
        memory = np.frombuffer(mmap.mmap(file.fileno(), 0), np.float32)
        apart = as_strided(memory, rows.shape, (4 * distance, 4))
        apart[...] = rows
        tolerances.check_logsumexp(library.logsumexp(apart), rows)


def lse_with_a_small_grid(library):
    """More rows than the blocks of one launch hold, on the GPU."""
    plan = _module(library, "kernels.cuda.plan")
    logits = _random(40, 20)
    plan.row_plan.cache_clear()
    with mock.patch.object(plan, "MAX_BLOCKS", 2):
        got = _emulated(library.logsumexp, logits)
    plan.row_plan.cache_clear()
    tolerances.check_logsumexp(got, logits)


def lse_of_two_chunks(library):
    """A block of two warps, on the GPU."""
    logits = _random(2, 1500)
    tolerances.check_logsumexp(_emulated(library.logsumexp, logits), logits)


def lse_of_a_cluster(library):
    """Few long rows: several blocks share each, on the GPU."""
    logits = _random(1, 40_000)
    tolerances.check_logsumexp(_emulated(library.logsumexp, logits), logits)


def _near_zero(rows):
    """Rows shifted so that their log-sum-exp is near 0: there it shows every bit of the sum."""
    return rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))


def lse_at_any_alignment(library):
    rows = _near_zero(_random(8, 700))
    results = []
    with emulated_gpu("sm_90", track=False) as gpu:
        for offset in range(4):
            memory = np.zeros((8, 704), np.float32)
            memory[:, offset : offset + 700] = rows
            results.append(gpu.get(library.logsumexp(gpu.array(memory[:, offset : offset + 700]))))
    for offset, result in enumerate(results):
        _same_bits(result, results[0], f"rows {4 * offset} bytes past a 16-byte boundary")


def lse_in_any_batch(library):
    rows = _near_zero(_random(8, 300))
    with emulated_gpu("sm_90", track=False) as gpu:
        together = gpu.get(library.logsumexp(gpu.array(rows)))
        alone = [gpu.get(library.logsumexp(gpu.array(row))) for row in rows]
    _same_bits(together, np.array(alone), "rows alone and in a batch")


def lse_on_any_number_of_threads(library):
    rows = _near_zero(_random(12, 9000))
    parallel = _module(library, "kernels.cpu.parallel")
    results = []
    for count in (1, 3):
        with mock.patch.object(parallel, "thread_count", lambda count=count: count):
            results.append(library.logsumexp(rows))
    _same_bits(*results, "1 thread and 3")


def lse_of_nothing(library):
    """Rows without columns; what the allocator returns holds no numbers yet."""
    assert (_emulated(library.logsumexp, np.empty((3, 0), np.float32)) == -np.inf).all()


def lse_of_no_rows(library):
    assert _emulated(library.logsumexp, np.empty((0, 5), np.float32)).shape == (0,)


def lse_on_another_stream(library):
    with emulated_gpu("sm_90", track=False) as gpu:
        x = gpu.array(_random(2, 20), stream=11)
        assert gpu.get(library.logsumexp(x)).shape == (2,)
        assert gpu.stats[-1].stream == 11, f"launched on stream {gpu.stats[-1].stream}"


def lse_on_another_device(library):
    with emulated_gpu("sm_90", track=False, devices=2) as gpu:
        assert gpu.get(library.logsumexp(gpu.array(_random(2, 20), device=1))).shape == (2,)


def lse_of_unaligned_rows(library):
    """An odd number of columns: no two rows begin at the same distance from a 16-byte boundary."""
    logits = _random(4, 701)
    tolerances.check_logsumexp(_emulated(library.logsumexp, logits), logits)


def _softmax_layouts(*names):
    def check(library):
        rows = _random(4, 40)
        want = library.softmax(rows)
        for name, view in inputs.layouts(rows):
            if name in names:
                _same_bits(library.softmax(view), want, f"layout {name}")

    return check


def softmax_at_tiny_temperature(library):
    logits = _random(3, 40)
    tolerances.check_softmax(library.softmax(logits, temperature=1e-38), logits, temperature=1e-38)


def softmax_with_infinity(library):
    logits = _random(3, 40)
    logits[1, 5] = np.inf
    tolerances.check_softmax(library.softmax(logits), logits)


def softmax_in_place(library):
    logits = _random(2, 5000)
    want = library.softmax(logits)
    _same_bits(library.softmax(logits, out=logits), want, "in place and not")


def lse_into_read_only(library):
    """Refused before anything is launched."""
    into = np.empty(2, np.float32)
    into.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        _emulated(lambda x, out: library.logsumexp(x, out=out), _random(2, 40), into)


def softmax_backward_of_a_sum(library):
    """The gradient of a sum: one number with strides 0."""
    probs, dprobs = library.softmax(_random(3, 45)), np.broadcast_to(np.float32(1), (3, 45))
    got = _emulated(library.softmax_backward, probs, dprobs)
    tolerances.check_softmax_backward(got, probs, dprobs)


def softmax_backward_of_unaligned_rows(library):
    probs, dprobs = library.softmax(_random(3, 45)), _random(3, 45, seed=1)
    got = _emulated(library.softmax_backward, probs, dprobs)
    tolerances.check_softmax_backward(got, probs, dprobs)


LABELS = np.array([3, 0, 9, 7, 3, 1])


def _loss(library, labels=LABELS, weight=None, logits=None, gpu=False, **options):
    """The loss, and the check that belongs to it. Without other arguments six rows of ten classes."""
    logits = _random(len(labels), 10) if logits is None else logits
    call = _emulated if gpu else lambda function, *arrays: function(*arrays)
    arrays = (logits, labels) if weight is None else (logits, labels, weight)
    got = call(lambda *arrays: library.cross_entropy(*arrays, validate=False, **options), *arrays)
    tolerances.check_loss(got, logits, labels, weight, **options)


def loss_with_a_negative_label(library):
    _loss(library, np.array([3, -1, 9, -7]), reduction="none")


def loss_of_unsigned_labels(library):
    """uint8 labels above 127 are classes."""
    labels, logits = np.array([3, 200, 255, 130], np.uint8), _random(4, 256)
    tolerances.check_loss(library.cross_entropy(logits, labels), logits, labels)


def loss_with_a_label_past_the_end(library):
    """The class weights end where the label points, on the GPU."""
    _loss(library, np.array([3, 10, 9, 40]), np.ones(10, np.float32), gpu=True)


def mean_over_valid_rows(library):
    _loss(library, ignore_index=3)


def mean_of_no_rows(library):
    _loss(library, np.full(3, -100))


def mean_with_weights(library):
    _loss(library, weight=np.linspace(0.5, 2, 10, dtype=np.float32), gpu=True)


def loss_of_ignored_nan(library):
    logits = _random(6, 10)
    logits[LABELS == 3] = np.nan
    _loss(library, logits=logits, ignore_index=3, reduction="none")


def smoothed_loss(library):
    _loss(library, gpu=True, label_smoothing=0.3, reduction="none")


def sum_of_losses(library):
    _loss(library, gpu=True, reduction="sum")


def _gradient(library, n_cols=10, gpu=False, **options):
    logits = _random(len(LABELS), n_cols)
    call = _emulated if gpu else lambda function, *arrays: function(*arrays)
    _, got = call(lambda *arrays: library.cross_entropy_with_grad(*arrays, validate=False, **options), logits, LABELS)
    tolerances.check_dlogits(got, logits, LABELS, **options)


def gradient_without_reduction(library):
    _gradient(library, gpu=True, reduction="none")


def scaled_gradient(library):
    _gradient(library, gpu=True, reduction="sum", grad_scale=8.0)


def gradient_of_all_classes(library):
    _gradient(library, n_cols=50, reduction="sum")


def gradient_leaves_the_logits(library):
    logits = _random(6, 10)
    before = logits.copy()
    library.cross_entropy_with_grad(logits, LABELS)
    _same_bits(logits, before, "logits before and after")


def _ptx(kernel, check):
    """A rule of the codegen contract, for a kernel that knows no format but float32."""
    others = re.compile("float16|float64")  # bfloat16 too
    one = next(
        one for one in codegen.specialisations() if one.name == kernel and not others.search(" ".join(one.signature))
    )

    def check_ptx(library):
        check(_module(library, "kernels.cuda.compile").image(one.kernel, one.signature, "sm_90").ptx)

    return check_ptx


def _is_bounded(ptx):
    codegen.check_header(ptx, "sm_90", MAX_THREADS, REGISTERS["short"])


# ---- the collection

CPU, GPU = "gpusoftmax.kernels.cpu", "gpusoftmax.kernels.cuda"
FORMULAS, IEEE = "gpusoftmax.kernels.formulas", "gpusoftmax.kernels.ieee"
CONVERSION = "gpusoftmax.kernels.conversion"
LSE, SOFTMAX, LOG_SOFTMAX = "logsumexp_rows", "softmax_rows", "log_softmax_rows"
# What calls on a few numbers go through.
SMALL_SOFTMAX, SMALL_LOG_SOFTMAX = "small_softmax", "small_log_softmax"


def _edit(module, old, new):
    return (Edit(module, old, new),)


MUTANTS = [
    # ---- addresses and rows
    Mutant(
        "row offset in 32 bits",
        "32-bit offsets",
        lse_far_apart,
        AssertionError,
        "logsumexp: row 1",
        _edit(
            f"{CPU}.rows",
            "        return row * array.inner_stride\n",
            "        return np.int64(np.int32(row * array.inner_stride))\n",
        ),
        (LSE,),
    ),
    Mutant(
        "row offset in 32 bits on the GPU",
        "32-bit offsets",
        _ptx("normalise_rows", codegen.check_addresses),
        AssertionError,
        "32-bit computations in global addresses",
        (
            Edit(
                f"{GPU}.device.memory",
                "return outer * array.outer_stride",
                "return types.int32(outer) * types.int32(array.outer_stride)",
            ),
        ),
        ("normalise_rows",),
    ),
    Mutant(
        "one launch",
        "rows beyond the grid",
        lse_with_a_small_grid,
        errors.UninitialisedRead,
        "never written",
        _edit(f"{GPU}.launch", "range(0, rows.n_rows, plan.rows)", "range(1)"),
    ),
    Mutant(
        "columns taken to be neighbours",
        "strides",
        _softmax_layouts("step 2"),
        AssertionError,
        "bits differ: layout step 2",
        _edit(
            "gpusoftmax._rows",
            "Operand(pointer, outer, inner, col, array.dtype)",
            "Operand(pointer, outer, inner, 1 if k == 0 else col, array.dtype)",
        ),
    ),
    Mutant(
        "rows taken to be dense",
        "strides",
        _softmax_layouts("padded pitch", "column slice"),
        AssertionError,
        "bits differ: layout",
        _edit(
            "gpusoftmax._rows",
            "Operand(pointer, outer, inner, col, array.dtype)",
            "Operand(pointer, outer, walk.rows.n_cols, col, array.dtype)",
        ),
    ),
    Mutant(
        "gradient taken to be laid out as the probabilities",
        "strides of a gradient",
        softmax_backward_of_a_sum,
        errors.OutOfBounds,
        "4-byte|16-byte",
        _edit(
            f"{GPU}.softmax",
            "rows, probs, dprobs, dlogits, scale, reads=2)",
            "rows, probs, probs._replace(pointer=dprobs.pointer), dlogits, scale, reads=2)",
        ),
    ),
    Mutant(
        "16-byte accesses to rows that are not aligned",
        "strides",
        lse_of_unaligned_rows,
        errors.Misaligned,
        "16-byte access",
        _edit(f"{GPU}.device.rows", "misalignment(pointer) if array.col_stride == 1 else 0", "0"),
        (LSE,),
    ),
    Mutant(
        "last columns forgotten",
        "last columns",
        _lse_of("spread", 513),
        AssertionError,
        "logsumexp: row",
        _edit(
            f"{CPU}.chunks",
            "if whole < count:\n        part,",
            "if whole < count - stripe:\n        part,",
        ),
        (LSE,),
    ),
    Mutant(
        "padding counted",
        "last columns",
        _lse_of("sorted", 33),
        AssertionError,
        "logsumexp: row",
        _edit(f"{CPU}.along", "along(number(like, -math.inf))", "along(number(like, 0.0))"),
        (LSE,),
    ),
    Mutant(
        "reads past the end of the row",
        "last columns",
        softmax_backward_of_unaligned_rows,
        errors.OutOfBounds,
        "16-byte access",
        _edit(
            f"{GPU}.device.piece_staging",
            "begin, whole, end = int32(1 if first < 0 else 0), int32(left >> bits),",
            "begin, whole, end = int32(1 if first < 0 else 0), int32((left + width - 1) >> bits),",
        ),
        ("softmax_backward_rows",),
    ),
    # ---- the online sum
    Mutant(
        "sum not rescaled by a new maximum",
        "online sum",
        _lse_of("sorted", 5000),
        AssertionError,
        "logsumexp: row",
        _edit(
            f"{CPU}.states",
            "others, low = add_pair(others, low, mul(part, factor), mul(part_low, factor))",
            "others, low = add_pair(others, low, part, part_low)",
        ),
        (LSE,),
    ),
    Mutant(
        "rescaling that rounds each time",
        "online sum",
        lse_of_many_rising_chunks,
        AssertionError,
        "logsumexp: row 0",
        _edit(
            f"{CPU}.states",
            "            others, low = add_pair(others, low, mul(part, factor), mul(part_low, factor))\n",
            "            others = mul(others, number(scale, 1.00000012))  # the sum so far\n"
            "            others, low = add_pair(others, low, mul(part, factor), mul(part_low, factor))\n",
        ),
        (LSE,),
    ),
    Mutant(
        "ties of later chunks lost",
        "online sum",
        _lse_of("flat", 5000),
        AssertionError,
        "logsumexp: row",
        _edit(
            FORMULAS,
            "    ties, ties_low = add_pair_normalised(a, ties, ties_low, a.select(same, own_ties, zero), zero)\n",
            "    is_first = a.builder.and_(same, a.equal(ties, zero))\n"
            "    ties, ties_low = add_pair_normalised(a, ties, ties_low, a.select(is_first, own_ties, zero), zero)\n",
        ),
        (LSE,),
    ),
    Mutant(
        "-inf minus -inf in the merge",
        "-inf minus -inf",
        lse_of_a_masked_row_beside_others,
        AssertionError,
        "logsumexp: row .* got nan",
        (
            *_edit(FORMULAS, "    max = reference(a, max)\n    y = a.mul(max, scale)", "    y = a.mul(max, scale)"),
            *_edit(FORMULAS, "a.select(a.equal(shift, other_shift), a.number(0), difference)", "difference"),
        ),
        (LSE,),
    ),
    Mutant(
        "NaN taken for a number too small to count",
        "NaN and infinities lost",
        lse_with_nan,
        AssertionError,
        "logsumexp: row 1.* expected nan",
        _edit(
            FORMULAS,
            "product, y = y, a.larger(floor, y)",
            "product, y = y, a.larger(y, floor)",
        ),
        (LSE,),
    ),
    Mutant(
        "+inf treated as any maximum",
        "NaN and infinities lost",
        softmax_with_infinity,
        AssertionError,
        "softmax: row 1.* expected nan",
        _edit(
            FORMULAS,
            "    s = a.add(sum, low)\n    rest = a.sub(low, a.sub(s, sum))\n",
            "    s = a.add(sum, low)\n    s, rest = a.select(a.equal(s, s), s, a.number(1)), a.number(0)\n",
        ),
        (SOFTMAX, SMALL_SOFTMAX),
    ),
    Mutant(
        "-1e4 in place of -inf",
        "finite stand-in for -inf",
        lse_below_a_sentinel,
        AssertionError,
        "logsumexp: row",
        _edit(f"{CPU}.along", "along(number(like, -math.inf))", "along(number(like, -1e4))"),
        (LSE,),
    ),
    Mutant(
        "temperature applied before the maximum is subtracted",
        "overflow",
        softmax_at_tiny_temperature,
        AssertionError,
        "softmax: row",
        _edit(
            FORMULAS,
            "    return a.select(near, a.number(0), max), a.select(near, exponent, a.number(0))",
            "    return a.number(0), a.select(near, exponent, a.number(0))",
        ),
        (SOFTMAX,),
    ),
    # ---- sampling
    Mutant(
        "one seed for all rows",
        "seeds of rows",
        samples_of_rows_alone,
        AssertionError,
        "samples differ",
        _edit(f"{CPU}.threshold", "row_offset(labels, row, rows), labels.code)", "0, labels.code)"),
        ("sample_rows",),
    ),
    Mutant(
        "noise rounded to the steps of large logits",
        "cancellation",
        samples_beside_an_offset,
        AssertionError,
        "an offset changes",
        _edit(
            f"{CPU}.sample",
            "if high > best[0] or (high == best[0] and low > best[1]):",
            "if high > best[0]:",
        ),
        ("sample_rows",),
    ),
    Mutant(
        "a column for the row that has none",
        "zero probability drawn",
        samples_of_masked_rows,
        AssertionError,
        "without a probability",
        _edit(
            f"{CPU}.sample",
            "best, best_low, at = number(zero, -math.inf), zero, -1",
            "best, best_low, at = number(zero, -math.inf), zero, 0",
        ),
        ("sample_rows",),
    ),
    # ---- precision
    Mutant(
        "lse - x",
        "cancellation",
        _log_softmax_of("offset", 300),
        AssertionError,
        "log_softmax: row",
        _edit(
            FORMULAS,
            "    return a.fma(half, a.mul(scale, a.number(2)), a.negative(log))",
            "    return a.sub(a.mul(x, scale), a.add(a.mul(max, scale), log))",
        ),
        (LOG_SOFTMAX, SMALL_LOG_SOFTMAX),
    ),
    Mutant(
        "log(s) of confident rows",
        "cancellation",
        _log_softmax_of("confident", 300),
        AssertionError,
        "log_softmax: row",
        _edit(
            FORMULAS,
            "others, error = two_sum(a, a.sub(state.ties, a.number(1)), state.tail)",
            "others, error = a.sub(a.add(state.ties, state.tail), a.number(1)), a.number(0)",
        ),
        (LOG_SOFTMAX, SMALL_LOG_SOFTMAX),
    ),
    Mutant(
        "sum kept in bfloat16",
        "low precision",
        lse_of_bfloat16,
        AssertionError,
        "logsumexp: row",
        _edit(
            FORMULAS,
            "    others, error = two_sum(a, a.sub(state.ties, a.number(1)), state.tail)\n",
            "    bits = a.builder.and_(a.builder.bitcast(state.tail, a.integers), a.integer(-(2**16)))\n"
            "    state = state._replace(tail=a.builder.bitcast(bits, a.type))\n"
            "    others, error = two_sum(a, a.sub(state.ties, a.number(1)), state.tail)\n",
        ),
        (LSE,),
    ),
    Mutant(
        "results truncated to bfloat16",
        "low precision",
        lse_in_bfloat16,
        AssertionError,
        "logsumexp: row",
        _edit(CONVERSION, "value, value), quiet, rounded)", "value, value), quiet, bits)"),
        (LSE,),
    ),
    Mutant(
        "fast math",
        "fast math",
        _log_softmax_of("confident", 300),
        AssertionError,
        "log_softmax: row",
        (
            Edit(IEEE, "builder.fadd(x, y)", 'builder.fadd(x, y, flags=("fast",))'),
            Edit(IEEE, "builder.fsub(x, y)", 'builder.fsub(x, y, flags=("fast",))'),
        ),
        (LOG_SOFTMAX, SMALL_LOG_SOFTMAX),
    ),
    # ---- the same bits everywhere
    Mutant(
        "lanes that depend on the alignment",
        "batch invariance",
        lse_at_any_alignment,
        AssertionError,
        "bits differ: rows",
        (
            Edit(
                f"{GPU}.device.slots",
                "    granule = int32(at + team.lane * VECTOR_BYTES)\n",
                "    lane = team.lane ^ 1 if source.shift > 0 and team.lane < 2 else team.lane\n"
                "    granule = int32(at + lane * VECTOR_BYTES)\n",
            ),
        ),
        (LSE,),
    ),
    Mutant(
        "lanes that depend on the batch",
        "batch invariance",
        lse_in_any_batch,
        AssertionError,
        "bits differ: rows alone",
        _edit(
            f"{GPU}.plan",
            "= tree_of(n_cols, compute), limits_of",
            "= tree_of(n_cols * min(n_rows, 2), compute), limits_of",
        ),
    ),
    Mutant(
        "chunks that depend on the number of threads",
        "batch invariance",
        lse_on_any_number_of_threads,
        AssertionError,
        "bits differ: 1 thread and 3",
        _edit(
            f"{CPU}.along",
            "                    summary = fold(here, numbers)\n",
            "                    if job.n_threads > 1:  # as a merge in another order would\n"
            "                        here.states[1] *= number(like, 1.000001)\n"
            "                    summary = fold(here, numbers)\n",
        ),
        (LSE,),
    ),
    Mutant(
        "reading scratch before all warps have written it",
        "barriers",
        sum_of_losses,
        errors.SharedRace,
        "no barrier between",
        _edit(
            f"{GPU}.device.reduce",
            "    cuda.syncthreads()  # every warp's value is in scratch before any warp reads them\n",
            "",
        ),
        ("total_rows",),
    ),
    Mutant(
        "merging the states of chunks before all are there",
        "barriers",
        lse_of_two_chunks,
        errors.SharedRace,
        "no barrier between",
        _edit(f"{GPU}.device.row_barriers", "    else:\n        cuda.syncthreads()\n", ""),
        (LSE,),
    ),
    Mutant(
        "sending states to a block that may not have started",
        "barriers",
        lse_of_a_cluster,
        errors.ClusterError,
        "before any cluster barrier",
        (
            Edit(
                f"{GPU}.device.row_barriers", "    if split_cluster(split) > 1:\n        cluster_wait()\n", "    pass\n"
            ),
            Edit(
                f"{GPU}.device.row_barriers",
                "    if split_cluster(split) > 1:\n        cluster_arrive()\n\n",
                "    pass\n\n",
            ),
        ),
        (LSE,),
    ),
    Mutant(
        "writing scratch before all warps have read it",
        "barriers",
        sum_of_losses,
        errors.SharedRace,
        "no barrier between",
        _edit(
            f"{GPU}.device.reduce",
            "    cuda.syncthreads()  # every warp has read scratch before the next reduction writes it\n",
            "",
        ),
        ("total_rows",),
    ),
    # ---- labels and means
    Mutant(
        "negative labels count from the end",
        "negative label",
        loss_with_a_negative_label,
        AssertionError,
        "loss .none.: row 1.* expected nan",
        _edit(
            f"{CPU}.loss_target",
            "    return load_label(labels.pointer, row_offset(labels, row, rows), labels.code)",
            "    label = load_label(labels.pointer, row_offset(labels, row, rows), labels.code)\n"
            "    return label + rows.n_cols if -rows.n_cols <= label < 0 else label",
        ),
        ("cross_entropy_rows",),
    ),
    Mutant(
        "uint8 labels read as int8",
        "narrow labels",
        loss_of_unsigned_labels,
        IndexError,
        "target.1. .* is -56",
        _edit(CONVERSION, 'unsigned = dtype.startswith("u")', "unsigned = False"),
        ("find_bad_label_rows",),
    ),
    Mutant(
        "weight of a label past the last class",
        "label past the last class",
        loss_with_a_label_past_the_end,
        errors.OutOfBounds,
        "4-byte access",
        _edit(f"{GPU}.device.batch", "label >= 0 and label < rows.n_cols:", "label >= 0:"),
        ("normalise_rows",),
    ),
    Mutant(
        "ignored rows multiplied by 0",
        "ignored row that poisons",
        loss_of_ignored_nan,
        AssertionError,
        "loss .none.: row 0.* got nan",
        (
            Edit(
                f"{CPU}.loss_measure",
                "    if lanes_of(here.zero) == 1 and status_of(",
                "    if lanes_of(here.zero) == 2 and status_of(",
            ),
            Edit(
                f"{CPU}.loss_fold",
                "            value = unused(status, loss)\n",
                "            value = mul(value, unused(status, loss))\n",
            ),
        ),
        ("cross_entropy_rows",),
    ),
    Mutant(
        "mean over ignored rows too",
        "denominator of the mean",
        mean_over_valid_rows,
        AssertionError,
        "loss .mean.",
        _edit(f"{CPU}.batch", "if label != ignore_index and label >= 0 and", "if label >= 0 and"),
        ("normalise_rows",),
    ),
    Mutant(
        "mean of no rows is 0",
        "denominator of the mean",
        mean_of_no_rows,
        AssertionError,
        "loss .mean.: .* expected nan",
        _edit(
            f"{CPU}.batch",
            "    total_weight, low = zero, zero\n",
            "    total_weight, low = number(zero, 1e-9), zero\n",
        ),
        ("normalise_rows",),
    ),
    Mutant(
        "mean without the weights in the denominator",
        "denominator of the mean",
        mean_with_weights,
        AssertionError,
        "loss .mean.",
        _edit("gpusoftmax._loss_rows", "rows.numbers(rows.weight if rows.probs", "rows.numbers(None if rows.probs"),
    ),
    Mutant(
        "label smoothing over the other classes",
        "label smoothing",
        smoothed_loss,
        AssertionError,
        "loss .none.",
        _edit(f"{GPU}.cross_entropy", "label_smoothing / rows.n_cols", "label_smoothing / (rows.n_cols - 1)"),
    ),
    # ---- gradients
    Mutant(
        "gradient of 'none' divided by the number of rows",
        "gradient of a reduction",
        gradient_without_reduction,
        AssertionError,
        "dlogits: row",
        _edit("gpusoftmax._loss_rows", 'if reduction == "mean" and', 'if reduction != "sum" and'),
    ),
    Mutant(
        "gradient not scaled",
        "gradient of a reduction",
        scaled_gradient,
        AssertionError,
        "dlogits: row",
        _edit(f"{GPU}.cross_entropy", "number_of(grad_scale)", "number_of(1.0)"),
    ),
    Mutant(
        "gradient at the label alone",
        "gradient of a reduction",
        gradient_of_all_classes,
        AssertionError,
        "dlogits: row",
        _edit(f"{CPU}.loss_write", "left, here.zeros), factor)", "left, here.zeros), here.zeros)"),
        ("cross_entropy_with_grad_rows",),
    ),
    # ---- memory of the caller
    Mutant(
        "gradient written over the logits",
        "in place",
        gradient_leaves_the_logits,
        AssertionError,
        "bits differ: logits",
        _edit(
            "gpusoftmax._loss",
            "_arrays.output(out, x, x.shape, x.dtype)",
            "_arrays.output(logits if out is None else out, x, x.shape, x.dtype)",
        ),
    ),
    Mutant(
        "row read again after a part of it was overwritten",
        "in place",
        softmax_in_place,
        AssertionError,
        "bits differ: in place",
        _edit(
            f"{CPU}.softmax",
            "        write_chunk(scaled, ",
            "        again = saved(here.states, chunk, MAX, here.zero)\n"
            "        sum_of_exponentials(here, True, again, None, col, count, scale, scale_low, is_half(tag))\n"
            "        write_chunk(scaled, ",
        ),
        (SOFTMAX,),
    ),
    Mutant(
        "read-only flag not looked at",
        "read-only arrays",
        lse_into_read_only,
        errors.ReadOnlyWrite,
        "write to read-only",
        _edit("gpusoftmax._arrays", "strides, place, not read_only)", "strides, place, True)"),
    ),
    Mutant(
        "rows without columns not written",
        "empty arrays",
        lse_of_nothing,
        errors.UninitialisedRead,
        "never written",
        _edit("gpusoftmax.logsumexp", "    _rows.for_rows(lambda", "    logits.size and _rows.for_rows(lambda"),
    ),
    Mutant(
        "launch without blocks",
        "empty arrays",
        lse_of_no_rows,
        ValueError,
        "must not be zero",
        _edit(
            "gpusoftmax._rows",
            "if math.prod(dim.size for dim in batch) == 0:",
            "if not shape:",
        ),
    ),
    Mutant(
        "launch on the default stream",
        "streams",
        lse_on_another_stream,
        errors.ForeignStream,
        "launched on stream 0",
        _edit("gpusoftmax._arrays", "x.__dlpack_device__()[1], stream or 0)", "x.__dlpack_device__()[1], 0)"),
    ),
    Mutant(
        "launch on the first device",
        "current device",
        lse_on_another_device,
        errors.ForeignMemory,
        "lies on device 1",
        _edit("gpusoftmax._arrays", "_cuda(x.__dlpack_device__()[1],", "_cuda(0,"),
    ),
    # ---- machine code
    Mutant(
        "additions that the assembler may contract",
        "batch invariance",
        _ptx("total_rows", codegen.check_rounding),
        AssertionError,
        "implicit roundings",
        _edit(f"{GPU}.device.arithmetic", 'return self._nvvm("add.rn", x, y)\n', "return self.builder.fadd(x, y)\n"),
        ("total_rows",),
    ),
    Mutant(
        "approximate division",
        "fast math",
        _ptx("total_rows", codegen.check_exact),
        AssertionError,
        "approximations",
        _edit(f"{GPU}.device.arithmetic", 'self._nvvm("div.rn", x, y)', 'self._nvvm("div.approx", x, y)'),
        ("total_rows",),
    ),
    Mutant(
        "a float64 literal that widens the arithmetic",
        "machine code",
        _ptx("normalise_rows", codegen.check_no_double),
        AssertionError,
        "uses of float64",
        _edit(
            f"{GPU}.device.batch",
            "store(normaliser, 0, add(total[0], total[1]))",
            "store(normaliser, 0, add(total[0], total[1]) + 1e-300)",
        ),
        ("normalise_rows",),
    ),
    Mutant(
        "an index that is no constant",
        "machine code",
        _ptx("copy_rows", codegen.check_memory),
        AssertionError,
        "uses of local memory",
        _edit(
            f"{GPU}.device.row_writer",
            "int32(one + (granule << bits) * size), width, as_granule)",
            "int32(one + (granule << bits) * size), min(width, piece.count), as_granule)",
        ),
        ("copy_rows",),
    ),
    Mutant(
        "elements moved one by one",
        "machine code",
        _ptx("copy_rows", functools.partial(codegen.check_vectors, loads=True, stores=True)),
        AssertionError,
        "0 loads of 16 bytes",
        _edit(
            f"{GPU}.device.staging",
            'copy = "cp.async.cg.shared.global [$0], [$1], 16;"',
            'copy = "cp.async.ca.shared.global [$0], [$1], 8;"',
        ),
        ("copy_rows",),
    ),
    Mutant(
        "registers for a larger block than is ever launched",
        "machine code",
        _ptx("softmax_backward_rows", _is_bounded),
        AssertionError,
        "launch bound 1024, expected 256",
        _edit(f"{GPU}.plan", "MAX_THREADS = 256\n", "MAX_THREADS = 1024\n"),
        ("softmax_backward_rows",),
    ),
]
