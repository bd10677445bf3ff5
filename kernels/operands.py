"""What the public functions hand to the kernels: geometry, arrays and the place of execution."""

import functools
import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np

# dtype name -> the NumPy type whose scalars and pointers stand for it in kernel signatures, see conversion.py
STORAGE = {
    "float16": np.int16,
    "bfloat16": np.uint16,
    "float32": np.float32,
    "float64": np.float64,
}
MASKS = {"bool": np.uint8, "bits": np.uint32}
"""Of a mask: a byte for each column, or a bit for each, the lowest of a word first. Not 0: the logit is kept."""
LABELS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
TOO_LARGE = -(2**63)
"""What stands for an unsigned label of 2^63 or more: no class, and no ignore_index that anybody uses."""
ONE_VALUE = len(LABELS)
"""The code of Labels that are one integer, the same for all rows: instead of an address, it stands in `pointer`."""
NO_BAD_LABEL = 2**63 - 1
"""What find_bad_label reports when every label is a class or ignore_index."""
SMALL = 4096
"""Logits that one thread of a CPU turns into probabilities in less than 10 us."""

STATE_COLS = 2048
"""Columns of a chunk whose state can be kept: that of a row which comes in parts, see cpu/logsumexp_state.py."""
STATE_NUMBERS = 4
"""Numbers of such a state: max, sum, low, ties."""


class Rows(NamedTuple):
    """The rows of one call, numbered along the inner batch axis first: row = outer * n_inner + inner."""

    n_rows: int
    n_inner: int
    n_cols: int


class Operand(NamedTuple):
    """An array: element (outer, inner, col) lies at the pointer plus index times stride of each, in elements."""

    pointer: int
    outer_stride: int
    inner_stride: int
    col_stride: int
    dtype: str
    transform: "Transform | None" = None


class Transform(NamedTuple):
    """What logits go through where they are read, in this order. Whatever is None costs nothing: kernels are compiled
    without it.
    """

    scale: tuple | None  # 1 / temperature as `scale_of` has it,
    temperature: Operand | None  # or one for each row
    bias: Operand | None
    softcap: np.floating | None
    mask: Operand | None  # of a dtype of MASKS; with "bits", columns count words
    n_valid: "Labels | None"  # columns of each row, from the first on; the others are masked
    zero_rows: bool | None  # rows that are masked whole have no probability anywhere, instead of NaN


class Labels(NamedTuple):
    """An array of one integer per row. `code` tells its dtype, see `label_code`."""

    pointer: int
    outer_stride: int
    inner_stride: int
    code: int


class Numbers(NamedTuple):
    """Contiguous numbers: class weights, or a result that a later kernel reads. Pointer 0: there are none."""

    pointer: int
    dtype: str


class Shares(NamedTuple):
    """The target of rows that have several labels: count of them, label_stride elements apart, each with its share of
    the probability, share_stride apart.
    """

    shares: Operand
    count: int
    label_stride: int
    share_stride: int


class Probs(NamedTuple):
    """The target of rows that have a probability for each class."""

    probs: Operand


class Extras(NamedTuple):
    """What a loss has and tells beyond its options. Pointer 0: there is none, or it was not asked for."""

    row_weight: Operand  # a factor for each row, in the computation format
    z_loss: float
    z_losses: Operand
    lse: Operand
    correct: Labels  # int64: 1 where the label is the first of the largest logits, else 0


class Place(NamedTuple):
    """Where the arrays are and in which order work on them runs. device and stream mean nothing on the CPU."""

    target: str  # "cpu" or "cuda": the package under gpusoftmax.kernels
    device: int = 0
    stream: int = 0


NO_OPERAND = Operand(0, 0, 0, 0, "float32")
NO_LABELS = Labels(0, 0, 0, 0)


def one_value(value: int) -> Labels:
    """An integer, modulo 2^64, as Labels that every row has."""
    return Labels((value + 2**63) % 2**64 - 2**63, 0, 0, ONE_VALUE)


