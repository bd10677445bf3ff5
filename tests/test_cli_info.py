"""gpusoftmax info: says what runs and what would help, whatever is missing or broken."""

import ctypes
import json
import os
import subprocess
import sys
import textwrap
import time
import tomllib
import zipfile
from pathlib import Path

import pytest

import gpusoftmax
from gpusoftmax import _info, _probe, cli
from gpusoftmax.kernels import cache_directory

H200 = {"ordinal": 0, "name": "NVIDIA H200", "compute_capability": [9, 0], "memory_bytes": 2**37}
V100 = {**H200, "name": "V100", "compute_capability": [7, 0]}
DRIVER = {"error": None, "loaded": True, "cuda": [13, 0], "release": "580.65.06", "devices": [H200]}
PACKAGES = {
    "numpy": "2.4.6",
    "numba": "0.68.1",
    "llvmlite": "0.50.0",
    "numba-cuda": "0.30.4",
    "cuda-core": "1.2.2",
    "cuda-bindings": "13.5.0",
    "cupy-cuda13x": "14.2.0",
}


def path(driver=None, packages=None, broken=None, without=()):
    """The decision for a machine that differs in this from one where the GPU works."""
    facts = {
        "driver": {**DRIVER, **(driver or {})},
        "packages": {name: v for name, v in {**PACKAGES, **(packages or {})}.items() if name not in without},
        "broken": broken or {},
    }
    return _info._path(facts)


def info(capsys, *arguments):
    assert cli.main(["info", *arguments]) == 0
    output, errors = capsys.readouterr()
    assert errors == ""
    return output


@pytest.fixture
def quick(monkeypatch):
    """Where the imports are not the point: only numba's is tried."""
    monkeypatch.setattr(_info, "_imports_to_try", lambda packages, with_gpu: {"numba": ("import", "numba")})


# ---------------------------------------------------------------- the decision


def test_everything_in_place():
    assert path() == {"device": "cuda", "why": None, "fix": None}


NO_DRIVER = {"loaded": False, "cuda": None, "release": None, "devices": [], "error": "libcuda.so.1 was not found"}


@pytest.mark.parametrize(
    ("machine", "why", "fix"),
    [
        ({"driver": NO_DRIVER}, "there is no NVIDIA driver (libcuda.so.1 was not found)", "install NVIDIA's driver"),
        ({"driver": NO_DRIVER, "without": ["cupy-cuda13x"]}, "no NVIDIA driver", "then pip install 'gpusoftmax[cu13]'"),
        ({"driver": {"cuda": [11, 4]}}, "too old: it knows CUDA up to 11.4", "update the driver to release 580"),
        ({"driver": {"error": "it is unwell"}}, "it is unwell", "nvidia-smi"),
        ({"driver": {"devices": []}}, "sees no GPU", "nvidia-smi"),
        ({"driver": {"devices": [V100]}}, "V100: compute capability 7.0 is below 7.5", "Turing"),
        ({"without": ["cupy-cuda13x"]}, "CuPy is not installed", "pip install 'gpusoftmax[cu13]'"),
        (
            {"without": ["cupy-cuda13x"], "driver": {"cuda": [12, 4]}},
            "CuPy is not installed",
            "pip install 'gpusoftmax[cu12]'",
        ),
        ({"without": ["cupy-cuda13x"], "packages": {"torch": "2"}}, "torch's CUDA tensors need none", "pip install"),
        (
            {"packages": {"cupy-cuda12x": "14.2.0"}},
            "2 versions of CuPy are installed over one another: cupy-cuda12x, cupy-cuda13x",
            "pip uninstall -y cupy-cuda12x cupy-cuda13x && pip install 'gpusoftmax[cu13]'",
        ),
        (
            {"driver": {"cuda": [12, 8]}},
            "cupy-cuda13x needs a driver of release 580 or later; this one knows CUDA up to 12.8",
            "pip uninstall -y cupy-cuda13x && pip install 'gpusoftmax[cu12]'",
        ),
        ({"without": ["numba-cuda"]}, "numba-cuda is not installed", "pip install 'gpusoftmax[cu13]'"),
        ({"without": ["cuda-core"]}, "cuda-core is not installed", "pip install 'gpusoftmax[cu13]'"),
        ({"packages": {"cupy-cuda13x": "13.6.0"}}, "cupy 13.6.0 does not work", "pip install -U 'gpusoftmax[cu13]'"),
        ({"packages": {"cupy-cuda13x": "14.1.0"}}, "cupy 14.1.0 does not work", "pip install -U 'gpusoftmax[cu13]'"),
        ({"packages": {"numba-cuda": "0.13.0"}}, "numba-cuda 0.13.0 does not work", "pip install -U"),
        ({"packages": {"numpy": "2.5.5"}}, "does not work with NumPy 2.5.5", "pip install 'numpy<2.5'"),
        ({"broken": {"cupy": "OSError: boo"}}, "cupy does not work: OSError: boo", "pip install --force-reinstall"),
        (
            {"broken": {"compiler": "no nvvm"}},
            "the CUDA compiler does not work: no nvvm",
            "pip install --force-reinstall",
        ),
    ],
)
def test_obstacles(machine, why, fix):
    decided = path(**machine)
    assert decided["device"] == "cpu"
    assert why in decided["why"] and fix in decided["fix"]


