"""What a transform of the logits costs on a GPU, in machine instructions for each logit: counted, not measured.

As predict.py does it: a row goes through the emulator, laid out as one of many, and machine_code.py says what it takes.
"""

import dataclasses
from collections.abc import Callable, Sequence
from unittest import mock

import numpy as np

import gpusoftmax
from benchmarks import machine_code
from benchmarks.cases import BFLOAT16
from benchmarks.measure import Report
from gpusoftmax.kernels.cuda import compile, launch
from tests import inputs
from tests.emulator import emulated_gpu

_ARCH = "sm_90"
_MANY_ROWS = 8192
_SHAPE = 1, 32000
_DTYPES = {"bfloat16": BFLOAT16, "float32": np.dtype(np.float32)}
_MASK = np.random.default_rng(1).random(_SHAPE) < 0.5
_PACKED = np.packbits(_MASK, axis=-1, bitorder="little").view("<i4")
_ONE: dict[str, Callable[[np.dtype], dict]] = {
    "nothing": lambda dtype: {},
    "temperature": lambda dtype: {"temperature": np.full(1, 0.7, np.float32)},
    "bias": lambda dtype: {"bias": np.random.default_rng(2).normal(size=_SHAPE[1]).astype(dtype)},
    "softcap": lambda dtype: {"softcap": 30.0},
    "mask": lambda dtype: {"mask": _MASK},
    "packed mask": lambda dtype: {"mask": _PACKED},
    "n_valid": lambda dtype: {"n_valid": np.array([_SHAPE[1] - 1])},
}
_WAYS = (*_ONE, "mask + softcap", "temperature + bias + softcap + mask + n_valid")
OPS = ("softmax", "cross_entropy_with_grad")


def run(report: Report, ops: Sequence[str] = ()) -> None:
    for op in ops or OPS:
        for dtype in _DTYPES:
            for way in _WAYS:
                instructions, registers = counted(op, dtype, way)
                report(f"{op:24}{dtype:9}{way:46}{instructions:6.1f} instructions per logit, {registers} registers")


def counted(op: str, dtype: str, way: str) -> tuple[float, int]:
    """(machine instructions for each logit, registers) of an op on logits that go through a transform."""
    options = {name: value for one in way.split(" + ") for name, value in _ONE[one](_DTYPES[dtype]).items()}
    arguments = [inputs.make("spread", (2, _SHAPE[1]), _DTYPES[dtype])[1:]]
    if op.startswith("cross_entropy"):
        arguments.append(np.flatnonzero(_MASK)[:1])
        options["reduction"] = "none"
    row_plan, image_of, images = launch.row_plan, compile.image, []

    def one_of_many(n_rows, *shape):
        plan = row_plan(_MANY_ROWS, *shape)
        return dataclasses.replace(plan, rows=1, blocks=plan.cluster)

    def image(*arguments):
        images.append(image_of(*arguments))
        return images[-1]

    with (
        emulated_gpu(_ARCH, track=False, check_race=False) as gpu,
        mock.patch.object(launch, "row_plan", one_of_many),
        mock.patch.object(compile, "image", image),
    ):
        given = {name: gpu.array(one) if isinstance(one, np.ndarray) else one for name, one in options.items()}
        getattr(gpusoftmax, op)(*map(gpu.array, arguments), **given)
        (only,) = images
        executed = machine_code.executed(only.ptx, _ARCH, gpu.stats[-1].warp_lines)
    return 32 * executed.total() / _SHAPE[1], compile.resources(only)[0]
