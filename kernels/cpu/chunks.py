"""What is done to one chunk of a row: maxima, sums of exponentials, and the order in which a sum is taken.

    chunk     STRIP stripes | STRIP stripes | ...            CHUNK_COLS columns, the last chunk of a row shorter
    stripe    one vector along the row                       lane i sums the columns i, i + stripe, i + 2 stripe, ...

A lane adds STRIP columns as a tree and carries the rounding errors of what follows along (Kahan); the lanes are then
folded in halves. That tree belongs to the row, not to the vectors: where lanes are rows (`across`), the columns of one
lane of the stripe are added first, then those of the next, with the same results bit for bit.

Functions here take vectors of either kind. `here` is where a step is at work, see walk.py.
"""

from typing import NamedTuple

from gpusoftmax.kernels.cpu.cache import device
from gpusoftmax.kernels.cpu.vector import (
    add,
    add_if_above,
    all_equal,
    anchor,
    coarse_exp_from,
    cols_before_line,
    cols_of,
    compensated_add,
    exp_from,
    floor,
    lanes_of,
    load,
    load_cols,
    max_per_row,
    maximum,
    negative,
    power_of_two_ratio,
    prefetch_to_read,
    prefetch_to_write,
    ratio_of_anchors,
    set_ties_apart,
    store,
    store_cols,
    stream_cols,
    stripe_of,
    sum_per_row,
    weighted_distance,
)

# 8 KiB of float32: a chunk, its exponentials and what is prefetched of the next ones fit a 32 KiB L1 cache.
CHUNK_COLS = 2048
STRIP = 4


class Line(NamedTuple):
    """A row, or neighbouring rows side by side: column c of row i lies at pointer[c * step + i]."""

    pointer: object
    step: int


# ---------------------------------------------------------------- maxima


@device
def chunk_max(here, first, count):
    """The largest of `count` columns from `first` on: a number along a row, a vector across rows."""
    cols = cols_of(here.zeros)
    largest = here.nothing
    full = count - count % cols
    for col in range(first, first + full, cols):
        largest = maximum(largest, load_cols(here.first, col, None, here.nothing))
    if full < count:
        largest = maximum(largest, load_cols(here.first, first + full, count - full, here.nothing))
    return max_per_row(largest)


@device
def count_above(here, first, count, threshold):
    """How many of `count` columns from `first` on are larger: a number along a row, a vector across rows."""
    cols = cols_of(here.zeros)
    above = here.zeros
    full = count - count % cols
    for col in range(first, first + full, cols):
        above = add_if_above(above, load_cols(here.first, col, None, here.nothing), threshold)
    if full < count:
        above = add_if_above(above, load_cols(here.first, first + full, count - full, here.nothing), threshold)
    return sum_per_row(above)


# ---------------------------------------------------------------- sums


@device
def accumulate(total, error, part, is_coarse):
    """total - error with one more part: its rounding errors are carried along unless the sum is coarse."""
    if is_coarse:
        return add(total, part), error
    return compensated_add(total, error, part)


@device
def sum_stripe(term, arguments, first, count, phase, zero, is_coarse, beside):
    """The terms of the columns phase, phase + stripe, ... of a chunk, as (total, error), their ties, what is beside."""
    stripe = stripe_of(zero)
    strip = STRIP * stripe
    full = count - count % strip
    total, error, ties = zero, zero, zero
    part = zero
    last = phase + strip - stripe
    for k in range(phase, full, stripe):
        value, ties, more = term(first + k, None, ties, arguments)
        beside = add(beside, more)
        part = add(part, value)
        if k == last:
            total, error = accumulate(total, error, part, is_coarse)
            part = zero
            last += strip
    for k in range(full, count, stripe):
        value = zero
        if k + phase < count:
            value, ties, more = term(first + k + phase, count - k - phase, ties, arguments)
            beside = add(beside, more)
        total, error = accumulate(total, error, value, is_coarse)
    return total, error, ties, beside


