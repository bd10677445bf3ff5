"""The state (max, ties, tail, tail_low) of a row: one pass over its chunks. `gpusoftmax.kernels.formulas` defines it.

Inside a chunk all threads agree on the maximum before the first exponential is taken, so that nothing is rescaled
there; the states of the chunks are merged in order. A row that fits one chunk stays in the registers.
"""

import math

from gpusoftmax.kernels.cuda.device._cuda import cuda, device
from gpusoftmax.kernels.cuda.device.arithmetic import maximum, merge, number, reference, tail_term, tie
from gpusoftmax.kernels.cuda.device.memory import thread_numbers
from gpusoftmax.kernels.cuda.device.reduce import block_max, block_sum
from gpusoftmax.kernels.cuda.device.rows import column, load_chunk, thread_sum
from gpusoftmax.kernels.cuda.device.transform import transform
from gpusoftmax.kernels.cuda.plan import COLS_PER_THREAD


@device
def load_logits(held, logits, first, n_cols, width, row, params):
    """load_chunk through `transform`; the padding never becomes a maximum and adds nothing to a sum."""
    load_chunk(held, logits, first, n_cols, width, number(params[0], -math.inf))
    for slice in range(COLS_PER_THREAD // width):
        for i in range(width):
            k = slice * width + i
            held[k] = transform(held[k], column(first, slice, width) + i, row, params)


@device
def chunk_state(held, scratch, params):
    scale, scale_low = params
    minus_infinity = number(scale, -math.inf)
    zero = number(scale, 0.0)
    partial_max = minus_infinity
    for k in range(COLS_PER_THREAD):
        partial_max = maximum(partial_max, held[k])
    row_max = block_max(partial_max, scratch, minus_infinity)
    shift = reference(row_max)
    values = thread_numbers(scale)
    for k in range(COLS_PER_THREAD):
        values[k] = tie(held[k], shift)
    ties = block_sum(thread_sum(values, scale), scratch, zero)
    if row_max == minus_infinity:
        ties = zero  # 0 stood in for the maximum; nothing may tie with it
    for k in range(COLS_PER_THREAD):
        values[k] = tail_term(held[k], shift, scale, scale_low)
    tail = block_sum(thread_sum(values, scale), scratch, zero)
    return row_max, ties, tail, zero


@device
def row_state(held, scratch, logits, n_cols, width, row, params):
    zero = number(params[0], 0.0)
    state = (number(params[0], -math.inf), zero, zero, zero)
    for first in range(0, n_cols, COLS_PER_THREAD * cuda.blockDim.x):
        load_logits(held, logits, first, n_cols, width, row, params)
        state = merge(state, chunk_state(held, scratch, params), params[0], params[1])
    return state


@device
def logits_again(held, logits, first, n_cols, width, row, params):
    """Fills the registers with a chunk for the second pass, unless row_state has left it there."""
    if n_cols > COLS_PER_THREAD * cuda.blockDim.x:
        load_logits(held, logits, first, n_cols, width, row, params)
