"""cvt between every pair of integer and floating point types."""

import numpy as np

from tests.emulator.instructions.registry import assign, ordinary, rounding_of
from tests.emulator.ptx_types import TYPES, f16, f32, f64, u16
from tests.emulator.rounding import (
    ROUND_TO_INTEGER,
    canonical_nan,
    float_to_integer,
    flush,
    from_bfloat16,
    integer_to_float,
    narrow,
    saturate,
    to_bfloat16,
)


@ordinary("cvt")
def cvt(m, ins):
    target, source = (TYPES[name] for name in ins.types[:2])
    if target.lanes == 2 and len(ins.args) == 3:
        return _pack_halves(m, ins, target, source)
    d, x = m.destination(ins.args[0], target, rounding_of(ins)), m.source(ins.args[1], source)
    to_integer = ins.first(*ROUND_TO_INTEGER)
    ftz = ins.has("ftz") and source.dtype == f32
    if source.is_float and target.is_float:
        keeps_nan = target.dtype == f32 and (source.kind == "g" or source.bits == 64)
        bits = m.source(ins.args[1], TYPES["b16"]) if keeps_nan and source.kind == "g" else None
        finish, round_first = _finisher(ins, target, keeps_nan), ROUND_TO_INTEGER.get(to_integer)

        def run(lanes):
            # A shift: in float64, as other instructions have bfloat16, a signalling NaN becomes a quiet one.
            value = x[lanes] if bits is None else from_bfloat16(bits[lanes])
            value = flush(value) if ftz else value
            d[lanes] = finish(round_first(value) if round_first else value)

        return run
    if source.is_float:
        wide = source.bits == 64

        def run_to_integer(lanes):
            value = flush(x[lanes]) if ftz else x[lanes]
            d[lanes] = float_to_integer(value, target.dtype, to_integer, wide)

        return run_to_integer
    if target.is_float:
        mode, sat = rounding_of(ins), ins.has("sat")

        def convert(lanes):
            value = integer_to_float(x[lanes], target, mode)
            return saturate(value) if sat else value

        return assign(d, convert)
    if ins.has("sat"):
        ours, theirs = np.iinfo(target.dtype), np.iinfo(source.dtype)
        low, high = max(ours.min, theirs.min), min(ours.max, theirs.max)
        return assign(d, lambda s: np.clip(x[s], low, high).astype(target.dtype))
    return assign(d, lambda s: x[s].astype(target.dtype))


def _finisher(ins, target, keeps_nan=False):
    """float64 or float32 -> the representation of the target, with .relu, .sat, .satfinite and .ftz.

    keeps_nan: an H100 makes float32 of bfloat16 and float64 with as much of the payload as fits; all else is its NaN.
    """
    relu, sat, finite = ins.has("relu"), ins.has("sat"), ins.has("satfinite")
    ftz, mode = ins.has("ftz") and target.dtype == f32, rounding_of(ins)

    def finish(value):
        if relu:
            value = np.where(value < 0, value.dtype.type(0), value)
        if sat:
            value = saturate(value)
        if target.kind == "g":
            bits = to_bfloat16(value, mode)
            if finite:
                bits = np.where((bits & u16(0x7FFF)) == 0x7F80, (bits & u16(0x8000)) | u16(0x7F7F), bits)
            return bits
        if value.dtype != target.dtype:
            if mode == "rn" or value.itemsize < target.dtype.itemsize:
                value = value.astype(target.dtype)
            else:
                value = narrow(value.astype(f64), target.dtype.type, mode)
        if finite and target.dtype == f16:
            value = np.where(np.isinf(value), np.copysign(f16(65504), value), value)
        value = flush(value) if ftz else value
        return value if keeps_nan else canonical_nan(value)

    return finish


def _pack_halves(m, ins, target, source):
    """cvt.rn.bf16x2.f32 d, a, b: a goes to the upper half"""
    upper, lower = m.source(ins.args[1], source), m.source(ins.args[2], source)
    raw = m.register(ins.args[0][1]).view(u16).reshape(m.lane_count, 2)
    finish, ftz = _finisher(ins, target), ins.has("ftz")

    def run(lanes):
        values = lower[lanes], upper[lanes]  # both before either is written
        halves = [finish(flush(value) if ftz else value).view(u16) for value in values]
        for k, half in enumerate(halves):
            raw[lanes, k] = half

    return run
