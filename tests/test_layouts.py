"""Any strides, any axis, any `out`: the bits of a contiguous call, and not a byte touched outside the views."""

import itertools
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

import gpusoftmax
from gpusoftmax import _rows
from tests import inputs, oracle, tolerances
from tests.calls import CALLS, IN_PLACE, Untouched, arguments, reshaped, same_bits

SHAPE = (8, 37)
ZERO_STRIDES = ("0-stride rows", "0-stride columns")
WITH_OUT = [name for name, call in CALLS.items() if call.takes_out]
F32 = np.dtype(np.float32)


def dtypes_of(target):
    """Every further dtype is a kernel to compile: float16 and float64 take the ways of bfloat16 and float32, and the
    layouts of the GPU kernels do not depend on it.
    """
    return (F32, inputs.BFLOAT16) if target.name == "cpu" else (F32,)


def run(target, name, arrays, **options):
    return target.get(CALLS[name].function(*(target.array(array) for array in arrays.values()), **options))


def with_view(name, arrays, argument, view):
    """The arguments with one of them replaced by a view of the same values; the others in shapes that go with it."""
    batch = view.shape if argument in CALLS[name].others else view.shape[:-1]
    brought = {
        other: array.reshape(batch if other in CALLS[name].others else (*batch, array.shape[-1]))
        for other, array in arrays.items()
    }
    return {**brought, argument: view}


# ---------------------------------------------------------------- inputs


@pytest.mark.parametrize(("name", "argument"), [(name, row) for name in CALLS for row in CALLS[name].rows])
def test_every_input_layout(target, name, argument):
    seen = set()
    for dtype, kind in itertools.product(dtypes_of(target), ("rows differ", "equal rows", "equal columns")):
        arrays = arguments(name, SHAPE, dtype)
        if kind != "rows differ":
            part = np.s_[:1] if kind == "equal rows" else np.s_[:, :1]
            arrays[argument] = np.ascontiguousarray(np.broadcast_to(arrays[argument][part], SHAPE))
        expected = run(target, name, arrays)
        for layout, view in inputs.layouts(arrays[argument]):
            if kind != "rows differ" and layout not in ZERO_STRIDES:
                continue
            with Untouched(view):
                result = run(target, name, with_view(name, arrays, argument, view))
            assert same_bits(reshaped(result, SHAPE[:1]), reshaped(expected, SHAPE[:1])), (layout, dtype.name)
            seen.add(layout)
    assert len(seen) == 15


@pytest.mark.parametrize("name", ["cross_entropy", "cross_entropy_with_grad"])
def test_every_label_layout(target, name):
    arrays = arguments(name, SHAPE, F32)
    labels = arrays["target"]
    wide = np.repeat(labels[:, None], 3, axis=1)
    padded = np.full((4, 5), 10**6)  # what lies between the labels is none
    padded[:, 1:3] = labels.reshape(4, 2)
    views = {
        "step": np.repeat(labels, 2)[::2],
        "reversed": labels[::-1].copy()[::-1],
        "column": wide[:, 1],
        "two strides": padded[:, 1:3],
        "transposed": labels.reshape(4, 2).T.copy().T,
        "read-only": np.frombuffer(labels.tobytes(), labels.dtype),
    }
    for axis in (1, -1):
        expected = run(target, name, arrays, axis=axis)
        for layout, view in views.items():
            with Untouched(view):
                result = run(target, name, with_view(name, arrays, "target", view), axis=-1)
            assert same_bits(reshaped(result, SHAPE[:1]), reshaped(expected, SHAPE[:1])), layout
    equal = {**arrays, "target": np.full(SHAPE[0], 5)}
    stretched = {**arrays, "target": np.broadcast_to(np.int64(5), SHAPE[0])}
    assert same_bits(run(target, name, stretched), run(target, name, equal))


