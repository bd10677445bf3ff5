"""What a transform of the logits costs on a GPU, in machine instructions for each logit: counted, not measured.

As predict.py does it: a row goes through the emulator, laid out as one of many, and machine_code.py says what it takes.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from unittest import mock

import numpy as np

import gpusoftmax
from benchmarks import machine_code
from benchmarks.cases import BFLOAT16
from benchmarks.measure import Report
from gpusoftmax.kernels.cuda import compile, launch
from gpusoftmax.kernels.cuda.plan import Short
from tests import inputs
from tests.emulator import emulated_gpu

_ARCH, _MULTIPROCESSORS = "sm_90", 132
_MANY_ROWS = 8192
_LENGTHS = 32000, 50257, 1000
"""Rows that begin at a boundary, rows most of which do not, and rows of one piece."""
_DTYPES = {"bfloat16": BFLOAT16, "float32": np.dtype(np.float32)}


def _mask(shape: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(1).random(shape) < 0.5


def _packed(mask: np.ndarray) -> np.ndarray:
    whole = np.pad(mask, ((0, 0), (0, -mask.shape[1] % 32)))
    return np.packbits(whole, axis=-1, bitorder="little").view("<i4")


_ONE: dict[str, Callable[[np.dtype, tuple[int, int]], dict]] = {
    "nothing": lambda dtype, shape: {},
    "temperature": lambda dtype, shape: {"temperature": np.full(shape[0], 0.7, np.float32)},
    "bias": lambda dtype, shape: {"bias": np.random.default_rng(2).normal(size=shape[1]).astype(dtype)},
    "softcap": lambda dtype, shape: {"softcap": 30.0},
    "mask": lambda dtype, shape: {"mask": _mask(shape)},
    "packed mask": lambda dtype, shape: {"mask": _packed(_mask(shape))},
    "n_valid": lambda dtype, shape: {"n_valid": np.full(shape[0], shape[1] - 1)},
}
_WAYS = (*_ONE, "mask + softcap", "temperature + bias + softcap + mask + n_valid")
OPS = ("softmax", "cross_entropy_with_grad")
OTHERS = ("log_softmax", "logsumexp", "argmax", "soft_argmax", "cross_entropy")


def run(report: Report, ops: Sequence[str] = ()) -> None:
    if unknown := sorted(set(ops) - {*OPS, *OTHERS}):
        raise SystemExit(f"transforms: no op {unknown[0]!r}, expected some of {', '.join((*OPS, *OTHERS))}")
    for op, n_cols, dtype, way in itertools.product(ops or OPS, _LENGTHS, _DTYPES, _WAYS):
        instructions, registers = counted(op, dtype, way, n_cols)
        case = f"{op:24}{n_cols:6} {dtype:9}{way:46}"
        report(f"{case}{instructions:6.1f} instructions per logit, {registers} registers")


def counted(op: str, dtype: str, way: str, n_cols: int) -> tuple[float, int]:
    """(machine instructions for each logit, registers) of an op on logits that go through a transform."""
    row_plan, image_of, images = launch.row_plan, compile.image, []

    def one_of_many(n_rows, *shape):
        """A row, or those of a block."""
        plan = row_plan(_MANY_ROWS, *shape)
        rows = plan.threads // plan.split.lanes if isinstance(plan.split, Short) else 1
        return dataclasses.replace(plan, rows=rows, blocks=plan.cluster)

    def image(*arguments):
        images.append(image_of(*arguments))
        return images[-1]

    rows = one_of_many(1, n_cols, (dtype,), "float32", _ARCH, _MULTIPROCESSORS).rows
    shape = rows, n_cols
    options = {name: value for one in way.split(" + ") for name, value in _ONE[one](_DTYPES[dtype], shape).items()}
    # Behind a row of their own, so that they begin where most rows do, as the results of the ops above.
    logits = inputs.make("spread", (rows + 1, n_cols), _DTYPES[dtype])
    arguments = [logits[1:]]
    if op in OPS:
        options["out"] = np.zeros_like(logits)[1:]
    if op.startswith("cross_entropy"):
        arguments.append(_mask(shape).argmax(axis=1))
        options["reduction"] = "none"
    with (
        emulated_gpu(_ARCH, track=False, check_race=False) as gpu,
        mock.patch.object(launch, "row_plan", one_of_many),
        mock.patch.object(compile, "image", image),
    ):
        given = {name: gpu.array(one) if isinstance(one, np.ndarray) else one for name, one in options.items()}
        getattr(gpusoftmax, op)(*map(gpu.array, arguments), **given)
        (only,) = images
        executed = machine_code.executed(only.ptx, _ARCH, gpu.stats[-1].warp_lines)
    return 32 * executed.total() / (rows * n_cols), compile.resources(only)[0]
