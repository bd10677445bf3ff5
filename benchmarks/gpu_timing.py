"""Times calls on a GPU with events: cold caches, and no waiting for the host in the times.

A call is measured between two events on its stream. Two things would spoil that, and a burst of calls is laid out
against both:

    occupy   mark call mark   mark call mark   ...   synchronize
    |        |
    |        each call works on other arrays than the ones before: between two accesses to an element lie more bytes
    |        than twice the L2 cache holds
    work that keeps the GPU busy, and empties L2, until the host has put the whole burst into the stream: a call that
    takes longer to start than to run would otherwise be timed with the pauses in between

A call that itself waits for the device (some libraries' do) is timed with its waiting, as its users are.
"""

import importlib
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

_MAX_BURST = 50
_BURST_SECONDS = 0.02
_FLUSH_BYTES = 512 * 2**20


class Clock(NamedTuple):
    """What the timing needs of a GPU; tests replace it by a simulated one."""

    mark: Callable[[], Any]  # an event on the current stream
    seconds: Callable[[Any, Any], float]  # between two events
    synchronize: Callable[[], None]
    occupy: Callable[[], None]  # puts some work into the stream that writes far more than L2 holds
    l2_bytes: int
    host: Callable[[], float] = time.perf_counter


def torch_clock() -> Clock:
    torch = importlib.import_module("torch")
    source, target = (torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2))

    def mark():
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    return Clock(
        mark,
        lambda start, stop: 1e-3 * start.elapsed_time(stop),
        torch.cuda.synchronize,
        lambda: target.copy_(source),
        torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size,
    )


def cupy_clock() -> Clock:
    cupy = importlib.import_module("cupy")
    source, target = (cupy.empty(_FLUSH_BYTES, "uint8") for _ in range(2))

    def mark():
        event = cupy.cuda.Event()
        event.record()
        return event

    return Clock(
        mark,
        lambda start, stop: 1e-3 * cupy.cuda.get_elapsed_time(start, stop),
        cupy.cuda.get_current_stream().synchronize,
        lambda: cupy.copyto(target, source),
        cupy.cuda.Device().attributes["L2CacheSize"],
    )


def rotation(bytes_per_call: int, l2_bytes: int) -> int:
    """How many sets of arrays to take in turn so that none is in L2 when it is its turn again.

    No more than there are calls in a burst, before which L2 is emptied.
    """
    return min(_MAX_BURST, math.ceil(2 * l2_bytes / max(bytes_per_call, 1)))


def burst(calls: Sequence[Callable[[], object]], clock: Clock) -> list[float]:
    """Seconds of each of a burst of calls, taken in turn from `calls`, which work on different arrays.

    All of them must have been called before: what they do once (compile, load, allocate) is done.
    """
    start, first = _timed(calls[0], clock)
    size = min(_MAX_BURST, max(3, round(_BURST_SECONDS / max(first, 1e-6))))
    host_seconds = size * start
    clock.synchronize()
    _, occupied = _timed(clock.occupy, clock)
    for _ in range(1 + math.ceil(host_seconds / occupied)):
        clock.occupy()
    marks = []
    for number in range(size):
        before = clock.mark()
        calls[number % len(calls)]()
        marks.append((before, clock.mark()))
    clock.synchronize()
    return [clock.seconds(*pair) for pair in marks]


def _timed(call: Callable[[], object], clock: Clock) -> tuple[float, float]:
    """Seconds that the host needs to start a call, and the device to run it."""
    clock.synchronize()
    start = clock.host()
    before = clock.mark()
    call()
    after = clock.mark()
    started = clock.host() - start
    clock.synchronize()
    return started, clock.seconds(before, after)
