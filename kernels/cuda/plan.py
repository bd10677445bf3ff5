"""How a launch is laid out: a pure function of the row's shape and the device. No CUDA, no Numba."""

import functools
from dataclasses import dataclass

WARP_SIZE = 32
# Columns that a thread holds in registers at a time: 64 bytes of float32, four 16-byte accesses.
COLS_PER_THREAD = 16
# Eight warps of up to 128 registers (float32) leave room for two blocks on an SM, to cover each other's barriers.
MAX_THREADS = 256
# The launch limit of the grid's first axis; further rows are taken by a stride loop.
MAX_BLOCKS = 2**31 - 1


@dataclass(frozen=True)
class Plan:
    """One launch. chunk_cols decides the bits of a row and depends on n_cols alone; everything else may vary freely."""

    threads: int
    blocks: int
    chunk_cols: int
    shared_bytes: int = 0
    cluster: int = 1


@functools.lru_cache(maxsize=4096)
def row_plan(n_rows: int, n_cols: int) -> Plan:
    """One block per row. The smallest block that holds the row in one chunk, 256 threads for longer rows."""
    threads = WARP_SIZE
    while threads < MAX_THREADS and threads * COLS_PER_THREAD < n_cols:
        threads *= 2
    return Plan(threads=threads, blocks=min(n_rows, MAX_BLOCKS), chunk_cols=threads * COLS_PER_THREAD)


SINGLE_BLOCK = Plan(threads=MAX_THREADS, blocks=1, chunk_cols=MAX_THREADS * COLS_PER_THREAD)
"""For the small kernels around a loss: a sum over all rows in a fixed order."""
