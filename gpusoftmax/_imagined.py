"""A call of an op on a GPU that need not exist: its arguments by name, with arrays that have no memory."""

import functools
import inspect
import math
from typing import Any

import numpy as np

import gpusoftmax
from gpusoftmax import _arrays, _checks
from gpusoftmax.kernels.operands import NO_BAD_LABEL

TOP = 8
"""Columns that are asked of top_logprobs and topk_softmax, or all there are, and the labels of a row with shares."""
IMAGES = ("spatial_softmax", "spatial_softmax_backward")
"""Those whose rows run along the last two axes."""
_OF_ROWS = {"logsumexp": (), "argmax": (), "soft_argmax": (), "spatial_softmax": (2,)}
"""The shape of a row's result, where it is not another row."""

FIRST = ("x", "logits", "probs", "log_probs", "features")
_ROWS = (*FIRST, "dprobs", "tangent", "dlog_probs", "target_logits")
UP_TO_N_VALID = (*FIRST, "bias", "mask")
"""Of what kernels read nothing behind n_valid columns."""
_COLUMNS = ("bias", "weight")
_POINTS = ("coordinates", "dcoordinates")
_NUMBERS = ("lse", "dloss", "dlogprob", "dentropy", "expected", "dexpected")
_ARRAYS = (
    *(*_ROWS, *_COLUMNS, *_POINTS, *_NUMBERS, "mask", "target", "normalizer", "out"),
    *("temperature", "n_valid", "row_weight", "rng", "top_k", "top_p", "min_p"),
)
"""The parameters that are arrays or may be, by what they have elements for."""
_LIMITS = {"top_k": 50, "top_p": 0.9}
"""What is given where one is needed; no launch depends on it."""
_ROOM = 52
"""So many bits of an address tell a place in an array, as large as no memory is; those above, which array it is."""


class Imagined:
    """An array on a device that need not exist. `known`: the arrays of its call, by their numbers.

    `name` is that of the argument which it is, and empty if the call has made it.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: Any, known: "dict[int, Imagined]", name: str = "",
        strides: tuple[int, ...] | None = None,
    ):  # fmt: skip
        self.shape, self.dtype, self.name = tuple(shape), np.dtype(dtype), name
        number = len(known) + 1
        known[number] = self
        self.__cuda_array_interface__ = {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "strides": strides and tuple(stride * self.dtype.itemsize for stride in strides),
            "data": (number << _ROOM if math.prod(self.shape) else 0, False),
            "version": 3,
        }
        # An attribute of the object, and so nothing that _replay.py would take for an array on a GPU.
        self.__gpusoftmax_empty__ = functools.partial(Imagined, known=known)

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def item(self) -> int:
        return NO_BAD_LABEL


def number_of(address: int) -> int:
    """The number of the array in which an address lies."""
    return address >> _ROOM


def parameters(op: str) -> tuple[str, ...]:
    """What calls of an op may be given beside its first argument. Of its result `out` has the dtype: `dtype` is that of
    the first argument here.
    """
    takes = inspect.signature(getattr(gpusoftmax, op)).parameters
    return tuple(name for name in takes if name not in (*FIRST, "dtype"))


def row_axes(op: str, ndim: int, options: dict[str, Any]) -> tuple[int, ...]:
    """The axes along which the rows of a call run."""
    return (ndim - 2, ndim - 1) if op in IMAGES else _checks.axes(options.get("axis", -1), ndim)


def call(
    op: str, shape: tuple[int, ...], dtype: str, options: dict[str, Any], strides: tuple[int, ...] | None = None
) -> tuple[dict[str, Any], dict[int, Imagined]]:
    """Calls `op`. Returns its arguments by name, and all arrays by number: arguments, results and what is between.

    options: arguments by name. Whatever has a shape and a dtype stands for an array on the device; a dtype alone for
    the usual one: a number for each row, a bias for each column, a mask for each logit. strides: of the first argument,
    in elements; by default it is C-contiguous, as all others are.
    """
    _checks.options(options, parameters(op), op)
    known: dict[int, Imagined] = {}
    takes = inspect.signature(getattr(gpusoftmax, op)).parameters
    axes = row_axes(op, len(shape), options)
    needed = [name for name, one in takes.items() if one.default is one.empty]
    asked = {name: _usual(name, dtype, math.prod(shape[axis] for axis in axes)) for name in needed} | options

    def array(given: Any, name: str, in_pair: bool = False) -> Any:
        if isinstance(given, tuple):
            return tuple(array(one, name, in_pair=True) for one in given)
        if given is None or isinstance(given, bool | int | float) or (is_array(given) and not given.shape):
            return given
        kind = numpy_dtype(given.dtype if is_array(given) else given, name)
        made = given.shape if is_array(given) else _usual_shape(op, name, kind, shape, axes, in_pair)
        return Imagined(made, kind, known, name, strides if name in (*FIRST, "out") else None)

    given = {name: array(one, name) if name in _ARRAYS else one for name, one in asked.items()}
    getattr(gpusoftmax, op)(**given)
    return given, known


def _usual(name: str, dtype: str, n_cols: int) -> Any:
    """What a call is given where it needs something."""
    if name in _ROWS:
        return dtype
    if name == "k":
        return min(TOP, n_cols)
    return "int64" if name in ("target", "rng") else _LIMITS.get(name, row_dtype(dtype))


def is_array(given: Any) -> bool:
    """Whether it has a shape and a dtype; an array without axes is a number."""
    return isinstance(getattr(given, "shape", None), tuple) and not isinstance(given, np.dtype)


def numpy_dtype(given: Any, name: str) -> np.dtype:
    """That of an array which is given as its dtype, of whatever library."""
    found = _checks.any_dtype(given, name)
    return _arrays.BFLOAT16 if found == "bfloat16" else np.dtype(found)


def row_dtype(dtype: str) -> str:
    """Of a number for each row."""
    return "float64" if dtype == "float64" else "float32"


def _usual_shape(
    op: str, name: str, kind: np.dtype, shape: tuple[int, ...], axes: tuple[int, ...], in_pair: bool
) -> tuple[int, ...]:
    """Of an array that is given as its dtype; in_pair: as one of two."""
    batch = tuple(size for axis, size in enumerate(shape) if axis not in axes)
    if name in _COLUMNS:
        return tuple(shape[axis] for axis in axes)
    if name == "mask" and kind != "bool":
        return tuple(-(-size // 32) if axis in axes else size for axis, size in enumerate(shape))
    if name == "target" and in_pair:
        return (*batch, TOP)
    if name == "out" and op in _OF_ROWS:
        return batch + _OF_ROWS[op]
    if name in (*_ROWS, "mask", "out") or (name == "target" and kind.kind not in "iu"):
        return shape
    return (1,) if name == "normalizer" else (*batch, 2) if name in _POINTS else batch
