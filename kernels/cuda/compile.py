"""From a kernel's name and signature to an image a device can load: PTX by Numba, cubin by nvJitLink, both cached.

Numba is imported only when a PTX is not in the cache. One PTX serves several architectures: see `ptx_architecture`.
"""

import functools
import importlib
import json
import re

import numpy as np

from gpusoftmax.kernels.cuda import cache
from gpusoftmax.kernels.cuda.plan import (
    MAX_THREADS,
    MAY_SPILL,
    MORE_REGISTERS,
    REGISTERS,
    Columns,
    Long,
    Short,
    columns_threads,
)
from gpusoftmax.kernels.operands import MASKS, STORAGE, Labels, Rows, Transform

_SPLITS = {"short": Short, "long": Long, "columns": Columns}


def ptx_architecture(arch: str) -> str:
    """The architecture to compile for: the oldest of its group, whose PTX links for every later one."""
    compute = int(arch.removeprefix("sm_"))
    return "sm_75" if compute < 80 else "sm_80" if compute < 90 else "sm_90"


class Image:
    """One kernel for one architecture. The cubin is linked when it is first asked for."""

    def __init__(self, kernel: str, signature: tuple[str, ...], arch: str):
        self.kernel = kernel
        self.signature = signature
        self.arch = arch

    @functools.cached_property
    def ptx(self) -> str:
        return _ptx(self.kernel, self.signature, ptx_architecture(self.arch))

    @functools.cached_property
    def entry(self) -> str:
        return self._linked[0]

    @functools.cached_property
    def cubin(self) -> bytes:
        return self._linked[1]

    def make(self) -> None:
        """Compiles and links the kernel unless it is in the cache."""
        self._linked  # noqa: B018

    @functools.cached_property
    def _linked(self) -> tuple[str, bytes]:
        key = cache.key(self.kernel, self.signature, self.arch, "cubin")
        stored = cache.get(key)
        if stored is not None:
            header, _, cubin = stored.partition(b"\n")
            return json.loads(header)["entry"], cubin
        entry = entry_of(self.ptx)
        cubin, _ = link(self.ptx, self.arch)
        cache.put(key, json.dumps({"entry": entry}).encode() + b"\n" + cubin)
        return entry, cubin


@functools.cache
def image(kernel: str, signature: tuple[str, ...], arch: str) -> Image:
    """The image of `kernel`, "<file>.<function>" under kernels/cuda/device.

    `signature` holds one word per argument: "rows", "labels", "strided bfloat16" (an Operand, whose transform follows
    field by field behind bars), "*float32" (Numbers: a pointer), "short", "long" or "columns" (how rows are split, see
    plan.py), "int64", "float32", "float64" or "none". Tuples take several parameters of the compiled kernel.
    """
    return Image(kernel, signature, arch)


def entry_of(ptx: str) -> str:
    """The name of the kernel in a PTX text."""
    return re.search(r"\.entry\s+([\w$]+)", ptx)[1]


def link(ptx: str, arch: str, lineinfo: bool = False) -> tuple[bytes, str]:
    """PTX -> (cubin, the assembler's report on registers and spills). Needs no GPU.

    A kernel that would spill gets more registers than its bound (plan.REGISTERS).
    """
    cubin, report = _link(ptx, arch, lineinfo)
    found = re.search(r"\.maxnreg (\d+)", ptx)
    bound = int(found[1]) if found else None
    for registers in MORE_REGISTERS.get(bound, ()):
        spilled = re.search(r"(\d+) bytes spill stores", report)
        if spilled is None or int(spilled[1]) <= MAY_SPILL.get(bound, 0):
            break
        cubin, report = _link(ptx.replace(found[0], f".maxnreg {registers}"), arch, lineinfo)
    return cubin, report


