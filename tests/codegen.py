"""The codegen contract: which kernels there are, what they compile to, and what must hold of that. Needs no GPU.

The list of kernels and signatures is not written down: every public function is called on device arrays that have no
memory, and what it would have launched is recorded. test_codegen.py says which of them are compiled for what.
`python -m tests.codegen` prints the registers that each of them takes.
"""

import ast
import contextlib
import functools
import itertools
import math
import re
import subprocess
import tempfile
from importlib import metadata
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np

import gpusoftmax
from gpusoftmax.kernels.cuda import compile, driver
from gpusoftmax.kernels.cuda.plan import MAY_SPILL, MORE_REGISTERS
from gpusoftmax.kernels.operands import NO_BAD_LABEL
from tests import inputs

DEVICE_SOURCES = Path(compile.__file__).parent / "device"
# One PTX serves a group of architectures.
LINKED = {"sm_75": ("sm_75",), "sm_80": ("sm_80", "sm_86", "sm_89"), "sm_90": ("sm_90", "sm_100", "sm_120")}
STATIC_SHARED_BYTES = 48 * 1024
REGISTERS_PER_SM = 65536
# Shapes and axes whose rows are split as plan.Short, plan.Long and plan.Columns.
SPLITS = (((4, 64), -1), ((4, 4096), -1), ((64, 64), 0))
# Kernels whose results are a number or two for each row.
NUMBERS_PER_ROW = (
    "logsumexp_rows",
    "measure_rows",
    "argmax_rows",
    "soft_argmax_rows",
    "spatial_softmax_rows",
    "token_logprobs_rows",
    "token_logprobs_and_entropy_rows",
    "top_logprobs_rows",
    "topk_softmax_rows",
    "sample_rows",
    "sample_kept_rows",
    "sample_mixed_rows",
)
# Approximate instructions that kernels may use: the exponentials of device/exponential.py that say so, and its softcap.
APPROXIMATE = frozenset({"ex2.approx.ftz.f32"})
OF_SOFTCAP = APPROXIMATE | {"rcp.approx.ftz.f32"}


# ---- which kernels there are


class Specialisation(NamedTuple):
    """A kernel with a signature, as compile.image takes them, and the dtype of the logits that led to it."""

    kernel: str
    signature: tuple[str, ...]
    dtype: str

    @property
    def name(self):
        return self.kernel.partition(".")[2]

    @property
    def reads_rows(self):
        """Whether it reads whole rows of logits; the others read one number or label for each row."""
        return self.kernel.partition(".")[0] != "batch" and self.name != "fold_rows"

    @property
    def writes_rows(self):
        """Whether it writes whole rows too."""
        return self.reads_rows and self.name not in NUMBERS_PER_ROW

    @property
    def is_double(self):
        return "float64" in " ".join(self.signature)

    @property
    def is_transformed(self):
        return "|" in " ".join(self.signature)

    @property
    def split(self):
        """ "short", "long" or "columns"; None for the kernels that run as one block."""
        return next((word for word in self.signature if word in ("short", "long", "columns")), None)

    def __str__(self):
        return "-".join(filter(None, (self.name, self.split, self.dtype)))


class _Array:
    """A device array as the library sees it. Its memory does not exist."""

    addresses = itertools.count(1 << 40, 1 << 20)

    def __init__(self, shape, dtype, strides=None):
        self.shape, self.dtype = shape, np.dtype(dtype)
        pointer = next(self.addresses) if math.prod(shape) else 0
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": self.dtype.str,
            "strides": strides and tuple(stride * self.dtype.itemsize for stride in strides),
            "data": (pointer, False),
            "version": 3,
        }

    def __dlpack_device__(self):
        return 2, 0

    def __gpusoftmax_empty__(self, shape, dtype):
        return _Array(shape, dtype)

    def item(self):
        return NO_BAD_LABEL


