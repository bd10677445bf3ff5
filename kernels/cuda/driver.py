"""The only file that talks to the CUDA driver: three functions, so that an emulator can stand in for them."""

import functools
from dataclasses import dataclass

from gpusoftmax.kernels.cuda.compile import Image
from gpusoftmax.kernels.cuda.plan import Plan


@dataclass(frozen=True)
class Device:
    ordinal: int
    arch: str  # "sm_90"
    multiprocessors: int


class _LoadedKernel:
    """A kernel in the memory of one device."""

    def __init__(self, kernel, ordinal: int):
        self.kernel = kernel
        self.ordinal = ordinal


@functools.cache
def device(ordinal: int) -> Device:
    """What the launch plans need to know of a device."""
    from cuda.core import Device as CoreDevice

    core = CoreDevice(ordinal)
    major, minor = core.compute_capability
    return Device(ordinal, f"sm_{major}{minor}", core.properties.multiprocessor_count)


@functools.cache
def load(image: Image, device: Device) -> _LoadedKernel:
    """The image's kernel, loaded once per device."""
    from cuda.core import ObjectCode

    with _current(device.ordinal):
        code = ObjectCode.from_cubin(image.cubin)
        return _LoadedKernel(code.get_kernel(image.entry), device.ordinal)


def launch(kernel: _LoadedKernel, plan: Plan, stream: int, words: tuple) -> None:
    """Starts the kernel on the caller's stream and returns at once.

    `words` holds one entry per parameter: int (a pointer or an int64), np.float32 or np.float64.
    """
    from cuda.core import LaunchConfig, launch

    with _current(kernel.ordinal):
        config = LaunchConfig(grid=plan.blocks, block=plan.threads, shmem_size=plan.shared_bytes)
        # 0 is the legacy stream to CuPy and torch, but may be the per-thread one to the driver's bindings; 1 is legacy.
        launch(_Stream(stream or 1), config, kernel.kernel, *words)


class _Stream:
    """A foreign stream handle, in the protocol of cuda.core."""

    def __init__(self, handle: int):
        self.handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle


class _current:
    """Makes a device current, and restores on exit the context that was: callers keep the device they had chosen."""

    def __init__(self, ordinal: int):
        self.ordinal = ordinal

    def __enter__(self):
        from cuda.bindings import driver
        from cuda.core import Device as CoreDevice

        self.driver = driver
        self.previous = driver.cuCtxGetCurrent()[1]
        CoreDevice(self.ordinal).set_current()

    def __exit__(self, *error):
        self.driver.cuCtxSetCurrent(self.previous)
