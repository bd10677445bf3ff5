"""What logits go through on the way from their slot into registers; operands.Transform says in which order.

Whatever reads a row calls `transform`, `transform_runs` or `transformed` once for each column that it has read. Options
that are not given are None, which is a type: kernels are compiled without them.

A run is what sixteen bytes hold: its mask is read as one word, or as the two in which it lies, its bias as one or two
vectors, where they lie aligned; else element by element, each of which costs an address and a wait. Columns from
n_valid on are not read at all: in the slots they are -inf, as what lies behind the row.
"""

import math
from typing import NamedTuple

from numpy import float32, int32, int64, uint32, uint64

from gpusoftmax.kernels.cuda.device._cuda import device, intrinsic, types
from gpusoftmax.kernels.cuda.device.arithmetic import (
    add,
    inverse_temperature,
    mul,
    number,
    pulled_through_mask,
    zero_where_empty,
)
from gpusoftmax.kernels.cuda.device.exponential import (
    inverse_cap,
    near_softcap,
    of_one_sign,
    pulled_through_softcap,
    scaled,
    size_for_cap,
    softcap,
)
from gpusoftmax.kernels.cuda.device.memory import (
    LINE_BYTES,
    advance,
    granule_numbers,
    load,
    load_bytes,
    load_stored,
    load_vector,
    misalignment,
    prefetch,
    row_offset,
    run_flags,
    vector_bits,
    vector_width,
    word_of,
)
from gpusoftmax.kernels.cuda.device.staging import hidden

VERY_MANY = 1 << 30  # columns: more than a piece has


class Through(NamedTuple):
    """A transform as one row has it. Where it is None, or has no such field, nobody asks for the rest."""

    transform: object
    n_valid: int  # columns from here on are masked; of a row that does not exist all
    scale: tuple  # (high, low), of_one_sign
    inverse_cap: float
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
        inverse_cap_of(transform),
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
    high, low = inverse_temperature(load_stored(temperature.pointer, row_offset(temperature, row, rows)))
    return of_one_sign(high, low)


@device
def scale_of_all(scale):
    if scale is None:
        return float32(1), float32(0)
    return of_one_sign(scale[0], scale[1])


@device
def inverse_cap_of(transform):
    if transform is None:
        return float32(0)
    return inverse_of_cap(transform.softcap)


@device
def inverse_of_cap(cap):
    if cap is None:
        return float32(0)
    return inverse_cap(cap)


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


@device
def is_changed(transform):
    return transform is not None


@device
def left_to_read(piece, through):
    """Of a row's columns from a piece on, how many need be read at all; below 0 if n_valid ends before."""
    return left_to_read_by(piece, through.transform, through)


@device
def left_to_read_by(piece, transform, through):
    if transform is None:
        return piece.left
    return left_of_valid(piece, transform.n_valid, through)


@device
def left_of_valid(piece, n_valid, through):
    if n_valid is None:
        return piece.left
    return min(piece.left, left_of(piece.first, through))


@device
def n_to_read(n_cols, through):
    """How many columns of a row need be read."""
    return n_to_read_by(n_cols, through.transform, through)


@device
def n_to_read_by(n_cols, transform, through):
    if transform is None:
        return n_cols
    return min(n_cols, through.n_valid)


@device
def padding_for(through, any_number):
    """What a last pass has behind the columns that are read: no result depends on it unless n_valid ends there."""
    return padding_by(through.transform, any_number)


@device
def padding_by(transform, any_number):
    if transform is None:
        return any_number
    return number(any_number, -math.inf)


@device
def fits_where_logits_were(transform, is_wide):
    """Whether something is done to logits that loses nothing where they are stored again in their own format. is_wide:
    it is that of the computation.
    """
    if transform is None:
        return False
    rounds = (
        transform.temperature is not None
        or transform.scale is not None
        or transform.bias is not None
        or transform.softcap is not None
    )
    return is_wide if rounds else transform.mask is not None


# ---------------------------------------------------------------- of runs of neighbouring columns


@device
def transform(values, col, width, through):
    """values[:width] = the columns col, col + 1, ... transformed; padding stays."""
    transform_by(values, col, width, 1, 0, left_of(col, through), through.transform, through)


@device
def transform_runs(values, col, width, n_runs, step, left, through):
    """As `transform`, of several runs one behind the other in `values`, whose first columns are `step` apart; there are
    `left` columns from the first on.
    """
    transform_by(values, col, width, n_runs, step, left, through.transform, through)


@device
def transform_by(values, col, width, n_runs, step, left, transform, through):
    if transform is None:
        return
    flags = run_flags(values[0])
    read_flags(flags, transform.mask, through, col, left, width, n_runs, step)  # first: it is waited for longest
    if transform.n_valid is None or left > 0:
        change(values, transform, through, col, left, width, n_runs, step)
    mask_runs(values, flags, transform.mask, transform.temperature, transform.softcap, left, width, n_runs, step)


