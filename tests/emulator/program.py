"""A parsed PTX module: instructions with resolved operands, variables, registers, functions.

Operands are tuples: ("reg", key), ("sym", key, offset) for a variable, ("name", text, offset) for anything else that
has a name (labels, functions), ("special", name), ("imm", value), ("mem", base, offset), ("vec", [operands]),
("not", operand), ("pair", first, second) for d|p, ("sink",) for _. A floating point immediate is ("f" or "d", bits).
"""

import itertools
from typing import NamedTuple

from tests.emulator.ptx_types import MODULE_BASE, TYPES

# They end a basic block: the lanes may part here.
BRANCHING = frozenset(
    ("bra", "brx", "ret", "exit", "trap", "brkpt", "call")
    + ("bar", "barrier", "shfl", "vote", "match", "redux", "elect")  # here they may have to wait
)
_module_addresses = itertools.count(MODULE_BASE + (1 << 20), 1 << 24)


class Variable(NamedTuple):
    key: str
    space: str
    align: int
    size: int
    init: tuple | None  # (type, values)
    function: str


class Scope:
    """Names visible in one { } block of a function."""

    def __init__(self, parent=None):
        self.parent, self.names, self.labels, self.tables = parent, {}, {}, {}

    def find(self, kind, name):
        scope = self
        while scope is not None:
            if name in getattr(scope, kind):
                return getattr(scope, kind)[name]
            scope = scope.parent
        return None


class Instruction:
    """One instruction; types are the PTX types among its modifiers, guard its predicate operand."""

    __slots__ = (
        "args",
        "base",
        "function",
        "guard",
        "line",
        "mods",
        "negated",
        "op",
        "scope",
        "text",
        "types",
        "used_bytes",
    )

    def __init__(self, op, args, function, scope):
        self.op, self.args, self.function, self.scope = op, args, function, scope
        self.base, *self.mods = op.split(".")
        self.types = [mod for mod in self.mods if mod in TYPES]
        self.guard, self.negated, self.line, self.text, self.used_bytes = None, False, 0, op, None

    @property
    def type(self):
        return TYPES[self.types[0]]

    def has(self, mod):
        return mod in self.mods

    def first(self, *mods):
        """The first modifier that is one of these, or None."""
        return next((mod for mod in self.mods if mod in mods), None)

    def __str__(self):
        return f'"{self.text}" (line {self.line}, {self.function[:60]})'


class Function:
    def __init__(self, name, is_entry):
        self.name, self.is_entry, self.params, self.results = name, is_entry, [], []
        self.start = self.end = None
        self.attributes = {}


class Program:
    """A parsed PTX module. code is one list for all functions; leaders are the starts of basic blocks."""

    def __init__(self):
        self.code, self.leaders, self.variables, self.registers = [], set(), {}, {}
        self.functions, self.entries, self.dynamic_shared, self.target = {}, [], set(), ""
        self.addresses, self.reads_noncoherent, self._reachable = {}, False, {}

    def finish(self):
        """Once all is parsed: .global and .const variables get addresses that no other program has."""
        at = next(_module_addresses)
        for variable in self.variables.values():
            if variable.space in ("global", "const"):
                self.addresses[variable.key] = at
                at += -(-max(variable.size, 1) // 256) * 256 + 4096
        self.reads_noncoherent = any(ins.base == "ld" and ins.has("nc") for ins in self.code)

    def reachable(self, function):
        """Names of everything that a function and the functions it calls mention."""
        if function.name in self._reachable:
            return self._reachable[function.name]
        seen, names, todo = set(), set(), [function]

        def walk(operand):
            if isinstance(operand, (list, tuple)):
                if len(operand) > 1 and operand[0] in ("sym", "name"):
                    names.add(operand[1])
                for part in operand:
                    walk(part)

        while todo:
            one = todo.pop()
            if one.name in seen or one.start is None:
                continue
            seen.add(one.name)
            for ins in self.code[one.start : one.end]:
                walk(ins.args)
            todo += [self.functions[name] for name in names if name in self.functions]
        self._reachable[function.name] = names
        return names
