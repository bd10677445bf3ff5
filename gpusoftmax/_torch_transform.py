"""What logits go through before an operation, in operations of torch, which differentiates these as often as asked.

    u = x / T + bias        z = softcap tanh(u / softcap), -inf where it is masked

A gradient with respect to z comes back by

    dx = dz (1 - tanh(u / softcap)^2) / T, 0 where it is masked        dbias = sum(T dx)        dT = -sum(x dx) / T

The kernels do the same where they read; here it is for what they have no kernel for. Where the logits are only masked,
a temperature for all rows is left for the operation, which subtracts the maximum first: z is x with -inf.

Beside a mask or n_valid, a z that is -inf by itself counts as masked, as in kernels, which see of a logit what has
become of it. Where there is none it has the slope of any other: at a label with the logit -inf p - 1, as torch has it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpusoftmax import _checks

Dims = tuple[int, ...]


class Through(NamedTuple):
    """The transform of a call. `temperature` is 1 where rows have their own."""

    temperature: float
    softcap: float | None = None
    n_valid: int | None = None
    empty_row: str = "nan"
    temperatures: Tensor | None = None
    bias: Tensor | None = None
    mask: Tensor | None = None
    valid_of_rows: Tensor | None = None

    def moved(self, source: int, destination: int, ndim: int) -> "Through":
        """As it is where an axis of the logits is moved. What is given per row has no such axis, and stays."""
        bias, mask = (
            one.movedim(source, destination) if one is not None and one.ndim == ndim > 1 else one
            for one in (self.bias, self.mask)
        )
        return self._replace(bias=bias, mask=mask)

    @property
    def is_mask(self) -> bool:
        """Whether logits are only masked and divided by one temperature."""
        return self.temperatures is None and self.bias is None and self.softcap is None


def through(
    x: Tensor, dim: Dims, temperature: Any, bias: Any, softcap: Any, mask: Any, n_valid: Any, empty_row: Any = "nan"
) -> float | Through:
    """The transform that the arguments of an operation stand for; where it is one temperature and no more, that.

    A temperature or n_valid that is a tensor stays one: without axes it is stretched over the rows, so that nobody has
    to wait for its value, and a temperature can have a gradient.
    """
    if type(temperature) is float and bias is softcap is mask is n_valid is None and empty_row == "nan":
        return _checks.temperature(temperature)
    _checks.one_of(empty_row, ("nan", "zero"), "empty_row")
    for name, given in (("bias", bias), ("mask", mask)):
        if given is not None and not isinstance(given, Tensor):
            raise TypeError(f"{name} is a {type(given).__name__}, expected a torch tensor as the logits are")
    batch = [size for axis, size in enumerate(x.shape) if axis not in dim]
    temperatures = valid_of_rows = None
    if isinstance(temperature, Tensor):
        temperature, temperatures = 1.0, temperature if temperature.ndim else temperature.expand(batch)
    if isinstance(n_valid, Tensor):
        n_valid, valid_of_rows = None, n_valid if n_valid.ndim else n_valid.expand(batch)
    numbers = _checks.temperature(temperature), _checks.softcap(softcap), n_valid, empty_row
    found = Through(*numbers, temperatures, bias, mask, valid_of_rows)
    nothing = found.is_mask and mask is n_valid is valid_of_rows is None and empty_row == "nan"
    return found.temperature if nothing else found


def options_of(given: Through) -> dict[str, Any]:
    """The arguments of the core's functions."""
    return {
        "temperature": given.temperature if given.temperatures is None else given.temperatures,
        "bias": given.bias,
        "softcap": given.softcap,
        "mask": given.mask,
        "n_valid": given.n_valid if given.valid_of_rows is None else given.valid_of_rows,
    }


def transformed(
    x: Tensor, dim: Dims, given: Through, takes_temperature: bool = True
) -> tuple[Tensor, float, Tensor | None]:
    """(z, the temperature that is left, which rows are to be 0 because nothing is left of them).

    z is float32 at least. Rows that are to be 0 are made rows of 0, whose softmax is no NaN: what comes of them has to
    be replaced.
    """
    kept = _kept(x, dim, given)
    if takes_temperature and given.is_mask:
        z, left = _wide(x if kept is None else torch.where(kept, x, 0)), given.temperature
    else:
        z, left = _before_cap(x, dim, given, kept), 1.0
    if given.softcap is not None:
        z = given.softcap * (z / given.softcap).tanh()
    if kept is not None:
        z = torch.where(kept & (z != -torch.inf), z, -torch.inf)
    if given.empty_row == "nan":
        return z, left, None
    empty = (z == -torch.inf).all(dim=dim, keepdim=True) if z.ndim else z == -torch.inf
    return z.masked_fill(empty, 0), left, empty


