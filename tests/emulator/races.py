"""Races on shared memory: who touched each granule last, and which barriers lie between.

Of warps always. Of lanes of one warp where the schedule is random, as it takes half as long again.
"""

import numpy as np

from tests.emulator.errors import SharedRace
from tests.emulator.ptx_types import TYPES, i32, i64

NOBODY, SEVERAL, SEVERAL_BLOCKS = -1, 1 << 30, (1 << 30) + 1  # besides warp numbers
MEMORY_INSTRUCTIONS = frozenset(("ld", "st", "atom", "red"))
VERBS = {"st": "written", "ld": "read", "atom": "updated"}
CONFLICTS = {"ld": ("st", "atom"), "st": ("st", "ld", "atom"), "atom": ("st", "ld")}


class Records:
    """The last accesses of one kind, per granule: the warp, its block-barrier count and its cluster-barrier count; the
    lane, and its count of barriers of any kind.
    """

    def __init__(self, count):
        self.warp, self.phase, self.arrived = np.full(count, NOBODY, i32), np.zeros(count, i32), np.zeros(count, i32)
        self.lane, self.met = np.full(count, NOBODY, i32), np.zeros(count, i32)
        self.used = False

    def clear(self):
        if self.used:
            self.warp.fill(NOBODY)
            self.lane.fill(NOBODY)
            self.used = False


class Races:
    """The part of a Machine that finds races.

    Two accesses are ordered by a barrier of their block (the later phase is higher) or of their cluster; two of one
    warp by its own too, but not by shuffles and votes, which order no memory.
    """

    def make_records(self):
        sizes = [
            TYPES[ins.types[-1]].bits // 8
            for ins in self.program.code
            if ins.base in MEMORY_INSTRUCTIONS and ins.types and not (ins.has("param") or ins.has("global"))
        ]
        self.granule = max(1, min([4, *sizes]))
        count = len(self.shared.data) // self.granule
        self.records = {kind: Records(count) for kind in ("ld", "st", "atom")}
        self.phase, self.met = np.zeros(self.lane_count, i64), np.zeros(self.lane_count, i64)

    def clear_records(self):
        """Nothing before can race with anything after: a fresh batch, or a barrier of every thread at once."""
        for record in self.records.values():
            record.clear()

    def have_met(self, lanes):
        """What these lanes did before a barrier is ordered before what they do now."""
        if self.check_race:
            self.met[lanes] = self.met[lanes].max() + 1

    def race(self, ins, lanes, address, place, size, kind):
        for offset in range(0, size, self.granule):
            granule = (place + offset) // self.granule
            for other in CONFLICTS[kind]:
                record = self.records[other]
                if record.used:
                    self._check(ins, lanes, address, size, kind, other, record, granule)
                    if self.shuffled:
                        self._check_lanes(ins, lanes, address, size, kind, other, record, granule)
            if self.shuffled:
                self._remember_lanes(lanes, kind, granule)
            self._remember(ins, lanes, address, size, kind, granule)

    def _check(self, ins, lanes, address, size, kind, other, record, granule):
        before = record.warp[granule]
        if before.max() == NOBODY:
            return
        warp, per_block = self.warp[lanes], self.warps_per_block
        same_block = (before < SEVERAL) & (before // per_block == warp // per_block) | (before == SEVERAL)
        ordered = (same_block & (record.phase[granule] < self.phase[lanes])) | (
            record.arrived[granule] < self.passed[lanes]
        )
        bad = (before != NOBODY) & (before != warp) & ~ordered
        if bad.any():
            j = int(np.argmax(bad))
            by = f"warp {int(before[j]) % per_block}" if before[j] < SEVERAL else "several warps"
            what = (
                f"shared memory race: {VERBS[other]} by {by} and {VERBS[kind]} by warp "
                f"{int(warp[j]) % per_block} with no barrier between"
            )
            self.fail(SharedRace, ins, lanes, j, address, size, what)

    def _unordered(self, record, granule, lanes):
        """Where another lane of the same warp came last, and no barrier since."""
        before = record.lane[granule]
        others = (before != NOBODY) & (before != self.lanes[lanes]) & (record.warp[granule] == self.warp[lanes])
        return others & (record.met[granule] >= self.met[lanes])

    def _check_lanes(self, ins, lanes, address, size, kind, other, record, granule):
        bad = self._unordered(record, granule, lanes)
        if bad.any():
            j = int(np.argmax(bad))
            before, lane = int(record.lane[granule][j]), int(self.lanes[lanes][j]) % 32
            by = f"lane {before % 32}" if before < SEVERAL else "several lanes"
            what = (
                f"shared memory race: {VERBS[other]} by {by} and {VERBS[kind]} by lane {lane} of one warp "
                f"with no barrier between"
            )
            self.fail(SharedRace, ins, lanes, j, address, size, what)

    def _remember_lanes(self, lanes, kind, granule):
        record, lane = self.records[kind], self.lanes[lanes]
        if kind == "st":
            record.lane[granule] = lane
        else:  # several lanes may read, or update, together
            record.lane[granule] = np.where(self._unordered(record, granule, lanes), SEVERAL, lane)
            after = record.lane[granule]
            record.lane[granule[(after != lane) & (after < SEVERAL)]] = SEVERAL
        record.met[granule] = self.met[lanes]

    def remember_copies(self, lanes, cells):
        """A copy that has been waited for is written only now; one row of bytes for each lane."""
        record, granule = self.records["st"], cells[:, :: self.granule] // self.granule
        record.used = True
        record.warp[granule], record.lane[granule] = self.warp[lanes][:, None], lanes[:, None]
        record.phase[granule], record.arrived[granule] = self.phase[lanes][:, None], self.arrived[lanes][:, None]
        record.met[granule] = self.met[lanes][:, None]

    def _remember(self, ins, lanes, address, size, kind, granule):
        record, warp, per_block = self.records[kind], self.warp[lanes], self.warps_per_block
        phase = self.phase[lanes]
        if kind == "st" or not record.used:
            record.warp[granule] = warp
        else:  # several warps may read, or update, together
            before = record.warp[granule]
            if (before == NOBODY).all():
                record.warp[granule] = warp
            else:
                keep = (before != NOBODY) & (before != warp) & (record.phase[granule] >= phase)
                keep &= record.arrived[granule] >= self.passed[lanes]
                far = (before == SEVERAL_BLOCKS) | (before < SEVERAL) & (before // per_block != warp // per_block)
                shared = np.where(far, SEVERAL_BLOCKS, SEVERAL)
                record.warp[granule] = np.where(keep, shared, warp)
        record.used = True
        record.phase[granule], record.arrived[granule] = phase, self.arrived[lanes]
        if isinstance(lanes, slice) and lanes.stop - lanes.start <= 32:
            return
        after = record.warp[granule]
        clash = (after != warp) & (after < SEVERAL)  # the same granule from two warps at this instruction
        if clash.any():
            j = int(np.argmax(clash))
            if kind == "st":
                what = (
                    f"shared memory race: written by warps {int(warp[j]) % per_block} and "
                    f"{int(after[j]) % per_block} at the same instruction"
                )
                self.fail(SharedRace, ins, lanes, j, address, size, what)
            near = after[clash] // per_block == warp[clash] // per_block
            record.warp[granule[clash]] = np.where(near, SEVERAL, SEVERAL_BLOCKS)
