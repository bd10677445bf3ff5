"""What `explain` says is what is launched: the same plans, the traffic that is counted, the assembler's registers."""

import json
import math
import re
from importlib import metadata
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest

import gpusoftmax
from gpusoftmax import _dry_run, _imagined, cli
from gpusoftmax.kernels.cuda import compile, driver
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


def test_more_numbers_of_rows_than_any_row_has_columns():
    """They are copied into another format in parts, as columns of one row."""
    explained = gpusoftmax.explain("softmax", (3 << 30, 8), dtype="bfloat16", temperature="float16", arch="sm_90")
    assert [kernel["kernel"] for kernel in explained["kernels"]] == [*3 * ["copy.copy_rows"], "softmax.softmax_rows"]


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


# ---------------------------------------------------------------- options of the call


@pytest.fixture
def without_the_assembler(monkeypatch):
    monkeypatch.setattr(compile, "resources", lambda image: (64, 0))


def test_options_decide_the_kernel():
    """The one that the call with these arrays launches."""
    options = {"temperature": "float32", "bias": "float16", "softcap": 30.0, "mask": "int32", "n_valid": "int64"}
    (launch,) = _dry_run.launches("log_softmax", (5, 41), "float16", "sm_90", **options)
    fields = "| none | strided float32 | strided float16 | float32 | strided bits | labels | none"
    assert f"strided float16 {fields}" in launch.image.signature
    loaded = []
    load = mock.patch.object(driver, "load", lambda image, device, stream: loaded.append(image))
    with emulated_gpu("sm_90", track=False) as gpu, load, mock.patch.object(driver, "launch"):
        made = {"temperature": (5,), "bias": (41,), "mask": (5, 2), "n_valid": (5,)}
        arrays = {name: gpu.array(np.ones(shape, options[name])) for name, shape in made.items()}
        gpusoftmax.log_softmax(gpu.array(np.ones((5, 41), np.float16)), **{**options, **arrays})
    assert set(loaded) == {launch.image}


def test_a_dtype_is_the_usual_array():
    of_rows = {"temperature": (6,), "n_valid": (6,), "row_weight": (6,), "lse": (6,)}
    for name, shape in {**of_rows, "bias": (70,), "weight": (70,)}.items():
        op = "cross_entropy_backward"
        given, _ = imagined(op, (2, 3, 70), "float32", {name: "int32" if name == "n_valid" else "float32"})
        assert math.prod(given[name].shape) == math.prod(shape), name
    for name, dtype, shape in (("mask", "bool", (5, 70)), ("mask", "int32", (5, 3)), ("target", "uint8", (5,))):
        given, _ = imagined("cross_entropy", (5, 70), "bfloat16", {name: dtype})
        assert given[name].shape == shape and given[name].dtype == dtype
    given, _ = imagined("cross_entropy", (70, 5), "bfloat16", {"axis": 0, "mask": "int32", "target": "bfloat16"})
    assert given["mask"].shape == (3, 5) and given["target"].shape == (70, 5)


def imagined(op, shape, dtype, options):
    with _dry_run.imagined("sm_90"):
        return _imagined.call(op, shape, dtype, options)


def test_arrays_stand_for_those_of_the_device(without_the_assembler):
    """By shape and dtype; theirs may be of any library, or of none."""
    mask = np.broadcast_to(np.True_, (64, 1000))
    for given in (mask, SimpleNamespace(shape=mask.shape, dtype="bool"), "bool", bool):
        explained = gpusoftmax.explain("softmax", (64, 1000), mask=given, arch="sm_90")
        assert explained["options"] == {"mask": "bool 64x1000"}
        assert explained["row"]["read"] == 5000 and explained["shared"] == 0
    of_all = gpusoftmax.explain("softmax", (64, 1000), mask=mask[0], arch="sm_90")
    assert of_all["row"]["read"] == 4000 and of_all["shared"] == 1000
    moved = 64 * 8000 + 1000
    assert of_all["expected_seconds"] == pytest.approx(moved / of_all["device"]["bytes_per_second"])