def _calls(dtype, out_dtype, shape, axis):
    """(public function, arguments, options): together they launch every kernel there is for these dtypes."""
    n_cols, batch = shape[axis], shape[:1] if axis == -1 else shape[1:]
    x, target, weight = _Array(shape, dtype), _Array(batch, np.int64), _Array((n_cols,), dtype)
    like = {"out": _Array(shape, out_dtype), "axis": axis}
    for function in ("softmax", "log_softmax"):
        yield function, (x,), like
        for temperature in (1.0, _Array(batch, np.float64 if np.float64 in (dtype, out_dtype) else np.float32)):
            yield f"{function}_backward", (x, _Array(shape, dtype)), {**like, "temperature": temperature}
    yield "softmax_jvp", (x, _Array(shape, dtype)), like
    for function in ("logsumexp", "soft_argmax"):
        per_row = {} if dtype == out_dtype else {"out": _Array(batch, out_dtype)}
        yield function, (x,), {**per_row, "axis": axis}
    yield "argmax", (x,), {"axis": axis}
    maps, points = _maps(batch[0], n_cols, dtype, axis), (batch[0], 2)
    yield "spatial_softmax", (maps,), {} if dtype == out_dtype else {"out": _Array(points, out_dtype)}
    row_dtype = np.float64 if dtype == np.float64 else np.float32
    yield "soft_argmax_backward", (x, _Array(batch, row_dtype), _Array(batch, row_dtype)), like
    out = {"out": _maps(batch[0], n_cols, out_dtype, axis)}
    yield "spatial_softmax_backward", (maps, _Array(points, row_dtype), _Array(points, row_dtype)), out
    for label_smoothing in (0.0, 0.1):
        options = {"label_smoothing": label_smoothing}
        yield "cross_entropy", (x, target, weight), {**options, "axis": axis, "validate": True}
        yield "cross_entropy_with_grad", (x, target, weight), {**options, **like}
    yield "cross_entropy", (x, target), {"axis": axis, "return_correct": True}
    if axis == -1:  # more rows than one block adds up
        yield "cross_entropy", (_Array((10_000, n_cols), dtype), _Array((10_000,), np.int64)), {}
    yield "cross_entropy_backward", (x, target, *(_Array(batch, row_dtype) for _ in range(2)), weight), like
    few = _Array((*batch, 5), np.int64), _Array((*batch, 5), row_dtype)
    for soft in (few, _Array(shape, dtype)):
        yield "cross_entropy_with_grad", (x, soft, weight), like
        yield "cross_entropy_backward", (x, soft, *(_Array(batch, row_dtype) for _ in range(2)), weight), like
    yield "kl_div", (x, _Array(shape, dtype)), {"axis": axis, "row_weight": _Array(batch, dtype)}
    yield "kl_div_with_grad", (x, _Array(shape, dtype)), {**like, "target_grad": True}
    yield "top_logprobs", (x, min(8, n_cols)), {"axis": axis}
    yield "topk_softmax", (x, min(8, n_cols)), {"axis": axis}
    gradient = _Array(batch, np.float64 if np.float64 in (dtype, out_dtype) else np.float32)
    for entropy in (False, True):
        yield "token_logprobs", (x, target), {"axis": axis, "return_entropy": entropy}
        gradients = (gradient, gradient) if entropy else (gradient,)
        yield "token_logprobs_backward", (x, target, *gradients), like
    yield "top_k_mask_logits", (x, 5), like
    yield "top_p_mask_logits", (x, 0.9), like
    yield "top_p_mask_logits", (x, _Array(batch, row_dtype)), like
    if dtype == out_dtype:
        own = {"temperature": _Array(batch, row_dtype)}
        for limits in ({}, {"top_k": 9, "top_p": 0.9, "min_p": 0.1}, own):
            yield "sample", (x,), {"axis": axis, "rng": (_Array(batch, np.int64), 0), **limits}
    if axis == -1:
        yield "softmax", (_Array((4, 4, n_cols), dtype),), {"axis": (0, 2)}  # no single stride walks these: copies


