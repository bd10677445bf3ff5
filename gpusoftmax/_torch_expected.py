"""Expected positions, and the largest probabilities, of torch tensors that require grad.

With p the probabilities of a row, k_c the number (coordinate) of column c, and dE the gradient with respect to the
expected one E = sum(p k),

    dz_c = dE p_c (k_c - E) / T

The k largest probabilities are those of the columns that the kernel found, wherever the logits move a little: they are
the softmax of these columns alone, or a part of the softmax of all.
"""

from typing import Any

import torch
from torch import Tensor

import gpusoftmax
from gpusoftmax import _torch_ops as ops
from gpusoftmax import _torch_rows as rows
from gpusoftmax._torch_transform import Dims, Through, options_of, pulled_back, transformed
from gpusoftmax._torch_transformed import Call, Op, called


def soft_argmax(x: Tensor, dim: Dims, keepdims: bool, dtype: torch.dtype | None, through: Through) -> Tensor:
    (expected,) = called(Call(_SOFT_ARGMAX, dim, (dtype,)), x, through)
    return expected.unsqueeze(dim[0]) if keepdims and dim else expected


def spatial_softmax(features: Tensor, dtype: torch.dtype | None, through: Through) -> Tensor:
    return called(Call(_SPATIAL_SOFTMAX, (features.ndim - 2, features.ndim - 1), (dtype,)), features, through)[0]


def topk_softmax(logits: Tensor, k: int, dim: Dims, renormalize: bool, through: Through) -> tuple[Tensor, ...]:
    """(probs, indices)."""
    return called(Call(_TOPK_SOFTMAX, dim, (k, renormalize)), logits, through)


# ---------------------------------------------------------------- along a row


def _soft_argmax_value(call: Call, x: Tensor, through: Through) -> tuple[Tensor]:
    return (gpusoftmax.soft_argmax(x, _axis(call), dtype=call.options[0], **options_of(through)),)


def _soft_argmax_dx(
    call: Call, x: Tensor, through: Through, made: list[Tensor], upstream: tuple[Tensor], dtype: torch.dtype
) -> Tensor:
    out = ops.room_for(x, dtype)
    return gpusoftmax.soft_argmax_backward(x, *made, *upstream, _axis(call), out=out, **options_of(through))


def _soft_argmax_dz(call: Call, z: Tensor, left: float, upstream: tuple[Tensor], made: list[Tensor]) -> Tensor:
    dexpected = upstream[0].to(z.dtype).reshape(_per_row(z, call.dim))
    return dexpected * _deviation(*_probs_and_columns(z, call.dim, left), call.dim) / left


def _soft_argmax_composed(call: Call, x: Tensor, through: Through) -> tuple[Tensor]:
    z, left, _ = transformed(x, call.dim, through)
    probs, columns = _probs_and_columns(z, call.dim, left)
    return ((probs * columns).sum(dim=call.dim).to(call.options[0] or z.dtype),)


def _probs_and_columns(z: Tensor, dim: Dims, left: float) -> tuple[Tensor, Tensor]:
    sizes = [size if axis in dim else 1 for axis, size in enumerate(z.shape)]
    columns = torch.arange(torch.Size(sizes).numel(), dtype=z.dtype, device=z.device).reshape(sizes)
    return rows.softmax(z, dim, left, None), columns


def _deviation(probs: Tensor, position: Tensor, dim: Dims) -> Tensor:
    """p_c (k_c - E)."""
    return probs * (position - (probs * position).sum(dim=dim, keepdim=True))


def _axis(call: Call) -> int:
    return call.dim[0] if call.dim else -1


def _per_row(x: Tensor, dim: Dims) -> list[int]:
    return [1 if axis in dim else size for axis, size in enumerate(x.shape)]


# ---------------------------------------------------------------- in an image


def _of_maps(through: Through) -> dict[str, Any]:
    options = options_of(through)
    return {"temperature": options["temperature"], "mask": options["mask"]}


def _spatial_softmax_value(call: Call, x: Tensor, through: Through) -> tuple[Tensor]:
    return (gpusoftmax.spatial_softmax(x, dtype=call.options[0], **_of_maps(through)),)


def _spatial_softmax_dx(
    call: Call, x: Tensor, through: Through, made: list[Tensor], upstream: tuple[Tensor], dtype: torch.dtype
) -> Tensor:
    out = ops.room_for(x, dtype)
    return gpusoftmax.spatial_softmax_backward(x, *made, *upstream, out=out, **_of_maps(through))


