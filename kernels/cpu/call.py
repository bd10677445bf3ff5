"""A call of a kernel in memory, so that one address is all a thread needs to take part in it.

    words     8 bytes each: the fields of the Job, then those of every argument, in order
    counters  from a cache line on, what the threads share, see job.py

A kernel is compiled for a `CallType`, which says what the words mean; to a thread it is a C function of the address.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import NativeValue, intrinsic, models, register_model, unbox

from gpusoftmax.kernels.cpu.job import Job, n_counters
from gpusoftmax.kernels.cpu.rows import Address, Strided
from gpusoftmax.kernels.numba_passes import compiling
from gpusoftmax.kernels.operands import has_address

COUNTERS_AT = 96
"""Words. The longest list of arguments, that of the loss with a transform, takes 71."""
WORKSPACE = Job._fields.index("workspace")
_WORD = ir.IntType(64)
_NUMBERS = {np.float32: types.float32, np.float64: types.float64}
_FIELDS = {
    **_NUMBERS,
    np.int16: types.int16,
    np.uint16: types.uint16,
    np.uint8: types.uint8,
    np.uint32: types.uint32,
    float: types.float64,
    type(None): types.none,
}
"""Of what stands in tuples. No word holds the tag of a Strided: its type is all it says."""


class CallType(types.Type):
    """The address of a call that walks over rows in a way, with arguments of these types behind the Job."""

    def __init__(self, way: types.Type, arguments: tuple[types.Type, ...]):
        self.way = way
        self.arguments = arguments
        super().__init__(name=f"Call({way}, {', '.join(map(str, arguments))})")


@register_model(CallType)
class _CallModel(models.PrimitiveModel):
    def __init__(self, manager, type):
        super().__init__(manager, type, _WORD)


@unbox(CallType)
def _unbox_call(type, object, context):
    return NativeValue(context.pyapi.long_as_longlong(object))


# ---------------------------------------------------------------- in Python


def type_of(way: types.Type, arguments: Sequence) -> CallType:
    return CallType(way, tuple(_type_of(argument) for argument in arguments))


def _type_of(argument) -> types.Type:
    if argument is None:
        return types.none
    if isinstance(argument, tuple):
        fields = [_type_of(f) if isinstance(f, tuple) else _FIELDS.get(type(f), types.int64) for f in argument]
        return types.BaseTuple.from_types(fields, type(argument) if hasattr(argument, "_fields") else None)
    return _NUMBERS.get(type(argument), types.int64)


def pack(job: Job, arguments: Sequence, n_split: int) -> np.ndarray:
    """The call, ready to be copied as often as it is made."""
    words = [word for argument in (job, *arguments) for word in _words(argument)]
    assert len(words) <= COUNTERS_AT, "the arguments reach into the counters"
    block = np.zeros(COUNTERS_AT + n_counters(job.n_threads, n_split), np.int64)
    block[: len(words)] = words
    return block


def addresses(arguments: Sequence) -> Iterator[tuple[int, int]]:
    """(word, address) of every array among the arguments and in their transforms. Where there is none, 0 stays 0."""
    word = len(Job._fields)
    for argument in arguments:
        if isinstance(argument, Strided) or has_address(argument):
            if argument[0]:
                yield word, argument[0]
        elif isinstance(argument, Address) and argument:
            yield word, argument
        if isinstance(argument, Strided) and argument.transform is not None:
            ahead = argument._replace(transform=None)
            for there, address in addresses(argument.transform):
                yield word + len(_words(ahead)) + there - len(Job._fields), address
        word += len(_words(argument))


def _words(argument) -> list[int]:
    if argument is None:
        return []
    if isinstance(argument, tuple):
        return [word for field in argument if not isinstance(field, np.generic) for word in _words(field)]
    if isinstance(argument, np.floating | float):
        argument = np.asarray(argument)
        return [int(argument.view(f"i{argument.itemsize}"))]
    return [int(argument)]


def c_function(kernel: Callable, argument: types.Type) -> int:
    """The address of the C function that a kernel is compiled to, for an argument of this type."""
    with compiling():  # for its address, too: LLVM has a lock of its own, which no fork waits for
        kernel.compile((argument,))
        result = kernel.overloads[argument,]
        return result.library.get_pointer_to_function(result.fndesc.llvm_cfunc_wrapper_name)


_compiled: dict[tuple, int] = {}


def _kind(argument):
    """What an argument's type follows from."""
    if not isinstance(argument, Strided):
        return type(argument)
    if argument.transform is None:
        return type(argument.tag)
    return type(argument.tag), *map(_kind, argument.transform)


def entry(kernel: Callable, way: types.Type, arguments: Sequence) -> int:
    """c_function of a kernel for a call with these arguments, looked up by us: making Numba's types takes 200 us."""
    key = kernel, way, *map(_kind, arguments)
    found = _compiled.get(key)
    if found is None:
        found = _compiled[key] = c_function(kernel, type_of(way, arguments))
    return found


# ---------------------------------------------------------------- in kernels

_JOB = types.NamedUniTuple(types.int64, len(Job._fields), Job)


@intrinsic
def arguments(typingctx, call):
    """(way, job, *arguments) of a call."""
    parts = (call.way, _JOB, *call.arguments)

    def codegen(context, builder, signature, args):
        first = builder.inttoptr(args[0], _WORD.as_pointer())
        n_read = 0

        def word(type):
            nonlocal n_read
            address = builder.gep(first, [ir.Constant(_WORD, n_read)])
            n_read += 1
            value = context.get_value_type(type)
            return builder.load(builder.bitcast(address, value.as_pointer()), align=8)

        def argument(type):
            if isinstance(type, types.NoneType):
                return context.get_dummy_value()
            if isinstance(type, types.BaseTuple):
                fields = [argument(field) if k != tag_of(type) else context.get_constant(field, 0)
                          for k, field in enumerate(type)]  # fmt: skip
                return context.make_tuple(builder, type, fields)
            return word(type)

        def tag_of(type):
            return Strided._fields.index("tag") if getattr(type, "instance_class", None) is Strided else None

        values = [context.get_dummy_value(), *(argument(type) for type in parts[1:])]
        counters = builder.add(args[0], ir.Constant(_WORD, 8 * COUNTERS_AT))
        values[1] = builder.insert_value(values[1], counters, Job._fields.index("counters"))
        return context.make_tuple(builder, signature.return_type, values)

    return types.Tuple(parts)(call), codegen


@intrinsic
def run_entry(typingctx, entry, call):
    """Calls the C function at the address `entry` with the address of a call."""

    def codegen(context, builder, signature, args):
        function = ir.FunctionType(ir.VoidType(), [_WORD])
        builder.call(builder.inttoptr(args[0], function.as_pointer()), [args[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen
