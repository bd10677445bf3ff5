"""What is done to one chunk of a row: maxima, sums of exponentials, and the order in which a sum is taken.

    chunk     STRIP stripes | STRIP stripes | ...            CHUNK_COLS columns, the last chunk of a row shorter
    stripe    one vector along the row                       lane i sums the columns i, i + stripe, i + 2 stripe, ...

A lane adds STRIP columns as a tree and carries the rounding errors of what follows along (Kahan); the lanes are then
folded in halves. That tree belongs to the row, not to the vectors: where lanes are rows (`across`), the columns of one
lane of the stripe are added first, then those of the next, with the same results bit for bit.

Functions here take vectors of either kind. `here` is where a step is at work, see walk.py. In blocks they go through
the rows of the block one by one, along each: what differs from row to row comes and goes as a vector, a row in each
lane. Rows of a block do not wait for each other, and what a row's vector is folded into is left in a register until
there are enough of them to be folded together.
"""

from gpusoftmax.kernels.cpu.arithmetic import (
    add,
    anchor,
    coarse_exp_from,
    compensated_add,
    counted_above,
    exp_from,
    finite_distance,
    floor,
    fma,
    kahan_add,
    maximum,
    negative,
    power_of_two_ratio,
    ratio_of_anchors,
    set_ties_apart,
    sub,
)
from gpusoftmax.kernels.cpu.cache import device
from gpusoftmax.kernels.cpu.here import by_way, line_in, register_in, row_in
from gpusoftmax.kernels.cpu.lanes import (
    all_equal,
    fold_max,
    fold_sums,
    max_per_row,
    save_lanes,
    save_max,
    save_sum,
    saved_lane,
    sum_per_row,
)
from gpusoftmax.kernels.cpu.memory import (
    advance,
    cols_before_line,
    load,
    load_cols,
    load_unordered,
    prefetch_to_read,
    prefetch_to_write,
    store,
    store_cols,
    stream_cols,
)
from gpusoftmax.kernels.cpu.vector import (
    cols_of,
    is_across,
    lanes_of,
    number,
    square_of,
    stripe_of,
    unless_none,
)

# 8 KiB of float32: a chunk, its exponentials and what is prefetched of the next ones fit a 32 KiB L1 cache.
CHUNK_COLS = 2048
STRIP = 4
# What becomes of a sum's rounding errors: they are left behind, for results of sixteen bits, which show none of a sum
# in float32; or carried along, where terms are finite or NaN, as exponentials are; or where they may be anything.
COARSE, FINITE, ANY = range(3)
# What is left of the columns of the rows of a block: a register of each row for each of these.
SUMS, LOWS, OTHERS, BESIDE, REGISTERS = range(5)


# ---------------------------------------------------------------- maxima


@device
def max_of_cols(line, here, first, count):
    cols = cols_of(here.zeros)
    largest = here.nothing
    full = count - count % cols
    for col in range(first, first + full, cols):
        largest = maximum(largest, load_unordered(line, col, here.nothing))
    if full < count:
        largest = maximum(largest, load_cols(line, first + full, count - full, here.nothing))
    return largest


def _max_of_row(here, first, count):
    return max_per_row(max_of_cols(here.first, here, first, count))


def _max_in_block(here, first, count):
    for k in range(here.n_rows):
        save_max(register_in(here, 0, k), max_of_cols(line_in(here.first, k), here, first, count))
    for k in range(0, here.n_rows, square_of(here.zero)):
        fold_max(register_in(here, 0, k), advance(here.partials, k))
    return load(here.partials, 0, here.zero)


# The largest of `count` columns from `first` on: a number along a row, else a vector of them.
chunk_max = by_way(_max_of_row, _max_of_row, _max_in_block)


@device
def max_and_above(line, here, first, count, threshold):
    """(largest, how many are larger than the threshold), per lane."""
    cols = cols_of(here.zeros)
    largest, n_above, threshold = here.nothing, here.zeros, add(here.zeros, threshold)
    full = count - count % cols
    for col in range(first, first + full, cols):
        x = load_unordered(line, col, here.nothing)
        largest, n_above = maximum(largest, x), counted_above(n_above, x, threshold)
    if full < count:
        x = load_cols(line, first + full, count - full, here.nothing)
        largest, n_above = maximum(largest, x), counted_above(n_above, x, threshold)
    return largest, n_above


def _max_and_above_of_row(here, first, count, threshold):
    largest, n_above = max_and_above(here.first, here, first, count, threshold)
    return max_per_row(largest), sum_per_row(n_above)


