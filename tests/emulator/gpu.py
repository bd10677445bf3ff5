"""An emulated GPU: runs the library's public calls, on arrays at made-up device addresses, without a device.

    with emulated_gpu("sm_90") as gpu:
        probs = gpu.get(gpusoftmax.softmax(gpu.array(logits)))
        assert gpu.stats[-1].read["global"] == logits.nbytes

device, load and launch of gpusoftmax.kernels.cuda.driver are replaced, and nothing else: the library allocates through
__gpusoftmax_empty__, compiles its kernels to PTX and launches them as on a device; the PTX is run here.
"""

import contextlib
import ctypes
import re
import threading
import weakref
from dataclasses import dataclass
from unittest import mock

import numpy as np

from gpusoftmax.kernels.cuda import driver
from tests.emulator.errors import (
    EmulatorError,
    ForeignMemory,
    ForeignStream,
    FreedMemory,
    OutsideChanged,
    UninitialisedRead,
    WrongArchitecture,
)
from tests.emulator.launch import MAX_LANES, MAX_STEPS, Kernel, Stats, kernel_of, load_variables
from tests.emulator.memory import SPARSE, DeviceMemory
from tests.emulator.parser import parse
from tests.emulator.ptx_types import FRESH, READY

DEFAULT_STREAM = 7
KEPT_LOGS = 8  # launches whose accesses are kept one by one; of older ones the counts
_one_launch_at_a_time = threading.Lock()  # machines are shared by all devices


def emulated_gpu(
    arch="sm_90",
    devices=1,
    seed=None,
    approx="exact",
    approx_seed=0,
    check_race=True,
    track=True,
    multiprocessors=132,
    max_lanes=MAX_LANES,
    max_steps=MAX_STEPS,
):
    """A context in which the library runs on emulated devices; gives an EmulatedGPU.

    arch              of every device, such as "sm_90"
    seed              a random schedule of lanes, warps and blocks, and order of atomics: results must not depend on it
    approx            "exact": approximate instructions are correctly rounded; "adversarial": each is off by an error
                      within its bound that approx_seed picks
    approx_seed       see approx
    check_race        look for races on shared memory: between warps and, with a seed, between lanes of one
    track             note every access to global memory, for stats and reads()
    multiprocessors   of every device
    max_lanes         threads that are run together, which is a matter of speed alone
    max_steps         instructions after which a launch is taken to be endless
    """
    if approx not in ("exact", "adversarial"):
        raise ValueError(f"approx must be 'exact' or 'adversarial', got {approx!r}")
    options = Options(seed, approx_seed if approx == "adversarial" else None, check_race, track, max_lanes, max_steps)
    return EmulatedGPU(arch, devices, multiprocessors, options)


@dataclass(frozen=True)
class Options:
    seed: int | None
    adversary: int | None  # seed of the errors of approximate instructions, if there are to be any
    check_race: bool
    track: bool
    max_lanes: int
    max_steps: int


class EmulatedArray:
    """An array on an emulated device: what the library needs to know of it, and nothing that would copy it."""

    def __init__(self, gpu, allocation, pointer, shape, strides, dtype, readonly, stream):
        self._gpu, self._allocation, self._pointer, self._stream = gpu, allocation, pointer, stream
        self.shape, self.strides, self.dtype, self._readonly = shape, strides, np.dtype(dtype), readonly
        allocation.owners += 1
        allocation.streams.add(stream)
        weakref.finalize(self, _release, allocation, gpu._found).atexit = False

    @property
    def __cuda_array_interface__(self):
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "strides": self.strides,
            "data": (self._pointer if self.size else 0, self._readonly),
            "stream": self._stream or None,  # 0 is not allowed here
            "version": 3,
        }

    def __dlpack_device__(self):
        return (2, self._allocation.device)

    def __gpusoftmax_empty__(self, shape, dtype):
        return self._gpu._empty(shape, dtype, self._allocation.device, self._stream)

    def __array__(self, dtype=None, copy=None):
        raise TypeError("an emulated device array is not copied to the host implicitly; use gpu.get(array)")

    @property
    def ndim(self):
        return len(self.shape)

    @property
    def size(self):
        return int(np.prod(self.shape, dtype=np.int64))

    def __len__(self):
        if not self.shape:
            raise TypeError("len() of a 0-d array")
        return self.shape[0]

    def __repr__(self):
        return f"EmulatedArray({self._allocation.name!r}, shape={self.shape}, dtype={self.dtype})"

    def item(self):
        return self._gpu.get(self).item()

    def _live(self):
        """The allocation, if it has not been freed."""
        if self._allocation.freed:
            raise FreedMemory(f"{self._allocation.name} has been freed")
        return self._allocation


