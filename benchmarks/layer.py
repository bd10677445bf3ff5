"""A linear layer with its loss, forward and backward: seconds and memory, beside what torch does with all logits.

Every provider gives the loss and the gradients of input and weights, and is held against plain float64 first. They take
turns; the best turn of each is compared, for whatever else the machine does can only add to it, and the medians are
given beside. Memory is the most that is in use beyond what it was before the call, results included: of the process, as
Linux counts it (VmHWM), or on a GPU of torch's allocator, of which all that a call on tensors needs there is taken.
"""

import gc
import importlib
import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import gpusoftmax
from benchmarks import arrays, measure, results
from benchmarks.measure import Report
from tests import inputs

OP = "linear_cross_entropy_with_grad"
SHAPES = {"cpu": (4096, 512, 32768), "gpu": (8192, 2048, 131072)}
"""Rows, features, classes."""
DTYPES = {"cpu": ("float32",), "gpu": ("float32", "bfloat16")}
_BLOCK = 256
_FAR_OFF = {"float32": 2**-12, "bfloat16": 2**-4}

Call = Callable[[], tuple[Any, Any, Any]]


def run(turns: int, threads: int, save: bool, report: Report, target: str, shape: tuple[int, int, int] | None) -> None:
    """shape: instead of that of the target."""
    shape = shape or SHAPES[target]
    for dtype in DTYPES[target]:
        records = [
            {
                "op": OP,
                "n_rows": shape[0],
                "n_features": shape[1],
                "n_cols": shape[2],
                "dtype": dtype,
                **measured,
                **({"threads": threads} if target == "cpu" else {}),
                **results.environment(target),
            }
            for measured in (_on_cpu(shape, turns, threads) if target == "cpu" else _on_gpu(shape, dtype, turns))
        ]
        for line in lines(records):
            cells = zip(line, (28, 8, 10, 6, 13, 15, 10), strict=True)
            report("  ".join(cell.ljust(width) for cell, width in cells).rstrip())
        if save:
            results.save(records)


def _on_cpu(shape: tuple[int, int, int], turns: int, threads: int) -> list[dict]:
    problem = _problem(*shape)
    with measure.threads(threads):
        return _measured(_calls(*problem), _exact(*problem), "float32", turns, peak_bytes, lambda: None)


def _on_gpu(shape: tuple[int, int, int], dtype: str, turns: int) -> list[dict]:
    torch = importlib.import_module("torch")
    x, weight, target = (torch.from_numpy(array).cuda() for array in _problem(*shape))
    tensors = x.to(getattr(torch, dtype)), weight.to(getattr(torch, dtype)), target
    del x, weight
    wanted = _with_gradients(_whole, *(tensor.double() for tensor in tensors[:2]), target)()
    calls = _torch_calls(*tensors)
    return _measured(calls, wanted, dtype, turns, peak_bytes_on_gpu, torch.cuda.synchronize)


def _measured(
    calls: dict[str, Call], wanted: tuple, dtype: str, turns: int, peak: Callable[[Call], int], wait: Callable[[], Any]
) -> list[dict]:
    peaks, errors = {}, {}
    for name, call in calls.items():
        errors[name] = _worst_error(call(), wanted, _FAR_OFF[dtype])  # and what is done once is done
        peaks[name] = peak(call)
    return [
        {
            "provider": name,
            "median_ms": 1e3 * statistics.median(taken),
            "attempts_ms": [1e3 * one for one in taken],
            "peak_bytes": peaks[name],
            "error": errors[name],
        }
        for name, taken in _in_turns(calls, turns, wait).items()
    ]


def lines(records: Sequence[dict]) -> list[list[str]]:
    """A table: the quickest provider first, and how many times of ours each takes."""

    def best(record: dict) -> float:
        return min(record["attempts_ms"]) / 1e3

    ours = next(record for record in records if record["provider"] == "gpusoftmax")
    table = [["", "best s", "median s", "MiB", "best / ours", "median / ours", "MiB / ours"]]
    for record in sorted(records, key=best):
        table.append(
            [
                record["provider"],
                f"{best(record):.3g}",
                f"{record['median_ms'] / 1e3:.3g}",
                f"{record['peak_bytes'] / 2**20:.0f}",
                f"{best(record) / best(ours):.2f}",
                f"{record['median_ms'] / ours['median_ms']:.2f}",
                f"{record['peak_bytes'] / ours['peak_bytes']:.2f}",
            ]
        )
    return table


