"""Who holds which column, and how a row gets into shared memory and out of it.

A row is cut into pieces. A lane of the warp that has a piece sums runs of neighbouring columns, sixteen bytes each:
lane l the runs l, l + lanes, l + 2 lanes, ... of the piece, so that one access of a warp reads neighbouring runs. Which
lane sums which column depends on n_cols and the formats alone.

Global memory is accessed by granules, sixteen aligned bytes, wherever the row begins:

    global     | . . a b | c d e f | g h i j | k . . . |        a ... k: a piece of float32 at some address
    slot       | . . a b | c d e f | g h i j | k . . . |        the same granules, at the same distance from a boundary

A granule inside the row is copied whole; at the ends of the row elements are copied one by one, so that no byte beside
it is touched, and what the lanes read beyond the row is filled with a padding that changes no result. A run that begins
beside a boundary is cut out of the two granules that hold it, at a distance that is the same for the whole row.
Results leave by granules of the output's own alignment: where input and output lie alike, those that two pieces share
are in the slots of both, and the later piece writes them whole. Rows whose columns are not neighbours are copied
element by element into the same slots: a row has the same bits wherever it lies. Where rows lie
side by side in memory instead, columns.py has another way to fill the slots and to empty them.

A warp has `slots` slots. If it has more pieces than slots it goes around them: the first pass leaves the last pieces
there; the last pass begins with those and fetches the others again in reverse order, since what was read last is most
likely still in the second-level cache. All of this is a warp's own: it waits for no other until states are exchanged.
"""

from typing import NamedTuple

from numpy import int32, int64

from gpusoftmax.kernels.cuda.device._cuda import cuda, device
from gpusoftmax.kernels.cuda.device.arithmetic import number
from gpusoftmax.kernels.cuda.device.columns import (
    copy_walked,
    in_walked_row,
    rows_of_block,
    tell_results,
    tell_sources,
    walked_columns,
    walked_writer,
)
from gpusoftmax.kernels.cuda.device.memory import (
    VECTOR_BYTES,
    advance,
    element_size,
    granule_numbers,
    is_null,
    load,
    misalignment,
    n_values,
    number_size,
    piece_numbers,
    row_offset,
    store,
    store_vector,
    vector_bits,
    vector_width,
)
from gpusoftmax.kernels.cuda.device.shared_numbers import cluster_arrive, cluster_wait
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
from gpusoftmax.kernels.cuda.device.staging import (
    copy_element,
    copy_vector,
    copy_vector_if,
    end_copies,
    hidden,
    pad_element,
    pad_vector,
    shared_start,
    stage_vector,
    staged,
    staged_runs,
    staged_vector,
    wait_for_copies,
)
from gpusoftmax.kernels.cuda.device.transform import (
    VERY_MANY,
    fetch_masks,
    fits_where_logits_were,
    is_changed,
    left_inside,
    left_to_read,
    n_to_read,
    padding_for,
    through_of,
    transform,
    transform_runs,
)
from gpusoftmax.kernels.cuda.plan import GROUP, WARP_SIZE


class Strided(NamedTuple):
    """An Operand as a kernel gets it. The pointer's type names the storage format."""

    pointer: object
    outer_stride: int
    inner_stride: int
    col_stride: int
    transform: object  # None: its elements are read as they are


class Row(NamedTuple):
    """One row of an array: column c lies at pointer[c * stride]. `shift` elements lie between the last 16-byte boundary
    and column 0; it is 0, and there are no granules, if the columns are not neighbours.
    """

    pointer: object
    stride: int
    shift: int
    through: object  # what its elements go through on the way into registers, see transform.py; None: nothing


class Piece(NamedTuple):
    """The columns [first, first + count) of a row, which has `left` from the first on (or very many)."""

    first: int
    count: int
    left: int


class Team(NamedTuple):
    """The threads that share a row, as one of them sees it: it is lane `lane` of part `rank` of `size` parts. A part is
    a warp, or a few lanes of one where the row is short, and has `n_pieces` pieces of the row.
    """

    lane: int
    rank: int
    size: int
    n_pieces: int
    slots: int  # the address in shared memory where the slots of this part begin


@device
def row_of(array, row, rows):
    pointer = advance(array.pointer, row_offset(array, row, rows))
    shift = int32(misalignment(pointer) if array.col_stride == 1 else 0)
    return Row(pointer, array.col_stride, shift, through_of(array.transform, row, rows))


