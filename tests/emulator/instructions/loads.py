"""ld, st, atom, red, cp.async and what is only advice to the memory system."""

import numpy as np

from tests.emulator.errors import OutOfBounds, ParseError, Unsupported
from tests.emulator.instructions.registry import assign, ordinary, space_of, vector_of
from tests.emulator.operands import BFloat16, Sink, bits_type
from tests.emulator.ptx_types import PENDING, READY, TYPES, U32, U64, i64, u8, u64
from tests.emulator.rounding import flush, min_max


def _elements(operand):
    return operand[1] if operand[0] == "vec" else [operand]


@ordinary("ld", "ldu")
def ld(m, ins):
    ptx_type, space, vector = TYPES[ins.types[-1]], space_of(ins), vector_of(ins)
    raw = ptx_type if ptx_type.kind == "s" else bits_type(ptx_type)
    targets = [m.destination(element, raw) for element in _elements(ins.args[0])]
    size = ptx_type.bits // 8 * vector
    if space.startswith("param"):
        slot = m.parameter_slot(ins.args[1])
        if slot:
            return _load_slot(targets, raw, size, *slot)
        return _load_parameter(m, ins, targets, raw, size)
    address = m.addresses(ins.args[1])
    if vector == 1:
        target = targets[0]

        def run(lanes):
            for part, memory, at in m.access(ins, space, lanes, address(lanes), size, "ld"):
                target[part] = memory.view(raw.dtype)[at]

    else:

        def run(lanes):
            for part, memory, at in m.access(ins, space, lanes, address(lanes), size, "ld"):
                rows = memory.view(raw.dtype, vector)[at]
                for k, target in enumerate(targets):
                    target[part] = rows[:, k]

    return run


def _load_slot(targets, raw, size, data, offset):
    """A parameter of a device function, or the result of a call."""

    def run(lanes):
        values = np.ascontiguousarray(data[lanes, offset : offset + size]).view(raw.dtype)
        for k, target in enumerate(targets):
            target[lanes] = values[:, k]

    return run


def _load_parameter(m, ins, targets, raw, size):
    """A parameter of the kernel: nearly always at one address for all lanes."""
    address = m.addresses(ins.args[1])

    def run(lanes):
        where, params = address(lanes).astype(i64), m.launch.parameters
        if (where < 0).any() or (where + size > len(params)).any():
            m.fail(OutOfBounds, ins, lanes, 0, where, size, "outside the kernel parameters")
        if (where == where[0]).all():
            values = params[where[0] : where[0] + size].copy().view(raw.dtype)[None]
        else:
            values = params[where[:, None] + np.arange(size)].view(raw.dtype)
        for k, target in enumerate(targets):
            target[lanes] = values[:, k]

    return run


@ordinary("st")
def st(m, ins):
    if ins.has("async") or ins.has("bulk"):
        raise Unsupported(f"{ins}")
    ptx_type, space, vector = TYPES[ins.types[-1]], space_of(ins), vector_of(ins)
    raw = bits_type(ptx_type)
    sources = [m.source(e, ptx_type if e[0] == "imm" else raw) for e in _elements(ins.args[1])]
    width = ptx_type.bits // 8
    size = width * vector
    if space.startswith("param"):
        data, offset = m.parameter_slot(ins.args[0])

        def run_slot(lanes):
            for k, x in enumerate(sources):
                at = offset + k * width
                data[lanes, at : at + width] = np.array(m.spread(x[lanes], lanes)).view(u8).reshape(-1, width)

        return run_slot
    address = m.addresses(ins.args[0])

    def run(lanes):
        for part, memory, at in m.access(ins, space, lanes, address(lanes), size, "st"):
            view = memory.view(raw.dtype, vector)
            for k, x in enumerate(sources):
                value = x[part]
                if value.dtype != raw.dtype:
                    value = value.view(raw.dtype)
                if vector == 1:
                    view[at] = value
                else:
                    view[at, k] = value

    return run


ATOMS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "exch": lambda old, new: new,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "cas": lambda old, expected, new: np.where(old == expected, new, old),
    "inc": lambda old, top: np.where(old >= top, old.dtype.type(0), old + old.dtype.type(1)),
    "dec": lambda old, top: np.where((old == 0) | (old > top), top, old - old.dtype.type(1)),
}


@ordinary("atom", "red")
def atom(m, ins):
    if ins.has("async") or vector_of(ins) > 1:
        raise Unsupported(f"{ins}")
    ptx_type, space, size = TYPES[ins.types[-1]], space_of(ins), TYPES[ins.types[-1]].bits // 8
    name = ins.first(*ATOMS)
    target, args = (("sink",), ins.args) if ins.base == "red" else (ins.args[0], ins.args[1:])
    address, d = m.addresses(args[0]), m.destination(target, ptx_type) if target[0] != "sink" else Sink()
    values = [m.source(arg, ptx_type) for arg in args[1 : 3 if name == "cas" else 2]]
    plain = min_max(name) if ptx_type.is_float and name in ("min", "max") else ATOMS[name]
    if ptx_type.name == "f32" and space == "global" and name == "add":  # flushes subnormals

        def function(old, new):
            return flush(plain(flush(old), flush(new)))
    else:
        function = plain

    def run(lanes):
        for part, memory, at in m.access(ins, space, lanes, address(lanes), size, "atom"):
            if ptx_type.lanes == 1:
                cell = memory.view(ptx_type.dtype)
            else:
                cell = memory.view(ptx_type.unsigned, ptx_type.lanes).view(ptx_type.dtype)
            units = np.arange(at.start, at.stop) if isinstance(at, slice) else at
            operands = [m.spread(value[part], part) for value in values]
            d[part] = _one_by_one(BFloat16(cell) if ptx_type.kind == "g" else cell, units, function, operands, m)

    return run


