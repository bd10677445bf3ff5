"""The only place where threads talk to each other.

    part     of a warp: xor butterfly. After log2(lanes) exchanges every lane holds the result, and all lanes hold the
             same bits (addition commutes bit for bit, and both partners of an exchange add the same two numbers)
    block    one number per warp goes through `scratch`; every warp then folds the same 32 entries
    row      a state for each chunk goes into the shared memory of all blocks that share the row, see row_state.py

Every block_* function ends with all threads holding the result and with `scratch` free for the next call.
"""

from numpy import int32, int64

from gpusoftmax.kernels.cuda.device._cuda import cuda, device
from gpusoftmax.kernels.cuda.device.arithmetic import add, add_pair, maximum
from gpusoftmax.kernels.cuda.device.memory import number_size
from gpusoftmax.kernels.cuda.device.shared_numbers import put, put_in_block, put_pair, put_pair_in_block
from gpusoftmax.kernels.cuda.device.split import shifted_down, split_cluster
from gpusoftmax.kernels.cuda.plan import WARP_SIZE

FULL_WARP = 0xFFFFFFFF


def butterfly_with(combine):
    """A device function that combines the values of `lanes` neighbouring lanes."""

    @device
    def butterfly(value, lanes):
        if lanes == WARP_SIZE:  # apart, with nothing to ask at each step: the usual case of short rows
            for offset in (16, 8, 4, 2, 1):
                value = combine(value, cuda.shfl_xor_sync(FULL_WARP, value, offset))
        else:
            for offset in (8, 4, 2, 1):
                if offset < lanes:
                    value = combine(value, cuda.shfl_xor_sync(FULL_WARP, value, offset))
        return value

    return butterfly


warp_max = butterfly_with(maximum)  # NaN loses against any number
warp_sum = butterfly_with(add)


@device
def plus(x, y):
    return int32(x + y)


warp_count = butterfly_with(plus)


@device
def warp_sum_pair(total, low):
    """The sum over a warp of total + low, with the rounding errors of every addition carried along."""
    for offset in (16, 8, 4, 2, 1):
        other = cuda.shfl_xor_sync(FULL_WARP, total, offset)
        other_low = cuda.shfl_xor_sync(FULL_WARP, low, offset)
        total, low = add_pair(total, low, other, other_low)
    return total, low


@device
def lanes_sum_pair(total, low, lanes):
    """As `warp_sum_pair`, over `lanes` neighbouring lanes."""
    for offset in (16, 8, 4, 2, 1):
        if offset < lanes:
            other = cuda.shfl_xor_sync(FULL_WARP, total, offset)
            other_low = cuda.shfl_xor_sync(FULL_WARP, low, offset)
            total, low = add_pair(total, low, other, other_low)
    return total, low


@device
def any_lane(condition):
    """Whether the condition holds in any lane of the warp."""
    return cuda.any_sync(FULL_WARP, condition)


@device
def lanes_where(condition):
    """A bit for each lane of the warp in which the condition holds."""
    return int32(cuda.ballot_sync(FULL_WARP, condition))


@device
def n_lanes(lanes):
    """How many lanes there are among some."""
    return int32(cuda.popc(lanes))


@device
def lanes_below(lanes, lane):
    """Those of some lanes that come before a lane."""
    return int32(lanes & ((1 << lane) - 1))


@device
def lanes_before(value, lane, lanes):
    """The sum of the integers of those of `lanes` neighbouring lanes that come before a lane."""
    total = value
    for offset in (1, 2, 4, 8, 16):
        if offset < lanes:
            other = cuda.shfl_up_sync(FULL_WARP, total, offset)
            if lane >= offset:
                total = int32(total + other)
    return int32(total - value)


@device
def last_of_lanes(value, lane, lanes):
    """The value that the last of `lanes` neighbouring lanes has."""
    return cuda.shfl_sync(FULL_WARP, value, int32(cuda.laneid - lane + lanes - 1))


@device
def first_lane(lanes):
    """The first of some lanes."""
    return int64(cuda.ffs(lanes) - 1)


