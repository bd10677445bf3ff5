"""Every argument check and every error message. Each names the argument, what came, what was expected, and the fix."""

import functools
import math
import operator

import numpy as np

from gpusoftmax.kernels.operands import TOO_LARGE

FLOATING = ("float16", "bfloat16", "float32", "float64")
INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
MAX_COLS = 2**31 - 1
MAX_WIDTH = 2**22
"""Of images: places and half places along a line are counted in float32 (kernels.positions.line_and_place)."""


def axes(axis, ndim: int) -> tuple[int, ...]:
    """The reduced axes in ascending order; None means all of them, as in SciPy."""
    if type(axis) is int and -ndim <= axis < ndim:
        return (axis % ndim,)
    if axis is None:
        return tuple(range(ndim))
    if ndim == 0 and axis in (-1, 0):
        return ()
    try:
        given = (
            tuple(operator.index(one) for one in axis) if isinstance(axis, tuple | list) else (operator.index(axis),)
        )
    except TypeError:
        raise TypeError(f"axis is {_short(axis)}, expected an int, a tuple of ints or None") from None
    if not given:
        raise ValueError("axis is (), expected at least one axis: softmax over no axis has no meaning; None means all")
    for one in given:
        if not -ndim <= one < ndim:
            raise np.exceptions.AxisError(one, ndim)
    found = tuple(sorted(one % ndim for one in given))
    if len(set(found)) != len(found):
        raise ValueError(f"axis is {_short(axis)}, expected each axis once")
    return found


def axis_or_all(axis, ndim: int) -> tuple[int, ...]:
    """One axis, or with None all of them."""
    if isinstance(axis, tuple | list):
        raise TypeError(f"axis is {_short(axis)}, expected one int, or None for the flattened array")
    return axes(axis, ndim)


def one_axis(axis, ndim: int) -> tuple[int, ...]:
    if axis is None or isinstance(axis, tuple | list):
        raise TypeError(f"axis is {_short(axis)}, expected one int")
    return axes(axis, ndim)


def image_width(shape: tuple[int, ...], name: str) -> int:
    """The size of the last axis, for images along the last two."""
    if len(shape) < 2:
        raise ValueError(f"{name} has shape {shape}, expected (..., height, width)")
    if 0 in shape[-2:]:
        raise ValueError(f"{name} has shape {shape}, expected at least one pixel: a height and a width above 0")
    if shape[-1] > MAX_WIDTH:
        raise ValueError(f"{name} has a width of {shape[-1]}, expected at most {MAX_WIDTH} (2^22)")
    return shape[-1]


def some_columns(shape: tuple[int, ...], axes: tuple[int, ...], name: str) -> None:
    if any(shape[axis] == 0 for axis in axes):
        raise ValueError(f"{name} has shape {shape}, expected at least one element in each row")


def temperature(value) -> float:
    if type(value) is float and 0.0 < value < math.inf:
        return value
    if isinstance(value, list | tuple):
        raise TypeError(
            f"temperature is {_short(value)}, expected one number, or, where rows may have their own, an array of these"
        )
    is_array = type(value) is not int and getattr(value, "ndim", 0)
    if is_array or isinstance(value, bool | str | bytes):
        raise TypeError(f"temperature is {_short(value)}, expected one number")
    number = scalar(value, "temperature")
    if not (0 < number < math.inf):
        raise ValueError(f"temperature is {number}, expected a finite number above 0")
    return number


def temperature_fits(temperature: float, dtype: str) -> None:
    """The kernels multiply by 2 / temperature, which must be finite in the format they compute in."""
    lowest = _lowest_temperature(dtype)
    if temperature < lowest:
        raise ValueError(f"temperature is {temperature}, expected at least {lowest:.3g} for arithmetic in {dtype}")


@functools.cache
def _lowest_temperature(dtype: str) -> float:
    return 2.0 / float(np.finfo(dtype).max)


def one_stride(axes: tuple[int, ...], transform) -> None:
    """Rows that no single stride walks are copied, which is not done for what is read beside them."""
    if transform is not None:
        raise ValueError(
            f"axis is {axes}, which no single stride walks; with a transform of the logits (bias, mask, n_valid, "
            f"temperature 0, ...), expected one axis, or axes that lie together: reshape or copy the logits first"
        )


