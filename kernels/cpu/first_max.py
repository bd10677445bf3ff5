"""Where a row has its maximum, from the states of its chunks and the logits of one of them."""

import math

from gpusoftmax.kernels.cpu.cache import device
from gpusoftmax.kernels.cpu.here import index_in
from gpusoftmax.kernels.cpu.lanes import (
    any_equal,
)
from gpusoftmax.kernels.cpu.memory import (
    load,
    load_cols,
)
from gpusoftmax.kernels.cpu.rows import chunk_range, count_of_chunks
from gpusoftmax.kernels.cpu.states import FIELDS, MAX, SUM
from gpusoftmax.kernels.cpu.vector import (
    lanes_of,
    number,
    stripe_of,
)


@device
def chunk_of_max(here, lane, like):
    """The first chunk that holds the maximum of a row, -1 if the row holds a NaN."""
    lanes = lanes_of(here.zero)
    found, largest = 0, number(like, -math.inf)
    for chunk in range(count_of_chunks(here.n_cols)):
        own = load(here.states, (chunk * FIELDS + MAX) * lanes + lane, like)
        total = load(here.states, (chunk * FIELDS + SUM) * lanes + lane, like)
        if total != total:  # a NaN makes the sum of its chunk one
            return -1
        if own > largest:
            found, largest = chunk, own
    return found


@device
def first_max(here, chunk, lane, like):
    """The first column of a chunk that holds its maximum."""
    lanes = lanes_of(here.zero)
    largest = load(here.states, (chunk * FIELDS + MAX) * lanes + lane, like)
    col, count = chunk_range(here, chunk)
    if lanes == 1:  # whole vectors are passed by together
        step = stripe_of(here.zeros)
        while count > step and not any_equal(load_cols(here.first, col, None, here.nothing), largest):
            col, count = col + step, count - step
    while logit_at(here, col, lane, like) != largest:
        col += 1
    return col


@device
def logit_at(here, label, lane, like):
    return load(here.first.pointer, index_in(here.first, lane, label), like)
