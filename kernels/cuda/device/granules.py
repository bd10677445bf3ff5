"""A lane's columns of a piece one granule after the other, straight from the slot and transformed: a loop that takes
few registers and little code, for kernels that do much with a column or go over a row many times. The columns are those
of `read_piece`.
"""

from numpy import int32

from gpusoftmax.kernels.cuda.device._cuda import device
from gpusoftmax.kernels.cuda.device.arithmetic import add
from gpusoftmax.kernels.cuda.device.memory import VECTOR_BYTES, element_size, granule_numbers, vector_bits
from gpusoftmax.kernels.cuda.device.slots import is_granule, read_columns
from gpusoftmax.kernels.cuda.device.split import split_lanes
from gpusoftmax.kernels.cuda.device.transform import transform


def granules_with(act):
    """A device function that gives a result from one granule to the next: result = act(result, values, col, width,
    source, split, numbers), where values[:width] are the columns col, col + 1, ... of the row. The lanes of a part take
    as many granules each: what lies beyond the row is padding.
    """

    @device
    def over_granules(result, source, at, piece, team, split, numbers, like):
        values = granule_numbers(like)
        bits, lanes = vector_bits(source.pointer), split_lanes(split)
        place = int32(at + source.shift * element_size(source.pointer) + team.lane * VECTOR_BYTES)
        as_granule = is_granule(source, place, 1 << bits)
        first = int32(0)
        while first < piece.count:
            read_columns(values, source, place, 1 << bits, as_granule)
            col = piece.first + first + (team.lane << bits)
            transform(values, col, 1 << bits, source.through)
            result = act(result, values, col, 1 << bits, source, split, numbers)
            first, place = int32(first + (lanes << bits)), int32(place + lanes * VECTOR_BYTES)
        return result

    return over_granules


@device
def granule_sum(values, width):
    """values[0] + ... + values[width - 1] as a balanced tree; they are used up."""
    if width == 8:
        for k in range(4):
            values[k] = add(values[k], values[k + 4])
    if width >= 4:
        for k in range(2):
            values[k] = add(values[k], values[k + 2])
    return add(values[0], values[1])
