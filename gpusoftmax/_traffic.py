"""The bytes that a call on a GPU moves: those of every array that its kernels are given."""

import math
from typing import TYPE_CHECKING, NamedTuple

from gpusoftmax import _imagined
from gpusoftmax._imagined import Imagined

if TYPE_CHECKING:
    from gpusoftmax.kernels.cuda.launch import Launch
    from gpusoftmax.kernels.cuda.plan import Plan


class Traffic(NamedTuple):
    """In bytes of global memory."""

    read: int  # by all rows, of what each has of its own
    written: int
    shared: int  # of what rows have together, which is read once for all of them
    once: bool  # whether no logit is read twice


class Layout(NamedTuple):
    """What rows are in the arrays of a call."""

    shape: tuple[int, ...]  # of the logits
    axes: tuple[int, ...]  # along which rows run
    n_valid: int | None  # how many columns are read at all, where that is one number

    @property
    def batch(self) -> tuple[int, ...]:
        return self._without_axes(self.shape)

    def _without_axes(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(size for axis, size in enumerate(shape) if axis not in self.axes)

    def is_of_rows(self, array: Imagined) -> bool:
        """Whether each row has elements of its own."""
        whole = len(array.shape) == len(self.shape) and self._without_axes(array.shape) == self.batch
        return whole or array.shape[: len(self.batch)] == self.batch

    def has_columns(self, array: Imagined) -> bool:
        """Whether each row has a row there."""
        return array.shape == self.shape or (array.name == "mask" and self.is_of_rows(array))

    def bytes_of(self, array: Imagined) -> int:
        """That are read or written."""
        if self.n_valid is None or array.name not in _imagined.UP_TO_N_VALID:
            return array.n_bytes
        n_cols = math.prod(self.shape[axis] for axis in self.axes)
        per_word = 32 if array.name == "mask" and array.dtype != "bool" else 1
        return array.n_bytes // -(-n_cols // per_word) * -(-self.n_valid // per_word)


def traffic(launches: "list[Launch]", arrays: dict[int, Imagined], layout: Layout) -> Traffic:
    """Of all launches but those that find a number of all rows, which read little and what has just been written.

    An argument is read, unless it is `out`; what the call has made is written where it comes first, and then read. A
    kernel has every byte from memory once: threads that ask again, and a last pass that reads a mask again, find it in
    a cache. But where a row does not stay on the chip, its columns are read again.
    """
    from gpusoftmax.kernels.cuda.plan import OF_A_BATCH

    kernels: dict[str, tuple[Plan, dict[int, list[int]]]] = {}  # of the arrays the addresses, launch by launch
    for launch in launches:
        _, given = kernels.setdefault(launch.image.kernel, (launch.plan, {}))
        for address in (launch.words[at] for at in launch.addresses):
            if _imagined.number_of(address) in arrays:
                given.setdefault(_imagined.number_of(address), []).append(address)
    read = written = shared = again = readings = 0
    seen: set[int] = set()
    for plan, given in kernels.values():
        columns = 0
        for number, addresses in given.items() if plan.regime not in OF_A_BATCH else ():
            array = arrays[number]
            # Launches that share the rows, or the parts of a result, begin at as many places; others walk all of it.
            times = len(addresses) // len(set(addresses))
            n_bytes = layout.bytes_of(array)
            if array.name == "out" or (not array.name and number not in seen):
                written += times * n_bytes
            elif layout.is_of_rows(array):
                read += times * n_bytes
                columns += n_bytes if layout.has_columns(array) else 0
                readings += times if array.name in _imagined.FIRST else 0
            else:
                shared += n_bytes
        seen |= given.keys()
        if not plan.held:
            again += max(columns - math.prod(layout.batch) * plan.cluster * plan.kept_bytes, 0)
    return Traffic(read + again, written, shared, again == 0 and readings == 1)
