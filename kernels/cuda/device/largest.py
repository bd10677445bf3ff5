"""The k largest logits of a row, in order.

Of a row of several chunks, while its pieces are in registers for the sums, every lane keeps the maximum of its columns.
The k-th largest of these maxima, found by halving an interval (kernels/ordering.py), is a lower bound of the k-th
largest logit, and a close one: of 32000 columns in 256 lanes, about 21 reach the twentieth. Only lanes whose maximum
reaches it are looked at again. What does is a candidate, and a candidate's place is the number of better ones.

    maxima        7.5  9.0  3.1  8.2  8.9 ...      k = 3: three of them reach 8.2
    entries            9.0       8.2  8.9          the columns of these lanes again, shared by all threads
    candidates    8.2  9.0  8.4  8.9               places 3 0 2 1: the last one is left out

Blocks of a cluster have the maxima of all chunks of the row for a bound, if enough of them are not masked (of 1.5 k
about 1.65 k columns reach the k-th), and otherwise read each other's. They put their candidates into the memory of the
first. Better is: larger, or equal and in a lower column. A masked column is no candidate: where there are too few
others, the first columns that are not candidates follow them. Nothing here depends on the order in which candidates
arrive. Rows of one piece are those of largest_of_short.py. Where there are too many candidates (many equal logits), and
where rows lie side by side, tournament.py does it.
"""

import math

from numpy import int32

from gpusoftmax.kernels.cuda.device._cuda import cuda, device
from gpusoftmax.kernels.cuda.device.arithmetic import maximum, number
from gpusoftmax.kernels.cuda.device.largest_of_short import masked_with, short_ranking_with
from gpusoftmax.kernels.cuda.device.memory import (
    element_size,
    granule_numbers,
    integer_of,
    load,
    mantissa_bits,
    n_values,
    number_of,
    number_size,
    vector_bits,
)
from gpusoftmax.kernels.cuda.device.orders import halfway, of_order, order_of
from gpusoftmax.kernels.cuda.device.pieces import chunk_of, part_of_block, piece_of, slot_of
from gpusoftmax.kernels.cuda.device.reduce import lanes_below, lanes_where, leads_block, n_lanes, warp_count
from gpusoftmax.kernels.cuda.device.row_barriers import exchange_states
from gpusoftmax.kernels.cuda.device.row_staging import last_in_slot
from gpusoftmax.kernels.cuda.device.row_state import saved_max, state_place
from gpusoftmax.kernels.cuda.device.shared_numbers import (
    cluster_arrive,
    cluster_wait,
    count_in_block,
    count_up,
    count_up_in_block,
    get,
    get_pair,
    number_in_block,
    put,
    put_in_block,
    put_pair,
    put_pair_in_block,
)
from gpusoftmax.kernels.cuda.device.slots import is_granule, read_columns
from gpusoftmax.kernels.cuda.device.split import (
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
    split_piece_bits,
)
from gpusoftmax.kernels.cuda.device.tournament import NO_COLUMN, is_better, tournament_with
from gpusoftmax.kernels.cuda.device.transform import left_to_read, transform
from gpusoftmax.kernels.cuda.plan import MOST_LARGEST, N_BEST, N_CANDIDATES, WARP_SIZE

N_READ = N_BEST // WARP_SIZE
N_ENTRIES = N_CANDIDATES // 2
RANKERS = 8  # threads that count together what is better than a candidate


# ---------------------------------------------------------------- where things lie in shared memory


@device
def scratch_place(k, split, like):
    return state_place(0, split_chunks(split) + 1, split, like) + k * number_size(like)


@device
def candidate_place(k, split, like):
    return scratch_place(2 * k, split, like)


@device
def best_place(k, split, like):
    return scratch_place(2 * N_CANDIDATES + k, split, like)


@device
def entry_place(k, split, like):
    return scratch_place(2 * N_CANDIDATES + N_BEST + k, split, like)


@device
def bound_place(split, like):
    return scratch_place(2 * N_CANDIDATES + N_BEST + N_ENTRIES, split, like)


@device
def n_entries_place(split, like):
    return scratch_place(2 * N_CANDIDATES + N_BEST + N_ENTRIES + 1, split, like)


@device
def n_candidates_place(split, like):
    return scratch_place(2 * N_CANDIDATES + N_BEST + N_ENTRIES + 2, split, like)


@device
def limit_place(split, like):
    return scratch_place(2 * N_CANDIDATES + N_BEST + N_ENTRIES + 3, split, like)


# ---------------------------------------------------------------- maxima


