"""Memory: bytes with a state each, arrays at made-up device addresses, and what each launch did to them.

Every array of a device, and every .global or .const variable of a kernel loaded there, is an Allocation with its own
range of addresses. Ranges lie far apart and are never used again, so an address outside them belongs to nobody and a
freed one is recognised.
"""

import bisect
import itertools

import numpy as np

from tests.emulator.errors import FreedMemory, OutsideChanged
from tests.emulator.ptx_types import DEVICE_BASE, FRESH, OUTSIDE, POISON, READY, i64, u8

ALIGNMENT, GAP = 512, 1 << 20
SPARSE = 1 << 26  # of a base larger than this only the views are copied
LOG_LIMIT = 1 << 20  # accesses of one launch to one array that are kept before they are counted


class Memory:
    """A block of bytes and the state of each: OUTSIDE, READY, FRESH or PENDING."""

    def __init__(self, size, zeroed=True):
        size = -(-size // 128) * 128 + 128
        self.data = np.zeros(size, u8)
        self.state = np.zeros(size, u8)
        self._views = {}

    def reset(self, copies, state):
        """Start anew: poison, and `state` as the states of each of the first copies."""
        size = copies * len(state)
        if size and (state != OUTSIDE).any():
            self.data[:size] = POISON
            self.state[:size].reshape(copies, -1)[:] = state

    def view(self, dtype, vector=1):
        """The bytes as an array of vectors of dtype."""
        key = (dtype, vector)
        if key not in self._views:
            view = self.data.view(dtype)
            self._views[key] = view.reshape(-1, vector) if vector > 1 else view
        return self._views[key]

    def states(self, size):
        """The states as an array with one word, or one row of words, per access of size bytes."""
        key = ("state", size)
        if key not in self._views:
            self._views[key] = by_access(self.state, size)
        return self._views[key]


def by_access(marks, size):
    """One mark per byte -> an array with one word, or one row of words, per access of size bytes."""
    word = min(size, 8)
    words = marks.view(f"u{word}")
    return words.reshape(-1, size // word) if size > word else words


class Allocation(Memory):
    """One array of a device.

    outside: some bytes may not be touched; fresh: some may hold nothing yet. Both only say that states must be looked
    at. protected marks the bytes of read-only views, where there are any. owners counts the live array objects; at 0
    the memory is gone and only the address range remains.
    """

    def __init__(self, name, device, start, size):
        super().__init__(size)
        self.name, self.device, self.start, self.size = name, device, start, size
        self.end = start + size
        self.outside, self.fresh, self.readonly, self.freed = False, False, False, False
        self.owners, self.streams = 0, set()
        self.host_root = self.original = self.protected = None
        self.written = None  # bytes that the running kernel wrote, where ld.global.nc is used

    def fill(self, state):
        self.state[: self.size] = state
        if state == FRESH:
            self.data.fill(POISON)
        self.fresh, self.outside = state == FRESH, state == OUTSIDE

    def array(self, shape, dtype, pointer, strides):
        """The live array at an address."""
        return np.ndarray(shape, dtype, self.data, pointer - self.start if 0 not in shape else 0, strides)

    def marks(self, marks, shape, itemsize, pointer, strides):
        """The marks, one per byte, of the array at an address; the last axis runs over the bytes of an item."""
        offset = pointer - self.start if 0 not in shape else 0
        return np.ndarray((*shape, itemsize), u8, marks, offset, (*strides, 1))

    def upload(self, array, pointer):
        """Copy a NumPy view to its place."""
        if array.size:
            self.array(array.shape, array.dtype, pointer, array.strides)[...] = array
            place = array.shape, array.itemsize, pointer, array.strides
            self.marks(self.state, *place)[...] = READY
            if not array.flags.writeable and self.protected is None:
                self.protected = np.zeros(len(self.data), u8)
            if self.protected is not None:
                self.marks(self.protected, *place)[...] = not array.flags.writeable
            self.outside = bool((self.state[: self.size] == OUTSIDE).any()) if self.size <= SPARSE else True

    def check_outside(self):
        """The bytes that belong to no view are as they were."""
        if self.original is None or self.freed:
            return
        changed = (self.data[: self.size] != self.original) & (self.state[: self.size] == OUTSIDE)
        if changed.any():
            first = int(np.argmax(changed))
            raise OutsideChanged(f"byte {first} of {self.name} lies outside every view and was changed")

    def free(self):
        self.freed = True
        self.data = self.state = self.host_root = self.original = self.protected = None
        self._views = {}


class DeviceMemory:
    """The allocations of one device, found by address."""

    def __init__(self, device):
        self.device = device
        self.next = DEVICE_BASE + (device << 40) + GAP
        self.starts, self.allocations = [], []
        self.numbers = itertools.count()

    def allocate(self, size, name):
        allocation = Allocation(name, self.device, self.next, size)
        self.next += -(-size // ALIGNMENT) * ALIGNMENT + max(GAP, 1 << int(size).bit_length())
        self.add(allocation)
        return allocation

    def add(self, allocation):
        """Also for variables of kernels, whose addresses the program chose."""
        at = bisect.bisect(self.starts, allocation.start)
        self.starts.insert(at, allocation.start)
        self.allocations.insert(at, allocation)

    def find(self, address):
        """The live allocation that holds an address, or None; a freed one is an error."""
        at = bisect.bisect_right(self.starts, address) - 1
        if at < 0 or address >= self.allocations[at].end:
            return None
        allocation = self.allocations[at]
        if allocation.freed:
            raise FreedMemory(f"address {address:#x} lies in {allocation.name}, which has been freed")
        return allocation

    def nearest(self, address):
        """Words for an address that belongs to nobody."""
        if address < 4096:
            return "null pointer"
        if not self.allocations:
            return "out of bounds (no arrays)"
        best = min(self.allocations, key=lambda a: max(a.start - address, address - a.end + 1, 0))
        if address >= best.end:
            where = f"{address - best.end} bytes past the end"
        elif address < best.start:
            where = f"{best.start - address} bytes before the start"
        else:
            where = f"at byte {address - best.start}, running over the end"
        return f"out of bounds: {where} of {best.name} ({best.size} bytes)"


class Traffic:
    """What one launch did to one allocation: how often each byte was read and written, sectors and requests.

    Accesses are only noted while the kernel runs and are counted when somebody asks.
    """

    def __init__(self, allocation):
        self.name, self.size = allocation.name, allocation.size
        self.read = self.written = 0
        self.sectors, self.lines, self.requests = ({"ld": 0, "st": 0, "atom": 0} for _ in range(3))
        self.log, self.pending = [], 0
        self._counts = {}

    def note(self, kind, size, warps, at, count):
        if kind != "st":
            self.read += count * size
        if kind != "ld":
            self.written += count * size
        if warps is None:
            return
        self.log.append((kind, size, warps, at))
        if not isinstance(at, slice):
            self.pending += count
            if self.pending > LOG_LIMIT:
                self.settle()

    def settle(self):
        log, self.log, self.pending = self.log, [], 0
        for kind, size, warps, at in log:
            units = np.arange(at.start, at.stop, dtype=i64) if isinstance(at, slice) else at
            self._count_sectors(kind, size, warps, units)
            for direction in ("read",) * (kind != "st") + ("write",) * (kind != "ld"):
                key = (direction, size)
                if key not in self._counts:
                    self._counts[key] = np.zeros(-(-self.size // size), np.uint32)
                if isinstance(at, slice):
                    self._counts[key][at] += 1
                else:
                    np.add.at(self._counts[key], units, 1)

    def _count_sectors(self, kind, size, warps, units):
        sector = (warps << 40) | (units * size >> 5)
        sector.sort()
        self.sectors[kind] += 1 + int(np.count_nonzero(np.diff(sector)))
        self.lines[kind] += 1 + int(np.count_nonzero(np.diff(sector >> 2)))
        self.requests[kind] += 1 + int(np.count_nonzero(np.diff(sector >> 40)))

    def counts(self, direction, offsets):
        """How often the bytes at these offsets were read ("read") or written ("write")."""
        self.settle()
        total = np.zeros(offsets.shape, i64)
        for (which, size), counts in self._counts.items():
            if which == direction:
                total += counts[offsets // size]
        return total
