"""Every kernel keeps the codegen contract (tests/codegen.py): what it compiles to, and what that is linked to.

By default each kernel is compiled and linked in float32 for sm_90 and, by turns, in bfloat16 for sm_90 or in float16 or
float64 for sm_75 or sm_80. The dtypes of a kernel get short rows, long ones and rows side by side in turn,
and the next kernel begins with another of these. Under the marker codegen_full each kernel goes through in each dtype,
mixed dtypes too, with all three, for each of the seven architectures that a PTX is linked for.
"""

import itertools

import pytest

import gpusoftmax
from gpusoftmax.kernels.cuda import compile
from tests import codegen, inputs

SPECIALISATIONS = codegen.specialisations()
DTYPES = [dtype.name for dtype in inputs.DTYPES]


def _one_of_each_dtype(name, number):
    """Specialisations of a kernel: its ways to split rows in turn, which of them first is up to `number`."""
    chosen, own = {}, [one for one in SPECIALISATIONS if one.kernel == name]
    splits = list(dict.fromkeys(one.split for one in own))
    for one in own:
        if one.split == splits[(number + DTYPES.index(one.dtype)) % len(splits)]:
            chosen[one.dtype] = one
    return list(chosen.values())


def covering():
    """(specialisation, architecture to link for): float32 for sm_90, which tests on the emulator compile too, and
    another dtype: bfloat16 for sm_90, of every other kernel one for an older architecture. Which of these, changes from
    kernel to kernel.
    """
    names = list(dict.fromkeys(one.kernel for one in SPECIALISATIONS))
    for number, name in enumerate(names):
        own = _one_of_each_dtype(name, number)
        turn, skipped = divmod(number, 2)
        # Where float32 gets rows side by side, bfloat16 is there to move sixteen bytes at a time.
        has_both = skipped or any(one.dtype == "float32" and one.split == "columns" for one in own)
        usual = [one for one in own if one.dtype == "float32" or (has_both and one.dtype == "bfloat16")] or own
        yield from ((one, "sm_90") for one in usual)
        if not skipped:
            others = [one for one in own if one.dtype not in ("float32", "bfloat16")] or own
            yield others[turn // 2 % len(others)], ("sm_75", "sm_80")[turn % 2]


LINKS = list(covering())
PTX = list(dict.fromkeys((one, compile.ptx_architecture(arch)) for one, arch in LINKS))
every_ptx = pytest.mark.parametrize("kernel, arch", PTX, ids=lambda part: str(part))
every_link = pytest.mark.parametrize("kernel, arch", LINKS, ids=lambda part: str(part))
# Disassembling takes half a second: of each kernel the first of these that moves sixteen bytes at a time.
DISASSEMBLED = {
    one.kernel: one for one, arch in reversed(LINKS) if arch == "sm_90" and one.reads_rows and one.split != "columns"
}


# ---- the list is complete


def test_every_kernel_is_listed():
    assert {one.kernel for one in SPECIALISATIONS} == codegen.kernels_on_disk()


def test_every_public_function_is_called():
    operations = {name for name in gpusoftmax.__all__ if name.islower()} - {"compile", "explain"}
    operations -= {"linear_cross_entropy", "linear_cross_entropy_with_grad"}  # the kernels of cross_entropy
    assert codegen.public_functions() == operations


def test_the_default_run_covers_every_dtype_and_architecture():
    """Each kernel in float32, and in bfloat16 or for an older architecture; there every other dtype and every split."""
    rows = [(one, arch) for one, arch in LINKS if one.reads_rows]
    kernels = {one.kernel for one, _ in rows}
    assert {one.kernel for one, arch in rows if (one.dtype, arch) == ("float32", "sm_90")} == kernels
    assert {one.kernel for one, arch in rows if one.dtype == "bfloat16" or arch != "sm_90"} == kernels
    assert {one.split for one, _ in rows if one.dtype == "bfloat16"} == {"short", "long", "columns"}
    assert DISASSEMBLED.keys() == kernels
    older = [(one, arch) for one, arch in LINKS if arch != "sm_90"]
    assert 2 * len({one.kernel for one, _ in older}) >= len({one.kernel for one in SPECIALISATIONS})
    every_pair = set(itertools.product(("float16", "float64"), ("sm_75", "sm_80")))
    assert {(one.dtype, arch) for one, arch in older} >= every_pair
    assert {one.split for one, _ in older} >= {"short", "long", "columns"}


# ---- PTX


@every_ptx
def test_target_entry_and_launch_bound(kernel, arch):
    codegen.check_header(codegen.ptx_of(kernel, arch), arch, *compile.launch_bounds(kernel.signature, arch))


@every_ptx
def test_threads_keep_everything_in_registers(kernel, arch):
    codegen.check_memory(codegen.ptx_of(kernel, arch))


@every_ptx
def test_rows_move_16_bytes_at_a_time(kernel, arch):
    """Those that lie side by side move an element at a time: a thread's neighbours have the neighbouring ones."""
    wide = kernel.split != "columns"
    codegen.check_vectors(codegen.ptx_of(kernel, arch), kernel.reads_rows and wide, kernel.writes_rows and wide)


@pytest.mark.parametrize("kernel, arch", [case for case in PTX if not case[0].is_double], ids=lambda part: str(part))
def test_no_float64_in_float32_kernels(kernel, arch):
    codegen.check_no_double(codegen.ptx_of(kernel, arch))


@every_ptx
def test_roundings_are_explicit(kernel, arch):
    codegen.check_rounding(codegen.ptx_of(kernel, arch))


@every_ptx
def test_nothing_but_the_exponential_is_approximate(kernel, arch):
    codegen.check_exact(codegen.ptx_of(kernel, arch))


@pytest.mark.parametrize("kernel, arch", [case for case in PTX if not case[0].split], ids=lambda part: str(part))
def test_global_addresses_are_computed_in_64_bits(kernel, arch):
    codegen.check_addresses(codegen.ptx_of(kernel, arch))


# ---- machine code


@every_link
def test_no_spills_and_room_for_a_block(kernel, arch, record_property):
    linked = codegen.link(kernel, arch)
    record_property("registers", linked.registers)
    entry = compile.entry_of(codegen.ptx_of(kernel, arch))
    bounds = compile.launch_bounds(kernel.signature, compile.ptx_architecture(arch))
    codegen.check_link(linked, entry, arch, *bounds)


@pytest.mark.parametrize("kernel", DISASSEMBLED.values(), ids=str)
def test_machine_code_moves_16_bytes_at_a_time(kernel):
    # No dataflow: which registers live when, a fifth of the time.
    code = codegen.sass(codegen.link(kernel, "sm_90").cubin, "--no-dataflow")
    assert ("LDGSTS.E.BYPASS.128" in code, "STG.E.128" in code) == (kernel.reads_rows, kernel.writes_rows)
    if kernel.split != "short":  # where a few numbers may be spilled
        assert "LDL" not in code and "STL" not in code, "local memory"


# ---- the whole matrix


def check_everything(kernel, arch, devices, may_spill=0):
    codegen.check_ptx(kernel, arch)
    for device in devices:
        entry, bounds = compile.entry_of(codegen.ptx_of(kernel, arch)), compile.launch_bounds(kernel.signature, arch)
        codegen.check_link(codegen.link(kernel, device), entry, device, *bounds, may_spill)


CROWDED_MAY_SPILL = 164
"""Bytes of a thread, before sm_90, where rows of sixteen bits lie side by side: blocks of 512 threads, which a sector
of such rows takes, leave it 128 registers. 2026-11-27, on sm_75, sm_80 and sm_86: cross_entropy 0, 112 and 0, smoothed
164, 156 and 44 (float16; bfloat16 0, 156 and 0), log_softmax 0, 8 and 0, logsumexp 0, 4 and 0.
"""


@pytest.mark.codegen_full
@pytest.mark.parametrize("arch", codegen.LINKED)
@pytest.mark.parametrize("kernel", SPECIALISATIONS + codegen.specialisations(mixed=True), ids=str)
def test_whole_matrix(kernel, arch):
    threads, _ = compile.launch_bounds(kernel.signature, arch)
    is_crowded = kernel.split == "columns" and threads == 512 and arch != "sm_90"
    check_everything(kernel, arch, codegen.LINKED[arch], CROWDED_MAY_SPILL if is_crowded else 0)


TEMPERED = codegen.tempered_specialisations()


@pytest.mark.parametrize("kernel", TEMPERED, ids=str)
def test_losses_at_a_temperature(kernel):
    check_everything(kernel, "sm_90", ["sm_90"])


TRANSFORMED = codegen.transformed_specialisations()
MAY_SPILL = 148
"""Bytes of a thread, with temperature, bias, softcap, mask and n_valid all at once: 128 registers are what two blocks
of 256 leave it. 2026-11-26, float32, on sm_90, sm_100 and sm_120: softmax 0, 0 and 52, log_softmax 72, 72 and 128,
logsumexp 64, 64 and 108, argmax 0, 0 and 148, soft_argmax 0, 0 and 40.
"""


def test_every_family_is_transformed():
    families = {one.kernel.partition(".")[0] for one in SPECIALISATIONS if one.reads_rows}
    families -= {"copy", "logsumexp_state", "kl_div"}  # take no transform
    assert {one.kernel.partition(".")[0] for one in TRANSFORMED} == families


def test_softmax_of_transformed_logits():
    """Every option at once, along long rows, for the architecture that all is tuned for: nothing is spilled."""
    (kernel,) = (one for one in TRANSFORMED if str(one) == "softmax_rows-long-float32")
    check_everything(kernel, "sm_90", ["sm_90"])


@pytest.mark.codegen_full
@pytest.mark.parametrize("arch", codegen.LINKED)
@pytest.mark.parametrize("kernel", TRANSFORMED, ids=str)
def test_transformed_logits(kernel, arch):
    check_everything(kernel, arch, codegen.LINKED[arch], MAY_SPILL)
