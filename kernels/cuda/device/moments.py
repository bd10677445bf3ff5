"""Expected positions under the softmax of a row. The mathematics stands in kernels/cpu/moments.py.

The state of a part of a row is (max, s, j, i): the sums of e_c, j e_c and i e_c, relative to the maximum of the part.
The tree is that of row_state.py: a lane's columns in groups, a butterfly over the lanes, pieces in order, chunks by
their numbers. Exponentials are cheap ones of gaps to the maximum (exponential.py):

    e_c      5 u + 3 |x_c - m| / T u       the difference, its product with c and c itself are rounded
"""

import math

from numpy import int32

from gpusoftmax.kernels.cuda.device._cuda import device
from gpusoftmax.kernels.cuda.device.arithmetic import (
    add,
    add_pair,
    div,
    exp_gap,
    fma,
    line_and_place,
    maximum,
    moved_moment,
    mul,
    number,
    ratio_of_pairs,
    row_inverse,
    sub,
)
from gpusoftmax.kernels.cuda.device.exponential import (
    anchor,
    cheap_exp_from,
    cheap_exp_gap,
    corrected_inverse,
    exact_exp_gap,
    lowest_of,
    ordered_exp_from,
)
from gpusoftmax.kernels.cuda.device.memory import n_values, piece_numbers, stored_in_halves, vector_width
from gpusoftmax.kernels.cuda.device.piece_state import (
    gap_params,
    group_sum,
    halved,
    is_near,
    piece_max,
    read_logits,
)
from gpusoftmax.kernels.cuda.device.pieces import chunk_of, col_of, has_columns
from gpusoftmax.kernels.cuda.device.reduce import publish, warp_max, warp_sum, warp_sum_pair
from gpusoftmax.kernels.cuda.device.row_barriers import announce, exchange_states, meet
from gpusoftmax.kernels.cuda.device.row_staging import open_row, stage_next, wait_for_piece
from gpusoftmax.kernels.cuda.device.row_state import saved_max, softmax_state, state_place
from gpusoftmax.kernels.cuda.device.row_writer import row_writer
from gpusoftmax.kernels.cuda.device.shared_numbers import get
from gpusoftmax.kernels.cuda.device.split import (
    is_one_chunk,
    quotient,
    remainder,
    shifted_up,
    split_chunks,
    split_lanes,
    split_piece_bits,
)
from gpusoftmax.kernels.cuda.device.transform import pulled_back
from gpusoftmax.kernels.cuda.plan import GROUP, WARP_SIZE


