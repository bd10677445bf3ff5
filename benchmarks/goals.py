"""The figures that this project has set itself, held against what is saved for a device: reached, not, or not measured.

Times of several libraries count only from one run: their medians are those of the same attempt (timing.py).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks import alignment, cold_start, layer, results, suites
from benchmarks.providers import BESIDE, COPY, OURS

Saved = dict[tuple, dict[str, dict]]
"""(op, rows, columns, dtype), of a layer its features too -> provider -> record, all of the latest run."""
_CASE = "op", "n_rows", "n_cols", "dtype"


class Goal(NamedTuple):
    what: str
    wanted: float
    found: float | None  # None: it is not measured
    is_most: bool = False

    @property
    def is_reached(self) -> bool:
        if self.found is None:
            return False
        return self.found <= self.wanted if self.is_most else self.found >= self.wanted


def of_device(directory: Path) -> list[Goal]:
    cases: dict[tuple, list[dict]] = {}
    for path in sorted(directory.glob("*.jsonl")):
        for record in results.load(path):
            key = tuple(record[name] for name in (*_CASE, "n_features") if name in record)
            cases.setdefault(key, []).append(record)
    saved = {key: _of_the_latest_run(records) for key, records in cases.items()}
    return list((_on_cpu if directory.name.startswith("cpu-") else _on_gpu)(saved))


def _of_the_latest_run(records: list[dict]) -> dict[str, dict]:
    """Files keep what a run with fewer providers, or with other threads, has not replaced."""
    latest = max(record["date"] for record in records)
    return {record["provider"]: record for record in records if record["date"] == latest}


def summary(goals: list[Goal]) -> str:
    measured = [goal for goal in goals if goal.found is not None]
    reached = sum(goal.is_reached for goal in goals)
    return f"{reached} reached of {len(measured)} that were measured; {len(goals) - len(measured)} were not"


def lines(goals: list[Goal]) -> list[list[str]]:
    """A table."""
    table = [["", "wanted", "measured", "reached"]]
    for goal in goals:
        found, reached = ("", "") if goal.found is None else (f"{goal.found:.2f}", "yes" if goal.is_reached else "no")
        table.append([goal.what, f"{'at most' if goal.is_most else 'at least'} {goal.wanted:g}", found, reached])
    return table


# ---------------------------------------------------------------- on the CPU

_TIMES_OF_TORCH = {
    ("softmax", "float32"): {
        (4096, 1024): 1.7,
        (1024, 8192): 1.6,
        (256, 32768): 1.5,
        (16, 262144): 1.5,
        (1, 262144): 2.8,
        (100_000, 10): 20,
        (65536, 64): 2,
        (65536, 1024): 1.8,
        (8, 16): 2.5,
    },
    ("softmax", "float64"): {(1024, 8192): 1.5, (256, 32768): 1.5, (16, 262144): 1.5},
    ("softmax", "bfloat16"): dict.fromkeys(suites.SOME, 2),
    ("softmax", "float16"): dict.fromkeys(suites.SOME, 2),
    ("log_softmax", "float32"): dict.fromkeys(suites.SOME, 1.6),
    ("log_softmax", "float64"): {(4096, 1024): 1.6},
    ("log_softmax", "bfloat16"): {(4096, 1024): 1.6},
    ("log_softmax", "float16"): {(4096, 1024): 1.6},
    ("logsumexp", "float32"): {
        (4096, 1024): 3.5,
        (1024, 8192): 3.5,
        (256, 32768): 10,
        (16, 262144): 10,
        (1, 262144): 10,
        (65536, 64): 2,
    },
    ("cross_entropy_with_grad", "float32"): {(1024, 32768): 12, (4096, 8192): 12, (8192, 1000): 5},
    ("softmax_backward", "float32"): dict.fromkeys(((4096, 1024), *suites.LONG), 1.2),
    ("token_logprobs", "float32"): dict.fromkeys(suites.SCORED, 8),
    ("sample", "float32"): dict.fromkeys(suites.SCORED, 3),
}
"""Torch's time over ours."""


def _on_cpu(saved: Saved) -> Iterator[Goal]:
    for (op, dtype), shapes in _TIMES_OF_TORCH.items():
        for shape, wanted in shapes.items():
            yield _times(saved, (op, *shape, dtype), "torch", wanted)
    yield _times(saved, ("cross_entropy_with_grad", 1024, 32768, "float32"), "torch", 6, "gpusoftmax.torch")
    for n_rows, n_cols in suites.SCORED:
        key = "token_logprobs_and_rank", n_rows, n_cols, "float32"
        scores, lse = _ms(saved, key, OURS), _ms(saved, key, f"{OURS}.{BESIDE[key[0]]}")
        what = f"token_logprobs_and_rank {n_rows}x{n_cols} float32: its time over {BESIDE[key[0]]}'s"
        yield Goal(what, 1.3, _ratio(scores, lse), is_most=True)
    yield from _of_the_layer(saved, layer.SHAPES["cpu"], "float32", "torch", peak=1 / 8)
    for case in alignment.CASES:
        for place in alignment.OFF:
            of_case = saved.get((alignment.OP, case.n_rows, case.n_cols, case.dtype), {})
            times = [of_case.get(f"{case.op}, {one}", {}).get("median_ms") for one in (place, alignment.ALIGNED)]
            yield Goal(f"{case}: its time {place} over aligned", 1.15, _ratio(*times), is_most=True)
    for case in cold_start.CASES:
        of_case = saved.get((cold_start.OP, case.n_rows, case.n_cols, case.dtype), {})
        milliseconds = of_case.get(case.op, {}).get("median_ms")
        seconds = None if milliseconds is None else milliseconds / 1e3
        yield Goal(f"{case}: seconds of a process's first call, import included", 0.5, seconds, is_most=True)


# ---------------------------------------------------------------- on a GPU


def _on_gpu(saved: Saved) -> Iterator[Goal]:
    for case in suites.gpu():
        key = case.op, case.n_rows, case.n_cols, case.dtype
        if case.op == "token_logprobs":
            yield Goal(f"{case}: part of a copy's speed", 0.85, _ratio(_ms(saved, key, COPY), _ms(saved, key, OURS)))
            yield _times(saved, key, "torch", 10)
        elif case.op == "cross_entropy_with_grad" and case.dtype in ("bfloat16", "float32"):
            yield _times(saved, key, "torch", 2.5)
            yield _times(saved, key, "Liger", 1.5)
    for dtype in layer.DTYPES["gpu"]:
        yield from _of_the_layer(saved, layer.SHAPES["gpu"], dtype, "torch linear_cross_entropy", peak=1)


# ---------------------------------------------------------------- of either


def _times(saved: Saved, key: tuple, rival: str, wanted: float, ours: str = OURS) -> Goal:
    op, n_rows, n_cols, dtype = key
    whose = "ours" if ours == OURS else f"{ours}'s"
    what = f"{op} {n_rows}x{n_cols} {dtype}: {rival}'s time over {whose}"
    return Goal(what, wanted, _ratio(_ms(saved, key, rival), _ms(saved, key, ours)))


def _of_the_layer(saved: Saved, shape: tuple[int, int, int], dtype: str, rival: str, peak: float) -> Iterator[Goal]:
    n_rows, n_features, n_cols = shape
    of_case = saved.get((layer.OP, n_rows, n_cols, dtype, n_features), {})
    theirs, ours = of_case.get(rival, {}), of_case.get(OURS, {})
    what = f"{layer.OP} {'x'.join(map(str, shape))} {dtype}"
    yield Goal(f"{what}: {rival}'s time over ours", 1, _ratio(theirs.get("median_ms"), ours.get("median_ms")))
    memory = _ratio(ours.get("peak_bytes"), theirs.get("peak_bytes"))
    yield Goal(f"{what}: our memory over {rival}'s", peak, memory, is_most=True)


def _ms(saved: Saved, key: tuple, provider: str) -> float | None:
    return saved.get(key, {}).get(provider, {}).get("median_ms")


def _ratio(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one / other
