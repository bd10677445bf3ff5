"""kernels/cuda/driver.py with NVIDIA's Python bindings, over a driver library that does nothing (stub.c).

What is called and with which arguments; whether a driver does what it is told, only a GPU shows.
"""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and a C compiler"
)
PREAMBLE = """
from collections import namedtuple
from cuda.bindings import driver as bindings
from cuda.core import Device
from gpusoftmax.kernels.cuda import driver

class Image:
    kernel, entry, cubin = "softmax.softmax_rows", "entry", b"cubin"

Plan = namedtuple("Plan", "threads blocks shared_bytes cluster", defaults=(32, 8, 0, 1))

image = Image()
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    directory = tmp_path_factory.mktemp("driver")
    source = Path(__file__).with_name("stub.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-w", "-o", directory / "libcuda.so.1", source], check=True)
    return directory


@pytest.fixture
def run(library):
    """Runs a program over the stub; the lines that it logs."""

    def run(program, **environment):
        completed = subprocess.run(
            [sys.executable, "-c", PREAMBLE + textwrap.dedent(program)],
            env={**os.environ, "LD_LIBRARY_PATH": str(library), **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert completed.returncode == 0, completed.stderr
        return completed.stderr.splitlines()

    return run


def test_a_launch_and_its_context(run):
    """The device is current during the launch, and afterwards what was before; stream 0 is the legacy one, 1."""
    log = run("""
        device = driver.device(1)
        assert (device.ordinal, device.arch, device.multiprocessors) == (1, "sm_90", 132)
        kernel = driver.load(image, device, 0)
        assert driver.load(image, device, 0) is kernel
        assert int(bindings.cuCtxGetCurrent()[1]) == 0
        driver.launch(kernel, Plan(), 0, (42, 1.5))
        assert int(bindings.cuCtxGetCurrent()[1]) == 0
        Device(1).set_current()
        driver.launch(kernel, Plan(threads=64), 0x77, (43,))
    """)
    assert [line for line in log if line.startswith("launch")] == [
        "launch grid 8 cluster 1 block 32 shared 0 stream 0x1 word 42 current 0x1001",
        "launch grid 8 cluster 1 block 64 shared 0 stream 0x77 word 43 current 0x1001",
    ]
    assert log[-2:] == ["current 0x1001", log[-1]], "no context calls where it is current"


def test_shared_memory_and_clusters_are_permitted_once_and_never_lowered(run):
    log = run("""
        kernel = driver.load(image, driver.device(0), 0)
        Device(0).set_current()
        for shared in (49152, 100000, 120000, 110000, 120000):
            driver.launch(kernel, Plan(shared_bytes=shared), 0, (1,))
        driver.launch(kernel, Plan(blocks=32, cluster=8), 0, (1,))
        driver.launch(kernel, Plan(blocks=32, cluster=16), 0, (1,))
        driver.launch(kernel, Plan(blocks=32, cluster=16), 0, (1,))
    """)
    assert [line for line in log if line.startswith("attribute")] == [
        "attribute 8 100000 device 0",
        "attribute 8 120000 device 0",
        "attribute 14 1 device 0",
    ]
    assert [line.split(" stream")[0] for line in log if line.startswith("launch")][-2:] == [
        "launch grid 32 cluster 16 block 32 shared 0"
    ] * 2


def test_room_for_large_clusters_is_asked_for_once(run):
    log = run("""
        kernel = driver.load(image, driver.device(1), 0)
        for cluster in (8, 16, 16):
            driver.launch(kernel, Plan(threads=256, blocks=32, shared_bytes=100000, cluster=cluster), 0, (1,))
    """)
    assert [line for line in log if line.startswith("room")] == [
        "room for cluster 16 grid 32 block 256 shared 100000 kernel 0x3000 current 0x1001"
    ]
    assert sum(line.startswith("launch") for line in log) == 3


@pytest.mark.parametrize("answer", [{"STUB_LARGEST_CLUSTER": "8"}, {"STUB_CLUSTER_ERROR": "912"}])
def test_without_room_for_a_cluster_nothing_is_launched(run, answer):
    """Each time: the plan is not taken for one that was launched before."""
    log = run(
        """
        kernel = driver.load(image, driver.device(0), 0)
        for _ in range(2):
            try:
                driver.launch(kernel, Plan(blocks=32, cluster=16), 0, (1,))
            except driver.ClusterDoesNotFit:
                driver.launch(kernel, Plan(blocks=32, cluster=8), 0, (1,))
            else:
                raise AssertionError
        """,
        **answer,
    )
    assert [line.split()[4] for line in log if line.startswith("launch")] == ["8", "8"]


def test_plans_that_take_turns_are_launched_as_they_are(run):
    """The plan that was launched last is known by identity, the others by their values."""
    log = run("""
        kernel = driver.load(image, driver.device(0), 0)
        Device(0).set_current()
        one, other = Plan(blocks=8), Plan(blocks=9)
        for plan in (one, one, other, one, Plan(blocks=9), other, other):
            driver.launch(kernel, plan, 0, (1,))
        assert set(kernel.configs) == {one, other}
    """)
    assert [line.split()[2] for line in log if line.startswith("launch")] == list("8898999")


def test_what_the_driver_refuses_is_an_error(run):
    """Each time."""
    run("""
        kernel = driver.load(image, driver.device(0), 0)
        for _ in range(2):
            try:
                driver.launch(kernel, Plan(shared_bytes=230000), 0, (1,))
            except RuntimeError as error:
                assert "MAX_DYNAMIC_SHARED_SIZE_BYTES = 230000" in str(error)
            else:
                raise AssertionError
    """)


def test_a_launch_waits_for_what_another_thread_has_permitted(run):
    """One that needs less counts on it, and came before the driver knew."""
    log = run("""
        import threading

        kernel = driver.load(image, driver.device(0), 0)
        permit, asked = bindings.cuKernelSetAttribute, threading.Event()

        def permit_late(*arguments):
            asked.set()
            other.join(0.5)
            return permit(*arguments)

        def launch_another():
            asked.wait()
            driver.launch(kernel, Plan(shared_bytes=100000), 0, (2,))

        bindings.cuKernelSetAttribute = permit_late
        other = threading.Thread(target=launch_another)
        other.start()
        driver.launch(kernel, Plan(shared_bytes=120000), 0, (1,))
        other.join()
    """)
    assert [line.split()[0] for line in log if line.startswith(("attribute", "launch"))] == [
        "attribute",
        "launch",
        "launch",
    ]


@pytest.mark.parametrize("stream", [0xCA, 0xCB])
def test_a_kernel_is_not_loaded_while_a_graph_is_captured(run, stream):
    """On the captured stream, or on the legacy stream while another one is captured."""
    log = run(f"""
        device = driver.device(0)
        try:
            driver.load(image, device, {stream})
        except RuntimeError as error:
            assert "softmax.softmax_rows is not loaded yet" in str(error) and "call once before" in str(error)
        else:
            raise AssertionError
        kernel = driver.load(image, device, 7)
        driver.launch(driver.load(image, device, {stream}), Plan(), {stream}, (1,))
    """)
    assert log[-2].startswith("launch")
