"""Where an array lives and how the kernels see it: the one place that knows array libraries.

`wrap` turns whatever the user holds into an `Array`: pointer, dtype name, shape, strides in elements, place. `empty`
allocates a result of the same kind. No library is imported unless an array of it was passed.

A device array of another library takes part without CuPy if it has `__cuda_array_interface__` (version 3), `dtype`,
`__dlpack_device__()` and `__gpusoftmax_empty__(shape, dtype)`, which returns a new array of its kind on its device.
"""

import contextlib
import functools
import importlib
import math
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import array_api_compat
import ml_dtypes
import numpy as np

from gpusoftmax import _checks, _memory
from gpusoftmax.kernels import operands
from gpusoftmax.kernels.forks import import_module
from gpusoftmax.kernels.operands import Numbers, Place, Transform

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
CPU = Place("cpu")
_DLPACK_CPU = (1, 3)  # kDLCPU, kDLCUDAHost: pinned host memory


class Array(NamedTuple):
    """One array. `strides` count elements and may be 0 or negative; `pointer` is the address of element 0.

    `owner` is the array itself; for JAX, whose arrays are reached and made through NumPy or CuPy, it is a pair: a JAX
    array of the call, which knows the device, and the NumPy or CuPy array. `transform` is what logits go through where
    they are read: that of an Operand, with arrays in place of operands.
    """

    owner: Any
    pointer: int
    kind: str
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    place: Place
    writable: bool
    transform: Transform | None = None

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return numpy_dtype(self.dtype).itemsize

    @property
    def library_array(self):
        return self.owner[1] if self.kind == "jax" else self.owner

    @property
    def home(self) -> str:
        library = _TITLES[self.kind]
        if self.place.target == "cpu":
            return f"a {library} array on the CPU" + (f" (device {self.place.device})" if self.place.device else "")
        return f"a {library} array on GPU {self.place.device}"

    def address_map(self) -> np.ndarray:
        """A NumPy array at the same addresses, for questions about overlap. Its elements are never touched."""
        interface = {
            "version": 3,
            "data": (self.pointer, True),
            "shape": self.shape,
            "strides": tuple(stride * self.itemsize for stride in self.strides),
            "typestr": f"|V{self.itemsize}",
        }
        return np.asarray(SimpleNamespace(__array_interface__=interface))

    @property
    def span(self) -> tuple[int, int]:
        """The first address of the array and the one behind its last."""
        low, high = self.reach
        return self.pointer + low, self.pointer + high

    @property
    def reach(self) -> tuple[int, int]:
        """`span`, counted from element 0."""
        return _reach(self.shape, self.strides, self.itemsize)


class RequiresGrad(TypeError):
    """A torch tensor came where gradients are recorded. Functions that have a differentiable version go on there."""

    def __init__(self, argument: str):
        super().__init__(
            f"{argument} is a tensor that requires grad, and this function records no gradient: use the functions of "
            f"gpusoftmax.torch where they exist, or pass {argument}.detach()"
        )
        self.argument = argument


_TITLES = {"numpy": "NumPy", "cupy": "CuPy", "torch": "torch", "jax": "JAX", "device": "CUDA"}


@functools.cache
def numpy_dtype(name: str) -> np.dtype:
    return BFLOAT16 if name == "bfloat16" else np.dtype(operands.MASKS.get(name, name))


# A small call on a GPU is as quick as its way to the driver. What follows from dtypes, shapes and strides alone is
# therefore worked out once.


@functools.lru_cache(maxsize=256)
def _name(dtype: np.dtype) -> str:
    return dtype.name


