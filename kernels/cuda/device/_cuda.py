"""The only place that imports numba.cuda: it is in maintenance, and moving to its successor must cost one file."""

import re
from collections.abc import Callable
from types import SimpleNamespace

from numba import cuda, types
from numba.cuda import dispatcher
from numba.cuda.codegen import CUDACodeLibrary
from numba.cuda.compiler import CUDACompiler
from numba.cuda.extending import intrinsic

from gpusoftmax.kernels.numba_passes import compiling, without_unused

# Helpers become LLVM functions that are always inlined. Numba's own inlining, of its IR, gives the same machine code
# and copies every callee at every call: softmax took 6 s to compile instead of 2.
device = cuda.jit(device=True, forceinline=True)


def compile_to_ptx(
    kernel: Callable, signature: tuple, compute_capability: tuple[int, int], threads: int, registers: int | None
) -> str:
    """PTX for one architecture, for so many threads of a block, with so many registers, at most. Needs no driver."""
    # A helper is compiled for the current device, which asks the driver; here it is told. The helpers are LLVM code and
    # know no architecture, so those of an earlier kernel serve a later one of another architecture.
    every_pass, every_module = CUDACompiler.define_pipelines, CUDACodeLibrary.modules

    def passes(compiler):
        (pipeline,) = every_pass(compiler)
        pipeline.passes[:] = without_unused(pipeline.passes)
        return [pipeline]

    def modules(library):
        """Each once. Numba has them once for every way in which one helper calls another: 630 instead of 138."""
        below = (module for one in library._linking_libraries for module in one.modules)
        return list(dict.fromkeys((library._module, *below)))

    with compiling():
        ask_the_driver = dispatcher.get_current_device
        dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=compute_capability)
        CUDACompiler.define_pipelines, CUDACodeLibrary.modules = passes, property(modules)
        try:
            ptx, _ = cuda.compile(
                kernel,
                signature,
                device=False,
                abi="numba",
                cc=compute_capability,
                launch_bounds=threads,
            )
        finally:
            dispatcher.get_current_device = ask_the_driver
            CUDACompiler.define_pipelines, CUDACodeLibrary.modules = every_pass, every_module
    if registers is None:
        return ptx
    # Numba has no word for it.
    ptx, count = re.subn(r"^\.maxntid .*\n", rf"\g<0>.maxnreg {registers}\n", ptx, flags=re.M)
    if count != 1:
        raise RuntimeError(f"no launch bound in the PTX of {kernel.__name__}")
    return ptx


__all__ = ["compile_to_ptx", "cuda", "device", "intrinsic", "types"]
