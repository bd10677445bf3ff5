"""One column of each row of logits, drawn with the probabilities of softmax(x / T), on the CPU.

    sample = argmax_c (x_c / T + g_c)          g_c Gumbel noise of the row's seed and step and of c

(the Gumbel-max trick: Yellott, "The relationship between Luce's choice axiom, Thurstone's theory of comparative
judgment, and the double exponential distribution", 1977). Scores are compared as x_c u + g_c T u, u a power of two.

One pass, no exponential, and hardly a logarithm: a column whose noise, bounded from above for a tenth of what it costs,
does not reach the best score so far is passed by. A maximum is the same in any order, so that threads, chunks and
vectors change no bit; of equal scores the first column wins.

With limits (threshold.py) the same is done to what is left of a row, after passes over it that find out what that is.
"""

import math

from gpusoftmax.kernels.cpu.arithmetic import (
    maximum,
)
from gpusoftmax.kernels.cpu.cache import device, kernel
from gpusoftmax.kernels.cpu.call import arguments
from gpusoftmax.kernels.cpu.lanes import (
    max_per_row,
)
from gpusoftmax.kernels.cpu.memory import (
    load_cols,
    pointer_to,
)
from gpusoftmax.kernels.cpu.noise import (
    any_reaches,
    first_equal,
    lowest,
    noise_scales_of,
    score,
    score_bound,
    where_equal,
    words_of,
)
from gpusoftmax.kernels.cpu.rows import chunk_range, count_of_chunks, nothing_first, row_offset, save_maxima
from gpusoftmax.kernels.cpu.run import run
from gpusoftmax.kernels.cpu.states import MAX, save, saved
from gpusoftmax.kernels.cpu.threshold import kept_from, limit_of, limit_of_own, nothing_measured, word_of
from gpusoftmax.kernels.cpu.vector import (
    cols_of,
    number,
    widest,
)
from gpusoftmax.kernels.cpu.walk import walk
from gpusoftmax.kernels.operands import (
    NO_LIMITS,
    Labels,
    Limits,
    Operand,
    Place,
    Rows,
    compute_dtype,
    have_own_numbers,
    limits_in,
    noise_scales,
    own_numbers,
    scale_of,
    unless_one,
)

# The best column of a chunk: its score, and its number from the chunk's first column on.
SCORE, SCORE_LOW, COLUMN = range(MAX + 1, MAX + 4)


def sample(
    rows: Rows,
    logits: Operand,
    seeds: Labels,
    steps: Labels,
    ids: Labels,
    temperature: float | Operand,
    limits: Limits,
    place: Place,
) -> None:
    """temperature 0: the largest logit. ids are int64; -1 for a row that holds NaN or +inf, or nothing but -inf, and
    for one whose own numbers, where rows have such, are none.
    """
    compute = compute_dtype(logits.dtype)
    if have_own_numbers(temperature, limits):
        own = own_numbers(temperature, limits, compute)
        keeps = limits.top_p != 1
        run(
            *(sample_mixed_rows, rows, logits, None, None, seeds, steps, ids, *own),
            whole_rows=True,
            keeps_exponentials=keeps,
        )
        return
    numbers = seeds, steps, ids, *noise_scales(temperature, compute)
    if limits == NO_LIMITS or temperature == 0:
        run(sample_rows, rows, logits, None, None, *numbers, only_along=True)
        return
    numbers = *numbers, *limits_in(limits, temperature, compute), *unless_one(scale_of(1.0, temperature, compute))
    keeps = limits.top_p < 1
    run(sample_kept_rows, rows, logits, None, None, *numbers, whole_rows=True, keeps_exponentials=keeps)


@kernel
def sample_rows(call):
    way, job, rows, logits, same, none, seeds, steps, ids, unit, noise = arguments(call)
    numbers = rows, seeds, steps, ids, unit, noise
    walk(way, job, rows, logits, same, none, nothing_first, measure, fold, write, numbers, unit)


@kernel
def sample_kept_rows(call):
    way, job, rows, logits, same, none, seeds, steps, ids, unit, noise, top_k, top_p, from_max, scale, low = arguments(
        call
    )
    numbers = rows, seeds, steps, ids, unit, noise, top_k, top_p, from_max, scale, low
    walk(way, job, rows, logits, same, none, save_maxima, nothing_measured, draw_kept, write, numbers, unit)