# ---------------------------------------------------------------- who


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


# ---------------------------------------------------------------- global memory -> slot


@device
def read_cols(piece, split, like):
    """Columns that the lanes read from a slot: whole groups, and of a long row always all."""
    if not is_long(split):
        group = int32(split_lanes(split) * GROUP)
        return int32((piece.count + group - 1) & -group)
    return int32(WARP_SIZE * n_values(like))


@device
def n_granules(shift, count, bits):
    """How many granules of 2^bits columns hold `count` columns, `shift` columns behind a boundary."""
    return int32((shift + count + (1 << bits) - 1) >> bits)


@device
def lone_columns(shift, count, low, high, bits):
    """Which of `count` columns belong to granules of 2^bits columns that do not lie inside the columns [low, high):
    the first `head` of them, and those from `tail` on. The first column is number 0.
    """
    width = 1 << bits
    head = int32(min(width - shift, count) if -shift < low else 0)
    last = int32((((shift + count - 1) >> bits) << bits) - shift)
    tail = int32(max(last, head) if last + width > high else count)
    return head, tail


@device
def is_whole(source, piece, n_cols, split, like):
    """Whether all granules of a slot lie inside what is read of the row."""
    if is_short(split) or source.stride != 1:
        return False
    bits = vector_bits(source.pointer)
    first = piece.first - source.shift
    end = first + (n_granules(source.shift, read_cols(piece, split, like), bits) << bits)
    return first >= 0 and end <= n_to_read(n_cols, source.through)


@device
def stage_granules(source, at, piece, n_cols, team, split, padding):
    """Starts the copies of the granules of a slot that lie inside the row, and fills those beyond it."""
    if source.stride == 1:
        bits = vector_bits(source.pointer)
        width = 1 << bits
        first = piece.first - source.shift
        to_read = left_to_read(piece, source.through)
        n = n_granules(source.shift, read_cols(piece, split, padding), bits)
        if is_whole(source, piece, n_cols, split, padding):
            col, place = first + (int64(team.lane) << bits), int32(at + team.lane * VECTOR_BYTES)
            for k in range(n_values(padding) >> bits):
                copy_vector(source.pointer, col + k * (WARP_SIZE << bits), int32(place + k * WARP_SIZE * VECTOR_BYTES))
            if source.shift > 0 and team.lane == 0:
                k = n_values(padding) >> bits
                copy_vector(source.pointer, col + k * (WARP_SIZE << bits), int32(place + k * WARP_SIZE * VECTOR_BYTES))
        else:
            left = int32(max(to_read + source.shift, 0))  # a piece behind the row's end is padding from its beginning
            begin, whole, end = int32(1 if first < 0 else 0), int32(left >> bits), int32((left + width - 1) >> bits)
            step = split_lanes(split)
            col, place = first + (int64(team.lane) << bits), int32(at + team.lane * VECTOR_BYTES)
            # One more: the columns may begin beside a boundary.
            for k in range((n_values(padding) >> bits) + 1):
                granule = int32(team.lane + k * step)
                inside = granule >= begin and granule < min(whole, n)
                copy_vector_if(inside, source.pointer, col + k * (step << bits), int32(place + k * step * VECTOR_BYTES))
            granule, step = int32(end + team.lane), hidden(step)
            while granule < n:
                pad_vector(source.pointer, padding, int32(at + granule * VECTOR_BYTES))
                granule = int32(granule + step)


@device
def stage_lone_columns(source, at, piece, n_cols, team, split, padding):
    """Copies the columns that stage_granules leaves, and fills the rest of their granules. These loads are waited for;
    those are not.
    """
    size = element_size(source.pointer)
    cols = read_cols(piece, split, padding)
    n_cols = n_to_read(n_cols, source.through)
    k, step = team.lane, hidden(split_lanes(split))
    if source.stride != 1:
        while k < cols:
            stage_element(source, int32(at + k * size), piece.first + k, n_cols, padding)
            k = int32(k + step)
        return
    bits = vector_bits(source.pointer)
    width = int32(1 << bits)
    first = piece.first - source.shift
    left = int32(left_to_read(piece, source.through) + source.shift)
    last = int32(left >> bits)
    head = first < 0
    tail = int32(left & (width - 1)) != 0 and last >= (1 if head else 0)
    tail = tail and last < n_granules(source.shift, cols, bits)
    if head or tail:
        while k < 2 * width:
            within = k & (width - 1)
            col = int32(within if k < width else (last << bits) + within)
            if head if k < width else tail:
                stage_element(source, int32(at + col * size), first + col, n_cols, padding)
            k = int32(k + step)