def test_what_else_a_call_reads_and_writes(without_the_assembler):
    def of(op, **options):
        return gpusoftmax.explain(op, (64, 1000), arch="sm_90", **options)

    assert of("top_logprobs", k=20)["row"]["written"] == 20 * (4 + 8)
    assert of("softmax", out="float64")["row"] == {"read": 4000, "written": 8000, "once": True}
    assert of("softmax", n_valid=10)["row"] == {"read": 40, "written": 4000, "once": True}
    assert of("softmax", n_valid="int32")["row"] == {"read": 4004, "written": 4000, "once": True}
    several = np.empty((64, 3), np.int16)
    told = of("token_logprobs", target=several, return_lse=True, return_argmax=True)
    assert told["row"] == {"read": 4006, "written": 3 * 4 + 4 + 8, "once": True}
    ranked = of("token_logprobs", target=several, return_rank=True)  # one launch for each
    assert ranked["row"] == {"read": 3 * 4000 + 6, "written": 3 * (4 + 8), "once": False}
    shared_rows = gpusoftmax.explain("softmax", (3, 4, 5, 64), arch="sm_90", mask=np.ones((1, 4, 1, 64), bool))
    assert len(shared_rows["kernels"]) == 3, "two batch axes go to a kernel"
    assert shared_rows["row"] == {"read": 256, "written": 256, "once": True} and shared_rows["shared"] == 256
    along = of("logsumexp", axis=0)
    assert along["n_rows"] == 1000 and along["row"] == {"read": 256, "written": 4, "once": True}
    copied = of("log_softmax_backward", temperature="float64")  # the temperatures become float32 first
    assert copied["row"] == {"read": 8000 + 8 + 4, "written": 4000 + 4, "once": True}


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


def test_the_command_takes_options(capsys):
    command = ["explain", "softmax", "--shape", "64x1000", "--arch", "sm_90", "--with"]
    assert cli.main([*command, "mask=int32", "bias=bool:1000"]) == 2
    assert "bias has dtype" in capsys.readouterr().err
    options = ["softcap=30", "mask=bool:1000", "temperature=float32", "empty_row=zero"]
    assert cli.main([*command, *options]) == 0
    text = capsys.readouterr().out
    assert "\n  softcap 30\n  mask bool 1000\n  temperature float32 64\n  empty_row zero\n" in text
    assert "a row    4.004 kB read, each logit once, 4 kB written\ntogether 1 kB read, once for all rows\n" in text
    assert "in all   257.3 kB read, 256 kB written" in text


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
        (["softmax", "--shape", "4x4", "--with", "mask"], "'mask' is not NAME=VALUE"),
        (["softmax", "--shape", "4x4", "--with", "dtype=float16"], "the result's is out=float16"),
        (["softmax", "--shape", "4x4", "--with", "mask=bits"], "mask is 'bits', expected what the call is given"),
        (["softmax", "--shape", "4x4", "--with", "mask=bits:4"], "mask is 'bits', expected what the call is given"),
        (["softmax", "--shape", "4x4", "--with", "mask=bool:x"], "'x' is not a shape"),
        (["softmax", "--shape", "4x4", "--with", "maskk=bool"], "softmax has no option maskk, expected some of"),
        (["sample", "--shape", "4x4", "--with", "top_p=1.5"], "top_p is 1.5, expected a number above 0, at most 1"),
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


@pytest.mark.parametrize("missing", ["numba-cuda", "cuda-core"])
@pytest.mark.parametrize(
    "arguments", [["explain", "softmax", "--shape", "4x5"], ["compile", "--arch", "sm_90", "--ops", "softmax"]]
)
def test_what_kernels_take_is_named_where_it_is_missing(missing, arguments, monkeypatch, capsys):
    """After pip install gpusoftmax, without an extra."""
    version = metadata.version

    def version_of(name):
        if name == missing:
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", version_of)
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err == (
        f"gpusoftmax {arguments[0]}: kernels for a GPU take {missing}, which is not installed: pip install "
        "'gpusoftmax[cu13]', or [cu12] for a CUDA 12 driver\n"
    )
    with pytest.raises(RuntimeError, match=f"take {missing}"):  # and by a call on a GPU
        driver.device.__wrapped__(0)
