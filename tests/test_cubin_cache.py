"""The private directory, and the cache of CUDA kernels in it, under faults: every fault is a miss and one warning."""

import errno
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gpusoftmax.kernels import cache_directory
from gpusoftmax.kernels.cuda import cache

posix = pytest.mark.skipif(os.name != "posix", reason="owners, modes and links")
needs_cuda_core = pytest.mark.skipif(cache._version("cuda-core") == "none", reason="cuda.core stores the files")

PAYLOAD = bytes(range(256)) * 40


@pytest.fixture
def root(tmp_path, monkeypatch):
    """The cache directory, not yet made, of a process that has warned of nothing."""
    kernels = tmp_path / "kernels"
    (kernels / "cuda" / "device").mkdir(parents=True)
    (kernels / "formulas.py").write_text("shared = 1\n")
    (kernels / "cuda" / "device" / "softmax.py").write_text("rows = 1\n")
    monkeypatch.setattr(cache_directory, "KERNELS", kernels)
    monkeypatch.setenv("GPUSOFTMAX_CACHE_DIR", str(tmp_path / "cache"))
    new_process(monkeypatch)
    yield tmp_path / "cache"
    cache_directory.source_fingerprint.cache_clear()
    cache._open.cache_clear()


def new_process(monkeypatch):
    """Forget what a process remembers."""
    monkeypatch.setattr(cache_directory, "_warned", set())
    cache_directory.source_fingerprint.cache_clear()
    cache._open.cache_clear()


class warned:
    """Expect exactly so many warnings, all of them RuntimeWarning; `text` holds them."""

    def __init__(self, count):
        self.count = count

    def __enter__(self):
        self.catcher = warnings.catch_warnings(record=True)
        self.caught = self.catcher.__enter__()
        warnings.simplefilter("always")
        return self

    def __exit__(self, *failure):
        self.catcher.__exit__(*failure)
        self.text = " ".join(str(warning.message) for warning in self.caught)
        if failure == (None, None, None):
            assert [warning.category for warning in self.caught] == [RuntimeWarning] * self.count, self.text


# The directory


def test_directories_are_created_for_us_alone(root):
    mask = os.umask(0)
    try:
        directory = cache_directory.private_directory("cpu", "0123")
    finally:
        os.umask(mask)
    assert directory == root / "cpu" / "0123"
    if os.name == "posix":
        for created in (directory, *directory.parents[:2]):
            assert created.stat().st_mode & 0o777 == 0o700
    assert cache_directory.private_directory("cpu", "0123") == directory


def test_override_and_default(root, monkeypatch):
    monkeypatch.setenv("HOME", str(root.parent))
    monkeypatch.setenv("GPUSOFTMAX_CACHE_DIR", "~/mine")
    assert cache_directory.private_directory() == root.parent / "mine"
    monkeypatch.setenv("GPUSOFTMAX_CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(root.parent / "xdg"))
    assert "gpusoftmax" in cache_directory.private_directory("cuda").parts


def test_relative_override(root, monkeypatch):
    monkeypatch.chdir(root.parent)
    monkeypatch.setenv("GPUSOFTMAX_CACHE_DIR", "relative")
    assert cache_directory.private_directory() == root.parent / "relative"


def refused(reason, count=1):
    """Check that there is no directory, that this is said once, and that the kernel cache does without."""
    with warned(count) as given:
        assert cache_directory.private_directory("cuda") is None
        assert cache_directory.private_directory("cuda") is None
        assert cache.get("key") is None
        cache.put("key", PAYLOAD)
        assert cache.get("key") is None
    assert reason in given.text
    assert "GPUSOFTMAX_CACHE_DIR" in given.text


@posix
@pytest.mark.parametrize("which", ["cache", "cache/cuda"])
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702, 0o1777])
def test_shared_directory(root, which, mode):
    (root / "cuda").mkdir(parents=True, mode=0o700)
    root.chmod(0o700)
    (root.parent / which).chmod(mode)
    refused("can be written by other users")


