"""How a kernel gets from rows of an array to chunks and back.

    along rows     lanes are columns; one row at a time, or parts of one row on several threads
    across rows    lanes are rows, in a copy in the cache: for rows of a few columns, which would not fill a vector, and
                   for reductions over an axis that is not the last, where neighbouring rows are neighbours in memory
    in blocks      along rows while lanes are columns, across a block of them in between: for rows of one short chunk

Every op is three steps, on whatever chunks they are given:

    1. measure   every chunk by itself: its maximum, its sums relative to its own anchor
    2. fold      the states of the chunks, in order, into what the row needs to know
    3. write     every chunk by itself

The chunks of a row and the order of its sums depend on n_cols and the computation format alone (chunks.py). A row has
the same bits in any batch and layout, on any threads, whole or in parts, along, across or in blocks.
"""

from numba.extending import overload

from gpusoftmax.kernels.cpu.across import across_rows
from gpusoftmax.kernels.cpu.along import along_rows
from gpusoftmax.kernels.cpu.blocks import rows_in_blocks
from gpusoftmax.kernels.cpu.cache import HELPER_OPTIONS
from gpusoftmax.kernels.cpu.vector import (
    Way,
)

ALONG, ACROSS, IN_BLOCKS = Way("along"), Way("across"), Way("in blocks")
_WALKS = {"along": along_rows, "across": across_rows, "in blocks": rows_in_blocks}


def walk(way, job, rows, first, second, target, prepare, measure, fold, write, numbers, like):
    """Runs the three steps over this thread's share of the rows.

    measure(here, first, last, numbers), fold(here, numbers) -> summary, write(here, first, last, summary, numbers):
    `first` and `last` are chunks, `numbers` what else the op's functions need. An op that reads one array gives it as
    `second` too, one whose result is a number per row also as `target`.
    """
    raise NotImplementedError("called from kernels only")


@overload(walk, jit_options=HELPER_OPTIONS)
def _walk(way, job, rows, first, second, target, prepare, measure, fold, write, numbers, like):
    chosen = _WALKS[way.way]

    def walk_chosen(way, job, rows, first, second, target, prepare, measure, fold, write, numbers, like):
        chosen(way, job, rows, first, second, target, prepare, measure, fold, write, numbers, like)

    return walk_chosen
