"""From a slot into registers, and back.

A slot holds the granules of a piece as they lie in global memory (piece_staging.py). A run that begins beside a
boundary is cut out of the two granules that hold it, at a distance that is the same for the whole row.
"""

from numpy import int32

from gpusoftmax.kernels.cuda.device._cuda import device
from gpusoftmax.kernels.cuda.device.memory import (
    VECTOR_BYTES,
    advance,
    element_size,
    n_values,
    number_size,
    vector_bits,
    vector_width,
)
from gpusoftmax.kernels.cuda.device.split import is_columns, is_long, split_lanes, split_slots
from gpusoftmax.kernels.cuda.device.staging import stage_vector, staged, staged_runs, staged_vector
from gpusoftmax.kernels.cuda.device.transform import fits_where_logits_were
from gpusoftmax.kernels.cuda.plan import WARP_SIZE

# ---------------------------------------------------------------- slot -> registers


@device
def read_piece(held, source, at, piece, team, split):
    """held = this lane's columns of the piece in the slot `at`; padding beyond its end."""
    granule = int32(at + team.lane * VECTOR_BYTES)
    shift = int32(source.shift * element_size(source.pointer))
    in_loop = is_columns(split)
    # The distance of a lane's runs is a constant in each branch: one address serves them all.
    if is_long(split):
        staged_runs(source.pointer, granule, shift, None, 32, False, held)
    elif split_lanes(split) == 32:
        staged_runs(source.pointer, granule, shift, piece.count, 32, in_loop, held)
    elif split_lanes(split) == 16:
        staged_runs(source.pointer, granule, shift, piece.count, 16, in_loop, held)
    elif split_lanes(split) == 8:
        staged_runs(source.pointer, granule, shift, piece.count, 8, in_loop, held)
    else:
        staged_runs(source.pointer, granule, shift, piece.count, 4, in_loop, held)


@device
def is_granule(source, place, width):
    """Whether so many columns, at this address in a slot, are a granule."""
    return width == vector_width(source.pointer) and place & (VECTOR_BYTES - 1) == 0


@device
def read_columns(values, source, place, width, as_granule):
    """values[:width] = the columns at an address in a slot and behind it."""
    size = element_size(source.pointer)
    if as_granule:
        staged_vector(source.pointer, place, values)
    else:
        for k in range(width):
            values[k] = staged(source.pointer, int32(place + k * size), values[k])


# ---------------------------------------------------------------- registers -> slot


@device
def are_left_transformed(source, team, split, like):
    """Whether a first pass leaves the logits in the slots as their transform has them, and the last one need not repeat
    it: where that loses nothing, every piece stays in its slot and runs are granules.
    """
    fits = fits_where_logits_were(source.through.transform, element_size(source.pointer) == number_size(like))
    return fits and is_long(split) and source.shift == 0 and team.n_pieces <= split_slots(split)


@device
def leave_transformed(held, source, at, team, split):
    """What read_piece has read, as it has become. The lane that wrote a granule of a whole piece reads it again."""
    bits, place = vector_bits(source.pointer), int32(at + team.lane * VECTOR_BYTES)
    for k in range(n_values(held[0]) >> bits):
        stage_vector(source.pointer, int32(place + k * WARP_SIZE * VECTOR_BYTES), advance(held, k << bits))