def has_address(argument) -> bool:
    """Whether the first field of a kernel's argument is the address of an array: it changes from call to call."""
    if isinstance(argument, Labels):
        return argument.code != ONE_VALUE
    return isinstance(argument, Operand | Numbers)


@functools.lru_cache(maxsize=256)
def noise_scales(temperature: float, dtype: str):
    """(unit, noise) with noise / unit = temperature, for the score x unit + g noise of a logit x with Gumbel noise g.

    The unit is a power of two that keeps noise near 1: no score overflows. Temperature 0: no noise. Far beyond the
    largest logit of the format, temperatures are all the same.
    """
    limits = np.finfo(dtype)
    least = float(limits.smallest_normal)
    unit = max(2.0 ** -max(0, math.ceil(math.log2(temperature or 1))), least)
    return limits.dtype.type(unit), limits.dtype.type(min(temperature, 2.0**100 / least) * unit)


class Limits(NamedTuple):
    """Which logits of a row are kept, in this order: the top_k largest (0: all); of these the largest that have the
    part top_p of the probability; those whose probability is min_p times the largest one's, or more. Where rows have
    their own, Labels or Operands of them.
    """

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


NO_LIMITS = Limits()


def own_numbers(temperature, limits: Limits, dtype: str) -> tuple:
    """What a kernel takes where rows have numbers of their own, as arrays: temperature, top_k, top_p and min_p, each as
    an array, of which none is told by pointer 0, and the number of all rows.
    """
    top_k = limits.top_k if isinstance(limits.top_k, Labels) else one_value(limits.top_k)
    return (
        *_array_and_number(temperature, dtype),
        top_k,
        *(part for one in (limits.top_p, limits.min_p) for part in _array_and_number(one, dtype)),
    )


def _array_and_number(given, dtype: str) -> tuple:
    number = np.dtype(dtype).type
    if isinstance(given, Operand):
        return given, number(0)
    return Operand(0, 0, 0, 0, dtype), number(min(given, float(np.finfo(dtype).max)))


def have_own_numbers(temperature, limits: Limits) -> bool:
    """Whether any of them is an array of one for each row."""
    return any(isinstance(one, Operand | Labels) for one in (temperature, *limits))


def limits_in(limits: Limits, temperature: float, dtype: str):
    """(top_k, top_p, from_max) for a kernel: logits are kept from the maximum plus from_max on."""
    number = np.dtype(dtype).type
    from_max = temperature * math.log(limits.min_p) if limits.min_p else -math.inf
    if from_max < float(np.finfo(dtype).min):
        from_max = -math.inf
    return limits.top_k, number(limits.top_p), number(from_max)


def label_code(dtype: str) -> int:
    """The number by which `load_label` knows an integer dtype: 2 log2(itemsize) + is_unsigned."""
    return LABELS.index(dtype)


def compute_dtype(*dtypes: str) -> str:
    """The format to compute in: float64 if any of the arrays is float64, float32 otherwise."""
    return "float64" if "float64" in dtypes else "float32"


@functools.lru_cache(maxsize=256)
def scale_of(numerator: float, temperature: float, dtype: str):
    """numerator / temperature as (high, low) numbers of the computation format: to about twice its precision.

    Neither 0 nor infinite: the product with a masked logit must stay -inf, that with a gap of 0 must stay 0.
    """
    limits = np.finfo(dtype)
    exact = Fraction(numerator) / Fraction(temperature)
    nearest = float(limits.max) if exact > Fraction(float(limits.max)) else float(exact)
    high = max(limits.dtype.type(nearest), limits.smallest_subnormal)
    return high, limits.dtype.type(0 if high == limits.max else float(exact - Fraction(float(high))))


def unless_one(scale: tuple) -> tuple:
    """A scale whose low part is None if it is exactly 1: kernels are then compiled without the multiplications."""
    return (scale[0], None) if scale[0] == 1 and scale[1] == 0 else scale
