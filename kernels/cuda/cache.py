"""Compiled CUDA kernels (PTX and cubins) kept on disk between processes.

`cuda.core` stores the files: atomically, within a size bound, without pickle. It does not notice damage, so a value is

    sha256(payload), payload

and one that does not match is deleted, warned of once, and counts as missing. No fault of the cache reaches the caller:
at worst a kernel is compiled. Neither finding nor reading an entry imports Numba.
"""

import contextlib
import functools
import hashlib
import sys
from importlib import metadata
from pathlib import Path

from gpusoftmax.kernels.cache_directory import (
    fingerprint,
    prepared_directory,
    private_directory,
    source_fingerprint,
    sources_unchanged,
    warn_once,
)

_DIGEST_BYTES = hashlib.sha256().digest_size
_MAX_BYTES = 256 * 2**20
"""A few thousand kernels; those not read for the longest are deleted first."""
_COMPILERS = (
    ("numba-cuda", "numba", "llvmlite", "cuda-core")
    + ("nvidia-nvvm", "nvidia-nvjitlink")
    + ("nvidia-cuda-nvcc-cu12", "nvidia-nvjitlink-cu12")  # the same two for CUDA 12
)
"""The distributions whose version decides the code."""


def key(kernel: str, signature: tuple[str, ...], arch: str, kind: str) -> str:
    """Return the name under which a compiled kernel is kept; "" if none is safe, which `get` and `put` understand.

    Parameters
    ----------
    kernel : str
        Module and function, as in "softmax.softmax_rows".
    signature : tuple of str
        The specialisation.
    arch : str
        As in "sm_90".
    kind : str
        "ptx" or "cubin".
    """
    sources = source_fingerprint("cuda")
    return fingerprint([], sources, *_versions(), kernel, *signature, arch, kind) if sources else ""


def get(key: str) -> bytes | None:
    """Return what was put under `key`, None if it is missing or damaged.

    A directory that somebody has prepared (`gpusoftmax compile`) is searched first, and never written to.
    """
    return _get(key, _prepared, deletes=False) or _get(key, _store, deletes=True) if key else None


def _get(key: str, find_store, deletes: bool) -> bytes | None:
    try:
        store = find_store()
        stored = None if store is None else store.get(key)
        if stored is None:
            return None
        digest, payload = stored[:_DIGEST_BYTES], stored[_DIGEST_BYTES:]
        if hashlib.sha256(payload).digest() == digest:
            return payload
        if deletes:
            with contextlib.suppress(KeyError):  # another process was faster
                del store[key]
        problem = f"{'deleted' if deletes else 'found'} a damaged entry {'of' if deletes else 'in'} its kernel cache"
    except Exception as error:
        problem = f"could not read its kernel cache ({type(error).__name__}: {error})"
    warn_once("cuda cache: get", f"gpusoftmax {problem} and compiles the kernel anew.")
    return None


def put(key: str, payload: bytes) -> None:
    """Keep `payload` under `key`, if that is possible."""
    try:
        store = _store() if key and sources_unchanged("cuda") else None
        if store is not None:  # an empty one is false
            store[key] = hashlib.sha256(payload).digest() + payload
        return
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    warn_once(
        "cuda cache: put",
        f"gpusoftmax could not keep a compiled kernel, which will be compiled anew by the next process ({problem}).",
    )


def _store():
    """Return cuda.core's cache in our directory, None if there is no such directory."""
    directory = private_directory("cuda")
    return _open(directory, _MAX_BYTES) if directory else None


def _prepared():
    """Return cuda.core's cache in the directory that was prepared, None if there is none."""
    directory = prepared_directory("cuda")
    return _open(directory, None) if directory else None


@functools.cache
def _open(directory: Path, max_bytes: int | None):
    from cuda.core.utils import FileStreamProgramCache  # needs no driver, but half a second

    return FileStreamProgramCache(directory, max_size_bytes=max_bytes)


@functools.cache
def _versions() -> tuple[str, ...]:
    return (f"python {sys.version}", *(f"{name} {_version(name)}" for name in _COMPILERS))


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "none"
