"""Kernels compiled ahead of time, and the directory of such kernels that is only read."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import gpusoftmax
from gpusoftmax import _dry_run, _info, cli
from gpusoftmax.kernels import cache_directory
from gpusoftmax.kernels.cuda import cache, compile
from tests import codegen
from tests.test_arrays import WARM_CALL

CALL = re.sub(r"gpusoftmax.cross_entropy_with_grad.*\n", "", WARM_CALL).replace(">= 2", ">= 1")
CALL = CALL.replace("gpusoftmax.softmax(", "gpusoftmax.argmax(")
"""argmax of float32 on sm_90, with a driver that does nothing; prints whether Numba was imported. Of all ops this one
compiles in the shortest time."""


def python(program, **environment):
    completed = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert completed.returncode == 0, completed.stderr
    return completed.stdout, completed.stderr


def test_the_list_is_that_of_the_codegen_contract():
    listed = {(image.kernel, image.signature) for image in _dry_run.images("sm_90", None, None)}
    assert listed == {(one.kernel, one.signature) for one in codegen.specialisations()}


def test_an_op_has_the_kernels_of_many_rows():
    """More than one block adds up: by itself, without ops that need the same kernel for something else."""
    for op in ("cross_entropy", "kl_div", "kl_div_with_grad"):
        used = {launch.image for launch in _dry_run.launches(op, (10_000, 64), "float32", "sm_90")}
        assert used <= set(_dry_run.images("sm_90", [op], ["float32"])), op


@pytest.mark.parametrize("op", _dry_run.OPS)
def test_an_op_has_a_bounded_number_of_kernels(op):
    """Dtypes and a few regimes multiply, and nothing else: a Dockerfile step that takes an hour is one nobody takes."""
    assert 4 <= len(_dry_run.images("sm_90", [op], None)) <= 64


def test_every_public_operation_is_known():
    operations = {name for name in gpusoftmax.__all__ if name.islower()} - {"compile", "explain"}
    # These take the kernels of cross_entropy.
    assert set(_dry_run.OPS) == operations - {"linear_cross_entropy", "linear_cross_entropy_with_grad"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A directory into which the command has compiled argmax of float32 for sm_90."""
    directory = tmp_path_factory.mktemp("prepared") / "cache"
    command = [sys.executable, "-m", "gpusoftmax", "compile"]
    command += ["--arch", "sm_90", "--ops", "argmax", "--dtypes", "float32"]
    environment = {**os.environ, "GPUSOFTMAX_CACHE_DIR": str(directory)}
    completed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    assert re.fullmatch(r"\d+ kernels for sm_90 are in the cache\n", completed.stdout)
    return directory


def files(directory):
    return {path: path.read_bytes() for path in Path(directory).rglob("*") if path.is_file()}


def test_nothing_is_compiled_after_that(prepared, tmp_path):
    before = files(prepared)
    assert before
    assert python(CALL, GPUSOFTMAX_CACHE_DIR=str(prepared)) == ("False\n", "")
    assert python(CALL, GPUSOFTMAX_CACHE_DIR=str(tmp_path), GPUSOFTMAX_CACHE_PATH=str(prepared)) == ("False\n", "")
    assert files(prepared) == before and not files(tmp_path)


def test_what_is_not_prepared_goes_to_the_users_own_cache(prepared, tmp_path):
    before = files(prepared)
    other = CALL.replace('"f4"', '"f2"')
    assert python(other, GPUSOFTMAX_CACHE_DIR=str(tmp_path), GPUSOFTMAX_CACHE_PATH=str(prepared)) == ("True\n", "")
    assert python(other, GPUSOFTMAX_CACHE_DIR=str(tmp_path), GPUSOFTMAX_CACHE_PATH=str(prepared)) == ("False\n", "")
    assert files(prepared) == before and files(tmp_path)


# ---------------------------------------------------------------- kernels of calls with options

EVERYTHING = {"temperature": "float32", "bias": "bfloat16", "softcap": 30.0, "mask": "int32", "n_valid": "int64"}
WITH_OPTIONS = {
    **dict.fromkeys(("softmax", "log_softmax", "logsumexp", "argmax", "soft_argmax", "topk_softmax"), EVERYTHING),
    "softmax_backward": {"temperature": "float32"},
    "cross_entropy": {**EVERYTHING, "weight": "float32", "z_loss": 0.1, "return_correct": True},
    "cross_entropy_with_grad": {"target": ("int64", "float32"), "row_weight": "float32", "softcap": 30.0},
    "cross_entropy_backward": {"target": "bfloat16", "weight": "bfloat16"},
    "token_logprobs": {**EVERYTHING, "return_entropy": True},
    "token_logprobs_backward": {**EVERYTHING, "dentropy": "float32"},
    "top_logprobs": {"mask": "bool", "k": 20},
    "sample": {**EVERYTHING, "top_p": 0.9},
    "top_p_mask_logits": {"mask": "bool", "n_valid": 1, "top_p": "float32"},
    "spatial_softmax": {"mask": "bool", "temperature": "float32"},
    "kl_div": {"row_weight": "float32"},
}


