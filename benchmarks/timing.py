"""Times calls side by side: interleaved, in one process, so that whatever else the machine does hits all of them."""

import statistics
import time
from collections.abc import Callable


def interleaved(calls: dict[str, Callable[[], object]], repeats: int, attempts: int) -> dict[str, list[float]]:
    """Seconds per call of the quietest of several attempts: the one with the smallest sum of medians.

    Each attempt runs every call `repeats` times, in turn. A call that takes long is not repeated more than it needs to.
    """
    for call in calls.values():
        call()  # compiles, allocates, fills caches
    best: dict[str, list[float]] = {}
    for _ in range(attempts):
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(repeats):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - start)
        if not best or _total(seconds) < _total(best):
            best = seconds
    return best


def _total(seconds: dict[str, list[float]]) -> float:
    return sum(statistics.median(times) for times in seconds.values())


def summary(seconds: list[float]) -> dict[str, float]:
    """Median and the 20th and 80th percentile, in milliseconds."""
    ordered = sorted(1e3 * one for one in seconds)
    last = len(ordered) - 1
    return {
        "median_ms": statistics.median(ordered),
        "p20_ms": ordered[round(0.2 * last)],
        "p80_ms": ordered[round(0.8 * last)],
    }
