"""Rows side by side: neighbouring threads have neighbouring rows, so that a column of them is read in whole sectors.

A block takes R = 4 ... 32 rows. Thread t works for row t % R, and is its worker number t / R. A worker does what a lane
of a warp does in rows.py, with the same columns: l, l + lanes, l + 2 lanes, ... of a piece. Where a block has fewer
workers for a row than the tree has lanes, a worker is several lanes in turn: l, l + workers, ...

    R = 8, float32     row 0 1 2 3 4 5 6 7 | 0 1 2 3 4 5 6 7 | 0 1 2 3 4 5 6 7 | 0 1 2 3 4 5 6 7
    a warp, its lanes      worker 0        |     worker 1    |     worker 2    |     worker 3
    reads at first         column 0        |     column 1    |     column 2    |     column 3       32 bytes of each

What a thread has read stays its own, in shared memory, until it writes the results: nobody waits for copies of others.
Sums go the way of reduce.py's butterflies, from the highest bit of the lane's number to the lowest:

    | turn | warp | place in the warp |        the bits of l: added up by a thread, through shared memory, by shuffles

and so a row has the bits that it has in any other layout.
"""

from numpy import int32

from gpusoftmax.kernels.cuda.device._cuda import cuda, device
from gpusoftmax.kernels.cuda.device.arithmetic import add, maximum
from gpusoftmax.kernels.cuda.device.memory import advance, element_size, granule_numbers, number_size, store
from gpusoftmax.kernels.cuda.device.split import (
    is_columns,
    split_lane_bits,
    split_lanes,
    split_row_bits,
    split_slot_values,
    split_turns,
)
from gpusoftmax.kernels.cuda.device.staging import copy_columns, get, put, staged, staged_columns
from gpusoftmax.kernels.cuda.plan import GROUP, MAX_THREADS, WARP_SIZE

FULL_WARP = 0xFFFFFFFF
WARP_BITS = 5  # log2 of WARP_SIZE


# ---------------------------------------------------------------- who


@device
def warp_of_block():
    return int32(int32(cuda.threadIdx.x) >> WARP_BITS)


@device
def warps_of_block():
    return int32(int32(cuda.blockDim.x) >> WARP_BITS)


@device
def row_in_block(split):
    """The number of this thread's row among those of the block; 0 where a block has one."""
    return int32(int32(cuda.threadIdx.x) & int32((1 << split_row_bits(split)) - 1))


@device
def workers(split):
    """How many threads a row has."""
    return int32(int32(cuda.blockDim.x) >> split_row_bits(split))


@device
def lanes_at_once(split):
    """How many lanes of a row its threads are at a time: all, unless a thread is several in turn."""
    return workers(split) if is_columns(split) else split_lanes(split)


@device
def lane_of(turn, team, split):
    """The lane that this thread is in a turn."""
    return int32(team.lane + turn * lanes_at_once(split))


@device
def n_columns(lane, piece, split):
    """How many columns of a piece a lane has."""
    return int32(int32(piece.count - lane + split_lanes(split) - 1) >> split_lane_bits(split))


@device
def own_place(source, at, turn, split):
    """Where this thread's columns of a turn begin in the slot `at`; they are WARP_SIZE elements apart."""
    return place_in_slot(source, at, warp_of_block(), turn, cuda.laneid, split)


@device
def place_in_slot(source, at, warp, turn, place, split):
    """Where the columns of a thread begin, the one at `place` in its warp."""
    first = int32((warp * split_turns(split) + turn) * split_slot_values(split) * WARP_SIZE)
    return int32(at + (first + place) * element_size(source.pointer))


