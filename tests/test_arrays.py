"""What may be passed, what comes back and where it runs: kinds of arrays, dtypes, devices, streams, imports."""

import contextlib
import doctest
import gc
import importlib
import inspect
import itertools
import os
import pkgutil
import re
import subprocess
import sys
import textwrap
import types
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

import gpusoftmax
from gpusoftmax import _replay
from gpusoftmax.kernels.cuda.plan import PART_ROWS
from tests import inputs, tolerances
from tests.calls import CALLS, Untouched, arguments, same_bits
from tests.emulator import emulated_gpu
from tests.emulator.gpu import EmulatedArray

F32 = np.dtype(np.float32)
X = inputs.make("spread", (3, 40), F32)
ROW_OPS = [gpusoftmax.softmax, gpusoftmax.log_softmax, gpusoftmax.logsumexp]
PUBLIC = sorted(gpusoftmax.__all__)


@pytest.fixture
def gpu():
    with emulated_gpu("sm_90", devices=2, track=False) as gpu:
        yield gpu


# ---------------------------------------------------------------- what becomes a NumPy array

BECOME_FLOAT64 = {
    "list": [[1.0, 2.5, -3.0]],
    "list of ints": [[1, 2, -3]],
    "tuple": ((1, 2), (3, 4)),
    "list of arrays": [np.array([1, 2], np.float16).astype(int), np.array([3, 4])],
    "bools": [[True, False]],
    "bool array": np.array([True, False, True]),
    "int8": np.array([[-128, 127]], np.int8),
    "uint64": np.array([2**64 - 1, 0], np.uint64),
    "range": range(5),
    "int": 3,
    "float": 2.5,
    "bool": True,
    "empty list": [],
    "memoryview": memoryview(np.array([1.0, 2.0])),
}


@pytest.mark.parametrize("case", BECOME_FLOAT64)
@pytest.mark.parametrize("function", ROW_OPS)
def test_lists_and_integers_become_float64(function, case):
    x = BECOME_FLOAT64[case]
    result = function(x)
    assert isinstance(result, np.ndarray | np.generic) and result.dtype == np.float64
    assert same_bits(result, function(np.asarray(x).astype(np.float64)))


def test_labels_and_weights_from_lists():
    expected = gpusoftmax.cross_entropy(X.astype(float), np.array([1, 2, 3]), np.linspace(1, 2, 40))
    assert gpusoftmax.cross_entropy(X.astype(float).tolist(), [1, 2, 3], list(np.linspace(1, 2, 40))) == expected
    whole = gpusoftmax.cross_entropy(X, (1, 2, 3), [1] * 39 + [2])
    assert same_bits(whole, gpusoftmax.cross_entropy(X, np.array([1, 2, 3]), np.array([1] * 39 + [2], F32)))


@pytest.mark.parametrize("dtype", inputs.DTYPES, ids=str)
def test_scalars_and_arrays_where_numpy_gives_them(dtype):
    row_dtype = np.float64 if dtype == np.float64 else np.float32
    for x in (dtype.type(3), np.array(3, dtype)):
        for axis in (-1, 0, None):
            probs, logp, lse = (function(x, axis) for function in ROW_OPS)
            assert type(probs) is dtype.type and probs == 1
            assert type(logp) is dtype.type and logp == 0
            assert type(lse) is row_dtype and lse == 3
    row = np.array([0, 0], dtype)
    assert type(gpusoftmax.logsumexp(row)) is row_dtype
    assert type(gpusoftmax.logsumexp(row[None], None)) is row_dtype
    assert gpusoftmax.logsumexp(row, keepdims=True).shape == (1,)
    assert gpusoftmax.logsumexp(row[None]).shape == (1,)
    assert type(gpusoftmax.cross_entropy(row[None], [1])) is row_dtype
    assert type(gpusoftmax.cross_entropy(row, 1, reduction="none")) is row_dtype
    assert gpusoftmax.cross_entropy(row[None], [1], reduction="none").shape == (1,)
    out = np.empty((), row_dtype)
    assert gpusoftmax.logsumexp(row, out=out) is out


def test_one_number_on_a_device_is_an_array(gpu):
    x = gpu.array(X[0])
    for result in (gpusoftmax.logsumexp(x), gpusoftmax.cross_entropy(x, gpu.array(np.array(3)))):
        assert isinstance(result, EmulatedArray) and result.shape == () and result.dtype == F32
    scalar = gpusoftmax.softmax(gpu.array(np.array(3, F32)))
    assert scalar.shape == () and gpu.get(scalar) == 1


