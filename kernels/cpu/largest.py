"""The k largest logits of a row, kept in order while it is read.

A vector of columns is looked at closer only if one of them is larger than the last that is kept. Equal logits stay in
the order of their columns. Where there are fewer logits than k so far, a NaN at the end stands for none.
"""

import math

from gpusoftmax.kernels.cpu.cache import device
from gpusoftmax.kernels.cpu.vector import lanes_not_below, load, load_cols, lowest_bit, number, store, stripe_of


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
    least = load(values, k - 1, like)
    candidates = lanes_not_below(vector, least, count)
    while candidates != 0:
        lane = lowest_bit(candidates)
        candidates &= candidates - 1
        x = load(here.first.pointer, col + lane, like)
        if comes_before(x, load(values, k - 1, like)):
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