def row_moments_with(has_lines):
    """A device function for the first pass over a row. Without lines, the width of one means nothing."""

    @device
    def position(k, first, image, team, split, source, like):
        """(line, place) of number k of a lane, counted from the first column of the chunk; places along a line where
        there are lines. The piece begins at column `first` of the chunk.
        """
        within = k & (vector_width(source.pointer) - 1)  # of a run, whose columns are neighbours
        column = add(number(like, int32(first + col_of(k - within, team, split, source))), number(like, within))
        if has_lines:
            before, width, inverse = image
            return line_and_place(column, before, width, inverse)
        return number(like, 0.0), column

    @device
    def piece_moments(held, source, piece, first, image, team, split, params):
        scale, scale_low, c, c_low = params
        largest = piece_max(held, piece, split, params)
        half = halved(largest)
        lines = piece_numbers(scale)
        s, j, i = number(scale, 0.0), number(scale, 0.0), number(scale, 0.0)
        for group in range(0, n_values(scale), GROUP):
            if has_columns(group, piece, split):
                for k in range(group, group + GROUP):
                    held[k] = cheap_exp_gap(held[k], half, scale, scale_low, c, c_low)
                s = add(s, group_sum(held, group))
                for k in range(group, group + GROUP):
                    line, place = position(k, first, image, team, split, source, scale)
                    lines[k] = mul(held[k], line)
                    held[k] = mul(held[k], place)
                j = add(j, group_sum(held, group))
                if has_lines:
                    i = add(i, group_sum(lines, group))
        lanes = split_lanes(split)
        return largest, warp_sum(s, lanes), warp_sum(j, lanes), warp_sum(i, lanes) if has_lines else i

    @device
    def joined(one, two, params):
        """The state of two parts of a chunk."""
        largest = maximum(one[0], two[0])
        factor, other = below(one[0], largest, params), below(two[0], largest, params)
        s = add(mul(one[1], factor), mul(two[1], other))
        j = add(mul(one[2], factor), mul(two[2], other))
        return largest, s, j, add(mul(one[3], factor), mul(two[3], other))

    @device
    def joined_chunks(width, team, split, params):
        """(E_j, E_i) of the row from the states of its chunks, which lie in shared memory; the same for all threads."""
        zero = number(params[0], 0.0)
        largest, chunk = number(params[0], -math.inf), team.lane
        while chunk < split_chunks(split):
            largest = maximum(largest, saved_max(chunk, split, zero))
            chunk = int32(chunk + WARP_SIZE)
        largest = warp_max(largest, WARP_SIZE)
        s, s_low, j, j_low, i, i_low = zero, zero, zero, zero, zero, zero
        chunk = team.lane
        while chunk < split_chunks(split):
            factor = below(saved_max(chunk, split, zero), largest, params)
            total = get(state_place(1, chunk, split, zero), zero)
            s, s_low = add_pair(s, s_low, mul(total, factor), zero)
            first = first_of_chunk(chunk, split, zero)
            by = number(zero, 0.0) if has_lines else number(zero, first)
            moment, low = moved_moment(get(state_place(2, chunk, split, zero), zero), zero, total, zero, by)
            j, j_low = add_pair(j, j_low, mul(moment, factor), mul(low, factor))
            if has_lines:
                line = number(zero, quotient(first, width))
                moment, low = moved_moment(get(state_place(3, chunk, split, zero), zero), zero, total, zero, line)
                i, i_low = add_pair(i, i_low, mul(moment, factor), mul(low, factor))
            chunk = int32(chunk + WARP_SIZE)
        s, s_low = warp_sum_pair(s, s_low)
        j, j_low = warp_sum_pair(j, j_low)
        if has_lines:
            i, i_low = warp_sum_pair(i, i_low)
        return ratio_of_pairs(j, j_low, s, s_low), ratio_of_pairs(i, i_low, s, s_low)

    @device
    def row_moments(source, n_cols, width, team, split, scale, scale_low):
        """(E_j, E_i) of the row, the same for all threads that share it; there is no E_i without lines."""
        params = gap_params(scale, scale_low)
        held = piece_numbers(scale)
        zero, least = number(scale, 0.0), number(scale, -math.inf)
        state = (least, zero, zero, zero)
        last_piece = int32((1 << split_piece_bits(split)) - 1)
        piece_cols = int32(split_lanes(split) * n_values(scale))
        inverse = div(number(scale, 1.0), number(scale, width))
        announce(split)
        open_row((source,), n_cols, team, split, least)
        meet(split)
        k = int32(0)
        while k < team.n_pieces:
            wait_for_piece(k, team, split)
            piece = read_logits(held, source, k, n_cols, team, split, params)
            stage_next(k, (source,), n_cols, team, split, least)
            chunk, within = chunk_of(k, team, split), int32(k & last_piece)
            image = zero, zero, zero
            if has_lines:
                before = number(scale, int32(width - remainder(first_of_chunk(chunk, split, zero), width)))
                image = before, number(scale, width), inverse
            first = int32(within * piece_cols)
            current = piece_moments(held, source, piece, first, image, team, split, params)
            state = current if within == 0 else joined(state, current, params)
            if not is_one_chunk(split) and within == last_piece:
                for n in range(4 if has_lines else 3):
                    publish(state_place(n, chunk, split, zero), state[n], team, split)
            k = int32(k + 1)
        if is_one_chunk(split):
            return ratio_of_pairs(state[2], zero, state[1], zero), ratio_of_pairs(state[3], zero, state[1], zero)
        exchange_states(split)
        return joined_chunks(width, team, split, params)

    return row_moments