def _release(allocation, found):
    """An array object is gone; with the last one its memory is, too. What is found wrong is raised at the end."""
    allocation.owners -= 1
    if allocation.owners == 0 and not allocation.freed:
        try:
            allocation.check_outside()
        except OutsideChanged as error:
            found.append(error)
        allocation.free()


@dataclass(frozen=True)
class _Loaded:
    """What load() returns: a kernel on a device."""

    kernel: Kernel
    device: int


class EmulatedGPU:
    """The devices of one emulated_gpu context. stats holds one Stats per launch."""

    def __init__(self, arch, devices, multiprocessors, options):
        self.arch, self.arch_number, self.options = arch, _arch_number(arch), options
        self.memories = [DeviceMemory(number) for number in range(devices)]
        self.devices = [driver.Device(number, arch, multiprocessors) for number in range(devices)]
        self.current_stream, self.stats = DEFAULT_STREAM, []
        self._roots, self._loaded, self._found, self._stack = {}, set(), [], contextlib.ExitStack()

    def __enter__(self):
        for name, function in (("device", self._device), ("load", self._load), ("launch", self._launch)):
            self._stack.enter_context(mock.patch.object(driver, name, function))
        return self

    def __exit__(self, kind, *_):
        self._stack.close()
        if kind is None:
            self.check_outside()

    # ---- the three functions of the driver
    def _device(self, ordinal):
        return self.devices[ordinal]

    def _load(self, image, device, stream):
        ours, theirs = self.arch_number, _arch_number(image.arch)
        if theirs // 10 != ours // 10 or theirs > ours or (image.arch.endswith("a") and image.arch != self.arch):
            raise WrongArchitecture(f"image for {image.arch} on a device of {self.arch}")
        program = parse(image.ptx)
        if program.target and _arch_number(program.target) > ours:
            raise WrongArchitecture(f"PTX for {program.target} on a device of {self.arch}")
        if (program, device.ordinal) not in self._loaded:
            load_variables(program, self.memories[device.ordinal])
            self._loaded.add((program, device.ordinal))
        # image.entry would link a cubin that nobody needs here.
        entry = program.entries[0] if len(program.entries) == 1 else image.entry
        return _Loaded(kernel_of(program, entry), device.ordinal)

    def _launch(self, loaded, plan, stream, words):
        kernel, device = loaded.kernel, loaded.device
        kernel.check(plan, self.arch_number)
        memory = self.memories[device]
        streams = {self.current_stream}
        for k, word in enumerate(words):
            if isinstance(word, int) and not isinstance(word, bool):
                self.check_foreign(word, device, f"parameter {k} of {kernel.entry[:60]}")
                allocation = memory.find(word)
                streams |= allocation.streams if allocation else set()
        if stream not in streams:
            raise ForeignStream(f"{kernel.entry[:60]} launched on stream {stream}, its arrays are on {sorted(streams)}")
        stats = Stats(kernel.entry, plan, device, stream)

        def foreign(address, who):
            self.check_foreign(address, device, who)

        with _one_launch_at_a_time:
            kernel.run(plan, memory, words, stats, self.options, foreign)
        self.stats.append(stats)
        if len(self.stats) > KEPT_LOGS:
            self.stats[-KEPT_LOGS - 1].settle()

    def check_foreign(self, address, device, who):
        """Addresses of another device may not be used on this one."""
        for memory in self.memories:
            allocation = memory.find(address) if memory.device != device else None
            if allocation is not None and self.memories[device].find(address) is None:
                raise ForeignMemory(
                    f"{allocation.name} lies on device {memory.device}, used on device {device} by {who}"
                )

    # ---- arrays
    @contextlib.contextmanager
    def stream(self, handle):
        """Make a stream current: new arrays live on it."""
        before, self.current_stream = self.current_stream, handle
        try:
            yield self
        finally:
            self.current_stream = before

    def array(self, a, device=0, stream=None, name=None):
        """Upload a NumPy array. It keeps dtype, shape, strides, read-only flag and its place in its base array.

        Views of one NumPy base share one device allocation for as long as any of them lives. Bytes of the base outside
        the views may not be touched by kernels.
        """
        a = np.asanyarray(a)
        stream = self.current_stream if stream is None else stream
        root, start, size = _base_of(a)
        key = (start, size, device)
        allocation = self._roots.get(key)
        if allocation is None or allocation.freed:
            memory = self.memories[device]
            allocation = memory.allocate(size, name or f"array {next(memory.numbers)} {a.dtype}{list(a.shape)}")
            allocation.host_root = root  # keeps its address from being used again
            self._roots[key] = allocation
            if 0 < size <= SPARSE:
                allocation.original = np.frombuffer(_raw_bytes(start, size), np.uint8).copy()
                allocation.data[:size] = allocation.original
        pointer = allocation.start + _address(a) - start if a.size else allocation.start
        allocation.upload(a, pointer)
        if allocation.original is not None and not allocation.outside:
            allocation.original = None
        return EmulatedArray(self, allocation, pointer, a.shape, a.strides, a.dtype, not a.flags.writeable, stream)

    def _empty(self, shape, dtype, device, stream):
        """Memory as an allocator gives it: reading before writing is an error."""
        shape = (shape,) if isinstance(shape, int) else tuple(int(n) for n in shape)
        dtype, memory = np.dtype(dtype), self.memories[device]
        strides, step = [], dtype.itemsize
        for n in reversed(shape):
            strides.insert(0, step)
            step *= max(n, 1)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        allocation = memory.allocate(size, f"empty {next(memory.numbers)} {dtype}{list(shape)}")
        allocation.fill(FRESH)
        return EmulatedArray(self, allocation, allocation.start, shape, tuple(strides), dtype, False, stream)

    def empty(self, shape, dtype, device=0):
        """A new, uninitialised array on the current stream."""
        return self._empty(shape, dtype, device, self.current_stream)

    def free(self, array):
        """Free an array's memory at once, whoever still holds it."""
        array._live().check_outside()
        array._allocation.free()

    def get(self, result):
        """A NumPy copy of a device array; tuples and named tuples element by element; anything else as it is."""
        if isinstance(result, EmulatedArray):
            return self._download(result)
        if isinstance(result, tuple):
            parts = [self.get(part) for part in result]
            return type(result)(*parts) if hasattr(result, "_fields") else tuple(parts)
        return result

    def _download(self, array):
        allocation = array._live()
        allocation.check_outside()
        states = allocation.marks(allocation.state, array.shape, array.dtype.itemsize, array._pointer, array.strides)
        if allocation.fresh and (states != READY).any():
            where = tuple(int(k) for k in np.argwhere((states != READY).any(-1))[0])
            raise UninitialisedRead(f"element {where} of {allocation.name} was never written")
        return np.array(allocation.array(array.shape, array.dtype, array._pointer, array.strides))

    def check_outside(self):
        """No byte of a base array outside its views has changed. Also checked by get(), free() and at the end."""
        if self._found:
            raise self._found[0]
        for memory in self.memories:
            for allocation in memory.allocations:
                allocation.check_outside()

    # ---- what happened
    def reset_stats(self):
        self.stats.clear()

    def reads(self, array, launch=-1):
        """How often each element was read in a launch (the most read byte of it): integers shaped like the array."""
        return self._counts(array, launch, "read")

    def writes(self, array, launch=-1):
        """How often each element was written in a launch."""
        return self._counts(array, launch, "write")

    def _counts(self, array, launch, direction):
        if not self.options.track:
            raise EmulatorError("counts need emulated_gpu(..., track=True)")
        traffic = self.stats[launch].traffic.get(array._allocation.start)
        if traffic is None or array.size == 0:
            return np.zeros(array.shape, np.int64)
        offsets = np.full(array.shape, array._pointer - array._allocation.start)
        for axis, step in enumerate(array.strides):
            place = np.arange(array.shape[axis]) * step
            offsets += place.reshape(-1, *[1] * (array.ndim - axis - 1))
        return np.max([traffic.counts(direction, offsets + byte) for byte in range(array.dtype.itemsize)], axis=0)


def _arch_number(arch):
    return int(re.fullmatch(r"sm_(\d+)[af]?", arch).group(1))


def _address(a):
    return a.__array_interface__["data"][0]


def _raw_bytes(start, size):
    return (ctypes.c_ubyte * size).from_address(start)


def _base_of(a):
    """(object that owns the memory, first address, bytes) of the array at the end of the chain of bases."""
    root, owner = a, a
    while getattr(owner, "base", None) is not None:
        owner = owner.base
        if isinstance(owner, np.ndarray):
            root = owner
    low, high = np.lib.array_utils.byte_bounds(root)
    if not isinstance(owner, np.ndarray):  # an array over bytes, a memoryview, ...: the whole of that
        with contextlib.suppress(TypeError, ValueError, BufferError):
            whole = np.frombuffer(owner, np.uint8)
            low, high = np.lib.array_utils.byte_bounds(whole)
            root = whole
    if a.size == 0 or root.size == 0:
        return root, _address(root), 0
    return root, low, high - low
