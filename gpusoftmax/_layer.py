"""A linear layer in chunks of rows: their logits, and what the gradient of these gives for input, weights and bias.

Z = X W^T + b        dX = dZ W        dW = dZ^T X        db = the sum of the rows of dZ
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from gpusoftmax import _arrays, _rows
from gpusoftmax._arrays import Array
from gpusoftmax._products import add_product, adds, blocks, clear, factor, is_factor, multiply

CHUNK_BYTES = {"cpu": 2**26, "cuda": 2**28}
"""Of the logits of a chunk where no size is given. kernels/README.md says why 64 MiB; 256 MiB has not been measured."""
_ROOM_SHARE = 8
_LEAST_ROOM_BYTES = 2**17
"""Copies of a part of the weights, and a part of a sum that is made beside it, together take one part in _ROOM_SHARE
of the bytes of a chunk of logits, and not less than this, so that small chunks are not worked on in crumbs.
"""


def chunks(
    x: Array,
    weight: Array,
    bias: Array | None,
    gradients: Sequence[Array | None],
    row_scale: Array | None,
    idle: Any | None,
    chunk_size: int | None,
) -> Iterator[tuple[slice, Array]]:
    """Yields one chunk of rows after the other with its logits, C-contiguous and always in the same memory.

    Whoever takes them puts their gradient in their place before the next turn. The `gradients` of x, weight and bias
    (None: not wanted) are made of it, times `row_scale` (one number per row), and complete when the chunks are through.
    Rows that are `idle` must have a gradient of zeros, and add nothing to the others' whatever x and `row_scale` hold
    there.
    """
    n_classes, n_features = weight.shape
    n_rows = math.prod(x.shape[:-1])
    sum_dtype, dtype = _arrays.compute_dtype(x), _factor_dtype(x)
    n_rooms = 1 if is_factor(weight, dtype) else 2
    size = _chunk_rows(n_rows, n_classes, dtype, chunk_size, x.place.target)
    step = _room_rows(size, n_classes, n_features, dtype, n_rooms)
    new = partial(_new, x, dtype=dtype)
    dx, dweight, dbias = gradients

    x = _arrays.reshaped(x, (n_rows, n_features), "input")
    x_rows = factor(x, dtype, size, copied=idle is not None or row_scale is not None)
    weight = _arrays.reshaped(weight, weight.shape, "linear_weight")
    weight_rows = factor(weight, dtype, step)
    classes = [slice(0, n_classes)] if n_rooms == 1 else list(blocks(n_classes, step))
    if bias is not None:
        bias = _rows.contiguous(bias, dtype).library_array
    if dx is not None:
        dx_rows = dx.library_array.reshape(n_rows, n_features)
        dx_room = None if dx.dtype == dtype else new((size, n_features))
    weight_sum, bias_sum = _sum_of(dweight, sum_dtype), _sum_of(dbias, sum_dtype)
    room, bias_room = None, None
    if not adds(x, dtype, sum_dtype):
        room = new((step, n_features)) if dweight is not None or (dx is not None and len(classes) > 1) else None
        bias_room = None if dbias is None else new((1, n_classes))
    row_factors = None
    if row_scale is not None:
        row_factors = _arrays.reshaped(_rows.contiguous(row_scale, dtype), (n_rows, 1), "grad_scale").library_array
        if idle is not None:  # whatever comes from above: 0 times NaN is none
            given, row_factors = row_factors, new((n_rows, 1))
            row_factors[...] = given
            clear(row_factors, idle)
    elif dbias is not None:
        ones = new((1, size))
        ones[...] = 1

    logits = _arrays.empty(x, (size, n_classes), dtype)
    for rows in blocks(n_rows, size):
        z = logits.library_array[: rows.stop - rows.start]
        features = x_rows(rows)
        if idle is not None:
            clear(features, idle[rows])
        for some in classes:
            multiply(features, weight_rows(some).T, z[:, some])
        if bias is not None:
            z += bias
        yield rows, logits._replace(shape=tuple(z.shape))
        if dx is not None:
            product = dx_rows[rows] if dx_room is None else dx_room[: len(z)]
            for some in classes:
                put = multiply if some.start == 0 else partial(add_product, room=room)
                put(z[:, some], weight_rows(some), product)
            if row_factors is not None:
                product *= row_factors[rows]
            if dx_room is not None:
                _rows.copy_into(_arrays.wrap(product, "product"), _arrays.wrap(dx_rows[rows], "dinput"))
        if dweight is not None:
            if row_factors is not None:  # the features are fewer than the classes
                features *= row_factors[rows]
            add_product(z.T, features, weight_sum.library_array, room)
        if dbias is not None:
            scales = ones[:, : len(z)] if row_factors is None else row_factors[rows].T
            add_product(scales, z, bias_sum.library_array[None], bias_room)
    for total, gradient in ((weight_sum, dweight), (bias_sum, dbias)):
        if total is not gradient:
            _rows.copy_into(total, gradient)


def _factor_dtype(x: Array) -> str:
    """Of the logits, and of all that is multiplied. cuBLAS multiplies half types at full speed and adds in float32; on
    the CPU nothing does.
    """
    return _arrays.compute_dtype(x) if x.place.target == "cpu" else x.dtype


def _chunk_rows(n_rows: int, n_classes: int, dtype: str, chunk_size: int | None, target: str) -> int:
    if chunk_size is None:
        most = max(1, CHUNK_BYTES[target] // (n_classes * _arrays.numpy_dtype(dtype).itemsize))
        n_chunks = -(-n_rows // most)
        chunk_size = -(-n_rows // max(n_chunks, 1))  # all of nearly one size
    return max(1, min(chunk_size, n_rows))


def _room_rows(chunk_rows: int, n_classes: int, n_features: int, dtype: str, n_rooms: int) -> int:
    """The rows of each of the rooms, as wide as the weights."""
    itemsize = _arrays.numpy_dtype(dtype).itemsize
    room_bytes = max(_LEAST_ROOM_BYTES, chunk_rows * n_classes * itemsize // _ROOM_SHARE) // n_rooms
    return max(1, min(room_bytes // max(n_features * itemsize, 1), n_classes))


def _new(like: Array, shape: tuple[int, ...], dtype: str) -> Any:
    """A new array of the library by which `like` is reached."""
    return _arrays.empty(like, shape, dtype).library_array


def _sum_of(gradient: Array | None, dtype: str) -> Array | None:
    """Zeros to which a gradient is summed up: in its own memory, if it has that dtype."""
    if gradient is None:
        return None
    total = gradient if gradient.dtype == dtype else _arrays.empty(gradient, gradient.shape, dtype)
    total.library_array[...] = 0
    return total
