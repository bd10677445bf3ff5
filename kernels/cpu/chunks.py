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


# ---------------------------------------------------------------- sums


@device
def accumulate(total, error, part, is_coarse):
    """total - error with one more part: its rounding errors are carried along unless the sum is coarse."""
    if is_coarse:
        return add(total, part), error
    return compensated_add(total, error, part)


@device
def sum_stripe(term, arguments, first, count, phase, zero, is_coarse):
    """The terms of the columns phase, phase + stripe, ... of a chunk, as (total, error), and their ties."""
    stripe = stripe_of(zero)
    strip = STRIP * stripe
    full = count - count % strip
    total, error, ties = zero, zero, zero
    part = zero
    last = phase + strip - stripe
    for k in range(phase, full, stripe):
        value, ties = term(first + k, None, ties, arguments)
        part = add(part, value)
        if k == last:
            total, error = accumulate(total, error, part, is_coarse)
            part = zero
            last += strip
    for k in range(full, count, stripe):
        value = zero
        if k + phase < count:
            value, ties = term(first + k + phase, count - k - phase, ties, arguments)
        total, error = accumulate(total, error, value, is_coarse)
    return total, error, ties


@device
def sum_chunk(term, arguments, first, count, zero, partials, is_coarse=False):
    """(sum, low, ties) over the columns of a chunk. term(col, left, ties, arguments) -> vector, ties.

    is_coarse: a constant. For results of sixteen bits, which show no rounding error of a sum in float32.
    """
    if partials is None and count <= stripe_of(zero):  # one term each, nothing to round
        total, ties = term(first, count, zero, arguments)
        return sum_per_row(total), sum_per_row(zero), sum_per_row(ties)
    if partials is None:
        total, error, ties = sum_stripe(term, arguments, first, count, 0, zero, is_coarse)
        return sum_per_row(total), sum_per_row(negative(error)), sum_per_row(ties)
    lanes = lanes_of(zero)
    stripe = stripe_of(zero)
    ties = zero
    n_phases = min(stripe, count)
    for phase in range(n_phases):
        if count <= stripe:  # one term each, nothing to round
            total, ties = term(first + phase, 1, ties, arguments)
        else:
            total, error, more = sum_stripe(term, arguments, first, count, phase, zero, is_coarse)
            ties = add(ties, more)
            store(partials, (stripe + phase) * lanes, error)
        store(partials, phase * lanes, total)
    # As the lanes of a vector are folded: the upper half of what there is on the lower one.
    half = stripe // 2
    while half > 0:
        for k in range(half * lanes, min(n_phases, 2 * half) * lanes, lanes):
            low = k - half * lanes
            store(partials, low, add(load(partials, low, zero), load(partials, k, zero)))
            if count > stripe:
                low += stripe * lanes
                store(partials, low, add(load(partials, low, zero), load(partials, k + stripe * lanes, zero)))
        half //= 2
    low = zero if count <= stripe else negative(load(partials, stripe * lanes, zero))
    return load(partials, 0, zero), low, ties


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
    return set_ties_apart(e, x, ties, largest)


@device
def sum_of_exponentials(here, home, largest, ties_of, first, count, scale, scale_low, is_coarse):
    """(sum, low, ties) of a chunk, relative to the anchor of its maximum `largest`.

    ties_of: the maximum again, if logits that equal it are to be counted instead of added, or None. home: where the
    exponentials are left, or None. is_coarse: a constant, see sum_chunk.
    """
    shift, exponent = anchor(largest, scale)
    arguments = here, home, ties_of, shift, exponent, floor(exponent), scale, scale_low, is_coarse
    return sum_chunk(exponential, arguments, first, count, here.zeros, here.partials, is_coarse)


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
