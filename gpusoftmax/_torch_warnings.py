"""What gpusoftmax.torch says where it takes more memory than it was asked to, or than it usually does."""

import functools
import warnings

import torch


def warn_once(message: str) -> None:
    """Issue a UserWarning, the first time in this process. Code that is compiled, which cannot, issues none."""
    if not torch.compiler.is_compiling():
        _warn(message)


@functools.cache
def _warn(message: str) -> None:
    warnings.warn(f"gpusoftmax.torch: {message}", stacklevel=3)
