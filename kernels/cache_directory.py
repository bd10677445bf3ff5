"""The private directory in which compiled kernels may be kept between processes, and what decides if they still fit.

An entry of either cache (kernels/cpu/cache.py, kernels/cuda/cache.py) is machine code that will be run: whoever can
write it can run anything as this user. So a directory is used only if nobody else can write it, and is otherwise
done without: kernels are then compiled in every process, with one warning.
"""

import functools
import hashlib
import os
import stat
import threading
import warnings
from collections.abc import Iterable
from pathlib import Path

import platformdirs

KERNELS = Path(__file__).resolve().parent
"""The directory of gpusoftmax.kernels, installed or in the repository."""

_warned: set[str] = set()
_warned_lock = threading.Lock()


class _Refused(Exception):
    """A directory that must not be used; the text ends the sentence that begins with its path."""


def warn_once(reason: str, message: str) -> None:
    """Issue a RuntimeWarning, the first time that `reason` is given in this process."""
    with _warned_lock:
        if reason in _warned:
            return
        _warned.add(reason)
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def private_directory(*names: str) -> Path | None:
    """Return the subdirectory `names` of the user's cache directory, created 0700; None, warned of once, if unsafe.

    The cache directory is `GPUSOFTMAX_CACHE_DIR`, or the platform's own (~/.cache/gpusoftmax on Linux). It and every
    directory below it on the way must be a writable directory of this user that no other user can write.
    """
    directory = Path("~/.cache/gpusoftmax")
    try:
        directory = _cache_directory()
        _make_private(directory)
        for name in names:
            directory = directory / name
            _make_private(directory)
    except _Refused as refused:
        reason = str(refused)
    except OSError as error:
        reason = f"cannot be created ({error.strerror or error})"
    else:
        return directory
    warn_once(
        f"directory {reason}",
        f"gpusoftmax compiles its kernels anew in every process, because its cache directory {directory} {reason}. "
        "Set GPUSOFTMAX_CACHE_DIR to a directory that only you can write.",
    )
    return None


def prepared_directory(*names: str) -> Path | None:
    """Return the subdirectory `names` of `GPUSOFTMAX_CACHE_PATH`, a cache directory that is only read.

    None if there is none; None, warned of once, if it is unsafe: it and the subdirectories must be readable directories
    of this user or of root that nobody else can write.
    """
    chosen = os.environ.get("GPUSOFTMAX_CACHE_PATH")
    if not chosen:
        return None
    directory = Path(os.path.abspath(os.path.expanduser(chosen)))
    try:
        for name in ("", *names):
            directory = directory / name
            owners = {os.geteuid(), 0} if os.name == "posix" else set()
            _check(directory, owners, os.R_OK | os.X_OK, "cannot be read by this user (chmod -R a+rX lets all users)")
    except _Refused as refused:
        reason = str(refused)
    except OSError as error:
        reason = f"cannot be opened ({error.strerror or error})"
    else:
        return directory
    warn_once(
        f"prepared directory {reason}",
        f"gpusoftmax does not use the kernels of GPUSOFTMAX_CACHE_PATH, because {directory} {reason}.",
    )
    return None


def _cache_directory() -> Path:
    """Return where the environment wants the cache; the path need not exist."""
    chosen = os.environ.get("GPUSOFTMAX_CACHE_DIR")
    if chosen:
        return Path(os.path.abspath(os.path.expanduser(chosen)))
    try:
        directory = Path(platformdirs.user_cache_dir("gpusoftmax", appauthor=False))
    except RuntimeError:
        directory = None
    if directory is None or not directory.is_absolute():  # older platformdirs leave the ~ in place
        raise _Refused("cannot be found: this user has no home directory")
    return directory


def _make_private(directory: Path) -> None:
    """Create `directory` (0700, parents too) if missing; raise _Refused unless it is ours alone."""
    for missing in reversed([directory, *directory.parents]):
        if not os.path.lexists(missing):
            missing.mkdir(mode=0o700, exist_ok=True)  # another process may be first
    owners = {os.geteuid()} if os.name == "posix" else set()
    _check(directory, owners, os.R_OK | os.W_OK | os.X_OK, "cannot be written")


def _check(directory: Path, owners: set[int], access: int, without_access: str) -> None:
    """Raise _Refused unless it is a directory that one of `owners` alone can write, and that gives us `access`."""
    status = os.lstat(directory)
    if stat.S_ISLNK(status.st_mode):
        raise _Refused("is a symbolic link")
    if not stat.S_ISDIR(status.st_mode):
        raise _Refused("is not a directory")
    if os.name == "posix":  # Windows has neither owners nor modes here; its profile directories are private
        if status.st_uid not in owners:
            raise _Refused("belongs to another user")
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise _Refused("can be written by other users")
    if not os.access(directory, access):
        raise _Refused(without_access)


@functools.cache
def source_fingerprint(target: str) -> str | None:
    """Return the fingerprint of all sources of `target` ("cpu" or "cuda") as of the first call, None if unreadable."""
    try:
        return fingerprint(_sources(target))
    except OSError as error:
        warn_once(
            f"sources {target}",
            f"gpusoftmax compiles its kernels anew in every process, because it cannot read their sources: {error}",
        )
        return None


def sources_unchanged(target: str) -> bool:
    """Tell whether `source_fingerprint` still holds.

    A process whose sources were edited or upgraded after it imported some of them runs neither the old code nor, for
    certain, the new: it must not keep what it compiles under the name of either.
    """
    try:
        return fingerprint(_sources(target)) == source_fingerprint(target)
    except OSError:
        return False


def _sources(target: str) -> list[Path]:
    """Return every file that code compiled for `target` can depend on."""
    shared = list(KERNELS.glob("*.py"))
    if not shared:  # in a zip archive: with nothing to hash, nothing would ever be found stale
        raise FileNotFoundError(f"no files in {KERNELS}")
    return shared + [path for path in (KERNELS / target).rglob("*") if path.is_file() and not _ignored(path)]


def _ignored(path: Path) -> bool:
    parts = path.relative_to(KERNELS).parts
    return "__pycache__" in parts or any(part.startswith(".") for part in parts)


def fingerprint(paths: Iterable[Path], *versions: str) -> str:
    """Return the sha256, in hexadecimal, of the files' names (relative to kernels/) and bytes, and of `versions`."""
    digest = hashlib.sha256()
    for name, path in sorted((os.path.relpath(path, KERNELS), path) for path in paths):
        _add(digest, name.encode())
        _add(digest, path.read_bytes())
    for version in versions:
        _add(digest, version.encode())
    return digest.hexdigest()


def _add(digest, part: bytes) -> None:
    """Add one part behind its length: "ab" + "c" is not "a" + "bc"."""
    digest.update(len(part).to_bytes(8, "little"))
    digest.update(part)