def pulled_back(dz: Tensor, x: Tensor, dim: Dims, given: Through, takes_temperature: bool = True) -> Tensor:
    """The gradient with respect to x, from that with respect to the z of `transformed`. In float32 at least."""
    kept = _kept(x, dim, given)
    dx = _wide(dz)
    if given.softcap is not None:
        u = _before_cap(x, dim, given, kept)
        t = (u / given.softcap).tanh_()  # in place: large arrays less
        dx = torch.addcmul(dx, dx * t, t, value=-1)
    elif kept is not None:
        kept = kept & ((x if given.is_mask else _before_cap(x, dim, given, kept)) != -torch.inf)
    if given.temperatures is not None:
        dx = dx / per_row(given.temperatures, x, dim)
    elif not (takes_temperature and given.is_mask) and given.temperature != 1:
        dx = dx / given.temperature
    # A NaN stays, as it does in kernels: all the row has it.
    return dx if kept is None else torch.where(kept | dx.isnan(), dx, 0)


def of_temperature_and_bias(
    dx: Tensor, x: Tensor, dim: Dims, given: Through, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients with respect to the temperatures of rows and to the bias, from that with respect to x."""
    of_temperature = of_bias = None
    temperature = given.temperature if given.temperatures is None else per_row(given.temperatures, x, dim)
    if wanted[0]:
        there = torch.where(x.isfinite(), x, 0)  # what is not has no weight in it
        total = -(dx * there / temperature).sum(dim=dim)
        of_temperature = total.reshape(given.temperatures.shape).to(given.temperatures.dtype)
    if wanted[1]:
        stretched = stretched_over(given.bias, x, dim)
        total = (dx * temperature).sum_to_size(stretched.shape)
        of_bias = total.reshape(given.bias.shape).to(given.bias.dtype)
    return of_temperature, of_bias


def per_row(numbers: Tensor, x: Tensor, dim: Dims) -> Tensor:
    """One number for each row, to be combined with its columns."""
    return _wide(numbers).reshape([1 if axis in dim else size for axis, size in enumerate(x.shape)])


def stretched_over(beside: Tensor, x: Tensor, dim: Dims) -> Tensor:
    """A bias or mask in as many axes as x, where it may have just those of the columns."""
    if beside.ndim == len(dim):
        sizes = dict(zip(dim, beside.shape, strict=True))
        return beside.reshape([sizes.get(axis, 1) for axis in range(x.ndim)])
    return beside


def _before_cap(x: Tensor, dim: Dims, given: Through, kept: Tensor | None) -> Tensor:
    """u, which is finite where it is masked, whatever the logit and the bias are there: its derivatives are no NaN."""
    u = _wide(x if kept is None else torch.where(kept, x, 0))
    if given.temperatures is not None:
        u = u / per_row(given.temperatures, x, dim)
    elif given.temperature != 1:
        u = u / given.temperature
    if given.bias is None:
        return u
    u = u + _wide(stretched_over(given.bias, x, dim))
    return u if kept is None else torch.where(kept, u, 0)


def _kept(x: Tensor, dim: Dims, given: Through) -> Tensor | None:
    """Which logits are not masked, to be stretched over x; None: all."""
    mask = given.mask if given.mask is None else stretched_over(given.mask, x, dim)
    counted = given.n_valid is not None or given.valid_of_rows is not None
    if mask is None and not counted:
        return None
    sizes = [size if axis in dim else 1 for axis, size in enumerate(x.shape)]
    columns = torch.arange(torch.Size(sizes).numel(), device=x.device)
    if mask is not None and mask.dtype != torch.bool:
        words = mask.view(torch.int32).index_select(dim[0], (columns >> 5).clamp(max=mask.shape[dim[0]] - 1))
        mask = (words >> (columns & 31).to(words.dtype).reshape(sizes)) & 1 != 0
    if not counted:
        return mask
    n_valid = given.n_valid
    if given.valid_of_rows is not None:
        shape = [1 if axis in dim else size for axis, size in enumerate(x.shape)]
        n_valid = given.valid_of_rows.to(torch.int64).reshape(shape)
    counts = columns.reshape(sizes) < n_valid
    return counts if mask is None else mask & counts


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
