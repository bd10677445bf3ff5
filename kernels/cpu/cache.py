"""The decorators of every CPU kernel, and Numba's disk cache made safe.

Numba's own cache trusts what it finds on disk: a damaged file ends the process, a planted one is unpickled and so
executed, and code is not compiled anew when a helper in another file changes. Here one file holds one compiled
signature of one kernel:

    <cache>/cpu/<fingerprint>/<kernel>-<key>.bin  =  sha256(name + payload), payload

- The fingerprint covers every source file, version, CPU feature and compiler switch that decides the machine code, so
  a stale entry cannot be found.
- The digest is checked before anything is unpickled. An entry that fails it, or does not load, is deleted, warned of
  once, and compiled again.
- There is no index to lose updates to: processes that fill the cache at once only ever replace whole, equal files.

No fault of the cache reaches the caller: at worst a kernel is compiled.
"""

import contextlib
import functools
import hashlib
import inspect
import itertools
import os
import pickle
import platform
import shutil
import signal
import stat
import sys
import tempfile
import threading
import time
from pathlib import Path

import llvmlite
import llvmlite.binding
import numba
from numba.core import config, sigutils
from numba.core.caching import _Cache
from numba.core.compiler import CompileResult
from numba.core.dispatcher import Dispatcher
from numba.core.runtime.nrt import rtsys
from numba.core.serialize import dumps

from gpusoftmax.kernels.cache_directory import (
    fingerprint,
    private_directory,
    source_fingerprint,
    sources_unchanged,
    warn_once,
)
from gpusoftmax.kernels.cpu.helpers import HelperCompiler, KernelCompiler

HELPER_OPTIONS = {
    "error_model": "numpy",
    "forceinline": True,
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
    "pipeline_class": HelperCompiler,
}

_DIGEST_BYTES = hashlib.sha256().digest_size
_UNUSED_SECONDS = 30 * 24 * 3600
"""Entries of another version of the sources that nobody has loaded for a month are deleted."""


def kernel(function, releases_lock=True):
    """Compile a module-level function with Numba on first use, or load it from the disk cache.

    releases_lock: while it runs, other threads may run Python.

    One entry is kept for every tuple of argument types. Helpers are `device` functions: they become part of the entry.
    So do the values of the globals that a kernel uses, which must therefore follow from the sources and the CPU alone,
    never from the environment or the number of cores.
    """
    if function.__closure__ or "<locals>" in function.__qualname__:
        raise TypeError(
            f"kernel() takes functions defined at the top of a module; {function.__qualname__} is defined inside "
            "another function, and the values it closes over could not be told apart in the cache"
        )
    dispatcher = numba.njit(error_model="numpy", nogil=releases_lock, pipeline_class=KernelCompiler)(function)
    if not isinstance(dispatcher, Dispatcher):  # but the function itself, which works on vectors and addresses
        raise RuntimeError("kernels for the CPU take Numba's compiler, which NUMBA_DISABLE_JIT switches off: unset it")
    dispatcher._cache = _KernelCache(function)
    return dispatcher


def device(function):
    """Compile a helper that kernels call; it is cached as a part of them, not on its own."""
    return numba.njit(nogil=True, **HELPER_OPTIONS)(function)


