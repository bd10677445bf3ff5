"""The oracle against sums done by hand, 120-digit decimals without any of its tricks, and difference quotients."""

from decimal import Decimal, localcontext
from math import inf, log, nan

import numpy as np
import pytest

from tests import inputs, oracle

EPS = np.finfo(np.longdouble).eps  # 2^-63 on x86-64; the tests ask for no more than the platform's longdouble
LN3 = log(3)  # logits (0, LN3) have the probabilities 1/4, 3/4


def close(got, expected, units=64):
    np.testing.assert_allclose(np.asarray(got, np.longdouble), np.asarray(expected, np.longdouble), units * EPS, 0)


def close_float64(got, expected):
    """For values that were worked out in float64."""
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=2e-15, atol=1e-16)


# Against decimals


def decimal(value):
    """Exact, in parts that a float64 holds."""
    high = float(value)
    return Decimal(high) + Decimal(float(np.longdouble(value) - np.longdouble(high)))


def from_decimal(value):
    high = float(value)
    return np.longdouble(high) + np.longdouble(float(value - Decimal(high)))


def decimal_row(row, temperature=1.0):
    """(probs, log_probs, lse) of a row by definition: 120 digits, so that even 1 + exp(-80) loses nothing."""
    with localcontext(prec=120):
        scaled = [decimal(x) / Decimal(temperature) for x in row]
        total = sum(x.exp() for x in scaled)
        lse = total.ln()
        return [x.exp() / total for x in scaled], [x - lse for x in scaled], lse


def decimal_losses(rows, labels, weights, eps):
    with localcontext(prec=120):
        weights, eps = [decimal(w) for w in weights], Decimal(eps)
        losses = []
        for row, label in zip(rows, labels, strict=True):
            _, log_probs, _ = decimal_row(row)
            smooth = sum(-w * y for w, y in zip(weights, log_probs, strict=True)) / len(row)
            losses.append((1 - eps) * weights[label] * -log_probs[label] + eps * smooth)
        return losses


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", sorted(inputs.FAMILIES.keys() - {"masked", "huge"}))
def test_row_functions_against_decimals(family, temperature):
    rows = inputs.make(family, (5, 9), np.float32)
    probs, log_probs, lse = zip(*(decimal_row(row, temperature) for row in rows), strict=True)
    units = 64 + 2 * 80 / temperature  # rounding (x - max) / T costs exp that many units
    close(oracle.softmax(rows, temperature=temperature), np.vectorize(from_decimal)(probs), units)
    close(oracle.log_softmax(rows, temperature=temperature), np.vectorize(from_decimal)(log_probs), units)
    error = oracle.logsumexp(rows, temperature=temperature) - np.vectorize(from_decimal)(lse)
    scale = np.abs(rows).max(axis=1) / temperature + 3  # lse may be the small difference of two such terms
    assert np.all(np.abs(error) <= 4 * EPS * scale)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("family", ["spread", "confident", "offset"])
def test_cross_entropy_against_decimals(family, label_smoothing):
    rows = inputs.make(family, (5, 9), np.float32)
    labels = inputs.targets_at_max(rows)
    weight = np.linspace(0.5, 2, 9, dtype=np.float32)
    expected = np.vectorize(from_decimal)(decimal_losses(rows, labels, weight, label_smoothing))
    options = {"label_smoothing": label_smoothing}
    close(oracle.cross_entropy(rows, labels, weight, reduction="none", **options), expected, 256)
    close(oracle.cross_entropy(rows, labels, weight, reduction="sum", **options), expected.sum(), 256)
    mean = expected.sum() / weight[labels].astype(np.longdouble).sum()
    close(oracle.cross_entropy(rows, labels, weight, **options), mean, 256)


def test_loss_of_a_confident_row_is_not_lost():
    logits = np.zeros((1, 1000), np.float32)
    logits[0, 3] = 30
    assert oracle.cross_entropy(logits, [3]) == pytest.approx(999 * np.exp(-30.0), rel=1e-12)  # 9.35e-11
    logits[0, 3] = 80
    close(oracle.cross_entropy(logits, [3]), 999 * np.exp(np.longdouble(-80)))


@pytest.mark.parametrize("dtype", inputs.DTYPES, ids=str)
def test_narrow_types_are_widened_exactly(dtype):
    rows = inputs.make("spread", (3, 17), dtype)
    np.testing.assert_array_equal(oracle.softmax(rows), oracle.softmax(rows.astype(np.float64)))