@pytest.mark.parametrize("kind", [np.matrix, np.memmap, np.recarray])
def test_subclasses_of_ndarray(kind, tmp_path):
    if kind is np.memmap:
        x = np.memmap(tmp_path / "x", F32, "w+", shape=X.shape)
        x[...] = X
    else:
        x = X.copy().view(kind)
    expected = gpusoftmax.softmax(X)
    result = gpusoftmax.softmax(x)
    assert type(result) is np.ndarray and same_bits(result, expected)
    out = x.copy() if kind is not np.memmap else x
    assert gpusoftmax.softmax(X, out=out) is out
    assert same_bits(out, expected)
    empty = X[:0].view(kind)
    assert gpusoftmax.softmax(X[:0], out=empty) is empty


UNSUPPORTED = {
    "complex": np.array([1, 2j]),
    "object": np.array([1, 2], object),
    "longdouble": np.array([1, 2], np.longdouble),
    "float8_e4m3fn": np.zeros(3, ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.zeros(3, ml_dtypes.float8_e5m2),
    "int4": np.zeros(3, ml_dtypes.int4),
    "text": np.array(["a", "b"]),
    "bytes": np.array([b"a"]),
    "date": np.zeros(3, "M8[s]"),
    "time": np.zeros(3, "m8[s]"),
    "record": np.zeros(3, [("a", "f4")]),
    "nothing": np.zeros(3, "V0"),
    "None": None,
    "any object": object(),
    "dict": {1: 2},
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_dtypes(case):
    x = UNSUPPORTED[case]
    dtype = re.escape(np.asarray(x).dtype.name)
    for function in ROW_OPS:
        with pytest.raises(
            TypeError, match=f"^x has dtype {dtype}, expected one of float16, bfloat16, float32, float64"
        ):
            function(x)
    with pytest.raises(TypeError, match="^dprobs has dtype"):
        gpusoftmax.softmax_backward(X, x)
    if x is not None:
        with pytest.raises(TypeError, match="^weight has dtype"):
            gpusoftmax.cross_entropy(X, [1, 2, 3], x)
    with pytest.raises(TypeError, match="^(logits|target) has dtype"):
        gpusoftmax.cross_entropy(x, [1, 2, 3])
    if isinstance(x, np.ndarray) and case not in ("text", "bytes"):
        with pytest.raises(TypeError, match="^out has (dtype|shape)"):
            gpusoftmax.softmax(np.zeros(x.shape), out=x)


@pytest.mark.parametrize("dtype", ["f4", "f8", "c8", "?", "O", "U1", "V4", "M8[s]", inputs.BFLOAT16, ml_dtypes.int4])
def test_labels_that_are_no_integers(dtype):
    with pytest.raises(TypeError, match="^target has dtype .*, expected an integer dtype"):
        gpusoftmax.cross_entropy(X, np.zeros(3, dtype))


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", ">i2", ">i8"])
def test_labels_of_any_integer_dtype(dtype):
    labels = np.array([39, 0, 7])
    assert same_bits(gpusoftmax.cross_entropy(X, labels.astype(dtype)), gpusoftmax.cross_entropy(X, labels))


def test_masked_arrays():
    masked = np.ma.array(X, mask=X > 0)
    for function in ROW_OPS:
        with pytest.raises(TypeError, match="^x is a masked array, whose mask would be lost"):
            function(masked)
    with pytest.raises(TypeError, match="^target is a masked array"):
        gpusoftmax.cross_entropy(X, np.ma.array([1, 2, 3], mask=[0, 1, 0]))
    with pytest.raises(TypeError, match="^out is a masked array"):
        gpusoftmax.softmax(X, out=np.ma.array(X.copy()))


SWAPPED = ("softmax", "cross_entropy", "token_logprobs")
"""How an array is taken does not depend on what is done with it: in every format for a few."""


def unusual(array):
    """(name, array): the same values, swapped, misaligned, or with strides that no element size divides."""
    swapped = array.astype(array.dtype.newbyteorder(">")) if array.dtype != inputs.BFLOAT16 else None
    raw = np.zeros(array.nbytes + 1, np.uint8)
    misaligned = raw[1:].view(array.dtype).reshape(array.shape)
    field = np.zeros(array.shape, [("before", "u1"), ("value", array.dtype), ("after", "u2")])["value"]
    for name, view in (("swapped", swapped), ("misaligned", misaligned), ("field of a record", field)):
        if view is not None:
            view[...] = array
            yield name, view


@pytest.mark.parametrize(
    "name, dtype",
    [
        pytest.param(
            name, dtype, marks=[] if dtype == F32 or name in SWAPPED else pytest.mark.matrix, id=f"{dtype}-{name}"
        )
        for name, dtype in itertools.product(CALLS, inputs.DTYPES)
    ],
)
def test_swapped_and_misaligned_arrays(name, dtype):
    arrays = arguments(name, (3, 40), dtype)
    expected = CALLS[name].function(*arrays.values())
    for argument, array in arrays.items():
        for kind, view in unusual(array):
            assert not view.dtype.isnative or not view.flags.aligned, kind
            with Untouched(view):
                result = CALLS[name].function(*{**arrays, argument: view}.values())
            assert same_bits(result, expected), (argument, kind)


@pytest.mark.parametrize("dtype", inputs.DTYPES, ids=str)
def test_outputs_that_numpy_would_have_to_convert(dtype):
    expected = gpusoftmax.softmax(X.astype(dtype))
    for kind, out in unusual(np.zeros((3, 40), dtype)):
        if kind == "misaligned":  # which is written where it lies
            assert gpusoftmax.softmax(X.astype(dtype), out=out) is out and same_bits(out, expected)
            continue
        with Untouched(out), pytest.raises(TypeError, match="^out is byte-swapped, has strides"):
            gpusoftmax.softmax(X.astype(dtype), out=out)
        assert kind
    for out in ([[0.0] * 40] * 3, 0.0, np.float32(0), (np.empty((3, 40), F32),), "out", object()):
        with pytest.raises(TypeError, match="^out is byte-swapped, has strides"):
            gpusoftmax.softmax(X, out=out)


# ---------------------------------------------------------------- dtype=

NAMES_OF_DTYPES = {
    "float16": ["float16", "half", np.float16, np.dtype(np.float16), np.dtype(">f2")],
    "bfloat16": ["bfloat16", ml_dtypes.bfloat16, np.dtype(ml_dtypes.bfloat16)],
    "float32": ["float32", "single", np.float32, np.dtype("f4"), np.dtype(">f4"), np.single],
    "float64": ["float64", "double", "float", float, np.float64, np.dtype(float), np.double],
}


@pytest.mark.parametrize("name", NAMES_OF_DTYPES)
def test_names_of_dtypes(name):
    expected = gpusoftmax.softmax(X, dtype=name)
    for dtype in NAMES_OF_DTYPES[name]:
        result = gpusoftmax.softmax(X, dtype=dtype)
        assert result.dtype.name == name and result.dtype.isnative
        assert same_bits(result, expected)
        assert gpusoftmax.logsumexp(X, dtype=dtype).dtype.name == name
    tolerances.check_softmax(expected, X)


@pytest.mark.parametrize(
    "dtype", [int, bool, complex, object, str, "int8", "float8", "float128", np.longdouble, np.int32, 3, (), "", X]
)
def test_what_is_no_dtype_of_a_result(dtype):
    for function in ROW_OPS:
        with pytest.raises(TypeError, match="(?s)^dtype is .*, expected one of float16, bfloat16, float32, float64"):
            function(X, dtype=dtype)


# ---------------------------------------------------------------- devices, streams, allocators


def test_mixed_kinds_name_both(gpu):
    x, labels = gpu.array(X), np.array([1, 2, 3])
    cuda, numpy = "a CUDA array on GPU 0", "a NumPy array on the CPU"
    for call, one, two in (
        (lambda: gpusoftmax.softmax(x, out=X.copy()), cuda, f"out is {numpy}"),
        (lambda: gpusoftmax.softmax(X, out=x), numpy, f"out is {cuda}"),
        (lambda: gpusoftmax.softmax_backward(x, X), f"probs is {cuda}", f"dprobs is {numpy}"),
        (lambda: gpusoftmax.log_softmax_backward(X, x), f"log_probs is {numpy}", f"dlog_probs is {cuda}"),
        (lambda: gpusoftmax.cross_entropy(x, labels), f"logits is {cuda}", f"target is {numpy}"),
        (lambda: gpusoftmax.cross_entropy(X, gpu.array(labels)), f"logits is {numpy}", f"target is {cuda}"),
        (lambda: gpusoftmax.cross_entropy(x, gpu.array(labels), X[0]), f"logits is {cuda}", f"weight is {numpy}"),
        (lambda: gpusoftmax.cross_entropy_with_grad(X, labels, out=x), numpy, f"out is {cuda}"),
        (lambda: gpusoftmax.cross_entropy(x, [1, 2, 3]), cuda, numpy),
    ):
        with pytest.raises(TypeError) as raised:
            call()
        assert one in str(raised.value) and two in str(raised.value)
        assert "expected both from one library on one device" in str(raised.value)
    assert not gpu.stats


def test_mixed_devices_name_both(gpu):
    near, far, labels = gpu.array(X), gpu.array(X, device=1), np.array([1, 2, 3])
    for call in (
        lambda: gpusoftmax.softmax(near, out=far),
        lambda: gpusoftmax.softmax_backward(near, far),
        lambda: gpusoftmax.cross_entropy(near, gpu.array(labels, device=1)),
        lambda: gpusoftmax.cross_entropy(near, gpu.array(labels), gpu.array(X[0], device=1)),
    ):
        with pytest.raises(TypeError, match="a CUDA array on GPU 0 and .* is a CUDA array on GPU 1"):
            call()
    assert not gpu.stats


@pytest.mark.parametrize("name", CALLS)
def test_everything_runs_where_the_arrays_are(gpu, name):
    arrays = arguments(name, (3, 40), F32)
    expected = gpu.get(CALLS[name].function(*(gpu.array(array) for array in arrays.values())))
    assert {launch.device for launch in gpu.stats} == {0}
    gpu.reset_stats()
    result = CALLS[name].function(*(gpu.array(array, device=1) for array in arrays.values()))
    assert {launch.device for launch in gpu.stats} == {1}
    for part in result if isinstance(result, tuple) else (result,):
        assert part.__dlpack_device__() == (2, 1)
    assert same_bits(gpu.get(result), expected)


@pytest.mark.parametrize("name", CALLS)
def test_everything_runs_on_the_stream_of_the_arrays(gpu, name):
    with gpu.stream(11):
        CALLS[name].function(*(gpu.array(array) for array in arguments(name, (3, 40), F32).values()))
    assert {launch.stream for launch in gpu.stats} == {11}


class Producer:
    """An emulated array whose `__cuda_array_interface__` says something else."""

    def __init__(self, array, **changes):
        self.array, self.changes = array, changes

    @property
    def __cuda_array_interface__(self):
        interface = {**self.array.__cuda_array_interface__, **self.changes}
        return {key: value for key, value in interface.items() if value != "absent"}

    def __getattr__(self, name):
        return getattr(self.array, name)

    def __gpusoftmax_empty__(self, shape, dtype):
        return Producer(self.array.__gpusoftmax_empty__(shape, dtype), **self.changes)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


@pytest.mark.parametrize("stream", [1, 2, 0x7F0012345678])
def test_streams_of_a_producer(gpu, stream):
    """1 is the legacy default stream, 2 that of the thread; both are handles that the driver takes as they are."""
    gpusoftmax.softmax(gpu.array(X, stream=stream))
    assert [launch.stream for launch in gpu.stats] == [stream]


@pytest.mark.parametrize("stream", [None, "absent"])
def test_a_producer_without_a_stream(gpu, stream):
    """No stream to wait for: the default stream."""
    with gpu.stream(0):
        gpusoftmax.softmax(Producer(gpu.array(X), stream=stream))
    assert [launch.stream for launch in gpu.stats] == [0]


def test_stream_0_is_ambiguous(gpu):
    """The protocol forbids it: it may mean either default stream."""
    with gpu.stream(0), pytest.raises((TypeError, ValueError), match="^x .*stream"):
        gpusoftmax.softmax(Producer(gpu.array(X), stream=0))
    assert not gpu.stats


def test_strides_of_a_producer_may_be_none(gpu):
    expected = gpu.get(gpusoftmax.softmax(gpu.array(X)))
    for strides in (None, "absent"):
        result = gpusoftmax.softmax(Producer(gpu.array(X), strides=strides))
        assert isinstance(result, Producer) and same_bits(gpu.get(result.array), expected)


class FailingAllocator:
    """Fails at the k-th allocation from now on; k=None only counts them."""

    def __init__(self, monkeypatch, k=None):
        allocate = EmulatedArray.__gpusoftmax_empty__
        self.count = 0

        def counted(array, shape, dtype):
            self.count += 1
            if self.count - 1 == k:
                raise MemoryError(f"no room for {shape}")
            return allocate(array, shape, dtype)

        monkeypatch.setattr(EmulatedArray, "__gpusoftmax_empty__", counted)


ALLOCATING = {
    **{name: call.function for name, call in CALLS.items()},
    "axes": lambda x: gpusoftmax.softmax(x, (0, 2)),
    "in place": lambda logits, target, weight: gpusoftmax.cross_entropy_with_grad(
        logits, target, weight, label_smoothing=0.1, validate=True, out=logits
    ),
    "axes in place": lambda x: gpusoftmax.softmax(x, (0, 2), out=x),
    "many rows in place": lambda logits, target: gpusoftmax.cross_entropy_with_grad(logits, target, out=logits),
    "many pairs of rows in place": lambda logits, others: gpusoftmax.kl_div_with_grad(logits, others, out=logits),
}


@pytest.mark.parametrize("case", ALLOCATING)
def test_failing_allocations(gpu, monkeypatch, case):
    """Whichever one fails: the error arrives, nothing has been written, nothing is leaked, the next call is right."""
    if case in CALLS:
        arrays = arguments(case, (3, 40), F32)
    elif case.startswith("axes"):
        arrays = {"x": X.reshape(2, 6, 10)}
    elif case.startswith("many"):  # their sums take several blocks, which need room of their own
        logits = inputs.make("spread", (PART_ROWS + 1, 3), F32)
        arrays = {"logits": logits, "others": logits[::-1].copy() if "pairs" in case else inputs.targets(*logits.shape)}
    else:
        arrays = {"logits": X, "target": np.array([3, 0, 39]), "weight": np.linspace(1, 2, 40, dtype=np.float16)}

    def call():
        placed = [gpu.array(array) for array in arrays.values()]
        try:
            return gpu.get(ALLOCATING[case](*placed))
        except MemoryError:
            for array, original in zip(placed, arrays.values(), strict=True):
                assert same_bits(gpu.get(array), original), "written before it failed"
            raise

    def live():
        return sum(not allocation.freed for memory in gpu.memories for allocation in memory.allocations)

    with monkeypatch.context() as patch:
        counter = FailingAllocator(patch)
        expected = call()
    assert counter.count or "in place" in case
    for k in range(counter.count):
        before = live()
        with monkeypatch.context() as patch:
            FailingAllocator(patch, k)
            with pytest.raises(MemoryError, match="no room for"):
                call()
        if live() > before:
            gc.collect()
        assert live() <= before
        assert same_bits(call(), expected)


# ---------------------------------------------------------------- protocols


class OnlyDlpack:
    def __init__(self, array, device=(1, 0)):
        self.array, self.device = array, device

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.device


class OnlyCudaArrayInterface:
    def __init__(self, array, read_only=False):
        self.array = array
        interface = array.__cuda_array_interface__
        self.__cuda_array_interface__ = {**interface, "data": (interface["data"][0], read_only)}


def test_host_memory_of_another_library_gives_numpy():
    expected = gpusoftmax.softmax(X)
    result = gpusoftmax.softmax(OnlyDlpack(X))
    assert type(result) is np.ndarray and same_bits(result, expected)
    out = np.empty_like(X)
    assert gpusoftmax.softmax(OnlyDlpack(X), out=out) is out
    read_only = X.copy()
    read_only.flags.writeable = False
    assert same_bits(gpusoftmax.softmax(OnlyDlpack(read_only)), expected)


OPTIONS_OF_DLPACK = {
    "temperature": (gpusoftmax.softmax, np.array([0.5, 1, 2], F32)),
    "one temperature": (gpusoftmax.softmax, np.array(0.5)),
    "n_valid": (gpusoftmax.softmax, np.array([1, 2, 3])),
    "rng": (gpusoftmax.sample, np.array([7, 8, 9])),
    "temperature of samples": (gpusoftmax.sample, np.array([0.5, 1, 2], F32)),
    "top_k": (gpusoftmax.sample, np.array([1, 2, 3])),
    "top_p": (gpusoftmax.sample, np.array([0.5, 0.6, 0.7])),
    "min_p": (gpusoftmax.sample, np.array([0.5, 0.6, 0.7])),
    "normalizer": (gpusoftmax.cross_entropy, np.array([3])),
}


@pytest.mark.parametrize("case", OPTIONS_OF_DLPACK)
def test_options_of_dlpack_alone(case):
    """They have no shape to tell them from a number by."""
    function, array = OPTIONS_OF_DLPACK[case]
    name = case.removesuffix(" of samples").removeprefix("one ")
    others = {gpusoftmax.sample: {"rng": 1}, gpusoftmax.cross_entropy: {"target": [1, 2, 3]}}.get(function, {})
    expected = function(X, **{**others, name: array})
    assert same_bits(function(X, **{**others, name: OnlyDlpack(array)}), expected)


def test_pairs_of_dlpack_alone():
    seeds, labels, shares = np.array([7, 8, 9]), np.array([[1], [2], [3]]), np.full((3, 1), 0.5, F32)
    drawn = gpusoftmax.sample(X, rng=(OnlyDlpack(seeds), OnlyDlpack(seeds)))
    assert same_bits(drawn, gpusoftmax.sample(X, rng=(seeds, seeds)))
    loss = gpusoftmax.cross_entropy(X, (OnlyDlpack(labels), OnlyDlpack(shares)))
    assert loss == gpusoftmax.cross_entropy(X, (labels, shares))


@pytest.mark.parametrize("protocol", [OnlyCudaArrayInterface, lambda array: OnlyDlpack(array, (2, 0))])
def test_device_memory_of_another_library_needs_cupy(gpu, monkeypatch, protocol):
    class NotInstalled:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "cupy":
                raise ModuleNotFoundError("No module named 'cupy'", name="cupy")

    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr(sys, "meta_path", [NotInstalled, *sys.meta_path])
    foreign = protocol(gpu.array(X))
    with pytest.raises(TypeError, match=r"^x is a GPU array .* needs CuPy: pip install 'gpusoftmax\[cu13\]'"):
        gpusoftmax.softmax(foreign)
    with pytest.raises(TypeError, match="^out is a GPU array .* needs CuPy"):
        gpusoftmax.softmax(X, out=foreign)


class FakeCupyArray:
    """What the library uses of cupy.ndarray, over an emulated array."""

    def __init__(self, array):
        self.array = array
        self.shape, self.strides, self.dtype, self.ndim = array.shape, array.strides, array.dtype, array.ndim
        self.itemsize, self.size = array.dtype.itemsize, array.size
        self.device = SimpleNamespace(id=array.__dlpack_device__()[1])
        self.data = SimpleNamespace(ptr=array.__cuda_array_interface__["data"][0], device_id=self.device.id)
        self.gpu = array._gpu

    def get(self):
        return self.gpu.get(self.array)

    def item(self):
        return self.array.item()

    def _new(self, host):
        return FakeCupyArray(self.gpu.array(host, device=self.device.id))

    def astype(self, dtype, **options):
        return self._new(self.get().astype(dtype))

    def reshape(self, *shape):
        return self._new(np.ascontiguousarray(self.get().reshape(*shape)))

    def transpose(self, *axes):
        return self._new(self.get().transpose(*axes))


@pytest.fixture
def cupy(gpu, monkeypatch):
    """A stand-in for the module: arrays on emulated devices, a current stream and a current device."""
    module = types.ModuleType("cupy")
    current = [0]

    @contextlib.contextmanager
    def device(ordinal):
        current.append(ordinal)
        yield
        current.pop()

    def current_stream(ordinal):
        assert ordinal in (0, 1)
        return SimpleNamespace(ptr=gpu.current_stream)

    def adopted(foreign):
        return foreign if isinstance(foreign, FakeCupyArray) else FakeCupyArray(foreign.array)

    module.ndarray = FakeCupyArray
    module.cuda = SimpleNamespace(Device=device, get_device_id=lambda: current[-1], get_current_stream=current_stream)
    module.empty = lambda shape, dtype: FakeCupyArray(gpu.empty(shape, dtype, device=current[-1]))
    module.asarray = module.from_dlpack = adopted
    module.array = lambda a, device=0: FakeCupyArray(gpu.array(a, device=device))
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setattr(FakeCupyArray, "__module__", "cupy")
    yield module
    assert current == [0]


@pytest.mark.parametrize("name", CALLS)
def test_cupy(gpu, cupy, name):
    """CuPy in, CuPy out; on the array's device, on CuPy's current stream."""
    arrays = arguments(name, (3, 40), F32)
    expected = gpu.get(CALLS[name].function(*(gpu.array(array) for array in arrays.values())))
    gpu.reset_stats()
    placed = [cupy.array(array, device=1) for array in arrays.values()]
    with gpu.stream(23):
        result = CALLS[name].function(*placed)
    assert {(launch.device, launch.stream) for launch in gpu.stats} == {(1, 23)}
    results = result if isinstance(result, tuple) else (result,)
    assert all(isinstance(part, FakeCupyArray) and part.device.id == 1 for part in results)
    assert same_bits(tuple(part.get() for part in results), expected if isinstance(expected, tuple) else (expected,))


@pytest.mark.parametrize("place", ["device", "cupy"])
def test_misaligned_arrays_on_a_gpu(gpu, cupy, place):
    """Of the views of bytes that CuPy makes, too: a GPU would read beside them, or lose its context."""
    array, get = {"device": (gpu.array, gpu.get), "cupy": (cupy.array, FakeCupyArray.get)}[place]
    rows, beside = np.zeros((4, 33), np.uint8), np.zeros(33, np.uint8)
    for x in (rows[:, :32].view(F32), beside[1:].view(F32)):
        with pytest.raises(ValueError, match="x lies at .* expected multiples of the 4 bytes of an element"):
            gpusoftmax.softmax(array(x))
        with pytest.raises(ValueError, match="out lies at"):
            gpusoftmax.softmax(array(np.zeros(x.shape, F32)), out=array(x))
    alone = rows[:1, :32].view(F32)  # a single row is aligned, wherever the next one would lie
    assert (get(gpusoftmax.softmax(array(alone))) == 0.125).all()


def test_cupy_out_and_integers(gpu, cupy):
    out = cupy.empty(X.shape, F32)
    assert gpusoftmax.softmax(cupy.array(X), out=out) is out
    tolerances.check_softmax(out.get(), X)
    integers = np.arange(12).reshape(3, 4)
    result = gpusoftmax.softmax(cupy.array(integers))
    assert result.dtype == np.float64
    tolerances.check_softmax(result.get(), integers.astype(float))
    with pytest.raises(TypeError, match="the input is a CuPy array on GPU 0 and out is a NumPy array on the CPU"):
        gpusoftmax.softmax(cupy.array(X), out=X.copy())
    with pytest.raises(TypeError, match="a CuPy array on GPU 0 and target is a CuPy array on GPU 1"):
        gpusoftmax.cross_entropy(cupy.array(X), cupy.array(np.zeros(3, int), device=1))


def test_a_second_cupy_call_is_replayed(gpu, cupy, monkeypatch):
    """With its own arrays, and results on their device."""
    labels = np.array([1, 2, 3])
    for device in (0, 1):
        gpusoftmax.cross_entropy_with_grad(cupy.array(X, device=device), cupy.array(labels, device=device))
    monkeypatch.setattr(_replay, "record", lambda *_: pytest.fail("not replayed"))
    for device in (0, 1):
        other = (X + device).astype(F32)
        call = cupy.array(other, device=device), cupy.array(labels, device=device)
        loss, dlogits = gpusoftmax.cross_entropy_with_grad(*call)
        assert isinstance(loss, FakeCupyArray) and loss.device.id == dlogits.device.id == device
        assert gpu.stats[-1].device == device
        tolerances.check_loss(loss.get(), other, labels)
        tolerances.check_dlogits(dlogits.get(), other, labels)


def test_cupy_labels_that_are_copied_live_long_enough(gpu, cupy):
    """Labels with three strides; the emulator knows freed memory, whoever got it next."""
    labels = np.random.default_rng(0).integers(0, 5, (4, 6, 4)).transpose(2, 0, 1)[::2, ::2]
    logits = inputs.make("spread", (*labels.shape, 5), F32)
    loss = gpusoftmax.cross_entropy(cupy.array(logits), cupy.array(labels), validate=True)
    tolerances.check_loss(loss.get(), logits, labels)


@pytest.mark.parametrize("protocol", [OnlyCudaArrayInterface, lambda array: OnlyDlpack(array, (2, 0))])
def test_device_memory_of_another_library_gives_cupy(gpu, cupy, protocol):
    result = gpusoftmax.softmax(protocol(gpu.array(X)))
    assert isinstance(result, FakeCupyArray)
    tolerances.check_softmax(result.get(), X)


def test_read_only_device_memory_of_another_library(gpu, cupy):
    """CuPy drops the flag on import."""
    out = gpu.array(np.zeros_like(X))
    with pytest.raises(ValueError, match="^out is read-only"):
        gpusoftmax.softmax(cupy.array(X), out=OnlyCudaArrayInterface(out, read_only=True))
    assert not gpu.get(out).any()


# ---------------------------------------------------------------- what is imported


def python(program, **environment):
    """Run a program in a new process; its output."""
    completed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert completed.returncode == 0, completed.stderr
    return completed.stdout


HEAVY = """
import sys
from pathlib import Path
loaded = {name.partition(".")[0] for name in sys.modules}
heavy = loaded & {"numba", "numba_cuda", "cupy", "torch", "jax", "jaxlib", "cuda"}
maps = Path("/proc/self/maps")  # what C libraries are in the process, where the system tells
heavy |= {line.split()[-1] for line in (maps.read_text() if maps.exists() else "").splitlines() if "libcuda" in line}
"""


def test_import_is_light():
    python("import gpusoftmax" + HEAVY + "assert not heavy, heavy")


def test_a_call_on_the_cpu_imports_numba_alone():
    python(
        "import gpusoftmax; gpusoftmax.cross_entropy([[1.0, 2.0]], [1])" + HEAVY + "assert heavy == {'numba'}, heavy"
    )


WARM_CALL = """
import sys
import numpy as np
import gpusoftmax
from gpusoftmax.kernels.cuda import driver

launched = []
driver.device = lambda ordinal: driver.Device(ordinal, "sm_90", 132)
driver.load = lambda image, device, stream: (image.entry, image.cubin)
driver.launch = lambda kernel, plan, stream, words: launched.append(kernel)

class Array:
    made = 0
    def __init__(self, shape, dtype):
        self.shape, self.dtype = shape, np.dtype(dtype)
        Array.made += 1
        data = Array.made << 40, False
        self.__cuda_array_interface__ = {
            "shape": shape, "typestr": self.dtype.str, "strides": None, "data": data, "version": 3
        }
    def __dlpack_device__(self):
        return (2, 0)
    def __gpusoftmax_empty__(self, shape, dtype):
        return Array(shape, dtype)

gpusoftmax.softmax(Array((3, 40), "f4"))
gpusoftmax.cross_entropy_with_grad(Array((3, 40), "f4"), Array((3,), "i8"))
assert len(launched) >= 2
for entry, cubin in launched:
    assert cubin[:4] == b"\\x7fELF" and entry.encode() in cubin
print("numba" in sys.modules)
"""


def test_a_gpu_call_on_a_warm_cache_imports_no_numba():
    """Nothing runs here but the search for the cubins."""
    python(WARM_CALL)
    assert python(WARM_CALL).split() == ["False"]


# ---------------------------------------------------------------- names and docstrings


def op_modules():
    for module in pkgutil.iter_modules(gpusoftmax.__path__):
        if not module.name.startswith("_") and module.name not in ("cli", "torch", "jax") and not module.ispkg:
            yield importlib.import_module(f"gpusoftmax.{module.name}")


def test_all_is_what_is_public():
    defined = {
        name: value
        for module in op_modules()
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    }
    defined["CrossEntropy"] = gpusoftmax.CrossEntropy  # several operations return it, and none imports another
    assert sorted(defined) == PUBLIC
    assert gpusoftmax.__all__ == PUBLIC  # in alphabetical order
    for name, value in defined.items():
        assert getattr(gpusoftmax, name) is value, "hidden by the submodule of its name"


@pytest.mark.parametrize("name", PUBLIC)
def test_docstrings(name):
    function = getattr(gpusoftmax, name)
    if not inspect.isfunction(function):
        return
    sections = inspect.getdoc(function)
    positions = [
        sections.find(f"\n{title}\n{'-' * len(title)}\n") for title in ("Parameters", "Returns", "Raises", "Examples")
    ]
    assert -1 not in positions and positions == sorted(positions)
    documented = sections[positions[0] : positions[1]]
    for parameter in inspect.signature(function).parameters.values():
        assert parameter.name in documented, parameter.name


@pytest.mark.parametrize("name", [name for name in PUBLIC if inspect.isfunction(getattr(gpusoftmax, name))])
def test_examples(name):
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    runner = doctest.DocTestRunner(optionflags=options)
    for example in doctest.DocTestFinder(recurse=False).find(getattr(gpusoftmax, name), name, globs={}):
        report = []
        runner.run(example, out=report.append)
        assert not runner.failures, "".join(report)
    assert runner.tries


def test_signatures_are_those_users_already_type():
    """`dtype`, `out` and the rest by keyword; the default axis is the last one, everywhere."""
    for name in PUBLIC:
        function = getattr(gpusoftmax, name)
        parameters = inspect.signature(function).parameters if inspect.isfunction(function) else {}
        if "axis" in parameters:
            assert parameters["axis"].default == -1, name
        for option in ("dtype", "out", "temperature", "keepdims", "reduction", "ignore_index", "label_smoothing"):
            if option in parameters:
                assert parameters[option].kind is inspect.Parameter.KEYWORD_ONLY, (name, option)


@pytest.mark.parametrize("reason", [BufferError("requires grad"), RuntimeError("Unsupported dtype in DLTensor.")])
def test_what_numpy_cannot_import_by_dlpack_is_named(reason):
    class Refusing:
        def __dlpack__(self, **options):
            raise reason

        def __dlpack_device__(self):
            return 1, 0

    with pytest.raises(TypeError, match="^x is a Refusing, expected what NumPy can import by DLPack"):
        gpusoftmax.softmax(Refusing())
