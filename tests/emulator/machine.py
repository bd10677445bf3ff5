"""Some blocks of a launch, run together on NumPy arrays: which lanes execute which instruction next.

Lanes that stand at the lowest program counter run first, a basic block at a time, so that lanes that parted meet again.
A machine outlives its launch: the next launch of the same kernel with the same shape finds its code bound.
"""

import numpy as np

from tests.emulator.accesses import Accesses
from tests.emulator.barriers import AT_BLOCK, AT_WARP, EXITED, RUNNING, Barriers
from tests.emulator.errors import ClusterError, Deadlock, Timeout, Unsupported
from tests.emulator.instructions import CONTROL, ORDINARY
from tests.emulator.memory import Memory
from tests.emulator.operands import Operands, bit_in_warp
from tests.emulator.program import BRANCHING
from tests.emulator.ptx_types import PRED, i64, u32
from tests.emulator.races import MEMORY_INSTRUCTIONS, Races

FAR = 1 << 60
PATIENCE = 3000  # steps after which a spinning group of lanes must let others run
STACK_DEPTH = 24


class Machine(Operands, Accesses, Races, Barriers):
    """block_count blocks (whole clusters) of threads lanes each, padded to whole warps."""

    def __init__(self, program, function, layout, threads, cluster, block_count, check_race, shuffled):
        self.program, self.function, self.layout = program, function, layout
        self.threads, self.cluster, self.block_count = threads, cluster, block_count
        self.check_race, self.shuffled = check_race, shuffled
        padded = -(-threads // 32) * 32
        count = self.lane_count = block_count * padded
        self.warps_per_block = padded // 32
        self.lanes = np.arange(count)
        self.warp, self.block_of_lane = self.lanes >> 5, self.lanes // padded
        self.cluster_of_lane, self.rank = self.block_of_lane // cluster, self.block_of_lane % cluster
        self.first_block = self.cluster_of_lane * cluster
        self.shared_base = self.block_of_lane * layout.shared_size
        self.thread = self.lanes % padded
        self.block_numbers = np.zeros(block_count, i64)
        self.shared, self.local = Memory(block_count * layout.shared_size), Memory(count * layout.local_size)
        self.make_registers()
        if check_race:
            self.make_records()
        self.pc, self.state, self.barrier, self.wanted = (np.zeros(count, i64) for _ in range(4))
        self.slots, self.depth, self.stack = {}, np.zeros(count, i64), np.zeros((count, STACK_DEPTH), i64)
        self.carry = np.zeros(count, bool)
        self.blocks, self.on_release, self.counts, self.steps = {}, {}, {}, 0
        self.launch = None

    def size(self):
        """About how many bytes of registers and memory it holds."""
        return sum(pool.nbytes for pool in self.pools.values()) + 2 * len(self.shared.data) + 2 * len(self.local.data)

    def begin(self, launch):
        """Take up a new launch."""
        self.launch, self.counts, self.steps = launch, {}, 0

    def start(self, numbers):
        """Load the next batch: linear block numbers, perhaps fewer than block_count."""
        self.block_numbers[: len(numbers)] = numbers
        used = (self.thread < self.threads) & (self.block_of_lane < len(numbers))
        self.state[:] = np.where(used, RUNNING, EXITED)
        self.live = np.bincount(self.block_of_lane[used], minlength=self.block_count)
        self.alive = np.zeros(self.block_count * self.warps_per_block, u32)
        np.bitwise_or.at(self.alive, self.warp[used], bit_in_warp(self.lanes[used]))
        self.pc[:], self.depth[:], self.carry[:] = self.function.start, 0, False
        layout = self.layout
        self.shared.reset(len(numbers), layout.shared_state)
        self.local.reset(len(numbers) * self.warps_per_block * 32, layout.local_state)
        self.arrivals = np.zeros((self.block_count, 16), i64)  # bar.arrive
        self.arrived, self.passed = np.zeros(self.lane_count, i64), np.zeros(self.lane_count, i64)  # cluster barriers
        self.arrived_at = np.zeros(self.lane_count, i64)  # where
        self.cluster_done = np.zeros(self.block_count // self.cluster, i64)
        self.remote = {}
        self.copy_group, self.pending_copies = np.zeros(self.lane_count, i64), []
        self.eligible, self.until = None, FAR
        if self.check_race:
            self.clear_records()
            self.phase.fill(0)
            self.met.fill(0)

    # ---- sets of lanes
    def count(self, lanes):
        return lanes.stop - lanes.start if isinstance(lanes, slice) else len(lanes)

    def compact(self, index):
        """Sorted lane numbers as a slice if they are consecutive."""
        count = len(index)
        if count and index[-1] - index[0] + 1 == count:
            return slice(int(index[0]), int(index[0]) + count)
        return index

    def subset(self, lanes, mask):
        """The lanes where mask, one element per lane of the set, holds."""
        return self.compact(np.flatnonzero(mask) + lanes.start if isinstance(lanes, slice) else lanes[mask])

    # ---- scheduling
    def run(self):
        """Run the batch to its end."""
        self.fair = self.steps + PATIENCE
        limit = self.steps + self.launch.max_steps
        while True:
            selected = self._select()
            if selected is not None:
                self._advance(*selected)
            elif not self._unblock():
                return
            if self.steps > limit:
                where = self.where(self.state == RUNNING)
                raise Timeout(f"{self.launch.max_steps} steps; lanes are at {where}")

    def _advance(self, lanes, p, next_pc, lane_count, warp_count):
        """Run lanes from p until they part, wait, reach the next group of lanes or have run for long enough."""
        blocks, counts = self.blocks, self.counts
        stop = min(self.until, self.fair + 1)
        while True:
            block = blocks.get(p)
            if block is None:
                block = blocks[p] = self._bind_block(p)
            actions, end, last = block
            for action in actions:
                action(lanes)
            tally = counts.get(p)
            if tally is None:
                tally = counts[p] = [0, 0, end + (last is not None)]
            tally[0] += lane_count
            tally[1] += warp_count
            self.steps += len(actions) + 1
            p = end if last is None else last(lanes, end)
            if p is None:
                return
            if p >= next_pc or self.steps >= stop:
                self.pc[lanes] = p
                return

    def _select(self):
        """(lanes, pc, lowest pc of the other lanes, lanes, warps) for the group that runs next, or None."""
        running = self.state == RUNNING
        if self.launch.random is not None or self.eligible is not None or self.steps > self.fair:
            self._choose_eligible(running)
            if self.eligible is not None:
                running = running & self.eligible
        counters = np.where(running, self.pc, FAR)
        p = int(counters.min())
        if p == FAR:
            return None
        here = counters == p
        index = np.flatnonzero(here)
        if len(index) == self.lane_count:
            return slice(0, self.lane_count), p, FAR, self.lane_count, self.lane_count // 32
        next_pc = int(np.where(here, FAR, counters).min())
        warps = 1 + int(np.count_nonzero(np.diff(index >> 5)))
        return self.compact(index), p, next_pc, len(index), warps

    def _choose_eligible(self, running):
        """With a random schedule some warps, or some of their lanes, run ahead for a while; without, nobody may starve
        the others for ever.
        """
        if self.eligible is not None and self.steps < self.until and (running & self.eligible).any():
            return
        self.eligible, self.until = None, FAR
        if not running.any():
            return
        random = self.launch.random
        if random is not None:
            warps = np.unique(self.warp[running])
            chosen = random.random(len(warps)) < random.choice([0.05, 0.3, 0.7, 1.0])
            chosen[random.integers(len(warps))] = True
            self.eligible = np.isin(self.warp, warps[chosen])
            some = self.eligible & (random.random(self.lane_count) < random.choice([0.1, 0.5, 1.0]))
            if (running & some).any():
                self.eligible = some
            self.until = self.steps + int(2 ** random.uniform(0, 9))
        elif self.steps > self.fair:
            self.fair = self.steps + PATIENCE
            counters = np.unique(self.pc[running])
            if len(counters) > 1:
                chosen = counters[self.launch.fairness.integers(len(counters))]
                self.eligible, self.until = running & (self.pc == chosen), self.steps + PATIENCE // 8

    def _unblock(self):
        """Nobody can run: exits may have completed barriers, all may be done, or it is a deadlock."""
        if (self.state == EXITED).all():
            return False
        for p in np.unique(self.pc[self.state == AT_WARP]):
            self._bind_block(int(p))[2](self.lanes[:0], int(p))
        for number in np.unique(self.barrier[self.state == AT_BLOCK]):
            self.check_block_barrier(int(number))
        self.check_cluster_barrier()
        if not (self.state == RUNNING).any():
            raise Deadlock("no thread can go on: " + self.where(self.state != EXITED))
        return True

    def exit(self, lanes):
        index = self.lanes[lanes]
        self.state[lanes] = EXITED
        self.live -= np.bincount(self.block_of_lane[index], minlength=self.block_count)
        np.bitwise_and.at(self.alive, self.warp[index], ~bit_in_warp(index))
        if self.remote:  # a block must outlive the accesses to its shared memory
            for block in np.unique(self.block_of_lane[index]):
                last, ins, who = self.remote.get(block, (-1, None, None))
                if not self.live[block] and last >= self.passed[self.block_of_lane == block].max():
                    raise ClusterError(
                        f"block of rank {block % self.cluster} may exit before its distributed shared memory is "
                        f"accessed by {who}, {ins}: no cluster barrier between"
                    )

    # ---- words for errors
    def where(self, mask):
        parts = []
        for p in np.unique(self.pc[mask])[:6]:
            lanes = np.flatnonzero(mask & (self.pc == p))
            parts.append(f"{len(lanes)} threads at {self.program.code[p]}, first {self.who(lanes[0])}")
        return "; ".join(parts)

    def who(self, lane):
        return f"thread {int(self.thread[lane])} of block {int(self.block_numbers[self.block_of_lane[lane]])}"

    # ---- binding: an instruction becomes a function of a set of lanes
    def _bind_block(self, p):
        """(functions of the straight-line instructions from p, pc after them, function of the branch or None)"""
        actions, code, leaders = [], self.program.code, self.program.leaders
        while True:
            ins = code[p]
            if ins.base in BRANCHING:
                return actions, p, self._bind_control(ins, p)
            actions.append(self._bind(ins))
            p += 1
            if p in leaders or (self.shuffled and ins.base in MEMORY_INSTRUCTIONS):
                return actions, p, None

    def _bind_closure(self, table, ins):
        binder = table.get(ins.base)
        if binder is None:
            raise Unsupported(f"PTX instruction {ins}")
        try:
            return binder(self, ins)
        except (KeyError, IndexError, StopIteration, TypeError, AttributeError) as error:
            raise Unsupported(f"PTX instruction {ins}: {error!r}") from error

    def _bind(self, ins):
        action = self._bind_closure(ORDINARY, ins)
        if ins.guard is None:
            return action
        guard, negated, subset = self.source(ins.guard, PRED), ins.negated, self.subset

        def run(lanes):
            mask = ~guard[lanes] if negated else guard[lanes]
            if mask.all():
                action(lanes)
            elif mask.any():
                action(subset(lanes, mask))

        return run

    def _bind_control(self, ins, p):
        """A control function returns the next pc of its lanes, or None if it has set self.pc or made them wait."""
        self.binding_pc = p
        action = self._bind_closure(CONTROL, ins)
        if ins.guard is None:
            return action
        guard, negated, subset, pc = self.source(ins.guard, PRED), ins.negated, self.subset, self.pc

        def run(lanes, p):
            mask = ~guard[lanes] if negated else guard[lanes]
            if mask.all():
                return action(lanes, p)
            if not mask.any():
                return p + 1
            pc[subset(lanes, ~mask)] = p + 1
            taken = subset(lanes, mask)
            target = action(taken, p)
            if target is not None:
                pc[taken] = target
            return None

        return run