def _spatial_softmax_dz(call: Call, z: Tensor, left: float, upstream: tuple[Tensor], made: list[Tensor]) -> Tensor:
    probs = rows.softmax(z, call.dim, left, None)
    along, across = (one[..., None, None] for one in upstream[0].to(z.dtype).unbind(-1))
    x, y = _coordinates(z)
    return (along * _deviation(probs, x, call.dim) + across * _deviation(probs, y, call.dim)) / left


def _spatial_softmax_composed(call: Call, x: Tensor, through: Through) -> tuple[Tensor]:
    z, left, _ = transformed(x, call.dim, through)
    probs = rows.softmax(z, call.dim, left, None)
    expected = [(probs * position).sum(dim=call.dim) for position in _coordinates(z)]
    return (torch.stack(expected, -1).to(call.options[0] or z.dtype),)


def _coordinates(z: Tensor) -> tuple[Tensor, Tensor]:
    """Of the pixels, along the lines and across them."""
    height, width = (
        torch.linspace(-1, 1, size, dtype=z.dtype, device=z.device) if size > 1 else z.new_zeros(1)
        for size in z.shape[-2:]
    )
    return width, height[:, None]


# ---------------------------------------------------------------- the largest


def _topk_softmax_value(call: Call, x: Tensor, through: Through) -> tuple[Tensor, Tensor]:
    k, renormalize = call.options
    return gpusoftmax.topk_softmax(x, k, axis=call.dim[0], renormalize=renormalize, **options_of(through))


def _topk_softmax_dx(
    call: Call, x: Tensor, through: Through, made: list[Tensor], upstream: tuple[Tensor, None], dtype: torch.dtype
) -> Tensor:
    (probs, indices), dprobs, (dim,) = made, upstream[0], call.dim
    columns, left = indices.clamp(0).movedim(-1, dim), through.temperature if through.is_mask else 1.0
    nothing = torch.zeros(x.shape, dtype=probs.dtype, device=x.device)
    if call.options[1]:
        dz = ops.softmax_backward(probs, dprobs, (probs.ndim - 1,), left, probs.dtype)
        dz = nothing.scatter(dim, columns, dz.movedim(-1, dim))
    else:
        every = gpusoftmax.softmax(x, dim, dtype=probs.dtype, **options_of(through))
        dz = ops.softmax_backward(
            every, nothing.scatter(dim, columns, dprobs.movedim(-1, dim)), (dim,), left, every.dtype
        )
    return pulled_back(dz, x, call.dim, through)


def _topk_softmax_dz(call: Call, z: Tensor, left: float, upstream: tuple[Tensor, None], made: list[Tensor]) -> Tensor:
    (dim,), dprobs = call.dim, upstream[0].to(z.dtype)
    columns = made[1].clamp(0).movedim(-1, dim)
    if call.options[1]:
        probs = rows.softmax(z.gather(dim, columns), (dim,), left, None)
        dz = rows.softmax_backward(probs, dprobs.movedim(-1, dim), (dim,), left, z.dtype)
        return torch.zeros_like(z).scatter(dim, columns, dz)
    dprobs = torch.zeros_like(z).scatter(dim, columns, dprobs.movedim(-1, dim))
    return rows.softmax_backward(rows.softmax(z, (dim,), left, None), dprobs, (dim,), left, z.dtype)


def _topk_softmax_composed(call: Call, x: Tensor, through: Through) -> tuple[Tensor, Tensor]:
    z, left, _ = transformed(x, call.dim, through)
    (dim,), (k, renormalize) = call.dim, call.options
    columns = z.sort(dim=dim, descending=True, stable=True).indices.narrow(dim, 0, k)
    if renormalize:
        probs = rows.softmax(z.gather(dim, columns), (dim,), left, None)
    else:
        probs = rows.softmax(z, (dim,), left, None).gather(dim, columns)
    return probs.movedim(dim, -1), torch.where(probs.isnan(), -1, columns).movedim(dim, -1)


_SOFT_ARGMAX = Op(_soft_argmax_value, _soft_argmax_composed, _soft_argmax_dx, _soft_argmax_dz, keeps=True)
_SPATIAL_SOFTMAX = Op(
    _spatial_softmax_value, _spatial_softmax_composed, _spatial_softmax_dx, _spatial_softmax_dz, keeps=True
)
_TOPK_SOFTMAX = Op(_topk_softmax_value, _topk_softmax_composed, _topk_softmax_dx, _topk_softmax_dz, keeps=True)
