"""How a row gets out of shared memory: from slots, as results, into global memory.

Results leave by granules of the output's own alignment: where input and output lie alike, those that two pieces share
are in the slots of both, and the later piece writes them whole.
"""

from numpy import int32, int64

from gpusoftmax.kernels.cuda.device._cuda import device
from gpusoftmax.kernels.cuda.device.columns import in_walked_row, tell_results, walked_columns, walked_writer
from gpusoftmax.kernels.cuda.device.memory import (
    VECTOR_BYTES,
    advance,
    element_size,
    granule_numbers,
    n_values,
    piece_numbers,
    store,
    store_vector,
    vector_bits,
)
from gpusoftmax.kernels.cuda.device.pieces import piece_of, read_cols, slot_of
from gpusoftmax.kernels.cuda.device.row_staging import stage_before, wait_for_last
from gpusoftmax.kernels.cuda.device.rows import Piece
from gpusoftmax.kernels.cuda.device.slots import are_left_transformed, is_granule, read_columns
from gpusoftmax.kernels.cuda.device.split import is_columns, is_short, split_lanes
from gpusoftmax.kernels.cuda.device.staging import hidden, staged_vector
from gpusoftmax.kernels.cuda.device.transform import is_changed, left_inside, padding_for, transform, transform_runs
from gpusoftmax.kernels.cuda.plan import WARP_SIZE


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