def softcap(value) -> float | None:
    if value is None:
        return None
    number = scalar(value, "softcap")
    if not 0 < number < math.inf:
        raise ValueError(f"softcap is {number}, expected a finite number above 0; None leaves it out")
    return number


def divisor_fits(divisor: float, name: str, dtype: str) -> None:
    """The kernels divide by it, in the format they compute in."""
    largest = _LARGEST[dtype]
    if not 1 / largest <= divisor <= largest:
        raise ValueError(f"{name} is {divisor}, expected {1 / largest:.3g} to {largest:.3g} for arithmetic in {dtype}")


def factor_fits(factor: float, name: str, dtype: str) -> None:
    """The kernels multiply by it, in the format they compute in; by NaN, too."""
    largest = _LARGEST[dtype]
    if abs(factor) > largest:
        raise ValueError(f"{name} is {factor}, expected {-largest:.3g} to {largest:.3g} for arithmetic in {dtype}")


def scale_fits(grad_scale: float, divisor: float, is_given: bool, dtype: str) -> None:
    """The kernels multiply by the quotient. is_given: whether the divisor is a normalizer."""
    factor_fits(grad_scale / divisor, "grad_scale / normalizer" if is_given else "grad_scale", dtype)


_LARGEST = {dtype: float(np.finfo(dtype).max) for dtype in ("float32", "float64")}


def valid_count(value, n_cols: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"n_valid is {_short(value)}, expected an int or an array of ints, one for each row") from None
    if not 0 <= number <= n_cols:
        raise ValueError(f"n_valid is {number}, expected 0 to {n_cols}, the number of columns")
    return number


def stretched(array, x, axes: tuple[int, ...], n_cols: int, name: str) -> tuple[int, ...]:
    """The strides that walk an array of one element for each column beside x. It has the shape of x, with a size of 1
    wherever it is the same for all, or just that of the columns.

    n_cols: elements for the columns of one axis, which may be words.
    """
    sizes = {axis: n_cols if len(axes) == 1 else x.shape[axis] for axis in axes}
    expected = tuple(sizes.get(axis, size) for axis, size in enumerate(x.shape))
    columns = tuple(sizes.values())
    if array.shape == columns:
        strides = dict(zip(axes, array.strides, strict=True))
        return tuple(strides.get(axis, 0) for axis in range(x.ndim))
    if array.ndim != x.ndim or any(size not in (1, full) for size, full in zip(array.shape, expected, strict=True)):
        raise ValueError(
            f"{name} has shape {array.shape}, expected {columns}, one for each column, or {expected}, where sizes "
            f"of 1 stand for all"
        )
    return tuple(0 if size == 1 else stride for size, stride in zip(array.shape, array.strides, strict=True))


def mask_dtype(array, axes: tuple[int, ...]) -> None:
    if array.dtype == "bool" or (array.dtype in ("int32", "uint32") and len(axes) == 1):
        return
    raise TypeError(
        f"mask has dtype {array.dtype}, expected bool, or int32 with a bit for each column along one axis; True, or 1, "
        f"keeps a logit"
    )


def is_zero(value) -> bool:
    """Whether a temperature is the 0 that stands for the largest logit."""
    return not isinstance(value, bool | str | bytes) and not getattr(value, "ndim", 0) and value == 0


def temperature_or_zero(value, dtype: str) -> float:
    """A temperature at which may be sampled: 0 takes the largest logit."""
    if is_zero(value):
        return 0.0
    number = temperature(value)
    temperature_fits(number, dtype)
    return number


def scalar(value, name: str) -> float:
    if type(value) is float:
        return value
    if type(value) is not int:  # nothing else can be asked of one that torch.compile has put in its place
        # float() of a complex number of NumPy drops a part of it, and torch has an error of its own.
        is_complex = getattr(getattr(value, "dtype", None), "kind", None) == "c"
        if is_complex or isinstance(value, bool | str | bytes):
            raise TypeError(f"{name} is {_short(value)}, expected a number")
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise TypeError(f"{name} is {_short(value)}, expected a number") from None


def grad_scale(value) -> float:
    """0.0 for -0.0: they are equal, and so are options of one call to _recipe.py."""
    return scalar(value, "grad_scale") + 0.0


def no_array(value, name: str, error: ValueError) -> ValueError:
    return ValueError(f"{name} is {_short(value)}, expected an array, or nested lists of equal lengths: {error}")


