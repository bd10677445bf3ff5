"""Several calls of kernels, one after the other on this thread, as one: Python starts it once.

words     their number; then, for each of them, TURN words: its C function, the word where it begins, and the
          address of a number with what that has to be, or else neither this call nor a later one is made (0: always)
calls     see call.py
"""

from collections.abc import Sequence

import numpy as np
from numba import types

from gpusoftmax.kernels.cpu.cache import kernel
from gpusoftmax.kernels.cpu.call import c_function, run_entry
from gpusoftmax.kernels.cpu.memory import pointer_to
from gpusoftmax.kernels.cpu.run import Start

TURN = 4


@kernel
def take_turns(calls):
    words = pointer_to(calls, calls)
    for k in range(words[0]):
        turn = 1 + TURN * k
        condition = words[turn + 2]
        if condition != 0 and pointer_to(condition, calls)[0] != words[turn + 3]:
            break
        run_entry(words[turn], calls + 8 * words[turn + 1])


def joined(calls: Sequence[Start], expected: Sequence[int | None]) -> Start:
    """One call for several on one thread.

    expected: what an int64 has to be before each of them; None: any. The addresses that are asked for are those of all
    calls in order, each call's followed by that of this number, if there is one.
    """
    size = 1 + TURN * len(calls)
    words, positions, workspaces = [len(calls)], [], []
    for k, (call, number) in enumerate(zip(calls, expected, strict=True)):
        words += [call.entry, size, 0, number or 0]
        positions += [size + position for position in call.positions]
        if number is not None:
            positions.append(1 + TURN * k + 2)
        workspaces += [size + position for position in call.workspaces]
        size += call.block.size
    return Start(
        entry=c_function(take_turns, types.int64),
        block=np.concatenate([np.array(words, np.int64), *(call.block for call in calls)]),
        positions=tuple(positions),
        addresses=(),
        n_threads=1,
        workspace_bytes=max(call.workspace_bytes for call in calls),
        workspaces=tuple(workspaces),
    )
