"""Calls inside of torch.compile, which follows Python wherever it leads, and makes code of its own of what it finds.

Of a call of the core that ends in a crash of the process: addresses are numbers to it, and what lies at them may be
gone by the time its code runs. So it leaves these calls alone: it breaks the graph, or says why where it must not.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

_REASON = (
    "kernels of gpusoftmax need values: use the functions of gpusoftmax.torch inside of torch.compile, or "
    "fullgraph=False, which calls those of the core between two graphs"
)


def follows() -> bool:
    """Whether torch.compile would follow the calls that are made here."""
    frames = sys.modules.get("torch._C._dynamo.eval_frame")  # with torch, also where nothing was compiled yet
    if frames is None:
        return False
    return sys.modules["torch"].compiler.is_compiling() or frames.get_eval_frame_callback() is not None


def unfollowed(function: Callable[..., Any], *given: Any) -> Any:
    return sys.modules["torch"].compiler.disable(function)(*given)


def opaque(function: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a function that looks whether it is followed, for torch.compile not to put its code into others'."""
    function._torchdynamo_disable, function._torchdynamo_disable_msg = True, _REASON
    return function


def left_alone(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that looks whether it is followed, and is not then."""

    @functools.wraps(function)
    def called(*given: Any, **options: Any) -> Any:
        if follows():
            return unfollowed(functools.partial(function, *given, **options))
        return function(*given, **options)

    return opaque(called)