# Worked out by hand


def test_two_columns_by_hand():
    logits = np.array([[0, LN3]])
    close_float64(oracle.softmax(logits), [[0.25, 0.75]])
    close_float64(oracle.log_softmax(logits), [[-log(4), log(0.75)]])
    close_float64(oracle.logsumexp(logits), [log(4)])
    close_float64(oracle.logsumexp(logits, temperature=0.5), [log(10)])
    close_float64(oracle.softmax(logits, temperature=0.5), [[0.1, 0.9]])
    close_float64(oracle.soft_argmax(logits), [0.75])
    close_float64(oracle.soft_argmax(logits, temperature=0.5), [0.9])
    close_float64(oracle.soft_argmax_backward(logits, [0.75], [2.0]), [[-0.375, 0.375]])
    assert oracle.argmax(logits) == [1]
    even = np.zeros((1, 2))
    close_float64(oracle.kl_div(even, logits), log(0.75) * 0.75 + log(0.25) * 0.25 + log(2))
    close_float64(oracle.kl_div(logits, even, reduction="none"), [-log(0.75) / 2 - log(0.25) / 2 - log(2)])
    close_float64(oracle.kl_div(logits, even, row_weight=[3.0], normalizer=6), log(2 / 3**0.5) / 2)
    of_logits, of_target = oracle.kl_div_grads(even, logits, grad_scale=2.0)
    close_float64(of_logits, [[0.5, -0.5]])
    close_float64(of_target, [[-0.375 * LN3, 0.375 * LN3]])  # the derivative of log 3 (p_1 - 3/4) is p_0 p_1 log 3


def test_divergences_at_the_edges():
    inf, nan = np.inf, np.nan
    x = np.array([[0, -inf], [0, 0], [0, -inf], [0, nan], [-inf, -inf], [nan, nan], [1e-9, 0]])
    y = np.array([[0, 0], [0, -inf], [3, -inf], [0, 0], [0, 0], [0, 0], [0, 0]])
    weights = [1, 1, 1, 1, 1, 0, 1]
    loss = oracle.kl_div(x, y, row_weight=weights, reduction="none")
    close_float64(loss[1:3], [log(2), 0])
    close_float64(loss[6], 1e-18 / 8)  # half the variance of the differences: nothing has cancelled
    assert np.isposinf(loss[0]) and np.isnan(loss[3:5]).all() and loss[5] == 0
    of_logits, of_target = oracle.kl_div_grads(x, y, row_weight=weights, reduction="none")
    close_float64(of_logits[:3], [[0.5, -0.5], [-0.5, 0.5], [0, 0]])
    assert np.isnan(of_target[0]).all() and not of_target[1:3].any()
    assert not of_logits[5].any() and not of_target[5].any()


def test_an_image_by_hand():
    """Three pixels to a line, two lines; x first."""
    features = np.array([[0, LN3, -np.inf], [-np.inf, -np.inf, LN3 + log(4)]])  # 1/16, 3/16 and 12/16
    points = oracle.spatial_softmax(features)
    close_float64(points, [-1 / 16 + 12 / 16, -4 / 16 + 12 / 16])
    gradient = oracle.spatial_softmax_backward(features, points, [0.0, 1.0])
    close_float64(gradient, [[-1.5 / 16, -4.5 / 16, 0], [0, 0, 6 / 16]])


def test_temperature_per_row():
    close_float64(oracle.softmax([[0, LN3], [0, LN3]], temperature=[1.0, 0.5]), [[0.25, 0.75], [0.1, 0.9]])


def test_weights_smoothing_and_denominators_by_hand():
    logits, target, weight = np.array([[0, LN3]] * 4), np.array([0, 1, -100, 1]), np.array([2.0, 5.0])
    first, second = log(4), log(4 / 3)  # nll of the two columns
    rows = np.array([2 * first, 5 * second, 0, 5 * second])
    close_float64(oracle.cross_entropy(logits, target, weight, reduction="none"), rows)
    close_float64(oracle.cross_entropy(logits, target, weight, reduction="sum"), rows.sum())
    close_float64(oracle.cross_entropy(logits, target, weight), rows.sum() / (2 + 5 + 5))
    close_float64(oracle.cross_entropy(logits, target), (first + 2 * second) / 3)

    smooth = 0.2 / 2 * (2 * first + 5 * second)
    rows = 0.8 * rows + smooth * (target != -100)
    close_float64(oracle.cross_entropy(logits, target, weight, reduction="none", label_smoothing=0.2), rows)
    close_float64(oracle.cross_entropy(logits, target, weight, label_smoothing=0.2), rows.sum() / 12)


