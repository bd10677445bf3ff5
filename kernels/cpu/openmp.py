"""The threads of an OpenMP library that torch has brought into the process.

After an operation of torch's, its threads spin for some milliseconds, and any other thread that wants their cores waits
for its turn: threads of our own would join when the call is over (2 cores, softmax of 512 x 8192 right after torch's:
3.0 ms on ours, 1.7 on torch's, 1.9 on the caller's alone). So torch's are asked, in the way that GCC's compiled code
asks for them: GOMP_parallel(function, argument, threads, flags), which LLVM's and Intel's libraries have as well.

They are left alone where that would cost more than it gains: in a child after a fork, which they do not survive; for
another number of threads than torch uses, since a smaller team ends the threads that are left over; and for some calls
after one whose end had to wait for a thread that got no core: OpenMP waits for all of them, work or not.
"""

import ctypes
import sys
from pathlib import Path

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gpusoftmax.kernels.cpu.job import call_c

_FUNCTIONS = ("GOMP_parallel", "omp_get_max_threads")


def functions() -> tuple[int, int]:
    """The addresses of GOMP_parallel and omp_get_max_threads in the library that torch uses; zeros if there is none."""
    torch = sys.modules["torch"]
    try:
        maps = Path("/proc/self/maps").read_text()
        paths = {line.split()[-1] for line in maps.splitlines() if "omp" in line.rpartition("/")[2]}
        home = str(Path(torch.__file__).parent)
        for path in sorted(paths, key=lambda path: not path.startswith(home)):
            library = ctypes.CDLL(path)  # it is loaded already
            if all(hasattr(library, name) for name in _FUNCTIONS):
                return tuple(ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in _FUNCTIONS)
    except (OSError, TypeError, AttributeError):  # no Linux, or a torch that is no package
        pass
    return 0, 0


@intrinsic
def parallel(typingctx, function, entry, argument, n_threads):
    """Runs the C function at the address `entry` with an argument on a team of n_threads; returns when all are done."""

    def codegen(context, builder, signature, args):
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        type = ir.FunctionType(ir.VoidType(), [byte, byte, word, word])
        pointers = [builder.inttoptr(value, byte) for value in args[1:3]]
        team = builder.trunc(args[3], word)
        builder.call(builder.inttoptr(args[0], type.as_pointer()), [*pointers, team, ir.Constant(word, 0)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), codegen


@intrinsic
def team_size(typingctx, function):
    """How many threads torch uses: omp_get_max_threads, at that address."""

    def codegen(context, builder, signature, args):
        type = ir.FunctionType(ir.IntType(32), [])
        return builder.sext(builder.call(builder.inttoptr(args[0], type.as_pointer()), []), ir.IntType(64))

    return types.int64(types.int64), codegen


@intrinsic
def now(typingctx):
    """Nanoseconds of a clock that only goes on."""

    def codegen(context, builder, signature, args):
        long = ir.IntType(64)
        with builder.goto_entry_block():
            time = builder.alloca(ir.ArrayType(long, 2))
        monotonic = ir.Constant(ir.IntType(32), 1)
        call_c(builder, "clock_gettime", monotonic, builder.bitcast(time, ir.IntType(8).as_pointer()))
        seconds, rest = (builder.extract_value(builder.load(time), k) for k in range(2))
        return builder.add(builder.mul(seconds, ir.Constant(long, 10**9)), rest)

    return types.int64(), codegen
