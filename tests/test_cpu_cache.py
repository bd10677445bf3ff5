"""The disk cache of the CPU kernels under faults: no crash, no wrong result, nothing executed, one warning."""

import errno
import hashlib
import importlib.util
import itertools
import os
import pickle
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gpusoftmax.kernels import cache_directory
from gpusoftmax.kernels.cpu import cache

TOY = """
from gpusoftmax.kernels.cpu.cache import device, kernel

@device
def square(x):
    return x * x

@kernel
def combine(x, y):
    return square(x) + 2 * y
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The path of a kernel module, in a world of its own: cache, sources, and warnings not yet given."""
    kernels = tmp_path / "kernels"
    (kernels / "cpu").mkdir(parents=True)
    (kernels / "formulas.py").write_text("shared = 1\n")
    (kernels / "cpu" / "softmax.py").write_text("rows = 1\n")
    monkeypatch.setattr(cache_directory, "KERNELS", kernels)
    monkeypatch.setenv("GPUSOFTMAX_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "toy.py"
    path.write_text(TOY)
    new_process(monkeypatch)
    yield path
    sys.modules.pop("toy", None)
    cache_directory.source_fingerprint.cache_clear()


def new_process(monkeypatch):
    """Forget what a process remembers."""
    monkeypatch.setattr(cache_directory, "_warned", set())
    cache_directory.source_fingerprint.cache_clear()


def imported(path):
    """Import the module anew: its kernels have compiled nothing yet."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def combine(path, expect_hit=False, expect_warnings=0):
    """Call the kernel of a newly imported module and check everything that can be seen from outside."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kernel = imported(path).combine
        assert kernel(3.0, 4.0) == 17.0
    assert [warning.category for warning in caught] == [RuntimeWarning] * expect_warnings, [str(w) for w in caught]
    assert bool(kernel.stats.cache_hits) == expect_hit
    return str(caught[0].message) if caught else None


def entries(path):
    return sorted((path.parent / "cache").rglob("*.bin"))


def warm(path):
    """Fill the cache and return its one entry."""
    combine(path)
    (entry,) = entries(path)
    return entry


def test_second_process_loads_what_the_first_compiled(toy):
    entry = warm(toy)
    combine(toy, expect_hit=True)
    assert entries(toy) == [entry]
    if os.name == "posix":
        assert entry.stat().st_mode & 0o777 == 0o600
        for directory in entry.parents[:3]:
            assert directory.stat().st_mode & 0o777 == 0o700
    assert list(entry.parent.iterdir()) == [entry]


def test_argument_types_have_their_own_entries(toy):
    warm(toy)
    assert imported(toy).combine(3, 4) == 17
    assert len(entries(toy)) == 2
    combine(toy, expect_hit=True)


@pytest.fixture
def load(toy, monkeypatch):
    """A function that loads the entry of `combine` as a new process would, and does not compile it: None for a miss."""
    kernel = imported(toy).combine
    kernel(3.0, 4.0)
    (result,) = kernel.overloads.values()

    def load(expect_warnings):
        new_process(monkeypatch)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            cached = imported(toy).combine._cache
            loaded = [cached.load_overload(result.signature.args, result.target_context) for _ in range(2)]
        assert [warning.category for warning in caught] == [RuntimeWarning] * expect_warnings
        assert (loaded[0] is None) == (loaded[1] is None)
        return loaded[0]

    return load


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
    yield "garbage", hashlib.shake_256(b"garbage").digest(size)
    yield "another file", b"#!/bin/sh\n"


def test_damaged_entries_are_replaced(toy, load, monkeypatch):
    (entry,) = entries(toy)
    sound = entry.read_bytes()
    assert load(expect_warnings=0) is not None
    damages = list(faults(sound))
    assert len(damages) >= 75
    for name, damaged in damages:
        entry.write_bytes(damaged)
        assert load(expect_warnings=1) is None, name
        assert not entry.exists(), name
    # And the whole way for a few.
    for name, damaged in damages[::30]:
        entry.write_bytes(damaged)
        new_process(monkeypatch)
        assert "damaged entry" in combine(toy, expect_warnings=1), name
        combine(toy, expect_hit=True)
        assert entries(toy) == [entry]


class Executed:
    """Creates a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def planted_entries(entry, signature_of_entry, marker):
    """What somebody who does not know how entries are signed could put in the place of one."""
    payload = pickle.dumps(([], Executed(marker)))
    digest = hashlib.sha256
    yield payload
    yield pickle.dumps("0.68.1") + payload  # the layout of Numba's own index
    for signature in (
        bytes(32),
        b"\xff" * 32,
        digest(b"").digest(),
        digest(payload).digest(),
        digest(payload + entry.name.encode()).digest(),
        digest(payload).hexdigest().encode(),
        digest(b"other.bin" + payload).digest(),
        signature_of_entry,
    ):
        yield signature + payload


def test_planted_pickles_are_not_executed(toy, load, tmp_path):
    (entry,) = entries(toy)
    sound = entry.read_bytes()
    marker = tmp_path / "executed"
    pickle.loads(pickle.dumps(Executed(marker)))
    assert marker.exists()  # the trap works
    marker.unlink()
    planted = list(planted_entries(entry, sound[:32], marker))
    assert len(planted) == 10
    for content in planted:
        entry.write_bytes(content)
        assert load(expect_warnings=1) is None
        assert not marker.exists()
    combine(toy)


@pytest.mark.skipif(os.name != "posix", reason="links and owners")
def test_entries_that_are_not_our_files(toy, monkeypatch, tmp_path):
    entry = warm(toy)
    elsewhere = tmp_path / "elsewhere"
    entry.rename(elsewhere)
    entry.symlink_to(elsewhere)
    assert "not a file of this user" in combine(toy, expect_warnings=1)
    assert elsewhere.exists()
    assert not entry.is_symlink()

    new_process(monkeypatch)
    entry.unlink()
    entry.mkdir()
    combine(toy, expect_warnings=2)  # can neither be loaded nor replaced
    entry.rmdir()

    new_process(monkeypatch)
    combine(toy)
    lstat = os.lstat

    def foreign(path, **keywords):
        status = lstat(path, **keywords)
        if Path(path) == entry:
            status = os.stat_result((*status[:4], os.geteuid() + 1, *status[5:]))
        return status

    monkeypatch.setattr(os, "lstat", foreign)
    assert "not a file of this user" in combine(toy, expect_warnings=1)


@pytest.mark.parametrize(
    "payload", [b"", b"not a pickle", pickle.dumps(None), pickle.dumps(([], ())), b"cno_such_module\nname\n."]
)
def test_well_signed_entries_that_do_not_load(toy, load, payload):
    (entry,) = entries(toy)
    entry.write_bytes(cache._digest(entry, payload) + payload)
    assert load(expect_warnings=1) is None
    assert not entry.exists()


def test_entry_of_another_signature_is_not_taken(toy):
    entry = warm(toy)
    imported(toy).combine(3, 4)
    (other,) = set(entries(toy)) - {entry}
    entry.write_bytes(other.read_bytes())
    combine(toy, expect_warnings=1)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("call", ["mkstemp", "write", "replace"])
def test_entries_that_cannot_be_saved(toy, monkeypatch, code, call):
    def fail(*arguments, **keywords):
        raise OSError(code, os.strerror(code))

    def fdopen(handle, mode):
        file = open(handle, mode)  # noqa: SIM115
        return FullDisk(file)

    class FullDisk:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, content):
            self.file.write(content[:100])
            fail()

    with monkeypatch.context() as patched:
        if call == "write":
            patched.setattr(cache.os, "fdopen", fdopen)
        else:
            patched.setattr(cache.tempfile if call == "mkstemp" else cache.os, call, fail)
        message = combine(toy, expect_warnings=1)
        combine(toy)  # not warned of again
    assert os.strerror(code) in message
    assert [path for path in (toy.parent / "cache").rglob("*") if path.is_file()] == []


@pytest.mark.skipif(os.name != "posix", reason="modes")
@pytest.mark.parametrize("directory", ["cache", "cache/cpu"])
def test_shared_directories_are_not_used(toy, directory):
    entry = warm(toy)
    (toy.parent / directory).chmod(0o777)
    assert "can be written by other users" in combine(toy, expect_warnings=1)
    (toy.parent / directory).chmod(0o700)
    combine(toy, expect_hit=True)
    assert entries(toy) == [entry]


def test_file_in_the_place_of_the_directory(toy):
    (toy.parent / "cache").write_text("")
    assert "is not a directory" in combine(toy, expect_warnings=1)
    combine(toy)


def test_edited_sources_are_another_version(toy, monkeypatch):
    warm(toy)
    directories = {cache._directory()}
    for edited in ("formulas.py", "cpu/softmax.py", "cpu/table.json"):
        path = cache_directory.KERNELS / edited
        path.write_text((path.read_text() if path.exists() else "") + "# edited\n")
        new_process(monkeypatch)
        directories.add(cache._directory())
    assert len(directories) == 4
    combine(toy)
    toy.write_text("# edited" + TOY)
    combine(toy)
    combine(toy, expect_hit=True)
    assert len(entries(toy)) == 3


def test_bytecode_and_editor_files_are_not_sources(toy, monkeypatch):
    warm(toy)
    (cache_directory.KERNELS / "cpu" / "__pycache__").mkdir()
    (cache_directory.KERNELS / "cpu" / "__pycache__" / "softmax.pyc").write_text("")
    (cache_directory.KERNELS / "cpu" / ".softmax.py.swp").write_text("")
    new_process(monkeypatch)
    combine(toy, expect_hit=True)


def test_sources_edited_under_a_running_process(toy):
    entry = warm(toy)
    kernel = imported(toy).combine
    (cache_directory.KERNELS / "formulas.py").write_text("shared = 2\n")
    assert kernel(3.0, 4.0) == 17.0
    assert not kernel.stats.cache_hits
    assert entries(toy) == [entry]


def test_sources_that_cannot_be_read(toy):
    for path in cache_directory.KERNELS.glob("*.py"):
        path.unlink()
    assert "cannot read their sources" in combine(toy, expect_warnings=1)
    assert entries(toy) == []


def test_another_compiler_is_another_version(toy, monkeypatch):
    compiler = cache._compiler()
    directories = {cache._directory()}
    for number in range(len(compiler)):
        changed = compiler[:number] + (compiler[number] + "0",) + compiler[number + 1 :]
        monkeypatch.setattr(cache, "_compiler", lambda changed=changed: changed)
        directories.add(cache._directory())
    assert len(directories) == 1 + len(compiler)


def test_compiler_names_what_decides_the_code(monkeypatch):
    described = "\n".join(cache._compiler())
    for word in ("python", "numba", "llvmlite", "cpu", "CPU_NAME", "CPU_FEATURES"):
        assert word in described
    before = cache._compiler.__wrapped__()
    monkeypatch.setattr(cache.config, "CPU_NAME", "generic")
    assert cache._compiler.__wrapped__() != before


def test_versions_that_nobody_uses_are_deleted(toy):
    versions = toy.parent / "cache" / "cpu"
    now = time.time()
    for name, days in (("old", 40), ("recent", 20)):
        (versions / name).mkdir(parents=True)
        (versions / name / "entry.bin").write_text("")
        os.utime(versions / name, (now, now - days * 24 * 3600))
    for directory in (versions, versions.parent):
        directory.chmod(0o700)
    combine(toy)
    assert not (versions / "old").exists()
    assert (versions / "recent").exists()
    (current,) = set(versions.iterdir()) - {versions / "recent"}
    os.utime(current, (0, 0))
    combine(toy, expect_hit=True)
    assert current.stat().st_mtime > now - 3600  # in use


def test_only_functions_of_a_module_are_kernels():
    factor = 2.0

    def scale(x):
        return factor * x

    with pytest.raises(TypeError, match="top of a module"):
        cache.kernel(scale)


def test_kernels_without_a_source_file(toy):
    namespace = {"__name__": "typed_in"}
    exec(compile(TOY, "<stdin>", "exec"), namespace)
    assert namespace["combine"](3.0, 4.0) == 17.0
    assert entries(toy) == []


def test_functions_as_arguments_are_not_kept(toy):
    module = imported(toy)
    toy.write_text(TOY + "\n@kernel\ndef apply(f, x):\n    return f(x)\n")
    module = imported(toy)
    assert module.apply(module.square, 3.0) == 9.0
    assert entries(toy) == []


@pytest.mark.parametrize("call", ["softmax(x)", "logsumexp(x)", "cross_entropy(x, [0])"])
def test_without_a_compiler_calls_say_so(toy, call):
    """They are of no use to a program that switches the compiler off for the sake of its own functions."""
    program = f"""
import numpy, gpusoftmax
x = numpy.zeros((1, 5), numpy.float32)
try:
    gpusoftmax.{call}
except RuntimeError as error:
    print(error)
"""
    assert "NUMBA_DISABLE_JIT" in run(program, toy, NUMBA_DISABLE_JIT="1")
    assert entries(toy) == []


def run(program, toy, **environment):
    """Run a program in a new process, with every warning an error, and return its output."""
    process = start(program, toy, **environment)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return output


def start(program, toy, **environment):
    sources = f"cache_directory.KERNELS = __import__('pathlib').Path({str(cache_directory.KERNELS)!r})\n"
    program = "from gpusoftmax.kernels import cache_directory\n" + sources + program
    return subprocess.Popen(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=toy.parent,
        env={**os.environ, **environment},
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_processes_that_fill_the_cache_at_once(toy):
    program = """
import multiprocessing
from gpusoftmax.kernels.cpu import cache

def fill():
    import toy
    together.wait()
    assert (toy.combine(3.0, 4.0), toy.combine(3, 4), toy.combine(3, 4.0)) == (17, 17, 17)
    assert cold or len(toy.combine.stats.cache_hits) == 3

cache.device(lambda x: x + 1)(1)  # all that Numba imports, here and not in every child
context = multiprocessing.get_context("fork")
together = context.Barrier(8)
for cold in (True, False):
    processes = [context.Process(target=fill) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    print([process.exitcode for process in processes])
"""
    assert run(program, toy).splitlines() == [str([0] * 8)] * 2
    assert len(entries(toy)) == 3
    assert [path for path in entries(toy)[0].parent.iterdir() if path.suffix != ".bin"] == []
    combine(toy, expect_hit=True)


def test_process_killed_while_it_saves(toy):
    kill = "os.kill(os.getpid(), signal.SIGKILL)"
    process = start(f"import os, signal, toy\nos.replace = lambda *_: {kill}\ntoy.combine(3.0, 4.0)", toy)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert len([path for path in (toy.parent / "cache").rglob("*") if path.is_file()]) == 1
    assert entries(toy) == []
    combine(toy)
    combine(toy, expect_hit=True)


def test_loading_registers_only_the_symbols_that_are_missing(toy):
    """LLVM aborts the process when loaded code refers to a symbol that Numba has not registered yet."""
    toy.write_text(TOY + "\n@kernel\ndef copy(a):\n    return a.copy()\n")
    program = """
import sys
import toy
import numpy as np
print(toy.combine(3.0, 4.0))
print(toy.copy(np.arange(3.0)).sum())
print("numba.np.linalg" in sys.modules)
print(len(toy.combine.stats.cache_hits), len(toy.copy.stats.cache_hits))
print(toy.combine(3, 4))
"""
    assert run(program, toy).splitlines() == ["17.0", "3.0", "True", "0 0", "17"]
    assert run(program, toy).splitlines() == ["17.0", "3.0", "False", "1 1", "17"]


def test_an_interrupt_while_an_entry_is_loaded(toy):
    """It comes as LLVM asks for the code, where exceptions are dropped."""
    warm(toy)
    program = """
import signal
import toy
from numba.core.registry import cpu_target

engine = cpu_target.target_context.codegen()._engine._ee
ask = engine._object_cache_getbuffer
def interrupted(module):
    engine._object_cache_getbuffer = ask
    signal.raise_signal(signal.SIGINT)
    return ask(module)
engine._object_cache_getbuffer = interrupted
try:
    toy.combine(3.0, 4.0)
except KeyboardInterrupt:
    print("interrupted")
print(toy.combine(3.0, 4.0), len(toy.combine.stats.cache_hits))
"""
    assert run(program, toy).splitlines() == ["interrupted", "17.0 1"]


def test_symbols_that_only_all_of_numba_registers():
    class Context:
        refreshed = 0

        def refresh(self):
            self.refreshed += 1

    context = Context()
    cache.rtsys.initialize(cache.numba.core.registry.cpu_target.target_context)
    cache._register_symbols(["NRT_Allocate", "PyErr_SetString"], context)
    assert context.refreshed == 0
    cache._register_symbols(["PyErr_SetString", "no_such_symbol"], context)
    assert context.refreshed == 1


def test_threads_that_compile_at_once(toy):
    kernel = imported(toy).combine
    arguments = list(itertools.product((3, 3.0), (4, 4.0))) * 6
    with ThreadPoolExecutor(24) as threads:
        assert list(threads.map(lambda pair: kernel(*pair), arguments)) == [17] * 24
    assert len(entries(toy)) == 4
    combine(toy, expect_hit=True)