def test_gradient_by_hand():
    logits, target, weight = np.array([[0, LN3], [0, LN3]]), np.array([0, -100]), np.array([2.0, 5.0])
    gradient = oracle.cross_entropy_grad
    close_float64(gradient(logits, target, reduction="none"), [[-0.75, 0.75], [0, 0]])
    close_float64(gradient(logits, target, weight, reduction="sum"), [[-1.5, 1.5], [0, 0]])
    close_float64(gradient(logits, target, weight), [[-0.75, 0.75], [0, 0]])
    close_float64(gradient(logits, [0, 1], weight, grad_scale=14), [[-3, 3], [2.5, -2.5]])
    close_float64(gradient(logits, [0, 1], reduction="none", grad_scale=[3, 4]), [[-2.25, 2.25], [1, -1]])
    # 0.8 * 2 (p - one_hot) + 0.1 (7 p - w)
    close_float64(
        gradient(logits, target, weight, reduction="sum", label_smoothing=0.2),
        [[0.8 * -1.5 + 0.1 * (7 / 4 - 2), 0.8 * 1.5 + 0.1 * (21 / 4 - 5)], [0, 0]],
    )


def test_backward_by_hand():
    # p . g = 1/4 + 9/4 = 5/2
    close_float64(oracle.softmax_backward([[0.25, 0.75]], [[1.0, 3.0]]), [[-0.375, 0.375]])
    close_float64(oracle.log_softmax_backward([[log(0.25), log(0.75)]], [[1.0, 3.0]]), [[0, 0]])
    close_float64(oracle.log_softmax_backward([[log(0.25), log(0.75)]], [[1.0, 0.0]], temperature=0.5), [[1.5, -1.5]])


# Gradients as difference quotients


def quotient(function, x, step=1e-5):
    """Central differences of a scalar function of a longdouble array."""
    slopes = np.empty(x.shape, np.longdouble)
    for index in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        slopes[index] = (function(up) - function(down)) / (up[index] - down[index])
    return slopes


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weight", [None, np.linspace(0.5, 2, 5)], ids=["unweighted", "weighted"])
def test_gradient_is_the_slope_of_the_loss(reduction, label_smoothing, weight):
    logits = inputs.make("spread", (4, 5), np.float64).astype(np.longdouble) / 4
    target = np.array([4, -100, 0, 2])
    options = {"reduction": reduction, "label_smoothing": label_smoothing, "temperature": 1.5}
    slopes = quotient(lambda x: 3 * oracle.cross_entropy(x, target, weight, **options), logits)
    gradient = oracle.cross_entropy_grad(logits, target, weight, grad_scale=3, **options)
    np.testing.assert_allclose(gradient.astype(float), slopes.astype(float), rtol=0, atol=1e-8)


@pytest.mark.parametrize("axis", [-1, 0, None])
def test_backwards_are_the_slopes_of_the_forwards(axis):
    logits = inputs.make("spread", (3, 4), np.float64).astype(np.longdouble) / 4
    upstream = inputs.make("spread", (3, 4), np.float64, seed=1)
    for forward, backward in (
        (oracle.softmax, oracle.softmax_backward),
        (oracle.log_softmax, oracle.log_softmax_backward),
    ):
        slopes = quotient(lambda x, forward=forward: (upstream * forward(x, axis, temperature=0.8)).sum(), logits)
        gradient = backward(forward(logits, axis, temperature=0.8), upstream, axis, temperature=0.8)
        np.testing.assert_allclose(gradient.astype(float), slopes.astype(float), rtol=0, atol=1e-8)


# Axes and shapes


