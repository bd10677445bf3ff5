"""Calls shared with the threads of torch's OpenMP library: kernels/cpu/openmp.py. Each test in a process of its own."""

import os
import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the library is found among a Linux process's maps")

PREAMBLE = """
import os, signal, threading, time
import numpy as np
import gpusoftmax
from gpusoftmax.kernels.cpu import parallel, pool
x = np.random.default_rng(0).standard_normal((64, 8192), dtype=np.float32)
expected = gpusoftmax.softmax(x)
import torch
torch.set_num_threads(2)
t = torch.from_numpy(x)
def shares_with_openmp():
    memory = parallel._threads.pool
    memory[pool.NO_MORE_WORK] = memory[pool.NOT_BEFORE] = 0
    assert np.array_equal(gpusoftmax.softmax(x), expected)
    return bool(memory[pool.NO_MORE_WORK])
"""


def run(program):
    completed = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", PREAMBLE + textwrap.dedent(program)],
        env={**os.environ, "NUMBA_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert completed.returncode == 0, (completed.returncode, completed.stderr)
    assert completed.stdout == "done\n"


def test_they_are_used_for_as_many_threads_as_torch_has():
    run("""
        assert shares_with_openmp()
        torch.softmax(t, -1)
        assert shares_with_openmp()
        torch.set_num_threads(1)
        assert not shares_with_openmp()
        torch.set_num_threads(2)
        assert shares_with_openmp()
        print("done")
    """)


def test_calls_from_many_threads_between_operations_of_torch():
    run("""
        wrong, reference = [], torch.softmax(t, -1)
        def work():
            for _ in range(30):
                if not np.array_equal(gpusoftmax.softmax(x), expected):
                    wrong.append("ours")
                if not torch.equal(torch.softmax(t, -1), reference):
                    wrong.append("torch's")
        threads = [threading.Thread(target=work) for _ in range(6)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert not wrong, wrong
        print("done")
    """)


def test_a_child_leaves_them_alone():
    """OpenMP's threads do not survive a fork; a team that waits for them would wait for ever."""
    run("""
        torch.softmax(t, -1)
        assert shares_with_openmp()
        for _ in range(3):
            child = os.fork()
            if child == 0:
                signal.alarm(30)
                gpusoftmax.softmax(x)
                os._exit(0 if not shares_with_openmp() and parallel._threads.started else 3)
            assert os.waitpid(child, 0)[1] == 0
        assert shares_with_openmp()
        print("done")
    """)


def test_a_thread_that_comes_late_is_not_waited_for_again():
    run("""
        assert shares_with_openmp()
        memory = parallel._threads.pool
        memory[pool.NOT_BEFORE] = 2**62  # as after a call whose end had to wait
        memory[pool.NO_MORE_WORK] = 0
        assert np.array_equal(gpusoftmax.softmax(x), expected) and not memory[pool.NO_MORE_WORK]
        print("done")
    """)
