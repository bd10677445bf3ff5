"""gpusoftmax normalize: the library's bits from files of any size, and one clear line and no trace when it fails."""

import errno
import io
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import gpusoftmax
from gpusoftmax import _info, _normalize, _npy, cli

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
OPERATIONS = {"softmax": gpusoftmax.softmax, "log_softmax": gpusoftmax.log_softmax}


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def logits(shape, dtype="float32", seed=0):
    return np.asarray(np.random.default_rng(seed).normal(size=shape) * 5).astype(dtype)


def normalize(*arguments, op="softmax"):
    return cli.main(["normalize", "in.npy", "out.npy", "--op", op, *arguments])


def fails(capsys, *arguments, code=2):
    """Run it; it must fail with one line, which is returned, and leave nothing behind."""
    before = {name: os.lstat(name) for name in os.listdir()}
    assert normalize(*arguments) == code
    output, message = capsys.readouterr()
    assert output == ""
    assert message.startswith("gpusoftmax normalize: ") and message.count("\n") == 1 and len(message) < 600, message
    after = {name: os.lstat(name) for name in os.listdir()}
    assert {name: (status.st_ino, status.st_size) for name, status in after.items()} == {
        name: (status.st_ino, status.st_size) for name, status in before.items()
    }
    return message


def header(description, version=(1, 0)):
    text = description.encode("latin1")
    length = struct.pack("<H" if version == (1, 0) else "<I", len(text))
    return b"\x93NUMPY" + bytes(version) + length + text


def describe(shape, descr="'<f4'", fortran_order="False"):
    return f"{{'descr': {descr}, 'fortran_order': {fortran_order}, 'shape': {shape}, }}\n"


# ---------------------------------------------------------------- right results


@pytest.mark.parametrize("chunk_bytes", [1, 5000, 2**26])
@pytest.mark.parametrize(
    ("shape", "axis"), [((40, 33), -1), ((40, 33), 0), ((7, 40, 33), 1), ((3, 5, 4, 6), -2), ((97,), 0), ((4, 1), 1)]
)
@pytest.mark.parametrize("order", ["C", "F"])
def test_same_bits_as_the_library_whatever_the_pieces(shape, axis, order, chunk_bytes, monkeypatch, capsys):
    monkeypatch.setattr(_normalize, "_CHUNK_BYTES", chunk_bytes)
    array = np.asarray(logits(shape), order=order)
    np.save("in.npy", array)
    assert normalize("--axis", str(axis), "--temperature", "0.5") == 0
    assert capsys.readouterr().out.startswith("out.npy: softmax of ")
    result = np.load("out.npy")
    np.testing.assert_array_equal(result, gpusoftmax.softmax(array, axis, temperature=0.5), strict=True)
    assert result.flags.f_contiguous == array.flags.f_contiguous
    assert sorted(os.listdir()) == ["in.npy", "out.npy"]


@pytest.mark.parametrize(
    ("op", "dtype", "requested"),
    [
        ("softmax", "float16", None),
        ("softmax", "float32", None),
        ("softmax", "float64", None),
        ("softmax", ">f4", None),
        ("softmax", ">f2", "float32"),
        ("softmax", ">i2", None),
        ("softmax", "int8", "float16"),
        ("softmax", "uint64", None),
        ("softmax", "bool", "float32"),
        ("softmax", "float32", "float64"),
        ("log_softmax", "float32", None),
        ("log_softmax", "float16", "float32"),
    ],
)
def test_dtypes(op, dtype, requested, monkeypatch):
    monkeypatch.setattr(_normalize, "_CHUNK_BYTES", 1000)
    array = logits((10, 31), dtype)
    np.save("in.npy", array)
    assert normalize(*(["--dtype", requested] if requested else []), op=op) == 0
    np.testing.assert_array_equal(np.load("out.npy"), OPERATIONS[op](array, dtype=requested), strict=True)


