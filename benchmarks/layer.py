"""A linear layer with its loss, forward and backward: seconds and memory, beside what torch does with all logits.

Every provider gives the loss and the gradients of input and weights, and is held against plain float64 first. They take
turns; the best turn of each is compared, for whatever else the machine does can only add to it, and the medians are
given beside. Memory is the most that the process has had more than before the call, results included: Linux counts it
(VmHWM).
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
SHAPE = 4096, 512, 32768
"""Rows, features, classes."""
_BLOCK = 256
_FAR_OFF = 2**-12

Call = Callable[[], tuple[Any, Any, Any]]


def run(turns: int, threads: int, save: bool, report: Report, shape: tuple[int, int, int] = SHAPE) -> None:
    x, weight, target = _problem(*shape)
    with measure.threads(threads):
        calls = _calls(x, weight, target)
        wanted = _exact(x, weight, target)
        peaks, errors = {}, {}
        for name, call in calls.items():
            errors[name] = _worst_error(call(), wanted)  # and what is done once is done
            peaks[name] = peak_bytes(call)
        seconds = _in_turns(calls, turns)
    records = [
        {
            "op": OP,
            "n_rows": shape[0],
            "n_features": shape[1],
            "n_cols": shape[2],
            "dtype": "float32",
            "provider": name,
            "median_ms": 1e3 * statistics.median(taken),
            "attempts_ms": [1e3 * one for one in taken],
            "peak_bytes": peaks[name],
            "error": errors[name],
            "threads": threads,
            **results.environment("cpu"),
        }
        for name, taken in seconds.items()
    ]
    for line in lines(records):
        report(
            "  ".join(cell.ljust(width) for cell, width in zip(line, (28, 8, 10, 6, 13, 15, 10), strict=True)).rstrip()
        )
    if save:
        results.save(records)


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


def _in_turns(calls: dict[str, Call], turns: int) -> dict[str, list[float]]:
    """Seconds per call, in changing order."""
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name in order.sample(list(calls), len(calls)):
            start = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _problem(n_rows: int, n_features: int, n_classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits of standard deviation 3."""
    rng = np.random.default_rng(0)
    x = 3 * rng.standard_normal((n_rows, n_features), np.float32)
    weight = rng.standard_normal((n_classes, n_features), np.float32) / np.float32(n_features**0.5)
    return x, weight, inputs.targets(n_rows, n_classes)


def _calls(x: np.ndarray, weight: np.ndarray, target: np.ndarray) -> dict[str, Call]:
    def ours(x, weight, target):
        return gpusoftmax.linear_cross_entropy_with_grad(x, weight, target)[:3]

    calls = {"gpusoftmax": partial(ours, x, weight, target), "NumPy": partial(_plain, x, weight, target)}
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return calls
    functional = torch.nn.functional
    tensors = [torch.from_numpy(array) for array in (x, weight, target)]
    leaves = [tensor.clone().requires_grad_() for tensor in tensors[:2]]

    def whole(x, weight, target):
        return functional.cross_entropy(functional.linear(x, weight), target)

    def with_gradients(loss):
        value = loss(*leaves, tensors[2])
        return value, *torch.autograd.grad(value, leaves)

    calls["gpusoftmax, torch tensors"] = partial(ours, *tensors)
    calls["torch"] = partial(with_gradients, whole)
    if hasattr(functional, "linear_cross_entropy"):
        chunked = partial(functional.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions())
        calls["torch linear_cross_entropy"] = partial(with_gradients, chunked)
    return calls


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


def _worst_error(result: tuple[Any, Any, Any], wanted: tuple[Any, Any, Any]) -> float:
    """As a part of the largest number; ValueError for another result."""
    worst = 0.0
    for got, want in zip(map(arrays.to_numpy, result), wanted, strict=True):
        error = float(np.abs(got - want).max() / np.abs(want).max())
        if not error <= _FAR_OFF:
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


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"/proc/self/status has no {key}")