@device
def turn_bits(split):
    """log2 of how many maxima a lane keeps: piece k goes to that number k modulo so many, 8 in a block of one warp."""
    n_warps = n_parts(split)
    few = 1 if n_warps <= N_READ // 2 else 0
    return int32(few + (1 if n_warps <= N_READ // 4 else 0) + (1 if n_warps == 1 else 0))


@device
def n_turns(split):
    return shifted_up(int32(1), turn_bits(split))


@device
def keep_none(split, like):
    """Before the first pass: there are no candidates."""
    if is_long(split) and cuda.threadIdx.x == 0:
        put(n_candidates_place(split, like), int32(0))


@device
def keep_best(k, largest, team, split):
    """In the first pass: the maximum of a lane's columns of piece k."""
    if is_long(split):
        turn = int32(k & int32(n_turns(split) - 1))
        at = best_place((shifted_up(own_part(split), turn_bits(split)) + turn) * WARP_SIZE + team.lane, split, largest)
        if turn < k:
            largest = maximum(largest, get(at, largest))
        put(at, largest)


@device
def is_kept(number_of_turn, block, team, split):
    """Whether a block of the row keeps this maximum for each lane."""
    bits = turn_bits(split)
    part, turn = shifted_down(number_of_turn, bits), int32(number_of_turn & int32(n_turns(split) - 1))
    chunk = int32(block * n_parts(split) + part + team.size * shifted_down(turn, split_piece_bits(split)))
    return part < n_parts(split) and chunk < split_chunks(split)


@device
def kept_max(number_of_turn, team, split, like):
    """One of the block's maxima for each lane; -inf where there is none."""
    if not is_kept(number_of_turn, quotient(team.rank, n_parts(split)), team, split):
        return number(like, -math.inf)
    return get(best_place(number_of_turn * WARP_SIZE + team.lane, split, like), like)


# ---------------------------------------------------------------- a bound, by one warp


@device
def read_maxima(maxima, k, team, split, like):
    """maxima = what the k-th largest is looked for in, N_READ numbers for each lane."""
    if split_cluster(split) == 1:
        for turn in range(N_READ):
            maxima[turn] = kept_max(int32(turn), team, split, like)
        return
    n_finite = int32(0)
    for turn in range(N_READ):
        maxima[turn] = max_of_chunks(int32(turn * WARP_SIZE + team.lane), split, like)
        n_finite = int32(n_finite + n_lanes(lanes_where(maxima[turn] > number(like, -math.inf))))
    if 2 * n_finite < 3 * k:
        for turn in range(N_READ):
            maxima[turn] = max_of_blocks(int32(turn), team, split, like)


@device
def max_of_blocks(turn, team, split, like):
    """The maximum of as many of a lane's maxima as there are blocks, so that N_READ turns have those of all blocks."""
    largest, k = number(like, -math.inf), int32(turn * split_cluster(split))
    end = int32(k + split_cluster(split))
    while k < end:
        block, number_of_turn = quotient(k, int32(N_READ)), remainder(k, int32(N_READ))
        if is_kept(number_of_turn, block, team, split):
            at = best_place(number_of_turn * WARP_SIZE + team.lane, split, like)
            largest = maximum(largest, number_in_block(at, block, like))
        k = int32(k + 1)
    return largest


@device
def max_of_chunks(first, split, like):
    """The maximum of every N_BEST-th chunk from a first one on."""
    largest, chunk = saved_max(first, split, like), int32(first + N_BEST)
    while chunk < split_chunks(split):
        largest = maximum(largest, saved_max(chunk, split, like))
        chunk = int32(chunk + N_BEST)
    return largest


@device
def count_of(maxima, limit):
    """How many of the warp's numbers are at least the limit."""
    count = int32(0)
    for turn in range(N_READ):
        count = int32(count + n_lanes(lanes_where(maxima[turn] >= limit)))
    return count


@device
def bound_of(maxima, k, row_max):
    """A number that k of the maxima reach, and not many more."""
    lowest, step = order_of(number(row_max, -math.inf)), 1 << mantissa_bits(row_max)
    high = order_of(row_max) + 1
    low = max(high, lowest + step) - step  # in this order 64 bits hold it, float64's last step too
    count = count_of(maxima, of_order(low, row_max))
    while count < k and low > lowest:
        high, step = low, step + step
        low = max(high, lowest + step) - step  # in this order 64 bits hold it, float64's last step too
        count = count_of(maxima, of_order(low, row_max))
    while count > k + shifted_down(int32(k), int32(2)) + 4 and halfway(low, high, 1) != low:
        middle = halfway(low, high, 1)
        found = count_of(maxima, of_order(middle, row_max))
        if found >= k:
            low, count = middle, found
        else:
            high = middle
    return of_order(low, row_max)


@device
def find_entries(k, row_max, team, split):
    """Tells the block the bound and which of its maxima reach it."""
    like, maxima = row_max, granule_numbers(row_max)
    read_maxima(maxima, k, team, split, like)
    bound = bound_of(maxima, k, row_max)
    count = int32(0)
    for turn in range(N_READ):
        value = kept_max(int32(turn), team, split, like)
        reaches = value >= bound and value > number(bound, -math.inf)
        lanes = lanes_where(reaches)
        k = int32(count + n_lanes(lanes_below(lanes, team.lane)))
        if reaches and k < N_ENTRIES:
            put(entry_place(k, split, bound), int32(turn * WARP_SIZE + team.lane))
        count = int32(count + n_lanes(lanes))
    if team.lane == 0:
        if count > N_ENTRIES:  # equal ones: spare the others the search
            claim(int32(N_CANDIDATES + 1), split, bound)
            count = int32(0)
        put(bound_place(split, bound), bound)
        put(n_entries_place(split, bound), count)


# ---------------------------------------------------------------- candidates


@device
def claim(count, split, like):
    """The number of the first of so many new candidates of the row."""
    at = n_candidates_place(split, like)
    if split_cluster(split) > 1:
        return count_up_in_block(at, 0, count)
    return count_up(at, count)


@device
def n_candidates(split, like):
    """How many candidates the row has."""
    at = n_candidates_place(split, like)
    if split_cluster(split) > 1:
        return count_in_block(at, 0)
    return get(at, int32(0))


@device
def put_candidate(k, value, col, split):
    at = candidate_place(k, split, value)
    if split_cluster(split) > 1:
        put_pair_in_block(at, 0, value, number_of(col, value))
    else:
        put_pair(at, value, number_of(col, value))


@device
def read_granule(values, k, within, width, piece, source, team, split):
    """values[:width] = the columns of piece k from `within` on, from its slot or from where they came from."""
    if last_in_slot(k, team, split) == k:
        size = element_size(source.pointer)
        place = int32(slot_of(k, team, split, 1) + (source.shift + within) * size)
        read_columns(values, source, place, width, is_granule(source, place, width))
    else:
        left = left_to_read(piece, source.through)  # a slot has -inf from n_valid on, memory has not
        for j in range(width):
            values[j] = number(values[j], -math.inf)
            if within + j < left:
                values[j] = load(source.pointer, (piece.first + within + j) * source.stride, values[j])
    transform(values, piece.first + within, width, source.through)


@device
def take_candidates(values, col, width, n_cols, bound, split):
    hits = int32(0)
    for j in range(width):
        if values[j] >= bound and values[j] > number(bound, -math.inf) and col + j < n_cols:
            hits = int32(hits | (1 << j))
    if hits != 0:
        k = claim(n_lanes(hits), split, bound)
        for j in range(width):
            if hits & (1 << j) != 0 and k < N_CANDIDATES:
                put_candidate(k, values[j], int32(col + j), split)
                k = int32(k + 1)


@device
def look_at_entries(source, n_cols, team, split, like):
    """All threads look for candidates in the columns of the entries: a granule each."""
    values, bound = granule_numbers(like), get(bound_place(split, like), like)
    n_entries, turns = get(n_entries_place(split, like), int32(0)), n_turns(split)
    bits = vector_bits(source.pointer)
    granules = int32(n_values(like) >> bits)
    granule, k = remainder(cuda.threadIdx.x, granules), quotient(cuda.threadIdx.x, granules)
    while k < n_entries:
        entry = get(entry_place(k, split, like), int32(0))
        part = shifted_down(entry, int32(5 + turn_bits(split)))
        owner = part_of_block(part, int32(entry & (WARP_SIZE - 1)), team, split)
        within = int32((granule * WARP_SIZE + owner.lane) << bits)
        turn = int32(shifted_down(entry, int32(5)) & int32(turns - 1))
        while turn < owner.n_pieces:
            piece = piece_of(turn, n_cols, owner, split, like)
            # A few of the chunks reach the bound; those of a long row would have to be read again.
            if within < piece.count and saved_max(chunk_of(turn, owner, split), split, like) >= bound:
                read_granule(values, turn, within, 1 << bits, piece, source, owner, split)
                take_candidates(values, piece.first + within, 1 << bits, n_cols, bound, split)
            turn = int32(turn + turns)
        k = int32(k + quotient(cuda.blockDim.x, granules))


# ---------------------------------------------------------------- their order


def ranking_with(write):
    """A device function in which a block calls write(j, logit, column, numbers) for the k best candidates."""

    @device
    def write_candidates(k, count, split, like, numbers):
        group, one = quotient(cuda.threadIdx.x, int32(RANKERS)), remainder(cuda.threadIdx.x, int32(RANKERS))
        first = int32(0)
        while first < count:
            mine = int32(first + group)
            value, col, better = number(like, -math.inf), int32(NO_COLUMN), int32(0)
            if mine < count:
                value, stored = get_pair(candidate_place(mine, split, like), like)
                col = integer_of(stored)
            j = one
            while j < count:
                other, stored = get_pair(candidate_place(j, split, like), like)
                if is_better(other, integer_of(stored), value, col):
                    better = int32(better + 1)
                j = int32(j + RANKERS)
            place = warp_count(better, RANKERS)
            if mine < count and one == 0 and place < k:
                write(place, value, col, numbers)
            first = int32(first + quotient(cuda.blockDim.x, int32(RANKERS)))

    return write_candidates


def by_candidates_with(act):
    """A device function that calls act(k, count, split, like, numbers) in the block that has part 0 of a long row, when
    its candidates are there. Whether it has: nothing is done if there are too many. Before it there were `keep_none`
    and a first pass that told `keep_best` the maxima, and the row's chunks have met, each with its maximum.
    """

    @device
    def by_candidates(source, k, n_cols, row_max, team, split, numbers):
        like = row_max
        if leads_block():
            find_entries(k, row_max, team, split)
        cuda.syncthreads()  # the entries are there before any thread looks at them
        look_at_entries(source, n_cols, team, split, like)
        exchange_states(split)  # every candidate has arrived
        count = n_candidates(split, like)
        if split_cluster(split) > 1:
            cluster_arrive()  # the count has been read before the first block may end
        if count <= N_CANDIDATES and team.rank < n_parts(split):
            act(k, count, split, like, numbers)
        if split_cluster(split) > 1:
            cluster_wait()
        return count <= N_CANDIDATES

    return by_candidates


def largest_with(write):
    """A device function that calls write(j, logit, column, numbers) for the k largest logits, j = 0, 1, ..., each in
    one thread of the block that has part 0 of the row. exists: whether there is a row. Before it there was what
    `by_candidates_with` asks for.
    """
    write_by_tournament = tournament_with(write)
    write_candidates, write_masked = ranking_with(write), masked_with(write, candidate_place)
    write_short = short_ranking_with(write)

    @device
    def write_all(k, count, split, like, numbers):
        write_candidates(k, count, split, like, numbers)
        if count < k:
            write_masked(k, count, cuda.threadIdx.x, cuda.blockDim.x, split, like, numbers)

    write_by_candidates = by_candidates_with(write_all)

    @device
    def largest(source, k, n_cols, exists, row_max, team, split, params, numbers):
        done = False
        if is_long(split) and k <= MOST_LARGEST:
            done = write_by_candidates(source, k, n_cols, row_max, team, split, numbers)
        if is_short(split):
            done = write_short(source, k, n_cols, exists, row_max, team, split, params, numbers)
        if not done:
            writes = exists and team.rank == 0 and team.lane == 0
            write_by_tournament(source, k, n_cols, writes, team, split, params, numbers)

    return largest


# ---------------------------------------------------------------- in the order of their size


@device
def tell(at, value, split):
    """Puts a number to a place in all blocks of the row."""
    if split_cluster(split) > 1:
        for block in range(split_cluster(split)):
            put_in_block(at, block, value)
    else:
        put(at, value)


@device
def put_in_order(j, x, col, numbers):
    k, split = numbers
    put(entry_place(j, split, x), x)
    if j == k - 1:
        tell(limit_place(split, x), x, split)


rank_in_order = ranking_with(put_in_order)


@device
def put_all_in_order(k, count, split, like, numbers):
    rank_in_order(k, count, split, like, (k, split))
    if count < k and cuda.threadIdx.x == 0:
        tell(limit_place(split, like), number(like, -math.inf), split)
    j = int32(count + cuda.threadIdx.x)
    while j < k:
        put(entry_place(j, split, like), number(like, -math.inf))
        j = int32(j + cuda.blockDim.x)


order_by_candidates = by_candidates_with(put_all_in_order)


@device
def kth_largest(source, k, n_cols, row_max, team, split):
    """(the k-th largest logit of a long row, for all its threads, and whether it has been found): -inf if fewer are
    larger than that. `ordered` then gives the block of part 0 all k of them. Before it there was what
    `by_candidates_with` asks for.
    """
    is_found = order_by_candidates(source, k, n_cols, row_max, team, split, ())
    exchange_states(split)  # the number has arrived
    return get(limit_place(split, row_max), row_max) if is_found else number(row_max, -math.inf), is_found


@device
def ordered(j, split, like):
    """The logit of rank j."""
    return get(entry_place(j, split, like), like)
