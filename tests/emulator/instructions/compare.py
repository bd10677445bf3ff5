"""setp, set, selp, slct and testp."""

import numpy as np

from tests.emulator.errors import Unsupported
from tests.emulator.instructions.registry import assign, ordinary
from tests.emulator.operands import bits_type
from tests.emulator.ptx_types import PRED, TYPES, f32, u16
from tests.emulator.rounding import flush

ORDERED = {
    "eq": np.equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
# x op-or-unordered y is not (x inverse y)
UNORDERED = {"ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt"}
COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
COMPARISONS = (*ORDERED, *UNORDERED, "ne", "equ", "neu", "num", "nan")


def comparison(name, is_float):
    if name in ORDERED:
        return ORDERED[name]
    if name in UNORDERED:
        inverse = ORDERED[UNORDERED[name]]
        return lambda a, b: ~inverse(a, b)
    if name == "neu" or (name == "ne" and not is_float):
        return np.not_equal
    return {
        "ne": lambda a, b: (a < b) | (a > b),
        "equ": lambda a, b: ~((a < b) | (a > b)),
        "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
        "nan": lambda a, b: np.isnan(a) | np.isnan(b),
    }[name]


@ordinary("setp", "set")
def setp(m, ins):
    ptx_type = TYPES[ins.types[-1]]
    compare = comparison(ins.first(*COMPARISONS), ptx_type.is_float)
    combine = COMBINE.get(ins.first(*COMBINE))
    a, b = m.source(ins.args[1], ptx_type), m.source(ins.args[2], ptx_type)
    c = m.source(ins.args[3], PRED) if combine else None
    ftz = ins.has("ftz") and ptx_type.dtype == f32

    def value(lanes):
        x, y = a[lanes], b[lanes]
        return compare(flush(x), flush(y)) if ftz else compare(x, y)

    if ins.base == "set" and ptx_type.lanes > 1:
        return _set_pairs(m, ins, value, combine)
    if ins.base == "set":
        return _set(m, ins, value, combine, c)
    if ptx_type.lanes > 1:
        raise Unsupported(str(ins))
    if ins.args[0][0] != "pair":
        p = m.destination(ins.args[0], PRED)
        return assign(p, (lambda s: combine(value(s), c[s])) if combine else value)
    p, q = m.paired_destination(ins.args[0], PRED, PRED)

    def run(lanes):
        result = value(lanes)
        both = (result, ~result)
        if combine:
            both = tuple(combine(x, c[lanes]) for x in both)
        p[lanes], q[lanes] = both

    return run


def _set(m, ins, value, combine, c):
    """set writes 1.0 or all ones"""
    target = ins.type
    if target.kind == "g":
        raise Unsupported(str(ins))
    d, dtype = m.destination(ins.args[0], target), target.dtype
    true = dtype.type(1) if target.is_float else dtype.type(-1) if target.kind == "s" else ~dtype.type(0)

    def run(lanes):
        result = value(lanes)
        if combine:
            result = combine(result, c[lanes])
        d[lanes] = np.where(result, true, dtype.type(0))

    return run


def _set_pairs(m, ins, value, combine):
    """set of pairs: all ones in each half for which the comparison holds"""
    if combine or ins.type.is_float:
        raise Unsupported(str(ins))
    d = m.destination(ins.args[0], TYPES["u16x2"])
    return assign(d, lambda s: np.where(value(s), u16(0xFFFF), u16(0)))


@ordinary("selp")
def selp(m, ins):
    raw = bits_type(ins.type)
    d, a, b = m.destination(ins.args[0], raw), m.source(ins.args[1], raw), m.source(ins.args[2], raw)
    p = m.source(ins.args[3], PRED)
    return assign(d, lambda s: np.where(p[s], a[s], b[s]))


@ordinary("slct")
def slct(m, ins):
    raw = bits_type(ins.type)
    d, a, b = m.destination(ins.args[0], raw), m.source(ins.args[1], raw), m.source(ins.args[2], raw)
    c = m.source(ins.args[3], TYPES[ins.types[1]])
    return assign(d, lambda s: np.where(c[s] >= 0, a[s], b[s]))


@ordinary("testp")
def testp(m, ins):
    d, a = m.destination(ins.args[0], PRED), m.source(ins.args[1], ins.type)
    tiny = np.finfo(ins.type.dtype).tiny
    test = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda x: ~np.isnan(x),
        "notanumber": np.isnan,
        "normal": lambda x: np.isfinite(x) & (np.abs(x) >= tiny),
        "subnormal": lambda x: (np.abs(x) < tiny) & (x != 0),
    }[ins.mods[0]]
    return assign(d, lambda s: test(a[s]))