def _max_and_above_in_block(here, first, count, threshold):
    save_lanes(here.stage, threshold)
    for k in range(here.n_rows):
        of_row = saved_lane(here.stage, k, threshold)
        largest, n_above = max_and_above(line_in(here.first, k), here, first, count, of_row)
        save_max(register_in(here, LOWS, k), largest)
        save_sum(register_in(here, SUMS, k), n_above)
    for k in range(0, here.n_rows, square_of(here.zero)):
        fold_max(register_in(here, LOWS, k), advance(register_in(here, LOWS, 0), k))
    return load(register_in(here, LOWS, 0), 0, here.zero), sums_of_rows(here, SUMS, here.zero)


# As chunk_max, and how many of the columns are larger than a threshold for each row.
chunk_max_and_above = by_way(_max_and_above_of_row, _max_and_above_of_row, _max_and_above_in_block)


# ---------------------------------------------------------------- sums


@device
def accumulate(total, error, part, terms):
    """total - error with one more part."""
    if terms == COARSE:
        return add(total, part), error
    if terms == FINITE:
        return kahan_add(total, error, part)
    return compensated_add(total, error, part)


@device
def plus_product(beside, value, more):
    if beside is None:
        return beside
    return fma(value, more, beside)


@device
def plus_term(term, here, arguments, col, left, part, others, beside):
    """A part of a sum, the others and what is beside, with the vector of a column."""
    value, others, more = term(col, left, others, here, arguments)
    return add(part, value), others, plus_product(beside, value, more)


@device
def sum_strips(term, here, arguments, first, count, terms, beside):
    """sum_stripe along a row. A strip is straight code here; where rows are short, what that takes of registers is
    spilled around them.
    """
    zero = here.zeros
    stripe = stripe_of(zero)
    strip = STRIP * stripe
    total, error, others = zero, zero, zero
    in_strips, whole = count - count % strip, count - count % stripe
    for k in range(first, first + in_strips, strip):
        part = zero
        for m in range(STRIP):
            part, others, beside = plus_term(term, here, arguments, k + m * stripe, None, part, others, beside)
        total, error = accumulate(total, error, part, terms)
    if in_strips == count:
        return total, error, others, beside
    part = zero
    for k in range(first + in_strips, first + whole, stripe):
        part, others, beside = plus_term(term, here, arguments, k, None, part, others, beside)
    if whole < count:
        part, others, beside = plus_term(
            term, here, arguments, first + whole, count - whole, part, others, beside
        )  # fmt: skip
    if count < strip:
        return part, error, others, beside
    total, error = accumulate(total, error, part, terms)
    return total, error, others, beside


@device
def sum_stripe(term, here, arguments, first, count, phase, least, terms, beside):
    """The terms of the columns phase, phase + stripe, ... of a chunk, as (total, error), the others, what is beside.

    least: of the columns that fill vectors, so many are there at least. Where LLVM knows that a loop is entered, it
    takes what stays the same in it, the constants of an exponential among that, out of the loop over rows around it.
    """
    zero = here.zeros
    stripe = stripe_of(zero)
    strip = STRIP * stripe
    whole = max(count - count % stripe, least)
    total, error, others = zero, zero, zero
    part = zero
    last = phase + strip - stripe
    for k in range(phase, whole, stripe):
        part, others, beside = plus_term(term, here, arguments, first + k, None, part, others, beside)
        if k == last:
            total, error = accumulate(total, error, part, terms)
            part = zero
            last += strip
    if whole < count:
        if whole + phase < count:
            part, others, beside = plus_term(
                term, here, arguments, first + whole + phase, count - whole - phase, part, others, beside
            )  # fmt: skip
        else:
            part = add(part, zero)
    if count < strip:
        total = part
    elif count % strip != 0:
        total, error = accumulate(total, error, part, terms)
    return total, error, others, beside


@device
def has_errors(here, count):
    """Whether a sum over so many columns may have left any."""
    return count > STRIP * stripe_of(here.zeros)


def _sum_along(term, here, arguments, first, count, terms=ANY, has_others=False, beside=None):
    total, error, others, beside = sum_strips(term, here, arguments, first, count, terms, beside)
    return sum_per_row(total), negative(sum_per_row(error)), sum_per_row(others), sum_per_row(beside)


def _sum_in_block(term, here, arguments, first, count, terms=ANY, has_others=False, beside=None):
    zero = here.zeros
    stripe = stripe_of(zero)
    has_low = has_errors(here, count)
    save_lanes(here.stage, arguments)
    if count < stripe:
        for k in range(here.n_rows):
            total, others, products = plus_term(
                term, row_in(here, k), saved_lane(here.stage, k, arguments), first, count, zero, zero, beside
            )
            save_sums(here, k, total, zero, others, products, False, has_others)
    else:
        for k in range(here.n_rows):
            total, error, others, products = sum_stripe(
                term, row_in(here, k), saved_lane(here.stage, k, arguments), first, count, 0, stripe, terms, beside
            )
            save_sums(here, k, total, error, others, products, has_low, has_others)
    low = negative(sums_of_rows(here, LOWS, here.zero)) if has_low else here.zero
    others = sums_of_rows(here, OTHERS, here.zero) if has_others else here.zero
    return sums_of_rows(here, SUMS, here.zero), low, others, sums_of_rows(here, BESIDE, unless_none(beside, here.zero))


