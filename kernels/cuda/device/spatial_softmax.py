"""Expected coordinates under the softmax over the pixels of an image, and their backward.

The mathematics stands in kernels/cpu/spatial_softmax.py and kernels/cpu/moments.py.
"""

from numpy import int32

from gpusoftmax.kernels.cuda.device.arithmetic import coordinate, number, per_place_of, place_of
from gpusoftmax.kernels.cuda.device.memory import store
from gpusoftmax.kernels.cuda.device.moments import backward_of_an_image, moments_of_an_image
from gpusoftmax.kernels.cuda.device.pieces import own_row, team_of
from gpusoftmax.kernels.cuda.device.rows import number_of_row, row_of
from gpusoftmax.kernels.cuda.device.split import quotient


def spatial_softmax_rows(rows, split, start, features, x, y, width, scale, scale_low):
    team = team_of(split, 1)
    row = own_row(start, split)
    n_cols = rows.n_cols if row < rows.n_rows else 0
    source = row_of(features, row, rows)
    place, line = moments_of_an_image(source, n_cols, int32(width), team, split, scale, scale_low)
    if row < rows.n_rows and team.lane == 0 and team.rank == 0:
        height = quotient(int32(rows.n_cols), int32(width))
        store(row_of(x, row, rows).pointer, 0, coordinate(place, number(scale, int32(width - 1))))
        store(row_of(y, row, rows).pointer, 0, coordinate(line, number(scale, int32(height - 1))))


def spatial_softmax_backward_rows(
    rows, split, start, features, x, y, dx, dy, dfeatures, width, scale, scale_low
):  # fmt: skip
    team = team_of(split, 1)
    row = own_row(start, split)
    n_cols = rows.n_cols if row < rows.n_rows else 0
    source, target = row_of(features, row, rows), row_of(dfeatures, row, rows)
    height = quotient(int32(rows.n_cols), int32(width))
    last_place, last_line = number(scale, int32(width - 1)), number(scale, int32(height - 1))
    pull = (
        place_of(number_of_row(x, row, rows, scale), last_place),
        per_place_of(number_of_row(dx, row, rows, scale), last_place),
        place_of(number_of_row(y, row, rows, scale), last_line),
        per_place_of(number_of_row(dy, row, rows, scale), last_line),
    )
    backward_of_an_image(target, source, n_cols, int32(width), pull, team, split, scale, scale_low)
