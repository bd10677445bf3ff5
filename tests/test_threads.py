"""Threads, forks and interruptions on the CPU. Each in a process of its own: what goes wrong here ends the process."""

import os
import subprocess
import sys
import textwrap

import pytest

LAYERS = ["workqueue", "omp"] if sys.platform == "linux" else ["workqueue"]  # threads of Numba's, not to be touched
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no os.fork on this platform")

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
def in_a_child(check):
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        code = 1
        try:
            code = 0 if check() else 3
        finally:
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    assert status == 0, status
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


SPY = """
        from gpusoftmax.kernels.cpu import parallel
        jobs = []
        played = parallel.play
        def spy(program, addresses, own):
            jobs.append(program.n_threads)
            return played(program, addresses, own)
        parallel.play = spy
"""


def test_number_of_threads():
    """As many threads as Numba was told to use, and the same bits from any number."""
    program = (
        SPY
        + """
        expected = gpusoftmax.softmax(x)
        for n_threads in (4, 1, 3, 2):
            numba.set_num_threads(n_threads)
            jobs.clear()
            assert np.array_equal(gpusoftmax.softmax(x), expected)
            assert jobs == [n_threads], (n_threads, jobs)

        # The number belongs to a thread, as in Numba.
        jobs.clear()
        others = []
        thread = threading.Thread(target=lambda: others.append(gpusoftmax.softmax(x)))
        thread.start()
        thread.join()
        assert jobs == [4] and np.array_equal(others[0], expected), jobs
        print("done")
    """
    )
    assert run(program) == "done\n"


def test_others_help():
    """Somebody else than the caller joins in, sooner or later; asleep in between or not."""
    program = """
        from gpusoftmax.kernels.cpu import parallel, pool
        expected = gpusoftmax.softmax(x)
        for pause in (0, 0.01):
            deadline, helped = time.time() + 30, False
            while not helped and time.time() < deadline:
                time.sleep(pause)
                assert np.array_equal(gpusoftmax.softmax(x), expected)
                helped = parallel._threads.pool[pool.LEFT] > 0
            assert helped, pause
        print("done")
    """
    assert run(program) == "done\n"


def test_nobody_helps():
    """Threads that never get a core cost nothing but their share of the work."""
    program = """
        from gpusoftmax.kernels.cpu import parallel
        expected = call()
        parallel._Threads.at_least = lambda threads, count: None
        with_threads, parallel._threads = parallel._threads, parallel._Threads()
        assert call() == expected
        assert np.array_equal(gpusoftmax.softmax(x.reshape(1, -1)), gpusoftmax.softmax(x.reshape(1, -1)))
        print("done")
    """
    assert run(program) == "done\n"


def test_numbers_of_threads_given_by_the_environment():
    program = (
        SPY
        + """
        gpusoftmax.softmax(x)
        print(*jobs)
    """
    )
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
        for _ in range(5):
            in_a_child(lambda: call() == expected and threading.active_count() > 1)
            assert call() == expected
        running = False
        [thread.join() for thread in threads]
        print("done")
    """
    assert run(program, NUMBA_THREADING_LAYER=layer) == "done\n"


@pytest.mark.parametrize("place", ["pool.new_pool", "pool.play.compile", "threading.Thread"])
def test_a_handler_calls_while_the_threads_are_made(place):
    program = f"""
        from gpusoftmax.kernels.cpu import parallel
        owner, _, name = "parallel.{place}".rpartition(".")
        owner, found = eval(owner), []
        function = getattr(owner, name)
        def interrupted(*arguments, **options):
            made = function(*arguments, **options)
            signal.raise_signal(signal.SIGINT)
            return made
        def handler(*_):
            setattr(owner, name, function)
            found.append((call(), parallel._threads))
        signal.signal(signal.SIGINT, handler)
        setattr(owner, name, interrupted)
        expected = call()
        assert found == [(expected, parallel._threads)]
        print("done")
    """
    assert run(program) == "done\n"


@needs_fork
def test_fork_while_a_thread_compiles(tmp_path):
    """The child finds neither Numba's lock taken by a thread that it has not got, nor garbage collection off."""
    program = """
        import gc
        compiler = threading.Thread(target=gpusoftmax.argmax, args=(x,))
        compiler.start()
        while gc.isenabled():
            time.sleep(0.01)
        in_a_child(lambda: gpusoftmax.argmax(x.astype(np.float64)).any() and gc.isenabled())
        compiler.join()
        assert gc.isenabled()
        print("done")
    """
    assert run(program, GPUSOFTMAX_CACHE_DIR=str(tmp_path)) == "done\n"


