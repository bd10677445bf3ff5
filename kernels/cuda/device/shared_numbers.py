"""Numbers in dynamic shared memory, by which threads of a block and blocks of a cluster tell each other what they know.

Places are byte offsets from its start. Clusters (sm_90) are replaced by nothing on an architecture that lacks them,
since plan.py gives them to no other.
"""

from llvmlite import ir

from gpusoftmax.kernels.cuda.device._cuda import intrinsic, types
from gpusoftmax.kernels.cuda.device.memory import compiled_for
from gpusoftmax.kernels.cuda.device.staging import dynamic_shared, volatile

_I32, _I64 = ir.IntType(32), ir.IntType(64)


@intrinsic
def get(typingctx, at, like):
    """The number at a place in shared memory."""

    def codegen(context, builder, signature, args):
        return builder.load(dynamic_shared(builder, args[0], context.get_value_type(like)), align=like.bitwidth // 8)

    return like(types.int64, like), codegen


@intrinsic
def put(typingctx, at, value):
    """Writes a number to a place in shared memory."""

    def codegen(context, builder, signature, args):
        builder.store(args[1], dynamic_shared(builder, args[0], args[1].type), align=value.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(types.int64, value), codegen


def _pair(number):
    """Two numbers side by side, as LLVM has them."""
    return ir.VectorType(number, 2)


@intrinsic
def get_pair(typingctx, at, like):
    """The two numbers at a place in shared memory and behind it, which is aligned to both together."""

    def codegen(context, builder, signature, args):
        number = context.get_value_type(like)
        pair = builder.load(dynamic_shared(builder, args[0], _pair(number)), align=like.bitwidth // 4)
        parts = [builder.extract_element(pair, ir.Constant(_I32, k)) for k in range(2)]
        return context.make_tuple(builder, signature.return_type, parts)

    return types.UniTuple(like, 2)(types.int64, like), codegen


@intrinsic
def put_pair(typingctx, at, first, second):
    """Writes what `get_pair` reads."""

    def codegen(context, builder, signature, args):
        pair = ir.Constant(_pair(args[1].type), ir.Undefined)
        for k in range(2):
            pair = builder.insert_element(pair, args[1 + k], ir.Constant(_I32, k))
        builder.store(pair, dynamic_shared(builder, args[0], pair.type), align=first.bitwidth // 4)
        return context.get_dummy_value()

    return types.void(types.int64, first, first), codegen


def _varying(numbers):
    """(position, type) of the members of a tuple that `put_numbers` writes: all but tuples and None."""
    return [(k, kind) for k, kind in enumerate(numbers.types) if not isinstance(kind, types.BaseTuple | types.NoneType)]


def _number_place(builder, at, number, type):
    return dynamic_shared(builder, builder.add(at, ir.Constant(_I64, 8 * number)), type)


@intrinsic
def put_numbers(typingctx, at, numbers):
    """Writes the numbers and pointers of a tuple to shared memory, eight bytes apart. Tuples in it are left out."""

    def codegen(context, builder, signature, args):
        for place, (k, _) in enumerate(_varying(numbers)):
            value = builder.extract_value(args[1], k)
            builder.store(value, _number_place(builder, args[0], place, value.type))
        return context.get_dummy_value()

    return types.void(types.int64, numbers), codegen


@intrinsic
def get_numbers(typingctx, at, own):
    """What another thread has written with `put_numbers`. The tuples in it, the same for all, are one's own."""

    def codegen(context, builder, signature, args):
        result = args[1]
        for place, (k, kind) in enumerate(_varying(own)):
            value = builder.load(_number_place(builder, args[0], place, context.get_value_type(kind)))
            result = builder.insert_value(result, value, k)
        return result

    return own(types.int64, own), codegen


def _put_remotely(builder, at, rank, numbers):
    """Writes numbers to a place in the shared memory of the cluster's block `rank`."""
    single = isinstance(numbers[0].type, ir.FloatType)
    kind, constraint = ("f32", "f") if single else ("f64", "d")
    values = "$2" if len(numbers) == 1 else "{$2, $3}"
    vector = "" if len(numbers) == 1 else ".v2"
    with builder.if_then(compiled_for(builder, 90)):
        place = builder.ptrtoint(dynamic_shared(builder, at, numbers[0].type), _I32)
        text = (
            "{ .reg .b32 remote; mapa.shared::cluster.u32 remote, $0, $1; "
            f"st.shared::cluster{vector}.{kind} [remote], {values}; }}"
        )
        constraints = ["r", "r", *[constraint] * len(numbers)]
        volatile(builder, text, constraints, place, builder.trunc(rank, _I32), *numbers)


@intrinsic
def put_in_block(typingctx, at, rank, value):
    """Writes a number to a place in the shared memory of the cluster's block `rank`. sm_90 and later."""

    def codegen(context, builder, signature, args):
        _put_remotely(builder, args[0], args[1], args[2:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, value), codegen


@intrinsic
def put_pair_in_block(typingctx, at, rank, first, second):
    """As `put_in_block`, of two numbers side by side."""

    def codegen(context, builder, signature, args):
        _put_remotely(builder, args[0], args[1], args[2:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, first, first), codegen


def _at_block(builder, at, rank, text, constraints, *arguments, result=_I32):
    """A number from an instruction on a place in the shared memory of the cluster's block `rank`, sm_90 and later: the
    text names the result $0 and the address `remote`, and the arguments from $3 on.
    """
    constraint = {_I32: "=r", ir.FloatType(): "=f", ir.DoubleType(): "=d"}[result]
    with builder.goto_entry_block():
        found = builder.alloca(result)
    with builder.if_then(compiled_for(builder, 90)):
        place = builder.ptrtoint(dynamic_shared(builder, at, _I32), _I32)
        arguments = place, builder.trunc(rank, _I32), *arguments
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        text = f"{{ .reg .b32 remote; mapa.shared::cluster.u32 remote, $1, $2; {text} }}"
        asm = ir.InlineAsm(kind, text, ",".join([constraint, "r", "r", *constraints, "~{memory}"]), True)
        builder.store(builder.call(asm, arguments), found)
    return builder.load(found)


@intrinsic
def count_up(typingctx, at, amount):
    """Adds to an int32 in shared memory; what it was before."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", dynamic_shared(builder, args[0], _I32), args[1], "monotonic")

    return types.int32(types.int64, types.int32), codegen


@intrinsic
def count_up_in_block(typingctx, at, rank, amount):
    """As `count_up`, in the shared memory of the cluster's block `rank`."""

    def codegen(context, builder, signature, args):
        text = "atom.relaxed.cluster.shared::cluster.add.u32 $0, [remote], $3;"
        return _at_block(builder, args[0], args[1], text, ["r"], args[2])

    return types.int32(types.int64, types.int64, types.int32), codegen


@intrinsic
def count_in_block(typingctx, at, rank):
    """The int32 at a place in the shared memory of the cluster's block `rank`."""

    def codegen(context, builder, signature, args):
        return _at_block(builder, args[0], args[1], "ld.shared::cluster.u32 $0, [remote];", [])

    return types.int32(types.int64, types.int64), codegen


@intrinsic
def number_in_block(typingctx, at, rank, like):
    """The number at a place in the shared memory of the cluster's block `rank`."""

    def codegen(context, builder, signature, args):
        text = f"ld.shared::cluster.f{like.bitwidth} $0, [remote];"
        return _at_block(builder, args[0], args[1], text, [], result=context.get_value_type(like))

    return like(types.int64, types.int64, like), codegen


@intrinsic
def cluster_arrive(typingctx):
    """The first half of a barrier of the cluster: what this thread wrote before is seen after the second half."""

    def codegen(context, builder, signature, args):
        with builder.if_then(compiled_for(builder, 90)):
            volatile(builder, "barrier.cluster.arrive.release.aligned;", "")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def cluster_wait(typingctx):
    """The second half: every thread of the cluster has arrived."""

    def codegen(context, builder, signature, args):
        with builder.if_then(compiled_for(builder, 90)):
            volatile(builder, "barrier.cluster.wait.acquire.aligned;", "")
        return context.get_dummy_value()

    return types.void(), codegen
