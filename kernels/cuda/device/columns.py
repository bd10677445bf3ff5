"""Rows side by side: threads of a warp that read or write memory together have neighbouring rows, so that a column of
them is whole sectors.

A block takes R = 4 ... 64 rows. In the slots, rows lie as piece_staging.py has them: a part of the block sums up and
transforms each row there, with the same columns in the same lanes, so that a row has the bits that it has in any other
layout. Only the ways into the slots and out of them are the block's: thread t walks row t % R, of which it has the
columns t / R, t / R + lanes, ... of a piece, whichever part the row belongs to.

    R = 8, float32     row 0 1 2 3 4 5 6 7 | 0 1 2 3 4 5 6 7 | 0 1 2 3 4 5 6 7 | 0 1 2 3 4 5 6 7
    a warp             column 0            | column 1        | column 2        | column 3       32 bytes of each

Results are computed on the way out, by whoever writes them. So a part tells the block about its row, in shared memory:
how many columns it has, where it lies, and the numbers that results depend on.

    shared memory      | entries: one for each row | states: those of each row's chunks | slots: turn, row, source |
"""

from numpy import int32, int64

from gpusoftmax.kernels.cuda.device._cuda import cuda, device
from gpusoftmax.kernels.cuda.device.memory import advance, element_size, granule_numbers, number_size, store
from gpusoftmax.kernels.cuda.device.shared_numbers import get, get_numbers, put, put_numbers
from gpusoftmax.kernels.cuda.device.split import (
    is_columns,
    own_part,
    shifted_down,
    shifted_up,
    split_chunks,
    split_lane_bits,
    split_lanes,
    split_row_bits,
)
from gpusoftmax.kernels.cuda.device.staging import copy_columns, hidden, pad_element, staged
from gpusoftmax.kernels.cuda.plan import ENTRY_BYTES, GROUP, STATE_NUMBERS

N_COLS, SOURCES, TARGET, NUMBERS = 0, 8, 24, 32  # where the parts of an entry begin, in bytes


# ---------------------------------------------------------------- who


@device
def walked_row(split):
    """The number of the row that this thread reads and writes."""
    return int32(int32(cuda.threadIdx.x) & int32(shifted_up(int32(1), split_row_bits(split)) - 1))


@device
def first_column(split):
    """The first of the columns that this thread reads and writes."""
    return shifted_down(cuda.threadIdx.x, split_row_bits(split))


@device
def n_walked(piece, split):
    """How many columns of a piece this thread reads and writes."""
    return shifted_down(int32(piece.count - first_column(split) + split_lanes(split) - 1), split_lane_bits(split))


@device
def rows_of_block(split):
    """How many rows the slots of one turn hold: a part has its own slots unless rows lie side by side."""
    return shifted_up(int32(1), split_row_bits(split))


@device
def entry(row):
    """Where the entry of a row begins, in bytes."""
    return int64(row * ENTRY_BYTES)


@device
def own_states(split, like):
    """Where the states of this thread's row begin, in bytes."""
    if not is_columns(split):
        return int64(0)
    states = int64(own_part(split) * split_chunks(split)) * STATE_NUMBERS * number_size(like)
    return int64(rows_of_block(split) * ENTRY_BYTES) + states


# ---------------------------------------------------------------- what a part tells the block


@device
def tell_sources(sources, n_cols, team, split):
    here = entry(own_part(split))
    if team.lane == 0:
        put(here + N_COLS, int64(n_cols))
        for i in range(len(sources)):
            put_numbers(here + SOURCES + 8 * i, (sources[i].pointer,))
    cuda.syncthreads()  # every part has told before any thread asks


@device
def tell_results(target, numbers, team, split):
    here = entry(own_part(split))
    if team.lane == 0:
        put_numbers(here + TARGET, (target.pointer,))
        put_numbers(here + NUMBERS, numbers)
    cuda.syncthreads()  # every part has told before any thread asks


@device
def walked_columns(split):
    """How many columns the walked row has; 0 if it must not be touched."""
    return get(entry(walked_row(split)) + N_COLS, int64(0))


@device
def in_walked_row(place, n_sources, split):
    """The place of the walked row that answers to one of this thread's own row in a slot."""
    return int32(place + (walked_row(split) - own_part(split)) * n_sources * split.slot_bytes)


# ---------------------------------------------------------------- global memory -> slots -> global memory


@device
def copy_walked(source, i, place, piece, n_padded, split, padding):
    """Starts to copy this thread's columns of a piece, of source number i, to the slot of the walked row at `place`;
    fills those up to `n_padded` with the padding.
    """
    (pointer,) = get_numbers(entry(walked_row(split)) + SOURCES + 8 * i, (source.pointer,))
    col, lanes, size = first_column(split), split_lanes(split), element_size(source.pointer)
    count = n_walked(piece, split)
    copy_columns(
        pointer,
        (piece.first + col) * source.stride,
        int64(lanes) * source.stride,
        int32(place + col * size),
        int32(lanes * size),
        count,
        padding,
    )
    col, step = int32(col + count * lanes), hidden(lanes)
    while col < n_padded:
        pad_element(source.pointer, padding, int32(place + col * size))
        col = int32(col + step)


def walked_writer(results):
    """A device function that writes this thread's columns of a piece; `results` as for rows.row_writer."""

    @device
    def write_walked(target, sources, place, piece, split, own_numbers, like):
        here = entry(walked_row(split))
        (pointer,) = get_numbers(here + TARGET, (target.pointer,))
        numbers = get_numbers(here + NUMBERS, own_numbers)
        values, others = granule_numbers(like), granule_numbers(like)
        size, lanes = element_size(sources[0].pointer), split_lanes(split)
        col = piece.first + first_column(split)
        place = int32(place + first_column(split) * size)
        count = n_walked(piece, split)
        # An address is made from the one before: those of a group, all at once, take two registers each.
        address, step = advance(pointer, col * target.stride), int64(lanes) * target.stride
        whole = int32(count & int32(-GROUP))
        done = int32(0)
        while done < whole:
            for k in range(GROUP):
                there = int32(place + k * lanes * size)
                values[k] = staged(sources[0].pointer, there, like)
                if len(sources) == 2:
                    others[k] = staged(sources[1].pointer, int32(there + split.slot_bytes), like)
            for k in range(GROUP):
                results(advance(values, k), advance(others, k), col, 1, numbers)
                store(address, 0, values[k])
                col, address = col + lanes, advance(address, step)
            place = int32(place + GROUP * lanes * size)
            done = int32(done + GROUP)
        while done < count:
            values[0] = staged(sources[0].pointer, place, like)
            if len(sources) == 2:
                others[0] = staged(sources[1].pointer, int32(place + split.slot_bytes), like)
            results(values, others, col, 1, numbers)
            store(address, 0, values[0])
            col, address = col + lanes, advance(address, step)
            place = int32(place + lanes * size)
            done = int32(done + 1)

    return write_walked