def _transformed_calls(dtype):
    """As _calls, in one dtype, along the last axis: one call for each family, whose logits go through every option."""
    (n_rows, n_cols), _ = SPLITS[1]
    row_dtype = np.float64 if dtype == np.float64 else np.float32
    x, target, per_row = _Array((n_rows, n_cols), dtype), _Array((n_rows,), np.int64), _Array((n_rows,), row_dtype)
    left_out = {"mask": _Array((n_rows, n_cols // 32), np.int32), "n_valid": _Array((n_rows,), np.int64)}
    everything = {"temperature": per_row, "bias": _Array((n_cols,), dtype), "softcap": 30.0, **left_out}
    for function in ("softmax", "log_softmax"):
        yield function, (x,), {**everything, "empty_row": "zero"}
    for function in ("logsumexp", "argmax", "soft_argmax"):
        yield function, (x,), everything
    yield "soft_argmax_backward", (x, per_row, per_row), everything
    yield "cross_entropy_with_grad", (x, target, _Array((n_cols,), dtype)), {**everything, "label_smoothing": 0.1}
    yield "token_logprobs", (x, target), {**everything, "return_entropy": True}
    yield "token_logprobs_backward", (x, target, per_row, per_row), everything
    for function in ("top_logprobs", "topk_softmax"):
        yield function, (x, 8), everything
    for limits in ({}, {"top_k": 9, "top_p": 0.9}):
        yield "sample", (x,), {**everything, "rng": (_Array((n_rows,), np.int64), 0), **limits}
    yield "top_k_mask_logits", (x, 5), left_out
    yield "top_p_mask_logits", (x, 0.9), left_out
    maps, points = _maps(n_rows, n_cols, dtype, -1), _Array((n_rows, 2), row_dtype)
    of_maps = {"temperature": per_row, "mask": _Array(maps.shape, np.bool_)}
    yield "spatial_softmax", (maps,), of_maps
    yield "spatial_softmax_backward", (maps, points, points), of_maps


def _maps(n_maps, n_pixels, dtype, axis):
    """Square feature maps one after another, or (axis 0) side by side."""
    side = math.isqrt(n_pixels)
    return _Array((n_maps, side, side), dtype, None if axis == -1 else (1, side * n_maps, n_maps))


def public_functions():
    """The functions that the recording calls."""
    return {function for function, _, _ in _calls(np.float32, np.float32, *SPLITS[0])}


@contextlib.contextmanager
def _recorded():
    """Collects (kernel, signature) of what would have been launched."""
    recorded = []
    stand_in = {
        "device": lambda ordinal: driver.Device(ordinal, "sm_90", 132),
        "load": lambda image, device, stream: recorded.append((image.kernel, image.signature)),
        "launch": lambda *_: None,
    }
    with mock.patch.multiple(driver, **stand_in):
        yield recorded


def _launches(dtype, out_dtype):
    with _recorded() as recorded:
        for shape, axis in SPLITS:
            for function, arguments, options in _calls(dtype, out_dtype, shape, axis):
                getattr(gpusoftmax, function)(*arguments, **options)
        if dtype == out_dtype:
            state = gpusoftmax.LogSumExpState.empty(4, like=_Array((4, 0), dtype))
            state.update(_Array((4, state.CHUNK_COLS + 64), dtype))
            state.logsumexp()
    return recorded


@functools.cache
def specialisations(mixed=False):
    """Every kernel with every signature: inputs and outputs of one dtype, or (mixed) of two."""
    found = {}
    for dtype, out_dtype in itertools.product(inputs.DTYPES, repeat=2):
        if (dtype == out_dtype) != mixed:
            for kernel, signature in _launches(dtype, out_dtype):
                found.setdefault((kernel, signature), f"{dtype}-{out_dtype}" if mixed else dtype.name)
    if mixed:
        for known in specialisations():
            found.pop(known[:2], None)
    return tuple(Specialisation(*key, dtype) for key, dtype in found.items())


@functools.cache
def transformed_specialisations():
    """A kernel of each family with every option on its logits, in each dtype."""
    found = {}
    for dtype in inputs.DTYPES:
        with _recorded() as recorded:
            for function, arguments, options in _transformed_calls(dtype):
                getattr(gpusoftmax, function)(*arguments, **options)
        found.update(dict.fromkeys(recorded, dtype.name))
    return tuple(Specialisation(*key, dtype) for key, dtype in found.items() if "|" in " ".join(key[1]))


def tempered_specialisations():
    """The kernels of losses at one temperature, which others have none for, along rows of either length."""
    found = {}
    for dtype in (np.dtype(np.float32), inputs.BFLOAT16):
        with _recorded() as recorded:
            for shape, _ in SPLITS[:2]:
                n_rows, n_cols = shape
                few = _Array((n_rows, 5), np.int64), _Array((n_rows, 5), np.float32)
                for target in (_Array((n_rows,), np.int64), few, _Array(shape, dtype)):
                    options = {"temperature": 0.7, "label_smoothing": 0.1}
                    gpusoftmax.cross_entropy_with_grad(
                        _Array(shape, dtype), target, _Array((n_cols,), dtype), **options
                    )
        found.update(dict.fromkeys((key for key in recorded if "cross_entropy" in key[0]), dtype.name))
    return tuple(Specialisation(*key, dtype) for key, dtype in found.items())


def kernels_on_disk():
    """The functions under kernels/cuda/device that have no decorator and whose name says that they go over rows."""
    return {
        f"{path.stem}.{node.name}"
        for path in DEVICE_SOURCES.glob("[a-z]*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and not node.decorator_list and node.name.endswith("_rows")
    }


# ---- what they compile to


class Linked(NamedTuple):
    """A cubin and what the assembler said about it."""

    cubin: bytes
    report: str
    registers: int
    shared_bytes: int


def ptx_of(specialisation, arch):
    return compile.image(specialisation.kernel, specialisation.signature, arch).ptx


@functools.cache
def link(specialisation, arch):
    return link_ptx(ptx_of(specialisation, arch), arch)


def link_ptx(ptx, arch):
    cubin, report = compile.link(ptx, arch)
    shared = re.search(r"(\d+) bytes smem", report)
    registers = int(re.search(r"Used (\d+) registers", report)[1])
    return Linked(cubin, report, registers, int(shared[1]) if shared else 0)


def sass(cubin, *options):
    """The machine code as text. "--print-line-info-ptx" tells which line of the PTX it comes from, where known."""
    disassembler = next(
        path.locate() for path in metadata.files("nvidia-cuda-nvdisasm") if path.name in ("nvdisasm", "nvdisasm.exe")
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [disassembler, "--print-code", *options, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


class Instruction(NamedTuple):
    opcode: str
    operands: tuple[str, ...]

    @property
    def words(self):
        return self.opcode.split(".")

    @property
    def registers(self):
        """Those in each operand, destinations first."""
        return [re.findall(r"%\w+(?:\.[xyz])?", operand) for operand in self.operands]

    def __str__(self):
        return f"{self.opcode} {', '.join(self.operands)}"


@functools.lru_cache(maxsize=256)
def instructions(ptx):
    body = ptx[ptx.index(".entry") :]
    lines = re.findall(r"^\s*(?:@!?%\w+\s+)?([a-z][\w.:]*)[ \t]*([^;\n]*);", body, re.M)
    return [Instruction(opcode, tuple(re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s]+", rest))) for opcode, rest in lines]


# ---- what must hold of PTX


def check_ptx(specialisation, arch):
    """Everything below."""
    ptx = ptx_of(specialisation, arch)
    check_header(ptx, arch, *compile.launch_bounds(specialisation.signature, arch))
    check_memory(ptx)
    wide = specialisation.split != "columns"
    check_vectors(ptx, specialisation.reads_rows and wide, specialisation.writes_rows and wide)
    if not specialisation.is_double:
        check_no_double(ptx)
    check_rounding(ptx)
    check_exact(ptx, OF_SOFTCAP if specialisation.is_transformed else APPROXIMATE)
    if not specialisation.split:  # the others count the columns of a piece, a thousand at most, in 32 bits
        check_addresses(ptx)


FLOATS = {"f16": 16, "f16x2": 16, "bf16": 16, "bf16x2": 16, "f32": 32, "f64": 64}
MAY_ROUND = {"add", "sub", "mul", "fma", "mad", "div", "rcp", "sqrt"}
APPROXIMATIONS = {"ex2", "lg2", "sin", "cos", "tanh", "rsqrt"}


def none_of(found, what):
    assert not found, f"{len(found)} {what}, such as: {found[0]}"


def check_header(ptx, arch, max_threads, max_registers):
    assert re.search(r"^\.target (\w+)", ptx, re.M)[1] == arch
    assert len(re.findall(r"\.entry\b", ptx)) == 1 and compile.entry_of(ptx)
    bound = re.search(r"\.maxntid (\d+)", ptx)
    assert bound and int(bound[1]) == max_threads, f"launch bound {bound and bound[1]}, expected {max_threads}"
    registers = re.search(r"\.maxnreg (\d+)", ptx)
    registers = registers and int(registers[1])
    assert registers == max_registers, f"at most {registers} registers, expected {max_registers}"


def check_memory(ptx):
    """No memory of a thread's own, no calls."""
    none_of(re.findall(r"\.local\b.*", ptx), "uses of local memory")
    none_of([one for one in instructions(ptx) if one.words[0] == "call"], "calls")


def check_vectors(ptx, loads, stores):
    """Rows are read (`loads`) and written (`stores`) 16 bytes at a time, or never so."""
    wide = {"ld": 0, "st": 0}
    for one in instructions(ptx):
        if one.words[:2] in (["ld", "global"], ["st", "global"]) and re.search(r"\.v4\..32|\.v2\..64", one.opcode):
            wide[one.words[0]] += 1
        if one.opcode.startswith("cp.async.") and one.operands[-1:] == ("16",):
            wide["ld"] += 1
    assert bool(wide["ld"]) == loads, f"{wide['ld']} loads of 16 bytes"
    assert bool(wide["st"]) == stores, f"{wide['st']} stores of 16 bytes"


def check_no_double(ptx):
    """A stray float64 constant costs a hundred float32 instructions, and changes bits."""
    none_of(re.findall(r".*\.f64\b.*", ptx), "uses of float64")


def check_rounding(ptx):
    """Every operation that may round names its rounding: an assembler may contract the others, each as it likes."""
    none_of([one for one in instructions(ptx) if _may_round(one) and "rn" not in one.words], "implicit roundings")


def _may_round(one):
    formats = [FLOATS[word] for word in one.words if word in FLOATS]
    if one.words[0] == "cvt" and one.words[-2] in FLOATS:  # cvt.to.from; float to integer names its rounding anyway
        return one.words[-1] not in FLOATS or formats[0] < formats[1]
    return one.words[0] in MAY_ROUND and bool(formats) and "approx" not in one.words  # check_exact judges those


def check_exact(ptx, allowed=APPROXIMATE):
    """No approximate instruction and no flushing of small numbers, unless listed."""
    none_of([one for one in instructions(ptx) if _is_inexact(one) and one.opcode not in allowed], "approximations")


def _is_inexact(one):
    return bool({"approx", "full", "ftz"} & set(one.words)) or one.words[0] in APPROXIMATIONS


def check_addresses(ptx):
    """What becomes part of a global address is computed in 64 bits.

    32-bit numbers may enter it by widening only where they cannot have wrapped: numbers of threads and blocks, what was
    loaded or came from another thread, and quotients and remainders, which are no larger than the dividend. 64-bit
    numbers are not cut to 32 bits on the way.
    """
    made = {}
    for one in instructions(ptx):
        if one.operands and one.words[0] not in ("st", "bra", "bar"):
            for register in one.registers[0]:
                made.setdefault(register, []).append(one)
    seen, pending, narrow = set(), [], []
    for one in instructions(ptx):
        if one.words[0] in ("ld", "st", "atom", "red", "cp", "prefetch") and "global" in one.words:
            pending += re.findall(r"%\w+", next(operand for operand in one.operands if operand.startswith("[")))
    assert pending, "no access to global memory"
    while pending:
        register = pending.pop()
        if register in seen:
            continue
        seen.add(register)
        for one in made.get(register, ()):
            if one.words[0] in ("ld", "shfl"):
                continue
            if _cuts(one, made):
                narrow.append(one)
            elif register.startswith("%rd") or one.words[0] in ("mov", "selp"):
                sources = one.registers[1:2] if one.words[0] in ("shl", "shr") else one.registers[1:]  # no shift counts
                pending += [source for found in sources for source in found if not source.startswith("%p")]
            elif not _cannot_wrap(one, made):
                narrow.append(one)
    none_of(narrow, "32-bit computations in global addresses")


def _cuts(one, made):
    """Keeps the low half: reads it alone, masks it, or shifts it up and down again."""
    if one.words[0] == "cvt":
        return one.words[-1] in ("s32", "u32", "s16", "u16") and one.operands[1].startswith("%rd")
    if one.opcode == "and.b64":
        return "4294967295" in one.operands
    if one.words[0] != "shr" or one.operands[2] != "32":
        return False
    shifted = made.get(one.operands[1], ())
    return any(other.words[0] == "shl" and other.operands[2] == "32" for other in shifted)


def _cannot_wrap(one, made):
    if one.words[0] in ("div", "rem"):
        return True
    if one.words[0] != "sub":
        return False
    # a - (a / b) b
    (dividend,), products = one.registers[1], made.get(one.registers[2][0], ())
    for product in products:
        factors = [register for sources in product.registers[1:] for register in sources]
        quotients = [source for factor in factors for source in made.get(factor, ()) if source.words[0] == "div"]
        if not any(
            quotient.registers[1] == [dividend] and quotient.registers[2][0] in factors for quotient in quotients
        ):
            return False
    return bool(products)


# ---- what must hold of machine code


def check_link(linked, entry, arch, threads, max_registers, may_spill=0):
    """No spills (of more bytes; of more than a few numbers where rows are short), no stack, static shared memory within
    the limit, and no more registers than the bound, or one that stands in for it.
    """
    assert f"'{entry}' for '{arch}'" in linked.report, linked.report
    stack, stores, loads = re.search(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", linked.report
    ).groups()
    may_spill = max(may_spill, MAY_SPILL.get(max_registers, 0))
    spilled = f"stack {stack}, spilled {stores} bytes, loaded {loads}"
    assert int(stores) <= may_spill and (int(stack) == 0 or int(stores) > 0), spilled
    assert "lmem" not in linked.report or int(stores), linked.report
    assert linked.shared_bytes <= STATIC_SHARED_BYTES
    most = max((max_registers, *MORE_REGISTERS.get(max_registers, ()))) if max_registers else 255
    assert linked.registers <= most, f"{linked.registers} registers, {most} at most"
    assert blocks_per_sm(linked.registers, threads) >= 1, f"{linked.registers} registers for each of {threads} threads"


def blocks_per_sm(registers, threads):
    """How many blocks the registers leave room for. A warp is given them in units of 256."""
    return REGISTERS_PER_SM // (-(-registers * 32 // 256) * 256 * (threads // 32))


def main():
    """A table of what every kernel takes on sm_90."""
    for specialisation in specialisations():
        linked = link(specialisation, "sm_90")
        threads, _ = compile.launch_bounds(specialisation.signature, "sm_90")
        room = blocks_per_sm(linked.registers, threads)
        print(f"{specialisation!s:36} {linked.registers:4} registers, {room} blocks of {threads} on an SM")


if __name__ == "__main__":
    main()
