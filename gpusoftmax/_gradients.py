"""Calls of the core on torch tensors that require grad: to their differentiable versions, which need torch."""

import importlib
from typing import Any

from gpusoftmax import _arrays

_HAVE_GRADIENTS = ("x", "logits", "probs", "dprobs", "tangent", "log_probs", "dlog_probs")


def call(function: str, argument: str, out: Any, transform: tuple, *arguments: Any) -> Any:
    """What `function` of _torch_core.py returns. `argument` is the one that requires grad.

    transform: temperature, bias, softcap, mask, n_valid and empty_row as they were given, of which the differentiable
    versions know one temperature for all rows.
    """
    if argument not in _HAVE_GRADIENTS:
        raise _arrays.RequiresGrad(argument)
    if out is not None:
        raise TypeError(
            f"out is given and {argument} requires grad, but what is written into out is not recorded: call without "
            f"out, or pass {argument}.detach()"
        )
    for name, value in zip(("temperature", "bias", "softcap", "mask", "n_valid", "empty_row"), transform, strict=False):
        usual = not getattr(value, "ndim", 0) if name == "temperature" else value is None
        if not usual and not (name == "empty_row" and value == "nan"):
            raise TypeError(
                f"{name} is given and {argument} requires grad, but gradients are recorded for one temperature and "
                f"nothing else: apply {name} in torch, before the call, or pass {argument}.detach()"
            )
    return getattr(importlib.import_module("gpusoftmax._torch_core"), function)(*arguments)
