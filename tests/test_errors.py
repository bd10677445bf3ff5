"""Every error message: the argument, what came, what was expected, the fix. And after an error nothing was written."""

import ast
import traceback
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

import gpusoftmax
from gpusoftmax import _checks
from tests import inputs
from tests.emulator import emulated_gpu

F32 = np.dtype(np.float32)
FLOATING = "expected one of float16, bfloat16, float32, float64"


def host_arrays():
    """What the cases below are made of, all of it new: `out` holds sevens."""
    memory = np.full(64, 7, F32)
    read_only = np.full((3, 4), 7, F32)
    read_only.flags.writeable = False
    return {
        "x": inputs.make("spread", (3, 4), F32),
        "half": inputs.make("spread", (3, 4), np.float16),
        "integers": np.ones((3, 4), np.int64),
        "doubles": inputs.make("spread", (3, 4), np.float64),
        "short": inputs.make("spread", (3, 3), F32),
        "cube": inputs.make("spread", (2, 3, 4), F32),
        "scalar": np.array(2, F32),
        "no_classes": np.empty((3, 0), F32),
        "no_rows": np.empty((0, 4), F32),
        "labels": np.array([1, 2, 3]),
        "four_labels": np.array([1, 2, 3, 0]),
        "bad_labels": np.array([1, -1, 4]),
        "label_pairs": np.array([[1, 2], [2, 3], [0, 1]]),
        "shares": np.full((3, 2), 0.5, F32),
        "no_labels": np.empty((3, 0), np.int64),
        "no_shares": np.empty((3, 0), F32),
        "float_labels": np.array([1.0, 2.0, 3.0]),
        "weight": np.ones(4, F32),
        "short_weight": np.ones(3, F32),
        "out": np.full((3, 4), 7, F32),
        "row_out": np.full(3, 7, F32),
        "integer_out": np.full((3, 4), 7, np.int32),
        "wide_out": np.full((3, 5), 7, F32),
        "stretched_out": as_strided(memory, (3, 4), (0, 4)),
        "overlapping_out": as_strided(memory, (3, 4), (8, 4)),
        "read_only": read_only,
    }


softmax, log_softmax, logsumexp = gpusoftmax.softmax, gpusoftmax.log_softmax, gpusoftmax.logsumexp
softmax_backward, log_softmax_backward = gpusoftmax.softmax_backward, gpusoftmax.log_softmax_backward
cross_entropy, with_grad = gpusoftmax.cross_entropy, gpusoftmax.cross_entropy_with_grad
sample = gpusoftmax.sample
kl_div = gpusoftmax.kl_div_with_grad
linear = gpusoftmax.linear_cross_entropy_with_grad
State = gpusoftmax.LogSumExpState


def state_with(columns, first_col=0, **options):
    state = State.empty(3, like=columns, **options)
    state.update(columns, first_col)
    return state


