"""Where a step of an op is at work: a row, neighbouring rows across, or a block of rows, see walk.py."""

import inspect
from collections.abc import Callable
from typing import NamedTuple

from numba import types
from numba.extending import overload

from gpusoftmax.kernels.cpu.arithmetic import (
    mul,
    pulled_through_mask,
    pulled_through_softcap,
    zero_where_empty,
)
from gpusoftmax.kernels.cpu.cache import HELPER_OPTIONS, device
from gpusoftmax.kernels.cpu.memory import (
    advance,
    load,
    load_cols,
)
from gpusoftmax.kernels.cpu.vector import (
    lanes_of,
    number,
    square_of,
)


class Line(NamedTuple):
    """A row, or neighbouring rows: column c of row i lies at pointer[c * step + i * row_step]."""

    pointer: object
    step: int
    row_step: int


class Ahead(NamedTuple):
    """What to fetch at each column, for whoever has time to: Lines of what will be read or written later on."""

    first: object
    second: object
    target: object


class Through(NamedTuple):
    """What is left to know of the transform of a row once its logits have gone through it."""

    transform: object  # None: there is none
    inverse: object  # of the temperature, where there is one


class Here(NamedTuple):
    """The row, or the n_rows neighbouring rows from `row` on, at which a step is working."""

    row: int
    n_rows: int
    n_cols: int
    states: object  # pointer to the states of the chunks
    partials: object  # memory for what becomes of the columns of several rows, None along a row, see chunks.sum_chunk
    stage: object  # and, only in blocks, for the numbers of each row that its columns are combined with
    zeros: object  # a vector of columns, or of rows across them: 0 in every lane,
    nothing: object  # and one of -inf: logits that are not there
    zero: object  # 0 as a number of the row: a number along a row, else a vector of rows
    first: object  # Line of the array that is read,
    second: object  # of another array beside it,
    target: object  # of the result,
    home: object  # and of where exponentials stay until they are written
    ahead: Ahead
    streamed: bool  # the result is written past the caches,
    is_cached: bool  # or there is one, and it is not
    through: Through  # logits are transformed along rows alone


@device
def index_in(line, k, col):
    """Where a column of row number k of neighbouring rows lies."""
    return col * line.step + k * line.row_step


@device
def line_in(line, k):
    """Row number k of neighbouring rows."""
    return Line(advance(line.pointer, k * line.row_step), line.step, line.row_step)


@device
def line_from(line, col):
    """The line from a column on."""
    return Line(advance(line.pointer, col), line.step, line.row_step)


@device
def row_in(here, k):
    """Row number k of a block, as along rows. Its states are those of the block."""
    first, second = line_in(here.first, k), line_in(here.second, k)
    target, home = line_in(here.target, k), line_in(here.home, k)
    ahead = Ahead(line_in(here.ahead.first, k), line_in(here.ahead.second, k), line_in(here.ahead.target, k))
    return Here(
        here.row + k, 1, here.n_cols, here.states, None, None, here.zeros, here.nothing, number(here.zero, 0.0),
        first, second, target, home, ahead, here.streamed, here.is_cached, here.through,
    )  # fmt: skip


@device
def register_in(here, which, k):
    """The register of row number k in a block, of those that are left of its columns, see vector.save_sum."""
    return advance(here.partials, (which * lanes_of(here.zero) + k) * square_of(here.zero))


@device
def pulled_back(gradient, x, through):
    """The gradient with respect to logits, from that with respect to the transformed ones, x."""
    return pulled_back_by(gradient, x, through.transform, through.inverse)


@device
def pulled_back_by(gradient, x, transform, inverse):
    if transform is None:
        return gradient
    pulled = pulled_through_cap(gradient, x, transform.softcap)
    pulled = times_inverse(times_inverse(pulled, transform.temperature, inverse), transform.scale, inverse)
    if transform.mask is None and transform.n_valid is None:
        return pulled  # a logit that is -inf by itself has the slope of any other: that of a label is p - 1
    return pulled_through_mask(pulled, gradient, x)


@device
def pulled_through_cap(gradient, x, cap):
    if cap is None:
        return gradient
    return pulled_through_softcap(gradient, x, number(x, 1.0 / cap))


@device
def times_inverse(gradient, scale, inverse):
    if scale is None:
        return gradient
    return mul(gradient, inverse)


@device
def pulled_back_cols(gradient, col, left, here):
    """pulled_back for the vector at a column."""
    return pulled_back_cols_by(gradient, col, left, here, here.through.transform)


@device
def pulled_back_cols_by(gradient, col, left, here, transform):
    if transform is None:
        return gradient
    return pulled_back(gradient, load_cols(here.first, col, left, here.nothing), here.through)


@device
def pulled_back_one(gradient, col, k, here):
    """pulled_back for one column of row number k."""
    return pulled_back_one_by(gradient, col, k, here, here.through.transform)


@device
def pulled_back_one_by(gradient, col, k, here, transform):
    if transform is None:
        return gradient
    return pulled_back(gradient, load(here.first.pointer, index_in(here.first, k, col), gradient), here.through)


@device
def unless_empty(value, row_max, rest, through):
    """The value; 0 in a row that is masked whole, if that is what its transform wants. Without a maximum, `rest` is 0
    or, in a row that holds a NaN, NaN.
    """
    return unless_empty_by(value, row_max, rest, through.transform)


@device
def unless_empty_by(value, row_max, rest, transform):
    if transform is None:
        return value
    return unless_empty_row(value, row_max, rest, transform.zero_rows)


@device
def unless_empty_row(value, row_max, rest, zero_rows):
    if zero_rows is None:
        return value
    return zero_where_empty(value, row_max, rest)


def where_given(name: str, given: Callable, absent: Callable) -> Callable:
    """One helper out of two that take the same: `absent` where the argument of this name is None."""
    return _by_type_of(name, lambda type: absent if isinstance(type, types.NoneType) else given, given)


def by_way(along: Callable, across: Callable, in_blocks: Callable) -> Callable:
    """One helper out of three that take the same: the one for the way that is walked where `here` is, see walk.py."""

    def of(type):
        here = dict(zip(Here._fields, type, strict=True))
        if isinstance(here["partials"], types.NoneType):
            return along
        return across if isinstance(here["stage"], types.NoneType) else in_blocks

    return _by_type_of("here", of, along)


def _by_type_of(name: str, helper_of: Callable, example: Callable) -> Callable:
    """The helper that the type of the argument of this name chooses; all take what `example` takes."""
    signature = inspect.signature(example)
    position = list(signature.parameters).index(name)

    def choose(*arguments):
        return helper_of(arguments[position])

    def chosen(*arguments):
        raise NotImplementedError("called from kernels only")

    choose.__signature__ = chosen.__signature__ = signature
    overload(chosen, jit_options=HELPER_OPTIONS)(choose)
    return chosen
