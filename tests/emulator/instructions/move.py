"""mov, and conversions between addresses of different spaces."""

import numpy as np

from tests.emulator.errors import ClusterError
from tests.emulator.instructions.registry import assign, ordinary
from tests.emulator.operands import Computed, bits_type
from tests.emulator.ptx_types import (
    LOCAL_WINDOW,
    PARAM_WINDOW,
    PRED,
    RANK_SHIFT,
    SHARED_WINDOW,
    TYPES,
    U32,
    U64,
    u32,
    u64,
)

WINDOWS = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW}
OFFSET = u64((1 << RANK_SHIFT) - 1)


@ordinary("mov")
def mov(m, ins):
    target, value = ins.args
    if target[0] == "vec":
        return _unpack(m, ins.type, target[1], value)
    if value[0] == "vec":
        return _pack(m, ins.type, target, value[1])
    ptx_type = ins.type if value[0] == "imm" else bits_type(ins.type)
    x, d = m.source(value, ptx_type), m.destination(target, ptx_type)

    def run(lanes):
        d[lanes] = x[lanes]

    return run


def _unpack(m, ptx_type, targets, value):
    """mov.b32 {low, high}, register"""
    part = TYPES[f"b{ptx_type.bits // len(targets)}"]
    whole = m.source(value, bits_type(ptx_type))
    if isinstance(whole, np.ndarray):
        x = whole.reshape(m.lane_count, 1).view(part.dtype)
    else:
        x = Computed(lambda s: whole[s].reshape(-1, 1).view(part.dtype))
    destinations = [m.destination(target, part) for target in targets]

    def run(lanes):
        parts = np.array(x[lanes])  # a copy: a destination may be the source
        for k, d in enumerate(destinations):
            d[lanes] = parts[:, k]

    return run


def _pack(m, ptx_type, target, values):
    """mov.b32 register, {low, high}"""
    part = TYPES[f"b{ptx_type.bits // len(values)}"]
    sources, d = [m.source(value, part) for value in values], m.destination(target, bits_type(ptx_type))

    def run(lanes):
        parts = np.empty((m.count(lanes), len(sources)), part.dtype)
        for k, x in enumerate(sources):
            parts[:, k] = x[lanes]
        d[lanes] = parts.view(ptx_type.unsigned)[:, 0]

    return run


@ordinary("cvta")
def cvta(m, ins):
    space = next(mod for mod in ins.mods if mod not in ("to", ins.type.name)).split("::")[0]
    base = u64(WINDOWS.get(space, 0))
    d, x = m.destination(ins.args[0], U64), m.source(ins.args[1], U64)
    if ins.has("to"):
        return assign(d, lambda s: x[s] - base)
    return assign(d, lambda s: x[s] + base)


@ordinary("isspacep")
def isspacep(m, ins):
    d, x = m.destination(ins.args[0], PRED), m.source(ins.args[1], U64)
    base = WINDOWS.get(ins.mods[0].split("::")[0])

    def run(lanes):
        window = x[lanes] >> u64(40)
        d[lanes] = window == base >> 40 if base else (window == 0) | (window > 3)

    return run


@ordinary("mapa")
def mapa(m, ins):
    """The address of a shared variable in another block of the cluster."""
    ptx_type = ins.type
    d, x = m.destination(ins.args[0], ptx_type), m.source(ins.args[1], ptx_type)
    target = m.source(ins.args[2], U32)
    base = u64(0 if ins.has("shared::cluster") else SHARED_WINDOW)

    def run(lanes):
        rank = m.spread(target[lanes], lanes)
        if (rank >= m.cluster).any():
            raise ClusterError(f"rank {int(rank.max())} in a cluster of {m.cluster} blocks, {ins}")
        offset = (x[lanes].astype(u64) - base) & OFFSET
        d[lanes] = (offset + (rank.astype(u64) << u64(RANK_SHIFT)) + base).astype(ptx_type.dtype)

    return run


@ordinary("getctarank")
def getctarank(m, ins):
    d, x = m.destination(ins.args[0], U32), m.source(ins.args[1], ins.type)
    return assign(d, lambda s: ((x[s].astype(u64) & u64((1 << 40) - 1)) >> u64(RANK_SHIFT)).astype(u32))
