"""What a call on a GPU would do, and how long its memory traffic takes."""

import math
from typing import Any

from gpusoftmax import _arrays, _checks, _dry_run


def explain(op: str, shape: tuple[int, ...], *, dtype: Any = "float32", arch: str | None = None) -> dict[str, Any]:
    """How a call of `op` on C-contiguous arrays of this shape and dtype is launched. Needs no GPU.

    The kernels are compiled if they are not in the cache, which takes seconds.

    Parameters
    ----------
    op : str
        A public function, such as "softmax", called with its defaults; "top_logprobs" and "topk_softmax" for
        8 columns.
    shape : tuple of int
        Of the logits; rows run along the last axis. Of the features of spatial_softmax, whose rows are feature maps.
    dtype : dtype
        Of the logits, and of results of their shape.
    arch : str, optional
        An architecture such as "sm_90". By default that of this machine's first GPU, or else sm_90.

    Returns
    -------
    dict
        Ready for JSON. `kernels` holds for each launch the kernel's name, the regime (kernels/cuda/plan.py), the grid
        (in blocks), the blocks of a cluster, the threads of a block, the registers of a thread, the bytes of shared
        memory of a block, and how many blocks fit on a multiprocessor at a time. `row` has the bytes that are read and
        written for a row in global memory, and whether each logit is read once. `device` is the one that is assumed
        for the architecture. `expected_seconds` are the bytes over the device's bandwidth, which takes enough rows, and
        leaves out what it takes to start a kernel (about 3 microseconds).

    Raises
    ------
    TypeError, ValueError
        Unknown names, or a shape without elements.

    Examples
    --------
    >>> import gpusoftmax
    >>> plan = gpusoftmax.explain("logsumexp", (8, 1024), dtype="float32", arch="sm_90")
    >>> plan["row"]["read"], plan["row"]["written"]
    (4096, 4)
    """
    _checks.one_of(op, _dry_run.OPS, "op")
    dtype, shape = _checks.dtype_name(dtype), _checks.shape(shape)
    arch = _dry_run.archs_here()[:1] or ["sm_90"] if arch is None else [arch]
    arch = _checks.one_of(arch[0], tuple(_dry_run.DEVICES), "arch")
    launches = _dry_run.launches(op, shape, dtype, arch)
    device = _dry_run.DEVICES[arch]
    row_axes = 2 if op in _dry_run.IMAGES else 1
    n_rows, row = math.prod(shape[:-row_axes]), _traffic(op, math.prod(shape[-row_axes:]), dtype, launches)
    seconds = n_rows * (row["read"] + row["written"]) / device.bytes_per_second
    return {
        "op": op,
        "shape": list(shape),
        "dtype": dtype,
        "arch": arch,
        "device": device._asdict(),
        "kernels": [_dry_run.facts(launch) for launch in launches],
        "row": row,
        "expected_seconds": seconds,
    }


def _traffic(op: str, n_cols: int, dtype: str, launches) -> dict[str, Any]:
    """Bytes for a row, from what the op has to move and whether the rows stay on the chip."""
    row = n_cols * _arrays.numpy_dtype(dtype).itemsize
    number = 8 if dtype == "float64" else 4
    read, written = _PER_ROW.get(op, (0, 0))
    label = 8 if op.startswith(("cross_entropy", "token_logprobs", "sample")) else 0  # or the seed
    top = min(_dry_run.TOP, n_cols) if op in _dry_run.OF_THE_LARGEST else 0
    sources = 2 if op in _TWO_SOURCES else 1
    plan = _dry_run.plan_of_rows(launches)
    again = 0 if plan.held else max(sources * row - plan.cluster * plan.kept_bytes, 0)
    results = 8 if op in ("argmax", "sample") else 0 if op in _NO_ROWS else row
    return {
        "read": sources * row + again + label + read * number,
        "written": results + written * number + top * (number + 8),
        "once": again == 0,
    }


_TWO_SOURCES = ("softmax_backward", "softmax_jvp", "log_softmax_backward", "kl_div", "kl_div_with_grad")
_NO_ROWS = (
    *("logsumexp", "kl_div", "cross_entropy", "token_logprobs", "soft_argmax", "spatial_softmax"),
    *_dry_run.OF_THE_LARGEST,
)
"""Those whose results have no row of their own."""
_PER_ROW = {
    "logsumexp": (0, 1),
    "kl_div": (0, 1),
    "kl_div_with_grad": (0, 1),
    "cross_entropy": (0, 1),
    "cross_entropy_with_grad": (0, 1),
    "cross_entropy_backward": (2, 0),
    "token_logprobs": (0, 1),
    "token_logprobs_backward": (1, 0),
    "soft_argmax": (0, 1),
    "soft_argmax_backward": (2, 0),
    "spatial_softmax": (0, 2),
    "spatial_softmax_backward": (4, 0),
}
"""How many numbers of a row are read and written, beside its columns."""