@pytest.mark.parametrize("axis", [0, 1, 2, -1, (0, 2), (2, 0), (1, 2), (-1, 0, 1), None])
def test_axes(axis):
    x = inputs.make("spread", (3, 4, 5), np.float64)
    exponentials = np.exp(x.astype(np.longdouble))
    total = exponentials.sum(axis=axis, keepdims=True)
    close(oracle.softmax(x, axis), exponentials / total)
    close(oracle.logsumexp(x, axis, keepdims=True), np.log(total), 1e3)
    close(oracle.logsumexp(x, axis), np.log(exponentials.sum(axis=axis)), 1e3)


def test_class_axis_in_the_middle():
    logits, target = inputs.make("spread", (2, 7, 3), np.float32), inputs.targets(6, 7).reshape(2, 3)
    moved = np.moveaxis(logits, 1, -1)
    loss = oracle.cross_entropy(logits, target, axis=1, reduction="none")
    np.testing.assert_array_equal(loss, oracle.cross_entropy(moved, target, reduction="none"))
    gradient = oracle.cross_entropy_grad(logits, target, axis=1)
    np.testing.assert_array_equal(np.moveaxis(gradient, 1, -1), oracle.cross_entropy_grad(moved, target))


@pytest.mark.parametrize("axis", [-1, 0, None])
def test_zero_dimensions(axis):
    x = np.float32(3)
    assert oracle.softmax(x, axis).shape == () and oracle.softmax(x, axis) == 1
    assert oracle.log_softmax(x, axis) == 0
    assert oracle.logsumexp(x, axis) == 3
    assert oracle.logsumexp(x, axis, keepdims=True).shape == ()


def test_one_row_of_logits_takes_one_label():
    assert oracle.cross_entropy(np.zeros(4), np.int64(1), reduction="none") == pytest.approx(log(4))


@pytest.mark.parametrize("axis", [(), (0, 0), (0, -2)])
def test_bad_axes(axis):
    with pytest.raises(ValueError):
        oracle.softmax(np.zeros((2, 3)), axis)


def test_target_of_a_wrong_shape():
    with pytest.raises(ValueError, match="target"):
        oracle.cross_entropy(np.zeros((3, 3)), np.zeros((3, 1), np.int64))


# Edge cases: the table of the design, line by line


def test_row_all_minus_inf():
    x = np.array([[-inf, -inf], [0, 0]])
    np.testing.assert_array_equal(oracle.softmax(x), [[nan, nan], [0.5, 0.5]])
    np.testing.assert_array_equal(np.isnan(oracle.log_softmax(x)), [[True, True], [False, False]])
    assert oracle.logsumexp(x)[0] == -inf
    np.testing.assert_array_equal(np.isnan(oracle.cross_entropy(x, [0, 0], reduction="none")), [True, False])
    np.testing.assert_array_equal(np.isnan(oracle.cross_entropy_grad(x, [0, 0], reduction="none"))[:, 0], [True, False])


def test_some_minus_inf():
    x = np.array([[-inf, 0, -inf, LN3]])
    close_float64(oracle.softmax(x), [[0, 0.25, 0, 0.75]])
    close_float64(oracle.log_softmax(x), [[-inf, -log(4), -inf, log(0.75)]])
    close_float64(oracle.logsumexp(x), [log(4)])
    close_float64(oracle.cross_entropy(x, [1]), log(4))
    close_float64(oracle.cross_entropy_grad(x, [1]), [[0, -0.75, 0, 0.75]])


def test_plus_inf_makes_the_row_nan():
    x = np.array([[1, inf, -inf], [nan, inf, 0], [inf, inf, 0]])
    assert np.isnan(oracle.softmax(x)).all() and np.isnan(oracle.log_softmax(x)).all()
    np.testing.assert_array_equal(oracle.logsumexp(x), [inf, nan, inf])
    assert np.isnan(oracle.cross_entropy(x, [0, 0, 0], reduction="none")).all()
    assert np.isnan(oracle.cross_entropy_grad(x, [1, 1, 1], reduction="none")).all()


def test_nan_stays_in_its_row():
    x = np.array([[nan, 0], [0, 0]])
    for function in (oracle.softmax, oracle.log_softmax):
        np.testing.assert_array_equal(np.isnan(function(x)), [[True, True], [False, False]])
    np.testing.assert_array_equal(np.isnan(oracle.logsumexp(x)), [True, False])
    np.testing.assert_array_equal(np.isnan(oracle.cross_entropy(x, [1, 1], reduction="none")), [True, False])