@device
def read_lane(held, source, at, piece, row, lane, split, padding):
    """held = the columns of a lane of any of the block's rows, which some thread has copied to the slot `at`."""
    turn = int32(lane // workers(split))
    thread = int32(((lane - turn * workers(split)) << split_row_bits(split)) + row)
    place = place_in_slot(source, at, thread >> WARP_BITS, turn, thread & (WARP_SIZE - 1), split)
    staged_columns(source.pointer, place, WARP_SIZE * n_columns(lane, piece, split), 32, padding, held)


@device
def place_of_column(source, at, col, turn, split):
    """Where column `col` of the piece in the slot `at` lies, one of this lane's."""
    if is_columns(split):
        k = col >> split_lane_bits(split)
        return own_place(source, at, turn, split) + k * WARP_SIZE * element_size(source.pointer)
    return at + (source.shift + col) * element_size(source.pointer)


# ---------------------------------------------------------------- global memory -> slot -> results -> global memory


@device
def copy_piece(source, at, piece, team, split, like):
    """Starts to copy this thread's columns of a piece to the slot `at`."""
    for turn in range(split_turns(split)):
        lane = lane_of(turn, team, split)
        index = (piece.first + lane) * source.stride
        step = split_lanes(split) * source.stride
        copy_columns(
            source.pointer, index, step, own_place(source, at, turn, split), n_columns(lane, piece, split), like
        )


def columns_writer(results):
    """A device function that writes this thread's results of a piece; `results` as for rows.row_writer."""

    @device
    def write_columns(target, sources, at, piece, team, split, numbers, like):
        values, others = granule_numbers(like), granule_numbers(like)
        size, lanes = element_size(sources[0].pointer), split_lanes(split)
        for turn in range(split_turns(split)):
            lane = lane_of(turn, team, split)
            first, count = piece.first + lane, n_columns(lane, piece, split)
            place = own_place(sources[0], at, turn, split)
            # An address is made from the one before: those of a group, all at once, take two registers each.
            address, step = advance(target.pointer, first * target.stride), lanes * target.stride
            whole = int32(count - (count & (GROUP - 1)))
            for _ in range(0, whole, GROUP):
                for k in range(GROUP):
                    here = place + k * WARP_SIZE * size
                    values[k] = staged(sources[0].pointer, here, values[k])
                    if len(sources) == 2:
                        others[k] = staged(sources[1].pointer, here + split.slot_bytes, values[k])
                for k in range(GROUP):
                    results(advance(values, k), advance(others, k), first, 1, numbers)
                    store(address, 0, values[k])
                    first, address = first + lanes, advance(address, step)
                place = int32(place + GROUP * WARP_SIZE * size)
            for _ in range(whole, count):
                values[0] = staged(sources[0].pointer, place, values[0])
                if len(sources) == 2:
                    others[0] = staged(sources[1].pointer, place + split.slot_bytes, values[0])
                results(values, others, first, 1, numbers)
                store(address, 0, values[0])
                first, address = first + lanes, advance(address, step)
                place = int32(place + WARP_SIZE * size)

    return write_columns


# ---------------------------------------------------------------- the threads of a row


@device
def exchange_place(number, warp, like):
    """Where the numbers of the block's threads lie: those of this thread's place in a warp. `number` is 0 or 1.

    Exchanges take them in turn: between two of one number lies the barrier of another, so that all have read.
    """
    return (number * MAX_THREADS + warp * WARP_SIZE + cuda.laneid) * number_size(like)


def all_workers_with(combine):
    """A device function that combines a number of each worker of a row, which all of them get."""

    @device
    def two(number, warp, other, like):
        return combine(get(exchange_place(number, warp, like), like), get(exchange_place(number, other, like), like))

    @device
    def all_workers(value, number, split):
        warps = warps_of_block()
        put(exchange_place(number, warp_of_block(), value), value)
        cuda.syncthreads()  # every warp's numbers are there before any warp reads them
        if warps == 8:
            even = combine(two(number, 0, 4, value), two(number, 2, 6, value))
            value = combine(even, combine(two(number, 1, 5, value), two(number, 3, 7, value)))
        elif warps == 4:
            value = combine(two(number, 0, 2, value), two(number, 1, 3, value))
        elif warps == 2:
            value = two(number, 0, 1, value)
        for offset in (16, 8, 4):
            if offset >> split_row_bits(split) > 0:
                value = combine(value, cuda.shfl_xor_sync(FULL_WARP, value, offset))
        return value

    return all_workers


max_of_workers = all_workers_with(maximum)
sum_of_workers = all_workers_with(add)


@device
def sum_of_turns(parts, split):
    """What the turns of a worker, the last parts, add up to."""
    if split_turns(split) == 4:
        return add(add(parts[0], parts[2]), add(parts[1], parts[3]))
    return add(parts[2], parts[3]) if split_turns(split) == 2 else parts[3]


@device
def any_of_block(condition, like):
    """Whether the condition holds for any thread of the block."""
    flags = 2 * MAX_THREADS * number_size(like)
    in_warp = cuda.any_sync(FULL_WARP, condition)
    if cuda.laneid == 0:
        put(flags + 4 * warp_of_block(), int32(1 if in_warp else 0))
    cuda.syncthreads()  # every warp's flag is there before any warp reads it
    found = int32(0)
    for warp in range(warps_of_block()):
        found |= get(flags + 4 * warp, int32(0))
    return found != 0