@device
def left_inside(col, through):
    """As left_of where the row does not end within a piece."""
    return left_inside_by(col, through.transform, through)


@device
def left_inside_by(col, transform, through):
    if transform is None:
        return int32(VERY_MANY)
    return int32(VERY_MANY) if transform.n_valid is None else left_of(col, through)


@device
def left_of(col, through):
    """How many columns there are from one on that are not masked by n_valid; less than 0 behind them."""
    return int32(max(min(through.n_valid - col, int64(VERY_MANY)), int64(-VERY_MANY)))


@device
def change(values, transform, through, col, left, width, n_runs, step):
    """All but masks."""
    scale_runs(values, transform.temperature, transform.scale, through.scale, width * n_runs)
    add_bias(values, transform.bias, through, col, left, width, n_runs, step)
    cap_runs(values, transform.softcap, through, width, n_runs)


@device
def scale_runs(values, temperature, scale, inverse, count):
    if temperature is None and scale is None:
        return
    for k in range(count):
        values[k] = scaled(values[k], inverse[0], inverse[1])


@device
def add_bias(values, bias, through, col, left, width, n_runs, step):
    if bias is None:
        return
    index, last = through.bias_start + col * bias.col_stride, (n_runs - 1) * step + width
    pointer = advance(bias.pointer, index)
    in_vectors = width >= vector_width(pointer) and misalignment(pointer) == 0
    if bias.col_stride == 1 and in_vectors and step % vector_width(pointer) == 0 and left >= last:
        numbers = granule_numbers(values[0])
        for j in range(width * n_runs >> vector_bits(pointer)):
            first = j << vector_bits(pointer)
            load_vector(pointer, first // width * step + first % width, numbers)
            for k in range(vector_width(pointer)):
                values[first + k] = add(values[first + k], numbers[k])
    else:
        for j in range(width * n_runs):
            k = j // width * step + j % width
            if k < left:
                values[j] = add(values[j], load(pointer, k * bias.col_stride, values[j]))


@device
def cap_runs(values, cap, through, width, n_runs):
    if cap is None:
        return
    inverse = through.inverse_cap
    for first in range(0, width * n_runs, width):
        far = False
        for k in range(width):
            far = far | (size_for_cap(values[first + k]) >= cap)
        if far:  # few logits are, and exponentials take as long as all the rest
            for k in range(width):
                values[first + k] = softcap(values[first + k], cap, inverse)
        else:
            for k in range(width):
                values[first + k] = near_softcap(values[first + k], cap, inverse)


@device
def mask_runs(values, flags, mask, temperature, cap, left, width, n_runs, step):
    """Needs flags where there is a mask. Slots have -inf from n_valid on, which nothing changes but a cap or NaN."""
    if mask is None:
        if temperature is not None or cap is not None:
            for first in range(0, width * n_runs, width):
                mask_end(advance(values, first), int32(left - first // width * step), width)
    else:
        for j in range(width * n_runs):
            if not has_flag(mask.pointer, flags[j // width], j % width):
                values[j] = number(values[j], -math.inf)


@device
def mask_end(values, left, width):
    if left < width:
        for k in range(width):
            if k >= left:
                values[k] = number(values[k], -math.inf)


# ---------------------------------------------------------------- of masks


@device
def read_flags(flags, mask, through, col, left, width, n_runs, step):
    """flags[r] = which columns of run r are kept; no others than the first `left`, counted from `col` on."""
    if mask is None:
        return
    pointer = advance(mask.pointer, through.mask_start)
    whole = width > 1 and left >= (n_runs - 1) * step + width and mask.col_stride == 1
    if has_bits(pointer):
        if whole and step & 31 == 0:
            words, place = advance(pointer, col >> 5), int32(col & 31)
            for r in range(n_runs):
                flags[r] = uint64(load_stored(words, r * step >> 5) >> uint32(place))
            if place + width > 32:  # a run lies in two words: of a row that begins beside a boundary
                for r in range(n_runs):
                    flags[r] |= uint64(load_stored(words, (r * step >> 5) + 1)) << uint64(32 - place)
        else:
            found = bits_of_runs(mask, pointer, col, left, width, n_runs, step)
            for r in range(n_runs):
                flags[r] = found >> uint64(r * width)
    elif whole and is_aligned(advance(pointer, col), width) and step & (width - 1) == 0:
        for r in range(n_runs):
            flags[r] = bytes_of_run(pointer, col + r * step, width)
    else:
        for r in range(n_runs):
            count = min(int32(left - r * step), int32(width))
            flags[r] = bytes_of_columns(mask, pointer, col + r * step, count, width, through)


@device
def bits_of_runs(mask, pointer, col, left, width, n_runs, step):
    """Those of all runs, one run behind the other: a lane has 32 columns at most. In a loop, which takes few registers:
    where rows end, and where there is one run.
    """
    found, r, one = uint64(0), int32(0), hidden(int32(1))
    while r < n_runs:
        count = min(int32(left - r * step), int32(width))
        found |= bits_of_run(mask, pointer, col + r * step, count) << uint64(r * width)
        r = int32(r + one)
    return found


@device
def bits_of_run(mask, pointer, col, count):
    """Those of `count` columns, at most 32, which may lie in two words."""
    if count <= 0:
        return uint64(0)
    first, place = (col >> 5) * mask.col_stride, int32(col & 31)
    low = load_stored(pointer, first)
    high = load_stored(pointer, first + (mask.col_stride if place + count > 32 else int64(0)))
    both = uint64(low) | uint64(high) << uint64(32)
    return both >> uint64(place) & ((uint64(1) << uint64(count)) - uint64(1))


@device
def fetch_masks(through, first, count, lane):
    """Starts to read what the mask has for so many columns; a long row's mask is waited for as its logits are."""
    fetch_masks_by(through.transform, through, first, count, lane)


@device
def fetch_masks_by(transform, through, first, count, lane):
    if transform is None:
        return
    fetch_masks_of(transform.mask, through, first, count, lane)


@device
def fetch_masks_of(mask, through, first, count, lane):
    if mask is None:
        return
    bits = 5 if has_bits(mask.pointer) else 0
    line = LINE_BYTES * 8 if has_bits(mask.pointer) else LINE_BYTES  # columns
    if mask.col_stride == 1 and lane * line < count:
        prefetch(mask.pointer, through.mask_start + (first + lane * line >> bits))


@device
def is_aligned(pointer, width):
    return misalignment(pointer) & (width - 1) == 0


@device
def bytes_of_run(pointer, index, width):
    if width == 8:
        return load_bytes(pointer, index, 8)
    if width == 4:
        return load_bytes(pointer, index, 4)
    return load_bytes(pointer, index, 2)


@device
def bytes_of_columns(mask, pointer, col, count, width, through):
    """Those of a run wherever it lies: of two aligned words, if the row has both of them, or else one by one."""
    if count == width and width > 1 and mask.col_stride == 1:
        behind = int32(misalignment(advance(pointer, col)) & (width - 1))  # a boundary
        if behind == 0:
            return bytes_of_run(pointer, col, width)
        if col >= behind and through.n_valid - col >= 2 * width - behind:
            low = bytes_of_run(pointer, col - behind, width)
            high = bytes_of_run(pointer, col - behind + width, width)
            return low >> uint64(8 * behind) | high << uint64(8 * (width - behind))
    return bytes_one_by_one(mask, pointer, col, count)


@device
def bytes_one_by_one(mask, pointer, col, count):
    flags, k, step = uint64(0), int32(0), hidden(int32(1))
    while k < count:
        if load_stored(pointer, (col + k) * mask.col_stride) != 0:
            flags |= uint64(1) << uint64(k * 8)
        k = int32(k + step)
    return flags


@device
def flag_place(pointer, k):
    return uint64(k if has_bits(pointer) else k * 8)


@device
def has_flag(pointer, flags, k):
    one = uint64(1) if has_bits(pointer) else uint64(255)
    return flags & (one << flag_place(pointer, k)) != 0


# ---------------------------------------------------------------- of a column


@device
def transformed(x, col, through):
    """The logit x of a column. It is not yet multiplied by the scale that all rows have: exponential.py does that to
    differences, so that the maximum is subtracted first.
    """
    return transformed_by(x, col, through.transform, through)


@device
def transformed_by(x, col, transform, through):
    if transform is None:
        return x
    values = granule_numbers(x)
    values[0] = x
    left = left_of(col, through)
    transform_by(values, col, 1, 1, 0, left, transform, through)
    mask_end(values, left, 1)
    return values[0]


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
    return pulled_back_by(gradient, x, through.transform, through)


@device
def pulled_back_by(gradient, x, transform, through):
    if transform is None:
        return gradient
    pulled, inverse = pulled_through_cap(gradient, x, transform.softcap, through.inverse_cap), through.scale
    pulled = times_inverse(times_inverse(pulled, transform.temperature, inverse), transform.scale, inverse)
    if transform.mask is None and transform.n_valid is None:
        return pulled  # a logit that is -inf by itself has the slope of any other: that of a label is p - 1
    return pulled_through_mask(pulled, gradient, x)


@device
def pulled_through_cap(gradient, x, cap, inverse):
    if cap is None:
        return gradient
    return pulled_through_softcap(gradient, x, inverse)


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