@device
def sum_chunk(term, arguments, first, count, zero, partials, is_coarse=False, beside=None):
    """(sum, low, ties, beside) over the columns of a chunk. term(col, left, ties, arguments) -> vector, ties, more.

    is_coarse: a constant. For results of sixteen bits, which show no rounding error of a sum in float32. beside: zeros
    where a second sum, of `more`, is taken along, coarsely; None where there is none.
    """
    if partials is None and count <= stripe_of(zero):  # one term each, nothing to round
        total, ties, beside = term(first, count, zero, arguments)
        return sum_per_row(total), sum_per_row(zero), sum_per_row(ties), sum_per_row(beside)
    if partials is None:
        total, error, ties, beside = sum_stripe(term, arguments, first, count, 0, zero, is_coarse, beside)
        return sum_per_row(total), sum_per_row(negative(error)), sum_per_row(ties), sum_per_row(beside)
    lanes = lanes_of(zero)
    stripe = stripe_of(zero)
    ties = zero
    n_phases = min(stripe, count)
    for phase in range(n_phases):
        if count <= stripe:  # one term each, nothing to round
            total, ties, more = term(first + phase, 1, ties, arguments)
        else:
            total, error, more_ties, more = sum_stripe(term, arguments, first, count, phase, zero, is_coarse, beside)
            ties = add(ties, more_ties)
            store(partials, (stripe + phase) * lanes, error)
        store(partials, phase * lanes, total)
        store(partials, (2 * stripe + phase) * lanes, more)
    # As the lanes of a vector are folded: the upper half of what there is on the lower one.
    half = stripe // 2
    while half > 0:
        for k in range(half * lanes, min(n_phases, 2 * half) * lanes, lanes):
            fold_partial(partials, k - half * lanes, k, zero)
            if count > stripe:
                fold_partial(partials, k + (stripe - half) * lanes, k + stripe * lanes, zero)
            if beside is not None:
                fold_partial(partials, k + (2 * stripe - half) * lanes, k + 2 * stripe * lanes, zero)
        half //= 2
    low = zero if count <= stripe else negative(load(partials, stripe * lanes, zero))
    return load(partials, 0, zero), low, ties, load(partials, 2 * stripe * lanes, beside)


@device
def fold_partial(partials, one, other, zero):
    store(partials, one, add(load(partials, one, zero), load(partials, other, zero)))


# ---------------------------------------------------------------- exponentials


@device
def exponential(col, left, ties, arguments):
    """exp of the columns relative to the chunk's anchor, left in `home`; where `largest` is given, a logit that equals
    it is counted in `ties` instead of added.
    """
    here, home, largest, shift, exponent, low, scale, scale_low, is_coarse = arguments
    prefetch_to_read(here.first, col + CHUNK_COLS, here.zeros)
    prefetch_to_write(home, col + CHUNK_COLS, here.zeros)
    x = load_cols(here.first, col, left, here.nothing)
    if is_coarse:
        e = coarse_exp_from(x, shift, exponent, low, scale, scale_low)
    else:
        e = exp_from(x, shift, exponent, low, scale, scale_low)
    store_cols(home, col, left, e)
    e, ties = set_ties_apart(e, x, ties, largest)
    return e, ties, None


@device
def sum_of_exponentials(here, home, largest, ties_of, first, count, scale, scale_low, is_coarse):
    """What sum_chunk gives of a chunk's exponentials, relative to the anchor of its maximum `largest`.

    ties_of: the maximum again, if logits that equal it are to be counted instead of added, or None. home: where the
    exponentials are left, or None. is_coarse: a constant, see sum_chunk.
    """
    shift, exponent = anchor(largest, scale)
    arguments = here, home, ties_of, shift, exponent, floor(exponent), scale, scale_low, is_coarse
    return sum_chunk(exponential, arguments, first, count, here.zeros, here.partials, is_coarse)


@device
def exponential_and_distance(col, left, ties, arguments):
    """exponential, and beside it the exponential times the distance to the maximum, which is 0 for those that tie."""
    here, _, largest, _, _, _, scale, scale_low, _ = arguments
    e, ties, _ = exponential(col, left, ties, arguments)
    x = load_cols(here.first, col, left, here.nothing)
    return e, ties, weighted_distance(e, x, largest, scale, scale_low)


@device
def sum_of_distances(here, largest, first, count, scale, scale_low):
    """What sum_chunk gives of a chunk's exponentials, ties apart, and beside it the sum of exponential_and_distance."""
    shift, exponent = anchor(largest, scale)
    arguments = here, None, largest, shift, exponent, floor(exponent), scale, scale_low, False
    return sum_chunk(exponential_and_distance, arguments, first, count, here.zeros, here.partials, False, here.zeros)


@device
def ratio(shift, exponent, other_shift, other_exponent, scale, scale_low):
    """What brings exponentials from one anchor to another, see formulas.anchor."""
    if all_equal(shift, other_shift):
        return power_of_two_ratio(exponent, other_exponent)
    return ratio_of_anchors(shift, exponent, other_shift, other_exponent, scale, scale_low)


# ---------------------------------------------------------------- results


@device
def write_chunk(value, arguments, here, first, count):
    """target[col] = value(col, left, here, arguments), a vector, for the columns of a chunk."""
    cols = cols_of(here.zeros)
    if here.streamed:
        head = min(count, cols_before_line(here.target, first))
        if head > 0:
            store_cols(here.target, first, head, value(first, head, here, arguments))
        first, count = first + head, count - head
    full = count - count % cols
    if here.streamed:
        for col in range(first, first + full, cols):
            stream_cols(here.target, col, value(col, None, here, arguments))
    else:
        for col in range(first, first + full, cols):
            prefetch_to_write(here.target, col + CHUNK_COLS, here.zeros)
            store_cols(here.target, col, None, value(col, None, here, arguments))
    if full < count:
        left = count - full
        store_cols(here.target, first + full, left, value(first + full, left, here, arguments))
