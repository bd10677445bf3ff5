"""Logic, shifts and bit fields."""

import numpy as np

from tests.emulator.instructions.arithmetic import elementwise
from tests.emulator.instructions.registry import ORDINARY, assign, ordinary
from tests.emulator.integers import leading_zeros, popcount, reverse_bits, shift
from tests.emulator.operands import Constant
from tests.emulator.ptx_types import PRED, U32, i8, i64, u8, u32, u64

LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


@ordinary("and", "or", "xor")
def logic(m, ins):
    return elementwise(m, ins, LOGIC[ins.base], 2)


@ordinary("not")
def invert(m, ins):
    return elementwise(m, ins, np.invert, 1)


@ordinary("shl", "shr")
def shl_shr(m, ins):
    ptx_type, amount = ins.type, ins.args[2]
    d, a = m.destination(ins.args[0], ptx_type), m.source(ins.args[1], ptx_type)
    if amount[0] == "imm" and 0 <= amount[1] < ptx_type.bits:
        function = np.left_shift if ins.base == "shl" else np.right_shift
        bits = ptx_type.dtype.type(amount[1])
        return assign(d, lambda s: function(a[s], bits))
    b = m.source(amount, U32)
    return assign(d, lambda s: shift(ins.base, a[s], b[s]))


@ordinary("shf")
def funnel_shift(m, ins):
    d, a, b, c = m.destination(ins.args[0], U32), *(m.source(arg, U32) for arg in ins.args[1:])
    clamp, left = ins.has("clamp"), ins.mods[0] == "l"

    def value(lanes):
        amount = np.minimum(c[lanes], u32(32)) if clamp else c[lanes] & u32(31)
        both = a[lanes].astype(u64) | (b[lanes].astype(u64) << u64(32))
        amount = amount.astype(u64)
        return (((both << amount) >> u64(32)) if left else (both >> amount)).astype(u32)

    return assign(d, value)


@ordinary("bfe")
def extract_field(m, ins):
    ptx_type, width = ins.type, ins.type.bits
    d, a = m.destination(ins.args[0], ptx_type), m.source(ins.args[1], ptx_type)
    b, c = m.source(ins.args[2], U32), m.source(ins.args[3], U32)

    def unsigned(lanes):
        start, length = (b[lanes] & u32(255)).astype(i64), (c[lanes] & u32(255)).astype(i64)
        value = shift("shr", a[lanes].astype(u64), start)
        mask = shift("shl", np.array([1], u64), length) - u64(1)
        return (value & np.where(length >= 64, ~u64(0), mask)).astype(ptx_type.dtype)

    def signed(lanes):
        start, length = (b[lanes] & u32(255)).astype(i64), (c[lanes] & u32(255)).astype(i64)
        x = a[lanes].astype(i64)
        top = np.minimum(start + length - 1, width - 1)  # the sign bit of the field
        used = np.clip(top - start + 1, 0, 64)
        fill = np.clip(64 - used, 0, 63)
        negative = (shift("shr", x, top) & 1) != 0
        value = np.where(used <= 0, np.where(negative, i64(-1), i64(0)), (shift("shr", x, start) << fill) >> fill)
        return np.where(length == 0, i64(0), value).astype(ptx_type.dtype)

    return assign(d, signed if ptx_type.kind == "s" else unsigned)


@ordinary("bfi")
def insert_field(m, ins):
    ptx_type = ins.type
    dtype = ptx_type.dtype
    d, a, b = (m.destination(ins.args[0], ptx_type), *(m.source(arg, ptx_type) for arg in ins.args[1:3]))
    c, e = m.source(ins.args[3], U32), m.source(ins.args[4], U32)

    def value(lanes):
        start, length = c[lanes] & u32(255), e[lanes] & u32(255)
        one = np.array([1], dtype)
        mask = np.where(length >= ptx_type.bits, ~dtype.type(0), shift("shl", one, length) - one)
        mask = shift("shl", mask, start)
        return (b[lanes] & ~mask) | (shift("shl", a[lanes] + (start * 0).astype(dtype), start) & mask)

    return assign(d, value)