@pytest.mark.parametrize("requested", [None, "float32"])
def test_bfloat16_is_saved_as_numpy_saves_it(requested):
    array = logits((10, 31)).astype(BFLOAT16)
    np.save("in.npy", array)
    assert np.load("in.npy").dtype == np.dtype("V2")
    assert normalize(*(["--dtype", requested] if requested else [])) == 0
    result = np.load("out.npy")
    if requested is None:
        assert Path("out.npy").read_bytes()[:128] == Path("in.npy").read_bytes()[:128]
        result = result.view(BFLOAT16)
    np.testing.assert_array_equal(result, gpusoftmax.softmax(array, dtype=requested), strict=True)


def test_a_bfloat16_result_of_float32():
    array = logits((10, 31))
    np.save("in.npy", array)
    assert normalize("--dtype", "bfloat16") == 0
    expected = gpusoftmax.softmax(array, dtype="bfloat16")
    np.testing.assert_array_equal(np.load("out.npy").view(BFLOAT16), expected, strict=True)


@pytest.mark.parametrize("shape", [(), (0,), (0, 5), (5, 0), (3, 0, 2), (2**62, 0)])
@pytest.mark.parametrize("axis", [-1, 0])
def test_shapes_without_rows_or_columns(shape, axis, capsys):
    if shape == (2**62, 0):  # NumPy refuses to make it
        if axis == 0:  # a row of 2**62
            Path("in.npy").write_bytes(header(describe(shape)))
            assert "expected at most 2147483647" in fails(capsys, "--axis", "0")
            return
        Path("in.npy").write_bytes(header(describe(shape)))
        assert normalize() == 0
        assert _npy.read_header(_npy.open_input("out.npy")).shape == shape
        return
    array = logits(shape)
    np.save("in.npy", array)
    assert normalize("--axis", str(axis)) == 0
    np.testing.assert_array_equal(np.load("out.npy"), gpusoftmax.softmax(array, axis), strict=True)


def test_infinities_and_nan_are_data():
    array = logits((6, 9))
    array[0], array[1, 3], array[2, 4], array[3, 5] = -np.inf, np.nan, np.inf, -np.inf
    np.save("in.npy", array)
    assert normalize() == 0
    np.testing.assert_array_equal(np.load("out.npy"), gpusoftmax.softmax(array))


def test_a_version_2_header():
    array = logits((3, 5))
    with open("in.npy", "wb") as file:
        np.lib.format.write_array(file, array, version=(2, 0))
    assert normalize() == 0
    np.testing.assert_array_equal(np.load("out.npy"), gpusoftmax.softmax(array))


@pytest.mark.parametrize(("shape", "axis"), [((32768, 64), -1), ((64, 32768), 0)])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_memory_is_bounded_by_the_pieces(shape, axis, dtype, monkeypatch):
    np.save("in.npy", logits(shape, dtype))
    monkeypatch.setattr(_normalize, "_CHUNK_BYTES", 2**18)
    assert normalize("--axis", str(axis)) == 0  # imports and compiles
    tracemalloc.start()
    try:
        assert normalize("--axis", str(axis), "--force") == 0
        assert tracemalloc.get_traced_memory()[1] < 2**19
    finally:
        tracemalloc.stop()


