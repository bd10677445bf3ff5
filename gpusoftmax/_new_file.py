"""Writing a file that appears complete or not at all."""

import contextlib
import errno
import io
import os
import secrets
import shutil
import stat
from collections.abc import Iterator

from gpusoftmax._progress import size_text


def check_output(path: str, sources: list[io.FileIO], force: bool) -> None:
    """Refuse early what `new_file` would refuse after hours of work; and an input, which --force cannot mean."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        if not os.path.basename(path):
            raise ValueError(f"{path}: a directory, expected a file name") from None
        return
    if not stat.S_ISREG(status.st_mode):  # nor a link: what it points to would not be written, but the link replaced
        raise ValueError(f"{path}: exists and is not a regular file")
    if any(os.path.samestat(status, os.fstat(source.fileno())) for source in sources):
        raise ValueError(f"{path}: is the input itself, expected another file")
    if not force:
        raise FileExistsError(errno.EEXIST, "exists (--force replaces it)", path)


def check_space(path: str, wanted: int) -> None:
    directory = os.path.dirname(path) or "."
    free = shutil.disk_usage(directory).free
    if wanted > free:
        raise OSError(
            errno.ENOSPC, f"too little disk: needs {size_text(wanted)}, {size_text(free)} are free", directory
        )


@contextlib.contextmanager
def new_file(path: str, force: bool) -> Iterator[io.FileIO]:
    """A file that appears under `path` when the block ends, whole and on the disk, and not at all if it raises."""
    directory = os.path.dirname(path) or "."
    temporary = os.path.join(directory, f".gpusoftmax-{secrets.token_hex(8)}.tmp")
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    try:
        with open(os.open(temporary, flags, 0o666), "r+b", buffering=0) as file:
            yield file
            os.fsync(file.fileno())
        _publish(temporary, path, force)
    except BaseException:  # interrupts too
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync_directory(directory)


def _publish(temporary: str, path: str, force: bool) -> None:
    """Give the file its name in one step; without `force` only if nobody has that name, not even since we looked."""
    if not force:
        try:
            os.link(temporary, path)
            os.unlink(temporary)
            return
        except FileExistsError:
            raise FileExistsError(errno.EEXIST, "exists (--force replaces it)", path) from None
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                raise
        # A file system without hard links: take the name with an empty file, which is then ours to replace.
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        try:
            os.replace(temporary, path)
        except BaseException:
            os.unlink(path)
            raise
    else:
        os.replace(temporary, path)


def _sync_directory(directory: str) -> None:
    """Make the new name survive a power cut, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
