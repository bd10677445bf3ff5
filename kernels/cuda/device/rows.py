"""Who holds which column, and how a row gets into shared memory and out of it.

A row is cut into pieces. Lane l of the warp that has a piece sums its columns l, l + lanes, l + 2 lanes, ...: lanes
side by side read elements of shared memory side by side, and which lane sums which column depends on n_cols alone.

Global memory is accessed by granules, sixteen aligned bytes, wherever the row begins:

    global     | . . a b | c d e f | g h i j | k . . . |        a ... k: a piece of float32 at some address
    slot       | . . a b | c d e f | g h i j | k . . . |        the same granules, at the same distance from a boundary

A granule inside the row is copied whole; at the ends of the row elements are copied one by one, so that no byte beside
it is touched. Results leave the same way, by granules of the output's own alignment. Rows whose columns are not
neighbours are copied element by element into the same slots: a row has the same bits wherever it lies. Where rows lie
side by side in memory instead, columns.py has another way to fill the slots and to empty them.

A warp has `slots` slots. If it has more pieces than slots it goes around them: the first pass leaves the last pieces
there; the last pass begins with those and fetches the others again in reverse order, since what was read last is most
likely still in the second-level cache. All of this is a warp's own: it waits for no other until states are exchanged.
"""

from typing import NamedTuple

from numpy import int32, int64

from gpusoftmax.kernels.cuda.device._cuda import cuda, device
from gpusoftmax.kernels.cuda.device.columns import (
    columns_writer,
    copy_piece,
    lane_of,
    n_columns,
    own_place,
    row_in_block,
)
from gpusoftmax.kernels.cuda.device.memory import (
    VECTOR_BYTES,
    advance,
    element_size,
    granule_numbers,
    misalignment,
    n_values,
    store,
    store_vector,
    vector_bits,
    vector_width,
)
from gpusoftmax.kernels.cuda.device.split import (
    is_columns,
    is_short,
    split_chunks,
    split_cluster,
    split_first_slot,
    split_lanes,
    split_piece_bits,
    split_row_bits,
    split_slots,
)
from gpusoftmax.kernels.cuda.device.staging import (
    cluster_arrive,
    cluster_wait,
    copy_element,
    copy_vector,
    end_copies,
    staged,
    staged_columns,
    staged_vector,
    wait_for_copies,
)
from gpusoftmax.kernels.cuda.plan import WARP_SIZE


class Strided(NamedTuple):
    """An Operand as a kernel gets it. The pointer's type names the storage format."""

    pointer: object
    outer_stride: int
    inner_stride: int
    col_stride: int


class Row(NamedTuple):
    """One row of an array: column c lies at pointer[c * stride]. `shift` elements lie between the last 16-byte boundary
    and column 0; it is 0, and there are no granules, if the columns are not neighbours.
    """

    pointer: object
    stride: int
    shift: int


class Piece(NamedTuple):
    """The columns [first, first + count) of a row."""

    first: int
    count: int


class Team(NamedTuple):
    """The threads that share a row, as one of them sees it: it is lane `lane` of part `rank` of `size` parts. A part is
    a warp, or a few lanes of one where the row is short, and has `n_pieces` pieces of the row. Where rows lie side by
    side, a part is a block, and `lane` the worker's number.
    """

    lane: int
    rank: int
    size: int
    n_pieces: int
    slots: int  # where the slots of this part begin


@device
def row_offset(array, row, rows):
    """Where a row starts, in elements. `array` has the strides of an Operand or of Labels."""
    if rows.n_inner >= rows.n_rows:  # one batch axis, the usual case: spares a division of some hundred instructions
        return row * array.inner_stride
    outer = row // rows.n_inner
    return outer * array.outer_stride + (row - outer * rows.n_inner) * array.inner_stride


@device
def row_of(array, row, rows):
    pointer = advance(array.pointer, row_offset(array, row, rows))
    return Row(pointer, array.col_stride, int32(misalignment(pointer) if array.col_stride == 1 else 0))