def launched(op, shape, **options):
    return {launch.image for launch in _dry_run.launches(op, shape, "bfloat16", "sm_90", **options)}


@pytest.mark.parametrize("op", WITH_OPTIONS)
def test_exactly_the_kernels_of_such_calls_are_compiled(op):
    """Of few rows and many, short and long ones, along either axis."""
    options = WITH_OPTIONS[op]
    maps = [{"shape": (4, 3, 30, n_cols)} for n_cols in (10, 100)]
    rows = [{"shape": (n_rows, n_cols), "axis": -1} for n_rows in (3, 10_000) for n_cols in (40, 9001)]
    rows += [{"shape": (n_cols, 700), "axis": 0} for n_cols in (33, 3000)]
    calls = maps if op == "spatial_softmax" else rows
    used = set.union(*(launched(op, **call, **options) for call in calls))
    assert set(_dry_run.images("sm_90", [op], ["bfloat16"], **options)) == used


def test_arrays_stand_for_their_dtypes():
    rows, columns = 0.5 + np.zeros(3, np.float32), np.zeros(7, np.float32)
    given = {"temperature": rows, "bias": columns, "mask": np.zeros((3, 1), np.int32), "softcap": 30}
    named = {"temperature": "float32", "bias": np.float32, "mask": np.dtype("int32"), "softcap": 30}
    one, other = (_dry_run.images("sm_90", ["softmax"], ["float32"], **options) for options in (given, named))
    assert one == other and all("strided bits" in " ".join(image.signature) for image in one)


MASKED_CALL = CALL.replace('argmax(Array((3, 40), "f4")', 'argmax(Array((3, 40), "f4"), mask=Array((3, 2), "i4")')


def test_a_call_with_options_finds_its_kernels(tmp_path, capsys):
    """The command, into an empty directory: nothing is compiled after that, nor imported to compile it."""
    assert MASKED_CALL != CALL
    command = ["compile", "--arch", "sm_90", "--ops", "argmax", "--dtypes", "float32", "--with", "mask=int32"]
    python(
        f"from gpusoftmax import cli; assert cli.main({command}) == 0",
        GPUSOFTMAX_CACHE_DIR=str(tmp_path),
    )
    before = files(tmp_path)
    assert before
    assert python(MASKED_CALL, GPUSOFTMAX_CACHE_DIR=str(tmp_path)) == ("False\n", "")
    assert files(tmp_path) == before


@pytest.fixture
def copied(prepared, tmp_path):
    directory = tmp_path / "copied"
    subprocess.run(["cp", "-r", prepared, directory], check=True)
    return directory


@pytest.fixture
def find(tmp_path, monkeypatch):
    """A function of a path: what a call finds there that looks for an argmax. Its own directory is empty."""
    monkeypatch.setenv("GPUSOFTMAX_CACHE_DIR", str(tmp_path / "own"))
    monkeypatch.setattr(cache_directory, "_warned", set())
    images = _dry_run.images("sm_90", ["argmax"], ["float32"])

    def find(path):
        monkeypatch.setenv("GPUSOFTMAX_CACHE_PATH", str(path))
        return [cache.get(cache.key(one.kernel, one.signature, "sm_90", "cubin")) for one in images]

    return find


def test_a_damaged_entry_is_not_used_and_not_touched(copied, find):
    assert all(find(copied))
    for path in files(copied):
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    before = files(copied)
    with pytest.warns(RuntimeWarning, match="found a damaged entry in its kernel cache"):
        assert not any(find(copied))
    assert files(copied) == before


@pytest.mark.skipif(os.name != "posix", reason="owners and modes are POSIX's")
@pytest.mark.parametrize("reason", ["can be written by other users", "is a symbolic link", "cannot be opened"])
def test_a_directory_that_is_not_to_be_trusted(copied, find, tmp_path, reason):
    assert all(find(copied))
    path = copied
    if reason == "can be written by other users":
        (copied / "cuda").chmod(0o777)
    elif reason == "is a symbolic link":
        path = tmp_path / "link"
        path.symlink_to(copied)
    else:
        path = tmp_path / "missing"
    with pytest.warns(RuntimeWarning, match=f"does not use the kernels of GPUSOFTMAX_CACHE_PATH.* {reason}"):
        assert not any(find(path))
    assert not path.exists() or path == copied or path.is_symlink(), "nothing is created"