def test_a_file_larger_than_the_address_space_of_the_process():
    """384 MiB under a limit that leaves a third of that to the work."""
    shape = 192, 2**20
    with open("in.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": shape})
        file.truncate(file.tell() + shape[0] * shape[1] * 2)
    code = (
        "import resource, sys, numpy as np, gpusoftmax\n"
        "from gpusoftmax import cli\n"
        # Compiles, and starts the threads, for which the C library reserves a lot of addresses.
        "gpusoftmax.softmax(np.zeros((16, 2**14), 'f2'))\n"
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        "limit = pages * resource.getpagesize() + 2**27\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "sys.exit(cli.main(['normalize', 'in.npy', 'out.npy', '--op', 'softmax']))\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "NUMBA_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert child.returncode == 0, child.stderr
    result = np.load("out.npy", mmap_mode="r")
    assert result.shape == shape and result[0, 0] == result[-1, -1] == np.float16(2**-20)


# ---------------------------------------------------------------- files that are not what they should be

BAD_FILES = {
    "empty": (b"", "not a readable .npy file"),
    "text": (b"hello, world\n" * 9, "not a readable .npy file"),
    "npz": (b"PK\x03\x04" + bytes(90), "an .npz archive"),
    "magic only": (b"\x93NUMPY\x01\x00", "not a readable .npy file"),
    "version": (header(describe((1,)), (9, 0)) + bytes(4), "not a readable .npy file"),
    "version 3": (header(describe((1,)), (3, 0)) + bytes(4), "format version is 3.0"),
    "header cut": (header(describe((3, 4)))[:30], "not a readable .npy file"),
    "header of 4 GiB": (b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + describe((1,)).encode(), "not a readable .npy file"),
    "header of 60 KB": (header(" " * 60000 + describe((1,))) + bytes(4), "not a readable .npy file"),
    "no dict": (header("(3, 4)\n"), "not a readable .npy file"),
    "code": (header(describe("__import__('os').system('touch planted')")), "not a readable .npy file"),
    "open string": (header("'''"), "not a readable .npy file"),
    "unhashable": (header("{[]: 1}"), "not a readable .npy file"),
    "nested": (header(describe("(" * 4000)), "not a readable .npy file"),
    "object": (header(describe((1,), "'|O'")) + bytes(8), "its elements are object"),
    "structured": (header(describe((1,), "[('a', '<f4')]")) + bytes(4), "its elements are"),
    "subarray": (header(describe((1,), "('<f4', (2,))")) + bytes(8), "its elements are"),
    "bytes": (header(describe((1,), "'|i1', (2,)")) + bytes(2), "not a readable .npy file"),
    "complex": (header(describe((1,), "'<c8'")) + bytes(8), "its elements are complex64"),
    "long double": (header(describe((1,), "'<f16'")) + bytes(16), "its elements are"),
    "time": (header(describe((1,), "'<M8[s]'")) + bytes(8), "its elements are"),
    "text array": (header(describe((1,), "'<U2'")) + bytes(8), "its elements are"),
    "raw": (header(describe((1,), "'|V4'")) + bytes(4), "its elements are"),
    "shorter": (header(describe((3, 4))) + bytes(47), "is shorter than its header says"),
    "longer": (header(describe((3, 4))) + bytes(49), "is longer than its header says"),
    "second array": (header(describe((3, 4))) + bytes(48) + header(describe((3, 4))), "is longer"),
    "huge": (header(describe((2**40, 2**20))) + bytes(48), "is shorter than its header says"),
    "overflow": (header(describe((2**32, 2**32))), "is shorter than its header says"),
    "more than 64 bits": (header(describe((2**100, 0))), "its header has the shape"),
    "negative": (header(describe((-3, -4))) + bytes(48), "its header has the shape"),
    "bool": (header(describe((True, 4))) + bytes(16), "its header has the shape"),
    "65 axes": (header(describe((1,) * 65)) + bytes(4), "its header has the shape"),
    "row too long": (header(describe((2**31, 0))), "expected at most 2147483647"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(name, capsys):
    content, message = BAD_FILES[name]
    Path("in.npy").write_bytes(content)
    assert message in fails(capsys, "--axis", "0")


def test_mutated_files_do_no_harm(capsys, monkeypatch):
    """Any bytes give a result or one line: no exception, no file left behind, no time or memory lost."""
    rng = random.Random(0)
    buffer = io.BytesIO()
    np.save(buffer, logits((3, 5)))
    valid = buffer.getvalue()
    characters = b"0123456789(),'{}[]<>fOVi- \n\x00\xff"
    started = time.monotonic()
    for _ in range(600):
        content = bytearray(valid)
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(6, 128)
            content[place] = rng.choice(characters) if rng.random() < 0.8 else rng.randrange(256)
        if rng.random() < 0.2:
            content = content[: rng.randrange(len(content))]
        Path("in.npy").write_bytes(content)
        code = normalize()
        output, message = capsys.readouterr()
        if code == 0:
            assert sorted(os.listdir()) == ["in.npy", "out.npy"]
            os.unlink("out.npy")
        else:
            assert code == 2 and message.count("\n") == 1, message
            assert os.listdir() == ["in.npy"]
    assert time.monotonic() - started < 60


# ---------------------------------------------------------------- bad arguments


@pytest.fixture
def valid():
    array = logits((10, 33))
    np.save("in.npy", array)
    return array


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--axis", "2"], "axis 2 is out of bounds"),
        (["--axis", "-3"], "axis -3 is out of bounds"),
        (["--temperature", "0"], "temperature is 0.0"),
        (["--temperature", "nan"], "temperature is nan"),
        (["--temperature=-1"], "temperature is -1.0"),
    ],
)
def test_bad_values(valid, arguments, message, capsys):
    assert message in fails(capsys, *arguments)


@pytest.mark.parametrize(
    "arguments",
    [["--axis", "x"], ["--temperature", "hot"], ["--dtype", "int8"], ["--device", "tpu"], ["--op", "max"], ["--what"]],
)
def test_bad_usage_is_one_line_too(valid, arguments, capsys):
    if arguments == ["--what"]:
        assert cli.main(["normalize", "in.npy", "out.npy", "--op", "softmax", "--what"]) == 2
        assert capsys.readouterr().err.count("\n") == 1
        return
    assert "(see gpusoftmax normalize --help)" in fails(capsys, *arguments)


def test_without_an_operation(valid, capsys):
    assert cli.main(["normalize", "in.npy", "out.npy"]) == 2
    assert "--op" in capsys.readouterr().err


def test_a_gpu_that_cannot_be_used(valid, capsys, monkeypatch):
    path = {"device": "cpu", "why": "there is no driver", "fix": "install one"}
    monkeypatch.setattr(_info, "gather", lambda for_path_only: {"path": path})
    assert "device cuda cannot be used: there is no driver; install one" in fails(capsys, "--device", "cuda")


def test_missing_input_and_directories(capsys):
    assert "in.npy: No such file or directory" in fails(capsys)
    os.mkdir("in.npy")
    assert "in.npy: not a regular file" in fails(capsys)
    os.rmdir("in.npy")
    os.mkfifo("in.npy")  # would wait for a writer
    assert "in.npy: not a regular file" in fails(capsys)


def test_output_that_is_no_place_for_a_file(valid, capsys):
    for output, message in (
        ("missing/out.npy", "missing: No such file or directory"),
        ("in.npy/out.npy", "Not a directory"),
        (".", "not a regular file"),
        ("out/", "expected a file name"),
    ):
        assert cli.main(["normalize", "in.npy", output, "--op", "softmax", "--force"]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert os.listdir() == ["in.npy"]


# ---------------------------------------------------------------- what exists stays


def test_refuses_to_overwrite_without_force(valid, capsys):
    Path("out.npy").write_text("precious")
    assert "out.npy: exists (--force replaces it)" in fails(capsys)
    assert Path("out.npy").read_text() == "precious"
    assert normalize("--force") == 0
    np.testing.assert_array_equal(np.load("out.npy"), gpusoftmax.softmax(valid))
    assert sorted(os.listdir()) == ["in.npy", "out.npy"]


def during(monkeypatch, action):
    """Let something happen while the first piece is computed."""

    def operation(*arguments, **keywords):
        action()
        return gpusoftmax.softmax(*arguments, **keywords)

    monkeypatch.setitem(_normalize._OPERATIONS, "softmax", operation)


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_appears_meanwhile_stays(links, valid, monkeypatch, capsys):
    during(monkeypatch, lambda: Path("out.npy").write_text("precious"))
    if not links:
        forbid_links(monkeypatch)
    assert normalize() == 2
    assert "out.npy: " in capsys.readouterr().err
    assert sorted(os.listdir()) == ["in.npy", "out.npy"] and Path("out.npy").read_text() == "precious"


def forbid_links(monkeypatch):
    def link(source, destination):
        raise OSError(errno.EPERM, "Operation not permitted", source)

    monkeypatch.setattr(os, "link", link)


def test_a_file_system_without_hard_links(valid, monkeypatch):
    forbid_links(monkeypatch)
    assert normalize() == 0
    np.testing.assert_array_equal(np.load("out.npy"), gpusoftmax.softmax(valid))
    assert sorted(os.listdir()) == ["in.npy", "out.npy"]


def test_a_rename_that_fails_leaves_nothing(valid, monkeypatch, capsys):
    forbid_links(monkeypatch)

    def replace(source, destination):
        raise OSError(errno.EIO, "Input/output error", source)

    monkeypatch.setattr(os, "replace", replace)
    assert "Input/output error" in fails(capsys)


@pytest.mark.parametrize("kind", ["itself", "hard link", "symbolic link", "dangling link", "directory"])
def test_outputs_that_are_never_replaced(kind, valid, capsys):
    if kind == "itself":
        assert cli.main(["normalize", "in.npy", "./in.npy", "--op", "softmax", "--force"]) == 2
        assert "is the input itself" in capsys.readouterr().err
        np.testing.assert_array_equal(np.load("in.npy"), valid)
        return
    {
        "hard link": lambda: os.link("in.npy", "out.npy"),
        "symbolic link": lambda: os.symlink("in.npy", "out.npy"),
        "dangling link": lambda: os.symlink("nowhere", "out.npy"),
        "directory": lambda: os.mkdir("out.npy"),
    }[kind]()
    message = fails(capsys, "--force")
    assert ("is the input itself" if kind == "hard link" else "not a regular file") in message
    np.testing.assert_array_equal(np.load("in.npy"), valid)


def test_an_input_that_is_a_link_is_read(valid):
    os.rename("in.npy", "elsewhere.npy")
    os.symlink("elsewhere.npy", "in.npy")
    assert normalize() == 0
    np.testing.assert_array_equal(np.load("out.npy"), gpusoftmax.softmax(valid))


# ---------------------------------------------------------------- faults in the middle


def test_too_little_disk_is_told_before_anything_is_written(valid, monkeypatch, capsys):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "too little disk: needs 1.4 KB, 1.0 KB are free" in fails(capsys)


def test_a_write_that_fails_leaves_nothing(directory):
    """A real fault: the system lets this process write no more than 100 kB to a file."""
    np.save("in.npy", logits((1000, 100)))

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    child = subprocess.run(command(), capture_output=True, text=True, preexec_fn=limit, timeout=120)
    assert (child.returncode, child.stdout) == (2, "")
    assert child.stderr == "gpusoftmax normalize: File too large\n"
    assert os.listdir() == ["in.npy"]


@pytest.mark.parametrize("axis", ["-1", "0"])
def test_an_input_that_shrinks_meanwhile(axis, monkeypatch, capsys):
    np.save("in.npy", logits((1000, 100)))
    monkeypatch.setattr(_normalize, "_CHUNK_BYTES", 10_000)
    during(monkeypatch, lambda: os.truncate("in.npy", 5000))
    assert normalize("--axis", axis) == 2
    assert capsys.readouterr().err == "gpusoftmax normalize: in.npy: became shorter while it was read\n"
    assert os.listdir() == ["in.npy"]


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSPC])
def test_a_file_system_that_reserves_no_space_or_has_none(code, valid, monkeypatch, capsys):
    def posix_fallocate(handle, offset, length):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", posix_fallocate)
    if code == errno.ENOSPC:
        assert fails(capsys) == "gpusoftmax normalize: No space left on device\n"
    else:
        assert normalize("--axis", "0") == 0
        np.testing.assert_array_equal(np.load("out.npy"), gpusoftmax.softmax(valid, 0))


