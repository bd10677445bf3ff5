"""Starts a kernel by name: its image for the device, loaded once, with the arguments packed for the driver."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from gpusoftmax.kernels.cuda import compile, driver
from gpusoftmax.kernels.cuda.compile import Image
from gpusoftmax.kernels.cuda.plan import Columns, Long, Plan, Short, row_plan
from gpusoftmax.kernels.operands import MASKS, STORAGE, Labels, Numbers, Operand, Place, Rows, Transform, has_address

_STRIDED = {dtype: f"strided {dtype}" for dtype in (*STORAGE, *MASKS)}
_SPLITS = {Short: "short", Long: "long", Columns: "columns"}
_ABSENT = 0
"""Numba gives a parameter to what is None, too."""
_SCALARS = {np.float32: "float32", np.float64: "float64", int: "int64"}


class Launch(NamedTuple):
    """A launch as it was made."""

    image: Image
    plan: Plan
    words: tuple
    addresses: list[int]  # the positions of the words that are addresses


class _Recorder(threading.local):
    note: Callable[[Launch], None] | None = None
    imagined: driver.Device | None = None


_recorder = _Recorder()


@contextlib.contextmanager
def recording(note: Callable[[Launch], None]) -> Iterator[None]:
    """Tells `note` the launches that this thread has made."""
    _recorder.note = note
    try:
        yield
    finally:
        _recorder.note = None


@contextlib.contextmanager
def imagined(device: driver.Device) -> Iterator[list[Launch]]:
    """Collects what this thread would launch on a device that need not exist. Nothing is launched."""
    _recorder.imagined = device
    launches: list[Launch] = []
    try:
        with recording(launches.append):
            yield launches
    finally:
        _recorder.imagined = None


def device_of(place: Place) -> driver.Device:
    """The device on which kernels are started for arrays at a place."""
    return _recorder.imagined or driver.device(place.device)


def launch(kernel: str, plan: Plan, place: Place, *arguments) -> None:
    """Starts `kernel`, "<file>.<function>" under kernels/cuda/device; compile.image explains the signature."""
    signature, words, addresses = [], [], []
    for argument in arguments:
        kind = type(argument)
        if has_address(argument):
            addresses.append(len(words))
        if kind is Operand:
            signature.append(_STRIDED[argument.dtype])
            words += argument[:4]
            signature[-1] += _add_transform(argument.transform, words, addresses)
        elif kind is Numbers:
            signature.append(f"*{argument.dtype}")
            words.append(argument.pointer)
        elif kind is Rows or kind is Labels:
            signature.append("rows" if kind is Rows else "labels")
            words += argument
        elif argument is None:
            signature.append("none")
            words.append(_ABSENT)
        elif kind in _SPLITS:
            signature.append(_SPLITS[kind])
            words += map(np.int32, argument)
        else:
            signature.append(_SCALARS[kind])
            words.append(argument)
    words = tuple(words)
    device = device_of(place)
    image = compile.image(kernel, tuple(signature), device.arch)
    if _recorder.imagined is None:
        driver.launch(driver.load(image, device, place.stream), plan, place.stream, words)
    if _recorder.note is not None:
        _recorder.note(Launch(image, plan, words, addresses))


def _add_transform(transform: Transform | None, words: list, addresses: list[int]) -> str:
    """Adds the words of a transform; what its fields are follows the word of the array in the signature."""
    if transform is None:
        words.append(_ABSENT)
        return ""
    kinds = []
    for field in transform:
        if has_address(field):
            addresses.append(len(words))
        if isinstance(field, Operand):
            kinds.append(_STRIDED[field.dtype])
            words += (*field[:4], _ABSENT)
        elif isinstance(field, Labels):
            kinds.append("labels")
            words += field
        elif isinstance(field, tuple):
            kinds.append(f"{len(field)} {_SCALARS[type(field[0])]}")
            words += field
        elif isinstance(field, np.floating):
            kinds.append(_SCALARS[type(field)])
            words.append(field)
        else:
            kinds.append("flag" if field else "none")
            words.append(_ABSENT)
    return "".join(f" | {kind}" for kind in kinds)


def launch_rows(
    kernel: str,
    place: Place,
    rows: Rows,
    *arguments,
    reads: int = 1,
    passes: int = 2,
    side_by_side: bool = True,
    writes_rows: bool = True,
    scratch: int = 0,
) -> None:
    """Starts a kernel that goes over rows: those of the first `reads` arguments, once or (passes) twice.

    With two passes, it writes rows of the last argument that is an array, unless it writes none. side_by_side: whether
    it can take rows that lie so together: it cannot where logits go through a transform, which a thread knows for its
    own row. scratch: see plan.row_plan.
    """
    device = device_of(place)
    formats = tuple(argument.dtype for argument in arguments[:reads])
    compute = "float64" if any(isinstance(argument, np.float64) for argument in arguments) else "float32"
    transformed = any(type(argument) is Operand and argument.transform for argument in arguments)
    side_by_side = side_by_side and not transformed
    neighbours = _neighbours(rows, arguments, reads, passes == 2 and writes_rows) if side_by_side else 1
    shape = rows.n_cols, formats, compute, device.arch, device.multiprocessors, passes, neighbours, scratch
    try:
        _launch_all(kernel, place, rows, shape, device.largest_cluster, arguments)
    except driver.ClusterDoesNotFit:  # nothing has been started: no memory holds long rows enough for two launches
        device.largest_cluster = driver.PORTABLE_CLUSTER
        _launch_all(kernel, place, rows, shape, device.largest_cluster, arguments)


def _launch_all(kernel: str, place: Place, rows: Rows, shape: tuple, largest_cluster: int, arguments: tuple) -> None:
    plan = row_plan(rows.n_rows, *shape, largest_cluster)
    for start in range(0, rows.n_rows, plan.rows):  # once, unless there are more rows than blocks
        last = row_plan(min(plan.rows, rows.n_rows - start), *shape, largest_cluster)
        launch(kernel, last, place, rows, last.split, start, *arguments)


def _neighbours(rows: Rows, arguments: tuple, reads: int, writes_rows: bool) -> int:
    """How many rows lie side by side, in each array whose rows are read or written."""
    arrays = [argument for argument in arguments if type(argument) is Operand]
    walked = arrays[:reads] + (arrays[-1:] if writes_rows else [])
    return rows.n_inner if all(one.inner_stride == 1 and one.col_stride != 1 for one in walked) else 1
