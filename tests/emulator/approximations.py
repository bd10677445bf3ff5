"""ex2.approx and its kin.

By default they are correctly rounded. An adversarial launch moves each float32 result by a seeded error of up to BOUND
ulp that depends on the inputs alone, as in hardware: accuracy must hold in that mode too.
"""

import numpy as np

from tests.emulator.ptx_types import f32, f64, i32, i64, u32, u64

# ulp: what the CUDA programming guide documents, or worse
BOUND = {"ex2": 2, "rcp": 1, "sqrt": 1, "rsqrt": 2, "div": 2, "lg2": 2, "sin": 2, "cos": 2, "tanh": 4096}
MULTIPLIER = u32(0x9E3779B1)


def _inverse_root(x):
    return 1.0 / np.sqrt(x)


FUNCTIONS = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "rsqrt": _inverse_root,
}


def rounded(name):
    """The function, computed in float64 and rounded to the dtype of its argument."""
    function = FUNCTIONS[name]
    return lambda x: function(x.astype(f64)).astype(x.dtype)


def upper_half(function):
    """The .ftz.f64 approximations: subnormals flushed, only the upper 32 bits of the result."""

    def tiny_to_zero(x):
        return np.where(np.abs(x) < 2.0**-1022, np.copysign(0.0, x), x)

    def run(x):
        result = function(tiny_to_zero(x))
        return tiny_to_zero((result.view(u64) & u64(0xFFFFFFFF00000000)).view(f64))

    return run


def approximate(machine, name, function):
    """function, off by up to BOUND[name] ulp when the launch is adversarial."""

    def run(*args):
        result = function(*args)
        seed = machine.launch.adversary
        if seed is None or result.dtype != f32:
            return result
        mixed = np.full(result.shape, seed & 0xFFFFFFFF, u32)
        for x in args:
            mixed = (mixed ^ np.broadcast_to(np.asarray(x, f32).view(u32), result.shape)) * MULTIPLIER
            mixed ^= mixed >> u32(15)
        bound = BOUND[name]
        step = (mixed % u32(2 * bound + 1)).astype(i64) - bound
        moved = (result.view(i32).astype(i64) + step).astype(i32).view(f32)
        exact = ~np.isfinite(result) | (np.abs(result) < f32(2.0**-125)) | (np.abs(result) > f32(2.0**126))
        if name in ("ex2", "lg2"):
            exact |= (result == 1) & (np.asarray(args[0]) == 0)
        return np.where(exact, result, moved)

    return run