@pytest.mark.parametrize("layout", ["step", "reversed", "0-stride", "column", "read-only"])
def test_every_weight_layout(layout):
    arrays = arguments("cross_entropy", SHAPE, F32)
    weight = np.linspace(0.5, 2, SHAPE[1], dtype=F32)
    if layout == "0-stride":
        weight = np.full_like(weight, 0.75)
    view = {
        "step": np.repeat(weight, 2)[::2],
        "reversed": weight[::-1].copy()[::-1],
        "0-stride": np.broadcast_to(F32.type(0.75), SHAPE[1]),
        "column": np.repeat(weight[:, None], 3, axis=1)[:, 1],
        "read-only": np.frombuffer(weight.tobytes(), F32),
    }[layout]
    for smoothing in (0, 0.1):
        expected = gpusoftmax.cross_entropy_with_grad(*arrays.values(), weight, label_smoothing=smoothing)
        with Untouched(view):
            result = gpusoftmax.cross_entropy_with_grad(*arrays.values(), view, label_smoothing=smoothing)
        assert same_bits(result, expected)


@pytest.mark.parametrize("name", ["softmax_backward", "log_softmax_backward"])
def test_every_layout_of_the_upstream_gradient(target, name):
    """What autograd hands on: expanded scalars, expanded rows and columns, reversed and transposed arrays."""
    arrays = arguments(name, SHAPE, F32)
    probs, gradient = arrays.values()
    scalar = F32.type(0.3)
    for upstream in (
        np.broadcast_to(scalar, SHAPE),  # of a plain sum
        np.broadcast_to(gradient[0], SHAPE),
        np.broadcast_to(gradient[:, :1], SHAPE),
        gradient[::-1, ::-1],
        gradient.T.copy().T,
        as_strided(np.repeat(gradient, 2, axis=1), SHAPE, (8 * SHAPE[1], 8)),
    ):
        for probs_view in (probs, probs.T.copy().T):
            with Untouched(upstream), Untouched(probs_view):
                result = target.get(CALLS[name].function(target.array(probs_view), target.array(upstream)))
            assert same_bits(
                result, run(target, name, dict(zip(arrays, (probs, np.ascontiguousarray(upstream)), strict=True)))
            )


@pytest.mark.parametrize("name", CALLS)
def test_more_batch_strides_than_a_kernel_takes(target, name):
    batch, n_cols = (2, 3, 2, 2), 11
    arrays = arguments(name, (*batch, n_cols), F32)
    expected = run(target, name, arrays)
    views = {}
    for argument, array in arrays.items():
        if argument in CALLS[name].others and target.name != "cpu":
            views[argument] = array.swapaxes(0, 2).copy()
            continue
        buffer = np.full([2 * n for n in array.shape], 0, array.dtype)
        views[argument] = buffer[tuple(slice(axis % 2, None, 2) for axis in range(array.ndim))]
        views[argument][...] = array
        # Swapping two axes keeps every pair of neighbouring axes from being joined.
        views[argument] = views[argument].swapaxes(0, 2)
    if target.name != "cpu":
        views.update({other: arrays[other].swapaxes(0, 2).copy() for other in CALLS[name].others})
    result = run(target, name, views)
    back = tuple if isinstance(result, tuple) else lambda parts: next(iter(parts))
    result = back(
        part.swapaxes(0, 2) if np.ndim(part) else part for part in (result if isinstance(result, tuple) else (result,))
    )
    if name.endswith("_with_grad"):  # the mean adds the rows in another order
        assert result[0] == pytest.approx(expected[0], rel=1e-6)
        result, expected = result[1], expected[1]
    assert same_bits(result, expected)


def test_copied_labels_live_as_long_as_they_are_read():
    """Labels with three strides are copied; freed memory is overwritten at once here, not some day."""
    program = """
        import numpy as np, gpusoftmax
        labels = np.random.default_rng(0).integers(0, 9, (12, 14, 10)).transpose(2, 0, 1)[::2, ::2]
        logits = np.random.default_rng(1).standard_normal((*labels.shape, 9), dtype=np.float32)
        loss = gpusoftmax.cross_entropy(logits, labels)
        assert loss == gpusoftmax.cross_entropy(logits, labels.copy()), loss
    """
    environment = {**os.environ, "MALLOC_PERTURB_": "165"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=120, env=environment)


# ---------------------------------------------------------------- axes


def axes_of(ndim):
    """Every axis from both ends, every tuple of two or more in ascending order, one backwards, and None."""
    tuples = [axes for n in range(1, ndim + 1) for axes in itertools.combinations(range(ndim), n)]
    return [*range(-ndim, ndim), *tuples, (ndim - 1, -ndim), None]