@ordinary("bfind")
def find_leading_one(m, ins):
    ptx_type = ins.type
    d, a = m.destination(ins.args[0], U32), m.source(ins.args[1], ptx_type)
    amount = ins.has("shiftamt")

    def value(lanes):
        x = a[lanes]
        if ptx_type.kind == "s":
            x = np.where(x < 0, ~x, x).view(ptx_type.unsigned)
        zeros = leading_zeros(x)
        return np.where(x == 0, u32(0xFFFFFFFF), zeros if amount else u32(ptx_type.bits - 1) - zeros)

    return assign(d, value)


def _unary(function, keeps_type=False):
    def bind(m, ins):
        d = m.destination(ins.args[0], ins.type if keeps_type else U32)
        a = m.source(ins.args[1], ins.type)
        return assign(d, lambda s: function(a[s]))

    return bind


ORDINARY.update(popc=_unary(popcount), clz=_unary(leading_zeros), brev=_unary(reverse_bits, True))

PERMUTATIONS = {
    "f4e": [[k, k + 1, k + 2, k + 3] for k in range(4)],
    "b4e": [[0, 7, 6, 5], [1, 0, 7, 6], [2, 1, 0, 7], [3, 2, 1, 0]],
    "rc8": [[k] * 4 for k in range(4)],
    "ecl": [[0, 1, 2, 3], [1, 1, 2, 3], [2, 2, 2, 3], [3, 3, 3, 3]],
    "ecr": [[0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 2, 2], [0, 1, 2, 3]],
    "rc16": [[0, 1, 0, 1], [2, 3, 2, 3]] * 2,
}


@ordinary("prmt")
def permute_bytes(m, ins):
    d, a, b, c = m.destination(ins.args[0], U32), *(m.source(arg, U32) for arg in ins.args[1:])
    mode = ins.first(*PERMUTATIONS)
    if mode is None and isinstance(c, Constant):
        return _permute_constant(m, d, a, b, int(c.value[0]))
    table = np.array(PERMUTATIONS[mode]) if mode else None

    def value(lanes):
        both = m.spread(a[lanes], lanes).astype(u64) | (m.spread(b[lanes], lanes).astype(u64) << u64(32))
        source, selector = both.reshape(-1, 1).view(u8), m.spread(c[lanes], lanes).astype(i64)
        rows, out = np.arange(len(source)), np.zeros((len(source), 4), u8)
        for k in range(4):
            if table is not None:
                out[:, k] = source[rows, table[selector & 3, k]]
                continue
            pick = (selector >> (4 * k)) & 15
            byte = source[rows, pick & 7]
            out[:, k] = np.where(pick & 8, (byte.view(i8) >> 7).view(u8), byte)
        return out.view(u32)[:, 0]

    return assign(d, value)


def _permute_constant(m, d, a, b, selector):
    """The usual case: the same bytes for every lane."""

    def value(lanes):
        source = np.empty((m.count(lanes), 2), u32)
        source[:, 0], source[:, 1] = a[lanes], b[lanes]
        source, out = source.view(u8), np.empty((len(source), 4), u8)
        for k in range(4):
            pick = (selector >> (4 * k)) & 15
            byte = source[:, pick & 7]
            out[:, k] = (byte.view(i8) >> 7).view(u8) if pick & 8 else byte
        return out.view(u32)[:, 0]

    return assign(d, value)


@ordinary("lop3")
def lop3(m, ins):
    combine = ins.first("or", "and")
    target, p = m.paired_destination(ins.args[0], U32, PRED)
    a, b, c = (m.source(arg, U32) for arg in ins.args[1:4])
    table = ins.args[4][1]
    q = m.source(ins.args[5], PRED) if combine else None

    def run(lanes):
        x, y, z = a[lanes], b[lanes], c[lanes]
        result = (x ^ x) & y & z
        for k in range(8):
            if table >> k & 1:
                result = result | ((x if k & 4 else ~x) & (y if k & 2 else ~y) & (z if k & 1 else ~z))
        if combine:
            p[lanes] = (result != 0) | q[lanes] if combine == "or" else (result != 0) & q[lanes]
        target[lanes] = result

    return run
