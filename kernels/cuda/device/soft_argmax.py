"""The expected column under the softmax of a row, and its backward.

The mathematics stands in kernels/cpu/moments.py.
"""

from numpy import int32

from gpusoftmax.kernels.cuda.device.arithmetic import number
from gpusoftmax.kernels.cuda.device.memory import store
from gpusoftmax.kernels.cuda.device.moments import backward_along_a_line, moments_along_a_line
from gpusoftmax.kernels.cuda.device.pieces import own_row, team_of
from gpusoftmax.kernels.cuda.device.rows import number_of_row, row_of


def soft_argmax_rows(rows, split, start, logits, expected, scale, scale_low):
    team = team_of(split, 1)
    row = own_row(start, split)
    n_cols = rows.n_cols if row < rows.n_rows else 0
    source = row_of(logits, row, rows)
    place, _ = moments_along_a_line(source, n_cols, int32(1), team, split, scale, scale_low)
    if row < rows.n_rows and team.lane == 0 and team.rank == 0:
        store(row_of(expected, row, rows).pointer, 0, place)


def soft_argmax_backward_rows(rows, split, start, logits, expected, dexpected, dlogits, scale, scale_low):
    team = team_of(split, 1)
    row = own_row(start, split)
    n_cols = rows.n_cols if row < rows.n_rows else 0
    source, target = row_of(logits, row, rows), row_of(dlogits, row, rows)
    zero = number(scale, 0.0)
    pull = number_of_row(expected, row, rows, scale), number_of_row(dexpected, row, rows, scale), zero, zero
    backward_along_a_line(target, source, n_cols, int32(1), pull, team, split, scale, scale_low)