@device
def stage_element(source, place, col, n_cols, padding):
    if col >= 0 and col < n_cols:
        copy_element(source.pointer, col * source.stride, place)
    else:
        pad_element(source.pointer, padding, place)


@device
def stage_walked(k, sources, team, split, padding):
    """Starts to copy what this thread has to, of piece k of the row that it walks."""
    piece = piece_of(k, walked_columns(split), team, split, padding)
    at = in_walked_row(slot_of(k, team, split, len(sources)), len(sources), split)
    for i in range(len(sources)):
        place = int32(at + i * split.slot_bytes)
        copy_walked(sources[i], i, place, piece, read_cols(piece, split, padding), split, padding)
    end_copies()


@device
def stage(k, sources, n_cols, team, split, padding):
    if is_columns(split):
        stage_walked(k, sources, team, split, padding)
        return
    piece = piece_of(k, n_cols, team, split, padding)
    at = slot_of(k, team, split, len(sources))
    for i in range(len(sources)):
        stage_granules(sources[i], int32(at + i * split.slot_bytes), piece, n_cols, team, split, padding)
        fetch_masks(sources[i].through, piece.first, piece.count, team.lane)
    end_copies()
    for i in range(len(sources)):
        stage_lone_columns(sources[i], int32(at + i * split.slot_bytes), piece, n_cols, team, split, padding)


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


# ---------------------------------------------------------------- slot -> registers


@device
def read_piece(held, source, at, piece, team, split):
    """held = this lane's columns of the piece in the slot `at`; padding beyond its end."""
    granule = int32(at + team.lane * VECTOR_BYTES)
    shift = int32(source.shift * element_size(source.pointer))
    in_loop = is_columns(split)
    # The distance of a lane's runs is a constant in each branch: one address serves them all.
    if is_long(split):
        staged_runs(source.pointer, granule, shift, None, 32, False, held)
    elif split_lanes(split) == 32:
        staged_runs(source.pointer, granule, shift, piece.count, 32, in_loop, held)
    elif split_lanes(split) == 16:
        staged_runs(source.pointer, granule, shift, piece.count, 16, in_loop, held)
    elif split_lanes(split) == 8:
        staged_runs(source.pointer, granule, shift, piece.count, 8, in_loop, held)
    else:
        staged_runs(source.pointer, granule, shift, piece.count, 4, in_loop, held)


@device
def col_of(k, team, split, source):
    """Which column of a piece is number k of a lane."""
    bits = vector_bits(source.pointer)
    return ((k >> bits) * split_lanes(split) + team.lane << bits) + (k & (1 << bits) - 1)


@device
def has_columns(group, piece, split):
    """Whether this group of a lane's values may hold any column: the others need not be computed with."""
    return is_long(split) or int32(int32(group) * split_lanes(split)) < piece.count


@device
def is_granule(source, place, width):
    """Whether so many columns, at this address in a slot, are a granule."""
    return width == vector_width(source.pointer) and place & (VECTOR_BYTES - 1) == 0


@device
def read_columns(values, source, place, width, as_granule):
    """values[:width] = the columns at an address in a slot and behind it."""
    size = element_size(source.pointer)
    if as_granule:
        staged_vector(source.pointer, place, values)
    else:
        for k in range(width):
            values[k] = staged(source.pointer, int32(place + k * size), values[k])


# ---------------------------------------------------------------- registers -> slot


@device
def are_left_transformed(source, team, split, like):
    """Whether a first pass leaves the logits in the slots as their transform has them, and the last one need not repeat
    it: where that loses nothing, every piece stays in its slot and runs are granules.
    """
    fits = fits_where_logits_were(source.through.transform, element_size(source.pointer) == number_size(like))
    return fits and is_long(split) and source.shift == 0 and team.n_pieces <= split_slots(split)


