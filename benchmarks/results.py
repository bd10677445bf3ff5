"""Results as files: JSON lines under results/<device>/<op>.jsonl, the newest measurement of each case and provider."""

import datetime
import functools
import importlib
import importlib.metadata
import itertools
import json
import platform
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
_VERSIONS = {
    "cpu": ("gpusoftmax", "numpy", "numba", "llvmlite", "torch", "scipy"),
    "gpu": ("gpusoftmax", "numpy", "numba-cuda", "cuda-core", "torch", "triton", "cupy-cuda13x", "cupy-cuda12x")
    + ("liger-kernel",),
}
_KEY = ("op", "dtype", "n_cols", "n_features", "n_rows", "provider", "threads")


@functools.cache
def environment(target: str) -> dict:
    """Where and with what a measurement was made."""
    return {
        "device": device_name(target),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": {name: version for name in _VERSIONS[target] if (version := _version(name))},
    }


def device_name(target: str) -> str:
    """The device's name as a folder name."""
    name = _gpu_name() if target == "gpu" else _cpu_name()
    return f"{target}-" + re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
        name = re.search(r"^model name\s*:\s*(.+)", text, re.M)[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()
    if not re.search(r"\d", name):  # as virtual machines tell it: an "AMD EPYC" may be of any generation
        numbers = re.findall(r"^(?:cpu )?(family|model)\s*:\s*(\d+)", text, re.M)
        name = " ".join([name, *itertools.chain(*numbers[:2])])
    return name


def _gpu_name() -> str:
    try:
        return importlib.import_module("torch").cuda.get_device_name()
    except ImportError:
        cupy = importlib.import_module("cupy")
        return cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The state of the sources, by git. Results, which a measurement changes itself, are no sources."""
    git = ["git", "-C", str(RESULTS.parent)]
    sources = [":(top)", f":(exclude,top){RESULTS.parent.name}/{RESULTS.name}"]
    try:
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *sources], capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return name.stdout.strip() + ("-dirty" if changed.returncode else "")


def save(records: Iterable[dict], root: Path = RESULTS) -> set[Path]:
    """Adds the records to the files of their devices and ops; they replace earlier ones of the same case."""
    written = set()
    for record in records:
        path = root / record["device"] / f"{record['op']}.jsonl"
        kept = {_key(one): one for one in load(path)} | {_key(record): record}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(kept[key]) + "\n" for key in sorted(kept)))
        written.add(path)
    return written


def load(path: Path) -> list[dict]:
    return [json.loads(one) for one in path.read_text().splitlines()] if path.exists() else []


def _key(record: dict) -> tuple:
    return tuple(record.get(name, 0) for name in _KEY)
