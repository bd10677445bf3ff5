"""The tables of instructions. A binder takes (machine, instruction) and returns what executes it.

An ordinary instruction becomes a function of a set of lanes. A control instruction, after which lanes may part or wait,
becomes a function of (lanes, pc) that returns the next pc, or None if it has set the program counters itself.
"""

ORDINARY, CONTROL = {}, {}


def ordinary(*names):
    def register(binder):
        ORDINARY.update(dict.fromkeys(names, binder))
        return binder

    return register


def control(*names):
    def register(binder):
        CONTROL.update(dict.fromkeys(names, binder))
        return binder

    return register


def assign(destination, function):
    """destination[lanes] = function(lanes)"""

    def run(lanes):
        destination[lanes] = function(lanes)

    return run


def space_of(ins):
    """The address space of a memory instruction; .const lies in global memory."""
    for mod in ins.mods:
        if mod.split("::")[0] in ("global", "shared", "local", "const", "param"):
            return "global" if mod == "const" else mod
    return "generic"


def vector_of(ins):
    return int((ins.first("v2", "v4", "v8") or "v1")[1:])


def rounding_of(ins):
    return ins.first("rn", "rz", "rm", "rp") or "rn"