def _in_turns(calls: dict[str, Call], turns: int, wait: Callable[[], Any]) -> dict[str, list[float]]:
    """Seconds per call, in changing order. wait: for the device."""
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name in order.sample(list(calls), len(calls)):
            wait()
            start = time.perf_counter()
            calls[name]()
            wait()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _problem(n_rows: int, n_features: int, n_classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits of standard deviation 3."""
    rng = np.random.default_rng(0)
    x = 3 * rng.standard_normal((n_rows, n_features), np.float32)
    weight = rng.standard_normal((n_classes, n_features), np.float32) / np.float32(n_features**0.5)
    return x, weight, inputs.targets(n_rows, n_classes)


def _calls(x: np.ndarray, weight: np.ndarray, target: np.ndarray) -> dict[str, Call]:
    calls = {"gpusoftmax": partial(_ours, x, weight, target), "NumPy": partial(_plain, x, weight, target)}
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return calls
    ours, *others = _torch_calls(*map(torch.from_numpy, (x, weight, target))).items()
    return calls | {"gpusoftmax, torch tensors": ours[1]} | dict(others)


def _torch_calls(x: Any, weight: Any, target: Any) -> dict[str, Call]:
    """Of torch tensors on any device: ours first."""
    torch = importlib.import_module("torch")
    calls = {
        "gpusoftmax": partial(_ours, x, weight, target),
        "torch": _with_gradients(_whole, x, weight, target),
    }
    functional = torch.nn.functional
    if hasattr(functional, "linear_cross_entropy"):
        chunked = partial(functional.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions())
        calls["torch linear_cross_entropy"] = _with_gradients(chunked, x, weight, target)
    if x.is_cuda:
        try:
            liger = importlib.import_module("liger_kernel.transformers.functional")
        except ImportError:
            return calls
        fused = liger.liger_fused_linear_cross_entropy
        calls["Liger"] = _with_gradients(lambda x, weight, target: fused(x, weight, target), x, weight, target)
    return calls


def _ours(x: Any, weight: Any, target: Any) -> tuple[Any, Any, Any]:
    return gpusoftmax.linear_cross_entropy_with_grad(x, weight, target)[:3]


def _whole(x: Any, weight: Any, target: Any) -> Any:
    """What one writes in torch."""
    functional = importlib.import_module("torch").nn.functional
    return functional.cross_entropy(functional.linear(x, weight), target)


def _with_gradients(loss: Callable[..., Any], x: Any, weight: Any, target: Any) -> Call:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, weight)]

    def call() -> tuple[Any, Any, Any]:
        value = loss(*leaves, target)
        return value, *importlib.import_module("torch").autograd.grad(value, leaves)

    return call


def _plain(x: np.ndarray, weight: np.ndarray, target: np.ndarray, n_rows: int | None = None) -> tuple[Any, Any, Any]:
    """What one writes in NumPy, with all logits; for some rows out of `n_rows`."""
    rows, n_rows = np.arange(len(x)), n_rows or len(x)
    logits = x @ weight.T
    logits -= logits.max(axis=1, keepdims=True)
    at_target = logits[rows, target]
    np.exp(logits, out=logits)
    total = logits.sum(axis=1, keepdims=True)
    loss = (np.log(total[:, 0]) - at_target).sum() / n_rows
    logits /= total
    logits[rows, target] -= 1
    logits /= n_rows
    return loss, logits @ weight, logits.T @ x


def _exact(x: np.ndarray, weight: np.ndarray, target: np.ndarray) -> tuple[Any, Any, Any]:
    weight = weight.astype(np.float64)
    blocks = [slice(first, first + _BLOCK) for first in range(0, len(x), _BLOCK)]
    loss, dx, dweight = 0.0, [], np.zeros_like(weight)
    for rows in blocks:
        part, dpart, added = _plain(x[rows].astype(np.float64), weight, target[rows], len(x))
        loss += part
        dx.append(dpart)
        dweight += added
    return loss, np.concatenate(dx), dweight


def _worst_error(result: tuple[Any, Any, Any], wanted: tuple[Any, Any, Any], bound: float) -> float:
    """As a part of the largest number; ValueError for another result."""
    worst = 0.0
    for got, want in zip(result, wanted, strict=True):
        # Where both are on a GPU they stay there.
        difference = got.detach().double() - want.detach() if hasattr(want, "is_cuda") else arrays.to_numpy(got) - want
        error = float(abs(difference).max() / abs(want).max())
        if not error <= bound:
            raise ValueError(f"its answer is wrong: off by {error:.3g} of its largest number")
        worst = max(worst, error)
    return worst


def peak_bytes(call: Callable[[], object]) -> int:
    """The most memory that the process has during a call, beyond what it has before."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def peak_bytes_on_gpu(call: Callable[[], object]) -> int:
    """The same of what torch has allocated on the device."""
    cuda = importlib.import_module("torch").cuda
    gc.collect()
    cuda.synchronize()
    cuda.reset_peak_memory_stats()
    before = cuda.memory_allocated()
    call()
    cuda.synchronize()
    return cuda.max_memory_allocated() - before


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"/proc/self/status has no {key}")
