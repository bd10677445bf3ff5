"""What `explain` says is what is launched: the same plans, the traffic that is counted, the assembler's registers."""

import json
import re

import numpy as np
import pytest

import gpusoftmax
from gpusoftmax import _dry_run, cli
from gpusoftmax.kernels.cuda import compile
from gpusoftmax.kernels.cuda.plan import OF_A_BATCH
from tests import codegen, inputs
from tests.calls import CALLS, arguments
from tests.emulator import emulated_gpu

F32 = np.dtype(np.float32)


@pytest.mark.parametrize(
    "name, shape, arch",
    [
        *((name, (3, 4099), "sm_90") for name in CALLS),
        ("softmax", (2, 200_000), "sm_90"),
        ("softmax", (2, 200_000), "sm_80"),  # is read twice, but for what stays in shared memory
        ("softmax", (5, 40), "sm_90"),
    ],
)
def test_explained_is_what_an_emulated_device_does(name, shape, arch, monkeypatch):
    monkeypatch.setattr(compile, "resources", lambda image: (64, 0))  # half a second each; asked for below
    explained = gpusoftmax.explain(name, shape, dtype="float32", arch=arch)
    multiprocessors = _dry_run.DEVICES[arch].multiprocessors
    with emulated_gpu(arch, multiprocessors=multiprocessors) as gpu:
        host = arguments(name, shape, F32)
        if "target" in host:
            host["target"] = np.arange(shape[0])  # rows that are ignored are not read
        given = {key: gpu.array(array) for key, array in host.items()}
        call = (
            getattr(gpusoftmax, name)
            if name.startswith(("cross_entropy", "kl_div", "token_logprobs"))
            else CALLS[name].function
        )
        call(*given.values())
        plans = [(stats.plan.regime, stats.plan.blocks, stats.plan.threads, stats.plan.cluster) for stats in gpu.stats]
        rows_launch = next(k for k, stats in enumerate(gpu.stats) if stats.plan.regime not in OF_A_BATCH)
        rows = [array for array in given.values() if array.shape == shape]
        read = sum(4 * int(gpu.reads(array, rows_launch).sum()) for array in rows)
    found = [(kernel["regime"], kernel["grid"], kernel["block"], kernel["cluster"]) for kernel in explained["kernels"]]
    assert found == plans
    label = 8 if CALLS[name].others else 0  # every thread asks for it, the first from global memory
    assert (explained["row"]["read"] - label) * shape[0] == pytest.approx(read, rel=0.01)
    assert explained["row"]["once"] == (read <= 1.01 * sum(4 * array.size for array in rows))


@pytest.mark.parametrize("shape, n_rows", [((1 << 40, 8), 1 << 40), ((4, (1 << 31) - 1), 4)])
def test_arrays_that_no_device_holds(shape, n_rows):
    """Imagined arrays are apart, however large they are."""
    explained = gpusoftmax.explain("softmax", shape, dtype="float32", arch="sm_90")
    row = explained["row"]["read"] + explained["row"]["written"]
    assert explained["expected_seconds"] * explained["device"]["bytes_per_second"] == pytest.approx(n_rows * row)


def test_more_columns_than_there_are_labels():
    with pytest.raises(ValueError, match="the reduced axis has 2147483648 elements, expected at most 2147483647"):
        gpusoftmax.explain("softmax", (8, 1 << 31), arch="sm_90")


def test_registers_and_shared_memory_are_the_assemblers():
    (kernel,) = gpusoftmax.explain("logsumexp", (8, 1024), dtype="float32", arch="sm_90")["kernels"]
    (launch,) = _dry_run.launches("logsumexp", (8, 1024), "float32", "sm_90")
    linked = codegen.link_ptx(launch.image.ptx, "sm_90")
    assert kernel["registers"] == linked.registers
    assert kernel["shared_bytes"] == linked.shared_bytes + launch.plan.shared_bytes
    by_registers = 65536 // (-(-kernel["registers"] * 32 // 256) * 256) // (kernel["block"] // 32)
    assert 1 <= kernel["blocks_per_multiprocessor"] <= by_registers


def test_time_follows_from_bytes_and_bandwidth():
    explained = gpusoftmax.explain("softmax", (1000, 4096), dtype=np.float16, arch="sm_90")
    assert explained["row"]["read"] == explained["row"]["written"] == 8192
    assert explained["expected_seconds"] == pytest.approx(2 * 8192 * 1000 / 4.3e12)
    assert explained["device"]["name"] == "H200" and explained["device"]["multiprocessors"] == 132


def test_a_device_of_this_machine_is_the_default(monkeypatch):
    monkeypatch.setattr(_dry_run, "archs_here", lambda: ["sm_80", "sm_90"])
    assert gpusoftmax.explain("logsumexp", (8, 64))["arch"] == "sm_80"
    monkeypatch.setattr(_dry_run, "archs_here", list)
    assert gpusoftmax.explain("logsumexp", (8, 64))["arch"] == "sm_90"


def test_nothing_is_left_imagined():
    gpusoftmax.explain("softmax", (2, 40), arch="sm_90")
    with emulated_gpu("sm_80", track=False) as gpu:
        gpusoftmax.softmax(gpu.array(inputs.make("spread", (2, 40), F32)))
        assert len(gpu.stats) == 1


# ---------------------------------------------------------------- the command


def test_the_command(capsys):
    arguments = ["explain", "cross_entropy_with_grad", "--shape", "64x32000", "--dtype", "float32", "--arch", "sm_90"]
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    assert "cross_entropy_with_grad 64x32000 float32 on sm_90 (H200, 132 multiprocessors, 4300 GB/s measured" in text
    assert re.search(r"cross_entropy\.cross_entropy_rows +\w+ +\d+ +\d+ +\d+ +\d+ +\d+ +\d+\n", text)
    assert "a row    128 kB read, each logit once, 128 kB written" in text and "us for that traffic" in text
    assert cli.main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == gpusoftmax.explain(
        "cross_entropy_with_grad", (64, 32000), dtype="float32", arch="sm_90"
    )


def test_few_rows_leave_multiprocessors_idle(capsys):
    assert cli.main(["explain", "softmax", "--shape", "1x8192", "--arch", "sm_80"]) == 0
    assert re.search(r"and longer: \d+ of 108 multiprocessors have work", capsys.readouterr().out)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["softmx", "--shape", "1x2"], "invalid choice: 'softmx'"),
        (["softmax"], "required: --shape"),
        (["softmax", "--shape", "3xx"], "'3xx' is not a shape such as 4096x50257"),
        (["softmax", "--shape", "0x4"], "'0x4' is not a shape"),
        (["softmax", "--shape", "4x4", "--arch", "sm_70"], "invalid choice: 'sm_70'"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    assert cli.main(["explain", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        (("softmx", (1, 2)), {}, ValueError, "op is 'softmx', expected one of softmax,"),
        (("softmax", ()), {}, ValueError, r"shape is \(\), expected at least one size"),
        (("softmax", (2, 0)), {}, ValueError, r"shape is \(2, 0\), expected at least one size"),
        (("softmax", 3), {}, TypeError, "shape is 3, expected a tuple of ints"),
        (("softmax", (2, 3)), {"dtype": "int8"}, TypeError, "dtype is 'int8'"),
        (("softmax", (2, 3)), {"arch": "sm_70"}, ValueError, "arch is 'sm_70'"),
    ],
)
def test_bad_names(arguments, options, error, message):
    with pytest.raises(error, match=message):
        gpusoftmax.explain(*arguments, **options)
