"""What compiling a kernel takes of Numba, whose front end, in Python, is three quarters of the time.

Numba passes every function through some thirty steps and analyses its variables anew after each. Kernels are plain
loops over numbers: what is left out here rewrites closures, `with` blocks, loops over tuples of several types, calls of
functions with inline="always" and array expressions, of which they have none. Code that had one would not compile.
"""

import contextlib
import gc
from collections.abc import Iterator

from numba.core.compiler_lock import global_compiler_lock

from gpusoftmax.kernels.forks import forks_wait_for

_UNUSED = {
    "WithLifting",
    "InlineClosureLikes",
    "RewriteDynamicRaises",
    "MakeFunctionToJitFunction",
    "InlineInlinables",
    "FindLiterallyCalls",
    "LiteralUnroll",
    "LiteralPropagationSubPipelinePass",
    "InlineOverloads",
    "NopythonRewrites",
}


def without_unused(passes: list[tuple[type, str]]) -> list[tuple[type, str]]:
    """The passes that kernels need, of a pipeline of numba or numba-cuda, whose classes have the same names."""
    names = [one.__name__ for one, _ in passes]
    again = names.index("InlineInlinables") + 1  # branches are pruned once more, for what has been inlined
    return [one for k, one in enumerate(passes) if names[k] not in _UNUSED and k != again]


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """No search for garbage: a compilation makes millions of objects, most of which stay.

    One thread at a time: of two, one could take what the other has switched off for what it has to leave.
    """
    with global_compiler_lock:
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if was_enabled:
                gc.enable()


# A child that is forked while another thread compiles has not got this thread: it would wait for Numba's lock for ever,
# at the next kernel that it loads or compiles, and search for no garbage. So forks wait for compilations.
forks_wait_for(global_compiler_lock)