@pytest.mark.parametrize("label", [-(2**63), -101, -99, -1, 2, 2**31, 2**32, 2**63 - 1])
def test_label_out_of_range_is_nan_in_its_row(label):
    x, target = np.zeros((3, 2)), np.array([0, label, 1])
    loss = oracle.cross_entropy(x, target, reduction="none")
    np.testing.assert_array_equal(np.isnan(loss), [False, True, False])
    gradient = oracle.cross_entropy_grad(x, target, reduction="none")
    np.testing.assert_array_equal(np.isnan(gradient), [[False] * 2, [True] * 2, [False] * 2])
    assert np.isnan(oracle.cross_entropy(x, target))
    # In a mean the row counts for nothing, so that the others' gradients keep their meaning.
    np.testing.assert_array_equal(oracle.cross_entropy_grad(x, target)[0], [-0.25, 0.25])


def test_unsigned_labels():
    target = np.array([1, 2**64 - 100, 2**64 - 1], np.uint64)
    np.testing.assert_array_equal(np.isnan(oracle.cross_entropy(np.zeros((3, 2)), target, reduction="none")), [0, 1, 1])


@pytest.mark.parametrize("ignore_index", [-100, -1, 1])
def test_ignored_row_is_zero_whatever_it_holds(ignore_index):
    x, target = np.array([[nan, inf], [0, 0]]), np.array([ignore_index, 0])
    options = {"ignore_index": ignore_index, "label_smoothing": 0.1}
    assert oracle.cross_entropy(x, target, reduction="none", **options)[0] == 0
    close_float64(oracle.cross_entropy(x, target, **options), log(2))
    assert np.all(oracle.cross_entropy_grad(x, target, **options)[0] == 0)


def test_all_labels_ignored():
    x, target = np.zeros((2, 3)), np.array([-100, -100])
    assert np.isnan(oracle.cross_entropy(x, target))
    assert oracle.cross_entropy(x, target, reduction="sum") == 0
    assert np.all(oracle.cross_entropy_grad(x, target) == 0)


def test_valid_rows_of_total_weight_zero():
    x, target, weight = np.zeros((2, 2)), np.array([0, -100]), np.array([0.0, 1.0])
    assert np.isnan(oracle.cross_entropy(x, target, weight))
    assert np.isnan(oracle.cross_entropy(x, target, weight, label_smoothing=0.5))
    np.testing.assert_array_equal(oracle.cross_entropy_grad(x, target, weight), [[nan, nan], [0, 0]])


def test_masked_target():
    x = np.array([[-inf, 0, 0]])
    assert oracle.cross_entropy(x, [0]) == inf
    close_float64(oracle.cross_entropy_grad(x, [0]), [[-1, 0.5, 0.5]])


def test_masked_column_and_smoothing():
    x = np.array([[-inf, 0, 0]])
    assert oracle.cross_entropy(x, [1], label_smoothing=0.3) == inf
    assert np.isnan(oracle.cross_entropy(x, [1], np.array([0.0, 1, 1]), label_smoothing=0.3))  # 0 * inf, as in torch
    close_float64(oracle.cross_entropy_grad(x, [1], label_smoothing=0.3), [[-0.1, 0.5 - 0.7 - 0.1, 0.5 - 0.1]])


def test_empty_batch():
    x, target = np.zeros((0, 3), np.float32), np.zeros(0, np.int64)
    assert oracle.softmax(x).shape == oracle.log_softmax(x).shape == (0, 3)
    assert oracle.logsumexp(x).shape == (0,) and oracle.logsumexp(x, keepdims=True).shape == (0, 1)
    assert oracle.cross_entropy(x, target, reduction="none").shape == (0,)
    assert oracle.cross_entropy(x, target, reduction="sum") == 0
    assert np.isnan(oracle.cross_entropy(x, target))
    assert oracle.cross_entropy_grad(x, target).shape == (0, 3)
    assert oracle.softmax_backward(x, x).shape == oracle.log_softmax_backward(x, x).shape == (0, 3)


def test_no_columns():
    x = np.zeros((2, 0), np.float32)
    assert oracle.softmax(x).shape == oracle.log_softmax(x).shape == (2, 0)
    np.testing.assert_array_equal(oracle.logsumexp(x), [-inf, -inf])
    for function in (oracle.cross_entropy, oracle.cross_entropy_grad):
        with pytest.raises(ValueError, match="columns"):
            function(x, [0, 0])
