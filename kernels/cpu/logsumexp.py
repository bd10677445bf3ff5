"""Log-sum-exp over rows of logits on the CPU: max / T + log s, one pass over the row."""

from gpusoftmax.kernels.cpu.cache import kernel
from gpusoftmax.kernels.cpu.parallel import for_rows
from gpusoftmax.kernels.cpu.rows import buffer_pointer, new_buffer, row_offset, row_state
from gpusoftmax.kernels.cpu.vector import logsumexp as logsumexp_of_state
from gpusoftmax.kernels.cpu.vector import pointer_to, store_one
from gpusoftmax.kernels.operands import STORAGE, Operand, Place, Rows, compute_dtype, split


def logsumexp(rows: Rows, logits: Operand, lse: Operand, temperature: float, place: Place) -> None:
    dtype = compute_dtype(logits.dtype, lse.dtype)
    for_rows(
        logsumexp_rows,
        rows.n_rows,
        rows.n_cols,
        rows.n_inner,
        rows.n_cols,
        *logits.words,
        STORAGE[logits.dtype](0),
        *lse.words,
        STORAGE[lse.dtype](0),
        *split(2.0 / temperature, dtype),
    )


@kernel
def logsumexp_rows(
    first_row,
    last_row,
    n_inner,
    n_cols,
    logits_address,
    logits_outer,
    logits_inner,
    logits_col,
    logits_tag,
    lse_address,
    lse_outer,
    lse_inner,
    lse_col,
    lse_tag,
    scale,
    scale_low,
):
    logits = pointer_to(logits_address, logits_tag)
    lse = pointer_to(lse_address, lse_tag)
    params = (scale, scale_low)
    array = new_buffer(scale)
    buffer = buffer_pointer(array, scale)
    for row in range(first_row, last_row):
        start = row_offset(row, n_inner, logits_outer, logits_inner)
        state = row_state(buffer, logits, start, logits_col, n_cols, row, params)
        store_one(lse, row_offset(row, n_inner, lse_outer, lse_inner), logsumexp_of_state(state, scale, scale_low))
    array[0] = 0.0  # the buffer must outlive the last access through its address