# name -> (type of the error, its text or the beginning of it, the call)
CASES = {
    # axis
    "axis of text": (
        TypeError,
        "axis is 'last', expected an int, a tuple of ints or None",
        lambda a: softmax(a.x, "last", out=a.out),
    ),
    "axis of floats": (
        TypeError,
        "axis is (0, 1.0), expected an int, a tuple of ints or None",
        lambda a: log_softmax(a.x, (0, 1.0), out=a.out),
    ),
    "no axis": (
        ValueError,
        "axis is (), expected at least one axis: softmax over no axis has no meaning; None means all",
        lambda a: logsumexp(a.x, (), out=a.row_out),
    ),
    "axis too large": (
        np.exceptions.AxisError,
        "axis 2 is out of bounds for array of dimension 2",
        lambda a: softmax(a.x, 2, out=a.out),
    ),
    "axis too small": (
        np.exceptions.AxisError,
        "axis -3 is out of bounds for array of dimension 2",
        lambda a: softmax_backward(a.x, a.x, (0, -3), out=a.out),
    ),
    "axis of a number": (
        np.exceptions.AxisError,
        "axis 1 is out of bounds for array of dimension 0",
        lambda a: softmax(a.scalar, 1),
    ),
    "axis twice": (
        ValueError,
        "axis is (1, -1), expected each axis once",
        lambda a: log_softmax_backward(a.x, a.x, (1, -1), out=a.out),
    ),
    "classes along None": (
        TypeError,
        "axis is None, expected one int: the class axis",
        lambda a: with_grad(a.x, a.labels, axis=None, out=a.out),
    ),
    "classes along a tuple": (
        TypeError,
        "axis is (0,), expected one int: the class axis",
        lambda a: with_grad(a.x, a.labels, axis=(0,), out=a.out),
    ),
    "an image along one axis": (
        ValueError,
        "features has shape (3,), expected (..., height, width)",
        lambda a: gpusoftmax.spatial_softmax(a.row_out),
    ),
    "an image without pixels": (
        ValueError,
        "features has shape (3, 0), expected at least one pixel: a height and a width above 0",
        lambda a: gpusoftmax.spatial_softmax(a.no_classes),
    ),
    "an image too wide": (
        ValueError,
        "features has a width of 4194305, expected at most 4194304 (2^22)",
        lambda a: gpusoftmax.spatial_softmax(np.broadcast_to(F32.type(0), (1, 2**22 + 1))),
    ),
    "expectation along None": (
        TypeError,
        "axis is None, expected one int",
        lambda a: gpusoftmax.soft_argmax(a.x, None, out=a.row_out),
    ),
    "expectation along a tuple": (
        TypeError,
        "axis is (0, 1), expected one int",
        lambda a: gpusoftmax.soft_argmax(a.x, (0, 1), out=a.row_out),
    ),
    "largest along a tuple": (
        TypeError,
        "axis is (0, 1), expected one int, or None for the flattened array",
        lambda a: gpusoftmax.argmax(a.x, (0, 1)),
    ),
    "largest of none": (
        ValueError,
        "x has shape (3, 0), expected at least one element in each row",
        lambda a: gpusoftmax.argmax(a.no_classes),
    ),
    "classes of a number": (
        ValueError,
        "logits has no axis, expected at least the class axis",
        lambda a: cross_entropy(a.scalar, a.labels),
    ),
    "no classes": (
        ValueError,
        "logits has 0 classes, expected at least 1",
        lambda a: cross_entropy(a.no_classes, a.labels),
    ),
    # numbers
    "temperature 0": (
        ValueError,
        "temperature is 0.0, expected a finite number above 0",
        lambda a: log_softmax(a.x, temperature=0, out=a.out),
    ),
    "negative temperature": (
        ValueError,
        "temperature is -1.0, expected a finite number above 0",
        lambda a: log_softmax(a.x, temperature=-1, out=a.out),
    ),
    "infinite temperature": (
        ValueError,
        "temperature is inf, expected a finite number above 0",
        lambda a: logsumexp(a.x, temperature=np.inf, out=a.row_out),
    ),
    "temperature NaN": (
        ValueError,
        "temperature is nan, expected a finite number above 0",
        lambda a: softmax_backward(a.x, a.x, temperature=np.nan, out=a.out),
    ),
    "temperature too small for float32": (
        ValueError,
        "temperature is 1e-39, expected at least 5.88e-39 for arithmetic in float32",
        lambda a: log_softmax(a.x, temperature=1e-39, out=a.out),
    ),
    "temperature of text": (
        TypeError,
        "temperature is '1', expected one number",
        lambda a: log_softmax_backward(a.x, a.x, temperature="1", out=a.out),
    ),
    "temperature True": (
        TypeError,
        "temperature is True, expected one number",
        lambda a: softmax(a.x, temperature=True, out=a.out),
    ),
    "several temperatures": (
        TypeError,
        "temperature is [1.0, 2.0, 3.0], expected one number, or, where rows may have their own, an array of these",
        lambda a: softmax(a.x, temperature=[1.0, 2.0, 3.0], out=a.out),
    ),
    "a temperature for each column": (
        ValueError,
        "temperature has shape (4,), expected (3,) one for each row, or a single number",
        lambda a: softmax(a.x, temperature=a.weight, out=a.out),
    ),
    # what logits go through
    "bias of the wrong length": (
        ValueError,
        "bias has shape (3,), expected (4,), one for each column, or (3, 4), where sizes of 1 stand for all",
        lambda a: softmax(a.x, bias=a.short_weight, out=a.out),
    ),
    "bias in the memory of the result": (
        ValueError,
        "out shares memory with bias, which is read while out is written",
        lambda a: softmax(a.x, bias=a.out, out=a.out),
    ),
    "mask of numbers": (
        TypeError,
        "mask has dtype float32, expected bool, or int32 with a bit for each column along one axis; True, or 1, keeps "
        "a logit",
        lambda a: log_softmax(a.x, mask=a.x, out=a.out),
    ),
    "mask of too many words": (
        ValueError,
        "mask has shape (3, 4), expected (1,), one for each column, or (3, 1), where sizes of 1 stand for all",
        lambda a: logsumexp(a.x, mask=a.integer_out, out=a.row_out),
    ),
    "softcap 0": (
        ValueError,
        "softcap is 0.0, expected a finite number above 0; None leaves it out",
        lambda a: softmax(a.x, softcap=0, out=a.out),
    ),
    "softcap too small for float32": (
        ValueError,
        "softcap is 1e-39, expected 2.94e-39 to 3.4e+38 for arithmetic in float32",
        lambda a: softmax(a.x, softcap=1e-39, out=a.out),
    ),
    "softcap of text": (
        TypeError,
        "softcap is '30', expected a number",
        lambda a: softmax(a.x, softcap="30", out=a.out),
    ),
    "more valid columns than there are": (
        ValueError,
        "n_valid is 5, expected 0 to 4, the number of columns",
        lambda a: softmax(a.x, n_valid=5, out=a.out),
    ),
    "half a valid column": (
        TypeError,
        "n_valid is 2.5, expected an int or an array of ints, one for each row",
        lambda a: softmax(a.x, n_valid=2.5, out=a.out),
    ),
    "valid columns of floats": (
        TypeError,
        "n_valid has dtype float32, expected an integer dtype: numbers of columns",
        lambda a: softmax(a.x, n_valid=a.row_out, out=a.out),
    ),
    "valid columns of other rows": (
        ValueError,
        "n_valid has shape (4,), expected (3,) one for each row, or a single int",
        lambda a: softmax(a.x, n_valid=a.four_labels, out=a.out),
    ),
    "empty_row": (
        ValueError,
        "empty_row is 'one', expected one of nan, zero",
        lambda a: softmax(a.x, empty_row="one", out=a.out),
    ),
    "a transform along axes that need a copy": (
        ValueError,
        "axis is (0, 2), which no single stride walks; with a transform of the logits (bias, mask, n_valid, "
        "temperature 0, ...), expected one axis, or axes that lie together: reshape or copy the logits first",
        lambda a: softmax(a.cube, axis=(0, 2), n_valid=2),
    ),
    "complex temperature": (
        TypeError,
        "temperature is 1j, expected a number",
        lambda a: softmax(a.x, temperature=1j, out=a.out),
    ),
    "temperature None": (
        TypeError,
        "temperature is None, expected a number",
        lambda a: softmax(a.x, temperature=None, out=a.out),
    ),
    "grad_scale None": (
        TypeError,
        "grad_scale is None, expected a number",
        lambda a: with_grad(a.x, a.labels, grad_scale=None, out=a.out),
    ),
    "grad_scale of text": (
        TypeError,
        "grad_scale is '2', expected a number",
        lambda a: with_grad(a.x, a.labels, grad_scale="2", out=a.out),
    ),
    "grad_scale beyond the format": (
        ValueError,
        "grad_scale is -1e+39, expected -3.4e+38 to 3.4e+38 for arithmetic in float32",
        lambda a: with_grad(a.x, a.labels, grad_scale=-1e39, out=a.out),
    ),
    "grad_scale beyond the format, over a normalizer": (
        ValueError,
        "grad_scale / normalizer is 1e+40, expected -3.4e+38 to 3.4e+38 for arithmetic in float32",
        lambda a: kl_div(a.x, a.x, grad_scale=1e20, normalizer=1e-20, out=a.out),
    ),
    "normalizer beyond the format": (
        ValueError,
        "normalizer is 1e+39, expected 2.94e-39 to 3.4e+38 for arithmetic in float32",
        lambda a: with_grad(a.x, a.labels, normalizer=1e39, out=a.out),
    ),
    "normalizer of a divergence that is nothing in the format": (
        ValueError,
        "normalizer is 1e-50, expected 2.94e-39 to 3.4e+38 for arithmetic in float32",
        lambda a: kl_div(a.x, a.x, normalizer=1e-50, out=a.out),
    ),
    "z_loss beyond the format": (
        ValueError,
        "z_loss is 1e+39, expected -3.4e+38 to 3.4e+38 for arithmetic in float32",
        lambda a: with_grad(a.x, a.labels, z_loss=1e39, out=a.out),
    ),
    "z_loss of a layer beyond the format": (
        ValueError,
        "z_loss is 1e+39, expected -3.4e+38 to 3.4e+38 for arithmetic in float32",
        lambda a: linear(a.x, a.x, a.labels, z_loss=1e39),
    ),
    "label_smoothing of a list": (
        TypeError,
        "label_smoothing is [0.1], expected a number",
        lambda a: with_grad(a.x, a.labels, label_smoothing=[0.1], out=a.out),
    ),
    "label_smoothing of text": (
        TypeError,
        "label_smoothing is '0.1', expected a number",
        lambda a: with_grad(a.x, a.labels, label_smoothing="0.1", out=a.out),
    ),
    "label_smoothing above 1": (
        ValueError,
        "label_smoothing is 1.5, expected a number from 0 to 1",
        lambda a: with_grad(a.x, a.labels, label_smoothing=1.5, out=a.out),
    ),
    "label_smoothing below 0": (
        ValueError,
        "label_smoothing is -0.1, expected a number from 0 to 1",
        lambda a: with_grad(a.x, a.labels, label_smoothing=-0.1, out=a.out),
    ),
    "label_smoothing NaN": (
        ValueError,
        "label_smoothing is nan, expected a number from 0 to 1",
        lambda a: with_grad(a.x, a.labels, label_smoothing=np.nan, out=a.out),
    ),
    "ignore_index of a float": (
        TypeError,
        "ignore_index is -100.0, expected an int",
        lambda a: with_grad(a.x, a.labels, ignore_index=-100.0, out=a.out),
    ),
    "ignore_index None": (
        TypeError,
        "ignore_index is None, expected an int",
        lambda a: with_grad(a.x, a.labels, ignore_index=None, out=a.out),
    ),
    "ignore_index beyond 64 bits": (
        ValueError,
        "ignore_index is 9223372036854775808, expected a 64-bit integer",
        lambda a: with_grad(a.x, a.labels, ignore_index=2**63, out=a.out),
    ),
    "unknown reduction": (
        ValueError,
        "reduction is 'average', expected 'none', 'mean' or 'sum'",
        lambda a: with_grad(a.x, a.labels, reduction="average", out=a.out),
    ),
    "reduction None": (
        ValueError,
        "reduction is None, expected 'none', 'mean' or 'sum'",
        lambda a: with_grad(a.x, a.labels, reduction=None, out=a.out),
    ),
    # dtypes
    "unknown dtype": (
        TypeError,
        f"dtype is 'float8', {FLOATING}",
        lambda a: softmax(a.x, dtype="float8"),
    ),
    "integer dtype": (
        TypeError,
        f"dtype is <class 'numpy.int32'>, {FLOATING}",
        lambda a: logsumexp(a.x, dtype=np.int32),
    ),
    "dtype and out": (
        TypeError,
        "dtype is float16 but out has dtype float32; give only one of them: out decides the dtype",
        lambda a: softmax(a.x, dtype="float16", out=a.out),
    ),
    "integer out": (
        TypeError,
        f"out has dtype int32, {FLOATING}; convert it first",
        lambda a: softmax(a.x, out=a.integer_out),
    ),
    "indices of floats": (
        TypeError,
        "out has dtype float32, expected int64: indices",
        lambda a: gpusoftmax.argmax(a.x, out=a.row_out),
    ),
    "gradient of another dtype": (
        TypeError,
        "dprobs has dtype float16, expected float32 to match probs",
        lambda a: softmax_backward(a.x, a.half, out=a.out),
    ),
    "gradient of another dtype, log": (
        TypeError,
        "dlog_probs has dtype float32, expected float16 to match log_probs",
        lambda a: log_softmax_backward(a.half, a.x, out=a.out),
    ),
    "tangent of another dtype": (
        TypeError,
        "tangent has dtype float16, expected float32 to match probs",
        lambda a: gpusoftmax.softmax_jvp(a.x, a.half, out=a.out),
    ),
    "labels of floats": (
        TypeError,
        "target has dtype float64, expected an integer dtype: class indices, or probabilities of the shape of logits",
        lambda a: with_grad(a.x, a.float_labels, out=a.out),
    ),
    # shapes
    "gradient of another shape": (
        ValueError,
        "dprobs has shape (3, 3), expected (3, 4) to match probs",
        lambda a: softmax_backward(a.x, a.short, out=a.out),
    ),
    "gradient of another shape, log": (
        ValueError,
        "dlog_probs has shape (3, 3), expected (3, 4) to match log_probs",
        lambda a: log_softmax_backward(a.x, a.short, out=a.out),
    ),
    "out of another shape": (
        ValueError,
        "out has shape (3, 5), expected (3, 4) to match the result",
        lambda a: softmax(a.x, out=a.wide_out),
    ),
    "out without the reduced axis": (
        ValueError,
        "out has shape (3,), expected (3, 1) to match the result",
        lambda a: logsumexp(a.x, keepdims=True, out=a.row_out),
    ),
    "labels of another shape": (
        ValueError,
        "target has shape (3,), expected (2, 3) to match logits (2, 3, 4) without axis -1",
        lambda a: cross_entropy(a.cube, a.labels),
    ),
    "weight of another shape": (
        ValueError,
        "weight has shape (3,), expected (4,) one factor for each class",
        lambda a: with_grad(a.x, a.labels, a.short_weight, out=a.out),
    ),
    "logits of the target of another shape": (
        ValueError,
        "target_logits has shape (3, 3), expected (3, 4) to match logits",
        lambda a: kl_div(a.x, a.short, out=a.out),
    ),
    "logits of the target of another dtype": (
        TypeError,
        "target_logits has dtype float16, expected float32 to match logits",
        lambda a: kl_div(a.x, a.half, out=a.out),
    ),
    "weights of rows of another shape": (
        ValueError,
        "row_weight has shape (4,), expected (3,) to match logits (3, 4) without axis -1",
        lambda a: kl_div(a.x, a.x, row_weight=a.weight, out=a.out),
    ),
    "targets of neither shape": (
        ValueError,
        "target has shape (4,), expected (3,) or (3, 'K') to match logits (3, 4) without axis -1",
        lambda a: gpusoftmax.token_logprobs(a.x, a.four_labels),
    ),
    "more tokens than there are": (
        ValueError,
        "k is 5, expected 1 to 4, the number of columns",
        lambda a: gpusoftmax.top_logprobs(a.x, 5),
    ),
    "no tokens": (
        ValueError,
        "k is 0, expected 1 to 4, the number of columns",
        lambda a: gpusoftmax.top_logprobs(a.x, 0),
    ),
    "half a token": (
        TypeError,
        "k is 1.5, expected an int",
        lambda a: gpusoftmax.top_logprobs(a.x, 1.5),
    ),
    "a gradient of another shape": (
        ValueError,
        "dlogprob has shape (4,), expected (3,) to match what it is the gradient of",
        lambda a: gpusoftmax.token_logprobs_backward(a.x, a.labels, a.weight, out=a.out),
    ),
    "no gradient at all": (
        ValueError,
        "dlogprob and dentropy are None, expected at least one of the gradients",
        lambda a: gpusoftmax.token_logprobs_backward(a.x, a.labels, None, out=a.out),
    ),
    # out
    "read-only out": (
        ValueError,
        "out is read-only, expected a writable array",
        lambda a: softmax(a.x, out=a.read_only),
    ),
    "out that repeats a row": (
        ValueError,
        "out has shape (3, 4) and strides (0, 1) (in elements): its elements overlap",
        lambda a: softmax(a.x, out=a.stretched_out),
    ),
    "out with rows that overlap": (
        ValueError,
        "out has shape (3, 4) and strides (2, 1) (in elements): its elements overlap",
        lambda a: log_softmax(a.x, out=a.overlapping_out),
    ),
    # labels
    "labels out of range": (
        IndexError,
        "target[1] (counted in C order) is -1, expected a class from 0 to 3 or ignore_index (-100)",
        lambda a: with_grad(a.x, a.bad_labels, validate=True, out=a.out),
    ),
    "labels out of range but for one": (
        IndexError,
        "target[2] (counted in C order) is 4, expected a class from 0 to 3 or ignore_index (-1)",
        lambda a: with_grad(a.x, a.bad_labels, ignore_index=-1, validate=True, out=a.out),
    ),
    # sampling
    "sampling at a negative temperature": (
        ValueError,
        "temperature is -1.0, expected a finite number above 0",
        lambda a: sample(a.x, temperature=-1, rng=0),
    ),
    "sampling at a temperature too small for float32": (
        ValueError,
        "temperature is 1e-39, expected at least 5.88e-39 for arithmetic in float32",
        lambda a: sample(a.x, temperature=1e-39, rng=0),
    ),
    "top_k 0": (
        ValueError,
        "top_k is 0, expected at least 1; None keeps all",
        lambda a: sample(a.x, top_k=0, rng=0),
    ),
    "top_k of a float": (TypeError, "top_k is 5.0, expected an int", lambda a: sample(a.x, top_k=5.0, rng=0)),
    "top_p 0": (
        ValueError,
        "top_p is 0.0, expected a number above 0, at most 1",
        lambda a: sample(a.x, top_p=0, rng=0),
    ),
    "top_p NaN": (
        ValueError,
        "top_p is nan, expected a number above 0, at most 1",
        lambda a: sample(a.x, top_p=np.nan, rng=0),
    ),
    "min_p above 1": (
        ValueError,
        "min_p is 1.5, expected a number from 0 to 1",
        lambda a: sample(a.x, min_p=1.5, rng=0),
    ),
    "a mask of top_k 0": (
        ValueError,
        "top_k is 0, expected at least 1; None keeps all",
        lambda a: gpusoftmax.top_k_mask_logits(a.x, 0, out=a.out),
    ),
    "a mask of top_p above 1": (
        ValueError,
        "top_p is 1.5, expected a number above 0, at most 1",
        lambda a: gpusoftmax.top_p_mask_logits(a.x, 1.5, out=a.out),
    ),
    "temperatures of integers": (
        TypeError,
        f"temperature has dtype int64, {FLOATING}; convert it first",
        lambda a: sample(a.x, temperature=a.labels, rng=0),
    ),
    "minima of another shape": (
        ValueError,
        "min_p has shape (4,), expected (3,), one for each row, or a single one",
        lambda a: sample(a.x, min_p=a.weight, rng=0),
    ),
    "counts of floats": (
        TypeError,
        "top_k has dtype float64, expected an integer dtype",
        lambda a: sample(a.x, top_k=a.float_labels, rng=0),
    ),
    "no rng": (
        TypeError,
        "rng is None, expected a seed or (seed, step): ints or arrays of integers",
        lambda a: sample(a.x, rng=None),
    ),
    "an rng of three": (
        TypeError,
        "rng is (1, 2, 3), expected a seed or (seed, step): ints or arrays of integers",
        lambda a: sample(a.x, rng=(1, 2, 3)),
    ),
    "a seed of True": (
        TypeError,
        "rng is (True, 0), expected a seed or (seed, step): ints or arrays of integers",
        lambda a: sample(a.x, rng=(True, 0)),
    ),
    "a seed beyond 64 bits": (
        ValueError,
        "rng is 18446744073709551616, expected 64-bit integers",
        lambda a: sample(a.x, rng=2**64),
    ),
    "seeds of floats": (
        TypeError,
        "seed has dtype float64, expected an integer dtype",
        lambda a: sample(a.x, rng=a.float_labels),
    ),
    "steps of another shape": (
        ValueError,
        "step has shape (3,), expected (2, 3), one for each row, or a single one",
        lambda a: sample(a.cube, rng=(0, a.labels)),
    ),
    "sampling from no classes": (
        ValueError,
        "logits has 0 classes, expected at least 1",
        lambda a: sample(a.no_classes, rng=0),
    ),
    # states of log-sum-exp
    "half a row": (TypeError, "n_rows is 0.5, expected an int", lambda a: State.empty(0.5, like=a.x)),
    "fewer rows than none": (ValueError, "n_rows is -1, expected 0 or more", lambda a: State.empty(-1, like=a.x)),
    "columns of other rows": (
        ValueError,
        "columns has shape (2, 3, 4), expected (3, n_cols): the rows of the state",
        lambda a: state_with(a.x).update(a.cube),
    ),
    "columns of float64": (
        TypeError,
        "columns has dtype float64, but the state is computed in float32: convert them, or make the state with "
        "like= of float64",
        lambda a: State.empty(3, like=a.x).update(a.doubles),
    ),
    "columns inside a chunk": (
        ValueError,
        "first_col is 100, expected a multiple of 2048, where a chunk begins",
        lambda a: state_with(a.x, 100),
    ),
    "columns before the first": (
        ValueError,
        "first_col is -2048, expected a multiple of 2048, where a chunk begins",
        lambda a: state_with(a.x, -2048),
    ),
    "a first column of a float": (
        TypeError,
        "first_col is 0.0, expected an int",
        lambda a: state_with(a.x, 0.0),
    ),
    "columns that are there": (
        ValueError,
        "columns are 2048 to 2050, but the state has 2048 to 2051 already",
        lambda a: state_with(a.x, 2048).update(a.short, 2048),
    ),
    "columns behind the last": (
        ValueError,
        "columns are 4096 to 4099 and the state has 2048 to 2051: only the last columns of all may end elsewhere than "
        "at a multiple of 2048",
        lambda a: state_with(a.x, 2048).update(a.x, 4096),
    ),
    "last columns before others": (
        ValueError,
        "other has 0 to 3 and the state has 2048 to 2051: only the last columns of all may end elsewhere than at a "
        "multiple of 2048",
        lambda a: state_with(a.x, 2048).merge(state_with(a.x)),
    ),
    "an array for a state": (
        TypeError,
        "other is 3, expected a LogSumExpState",
        lambda a: state_with(a.x).merge(3),
    ),
    "a state of other rows": (
        ValueError,
        "other has 2 rows, expected 3 as the state has",
        lambda a: state_with(a.x).merge(State.empty(2, like=a.x)),
    ),
    "a state of another dtype": (
        TypeError,
        "other is computed in float64, expected float32 as the state is",
        lambda a: state_with(a.x).merge(State.empty(3, like=a.doubles)),
    ),
    "a state of another temperature": (
        ValueError,
        "other has temperature 0.5, expected 1.0 as the state has",
        lambda a: state_with(a.x).merge(State.empty(3, like=a.x, temperature=0.5)),
    ),
    "a table of half types": (
        TypeError,
        "table has dtype float16, expected float32 or float64, as it was made",
        lambda a: State.from_table(a.half, ((0, 4),)),
    ),
    "a table of another shape": (
        ValueError,
        "table has shape (2, 3, 4), expected (n_rows, 2, 4) for its columns",
        lambda a: State.from_table(a.cube, ((0, 4000),)),
    ),
    "columns that are no pairs": (
        TypeError,
        "columns is (0, 4000), expected ((first, stop), ...) in ascending order, at multiples of 2048 but for the last "
        "stop",
        lambda a: State.from_table(a.cube, (0, 4000)),
    ),
    "columns that end inside a chunk": (
        ValueError,
        "columns is ((0, 100), (2048, 4096)), expected ((first, stop), ...) in ascending order, at multiples of 2048 "
        "but for the last stop",
        lambda a: State.from_table(a.cube, ((0, 100), (2048, 4096))),
    ),
    # a linear layer
    "features that do not fit": (
        ValueError,
        "linear_weight has shape (3, 3), expected (n_classes, 4) to match input (3, 4)",
        lambda a: linear(a.x, a.short, a.labels),
    ),
    "input without features": (
        ValueError,
        "input has shape (), expected (..., n_features)",
        lambda a: linear(a.scalar, a.x, a.labels),
    ),
    "a layer without classes": (
        ValueError,
        "linear_weight has 0 classes, expected at least 1",
        lambda a: linear(a.x, a.no_rows, a.labels),
    ),
    "a layer of another dtype": (
        TypeError,
        "linear_weight has dtype float16, expected float32 to match input",
        lambda a: linear(a.x, a.half, a.labels),
    ),
    "a bias of another shape": (
        ValueError,
        "linear_bias has shape (4,), expected (3,) one number for each class",
        lambda a: linear(a.x, a.x, a.labels, linear_bias=a.weight),
    ),
    "labels of a layer of another shape": (
        ValueError,
        "target has shape (4,), expected (3,) to match input (3, 4) without its last axis",
        lambda a: linear(a.x, a.x, a.four_labels),
    ),
    "gradients of losses of another shape": (
        ValueError,
        "grad_scale has shape (4,), expected (3,) one number for each row",
        lambda a: linear(a.x, a.x, a.labels, grad_scale=a.weight),
    ),
    "a chunk of no rows": (
        ValueError,
        "chunk_size is 0, expected at least 1; None chooses it",
        lambda a: linear(a.x, a.x, a.labels, chunk_size=0),
    ),
    "a chunk of half a row": (
        TypeError,
        "chunk_size is 0.5, expected an int or None",
        lambda a: linear(a.x, a.x, a.labels, chunk_size=0.5),
    ),
    "row weights of a layer of another shape": (
        ValueError,
        "row_weight has shape (4,), expected (3,) one factor for each row",
        lambda a: linear(a.x, a.x, a.labels, row_weight=a.weight),
    ),
    "several normalizers of a layer": (
        ValueError,
        "normalizer has shape (4,), expected one element",
        lambda a: linear(a.x, a.x, a.labels, normalizer=a.weight),
    ),
    "a normalizer of the losses of a layer's rows": (
        ValueError,
        "normalizer is given and reduction is 'none', expected 'mean', which divides by it",
        lambda a: linear(a.x, a.x, a.labels, reduction="none", normalizer=3),
    ),
    "a layer with a temperature for each row": (
        TypeError,
        "temperature is [1.0, 2.0, 3.0], expected one number, or, where rows may have their own, an array of these",
        lambda a: linear(a.x, a.x, a.labels, temperature=[1.0, 2.0, 3.0]),
    ),
    "a layer with a softcap of 0": (
        ValueError,
        "softcap is 0.0, expected a finite number above 0; None leaves it out",
        lambda a: linear(a.x, a.x, a.labels, softcap=0),
    ),
    "a layer with a z_loss below 0": (
        ValueError,
        "z_loss is -1.0, expected a finite number, 0 or above",
        lambda a: linear(a.x, a.x, a.labels, z_loss=-1.0),
    ),
    # everything that a loss may have
    "a normalizer of 0": (
        ValueError,
        "normalizer is 0.0, expected a finite number above 0, or an array of one element",
        lambda a: with_grad(a.x, a.labels, normalizer=0, out=a.out),
    ),
    "a normalizer of a sum": (
        ValueError,
        "normalizer is given and reduction is 'sum', expected 'mean', which divides by it",
        lambda a: with_grad(a.x, a.labels, normalizer=3, reduction="sum", out=a.out),
    ),
    "several normalizers": (
        ValueError,
        "normalizer has shape (4,), expected one element",
        lambda a: with_grad(a.x, a.labels, normalizer=a.weight, out=a.out),
    ),
    "z_loss below 0": (
        ValueError,
        "z_loss is -1.0, expected a finite number, 0 or above",
        lambda a: with_grad(a.x, a.labels, z_loss=-1.0, out=a.out),
    ),
    "correct predictions of soft targets": (
        ValueError,
        "return_correct is given, and target has shares, expected one class index for each row",
        lambda a: with_grad(a.x, a.x, return_correct=True, out=a.out),
    ),
    "shares of one label for each row": (
        ValueError,
        "target[0] has shape (3,), expected (3, 'K') to match logits (3, 4) without axis -1",
        lambda a: with_grad(a.x, (a.labels, a.row_out), out=a.out),
    ),
    "shares of other labels": (
        ValueError,
        "target[1] has shape (3, 4), expected (3, 2) one share for each index of target[0]",
        lambda a: with_grad(a.x, (a.label_pairs, a.x), out=a.out),
    ),
    "shares of no labels": (
        ValueError,
        "target[0] has shape (3, 0), expected one label or more for each row",
        lambda a: with_grad(a.x, (a.no_labels, a.no_shares), out=a.out),
    ),
    "row weights of another shape": (
        ValueError,
        "row_weight has shape (4,), expected (3,) one factor for each row",
        lambda a: with_grad(a.x, a.labels, row_weight=a.weight, out=a.out),
    ),
    # names
    "an op that there is not": (
        ValueError,
        "op is 'softmx', expected one of softmax, softmax_backward, softmax_jvp, "
        "log_softmax, log_softmax_backward, logsumexp, cross_entropy, cross_entropy_with_grad, "
        "cross_entropy_backward, token_logprobs, token_logprobs_backward, top_logprobs, argmax, "
        "soft_argmax, soft_argmax_backward, spatial_softmax, spatial_softmax_backward, sample, "
        "top_k_mask_logits, top_p_mask_logits, topk_softmax, kl_div, kl_div_with_grad",
        lambda a: gpusoftmax.compile(arch="sm_90", ops=["softmx"]),
    ),
    "ops in a string": (
        TypeError,
        "ops is 'softmax', expected a sequence: put a single one into a list",
        lambda a: gpusoftmax.compile(arch="sm_90", ops="softmax"),
    ),
    "an arch that is a number": (
        TypeError,
        "arch is 90, expected a sequence: put a single one into a list",
        lambda a: gpusoftmax.compile(arch=90, ops=[]),
    ),
    "names in an array": (
        ValueError,
        "empty_row is array([1., 1.]), expected one of nan, zero",
        lambda a: softmax(a.x, empty_row=np.ones(2), out=a.out),
    ),
    # numbers and arrays that NumPy or torch would complain about in their own words
    "complex softcap of NumPy": (
        TypeError,
        "softcap is np.complex64(2+1j), expected a number",
        lambda a: softmax(a.x, softcap=np.complex64(2 + 1j), out=a.out),
    ),
    "mask of text": (
        TypeError,
        "mask has dtype str32, expected bool, or int32 with a bit for each column along one axis; True, or 1, keeps a "
        "logit",
        lambda a: softmax(a.x, mask=np.full(4, "a"), out=a.out),
    ),
    "n_valid of text": (
        TypeError,
        "n_valid has dtype str32, expected an integer dtype: numbers of columns",
        lambda a: softmax(a.x, n_valid=np.full(3, "a"), out=a.out),
    ),
    "top_k of text": (
        TypeError,
        "top_k has dtype str32, expected an integer dtype",
        lambda a: gpusoftmax.top_k_mask_logits(a.x, np.full(3, "a"), out=a.out),
    ),
    "token_logprobs without a target": (
        TypeError,
        "target has dtype object, expected an integer dtype: class indices, not probabilities",
        lambda a: gpusoftmax.token_logprobs(a.x, None),
    ),
    "rows of unequal lengths": (
        ValueError,
        "x is [[1.0, 2.0], [3.0]], expected an array, or nested lists of equal lengths: setting an array element with "
        "a sequence. The requested array has an inhomogeneous shape after 1 dimensions. The detected shape was (2,) + "
        "inhomogeneous part.",
        lambda a: softmax([[1.0, 2.0], [3.0]]),
    ),
    # what a call is explained or compiled with
    "an option that the op has not": (
        TypeError,
        "softmax_jvp has no option mask, expected some of tangent, axis, temperature, out",
        lambda a: gpusoftmax.explain("softmax_jvp", (2, 4), mask="bool"),
    ),
    "a word that is no dtype": (
        TypeError,
        "mask is 'bits', expected what the call is given: a number, an array, or for an array its dtype, such as "
        "'float32' (of a mask 'bool', or 'int32' for bits)",
        lambda a: gpusoftmax.explain("softmax", (2, 4), mask="bits"),
    ),
    "options of every op": (
        ValueError,
        "softcap is given and ops is None, expected the ops whose calls have it",
        lambda a: gpusoftmax.compile("sm_90", softcap=30.0),
    ),
    "kernels of an axis": (
        TypeError,
        "axis is given, expected none: kernels are compiled for rows along every axis",
        lambda a: gpusoftmax.compile("sm_90", ["softmax"], axis=0),
    ),
    # the shape that a call is explained for
    "a shape that is a number": (
        TypeError,
        "shape is 3, expected a tuple of ints",
        lambda a: gpusoftmax.explain("softmax", 3),
    ),
    "a shape without elements": (
        ValueError,
        "shape is (2, 0), expected at least one size, and all of them above 0",
        lambda a: gpusoftmax.explain("softmax", (2, 0)),
    ),
}