@needs_fork
def test_fork_while_a_thread_imports():
    """The child finds no lock of a module taken by a thread that it has not got."""
    program = """
        importing = threading.Event()
        class Slow:
            @staticmethod
            def find_spec(name, *_):
                if name == "gpusoftmax.kernels.cpu.walk":
                    importing.set()
                    time.sleep(0.5)
        sys.meta_path.insert(0, Slow)
        importer = threading.Thread(target=gpusoftmax.argmax, args=(x,))
        importer.start()
        importing.wait()
        in_a_child(lambda: gpusoftmax.argmax(x).any())
        importer.join()
        print("done")
    """
    assert run(program) == "done\n"


@needs_fork
def test_fork_while_a_thread_asks_for_an_address():
    """LLVM holds a lock while it says where a kernel is; here one that is held for longer stands for it."""
    program = """
        from numba.core.codegen import JITCodeLibrary
        address, lock, asking = JITCodeLibrary.get_pointer_to_function, threading.Lock(), threading.Event()
        def slowly(library, name):
            if not name.startswith("cfunc."):
                return address(library, name)
            with lock:
                asking.set()
                time.sleep(0.5)
                return address(library, name)
        JITCodeLibrary.get_pointer_to_function = slowly
        asker = threading.Thread(target=gpusoftmax.argmax, args=(x,))
        asker.start()
        asking.wait()
        in_a_child(lambda: gpusoftmax.argmax(x).any())
        asker.join()
        print("done")
    """
    assert run(program) == "done\n"


@needs_fork
def test_fork_while_a_thread_asks_numba_for_its_threads():
    """It takes locks for that, which the child would find taken by a thread that it has not got."""
    program = """
        from numba.np.ufunc import parallel as numba_threads
        numba.set_num_threads(2)
        expected, asking, asked = call(), threading.Event(), threading.Event()
        def ask():
            with numba_threads._backend_init_process_lock, numba_threads._backend_init_thread_lock:
                asking.set()
                asked.wait()
        thread = threading.Thread(target=ask)
        thread.start()
        asking.wait()
        in_a_child(lambda: call() == expected)
        assert call() == expected  # nor does anybody here wait
        asked.set()
        thread.join()
        print("done")
    """
    assert run(program) == "done\n"


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


def test_an_interrupt_leaves_when_nobody_works_on_the_arrays():
    """Else the other threads go on writing into arrays that the caller, who sees an exception, lets go of."""
    program = """
        big = np.tile(x, (8, 1))
        expected, out, interrupted = gpusoftmax.softmax(big), np.empty_like(big), 0
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        for k in range(200):
            try:
                signal.setitimer(signal.ITIMER_REAL, 2e-5 * (k + 1))
                gpusoftmax.softmax(big, out=out)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupted += 1
                left = out.tobytes()
                time.sleep(1e-3)
                assert out.tobytes() == left
        assert interrupted > 0
        assert np.array_equal(gpusoftmax.softmax(big, out=out), expected)
        print("done")
    """
    assert run(program) == "done\n"


def test_scratch_memory_outlives_a_call_in_between():
    """A signal's handler, or a finaliser, makes a call that needs more, when this one has been given its memory."""
    program = """
        import weakref
        from gpusoftmax.kernels.cpu import parallel, run
        expected, play, found = gpusoftmax.softmax(x), parallel.play, []
        def interrupted(*arguments):
            memory, _ = run._kept.memory
            given, size = weakref.ref(memory), memory.size
            del memory
            run._workspace(2 * size)
            found.append(given() is not None)
            return play(*arguments)
        parallel.play = interrupted
        assert np.array_equal(gpusoftmax.softmax(x), expected)
        assert found == [True]
        print("done")
    """
    assert run(program) == "done\n"


def test_first_calls_of_many_threads_make_one_pool():
    program = """
        from gpusoftmax.kernels.cpu import parallel
        expected, pools = gpusoftmax.softmax(x), []
        made = parallel._Threads.__init__
        def slowly(threads):
            time.sleep(0.05)
            made(threads)
            pools.append(threads)
        parallel._Threads.__init__ = slowly
        first, parallel._threads = parallel._threads, None
        barrier = threading.Barrier(8)
        def work():
            barrier.wait()
            assert np.array_equal(gpusoftmax.softmax(x), expected)
        threads = [threading.Thread(target=work) for _ in range(8)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert len(pools) == 1
        print("done")
    """
    assert run(program) == "done\n"


def test_threads_that_sleep_are_woken():
    """Calls at all distances from each other: a thread that falls asleep as the bell rings misses no call for good."""
    program = """
        from gpusoftmax.kernels.cpu import parallel, pool
        expected = gpusoftmax.softmax(x)
        for k in range(3000):
            deadline = time.perf_counter() + 1e-7 * k
            while time.perf_counter() < deadline:
                pass
            gpusoftmax.softmax(x)
        assert np.array_equal(gpusoftmax.softmax(x), expected)
        memory = parallel._threads.pool
        time.sleep(0.5)
        assert memory[pool.SLEEPING] == len(parallel._threads.started) == 3
        assert memory[pool.BUSY] == memory[pool.SEATS] == 0
        print("done")
    """
    assert run(program) == "done\n"