@device
def save_sums(here, k, total, error, others, products, has_low, has_others):
    save_sum(register_in(here, SUMS, k), total)
    save_sum(register_in(here, BESIDE, k), products)
    if has_low:
        save_sum(register_in(here, LOWS, k), error)
    if has_others:
        save_sum(register_in(here, OTHERS, k), others)


@device
def sums_of_rows(here, which, like):
    result = register_in(here, which, 0)
    if like is not None:
        for k in range(0, here.n_rows, square_of(here.zero)):
            fold_sums(register_in(here, which, k), advance(result, k))
    return load(result, 0, like)


def _sum_across(term, here, arguments, first, count, terms=ANY, has_others=False, beside=None):
    zero, partials = here.zeros, here.partials
    if count == 0:  # nothing would be stored of what is loaded at the end
        return zero, zero, zero, beside
    lanes = lanes_of(zero)
    stripe = stripe_of(zero)
    others = zero
    n_phases = min(stripe, count)
    has_low = has_errors(here, count)
    for phase in range(n_phases):
        if count <= stripe:  # one term each
            total, others, more = term(first + phase, 1, others, here, arguments)
            products = plus_product(beside, total, more)
        else:
            total, error, more_others, products = sum_stripe(
                term, here, arguments, first, count, phase, 0, terms, beside
            )
            others = add(others, more_others)
            if has_low:
                store(partials, (stripe + phase) * lanes, error)
        store(partials, phase * lanes, total)
        store(partials, (2 * stripe + phase) * lanes, products)
    # As the lanes of a vector are folded: the upper half of what there is on the lower one.
    half = stripe // 2
    while half > 0:
        for k in range(half * lanes, min(n_phases, 2 * half) * lanes, lanes):
            fold_partial(partials, k - half * lanes, k, zero)
            if has_low:
                fold_partial(partials, k + (stripe - half) * lanes, k + stripe * lanes, zero)
            if beside is not None:
                fold_partial(partials, k + (2 * stripe - half) * lanes, k + 2 * stripe * lanes, zero)
        half //= 2
    low = negative(load(partials, stripe * lanes, zero)) if has_low else zero
    return load(partials, 0, zero), low, others, load(partials, 2 * stripe * lanes, beside)


@device
def fold_partial(partials, one, other, zero):
    store(partials, one, add(load(partials, one, zero), load(partials, other, zero)))


# (sum, low, others, beside) over the columns of a chunk.
# term(col, left, others, here, arguments) -> a vector, the others counted so far, and more, a vector or None.
# terms: a constant, COARSE, FINITE or ANY.
# has_others: a constant. Whether `term` counts any.
# beside: zeros where a second sum, of the terms times `more`, is taken along, coarsely; None where there is none.
sum_chunk = by_way(_sum_along, _sum_across, _sum_in_block)


# ---------------------------------------------------------------- exponentials


@device
def exponential(col, left, others, here, arguments):
    """exp of the columns relative to the chunk's anchor; where `largest` is given, a logit that equals it is not added,
    and the others are counted.
    """
    largest, shift, exponent, low, scale, scale_low, is_kept, is_written, is_coarse = arguments
    prefetch_to_read(here.ahead.first, col, here.zeros)
    if is_written and here.is_cached:
        # While there is much to compute, and not when all of it has to be written.
        prefetch_to_write(here.ahead.target, col, here.zeros)
    x = load_cols(here.first, col, left, here.nothing)
    if is_coarse:
        e = coarse_exp_from(x, shift, exponent, low, scale, scale_low)
    else:
        e = exp_from(x, shift, exponent, low, scale, scale_low)
    if is_kept:
        store_cols(here.home, col, left, e)
    e, others = set_ties_apart(e, x, others, largest)
    return e, others, None


@device
def sum_of_exponentials(
    here, is_kept, largest, ties_of, first, count, scale, scale_low, is_coarse, is_written=False
):  # fmt: skip
    """What sum_chunk gives of a chunk's exponentials, relative to the anchor of its maximum `largest`, with the ties.

    is_kept: a constant, whether the exponentials are left in here.home until results are written. ties_of: the maximum
    again, if logits that equal it are to be counted instead of added, or None. is_coarse: a constant, whether results
    have sixteen bits. is_written: a constant, whether there will be one for each column although no exponentials are
    kept.
    """
    shift, exponent = anchor(largest, scale)
    is_written = is_kept or is_written
    arguments = ties_of, shift, exponent, floor(exponent), scale, scale_low, is_kept, is_written, is_coarse
    terms = COARSE if is_coarse else FINITE
    sums = sum_chunk(exponential, here, arguments, first, count, terms, ties_of is not None)
    return with_ties(sums, here, count, ties_of)


