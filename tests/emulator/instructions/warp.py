"""Instructions by which the lanes of a warp talk to each other."""

import numpy as np

from tests.emulator.errors import Unsupported
from tests.emulator.instructions.registry import control, ordinary
from tests.emulator.integers import popcount
from tests.emulator.operands import Constant, bit_in_warp
from tests.emulator.ptx_types import POISON, PRED, U32, i64, u32

LANE = np.arange(32)


def warp_operation(m, mask, body):
    """body(lanes) runs once all members of a warp's mask have come."""

    def run(lanes, p):
        ready, all_go_on = m.warp_sync(lanes, p, mask)
        if m.count(ready):
            body(ready)
        return p + 1 if all_go_on else None

    return run


def is_whole_warps(lanes):
    return isinstance(lanes, slice) and lanes.start % 32 == 0 and lanes.stop % 32 == 0


def or_over_warp(m, lanes, bits):
    """OR of bits over the lanes of each warp, handed back to every lane."""
    if is_whole_warps(lanes):
        return np.repeat(np.bitwise_or.reduce(bits.reshape(-1, 32), axis=1), 32)
    warps, together = m.warp[lanes], np.zeros(len(m.alive), u32)
    np.bitwise_or.at(together, warps, bits)
    return together[warps]


def _shuffle_source(mode, lane, distance, bounds):
    """(source lane, whether it is in range) as the PTX manual defines it"""
    segment, clamp = (bounds >> 8) & 31, bounds & 31
    last, first = (lane & segment) | (clamp & ~segment), lane & segment
    if mode == "up":
        source = lane - distance
        return source, source >= last
    if mode == "down":
        source = lane + distance
    elif mode == "bfly":
        source = lane ^ distance
    else:
        source = first | (distance & ~segment)
    return source, source <= last


@control("shfl")
def shfl(m, ins):
    mode = ins.first("bfly", "up", "down", "idx")
    if not ins.has("sync"):
        raise Unsupported(str(ins))
    d, in_range = m.paired_destination(ins.args[0], U32, PRED)
    a, b, c, mask = (m.source(arg, U32) for arg in ins.args[1:5])
    fixed = None
    if isinstance(b, Constant) and isinstance(c, Constant):
        source, inside = _shuffle_source(mode, LANE, int(b.value[0]) & 31, int(c.value[0]))
        fixed = np.where(inside, source, LANE), inside
    values = np.empty(m.lane_count, u32)

    def body(lanes):
        if fixed and is_whole_warps(lanes):
            rows = m.spread(a[lanes], lanes).reshape(-1, 32)
            d[lanes] = rows[:, fixed[0]].reshape(-1)
            in_range[lanes] = np.tile(fixed[1], len(rows))
            return
        index = m.lanes[lanes]
        lane = index & 31
        source, inside = _shuffle_source(mode, lane, (b[lanes] & u32(31)).astype(i64), c[lanes].astype(i64))
        values.view(np.uint8).fill(POISON)  # an absent source lane: undefined
        values[index] = a[lanes]
        d[lanes] = values[(index - lane) + np.where(inside, source, lane)]
        in_range[lanes] = inside

    return warp_operation(m, mask, body)


@control("vote")
def vote(m, ins):
    if ins.mods[0] != "sync":
        raise Unsupported(str(ins))
    mode = ins.mods[1]
    d = m.destination(ins.args[0], U32 if mode == "ballot" else PRED)
    a, mask = m.source(ins.args[1], PRED), m.source(ins.args[2], U32)

    def body(lanes):
        bit, members = bit_in_warp(m.lanes[lanes]), m.spread(mask[lanes], lanes)
        yes = or_over_warp(m, lanes, np.where(a[lanes], bit, u32(0))) & members
        if mode == "ballot":
            d[lanes] = yes
        elif mode == "any":
            d[lanes] = yes != 0
        else:
            here = or_over_warp(m, lanes, bit) & members
            d[lanes] = yes == here if mode == "all" else (yes == 0) | (yes == here)

    return warp_operation(m, mask, body)


@control("match")
def match(m, ins):
    d, agreed = m.paired_destination(ins.args[0], U32, PRED)
    a, mask = m.source(ins.args[1], ins.type), m.source(ins.args[2], U32)
    everybody = ins.mods[0] == "all"

    def body(lanes):
        index, warp, value = m.lanes[lanes], m.warp[lanes], m.spread(a[lanes], lanes)
        members, bit = m.spread(mask[lanes], lanes), bit_in_warp(m.lanes[lanes])
        equal = np.zeros(len(index), u32)
        for k in range(len(index)):
            equal[k] = np.bitwise_or.reduce(bit[(warp == warp[k]) & (value == value[k])])
        equal &= members
        if everybody:
            same = equal == (or_over_warp(m, lanes, bit) & members)
            agreed[lanes] = same
            equal = np.where(same, equal, u32(0))
        d[lanes] = equal

    return warp_operation(m, mask, body)


REDUCTIONS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


@control("redux")
def redux(m, ins):
    ptx_type, name = ins.type, ins.mods[1]
    d, a = m.destination(ins.args[0], ptx_type), m.source(ins.args[1], ptx_type)
    mask, function = m.source(ins.args[2], U32), REDUCTIONS[name]
    if ptx_type.is_float and not ins.has("NaN"):
        function = {"min": np.fmin, "max": np.fmax}[name]

    def body(lanes):
        value = m.spread(a[lanes], lanes)
        value = np.abs(value) if ins.has("abs") else value
        group = (m.warp[lanes] << 32) + m.spread(mask[lanes], lanes)
        result = np.empty_like(value)
        for one in np.unique(group):
            result[group == one] = function.reduce(value[group == one])
        d[lanes] = result

    return warp_operation(m, mask, body)


@control("elect")
def elect(m, ins):
    d, leader = m.paired_destination(ins.args[0], U32, PRED)
    mask = m.source(ins.args[1], U32)

    def body(lanes):
        index = m.lanes[lanes]
        here = or_over_warp(m, lanes, bit_in_warp(index)) & m.spread(mask[lanes], lanes)
        first = popcount((here & (~here + u32(1))) - u32(1))
        d[lanes] = first
        leader[lanes] = first == (index & 31)

    return warp_operation(m, mask, body)


@ordinary("activemask")
def activemask(m, ins):
    d = m.destination(ins.args[0], U32)

    def run(lanes):
        d[lanes] = or_over_warp(m, lanes, bit_in_warp(m.lanes[lanes]))

    return run