def test_a_row_that_does_not_fit_in_memory(monkeypatch, capsys):
    monkeypatch.setattr(os, "sysconf", lambda name: 100)
    monkeypatch.setattr(_normalize, "_CHUNK_BYTES", 1)
    np.save("in.npy", logits((3, 5000)))
    assert "a piece of 1 rows needs 20.0 KB, more than there is memory" in fails(capsys)


@pytest.mark.parametrize("failure", [MemoryError(), RuntimeError("CUDA\n  error"), KeyError("bug"), AssertionError()])
def test_whatever_fails_nothing_is_left(failure, valid, monkeypatch, capsys):
    def operation(*arguments, **keywords):
        raise failure

    monkeypatch.setitem(_normalize._OPERATIONS, "softmax", operation)
    fails(capsys)


def test_the_result_is_on_the_disk_before_it_has_its_name(valid, monkeypatch):
    calls = []

    def trace(name, call):
        monkeypatch.setattr(os, name, lambda *arguments: calls.append(name) or call(*arguments))

    for name in ("fsync", "link", "unlink"):
        trace(name, getattr(os, name))
    assert normalize() == 0
    assert calls == ["fsync", "link", "unlink", "fsync"]


def test_the_file_has_the_usual_permissions(valid):
    old = os.umask(0o027)
    try:
        assert normalize() == 0
    finally:
        os.umask(old)
    assert os.stat("out.npy").st_mode & 0o777 == 0o640


