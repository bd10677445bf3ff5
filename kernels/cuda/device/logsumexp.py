"""Log-sum-exp. The mathematics stands in kernels/cpu/logsumexp.py."""

from gpusoftmax.kernels.cuda.device.arithmetic import logsumexp
from gpusoftmax.kernels.cuda.device.memory import store
from gpusoftmax.kernels.cuda.device.piece_state import gap_params
from gpusoftmax.kernels.cuda.device.row_state import loss_state
from gpusoftmax.kernels.cuda.device.rows import own_row, row_of, team_of


def logsumexp_rows(rows, split, start, logits, lse, scale, scale_low):
    params = gap_params(scale, scale_low)
    team = team_of(split, 1)
    row = own_row(start, split)
    n_cols = rows.n_cols if row < rows.n_rows else 0
    state = loss_state(row_of(logits, row, rows), n_cols, row, team, split, params)
    if row < rows.n_rows and team.lane == 0 and team.rank == 0:
        store(row_of(lse, row, rows).pointer, 0, logsumexp(state, scale, scale_low))
