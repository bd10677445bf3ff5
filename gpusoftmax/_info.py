"""Show versions, devices and caches, which processor gpusoftmax runs on here, and what would make it use the GPU."""

# Nothing that can be missing or broken is touched by this process: importlib.metadata tells versions without importing,
# and the driver and the imports are tried in child processes (gpusoftmax/_probe.py) that may crash or hang.

import argparse
import json
import os
import pkgutil
import platform
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import gpusoftmax

HELP = "versions, devices, caches, and whether the GPU is used"
_PROBE_SECONDS = 30.0
_REQUIRED = ("numpy", "numba", "llvmlite", "ml-dtypes", "array-api-compat", "platformdirs")
_FOR_GPUS = ("numba-cuda", "cuda-core", "cuda-bindings")
_OPTIONAL = ("torch", "jax")
_OLDEST = {"cupy": (14, 0, 1), "numba-cuda": (0, 30, 4), "cuda-core": (1, 2)}
"""As in the extras cu12 and cu13 of pyproject.toml."""
_DRIVER_RELEASES = {12: 525, 13: 580}
"""The first driver release that runs programs of a CUDA version (NVIDIA's compatibility guide)."""
_OLDEST_ARCH = (7, 5)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> None:
    facts = gather()
    print(json.dumps(facts, indent=2) if arguments.json else _text(facts))


def choose_device(requested: str | None) -> tuple[str, str]:
    """The device for a command: the one asked for, or the GPU if it works; and why it is not the GPU, or ""."""
    if requested == "cpu":
        return "cpu", ""
    path = gather(for_path_only=True)["path"]
    if path["device"] == "cuda":
        return "cuda", ""
    if requested == "cuda":
        raise ValueError(f"device cuda cannot be used: {path['why']}; {path['fix']}")
    return "cpu", path["why"]


def gather(for_path_only: bool = False) -> dict[str, Any]:
    """Everything there is to report, ready for JSON. `for_path_only` leaves out what does not decide the path."""
    packages = _packages()
    answers = _probe({"driver": ("driver",)})
    if not for_path_only or not answers["driver"]["error"]:
        answers |= _probe(_imports_to_try(packages, with_gpu=not answers["driver"]["error"]))
    driver = answers.pop("driver")
    if "loaded" not in driver:  # no answer: there is something that crashes or hangs
        driver = {"loaded": True, "error": f"asking the NVIDIA driver {driver['error']}"}
    facts: dict[str, Any] = {
        "packages": packages,
        "driver": {"cuda": None, "release": None, "devices": [], **driver},
        "broken": {name: answer["error"] for name, answer in answers.items() if answer["error"]},
    }
    facts["path"] = _path(facts)
    if for_path_only:
        return facts
    return {
        "version": gpusoftmax.__version__,
        "path": facts["path"],
        "python": platform.python_version(),
        "platform": platform.platform(),
        **facts,
        "cpu": _attempt(_cpu),
        "caches": {name: _attempt(lambda name=name: _cache(name)) for name in ("cpu", "cuda", *_prepared())},
    }


# ---------------------------------------------------------------- facts


def _packages() -> dict[str, str]:
    """The versions of the installed distributions that matter here."""
    found = {}
    for name in (*_REQUIRED, *_FOR_GPUS, *_OPTIONAL):
        try:
            found[name] = str(metadata.version(name))
        except Exception:  # not installed, or its metadata is damaged: then it is not there to be relied on
            continue
    try:
        for distribution in metadata.distributions():
            # Half-removed distributions have no name.
            name = str(_attempt(lambda d=distribution: {"name": d.metadata["Name"]}).get("name") or "").lower()
            if re.fullmatch(r"cupy(-cuda\d+x?|-rocm.*)?", name):
                found[name] = str(distribution.version)
    except Exception:
        pass
    return found


def _imports_to_try(packages: dict[str, str], with_gpu: bool) -> dict[str, tuple[str, ...]]:
    probes: dict[str, tuple[str, ...]] = {"numba": ("import", "numba")}
    if "numba-cuda" in packages:
        probes["numba-cuda"] = ("import", "numba.cuda")
    if "cuda-core" in packages:
        probes["cuda-core"] = ("import", "cuda.core")
        probes["compiler"] = ("compiler",)
    if _cupys(packages) and with_gpu:  # else it would be called broken for want of a driver
        probes["cupy"] = ("arrays",)
    return probes


def _cupys(packages: dict[str, str]) -> list[str]:
    return sorted(name for name in packages if name == "cupy" or name.startswith("cupy-"))


def _cpu() -> dict:
    count = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else count
    return {"cores": count, "usable": usable, "threads": int(os.environ.get("NUMBA_NUM_THREADS") or usable)}