def command(*arguments):
    return [sys.executable, "-m", "gpusoftmax", "normalize", "in.npy", "out.npy", "--op", "softmax", *arguments]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_is_one_line_and_leaves_nothing(number):
    with open("in.npy", "wb") as file:  # sparse: 16 GiB of zeros, many seconds of work
        np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": (2**18, 2**15)})
        file.truncate(file.tell() + 2**34)
    code = (
        "import shutil, sys\n"
        "from gpusoftmax import _normalize, cli\n"
        "_normalize._reserve = lambda file, length: None\n"  # 16 GiB may be more than the disk has
        "shutil.disk_usage = lambda path: shutil._ntuple_diskusage(2**60, 0, 2**60)\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, *command()[3:]], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 60
        while sum(os.path.getsize(name) for name in os.listdir() if name.endswith(".tmp")) < 2**25:
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        child.send_signal(number)
        output, message = child.communicate(timeout=30)
    finally:
        child.kill()
    assert (child.returncode, output) == (130, "")
    assert message == "gpusoftmax normalize: interrupted\n"
    assert os.listdir() == ["in.npy"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_second_interrupt_does_not_break_into_the_clean_up(number, valid):
    """Ctrl-C, and again at the very moment when the temporary file would be removed."""
    code = (
        "import os, sys\n"
        "from gpusoftmax import cli\n"
        "number, unlink = int(sys.argv[1]), os.unlink\n"
        "def again(path):\n"
        "    os.kill(os.getpid(), number)\n"
        "    unlink(path)\n"
        "os.unlink, os.fsync = again, lambda handle: os.kill(os.getpid(), number)\n"
        "sys.exit(cli.main(sys.argv[2:]))\n"
    )
    arguments = [str(int(number)), "normalize", "in.npy", "out.npy", "--op", "softmax"]
    child = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert (child.returncode, child.stderr) == (130, "gpusoftmax normalize: interrupted\n")
    assert os.listdir() == ["in.npy"]


def test_killed_or_not_the_name_never_stands_for_half_a_file():
    """kill -9 at any time: no result or all of it."""
    array = logits((4000, 1000))
    np.save("in.npy", array)
    expected = gpusoftmax.softmax(array)
    for delay in (0.0, 0.02):
        child = subprocess.Popen(command("--force"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not any(name.endswith(".tmp") for name in os.listdir()):
            if child.poll() is not None or time.monotonic() > deadline:
                break
        time.sleep(delay)
        child.kill()
        child.wait()
        if os.path.exists("out.npy"):
            np.testing.assert_array_equal(np.load("out.npy"), expected)
            os.unlink("out.npy")
        for name in os.listdir():
            if name.endswith(".tmp"):
                os.unlink(name)
