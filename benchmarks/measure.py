"""Runs the providers of one case: each answer is checked, then all are timed. One record per provider."""

import contextlib
import gc
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from benchmarks import arrays, cases, gpu_timing, results, timing
from benchmarks.cases import Case
from benchmarks.providers import APART, BESIDE, COPY, ONE_NUMBER, OURS, PROVIDERS, Calls

Report = Callable[[str], None]

SIDE_BY_SIDE = 16
"""Cases whose attempts take turns on the CPU: one to four minutes for fifteen of each, and gigabytes of arrays."""


class Effort(NamedTuple):
    """How long to measure. `seconds` is what one call may take of one attempt."""

    attempts: int = 5
    samples: int = 15
    seconds: float = 0.5
    threads: int = 2


def available(target: str, report: Report) -> dict[str, Calls]:
    """The calls of every provider whose library is installed; a line about each of the others."""
    found = {}
    for name, provider in PROVIDERS.items():
        if target in provider.library:
            try:
                found[name] = provider.calls()
            except ImportError as error:
                report(f"{name} is skipped: it is not installed ({error})")
    return found


def on_cpu(cases: Sequence[Case], providers: dict[str, Calls], effort: Effort, report: Report) -> list[list[dict]]:
    """The records of each case. The attempts of the cases take turns, so that those of one case are seconds apart."""
    with threads(effort.threads):
        calls, errors = zip(*(_calls_on_cpu(case, providers, report) for case in cases), strict=True)
        attempts = [timing.attempts_at(of_case, effort.samples, effort.seconds, APART) for of_case in calls]
        taken = [[next(of_case) for of_case in attempts] for _ in range(effort.attempts)]
    timed = (timing.quietest(of_case) for of_case in zip(*taken, strict=True))
    return [
        _records(case, "cpu", seconds, medians, of_case, {"threads": effort.threads})
        for case, (seconds, medians), of_case in zip(cases, timed, errors, strict=True)
    ]


def _calls_on_cpu(case: Case, providers: dict[str, Calls], report: Report) -> tuple[dict[str, Callable], dict]:
    """What is timed, and how far each answer is off."""
    calls, errors = {}, {}
    for name, ops in _taking_part(case, providers):
        call = ops[case.op](arrays.on_cpu(case, PROVIDERS[name].library["cpu"]))
        with _reported(case, name, report):
            errors[name] = _checked(case, name, call())
            calls[name] = call
    if case.op in BESIDE:
        other = case._replace(op=BESIDE[case.op])
        name, call = f"{OURS}.{other.op}", providers[OURS][other.op](arrays.on_cpu(case, "numpy"))
        errors[name], calls[name] = _checked(other, OURS, call()), call
    calls[COPY] = _copy_on_cpu(case.bytes_moved // 2)
    return calls, errors


def _copy_on_cpu(size: int) -> Callable[[], object]:
    source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
    try:
        torch = importlib.import_module("torch")  # copies with all threads, as NumPy does not
    except ImportError:
        return partial(np.copyto, target, source)
    return partial(torch.from_numpy(target).copy_, torch.from_numpy(source))


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """As many threads for every provider (NumPy and SciPy use one in any case)."""
    numba = importlib.import_module("numba")
    count = min(count, os.cpu_count() or 1)
    before = numba.get_num_threads()
    numba.set_num_threads(count)
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        torch = None
    else:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        numba.set_num_threads(before)


def on_gpu(
    case: Case, providers: dict[str, Calls], effort: Effort, clock: gpu_timing.Clock, library: str, report: Report
) -> list[dict]:
    """`library`, torch or CuPy, holds the arrays of the providers that take either."""
    rotations = gpu_timing.rotation(case.bytes_moved, clock.l2_bytes)
    calls, errors = {}, {}
    for name, ops in _taking_part(case, providers):
        with _reported(case, name, report):
            made = [
                ops[case.op](arrays.on_gpu(case, PROVIDERS[name].library["gpu"] or library)) for _ in range(rotations)
            ]
            errors[name] = _checked(case, name, made[0]())
            for call in made[1:]:
                call()
            calls[name] = made
    calls[COPY] = [_copy_on_gpu(case.bytes_moved // 2, library) for _ in range(rotations)]
    calls[ONE_NUMBER] = [_copy_on_gpu(1, library)]
    for call in (*calls[COPY], *calls[ONE_NUMBER]):
        call()
    bursts: dict[str, list[list[float]]] = {name: [] for name in calls}
    for _ in range(effort.attempts):
        for name, made in calls.items():
            bursts[name].append(gpu_timing.burst(made, clock))
    seconds = {name: [one for burst in taken for one in burst] for name, taken in bursts.items()}
    medians = {name: [float(np.median(burst)) for burst in taken] for name, taken in bursts.items()}
    gc.collect()  # gigabytes of arrays, some of them in cycles of autograd
    return _records(case, "gpu", seconds, medians, errors, {"rotations": rotations})


def _copy_on_gpu(size: int, library: str) -> Callable[[], object]:
    if library == "torch":
        torch = importlib.import_module("torch")
        source, target = (torch.ones(size, dtype=torch.uint8, device="cuda") for _ in range(2))
        return partial(target.copy_, source)
    cupy = importlib.import_module("cupy")
    return partial(cupy.copyto, cupy.ones(size, "uint8"), cupy.ones(size, "uint8"))


def _taking_part(case: Case, providers: dict[str, Calls]) -> Iterator[tuple[str, Calls]]:
    for name, ops in providers.items():
        provider = PROVIDERS[name]
        if case.op in ops and case.dtype in provider.dtypes and case.n_cols <= provider.max_cols:
            yield name, ops


@contextlib.contextmanager
def _reported(case: Case, name: str, report: Report) -> Iterator[None]:
    """A rival that fails or is wrong is left out and said to be; our own failure ends the run."""
    try:
        yield
    except Exception as error:
        if name.startswith(OURS):
            raise
        lines = str(error).strip().splitlines()
        report(f"{case}: {name} is left out: {type(error).__name__}: {lines[0] if lines else ''}"[:300])


def _checked(case: Case, name: str, result: Any) -> dict[str, float]:
    errors = {"error": cases.worst_error(case, result, arrays.to_numpy)}
    if name.startswith(OURS):
        errors["worst_ulp"] = cases.hold_to_promise(case, result, arrays.to_numpy)
    return errors


def _records(case: Case, target: str, seconds, medians, errors, how: dict[str, Any]) -> list[dict]:
    return [
        {
            "op": case.op,
            "n_rows": case.n_rows,
            "n_cols": case.n_cols,
            "dtype": case.dtype,
            "provider": name,
            **timing.summary(taken),
            "attempts_ms": [1e3 * median for median in medians[name]],
            "samples": len(taken),
            "bytes": 2 if name == ONE_NUMBER else case.bytes_moved,
            **errors.get(name, {}),
            **how,
            **results.environment(target),
        }
        for name, taken in seconds.items()
    ]


def line(records: Sequence[dict]) -> Iterator[str]:
    """What was found about one case, a line per provider, the quickest first."""
    ours = next(record["median_ms"] for record in records if record["provider"] == OURS)
    for record in sorted(records, key=lambda record: record["median_ms"]):
        milliseconds = record["median_ms"]
        case = f"{record['op']} {record['n_rows']}x{record['n_cols']} {record['dtype']}"
        speed = f"{milliseconds:10.4f} ms {record['bytes'] / milliseconds / 1e6:8.1f} GB/s"
        yield f"{case:50}{record['provider']:16}{speed} {milliseconds / ours:7.2f} x ours"