@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 3, 4, 5)], ids=["3-D", "4-D"])
@pytest.mark.parametrize("order", ["C", "F", "moved"])
def test_every_axis(shape, order):
    made = {
        argument: array if order == "C" else np.asfortranarray(array) if order == "F" else _moved(array)
        for name in ("softmax_backward", "log_softmax_backward", "softmax")
        for argument, array in arguments(name, shape, F32).items()
    }
    x, gradient = made["x"], made["dprobs"]
    for axis in axes_of(len(shape)):
        tolerances.check_softmax(gpusoftmax.softmax(x, axis), x, axis)
        tolerances.check_log_softmax(gpusoftmax.log_softmax(x, axis), x, axis)
        for keepdims in (False, True):
            lse = np.asarray(gpusoftmax.logsumexp(x, axis, keepdims=keepdims))
            tolerances.check_logsumexp(lse, x, axis, keepdims=keepdims)
        probs, log_probs = gpusoftmax.softmax(x, axis), gpusoftmax.log_softmax(x, axis)
        tolerances.check_softmax_backward(gpusoftmax.softmax_backward(probs, gradient, axis), probs, gradient, axis)
        dlogits = gpusoftmax.log_softmax_backward(log_probs, gradient, axis)
        tolerances.check_log_softmax_backward(dlogits, log_probs, gradient, axis)


def _moved(array):
    """The same values with the first axis in the middle of the memory and gaps between the rows."""
    buffer = np.full((*array.shape[1:-1], array.shape[0], array.shape[-1] + 3), np.nan, array.dtype)
    view = np.moveaxis(buffer[..., 1:-2], -2, 0)
    view[...] = array
    return view


@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 3, 4, 5)], ids=["3-D", "4-D"])
def test_every_class_axis(target, shape):
    x = inputs.make("spread", shape, F32)
    for axis in range(-len(shape), len(shape) if target.name == "cpu" else 0):
        batch = oracle.logsumexp(x, axis).shape
        labels = inputs.targets(int(np.prod(batch)), shape[axis], share_ignored=0.2).reshape(batch)
        weight = np.linspace(0.5, 2, shape[axis], dtype=F32)
        for reduction in ("none", "mean") if target.name == "cpu" else ("mean",):
            options = {"axis": axis, "reduction": reduction, "label_smoothing": 0.1}
            loss, dlogits = target.get(
                gpusoftmax.cross_entropy_with_grad(
                    target.array(x), target.array(labels), target.array(weight), **options
                )
            )
            tolerances.check_loss(loss, x, labels, weight, **options)
            tolerances.check_dlogits(dlogits, x, labels, weight, **options)


@pytest.mark.parametrize("axis", [0, 1, 2, -3, (0, 1), (1, 2), (0, 1, 2), None, (0, 2), (2, 0)])
def test_axes_on_a_device(target, axis):
    """(0, 2) is no single stride and costs a copy; each combination means what it means on the CPU."""
    x = inputs.make("spread", (3, 4, 5), F32)
    probs = target.get(gpusoftmax.softmax(target.array(x), axis))
    tolerances.check_softmax(probs, x, axis)
    lse = target.get(gpusoftmax.logsumexp(target.array(x), axis, keepdims=True))
    tolerances.check_logsumexp(np.asarray(lse), x, axis, keepdims=True)
    dlogits = target.get(gpusoftmax.softmax_backward(target.array(probs), target.array(x), axis))
    tolerances.check_softmax_backward(dlogits, probs, x, axis)


def test_the_order_of_a_tuple_means_nothing():
    x = inputs.make("spread", (3, 4, 5), F32)
    for one, two in (((0, 2), (2, 0)), ((0, 2), (-1, -3)), (None, (0, 1, 2)), ((1,), 1), ([0, 1], (1, 0))):
        assert same_bits(gpusoftmax.softmax(x, one), gpusoftmax.softmax(x, two))
        assert same_bits(gpusoftmax.logsumexp(x, one), gpusoftmax.logsumexp(x, two))


def test_axes_in_place_through_a_copy():
    x = inputs.make("spread", (3, 4, 5), F32)
    expected = gpusoftmax.softmax(x, (0, 2))
    guarded = _moved(x)
    with Untouched(guarded, but_view=True):
        assert gpusoftmax.softmax(guarded, (0, 2), out=guarded) is guarded
        assert same_bits(guarded.copy(), expected)


