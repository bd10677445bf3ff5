"""The softmax family by its textbook definitions, in np.longdouble. Shares no code with the library.

Each row of logits x, divided by a temperature T, with m = max x:

    s - 1   = (ties - 1) + sum over x_c < m of exp((x_c - m) / T)      ties = how many elements equal m
    lse     = m / T + log1p(s - 1)
    logp_c  = (x_c - m) / T - log1p(s - 1)                             two terms of one sign: nothing cancels
    p_c     = exp((x_c - m) / T) / s
    loss    = (1 - eps) w_y (-logp_y) + (eps / V) sum_c w_c (-logp_c)  torch's label smoothing, class weights w

s - 1 is never formed by subtraction, so a row whose target leads by 80 has its loss (exp(-80)) to full precision.

Arrays may have any dtype NumPy knows, ml_dtypes.bfloat16 included; widening to longdouble is exact. Where longdouble
is no wider than float64 (some platforms other than x86-64 and aarch64 Linux), results for float64 inputs carry errors
of a few units of 2^-53 themselves; the bounds in tolerances.py leave room for that, its 4-ulp goal does not.

Edge cases (all -inf rows, +inf, NaN, V = 0, ignored and out-of-range labels) follow the table in the design and are
spelled out one by one in test_oracle.py.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.lib.array_utils import normalize_axis_index, normalize_axis_tuple

NAN = np.longdouble("nan")
_quiet = np.errstate(all="ignore")  # NaN and infinities are answers here, not accidents


def softmax(x, axis=-1, *, temperature=1.0):
    """Probabilities; NaN for a whole row that has no finite maximum."""
    return from_rows(softmax_rows(to_rows(x, axis), row_temperature(temperature)), x, axis)


def log_softmax(x, axis=-1, *, temperature=1.0):
    """Log-probabilities in nats; NaN for a whole row that has no finite maximum."""
    return from_rows(log_softmax_rows(to_rows(x, axis), row_temperature(temperature)), x, axis)


def logsumexp(x, axis=-1, *, keepdims=False, temperature=1.0):
    """log(sum(exp(x / temperature))); -inf for a row that is empty or all -inf, +inf for one that holds +inf."""
    lse = logsumexp_rows(to_rows(x, axis), row_temperature(temperature))
    return lse.reshape(_row_shape(x, axis, keepdims))


def argmax(x, axis=-1, *, keepdims=False):
    """The first of the largest elements; the first NaN where there is one."""
    rows = to_rows(x, axis)
    if rows.shape[1] == 0:
        raise ValueError("argmax of rows without columns")
    leads = np.where(np.isnan(rows).any(axis=1, keepdims=True), np.isnan(rows), rows == _row_max(rows))
    return np.array([list(row).index(True) for row in leads], np.int64).reshape(_row_shape(x, axis, keepdims))


@_quiet
def soft_argmax(x, axis=-1, *, temperature=1.0, keepdims=False):
    """The expected column under the softmax; NaN for a row that has no finite maximum."""
    probs = softmax_rows(to_rows(x, axis), row_temperature(temperature))
    expected = (probs * np.arange(probs.shape[1])).sum(axis=1)
    return np.where(probs.shape[1] == 0, NAN, expected).reshape(_row_shape(x, axis, keepdims))


@_quiet
def soft_argmax_backward(x, expected, dexpected, axis=-1, *, temperature=1.0):
    """Gradient with respect to x: dexpected p_c (c - expected) / T."""
    temperature = row_temperature(temperature)
    probs = softmax_rows(to_rows(x, axis), temperature)
    expected, dexpected = (np.asarray(part).astype(np.longdouble).reshape(-1, 1) for part in (expected, dexpected))
    return from_rows(dexpected * probs * (np.arange(probs.shape[1]) - expected) / temperature, x, axis)


@_quiet
def spatial_softmax_backward(features, coordinates, dcoordinates, *, temperature=1.0):
    """Gradient with respect to the features: p_c (dx (x_c - x) + dy (y_c - y)) / T."""
    *_, height, width = np.shape(features)
    temperature = row_temperature(temperature)
    probs = softmax_rows(to_rows(features, (-2, -1)), temperature).reshape(-1, height, width)
    points, upstream = (
        np.asarray(part).astype(np.longdouble).reshape(-1, 2, 1, 1) for part in (coordinates, dcoordinates)
    )
    across = upstream[:, 0] * (pixel_coordinates(width) - points[:, 0])
    down = upstream[:, 1] * (pixel_coordinates(height)[:, None] - points[:, 1])
    return (probs * (across + down) / temperature).reshape(np.shape(features))


@_quiet
def spatial_softmax(features, *, temperature=1.0):
    """(x, y) expected under the softmax over all pixels of (..., height, width) maps; linspace(-1, 1, size) or 0."""
    *batch, height, width = np.shape(features)
    probs = softmax_rows(to_rows(features, (-2, -1)), row_temperature(temperature)).reshape(-1, height, width)
    x, y = (probs * pixel_coordinates(width)), (probs * pixel_coordinates(height)[:, None])
    return np.stack([x.sum(axis=(1, 2)), y.sum(axis=(1, 2))], axis=-1).reshape(*batch, 2)


def pixel_coordinates(size):
    """linspace(-1, 1, size); 0 for one pixel."""
    return (2 * np.arange(size, dtype=np.longdouble) - (size - 1)) / max(size - 1, 1)


@_quiet
def softmax_backward(probs, dprobs, axis=-1, *, temperature=1.0):
    """Gradient with respect to the logits: p (g - sum p g) / T."""
    p, g = to_rows(probs, axis), to_rows(dprobs, axis)
    dlogits = p * (g - (p * g).sum(axis=1, keepdims=True)) / row_temperature(temperature)
    return from_rows(dlogits, probs, axis)


@_quiet
def log_softmax_backward(log_probs, dlog_probs, axis=-1, *, temperature=1.0):
    """Gradient with respect to the logits: (g - exp(y) sum g) / T."""
    y, g = to_rows(log_probs, axis), to_rows(dlog_probs, axis)
    dlogits = (g - np.exp(y) * g.sum(axis=1, keepdims=True)) / row_temperature(temperature)
    return from_rows(dlogits, log_probs, axis)


@_quiet
def cross_entropy(
    logits,
    target,
    weight=None,
    *,
    axis=-1,
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.0,
    temperature=1.0,
):
    """Cross-entropy in nats with torch's weights, smoothing and denominators.

    An ignored row gives 0, a label out of range NaN. `mean` divides by the summed weights of the labels of valid
    rows (their number without weights) and is NaN when that is 0.
    """
    rows, labels = _checked_rows(logits, target, axis)
    n_rows, n_cols = rows.shape
    weights = class_weights(weight, n_cols)
    eps = np.longdouble(label_smoothing)
    ignored, valid, safe = read_labels(labels, n_cols, ignore_index)

    nlogp = -log_softmax_rows(rows, row_temperature(temperature))
    loss = (1 - eps) * weights[safe] * nlogp[np.arange(n_rows), safe]
    if label_smoothing != 0:  # a -inf logit must not make 0 * inf here
        loss = loss + eps / n_cols * (weights * nlogp).sum(axis=1)
    loss = np.where(ignored, 0, np.where(valid, loss, NAN))

    if reduction == "none":
        return loss.reshape(np.shape(target))
    if reduction == "sum":
        return loss.sum()
    total = mean_denominator(labels, weight, n_cols, ignore_index)
    return loss.sum() / total if total != 0 else NAN


@_quiet
def cross_entropy_grad(
    logits,
    target,
    weight=None,
    *,
    axis=-1,
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.0,
    temperature=1.0,
    grad_scale=1.0,
):
    """Gradient of `grad_scale * cross_entropy(...)` with respect to the logits.

    `grad_scale` is a scalar or one value per row. Ignored rows are exactly 0 whatever they hold; rows with a label
    out of range are NaN.
    """
    rows, labels = _checked_rows(logits, target, axis)
    n_cols = rows.shape[1]
    weights = class_weights(weight, n_cols)
    eps, scaled_by = np.longdouble(label_smoothing), row_temperature(temperature)
    ignored, valid, safe = read_labels(labels, n_cols, ignore_index)
    at_target = np.arange(n_cols) == safe[:, None]

    logp = log_softmax_rows(rows, scaled_by)
    probs_minus_one_hot = np.where(at_target, np.expm1(logp), np.exp(logp))
    dlogits = (1 - eps) * weights[safe][:, None] * probs_minus_one_hot
    if label_smoothing != 0:
        dlogits = dlogits + eps / n_cols * (np.exp(logp) * weights.sum() - weights)
    factor = row_factor(labels, weight, n_cols, ignore_index, reduction, grad_scale)
    dlogits = dlogits * factor[:, None] / scaled_by
    dlogits = np.where(ignored[:, None], 0, np.where(valid[:, None], dlogits, NAN))
    return from_rows(dlogits, logits, axis)


class FullLoss(NamedTuple):
    """What there is to know of a loss; one entry for each row, but for n_correct."""

    loss: np.ndarray
    z_loss: np.ndarray
    lse: np.ndarray
    n_correct: int
    dlogits: np.ndarray
    terms: np.ndarray  # the sum of the magnitudes that make up a loss
    upstream: np.ndarray  # and of those that multiply a row's probabilities and target
    counted: np.ndarray


@_quiet
def full_cross_entropy(
    logits, target, weight=None, *, shares=None, row_weight=None, z_loss=0.0, label_smoothing=0.0, ignore_index=-100
) -> FullLoss:
    """The loss of each of the rows along the last axis, by its definition as a sum over all classes:

        q'_c = (1 - eps) q_c + eps / V        loss = r (sum_c w_c q'_c (-logp_c) + z_loss (sum_c w_c q_c) lse^2)

    with q one-hot for labels, sum_j v_j [c = t_j] for labels (rows, K) with shares v, or the target itself. Rows whose
    labels are all ignored, or whose weight r is 0, are 0; those with a label out of range NaN.
    """
    x = to_rows(logits, -1)
    n_rows, n_cols = x.shape
    w, eps = class_weights(weight, n_cols), np.longdouble(label_smoothing)
    r = np.ones(n_rows, np.longdouble) if row_weight is None else np.asarray(row_weight).astype(np.longdouble)
    counted, bad = r != 0, np.zeros(n_rows, bool)
    if np.shape(target) == x.shape and np.asarray(target).dtype.kind not in "iu":
        q = np.asarray(target).astype(np.longdouble)
    else:
        labels = np.reshape(target, (n_rows, -1))
        ignored, valid, safe = read_labels(labels, n_cols, ignore_index)
        values = np.ones(labels.shape) if shares is None else np.asarray(shares).astype(np.longdouble)
        q = np.zeros(x.shape, np.longdouble)
        np.add.at(q, (np.arange(n_rows)[:, None], safe), np.where(valid, values, 0))
        counted, bad = counted & ~ignored.all(axis=1), (~ignored & ~valid).any(axis=1)
    logp, lse = log_softmax_rows(x, np.longdouble(1)), logsumexp_rows(x, np.longdouble(1)).ravel()
    mass = w * ((1 - eps) * q + eps / n_cols)
    s = (w * q).sum(axis=1)
    z = np.where(z_loss == 0, 0, r * z_loss * s * lse**2)
    nats = np.where(mass == 0, 0, -logp) * mass  # a masked logit must not make 0 * inf here
    loss = r * nats.sum(axis=1) + z
    slope = mass.sum(axis=1) + np.where(z_loss == 0, 0, 2 * z_loss * s * lse)
    dlogits = r[:, None] * (np.exp(logp) * slope[:, None] - mass)
    first_max = argmax(x)
    label = np.reshape(target, (n_rows, -1))[:, 0]
    n_correct = int((counted & ~bad & (label == first_max)).sum())
    terms = np.abs(r) * np.abs(nats).sum(axis=1) + np.abs(z)
    upstream = np.abs(r) * (np.abs(mass).sum(axis=1) + np.abs(slope))

    def of_rows(values, of_bad=NAN):
        shape = (n_rows,) + (1,) * (values.ndim - 1)
        return np.where((~counted).reshape(shape), 0, np.where(bad.reshape(shape), of_bad, values))

    every = (of_rows(one) for one in (loss, z, lse))
    loss, z, lse = every
    return FullLoss(loss, z, lse, n_correct, of_rows(dlogits), of_rows(terms, 0), of_rows(upstream, 0), counted)


@_quiet
def linear_cross_entropy(x, linear_weight, target, linear_bias=None, weight=None, *, grad_scale=1.0, **options):
    """(loss, dinput, dlinear_weight, dlinear_bias) of cross_entropy(Z) with Z = X W^T + b: dZ W, dZ^T X, sum of dZ.

    Rows that are ignored are zeros in X: they take no part whatever they hold.
    """
    shape, labels = np.shape(x), np.ravel(target)
    ignored = labels == options.get("ignore_index", -100)
    rows = np.where(ignored[:, None], 0, np.reshape(x, (labels.size, shape[-1])).astype(np.longdouble))
    layer = np.asarray(linear_weight).astype(np.longdouble)
    logits = rows @ layer.T + (0 if linear_bias is None else np.asarray(linear_bias).astype(np.longdouble))
    loss = cross_entropy(logits, labels, weight, **options)
    dlogits = cross_entropy_grad(logits, labels, weight, grad_scale=grad_scale, **options)
    loss = loss.reshape(np.shape(target)) if options.get("reduction") == "none" else loss
    return loss, (dlogits @ layer).reshape(shape), dlogits.T @ rows, dlogits.sum(axis=0)


@_quiet
def token_logprobs(logits, target, axis=-1, *, temperature=1.0, ignore_index=-100):
    """(logprob, lse, entropy, rank, argmax) of rows: (n_rows, n_targets) for those of a target, else (n_rows,).

    entropy = log s + sum_c p_c (max - x_c) / T. A rank is 1 + how many logits are larger, -1 where logprob is NaN or
    the target ignored; argmax is -1 in a row with NaN.
    """
    rows = to_rows(logits, axis)
    n_rows, n_cols = rows.shape
    targets = np.reshape(target, (n_rows, -1))
    scaled_by = row_temperature(temperature)
    ignored, valid, safe = read_labels(targets, n_cols, ignore_index)
    logp = log_softmax_rows(rows, scaled_by)
    logprob = np.where(ignored, 0, np.where(valid, np.take_along_axis(logp, safe, 1), NAN))
    at_target = np.take_along_axis(rows, safe, 1)
    rank = 1 + (rows[:, None, :] > at_target[:, :, None]).sum(axis=2)
    rank = np.where(valid & ~np.isnan(logprob), rank, -1)
    has_nan = np.isnan(rows).any(axis=1)
    argmax = np.where(has_nan, -1, np.argmax(np.where(np.isnan(rows), -np.inf, rows), axis=1))
    return logprob, logsumexp_rows(rows, scaled_by), entropy_rows(rows, scaled_by), rank, argmax


@_quiet
def token_logprobs_backward(logits, target, dlogprob, dentropy, axis=-1, *, temperature=1.0, ignore_index=-100):
    """sum_j g_j ([c = t_j] - p_c) - h p_c (log p_c + entropy), all over T; an ignored target has g_j = 0."""
    rows = to_rows(logits, axis)
    n_rows, n_cols = rows.shape
    targets = np.reshape(target, (n_rows, -1))
    ignored, valid, safe = read_labels(targets, n_cols, ignore_index)
    scaled_by = row_temperature(temperature)
    g = np.where(ignored, 0, np.where(valid, np.reshape(dlogprob, (n_rows, -1)).astype(np.longdouble), NAN))
    probs = softmax_rows(rows, scaled_by)
    dlogits = -probs * g.sum(axis=1, keepdims=True)
    for j in range(targets.shape[1]):
        dlogits[np.arange(n_rows), safe[:, j]] += np.where(valid[:, j], g[:, j], 0)
    if dentropy is not None:
        h = np.reshape(dentropy, (n_rows, 1)).astype(np.longdouble)
        logp = log_softmax_rows(rows, scaled_by)
        slope = np.where(probs == 0, 0, probs * (logp + entropy_rows(rows, scaled_by)[:, None]))
        dlogits = dlogits - h * np.where(np.isnan(probs), NAN, slope)
    else:
        dlogits = np.where(ignored.all(axis=1)[:, None], 0, dlogits)
    return from_rows(dlogits / scaled_by, logits, axis)


@_quiet
def kl_div(
    logits, target_logits, *, axis=-1, temperature=1.0, row_weight=None, reduction="mean", normalizer=None
):  # fmt: skip
    """KL(p || q), p = softmax(target_logits / T), q = softmax(logits / T); a row of weight 0 gives 0."""
    rows, weights = kl_rows(logits, target_logits, axis, temperature), kl_weights(logits, axis, row_weight)
    loss = np.where(weights == 0, 0, weights * rows[0])
    if reduction == "none":
        return loss.reshape(_row_shape(logits, axis, False))
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / kl_divisor(weights, reduction, normalizer)


@_quiet
def kl_div_grads(
    logits, target_logits, *, axis=-1, temperature=1.0, row_weight=None, reduction="mean", normalizer=None,
    grad_scale=1.0,
):  # fmt: skip
    """Gradients of grad_scale times kl_div with respect to logits and target_logits: u (q - p) / T and
    u p (log p - log q - KL) / T, where that of a row whose divergence is infinite is NaN.
    """
    kl, p, q, d = kl_rows(logits, target_logits, axis, temperature)
    weights = kl_weights(logits, axis, row_weight)
    factor = weights * np.longdouble(grad_scale) / kl_divisor(weights, reduction, normalizer) / temperature
    of_logits = (q - p) * factor[:, None]
    of_target = np.where(p == 0, 0, p * (d - kl[:, None])) * factor[:, None]
    of_target = np.where(np.isfinite(kl)[:, None], of_target, NAN)
    return tuple(from_rows(np.where(weights[:, None] == 0, 0, one), logits, axis) for one in (of_logits, of_target))


def kl_rows(logits, target_logits, axis, temperature):
    """(KL, p, q, log p - log q) of rows. The sum of p d - p + q, with p (d^2 / 2 - d^3 / 6 + ...) for small d."""
    x, y, temperature = to_rows(logits, axis), to_rows(target_logits, axis), row_temperature(temperature)
    p, q = softmax_rows(y, temperature), softmax_rows(x, temperature)
    # The difference of logits that are far from 0 is taken before that of their maxima.
    ahead = (y - x) - (_row_max(y) - _row_max(x))
    log_s = [np.log1p(_sum_minus_one(rows, _row_max(rows), temperature)) for rows in (y, x)]
    d = ahead / temperature - (log_s[0] - log_s[1])
    series = np.zeros_like(d)
    for k in range(11, 1, -1):
        series = np.longdouble(1) / math.factorial(k) - d * series
    series = d * d * series
    terms = np.where(np.abs(d) < 0.01, p * series, np.where(p == 0, q, p * d - p + q))
    terms = np.where((x == -np.inf) & (p > 0), np.inf, terms)
    return np.where(np.isnan(p + q).any(axis=1), NAN, terms.sum(axis=1)), p, q, d


def kl_weights(logits, axis, row_weight):
    n_rows = to_rows(logits, axis).shape[0]
    return np.ones(n_rows, np.longdouble) if row_weight is None else np.ravel(row_weight).astype(np.longdouble)


def kl_divisor(weights, reduction, normalizer):
    if reduction != "mean":
        return np.longdouble(1)
    return weights.sum() if normalizer is None else np.longdouble(normalizer)


# Rows: everything below works on (n_rows, n_cols) longdouble, with temperature a scalar or (n_rows, 1).


@_quiet
def softmax_rows(rows, temperature):
    row_max = _row_max(rows)
    probs = np.exp((rows - row_max) / temperature) / (1 + _sum_minus_one(rows, row_max, temperature))
    return np.where(np.isfinite(row_max), probs, NAN)


@_quiet
def log_softmax_rows(rows, temperature):
    row_max = _row_max(rows)
    logp = (rows - row_max) / temperature - np.log1p(_sum_minus_one(rows, row_max, temperature))
    return np.where(np.isfinite(row_max), logp, NAN)


@_quiet
def logsumexp_rows(rows, temperature):
    row_max = _row_max(rows)
    lse = row_max / temperature + np.log1p(_sum_minus_one(rows, row_max, temperature))
    return np.where(np.isfinite(row_max), lse, row_max)[:, 0]


@_quiet
def entropy_rows(rows, temperature):
    probs, distance = softmax_rows(rows, temperature), (_row_max(rows) - rows) / temperature
    log_s = np.log1p(_sum_minus_one(rows, _row_max(rows), temperature))[:, 0]
    mean = np.where(probs == 0, 0, probs * distance).sum(axis=1)
    return np.where(np.isfinite(_row_max(rows)[:, 0]), log_s + mean, NAN)


def _row_max(rows):
    return rows.max(axis=1, keepdims=True, initial=-np.inf)  # NaN wins over everything, +inf included


def _sum_minus_one(rows, row_max, temperature):
    """sum(exp((x - max) / T)) - 1, from the ties and the tail below them; meaningless where max is not finite."""
    ties = (rows == row_max).sum(axis=1, keepdims=True)
    below = np.where(rows == row_max, -np.inf, rows - row_max)
    return (ties - 1) + np.exp(below / temperature).sum(axis=1, keepdims=True)


def to_rows(x, axis):
    """The array as (n_rows, n_cols) longdouble, rows in the order of the axes that are kept."""
    x = np.atleast_1d(np.asarray(x))  # a 0-d array is one row of one column
    kept, reduced = _split_axes(x.ndim, axis)
    n_cols = int(np.prod([x.shape[a] for a in reduced], dtype=np.int64))
    n_rows = int(np.prod([x.shape[a] for a in kept], dtype=np.int64))
    return np.ascontiguousarray(x.transpose(kept + reduced).reshape(n_rows, n_cols).astype(np.longdouble))


def from_rows(rows, like, axis):
    """Undo to_rows for a result with as many columns as the input `like`."""
    shape = np.atleast_1d(np.asarray(like)).shape
    kept, reduced = _split_axes(len(shape), axis)
    order = kept + reduced
    moved = rows.reshape([shape[a] for a in order])
    return moved.transpose(np.argsort(order)).reshape(np.shape(like))


def _split_axes(ndim, axis):
    if axis is None:
        return (), tuple(range(ndim))
    if axis == ():
        raise ValueError("axis is an empty tuple: no axis to reduce over")
    reduced = tuple(sorted(normalize_axis_tuple(axis, ndim)))
    return tuple(a for a in range(ndim) if a not in reduced), reduced


def _row_shape(x, axis, keepdims):
    shape = np.atleast_1d(np.asarray(x)).shape
    kept, _ = _split_axes(len(shape), axis)
    if keepdims:
        return () if np.ndim(x) == 0 else tuple(n if a in kept else 1 for a, n in enumerate(shape))
    return tuple(shape[a] for a in kept)


def row_temperature(temperature):
    """Scalar, or one value per row as a column."""
    temperature = np.asarray(temperature, dtype=np.longdouble)
    return temperature if temperature.ndim == 0 else temperature.reshape(-1, 1)


# Labels and weights


def _checked_rows(logits, target, axis):
    """Logits as rows and one label for each; target has the shape of logits without the class axis."""
    shape = list(np.shape(logits))
    n_cols = shape.pop(normalize_axis_index(axis, len(shape)))
    if n_cols == 0:
        raise ValueError("cross-entropy of rows without columns")
    if np.shape(target) != tuple(shape):
        raise ValueError(f"target has shape {np.shape(target)}, expected {tuple(shape)}")
    return to_rows(logits, axis), np.ravel(target)


def read_labels(labels, n_cols, ignore_index):
    """(ignored, valid, safe): masks of the rows, and a label that may be indexed with whatever the row holds."""
    ignored = labels == ignore_index
    valid = ~ignored & (labels >= 0) & (labels < n_cols)
    return ignored, valid, np.where(valid, labels, 0).astype(np.int64)


def class_weights(weight, n_cols):
    return np.ones(n_cols, np.longdouble) if weight is None else np.asarray(weight).astype(np.longdouble)


def mean_denominator(labels, weight, n_cols, ignore_index):
    """Summed weight of the labels of valid rows. A label out of range has no weight and adds nothing."""
    _, valid, safe = read_labels(labels, n_cols, ignore_index)
    return class_weights(weight, n_cols)[safe[valid]].sum()


def row_factor(labels, weight, n_cols, ignore_index, reduction, grad_scale):
    """What each row's own gradient is multiplied by: the upstream gradient over the denominator of `mean`."""
    factor = np.broadcast_to(np.asarray(grad_scale, dtype=np.longdouble).ravel(), labels.shape)
    if reduction != "mean":
        return factor
    total = mean_denominator(labels, weight, n_cols, ignore_index)
    return factor / total if total != 0 else np.full(labels.shape, NAN)