def no_dlpack(value, name: str, error: Exception) -> TypeError:
    return TypeError(
        f"{name} is a {type(value).__name__}, expected what NumPy can import by DLPack ({error}): convert it to a "
        f"NumPy array first"
    )


def dtype_name(dtype) -> str:
    """The name of a floating dtype given as a NumPy, CuPy, ml_dtypes, JAX or torch dtype, or as a string."""
    name = _name_of(dtype)
    if name not in FLOATING:
        raise TypeError(f"dtype is {_short(dtype)}, expected one of {', '.join(FLOATING)}")
    return name


def any_dtype(value, name: str) -> str:
    """The name of a dtype, of whatever library, that stands for an array."""
    found = _name_of(value)
    if found not in (*FLOATING, *INTEGERS, "bool"):
        raise TypeError(
            f"{name} is {_short(value)}, expected what the call is given: a number, an array, or for an array its "
            f"dtype, such as 'float32' (of a mask 'bool', or 'int32' for bits)"
        )
    return found


def _name_of(dtype) -> str:
    try:
        return np.dtype(dtype).name
    except TypeError:  # "bfloat16" and torch's
        return str(dtype).removeprefix("torch.")


def floating(dtype: str, name: str) -> None:
    if dtype not in FLOATING:
        raise TypeError(f"{name} has dtype {dtype}, expected one of {', '.join(FLOATING)}; convert it first")


def integer(dtype: str, name: str, meaning: str = "class indices, not probabilities") -> None:
    if dtype not in INTEGERS:
        raise TypeError(f"{name} has dtype {dtype}, expected an integer dtype: {meaning}")


def indices(dtype: str, name: str) -> None:
    if dtype != "int64":
        raise TypeError(f"{name} has dtype {dtype}, expected int64: indices")


def same_dtype(one, two, one_name: str, two_name: str) -> None:
    if one.dtype != two.dtype:
        raise TypeError(f"{two_name} has dtype {two.dtype}, expected {one.dtype} to match {one_name}")


def same_shape(array, shape: tuple[int, ...], name: str, reason: str) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}, expected {shape} {reason}")


def targets(array, batch_shape: tuple[int, ...], reason: str) -> None:
    """One target for each row, or several along a last axis."""
    if array.shape != batch_shape and array.shape[:-1] != batch_shape:
        raise ValueError(f"target has shape {array.shape}, expected {batch_shape} or {(*batch_shape, 'K')} {reason}")


def same_home(one, two, one_name: str, two_name: str) -> None:
    """One array library and one device for all arguments of a call: nothing is copied behind the caller's back."""
    if one.kind != two.kind or one.place[:2] != two.place[:2]:
        raise TypeError(
            f"{one_name} is {one.home} and {two_name} is {two.home}; expected both from one library on one device: "
            f"move one of them first"
        )
    streams = {one.place.stream, two.place.stream} - {0}  # 0: it named none
    if one.kind == "device" and len(streams) > 1:
        raise ValueError(
            f"{one_name} is on stream {one.place.stream} and {two_name} on stream {two.place.stream}, expected one "
            f"stream: nothing orders the work on them"
        )


def column_count(n_cols: int) -> None:
    if n_cols > MAX_COLS:
        raise ValueError(f"the reduced axis has {n_cols} elements, expected at most {MAX_COLS} (2^31 - 1)")


def output(out, dtype: str | None, made: str) -> None:
    """What can be said of `out` on its own. `made`: the dtype of a new one; int64 for indices, which have no other."""
    if dtype is not None and dtype != out.dtype:
        raise TypeError(f"dtype is {dtype} but out has dtype {out.dtype}; give only one of them: out decides the dtype")
    if made == "int64":
        indices(out.dtype, "out")
    else:
        floating(out.dtype, "out")
    if not out.writable:
        raise ValueError("out is read-only, expected a writable array")
    if _overlaps_itself(out.shape, out.strides):
        raise ValueError(f"out has shape {out.shape} and strides {out.strides} (in elements): its elements overlap")