# ---------------------------------------------------------------- out


def outs(shape, dtype):
    """(layout, writable view of `shape` or a shape of as many elements with the same last axis)."""
    base = np.full(shape, 7, dtype).reshape(-1, shape[-1])
    base += np.arange(base.size, dtype=np.float32).reshape(base.shape).astype(dtype)  # no rows or columns are equal
    for layout, view in inputs.layouts(base):
        if view.flags.writeable and layout not in ZERO_STRIDES:
            yield layout, view


@pytest.mark.parametrize("name", WITH_OUT)
def test_every_output_layout(target, name):
    tested = 0
    for dtype in dtypes_of(target):
        arrays = arguments(name, SHAPE, dtype)
        expected = run(target, name, arrays)
        expected = expected[1] if isinstance(expected, tuple) else expected
        if CALLS[name].per_row:
            # One number per row: the views of (n_rows, n_cols) become the batch shape of logits with one more axis.
            x = inputs.make("spread", (*SHAPE, 5), dtype)
            expected = target.get(CALLS[name].function(target.array(x)))
            arrays = {"x": x}
        for layout, out in outs(SHAPE, expected.dtype):
            batch = out.shape if CALLS[name].per_row else out.shape[:-1]
            shaped = {
                argument: array.reshape(batch if argument in CALLS[name].others else (*batch, array.shape[-1]))
                for argument, array in arrays.items()
            }
            with Untouched(out, but_view=True):
                place = target.array(out)
                given = [target.array(array) for array in shaped.values()]
                result = CALLS[name].function(*given, out=place)
                result = result[1] if isinstance(result, tuple) else result
                assert result is place
                written = target.get(place)
                assert same_bits(written.reshape(expected.shape), expected), (layout, dtype.name)
            tested += 1
    assert tested == 12 * len(dtypes_of(target))


@pytest.mark.parametrize(("name", "argument"), IN_PLACE)
@pytest.mark.parametrize("n_cols", [37, 5000])  # in one chunk, and in several: a row is read twice
def test_in_place(target, name, argument, n_cols):
    arrays = arguments(name, (4, n_cols), F32)
    expected = run(target, name, arrays)
    for layout, view in inputs.layouts(arrays[argument]):
        if not view.flags.writeable or (target.name != "cpu" and layout != ("reversed" if n_cols < 100 else "C")):
            continue
        values = view.copy()
        shaped = with_view(name, arrays, argument, view)
        with Untouched(view, but_view=True):
            placed = {key: target.array(array) for key, array in shaped.items()}
            result = CALLS[name].function(*placed.values(), out=placed[argument])
            loss, result = result if isinstance(result, tuple) else (None, result)
            assert result is placed[argument]
            got = target.get(result)
            got = got.reshape(4, n_cols) if loss is None else (target.get(loss), got.reshape(4, n_cols))
            assert same_bits(got, expected), layout
        assert target.name != "cpu" or not same_bits(view.copy(), values)


def test_logsumexp_in_place():
    """Only logits with one column have the shape of their log-sum-exp."""
    x = inputs.make("spread", (5, 1), F32)
    expected = x.copy()
    assert gpusoftmax.logsumexp(x, keepdims=True, out=x) is x
    assert same_bits(x, expected)


@pytest.mark.parametrize("strides", [(0, 4), (400, 4)])
def test_in_place_whatever_the_strides_of_axes_of_length_one(strides):
    """x[None] and x.reshape(1, -1) are the same memory with different strides; the alias is exact all the same."""
    x = inputs.make("spread", (5,), F32)
    expected = gpusoftmax.softmax(x)
    assert same_bits(gpusoftmax.softmax(x.reshape(1, 5), out=as_strided(x, (1, 5), strides))[0], expected)


