"""One column of each row of logits, drawn with the probabilities of softmax(x / T), on the CPU.

    sample = argmax_c (x_c / T + g_c)          g_c Gumbel noise of the row's seed and step and of c

(the Gumbel-max trick: Yellott, "The relationship between Luce's choice axiom, Thurstone's theory of comparative
judgment, and the double exponential distribution", 1977). Scores are compared as x_c u + g_c T u, u a power of two.

One pass, no exponential, and hardly a logarithm: a column whose noise, bounded from above for a tenth of what it costs,
does not reach the best score so far is passed by. A maximum is the same in any order, so that threads, chunks and
vectors change no bit; of equal scores the first column wins.
"""

import math

from gpusoftmax.kernels.cpu.cache import device, kernel
from gpusoftmax.kernels.cpu.call import arguments
from gpusoftmax.kernels.cpu.noise import any_reaches, first_equal, lowest, score, score_bound, where_equal, words_of
from gpusoftmax.kernels.cpu.rows import chunk_range, count_of_chunks, nothing_first, row_offset
from gpusoftmax.kernels.cpu.run import run
from gpusoftmax.kernels.cpu.states import save, saved
from gpusoftmax.kernels.cpu.vector import cols_of, load_cols, load_label, max_per_row, maximum, number, pointer_to
from gpusoftmax.kernels.cpu.walk import walk
from gpusoftmax.kernels.operands import ONE_VALUE, Labels, Operand, Place, Rows, noise_scales

# The best column of a chunk: its score, and its number from the chunk's first column on.
SCORE, SCORE_LOW, COLUMN = range(3)


def sample(
    rows: Rows, logits: Operand, seeds: Labels, steps: Labels, ids: Labels, temperature: float, place: Place
) -> None:
    """temperature 0: the largest logit. ids are int64; -1 for a row that holds NaN or +inf, or nothing but -inf."""
    compute = "float64" if logits.dtype == "float64" else "float32"
    run(
        sample_rows,
        rows,
        logits,
        None,
        None,
        seeds,
        steps,
        ids,
        *noise_scales(temperature, compute),
        only_along=True,
    )


@kernel
def sample_rows(call):
    way, job, rows, logits, same, none, seeds, steps, ids, unit, noise = arguments(call)
    numbers = rows, seeds, steps, ids, unit, noise
    walk(way, job, rows, logits, same, none, nothing_first, measure, fold, write, numbers, unit)


@device
def word_of(labels, row, rows):
    """A row's own integer, or the one of all rows."""
    if labels.code == ONE_VALUE:
        return labels.pointer
    return load_label(labels.pointer, row_offset(labels, row, rows), labels.code)


@device
def measure(here, first, last, numbers):
    rows, seeds, steps, _, unit, noise = numbers
    seed, step = word_of(seeds, here.row, rows), word_of(steps, here.row, rows)
    for chunk in range(first, last):
        col, count = chunk_range(here, chunk)
        high, low, at = best_column(here, col, count, seed, step, unit, noise)
        save(here.states, chunk, SCORE, high)
        save(here.states, chunk, SCORE_LOW, low)
        save(here.states, chunk, COLUMN, number(unit, at - col))


@device
def best_column(here, first, count, seed, step, unit, noise):
    """(score, low, column) of the best of some columns."""
    cols = cols_of(here.zeros)
    full = count - count % cols
    best = number(unit, -math.inf), number(unit, 0.0), first
    for col in range(first, first + full, cols):
        best = better_of(best, here, col, None, seed, step, unit, noise)
    if full < count:
        best = better_of(best, here, first + full, count - full, seed, step, unit, noise)
    return best


@device
def better_of(best, here, col, left, seed, step, unit, noise):
    """The best column so far, or a better one of the vector at `col`."""
    x = load_cols(here.first, col, left, here.nothing)
    words = words_of(col, seed, step, here.zeros)
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
    rows, _, _, ids, _, _ = numbers
    if first == 0:
        pointer_to(ids.pointer, ids.pointer)[row_offset(ids, here.row, rows)] = column
