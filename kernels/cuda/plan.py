"""How a launch is laid out: a pure function of the rows, their formats and the device. No CUDA, no Numba.

A row is a tree: columns -> pieces (what the lanes of a warp hold in registers at a time) -> chunks (the pieces that one
warp merges in order; one, below a million columns) -> the row. `tree_of` decides it from n_cols and the computation
format alone, and with it the bits. `row_plan` decides who computes what, and may look at anything.

    short     a row is one piece: a warp or a part of one for each row, several rows in a block
    held      a block for each row, which stays in its shared memory: read once
    cluster   sm_90: a cluster of 2 to 16 blocks for each row, which stays in their shared memory
    online    what does not fit stays away: a first pass and a last one, that begins with what is still there
    columns   neighbouring rows lie side by side in memory (axis != -1): a block takes 4 to 64 of them, which its
              threads read and write together, sector by sector; its warps sum them up one by one. `held` tells whether
              the rows are read once
    single    one block, for numbers of all rows
    parts     a block for each 8192 rows, for the same; one more adds up what they have found
    warps     a warp for each row, where a row is a few numbers

The regimes walk one tree: a row has the same bits in each.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gpusoftmax.kernels.operands import STORAGE

WARP_SIZE = 32
GROUP = 8
"""So many of a lane's numbers are added in a balanced tree, and left out together where there are no columns."""
STATE_NUMBERS = 6
"""Numbers of a chunk that go through shared memory, in pairs: max and total, ties and rest of a second look and, for
smoothed losses, distance and weight.
"""
MAX_CHUNKS = 1024
"""Beyond, chunks have several pieces: the states of a row take 24 KiB of shared memory at most (float64: 48)."""
MAX_THREADS = 256
SECTOR_BYTES = 32
"""What a multiprocessor gets from memory at the least."""
REGISTERS = {"short": 64, "long 2": 80, "long 4": 96, "columns": 128}
"""Of a thread, at most, on sm_90: of kernels whose rows are split so, by the bytes of an element. A warp mostly waits,
for memory, barriers and shuffles; the fewer registers it has, the more of them there are: 32, 24 and 20 on a
multiprocessor (measured: kernels/README.md, 2026-11-26). float64 takes what it needs.
"""
MORE_REGISTERS = {64: (80, 128), 80: (96, 128), 96: (128,)}
"""What a kernel gets instead that would spill."""
MAY_SPILL = {64: 256}
"""Bytes of a thread that cost less than warps: a few numbers, where rows are short."""
ONE_PASS = {2: (128, 6), 4: (128, 5), 8: (256, 2)}
"""(threads of a block at most, blocks on a multiprocessor) where long rows are read once, by the bytes of an element
(float64: 8). Of several blocks, one loads while another computes.
"""
TWO_PASSES = {2: ((256, 3), (256, 2)), 4: ((128, 5), (128, 3), (256, 2)), 8: ((256, 2), (256, 1))}
"""The same where a row is read twice: the first for which the shared memory of a cluster holds the row."""
ONLINE = {2: (256, 3), 4: (256, 2), 8: (256, 1)}
"""The same where none does. The second time, most of the row comes from the second-level cache."""
N_BEST, N_CANDIDATES, MOST_LARGEST = 256, 256, 64
"""Of kernels that look for the largest logits of a long row: maxima of a few of a lane's columns that a block keeps (as
many as it has threads), logits that it takes into the choice, and how many are looked for in this way.
"""
LARGEST_SCRATCH = 2 * N_CANDIDATES + N_BEST + N_CANDIDATES // 2 + 4
"""Numbers in shared memory for that: candidates with their columns, maxima, where to look, and four more."""
LANE_CANDIDATES = 4
"""Of the same kernels, where rows are short: how many candidates a row has room for, for each lane that shares it."""
WARP_CHUNKS = 4
"""Of a row, what a warp takes at least where there are rows for all warps: what it pays for a row (addresses, the state
of the chunks, the logarithm) is as much as for two thousand logits.
"""
WAVES = 3
"""So often a launch fills the device at least where its rows can be shared: what the last blocks leave idle, and what
the first ones wait for, is a third of a block's time, and the blocks of a cluster wait for each other.
"""
MAX_BLOCKS = 2**31 - 1
"""The launch limit of the grid's first axis; further rows take further launches."""