@contextlib.contextmanager
def _interrupts_wait():
    """Ctrl-C counts behind the block.

    LLVM asks for the machine code of an entry by a callback. An exception in it is dropped, and with it the code: Numba
    would write to address 0.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):  # it runs there alone
        yield
        return
    came = []
    try:
        signal.signal(signal.SIGINT, lambda *arguments: came.append(arguments))
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        for arguments in came:
            handler(*arguments)


class _KernelCache(_Cache):
    """The entries of one kernel. Numba calls it with its compiler lock held."""

    def __init__(self, function):
        self._function = function
        self._stem = f"{function.__module__.rpartition('.')[2]}.{function.__qualname__}"
        source_fingerprint("cpu")  # as imported now, not as found at the first call
        try:
            self._source = fingerprint([Path(inspect.getfile(function))])  # for kernels outside kernels/, as in tests
            self._enabled = True
        except OSError:  # typed in, or in a zip archive
            self._enabled = False

    @property
    def cache_path(self):
        """The directory of the entries, None if there is none."""
        return _directory()

    def enable(self):
        self._enabled = True

    def disable(self):
        self._enabled = False

    def flush(self):
        """Delete every entry of this kernel."""
        directory = _directory()
        for path in directory.glob(f"{self._stem}-*.bin") if directory else ():
            _delete(path)

    @_interrupts_wait()
    def load_overload(self, sig, target_context):
        """Return the compiled result for `sig`, None if it has to be compiled."""
        path = self._path(sig, target_context.codegen())
        if path is None:
            return None
        try:
            payload = _read(path)
            if payload is None:
                return None
            external_names, reduced = pickle.loads(payload)
            _register_symbols(external_names, target_context)
            return CompileResult._rebuild(target_context, *reduced)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        _delete(path)
        warn_once(
            "cpu cache: load",
            f"gpusoftmax deleted a damaged entry of its kernel cache and compiles the kernel anew: {path} ({problem})",
        )
        return None

    def save_overload(self, sig, data):
        """Keep the compiled result `data`, if that is possible."""
        path = self._path(sig, data.codegen)
        if path is None:
            return
        try:
            if data.library.has_dynamic_globals:
                raise ValueError("the code contains addresses of this process")
            _write(path, dumps((_external_names(data.library), data._reduce())))
            return
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        warn_once(
            "cpu cache: save",
            f"gpusoftmax could not keep a compiled kernel, which will be compiled anew by the next process: {path} "
            f"({problem})",
        )

    def _path(self, sig, codegen) -> Path | None:
        """Return the path of the entry for `sig`, None if there is to be none."""
        directory = _directory() if self._enabled else None
        if directory is None:
            return None
        types = repr(sigutils.normalize_signature(sig))
        if " at 0x" in types:  # a function as an argument: its address names something else in another process
            return None
        line = str(self._function.__code__.co_firstlineno)
        key = fingerprint([], self._stem, line, self._source, types, repr(codegen.magic_tuple()))
        return directory / f"{self._stem}-{key}.bin"


def _directory() -> Path | None:
    """Return the directory for the sources and compiler of this process, None if nothing may be kept."""
    sources = source_fingerprint("cpu")
    if sources is None or not sources_unchanged("cpu"):
        return None
    return private_directory("cpu", fingerprint([], sources, *_compiler()))


@functools.cache
def _compiler() -> tuple[str, ...]:
    """Return what decides the machine code apart from the sources: versions, the CPU, Numba's switches."""
    try:
        features = llvmlite.binding.get_host_cpu_features().flatten()
    except RuntimeError:  # LLVM cannot tell on this platform
        features = ""
    switches = (
        # CPU_NAME and CPU_FEATURES hold NUMBA_CPU_NAME and NUMBA_CPU_FEATURES.
        ("CPU_NAME", "CPU_FEATURES", "ENABLE_AVX", "USING_SVML")
        + ("OPT", "LOOP_VECTORIZE", "SLP_VECTORIZE", "BOUNDSCHECK", "DEBUGINFO_DEFAULT")
    )
    return (
        f"python {platform.python_implementation()} {sys.version}",
        f"numba {numba.__version__}, llvmlite {llvmlite.__version__}",
        f"cpu {llvmlite.binding.get_host_cpu_name()} {features}",
        *(f"{name} {getattr(config, name, None)}" for name in switches),
    )


def _external_names(library) -> list[str]:
    """Return the functions and variables that compiled code expects to find in the process."""
    module = library._final_module
    values = itertools.chain(module.functions, module.global_variables)
    return sorted(value.name for value in values if value.is_declaration and not value.name.startswith("llvm."))


def _register_symbols(names: list[str], target_context) -> None:
    """Make sure that the process has all these symbols: LLVM aborts it if one is missing.

    Numba's cache calls `refresh` always, which imports all of Numba and SciPy: 0.6 s, for kernels that need nothing.
    """
    for register in (lambda: rtsys.initialize(target_context), target_context.refresh):
        if all(llvmlite.binding.address_of_symbol(name) for name in names):
            return
        register()


def _read(path: Path) -> bytes | None:
    """Return the payload of an entry, None if there is no such file; raise if it is not what was written."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode) or (os.name == "posix" and status.st_uid != os.geteuid()):
        raise ValueError("not a file of this user")
    stored = path.read_bytes()
    digest, payload = stored[:_DIGEST_BYTES], stored[_DIGEST_BYTES:]
    if digest != _digest(path, payload):
        raise ValueError("the content does not match its checksum")
    with contextlib.suppress(OSError):
        os.utime(path.parent)  # in use: not to be deleted by `_delete_unused_versions`
    return payload


def _write(path: Path, payload: bytes) -> None:
    """Put an entry in place, whole or not at all."""
    if not any(path.parent.iterdir()):
        _delete_unused_versions(path.parent)
    handle, temporary = tempfile.mkstemp(dir=path.parent)  # 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(_digest(path, payload) + payload)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _digest(path: Path, payload: bytes) -> bytes:
    """Return the checksum that ties a payload to its name: an entry under another's name is damaged too."""
    return hashlib.sha256(path.name.encode() + payload).digest()


def _delete(path: Path) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def _delete_unused_versions(current: Path) -> None:
    """Delete the directories beside `current` that no process has used for a month."""
    for directory in current.parent.iterdir():
        with contextlib.suppress(OSError):
            if directory != current and os.lstat(directory).st_mtime < time.time() - _UNUSED_SECONDS:
                shutil.rmtree(directory, ignore_errors=True)
