"""The float instructions that kernels are made of, as machine code: NumPy has no fma and knows no NVIDIA NaN.

Each is a loop over lanes in LLVM's language, without fast-math, so every result is rounded as IEEE 754 says. Compiled
by llvmlite and not by Numba, which the library promises not to import.
"""

import ctypes
import functools

import numpy as np
from llvmlite import binding

from tests.emulator.ptx_types import f32

WIDTH = 32  # lanes per round: slices of whole warps are the usual case
MOST_PREPARED = 64  # slices whose arguments one instruction keeps
OPERATIONS = {
    "add": "%r = fadd {t} %a, %b",
    "sub": "%r = fsub {t} %a, %b",
    "mul": "%r = fmul {t} %a, %b",
    "div": "%r = fdiv {t} %a, %b",
    "fma": "%r = call {t} @llvm.fma.{f}({t} %a, {t} %b, {t} %c)",
}
# The larger of two numbers, +0 above -0; a NaN gives way to a number.
OPERATIONS["max"] = """%greater = fcmp ogt {t} %a, %b
  %equal = fcmp oeq {t} %a, %b
  %bits = bitcast {t} %a to {i}
  %positive = icmp sge {i} %bits, zeroinitializer
  %tie = and {p} %equal, %positive
  %b_nan = fcmp uno {t} %b, %b
  %either = or {p} %greater, %tie
  %first = or {p} %either, %b_nan
  %r = select {p} %first, {t} %a, {t} %b"""
OPERATIONS["min"] = OPERATIONS["max"].replace("ogt", "olt").replace("sge", "slt")
# NVIDIA's NaN, for float32 only: float64 keeps payloads.
CANONICAL = """%nan = fcmp uno {t} %r, %r
  %raw = bitcast {t} %r to {i}
  %fixed = select {p} %nan, {i} {quiet}, {i} %raw
  store {i} %fixed, ptr %qd, align {size}"""
PLAIN = "store {t} %r, ptr %qd, align {size}"

FUNCTION = """
declare {t} @llvm.fma.{f}({t}, {t}, {t})
define void @{name}(ptr %arguments) {{
entry:
{arguments}
  br label %loop
loop:
  %k = phi i64 [0, %entry], [%next, %loop]
{offset}
  %od = mul i64 %lane, {step}
  %ad = add i64 %pd, %od
  %qd = inttoptr i64 %ad to ptr
{loads}  {operation}
  {finish}
  %next = add i64 %k, 1
  %more = icmp slt i64 %next, %count
  br i1 %more, label %loop, label %done
done:
  ret void
}}
"""
LOAD = """  %o{x} = mul i64 %lane, %s{x}
  %a{x} = add i64 %p{x}, %o{x}
  %q{x} = inttoptr i64 %a{x} to ptr
  %{x} = load {t}, ptr %q{x}, align {size}
"""
ARGUMENT = """  %p_{x} = getelementptr i64, ptr %arguments, i64 {k}
  %{x} = load i64, ptr %p_{x}
"""
ARGUMENTS = "".join(
    ARGUMENT.format(x=x, k=k) for k, x in enumerate(("pd", "pa", "sa", "pb", "sb", "pc", "sc", "index", "count"))
)
CONSECUTIVE = "  %lane = add i64 %k, 0"
INDEXED = """  %indices = inttoptr i64 %index to ptr
  %slot = getelementptr i64, ptr %indices, i64 %k
  %lane = load i64, ptr %slot"""


@functools.cache
def _engine():
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    target = binding.Target.from_default_triple()
    features = binding.get_host_cpu_features().flatten()
    machine = target.create_target_machine(cpu=binding.get_host_cpu_name(), features=features, opt=3)
    return binding.create_mcjit_compiler(binding.parse_assembly(""), machine)


@functools.cache
def _function(operation, dtype, indexed):
    """A function of the address of int64 [d, a, step of a, b, step of b, c, step of c, lane numbers, count].

    Addresses and steps in bytes. Indexed: one lane a round, wherever the lane numbers say. Else WIDTH lanes a round.
    One argument, because ctypes takes a microsecond for each.
    """
    single, lanes = dtype == f32, 1 if indexed else WIDTH
    size = 4 if single else 8

    def vector(element):
        return element if indexed else f"<{lanes} x {element}>"

    fields = {
        "t": vector("float" if single else "double"),
        "i": vector("i32" if single else "i64"),
        "p": vector("i1"),
        "f": ("" if indexed else f"v{lanes}") + ("f32" if single else "f64"),
        "size": size,
        "step": size * lanes,
        "quiet": "2147483647" if indexed else f"<{', '.join(['i32 2147483647'] * lanes)}>",
        "name": f"{operation}_{size}_{lanes}",
    }
    operation_text = OPERATIONS[operation].format(**fields)
    if indexed:
        operation_text = operation_text.replace("zeroinitializer", "0")
    text = FUNCTION.format(
        arguments=ARGUMENTS,
        offset=INDEXED if indexed else CONSECUTIVE,
        loads="".join(LOAD.format(x=x, **fields) for x in ("abc" if operation == "fma" else "ab")),
        operation=operation_text,
        finish=(CANONICAL if single else PLAIN).format(**fields),
        **fields,
    )
    engine = _engine()
    engine.add_module(binding.parse_assembly(text))
    engine.finalize_object()
    return ctypes.PYFUNCTYPE(None, ctypes.c_int64)(engine.get_function_address(fields["name"]))


def _arguments(arrays, first, step):
    """[d, a, step of a, b, step of b, c, step of c, lane numbers, count]; a constant does not move."""
    values = [arrays[0].ctypes.data + first * arrays[0].itemsize]
    for array in arrays[1:]:
        moves = len(array) == len(arrays[0])
        values += [array.ctypes.data + moves * first * array.itemsize, moves * step]
    return np.array(values + [0] * (9 - len(values)), np.int64)


def bind(operation, destination, sources):
    """A function of a set of lanes that runs the operation on registers, or None where they are no plain arrays."""
    dtype = getattr(destination, "dtype", None)
    if dtype not in (np.float32, np.float64) or len(destination) % WIDTH:
        return None
    arrays = [destination]
    for source in sources:
        array = getattr(source, "value", source)
        if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != 1:
            return None
        arrays.append(np.repeat(array, WIDTH) if len(array) == 1 else array)
    if any(array.strides[0] != dtype.itemsize for array in arrays):
        return None
    together, single = _function(operation, dtype, False), _function(operation, dtype, True)
    scattered = _arguments(arrays, 0, dtype.itemsize)
    scattered_address = scattered.ctypes.data
    addresses, kept = {}, [arrays]

    def run(lanes):
        if type(lanes) is slice:
            first, stop = lanes.start, lanes.stop
            address = addresses.get((first, stop))
            if address is not None:
                together(address)
                return
            if (stop - first) % WIDTH == 0 and len(addresses) < MOST_PREPARED:
                block = _arguments(arrays, first, dtype.itemsize * WIDTH)
                block[8] = (stop - first) // WIDTH
                kept.append(block)
                addresses[first, stop] = block.ctypes.data
                together(addresses[first, stop])
                return
            lanes = np.arange(first, stop)
        scattered[7], scattered[8] = lanes.__array_interface__["data"][0], len(lanes)
        single(scattered_address)

    return run
