"""What `gpusoftmax info` tries in a child process, because a broken installation may crash or hang there.

    python -P -c "the text of this file" driver | compiler | arrays | import NAME

prints one JSON object: {"error": null or a text, ...}. Standard library only, and nothing of gpusoftmax at the top.
"""

import ctypes
import importlib
import json
import os
import re
import sys
from pathlib import Path

_DRIVER_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_INIT_ERRORS = {
    100: "it sees no GPU",
    802: "the GPUs are not ready: is the fabric manager running?",
    803: "its library and its kernel module have different versions: restart the machine",
}


def driver(load=ctypes.CDLL) -> dict:
    """The driver and its devices, asked through the driver's own library: needs no CUDA package."""
    found = {"error": None, "loaded": False, "cuda": None, "release": _driver_release(), "devices": []}
    try:
        library = load(_DRIVER_LIBRARY)
    except OSError:
        found["error"] = f"{_DRIVER_LIBRARY} was not found"
        return found
    found["loaded"] = True
    version = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(version)) == 0:
        found["cuda"] = [version.value // 1000, version.value % 1000 // 10]
    status = library.cuInit(0)
    if status:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        because = _INIT_ERRORS.get(status, f"cuInit returned error {status}: does nvidia-smi work?")
        if status == 100 and hidden is not None:
            because += f" (CUDA_VISIBLE_DEVICES is {hidden!r})"
        found["error"] = f"the driver is installed, but {because}"
        return found
    count = ctypes.c_int()
    library.cuDeviceGetCount(ctypes.byref(count))
    found["devices"] = [_device(library, ordinal) for ordinal in range(count.value)]
    return found


def _device(library, ordinal: int) -> dict:
    handle, major, minor, memory = ctypes.c_int(), ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(256)
    library.cuDeviceGet(ctypes.byref(handle), ordinal)
    library.cuDeviceGetName(name, len(name), handle)
    library.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, handle)
    library.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, handle)
    library.cuDeviceTotalMem_v2(ctypes.byref(memory), handle)
    return {
        "ordinal": ordinal,
        "name": name.value.decode(errors="replace"),
        "compute_capability": [major.value, minor.value],
        "memory_bytes": memory.value,
    }


def _driver_release() -> str | None:
    """NVIDIA's own number of the driver, as in 580.65.06; the library only knows the CUDA version."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    match = re.search(r"\s(\d{3,}\.\d+(?:\.\d+)*)\s", text)
    return match[1] if match else None


def compiler() -> dict:
    """Can the libraries be loaded that turn kernels into machine code?"""
    pathfinder = importlib.import_module("cuda.pathfinder")
    for name in ("nvvm", "nvJitLink"):
        pathfinder.load_nvidia_dynamic_lib(name)
    return {"error": None}


def arrays() -> dict:
    """Can arrays be made on a GPU?"""
    importlib.import_module("gpusoftmax._arrays").array_module("cuda")
    return {"error": None}


def import_module(name: str) -> dict:
    importlib.import_module(name)
    return {"error": None}


def _main(what: str, *arguments: str) -> None:
    # Whatever the modules print, from Python or from C, goes to stderr.
    answer = os.dup(1)
    os.dup2(2, 1)
    probes = {"driver": driver, "compiler": compiler, "arrays": arrays, "import": import_module}
    try:
        result = probes[what](*arguments)
    except BaseException as error:  # SystemExit too: a module may raise anything
        error = error.__cause__ if what == "arrays" and error.__cause__ else error
        lines = str(error).strip().splitlines()
        result = {"error": f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]}
    with os.fdopen(answer, "w") as file:
        json.dump(result, file)
    os._exit(0)  # no clean-up of half-imported modules, which could still crash or hang


if __name__ == "__main__":
    _main(*sys.argv[1:])
