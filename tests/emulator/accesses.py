"""Loads and stores of a machine: address spaces, bounds, alignment, initialisation, distributed shared memory."""

import bisect

import numpy as np

from tests.emulator.errors import (
    ClusterError,
    FreedMemory,
    Misaligned,
    NonCoherentRead,
    OutOfBounds,
    ReadOnlyWrite,
    UninitialisedRead,
    Unsupported,
)
from tests.emulator.memory import Traffic, by_access
from tests.emulator.ptx_types import (
    LOCAL_FIRST,
    OUTSIDE,
    PENDING,
    RANK_SHIFT,
    READY,
    SHARED_FIRST,
    i64,
    u64,
)

WINDOWS = {1: "shared::cluster", 2: "local", 3: "param"}
ONES = {size: np.array(0x0101010101010101 & ((1 << 8 * size) - 1), f"u{size}") for size in (1, 2, 4, 8)}


class Accesses:
    """The part of a Machine that checks memory accesses.

    kind is "ld", "st" or "atom". access() yields pieces (lanes, memory, at): at indexes memory.view(...) in units of
    the access size, as a slice where the lanes touch consecutive units.
    """

    def fail(self, error, ins, lanes, k, address, size, what):
        lane = self.lanes[lanes][k]
        raise error(f"{what}: {size}-byte access at address {int(address[k]):#x} by {self.who(lane)}, {ins}")

    def access(self, ins, space, lanes, address, size, kind):
        if space == "generic":
            return self._by_window(ins, lanes, address, size, kind)
        if space == "global":
            return self._global(ins, lanes, address, size, kind)
        if space in ("shared", "shared::cta", "shared::cluster"):
            return (self._shared(ins, space, lanes, address, size, kind),)
        if space == "local":
            return (self._local(ins, lanes, address, size, kind),)
        raise Unsupported(f"{space} memory in {ins}")

    def _by_window(self, ins, lanes, address, size, kind):
        """Generic addresses, cut by the window in which they lie."""
        window = address >> u64(40)
        for number in np.unique(window) if (window != window[0]).any() else window[:1]:
            number = int(number)
            space = WINDOWS.get(number, "global")
            offset = address - u64(number << 40) if number in WINDOWS else address
            inside = window == u64(number)
            if inside.all():
                yield from self.access(ins, space, lanes, offset, size, kind)
            else:
                yield from self.access(ins, space, self.subset(lanes, inside), offset[inside], size, kind)

    # ---- global memory
    def _global(self, ins, lanes, address, size, kind):
        memory = self.launch.memory
        count = len(address)
        consecutive = count > 1 and bool((address[1:] - address[:-1] == size).all())
        if consecutive:
            low, high = int(address[0]), int(address[-1])
        else:
            low, high = int(address.min()), int(address.max())
        k = bisect.bisect_right(memory.starts, low) - 1
        if k >= 0 and high + size <= memory.allocations[k].end:
            return (self._piece(ins, memory.allocations[k], lanes, address, size, kind, consecutive),)
        which = np.searchsorted(np.array(memory.starts, u64), address, "right") - 1
        ends = np.array([allocation.end for allocation in memory.allocations] or [0], u64)
        bad = (which < 0) | (address + u64(size) > ends[which])
        if bad.any():
            j = int(np.argmax(bad))
            self.launch.foreign(int(address[j]), f"{self.who(self.lanes[lanes][j])}, {ins}")
            self.fail(OutOfBounds, ins, lanes, j, address, size, memory.nearest(int(address[j])))
        return [
            self._piece(
                ins, memory.allocations[k], self.subset(lanes, which == k), address[which == k], size, kind, False
            )
            for k in np.unique(which)
        ]

    def _piece(self, ins, allocation, lanes, address, size, kind, consecutive):
        """Accesses to one allocation, all inside its range."""
        launch = self.launch
        if allocation.freed:
            self.fail(FreedMemory, ins, lanes, 0, address, size, f"{allocation.name} has been freed")
        if kind != "ld" and allocation.readonly:
            self.fail(ReadOnlyWrite, ins, lanes, 0, address, size, f"write to read-only {allocation.name}")
        at = self._units(ins, "global", lanes, address, allocation.start, size, consecutive)
        if kind != "ld" and allocation.protected is not None:
            protected = by_access(allocation.protected, size)[at].reshape(len(address), -1).any(1)
            if protected.any():
                j = int(np.argmax(protected))
                self.fail(ReadOnlyWrite, ins, lanes, j, address, size, f"write to read-only {allocation.name}")
        if allocation.outside or (allocation.fresh and kind != "st"):
            self._check_states(ins, allocation, lanes, address, size, kind, at)
        if allocation.fresh and kind != "ld":
            allocation.states(size)[at] = ONES[min(size, 8)]
        if launch.program.reads_noncoherent:
            self._noncoherent(ins, allocation, lanes, address, size, kind)
        traffic = launch.traffic.get(allocation.start)
        if traffic is None:
            traffic = launch.traffic[allocation.start] = Traffic(allocation)
        count = len(address)
        traffic.note(kind, size, self.warp[lanes] if launch.track else None, at, count)
        self._count("global", kind, count * size)
        return lanes, allocation, at

    def _units(self, ins, space, lanes, address, start, size, consecutive):
        """Positions in units of size; misaligned addresses are an error."""
        shift = size.bit_length() - 1
        if consecutive:
            first = int(address[0]) - start
            if first % size == 0:
                return slice(first >> shift, (first >> shift) + len(address))
        offset = (address - u64(start)).view(i64)
        if int(np.bitwise_or.reduce(offset)) & (size - 1):
            j = int(np.argmax((offset & (size - 1)) != 0))
            self.fail(Misaligned, ins, lanes, j, address, size, f"misaligned ({space})")
        return offset >> shift

    def _noncoherent(self, ins, allocation, lanes, address, size, kind):
        """Remember what this launch writes; ld.global.nc must not read it."""
        if kind == "ld" and (allocation.written is None or not ins.has("nc")):
            return
        place = (address - u64(allocation.start)).view(i64)[:, None] + np.arange(size)
        if kind != "ld":
            if allocation.written is None:
                allocation.written = np.zeros(allocation.size, bool)
                self.launch.marked.append(allocation)
            allocation.written[place] = True
        elif (bad := allocation.written[place].any(1)).any():
            j = int(np.argmax(bad))
            self.fail(NonCoherentRead, ins, lanes, j, address, size, "ld.global.nc of memory that this kernel wrote")

    def _check_states(self, ins, memory, lanes, address, size, kind, at):
        """Outside bytes may not be touched, fresh ones not read."""
        states, ones = memory.states(size)[at], ONES[min(size, 8)]
        if kind == "st":
            bad = (states & ones) != ones
        else:
            bad = states != ones
        if not bad.any():
            return
        units = np.arange(at.start, at.stop) if isinstance(at, slice) else at
        for j in np.flatnonzero(bad.reshape(len(units), -1).any(1)):
            self._check_state(ins, memory, lanes, int(j), address, size, kind, int(units[j]) * size)

    def _check_state(self, ins, memory, lanes, j, address, size, kind, place):
        state = memory.state[place : place + size]
        if ins.used_bytes is not None:
            state = state[[bool(ins.used_bytes >> b & 1) for b in range(size)]]
        shared = memory is self.shared
        if (state == OUTSIDE).any():
            if shared:
                near = self.layout.nearest_shared(int(address[j]) & 0xFFFFFF)
                what = f"between shared variables ({near})"
            elif memory is self.local:
                what = "between local variables"
            else:
                what = f"out of bounds: byte {place} of the base of {memory.name}, outside the view"
            self.fail(OutOfBounds, ins, lanes, j, address, size, what)
        if kind == "st":
            return
        if (state == PENDING).any():
            self.fail(UninitialisedRead, ins, lanes, j, address, size, "asynchronous copy not waited for")
        if (state != READY).any():
            name = "shared memory" if shared else "local memory" if memory is self.local else memory.name
            self.fail(UninitialisedRead, ins, lanes, j, address, size, f"uninitialised {name}")

    # ---- shared and local memory
    def _shared(self, ins, space, lanes, address, size, kind):
        layout, count = self.layout, len(address)
        if self.cluster == 1:
            low, high = int(address.min()), int(address.max())
            bad = low < SHARED_FIRST or high + size > layout.shared_size
            if bad:
                wrong = (address < SHARED_FIRST) | (address + u64(size) > layout.shared_size)
                self._outside_shared(ins, lanes, int(np.argmax(wrong)), address, size)
            place = self.shared_base[lanes] + address.view(i64)
        else:
            place = self._cluster_shared(ins, space, lanes, address, size, kind)
        if int(np.bitwise_or.reduce(place)) & (size - 1):
            j = int(np.argmax((place & (size - 1)) != 0))
            self.fail(Misaligned, ins, lanes, j, address, size, "misaligned (shared)")
        at = place >> (size.bit_length() - 1)
        self._check_states(ins, self.shared, lanes, address, size, kind, at)
        if kind != "ld":
            self.shared.states(size)[at] = ONES[min(size, 8)]
        if self.check_race:
            self.race(ins, lanes, address, place, size, kind)
        self._count("shared", kind, count * size)
        return lanes, self.shared, at

    def _outside_shared(self, ins, lanes, j, address, size):
        offset = int(address[j]) & 0xFFFFFF
        what = f"outside shared memory (own rank {int(self.rank[lanes][j])}, {self.layout.nearest_shared(offset)})"
        self.fail(OutOfBounds, ins, lanes, j, address, size, what)

    def _cluster_shared(self, ins, space, lanes, address, size, kind):
        """Shared memory in a cluster, perhaps of another block: it must be alive and known to have started."""
        rank = (address >> u64(RANK_SHIFT)).view(i64)
        offset = (address & u64(0xFFFFFF)).view(i64)
        own = rank == self.rank[lanes]
        bad = (offset < SHARED_FIRST) | (offset + size > self.layout.shared_size) | (rank >= self.cluster)
        if space != "shared::cluster":
            bad |= ~own
        if bad.any():
            self._outside_shared(ins, lanes, int(np.argmax(bad)), address, size)
        block = self.first_block[lanes] + rank
        if not own.all():
            for wrong, what in (
                (~own & (self.live[block] == 0), "of a block that has exited"),
                (~own & (self.cluster_done[self.cluster_of_lane[lanes]] == 0), "before any cluster barrier"),
            ):
                if wrong.any():
                    what = f"distributed shared memory {what}"
                    self.fail(ClusterError, ins, lanes, int(np.argmax(wrong)), address, size, what)
            self._note_remote(ins, lanes, block, own)
            self._count("dsmem", kind, int((~own).sum()) * size)
        return block * self.layout.shared_size + offset

    def _note_remote(self, ins, lanes, block, own):
        """The last cluster barrier before an access to another block, for the check when that block exits."""
        arrived = self.arrived[lanes]
        for target in np.unique(block[~own]):
            far = np.flatnonzero((block == target) & ~own)
            j = far[np.argmax(arrived[far])]
            if arrived[j] >= self.remote.get(target, (-1,))[0]:
                self.remote[target] = (int(arrived[j]), ins, self.who(self.lanes[lanes][j]))

    def _local(self, ins, lanes, address, size, kind):
        layout = self.layout
        bad = (address < LOCAL_FIRST) | (address + u64(size) > layout.local_size)
        if bad.any():
            what = f"outside local memory ({layout.local_size - LOCAL_FIRST} bytes)"
            self.fail(OutOfBounds, ins, lanes, int(np.argmax(bad)), address, size, what)
        place = self.lanes[lanes] * layout.local_size + address.view(i64)
        at = self._units(ins, "local", lanes, place.view(u64), 0, size, False)
        self._check_states(ins, self.local, lanes, address, size, kind, at)
        if kind != "ld":
            self.local.states(size)[at] = ONES[min(size, 8)]
        self._count("local", kind, len(address) * size)
        return lanes, self.local, at

    def _count(self, space, kind, size):
        stats = self.launch.stats
        if kind != "st":
            stats.read[space] += size
        if kind != "ld":
            stats.written[space] += size