# Text -> a call with NumPy arrays `a` and arrays `d` on an emulated device, which are the same otherwise.
MIXED = {
    "input is a CUDA array on GPU 0 of a library that is not known to multiply matrices, expected CuPy arrays or torch "
    "tensors: convert it by DLPack": lambda a, d: linear(d.x, d.x, d.labels),
    "input is a NumPy array on the CPU and linear_weight is a CUDA array on GPU 0; expected both from one library on "
    "one device: move one of them first": lambda a, d: linear(a.x, d.x, a.labels),
    "logits is a CUDA array on GPU 0 and seed is a NumPy array on the CPU; expected both from one library on one "
    "device: move one of them first": lambda a, d: sample(d.x, rng=a.labels),
    "probs is a NumPy array on the CPU and dprobs is a CUDA array on GPU 0; expected both from one library on one "
    "device: move one of them first": lambda a, d: softmax_backward(a.x, d.x, out=a.out),
    "logits is a CUDA array on GPU 0 and target is a NumPy array on the CPU; expected both from one library on one "
    "device: move one of them first": lambda a, d: with_grad(d.x, a.labels, out=d.out),
    "logits is a NumPy array on the CPU and weight is a CUDA array on GPU 0; expected both from one library on one "
    "device: move one of them first": lambda a, d: with_grad(a.x, a.labels, d.weight, out=a.out),
}
# Text -> a call with arrays that lie in one memory.
OVERLAPPING = {
    "out overlaps x in part; expected x itself (in place) or memory of its own": lambda memory, labels: softmax(
        memory[:12].reshape(3, 4), out=memory[4:16].reshape(3, 4)
    ),
    "out shares memory with target, which is read while out is written": lambda memory, labels: with_grad(
        memory[:12].reshape(3, 4), labels, out=memory[16:28].reshape(3, 4)
    ),
}