@functools.lru_cache(maxsize=4096)
def _overlaps_itself(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    if math.prod(shape) == 0:
        return False
    reached = 0
    for stride, size in sorted((abs(stride), size) for stride, size in zip(strides, shape, strict=True) if size > 1):
        if stride <= reached:
            return True
        reached += stride * (size - 1)
    return False


def no_partial_overlap(out, array, name: str) -> None:
    """out may be exactly `array` (the call works in place) or share no byte with it."""
    if _spans_meet(out, array) and _walk(out) != _walk(array) and _share_memory(out, array):
        raise ValueError(f"out overlaps {name} in part; expected {name} itself (in place) or memory of its own")


def _walk(array) -> tuple:
    """Which elements an array visits, in which order. The stride of an axis with one element is never taken."""
    steps = [stride for stride, size in zip(array.strides, array.shape, strict=True) if size > 1]
    return array.pointer, array.dtype, array.shape, steps


def no_overlap(out, array, name: str) -> None:
    """out may share no byte with `array`, not even all of them."""
    if _spans_meet(out, array) and _share_memory(out, array):
        raise ValueError(f"out shares memory with {name}, which is read while out is written")


def _share_memory(one, two) -> bool:
    """Whether any byte belongs to both: spans meet, too, where the elements of one lie between those of the other."""
    try:
        return np.shares_memory(one.address_map(), two.address_map(), max_work=100_000)
    except np.exceptions.TooHardError:
        return True


def _spans_meet(one, two) -> bool:
    (one_start, one_stop), (two_start, two_stop) = one.span, two.span
    return one.place[:2] == two.place[:2] and one_start < two_stop and two_start < one_stop


def token_count(value, n_cols: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"k is {_short(value)}, expected an int") from None
    if not 1 <= number <= n_cols:
        raise ValueError(f"k is {number}, expected 1 to {n_cols}, the number of columns")
    return number


def any_gradient(dlogprob, dentropy) -> None:
    if dlogprob is None and dentropy is None:
        raise ValueError("dlogprob and dentropy are None, expected at least one of the gradients")


def reduction(value) -> str:
    if not isinstance(value, str) or value not in ("none", "mean", "sum"):
        raise ValueError(f"reduction is {_short(value)}, expected 'none', 'mean' or 'sum'")
    return value


def normalizer(value) -> float | None:
    """A number; an array is looked at by nobody."""
    if value is None:
        return None
    number = scalar(value, "normalizer")
    if not 0.0 < number < math.inf:
        raise ValueError(f"normalizer is {number}, expected a finite number above 0, or an array of one element")
    return number


def only_for(is_given: bool, name: str, is_fit: bool, reduction: str) -> None:
    if is_given and not is_fit:
        raise ValueError(f"{name} is given and reduction is {reduction!r}, expected 'mean', which divides by it")


def one_element(array, name: str) -> None:
    if math.prod(array.shape) != 1:
        raise ValueError(f"{name} has shape {tuple(array.shape)}, expected one element")


def z_loss(value) -> float:
    number = scalar(value, "z_loss")
    if not 0.0 <= number < math.inf:
        raise ValueError(f"z_loss is {number}, expected a finite number, 0 or above")
    return number


def counts_labels(is_wanted: bool, has_labels: bool) -> None:
    if is_wanted and not has_labels:
        raise ValueError("return_correct is given, and target has shares, expected one class index for each row")


def shares(labels, shares, batch_shape: tuple[int, ...], reason: str) -> None:
    """Several labels for each row, and as many shares."""
    if labels.ndim != len(batch_shape) + 1 or labels.shape[:-1] != batch_shape:
        raise ValueError(f"target[0] has shape {labels.shape}, expected {(*batch_shape, 'K')} {reason}")
    same_shape(shares, labels.shape, "target[1]", "one share for each index of target[0]")
    if not labels.shape[-1]:
        raise ValueError(f"target[0] has shape {labels.shape}, expected one label or more for each row")


def label_smoothing(value) -> float:
    number = scalar(value, "label_smoothing")
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"label_smoothing is {number}, expected a number from 0 to 1")
    return number


def ignore_index(value) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"ignore_index is {_short(value)}, expected an int") from None
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"ignore_index is {number}, expected a 64-bit integer")
    return number


def class_axis(axis, ndim: int) -> tuple[int]:
    """The one axis along which the classes lie."""
    if axis is None or isinstance(axis, tuple | list):
        raise TypeError(f"axis is {_short(axis)}, expected one int: the class axis")
    if ndim == 0:
        raise ValueError("logits has no axis, expected at least the class axis")
    return axes(axis, ndim)