OVERLAPPING = {
    "next row": (np.s_[:-1], np.s_[1:]),
    "previous row": (np.s_[1:], np.s_[:-1]),
    "next column": (np.s_[:, :-1], np.s_[:, 1:]),
    "reversed rows": (np.s_[:], np.s_[::-1]),
    "reversed columns": (np.s_[:], np.s_[:, ::-1]),
    "one column in common": (np.s_[:, :4], np.s_[:, 3:]),
    "one element in common": (np.s_[:4, :4], np.s_[3:, 3:]),
}
DISJOINT = {
    "even and odd columns": (np.s_[:, ::2], np.s_[:, 1::2]),
    "odd and even columns": (np.s_[:, 1::2], np.s_[:, ::2]),
    "even and odd rows": (np.s_[::2], np.s_[1::2]),
    "even and odd columns backwards": (np.s_[:, ::2], np.s_[:, ::-2]),
    "halves of the columns": (np.s_[:, :4], np.s_[:, 4:]),
    "halves of the rows": (np.s_[4:], np.s_[:4]),
    "neighbouring elements": (np.s_[:1], np.s_[1:2]),
}


def halves(case, square=(8, 8)):
    """(logits, out) in one buffer; where the slice of out is larger, out has a row or column less."""
    buffer = inputs.make("spread", square, F32)
    x, out = (buffer[where] for where in case)
    smaller = tuple(slice(min(pair)) for pair in zip(x.shape, out.shape, strict=True))
    return buffer, x[smaller], out[smaller]


COPIES = "CuPy copies what it is given: no two of its arrays share memory, and all can be written"


@pytest.mark.parametrize("case", OVERLAPPING)
def test_partial_overlap(target, case):
    if target.name == "gpu":
        pytest.skip(COPIES)
    buffer, x, out = halves(OVERLAPPING[case])
    before = buffer.tobytes()
    x, out = target.array(x), target.array(out)
    for function in (gpusoftmax.softmax, gpusoftmax.log_softmax):
        with pytest.raises(ValueError, match="^out overlaps x in part"):
            function(x, out=out)
    with pytest.raises(ValueError, match="^out overlaps probs in part"):
        gpusoftmax.softmax_backward(x, x, out=out)
    target.get(out), target.get(x)
    assert buffer.tobytes() == before


@pytest.mark.parametrize("case", DISJOINT)
def test_interleaved_memory_does_not_overlap(target, case):
    _, x, out = halves(DISJOINT[case])
    expected = target.get(gpusoftmax.softmax(target.array(x.copy())))
    logits = target.array(x)
    result = target.array(out)
    assert gpusoftmax.softmax(logits, out=result) is result
    assert same_bits(target.get(result), expected)


def test_overlap_of_every_other_argument():
    memory = np.zeros(200, np.float64)
    probs, other = memory[:12].reshape(3, 4), memory[20:32].reshape(3, 4)
    for function in (gpusoftmax.softmax_backward, gpusoftmax.log_softmax_backward):
        first, second = CALLS[function.__name__].arguments
        with pytest.raises(ValueError, match=f"^out overlaps {first} in part"):
            function(probs, other, out=memory[1:13].reshape(3, 4))
        with pytest.raises(ValueError, match=f"^out overlaps {second} in part"):
            function(probs, other, out=memory[21:33].reshape(3, 4))
    labels, weight = memory[:3].view(np.int64), memory[40:44]
    logits = np.zeros((3, 4))
    with pytest.raises(ValueError, match="^out shares memory with target"):
        gpusoftmax.cross_entropy_with_grad(logits, labels, out=probs)
    with pytest.raises(ValueError, match="^out shares memory with weight"):
        gpusoftmax.cross_entropy_with_grad(logits, np.zeros(3, int), weight, out=memory[38:50].reshape(3, 4))
    with pytest.raises(ValueError, match="^out overlaps logits in part"):
        gpusoftmax.cross_entropy_with_grad(probs, np.zeros(3, int), out=memory[1:13].reshape(3, 4))
    with pytest.raises(ValueError, match="^out overlaps x in part"):
        gpusoftmax.logsumexp(probs, out=memory[2:5])
    assert not memory.any()


def test_columns_beside_the_logits_do_not_overlap():
    """A table with a row for each row of logits: these, in whose place the gradient comes, and what belongs to them."""
    logits, classes = inputs.make("spread", (5, 6), np.float64), inputs.targets(5, 6)
    weight, temperature = np.arange(1.0, 6.0), np.linspace(0.5, 2.0, 5)
    table = np.zeros((5, 10))
    table[:, :6], table[:, 7], table[:, 8] = logits, weight, temperature
    table[:, 9].view(np.int64)[:] = classes
    beside = table[:, 6:].copy()
    loss, dlogits = gpusoftmax.cross_entropy_with_grad(
        table[:, :6], table[:, 9].view(np.int64), row_weight=table[:, 7], temperature=table[:, 8], out=table[:, :6]
    )
    options = {"row_weight": weight, "temperature": temperature}
    expected = gpusoftmax.cross_entropy_with_grad(logits, classes, **options)
    assert loss == expected[0] and same_bits(dlogits, expected[1])
    assert same_bits(table[:, 6:], beside)
    assert gpusoftmax.argmax(table[:, :6], out=table[:, 9].view(np.int64)).shape == (5,)