OF_ITS_MEMORY = ("read-only out", "out that repeats a row", "out with rows that overlap")


@pytest.mark.parametrize("case", CASES)
def test_message(target, case):
    if target.name == "gpu" and case in OF_ITS_MEMORY:
        pytest.skip("CuPy copies what it is given, to ordinary memory")
    kind, text, call = CASES[case]
    host = host_arrays()
    placed = SimpleNamespace(**{name: target.array(array) for name, array in host.items()})
    before = {name: array.tobytes() for name, array in host.items()}
    with pytest.raises(kind) as raised:
        call(placed)
    assert str(raised.value) == text
    assert type(raised.value) is kind
    for name, content in before.items():
        assert target.get(getattr(placed, name)).tobytes() == content, name


def on_both(gpu):
    host = host_arrays()
    return SimpleNamespace(**host), SimpleNamespace(**{name: gpu.array(array) for name, array in host.items()})


@pytest.mark.parametrize("text", MIXED)
def test_mixed_homes(text):
    with emulated_gpu("sm_90", track=False) as gpu:
        a, d = on_both(gpu)
        with pytest.raises(TypeError) as raised:
            MIXED[text](a, d)
        assert str(raised.value) == text
        assert (gpu.get(d.out) == 7).all() and (a.out == 7).all() and not gpu.stats


