"""What a call on a GPU would launch: the call itself, on arrays without memory, for a device that need not exist."""

from typing import TYPE_CHECKING, Any, NamedTuple

import gpusoftmax
from gpusoftmax import _arrays, _checks, _imagined
from gpusoftmax._imagined import Imagined

if TYPE_CHECKING:
    from gpusoftmax.kernels.cuda.compile import Image
    from gpusoftmax.kernels.cuda.launch import Launch

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
_LOSSES = ("cross_entropy", "cross_entropy_with_grad", "cross_entropy_backward")
_ONE_AXIS = (
    *("argmax", "soft_argmax", "soft_argmax_backward", "token_logprobs", "token_logprobs_backward", "sample"),
    *(*_LOSSES, "kl_div", "kl_div_with_grad", "top_logprobs", "topk_softmax"),
)
"""Those that take no tuple of axes, which might cost a copy."""


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


def launches(op: str, shape: tuple[int, ...], dtype: str, arch: str, **options: Any) -> "list[Launch]":
    """The launches of a call of `op` on C-contiguous logits of this shape and dtype; options: see _imagined.call."""
    with imagined(arch) as found:
        _imagined.call(op, shape, dtype, options)
    return found


def every_kernel(op: str, dtype: str, arch: str, options: dict[str, Any]) -> "list[Launch]":
    """A launch of each kernel that calls of `op` can use which have these options, whatever their shape, where input
    and output have the same dtype. Without options also of what is always compiled ahead, and with logsumexp of the
    kernels of its states.
    """
    variants = [options] if options else _variants(op, dtype)
    with imagined(arch) as found:
        if op in _imagined.IMAGES:
            for shape, strides in _MAPS if options else (*_MAPS, *_WINDOWS):
                for variant in variants:
                    _imagined.call(op, shape, dtype, variant, strides)
            return found
        for shape, axis in _ROWS:
            for variant in variants:
                _imagined.call(op, shape, dtype, {**_fitting(variant, shape[axis]), "axis": axis})
            if axis == -1 and op not in _ONE_AXIS and not options:
                _imagined.call(op, (4, 4, shape[axis]), dtype, {"axis": (0, 2)})  # no single stride walks these: copies
        if op == "logsumexp" and not options:
            _log_sum_exp_in_parts(dtype)
    return found


def _variants(op: str, dtype: str) -> list[dict[str, Any]]:
    """The options with which every op is compiled ahead."""
    row_dtype = _imagined.row_dtype(dtype)
    if op in _LOSSES:
        found = [{}, {"weight": dtype, "label_smoothing": 0.1, "validate": True}]
        if op == "cross_entropy":
            return [*found, {"return_correct": True}]
        return [*found, {"target": ("int64", row_dtype)}, {"target": dtype}]
    others = {
        "token_logprobs": [{"return_entropy": True, "validate": True}],
        "token_logprobs_backward": [{"dentropy": row_dtype, "validate": True}],
        "kl_div_with_grad": [{"target_grad": True}],
        "sample": [{"top_p": 0.9}, {"temperature": row_dtype}],
        "top_p_mask_logits": [{"top_p": row_dtype}],
        "softmax_backward": [{"temperature": row_dtype}],
        "log_softmax_backward": [{"temperature": row_dtype}],
        "spatial_softmax_backward": [{"out": dtype}],  # a window where the features are one
    }
    return [{}, *others.get(op, [])]


def _fitting(options: dict[str, Any], n_cols: int) -> dict[str, Any]:
    """With numbers of columns that there are."""
    least = {name: min(options[name], n_cols) for name in ("k", "n_valid") if isinstance(options.get(name), int)}
    return {**options, **least}


def _log_sum_exp_in_parts(dtype: str) -> None:
    """A whole chunk and a shorter one."""
    columns = Imagined((4, gpusoftmax.LogSumExpState.CHUNK_COLS + 64), _arrays.numpy_dtype(dtype), {})
    state = gpusoftmax.LogSumExpState.empty(4, like=columns)
    state.update(columns)
    state.logsumexp()


# Rows that one warp holds, more of them than one block adds up, longer rows, and rows that lie side by side.
_ROWS = (((4, 64), -1), ((10_000, 64), -1), ((4, 100_000), -1), ((64, 64), 0))
# Feature maps that one warp holds, larger ones, and maps that lie side by side; windows of the first two, which are
# copied.
_MAPS = (((4, 8, 8), None), ((4, 100, 1000), None), ((64, 8, 8), (1, 512, 64)))
_WINDOWS = (((4, 8, 8), (1000, 100, 1)), ((4, 100, 1000), (10**6, 10**4, 1)))


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
    from gpusoftmax.kernels.cuda import driver, launch, requirements

    requirements.check()
    return launch.imagined(driver.Device(0, arch, DEVICES[arch].multiprocessors))


def images(arch: Any, ops: Any, dtypes: Any, **options: Any) -> "list[Image]":
    """The kernels that `gpusoftmax.compile` compiles: see there."""
    archs = archs_here() if arch is None else [arch] if isinstance(arch, str) else _checks.several(arch, "arch")
    if not archs:
        raise ValueError("there is no GPU here whose architecture could be compiled for: pass arch, such as sm_90")
    archs = [_checks.one_of(one, tuple(DEVICES), "arch") for one in archs]
    _checks.options_of_ops(options, ops)
    ops = [_checks.one_of(op, OPS, "op") for op in (OPS if ops is None else _checks.several(ops, "ops"))]
    options = {name: _dtypes_of(given) for name, given in options.items()}
    dtypes = _checks.FLOATING if dtypes is None else _checks.several(dtypes, "dtypes")
    dtypes = [_checks.dtype_name(dtype) for dtype in dtypes]
    from gpusoftmax.kernels.cache_directory import private_directory

    if private_directory("cuda") is None:
        raise RuntimeError("no directory can be used for the cache: set GPUSOFTMAX_CACHE_DIR to one of your own")
    found = [
        launch.image
        for one in archs
        for dtype in dtypes
        for op in ops
        for launch in every_kernel(op, dtype, one, options)
    ]
    return list(dict.fromkeys(found))


def _dtypes_of(given: Any) -> Any:
    """Of an array its dtype, which is all that kernels know of it beside the layout of its rows."""
    if isinstance(given, tuple):
        return tuple(_dtypes_of(one) for one in given)
    return given.dtype if _imagined.is_array(given) and given.shape else given


def archs_here() -> list[str]:
    """The architectures of this machine's GPUs, by the newest that kernels are linked for; none without a GPU."""
    from gpusoftmax import _info

    found = []
    for device in _info.gather(for_path_only=True)["driver"]["devices"]:
        major, minor = device["compute_capability"]
        usable = [arch for arch in DEVICES if int(arch[3:]) // 10 == major and int(arch[3:]) % 10 <= minor]
        found += usable[-1:]
    return list(dict.fromkeys(found))