@pytest.mark.skipif(os.name != "posix", reason="owners and modes are POSIX's")
def test_a_directory_of_root_for_other_users(copied, find, monkeypatch):
    """It is made 0700; what lets others read it is said."""
    access = os.access

    def of_another_user(path, mode):
        return access(path, mode) and (copied not in (path, *path.parents) or path.stat().st_mode & 0o5 == 0o5)

    monkeypatch.setattr(os, "access", of_another_user)
    with pytest.warns(RuntimeWarning, match=r"copied cannot be read by this user \(chmod -R a\+rX lets all users\)"):
        assert not any(find(copied))
    subprocess.run(["chmod", "-R", "a+rX", copied], check=True)
    assert all(find(copied))


# ---------------------------------------------------------------- the linker


@pytest.mark.parametrize(("version", "no_cache"), [((12, 4), None), ((12, 5), True), ((13, 0), True)])
def test_an_old_linker_is_given_no_option_that_it_does_not_know(monkeypatch, version, no_cache):
    """12.3 and 12.4, which numba-cuda takes for CUDA 12 too, refuse -no-cache, and so every kernel."""
    given = linker_of_version(monkeypatch, version)
    assert compile.link(".version 8.4", "sm_90") == (b"cubin", "")
    assert [options.no_cache for options in given] == [no_cache]


def test_an_old_linker_is_given_no_kernel_on_which_it_crashes(monkeypatch):
    """12.4 to 12.6 do on a chain of max.bf16x2 for sm_90, which ptxas makes one instruction with three operands."""
    ptx = "max.bf16x2 %r1, %r2, %r3;"
    given = linker_of_version(monkeypatch, (12, 6))
    with pytest.raises(RuntimeError, match="nvJitLink 12.6 cannot link kernels of bfloat16 for sm_90, expected 12.8"):
        compile.link(ptx, "sm_90")
    assert not given
    for version, arch in (((12, 6), "sm_80"), ((12, 8), "sm_90")):
        linker_of_version(monkeypatch, version)
        assert compile.link(ptx, arch) == (b"cubin", "")


def linker_of_version(monkeypatch, version):
    """Puts a linker in the place of nvJitLink; the options that it is given."""
    from cuda import core
    from cuda.bindings import nvjitlink

    given = []

    def linker(*objects, options):
        given.append(options)
        return SimpleNamespace(link=lambda kind: SimpleNamespace(code=b"cubin"), get_info_log=lambda: "")

    monkeypatch.setattr(nvjitlink, "version", lambda: version)
    monkeypatch.setattr(core, "Linker", linker)
    return given


# ---------------------------------------------------------------- arguments


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(_info, "gather", lambda for_path_only: {"driver": {"devices": []}})


def test_without_a_gpu_an_architecture_must_be_named(no_gpu, capsys):
    with pytest.raises(ValueError, match="there is no GPU here .* pass arch"):
        gpusoftmax.compile()
    assert cli.main(["compile"]) == 2
    assert capsys.readouterr().err.startswith("gpusoftmax compile: there is no GPU here")


@pytest.mark.parametrize("capability, arch", [((9, 0), "sm_90"), ((8, 7), "sm_86"), ((12, 1), "sm_120")])
def test_the_architectures_of_this_machine(monkeypatch, capability, arch):
    devices = [{"compute_capability": list(capability)}] * 2 + [{"compute_capability": [6, 1]}]
    monkeypatch.setattr(_info, "gather", lambda for_path_only: {"driver": {"devices": devices}})
    assert _dry_run.archs_here() == [arch]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"arch": "sm_70"}, "arch is 'sm_70', expected one of sm_75,"),
        ({"arch": "sm_90", "ops": ["softmx"]}, "op is 'softmx', expected one of softmax,"),
    ],
)
def test_unknown_names(arguments, message):
    with pytest.raises(ValueError, match=message):
        gpusoftmax.compile(**arguments)


def test_without_a_cache_directory(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("GPUSOFTMAX_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="is not a directory"), pytest.raises(RuntimeError, match="no directory"):
        gpusoftmax.compile("sm_90", ["logsumexp"], ["float32"])


def test_info_shows_the_prepared_directory(prepared, monkeypatch, capsys):
    monkeypatch.setenv("GPUSOFTMAX_CACHE_PATH", str(prepared))
    assert cli.main(["info"]) == 0
    assert re.search(rf"cuda, read only +{prepared}/cuda: \d+ files", capsys.readouterr().out)
    monkeypatch.setenv("GPUSOFTMAX_CACHE_PATH", str(prepared / "missing"))
    monkeypatch.setattr("gpusoftmax.kernels.cache_directory._warned", set())
    assert cli.main(["info"]) == 0
    assert "because" in (text := capsys.readouterr().out) and "cannot be opened" in text
