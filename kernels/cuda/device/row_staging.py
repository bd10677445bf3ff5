"""When the pieces of a row get into shared memory.

A warp has `slots` slots. If it has more pieces than slots it goes around them: the first pass leaves the last pieces
there; the last pass begins with those and fetches the others again in reverse order, since what was read last is most
likely still in the second-level cache. All of this is a warp's own: it waits for no other until states are exchanged.
"""

from numpy import int32

from gpusoftmax.kernels.cuda.device._cuda import cuda, device
from gpusoftmax.kernels.cuda.device.columns import tell_sources
from gpusoftmax.kernels.cuda.device.piece_staging import (
    is_whole,
    stage,
    stage_granules,
    stage_lone_columns,
    stage_walked,
)
from gpusoftmax.kernels.cuda.device.pieces import behind, piece_of, piece_of_row, slot_of
from gpusoftmax.kernels.cuda.device.split import (
    is_columns,
    is_short,
    quotient,
    shifted_up,
    split_piece_bits,
    split_slots,
)
from gpusoftmax.kernels.cuda.device.staging import end_copies, wait_for_copies
from gpusoftmax.kernels.cuda.device.transform import fetch_masks


@device
def sync_slots(split):
    """A barrier of the threads that fill slots together."""
    if is_columns(split):
        cuda.syncthreads()
    else:
        cuda.syncwarp()


@device
def open_row(sources, n_cols, team, split, padding):
    """Starts to fill the slots with the first pieces of a row; `padding`, a number of the computation format, follows
    its last column.
    """
    n_staged = int32(1) if is_short(split) else int32(min(split_slots(split), team.n_pieces))
    if is_columns(split):
        tell_sources(sources, n_cols, team, split)
        for k in range(n_staged):
            stage_walked(int32(k), sources, team, split, padding)
        return
    # Each place is made from the one before: a warp does so for every thousand logits.
    number = int32(shifted_up(team.rank, split_piece_bits(split)))
    at, step = team.slots, int32(len(sources) * split.slot_bytes)
    all_whole = True
    k = int32(0)
    while k < n_staged:
        piece = piece_of_row(number, n_cols, split, padding)
        for i in range(len(sources)):
            stage_granules(sources[i], int32(at + i * split.slot_bytes), piece, n_cols, team, split, padding)
            fetch_masks(sources[i].through, piece.first, piece.count, team.lane)
            all_whole = all_whole and is_whole(sources[i], piece, n_cols, split, padding)
        end_copies()
        number, at, k = behind(number, k, team, split), int32(at + step), int32(k + 1)
    # Only now: what these wait for, the copies of all slots do not wait for. Most warps have none.
    k = n_staged if all_whole else int32(0)
    while k < n_staged:
        piece = piece_of(k, n_cols, team, split, padding)
        at = slot_of(k, team, split, len(sources))
        for i in range(len(sources)):
            stage_lone_columns(sources[i], int32(at + i * split.slot_bytes), piece, n_cols, team, split, padding)
        k = int32(k + 1)


@device
def fetch_last(sources, n_cols, team, split, padding):
    """Fills the slots for a last pass that no first one comes before: with the last pieces of a row."""
    n_staged = int32(1) if is_short(split) else int32(min(split_slots(split), team.n_pieces))
    if is_columns(split):
        tell_sources(sources, n_cols, team, split)
    for k in range(n_staged):
        stage(int32(team.n_pieces - 1 - k), sources, n_cols, team, split, padding)
    wait_for_copies(int32(0))
    sync_slots(split)  # every lane has waited for its own copies


@device
def wait_for_piece(k, team, split):
    """In the first pass: piece k is in its slot."""
    if is_short(split):
        wait_for_copies(int32(0))
    else:
        wait_for_copies(int32(min(int32(k + split_slots(split)), team.n_pieces) - 1 - k))
    sync_slots(split)  # every lane has waited for its own copies


@device
def stage_next(k, sources, n_cols, team, split, padding):
    """In the first pass: the slot of piece k, which is in registers, is filled again."""
    if not is_short(split) and int32(k + split_slots(split)) < team.n_pieces:
        sync_slots(split)  # every lane has read the slot
        stage(int32(k + split_slots(split)), sources, n_cols, team, split, padding)


@device
def wait_for_last(k, team, split):
    """In a pass from the last piece to the first: piece k is in its slot."""
    if not is_short(split) and int32(k + split_slots(split)) < team.n_pieces:
        wait_for_copies(min(int32(split_slots(split) - 1), k))
        sync_slots(split)  # every lane has waited for its own copies


@device
def stage_before(k, sources, n_cols, team, split, padding):
    """In a pass from the last piece to the first: the slot of piece k, which is done with, is filled again."""
    if not is_short(split) and k >= split_slots(split):
        sync_slots(split)  # every lane has read the slot
        stage(int32(k - split_slots(split)), sources, n_cols, team, split, padding)


@device
def last_in_slot(k, team, split):
    """The number of the piece that the first pass has left where piece k was."""
    slots = split_slots(split)
    return int32(k + quotient(int32(team.n_pieces - 1 - k), slots) * slots)


@device
def fetch_again(k, source, n_cols, team, split, padding):
    """After the first pass: piece k is in its slot. Not of rows side by side, which fill theirs together."""
    if last_in_slot(k, team, split) != k:
        replace_piece(k, source, n_cols, team, split, padding)


@device
def put_back(k, source, n_cols, team, split, padding):
    """The slot has again what the last pass expects there."""
    if last_in_slot(k, team, split) != k:
        replace_piece(last_in_slot(k, team, split), source, n_cols, team, split, padding)


@device
def replace_piece(k, source, n_cols, team, split, padding):
    cuda.syncwarp()  # every lane has read the slot
    stage(k, (source,), n_cols, team, split, padding)
    wait_for_copies(int32(0))
    cuda.syncwarp()  # every lane has waited for its own copies