def _link(ptx: str, arch: str, lineinfo: bool) -> tuple[bytes, str]:
    from cuda.bindings import nvjitlink
    from cuda.core import Linker, LinkerOptions, ObjectCode

    version = nvjitlink.version()
    if version < (12, 8) and arch == "sm_90" and "max.bf16x2" in ptx:  # it would end the process
        raise RuntimeError(
            f"nvJitLink {'.'.join(map(str, version))} cannot link kernels of bfloat16 for sm_90, expected 12.8 or "
            f"later: pip install -U nvidia-nvjitlink-cu12"
        )
    # Without its cache: what comes from there has no report. Before 12.5 it refuses to be told so.
    no_cache = True if version >= (12, 5) else None
    options = LinkerOptions(arch=arch, lineinfo=lineinfo, ptxas_options=["-v"], no_cache=no_cache)
    linker = Linker(ObjectCode.from_ptx(ptx.encode()), options=options)
    cubin = bytes(linker.link("cubin").code)
    return cubin, linker.get_info_log()


@functools.cache
def resources(image: Image) -> tuple[int, int]:
    """Registers of a thread and bytes of static shared memory of a block, as the assembler reports them."""
    _, report = link(image.ptx, image.arch)
    shared = re.search(r"(\d+) bytes smem", report)
    return int(re.search(r"Used (\d+) registers", report)[1]), int(shared[1]) if shared else 0


def launch_bounds(signature: tuple[str, ...], arch: str) -> tuple[int, int | None]:
    """(threads of a block at most, registers of a thread at most, None: what they need)"""
    is_double, threads = "float64" in " ".join(signature), MAX_THREADS
    split = next((word for word in signature if word in _SPLITS), "")
    source = next((word.split()[1] for word in signature if word.startswith("strided ")), "")
    if split == "columns":
        threads = columns_threads(np.dtype(STORAGE[source]).itemsize, "float64" if is_double else "float32")
    if arch != "sm_90" or is_double:
        return threads, None
    if split == "long":
        split = f"long {np.dtype(STORAGE[source]).itemsize}"
    return threads, REGISTERS.get(split)


@functools.cache
def _ptx(kernel: str, signature: tuple[str, ...], arch: str) -> str:
    key = cache.key(kernel, signature, arch, "ptx")
    stored = cache.get(key)
    if stored is not None:
        return stored.decode()
    from gpusoftmax.kernels.cuda.device._cuda import compile_to_ptx, types

    file, name = kernel.split(".")
    function = getattr(importlib.import_module(f"gpusoftmax.kernels.cuda.device.{file}"), name)
    compute = int(arch.removeprefix("sm_"))
    ptx = compile_to_ptx(
        function,
        tuple(_numba_type(types, word) for word in signature),
        (compute // 10, compute % 10),
        *launch_bounds(signature, arch),
    )
    cache.put(key, ptx.encode())
    return ptx


def _numba_type(types, word: str):
    from gpusoftmax.kernels.cuda.device.rows import Strided

    if word in ("rows", "labels"):
        fields = Rows if word == "rows" else Labels
        return types.NamedUniTuple(types.int64, len(fields._fields), fields)
    if word in _SPLITS:
        fields = _SPLITS[word]
        return types.NamedUniTuple(types.int32, len(fields._fields), fields)
    if word.startswith("strided "):
        (_, dtype), *fields = (part.split() for part in word.split(" | "))
        transform = types.none
        if fields:
            transform = types.NamedTuple([_numba_type(types, " ".join(field)) for field in fields], Transform)
        return types.NamedTuple((_pointer_type(types, dtype), *(types.int64,) * 3, transform), Strided)
    if word in ("none", "flag"):
        return types.none if word == "none" else types.int64
    if word[0].isdigit():
        count, kind = word.split()
        return types.UniTuple(getattr(types, kind), int(count))
    return _pointer_type(types, word[1:]) if word.startswith("*") else getattr(types, word)


def _pointer_type(types, dtype: str):
    stored = {**STORAGE, **MASKS}.get(dtype)
    return types.CPointer(getattr(types, stored.__name__ if stored else dtype))