def class_count(n_cols: int, name: str = "logits") -> None:
    if n_cols == 0:
        raise ValueError(f"{name} has 0 classes, expected at least 1")


def layer(input_shape: tuple[int, ...], weight_shape: tuple[int, ...]) -> None:
    """Rows of features, and for each class as many weights."""
    if not input_shape:
        raise ValueError("input has shape (), expected (..., n_features)")
    if len(weight_shape) != 2 or weight_shape[1] != input_shape[-1]:
        raise ValueError(
            f"linear_weight has shape {weight_shape}, expected (n_classes, {input_shape[-1]}) to match input "
            f"{input_shape}"
        )


def chunk_size(value) -> int | None:
    if value is None:
        return None
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"chunk_size is {_short(value)}, expected an int or None") from None
    if number < 1:
        raise ValueError(f"chunk_size is {number}, expected at least 1; None chooses it")
    return number


def multiplies_matrices(array) -> None:
    """A device array of another library says where its memory is, but not how matrices are multiplied there."""
    if array.kind == "device":
        raise TypeError(
            f"input is {array.home} of a library that is not known to multiply matrices, expected CuPy arrays or torch "
            f"tensors: convert it by DLPack"
        )


def bad_label(row: int, label: int, n_cols: int, ignore_index: int) -> IndexError:
    found = "above 2^63 - 1" if label == TOO_LARGE else label
    return IndexError(
        f"target[{row}] (counted in C order) is {found}, expected a class from 0 to {n_cols - 1} "
        f"or ignore_index ({ignore_index})"
    )


def rng(value) -> tuple:
    """(seed, step), each a Python int or something else that should be an array."""
    seed, step = value if isinstance(value, tuple) and len(value) == 2 else (value, 0)
    return _seed(seed, value), _seed(step, value)


def _seed(part, value):
    if isinstance(part, int | np.integer) and not isinstance(part, bool):
        if not -(2**63) <= part < 2**64:
            raise ValueError(f"rng is {_short(value)}, expected 64-bit integers")
        return int(part)
    if not hasattr(part, "__dlpack__") and not (hasattr(part, "dtype") and hasattr(part, "shape")):
        raise TypeError(f"rng is {_short(value)}, expected a seed or (seed, step): ints or arrays of integers")
    return part


def seeds(array, name: str, batch_shape: tuple[int, ...]) -> None:
    """An array of seeds or steps: one for each row, or one for all."""
    if array.dtype not in INTEGERS:
        raise TypeError(f"{name} has dtype {array.dtype}, expected an integer dtype")
    if array.shape != batch_shape and array.size != 1:
        raise ValueError(f"{name} has shape {array.shape}, expected {batch_shape}, one for each row, or a single one")


def number_of_rows(array, name: str, batch_shape: tuple[int, ...]) -> None:
    """An array of one number for each row, or one for all."""
    floating(array.dtype, name)
    if array.shape != batch_shape and array.size != 1:
        raise ValueError(f"{name} has shape {array.shape}, expected {batch_shape}, one for each row, or a single one")


def top_k(value) -> int:
    """How many logits are kept; 0: all of them."""
    if value is None:
        return 0
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"top_k is {_short(value)}, expected an int")
    if number < 1:
        raise ValueError(f"top_k is {number}, expected at least 1; None keeps all")
    return min(number, 2**63 - 1)  # kernels take 64 bits, and no row has more logits


def top_p(value) -> float:
    if value is None:
        return 1.0
    number = scalar(value, "top_p")
    if not 0.0 < number <= 1.0:
        raise ValueError(f"top_p is {number}, expected a number above 0, at most 1")
    return number


def min_p(value) -> float:
    if value is None:
        return 0.0
    number = scalar(value, "min_p")
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"min_p is {number}, expected a number from 0 to 1")
    return number


# ---------------------------------------------------------------- states of log-sum-exp


def row_count(value) -> int:
    number = _index(value, "n_rows")
    if number < 0:
        raise ValueError(f"n_rows is {number}, expected 0 or more")
    return number


