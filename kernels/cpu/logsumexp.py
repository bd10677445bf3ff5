"""Log-sum-exp over rows of logits on the CPU: max / T + log s, one pass over the row."""

from gpusoftmax.kernels.cpu.cache import kernel
from gpusoftmax.kernels.cpu.parallel import for_rows
from gpusoftmax.kernels.cpu.rows import buffer_pointer, new_buffer, row_of, row_state
from gpusoftmax.kernels.cpu.vector import logsumexp as logsumexp_of_state
from gpusoftmax.kernels.cpu.vector import store_one
from gpusoftmax.kernels.operands import Operand, Place, Rows, compute_dtype, scale_of


def logsumexp(rows: Rows, logits: Operand, lse: Operand, temperature: float, place: Place) -> None:
    scale = scale_of(2.0, temperature, compute_dtype(logits.dtype, lse.dtype))
    for_rows(logsumexp_rows, rows, logits, lse, *scale)


@kernel
def logsumexp_rows(first_row, last_row, rows, logits, lse, scale, scale_low):
    params = (scale, scale_low)
    array = new_buffer(scale)
    buffer = buffer_pointer(array, scale)
    for row in range(first_row, last_row):
        state = row_state(buffer, row_of(logits, row, rows), rows.n_cols, row, params)
        store_one(row_of(lse, row, rows).pointer, 0, logsumexp_of_state(state, scale, scale_low))
    array[0] = 0.0  # the buffer must outlive the last access through its address