@functools.lru_cache(maxsize=4096)
def _reach(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> tuple[int, int]:
    """The lowest byte of an array and the one behind its highest, counted from element 0."""
    if math.prod(shape) == 0:
        return 0, 0
    steps = [stride * (size - 1) for stride, size in zip(strides, shape, strict=True)]
    low, high = sum(step for step in steps if step < 0), sum(step for step in steps if step > 0)
    return low * itemsize, (high + 1) * itemsize


@functools.lru_cache(maxsize=4096)
def _element_strides(strides: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    return tuple(stride // itemsize for stride in strides)


@functools.lru_cache(maxsize=4096)
def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a C-contiguous array."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


@functools.lru_cache(maxsize=256)
def _cuda(device: int, stream: int) -> Place:
    return Place("cuda", device, stream)


# ---------------------------------------------------------------- from the user's array to an Array


def wrap(x, name: str) -> Array:
    """Describes an array argument. Anything that is no array becomes a NumPy array."""
    array = _described(x, name)
    if array.size and not array.pointer:
        raise TypeError(f"{name} has no memory of its own: it is a fake, zero or traced tensor; see gpusoftmax.torch")
    return array


_readers: dict[type, Callable[[Any, str], Array]] = {}
"""How an array of a library is read, by its type: the types that have been met."""


def _described(x, name: str) -> Array:
    kind = type(x)
    if kind not in _readers:
        reader = _reader(x)
        if reader is None:
            return _from_protocol(x, name)
        _readers[kind] = reader
    return _readers[kind](x, name)


def _reader(x) -> Callable[[Any, str], Array] | None:
    if isinstance(x, np.ndarray | np.generic):
        return _from_numpy
    if array_api_compat.is_cupy_array(x):
        return _from_cupy
    if array_api_compat.is_torch_array(x):
        return _from_torch
    return _from_jax if array_api_compat.is_jax_array(x) else None


def is_torch_on_cpu(x) -> bool:
    """False for a tensor of a class that has not been met yet."""
    return _readers.get(type(x)) is _from_torch and x.is_cpu


def on_gpu(x) -> tuple[tuple, int]:
    """What tells the layout of an array on a GPU from any other, and its address; TypeError if it is not on one."""
    kind = type(x)
    reader = _readers.get(kind)
    if reader is _from_cupy:
        data = x.data
        device, pointer = data.device_id, data.ptr
        stream = sys.modules["cupy"].cuda.get_current_stream(device).ptr
        layout = kind, x.dtype, x.shape, x.strides, device, stream
    elif (reader is _from_torch and x.is_cuda) or (reader is None and hasattr(kind, "__gpusoftmax_empty__")):
        _, pointer, *layout = _described(x, "an argument")
        layout = tuple(layout)
    else:
        raise TypeError
    if not pointer:
        raise TypeError
    return layout, pointer


def _from_protocol(x, name: str) -> Array:
    """Whatever says itself where its memory is, or else can be made an array by NumPy."""
    if hasattr(x, "__cuda_array_interface__") and hasattr(x, "__gpusoftmax_empty__"):
        return _from_device(x, name)
    if hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__"):
        # Preferred: CuPy's import of the other interface waits on the host for the producer's stream.
        if int(x.__dlpack_device__()[0]) in _DLPACK_CPU:
            return _from_numpy(_from_dlpack(x, name), name)
        return _from_cupy(_cupy(name).from_dlpack(x), name)
    if hasattr(x, "__cuda_array_interface__"):
        read_only = x.__cuda_array_interface__["data"][1]
        return _from_cupy(_cupy(name).asarray(x), name)._replace(writable=not read_only)
    try:
        array = np.asarray(x)
    except ValueError as error:  # rows of unequal lengths
        raise _checks.no_array(x, name, error) from None
    return _from_numpy(array, name)


def with_shape(given, name: str):
    """A number or an array: of one that has a protocol alone, and no shape to be told from a number by, that of NumPy
    or CuPy.
    """
    if type(given) in _NUMBERS or hasattr(given, "shape"):
        return given
    is_array = hasattr(given, "__dlpack__") or hasattr(given, "__cuda_array_interface__")
    return wrap(given, name).owner if is_array else given


_NUMBERS = frozenset((int, float, type(None)))


def _from_dlpack(x, name: str) -> np.ndarray:
    try:
        return np.from_dlpack(x)
    except (BufferError, RuntimeError) as error:  # a dtype that NumPy lacks, or the library of x does not export it
        raise _checks.no_dlpack(x, name, error) from None


def logits(x, name: str) -> Array:
    """An array argument that must be floating; integers and bools of NumPy and CuPy become float64, as in SciPy."""
    array = wrap(x, name)
    if array.dtype in (*_checks.INTEGERS, "bool") and array.kind in ("numpy", "cupy"):
        array = wrap(array.owner.astype(np.float64), name)
    _checks.floating(array.dtype, name)
    return array


def _cupy(name: str):
    try:
        return importlib.import_module("cupy")
    except ImportError as error:
        raise TypeError(
            f"{name} is a GPU array of another library, which needs CuPy: pip install 'gpusoftmax[cu13]'"
        ) from error


def _from_numpy(x, name: str) -> Array:
    # There are none before somebody has imported numpy.ma, which NumPy does when it is first named.
    if "numpy.ma" in sys.modules and isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, whose mask would be lost; fill the masked logits with -inf first")
    array = np.asarray(x)
    writable = isinstance(x, np.ndarray) and array.flags.writeable
    if not array.itemsize:  # nothing could be said of its strides
        _checks.floating(array.dtype.name, name)
    if not array.dtype.isnative or any(s % array.itemsize for s in array.strides):
        # The kernels count in whole, native elements; such an array is copied, and so it cannot be written through.
        array = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
        writable = False
    strides = _element_strides(array.strides, array.itemsize)
    return Array(array, _memory.address(array), "numpy", _name(array.dtype), array.shape, strides, CPU, writable)


def _from_cupy(x, name: str) -> Array:
    device, pointer = x.data.device_id, x.data.ptr
    place = _cuda(device, sys.modules["cupy"].cuda.get_current_stream(device).ptr)
    strides = _strides_on_gpu(pointer, x.shape, x.strides, x.itemsize, name)
    return Array(x, pointer, "cupy", _name(x.dtype), x.shape, strides, place, True)


def _strides_on_gpu(
    pointer: int, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, name: str
) -> tuple[int, ...]:
    """Strides in elements. A GPU cannot read others than aligned ones, neither to copy them."""
    if pointer % itemsize or any(stride % itemsize for stride, size in zip(strides, shape, strict=True) if size > 1):
        raise ValueError(
            f"{name} lies at {pointer:#x} with strides of {strides} bytes, expected multiples of the {itemsize} bytes "
            f"of an element: a GPU reads no others, so copy the bytes of which it is a view to such a place first"
        )
    return _element_strides(strides, itemsize)


def _from_torch(x, name: str) -> Array:
    torch = sys.modules["torch"]
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        raise TypeError(
            f"{name} is traced by torch: kernels need values, so call gpusoftmax outside of torch.compile and "
            f"torch.jit.trace, or use gpusoftmax.torch inside of torch.compile"
        )
    # Where forward mode is off, torch.func.linearize has tensors that fail when they are asked.
    if torch._C._is_fwd_grad_enabled() and torch.autograd.forward_ad.unpack_dual(x).tangent is not None:
        raise TypeError(
            f"{name} carries a tangent of forward-mode differentiation, which this function would drop: "
            f"pass {name}.detach()"
        )
    if x.requires_grad and torch.is_grad_enabled():
        raise RequiresGrad(name)
    not_nested(x, name)
    if x.layout != torch.strided:
        raise TypeError(f"{name} has layout {x.layout}, expected a dense tensor: call .to_dense()")
    if not (x.is_cpu or x.is_cuda):
        raise TypeError(f"{name} is on device {x.device}, expected cpu or cuda")
    x = x.resolve_neg()
    place = CPU if x.is_cpu else _cuda(x.device.index, torch.cuda.current_stream(x.device).cuda_stream)
    dtype = str(x.dtype).removeprefix("torch.")
    return Array(x, _torch_pointer(x), "torch", dtype, tuple(x.shape), tuple(x.stride()), place, True)


def not_nested(tensor, name: str) -> None:
    if tensor.is_nested:
        raise TypeError(
            f"{name} is a nested tensor, expected a dense one: pass its .values(), or where rows have different "
            f"lengths its .to_padded_tensor(-math.inf)"
        )


def _torch_pointer(tensor) -> int:
    """The address of element 0, 0 if the tensor has no memory."""
    try:
        return tensor.data_ptr()
    except RuntimeError:  # what functorch's wrappers do; others say 0
        return 0


def _from_jax(x, name: str) -> Array:
    jax = importlib.import_module("jax")
    if isinstance(x, jax.core.Tracer):
        raise TypeError(
            f"{name} is traced by jax: kernels need values, so call gpusoftmax outside of jit and vmap, with jax.grad "
            f"the functions of gpusoftmax.jax, or use jax.nn inside (jax.pure_callback copies the arrays)"
        )
    device, *others = x.devices()
    if others:
        raise TypeError(f"{name} is spread over {1 + len(others)} devices, expected one: jax.device_put it there first")
    if x.dtype == np.float64 and not jax.config.jax_enable_x64:
        raise TypeError(f"{name} is float64, which JAX narrows to float32: set jax_enable_x64, or pass float32")
    if device.platform == "cpu":
        array = _from_numpy(np.asarray(x), name)
        array = array._replace(place=Place("cpu", device.id))
    else:
        array = _from_cupy(_cupy(name).from_dlpack(x), name)
    return array._replace(kind="jax", owner=(x, array.owner), writable=False)


def _from_device(x, name: str) -> Array:
    interface = x.__cuda_array_interface__
    dtype = np.dtype(x.dtype)
    pointer, read_only = interface["data"]
    shape = tuple(interface["shape"])
    strides = interface.get("strides")
    if strides is None:
        strides = tuple(stride * dtype.itemsize for stride in row_major(shape))
    strides = _strides_on_gpu(pointer, shape, tuple(strides), dtype.itemsize, name)
    stream = interface.get("stream")
    if stream == 0:
        raise ValueError(
            f"{name} gives stream 0, which __cuda_array_interface__ forbids: expected None, 1 or 2 or a handle"
        )
    place = _cuda(x.__dlpack_device__()[1], stream or 0)
    return Array(x, pointer, "device", _name(dtype), shape, strides, place, not read_only)


# ---------------------------------------------------------------- results


class Made:
    """What a call makes of arrays."""

    def __init__(self):
        self.arrays: list[Array] = []  # from `empty`; held, so that no address is used twice
        self.results: list[tuple[Any, Array]] = []  # what the caller gets for them
        self.is_all = True  # False: another call was recorded in between, by a signal's handler or a finaliser


class _Recorder(threading.local):
    made: Made | None = None
    note_read: Callable[[Array, Any], None] | None = None


_recorder = _Recorder()


@contextlib.contextmanager
def recording(note_read: Callable[[Array, Any], None]) -> Iterator[Made]:
    """Notes what this thread makes, and tells `note_read` what `to_python` has read."""
    made = Made()
    _recorder.made, _recorder.note_read = made, note_read
    try:
        yield made
    finally:
        made.is_all = _recorder.made is made
        _recorder.made, _recorder.note_read = None, None


def is_recording() -> bool:
    return _recorder.made is not None


def empty(like: Array, shape: tuple[int, ...], dtype: str) -> Array:
    """A new C-contiguous array of the same kind on the same device. Its contents are whatever was there."""
    array = _empty(like, shape, dtype)
    if _recorder.made is not None:
        _recorder.made.arrays.append(array)
    return array


def make_beside(
    arrays: list[Any], pointers: list[int], made: Sequence[tuple[tuple[int, ...], np.dtype]], place: Place
) -> None:
    """Adds new arrays, as `empty` makes them, and their addresses: of the kind and on the device of the first array,
    which on_gpu knows.
    """
    if _readers.get(type(arrays[0])) is _from_cupy:
        for shape, dtype in made:
            array = _empty_cupy(shape, dtype, place.device)
            arrays.append(array)
            pointers.append(array.data.ptr)
    else:
        like = _described(arrays[0], "an argument")
        for shape, dtype in made:
            array, pointer, *_ = _empty(like, shape, _name(dtype))
            arrays.append(array)
            pointers.append(pointer)


def _empty(like: Array, shape: tuple[int, ...], dtype: str) -> Array:
    if like.kind == "torch":
        torch = sys.modules["torch"]
        tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=like.owner.device)
        is_plain = type(tensor) is torch.Tensor
        pointer = _torch_pointer(tensor) if is_plain else 0
        if not is_plain or (tensor.numel() and not pointer):
            raise TypeError(
                "torch makes fake or functional tensors here, which have no memory for a result: leave FakeTensorMode "
                "or torch.func.functionalize"
            )
        array = Array(tensor, pointer, "torch", dtype, tuple(shape), row_major(tuple(shape)), like.place, True)
        if like.place.target == "cpu":
            _memory.in_huge_pages(array.pointer, array.size * array.itemsize)
        return array
    if like.kind == "device":
        return _from_device(like.owner.__gpusoftmax_empty__(shape, numpy_dtype(dtype)), "out")
    if like.place.target == "cpu":
        array = _from_numpy(_memory.aligned(shape, numpy_dtype(dtype)), "out")
    else:
        owner = _empty_cupy(shape, numpy_dtype(dtype), like.place.device)
        array = Array(owner, owner.data.ptr, "cupy", dtype, shape, row_major(shape), like.place, True)
    if like.kind == "jax":
        return array._replace(kind="jax", owner=(like.owner[0], array.owner), place=like.place)
    return array


def _empty_cupy(shape: tuple[int, ...], dtype: np.dtype, device: int):
    cupy = sys.modules["cupy"]
    if cupy.cuda.get_device_id() == device:
        return cupy.empty(shape, dtype)
    with cupy.cuda.Device(device):
        return cupy.empty(shape, dtype)


def output(out, like: Array, shape: tuple[int, ...], dtype: str, requested: str | None = None) -> Array:
    """The array to write: the user's `out`, checked, or a new one. `dtype` is what a new one gets."""
    if like.kind == "jax" and requested == "float64" and not importlib.import_module("jax").config.jax_enable_x64:
        raise TypeError("dtype is float64, which JAX narrows to float32: set jax_enable_x64, or ask for float32")
    if out is None:
        return empty(like, shape, requested or dtype)
    if like.kind == "jax":
        raise TypeError("out is not supported for JAX arrays, which are immutable: use the returned array")
    array = wrap(out, "out")
    ordinary = isinstance(out, np.ndarray) and (array.size == 0 or np.shares_memory(array.owner, out))
    if array.kind == "numpy" and not ordinary:
        raise TypeError(
            "out is byte-swapped, has strides that are no multiples of its itemsize, or is no array at all, expected "
            "an ordinary writable NumPy array"
        )
    if array.kind == "torch" and array.owner is not out:
        raise TypeError("out is a lazily negated view, expected an ordinary tensor: pass out.resolve_neg()")
    _checks.same_home(like, array, "the input", "out")
    _checks.same_shape(array, shape, "out", "to match the result")
    _checks.output(array, requested, dtype)
    return array if array.owner is out else array._replace(owner=out)


def result(array: Array, given=None):
    """What the user gets back: `out` itself where one was given; a NumPy scalar where NumPy would return one."""
    if given is not None:
        written(given)
        return given
    if array.kind == "jax":
        return _to_jax(array)
    told = array.owner[()] if array.kind == "numpy" and array.ndim == 0 else array.owner
    if _recorder.made is not None:
        _recorder.made.results.append((told, array))
    return told


def written(given) -> None:
    """What is due after a user's array was written to."""
    if _readers.get(type(given)) is _from_torch:
        sys.modules["torch"].autograd.graph.increment_version(given)


def _to_jax(array: Array):
    jax = importlib.import_module("jax")
    if array.place.target == "cpu":
        like = array.owner[0]
        (device,) = like.devices()
        if like.committed:
            return jax.device_put(array.library_array, device)
        with jax.default_device(device):  # free to be combined with arrays of other devices, as the input was
            return jax.device_put(array.library_array)
    # JAX knows no current stream: its own work must not start before this result is there, nor reuse what it was read
    # from.
    importlib.import_module("cupy").cuda.get_current_stream(array.place.device).synchronize()
    return jax.dlpack.from_dlpack(array.library_array)


def compute_dtype(*arrays: Array | None) -> str:
    """The format in which a call with these arrays is computed."""
    return operands.compute_dtype(*(array.dtype for array in arrays if array is not None))


def numbers(array: Array) -> Numbers:
    """A contiguous array for a kernel."""
    return Numbers(array.pointer, array.dtype)


def to_python(array: Array):
    """The value of a one-element array; waits for the device."""
    value = array.library_array.item()
    if _recorder.note_read is not None:
        _recorder.note_read(array, value)
    return value


def next_integer(given: Any, counts: Any) -> Any:
    """An array of integers plus 1, by its own library; as it is where counts, if there are any, are not above 0."""
    array = wrap(given, "an index")
    if array.kind == "device":
        raise TypeError(f"temperature is 0, which takes an addition: of {array.home} no library is known that adds")
    if counts is None:
        return given + 1
    library = array_api_compat.array_namespace(given)
    return given + (library.asarray(counts, dtype=given.dtype) > 0)  # torch compares no uint16 and wider


def reshaped(array: Array, shape: tuple[int, ...], name: str) -> Array:
    """The array in another shape, by its own library: a view, or a copy where no strides walk it. One of JAX becomes
    the NumPy or CuPy array by which it is reached.
    """
    if array.shape == shape and array.kind != "jax":
        return array
    return wrap(array.library_array.reshape(shape), name)


def current_device(array: Array) -> contextlib.AbstractContextManager:
    """Where CuPy works, which has a current device; torch works where its tensors are."""
    if array.place.target == "cuda" and array.kind in ("cupy", "jax"):
        return sys.modules["cupy"].cuda.Device(array.place.device)
    return contextlib.nullcontext()


def kernels(place: Place, op: str):
    """The module of an operation's kernels for the place where the arrays live."""
    return _kernels(place.target, op)


@functools.cache
def _kernels(target: str, op: str):
    return import_module(f"gpusoftmax.kernels.{target}.{op}")


def array_module(device: str):
    """The library that makes arrays on a device: NumPy for "cpu", CuPy for "cuda"."""
    if device == "cpu":
        return np
    try:
        cupy = importlib.import_module("cupy")
        cupy.cuda.runtime.getDeviceCount()  # raises where there is no driver or no GPU
    except Exception as error:  # whatever a broken installation raises
        raise RuntimeError(f"CuPy cannot use a GPU ({type(error).__name__}: {error}); see gpusoftmax info") from error
    return cupy
