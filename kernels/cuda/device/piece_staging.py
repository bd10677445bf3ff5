"""How a piece gets into shared memory: from global memory into a slot.

Global memory is accessed by granules, sixteen aligned bytes, wherever the row begins:

    global     | . . a b | c d e f | g h i j | k . . . |        a ... k: a piece of float32 at some address
    slot       | . . a b | c d e f | g h i j | k . . . |        the same granules, at the same distance from a boundary

A granule inside the row is copied whole; at the ends of the row elements are copied one by one, so that no byte beside
it is touched, and what the lanes read beyond the row is filled with a padding that changes no result. Rows whose
columns are not neighbours are copied element by element into the same slots: a row has the same bits wherever it lies.
Where rows lie side by side in memory instead, columns.py has another way to fill the slots and to empty them.
"""

from numpy import int32, int64

from gpusoftmax.kernels.cuda.device._cuda import device
from gpusoftmax.kernels.cuda.device.columns import copy_walked, in_walked_row, walked_columns
from gpusoftmax.kernels.cuda.device.memory import VECTOR_BYTES, element_size, n_values, vector_bits
from gpusoftmax.kernels.cuda.device.pieces import piece_of, read_cols, slot_of
from gpusoftmax.kernels.cuda.device.split import is_columns, is_short, split_lanes
from gpusoftmax.kernels.cuda.device.staging import (
    copy_element,
    copy_vector,
    copy_vector_if,
    end_copies,
    hidden,
    pad_element,
    pad_vector,
)
from gpusoftmax.kernels.cuda.device.transform import fetch_masks, left_to_read, n_to_read
from gpusoftmax.kernels.cuda.plan import WARP_SIZE


@device
def n_granules(shift, count, bits):
    """How many granules of 2^bits columns hold `count` columns, `shift` columns behind a boundary."""
    return int32((shift + count + (1 << bits) - 1) >> bits)


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