class Limits(NamedTuple):
    """Of an architecture (CUDA programming guide, compute capabilities): shared memory of a block and of a
    multiprocessor in bytes, blocks of a cluster, threads and blocks of a multiprocessor.
    """

    block_bytes: int
    multiprocessor_bytes: int
    cluster: int
    threads: int
    blocks: int


LIMITS = {
    75: Limits(65536, 65536, 1, 1024, 16),
    80: Limits(166912, 167936, 1, 2048, 32),
    86: Limits(101376, 102400, 1, 1536, 16),
    89: Limits(101376, 102400, 1, 1536, 24),
    90: Limits(232448, 233472, 16, 2048, 32),
    100: Limits(232448, 233472, 16, 2048, 32),
    120: Limits(101376, 102400, 8, 1536, 24),
}
BLOCK_RESERVE = 1024
"""Shared memory that the system takes from each block."""


def limits_of(arch: str) -> Limits:
    """Those of the architecture, or of the newest one that is not newer."""
    number = int(arch.removeprefix("sm_").rstrip("af"))
    return LIMITS[max(known for known in LIMITS if known <= number)]


def blocks_per_multiprocessor(arch: str, threads: int, registers: int, shared_bytes: int) -> int:
    """How many blocks a multiprocessor runs at a time (CUDA programming guide, compute capabilities)."""
    limits = limits_of(arch)
    warps = threads // WARP_SIZE
    warp_registers = _ratio(registers * WARP_SIZE, 256) * 256  # allocated by the 256
    by_registers = 65536 // warp_registers // warps
    by_shared_memory = limits.multiprocessor_bytes // (shared_bytes + BLOCK_RESERVE)
    return min(by_registers, by_shared_memory, limits.threads // threads, limits.blocks)


# ---------------------------------------------------------------- what decides the bits


class Tree(NamedTuple):
    lanes: int  # of a warp, that share a piece
    piece_cols: int
    chunk_cols: int
    n_chunks: int


def values_per_lane(compute: str) -> int:
    """Columns of a piece that a lane holds: 32 registers in either format."""
    return 16 if compute == "float64" else 32


def run_of(itemsize: int) -> int:
    """Neighbouring columns that a lane holds: sixteen bytes."""
    return 16 // itemsize


@functools.lru_cache(maxsize=4096)
def tree_of(n_cols: int, compute: str) -> Tree:
    """How a row is cut, whatever the batch, the device and the place in memory."""
    values = values_per_lane(compute)
    for lanes in (4, 8, 16, 32):
        if n_cols <= lanes * values:
            return Tree(lanes, lanes * values, lanes * values, 1)
    piece_cols = WARP_SIZE * values
    chunk_cols = piece_cols
    while _ratio(n_cols, chunk_cols) > MAX_CHUNKS:
        chunk_cols *= 2
    return Tree(WARP_SIZE, piece_cols, chunk_cols, _ratio(n_cols, chunk_cols))


# ---------------------------------------------------------------- who computes what


class Short(NamedTuple):
    """A kernel's view of a plan: rows of one piece."""

    lanes: int
    lane_bits: int  # log2 of the lanes
    slot_bytes: int


class Long(NamedTuple):
    """A kernel's view of a plan: rows of several chunks."""

    n_chunks: int
    piece_bits: int  # log2 of the pieces of a chunk
    cluster: int
    slots: int
    slot_bytes: int
    first_slot: int


class Columns(NamedTuple):
    """A kernel's view of a plan: rows that lie side by side in memory."""

    lanes: int
    lane_bits: int  # log2 of the lanes
    row_bits: int  # log2 of the rows of a block
    n_chunks: int
    piece_bits: int
    slots: int
    slot_bytes: int
    first_slot: int


ENTRY_BYTES = 13 * 8
"""What a row of Columns tells its block: how many columns, three addresses, at most nine numbers of its results."""


def columns_threads(itemsize: int, compute: str) -> int:
    """The most threads of a block of Columns: a sector of sixteen-bit numbers is that of sixteen rows, and a row may
    take a warp. float64 has no registers for so many.
    """
    return 2 * MAX_THREADS if itemsize == 2 and compute == "float32" else MAX_THREADS


@dataclass(frozen=True)
class Plan:
    """One launch, of `rows` rows. chunk_cols decides the bits of a row and depends on n_cols and the format alone;
    everything else may vary freely. `held`: every element is read from global memory once.
    """

    regime: str
    threads: int
    blocks: int
    chunk_cols: int
    rows: int = 0
    shared_bytes: int = 0
    cluster: int = 1
    held: bool = True
    split: Short | Long | Columns | None = None

    @property
    def kept_bytes(self) -> int:
        """Of its row, what a block keeps in shared memory between a first and a second pass."""
        if not isinstance(self.split, Long):
            return 0
        n_slots = (self.shared_bytes - self.split.first_slot) // self.split.slot_bytes
        return n_slots * (self.split.slot_bytes - BESIDE_BYTES)


OF_A_BATCH = ("single", "parts")
"""The regimes of kernels that find a number of all rows."""
BESIDE_BYTES = 16
"""Of a slot, for rows that begin beside a boundary: a granule more than their columns take."""
PART_ROWS = 8192
"""Rows that one block sums up where a number is wanted of a whole batch: 32 for each of its threads."""
SINGLE_BLOCK = Plan(regime="single", threads=MAX_THREADS, blocks=1, chunk_cols=0)
"""For the small kernels around a loss: a sum over all rows in a fixed order."""


def parts_plan(n_rows: int) -> Plan:
    """A block for each PART_ROWS rows, for a number of all of them."""
    return Plan(regime="parts", threads=MAX_THREADS, blocks=n_parts(n_rows), chunk_cols=0)


def n_parts(n_rows: int) -> int:
    return max(_ratio(n_rows, PART_ROWS), 1)


def warps_plan(n_rows: int) -> Plan:
    """A warp for each row: of kernels that read a few numbers of it."""
    return Plan(regime="warps", threads=MAX_THREADS, blocks=_ratio(n_rows, MAX_THREADS // WARP_SIZE), chunk_cols=0)


@functools.lru_cache(maxsize=4096)
def row_plan(
    n_rows: int,
    n_cols: int,
    formats: tuple[str, ...],
    compute: str,
    arch: str,
    multiprocessors: int,
    passes: int = 2,
    neighbours: int = 1,
    scratch: int = 0,
    largest_cluster: int = 16,
) -> Plan:
    """The launch of a kernel that reads rows.

    Parameters
    ----------
    n_rows, n_cols : int
        The rows.
    formats : tuple of str
        Of the arrays whose rows are read: one or two, of the same size.
    compute : str
        "float32" or "float64".
    arch, multiprocessors : str, int
        Of the device.
    passes : int
        1: the rows are only summed up; 2: results are computed from the columns after that.
    neighbours : int
        How many rows lie side by side in memory, in each array whose rows are read or written.
    scratch : int
        So many numbers a kernel keeps in shared memory behind the states of a row of several chunks; if any, then for
        each lane of shorter rows LANE_CANDIDATES with their columns.
    largest_cluster : int
        So many blocks of a cluster the device has room for, where it may be fewer than its architecture has.
    """
    tree, limits = tree_of(n_cols, compute), limits_of(arch)
    limits = limits._replace(cluster=min(limits.cluster, largest_cluster))
    itemsize = np.dtype(STORAGE[formats[0]]).itemsize
    # Lanes read whole groups.
    slot_bytes = _ratio(min(n_cols, tree.piece_cols), tree.lanes * GROUP) * tree.lanes * GROUP * itemsize + BESIDE_BYTES
    if neighbours * itemsize >= SECTOR_BYTES:
        plan = _columns(n_rows, tree, itemsize, slot_bytes, len(formats), compute, limits, multiprocessors, passes)
        if plan is not None:
            return plan
    if tree.n_chunks == 1:
        return _short(n_rows, tree, slot_bytes, len(formats), compute, limits, multiprocessors, scratch)
    return _long(n_rows, tree, itemsize, slot_bytes, len(formats), compute, limits, multiprocessors, passes, scratch)


def _short(n_rows, tree, slot_bytes, n_sources, compute, limits, multiprocessors, scratch):
    threads = MAX_THREADS
    numbers = STATE_NUMBERS + (2 * LANE_CANDIDATES * tree.lanes if scratch else 0)
    part_bytes = n_sources * slot_bytes + numbers * _number_bytes(compute)

    def too_large():
        parts = threads // tree.lanes
        few = _ratio(n_rows, parts) < multiprocessors  # rather one row on each multiprocessor
        return few or parts * part_bytes > limits.block_bytes

    while threads > WARP_SIZE and too_large():
        threads //= 2
    parts = threads // tree.lanes
    return Plan(
        regime="short",
        threads=threads,
        blocks=min(_ratio(n_rows, parts), MAX_BLOCKS),
        chunk_cols=tree.chunk_cols,
        rows=min(n_rows, MAX_BLOCKS * parts),
        shared_bytes=_rounded(parts * part_bytes),
        split=Short(tree.lanes, tree.lanes.bit_length() - 1, slot_bytes),
    )


def _long(n_rows, tree, itemsize, slot_bytes, n_sources, compute, limits, multiprocessors, passes, scratch):
    pieces = tree.chunk_cols // tree.piece_cols
    # One for the row.
    first_slot = _rounded(((tree.n_chunks + 1) * STATE_NUMBERS + scratch) * _number_bytes(compute))
    slot_bytes_of_all = n_sources * slot_bytes
    clusters = [size for size in (1, 2, 4, 8, 16) if size <= limits.cluster and size <= tree.n_chunks]

    def most_warps(threads):
        return min(threads // WARP_SIZE, (limits.block_bytes - first_slot) // slot_bytes_of_all)

    def least_chunks(threads, blocks):
        """Of a warp."""
        least = min(max(WARP_CHUNKS // (n_sources * pieces), 1), tree.n_chunks)
        if n_rows * _ratio(tree.n_chunks, least) < multiprocessors * blocks * threads // WARP_SIZE:
            return 1  # warps would go without
        return least

    def turns(cluster, way):
        """Chunks of the busiest warp; as few warps as that takes are used."""
        most = min(most_warps(way[0]), _ratio(tree.n_chunks, cluster * least_chunks(*way)))
        return _ratio(tree.n_chunks, cluster * most)

    def warps(cluster, way):
        return _ratio(tree.n_chunks, cluster * turns(cluster, way))

    def bytes_of(cluster, way, slots):
        return first_slot + warps(cluster, way) * slots * slot_bytes_of_all

    def room(blocks):
        """Shared memory of each block."""
        return min(limits.multiprocessor_bytes // blocks - BLOCK_RESERVE, limits.block_bytes)

    def fitting_slots(cluster, way, blocks, first_slot):
        return max((room(blocks) - first_slot) // (warps(cluster, way) * slot_bytes_of_all), 1)

    def holds(cluster, way):
        return passes == 1 or bytes_of(cluster, way, turns(cluster, way) * pieces) <= room(way[1])

    size = 8 if compute == "float64" else itemsize
    ways = TWO_PASSES[size] if passes == 2 else (ONE_PASS[size],)
    if n_rows <= multiprocessors:  # whose blocks would have the multiprocessors for themselves
        ways = ((MAX_THREADS, 2),)
    found = ((cluster, way) for way in ways for cluster in clusters if holds(cluster, way))
    cluster, way = next(found, (clusters[-1], ONLINE[size]))
    # Few rows: more blocks for each, down to two chunks for each warp.
    while cluster * 2 in clusters and n_rows * cluster * 2 <= multiprocessors and turns(cluster, way) > 2:
        cluster *= 2
    # Blocks that have work for all their warps.
    most = tree.n_chunks // (most_warps(way[0]) * max(least_chunks(*way), 2))
    while cluster * 2 in clusters and cluster * 2 <= most and n_rows * cluster < WAVES * way[1] * multiprocessors:
        cluster *= 2
    needed = turns(cluster, way) * pieces
    slots = min(needed, fitting_slots(cluster, way, way[1], first_slot))
    blocks, without = way[1], first_slot - scratch * _number_bytes(compute)
    while blocks > 1 and slots < min(needed, fitting_slots(cluster, way, way[1], without)):
        blocks -= 1  # rather a block less than a slot less
        slots = min(needed, fitting_slots(cluster, way, blocks, first_slot))
    held = passes == 1 or slots >= needed
    return Plan(
        regime="online" if not held else "cluster" if cluster > 1 else "held",
        threads=warps(cluster, way) * WARP_SIZE,
        blocks=min(n_rows, MAX_BLOCKS // cluster) * cluster,
        chunk_cols=tree.chunk_cols,
        rows=min(n_rows, MAX_BLOCKS // cluster),
        shared_bytes=bytes_of(cluster, way, slots),
        cluster=cluster,
        held=held,
        split=Long(tree.n_chunks, pieces.bit_length() - 1, cluster, slots, slot_bytes, first_slot),
    )


def _columns(n_rows, tree, itemsize, slot_bytes, n_sources, compute, limits, multiprocessors, passes):
    """None if it would not pay, or if the states of the chunks do not fit."""
    pieces = tree.n_chunks * (tree.chunk_cols // tree.piece_cols)
    number_bytes = _number_bytes(compute)
    states = tree.n_chunks * STATE_NUMBERS * number_bytes if tree.n_chunks > 1 else 0
    wanted = pieces if passes == 2 else min(pieces, 2)
    shared = limits.multiprocessor_bytes // 2 - BLOCK_RESERVE  # one block loads while the other computes

    def first_slot(rows):
        return _rounded(rows * (ENTRY_BYTES + states))

    def bytes_of(rows, slots):
        return first_slot(rows) + slots * rows * n_sources * slot_bytes

    def fits(rows):
        """So many rows are held by each of two blocks on a multiprocessor, and every multiprocessor has a block."""
        return bytes_of(rows, wanted) <= shared and _ratio(n_rows, rows) >= multiprocessors

    # As many rows as fit: where they do not begin at a sector, fewer sectors are shared with another block.
    most = columns_threads(itemsize, compute) // tree.lanes
    least = min(max(SECTOR_BYTES // itemsize, WARP_SIZE // tree.lanes), most)
    sizes = [rows for rows in (64, 32, 16, 8, 4) if least <= rows <= most]
    rows = next(filter(fits, sizes), sizes[-1])
    blocks = _ratio(n_rows, rows)
    # Column by column, a warp for each row uses one element of a sector: that much fewer multiprocessors are enough.
    if tree.n_chunks > 1 and blocks * (SECTOR_BYTES // itemsize) < multiprocessors:
        return None
    held = bytes_of(rows, wanted) <= limits.block_bytes
    room = limits.block_bytes if held or bytes_of(rows, 1) > shared else shared
    slots = min(wanted, (room - first_slot(rows)) // (rows * n_sources * slot_bytes))
    if slots < 1:
        return None
    return Plan(
        regime="columns",
        threads=rows * tree.lanes,
        blocks=min(blocks, MAX_BLOCKS),
        chunk_cols=tree.chunk_cols,
        rows=min(n_rows, MAX_BLOCKS * rows),
        shared_bytes=bytes_of(rows, slots),
        held=passes == 1 or slots >= wanted,
        split=Columns(
            lanes=tree.lanes,
            lane_bits=tree.lanes.bit_length() - 1,
            row_bits=rows.bit_length() - 1,
            n_chunks=tree.n_chunks,
            piece_bits=(pieces // tree.n_chunks).bit_length() - 1,
            slots=slots,
            slot_bytes=slot_bytes,
            first_slot=first_slot(rows),
        ),
    )


def _number_bytes(compute: str) -> int:
    return 8 if compute == "float64" else 4


def _ratio(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def _rounded(size: int) -> int:
    """The size in bytes, up to the next 16-byte boundary."""
    return _ratio(size, 16) * 16
