"""What a row knows of its chunks, and how their states become one: in order, whoever measured them.

The sums of a chunk refer to its own anchor, a power of two near the exponential of its maximum, so that bringing them
to the anchor of the row is exact (`formulas.anchor`).
"""

from typing import NamedTuple

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gpusoftmax.kernels.cpu.arithmetic import (
    add,
    add_pair,
    anchor,
    div,
    exp_from,
    finite_or_zero,
    floor,
    fma,
    maximum,
    mul,
    negative,
    tied_total,
    where_finite,
)
from gpusoftmax.kernels.cpu.cache import device
from gpusoftmax.kernels.cpu.chunks import ratio
from gpusoftmax.kernels.cpu.vector import (
    number,
)

# What is kept of a chunk: when it is measured, which other threads may read until they have all folded the row,
MAX, SUM, LOW, TIES, OWN = range(5)  # OWN: what an op sums beside it
MEASURED_FIELDS = 8
# and when it is written, by the one thread that writes it.
WRITER = MEASURED_FIELDS
FIELDS = 16


class Sum(NamedTuple):
    """The exponentials of a row added up: sum + low, relative to the row's anchor."""

    shift: object
    exponent: object
    sum: object
    low: object


@intrinsic
def save(typingctx, states, chunk, field, value):
    """Notes a number or, across rows, one per row."""

    def codegen(context, builder, signature, args):
        builder.store(args[3], _place(context, builder, args, value), align=states.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(states, types.intp, types.intp, value), codegen


@intrinsic
def saved(typingctx, states, chunk, field, like):
    """What `save` has noted."""

    def codegen(context, builder, signature, args):
        return builder.load(_place(context, builder, args, like), align=states.dtype.bitwidth // 8)

    return like(states, types.intp, types.intp, like), codegen


def _place(context, builder, args, value):
    states, chunk, field, _ = args
    type = context.get_value_type(value)
    index = builder.add(builder.mul(chunk, ir.Constant(chunk.type, FIELDS)), field)
    return builder.gep(builder.bitcast(states, type.as_pointer()), [index])


@device
def save_state(states, chunk, sums):
    total, low, ties, _ = sums
    save(states, chunk, SUM, total)
    save(states, chunk, LOW, low)
    save(states, chunk, TIES, ties)


@device
def sum_of_saved(states, n_chunks, like):
    """(sum, low) of what the chunks have saved as SUM and LOW. `like` is 0."""
    total, low = saved(states, 0, SUM, like), saved(states, 0, LOW, like)
    for chunk in range(1, n_chunks):
        total, low = add_pair(total, low, saved(states, chunk, SUM, like), saved(states, chunk, LOW, like))
    return total, low


@device
def row_max(states, n_chunks, like):
    largest = saved(states, 0, MAX, like)
    for chunk in range(1, n_chunks):
        largest = maximum(largest, saved(states, chunk, MAX, like))
    return largest


@device
def anchor_of_chunk(largest, shift, exponent, scale):
    """The anchor of a chunk with this maximum, or that of its row where it is -inf: the sums are 0 whatever they refer
    to, but 0 times a ratio that overflows would be NaN.
    """
    own_shift, own_exponent = anchor(largest, scale)
    return where_finite(largest, own_shift, shift), where_finite(largest, own_exponent, exponent)


@device
def chunk_ratio(states, chunk, shift, exponent, like, scale, scale_low):
    """What brings the exponentials of a chunk to the anchor of the row."""
    own_shift, own_exponent = anchor_of_chunk(saved(states, chunk, MAX, like), shift, exponent, scale)
    return ratio(own_shift, own_exponent, shift, exponent, scale, scale_low)


@device
def fold_sum(states, n_chunks, like, scale, scale_low):
    """The Sum of a row."""
    shift, exponent = anchor(row_max(states, n_chunks, like), scale)
    total, low = saved(states, 0, SUM, like), saved(states, 0, LOW, like)
    if n_chunks > 1:
        total, low = like, like
        for chunk in range(n_chunks):
            factor = chunk_ratio(states, chunk, shift, exponent, like, scale, scale_low)
            part, part_low = saved(states, chunk, SUM, like), saved(states, chunk, LOW, like)
            total, low = add_pair(total, low, mul(part, factor), mul(part_low, factor))
    return Sum(shift, exponent, total, low)


@device
def fold_state(states, n_chunks, like, scale, scale_low):
    """(State, Sum): the row state of `formulas` and the sum that goes with it. `like` is 0."""
    largest = row_max(states, n_chunks, like)
    shift, exponent = anchor(largest, scale)
    others, low, ties = saved(states, 0, SUM, like), saved(states, 0, LOW, like), saved(states, 0, TIES, like)
    ties_low = like
    if n_chunks > 1:
        others, low, ties = like, like, like
        for chunk in range(n_chunks):
            own_max = saved(states, chunk, MAX, like)
            own_shift, own_exponent = anchor_of_chunk(own_max, shift, exponent, scale)
            factor = ratio(own_shift, own_exponent, shift, exponent, scale, scale_low)
            own = exp_from(own_max, own_shift, own_exponent, floor(own_exponent), scale, scale_low)
            # What tied inside the chunk ties in the row too, or joins the others.
            own_ties = saved(states, chunk, TIES, like)
            ties, ties_low, joining = tied_total(ties, ties_low, own_ties, own, own_max, largest)
            part, part_low = saved(states, chunk, SUM, like), saved(states, chunk, LOW, like)
            others, low = add_pair(others, low, mul(part, factor), mul(part_low, factor))
            others, low = add_pair(others, low, mul(joining, factor), like)
    at_max = exp_from(largest, shift, exponent, floor(exponent), scale, scale_low)
    at_max = where_finite(largest, at_max, number(scale, 1.0))
    tail = div(others, at_max)
    rest = add(fma(negative(tail), at_max, others), low)
    state = (largest, ties, tail, add(finite_or_zero(div(rest, at_max), tail), ties_low))
    whole, whole_low = add_pair(mul(ties, at_max), mul(ties_low, at_max), others, low)
    return state, Sum(shift, exponent, whole, whole_low)
