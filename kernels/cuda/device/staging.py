"""Dynamic shared memory and what fills it: asynchronous copies, the parts of a row, states sent between blocks.

Places are byte offsets from the start of the block's dynamic shared memory. What an architecture lacks is replaced
here: asynchronous copies (sm_80) by a load and a store, clusters (sm_90) by nothing, since plan.py gives them to no
other.
"""

import contextlib

from llvmlite import ir

from gpusoftmax.kernels import conversion
from gpusoftmax.kernels.cuda.device._cuda import intrinsic, types
from gpusoftmax.kernels.cuda.device.memory import (
    GLOBAL_SPACE,
    SHARED_SPACE,
    STORED_DTYPE,
    VECTOR_BYTES,
    compiled_for,
    global_address,
    lanes_of_vector,
    vector_type,
)
from gpusoftmax.kernels.cuda.plan import GROUP, WARP_SIZE, values_per_lane

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_MAX_PENDING = 7  # copies in flight that `wait_for_copies` can tell apart


def _shared(builder, at, type):
    """The address `at` bytes into dynamic shared memory, as a pointer to `type`."""
    name = "dynamic_shared"
    start = builder.module.globals.get(name)
    if start is None:
        start = ir.GlobalVariable(builder.module, ir.ArrayType(ir.IntType(8), 0), name, SHARED_SPACE)
        start.align = VECTOR_BYTES
    first = builder.bitcast(start, ir.IntType(8).as_pointer(SHARED_SPACE))
    return builder.bitcast(builder.gep(first, [at]), type.as_pointer(SHARED_SPACE))


def _volatile(builder, text, constraints, *arguments):
    """PTX that other memory accesses are not moved across."""
    kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    builder.call(ir.InlineAsm(kind, text, ",".join([*constraints, "~{memory}"]), True), arguments)


def _walk(builder, first, step, count, length, act, prepare=lambda k: None):
    """act(k, address) for every k < count <= length and first + k step, GROUP at a time where there are so many, and
    after prepare(k) for all of a group where there are not.

    An address is made from the one before, by an addition that LLVM does not see through: it would compute all of them
    in advance, and they take two registers each.
    """
    add = ir.InlineAsm(ir.FunctionType(_I64, [_I64, _I64]), "add.s64 $0, $1, $2;", "=l,l,l")
    next_group = builder.mul(step, ir.Constant(_I64, GROUP))
    for group in range(0, length, GROUP):
        address = first
        with builder.if_else(builder.icmp_signed("<=", ir.Constant(_I32, group + GROUP), count)) as (whole, part):
            with whole:
                for k in range(group, group + GROUP):
                    act(k, address)
                    address = builder.call(add, [address, step])
            with part, contextlib.ExitStack() as existing:
                address = first
                for k in range(group, group + GROUP):
                    prepare(k)
                for k in range(group, group + GROUP - 1):
                    existing.enter_context(builder.if_then(builder.icmp_signed("<", ir.Constant(_I32, k), count)))
                    act(k, address)
                    address = builder.call(add, [address, step])
        first = builder.call(add, [first, next_group])