def _prepared() -> tuple[str, ...]:
    """The name of the CUDA cache that is only read, if the environment names one."""
    return ("cuda, read only",) if os.environ.get("GPUSOFTMAX_CACHE_PATH") else ()


def _cache(name: str) -> dict:
    """Where compiled kernels are kept, and how much there is; creates the directory, as they would."""
    from gpusoftmax.kernels.cache_directory import prepared_directory, private_directory

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        directory = prepared_directory("cuda") if name in _prepared() else private_directory(name)
    if directory is None:
        reason = str(caught[0].message) if caught else "its directory is missing or unsafe (see the other cache)"
        return {"directory": None, "error": reason}
    files = [path.stat().st_size for path in directory.rglob("*") if path.is_file()]
    return {"directory": str(directory), "error": None, "files": len(files), "bytes": sum(files)}


def _attempt(probe: Callable[[], dict]) -> dict:
    try:
        return probe()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _probe(probes: dict[str, tuple[str, ...]]) -> dict[str, dict]:
    """The answers of child processes that run side by side. None of them can take this process down or hold it up."""
    # The children find the modules that this process would.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    program = pkgutil.get_data("gpusoftmax", "_probe.py").decode()  # no file to be run where we are in a zip archive
    children: dict[str, subprocess.Popen | OSError] = {}
    for name, arguments in probes.items():
        command = [sys.executable, "-P", "-c", program, *arguments]
        try:
            children[name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
        except (OSError, ValueError) as error:
            children[name] = error
    deadline = time.monotonic() + _PROBE_SECONDS
    return {name: _answer(child, deadline) for name, child in children.items()}


def _answer(child, deadline: float) -> dict:
    if isinstance(child, Exception):
        return {"error": f"could not be tried: {child}"}
    try:
        output, _ = child.communicate(timeout=max(deadline - time.monotonic(), 0.1))
        return json.loads(output)
    except subprocess.TimeoutExpired:
        child.kill()  # without waiting: a process stuck in a broken driver does not die
        return {"error": f"did not answer within {_PROBE_SECONDS:.0f} seconds"}
    except ValueError:
        pass
    if child.returncode < 0:
        return {"error": f"crashed Python ({signal.strsignal(-child.returncode)})"}
    return {"error": f"ended Python (exit code {child.returncode})"}


# ---------------------------------------------------------------- what follows from them


def _has_no_compiler(disable_jit: str) -> bool:
    """As Numba reads it: what is no integer counts as not given."""
    try:
        return int(disable_jit) != 0
    except ValueError:
        return False


def _path(facts: dict) -> dict[str, str | None]:
    """Which processor calls run on, and, where it is not the GPU, the first obstacle and what removes it."""
    packages, broken = facts["packages"], facts["broken"]
    if "numba" not in packages or "numba" in broken:
        why = f"numba {'does not import: ' + broken['numba'] if 'numba' in broken else 'is not installed'}"
        return {"device": None, "why": why, "fix": "pip install --force-reinstall numba"}
    if _has_no_compiler(os.environ.get("NUMBA_DISABLE_JIT", "0")):
        why = "NUMBA_DISABLE_JIT switches Numba's compiler off, which compiles all kernels"
        return {"device": None, "why": why, "fix": "unset NUMBA_DISABLE_JIT"}
    for why, fix in _obstacles(facts["driver"], packages, broken):
        return {"device": "cpu", "why": why, "fix": fix}
    return {"device": "cuda", "why": None, "fix": None}


def _obstacles(driver: dict, packages: dict, broken: dict) -> Iterator[tuple[str, str]]:
    """(why the GPU is not used, what would help), most basic first."""
    cuda = driver["cuda"] and driver["cuda"][0]
    extra = "gpusoftmax[cu13]" if cuda is None or cuda >= 13 else "gpusoftmax[cu12]"
    install = f"pip install '{extra}'"
    reinstall = f"pip install --force-reinstall '{extra}'"
    cupys = _cupys(packages)

    if not driver["loaded"]:
        then = "" if len(cupys) == 1 else f", then {install}"
        yield (
            f"there is no NVIDIA driver ({driver['error']})",
            f"install NVIDIA's driver, release {_DRIVER_RELEASES[13]} or later, which pip cannot do{then}",
        )
    if cuda is not None and cuda < min(_DRIVER_RELEASES):
        yield (
            f"the NVIDIA driver is too old: it knows CUDA up to {_dotted(driver['cuda'])}",
            f"update the driver to release {_DRIVER_RELEASES[13]} or later (CUDA 12 needs {_DRIVER_RELEASES[12]}), "
            "then pip install 'gpusoftmax[cu13]'",
        )
    if driver["error"]:
        yield driver["error"], "gpusoftmax uses the GPU as soon as nvidia-smi shows one"
    if not driver["devices"]:
        yield "the NVIDIA driver sees no GPU", "gpusoftmax uses the GPU as soon as nvidia-smi shows one"
    if driver["devices"] and max(tuple(one["compute_capability"]) for one in driver["devices"]) < _OLDEST_ARCH:
        names = ", ".join(one["name"] for one in driver["devices"])
        yield (
            f"{names}: compute capability {_dotted(driver['devices'][0]['compute_capability'])} is below "
            f"{_dotted(_OLDEST_ARCH)}",
            "use a GPU of the Turing generation (2018) or later",
        )
    if len(cupys) > 1:
        # They overwrite each other's files, so that removing one breaks the other.
        yield (
            f"{len(cupys)} versions of CuPy are installed over one another: {', '.join(cupys)}",
            f"pip uninstall -y {' '.join(cupys)} && {install}",
        )
    if not cupys:
        torch = " (torch's CUDA tensors need none)" if "torch" in packages else ""
        yield f"there is a GPU, but CuPy is not installed{torch}", install
    for name in cupys:
        built_for = re.search(r"cuda(\d\d)", name)
        if built_for and cuda is not None and int(built_for[1]) > cuda:
            major = int(built_for[1])
            yield (
                f"{name} needs a driver of release {_DRIVER_RELEASES.get(major, '?')} or later; this one knows CUDA up "
                f"to {_dotted(driver['cuda'])}",
                f"pip uninstall -y {name} && {install}",
            )
    for name in ("numba-cuda", "cuda-core"):
        if name not in packages:
            yield f"{name} is not installed", install
    for name, oldest in _OLDEST.items():
        version = packages[cupys[0] if name == "cupy" else name]
        if _numbers(version) < oldest or (name == "cupy" and _numbers(version) == (14, 1, 0)):
            yield (
                f"{name} {version} does not work here, expected {_dotted(oldest)} or later",
                f"pip install -U '{extra}'",
            )
    if _numbers(packages.get("numpy", "0")) >= (2, 5):
        yield (
            f"numba-cuda {packages['numba-cuda']} does not work with NumPy {packages['numpy']}",
            "pip install 'numpy<2.5'",
        )
    for name, error in broken.items():
        yield f"{'the CUDA compiler' if name == 'compiler' else name} does not work: {error}", reinstall


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def _dotted(numbers) -> str:
    return ".".join(str(number) for number in numbers)


# ---------------------------------------------------------------- text


def _text(facts: dict) -> str:
    path, packages, driver = facts["path"], facts["packages"], facts["driver"]
    lines = [f"gpusoftmax {facts['version']}", ""]
    where = {"cpu": "the CPU", "cuda": "the GPU for arrays that are there, on the CPU for others", None: "nothing"}
    lines.append(f"Runs on {where[path['device']]}.")
    if path["why"]:
        lines += [f"  why   {path['why']}", f"  help  {path['fix']}"]
    lines += ["", "Versions", f"  {'python':<18}{facts['python']} on {facts['platform']}"]
    gpu_names = (*_FOR_GPUS, *(_cupys(packages) or ["cupy"]))
    for name in (*_REQUIRED, *gpu_names, *_OPTIONAL):
        if name in packages or name not in _OPTIONAL:
            error = facts["broken"].get("cupy" if name.startswith("cupy") else name)
            note = f", broken: {error}" if error and name in packages else ""
            lines.append(f"  {name:<18}{packages.get(name, 'not installed')}{note}")
    lines += ["", "Devices"]
    if driver["loaded"]:
        release = f" {driver['release']}" if driver["release"] else ""
        knows = f", CUDA up to {_dotted(driver['cuda'])}" if driver["cuda"] else ""
        lines.append(f"  {'driver':<18}NVIDIA{release}{knows}")
    if driver["error"]:
        lines.append(f"  {'driver':<18}{driver['error']}")
    for device in driver["devices"]:
        lines.append(
            f"  {'GPU ' + str(device['ordinal']):<18}{device['name']}, compute capability "
            f"{_dotted(device['compute_capability'])}, {device['memory_bytes'] / 2**30:.0f} GiB"
        )
    cpu = facts["cpu"]
    cores = cpu.get("error") or f"{cpu['usable']} of {cpu['cores']} cores, {cpu['threads']} threads"
    lines += [f"  {'CPU':<18}{cores}", "", "Caches of compiled kernels"]
    for target, cache in facts["caches"].items():
        text = cache["error"] or f"{cache['directory']}: {cache['files']} files, {cache['bytes'] / 2**20:.1f} MiB"
        lines.append(f"  {target:<18}{text}")
    return "\n".join(lines)
