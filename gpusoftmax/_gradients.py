"""Calls of the core on torch tensors that require grad: to their differentiable versions, which need torch."""

import importlib
from typing import Any

from gpusoftmax import _arrays

_HAVE_GRADIENTS = {
    *("x", "logits", "target_logits", "features", "probs", "dprobs", "tangent", "log_probs", "dlog_probs"),
    *("temperature", "bias", "input", "linear_weight", "linear_bias", "target", "target[1]"),
}


def call(function: str, argument: str, out: Any, transform: tuple, *arguments: Any) -> Any:
    """What `function` of _torch_core.py returns. `argument` is the one that requires grad.

    transform: temperature, bias, softcap, mask, n_valid and empty_row as they were given, as far as the function has
    them.
    """
    if argument not in _HAVE_GRADIENTS:
        raise _arrays.RequiresGrad(argument)
    if out is not None:
        raise TypeError(
            f"out is given and {argument} requires grad, but what is written into out is not recorded: call without "
            f"out, or pass {argument}.detach()"
        )
    options = {"transform": transform} if transform else {}
    return getattr(importlib.import_module("gpusoftmax._torch_core"), function)(*arguments, **options)
