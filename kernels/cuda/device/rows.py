"""What the arrays of a kernel, their rows, the pieces of a row and the threads that share it are.

pieces.py says who holds which column; piece_staging.py and row_staging.py bring a row into shared memory, slots.py from
there into registers, row_writer.py out again.
"""

from typing import NamedTuple

from numpy import int32

from gpusoftmax.kernels.cuda.device._cuda import device
from gpusoftmax.kernels.cuda.device.arithmetic import number
from gpusoftmax.kernels.cuda.device.memory import advance, is_null, load, misalignment, row_offset
from gpusoftmax.kernels.cuda.device.transform import through_of


class Strided(NamedTuple):
    """An Operand as a kernel gets it. The pointer's type names the storage format."""

    pointer: object
    outer_stride: int
    inner_stride: int
    col_stride: int
    transform: object  # None: its elements are read as they are


class Row(NamedTuple):
    """One row of an array: column c lies at pointer[c * stride]. `shift` elements lie between the last 16-byte boundary
    and column 0; it is 0, and there are no granules, if the columns are not neighbours.
    """

    pointer: object
    stride: int
    shift: int
    through: object  # what its elements go through on the way into registers, see transform.py; None: nothing


class Piece(NamedTuple):
    """The columns [first, first + count) of a row, which has `left` from the first on (or very many)."""

    first: int
    count: int
    left: int


class Team(NamedTuple):
    """The threads that share a row, as one of them sees it: it is lane `lane` of part `rank` of `size` parts. A part is
    a warp, or a few lanes of one where the row is short, and has `n_pieces` pieces of the row.
    """

    lane: int
    rank: int
    size: int
    n_pieces: int
    slots: int  # the address in shared memory where the slots of this part begin


@device
def row_of(array, row, rows):
    pointer = advance(array.pointer, row_offset(array, row, rows))
    shift = int32(misalignment(pointer) if array.col_stride == 1 else 0)
    return Row(pointer, array.col_stride, shift, through_of(array.transform, row, rows))


@device
def number_or(array, row, rows, default):
    """The number that an array has for a row, or the default where the caller gave no array."""
    return default if is_null(array.pointer) else load(row_of(array, row, rows).pointer, 0, default)


@device
def number_of_row(array, row, rows, like):
    """The number of a row from an array of one number per row."""
    return load(row_of(array, row, rows).pointer, 0, like) if row < rows.n_rows else number(like, 0.0)
