"""What logits go through on the way from their slot into registers; operands.Transform says in which order.

Whatever reads a row calls `transform` or `transformed` once for each column that it has read. Options that are not
given are None, which is a type: kernels are compiled without them.
"""

import math
from typing import NamedTuple

from numpy import float32, int64

from gpusoftmax.kernels.cuda.device._cuda import device, intrinsic, types
from gpusoftmax.kernels.cuda.device.arithmetic import (
    add,
    inverse_temperature,
    mul,
    number,
    pulled_through_mask,
    pulled_through_softcap,
    scaled,
    softcap,
    zero_where_empty,
)
from gpusoftmax.kernels.cuda.device.memory import load, load_stored, row_offset, word_of


class Through(NamedTuple):
    """A transform as one row has it. Where it is None, or has no such field, nobody asks for the rest."""

    transform: object
    n_valid: int  # columns from here on are masked; of a row that does not exist all
    scale: tuple  # (high, low)
    bias_start: int  # where the row begins in the arrays of the transform, in elements
    mask_start: int


# ---------------------------------------------------------------- of a row


@device
def through_of(transform, row, rows):
    """The transform of an array as its row has it."""
    return Through(
        transform,
        valid_columns_of(transform, row, rows),
        scale_of(transform, row, rows),
        bias_start_of(transform, row, rows),
        mask_start_of(transform, row, rows),
    )


@device
def valid_columns_of(transform, row, rows):
    if transform is None:
        return int64(0)
    return valid_columns(transform.n_valid, row, rows) if row < rows.n_rows else int64(0)


@device
def valid_columns(n_valid, row, rows):
    if n_valid is None:
        return rows.n_cols
    return min(max(word_of(n_valid, row, rows), int64(0)), rows.n_cols)


@device
def scale_of(transform, row, rows):
    if transform is None:
        return float32(1), float32(0)
    return scale_of_row(transform.scale, transform.temperature, row if row < rows.n_rows else int64(0), rows)


@device
def scale_of_row(scale, temperature, row, rows):
    if temperature is None:
        return scale_of_all(scale)
    return inverse_temperature(load_stored(temperature.pointer, row_offset(temperature, row, rows)))


@device
def scale_of_all(scale):
    if scale is None:
        return float32(1), float32(0)
    return scale[0], scale[1]


@device
def bias_start_of(transform, row, rows):
    if transform is None:
        return int64(0)
    return start_of(transform.bias, row, rows)


@device
def mask_start_of(transform, row, rows):
    if transform is None:
        return int64(0)
    return start_of(transform.mask, row, rows)


@device
def start_of(array, row, rows):
    if array is None:
        return int64(0)
    return int64(row_offset(array, row, rows))


# ---------------------------------------------------------------- of a column


@device
def transform(values, col, width, through):
    """values[:width] = the columns col, col + 1, ... transformed."""
    for k in range(width):
        values[k] = transformed(values[k], col + k, through)


@device
def transformed(x, col, through):
    """The logit x of a column. It is not yet multiplied by the scale that all rows have: exponential.py does that to
    differences, so that the maximum is subtracted first.
    """
    x = biased(divided(x, through), col, through)
    return masked(capped(x, through), col, through)


@device
def divided(x, through):
    return divided_by(x, through.transform, through.scale)


@device
def divided_by(x, transform, inverse):
    if transform is None:
        return x
    return of_scale(of_temperature(x, transform.temperature, inverse), transform.scale, inverse)


@device
def of_temperature(x, temperature, inverse):
    if temperature is None:
        return x
    return scaled(x, inverse[0], inverse[1])


@device
def of_scale(x, scale, inverse):
    if scale is None:
        return x
    return scaled(x, inverse[0], inverse[1])


@device
def biased(x, col, through):
    return biased_by(x, col, through.transform, through)


@device
def biased_by(x, col, transform, through):
    if transform is None:
        return x
    return with_bias(x, col, transform.bias, through)


@device
def with_bias(x, col, bias, through):
    if bias is None:
        return x
    if col >= through.n_valid:  # there may be none
        return x
    return add(x, load(bias.pointer, through.bias_start + col * bias.col_stride, x))


@device
def capped(x, through):
    return capped_by(x, through.transform)


@device
def capped_by(x, transform):
    if transform is None:
        return x
    return with_cap(x, transform.softcap)


@device
def with_cap(x, cap):
    if cap is None:
        return x
    return softcap(x, cap)


@device
def masked(x, col, through):
    return masked_by(x, col, through.transform, through)


@device
def masked_by(x, col, transform, through):
    if transform is None:
        return x
    if col >= through.n_valid:
        return number(x, -math.inf)
    return with_mask(x, col, transform.mask, through.mask_start)


@device
def with_mask(x, col, mask, start):
    if mask is None:
        return x
    return x if is_kept(mask, start, col) else number(x, -math.inf)


@device
def is_kept(mask, start, col):
    if has_bits(mask.pointer):
        return (int64(load_stored(mask.pointer, start + (col >> 5) * mask.col_stride)) >> (col & 31)) & 1 != 0
    return load_stored(mask.pointer, start + col * mask.col_stride) != 0


@intrinsic
def has_bits(typingctx, pointer):
    """Whether a mask has a bit for each column; a constant."""

    def codegen(context, builder, signature, args):
        return context.get_constant(types.boolean, pointer.dtype == types.uint32)

    return types.boolean(pointer), codegen


# ---------------------------------------------------------------- of a gradient


@device
def pulled_back(gradient, x, through):
    """The gradient with respect to a logit, from that with respect to the transformed one, x."""
    return pulled_back_by(gradient, x, through.transform, through.scale)


@device
def pulled_back_by(gradient, x, transform, inverse):
    if transform is None:
        return gradient
    pulled = pulled_through_cap(gradient, x, transform.softcap)
    pulled = times_inverse(times_inverse(pulled, transform.temperature, inverse), transform.scale, inverse)
    return pulled_through_mask(pulled, gradient, x)


@device
def pulled_through_cap(gradient, x, cap):
    if cap is None:
        return gradient
    return pulled_through_softcap(gradient, x, cap)


@device
def times_inverse(gradient, scale, inverse):
    if scale is None:
        return gradient
    return mul(gradient, inverse[0])


# ---------------------------------------------------------------- of a row that is masked whole


@device
def unless_empty(value, row_max, rest, through):
    """The value; 0 in a row that is masked whole, if that is what its transform wants. Without a maximum, `rest` is 0
    or, in a row that holds a NaN, NaN.
    """
    return unless_empty_by(value, row_max, rest, through.transform)


@device
def unless_empty_by(value, row_max, rest, transform):
    if transform is None:
        return value
    return unless_empty_row(value, row_max, rest, transform.zero_rows)


@device
def unless_empty_row(value, row_max, rest, zero_rows):
    if zero_rows is None:
        return value
    return zero_where_empty(value, row_max, rest)
