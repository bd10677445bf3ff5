"""Expected positions under the softmax of a row: what soft_argmax.py and spatial_softmax.py have in common.

A row is an image: its columns are the places of lines of `width` columns, one line behind the other. soft_argmax has
one line and no width, None. For a column c at place j of line i, with the largest logit m,

    e_c = exp((x_c - m) / T)     s = sum_c e_c     E_j = sum_c j e_c / s     E_i = sum_c i e_c / s

No term is negative, so nothing cancels: if every e_c is off by a share of d_c of itself, E_j is by no more than

    sum_c j p_c d_c + E_j sum_c p_c d_c                                 p_c = e_c / s

and d_c is 1 ulp + |x_c - m| / T u: the difference to the maximum is rounded. It is taken all the same, and not a power
of two for an anchor as elsewhere, because the exponential of the maximum is then exactly 1: where no other column
counts, the result is exactly its position. What lies below the smallest exponential counts as 0.

Places are counted in float32 from the first column of a chunk, or along a line: exact integers. The sums of a chunk,
sum k e_k, become those of the row as sum (k + first) e_k = sum k e_k + first sum e_k, in pairs of numbers.

Backward: E_j has the derivative p_c (j - E_j) / T with respect to x_c. The probabilities are those of softmax.py.
"""

from typing import NamedTuple

from gpusoftmax.kernels.cpu.arithmetic import (
    add,
    add_pair,
    div,
    exp_below,
    fma,
    line_and_place,
    moved_moment,
    mul,
    ratio_of_pairs,
    row_inverse,
    sub,
)
from gpusoftmax.kernels.cpu.cache import device
from gpusoftmax.kernels.cpu.chunks import CHUNK_COLS, sum_chunk, sum_of_exponentials, write_chunk
from gpusoftmax.kernels.cpu.here import Line, pulled_back_cols
from gpusoftmax.kernels.cpu.memory import (
    advance,
    load_cols,
    numbers_on_stack,
    prefetch_to_read,
    store_cols,
)
from gpusoftmax.kernels.cpu.rows import chunk_range, count_of_chunks
from gpusoftmax.kernels.cpu.states import LOW, MAX, OWN, SUM, chunk_ratio, fold_sum, row_max, save, saved
from gpusoftmax.kernels.cpu.vector import (
    column_numbers,
    is_across,
    number,
)
from gpusoftmax.kernels.operands import scale_of, unless_one

# What is kept of a chunk beside its maximum and sum: sum_c j e_c and sum_c i e_c.
PLACES, PLACES_LOW, LINES, LINES_LOW = range(OWN, OWN + 4)


def scale_below(temperature: float, dtype: str) -> tuple:
    """The scale that positions.exp_below takes."""
    one = unless_one(scale_of(1.0, temperature, dtype))
    return one if one[1] is None else scale_of(2.0, temperature, dtype)


@device
def positions(col, first, width, zeros, like):
    """(lines, places) of the vector at `col`, both counted from `first`; places along a line where there are lines."""
    k = add(column_numbers(zeros), number(like, col - first))
    if width is None:
        return zeros, k
    inverse = div(number(like, 1.0), number(like, width))
    return line_and_place(k, number(like, width - first % width), number(like, width), inverse)