@posix
@pytest.mark.parametrize("which", ["cache", "cache/cuda"])
def test_symbolic_link(root, which):
    cache_directory.private_directory("cuda")
    (root.parent / which).rename(root.parent / "elsewhere")
    (root.parent / which).symlink_to(root.parent / "elsewhere")
    refused("is a symbolic link")


@posix
def test_dangling_link(root):
    root.symlink_to(root.parent / "nowhere")
    refused("is a symbolic link")


@posix
def test_directory_of_somebody_else(root, monkeypatch):
    cache_directory.private_directory("cuda")
    euid = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: euid + 1)
    refused("belongs to another user")


def test_file_in_the_place_of_the_directory(root):
    root.write_text("")
    refused("is not a directory")


def test_file_in_the_place_of_a_parent(root, monkeypatch):
    (root.parent / "file").write_text("")
    monkeypatch.setenv("GPUSOFTMAX_CACHE_DIR", str(root.parent / "file" / "cache"))
    refused(os.strerror(errno.ENOTDIR))


@pytest.mark.parametrize("code", [errno.EACCES, errno.ENOSPC, errno.EROFS])
def test_directory_that_cannot_be_created(root, monkeypatch, code):
    def mkdir(*arguments, **keywords):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    refused(os.strerror(code))


def test_directory_that_cannot_be_written(root, monkeypatch):
    cache_directory.private_directory("cuda")
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)  # chmod does not bind root
    refused("cannot be written")