@pytest.mark.parametrize(
    "given, device", [("1", None), ("0", "cuda"), ("", "cuda"), ("00", "cuda"), ("true", "cuda"), (" 2 ", None)]
)
def test_without_numbas_compiler_nothing_runs(given, device, monkeypatch):
    monkeypatch.setenv("NUMBA_DISABLE_JIT", given)
    decided = path()
    assert decided["device"] == device
    assert device or decided["fix"] == "unset NUMBA_DISABLE_JIT" and "NUMBA_DISABLE_JIT" in decided["why"]


@pytest.mark.parametrize("machine", [{"broken": {"numba": "ImportError: boo"}}, {"without": ["numba"]}])
def test_without_numba_nothing_runs(machine):
    decided = path(**machine)
    assert decided["device"] is None
    assert decided["fix"] == "pip install --force-reinstall numba"


def test_a_driver_for_cuda_12_with_cupy_for_cuda_12():
    assert (
        path(driver={"cuda": [12, 4]}, packages={"cupy-cuda12x": "14.2.0"}, without=["cupy-cuda13x"])["device"]
        == "cuda"
    )


def test_the_oldest_versions_are_those_of_the_extras():
    extras = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for extra in ("cu12", "cu13"):
        for name, oldest in _info._OLDEST.items():
            assert any(line.startswith(name) and f">={_info._dotted(oldest)}" in line for line in extras[extra])
        assert any(line.startswith("numpy") and line.endswith("<2.5") for line in extras[extra])


# ---------------------------------------------------------------- the driver


class FakeDriver:
    """A libcuda. Arguments that ctypes passes by reference have their value in `_obj`."""

    def __init__(self, version=13000, init=0, devices=((b"NVIDIA H200", 9, 0), (b"Tesla T4", 7, 5))):
        self.version, self.init, self.devices = version, init, devices

    def cuDriverGetVersion(self, version):
        version._obj.value = self.version
        return 0

    def cuInit(self, flags):
        return self.init

    def cuDeviceGetCount(self, count):
        count._obj.value = len(self.devices)

    def cuDeviceGet(self, handle, ordinal):
        handle._obj.value = ordinal

    def cuDeviceGetName(self, name, length, handle):
        name.value = self.devices[handle.value][0]

    def cuDeviceGetAttribute(self, value, attribute, handle):
        value._obj.value = self.devices[handle.value][{75: 1, 76: 2}[attribute]]

    def cuDeviceTotalMem_v2(self, memory, handle):
        memory._obj.value = 2**37


def test_a_driver_with_two_devices():
    found = _probe.driver(load=lambda name: FakeDriver())
    assert found["error"] is None and found["loaded"] and found["cuda"] == [13, 0]
    assert found["devices"] == [
        {"ordinal": 0, "name": "NVIDIA H200", "compute_capability": [9, 0], "memory_bytes": 2**37},
        {"ordinal": 1, "name": "Tesla T4", "compute_capability": [7, 5], "memory_bytes": 2**37},
    ]


def test_no_driver():
    def load(name):
        raise OSError(f"{name}: cannot open shared object file: No such file or directory")

    found = _probe.driver(load)
    assert not found["loaded"] and "was not found" in found["error"]


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (100, "it sees no GPU"),
        (803, "restart the machine"),
        (802, "fabric manager"),
        (999, "cuInit returned error 999"),
    ],
)
def test_a_driver_that_does_not_start(status, message):
    found = _probe.driver(load=lambda name: FakeDriver(12040, status))
    assert message in found["error"] and found["loaded"] and found["cuda"] == [12, 4] and found["devices"] == []


def test_hidden_devices_are_named(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES is ''" in _probe.driver(load=lambda name: FakeDriver(init=100))["error"]


def test_a_driver_that_is_no_driver():
    """A stub library without the functions ends up as an error of the child, not as an exception of ours."""
    with pytest.raises(AttributeError):
        _probe.driver(load=lambda name: ctypes.CDLL(None))


# ---------------------------------------------------------------- children that fail


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """broken(name, code): a module of this name, ahead of the real one for the children."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(name, code, version=None):
        package = tmp_path / name
        package.mkdir()
        (package / "__init__.py").write_text(textwrap.dedent(code))
        return package

    return make


BREAKAGES = {
    "raise ImportError('libfoo.so.3: cannot open')": "ImportError: libfoo.so.3: cannot open",
    "raise RuntimeError('first line\\nsecond line')": "RuntimeError: first line",
    "raise SystemExit(3)": "SystemExit: 3",
    "class Odd(BaseException): pass\nraise Odd": "Odd: ",
    "import os; os.abort()": "crashed Python (Aborted)",
    "import ctypes; ctypes.string_at(0)": "crashed Python (Segmentation fault)",
    "import os; os._exit(7)": "ended Python (exit code 7)",
    "print('junk', flush=True); import os; os.write(1, b'more'); raise ValueError('x')": "ValueError: x",
    "def": "SyntaxError: ",
}


@pytest.mark.parametrize("code", BREAKAGES)
def test_a_broken_module_is_reported_in_its_line(quick, code, broken, capsys):
    broken("numba", code)
    output = info(capsys)
    line = next(line for line in output.splitlines() if line.startswith("  numba  "))
    assert f", broken: {BREAKAGES[code]}" in line
    assert "Runs on nothing." in output and "pip install --force-reinstall numba" in output


def test_a_module_that_hangs(broken, monkeypatch):
    broken("numba", "import time; time.sleep(60)")
    monkeypatch.setattr(_info, "_PROBE_SECONDS", 5.0)
    started = time.monotonic()
    answer = _info._probe({"numba": ("import", "numba"), "json": ("import", "json")})
    assert time.monotonic() - started < 30
    assert answer == {"numba": {"error": "did not answer within 5 seconds"}, "json": {"error": None}}


def test_a_module_that_talks_is_fine(broken):
    broken("chatty", "print('hello', flush=True); import os; os.write(1, b'bytes'); os.write(2, b'bytes')")
    assert _info._probe({"chatty": ("import", "chatty")}) == {"chatty": {"error": None}}


def test_python_that_cannot_be_started(monkeypatch, capsys):
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    facts = json.loads(info(capsys, "--json"))
    assert facts["path"]["device"] is None
    assert "could not be tried" in facts["broken"]["numba"]


def test_a_driver_that_crashes_or_hangs(quick, monkeypatch, capsys):
    ask = _info._probe

    def probe(probes):
        return ask(probes) if "driver" not in probes else {"driver": {"error": "crashed Python (Aborted)"}}

    monkeypatch.setattr(_info, "_probe", probe)
    assert "why   asking the NVIDIA driver crashed Python (Aborted)" in info(capsys)


def with_gpu(monkeypatch, driver=DRIVER):
    ask = _info._probe
    monkeypatch.setattr(_info, "_probe", lambda probes: ask(probes) if "driver" not in probes else {"driver": driver})


def test_cupy_that_does_not_work(broken, tmp_path, monkeypatch, capsys):
    with_gpu(monkeypatch)
    monkeypatch.setattr(_info, "_packages", lambda: PACKAGES)
    broken(
        "cupy", "class cuda:\n class runtime:\n  @staticmethod\n  def getDeviceCount(): raise OSError('no libnvrtc')"
    )
    output = info(capsys)
    assert "why   cupy does not work: OSError: no libnvrtc" in output
    assert "help  pip install --force-reinstall 'gpusoftmax[cu13]'" in output
    assert "cupy-cuda13x      14.2.0, broken: OSError: no libnvrtc" in output


def test_without_a_driver_cupy_is_not_called_broken(broken, monkeypatch, capsys):
    with_gpu(monkeypatch, {"error": "libcuda.so.1 was not found", "loaded": False})
    monkeypatch.setattr(_info, "_packages", lambda: PACKAGES)
    broken("cupy", "raise OSError('no libcuda')")
    assert "broken" not in info(capsys)


def test_two_cupys_are_found(quick, tmp_path, monkeypatch, capsys):
    with_gpu(monkeypatch)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("cupy_cuda12x", "cupy_cuda13x"):
        metadata = tmp_path / f"{name}-14.2.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 14.2.0\n")
    facts = json.loads(info(capsys, "--json"))
    assert facts["packages"]["cupy-cuda12x"] == facts["packages"]["cupy-cuda13x"] == "14.2.0"
    assert facts["path"]["fix"].startswith(
        "pip uninstall -y cupy-cuda12x cupy-cuda13x && pip install 'gpusoftmax[cu13]'"
    )


def test_damaged_metadata(quick, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "cupy_cuda13x-1.dist-info").mkdir()
    (tmp_path / "torch-9.dist-info").mkdir()
    (tmp_path / "torch-9.dist-info" / "METADATA").write_bytes(b"\xff\xfe\x00 not text")
    info(capsys)


def test_metadata_that_cannot_be_read_at_all(monkeypatch, capsys):
    def fail(*arguments, **keywords):
        raise PermissionError("no")

    monkeypatch.setattr(_info.metadata, "version", fail)
    monkeypatch.setattr(_info.metadata, "distributions", fail)
    assert "numba is not installed" in info(capsys)


# ---------------------------------------------------------------- the report


def test_json(capsys):
    facts = json.loads(info(capsys, "--json"))
    assert facts["version"] == gpusoftmax.__version__
    assert {"path", "python", "platform", "packages", "driver", "broken", "cpu", "caches"} <= facts.keys()
    assert facts["path"]["device"] in ("cpu", "cuda")
    assert facts["packages"]["numba"] and facts["broken"] == {}
    assert facts["cpu"]["usable"] <= facts["cpu"]["cores"]
    assert facts["caches"]["cpu"]["directory"].startswith(os.environ["GPUSOFTMAX_CACHE_DIR"])


def test_a_machine_with_a_gpu(quick, monkeypatch, capsys):
    with_gpu(monkeypatch)
    monkeypatch.setattr(_info, "_packages", lambda: PACKAGES)
    output = info(capsys)
    assert "Runs on the GPU for arrays that are there, on the CPU for others." in output
    assert "driver            NVIDIA 580.65.06, CUDA up to 13.0" in output
    assert "GPU 0             NVIDIA H200, compute capability 9.0, 128 GiB" in output


@pytest.fixture
def new_process(monkeypatch):
    monkeypatch.setattr(cache_directory, "_warned", set())


def test_a_cache_that_cannot_be_used(quick, new_process, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GPUSOFTMAX_CACHE_DIR", str(tmp_path / "file"))
    caches = json.loads(info(capsys, "--json"))["caches"]
    assert caches["cpu"]["directory"] is None and "is not a directory" in caches["cpu"]["error"]
    assert caches["cuda"]["directory"] is None and caches["cuda"]["error"]


def test_the_size_of_the_caches(quick, new_process, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GPUSOFTMAX_CACHE_DIR", str(tmp_path / "cache"))
    info(capsys)
    (tmp_path / "cache" / "cpu" / "entry").write_bytes(bytes(3 * 2**20))
    assert f"{tmp_path / 'cache' / 'cpu'}: 1 files, 3.0 MiB" in info(capsys)


@pytest.mark.parametrize("threads", ["1", "many"])
def test_thread_settings(quick, threads, monkeypatch, capsys):
    monkeypatch.setenv("NUMBA_NUM_THREADS", threads)
    cpu = json.loads(info(capsys, "--json"))["cpu"]
    assert cpu.get("threads") == 1 if threads == "1" else "ValueError" in cpu["error"]


def test_nothing_heavy_is_imported_here():
    code = (
        "import sys\nfrom gpusoftmax import cli\nassert cli.main(['info', '--json']) == 0\n"
        "heavy = {'numba', 'llvmlite', 'cupy', 'torch', 'jax', 'cuda', 'scipy'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_as_a_program_in_a_bare_environment(tmp_path):
    """No HOME, hardly a variable, another working directory with a file named as a library."""
    (tmp_path / "numba.py").write_text("raise ValueError('not this one')")
    child = subprocess.run(
        [Path(sys.executable).parent / "gpusoftmax", "info"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"GPUSOFTMAX_CACHE_DIR": str(tmp_path / "cache")},
        timeout=60,
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.startswith(f"gpusoftmax {gpusoftmax.__version__}\n") and "Traceback" not in child.stderr
    assert "broken" not in child.stdout


def test_in_a_zip_archive(tmp_path):
    """There the children have no file to run."""
    package = Path(gpusoftmax.__file__).parent
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        for path in package.glob("*.py"):
            archive.write(path, f"gpusoftmax/{path.name}")
        for path in cache_directory.KERNELS.rglob("*.py"):
            archive.write(path, f"gpusoftmax/kernels/{path.relative_to(cache_directory.KERNELS)}")
    child = subprocess.run(
        [sys.executable, "-P", "-m", "gpusoftmax", "info", "--json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "archive.zip")},
        timeout=60,
    )
    assert child.returncode == 0, child.stderr
    facts = json.loads(child.stdout)
    assert facts["broken"] == {} and facts["path"]["device"] in ("cpu", "cuda")
    assert "ended Python" not in child.stdout


# ---------------------------------------------------------------- the command line itself


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"gpusoftmax {gpusoftmax.__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], *([command, "--help"] for command in cli.COMMANDS)])
def test_help(arguments, capsys):
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.startswith("usage: gpusoftmax")


@pytest.mark.parametrize("arguments", [[], ["fly"], ["info", "--fast"]])
def test_bad_usage(arguments, capsys):
    assert cli.main(arguments) == 2
    output, message = capsys.readouterr()
    assert output == "" and message.count("\n") == 1 and "--help" in message


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("two\n  lines"), "two lines"),
        (FileNotFoundError(2, "No such file", "x.npy"), "x.npy: No such file"),
        (MemoryError(), "MemoryError"),
        (KeyError("k"), "KeyError: 'k'"),
    ],
)
def test_an_error_is_one_line(error, message, monkeypatch, capsys):
    def run(arguments):
        raise error

    monkeypatch.setattr(_info, "run", run)
    assert cli.main(["info"]) == 2
    assert capsys.readouterr().err == f"gpusoftmax info: {message}\n"


def test_an_interrupt(monkeypatch, capsys):
    def run(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(_info, "run", run)
    assert cli.main(["info"]) == 130
    assert capsys.readouterr().err == "gpusoftmax info: interrupted\n"


def program(*arguments, **streams):
    """(exit code, what came on stderr) of the command as a program, whose output Python buffers."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "gpusoftmax", *arguments]
    child = subprocess.run(command, stderr=subprocess.PIPE, text=True, env=environment, timeout=60, **streams)
    return child.returncode, child.stderr


@pytest.mark.parametrize("arguments", [["info"], ["--help"], ["info", "--help"], ["--version"]])
def test_a_reader_that_leaves(arguments):
    """gpusoftmax info | head -0"""
    reader, writer = os.pipe()
    os.close(reader)
    assert program(*arguments, stdout=writer) == (2, "")
    os.close(writer)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a disk that is full")
@pytest.mark.parametrize("arguments", [["info"], ["info", "--json"], ["--version"]])
def test_output_that_cannot_be_written(arguments):
    name = " ".join(["gpusoftmax", *(one for one in arguments if one[0] != "-")])
    with open("/dev/full", "w") as full:
        assert program(*arguments, stdout=full) == (2, f"{name}: No space left on device\n")


@pytest.mark.skipif(os.name != "posix", reason="descriptors are closed before the program starts")
def test_streams_that_are_closed():
    """gpusoftmax info >&- 2>&-"""
    assert program("info", preexec_fn=lambda: os.close(1)) == (0, "")
    code = "import os, sys; os.close(2); os.execv(sys.executable, [sys.executable, '-m', 'gpusoftmax', 'fly'])"
    child = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, timeout=60)
    assert (child.returncode, child.stdout) == (2, b"")  # an error does not go where results are expected
