"""What a call on a GPU would launch: the call itself, on arrays without memory, for a device that need not exist."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

import gpusoftmax
from gpusoftmax import _arrays, _checks
from gpusoftmax.kernels.operands import NO_BAD_LABEL

if TYPE_CHECKING:
    from gpusoftmax.kernels.cuda.compile import Image
    from gpusoftmax.kernels.cuda.launch import Launch
    from gpusoftmax.kernels.cuda.plan import Plan

OPS = (
    "softmax",
    "softmax_backward",
    "softmax_jvp",
    "log_softmax",
    "log_softmax_backward",
    "logsumexp",
    "cross_entropy",
    "cross_entropy_with_grad",
    "cross_entropy_backward",
    "token_logprobs",
    "token_logprobs_backward",
    "top_logprobs",
    "argmax",
    "soft_argmax",
    "soft_argmax_backward",
    "spatial_softmax",
    "spatial_softmax_backward",
    "sample",
    "top_k_mask_logits",
    "top_p_mask_logits",
    "topk_softmax",
    "kl_div",
    "kl_div_with_grad",
)
TOP = 8
"""Columns that a dry run asks of top_logprobs and topk_softmax, or all there are."""
OF_THE_LARGEST = ("top_logprobs", "topk_softmax")
LOSSES = ("cross_entropy", "cross_entropy_with_grad", "cross_entropy_backward", "kl_div", "kl_div_with_grad")
ONE_AXIS = (
    *("argmax", "soft_argmax", "soft_argmax_backward", "token_logprobs", "token_logprobs_backward", "sample"),
    *(*LOSSES, *OF_THE_LARGEST),
)
"""Those that take no tuple of axes, which might cost a copy."""
IMAGES = ("spatial_softmax", "spatial_softmax_backward")
"""Those whose rows run along the last two axes."""
_LIMITS = {"top_k_mask_logits": 50, "top_p_mask_logits": 0.9}
"""What these are called with; no launch depends on it."""


class Device(NamedTuple):
    """A GPU that stands for an architecture."""

    name: str
    multiprocessors: int
    bytes_per_second: float
    source: str  # of the bandwidth


_DATA_SHEET = "by its data sheet"
DEVICES = {
    "sm_75": Device("T4", 40, 0.32e12, _DATA_SHEET),
    "sm_80": Device("A100 80 GB", 108, 2.039e12, _DATA_SHEET),
    "sm_86": Device("A40", 84, 0.696e12, _DATA_SHEET),
    "sm_89": Device("L40S", 142, 0.864e12, _DATA_SHEET),
    "sm_90": Device("H200", 132, 4.3e12, "measured as a copy"),
    "sm_100": Device("B200", 148, 8.0e12, _DATA_SHEET),
    "sm_120": Device("RTX 5090", 170, 1.792e12, _DATA_SHEET),
}
"""The architectures that kernels are linked for."""


_ALIGNMENT = 1 << 36
"""Of imagined addresses; it is that of every vector."""


class _Imagined:
    """An array on a device that need not exist."""

    _address = 1 << 40  # of the next one

    def __init__(self, shape: tuple[int, ...], dtype: Any, strides: tuple[int, ...] | None = None):
        self.shape, self.dtype = shape, np.dtype(dtype)
        pointer = _Imagined._address if math.prod(shape) else 0
        # No matter how large they are, no two overlap.
        reach = math.prod(shape) if strides is None else sum(a * b for a, b in zip(shape, strides, strict=True))
        _Imagined._address += -(-reach * self.dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": self.dtype.str,
            "strides": strides and tuple(stride * self.dtype.itemsize for stride in strides),
            "data": (pointer, False),
            "version": 3,
        }
        # An attribute of the object, and so nothing that _replay.py would take for an array on a GPU.
        self.__gpusoftmax_empty__ = _Imagined

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def item(self) -> int:
        return NO_BAD_LABEL


def launches(op: str, shape: tuple[int, ...], dtype: str, arch: str, **options: Any) -> "list[Launch]":
    """The launches of a call of `op` on C-contiguous logits (and gradients) of this shape and dtype."""
    with imagined(arch) as found:
        _call(op, shape, dtype, options)
    return found


def every_kernel(op: str, dtype: str, arch: str) -> "Iterator[Launch]":
    """A launch of each kernel that calls of `op` can use, where input and output have the same dtype; with logsumexp
    those of its states too.
    """
    with imagined(arch) as found:
        if op in IMAGES:
            for shape, strides in _MAPS:
                out = {"out": _Imagined(shape, _arrays.numpy_dtype(dtype), strides)} if op.endswith("_backward") else {}
                _call(op, shape, dtype, out, strides)
            yield from found
            return
        # Rows that one warp holds, longer ones, and rows that lie side by side.
        for shape, axis in (((4, 64), -1), ((4, 100_000), -1), ((64, 64), 0)):
            n_cols = shape[axis]
            _call(op, shape, dtype, {"axis": axis})
            if op == "token_logprobs":
                _call(op, shape, dtype, {"axis": axis, "return_entropy": True, "validate": True})
            elif op == "token_logprobs_backward":
                gradient = _Imagined(_batch(shape, axis), _row_dtype(dtype))
                _call(op, shape, dtype, {"axis": axis, "dentropy": gradient, "validate": True})
            elif op in LOSSES[:3]:
                weight = _Imagined((n_cols,), _arrays.numpy_dtype(dtype))
                _call(op, shape, dtype, {"axis": axis, "weight": weight, "label_smoothing": 0.1, "validate": True})
                for soft in () if op == "cross_entropy" else _soft_targets(shape, axis, dtype):
                    _call(op, shape, dtype, {"axis": axis}, target=soft)
                if op == "cross_entropy":
                    _call(op, shape, dtype, {"axis": axis, "return_correct": True})
            elif op == "kl_div_with_grad":
                _call(op, shape, dtype, {"axis": axis, "target_grad": True})
            elif op == "sample":
                _call(op, shape, dtype, {"axis": axis, "top_p": 0.9})
                temperatures = _Imagined(_batch(shape, axis), _row_dtype(dtype))
                _call(op, shape, dtype, {"axis": axis, "temperature": temperatures})
            elif op == "top_p_mask_logits":
                _call(op, shape, dtype, {"axis": axis}, target=_Imagined(_batch(shape, axis), _row_dtype(dtype)))
            elif op in ("softmax_backward", "log_softmax_backward"):
                _call(
                    op, shape, dtype, {"axis": axis, "temperature": _Imagined(_batch(shape, axis), _row_dtype(dtype))}
                )
            if axis == -1 and op not in ONE_AXIS:
                _call(op, (4, 4, n_cols), dtype, {"axis": (0, 2)})  # no single stride walks these: copies
        if op == "logsumexp":
            _log_sum_exp_in_parts(dtype)
    yield from found


def _soft_targets(shape: tuple[int, ...], axis: int, dtype: str) -> tuple:
    """A few labels with shares, and a share for every class."""
    few = (*_batch(shape, axis), TOP)
    return (_Imagined(few, np.int64), _Imagined(few, _row_dtype(dtype))), _Imagined(shape, _arrays.numpy_dtype(dtype))


def _log_sum_exp_in_parts(dtype: str) -> None:
    """A whole chunk and a shorter one."""
    columns = _Imagined((4, gpusoftmax.LogSumExpState.CHUNK_COLS + 64), _arrays.numpy_dtype(dtype))
    state = gpusoftmax.LogSumExpState.empty(4, like=columns)
    state.update(columns)
    state.logsumexp()


# Feature maps that one warp holds, larger ones, windows of either, which are copied, and maps that lie side by side.
_MAPS = (
    ((4, 8, 8), None),
    ((4, 100, 1000), None),
    ((4, 8, 8), (1000, 100, 1)),
    ((4, 100, 1000), (10**6, 10**4, 1)),
    ((64, 8, 8), (1, 512, 64)),
)


def plan_of_rows(launches: "list[Launch]") -> "Plan":
    """How the rows are read, by the first of the launches that does not find a number of all of them."""
    from gpusoftmax.kernels.cuda.plan import OF_A_BATCH

    return next(launch.plan for launch in launches if launch.plan.regime not in OF_A_BATCH)


def facts(launch: "Launch") -> dict[str, Any]:
    """What `explain` says of a launch."""
    from gpusoftmax.kernels.cuda import compile
    from gpusoftmax.kernels.cuda.plan import blocks_per_multiprocessor

    plan, image = launch.plan, launch.image
    registers, static_bytes = compile.resources(image)
    shared_bytes = plan.shared_bytes + static_bytes
    return {
        "kernel": image.kernel,
        "regime": plan.regime,
        "grid": plan.blocks,
        "cluster": plan.cluster,
        "block": plan.threads,
        "registers": registers,
        "shared_bytes": shared_bytes,
        "blocks_per_multiprocessor": blocks_per_multiprocessor(image.arch, plan.threads, registers, shared_bytes),
    }


def imagined(arch: str):
    """As kernels.cuda.launch.imagined, for a device of an architecture."""
    from gpusoftmax.kernels.cuda import driver, launch

    return launch.imagined(driver.Device(0, arch, DEVICES[arch].multiprocessors))


def _call(
    op: str,
    shape: tuple[int, ...],
    dtype: str,
    options: dict[str, Any],
    strides: tuple[int, ...] | None = None,
    target: Any = None,
) -> None:
    arguments = [_Imagined(shape, _arrays.numpy_dtype(dtype), strides)]
    batch = _batch(shape, options.get("axis", -1))
    if op.startswith(("cross_entropy", "token_logprobs")):
        arguments.append(_Imagined(batch, np.int64) if target is None else target)
    if op == "token_logprobs_backward":
        arguments.append(_Imagined(batch, _row_dtype(dtype)))
    elif op == "cross_entropy_backward" or op == "soft_argmax_backward":
        arguments += (_Imagined(batch, _row_dtype(dtype)) for _ in range(2))
    elif op == "spatial_softmax_backward":
        arguments += (_Imagined((*shape[:-2], 2), _row_dtype(dtype)) for _ in range(2))
    elif op.endswith(("_backward", "_jvp")) or op.startswith("kl_div"):
        arguments.append(_Imagined(shape, _arrays.numpy_dtype(dtype)))
    elif op in OF_THE_LARGEST:
        arguments.append(min(TOP, shape[options.get("axis", -1)]))
    elif op in _LIMITS:
        arguments.append(_LIMITS[op] if target is None else target)
    elif op == "sample":
        options = {**options, "rng": _Imagined(batch, np.int64)}
    getattr(gpusoftmax, op)(*arguments, **options)


def _batch(shape: tuple[int, ...], axis: int | tuple[int, ...]) -> tuple[int, ...]:
    """The shape without the axis, or axes, along which rows run."""
    axes = {one % len(shape) for one in (axis if isinstance(axis, tuple) else (axis,))}
    return tuple(size for number, size in enumerate(shape) if number not in axes)


def _row_dtype(dtype: str) -> np.dtype:
    """Of a number for each row."""
    return np.dtype("float64" if dtype == "float64" else "float32")


def images(arch: Any, ops: Any, dtypes: Any) -> "list[Image]":
    """The kernels that `gpusoftmax.compile` compiles: see there."""
    archs = archs_here() if arch is None else [arch] if isinstance(arch, str) else _checks.several(arch, "arch")
    if not archs:
        raise ValueError("there is no GPU here whose architecture could be compiled for: pass arch, such as sm_90")
    archs = [_checks.one_of(one, tuple(DEVICES), "arch") for one in archs]
    ops = [_checks.one_of(op, OPS, "op") for op in (OPS if ops is None else _checks.several(ops, "ops"))]
    dtypes = _checks.FLOATING if dtypes is None else _checks.several(dtypes, "dtypes")
    dtypes = [_checks.dtype_name(dtype) for dtype in dtypes]
    from gpusoftmax.kernels.cache_directory import private_directory

    if private_directory("cuda") is None:
        raise RuntimeError("no directory can be used for the cache: set GPUSOFTMAX_CACHE_DIR to one of your own")
    found = [launch.image for one in archs for dtype in dtypes for op in ops for launch in every_kernel(op, dtype, one)]
    return list(dict.fromkeys(found))


def archs_here() -> list[str]:
    """The architectures of this machine's GPUs, by the newest that kernels are linked for; none without a GPU."""
    from gpusoftmax import _info

    found = []
    for device in _info.gather(for_path_only=True)["driver"]["devices"]:
        major, minor = device["compute_capability"]
        usable = [arch for arch in DEVICES if int(arch[3:]) // 10 == major and int(arch[3:]) % 10 <= minor]
        found += usable[-1:]
    return list(dict.fromkeys(found))