@pytest.mark.parametrize("text", OVERLAPPING)
def test_overlaps(text):
    memory = np.zeros(40)
    with pytest.raises(ValueError) as raised:
        OVERLAPPING[text](memory, memory[20:23].view(np.int64))
    assert str(raised.value) == text
    assert not memory.any()


def two_streams():
    """Device arrays on streams that nothing orders."""
    with emulated_gpu("sm_90", track=False) as gpu:
        logits = gpu.array(inputs.make("spread", (3, 4), F32))
        with gpu.stream(9):
            out = gpu.array(np.full((3, 4), 7, F32))
        softmax(logits, out=out)


def test_two_streams():
    with pytest.raises(ValueError, match="the input is on stream 7 and out on stream 9, expected one stream"):
        two_streams()


def too_many_columns():
    logsumexp(np.broadcast_to(F32.type(0), (1, 2**31)))


def test_too_many_columns():
    with pytest.raises(ValueError) as raised:
        too_many_columns()
    assert str(raised.value) == "the reduced axis has 2147483648 elements, expected at most 2147483647 (2^31 - 1)"


def test_every_message_has_a_case():
    """Each `raise` of _checks.py is the origin of an error above."""
    with open(_checks.__file__) as file:
        source = ast.parse(file.read())
    raises = {(node.lineno, node.end_lineno) for node in ast.walk(source) if isinstance(node, ast.Raise)}
    memory, reached = np.zeros(40), set()
    with emulated_gpu("sm_90", track=False) as gpu:
        a, d = on_both(gpu)
        calls = [partial(call, a) for _, _, call in CASES.values()]
        calls += [partial(call, a, d) for call in MIXED.values()]
        calls += [partial(call, memory, memory[20:23].view(np.int64)) for call in OVERLAPPING.values()]
        for call in [*calls, too_many_columns, two_streams]:
            try:
                call()
            except (TypeError, ValueError, IndexError) as error:
                frames = traceback.extract_tb(error.__traceback__)
                reached |= {frame.lineno for frame in frames if frame.filename == _checks.__file__}
    missing = [lines for lines in sorted(raises) if not reached & set(range(lines[0], lines[1] + 1))]
    assert not missing, f"no case reaches these lines of _checks.py: {missing}"


