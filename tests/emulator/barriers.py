"""Barriers of warps, blocks and clusters: who waits, and when everybody has come."""

import numpy as np

from tests.emulator.errors import BarrierError
from tests.emulator.operands import bit_in_warp
from tests.emulator.ptx_types import i64, u32

RUNNING, AT_WARP, AT_BLOCK, AT_CLUSTER, EXITED = range(5)
WHOLE_WARP = u32(0xFFFFFFFF)


class Barriers:
    """The part of a Machine that makes lanes wait for each other."""

    def check_block_barrier(self, number):
        """Let the threads at a block barrier go on where all have arrived."""
        waiting = (self.state == AT_BLOCK) & (self.barrier == number)
        came = np.bincount(self.block_of_lane[waiting], minlength=self.block_count)
        wanted = np.zeros(self.block_count, i64)
        np.maximum.at(wanted, self.block_of_lane[waiting], self.wanted[waiting])
        needed = np.where(wanted > 0, wanted, self.live)
        present = came + self.arrivals[:, number]
        done = (came > 0) & (present >= needed)
        if not done.any():
            return
        if (present[done] > needed[done]).any():
            raise BarrierError(f"more threads than expected at barrier {number}: {self.where(waiting)}")
        released = np.flatnonzero(waiting & done[self.block_of_lane])
        self.launch.stats.early_exit_barriers += int((done & (wanted == 0) & (came < self.threads)).sum())
        counters = np.unique(self.pc[released])
        for p in counters:
            here, others = released[self.pc[released] == p], released[self.pc[released] != p]
            ins = self.program.code[p]
            aligned = ins.base == "bar" or ins.has("aligned")
            if aligned and len(np.intersect1d(self.warp[here], self.warp[others])):
                where = self.where(waiting)
                raise BarrierError(f"threads of one warp wait at different aligned barriers: {where}")
        for p in counters:
            if p in self.on_release:
                self.on_release[p](released[self.pc[released] == p])
        if self.check_race:
            top = np.zeros(self.block_count, i64)
            np.maximum.at(top, self.block_of_lane[released], self.phase[released])
            self.phase[released] = top[self.block_of_lane[released]] + 1
            self.have_met(released)
        self.arrivals[done, number] = 0
        self.pc[released] += 1
        self.state[released] = RUNNING

    def check_cluster_barrier(self):
        live = self.state != EXITED
        cluster, done = self.cluster_of_lane, self.cluster_done
        missing = np.bincount(cluster[live & (self.arrived == done[cluster])], minlength=len(done))
        some = np.bincount(cluster[self.arrived > done[cluster]], minlength=len(done))
        complete = (missing == 0) & (some > 0)
        if complete.any():
            self._check_aligned(live & complete[cluster])
        done += complete
        released = (self.state == AT_CLUSTER) & (done[cluster] >= self.arrived)
        if released.any():
            self.have_met(released)
            self.passed[released] = self.arrived[released]
            self.state[released] = RUNNING
            self.pc[released] += 1

    def _check_aligned(self, came):
        """The threads of a warp must have come to one aligned barrier, not to copies of it in branches."""
        index = np.flatnonzero(came)
        counters, warp = self.arrived_at[index], self.warp[index]
        if (counters == counters[:1]).all():
            return
        for p in np.unique(counters):
            ins = self.program.code[p]
            if ins.has("aligned") and len(np.intersect1d(warp[counters == p], warp[counters != p])):
                raise BarrierError(f"threads of one warp at different aligned barriers: {self.who(index[0])}, {ins}")

    def warp_sync(self, lanes, p, mask):
        """Lanes reach a .sync instruction -> (the lanes whose warp is complete, whether they were all of them).

        The others wait; where some wait or waited, the program counters are set here.
        """
        if isinstance(lanes, slice) and lanes.start % 32 == 0 and lanes.stop % 32 == 0:
            warps = slice(lanes.start >> 5, lanes.stop >> 5)
            if (mask[lanes] == WHOLE_WARP).all() and (self.alive[warps] == WHOLE_WARP).all():
                return lanes, True
        waiting = np.flatnonzero((self.state == AT_WARP) & (self.pc == p))
        index = self.lanes[lanes]
        if len(waiting):
            index = np.sort(np.concatenate([index, waiting]))
        if not len(index):
            return index, False
        warp, bit = self.warp[index], bit_in_warp(index)
        members = self.spread(mask[index], index)
        if ((members & bit) == 0).any():
            lane = index[np.argmax((members & bit) == 0)]
            raise BarrierError(f"{self.who(lane)} is not in its own member mask, {self.program.code[p]}")
        present = np.zeros(len(self.alive), u32)
        np.bitwise_or.at(present, warp, bit)
        complete = (members & self.alive[warp] & ~present[warp]) == 0
        if complete.all() and not len(waiting):
            return lanes, True
        self.state[index[complete]] = RUNNING
        self.pc[index[complete]] = p + 1
        self.state[index[~complete]] = AT_WARP
        self.pc[index[~complete]] = p
        return index[complete], False