def test_the_same_memory_in_another_dtype_is_no_alias():
    x = inputs.make("spread", (4, 6), F32)
    before = x.tobytes()
    with pytest.raises(ValueError, match="^out overlaps x in part"):
        gpusoftmax.softmax(x[:2], out=x.reshape(-1)[:6].view(np.float16).reshape(2, 6))
    with pytest.raises(ValueError, match="^out overlaps x in part"):
        gpusoftmax.softmax(x, out=as_strided(x, (4, 6), (4, 16)))  # the same elements in another order
    assert x.tobytes() == before


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (2, 0, 3)])
def test_empty_outputs(target, shape):
    """Whatever strides an array without elements has, it has none that overlap."""
    x = np.empty(shape, F32)
    for out in (np.empty(shape, F32), as_strided(np.empty(1, F32), shape, (0,) * len(shape))):
        place = target.array(out)
        assert gpusoftmax.softmax(target.array(x), out=place) is place
    if not shape[-1]:
        assert (target.get(gpusoftmax.logsumexp(target.array(x))) == -np.inf).all()


def test_outputs_that_cannot_be_written(target):
    if target.name == "gpu":
        pytest.skip(COPIES)
    x = target.array(inputs.make("spread", (3, 4), F32))
    for strides in ((0, 4), (16, 0), (0, 0), (8, 4), (4, 4)):
        buffer = np.full(64, 7, F32)
        out = as_strided(buffer, (3, 4), strides)
        with pytest.raises(ValueError, match="^out .* its elements overlap"):
            gpusoftmax.softmax(x, out=target.array(out))
        assert (buffer == 7).all()
    read_only = np.zeros((3, 4), F32)
    read_only.flags.writeable = False
    with pytest.raises(ValueError, match="^out is read-only"):
        gpusoftmax.softmax(x, out=target.array(read_only))
    with pytest.raises(ValueError, match="^out is read-only"):
        gpusoftmax.logsumexp(x, out=target.array(read_only[:, 0]))
    assert not read_only.any()


@pytest.mark.parametrize(
    ("dtype", "out_dtype"), [("float32", "float64"), ("float16", "float32"), ("float64", "bfloat16")]
)
def test_out_decides_the_dtype(dtype, out_dtype):
    x = inputs.make("spread", (3, 40), dtype)
    options = {"dtype": out_dtype}
    for function, check in (
        (gpusoftmax.softmax, tolerances.check_softmax),
        (gpusoftmax.log_softmax, tolerances.check_log_softmax),
        (gpusoftmax.logsumexp, tolerances.check_logsumexp),
    ):
        like = function(x, **options)
        out = np.empty_like(like)
        assert out.dtype.name == out_dtype
        assert function(x, out=out) is out
        assert same_bits(out, like)
        assert same_bits(function(x, out=np.empty_like(like), **options), like)  # the same dtype twice is no conflict
        check(out, x)
    labels = inputs.targets(3, 40)
    out = np.empty(x.shape, like.dtype)
    loss, dlogits = gpusoftmax.cross_entropy_with_grad(x, labels, out=out)
    assert dlogits is out and loss.dtype == (np.float64 if dtype == "float64" else np.float32)
    tolerances.check_dlogits(out, x, labels)


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
def test_out_and_another_dtype(target, name):
    x = inputs.make("spread", (3, 4), F32)
    out = np.full((3,) if CALLS[name].per_row else (3, 4), 7, F32)
    with pytest.raises(TypeError, match="^dtype is float64 but out has dtype float32; give only one of them"):
        CALLS[name].function(target.array(x), dtype=np.float64, out=target.array(out))
    assert (out == 7).all()


# ---------------------------------------------------------------- beyond 32 bits


