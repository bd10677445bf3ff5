"""On the command line: what a call is given beside its logits, as NAME=VALUE."""

import argparse
from typing import Any

import numpy as np

from gpusoftmax import _checks, _imagined


def add_argument(parser: argparse.ArgumentParser) -> None:
    """`options` of the parsed arguments are pairs of a name and a value."""
    parser.add_argument(
        "--with",
        dest="options",
        nargs="+",
        type=_option,
        default=[],
        metavar="NAME=VALUE",
        help="arguments of the call, such as softcap=30 mask=int32 temperature=float32: numbers and words; of an array "
        "its dtype (of a number for each row, a bias for each column, a mask for each logit, int32: of bits), or "
        "DTYPE:SHAPE",
    )


def _option(text: str) -> tuple[str, Any]:
    name, is_given, value = text.partition("=")
    if not (name and is_given and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE, such as softcap=30 or mask=bool:4096x50257")
    if name == "dtype":
        raise argparse.ArgumentTypeError(f"{text!r} is for the logits, by themselves; the result's is out={value}")
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            pass
    if value in ("true", "false"):
        return name, value == "true"
    return name, _array(value, name) if ":" in value else value


def _array(text: str, name: str) -> np.ndarray:
    """DTYPE:SHAPE, as an array of one element that is stretched."""
    dtype, _, sizes = text.partition(":")
    try:
        element = np.empty((), _imagined.numpy_dtype(dtype, name))
    except TypeError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return np.broadcast_to(element, shape(sizes))


def shape(text: str) -> tuple[int, ...]:
    """ROWSxCOLS, with as many sizes as there are."""
    try:
        return _checks.shape(tuple(int(size) for size in text.lower().split("x")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape such as 4096x50257") from None