@posix
@pytest.mark.parametrize("home", [None, "relative"])
def test_user_without_a_home(root, monkeypatch, home):
    import pwd

    def getpwuid(uid):
        raise KeyError(uid)

    for name in ("GPUSOFTMAX_CACHE_DIR", "HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    if home is not None:
        monkeypatch.setenv("HOME", home)
    monkeypatch.chdir(root.parent)
    before = set(root.parent.rglob("*"))
    monkeypatch.setattr(pwd, "getpwuid", getpwuid)
    refused("no home directory")
    assert set(root.parent.rglob("*")) == before  # no directory called ~


@posix
def test_home_that_is_unset_or_missing(root, monkeypatch):
    import pwd

    monkeypatch.delenv("GPUSOFTMAX_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    home = pwd.struct_passwd(("user", "x", os.geteuid(), 0, "", str(root.parent), ""))
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: home)
    assert root.parent in cache_directory.private_directory("cuda").parents
    (root.parent / "file").write_text("")
    monkeypatch.setenv("HOME", str(root.parent / "file"))
    refused("cannot be created")


def test_sources_are_found():
    for target in ("cpu", "cuda"):
        names = {path.relative_to(cache_directory.KERNELS).as_posix() for path in cache_directory._sources(target)}
        assert {"cache_directory.py", f"{target}/cache.py"} <= names
        assert not any("__pycache__" in name for name in names)


def test_each_reason_is_given_once(root):
    with warned(2):
        for _ in range(2):
            cache_directory.warn_once("one", "text")
            cache_directory.warn_once("two", "text")


def test_fingerprint_depends_on_names_bytes_and_versions(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"ab")
    two.write_bytes(b"c")
    fingerprints = {cache_directory.fingerprint([one, two], "1", "2")}
    assert cache_directory.fingerprint([two, one], "1", "2") in fingerprints
    fingerprints.add(cache_directory.fingerprint([one, two], "12"))
    fingerprints.add(cache_directory.fingerprint([one, two], "2", "1"))
    fingerprints.add(cache_directory.fingerprint([one], "1", "2"))
    one.write_bytes(b"a")
    two.write_bytes(b"bc")
    fingerprints.add(cache_directory.fingerprint([one, two], "1", "2"))
    two.rename(tmp_path / "three")
    fingerprints.add(cache_directory.fingerprint([one, tmp_path / "three"], "1", "2"))
    assert len(fingerprints) == 6


# The keys


def a_key():
    return cache.key("softmax.softmax_rows", ("*bfloat16", "i64", "f32"), "sm_90", "ptx")


def test_keys_differ_in_every_argument(root):
    keys = {
        a_key(),
        cache.key("softmax.softmax", ("*bfloat16", "i64", "f32"), "sm_90", "ptx"),
        cache.key("softmax.softmax_rows", ("*bfloat16", "i64", "f64"), "sm_90", "ptx"),
        cache.key("softmax.softmax_rows", ("*bfloat16", "i64f32"), "sm_90", "ptx"),
        cache.key("softmax.softmax_rows", ("*bfloat16", "i64", "f32"), "sm_80", "ptx"),
        cache.key("softmax.softmax_rows", ("*bfloat16", "i64", "f32"), "sm_90", "cubin"),
    }
    assert len(keys) == 6
    assert all(len(key) == 64 for key in keys)
    assert a_key() in keys


def test_keys_differ_with_sources_and_versions(root, monkeypatch):
    keys = [a_key()]
    for name in ("formulas.py", "cuda/device/softmax.py", "cuda/plan.py"):
        with open(cache_directory.KERNELS / name, "a") as file:
            file.write("# edited\n")
        assert a_key() == keys[-1]  # hashed once per process
        new_process(monkeypatch)
        keys.append(a_key())
    versions = cache._versions()
    versions = tuple(version.replace(" none", " 1") for version in versions)  # as if all were installed
    for name in ("numba-cuda", "nvidia-nvvm", "nvidia-nvjitlink", "cuda-core"):
        (number,) = [number for number, version in enumerate(versions) if version.startswith(name + " ")]
        changed = versions[:number] + (f"{name} none",) + versions[number + 1 :]
        monkeypatch.setattr(cache, "_versions", lambda changed=changed: changed)
        keys.append(a_key())
    assert len(set(keys)) == 8
    assert cache._version("no-such-distribution") == "none"


@needs_cuda_core
def test_sources_edited_under_a_running_process(root):
    key = a_key()
    (cache_directory.KERNELS / "formulas.py").write_text("shared = 2\n")
    cache.put(key, PAYLOAD)
    assert cache.get(key) is None


def test_sources_that_cannot_be_read(root):
    (cache_directory.KERNELS / "formulas.py").unlink()
    with warned(1) as given:
        key = a_key()
        cache.put(key, PAYLOAD)
        assert cache.get(key) is None
    assert "cannot read their sources" in given.text


def test_a_hit_imports_no_numba(root):
    program = (
        "import sys\n"
        "from gpusoftmax.kernels.cuda import cache\n"
        "assert 'cuda.core' not in sys.modules\n"
        "key = cache.key('softmax.softmax_rows', (), 'sm_90', 'cubin')\n"
        "cache.put(key, b'cubin')\n"
        "print(cache.get(key), 'numba' in sys.modules)\n"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert output.returncode == 0, output.stderr
    if cache._version("cuda-core") != "none":
        assert (output.stdout, output.stderr) == ("b'cubin' False\n", "")


# The entries


@pytest.fixture
def entry(root):
    """The file of the one entry, "key"."""
    cache.put("key", PAYLOAD)
    (path,) = files(root)
    return path


def files(root):
    return [path for path in root.rglob("*") if path.is_file()]


@needs_cuda_core
def test_second_process_reads_what_the_first_put(root, monkeypatch):
    with warned(0):
        assert cache.get("key") is None
        cache.put("key", PAYLOAD)
        cache.put("empty", b"")
        new_process(monkeypatch)
        assert cache.get("key") == PAYLOAD
        assert cache.get("empty") == b""
        cache.put("key", b"newer")
        assert cache.get("key") == b"newer"
        assert cache.get("other") is None
    for path in files(root):
        assert os.name != "posix" or path.stat().st_mode & 0o777 == 0o600


def faults(content):
    """Every kind of damage: (name, what is then in the file)."""
    size = len(content)
    for kept in sorted({0, 1, 31, 32, 33, size - 1, *range(0, size, size // 14)}):
        yield f"truncated to {kept}", content[:kept]
    for position in sorted({0, 31, 32, 33, size - 1, *range(0, size, size // 55)}):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        yield f"bit flipped in byte {position}", bytes(flipped)
    yield "one byte more", content + b"\0"
    yield "zeros", bytes(size)
    yield "pickle", pickle.dumps(PAYLOAD)


@needs_cuda_core
def test_damaged_entries_are_deleted(root, entry, monkeypatch):
    sound = entry.read_bytes()
    damages = list(faults(sound))
    assert len(damages) >= 75
    for name, damaged in damages:
        entry.write_bytes(damaged)
        new_process(monkeypatch)
        with warned(1) as given:
            assert cache.get("key") is None, name
            assert not entry.exists(), name
            cache.put("other", PAYLOAD)
            cache.get("other")
        assert "damaged" in given.text
        with warned(0):
            cache.put("key", PAYLOAD)
            assert cache.get("key") == PAYLOAD
    assert entry.read_bytes() == sound


@needs_cuda_core
def test_damage_is_warned_of_once(root, entry):
    cache.put("second", PAYLOAD)
    for path in files(root):
        path.write_bytes(b"garbage")
    with warned(1):
        assert cache.get("key") is None
        assert cache.get("second") is None
    assert files(root) == []


@needs_cuda_core
def test_directory_in_the_place_of_an_entry(root, entry):
    entry.unlink()
    entry.mkdir()
    with warned(2):  # can neither be read nor replaced
        for _ in range(2):
            assert cache.get("key") is None
            cache.put("key", PAYLOAD)


@needs_cuda_core
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_entries_that_cannot_be_saved(root, monkeypatch, code, call):
    def fail(*arguments, **keywords):
        raise OSError(code, os.strerror(code))

    with warned(1) as given, monkeypatch.context() as patched:
        patched.setattr(os, call, fail)
        cache.put("key", PAYLOAD)
        cache.put("key", PAYLOAD)
    assert os.strerror(code) in given.text
    assert files(root) == []
    with warned(0):
        assert cache.get("key") is None
        cache.put("key", PAYLOAD)
        assert cache.get("key") == PAYLOAD


@needs_cuda_core
def test_entries_that_cannot_be_read(root, entry, monkeypatch):
    def read_bytes(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with warned(1) as given, monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", read_bytes)
        assert cache.get("key") is None
        assert cache.get("key") is None
    assert "PermissionError" in given.text
    assert cache.get("key") == PAYLOAD  # not deleted: nothing is wrong with it


@needs_cuda_core
def test_cuda_core_that_does_not_import(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.core.utils", None)
    with warned(2):
        for _ in range(2):
            assert cache.get("key") is None
            cache.put("key", PAYLOAD)


@needs_cuda_core
def test_directory_deleted_under_a_running_process(root, entry):
    shutil.rmtree(root)
    with warned(0):
        assert cache.get("key") is None
        cache.put("key", PAYLOAD)
        assert cache.get("key") == PAYLOAD


@needs_cuda_core
def test_size_is_bounded(root, monkeypatch):
    monkeypatch.setattr(cache, "_MAX_BYTES", 5 * len(PAYLOAD))
    for number in range(20):
        cache.put(str(number), PAYLOAD)
    assert sum(path.stat().st_size for path in files(root)) <= 5 * len(PAYLOAD)
    assert cache.get("19") == PAYLOAD


@needs_cuda_core
def test_threads_that_fill_the_cache_at_once(root):
    def use(number):
        key, payload = str(number % 4), PAYLOAD + bytes([number % 4])
        found = cache.get(key)
        cache.put(key, payload)
        return found in (None, payload) and cache.get(key) == payload

    with warned(0), ThreadPoolExecutor(24) as threads:
        assert all(threads.map(use, range(480)))
    assert len(files(root)) == 4


@needs_cuda_core
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_processes_that_fill_the_cache_at_once(root):
    program = """
import multiprocessing
from gpusoftmax.kernels.cuda import cache

def fill():
    together.wait()
    for number in range(40):
        key, payload = str(number % 4), bytes([number % 4]) * 100_000
        assert cache.get(key) in (None, payload)
        cache.put(key, payload)
        assert cache.get(key) == payload

import cuda.core.utils  # here and not in every child
context = multiprocessing.get_context("fork")
together = context.Barrier(8)
processes = [context.Process(target=fill) for _ in range(8)]
for process in processes:
    process.start()
for process in processes:
    process.join()
print([process.exitcode for process in processes])
"""
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", program]
    output = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert output.stdout == f"{[0] * 8}\n", output.stderr
    assert len(files(root)) == 4