# ---------------------------------------------------------------- who


@device
def own_row(start, split):
    """The row of this thread's team, of those from `start` on; past the last row for some teams of the last block."""
    if is_columns(split):
        return start + (int64(cuda.blockIdx.x) << split_row_bits(split)) + row_in_block(split)
    if is_short(split):
        part = cuda.threadIdx.x // split_lanes(split)
        return start + cuda.blockIdx.x * (cuda.blockDim.x // split_lanes(split)) + part
    return start + cuda.blockIdx.x // split_cluster(split)


@device
def team_of(split, n_sources):
    if is_columns(split):
        worker = int32(int32(cuda.threadIdx.x) >> split_row_bits(split))
        n_pieces = int32(split_chunks(split) << split_piece_bits(split))
        return Team(worker, int32(0), int32(1), n_pieces, int32(split_first_slot(split)))
    part = int32(cuda.threadIdx.x // split_lanes(split))
    lane = int32(cuda.threadIdx.x - part * split_lanes(split))
    if is_short(split):
        return Team(lane, int32(0), int32(1), int32(1), int32(part * n_sources * split.slot_bytes))
    warps = int32(cuda.blockDim.x // WARP_SIZE)
    rank = int32(cuda.blockIdx.x % split_cluster(split) * warps + part)
    size = int32(split_cluster(split) * warps)
    n_chunks = int32(max(int32(split_chunks(split) - rank + size - 1), 0)) // size
    slots = int32(split_first_slot(split) + part * split_slots(split) * n_sources * split.slot_bytes)
    return Team(lane, rank, size, int32(n_chunks << split_piece_bits(split)), slots)


@device
def chunk_of(k, team, split):
    """The chunk of this part's piece number k: the chunks are dealt out in turn."""
    return int32(team.rank + team.size * (k >> split_piece_bits(split)))


@device
def piece_of(k, n_cols, team, split, like):
    """This part's piece number k. A chunk at the end of the row may have pieces without columns."""
    cols = split_lanes(split) * n_values(like)
    if is_short(split):
        return Piece(int64(0), int32(n_cols))
    within = k & ((1 << split_piece_bits(split)) - 1)
    first = ((int64(chunk_of(k, team, split)) << split_piece_bits(split)) + within) * cols
    return Piece(first, int32(max(min(n_cols - first, cols), 0)))


@device
def slot_of(k, team, split, n_sources):
    if is_short(split):
        return team.slots
    turn = k if k < split_slots(split) else k % split_slots(split)
    return int32(team.slots + turn * n_sources * split.slot_bytes)


# ---------------------------------------------------------------- global memory -> slot


@device
def n_granules(shift, piece, bits):
    """How many granules of 2^bits columns hold the columns of a piece."""
    return int32((shift + piece.count + (1 << bits) - 1) >> bits)


@device
def lone_columns(shift, piece, low, high, bits):
    """Which columns of the piece belong to granules of 2^bits columns that do not lie inside the columns [low, high):
    the first `head` of them, and those from `tail` on.
    """
    width = 1 << bits
    head = int32(min(width - shift, piece.count) if piece.first - shift < low else 0)
    last = int32((((shift + piece.count - 1) >> bits) << bits) - shift)
    tail = int32(max(last, head) if piece.first + last + width > high else piece.count)
    return head, tail


@device
def stage_granules(source, at, piece, n_cols, team, split, like):
    """Starts the copies of the granules that hold columns of the piece and lie inside the row."""
    if is_columns(split):
        copy_piece(source, at, piece, team, split, like)
    elif source.stride == 1:
        bits = vector_bits(source.pointer)
        for granule in range(team.lane, n_granules(source.shift, piece, bits), split_lanes(split)):
            col = piece.first - source.shift + (granule << bits)
            if col >= 0 and col + (1 << bits) <= n_cols:
                copy_vector(source.pointer, col, at + granule * VECTOR_BYTES)


@device
def stage_lone_columns(source, at, piece, n_cols, team, split):
    """Copies the columns that stage_granules leaves. These loads are waited for; those are not."""
    if is_columns(split):
        return
    head, tail = piece.count, piece.count
    if source.stride == 1:
        head, tail = lone_columns(source.shift, piece, 0, n_cols, vector_bits(source.pointer))
    size = element_size(source.pointer)
    for k in range(team.lane, int32(head + piece.count - tail), split_lanes(split)):
        col = int32(k if k < head else k - head + tail)
        copy_element(source.pointer, (piece.first + col) * source.stride, at + (source.shift + col) * size)


@device
def stage(k, sources, n_cols, team, split, like):
    piece = piece_of(k, n_cols, team, split, like)
    at = slot_of(k, team, split, len(sources))
    for i in range(len(sources)):
        stage_granules(sources[i], at + i * split.slot_bytes, piece, n_cols, team, split, like)
    end_copies()
    for i in range(len(sources)):
        stage_lone_columns(sources[i], at + i * split.slot_bytes, piece, n_cols, team, split)


@device
def open_row(sources, n_cols, team, split, like):
    """Starts to fill the slots with the first pieces of a row."""
    n_staged = int32(1) if is_short(split) else int32(min(split_slots(split), team.n_pieces))
    for k in range(n_staged):
        piece = piece_of(k, n_cols, team, split, like)
        at = slot_of(k, team, split, len(sources))
        for i in range(len(sources)):
            stage_granules(sources[i], at + i * split.slot_bytes, piece, n_cols, team, split, like)
        end_copies()
    for k in range(n_staged):  # only now: what these wait for, the copies of all slots do not wait for
        piece = piece_of(k, n_cols, team, split, like)
        at = slot_of(k, team, split, len(sources))
        for i in range(len(sources)):
            stage_lone_columns(sources[i], at + i * split.slot_bytes, piece, n_cols, team, split)


@device
def fetch_last(sources, n_cols, team, split, like):
    """Fills the slots for a last pass that no first one comes before: with the last pieces of a row."""
    n_staged = int32(1) if is_short(split) else int32(min(split_slots(split), team.n_pieces))
    for k in range(n_staged):
        stage(int32(team.n_pieces - 1 - k), sources, n_cols, team, split, like)
    wait_for_copies(0)
    cuda.syncwarp()  # every lane has waited for its own copies


@device
def wait_for_piece(k, team, split):
    """In the first pass: piece k is in its slot."""
    if is_short(split):
        wait_for_copies(0)
    else:
        wait_for_copies(min(k + split_slots(split), team.n_pieces) - 1 - k)
    cuda.syncwarp()  # every lane has waited for its own copies


@device
def stage_next(k, sources, n_cols, team, split, like):
    """In the first pass: the slot of piece k, which is in registers, is filled again."""
    if not is_short(split) and k + split_slots(split) < team.n_pieces:
        cuda.syncwarp()  # every lane has read the slot
        stage(int32(k + split_slots(split)), sources, n_cols, team, split, like)


# ---------------------------------------------------------------- slot -> registers


@device
def read_piece(held, source, at, piece, turn, team, split, padding):
    """held = this lane's columns of the piece in the slot `at`; `padding` beyond its end."""
    if is_columns(split):
        count = WARP_SIZE * n_columns(lane_of(turn, team, split), piece, split)
        staged_columns(source.pointer, own_place(source, at, turn, split), count, 32, padding, held)
        return
    place = at + (source.shift + team.lane) * element_size(source.pointer)
    count = piece.count - team.lane
    # The distance of a lane's columns is a constant in each branch: one address serves them all.
    if split_lanes(split) == 32:
        staged_columns(source.pointer, place, count, 32, padding, held)
    elif split_lanes(split) == 16:
        staged_columns(source.pointer, place, count, 16, padding, held)
    elif split_lanes(split) == 8:
        staged_columns(source.pointer, place, count, 8, padding, held)
    else:
        staged_columns(source.pointer, place, count, 4, padding, held)


@device
def has_columns(group, piece, split):
    """Whether this group of a lane's values may hold any column: the others need not be computed with."""
    return group * split_lanes(split) < piece.count


@device
def read_granule(values, source, at, col, width):
    """values[:width] = the columns col, col + 1, ... of the piece in the slot `at`."""
    size = element_size(source.pointer)
    place = at + (source.shift + col) * size
    if width == vector_width(source.pointer) and place % VECTOR_BYTES == 0:
        staged_vector(source.pointer, place, values)
    else:
        for k in range(width):
            values[k] = staged(source.pointer, place + k * size, values[k])


# ---------------------------------------------------------------- slot -> results -> global memory


def row_writer(results):
    """A device function that writes a row.

    results(values, others, col, width, numbers) turns values[:width], the columns col, col + 1, ... of the first
    source, into results; `others` holds the same columns of the second, if there is one.
    """

    write_columns = columns_writer(results)

    @device
    def write_piece(target, sources, at, piece, team, split, numbers, like):
        if is_columns(split):
            write_columns(target, sources, at, piece, team, split, numbers, like)
            return
        values, others = granule_numbers(like), granule_numbers(like)
        head, tail = piece.count, piece.count
        if target.stride == 1:
            bits = vector_bits(target.pointer)
            width = 1 << bits
            head, tail = lone_columns(target.shift, piece, piece.first, piece.first + piece.count, bits)
            for granule in range(team.lane, n_granules(target.shift, piece, bits), split_lanes(split)):
                col = int32((granule << bits) - target.shift)
                if col >= 0 and col + width <= piece.count:
                    read_granule(values, sources[0], at, col, width)
                    if len(sources) == 2:
                        read_granule(others, sources[1], at + split.slot_bytes, col, width)
                    results(values, others, piece.first + col, width, numbers)
                    store_vector(target.pointer, piece.first + col, values)
        for k in range(team.lane, int32(head + piece.count - tail), split_lanes(split)):
            col = int32(k if k < head else k - head + tail)
            read_granule(values, sources[0], at, col, 1)
            if len(sources) == 2:
                read_granule(others, sources[1], at + split.slot_bytes, col, 1)
            results(values, others, piece.first + col, 1, numbers)
            store(target.pointer, (piece.first + col) * target.stride, values[0])

    @device
    def write_row(target, sources, n_cols, team, split, numbers, like):
        """The last pass, from the last piece to the first: the last ones are in their slots."""
        if is_short(split):
            piece = piece_of(0, n_cols, team, split, like)
            write_piece(target, sources, team.slots, piece, team, split, numbers, like)
            return
        for back in range(team.n_pieces):
            k = int32(team.n_pieces - 1 - back)
            if k + split_slots(split) < team.n_pieces:
                wait_for_copies(min(split_slots(split) - 1, k))
                cuda.syncwarp()  # every lane has waited for its own copies
            piece = piece_of(k, n_cols, team, split, like)
            at = slot_of(k, team, split, len(sources))
            write_piece(target, sources, at, piece, team, split, numbers, like)
            if k >= split_slots(split):
                cuda.syncwarp()  # every lane has read the slot
                stage(int32(k - split_slots(split)), sources, n_cols, team, split, like)

    return write_row


# ---------------------------------------------------------------- the blocks of a row


@device
def announce(split):
    """The first half of `meet`: a block tells the others of its cluster that it has started."""
    if split_cluster(split) > 1:
        cluster_arrive()


@device
def meet(split):
    """All blocks of the cluster have started: their shared memory may be written to."""
    if split_cluster(split) > 1:
        cluster_wait()


@device
def exchange_states(split):
    """The states of all chunks of the row are in the shared memory of each block before any warp reads them."""
    if split_cluster(split) > 1:
        cluster_arrive()
        cluster_wait()
    else:
        cuda.syncthreads()