def _index(value, name: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {_short(value)}, expected an int") from None


def rows_of_state(columns, n_rows: int, dtype: str) -> None:
    """What comes into a state computed in this format."""
    if columns.ndim != 2 or columns.shape[0] != n_rows:
        raise ValueError(f"columns has shape {columns.shape}, expected ({n_rows}, n_cols): the rows of the state")
    if columns.dtype == "float64" != dtype:
        raise TypeError(
            f"columns has dtype float64, but the state is computed in {dtype}: convert them, or make the state with "
            f"like= of float64"
        )


def first_column(value, multiple: int) -> int:
    number = _index(value, "first_col")
    if number < 0 or number % multiple:
        raise ValueError(f"first_col is {number}, expected a multiple of {multiple}, where a chunk begins")
    return number


def new_columns(known: tuple, first: int, stop: int, multiple: int, given: str) -> None:
    """Columns [first, stop) of an argument can join those that a state has."""
    for known_first, known_stop in known:
        if max(first, known_first) < min(stop, known_stop):
            raise ValueError(
                f"{given} {first} to {stop - 1}, but the state has {known_first} to {known_stop - 1} already"
            )
        for end, next_first in ((known_stop, first), (stop, known_first)):
            if end % multiple and next_first >= end > 0 and stop > first:
                raise ValueError(
                    f"{given} {first} to {stop - 1} and the state has {known_first} to {known_stop - 1}: "
                    f"only the last columns of all may end elsewhere than at a multiple of {multiple}"
                )


def column_ranges(value, multiple: int) -> list[tuple[int, int]]:
    """(first, stop) of the columns that a table is of, in ascending order."""
    expected = f"expected ((first, stop), ...) in ascending order, at multiples of {multiple} but for the last stop"
    try:
        ranges = [(operator.index(first), operator.index(stop)) for first, stop in value]
    except (TypeError, ValueError):
        raise TypeError(f"columns is {_short(value)}, {expected}") from None
    at = 0
    for first, stop in ranges:
        if first < at or first % multiple or at % multiple or stop <= first:
            raise ValueError(f"columns is {_short(value)}, {expected}")
        at = stop
    return ranges


def state_table(table, n_chunks: int, n_numbers: int) -> None:
    if table.dtype not in ("float32", "float64"):
        raise TypeError(f"table has dtype {table.dtype}, expected float32 or float64, as it was made")
    if table.shape[1:] != (n_chunks, n_numbers):
        raise ValueError(f"table has shape {table.shape}, expected (n_rows, {n_chunks}, {n_numbers}) for its columns")


def state(value, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"other is {_short(value)}, expected a {kind.__name__}")


def same_kind_of_state(one: tuple, other: tuple) -> None:
    """(n_rows, dtype, temperature) of two states that are to be merged."""
    if one[0] != other[0]:
        raise ValueError(f"other has {other[0]} rows, expected {one[0]} as the state has")
    if one[1] != other[1]:
        raise TypeError(f"other is computed in {other[1]}, expected {one[1]} as the state is")
    if one[2] != other[2]:
        raise ValueError(f"other has temperature {other[2]}, expected {one[2]} as the state has")


def shape(value) -> tuple[int, ...]:
    try:
        sizes = tuple(operator.index(size) for size in value)
    except TypeError:
        raise TypeError(f"shape is {_short(value)}, expected a tuple of ints") from None
    if not sizes or min(sizes) < 1:
        raise ValueError(f"shape is {_short(value)}, expected at least one size, and all of them above 0")
    return sizes


def several(value, name: str) -> list:
    """A string would be a sequence of letters."""
    try:
        found = None if isinstance(value, str | bytes) else list(value)
    except TypeError:
        found = None
    if found is None:
        raise TypeError(f"{name} is {_short(value)}, expected a sequence: put a single one into a list")
    return found


def options(given, known: tuple[str, ...], op: str) -> None:
    """Of a call of op that is described."""
    for name in given:
        if name not in known:
            raise TypeError(f"{op} has no option {name}, expected some of {', '.join(known)}")


def options_of_ops(given, ops) -> None:
    """Of calls whose kernels are compiled."""
    if given and ops is None:
        raise ValueError(f"{next(iter(given))} is given and ops is None, expected the ops whose calls have it")
    if "axis" in given:
        raise TypeError("axis is given, expected none: kernels are compiled for rows along every axis")


def one_of(value, known: tuple[str, ...], name: str) -> str:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} is {_short(value)}, expected one of {', '.join(known)}")
    return value


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"a {type(value).__name__}"
