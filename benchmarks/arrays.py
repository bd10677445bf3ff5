"""The arguments of a call and room for its result, as arrays of the library that is called."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.cases import BFLOAT16, Case

_ALIGNMENT = 64
"""Of arrays on the CPU: what torch gives its own. NumPy's start 16 bytes past it, and vectors straddle cache lines."""


class Arrays:
    """The inputs of a case by name, such as `logits`; `result()` and `per_row()` make room for what a call writes."""

    def __init__(self, case: Case, inputs: dict[str, Any], empty: Callable[[tuple[int, ...], str], Any]):
        self.__dict__.update(inputs)
        self.case = case
        self._empty = empty

    def result(self) -> Any:
        return self._empty((self.case.n_rows, self.case.n_cols), self.case.dtype)

    def per_row(self, dtype: str | None = None) -> Any:
        return self._empty((self.case.n_rows,), dtype or self.case.dtype)


def on_cpu(case: Case, library: str, offset: int = 0) -> Arrays:
    """NumPy arrays or torch tensors; both share the inputs' memory, which is kept until the next case.

    offset: so many bytes behind a boundary of _ALIGNMENT all of them begin.
    """
    inputs = _inputs_on_cpu(case, offset)
    if library == "torch":
        return Arrays(
            case,
            {name: _torch_from_numpy(array) for name, array in inputs.items()},
            lambda shape, dtype: _torch_from_numpy(_at(offset, shape, dtype)),
        )
    return Arrays(case, inputs, functools.partial(_at, offset))


@functools.lru_cache(maxsize=1)
def _inputs_on_cpu(case: Case, offset: int) -> dict[str, np.ndarray]:
    inputs = {}
    for name, block in case.inputs.items():
        array = _at(offset, (case.n_rows, *block.shape[1:]), block.dtype.name)
        array.reshape(-1, *block.shape)[...] = block
        inputs[name] = array
    return inputs


def _at(offset: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Zeros, so that the first call does not pay for the operating system's pages."""
    dtype = BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.zeros(size + offset + _ALIGNMENT, np.uint8)
    raw[...] = 0
    start = -raw.ctypes.data % _ALIGNMENT + offset
    return raw[start : start + size].view(dtype).reshape(shape)


def on_gpu(case: Case, library: str) -> Arrays:
    """New torch tensors or CuPy arrays on the current device."""
    repeats = case.n_rows // case.block_rows
    if library == "torch":
        torch = importlib.import_module("torch")
        inputs = {name: _torch_from_numpy(block).cuda() for name, block in case.inputs.items()}
        inputs = {name: block.repeat(repeats, *[1] * (block.ndim - 1)) for name, block in inputs.items()}
        return Arrays(case, inputs, lambda shape, dtype: torch.zeros(shape, dtype=getattr(torch, dtype), device="cuda"))
    cupy = importlib.import_module("cupy")
    inputs = {
        name: cupy.tile(cupy.asarray(block), (repeats, *[1] * (block.ndim - 1))) for name, block in case.inputs.items()
    }
    return Arrays(case, inputs, lambda shape, dtype: cupy.zeros(shape, BFLOAT16 if dtype == "bfloat16" else dtype))


def _torch_from_numpy(array: np.ndarray) -> Any:
    torch = importlib.import_module("torch")
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy(array: Any) -> np.ndarray:
    """A NumPy array from any library's, from whichever device; waits for the device."""
    module = type(array).__module__.partition(".")[0]
    if module == "cupy":
        return array.get()
    if module != "torch":
        return np.asarray(array)
    array = array.detach()
    torch = importlib.import_module("torch")
    if array.dtype == torch.bfloat16:
        return array.view(torch.int16).cpu().numpy().view(BFLOAT16)
    return array.cpu().numpy()
