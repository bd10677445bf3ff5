"""Log-sum-exp. The mathematics stands in kernels/cpu/logsumexp.py."""

from gpusoftmax.kernels.cuda.device._cuda import device
from gpusoftmax.kernels.cuda.device.arithmetic import logsumexp, number
from gpusoftmax.kernels.cuda.device.memory import store
from gpusoftmax.kernels.cuda.device.piece_state import gap_params
from gpusoftmax.kernels.cuda.device.pieces import own_row, team_of
from gpusoftmax.kernels.cuda.device.row_state import loss_numbers_with
from gpusoftmax.kernels.cuda.device.rows import row_of


@device
def finish(state, params):
    zero = number(params[0], 0.0)
    return logsumexp(state, params[0], params[1]), zero, zero, zero


logsumexp_numbers, _ = loss_numbers_with(finish)


def logsumexp_rows(rows, split, start, logits, lse, scale, scale_low):
    params = gap_params(scale, scale_low)
    team = team_of(split, 1)
    row = own_row(start, split)
    n_cols = rows.n_cols if row < rows.n_rows else 0
    result, _, _, _ = logsumexp_numbers(row_of(logits, row, rows), n_cols, team, split, params)
    if row < rows.n_rows and team.lane == 0 and team.rank == 0:
        store(row_of(lse, row, rows).pointer, 0, result)
