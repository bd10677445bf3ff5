"""What torch.nn.LinearCrossEntropyOptions ask of the layers: how their logits are cut into chunks."""

import torch
from torch import Tensor

from gpusoftmax._torch_ops import row_dtype
from gpusoftmax._torch_warnings import warn_once


def chunk_size_of(options: "torch.nn.LinearCrossEntropyOptions", input: Tensor, linear_weight: Tensor) -> int | None:
    """Rows of a chunk, None for as many as are taken by default. A gradient can be computed again whatever
    `allow_retain_graph` is.
    """
    if not isinstance(options, getattr(torch.nn, "LinearCrossEntropyOptions", ())):  # torch has them since 2.13
        raise TypeError(
            f"options is a {type(options).__name__}, expected torch.nn.LinearCrossEntropyOptions, or None: chunk_size "
            f"says how many rows of logits are held at a time"
        )
    sums = row_dtype(input.dtype)
    if options.acc_dtype not in (None, input.dtype, sums):
        raise ValueError(
            f"options.acc_dtype is {options.acc_dtype}, expected {sums}, in which {input.dtype} is summed, or None: "
            f"convert input and linear_weight first"
        )
    if options.acc_policy != "auto" or options.acc_dtype not in (None, sums):
        warn_once(
            "linear_cross_entropy sums in float32, float64 in float64, and has no use for an acc_policy or acc_dtype "
            "of its options"
        )
    method = options.chunking_method
    if method == "auto":
        return options.batch_chunk_size
    n_rows = input.shape[:-1].numel()
    if method is None:
        return options.batch_chunk_size or max(n_rows, 1)
    _, _, factor = method.partition(":")
    size = _rows_as_large_as(input, linear_weight, n_rows) // int(factor or 1)
    size = max(1, min(size, n_rows))
    if options.batch_chunk_size not in (None, size):
        raise ValueError(
            f"options.batch_chunk_size is {options.batch_chunk_size}, and chunking_method {method!r} makes it {size}, "
            f"expected one of them alone"
        )
    return size


def _rows_as_large_as(input: Tensor, linear_weight: Tensor, n_rows: int) -> int:
    """The power of two that has rows enough for logits of the size of all of `input`."""
    wanted, size = -(-n_rows // -(-linear_weight.shape[0] // max(input.shape[-1], 1))), 1
    while size < wanted:  # bit_length would not do for sizes that torch.compile has put symbols for
        size *= 2
    return size