def test_errors_come_alone():
    """Not as what happened while another exception was handled, that of an option which cannot be a key."""
    with emulated_gpu("sm_90") as gpu:
        for x in (np.ones((2, 3)), gpu.array(np.ones((2, 3))), [[1.0]]):
            with pytest.raises(TypeError, match="temperature is") as raised:
                softmax(x, temperature=[])
            assert raised.value.__cause__ is None
            assert raised.value.__context__ is None or raised.value.__suppress_context__


def test_long_values_are_not_printed():
    """A message stays a line, whatever was passed."""
    for call in (
        lambda: softmax([1.0], temperature=list(range(1000))),
        lambda: with_grad([[1.0]], [0], grad_scale=np.zeros(1000)),
        lambda: with_grad([[1.0]], [0], label_smoothing=list(range(1000))),
        lambda: with_grad([[1.0]], [0], ignore_index=list(range(1000))),
        lambda: softmax([1.0], dtype=np.zeros((40, 40))),
        lambda: softmax([1.0], axis=np.zeros((40, 40))),
        lambda: cross_entropy([[1.0]], [0], reduction="m" * 1000),
    ):
        with pytest.raises((TypeError, ValueError)) as raised:
            call()
        assert len(str(raised.value)) < 200 and "\n" not in str(raised.value)
