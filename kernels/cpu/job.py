"""How the threads that work on one call share it: they draw items from counters that all can see.

    counters  TICKETS     threads that have joined
              NEXT        for every thread one line: how many items of its share have been drawn
              n_threads lines on, if rows are split, for every row: the parts that have been drawn to be measured, those
              that have been drawn to be written (one bit each), and how many have been measured

Every thread has a share, the same at the next call, whose data may still be in its cache; when that is done it draws
from the shares of others. So nobody waits for a thread that has not started: a core that is busy elsewhere costs its
part of the work and no more. Who computes an item changes no bit.
"""

import os
import platform
from typing import NamedTuple

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gpusoftmax.kernels.cpu.cache import device
from gpusoftmax.kernels.cpu.memory import (
    CACHE_LINE,
)

# Counters that different threads write lie in different cache lines.
LINE = CACHE_LINE // 8
TICKETS, NEXT = 0, LINE
MEASURING, WRITING, MEASURED, PER_ROW = range(4)
MAX_PARTS = 63


def n_counters(n_threads: int, n_split: int) -> int:
    return NEXT + n_threads * LINE + n_split * PER_ROW


class Job(NamedTuple):
    """One call, in int64. Items are rows_per_item rows or blocks of rows or, if parts > 1, the parts of single rows."""

    counters: int  # their address, which follows from that of the call
    workspace: int  # address of n_threads slots, or of one for every row if rows are split
    n_threads: int  # how many may join
    rows_per_item: int  # or blocks of rows
    parts: int
    height: int  # rows of a block
    slot_bytes: int  # the states of the chunks come first in a slot; then, at these offsets,
    partials: int  # what chunks.sum_chunk needs across rows and in blocks,
    scratch: int  # exponentials of columns (0: they stay where the result goes), so many numbers for a row,
    scratch_cols: int
    stage: int  # in blocks, numbers of its rows; and copies of the rows of each array:
    target_copy: int  # along, of columns that are no neighbours,
    first_copy: int  # and of logits that are transformed; across, of all, where the result takes the place of the first
    second_copy: int
    streamed: int  # 1: write the result past the caches
    has_second: int  # 0: the op reads one array
    has_target: int  # 0: the result is one number per row


def _atomic(operation):
    @intrinsic
    def atomic(typingctx, pointer, index, value):
        """Combines pointer[index] with the value; returns what was there."""

        def codegen(context, builder, signature, args):
            return builder.atomic_rmw(operation, builder.gep(args[0], [args[1]]), args[2], "seq_cst")

        return types.int64(pointer, types.int64, types.int64), codegen

    return atomic


atomic_add = _atomic("add")
atomic_or = _atomic("or")
atomic_exchange = _atomic("xchg")


@intrinsic
def atomic_replace(typingctx, pointer, index, expected, value):
    """Sets pointer[index] to the value if it is `expected`; whether it was."""

    def codegen(context, builder, signature, args):
        address = builder.gep(args[0], [args[1]])
        return builder.extract_value(builder.cmpxchg(address, args[2], args[3], "seq_cst", "seq_cst"), 1)

    return types.boolean(pointer, types.int64, types.int64, types.int64), codegen


@intrinsic
def atomic_load(typingctx, pointer, index):
    def codegen(context, builder, signature, args):
        return builder.load_atomic(builder.gep(args[0], [args[1]]), "acquire", 8)

    return types.int64(pointer, types.int64), codegen


@intrinsic
def atomic_store(typingctx, pointer, index, value):
    def codegen(context, builder, signature, args):
        builder.store_atomic(args[2], builder.gep(args[0], [args[1]]), "release", 8)
        return context.get_dummy_value()

    return types.void(pointer, types.int64, types.int64), codegen


_HAS_PAUSE = platform.machine() in ("x86_64", "AMD64")
LOOKS = 2000  # 20 to 90 us, depending on what `pause` takes


@intrinsic
def pause(typingctx):
    """Tells the core that this thread is only looking at a number again and again."""

    def codegen(context, builder, signature, args):
        if _HAS_PAUSE:
            name, type = "llvm.x86.sse2.pause", ir.FunctionType(ir.VoidType(), [])
            builder.call(builder.module.globals.get(name) or ir.Function(builder.module, type, name), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def yield_to_others(typingctx):
    """Lets another thread have this core, if one wants it: it may be the one that is waited for."""

    def codegen(context, builder, signature, args):
        call_c(builder, "sched_yield")
        return context.get_dummy_value()

    return types.void(), codegen


def call_c(builder, name: str, *arguments) -> None:
    """Calls a POSIX function and ignores what it returns. Elsewhere there is nobody to wait for or to wake."""
    if os.name != "posix":
        return
    module, type = builder.module, ir.FunctionType(ir.IntType(32), [argument.type for argument in arguments])
    builder.call(module.globals.get(name) or ir.Function(module, type, name), arguments)


@device
def wait_until_at_least(pointer, index, value):
    looks = 0
    while atomic_load(pointer, index) < value:
        if looks < LOOKS:
            looks += 1
            pause()
        else:
            yield_to_others()


@device
def draw_item(counters, n_items, n_threads, ticket, share):
    """(item, share): an item that nobody has drawn, from `share` on; share n_threads: there is none."""
    item = n_items
    while share < n_threads:
        owner = (ticket + share) % n_threads
        first, last = n_items * owner // n_threads, n_items * (owner + 1) // n_threads
        item = first + atomic_add(counters, NEXT + owner * LINE, 1)
        if item < last:
            break
        share += 1
    return item, share


@device
def draw_part(counters, word, parts, ticket, n_threads):
    """A part of a row that nobody has drawn, `parts` if there is none."""
    start = parts * ticket // n_threads
    for k in range(parts):
        part = (start + k) % parts
        bit = 1 << part
        if atomic_load(counters, word) & bit == 0 and atomic_or(counters, word, bit) & bit == 0:
            return part
    return parts
