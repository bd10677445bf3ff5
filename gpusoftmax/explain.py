"""What a call on a GPU would do, and how long its memory traffic takes."""

import math
from typing import Any

from gpusoftmax import _checks, _dry_run, _imagined
from gpusoftmax._imagined import Imagined
from gpusoftmax._traffic import Layout, traffic


def explain(
    op: str, shape: tuple[int, ...], *, dtype: Any = "float32", arch: str | None = None, **options: Any
) -> dict[str, Any]:
    """How a call of `op` on C-contiguous arrays of this shape and dtype is launched. Needs no GPU.

    The kernels are compiled if they are not in the cache, which takes seconds.

    Parameters
    ----------
    op : str
        A public function, such as "softmax".
    shape : tuple of int
        Of the logits; rows run along the last axis, or along `axis` among the options. Of the features of
        spatial_softmax, whose rows are feature maps.
    dtype : dtype
        Of the logits, and of results of their shape unless the options have an `out`.
    arch : str, optional
        An architecture such as "sm_90". By default that of this machine's first GPU, or else sm_90.
    **options
        Further arguments of the call, by the names that `op` gives them: `temperature`, `bias`, `softcap`, `mask`,
        `n_valid`, `k`, `top_p`, `label_smoothing`, `out`, ... Instead of an array its dtype: of a temperature for each
        row, a bias for each column, a mask for each logit ("int32": of bits), labels for each row. Arrays of other
        shapes as they are, or as whatever has a shape and a dtype: NumPy's stand for those of the device, and none is
        looked at. What is needed and not given is usual: labels, or 8 columns for "top_logprobs" and "topk_softmax".

    Returns
    -------
    dict
        Ready for JSON. `options` are those given, an array as its dtype and shape. `kernels` holds for each launch the
        kernel's name, the regime (kernels/cuda/plan.py), the grid (in blocks), the blocks of a cluster, the threads of
        a block, the registers of a thread, the bytes of shared memory of a block, and how many blocks fit on a
        multiprocessor at a time. `row` has the bytes that are read and written for a row in global memory, of what the
        row has of its own, and whether each logit is read once; `shared` the bytes of what rows have together, such as
        a bias of (n_cols,), which are read once for all of them. `device` is the one that is assumed for the
        architecture. `expected_seconds` are all these bytes over the device's bandwidth, which takes enough rows, and
        leaves out what it takes to start a kernel (about 3 microseconds).

    Raises
    ------
    TypeError, ValueError
        Unknown names, a shape without elements, or options that `op` does not take.
    RuntimeError
        numba-cuda or cuda-core is not installed.

    Notes
    -----
    An `n_valid` that is one number ends what is read of a row; of one for each row nothing is known, and all columns
    count.

    Examples
    --------
    >>> import gpusoftmax
    >>> plan = gpusoftmax.explain("logsumexp", (8, 1024), dtype="float32", arch="sm_90")
    >>> plan["row"]["read"], plan["row"]["written"]
    (4096, 4)
    >>> plan = gpusoftmax.explain("logsumexp", (8, 1024), arch="sm_90", mask="int32", bias="float32")
    >>> plan["row"]["read"], plan["shared"]
    (4224, 4096)
    """
    _checks.one_of(op, _dry_run.OPS, "op")
    dtype, shape = _checks.dtype_name(dtype), _checks.shape(shape)
    arch = _dry_run.archs_here()[:1] or ["sm_90"] if arch is None else [arch]
    arch = _checks.one_of(arch[0], tuple(_dry_run.DEVICES), "arch")
    with _dry_run.imagined(arch) as launches:
        given, arrays = _imagined.call(op, shape, dtype, options)
    n_valid = given.get("n_valid")
    layout = Layout(
        shape, _imagined.row_axes(op, len(shape), options), None if isinstance(n_valid, Imagined) else n_valid
    )
    moved = traffic(launches, arrays, layout)
    device, n_rows = _dry_run.DEVICES[arch], math.prod(layout.batch)
    return {
        "op": op,
        "shape": list(shape),
        "dtype": dtype,
        "options": {name: _described(given[name]) for name in options},
        "arch": arch,
        "device": device._asdict(),
        "kernels": [_dry_run.facts(launch) for launch in launches],
        "n_rows": n_rows,
        "row": {"read": moved.read // n_rows, "written": moved.written // n_rows, "once": moved.once},
        "shared": moved.shared,
        "expected_seconds": (moved.read + moved.written + moved.shared) / device.bytes_per_second,
    }


def _described(given: Any) -> Any:
    """An argument for JSON."""
    if isinstance(given, tuple):
        return [_described(one) for one in given]
    if isinstance(given, Imagined):
        return f"{given.dtype.name} {'x'.join(map(str, given.shape))}"
    return given.item() if hasattr(given, "item") else given
