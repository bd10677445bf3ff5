"""The only file that talks to the CUDA driver: three functions, so that an emulator can stand in for them."""

import functools
import threading
from dataclasses import dataclass

from gpusoftmax.kernels.cuda import requirements
from gpusoftmax.kernels.cuda.compile import Image
from gpusoftmax.kernels.cuda.plan import Plan

_FREE_SHARED_BYTES = 48 * 1024
PORTABLE_CLUSTER = 8
"""A kernel that wants more dynamic shared memory or larger clusters has to be permitted to."""


@dataclass(eq=False)  # compared by identity, as a key that costs nothing: there is one object per device
class Device:
    ordinal: int
    arch: str  # "sm_90"
    multiprocessors: int
    largest_cluster: int = 16  # as far as is known


class ClusterDoesNotFit(Exception):
    """A launch that was planned in larger clusters than the device has room for. It is to be planned again."""


class _LoadedKernel:
    """A kernel in the memory of one device: that device's context, and the launches that were configured before."""

    def __init__(self, kernel, ordinal: int, context: int):
        self.kernel = kernel
        self.ordinal = ordinal
        self.context = context
        self.shared_bytes = _FREE_SHARED_BYTES
        self.configs: dict[Plan, object] = {}
        self.latest: tuple[Plan | None, object] = None, None
        """The entry of configs that was used last: the same plan again need not be hashed."""


@functools.cache
def device(ordinal: int) -> Device:
    """What the launch plans need to know of a device."""
    requirements.check()
    from cuda.core import Device as CoreDevice

    core = CoreDevice(ordinal)
    major, minor = core.compute_capability
    return Device(ordinal, f"sm_{major}{minor}", core.properties.multiprocessor_count)


_loaded: dict[tuple[Image, Device], _LoadedKernel] = {}


def load(image: Image, device: Device, stream: int) -> _LoadedKernel:
    """The image's kernel, loaded once per device.

    Loading is not allowed while a graph is captured on the stream that the kernel is wanted for: RuntimeError.
    """
    try:
        return _loaded[image, device]
    except KeyError:
        pass
    from cuda.core import ObjectCode

    with _current(device.ordinal) as context:
        if _is_capturing(stream):
            raise RuntimeError(
                f"the kernel {image.kernel} is not loaded yet, which cannot be done while a CUDA graph is captured: "
                f"make the same call once before the capture"
            )
        kernel = ObjectCode.from_cubin(image.cubin).get_kernel(image.entry)
    return _loaded.setdefault((image, device), _LoadedKernel(kernel, device.ordinal, context))


def launch(kernel: _LoadedKernel, plan: Plan, stream: int, words: tuple) -> None:
    """Starts the kernel on the caller's stream and returns at once.

    `words` holds one entry per parameter: int (a pointer or an int64), np.float32 or np.float64. Raises
    ClusterDoesNotFit where it cannot start.
    """
    current_context, start = _functions()
    latest, config = kernel.latest
    if latest is not plan:
        config = kernel.configs.get(plan)
        if config is None:
            config = kernel.configs[plan] = _configured(kernel, plan)
        kernel.latest = plan, config
    if int(current_context()[1]) == kernel.context:
        start(_stream(stream), config, kernel.kernel, *words)
    else:
        with _current(kernel.ordinal):
            start(_stream(stream), config, kernel.kernel, *words)


@functools.cache
def _functions():
    """What every launch needs of the driver's bindings, which are imported when the first kernel is launched."""
    from cuda.bindings.driver import cuCtxGetCurrent
    from cuda.core import launch

    return cuCtxGetCurrent, launch


_permitting = threading.Lock()
"""Held until the driver knows: another thread's launch may count on it."""


def _configured(kernel: _LoadedKernel, plan: Plan):
    """The launch as cuda.core wants it; raises what the kernel may use to what the plan asks for, if that is more."""
    from cuda.bindings import driver
    from cuda.core import LaunchConfig

    attributes = driver.CUfunction_attribute

    def permit(attribute, value: int) -> None:
        (error,) = driver.cuKernelSetAttribute(attribute, value, kernel.kernel.handle, kernel.ordinal)
        if error:
            raise RuntimeError(f"the driver refuses {attribute.name} = {value}: {error.name}")

    with _permitting:
        if plan.shared_bytes > kernel.shared_bytes:  # raised, never lowered: another thread's launch may be on its way
            permit(attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, plan.shared_bytes)
            kernel.shared_bytes = plan.shared_bytes
        if plan.cluster > PORTABLE_CLUSTER:
            permit(attributes.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1)
            if not _has_room(kernel, plan):
                raise ClusterDoesNotFit
    cluster = plan.cluster if plan.cluster > 1 else None
    return LaunchConfig(
        grid=plan.blocks // plan.cluster, cluster=cluster, block=plan.threads, shmem_size=plan.shared_bytes
    )


def _has_room(kernel: _LoadedKernel, plan: Plan) -> bool:
    """Whether the device can run one cluster of the plan: a part of a GPU may have too few multiprocessors together."""
    from cuda.bindings import driver

    cluster = driver.CUlaunchAttribute()
    cluster.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    dimensions = cluster.value.clusterDim
    dimensions.x, dimensions.y, dimensions.z = plan.cluster, 1, 1
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = plan.blocks, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = plan.threads, 1, 1
    config.sharedMemBytes, config.attrs, config.numAttrs = plan.shared_bytes, [cluster], 1
    with _current(kernel.ordinal):
        error, count = driver.cuOccupancyMaxActiveClusters(int(kernel.kernel.handle), config)
    return not error and count > 0


# A stream object of cuda.core takes longer to make than to launch on. It owns nothing: that a handle may come to stand
# for another stream does not matter.
@functools.lru_cache(maxsize=256)
def _stream(handle: int):
    from cuda.core import Stream

    # 0 is the legacy stream to CuPy and torch, but may be the per-thread one to the driver's bindings; 1 is legacy.
    return Stream.from_handle(handle or 1)


def _is_capturing(stream: int) -> bool:
    from cuda.bindings import driver

    error, status = driver.cuStreamIsCapturing(stream or 1)
    if error:  # the legacy stream cannot be asked while another stream is captured
        return error == driver.CUresult.CUDA_ERROR_STREAM_CAPTURE_IMPLICIT
    return status != driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE


class _current:
    """Makes a device current, and restores on exit the context that was: callers keep the device they had chosen."""

    def __init__(self, ordinal: int):
        self.ordinal = ordinal

    def __enter__(self) -> int:
        """The device's context."""
        from cuda.bindings import driver
        from cuda.core import Device as CoreDevice

        self.driver = driver
        self.previous = driver.cuCtxGetCurrent()[1]
        CoreDevice(self.ordinal).set_current()
        return int(driver.cuCtxGetCurrent()[1])

    def __exit__(self, *error):
        self.driver.cuCtxSetCurrent(self.previous)
