"""Who holds which column.

A row is cut into pieces. A lane of the warp that has a piece sums runs of neighbouring columns, sixteen bytes each:
lane l the runs l, l + lanes, l + 2 lanes, ... of the piece, so that one access of a warp reads neighbouring runs. Which
lane sums which column depends on n_cols and the formats alone.
"""

from numpy import int32, int64

from gpusoftmax.kernels.cuda.device._cuda import cuda, device
from gpusoftmax.kernels.cuda.device.columns import rows_of_block
from gpusoftmax.kernels.cuda.device.memory import n_values, vector_bits
from gpusoftmax.kernels.cuda.device.rows import Piece, Team
from gpusoftmax.kernels.cuda.device.split import (
    is_columns,
    is_long,
    is_short,
    n_parts,
    own_part,
    quotient,
    remainder,
    shifted_down,
    shifted_up,
    split_chunks,
    split_cluster,
    split_first_slot,
    split_lanes,
    split_piece_bits,
    split_slots,
)
from gpusoftmax.kernels.cuda.device.staging import shared_start
from gpusoftmax.kernels.cuda.device.transform import VERY_MANY
from gpusoftmax.kernels.cuda.plan import GROUP, WARP_SIZE


@device
def own_row(start, split):
    """The row of this thread's team, of those from `start` on; past the last row for some teams of the last block."""
    if not is_long(split):
        return start + int64(cuda.blockIdx.x) * n_parts(split) + own_part(split)
    if split_cluster(split) == 1:
        return start + cuda.blockIdx.x
    return start + quotient(cuda.blockIdx.x, split_cluster(split))


@device
def team_of(split, n_sources):
    part = own_part(split)
    lane = int32(cuda.threadIdx.x - part * split_lanes(split))
    if is_short(split):
        return Team(lane, int32(0), int32(1), int32(1), int32(shared_start() + part * n_sources * split.slot_bytes))
    if is_columns(split):
        slots = int32(shared_start() + split_first_slot(split) + part * n_sources * split.slot_bytes)
        return Team(lane, int32(0), int32(1), int32(split_chunks(split) << split_piece_bits(split)), slots)
    warps = quotient(cuda.blockDim.x, int32(WARP_SIZE))
    rank = part
    if split_cluster(split) > 1:
        rank = int32(remainder(cuda.blockIdx.x, split_cluster(split)) * warps + part)
    size = int32(split_cluster(split) * warps)
    n_chunks = quotient(max(int32(split_chunks(split) - rank + size - 1), int32(0)), size)
    first_slot = shared_start() + split_first_slot(split)
    slots = int32(first_slot + part * split_slots(split) * n_sources * split.slot_bytes)
    return Team(lane, rank, size, int32(n_chunks << split_piece_bits(split)), slots)


@device
def part_of_block(part, lane, team, split):
    """The team as a lane of another part of this block sees it, where rows are long."""
    step = int32(part - own_part(split))
    rank = int32(team.rank + step)
    n_chunks = quotient(max(int32(split_chunks(split) - rank + team.size - 1), int32(0)), team.size)
    slots = int32(team.slots + step * split_slots(split) * split.slot_bytes)
    return Team(lane, rank, team.size, int32(n_chunks << split_piece_bits(split)), slots)


@device
def chunk_of(k, team, split):
    """The chunk of this part's piece number k: the chunks are dealt out in turn."""
    return int32(team.rank + team.size * shifted_down(k, split_piece_bits(split)))


@device
def piece_of(k, n_cols, team, split, like):
    """This part's piece number k. A chunk at the end of the row may have pieces without columns."""
    number = int32(0)
    if not is_short(split):
        pieces = shifted_up(int32(1), split_piece_bits(split))
        number = int32(shifted_up(chunk_of(k, team, split), split_piece_bits(split)) + (k & int32(pieces - 1)))
    return piece_of_row(number, n_cols, split, like)


@device
def behind(number, k, team, split):
    """The number in the row of this part's piece k + 1, from that of its piece k."""
    pieces = shifted_up(int32(1), split_piece_bits(split))
    others = int32(shifted_up(int32(team.size - 1), split_piece_bits(split)))  # pieces of the other parts
    return int32(number + 1 + (others if int32(k + 1) & int32(pieces - 1) == 0 else int32(0)))


@device
def piece_of_row(number, n_cols, split, like):
    cols = int32(split_lanes(split) * n_values(like))
    first = int64(number) * cols
    left = int32(min(n_cols - first, int64(VERY_MANY)))
    return Piece(first, max(min(left, cols), int32(0)), left)


@device
def slot_of(k, team, split, n_sources):
    if is_short(split):
        return team.slots
    turn = k if k < split_slots(split) else remainder(k, split_slots(split))
    return int32(team.slots + turn * rows_of_block(split) * n_sources * split.slot_bytes)


@device
def read_cols(piece, split, like):
    """Columns that the lanes read from a slot: whole groups, and of a long row always all."""
    if not is_long(split):
        group = int32(split_lanes(split) * GROUP)
        return int32((piece.count + group - 1) & -group)
    return int32(WARP_SIZE * n_values(like))


@device
def col_of(k, team, split, source):
    """Which column of a piece is number k of a lane."""
    bits = vector_bits(source.pointer)
    return ((k >> bits) * split_lanes(split) + team.lane << bits) + (k & (1 << bits) - 1)


@device
def has_columns(group, piece, split):
    """Whether this group of a lane's values may hold any column: the others need not be computed with."""
    return is_long(split) or int32(int32(group) * split_lanes(split)) < piece.count
