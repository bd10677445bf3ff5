"""What a call costs on the host, until the driver has it: microseconds per call of an op on the GPU.

Needs no GPU: the three functions of gpusoftmax.kernels.cuda.driver are replaced by ones that do nothing, and the arrays
are CuPy's own at made-up addresses (stand-ins with the same attributes where CuPy is not installed). What CuPy takes to
allocate a result is left out. Where there is a GPU, whole calls are timed beside torch's, too: with so small arrays the
device is quicker than the host.
"""

import contextlib
import importlib
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

import gpusoftmax
from benchmarks import timing
from benchmarks.measure import Report
from gpusoftmax.kernels.cuda import driver

_SHAPE = 8, 16
_ATTEMPTS, _SAMPLES, _SECONDS = 5, 9, 0.1


def run(report: Report) -> None:
    empty_call = _seconds({"": lambda: None})[""]
    report(f"{'a call of an empty function':42}{1e6 * empty_call:8.2f} us")
    for name, seconds in without_a_driver().items():
        report(f"{name:42}{1e6 * seconds:8.2f} us until the driver")
    try:
        cupy = importlib.import_module("cupy")
        cupy.cuda.runtime.getDeviceCount()
    except Exception as error:
        report(f"whole calls are not timed: CuPy finds no GPU ({type(error).__name__})")
        return
    for name, seconds in with_a_driver(cupy).items():
        report(f"{name:42}{1e6 * seconds:8.2f} us per call")


def without_a_driver() -> dict[str, float]:
    """Seconds per call of our own code."""
    device = driver.Device(0, "sm_90", 132)
    with (
        mock.patch.object(driver, "device", lambda ordinal: device),
        mock.patch.object(driver, "load", lambda image, device, stream: image),
        mock.patch.object(driver, "launch", lambda kernel, plan, stream, words: None),
        _cupy_without_a_gpu() as cupy,
    ):
        return _seconds(_calls(cupy))


def with_a_driver(cupy: ModuleType) -> dict[str, float]:
    """Seconds per call as a user has them, beside torch's."""
    calls = {f"gpusoftmax {name}": call for name, call in _calls(cupy).items()}
    with contextlib.suppress(ImportError):
        torch = importlib.import_module("torch")
        x = torch.zeros(_SHAPE, device="cuda")
        target = torch.zeros(_SHAPE[0], dtype=torch.int64, device="cuda")
        out = torch.empty_like(x)
        calls["torch softmax"] = lambda: torch.softmax(x, -1)
        calls["torch softmax, out"] = lambda: torch.softmax(x, -1, out=out)
        calls["torch cross_entropy"] = lambda: torch.nn.functional.cross_entropy(x, target)
    return _seconds(calls)


def _calls(cupy: Any) -> dict[str, Callable[[], Any]]:
    x, dy, out = (cupy.empty(_SHAPE, "float32") for _ in range(3))
    half = cupy.empty(_SHAPE, "float16")
    row, target = cupy.empty(_SHAPE[:1], "float32"), cupy.empty(_SHAPE[:1], "int64")
    return {
        "softmax": lambda: gpusoftmax.softmax(x),
        "softmax, out": lambda: gpusoftmax.softmax(x, out=out),
        "softmax, float16": lambda: gpusoftmax.softmax(half),
        "logsumexp, out": lambda: gpusoftmax.logsumexp(x, out=row),
        "softmax_backward, out": lambda: gpusoftmax.softmax_backward(x, dy, out=out),
        "cross_entropy, none": lambda: gpusoftmax.cross_entropy(x, target, reduction="none"),
        "cross_entropy_with_grad, mean, out": lambda: gpusoftmax.cross_entropy_with_grad(x, target, out=out),
    }


def _seconds(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """The best median of several attempts: the machine can only add to what a call costs."""
    _, medians = timing.interleaved(calls, _ATTEMPTS, _SAMPLES, _SECONDS)
    return {name: min(attempts) for name, attempts in medians.items()}


@contextlib.contextmanager
def _cupy_without_a_gpu() -> Iterator[Any]:
    """CuPy whose `empty` makes arrays without memory; one current stream, one current device."""
    stream = SimpleNamespace(ptr=0)
    with contextlib.ExitStack() as stack:
        try:
            cupy = importlib.import_module("cupy")
        except ImportError:
            cupy = ModuleType("cupy")
            cupy.ndarray, cupy.cuda = _StandIn, SimpleNamespace()
            # Not mock.patch.dict, which forgets whatever is imported in the meantime: it would be there twice.
            sys.modules["cupy"] = cupy
            stack.callback(sys.modules.pop, "cupy")
            new = _StandIn
        else:
            new = _without_memory(cupy)
        stack.enter_context(mock.patch.object(cupy, "empty", _reused(new), create=True))
        replaced = {"get_current_stream": lambda *_: stream, "get_device_id": lambda: 0}
        for name, value in replaced.items():
            stack.enter_context(mock.patch.object(cupy.cuda, name, value, create=True))
        yield cupy


_ADDRESS = 1 << 40


def _without_memory(cupy: ModuleType) -> Callable[..., Any]:
    def new(shape, dtype):
        memory = cupy.cuda.UnownedMemory(next(_addresses), math.prod(shape) * dtype.itemsize, None, 0)
        return cupy.ndarray(shape, dtype, memptr=cupy.cuda.MemoryPointer(memory, 0))

    return new


def _reused(new: Callable[..., Any]) -> Callable[..., Any]:
    """As a memory pool does it: arrays that were made before, not the latest ones."""
    pools: dict[tuple, Iterator[Any]] = {}

    def empty(shape, dtype):
        key = shape, np.dtype(dtype)
        if key not in pools:
            pools[key] = itertools.cycle([new(*key) for _ in range(8)])
        return next(pools[key])

    return empty


def _next_addresses() -> Iterator[int]:
    address = _ADDRESS
    while True:
        yield address
        address += 2**20


_addresses = _next_addresses()


class _StandIn:
    """What is used of cupy.ndarray."""

    def __init__(self, shape: tuple[int, ...], dtype: Any):
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
        self.ndim, self.itemsize = len(shape), self.dtype.itemsize
        self.strides = tuple(self.itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        self.device = SimpleNamespace(id=0)
        self.data = SimpleNamespace(ptr=next(_addresses), device_id=0)
