"""The slots in dynamic shared memory and what fills them: asynchronous copies, the parts of a row.

Slots are addresses in shared memory, 32 bits wide: the start of dynamic shared memory is asked for once in a kernel (on
sm_90 it is computed from the number of the block in its cluster, again for each access). Asynchronous copies (sm_80)
are replaced by a load and a store on an architecture that lacks them.
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
    vector_of,
    vector_type,
)
from gpusoftmax.kernels.cuda.plan import GROUP, run_of, values_per_lane

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_MAX_PENDING = 3  # copies in flight that `wait_for_copies` can tell apart


def dynamic_shared(builder, at, type):
    """The address `at` bytes into dynamic shared memory, as a pointer to `type`."""
    name = "dynamic_shared"
    start = builder.module.globals.get(name)
    if start is None:
        start = ir.GlobalVariable(builder.module, ir.ArrayType(ir.IntType(8), 0), name, SHARED_SPACE)
        start.align = VECTOR_BYTES
    first = builder.bitcast(start, ir.IntType(8).as_pointer(SHARED_SPACE))
    return builder.bitcast(builder.gep(first, [at]), type.as_pointer(SHARED_SPACE))


def volatile(builder, text, constraints, *arguments):
    """PTX that other memory accesses are not moved across."""
    kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    builder.call(ir.InlineAsm(kind, text, ",".join([*constraints, "~{memory}"]), True), arguments)


@intrinsic
def shared_start(typingctx):
    """The address of dynamic shared memory."""

    def codegen(context, builder, signature, args):
        start = builder.ptrtoint(dynamic_shared(builder, ir.Constant(_I64, 0), ir.IntType(8)), _I32)
        return _hidden(builder, start)  # or it would be computed again at each use

    return types.int32(), codegen


def _hidden(builder, value):
    return builder.call(ir.InlineAsm(ir.FunctionType(_I32, [_I32]), "mov.b32 $0, $1;", "=r,r"), [value])


@intrinsic
def hidden(typingctx, value):
    """The number, of which the compiler knows nothing. Loops with such a step are not unrolled: one that runs once or
    twice would pay more for finding out how often that is than for its turns.
    """
    return types.int32(types.int32), lambda context, builder, signature, args: _hidden(builder, args[0])


def _slot(builder, address, type):
    """An address in shared memory as a pointer to `type`."""
    return builder.inttoptr(address, type.as_pointer(SHARED_SPACE))


_WORDS = ir.VectorType(_I32, VECTOR_BYTES // 4)


def _copy_vector(builder, address, place, condition=None):
    """Sixteen aligned bytes of global memory to a slot, asynchronously where that can be; if the condition holds."""
    with builder.if_else(compiled_for(builder, 80)) as (asynchronous, plain):
        with asynchronous:
            copy = "cp.async.cg.shared.global [$0], [$1], 16;"
            global_address = builder.ptrtoint(address, _I64)
            if condition is None:
                volatile(builder, copy, "rl", place, global_address)
            else:  # a predicate, not a branch: copies that follow each other cost less
                text = f"{{\n.reg .pred %copies;\nsetp.ne.u32 %copies, $2, 0;\n@%copies {copy}\n}}"
                volatile(builder, text, "rlr", place, global_address, builder.zext(condition, _I32))
        with plain, contextlib.ExitStack() as stack:
            if condition is not None:
                stack.enter_context(builder.if_then(condition))
            builder.store(builder.load(address, align=VECTOR_BYTES), _slot(builder, place, _WORDS), align=VECTOR_BYTES)


@intrinsic
def copy_vector(typingctx, pointer, index, at):
    """Sixteen aligned bytes from pointer[index:] to a slot; there when `wait_for_copies` says so."""

    def codegen(context, builder, signature, args):
        _copy_vector(builder, global_address(builder, args[0], args[1], _WORDS), args[2])
        return context.get_dummy_value()

    return types.void(pointer, types.int64, types.int32), codegen


@intrinsic
def copy_vector_if(typingctx, condition, pointer, index, at):
    """As `copy_vector` if the condition holds; else nothing is read."""

    def codegen(context, builder, signature, args):
        address = global_address(builder, args[1], args[2], _WORDS)
        _copy_vector(builder, address, args[3], args[0])
        return context.get_dummy_value()

    return types.void(types.boolean, pointer, types.int64, types.int32), codegen


def _hidden_sum(builder, x, y):
    """x + y, by an addition that LLVM does not see through."""
    add = ir.InlineAsm(
        ir.FunctionType(x.type, [x.type, x.type]),
        f"add.s{x.type.width} $0, $1, $2;",
        {32: "=r,r,r", 64: "=l,l,l"}[x.type.width],
    )
    return builder.call(add, [x, y])


def _walk(builder, cursors, count, length, act, prepare=lambda k: None):
    """act(k, *addresses) for every k < count <= length, GROUP at a time where there are so many, and after prepare(k)
    for all of a group where there are not.

    A cursor is a pair (first, step): its address number k is first + k step, and made from the one before. LLVM would
    compute all of them in advance, and those in global memory take two registers each.
    """
    firsts, steps = zip(*cursors, strict=True)
    strides = [builder.mul(step, ir.Constant(step.type, GROUP)) for step in steps]

    def advanced(addresses, by):
        return [_hidden_sum(builder, address, step) for address, step in zip(addresses, by, strict=True)]

    for group in range(0, length, GROUP):
        with builder.if_else(builder.icmp_signed("<=", ir.Constant(_I32, group + GROUP), count)) as (whole, part):
            with whole:
                addresses = firsts
                for k in range(group, group + GROUP):
                    act(k, *addresses)
                    addresses = advanced(addresses, steps)
            with part, contextlib.ExitStack() as existing:
                addresses = firsts
                for k in range(group, group + GROUP):
                    prepare(k)
                for k in range(group, group + GROUP - 1):
                    existing.enter_context(builder.if_then(builder.icmp_signed("<", ir.Constant(_I32, k), count)))
                    act(k, *addresses)
                    addresses = advanced(addresses, steps)
        firsts = advanced(firsts, strides)


@intrinsic
def copy_columns(typingctx, pointer, index, step, at, at_step, count, like):
    """The elements pointer[index + k step], k < count, to a slot, the first at the address `at` and `at_step` bytes
    apart.

    `count` is at most values_per_lane. Elements of four bytes and more are there when `wait_for_copies` says so; others
    at once, with all of them under way at a time.
    """
    size = pointer.dtype.bitwidth // 8

    def codegen(context, builder, signature, args):
        stored, length = context.get_value_type(pointer.dtype), values_per_lane(like.name)
        first = builder.ptrtoint(global_address(builder, args[0], args[1], stored), _I64)
        source, target = (first, builder.mul(args[2], ir.Constant(_I64, size))), (args[3], args[4])
        count = args[5]

        def copy(k, address, place):
            volatile(builder, f"cp.async.ca.shared.global [$0], [$1], {size};", "rl", place, address)

        def copy_at_once():
            with builder.goto_entry_block():
                held = [builder.alloca(stored) for _ in range(length)]

            def take(k, address):
                element = builder.inttoptr(address, stored.as_pointer(GLOBAL_SPACE))
                builder.store(builder.load(element, align=size), held[k])

            def leave(k, place):
                builder.store(builder.load(held[k]), _slot(builder, place, stored), align=size)

            # Those that are not taken are zero: undefined ones would be kept from turn to turn of a loop.
            _walk(builder, [source], count, length, take, lambda k: builder.store(ir.Constant(stored, 0), held[k]))
            _walk(builder, [target], count, length, leave)

        if size < 4:
            copy_at_once()
        else:
            with builder.if_else(compiled_for(builder, 80)) as (asynchronous, plain):
                with asynchronous:
                    _walk(builder, [source, target], count, length, copy)
                with plain:
                    copy_at_once()
        return context.get_dummy_value()

    return types.void(pointer, types.int64, types.int64, types.int32, types.int32, types.int32, like), codegen


@intrinsic
def copy_element(typingctx, pointer, index, at):
    """One element of pointer[index] to a slot, at once."""
    size = pointer.dtype.bitwidth // 8

    def codegen(context, builder, signature, args):
        stored = context.get_value_type(pointer.dtype)
        value = builder.load(global_address(builder, args[0], args[1], stored), align=size)
        builder.store(value, _slot(builder, args[2], stored), align=size)
        return context.get_dummy_value()

    return types.void(pointer, types.int64, types.int32), codegen


@intrinsic
def pad_element(typingctx, pointer, padding, at):
    """One element of a slot, stored as the pointer's are, is `padding`."""
    dtype = STORED_DTYPE[pointer.dtype]

    def codegen(context, builder, signature, args):
        value = conversion.narrow(builder, args[1], dtype)
        builder.store(value, _slot(builder, args[2], value.type), align=pointer.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(pointer, padding, types.int32), codegen


@intrinsic
def pad_vector(typingctx, pointer, padding, at):
    """Sixteen aligned bytes of a slot, stored as the pointer's elements are, are `padding`."""
    dtype, bits = STORED_DTYPE[pointer.dtype], pointer.dtype.bitwidth

    def codegen(context, builder, signature, args):
        value = conversion.narrow(builder, args[1], dtype)
        if bits == 16:
            half = builder.zext(value, _I32)
            value = builder.or_(half, builder.shl(half, ir.Constant(_I32, 16)))
        count = VECTOR_BYTES * 8 // max(bits, 32)
        vector = ir.Constant(ir.VectorType(value.type, count), ir.Undefined)
        for k in range(count):
            vector = builder.insert_element(vector, value, ir.Constant(_I32, k))
        builder.store(vector, _slot(builder, args[2], vector.type), align=VECTOR_BYTES)
        return context.get_dummy_value()

    return types.void(pointer, padding, types.int32), codegen


@intrinsic
def end_copies(typingctx):
    """The copies since the last call form a group that `wait_for_copies` counts."""

    def codegen(context, builder, signature, args):
        with builder.if_then(compiled_for(builder, 80)):
            volatile(builder, "cp.async.commit_group;", "")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def wait_for_copies(typingctx, pending):
    """Waits until at most `pending` groups of this thread are under way; the oldest arrive first."""

    def codegen(context, builder, signature, args):
        with builder.if_then(compiled_for(builder, 80)):
            # Predicates: a jump by a table, at each piece, took as long as a load from shared memory.
            for count in range(_MAX_PENDING + 1):
                test = "eq" if count < _MAX_PENDING else "ge"
                text = f"setp.{test}.s32 %reached, $0, {count};\n@%reached cp.async.wait_group {count};"
                volatile(builder, f"{{\n.reg .pred %reached;\n{text}\n}}", "r", args[0])
        return context.get_dummy_value()

    return types.void(types.int32), codegen


@intrinsic
def staged(typingctx, pointer, at, like):
    """The element at an address in a slot, stored there as the pointer's are, in the format of `like`."""
    dtype = STORED_DTYPE[pointer.dtype]

    def codegen(context, builder, signature, args):
        stored = context.get_value_type(pointer.dtype)
        value = builder.load(_slot(builder, args[1], stored), align=pointer.dtype.bitwidth // 8)
        return conversion.widen(builder, value, dtype, context.get_value_type(like))

    return like(pointer, types.int32, like), codegen


def _granule(builder, address, number):
    """The words of the granule `number` (a constant) granules behind an aligned address."""
    first = _slot(builder, address, _WORDS)
    vector = builder.load(builder.gep(first, [ir.Constant(_I32, number)]), align=VECTOR_BYTES)
    return [builder.extract_element(vector, ir.Constant(_I32, k)) for k in range(_WORDS.count)]


def _funnel(builder, low, high, n_bytes):
    """The word that begins n_bytes modulo 4 behind the start of `low`."""
    bits = builder.shl(n_bytes, ir.Constant(_I32, 3))  # the instruction takes them modulo 32
    shift = ir.InlineAsm(ir.FunctionType(_I32, [_I32] * 3), "shf.r.wrap.b32 $0, $1, $2, $3;", "=r,r,r,r")
    return builder.call(shift, [low, high, bits])


def _numbers_of(builder, words, pointer, context, like):
    """The numbers that are stored in these words."""
    dtype, stored = STORED_DTYPE[pointer.dtype], context.get_value_type(pointer.dtype)
    vector = ir.Constant(_WORDS, ir.Undefined)
    for k, word in enumerate(words):
        vector = builder.insert_element(vector, word, ir.Constant(_I32, k))
    lanes = lanes_of_vector(builder, builder.bitcast(vector, vector_type(stored)), stored)
    return [conversion.widen(builder, lane, dtype, context.get_value_type(like)) for lane in lanes]


@intrinsic
def staged_runs(typingctx, pointer, at, shift, count, lanes, in_loop, held):
    """held[:] = the numbers of this lane's runs of sixteen bytes, which lie `lanes` (a literal) granules apart.

    `at` is the address of the lane's first granule; `shift` (0 to 15, the same for all lanes) says how many bytes
    behind it the run begins. A shifted run is cut out of the two granules that hold it, in a branch for each number of
    whole words. Groups that begin beyond `count` columns are not read; None: all are.
    In a loop they become zero: undefined ones would be kept from turn to turn.
    """
    if not isinstance(lanes, types.IntegerLiteral):
        return None  # Numba asks again with the literal
    step, size = lanes.literal_value, pointer.dtype.bitwidth // 8
    n_values = values_per_lane(held.dtype.name)
    run = run_of(size)

    def codegen(context, builder, signature, args):
        _, address, distance, n_columns, _, repeated, numbers = args
        n_words = n_values // run * _WORDS.count
        with builder.goto_entry_block():
            array = builder.alloca(ir.ArrayType(_I32, n_words))
            words = builder.bitcast(array, _I32.as_pointer())

        def read_run(k, n_skipped):
            found = _granule(builder, address, k * step)
            if n_skipped is not None:
                found = (found + _granule(builder, address, k * step + 1))[n_skipped:]
                if size == 2:
                    found = [_funnel(builder, *pair, distance) for pair in zip(found, found[1:], strict=False)]
            for j in range(_WORDS.count):
                builder.store(found[j], builder.gep(words, [ir.Constant(_I32, k * _WORDS.count + j)]))

        def read(n_skipped):
            for group in range(0, n_values, GROUP):
                with contextlib.ExitStack() as condition:
                    if not isinstance(count, types.NoneType):
                        reached = builder.icmp_signed("<", ir.Constant(_I32, group * step), n_columns)
                        condition.enter_context(builder.if_then(reached))
                    for k in range(group // run, (group + GROUP) // run):
                        read_run(k, n_skipped)

        if not isinstance(count, types.NoneType):
            with builder.if_then(repeated):
                builder.store(ir.Constant(ir.ArrayType(_I32, n_words), None), array)
        with builder.if_else(builder.icmp_unsigned("==", distance, ir.Constant(_I32, 0))) as (aligned, shifted):
            with aligned:
                read(None)
            with shifted:
                end, last = builder.append_basic_block("runs"), builder.append_basic_block("runs.last")
                choice = builder.switch(builder.lshr(distance, ir.Constant(_I32, 2)), last)
                first, *others = {2: (3, 0, 1, 2), 4: (3, 1, 2), 8: (2,)}[size]  # words that may be skipped
                for n_skipped in others:
                    block = builder.append_basic_block(f"runs.{n_skipped}")
                    choice.add_case(ir.Constant(_I32, n_skipped), block)
                    builder.position_at_end(block)
                    read(n_skipped)
                    builder.branch(end)
                builder.position_at_end(last)
                read(first)
                builder.branch(end)
                builder.position_at_end(end)
        for k in range(n_values // run):
            four = [builder.load(builder.gep(words, [ir.Constant(_I32, 4 * k + j)])) for j in range(_WORDS.count)]
            for j, value in enumerate(_numbers_of(builder, four, pointer, context, held.dtype)):
                builder.store(value, builder.gep(numbers, [ir.Constant(_I32, k * run + j)]))
        return context.get_dummy_value()

    return types.void(pointer, types.int32, types.int32, count, lanes, types.boolean, held), codegen


@intrinsic
def staged_vector(typingctx, pointer, at, values):
    """values[:] = the numbers in the sixteen aligned bytes at an address in a slot."""

    def codegen(context, builder, signature, args):
        for k, number in enumerate(_numbers_of(builder, _granule(builder, args[1], 0), pointer, context, values.dtype)):
            builder.store(number, builder.gep(args[2], [ir.Constant(_I64, k)]))
        return context.get_dummy_value()

    return types.void(pointer, types.int32, values), codegen


@intrinsic
def stage_vector(typingctx, pointer, at, values):
    """The sixteen aligned bytes at an address in a slot become these numbers, stored as the pointer's are."""

    def codegen(context, builder, signature, args):
        vector = vector_of(builder, context, pointer, args[2])
        builder.store(vector, _slot(builder, args[1], vector.type), align=VECTOR_BYTES)
        return context.get_dummy_value()

    return types.void(pointer, types.int32, values), codegen
