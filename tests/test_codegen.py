"""The contract with the compiler: what PTX and machine code of every kernel must and must not contain."""

import os
import re
import subprocess
import sysconfig
from pathlib import Path

import pytest

from gpusoftmax.kernels.cuda import compile
from gpusoftmax.kernels.cuda.plan import MAX_THREADS
from tests.codegen import DTYPES, kernels

PTX_ARCHITECTURES = ["sm_75", "sm_80", "sm_90"]
LINKED = {"sm_75": ["sm_75"], "sm_80": ["sm_80", "sm_86", "sm_89"], "sm_90": ["sm_90", "sm_100", "sm_120"]}
SMALL = {"cross_entropy.normalise_rows", "cross_entropy.total_rows", "cross_entropy.find_bad_label_rows"}
ROUNDED = re.compile(r"^\s*(?:@!?%p\d+ )?((?:add|sub|mul|fma|mad|div|sqrt|rcp)\.[\w.]*f(?:16|32|64)[\w.]*)", re.M)
APPROXIMATE = re.compile(r"\b(?:ex2|lg2|sin|cos|tanh|rcp|rsqrt|sqrt|div)\.(?:approx|full)[\w.]*")
"""The library asks for no approximate instruction yet. A kernel that does must be listed here, with its reason."""
REGISTERS_OF_A_THREAD = 65536 // MAX_THREADS  # one block must fit an SM


def _cases():
    """Every kernel and dtype once; the PTX architectures take turns, so that pairs are covered."""
    for number, (kernel, dtype) in enumerate(sorted(kernels())):
        for k, arch in enumerate(PTX_ARCHITECTURES):
            default = arch == "sm_90" or (number + k) % len(PTX_ARCHITECTURES) == 0
            marks = () if default else pytest.mark.codegen_full
            yield pytest.param(kernel, dtype, arch, marks=marks, id=f"{kernel}-{dtype}-{arch}")


@pytest.mark.parametrize(("kernel", "dtype", "arch"), _cases())
def test_ptx(kernel, dtype, arch):
    signature = kernels()[kernel, dtype]
    ptx = compile.image(kernel, signature, arch).ptx
    assert f".target {arch}" in ptx
    assert f".maxntid {MAX_THREADS}" in ptx
    assert compile.entry_of(ptx) in ptx
    unrounded = [op for op in ROUNDED.findall(ptx) if not re.search(r"\.r[nzmp]", op)]
    assert not unrounded, f"rounding is left to the compiler: {set(unrounded)}"
    assert not APPROXIMATE.findall(ptx)
    assert ".ftz" not in ptx
    if dtype != "float64":
        assert ".f64" not in ptx, "double precision in a float32 kernel"
    assert ".local" not in ptx, "an array of a thread is not in registers"
    assert not _narrow_products_in_addresses(ptx)
    if kernel not in SMALL:
        wide = "ld.global.v2.f64" if dtype == "float64" else "ld.global.v4"
        assert wide in ptx
        if kernel != "logsumexp.logsumexp_rows":
            assert wide.replace("ld", "st") in ptx


@pytest.mark.parametrize(("kernel", "dtype", "arch"), _cases())
def test_links_without_spills(kernel, dtype, arch):
    image = compile.image(kernel, kernels()[kernel, dtype], arch)
    for target in LINKED[arch]:
        cubin, report = compile.link(image.ptx, target)
        assert cubin[:4] == b"\x7fELF"
        assert re.search(r"0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", report), report
        registers = int(re.search(r"Used (\d+) registers", report)[1])
        assert registers <= REGISTERS_OF_A_THREAD, f"{registers} registers: no block of {MAX_THREADS} fits"
        shared = re.search(r"(\d+) bytes smem", report)
        assert shared is None or int(shared[1]) <= 48 * 1024


def _narrow_products_in_addresses(ptx: str) -> list[str]:
    """Instructions that widen a 32-bit product: beyond 2^31 elements such an offset wraps."""
    narrow = set(re.findall(r"(?:mul\.lo|mad\.lo)\.[su]32\s+(%r\d+)", ptx))
    widened = re.findall(r"(cvt\.[su]64\.[su]32\s+%rd\d+, (%r\d+);)", ptx)
    return [text for text, register in widened if register in narrow]


def _disassembler() -> Path:
    found = sorted(Path(sysconfig.get_paths()["purelib"]).glob("nvidia/**/bin/nvdisasm"))
    assert found, "nvidia-cuda-nvdisasm is not installed"
    return found[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", ["softmax.softmax_rows", "cross_entropy.cross_entropy_rows"])
def test_machine_code_moves_sixteen_bytes(kernel, dtype, tmp_path):
    cubin, _ = compile.link(compile.image(kernel, kernels()[kernel, dtype], "sm_90").ptx, "sm_90")
    file = tmp_path / "kernel.cubin"
    file.write_bytes(cubin)
    tool = _disassembler()
    sass = subprocess.run([tool, "-c", file], capture_output=True, text=True, check=True, env=os.environ).stdout
    assert "LDG.E.128" in sass
    assert "STG.E.128" in sass
    assert not re.search(r"\b(LDL|STL)\b", sass), "local memory"