@intrinsic
def copy_vector(typingctx, pointer, index, at):
    """Sixteen aligned bytes from pointer[index:] to shared memory; there when `wait_for_copies` says so."""

    def codegen(context, builder, signature, args):
        words = ir.VectorType(_I32, VECTOR_BYTES // 4)
        source, target = global_address(builder, args[0], args[1], words), _shared(builder, args[2], words)
        with builder.if_else(compiled_for(builder, 80)) as (asynchronous, plain):
            with asynchronous:
                place = builder.ptrtoint(target, _I32)
                text = "cp.async.cg.shared.global [$0], [$1], 16;"
                _volatile(builder, text, "rl", place, builder.ptrtoint(source, _I64))
            with plain:
                builder.store(builder.load(source, align=VECTOR_BYTES), target, align=VECTOR_BYTES)
        return context.get_dummy_value()

    return types.void(pointer, types.int64, types.int64), codegen


@intrinsic
def copy_element(typingctx, pointer, index, at):
    """One element of pointer[index] to shared memory, at once."""
    size = pointer.dtype.bitwidth // 8

    def codegen(context, builder, signature, args):
        stored = context.get_value_type(pointer.dtype)
        value = builder.load(global_address(builder, args[0], args[1], stored), align=size)
        builder.store(value, _shared(builder, args[2], stored), align=size)
        return context.get_dummy_value()

    return types.void(pointer, types.int64, types.int64), codegen


@intrinsic
def copy_columns(typingctx, pointer, index, step, at, count, like):
    """The elements pointer[index + k step], k < count, to places in shared memory WARP_SIZE elements apart.

    `count` is at most values_per_lane. Elements of four bytes and more are there when `wait_for_copies` says so; others
    at once, with all of them under way at a time.
    """
    size = pointer.dtype.bitwidth // 8

    def codegen(context, builder, signature, args):
        stored, length = context.get_value_type(pointer.dtype), values_per_lane(like.name)
        target, count = _shared(builder, args[3], stored), builder.trunc(args[4], _I32)

        first = builder.ptrtoint(global_address(builder, args[0], args[1], stored), _I64)
        step = builder.mul(args[2], ir.Constant(_I64, size))

        def target_of(k):
            return builder.gep(target, [ir.Constant(_I32, k * WARP_SIZE)])

        def each(*acts):
            _walk(builder, first, step, count, length, *acts)

        def copy(k, address):
            place = builder.ptrtoint(target_of(k), _I32)
            _volatile(builder, f"cp.async.ca.shared.global [$0], [$1], {size};", "rl", place, address)

        def copy_at_once():
            with builder.goto_entry_block():
                held = [builder.alloca(stored) for _ in range(length)]

            def take(k, address):
                source = builder.inttoptr(address, stored.as_pointer(GLOBAL_SPACE))
                builder.store(builder.load(source, align=size), held[k])

            # Those that are not taken are zero: undefined ones would be kept from turn to turn of a loop.
            each(take, lambda k: builder.store(ir.Constant(stored, 0), held[k]))
            each(lambda k, _: builder.store(builder.load(held[k]), target_of(k), align=size))

        if size < 4:
            copy_at_once()
        else:
            with builder.if_else(compiled_for(builder, 80)) as (asynchronous, plain):
                with asynchronous:
                    each(copy)
                with plain:
                    copy_at_once()
        return context.get_dummy_value()

    return types.void(pointer, types.int64, types.int64, types.int64, types.int64, like), codegen


@intrinsic
def end_copies(typingctx):
    """The copies since the last call form a group that `wait_for_copies` counts."""

    def codegen(context, builder, signature, args):
        with builder.if_then(compiled_for(builder, 80)):
            _volatile(builder, "cp.async.commit_group;", "")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def wait_for_copies(typingctx, pending):
    """Waits until at most `pending` groups of this thread are under way; the oldest arrive first."""

    def codegen(context, builder, signature, args):
        with builder.if_then(compiled_for(builder, 80)):
            end = builder.append_basic_block("waited")
            choice = builder.switch(args[0], builder.append_basic_block("wait"))
            for count in range(_MAX_PENDING):
                block = builder.append_basic_block(f"wait.{count}")
                choice.add_case(ir.Constant(_I64, count), block)
                builder.position_at_end(block)
                _volatile(builder, f"cp.async.wait_group {count};", "")
                builder.branch(end)
            builder.position_at_end(choice.default)
            _volatile(builder, f"cp.async.wait_group {_MAX_PENDING};", "")
            builder.branch(end)
            builder.position_at_end(end)
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def staged(typingctx, pointer, at, like):
    """The element at a place in shared memory, stored there as the pointer's are, in the format of `like`."""
    dtype = STORED_DTYPE[pointer.dtype]

    def codegen(context, builder, signature, args):
        stored = context.get_value_type(pointer.dtype)
        value = builder.load(_shared(builder, args[1], stored), align=pointer.dtype.bitwidth // 8)
        return conversion.widen(builder, value, dtype, context.get_value_type(like))

    return like(pointer, types.int64, like), codegen


@intrinsic
def staged_columns(typingctx, pointer, at, count, stride, padding, held):
    """held[k] = the element k stride (a literal) behind a place in shared memory, `padding` where k stride >= count."""
    dtype, size = STORED_DTYPE[pointer.dtype], pointer.dtype.bitwidth // 8
    if not isinstance(stride, types.IntegerLiteral):
        return None  # Numba asks again with the literal
    step = stride.literal_value

    def codegen(context, builder, signature, args):
        stored, compute = context.get_value_type(pointer.dtype), context.get_value_type(padding)
        first, left = _shared(builder, args[1], stored), builder.trunc(args[2], _I32)
        length = values_per_lane(padding.name)

        def read(k):
            address = builder.gep(first, [ir.Constant(_I32, k * step)])
            return conversion.widen(builder, builder.load(address, align=size), dtype, compute)

        def keep(k, value):
            builder.store(value, builder.gep(args[5], [ir.Constant(_I64, k)]))

        for group in range(0, length, GROUP):
            columns = range(group, group + GROUP)
            whole = builder.icmp_signed("<", ir.Constant(_I32, (group + GROUP - 1) * step), left)
            with builder.if_else(whole) as (all_of_them, some):
                with all_of_them:
                    for k in columns:
                        keep(k, read(k))
                with some:
                    for k in columns:
                        keep(k, args[4])
                        with builder.if_then(builder.icmp_signed("<", ir.Constant(_I32, k * step), left)):
                            keep(k, read(k))
        return context.get_dummy_value()

    return types.void(pointer, types.int64, types.int64, stride, padding, held), codegen


@intrinsic
def staged_vector(typingctx, pointer, at, values):
    """values[:] = the numbers in the sixteen aligned bytes at a place in shared memory."""
    dtype = STORED_DTYPE[pointer.dtype]

    def codegen(context, builder, signature, args):
        stored = context.get_value_type(pointer.dtype)
        vector = builder.load(_shared(builder, args[1], vector_type(stored)), align=VECTOR_BYTES)
        for k, lane in enumerate(lanes_of_vector(builder, vector, stored)):
            number = conversion.widen(builder, lane, dtype, context.get_value_type(values.dtype))
            builder.store(number, builder.gep(args[2], [ir.Constant(_I64, k)]))
        return context.get_dummy_value()

    return types.void(pointer, types.int64, values), codegen


# ---------------------------------------------------------------- numbers of the block, and of the cluster's blocks


@intrinsic
def get(typingctx, at, like):
    """The number at a place in shared memory."""

    def codegen(context, builder, signature, args):
        return builder.load(_shared(builder, args[0], context.get_value_type(like)), align=like.bitwidth // 8)

    return like(types.int64, like), codegen


@intrinsic
def put(typingctx, at, value):
    """Writes a number to a place in shared memory."""

    def codegen(context, builder, signature, args):
        builder.store(args[1], _shared(builder, args[0], args[1].type), align=value.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(types.int64, value), codegen


@intrinsic
def put_in_block(typingctx, at, rank, value):
    """Writes a number to a place in the shared memory of the cluster's block `rank`. sm_90 and later."""
    kind, constraint = ("f32", "f") if value.bitwidth == 32 else ("f64", "d")

    def codegen(context, builder, signature, args):
        with builder.if_then(compiled_for(builder, 90)):
            place = builder.ptrtoint(_shared(builder, args[0], args[2].type), _I32)
            text = (
                "{ .reg .b32 remote; mapa.shared::cluster.u32 remote, $0, $1; "
                f"st.shared::cluster.{kind} [remote], $2; }}"
            )
            _volatile(builder, text, ["r", "r", constraint], place, builder.trunc(args[1], _I32), args[2])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, value), codegen


@intrinsic
def fresh_lane(typingctx):
    """cuda.laneid, asked for anew.

    For loops in which lanes exchange numbers: what depends on cuda.laneid alone is the same in every turn, so that LLVM
    makes a loop for some lanes and another for the rest, which then wait for each other.
    """

    def codegen(context, builder, signature, args):
        ask = ir.InlineAsm(ir.FunctionType(_I32, []), "mov.u32 $0, %laneid;", "=r", True)
        return builder.call(ask, [])

    return types.int32(), codegen


@intrinsic
def cluster_arrive(typingctx):
    """The first half of a barrier of the cluster: what this thread wrote before is seen after the second half."""

    def codegen(context, builder, signature, args):
        with builder.if_then(compiled_for(builder, 90)):
            _volatile(builder, "barrier.cluster.arrive.release.aligned;", "")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def cluster_wait(typingctx):
    """The second half: every thread of the cluster has arrived."""

    def codegen(context, builder, signature, args):
        with builder.if_then(compiled_for(builder, 90)):
            _volatile(builder, "barrier.cluster.wait.acquire.aligned;", "")
        return context.get_dummy_value()

    return types.void(), codegen
