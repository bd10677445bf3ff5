"""Barriers of blocks and clusters, branches, calls and exits."""

import numpy as np

from tests.emulator.barriers import AT_BLOCK, AT_CLUSTER
from tests.emulator.errors import BarrierError, OutOfBounds, ParseError, Trap, Unsupported
from tests.emulator.instructions.registry import control, ordinary
from tests.emulator.instructions.warp import warp_operation
from tests.emulator.ptx_types import PRED, U32, i64, u32


@control("bar", "barrier")
def block_barrier(m, ins):
    if ins.has("cluster"):
        return _cluster_barrier(m, ins)
    if ins.has("warp"):
        return warp_operation(m, m.source(ins.args[0], U32), m.have_met)
    args = list(ins.args)
    reduction = ins.first("popc", "and", "or") if ins.has("red") else None
    if reduction:
        target = m.destination(args.pop(0), U32 if reduction == "popc" else PRED)
        m.on_release[m.binding_pc] = _barrier_vote(m, reduction, target, m.source(args.pop(), PRED))
    number = m.source(args[0], U32)
    expected = m.source(args[1], U32) if len(args) > 1 else None

    def run(lanes, p):
        barrier = m.spread(number[lanes], lanes)
        wanted = m.spread(expected[lanes], lanes) if expected is not None else None
        if wanted is not None and ((wanted % 32 != 0) | (wanted == 0)).any():
            raise BarrierError(f"thread count {int(wanted[0])} is not a multiple of 32, {ins}")
        if (barrier > 15).any():
            raise BarrierError(f"barrier number {int(barrier.max())}, {ins}")
        if ins.has("arrive"):
            np.add.at(m.arrivals, (m.block_of_lane[lanes], barrier.astype(i64)), 1)
            for one in np.unique(barrier):
                m.check_block_barrier(int(one))
            m.pc[lanes] = p + 1
            return None
        if not reduction and wanted is None and _everybody(m, lanes, barrier):
            return p + 1
        m.state[lanes], m.barrier[lanes], m.pc[lanes] = AT_BLOCK, barrier, p
        m.wanted[lanes] = 0 if wanted is None else wanted
        for one in np.unique(barrier):
            m.check_block_barrier(int(one))
        return None

    return run


def _everybody(m, lanes, barrier):
    """Every living thread of every block came at once: nobody need wait."""
    if m.count(lanes) != int(m.live.sum()) or m.arrivals.any() or (barrier != barrier[0]).any():
        return False
    if m.check_race:
        if m.cluster == 1:
            m.clear_records()
        else:
            m.phase[lanes] = m.phase[lanes].max() + 1
            m.have_met(lanes)
    m.launch.stats.early_exit_barriers += int(((m.live > 0) & (m.live < m.threads)).sum())
    return True


def _barrier_vote(m, reduction, target, predicate):
    """bar.red: what the lanes get when the barrier opens"""

    def finish(lanes):
        block = m.block_of_lane[lanes]
        yes = np.bincount(block, weights=predicate[lanes], minlength=m.block_count)
        everybody = np.bincount(block, minlength=m.block_count)
        result = {"popc": yes, "and": yes == everybody, "or": yes > 0}[reduction][block]
        target[lanes] = result.astype(u32) if reduction == "popc" else result

    return finish


def _cluster_barrier(m, ins):
    if ins.has("arrive"):

        def arrive(lanes, p):
            if (m.arrived[lanes] != m.passed[lanes]).any():
                raise BarrierError(f"barrier.cluster.arrive twice without a wait, {ins}")
            m.arrived[lanes] += 1
            m.arrived_at[lanes], m.pc[lanes] = p, p + 1
            m.check_cluster_barrier()

        return arrive

    def wait(lanes, p):
        if (m.arrived[lanes] == m.passed[lanes]).any():
            raise BarrierError(f"barrier.cluster.wait without an arrive, {ins}")
        m.state[lanes], m.pc[lanes] = AT_CLUSTER, p
        m.check_cluster_barrier()

    return wait


def _label(ins, name):
    target = ins.scope.find("labels", name)
    if target is None:
        raise ParseError(f"no label {name}, {ins}")
    return target


@control("bra")
def bra(m, ins):
    target = _label(ins, ins.args[0][1])
    return lambda lanes, p: target


@control("brx")
def brx(m, ins):
    """A jump table."""
    x = m.source(ins.args[0], U32)
    targets = np.array([_label(ins, name) for name in ins.scope.find("tables", ins.args[1][1])])

    def run(lanes, p):
        index = m.spread(x[lanes], lanes)
        if (index >= len(targets)).any():
            raise OutOfBounds(f"branch index {int(index.max())} of {len(targets)}, {ins}")
        m.pc[lanes] = targets[index]

    return run


@control("ret", "exit")
def ret(m, ins):
    is_exit = ins.base == "exit"

    def run(lanes, p):
        inside_call = m.depth[lanes] > 0
        if is_exit or not inside_call.any():
            m.exit(lanes)
            return
        back = lanes
        if not inside_call.all():
            m.exit(m.subset(lanes, ~inside_call))
            back = m.subset(lanes, inside_call)
        m.depth[back] -= 1
        m.pc[back] = m.stack[m.lanes[back], m.depth[back]]

    return run


@control("trap", "brkpt")
def trap(m, ins):
    def run(lanes, p):
        raise Trap(f"{ins} by {m.who(m.lanes[lanes][0])}")

    return run


def _call_parts(ins):
    """(results, function name, arguments)"""
    args, results = ins.args, []
    if args[0][0] == "vec":
        results, args = args[0][1], args[1:]
    return results, args[0][1], args[1][1] if len(args) > 1 and args[1][0] == "vec" else []


def _slot(m, operand):
    return m.parameter_slot(("mem", operand, 0))[0]


@control("call")
def call(m, ins):
    _, name, args = _call_parts(ins)
    function = m.program.functions.get(name)
    if function is not None and function.start is None:
        return _external(m, ins, name)
    if function is None:
        raise Unsupported(f"indirect call or unknown function, {ins}")
    actual = [_slot(m, arg) for arg in args]
    formal = [_slot(m, ("sym", variable.key, 0)) for variable in function.params]
    columns = np.arange(m.stack.shape[1])

    def run(lanes, p):
        depth, index = m.depth[lanes], m.lanes[lanes]
        if ((m.stack[index] == p + 1) & (columns < depth[:, None])).any():
            raise Unsupported(f"recursion, {ins}")
        for target, value in zip(formal, actual, strict=True):
            target[lanes] = value[lanes]
        m.stack[index, depth] = p + 1
        m.depth[lanes] += 1
        m.pc[lanes] = function.start

    return run


def _external(m, ins, name):
    """printf is silent, a failed assertion is a Trap; nothing else can be called without its code."""
    if name not in ("vprintf", "__assertfail"):
        raise Unsupported(f"call of the external function {name}")

    def run(lanes, p):
        if name == "__assertfail":
            raise Trap(f"assertion failed in {m.who(m.lanes[lanes][0])}")
        return p + 2

    return run


@ordinary("callret")
def fetch_results(m, ins):
    """The second half of a call: copy the results."""
    results, name, _ = _call_parts(ins)
    function = m.program.functions[name]
    pairs = [
        (_slot(m, result), _slot(m, ("sym", variable.key, 0)))
        for result, variable in zip(results, function.results, strict=True)
    ]

    def run(lanes):
        for target, value in pairs:
            target[lanes] = value[lanes]

    return run
