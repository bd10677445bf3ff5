"""How long a kernel should take on an H200: a model on paper. Nothing here was measured on a GPU.

A multiprocessor has, each clock (CUDA programming guide, throughput of native arithmetic instructions, 9.0):

    issue     4 warp instructions, one for each of its schedulers; one warp, waiting for its own results, about 1/2
    integer   64 lanes of integer, comparison, selection and logic
    double    64 lanes of float64
    special   16 lanes of ex2, rcp, lg2
    shared    128 bytes of shared memory: a warp's access of up to 4 bytes a lane, or a shuffle, takes one clock
    memory    64 bytes from the second-level cache; all of them together what a copy was measured to move

Memory and the busiest of the others work at the same time, if there are other blocks to work on: the time is the longer
of the two, plus of the shorter one the part of one wave (the blocks that run at a time), which has nothing to hide
behind. A kernel of a single wave therefore takes the sum. Starting a kernel and waiting for the first bytes come on
top.

Assumed and not known: the clock; that schedulers are busy all the time, that shared memory has no bank conflicts, and
that clusters can be placed anywhere, all of which makes the prediction too fast; that nothing that is read twice is
found in the second-level cache, which makes it too slow.
"""

from collections import Counter
from typing import NamedTuple

from gpusoftmax import _dry_run

H200 = _dry_run.DEVICES["sm_90"]
MULTIPROCESSORS, COPY_BYTES_PER_SECOND = H200.multiprocessors, H200.bytes_per_second
CLOCK = 1.98e9
START_SECONDS = 3e-6
LATENCY_SECONDS = 0.8e-6
_LEAST_CLOCKS_OF_A_WARP = 2
_SLOTS = 4
_BYTES_A_CLOCK = 64
_INTEGER = (
    *("IADD3", "VIADD", "LEA", "LOP3", "PLOP3", "SHF", "PRMT", "FLO", "POPC", "MOV", "P2R", "VOTE", "F2FP"),
    *("ISETP", "SEL", "VIMNMX", "FSETP", "FSET", "FSEL", "FMNMX", "HSET2", "HMNMX2", "VHMNMX"),
)
_DOUBLE = ("DADD", "DMUL", "DFMA", "DSETP")
_SHARED = ("LDS", "STS", "LDGSTS", "SHFL")


class Layout(NamedTuple):
    """How a kernel is launched."""

    blocks: int
    cluster: int
    warps: int  # of a block
    blocks_per_multiprocessor: int


class Prediction(NamedTuple):
    """`parts` holds the seconds that each part would take alone; `bound` names the longest."""

    seconds: float
    bound: str
    parts: dict[str, float]


def clocks_of(instructions: Counter) -> dict[str, float]:
    """The clocks for which warp instructions, counted by opcode, occupy each unit of one multiprocessor."""
    clocks = dict.fromkeys(("integer", "double", "special", "shared"), 0.0)
    for opcode, count in instructions.items():
        name = opcode.partition(".")[0]
        if name in _INTEGER:
            clocks["integer"] += count / 2
        elif name in _DOUBLE:
            clocks["double"] += count / 2
        elif name == "MUFU":
            clocks["special"] += 2 * count
        elif name in _SHARED:
            clocks["shared"] += count * (4 if ".128" in opcode else 2 if ".64" in opcode else 1)
    return {"issue": instructions.total() / _SLOTS, **clocks}


def predict(layout: Layout, instructions: Counter, n_bytes: float) -> Prediction:
    """A launch whose blocks together issue these instructions and move these bytes."""
    at_a_time = max(MULTIPROCESSORS * layout.blocks_per_multiprocessor // layout.cluster, 1) * layout.cluster
    full, rest = divmod(layout.blocks, at_a_time)
    waves = [(at_a_time, full), (rest, int(rest > 0))]
    per_block = {unit: clocks / layout.blocks for unit, clocks in clocks_of(instructions).items()}
    parts = dict.fromkeys(("memory", *per_block), 0.0)
    for blocks, times in waves:
        if times:
            busy = min(blocks, MULTIPROCESSORS)
            each = -(-blocks // MULTIPROCESSORS)  # blocks of the busiest multiprocessor
            bandwidth = min(COPY_BYTES_PER_SECOND, busy * _BYTES_A_CLOCK * CLOCK)
            parts["memory"] += times * blocks * n_bytes / layout.blocks / bandwidth
            slowdown = max(1.0, _SLOTS * _LEAST_CLOCKS_OF_A_WARP / (each * layout.warps))
            for unit, clocks in per_block.items():
                parts[unit] += times * each * clocks * (slowdown if unit == "issue" else 1) / CLOCK
    n_waves = full + (rest > 0)
    on_chip = max(seconds for unit, seconds in parts.items() if unit != "memory")
    longer, shorter = max(parts["memory"], on_chip), min(parts["memory"], on_chip)
    seconds = START_SECONDS + LATENCY_SECONDS + longer + shorter / n_waves
    bound = max(parts, key=parts.get) if longer > START_SECONDS + LATENCY_SECONDS else "latency"
    return Prediction(seconds, bound, parts)