# ---------------------------------------------------------------- sampling


def philox(counter, key):
    """Philox4x32-10 on arrays of integers below 2^32, as uint64. Salmon et al., 2011, section 3.3."""
    low = np.uint64(0xFFFFFFFF)
    a, b, c, d = (np.asarray(word, np.uint64) for word in counter)
    first, second = (np.asarray(word, np.uint64) for word in key)
    for _ in range(10):
        one, two = np.uint64(0xD2511F53) * a, np.uint64(0xCD9E8D57) * c
        a, b, c, d = (two >> np.uint64(32)) ^ b ^ first, two & low, (one >> np.uint64(32)) ^ d ^ second, one & low
        first, second = (first + np.uint64(0x9E3779B9)) & low, (second + np.uint64(0xBB67AE85)) & low
    return a, b, c, d


def words(n_cols, seed, step):
    """The random word of each column of a row."""
    halves = [(int(number) & 0xFFFFFFFF, int(number) >> 32 & 0xFFFFFFFF) for number in (seed, step)]
    blocks = np.arange(-(-n_cols // 4))
    found = np.broadcast_arrays(*philox((blocks, *halves[1], 0), halves[0]))
    return np.stack(found, axis=-1).reshape(-1)[:n_cols]


def gumbel(words):
    """Gumbel noise, longdouble."""
    v = (np.asarray(words).astype(np.longdouble) + np.longdouble(0.5)) * np.longdouble(2) ** -32
    return -np.log(-np.log1p(-v))


def gumbel_scores(row, seed, step, temperature):
    """What each column's logit and noise come to, longdouble: the largest is the sample."""
    x = np.asarray(row).astype(np.float64).astype(np.longdouble)
    return x + np.longdouble(temperature) * gumbel(words(len(x), seed, step))


def kept_columns(row, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """(kept, doubtful): the columns that limits leave, and those that an error of 1e-6 in a sum would leave or not."""
    x = np.asarray(row).astype(np.longdouble)
    kept, doubtful = np.ones(len(x), bool), np.zeros(len(x), bool)
    if top_k is not None:
        kept = x >= np.sort(x)[-min(top_k, len(x))]
    if top_p is not None:
        e = np.where(kept, np.exp((x - x.max()) / np.longdouble(temperature)), 0)
        before = _mass_of_larger(x, e) / e.sum()
        doubtful = np.abs(before - top_p) < 1e-6
        kept = kept & (before < top_p)
    if min_p:
        edge = x.max() + np.longdouble(temperature) * np.log(np.longdouble(min_p))
        doubtful = doubtful | (np.abs(x - edge) <= 1e-6 * max(1, abs(edge)))
        kept = kept & (x >= edge)
    return kept, doubtful


def _mass_of_larger(x, e):
    """For each column the sum of e over those with a larger logit."""
    order = np.argsort(-x, kind="stable")
    before = np.concatenate([[0], e[order].cumsum()])
    return before[np.searchsorted(-x[order], -x)]  # the first of equal ones
