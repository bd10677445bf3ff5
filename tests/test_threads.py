"""Threads, forks and interruptions on the CPU. Each in a process of its own: what goes wrong here ends the process."""

import os
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

import gpusoftmax
from gpusoftmax.kernels.cpu import softmax as cpu_softmax
from tests import inputs

LAYERS = ["workqueue", "omp"] if sys.platform == "linux" else ["workqueue"]  # threads of Numba's, not to be touched
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no os.fork on this platform")
X = inputs.make("spread", (64, 4096), np.float32)  # enough for eight threads

PREAMBLE = """
import os, signal, sys, threading, time
import numba
import numpy as np
import gpusoftmax
rng = np.random.default_rng(0)
x = rng.standard_normal((64, 4096), dtype=np.float32)
labels = rng.integers(0, 4096, 64)
def call():
    loss, dlogits = gpusoftmax.cross_entropy_with_grad(x, labels)
    return gpusoftmax.softmax(x).tobytes(), gpusoftmax.logsumexp(x).tobytes(), loss, dlogits.tobytes()
"""


def run(program, timeout=120, **environment):
    """Run PREAMBLE and a program in a new process on four threads; what it prints."""
    completed = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", PREAMBLE + textwrap.dedent(program)],
        env={**os.environ, "NUMBA_NUM_THREADS": "4", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert completed.returncode == 0, (completed.returncode, completed.stderr)
    return completed.stdout


@pytest.mark.parametrize("layer", LAYERS)
def test_concurrent_calls(layer):
    """Eight threads, 120 calls of three functions each. Numba's workqueue layer would abort the process."""
    program = """
        numba.set_num_threads(1)
        expected = call()
        wrong = []
        def work():
            for _ in range(15):
                if call() != expected:
                    wrong.append(threading.current_thread())
        threads = [threading.Thread(target=work) for _ in range(8)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert not wrong, wrong
        print("done")
    """
    assert run(program, NUMBA_THREADING_LAYER=layer) == "done\n"


def test_concurrent_first_calls(tmp_path):
    """Eight threads that all need the same kernel, which nobody has compiled."""
    program = """
        barrier, results = threading.Barrier(8), []
        def work():
            barrier.wait()
            results.append(gpusoftmax.logsumexp(x))
        threads = [threading.Thread(target=work) for _ in range(8)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert len(results) == 8
        for result in results:
            assert np.array_equal(result, results[0]) and np.isfinite(result).all()
        print("done")
    """
    assert run(program, GPUSOFTMAX_CACHE_DIR=str(tmp_path / "cache")) == "done\n"


def test_number_of_threads():
    """As many threads as Numba was told to use, each with its share of the rows, and the same bits from any number."""
    program = """
        from gpusoftmax.kernels.cpu import softmax as kernels
        expected = gpusoftmax.softmax(x)
        compiled, parts = kernels.softmax_rows, []
        def spy(first_row, last_row, *arguments):
            parts.append((first_row, last_row, threading.get_ident()))
            time.sleep(0.2)  # long enough for every thread to get a part
            compiled(first_row, last_row, *arguments)
        kernels.softmax_rows = spy
        for n_threads in (4, 1, 3, 2, None):
            if n_threads:
                numba.set_num_threads(n_threads)
            parts.clear()
            assert np.array_equal(gpusoftmax.softmax(x), expected)
            assert len(parts) == len({thread for _, _, thread in parts}) == (n_threads or 2), (n_threads, parts)
            assert parts[0][2] == threading.get_ident() or n_threads != 1
            rows = sorted(row for first, last, _ in parts for row in range(first, last))
            assert rows == list(range(64))
        kernels.softmax_rows = compiled

        # The number belongs to a thread, as in Numba.
        kernels.softmax_rows, others = spy, []
        parts.clear()
        thread = threading.Thread(target=lambda: others.append(gpusoftmax.softmax(x)))
        thread.start()
        thread.join()
        assert len(parts) == 4 and np.array_equal(others[0], expected), parts
        print("done")
    """
    assert run(program) == "done\n"


def test_numbers_of_threads_given_by_the_environment():
    program = """
        from gpusoftmax.kernels.cpu import softmax as kernels
        parts = []
        kernels.softmax_rows = lambda *arguments: parts.append(arguments)
        gpusoftmax.softmax(x)
        print(len(parts))
    """
    for n_threads in ("1", "3"):
        assert run(program, NUMBA_NUM_THREADS=n_threads).split() == [n_threads]


def test_small_inputs_start_no_thread():
    program = """
        before = threading.active_count()
        gpusoftmax.softmax(x[:7]), gpusoftmax.softmax(x[:1])
        assert threading.active_count() == before
        gpusoftmax.softmax(x)
        assert threading.active_count() > before
        print("done")
    """
    assert run(program) == "done\n"


@needs_fork
@pytest.mark.parametrize(("layer", "busy"), [(LAYERS[0], False), (LAYERS[-1], True)])
def test_fork(layer, busy):
    """A child of a process that has used its threads, or is using them from others, computes on threads of its own."""
    program = f"""
        numba.set_num_threads(4)  # starts Numba's own threads, which do not survive
        expected, running = call(), True
        def work():
            while running:
                call()
        threads = [threading.Thread(target=work) for _ in range(2 if {busy} else 0)]
        [thread.start() for thread in threads]
        def child():
            signal.alarm(30)
            code = 1
            try:
                code = 0 if call() == expected and threading.active_count() > 1 else 3
            finally:
                os._exit(code)
        for _ in range(5):
            pid = os.fork()
            if pid == 0:
                child()
            status = os.waitpid(pid, 0)[1]
            assert status == 0, status
            assert call() == expected
        running = False
        [thread.join() for thread in threads]
        print("done")
    """
    assert run(program, NUMBA_THREADING_LAYER=layer) == "done\n"


@needs_fork
def test_worker_processes_by_fork():
    program = """
        import multiprocessing
        expected = call()
        def work(_):
            return call() == expected
        with multiprocessing.get_context("fork").Pool(3) as pool:
            assert pool.map(work, range(9)) == [True] * 9
        print("done")
    """
    assert run(program) == "done\n"


def test_calls_while_the_interpreter_ends():
    """Executors take no more work then; an exit handler still gets its result."""
    program = """
        import atexit
        expected = gpusoftmax.softmax(x)
        atexit.register(lambda: print(np.array_equal(gpusoftmax.softmax(x), expected), flush=True))
    """
    assert run(program) == "True\n"


def test_an_error_in_one_thread_is_that_threads_own():
    program = """
        expected, results, errors = call(), [], []
        bad = labels.copy()
        bad[40] = 4096
        def good():
            results.extend(call() == expected for _ in range(20))
        def wrong():
            for _ in range(100):
                try:
                    gpusoftmax.cross_entropy(x, bad)
                except IndexError as error:
                    errors.append("target[40]" in str(error))
        threads = [threading.Thread(target=target) for target in (good, wrong, good, wrong)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert len(results) == 40 and all(results) and len(errors) == 200 and all(errors)
        print("done")
    """
    assert run(program) == "done\n"


class Parts:
    """In place of a kernel: notes which parts began and ended, the later rows later; `fail(first_row)` may raise."""

    def __init__(self, fail):
        self.fail, self.began, self.ended = fail, [], []

    def __call__(self, first_row, last_row, *arguments):
        self.began.append(first_row)
        self.fail(first_row)
        time.sleep(0.2 + first_row / 200)
        self.ended.append(first_row)


def in_the_caller(first_row):
    if first_row == 0:
        raise KeyboardInterrupt


def in_a_worker(first_row):
    if first_row == 16:
        raise MemoryError


@pytest.mark.parametrize(("fail", "error"), [(in_the_caller, KeyboardInterrupt), (in_a_worker, MemoryError)])
def test_an_error_leaves_when_all_parts_are_done(monkeypatch, fail, error):
    """Else the other threads go on writing into arrays that the caller, who sees an exception, lets go of."""
    import numba

    expected = gpusoftmax.softmax(X)
    monkeypatch.setattr(numba.config, "NUMBA_NUM_THREADS", 4)
    monkeypatch.setattr(numba, "get_num_threads", lambda: 4)
    parts = Parts(fail)
    with monkeypatch.context() as patch:
        patch.setattr(cpu_softmax, "softmax_rows", parts)
        with pytest.raises(error):
            gpusoftmax.softmax(X)
        began, ended = sorted(parts.began), sorted(parts.ended)
        assert ended == [first_row for first_row in began if not _fails(fail, first_row)]
    assert np.array_equal(gpusoftmax.softmax(X), expected)


def _fails(fail, first_row):
    try:
        fail(first_row)
    except BaseException:
        return True
    return False


def test_an_interrupt_waits_for_the_workers(monkeypatch):
    """Ctrl-C while the caller, done with its own part, waits for the others."""
    import numba

    monkeypatch.setattr(numba.config, "NUMBA_NUM_THREADS", 4)
    monkeypatch.setattr(numba, "get_num_threads", lambda: 4)
    parts = Parts(lambda first_row: time.sleep(first_row / 40))
    monkeypatch.setattr(cpu_softmax, "softmax_rows", parts)
    interrupt = threading.Timer(0.4, lambda: os.kill(os.getpid(), 2))  # SIGINT, handled by the main thread
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        gpusoftmax.softmax(X)
    assert sorted(parts.ended) == sorted(parts.began) and len(parts.began) == 4
