"""From arrays to rows: arrays of any shape, strides and axes in the (outer, inner, column) form that kernels take."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from gpusoftmax import _arrays, _checks
from gpusoftmax._arrays import Array
from gpusoftmax.kernels import operands
from gpusoftmax.kernels.operands import Labels, Operand, Rows, Transform


def without_axes(array: Array, axes: tuple[int, ...], keepdims: bool = False) -> tuple[int, ...]:
    """The shape of a result that has one number per row."""
    if keepdims:
        return tuple(1 if axis in axes else size for axis, size in enumerate(array.shape))
    return tuple(size for axis, size in enumerate(array.shape) if axis not in axes)


def column_count(array: Array, axes: tuple[int, ...]) -> int:
    return math.prod(array.shape[axis] for axis in axes)


def per_row(array: Array, axes: tuple[int, ...], ndim: int) -> Array:
    """An array of one number per row, stretched over the reduced axes with stride 0, to walk beside the logits."""
    if array.ndim == ndim:
        strides = tuple(0 if axis in axes else stride for axis, stride in enumerate(array.strides))
    else:
        kept = iter(array.strides)
        strides = tuple(0 if axis in axes else next(kept) for axis in range(ndim))
    return Array(*array[:5], strides, *array[6:])  # _replace takes four times as long


def part(array: Array, k: int) -> Array:
    """array[..., k], which a kernel takes as one number per row; only to be read and written through its pointer."""
    pointer = array.pointer + k * array.strides[-1] * array.itemsize
    return array._replace(pointer=pointer, shape=array.shape[:-1], strides=array.strides[:-1])


def rows_of(array: Array, rows: slice) -> Array:
    """array[rows] of an array of one axis, for a kernel; only to be read and written through its pointer."""
    pointer = array.pointer + rows.start * array.strides[0] * array.itemsize
    return array._replace(pointer=pointer, shape=(rows.stop - rows.start,))


class _Dim(NamedTuple):
    size: int
    strides: tuple[int, ...]  # one per array


def _coalesce(dims: list[_Dim]) -> list[_Dim]:
    """Joins neighbouring axes that every array walks with one stride; axes of size 1 vanish."""
    joined: list[_Dim] = []
    for dim in dims:
        if dim.size == 1:
            continue
        if joined and all(
            outer == inner * dim.size for outer, inner in zip(joined[-1].strides, dim.strides, strict=True)
        ):
            joined[-1] = _Dim(joined[-1].size * dim.size, dim.strides)
        else:
            joined.append(dim)
    return joined


def all_labels(array: Array, n_cols: int) -> tuple[Rows, Labels, Array]:
    """An array of one label per row, by itself: all its rows in one call, in C order.

    One that takes more than two strides to walk is flattened by its own library. The third result keeps the memory of
    the labels; hold it until the kernels that read them have been started.
    """
    dims = _coalesce([_Dim(size, (stride,)) for size, stride in zip(array.shape, array.strides, strict=True)])
    if len(dims) > 2:
        if array.kind == "device":
            raise TypeError(f"target, {array.home}, takes more than two strides to walk: pass a contiguous copy")
        array = _arrays.wrap(array.library_array.reshape(-1), "copy")
        dims = [_Dim(array.size, array.strides)]
    outer, inner = ([_Dim(1, (0,))] * 2 + dims)[-2:]
    rows = Rows(array.size, max(inner.size, 1), n_cols)
    labels = Labels(array.pointer, outer.strides[0], inner.strides[0], operands.label_code(array.dtype))
    return rows, labels, array


def for_rows(call: Callable[..., None], axes: tuple[int, ...], reads: Sequence[Array], writes: Sequence[Array]) -> None:
    """call(rows, *operands of reads, *operands of writes) until every row is done; no call for an empty batch.

    The logits come first in `reads` and give the shape. Two batch axes go to the kernel, further ones that cannot be
    joined with them are looped over here. Reduced axes that form no single stride cost one copy of each array.
    """
    transform = reads[0].transform
    arrays = [*reads, *writes]
    if transform is not None:
        arrays += [field for field in transform if isinstance(field, Array)]
    walk = _walk(axes, reads[0].shape, tuple([array.strides for array in arrays]))
    if walk is None:
        _checks.one_stride(axes, transform)
        _for_rows_of_copies(call, axes, reads, writes)
        return
    for index in itertools.product(*walk.calls):
        here = []
        for k, array in enumerate(arrays):
            pointer, (outer, inner, col) = array.pointer, walk.strides[k]
            for i, strides in zip(index, walk.call_strides, strict=True):
                pointer += i * strides[k] * array.itemsize
            if array.dtype in _LABELS:
                here.append(Labels(pointer, outer, inner, operands.label_code(array.dtype)))
            else:
                here.append(Operand(pointer, outer, inner, col, array.dtype))
        if transform is not None:
            fields = iter(here[len(reads) + len(writes) :])
            here[0] = here[0]._replace(
                transform=Transform(*(next(fields) if isinstance(field, Array) else field for field in transform))
            )
            del here[len(reads) + len(writes) :]
        call(walk.rows, *here)


_LABELS = frozenset(operands.LABELS)


class _Walk(NamedTuple):
    """Strides count elements and come for each array."""

    rows: Rows  # of one call
    strides: tuple[tuple[int, int, int], ...]  # (outer, inner, column)
    calls: tuple[range, ...]  # the batch axes that are looped over: none for one call, an empty range for no call
    call_strides: tuple[tuple[int, ...], ...]


@functools.lru_cache(maxsize=4096)
def _walk(axes: tuple[int, ...], shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...]) -> _Walk | None:
    """How kernels walk arrays of one shape along `axes`; None if no single stride walks these."""
    n_cols = math.prod(shape[axis] for axis in axes)
    _checks.column_count(n_cols)
    dims = [_Dim(size, tuple(each[axis] for each in strides)) for axis, size in enumerate(shape)]
    cols = _coalesce([dims[axis] for axis in axes])
    batch = [dim for axis, dim in enumerate(dims) if axis not in axes]
    if math.prod(dim.size for dim in batch) == 0:
        return _Walk(Rows(0, 0, n_cols), (), (range(0),), ())
    if len(cols) > 1 and n_cols:
        return None
    col_strides = cols[0].strides if cols else (1,) * len(strides)
    batch = [_Dim(1, (0,) * len(strides))] * 2 + _coalesce(batch)
    outer, inner = batch[-2:]
    looped = [dim for dim in batch[:-2] if dim.size > 1]
    return _Walk(
        Rows(outer.size * inner.size, inner.size, n_cols),
        tuple(zip(outer.strides, inner.strides, col_strides, strict=True)),
        tuple(range(dim.size) for dim in looped),
        tuple(dim.strides for dim in looped),
    )


def _for_rows_of_copies(call, axes, reads, writes) -> None:
    """for_rows on copies that have the reduced axes last and contiguous; what was written is copied back. A result
    takes the place of the first array's copy if it has its dtype: kernels that write rows work in place.
    """
    full = reads[0].shape
    order = tuple(axis for axis in range(len(full)) if axis not in axes) + axes
    last = tuple(range(len(full) - len(axes), len(full)))

    def reordered(array: Array) -> Array:
        """The axes in the new order. One number per row comes with as many strides, see per_row."""
        shape = tuple(full[axis] for axis in order)
        return array._replace(shape=shape, strides=tuple(array.strides[axis] for axis in order))

    def copied(array: Array, filled: bool) -> Array:
        if array.shape != full:
            return reordered(array)
        copy = _arrays.empty(array, reordered(array).shape, array.dtype)
        if filled:
            copy_into(reordered(array), copy)
        return copy

    sources = [copied(array, filled=True) for array in reads]
    in_place = [array.shape == full and array.dtype == reads[0].dtype for array in writes]
    targets = [
        sources[0] if is_in_place else copied(array, filled=False)
        for array, is_in_place in zip(writes, in_place, strict=True)
    ]
    for_rows(call, last, sources, targets)
    for array, target in zip(writes, targets, strict=True):
        if array.shape == full:
            copy_into(target, reordered(array))


# ---------------------------------------------------------------- copies, by a kernel


def contiguous(array: Array, dtype: str) -> Array:
    """The array itself if it is C-contiguous and of this floating dtype, or else a copy that is."""
    walks = zip(array.shape, array.strides, _arrays.row_major(array.shape), strict=True)
    if dtype == array.dtype and all(size <= 1 or stride == dense for size, stride, dense in walks):
        return array
    if not array.ndim:  # rows of copies have an axis
        return contiguous(array._replace(shape=(1,), strides=(1,)), dtype)._replace(shape=(), strides=())
    copied = _arrays.empty(array, array.shape, dtype)
    copy_into(array, copied)
    return copied


def copy_into(source: Array, target: Array) -> None:
    """target[...] = source, by a kernel, so that every kind of array can be copied alike."""
    copy = _arrays.kernels(source.place, "copy").copy
    n_cols = source.shape[-1]
    for first in range(0, n_cols, _MOST_COPIED):  # numbers of rows may be more than the columns of any
        reads, writes = ([_columns_of(one, first, min(_MOST_COPIED, n_cols - first))] for one in (source, target))
        for_rows(lambda rows, read, write: copy(rows, read, write, source.place), (source.ndim - 1,), reads, writes)


_MOST_COPIED = 1 << 30


def _columns_of(array: Array, first: int, count: int) -> Array:
    """array[..., first : first + count], for a kernel; only to be read and written through its pointer."""
    pointer = array.pointer + first * array.strides[-1] * array.itemsize
    return array._replace(pointer=pointer, shape=(*array.shape[:-1], count))