@device
def leave_transformed(held, source, at, team, split):
    """What read_piece has read, as it has become. The lane that wrote a granule of a whole piece reads it again."""
    bits, place = vector_bits(source.pointer), int32(at + team.lane * VECTOR_BYTES)
    for k in range(n_values(held[0]) >> bits):
        stage_vector(source.pointer, int32(place + k * WARP_SIZE * VECTOR_BYTES), advance(held, k << bits))


# ---------------------------------------------------------------- slot -> results -> global memory


@device
def lie_alike(target, sources):
    """Whether granules of the result are granules of all sources."""
    alike = target.stride == 1
    for i in range(len(sources)):
        same_width = vector_bits(sources[i].pointer) == vector_bits(target.pointer)
        alike = alike and same_width and sources[i].stride == 1 and sources[i].shift == target.shift
    return alike


def piece_writer(results, own_columns=False, results_of_run=None, may_find_transformed=False):
    """A device function that writes a piece; `results` and `results_of_run` as for row_writer. Where rows lie side by
    side, a thread writes columns of the row that it walks, whose part has told about it (columns.tell_results).

    own_columns: no column of another piece is written with it, which may have to be read again, in place.
    """

    write_walked = walked_writer(results)
    results_of_run = results_of_run or results

    @device
    def is_to_transform(source, team, split, like):
        found = may_find_transformed and are_left_transformed(source, team, split, like)
        return is_changed(source.through.transform) and not found

    @device
    def write_changed(target, source, place, col, numbers, like):
        """write_whole of logits that go through a transform: what it reads from memory is read at once."""
        held, others = piece_numbers(like), granule_numbers(like)
        bits = vector_bits(target.pointer)
        width, n_runs, step = 1 << bits, n_values(like) >> bits, WARP_SIZE << bits
        for k in range(n_runs):
            values = advance(held, k << bits)
            staged_vector(source.pointer, int32(place + k * WARP_SIZE * VECTOR_BYTES), values)
        transform_runs(held, col, width, n_runs, step, left_inside(col, source.through), source.through)
        for k in range(n_runs):
            values = advance(held, k << bits)
            results_of_run(values, others, col + k * step, width, numbers)
            store_vector(target.pointer, col + k * step, values)

    @device
    def write_whole(target, sources, at, first, team, split, numbers, like):
        """Granules of a whole piece that begin where those of the slot do, at column `first`."""
        values, others = granule_numbers(like), granule_numbers(like)
        bits = vector_bits(target.pointer)
        col, place = first + (int64(team.lane) << bits), int32(at + team.lane * VECTOR_BYTES)
        if is_to_transform(sources[0], team, split, like):
            write_changed(target, sources[0], place, col, numbers, like)
            return
        for k in range(n_values(like) >> bits):
            staged_vector(sources[0].pointer, int32(place + k * WARP_SIZE * VECTOR_BYTES), values)
            if len(sources) == 2:
                other = int32(place + split.slot_bytes + k * WARP_SIZE * VECTOR_BYTES)
                staged_vector(sources[1].pointer, other, others)
            results_of_run(values, others, col + k * (WARP_SIZE << bits), 1 << bits, numbers)
            store_vector(target.pointer, col + k * (WARP_SIZE << bits), values)

    @device
    def write_columns(target, sources, at, piece, shift, team, split, numbers, like):
        """Any columns. `at`: where the first of them lies in the slot; `shift`: how far behind a boundary in memory."""
        values, others = granule_numbers(like), granule_numbers(like)
        size, other, step = element_size(sources[0].pointer), split.slot_bytes, hidden(split_lanes(split))
        head, tail = piece.count, piece.count
        if target.stride == 1:
            bits = vector_bits(target.pointer)
            width = 1 << bits
            head, tail = lone_columns(shift, piece.count, 0, piece.count, bits)
            begin, end = int32(1 if shift > 0 else 0), int32((shift + piece.count) >> bits)
            one, two = int32(at[0] - shift * size), int32(at[1] + other - shift * size)
            as_granule = is_granule(sources[0], one, width)
            others_as_granule = is_granule(sources[len(sources) - 1], two, width)
            granule = team.lane
            while granule < end:
                if granule >= begin:
                    read_columns(values, sources[0], int32(one + (granule << bits) * size), width, as_granule)
                    if len(sources) == 2:
                        place = int32(two + (granule << bits) * size)
                        read_columns(others, sources[1], place, width, others_as_granule)
                    col = piece.first - shift + (int64(granule) << bits)
                    if is_to_transform(sources[0], team, split, like):
                        transform(values, col, width, sources[0].through)
                    results(values, others, col, width, numbers)
                    store_vector(target.pointer, col, values)
                granule = int32(granule + step)
        k, n_lone = team.lane, int32(head + piece.count - tail)
        while k < n_lone:
            col = int32(k if k < head else k - head + tail)
            read_columns(values, sources[0], int32(at[0] + col * size), 1, False)
            if len(sources) == 2:
                read_columns(others, sources[1], int32(at[1] + other + col * size), 1, False)
            if is_to_transform(sources[0], team, split, like):
                transform(values, piece.first + col, 1, sources[0].through)
            results(values, others, piece.first + col, 1, numbers)
            store(target.pointer, (piece.first + col) * target.stride, values[0])
            k = int32(k + step)

    @device
    def write_piece_of_rows(k, target, sources, team, split, numbers, like):
        """This thread's part of piece k of the row that it walks."""
        piece = piece_of(k, walked_columns(split), team, split, like)
        place = in_walked_row(slot_of(k, team, split, len(sources)), len(sources), split)
        write_walked(target, sources, place, piece, split, numbers, like)

    @device
    def write_piece(target, sources, at, piece, n_cols, team, split, numbers, like):
        if piece.count == 0:
            return
        size = element_size(sources[0].pointer)
        last = len(sources) - 1
        shift = target.shift
        if lie_alike(target, sources) and not (own_columns and shift > 0):
            cols = read_cols(piece, split, like)
            first = piece.first - shift
            is_last = piece.left <= cols
            whole = not is_last or (shift == 0 and piece.left == cols)
            if not is_short(split) and first >= 0 and whole:
                write_whole(target, sources, at, first, team, split, numbers, like)
                return
            # Up to where the granules of the next piece begin.
            count = piece.left if is_last else int32(cols - shift)
            if first >= 0:
                before = Piece(first, int32(count + shift), int32(piece.left + shift))
                write_columns(target, sources, (at, at), before, int32(0), team, split, numbers, like)
                return
            piece = Piece(piece.first, count, piece.left)
        places = int32(at + sources[0].shift * size), int32(at + sources[last].shift * size)
        write_columns(target, sources, places, piece, shift, team, split, numbers, like)

    @device
    def write_number(k, target, sources, n_cols, team, split, numbers, like):
        """Piece number k, which is in its slot."""
        if is_columns(split):
            write_piece_of_rows(k, target, sources, team, split, numbers, like)
        else:
            piece = piece_of(k, n_cols, team, split, like)
            at = slot_of(k, team, split, len(sources))
            write_piece(target, sources, at, piece, n_cols, team, split, numbers, like)

    return write_number


