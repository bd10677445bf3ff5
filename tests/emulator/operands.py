"""Registers and operands: what an instruction reads and writes, as things indexed by a set of lanes.

A set of lanes is a slice (whole warps, the usual case) or an array of lane numbers. A register is an array over all
lanes; a source gives an array over the set, or one element that broadcasts.
"""

import numpy as np

from tests.emulator.errors import ParseError, Unsupported
from tests.emulator.ptx_types import POISON, RANK_SHIFT, TYPES, U32, U64, f32, f64, i64, u16, u32, u64
from tests.emulator.rounding import from_bfloat16, to_bfloat16


class Constant:
    """An immediate: the same one-element array for every set of lanes."""

    def __init__(self, value):
        self.value = value

    def __getitem__(self, lanes):
        return self.value


class Computed:
    """A source that is computed when it is read."""

    def __init__(self, get):
        self.get = get

    def __getitem__(self, lanes):
        return self.get(lanes)


class Sink:
    """The destination _."""

    def __setitem__(self, lanes, value):
        pass


class BFloat16:
    """A bfloat16 register: read as float64, written with one rounding."""

    def __init__(self, raw, mode="rn"):
        self.raw, self.mode = raw, mode

    def __getitem__(self, lanes):
        return from_bfloat16(self.raw[lanes]).astype(f64)

    def __setitem__(self, lanes, value):
        self.raw[lanes] = value if value.dtype == u16 else to_bfloat16(value, self.mode)


class Widened:
    """A float result in a wider register: the bits, zero-extended."""

    def __init__(self, register, dtype):
        self.register, self.dtype = register, np.dtype(dtype)

    def __setitem__(self, lanes, value):
        self.register[lanes] = np.ascontiguousarray(value, self.dtype).view(f"u{self.dtype.itemsize}")