@device
def origin(first, width, like):
    """What `positions` leaves out: (line, place) of the column `first`."""
    if width is None:
        return number(like, 0.0), number(like, first)
    return number(like, first // width), number(like, 0.0)


@device
def measure_moments(here, first, last, width, scale, scale_low):
    """Step 1: the sums of chunks, each relative to its own maximum."""
    memory = numbers_on_stack(CHUNK_COLS, scale)
    for chunk in range(first, last):
        col, count = chunk_range(here, chunk)
        kept = here.home if is_across(here.zeros) else Line(advance(memory, -col), 1, 0)
        largest = saved(here.states, chunk, MAX, here.zero)
        total, low, _, _ = sum_chunk(exponential, here, (kept, largest, scale, scale_low), col, count)
        save(here.states, chunk, SUM, total)
        save(here.states, chunk, LOW, low)
        save_moments(here, chunk, kept, col, count, width, scale)


@device
def exponential(col, left, others, here, arguments):
    kept, largest, scale, scale_low = arguments
    prefetch_to_read(here.ahead.first, col, here.zeros)
    e = exp_below(load_cols(here.first, col, left, here.nothing), largest, scale, scale_low)
    store_cols(kept, col, left, e)
    return e, others, None


@device
def save_moments(here, chunk, kept, first, count, width, like):
    arguments = kept, first, width, like
    total, low, _, _ = sum_chunk(times_place, here, arguments, first, count)
    save(here.states, chunk, PLACES, total)
    save(here.states, chunk, PLACES_LOW, low)
    if width is not None:
        total, low, _, _ = sum_chunk(times_line, here, arguments, first, count)
        save(here.states, chunk, LINES, total)
        save(here.states, chunk, LINES_LOW, low)


@device
def times_place(col, left, others, here, arguments):
    kept, first, width, like = arguments
    _, places = positions(col, first, width, here.zeros, like)
    return mul(load_cols(kept, col, left, here.zeros), places), others, None


@device
def times_line(col, left, others, here, arguments):
    kept, first, width, like = arguments
    lines, _ = positions(col, first, width, here.zeros, like)
    return mul(load_cols(kept, col, left, here.zeros), lines), others, None


@device
def add_scaled(total, low, part, part_low, factor):
    return add_pair(total, low, mul(part, factor), mul(part_low, factor))


@device
def moment_of_chunk(here, chunk, field, first):
    """(moment, low) of a chunk, counted from the beginning of the row."""
    moment, low = saved(here.states, chunk, field, here.zero), saved(here.states, chunk, field + 1, here.zero)
    total, total_low = saved(here.states, chunk, SUM, here.zero), saved(here.states, chunk, LOW, here.zero)
    return moved_moment(moment, low, total, total_low, add(here.zero, first))


@device
def fold_moments(here, width, scale, scale_low):
    """Step 2: (E_j, E_i); there is no E_i without lines."""
    n_chunks = count_of_chunks(here.n_cols)
    largest = row_max(here.states, n_chunks, here.zero)
    s, s_low, j, j_low, i, i_low = here.zero, here.zero, here.zero, here.zero, here.zero, here.zero
    for chunk in range(n_chunks):
        factor = exp_below(saved(here.states, chunk, MAX, here.zero), largest, scale, scale_low)
        total, low = saved(here.states, chunk, SUM, here.zero), saved(here.states, chunk, LOW, here.zero)
        s, s_low = add_scaled(s, s_low, total, low, factor)
        line, place = origin(chunk * CHUNK_COLS, width, scale)
        moment, low = moment_of_chunk(here, chunk, PLACES, place)
        j, j_low = add_scaled(j, j_low, moment, low, factor)
        if width is not None:
            moment, low = moment_of_chunk(here, chunk, LINES, line)
            i, i_low = add_scaled(i, i_low, moment, low, factor)
    return ratio_of_pairs(j, j_low, s, s_low), ratio_of_pairs(i, i_low, s, s_low)


# ---------------------------------------------------------------- backward


class Pull(NamedTuple):
    """What the gradient of a row, or of one row per lane, is made of:

    p_c (per_place (j - place) + per_line (i - line)) / T, with p_c from exponentials relative to (shift, exponent).
    """

    shift: object
    exponent: object
    factor: object  # 1 / (s T)
    place: object  # expected ones
    per_place: object  # what the gradient is for each place further on
    line: object
    per_line: object


@device
def measure_exponentials(here, first, last, scale, scale_low):
    """Step 1 of a backward: the exponentials, which stay until they are written, and their sum."""
    for chunk in range(first, last):
        col, count = chunk_range(here, chunk)
        largest = saved(here.states, chunk, MAX, here.zero)
        total, low, _, _ = sum_of_exponentials(here, True, largest, None, col, count, scale, scale_low, False)
        save(here.states, chunk, SUM, total)
        save(here.states, chunk, LOW, low)


@device
def fold_exponentials(here, scale, scale_low):
    """The first members of Pull."""
    n_chunks = count_of_chunks(here.n_cols)
    row = fold_sum(here.states, n_chunks, here.zero, scale, scale_low)
    inverse = row_inverse(row_max(here.states, n_chunks, here.zero), row.sum, row.low)
    return row.shift, row.exponent, mul(inverse, scale)


@device
def write_gradients(here, first, last, pull, width, scale, scale_low):
    """Step 3 of a backward."""
    for chunk in range(first, last):
        col, count = chunk_range(here, chunk)
        ratio = chunk_ratio(here.states, chunk, pull.shift, pull.exponent, here.zero, scale, scale_low)
        write_chunk(gradient, (mul(ratio, pull.factor), pull, col, width, scale), here, col, count)


@device
def gradient(col, left, here, arguments):
    factor, pull, first, width, like = arguments
    probs = mul(load_cols(here.home, col, left, here.zeros), factor)
    value = mul(probs, pull_at(col, first, pull, width, here.zeros, like))
    return pulled_back_cols(value, col, left, here)


@device
def pull_at(col, first, pull, width, zeros, like):
    lines, places = positions(col, first, width, zeros, like)
    line, place = origin(first, width, like)
    value = mul(sub(add(places, place), pull.place), pull.per_place)
    if width is not None:
        value = fma(sub(add(lines, line), pull.line), pull.per_line, value)
    return value
