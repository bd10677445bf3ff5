"""Times calls side by side, in one process, so that whatever else the machine does hits all of them alike.

One attempt times every call several times, in turns of changing order: a call finds in the caches what another one left
there, and no call should always follow the same one. Calls that leave much more there than the others do take their
turns `apart`, after them. What is reported is the quietest of several attempts. A neighbour
on the machine is busy for seconds or minutes: attempts that follow each other at once may all be of one such time.
"""

import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Sequence

_SAMPLE_SECONDS = 300e-6
"""Shorter calls are repeated within a sample, so that reading the clock (some 50 ns) does not count."""
_LEAST_SAMPLES = 3


Attempt = dict[str, list[float]]
"""Seconds per call: what each call took, several times."""


def interleaved(
    calls: dict[str, Callable[[], object]],
    attempts: int,
    samples: int,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Attempt, Attempt]:
    """What `quietest` says of so many attempts."""
    return quietest(list(itertools.islice(attempts_at(calls, samples, seconds, clock=clock), attempts)))


def attempts_at(
    calls: dict[str, Callable[[], object]],
    samples: int,
    seconds: float,
    apart: Collection[str] = (),
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Attempt]:
    """One attempt after the other, each made when it is asked for.

    No attempt spends more than about `seconds` on one call; a slow one is sampled less often, three times at least.
    """
    repeats, wanted = {}, {}
    for name, call in calls.items():
        call()  # compiles, allocates, fills caches
        once = _per_call(call, 1, clock)
        repeats[name] = max(1, round(_SAMPLE_SECONDS / max(once, 1e-9)))
        wanted[name] = max(_LEAST_SAMPLES, min(samples, int(seconds / (once * repeats[name]))))
    order = random.Random(0)
    while True:
        taken: Attempt = {name: [] for name in calls}
        for together in ([name for name in calls if name not in apart], [name for name in calls if name in apart]):
            for turn in range(samples):
                for name in order.sample(together, len(together)):
                    if turn < wanted[name]:
                        taken[name].append(_per_call(calls[name], repeats[name], clock))
        yield taken


def quietest(attempts: Sequence[Attempt]) -> tuple[Attempt, Attempt]:
    """Each call's samples in the quietest attempt, and its median in every attempt."""
    medians = {name: [statistics.median(taken[name]) for taken in attempts] for name in attempts[0]}
    return attempts[_quietest(list(medians.values()))], medians


def _per_call(call: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(repeats):
        call()
    return (clock() - start) / repeats


def _quietest(medians: Sequence[Sequence[float]]) -> int:
    """The attempt in which the calls, in geometric mean, came nearest to their own best times."""
    slowdown = [sum(math.log(call[attempt]) for call in medians) for attempt in range(len(medians[0]))]
    return slowdown.index(min(slowdown))


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median and the 20th and 80th percentile, in milliseconds."""
    ordered = sorted(1e3 * one for one in seconds)
    last = len(ordered) - 1
    return {
        "median_ms": statistics.median(ordered),
        "p20_ms": ordered[round(0.2 * last)],
        "p80_ms": ordered[round(0.8 * last)],
    }
