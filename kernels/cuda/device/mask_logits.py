"""Logits below a limit of their row become -inf. threshold.py finds the limit."""

import math

from numpy import int64

from gpusoftmax.kernels.cuda.device._cuda import device
from gpusoftmax.kernels.cuda.device.arithmetic import number
from gpusoftmax.kernels.cuda.device.piece_state import gap_params
from gpusoftmax.kernels.cuda.device.pieces import own_row, team_of
from gpusoftmax.kernels.cuda.device.row_writer import row_writer
from gpusoftmax.kernels.cuda.device.rows import row_of
from gpusoftmax.kernels.cuda.device.threshold import kept_from, limit_of, limit_of_own, own_numbers_of


@device
def kept(values, others, col, width, numbers):
    for k in range(width):
        values[k] = kept_from(values[k], numbers[0])


write_kept = row_writer(kept)


def mask_logits_rows(rows, split, start, logits, masked, top_k, top_p, from_max, scale, scale_low):
    team = team_of(split, 1)
    row = own_row(start, split)
    n_cols = rows.n_cols if row < rows.n_rows else int64(0)
    source, limits = row_of(logits, row, rows), (top_k, top_p, from_max)
    limit = limit_of(source, n_cols, rows.n_cols, limits, team, split, gap_params(scale, scale_low))
    write_kept(row_of(masked, row, rows), (source,), n_cols, team, split, (limit,), scale)


def mask_mixed_logits_rows(rows, split, start, logits, masked, temperatures, t, top_ks, top_ps, p, min_ps, m):
    team = team_of(split, 1)
    row = own_row(start, split)
    n_cols = rows.n_cols if row < rows.n_rows else int64(0)
    source, own = row_of(logits, row, rows), own_numbers_of(row, rows, temperatures, t, top_ks, top_ps, p, min_ps, m)
    limit = limit_of_own(source, n_cols, rows.n_cols, own, team, split)
    if not own.is_given or own.temperature == number(t, 0.0):
        limit = number(t, math.inf)
    write_kept(row_of(masked, row, rows), (source,), n_cols, team, split, (limit,), t)