def _one_by_one(cell, units, function, operands, m):
    """Update cells in lane order, or a random one; the old values. One round per multiplicity: each address once."""
    left, old_values = np.arange(len(units)), None
    if m.launch.random is not None:
        left = m.launch.random.permutation(left)
    while len(left):
        _, first = np.unique(units[left], return_index=True)
        now = left[first]
        old = cell[units[now]]
        if old_values is None:
            old_values = np.empty((len(units), *old.shape[1:]), old.dtype)
        old_values[now] = old
        cell[units[now]] = function(old, *[operand[now] for operand in operands])
        left = np.delete(left, first)
    return old_values


@ordinary("prefetch", "prefetchu", "membar", "fence", "griddepcontrol", "nanosleep", "applypriority", "discard")
def advice(m, ins):
    return lambda lanes: None


@ordinary("createpolicy")
def createpolicy(m, ins):
    d = m.destination(ins.args[0], U64)
    return assign(d, lambda s: 0)


@ordinary("cp")
def cp_async(m, ins):
    if ins.mods[0] != "async" or ins.has("bulk") or ins.has("mbarrier"):
        raise Unsupported(f"{ins}")
    if ins.has("commit_group"):

        def commit(lanes):
            m.copy_group[lanes] += 1

        return commit
    if ins.has("wait_group") or ins.has("wait_all"):
        keep = int(ins.args[0][1]) if ins.has("wait_group") else -1

        def wait(lanes):
            inside = np.zeros(m.lane_count, bool)
            inside[lanes] = True
            _finish_copies(m, inside, m.copy_group - keep)

        return wait
    return _start_copy(m, ins)


def _start_copy(m, ins):
    """cp.async.ca/cg: global to shared; the bytes arrive when their group is waited for."""
    target, source, size = m.addresses(ins.args[0]), m.addresses(ins.args[1]), int(ins.args[2][1])
    if size not in (4, 8, 16) or (ins.has("cg") and size != 16):
        raise ParseError(f"cp.async size {size}, {ins}")
    real = None  # how many bytes are read; the rest become 0
    if len(ins.args) > 3 and not (ins.args[3][0] == "reg" and m.program.registers[ins.args[3][1]] != 32):
        real = m.source(ins.args[3], U32)

    def run(lanes):
        ((_, shared, at),) = m.access(ins, "shared", lanes, target(lanes), size, "st")
        copy, address = _Copy(m.lanes[lanes], m.copy_group[lanes].copy(), at * size, size), source(lanes)
        wanted = m.spread(real[lanes], lanes) if real is not None else np.full(len(copy.lanes), size)
        for length in np.unique(wanted):
            chosen = wanted == length
            unit = size if length == size else 1
            for offset in range(0, int(length), unit):
                part = m.subset(lanes, chosen)
                rows = np.flatnonzero(chosen)
                for piece, memory, units in m.access(ins, "global", part, address[chosen] + u64(offset), unit, "ld"):
                    first = np.arange(units.start, units.stop) if isinstance(units, slice) else units
                    inside = np.isin(m.lanes[part], m.lanes[piece])
                    places = first[:, None] * unit + np.arange(unit)
                    copy.parts.append((rows[inside], slice(offset, offset + unit), memory, places))
        shared.state[copy.cells] = PENDING
        copy.read()
        m.pending_copies.append(copy)

    return run


class _Copy:
    """What some lanes have under way: a row of bytes each. `left`: those that have not waited for it yet."""

    def __init__(self, lanes, group, place, size):
        self.lanes, self.group, self.cells = lanes, group, place[:, None] + np.arange(size)
        self.data, self.parts, self.left = np.zeros(self.cells.shape, u8), [], np.ones(len(lanes), bool)

    def read(self):
        for rows, columns, memory, places in self.parts:
            self.data[rows, columns] = memory.data[places]


def _finish_copies(m, inside, limit):
    """The copies of lanes `inside` that belong to groups below limit. With a random schedule global memory is only read
    now: what has been written there meanwhile arrives or not.
    """
    for copy in m.pending_copies:
        done = copy.left & inside[copy.lanes] & (copy.group < limit[copy.lanes])
        if not done.any():
            continue
        if m.shuffled:
            copy.read()
        cells = copy.cells[done]
        m.shared.data[cells], m.shared.state[cells] = copy.data[done], READY
        if m.check_race:
            m.remember_copies(copy.lanes[done], cells)
        copy.left &= ~done
    m.pending_copies = [copy for copy in m.pending_copies if copy.left.any()]
