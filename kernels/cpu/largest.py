"""The k largest logits of a row, in order.

    short rows   up to 8 by a sorting network (few_largest.py); else k times the largest of a copy, in which it is then
                 replaced by a NaN
    long rows    kept in order while the row is read: a vector of columns is looked at closer only if one of them is
                 larger than the last that is kept. Where there are fewer than k so far, a NaN at the end stands for
                 none. Many are kept as a heap, the last one at its top, and put in order at the end of the row

Equal logits stay in the order of their columns.
"""

import math

from gpusoftmax.kernels.cpu.arithmetic import (
    maximum,
)
from gpusoftmax.kernels.cpu.cache import device
from gpusoftmax.kernels.cpu.few_largest import FEW, LAST_COLUMN, take_few
from gpusoftmax.kernels.cpu.here import Line
from gpusoftmax.kernels.cpu.lanes import (
    add_at,
    lanes_equal,
    lanes_not_below,
    lowest_bit,
    max_per_row,
)
from gpusoftmax.kernels.cpu.memory import (
    load,
    load_cols,
    numbers_on_stack,
    store,
    store_cols,
)
from gpusoftmax.kernels.cpu.vector import (
    number,
    size_of,
    stripe_of,
    widest,
)

# As many logits are gone over faster than a few are put where they belong (Zen 4, 8 of 64: 4 times as fast).
SHORT = 512
# To move as many at each insertion takes longer than a heap (Zen 5, 1000 of 151936: 1.6 ms; in ascending order 58).
MANY = 128


@device
def find_largest(here, first, count, values, columns, k, like):
    """The k largest of the columns before and of these, which are a chunk, go to values and columns, or stay there."""
    if k <= FEW and here.n_cols <= LAST_COLUMN + 1 and size_of(like) == 4:
        take_few(here, values, columns, k, like)
    elif here.n_cols <= SHORT:
        take_in_turn(here, values, columns, k, like)
    else:
        if first == 0:
            begin_largest(values, columns, k, like)
        take_largest(here, first, count, values, columns, k, like)
        if k > MANY and first + count == here.n_cols:
            put_in_order(values, columns, k, like)


# ---------------------------------------------------------------- short rows


@device
def take_in_turn(here, values, columns, k, like):
    nothing = widest(here.nothing)
    step = stripe_of(nothing)
    copy = Line(numbers_on_stack(SHORT, like), 1, 0)  # whole vectors, with -inf behind the last column
    largest = nothing
    for col in range(0, here.n_cols, step):
        x = load_cols(here.first, col, min(step, here.n_cols - col), nothing)
        store_cols(copy, col, None, x)
        largest = maximum(largest, x)
    for j in range(k):
        value = max_per_row(largest)
        at, largest = -1, nothing
        for col in range(0, here.n_cols, step):
            x = load_cols(copy, col, None, nothing)
            if at < 0:
                found = lanes_equal(x, value)
                if found != 0:
                    at = col + lowest_bit(found)
                    x = add_at(x, lowest_bit(found), number(like, math.nan))
                    store_cols(copy, col, None, x)
            largest = maximum(largest, x)
        if at < 0 or at >= here.n_cols:  # in a row of NaN
            at = 0
        columns[j] = at
        store(values, j, load(here.first.pointer, at, like))


# ---------------------------------------------------------------- long rows


@device
def begin_largest(values, columns, k, like):
    """None yet."""
    for j in range(k):
        store(values, j, number(like, math.nan))
        columns[j] = -1


@device
def take_largest(here, first, count, values, columns, k, like):
    """The k largest of the columns before and of these; a NaN stands for none yet."""
    step = stripe_of(here.zeros)
    full = first + count - count % step
    for col in range(first, full, step):
        take_from_vector(here, col, load_cols(here.first, col, None, here.nothing), step, values, columns, k, like)
    left = first + count - full
    if left > 0:
        take_from_vector(here, full, load_cols(here.first, full, left, here.nothing), left, values, columns, k, like)


@device
def take_from_vector(here, col, vector, count, values, columns, k, like):
    last = 0 if k > MANY else k - 1
    least = load(values, last, like)
    candidates = lanes_not_below(vector, least, count)
    while candidates != 0:
        lane = lowest_bit(candidates)
        candidates &= candidates - 1
        x = load(here.first.pointer, col + lane, like)
        if comes_before(x, load(values, last, like)):
            if k > MANY:
                replace_top(values, columns, x, col + lane, k, like)
            else:
                insert(values, columns, x, col + lane, k, like)


@device
def comes_before(x, other):
    return x > other or other != other


@device
def insert(values, columns, x, col, k, like):
    j = k - 1
    while j > 0 and comes_before(x, load(values, j - 1, like)):
        store(values, j, load(values, j - 1, like))
        columns[j] = columns[j - 1]
        j -= 1
    store(values, j, x)
    columns[j] = col


# ---------------------------------------------------------------- many


@device
def replace_top(values, columns, x, col, k, like):
    """Puts a logit into a heap of k in place of the one at the top, behind which no other one comes."""
    j, child = 0, 1
    while child < k:
        if child + 1 < k and is_ahead(load(values, child, like), columns[child], values, columns, child + 1, like):
            child += 1
        if not is_ahead(x, col, values, columns, child, like):
            break
        store(values, j, load(values, child, like))
        columns[j] = columns[child]
        j, child = child, 2 * child + 1
    store(values, j, x)
    columns[j] = col


@device
def is_ahead(x, col, values, columns, j, like):
    """Whether a logit comes before that at a place of a heap."""
    other = load(values, j, like)
    return comes_before(x, other) or (x == other and col < columns[j])


@device
def put_in_order(values, columns, k, like):
    """The top of what is left of a heap goes behind it, again and again."""
    for left in range(k - 1, 0, -1):
        x, col = load(values, left, like), columns[left]
        store(values, left, load(values, 0, like))
        columns[left] = columns[0]
        replace_top(values, columns, x, col, left, like)