@device
def below(part_max, row_max, params):
    """What brings sums of a part, relative to its maximum, to the maximum of its row. No sum if there is no maximum."""
    return exp_gap(mul(part_max, number(part_max, 0.5)), halved(row_max), params[0], params[1])


@device
def first_of_chunk(chunk, split, like):
    """The first column of a chunk."""
    return int32(shifted_up(chunk, split_piece_bits(split)) * split_lanes(split) * n_values(like))


moments_along_a_line = row_moments_with(has_lines=False)
moments_of_an_image = row_moments_with(has_lines=True)


# ---------------------------------------------------------------- backward


def gradients_with(has_lines, exp_from, exp_gap):
    @device
    def pull_at(col, k, at, image, numbers):
        """What the probability of column col + k is multiplied by; `at` is (line, place) of the column `col`."""
        place, per_place, line, per_line = numbers
        if not has_lines:
            return mul(sub(number(place, int32(col + k)), place), per_place)
        _, width, inverse = image
        lines, places = line_and_place(number(place, k), sub(width, number(place, at[1])), width, inverse)
        value = mul(sub(places, place), per_place)
        return fma(sub(add(lines, number(place, at[0])), line), per_line, value)

    @device
    def gradients(values, others, col, width, numbers):
        half, exponent, lowest, factor, place, per_place, line, per_line, params, image, through = numbers
        scale, scale_low, c, c_low = params
        if is_near(exponent):
            for k in range(width):
                others[k] = values[k]
                values[k] = mul(exp_from(values[k], exponent, lowest, c, c_low), factor)
        else:
            for k in range(width):
                others[k] = values[k]
                values[k] = mul(exp_gap(values[k], half, scale, scale_low, c, c_low), factor)
        at = int32(0), int32(0)
        if has_lines:
            first = quotient(int32(col), image[0])
            at = first, int32(int32(col) - first * image[0])
        for k in range(width):
            gradient = mul(values[k], pull_at(col, k, at, image, (place, per_place, line, per_line)))
            values[k] = pulled_back(gradient, others[k], through)

    return gradients


def row_backward_with(has_lines):
    """A device function that writes p_c (per_place (j - place) + per_line (i - line)) / T; pull has these numbers."""
    write_halves = row_writer(gradients_with(has_lines, cheap_exp_from, cheap_exp_gap))
    write = row_writer(gradients_with(has_lines, ordered_exp_from, exact_exp_gap))

    @device
    def row_backward(target, source, n_cols, width, pull, team, split, scale, scale_low):
        params = gap_params(scale, scale_low)
        row_max, total = softmax_state(source, n_cols, team, split, params)
        exponent = anchor(row_max, params[2])
        lowest = lowest_of(exponent, params[2])
        factor = row_inverse(row_max, total, number(scale, 0.0))
        if not stored_in_halves(target.pointer):
            factor = corrected_inverse(factor, row_max, exponent, params[3])
        factor = mul(factor, mul(scale, number(scale, 0.5)))
        image = width, number(scale, width), div(number(scale, 1.0), number(scale, width))
        numbers = (
            halved(row_max), exponent, lowest, factor, pull[0], pull[1], pull[2], pull[3], params, image,
            source.through,
        )  # fmt: skip
        if stored_in_halves(target.pointer):
            write_halves(target, (source,), n_cols, team, split, numbers, scale)
        else:
            write(target, (source,), n_cols, team, split, numbers, scale)

    return row_backward


backward_along_a_line = row_backward_with(has_lines=False)
backward_of_an_image = row_backward_with(has_lines=True)