def row_writer(results, results_of_run=None, may_find_transformed=False):
    """A device function that writes a row.

    results(values, others, col, width, numbers) turns values[:width], the columns col, col + 1, ... of the first
    source, into results; `others` holds the same columns of the second, if there is one. results_of_run, the same by
    default, does so where all lanes of a warp are there, each with the `width` columns behind those of the lane before.
    """
    write_number = piece_writer(results, results_of_run=results_of_run, may_find_transformed=may_find_transformed)

    @device
    def write_row(target, sources, n_cols, team, split, numbers, like):
        """The last pass, from the last piece to the first: the last ones are in their slots."""
        if is_short(split):
            write_number(int32(0), target, sources, n_cols, team, split, numbers, like)
            return
        if is_columns(split):
            tell_results(target, numbers, team, split)
        k = int32(team.n_pieces - 1)
        while k >= 0:
            wait_for_last(k, team, split)
            write_number(k, target, sources, n_cols, team, split, numbers, like)
            stage_before(k, sources, n_cols, team, split, padding_for(sources[0].through, like))
            k = int32(k - 1)

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
    elif is_columns(split):
        cuda.syncwarp()  # the chunks of a row are one warp's
    else:
        cuda.syncthreads()


@device
def number_or(array, row, rows, default):
    """The number that an array has for a row, or the default where the caller gave no array."""
    return default if is_null(array.pointer) else load(row_of(array, row, rows).pointer, 0, default)


@device
def number_of_row(array, row, rows, like):
    """The number of a row from an array of one number per row."""
    return load(row_of(array, row, rows).pointer, 0, like) if row < rows.n_rows else number(like, 0.0)