@kernel
def sample_mixed_rows(call):
    way, job, rows, logits, same, none, seeds, steps, ids, temperatures, t, top_k, top_ps, p, min_ps, m = arguments(
        call
    )
    numbers = rows, seeds, steps, ids, ((temperatures, t), top_k, (top_ps, p), (min_ps, m))
    walk(way, job, rows, logits, same, none, save_maxima, nothing_measured, draw_mixed, write, numbers, t)


@device
def draw_mixed(here, numbers):
    """As draw_kept, with the row's own numbers."""
    rows, seeds, steps, ids, own = numbers
    is_given, temperature, limit = limit_of_own(here, rows, own)
    if not is_given:
        return -1
    unit, noise = noise_scales_of(temperature)
    measure_kept(here, 0, count_of_chunks(here.n_cols), (rows, seeds, steps, ids, unit, noise), limit)
    return fold(here, numbers)


@device
def measure(here, first, last, numbers):
    measure_kept(here, first, last, numbers, None)


@device
def draw_kept(here, numbers):
    _, _, _, _, _, _, top_k, top_p, from_max, scale, low = numbers
    limit = limit_of(here, top_k, top_p, from_max, scale, low)
    measure_kept(here, 0, count_of_chunks(here.n_cols), numbers, limit)
    return fold(here, numbers)


@device
def measure_kept(here, first, last, numbers, limit):
    """The best column of each chunk, among those whose logits are at least the limit."""
    rows, seeds, steps, unit, noise = numbers[0], numbers[1], numbers[2], numbers[4], numbers[5]
    draw = word_of(seeds, here.row, rows), word_of(steps, here.row, rows), unit, noise
    for chunk in range(first, last):
        col, count = chunk_range(here, chunk)
        high, low, at = best_column(here, col, count, draw, limit)
        save(here.states, chunk, SCORE, high)
        save(here.states, chunk, SCORE_LOW, low)
        save(here.states, chunk, COLUMN, number(unit, at - col))


@device
def best_column(here, first, count, draw, limit):
    """(score, low, column) of the best of some columns."""
    unit = draw[2]
    cols = cols_of(widest(here.zeros))
    full = count - count % cols
    best = number(unit, -math.inf), number(unit, 0.0), first
    for col in range(first, first + full, cols):
        best = better_of(best, here, col, None, draw, limit)
    if full < count:
        best = better_of(best, here, first + full, count - full, draw, limit)
    return best


@device
def better_of(best, here, col, left, draw, limit):
    """The best column so far, or a better one of the vector at `col`."""
    seed, step, unit, noise = draw
    nothing = widest(here.nothing)
    x = kept_from(load_cols(here.first, col, left, nothing), limit)
    if limit is not None and not any_reaches(x, lowest(unit)):  # as a rule: noise is drawn for few
        return best
    words = words_of(col, seed, step, nothing)
    if any_reaches(score_bound(x, words, unit, noise), maximum(lowest(unit), best[0])):  # a score of -inf is none
        highs, lows = score(x, words, unit, noise)
        high = max_per_row(highs)
        lows = where_equal(highs, high, lows)
        low = max_per_row(lows)
        if high > best[0] or (high == best[0] and low > best[1]):
            best = high, low, col + first_equal(lows, low)
    return best


@device
def fold(here, numbers):
    """The best column of the row, -1 if there is none."""
    zero = here.zero
    best, best_low, at = number(zero, -math.inf), zero, -1
    for chunk in range(count_of_chunks(here.n_cols)):
        high, low = saved(here.states, chunk, SCORE, zero), saved(here.states, chunk, SCORE_LOW, zero)
        if high > best or (high == best and low > best_low):
            best, best_low, at = high, low, chunk_range(here, chunk)[0] + int(saved(here.states, chunk, COLUMN, zero))
    return -1 if best == number(zero, math.inf) else at


@device
def write(here, first, last, column, numbers):
    if first == 0:
        rows, ids = numbers[0], numbers[3]
        pointer_to(ids.pointer, ids.pointer)[row_offset(ids, here.row, rows)] = column