class Operands:
    """The part of a Machine that turns operands into sources and destinations."""

    def make_registers(self):
        """One pool of arrays per register width, in the order in which the program declares them."""
        widths = {}
        self.register_rows = {}
        for key, bits in self.program.registers.items():
            self.register_rows[key] = widths.get(bits, 0)
            widths[bits] = widths.get(bits, 0) + 1
        self.pools = {}
        for bits, count in widths.items():
            dtype = np.dtype(bool if bits == 1 else f"u{bits // 8}")
            poison = np.full(dtype.itemsize, 1 if bits == 1 else POISON, np.uint8).view(dtype)
            self.pools[bits] = np.full((count, self.lane_count), poison)

    def register(self, key):
        return self.pools[self.program.registers[key]][self.register_rows[key]]

    def source(self, operand, ptx_type):
        """operand -> something that gives arrays of ptx_type when indexed by a set of lanes"""
        kind = operand[0]
        if kind == "reg":
            return self._source_register(operand[1], ptx_type)
        if kind == "imm":
            return self._immediate(operand[1], ptx_type)
        if kind == "special":
            return self._special(operand[1], ptx_type)
        if kind in ("sym", "name"):
            return self._symbol(operand, ptx_type)
        if kind == "not":
            inner = self.source(operand[1], ptx_type)
            return Computed(lambda s: ~inner[s])
        raise Unsupported(f"operand {operand}")

    def _source_register(self, key, ptx_type):
        register = self.register(key)
        if ptx_type.kind == "p" or register.dtype == bool:
            if register.dtype != bool or ptx_type.kind != "p":
                raise Unsupported(f"predicate and {ptx_type.name} mixed")
            return register
        width = register.itemsize * 8
        if width < ptx_type.bits:
            raise ParseError(f"register {key} is narrower than .{ptx_type.name}")
        view = register.view(ptx_type.dtype)
        if ptx_type.lanes > 1:
            view = view.reshape(self.lane_count, -1)
        elif width > ptx_type.bits:
            view = view[:: width // ptx_type.bits]
        return BFloat16(view) if ptx_type.kind == "g" else view

    def _immediate(self, value, ptx_type):
        if ptx_type.kind == "p":
            return Constant(np.array([bool(value)]))
        if isinstance(value, tuple) and ptx_type.is_float:
            bits = np.array([value[1]], u32 if value[0] == "f" else u64)
            raw = bits.view(f32 if value[0] == "f" else f64).astype(ptx_type.dtype)
        elif isinstance(value, float) or (ptx_type.kind == "f" and ptx_type.lanes == 1 and ptx_type.bits > 16):
            raw = np.array([value], ptx_type.dtype)
        else:
            value = value[1] if isinstance(value, tuple) else value
            raw = np.array([value & ((1 << ptx_type.bits) - 1)], f"u{ptx_type.bits // 8}").view(ptx_type.dtype)
        if ptx_type.lanes > 1:
            raw = raw.reshape(1, -1)
        return Constant(from_bfloat16(raw).astype(f64) if ptx_type.kind == "g" else raw)

    def destination(self, operand, ptx_type, mode="rn"):
        """operand -> something whose item assignment writes values of ptx_type"""
        if operand[0] == "sink":
            return Sink()
        if operand[0] != "reg":
            raise Unsupported(f"destination {operand}")
        register = self.register(operand[1])
        if ptx_type.kind == "p" or register.dtype == bool:
            return register
        width = register.itemsize * 8
        if width < ptx_type.bits:
            raise ParseError(f"register {operand[1]} is narrower than .{ptx_type.name}")
        if ptx_type.lanes > 1:
            view = register.view(ptx_type.dtype).reshape(self.lane_count, -1)
            return BFloat16(view, mode) if ptx_type.kind == "g" else view
        if ptx_type.kind == "g":
            return BFloat16(register, mode)
        if width == ptx_type.bits:
            return register.view(ptx_type.dtype)
        if ptx_type.kind == "f":
            return Widened(register, ptx_type.dtype)
        return register.view(f"i{width // 8}") if ptx_type.kind == "s" else register

    def paired_destination(self, operand, ptx_type, second_type):
        """d or d|p -> two destinations"""
        if operand[0] == "pair":
            return self.destination(operand[1], ptx_type), self.destination(operand[2], second_type)
        return self.destination(operand, ptx_type), Sink()

    def _special(self, name, ptx_type):
        """%tid.x and the like. Grids, blocks and clusters are one-dimensional."""
        base, _, axis = name[1:].partition(".")
        dtype = ptx_type.dtype

        def same(value):
            mask = (1 << ptx_type.bits) - 1
            return Constant(np.array([value & mask], ptx_type.unsigned).view(dtype))

        if axis and axis != "x":
            return same(1 if base[0] == "n" or "_n" in base else 0)
        if base in ("clock", "clock64", "globaltimer", "globaltimer_lo"):
            mask = (1 << ptx_type.bits) - 1
            return Computed(lambda s: np.array([self.steps & mask], ptx_type.unsigned).view(dtype))
        block = self.block_of_lane
        lane_values = {
            "ctaid": lambda s: self.block_numbers[block[s]],
            "smid": lambda s: self.block_numbers[block[s]] % 132,
            "clusterid": lambda s: self.block_numbers[block[s]] // self.cluster,
            "cluster_ctaid": lambda s: self.block_numbers[block[s]] % self.cluster,
            "cluster_ctarank": lambda s: self.rank[s],
        }
        if base in lane_values:
            get = lane_values[base]
            return Computed(lambda s: get(s).astype(dtype))
        launch_values = {
            "nctaid": lambda: self.launch.blocks,
            "nclusterid": lambda: self.launch.blocks // self.cluster,
            "gridid": lambda: 1,
        }
        if base in launch_values:
            get = launch_values[base]
            return Computed(lambda s: np.array([get()], ptx_type.unsigned).view(dtype))
        lane = self.lanes & 31
        if base == "tid":
            return self.thread.astype(dtype)
        if base == "laneid":
            return lane.astype(dtype)
        if base == "warpid":
            return (self.thread >> 5).astype(dtype)
        if base.startswith("lanemask"):
            mine = u32(1) << lane.astype(u32)
            below = mine - u32(1)
            masks = {"eq": mine, "lt": below, "le": below | mine, "gt": ~(below | mine), "ge": ~below}
            return masks[base[9:]].astype(dtype)
        return same(
            {
                "ntid": self.threads,
                "nwarpid": self.warps_per_block,
                "cluster_nctaid": self.cluster,
                "cluster_nctarank": self.cluster,
                "is_explicit_cluster": int(self.cluster > 1),
                "nsmid": 132,
                "dynamic_smem_size": self.layout.dynamic_bytes,
                "total_smem_size": self.layout.shared_bytes,
                "aggr_smem_size": self.layout.shared_bytes,
            }.get(base, 0)
        )

    def _symbol(self, operand, ptx_type):
        """The address of a variable: an offset for shared, local and param, absolute for global and const."""
        key, offset = operand[1], operand[2]
        if key not in self.layout.addresses:
            raise Unsupported(f"address of {key}")
        address = self.layout.addresses[key] + offset
        if self.program.variables[key].space == "shared" and self.cluster > 1:
            return ((self.rank << RANK_SHIFT) + address).astype(ptx_type.unsigned).view(ptx_type.dtype)
        mask = (1 << ptx_type.bits) - 1
        return Constant(np.array([address & mask], ptx_type.unsigned).view(ptx_type.dtype))

    def addresses(self, operand):
        """memory operand -> function of a set of lanes that gives one uint64 address per lane"""
        base, offset = operand[1], u64(operand[2] & (2**64 - 1))
        if base[0] == "reg":
            source = self.source(base, U64 if self.program.registers[base[1]] == 64 else U32)
        else:
            source = self.source(base, U64)
        if isinstance(source, np.ndarray) and source.dtype == u64:
            return lambda s: source[s] + offset
        return lambda s: self.spread(source[s].astype(u64) + offset, s)

    def spread(self, value, lanes):
        """value, broadcast to one element per lane"""
        count = self.count(lanes)
        return value if len(value) == count else np.broadcast_to(value, (count, *value.shape[1:]))

    def parameter_slot(self, operand):
        """A .param variable of a device function or a call: (bytes per lane, offset), or None for another operand."""
        if operand[0] != "mem" or operand[1][0] != "sym":
            return None
        variable = self.program.variables[operand[1][1]]
        if variable.space != "param" or variable.key in self.layout.addresses:
            return None
        if variable.key not in self.slots:
            width = -(-max(variable.size, 1) // 16) * 16
            self.slots[variable.key] = np.zeros((self.lane_count, width), np.uint8)
        return self.slots[variable.key], operand[2]


def bits_type(ptx_type):
    """The untyped bits of the same width."""
    return TYPES["pred"] if ptx_type.kind == "p" else TYPES[f"b{ptx_type.bits}"]


def bit_in_warp(lanes):
    """The bit of each lane in its warp's mask."""
    return u32(1) << (lanes & i64(31)).astype(u32)