@device
def with_ties(sums, here, count, ties_of):
    """What sum_chunk gives, with those that tie in place of the others. What fills up a vector is among the others, or
    among the ties where the chunk is nothing but -inf, of which no sum makes anything.
    """
    if ties_of is None:
        return sums
    total, low, others, beside = sums
    cols = cols_of(here.zeros)
    return total, low, sub(number(here.zero, (count + cols - 1) // cols * cols), others), beside


@device
def exponential_and_distance(col, left, others, here, arguments):
    """exponential, and what it is multiplied by beside: the distance to the maximum."""
    e, others, _ = exponential(col, left, others, here, arguments)
    largest, shift, _, low, scale, scale_low, _, _, _ = arguments
    x = load_cols(here.first, col, left, here.nothing)
    return e, others, finite_distance(x, shift, low, largest, scale, scale_low)


@device
def sum_of_distances(here, largest, first, count, scale, scale_low):
    """What sum_chunk gives of a chunk's exponentials, ties apart, and beside it the sum of exponential_and_distance."""
    shift, exponent = anchor(largest, scale)
    arguments = largest, shift, exponent, floor(exponent), scale, scale_low, False, False, False
    # Not FINITE, although they are: with a sum beside them that took a little longer (kernels/README.md).
    sums = sum_chunk(exponential_and_distance, here, arguments, first, count, ANY, True, here.zeros)
    return with_ties(sums, here, count, largest)


@device
def ratio(shift, exponent, other_shift, other_exponent, scale, scale_low):
    """What brings exponentials from one anchor to another, see formulas.anchor."""
    if all_equal(shift, other_shift):
        return power_of_two_ratio(exponent, other_exponent)
    return ratio_of_anchors(shift, exponent, other_shift, other_exponent, scale, scale_low)


@device
def fetch_both(here, col):
    """Asks for what will be read at a column of both arrays, for an op that begins with a sum over them."""
    if is_across(here.zeros):
        prefetch_to_read(here.ahead.first, col, here.zeros)
        prefetch_to_read(here.ahead.second, col, here.zeros)
    else:  # no maximum comes in between: one chunk ahead (two chunks, softmax_backward: 1.03 to 1.06 of the time)
        prefetch_to_read(here.first, col + CHUNK_COLS, here.zeros)
        prefetch_to_read(here.second, col + CHUNK_COLS, here.zeros)


# ---------------------------------------------------------------- results


@device
def write_cols(value, arguments, here, first, count, again):
    cols = cols_of(here.zeros)
    if here.streamed:
        head = min(count, cols_before_line(here.target, first))
        if head > 0:
            store_cols(here.target, first, head, value(first, head, here, arguments))
        first, count = first + head, count - head
    full = count - count % cols
    if here.streamed:
        start, end = first, first + full
        stop = cols_before(again, here, arguments, start, end)
        if stop < end:
            prefetch_to_write(here.target, stop, here.zeros)
        while True:
            for col in range(start, stop, cols):
                stream_cols(here.target, col, value(col, None, here, arguments))
            if stop == end:
                break
            store_cols(here.target, stop, None, value(stop, None, here, arguments))
            start, stop = stop + cols, end
    else:
        for col in range(first, first + full, cols):
            if here.is_cached:
                prefetch_to_write(here.ahead.target, col, here.zeros)
            store_cols(here.target, col, None, value(col, None, here, arguments))
    if full < count:
        left = count - full
        store_cols(here.target, first + full, left, value(first + full, left, here, arguments))


@device
def cols_before(again, here, arguments, start, end):
    """Where the vector of the column that is written again begins, of those from start to end; else end."""
    if again is None:
        return end
    col = again(here, arguments)
    return col - (col - start) % cols_of(here.zeros) if start <= col and col < end else end


def _write_rows(value, arguments, here, first, count, again=None):
    write_cols(value, arguments, here, first, count, again)


def _write_block(value, arguments, here, first, count, again=None):
    save_lanes(here.stage, arguments)
    for k in range(here.n_rows):
        write_cols(value, saved_lane(here.stage, k, arguments), row_in(here, k), first, count, again)


# target[col] = value(col, left, here, arguments), a vector, for the columns of a chunk.
# again(here, arguments) -> a column that will be written again at once: it would come back from memory for that if it
# were written past the caches.
write_chunk = by_way(_write_rows, _write_rows, _write_block)
