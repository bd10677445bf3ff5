"""Products of matrices, by the library that these belong to: BLAS for NumPy and torch, cuBLAS for CuPy and torch.

They are NumPy arrays, CuPy arrays or torch tensors. NumPy and CuPy cannot add a product to what is there, so it
is made a few rows at a time beside it, in a `room`: never a second matrix of the size of the sum.
"""

from collections.abc import Callable, Iterator
from typing import Any

import array_api_compat

from gpusoftmax import _arrays, _rows
from gpusoftmax._arrays import Array


def multiply(left: Any, right: Any, out: Any) -> None:
    """out = left @ right"""
    if array_api_compat.is_torch_array(out):
        out.addmm_(left, right, beta=0)  # 0: what is there is not read
    else:
        array_api_compat.array_namespace(out).matmul(left, right, out=out)


def add_product(left: Any, right: Any, total: Any, room: Any | None) -> None:
    """total += left @ right. `room` is for some rows of that, in the dtype of the factors; None if the library adds."""
    if room is None:
        total.addmm_(left, right)
        return
    for rows in blocks(len(total), len(room)):
        part = total[rows]
        product = room[: len(part)]
        multiply(left[rows], right, product)
        part += product


def adds(x: Array, dtype: str, sum_dtype: str) -> bool:
    """Whether the library of x adds products: torch does, to a sum of the dtype of the factors."""
    return x.kind == "torch" and dtype == sum_dtype


def is_factor(matrix: Array, dtype: str) -> bool:
    """Whether BLAS takes the matrix as it is. Libraries copy others as a whole, or multiply them without BLAS."""
    (n_rows, n_cols), (down, along) = matrix.shape, matrix.strides
    by_rows = along == 1 and down >= max(n_cols, 1)
    by_cols = down == 1 and along >= max(n_rows, 1)
    return matrix.dtype == dtype and (by_rows or by_cols)


def factor(matrix: Array, dtype: str, most: int, copied: bool = False) -> Callable[[slice], Any]:
    """What gives rows of a matrix, up to `most`, as a factor of this dtype: as they are if BLAS takes them, else copied
    into a room that the next ones are copied into; always `copied` where they are to be changed.
    """
    rows_of = matrix.library_array
    if is_factor(matrix, dtype) and not copied:
        return lambda rows: rows_of[rows]
    room = _arrays.empty(matrix, (most, matrix.shape[1]), dtype).library_array

    def copy(rows: slice) -> Any:
        part = room[: rows.stop - rows.start]
        _rows.copy_into(_arrays.wrap(rows_of[rows], "rows"), _arrays.wrap(part, "room"))
        return part

    return copy


def clear(matrix: Any, rows: Any) -> None:
    """Makes zeros of the rows where `rows` is true, without waiting for a GPU to say how many they are."""
    if array_api_compat.is_torch_array(matrix):
        matrix.masked_fill_(rows[:, None], 0)
    else:
        matrix[rows] = 0


def blocks(size: int, step: int) -> Iterator[slice]:
    return (slice(first, min(first + step, size)) for first in range(0, size, step))