@pytest.mark.parametrize("stride", [2**31 - 1, 2**31, 2**31 + 1])
def test_row_strides_beyond_32_bits(tmp_path, stride):
    """Rows 0, 1 and 2 lie up to 2^32 + 2 elements apart, in a sparse file of 16 GB that holds a few pages."""
    n_cols = 21
    flat = np.memmap(tmp_path / "logits", F32, "w+", shape=2 * stride + 100)
    x, out = (as_strided(flat[first:], (3, n_cols), (4 * stride, 4)) for first in (0, 50))
    x[...] = inputs.make("spread", (3, n_cols), F32)
    dense, labels = np.array(x), np.array([3, 20, 0])
    assert gpusoftmax.softmax(x, out=out) is out
    assert same_bits(np.array(out), gpusoftmax.softmax(dense))
    assert same_bits(gpusoftmax.logsumexp(x[::-1]), gpusoftmax.logsumexp(dense[::-1]))
    loss, _ = gpusoftmax.cross_entropy_with_grad(x, labels, reduction="none", out=out)
    expected = gpusoftmax.cross_entropy_with_grad(dense, labels, reduction="none")
    assert same_bits((loss, np.array(out)), expected)
    assert same_bits(np.array(x), dense)


def test_column_and_label_strides_beyond_32_bits(tmp_path):
    stride = 2**31 + 1
    flat = np.memmap(tmp_path / "logits", np.float16, "w+", shape=2 * stride + 100)
    x, out = (as_strided(flat[first:], (4, 3), (2, 2 * stride)) for first in (0, 50))
    x[...] = inputs.make("spread", (4, 3), np.float16)
    gpusoftmax.softmax(x[:, ::-1], out=out)
    assert same_bits(np.array(out), gpusoftmax.softmax(np.array(x)[:, ::-1]))
    labels = as_strided(np.memmap(tmp_path / "labels", np.int8, "w+", shape=3 * stride + 1), (4,), (stride,))
    labels[...] = [2, 0, -100, 1]
    result = gpusoftmax.cross_entropy_with_grad(x, labels)
    assert same_bits(result, gpusoftmax.cross_entropy_with_grad(np.array(x), np.array(labels)))


def test_row_strides_beyond_32_bits_on_a_device():
    from tests.emulator import emulated_gpu

    stride, n_cols = 2**31 + 1, 21
    flat = np.zeros(stride + 100, F32)  # untouched pages take no memory
    x, out = (as_strided(flat[first:], (2, n_cols), (4 * stride, 4)) for first in (0, 50))
    x[...] = inputs.make("spread", (2, n_cols), F32)
    with emulated_gpu("sm_90", track=False) as gpu:
        expected = gpu.get(gpusoftmax.softmax(gpu.array(np.array(x))))
        place = gpu.array(out)
        gpusoftmax.softmax(gpu.array(x), out=place)
        assert same_bits(gpu.get(place), expected)


def test_numbers_of_rows_are_copied_in_parts(target, monkeypatch):
    """As they are where there are more of them than a row has columns."""
    monkeypatch.setattr(_rows, "_MOST_COPIED", 8)
    x = inputs.make("spread", (21, 5), F32, seed=4)
    temperature = np.linspace(0.5, 2, 42).astype(np.float16)[::2]
    expected = gpusoftmax.softmax(x, temperature=temperature.astype(F32))
    got = target.get(gpusoftmax.softmax(target.array(x), temperature=target.array(temperature)))
    assert np.allclose(got, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "softmax_backward"])
def test_calls_in_place_and_not_take_turns(name):
    """A call that was made before, with arrays of the same layout, but other ones of them the same."""
    call = CALLS[name]
    arrays = list(arguments(name, (20, 300), "float32").values())
    expected = call.function(*arrays)
    for _ in range(3):
        out = np.empty_like(expected)
        call.function(*arrays, out=out)
        assert np.array_equal(out, expected)
        in_place = [array.copy() for array in arrays]
        call.function(*in_place, out=in_place[0])
        assert np.array_equal(in_place[0], expected)
        for before, after in zip(arrays[1:], in_place[1:], strict=True):
            assert np.array_equal(before, after)
    fresh = arguments(name, (20, 300), "float32").values()
    assert all(np.array_equal(one, other) for one, other in zip(arrays, fresh, strict=True))