@device
def any_thread(condition):
    """Whether the condition holds in any thread of the block; a barrier."""
    return cuda.syncthreads_or(int32(condition)) != 0


@device
def publish(at, value, team, split):
    """The value, which all lanes hold, goes to a place in the shared memory of each block that shares the row."""
    if split_cluster(split) > 1:
        if team.lane < split_cluster(split):
            put_in_block(at, team.lane, value)
    elif team.lane == 0:
        put(at, value)


@device
def publish_pair(at, first, second, team, split):
    """As `publish`, of two numbers side by side."""
    if split_cluster(split) > 1:
        if team.lane < split_cluster(split):
            put_pair_in_block(at, team.lane, first, second)
    elif team.lane == 0:
        put_pair(at, first, second)


@device
def publish_pair_and(at, first, second, k, other, team, split):
    """As `publish_pair`, and `publish` of one more, k numbers behind the first."""
    other_at = at + k * number_size(first)
    if split_cluster(split) > 1:
        if team.lane < split_cluster(split):
            put_pair_in_block(at, team.lane, first, second)
            put_in_block(other_at, team.lane, other)
    elif team.lane == 0:
        put_pair(at, first, second)
        put(other_at, other)


@device
def leads_block():
    """Whether this is the warp that does what one warp of a block is enough for."""
    return cuda.threadIdx.x < WARP_SIZE


@device
def exchange(value, scratch, identity):
    """Hands lane k of every warp the value of warp k; `identity` where there is no such warp."""
    warp = cuda.threadIdx.x // WARP_SIZE
    if cuda.laneid == 0:
        scratch[warp] = value
    cuda.syncthreads()  # every warp's value is in scratch before any warp reads them
    value = identity
    if cuda.laneid < cuda.blockDim.x // WARP_SIZE:
        value = scratch[cuda.laneid]
    cuda.syncthreads()  # every warp has read scratch before the next reduction writes it
    return value


@device
def block_sum_pair(total, low, scratch, identity):
    """The sum over the block of total + low, in two numbers, too."""
    total, low = warp_sum_pair(total, low)
    total, low = exchange(total, scratch, identity), exchange(low, scratch, identity)
    return warp_sum_pair(total, low)


@device
def warp_min(value, lanes):
    """The smallest integer of `lanes` neighbouring lanes."""
    for offset in (16, 8, 4, 2, 1):
        if offset < lanes:
            value = min(value, cuda.shfl_xor_sync(FULL_WARP, value, offset))
    return value


@device
def first_of_block(row, scratch):
    """The smallest of the block's row numbers (int64)."""
    return warp_min(exchange(warp_min(row, WARP_SIZE), scratch, row), WARP_SIZE)


@device
def sum_of_warp(value):
    """The sum of the warp's integers (int64)."""
    for offset in (16, 8, 4, 2, 1):
        value += cuda.shfl_xor_sync(FULL_WARP, value, offset)
    return value


@device
def sum_of_block(value, scratch):
    """The sum of the block's integers (int64)."""
    value = exchange(sum_of_warp(value), scratch, value - value)
    return sum_of_warp(value)


@device
def beats(one, two):
    """Whether one (high, low, column) comes before another: it has the larger sum high + low, or stands first."""
    if one[0] != two[0]:
        return one[0] > two[0]
    if one[1] != two[1]:
        return one[1] > two[1]
    return one[2] < two[2]


@device
def warp_best(best, lanes):
    """The first (high, low, column) of `lanes` neighbouring lanes in the order of `beats`."""
    offset = shifted_down(int32(lanes), int32(1))
    while offset > 0:  # a tuple of offsets, in a loop that is not unrolled, could be left by an IndexError
        high = cuda.shfl_xor_sync(FULL_WARP, best[0], offset)
        low = cuda.shfl_xor_sync(FULL_WARP, best[1], offset)
        other = high, low, cuda.shfl_xor_sync(FULL_WARP, best[2], offset)
        if beats(other, best):
            best = other
        offset = shifted_down(offset, int32(1))
    return best
