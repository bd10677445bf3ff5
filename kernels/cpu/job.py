"""How the threads that work on one call share it: they draw items from counters that all can see.

    counters  FINISHED    items that have been completed
              TICKETS     threads that have joined
              NEXT        for every thread one line: how many items of its share have been drawn
              n_threads lines on, if rows are split, for every row: the parts that have been drawn to be measured, those
              that have been drawn to be written (one bit each), and how many have been measured

Every thread has a share, the same at the next call, whose data may still be in its cache; when that is done it draws
from the shares of others. So nobody waits for a thread that has not started: a core that is busy elsewhere costs its
part of the work and no more. Who computes an item changes no bit.
"""

import os
from typing import NamedTuple

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gpusoftmax.kernels.cpu.cache import device
from gpusoftmax.kernels.cpu.vector import CACHE_LINE

# Counters that different threads write lie in different cache lines.
LINE = CACHE_LINE // 8
FINISHED, TICKETS, NEXT = 0, LINE, 2 * LINE
NOBODYS_BELL = TICKETS + 1  # for a call without others
MEASURING, WRITING, MEASURED, PER_ROW = range(4)
MAX_PARTS = 63


def n_counters(n_threads: int, n_split: int) -> int:
    return NEXT + n_threads * LINE + n_split * PER_ROW


class Job(NamedTuple):
    """One call, in int64. Items are blocks of rows_per_item rows or, if parts > 1, the parts of single rows."""

    counters: int  # their address
    bell: int  # address of the number on which waiting threads look
    epoch: int  # what it has to show for them to join
    n_threads: int  # how many may join
    rows_per_item: int  # or blocks of neighbouring rows
    parts: int
    workspace: int  # address of n_threads slots, or of one for every row if rows are split
    slot_bytes: int  # the states of the chunks come first in a slot; then, at these offsets,
    partials: int  # what chunks.sum_chunk needs across rows,
    scratch: int  # exponentials along rows (0: they stay where the result goes),
    stage: int  # and copies, of so many bytes each
    stage_bytes: int
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


SPINS_BEFORE_YIELDING = 2000  # about 2 us


def _yield_to_others(builder):
    """Lets another thread have this core, if one wants it: it may be the one that is waited for."""
    if os.name == "posix":
        module, type = builder.module, ir.FunctionType(ir.IntType(32), [])
        builder.call(module.globals.get("sched_yield") or ir.Function(module, type, "sched_yield"), [])


def _wait(emit_done):
    """An intrinsic that looks at pointer[index] until emit_done(builder, value, argument) or `spins` looks are over."""

    @intrinsic
    def wait(typingctx, pointer, index, argument, spins):
        """Returns what was seen last."""

        def codegen(context, builder, signature, args):
            address, zero = builder.gep(args[0], [args[1]]), ir.Constant(ir.IntType(64), 0)
            start = builder.block
            look, again, rest, done = (builder.append_basic_block(name) for name in ("look", "again", "rest", "done"))
            builder.branch(look)
            builder.position_at_end(look)
            looks = builder.phi(ir.IntType(64))
            seen = builder.load_atomic(address, "acquire", 8)
            over = builder.or_(emit_done(builder, seen, args[2]), builder.icmp_signed(">=", looks, args[3]))
            builder.cbranch(over, done, again)
            builder.position_at_end(again)
            more = builder.add(looks, ir.Constant(ir.IntType(64), 1))
            limit = ir.Constant(ir.IntType(64), SPINS_BEFORE_YIELDING)
            builder.cbranch(builder.icmp_signed(">", looks, limit), rest, look)
            builder.position_at_end(rest)
            _yield_to_others(builder)
            builder.branch(look)
            for value, block in ((zero, start), (more, again), (more, rest)):
                looks.add_incoming(value, block)
            builder.position_at_end(done)
            return seen

        return types.int64(pointer, types.int64, types.int64, types.int64), codegen

    return wait


wait_until_at_least = _wait(lambda builder, seen, value: builder.icmp_signed(">=", seen, value))
wait_until_other_than = _wait(lambda builder, seen, value: builder.icmp_signed("!=", seen, value))
FOREVER = 2**62


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
