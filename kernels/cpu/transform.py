"""What logits go through before anything else is done with them; operands.Transform says in which order.

A row is transformed on the way into a copy in the computation format, which is what the steps of an op read: they know
of none of this. The copy costs a row that fits the caches a fraction of what comes after. Vectors are taken along the
row where its logits, bias and mask are neighbours; else one column after the other goes through the same formulas.

Gradients come back by here.pulled_back.
"""

import math

import numpy as np

from gpusoftmax.kernels.cpu.arithmetic import (
    add,
    inverse_temperature,
    near_softcap,
    scaled,
    softcap,
)
from gpusoftmax.kernels.cpu.cache import device
from gpusoftmax.kernels.cpu.here import Line, Through
from gpusoftmax.kernels.cpu.lanes import all_near_cap
from gpusoftmax.kernels.cpu.memory import (
    advance,
    has_bits,
    load,
    load_cols,
    load_label,
    pointer_to,
    prefetch_to_read,
    store,
    store_cols,
    where_kept,
)
from gpusoftmax.kernels.cpu.rows import element, row_offset
from gpusoftmax.kernels.cpu.vector import (
    along,
    cols_of,
    number,
)
from gpusoftmax.kernels.operands import ONE_VALUE


@device
def through_of(transform, row, rows, like):
    """What the steps of an op have to know of the transform of their row."""
    return Through(transform, inverse_of(transform, row, rows, like))


@device
def inverse_of(transform, row, rows, like):
    if transform is None:
        return like
    return scale_of_row(transform.scale, transform.temperature, row, rows, like)[0]


@device
def transformed_line(array, transform, row, rows, buffer, like):
    """The Line of a row that has gone through its transform, in the buffer."""
    source = Line(element(array, row, rows), array.col_stride, 0)
    copy = pointer_to(buffer, like)
    line = Line(copy, 1, 0)
    scale = scale_of_row(transform.scale, transform.temperature, row, rows, like)
    starts = starts_of(transform, row, rows)
    next_starts = starts_of(transform, min(row + 1, rows.n_rows - 1), rows)
    count = valid_columns(transform.n_valid, row, rows)
    if array.col_stride == 1 and is_dense(transform.bias) and is_dense(transform.mask):
        zeros = along(number(like, 0.0))
        cols = cols_of(zeros)
        full = count - count % cols
        for col in range(0, full, cols):
            fetch(transform.bias, next_starts[0], col, zeros)
            fetch(transform.mask, next_starts[1], col, zeros)
            store_cols(line, col, None, through(source, col, None, zeros, transform, scale, starts))
        if full < count:
            left = count - full
            store_cols(line, full, left, through(source, full, left, zeros, transform, scale, starts))
    else:
        for col in range(count):
            store(copy, col, through_one(source, col, transform, scale, starts, like))
    for col in range(count, rows.n_cols):
        store(copy, col, number(like, -math.inf))
    return line


# ---------------------------------------------------------------- of a row


@device
def scale_of_row(scale, temperature, row, rows, like):
    """1 / temperature as (high, low)."""
    if temperature is None:
        return scale_of_all(scale, like)
    return inverse_temperature(load(element(temperature, row, rows), 0, like))


@device
def scale_of_all(scale, like):
    if scale is None:
        return number(like, 1.0), number(like, 0.0)
    return number(like, scale[0]), number(like, scale[1])


@device
def starts_of(transform, row, rows):
    return start_of(transform.bias, row, rows), start_of(transform.mask, row, rows)


@device
def start_of(array, row, rows):
    """Where a row begins in an array of the transform, in elements."""
    if array is None:
        return 0
    return row_offset(array, row, rows)


@device
def valid_columns(n_valid, row, rows):
    if n_valid is None:
        return rows.n_cols
    if n_valid.code == ONE_VALUE:
        return min(max(n_valid.pointer, 0), rows.n_cols)
    return min(max(load_label(n_valid.pointer, row_offset(n_valid, row, rows), n_valid.code), 0), rows.n_cols)


@device
def is_dense(array):
    if array is None:
        return True
    return array.col_stride == 1


# ---------------------------------------------------------------- of the columns of a vector


@device
def through(line, col, left, zeros, transform, scale, starts):
    x = of_scale(load_cols(line, col, left, zeros), transform, scale)
    x = capped(with_bias(x, transform.bias, starts[0], col, left, zeros), transform.softcap)
    return with_mask(x, transform.mask, starts[1], col, left)


@device
def of_scale(x, transform, scale):
    return by_scale(by_scale(x, transform.temperature, scale), transform.scale, scale)


@device
def by_scale(x, given, scale):
    if given is None:
        return x
    return scaled(x, scale[0], scale[1])


@device
def capped(x, cap):
    if cap is None:
        return x
    cap, inverse = number(x, cap), number(x, 1.0 / cap)
    if all_near_cap(x, cap):  # few logits are farther, and for them there are two divisions and an exponential
        return near_softcap(x, cap, inverse)
    return softcap(x, cap, inverse)


@device
def with_bias(x, bias, start, col, left, zeros):
    if bias is None:
        return x
    return add(x, load_cols(Line(advance(pointer_to(bias.address, bias.tag), start), 1, 0), col, left, zeros))


@device
def with_mask(x, mask, start, col, left):
    if mask is None:
        return x
    return where_kept(x, advance(pointer_to(mask.address, mask.tag), start), col, left)


@device
def fetch(array, start, col, zeros):
    """Asks for what goes with a vector of logits; the logits themselves are fetched by Here.ahead."""
    if array is not None:
        pointer = advance(pointer_to(array.address, array.tag), start)
        prefetch_to_read(Line(pointer, 1, 0), col >> 5 if has_bits(pointer) else col, zeros)


# ---------------------------------------------------------------- of one column


@device
def through_one(line, col, transform, scale, starts, like):
    x = of_scale(load(line.pointer, col * line.step, like), transform, scale)
    x = capped(with_one_bias(x, transform.bias, starts[0], col), transform.softcap)
    return with_one_mask(x, transform.mask, starts[1], col)


@device
def with_one_bias(x, bias, start, col):
    if bias is None:
        return x
    return add(x, load(pointer_to(bias.address, bias.tag), start + col * bias.col_stride, x))


@device
def with_one_mask(x, mask, start, col):
    if mask is None:
        return x
    return x if is_kept(pointer_to(mask.address, mask.tag), start, mask.col_stride, col) else number(x, -math.inf)


@device
def is_kept(pointer, start, step, col):
    if has_bits(pointer):
        return (np.int64(pointer[start + (col >> 5) * step]) >> (col & 31)) & 1 != 0
    return pointer[start + col * step] != 0
