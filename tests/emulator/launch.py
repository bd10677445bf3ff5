"""A kernel and its launches: memory layout, parameters, batches of blocks, and what is counted."""

import collections
import functools
import time

import numpy as np

from tests.emulator.errors import EmulatorError, InvalidLaunch, Trap
from tests.emulator.machine import Machine
from tests.emulator.memory import Allocation
from tests.emulator.ptx_types import (
    FRESH,
    LOCAL_FIRST,
    OUTSIDE,
    RANK_SHIFT,
    READY,
    SHARED_FIRST,
    f32,
    f64,
    i32,
    u8,
    u32,
    u64,
)

GUARD = 256  # untouchable bytes after each shared variable
MAX_LANES = 8192  # threads that run together; blocks of one cluster always do
SMALL_MACHINE = 1024  # lanes
MAX_STEPS = 5_000_000
MACHINE_BYTES = 512 << 20  # machines kept for launches to come
# Bytes of shared memory that a block may use, by architecture (CUDA programming guide, compute capabilities).
SHARED_LIMIT = {75: 65536, 80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}


@functools.lru_cache(maxsize=256)
def kernel_of(program, entry):
    return Kernel(program, entry)


class Layout:
    """Where the shared, local and parameter variables of one kernel lie; guard bytes stand between them."""

    def __init__(self, program, function, dynamic_bytes):
        self.addresses, self.dynamic_bytes = dict(program.addresses), dynamic_bytes
        self._place_shared(program, function)
        self._place_local(program)
        offset = 0
        self.parameters = []
        for variable in function.params:
            offset = -(-offset // variable.align) * variable.align
            self.addresses[variable.key] = offset
            self.parameters.append((offset, variable.size))
            offset += variable.size
        self.parameter_bytes = offset

    def _place_shared(self, program, function):
        at, total, used = SHARED_FIRST, 0, program.reachable(function)
        self.shared_variables = []
        for variable in program.variables.values():
            if variable.space == "shared" and variable.key not in program.dynamic_shared and variable.key in used:
                at = -(-at // variable.align) * variable.align
                self.addresses[variable.key] = at
                self.shared_variables.append((variable.key, at, variable.size))
                total += variable.size
                at += variable.size + GUARD
        align = max([16] + [program.variables[key].align for key in program.dynamic_shared])
        at = -(-at // align) * align
        for key in program.dynamic_shared:
            self.addresses[key] = at
        if self.dynamic_bytes:
            self.shared_variables.append(("dynamic shared memory", at, self.dynamic_bytes))
            at += self.dynamic_bytes
        self.shared_bytes = total + self.dynamic_bytes
        self.shared_size = -(-(at + GUARD) // 128) * 128
        self.shared_state = np.full(self.shared_size, OUTSIDE, u8)
        for _, start, size in self.shared_variables:
            self.shared_state[start : start + size] = FRESH

    def _place_local(self, program):
        at, placed = LOCAL_FIRST, []
        for variable in program.variables.values():
            if variable.space == "local":
                at = -(-at // variable.align) * variable.align
                self.addresses[variable.key] = at
                placed.append((at, variable.size))
                at += variable.size + LOCAL_FIRST
        self.local_size = -(-at // 64) * 64 if placed else 0
        self.local_state = np.full(self.local_size, OUTSIDE, u8)
        for start, size in placed:
            self.local_state[start : start + size] = FRESH

    def nearest_shared(self, offset):
        """Words for an offset in shared memory."""
        if not self.shared_variables:
            return "no shared variables"
        name, start, size = min(self.shared_variables, key=lambda v: max(v[1] - offset, offset - v[1] - v[2] + 1, 0))
        return f"nearest variable {name[-40:]}, offset {offset - start} of {size} bytes"


class Stats:
    """What one launch did.

    entry, plan, device, stream     how it was launched
    read, written                   bytes by space: global, shared, local, dsmem (another block's shared memory)
    buffers                         {array name: Traffic}: bytes and how often each byte was read and written
    sectors, lines, requests        32-byte sectors, 128-byte lines and warp accesses of global memory by ld, st, atom
    instructions, warp_instructions by opcode, per thread and per warp, also where a predicate switched them off
    warp_lines                      by line of the PTX text, per warp
    """

    def __init__(self, entry, plan, device, stream):
        self.entry, self.plan, self.device, self.stream = entry, plan, device, stream
        self.read, self.written = collections.Counter(), collections.Counter()
        self.traffic = {}
        self.blocks = self.steps = self.early_exit_barriers = self.shared_bytes = 0
        self.seconds = 0.0
        self._counts, self._code = {}, ()

    @property
    def buffers(self):
        return {traffic.name: traffic for traffic in self.traffic.values()}

    def settle(self):
        """Count what has only been noted."""
        for traffic in self.traffic.values():
            traffic.settle()

    def _sum(self, name):
        self.settle()
        total = collections.Counter()
        for traffic in self.traffic.values():
            total.update(getattr(traffic, name))
        return total

    @property
    def sectors(self):
        return self._sum("sectors")

    @property
    def lines(self):
        return self._sum("lines")

    @property
    def requests(self):
        return self._sum("requests")

    def keep_counts(self, counts, code):
        self._counts, self._code = counts, code

    def _instructions(self, which):
        total = collections.Counter()
        for start, tally in self._counts.items():
            for ins in self._code[start : tally[2]]:
                if ins.base != "callret":
                    total[ins.op] += tally[which]
        return total

    @property
    def instructions(self):
        return self._instructions(0)

    @property
    def warp_instructions(self):
        return self._instructions(1)

    @property
    def warp_lines(self):
        executed, lines = collections.Counter(), {}
        for start, tally in self._counts.items():
            executed.update(dict.fromkeys(range(start, tally[2]), tally[1]))
        for k, count in executed.items():
            line = self._code[k].line  # of several instructions, for inline PTX
            lines[line] = max(lines.get(line, 0), count)
        return lines

    def __repr__(self):
        return (
            f"Stats({self.entry[:40]}, blocks={self.blocks}, steps={self.steps}, read={dict(self.read)}, "
            f"written={dict(self.written)}, sectors={dict(self.sectors)}, seconds={self.seconds:.3f})"
        )


class Launch:
    """One launch while it runs: what a Machine asks for beyond the code."""

    def __init__(self, program, memory, parameters, blocks, stats, options, foreign):
        self.program, self.memory, self.parameters, self.blocks, self.stats = program, memory, parameters, blocks, stats
        self.track, self.max_steps = options.track, options.max_steps
        self.random = np.random.default_rng(options.seed) if options.seed is not None else None
        self.fairness = np.random.default_rng(0)
        self.adversary, self.foreign = options.adversary, foreign
        self.traffic, self.marked = stats.traffic, []


class Kernel:
    """One entry of a program. Machines are kept, most recent last, so that a later launch finds its code bound."""

    machines = collections.OrderedDict()

    def __init__(self, program, entry):
        if entry not in program.entries:
            raise InvalidLaunch(f"no entry {entry!r} in the PTX; it has {program.entries}")
        self.program, self.entry, self.function = program, entry, program.functions[entry]
        self.layouts = {}

    def check(self, plan, arch_number):
        """Refuse what the driver would refuse."""
        attributes, threads, cluster = self.function.attributes, plan.threads, plan.cluster
        required = attributes.get(".reqnctapercluster")
        if required and int(np.prod(required)) != cluster:
            raise InvalidLaunch(f"kernel requires clusters of {required}, launched with {cluster}")
        if not 0 < threads <= 1024:
            raise InvalidLaunch(f"block of {threads} threads")
        if ".maxntid" in attributes and threads > int(np.prod(attributes[".maxntid"])):
            raise InvalidLaunch(f"block of {threads} threads, kernel compiled for at most {attributes['.maxntid']}")
        if ".reqntid" in attributes and threads != int(np.prod(attributes[".reqntid"])):
            raise InvalidLaunch(f"block of {threads} threads, kernel requires {attributes['.reqntid']}")
        if not 0 < plan.blocks < 2**31 or not 1 <= cluster <= 16 or plan.blocks % cluster:
            raise InvalidLaunch(f"grid of {plan.blocks} blocks in clusters of {cluster}")
        if cluster > 1 and arch_number < 90:
            raise InvalidLaunch(f"cluster of {cluster} blocks on sm_{arch_number}")
        layout = self.layout(plan.shared_bytes)
        limit = SHARED_LIMIT.get(arch_number, min(SHARED_LIMIT.values()))
        if layout.shared_bytes > limit or layout.shared_size >= 1 << RANK_SHIFT:
            raise InvalidLaunch(f"{layout.shared_bytes} bytes of shared memory, sm_{arch_number} has {limit}")

    def layout(self, dynamic_bytes):
        if dynamic_bytes not in self.layouts:
            self.layouts[dynamic_bytes] = Layout(self.program, self.function, dynamic_bytes)
        return self.layouts[dynamic_bytes]

    def pack(self, words, layout):
        """The parameter bytes: an int or NumPy scalar of the parameter's own size each."""
        if len(words) != len(layout.parameters):
            raise InvalidLaunch(f"{self.entry[:60]} takes {len(layout.parameters)} parameters, got {len(words)}")
        data = bytearray(layout.parameter_bytes)
        for k, (word, (offset, size)) in enumerate(zip(words, layout.parameters, strict=True)):
            if isinstance(word, np.generic):
                raw = word.tobytes()
            elif isinstance(word, int):
                raw = (word & (2**64 - 1)).to_bytes(8, "little")
            else:
                raise InvalidLaunch(f"parameter {k}: {word!r:.60} is neither an int nor a NumPy scalar")
            if len(raw) != size:
                raise InvalidLaunch(f"parameter {k}: {word!r:.60} has {len(raw)} bytes, the kernel's has {size}")
            data[offset : offset + size] = raw
        return np.frombuffer(bytes(data) or b"\0", u8)

    def run(self, plan, memory, words, stats, options, foreign):
        """Execute a launch on a device's memory."""
        started = time.perf_counter()
        layout = self.layout(plan.shared_bytes)
        parameters = self.pack(words, layout)
        launch = Launch(self.program, memory, parameters, plan.blocks, stats, options, foreign)
        padded = -(-plan.threads // 32) * 32
        clusters = plan.blocks // plan.cluster
        batch = max(1, min(clusters, options.max_lanes // (padded * plan.cluster)))
        machine = self._machine(layout, plan, batch, options)
        order = np.arange(plan.blocks).reshape(clusters, plan.cluster)
        if launch.random is not None:
            order = launch.random.permutation(order)
        try:
            with np.errstate(all="ignore"):
                machine.begin(launch)
                for first in range(0, clusters, batch):
                    machine.start(order[first : first + batch].reshape(-1))
                    machine.run()
        finally:
            for allocation in launch.marked:
                allocation.written = None
            machine.launch = None
        stats.blocks, stats.steps, stats.shared_bytes = plan.blocks, machine.steps, layout.shared_bytes
        stats.keep_counts(machine.counts, self.program.code)
        self._check_error_code(memory)
        stats.seconds = time.perf_counter() - started

    def _machine(self, layout, plan, batch, options):
        """A machine for batches of at least so many clusters, new or used. Few sizes, so that it is mostly used."""
        shuffled = options.seed is not None
        lanes = -(-plan.threads // 32) * 32 * plan.cluster
        room = SMALL_MACHINE if batch * lanes <= SMALL_MACHINE else options.max_lanes
        block_count = max(batch, room // lanes) * plan.cluster
        key = (self.program, self.entry, plan.shared_bytes, plan.threads, plan.cluster, block_count)
        key += (options.check_race, shuffled)
        machines = Kernel.machines
        machine = machines.pop(key, None)
        if machine is None:
            machine = Machine(
                self.program,
                self.function,
                layout,
                plan.threads,
                plan.cluster,
                block_count,
                options.check_race,
                shuffled,
            )
        machines[key] = machine
        while len(machines) > 1 and sum(one.size() for one in machines.values()) > MACHINE_BYTES:
            # Its code, bound to it, is a cycle: gigabytes of registers would wait for the garbage collector.
            vars(machines.popitem(last=False)[1]).clear()
        return machine

    def _check_error_code(self, memory):
        """Numba in debug mode leaves the number of the kernel's exception in a variable."""
        for key, address in self.program.addresses.items():
            if key.endswith("__errcode__"):
                code = memory.find(address).data[:4].view(i32)[0]
                if code:
                    raise Trap(f"{self.entry[:60]} raised the Numba exception number {code}")


def load_variables(program, memory):
    """Make the .global and .const variables of a program on one device."""
    for variable in program.variables.values():
        if variable.key not in program.addresses or not variable.size:
            continue
        name = f"{variable.space} variable {variable.key[-60:]}"
        allocation = Allocation(name, memory.device, program.addresses[variable.key], variable.size)
        allocation.fill(READY)
        allocation.readonly = variable.space == "const"
        memory.add(allocation)
        if variable.init:
            raw = _initial_bytes(program, *variable.init)
            allocation.data[: len(raw)] = raw


def _initial_bytes(program, ptx_type, values):
    parts = []
    for value in values:
        if isinstance(value, tuple) and value[0] == "sym":
            if value[1] not in program.addresses:
                raise EmulatorError(f"initialiser with the address of {value[1]}")
            value = program.addresses[value[1]] + value[2]
        if isinstance(value, tuple):
            bits = np.array([value[1]], u32 if value[0] == "f" else u64)
            part = bits.view(f32 if value[0] == "f" else f64).astype(ptx_type.dtype) if ptx_type.is_float else bits
            parts.append(part.astype(ptx_type.dtype))
        elif isinstance(value, float) or ptx_type.kind == "f":
            parts.append(np.array([value], ptx_type.dtype))
        else:
            parts.append(np.array([value & ((1 << ptx_type.bits) - 1)], ptx_type.unsigned))
    return np.concatenate(parts).view(u8)
