"""The one comparison rule for each quantity: how far a result may be from the exact value.

With u = 2^-24 (2^-53 for float64), `ulp` the spacing of the result's type at the exact value, d = (max - x) / T and
gap = (max - second maximum) / T (0 for ties), a result may be off by

    softmax         (24 + d) ulp                       and a row sum by 4e-6 (float64: 4e-6 * 2^-29)
    log_softmax     24 ulp where |y| >= 0.5            below that (24 + gap) u |y|, as the loss
    logsumexp       2 ulp of max(|lse|, 1)             with T != 1: of max(|lse|, |max| / T, 1)
    soft_argmax     (24 + 3 D) u of the result         D: means of d over the columns, see check_soft_argmax
    spatial_softmax that of places along a line, in coordinates, + u: see check_spatial_softmax
    their backwards (32 + d) u times the magnitudes of the terms that are added
    loss, one row   (24 + gap) u S                     S: see check_loss; without smoothing it is the loss
    loss, sum       that, summed, + 24 u sum S         loss, mean: the same over the denominator
    dlogits         32 u upstream                      and its row sum by (4e-6 + 16 u) upstream: see check_dlogits
    a layer's loss  what is lost in products of matrices, see check_linear_cross_entropy
    kl_div          see check_kl_div: relative to its terms, of which none is negative, and k^2 / 2
    entropy         (24 + gap) u log s + sum_c (24 + 3 d_c) u p_c d_c
    backwards       32 u times the magnitudes of the terms that are added: see each check

Why these terms: max - x is rounded once and exp turns that into a relative error of its size (hence d and gap); 24
covers exp, the sum and the division. 1/T is rounded too, which moves lse by |max| / T u whatever is done afterwards.

Half types compute in float32 and round once more. softmax and log_softmax must be within 0.52 ulp of the exact value:
0.5 for the rounding, 0.02 for everything before it, so that rounding twice or truncating is seen. Elsewhere 0.52 ulp is
added to the float32 bound. Results below 2^-126 (float64: 2^-1022) may have been flushed to zero, so there the bound is
that, absolute. What is 0 by definition (masked columns, ignored rows) must be exactly 0. NaN and infinities must be
where the oracle has them; only a finite value next to the type's limit may round to infinity.

Every check takes the library's result with its NumPy dtype, raises AssertionError naming the worst element, and returns
the worst error in ulp of the result's type: at the exact value, for logsumexp at max(|lse|, 1), for gradients at the
magnitude to which their bound is relative. Rows are counted with the reduced axes moved last.
"""

from dataclasses import dataclass

import numpy as np

from tests import oracle

HALF_ULP = 0.52
ROW_SUM = 4e-6  # for float32
_quiet = np.errstate(all="ignore")  # bounds of elements that are NaN or infinite are not used


@dataclass(frozen=True)
class Format:
    """A binary floating-point type: significant bits, and exponents of its smallest normal and largest numbers."""

    digits: int
    min_exponent: int
    max_exponent: int

    @property
    def unit(self):
        return _power_of_two(-self.digits)

    @property
    def tiny(self):
        return _power_of_two(self.min_exponent)

    @property
    def limit(self):
        """The first power of two that overflows."""
        return _power_of_two(self.max_exponent + 1)

    def ulp(self, value):
        """Spacing of the type at a finite value."""
        _, exponent = np.frexp(value)  # value = f 2^exponent with f in [1/2, 1)
        exponent = np.where(value == 0, self.min_exponent, exponent - 1)
        return _power_of_two(np.clip(exponent, self.min_exponent, self.max_exponent) - (self.digits - 1))


def _power_of_two(exponent):
    return np.ldexp(np.longdouble(1), exponent)


FORMATS = {
    "float16": Format(11, -14, 15),
    "bfloat16": Format(8, -126, 127),
    "float32": Format(24, -126, 127),
    "float64": Format(53, -1022, 1023),
}


# The checks


@_quiet
def check_softmax(got, logits, axis=-1, temperature=1.0, *, ulp=None):
    """`ulp` replaces the element bound (24 + d, for half types 0.52) by a flat one, such as the goal of 4."""
    got, want = _as_rows("softmax", got, oracle.softmax(logits, axis, temperature=temperature), axis)
    result, computed, half = _formats(got)
    distance, _ = _distance_and_gap(logits, axis, temperature)
    if ulp is None:
        ulp = HALF_ULP if half else 24 + distance
    tolerance = _or_flushed(ulp * result.ulp(want), want, computed)
    worst = _compare("softmax", got, want, np.where(np.isinf(distance), 0, tolerance))
    if not half:  # for half types the rounding of each element says more
        _compare_row_sums("softmax", got, want, ROW_SUM * computed.unit / FORMATS["float32"].unit)
    return worst


@_quiet
def check_log_softmax(got, logits, axis=-1, temperature=1.0):
    got, want = _as_rows("log_softmax", got, oracle.log_softmax(logits, axis, temperature=temperature), axis)
    result, computed, half = _formats(got)
    distance, gap = _distance_and_gap(logits, axis, temperature)
    overflowed = distance * oracle.row_temperature(temperature) >= computed.limit  # max - x, before T divides it
    want = np.where(overflowed & (_widened(got) == -np.inf), -np.inf, want)
    if half:
        tolerance = HALF_ULP * result.ulp(want)
    else:
        near_zero = _loss_units(gap, computed) * computed.unit * np.abs(want)
        tolerance = np.where(np.abs(want) >= 0.5, 24 * result.ulp(want), near_zero)
    return _compare("log_softmax", got, want, _or_flushed(tolerance, want, computed))


@_quiet
def check_logsumexp(got, logits, axis=-1, temperature=1.0, *, keepdims=False):
    expected = oracle.logsumexp(logits, axis, keepdims=keepdims, temperature=temperature)
    got, want = _as_column("logsumexp", got, expected)
    _, computed, _ = _formats(got)
    scale = np.maximum(np.abs(want), 1)
    if np.any(np.asarray(temperature) != 1):
        row_max = oracle.to_rows(logits, axis).max(axis=1, keepdims=True, initial=-np.inf)
        scale = np.maximum(scale, np.abs(row_max) / oracle.row_temperature(temperature))
    return _compare("logsumexp", got, want, _and_rounding(2 * computed.ulp(_finite(scale)), want, got), scale)


@_quiet
def check_soft_argmax(got, logits, axis=-1, temperature=1.0, *, keepdims=False):
    """E = sum c p_c may be off by u (24 E + 3 (sum c p_c d_c + E sum p_c d_c)), and by 2^-126 sum c.

    All terms have one sign, and each exponential is off by a multiple of u and by 3 d_c u: the difference to the
    maximum, its product with 1/T and 1/T itself are rounded. Those below 2^-126 may have been flushed to zero.
    """
    expected = oracle.soft_argmax(logits, axis, temperature=temperature, keepdims=keepdims)
    got, want = _as_column("soft_argmax", got, expected)
    _, computed, _ = _formats(got)
    columns = np.arange(oracle.to_rows(logits, axis).shape[1])
    tolerance = _moment_bound(columns, want, logits, axis, temperature, computed)
    return _compare("soft_argmax", got, want, _and_rounding(tolerance, want, got))


@_quiet
def check_soft_argmax_backward(got, logits, expected, dexpected, axis=-1, temperature=1.0):
    """dE p (c - E) / T may be off by (32 + d) u |dE| p (c + E) / T: softmax's bound for p, and the roundings around."""
    want = oracle.soft_argmax_backward(logits, expected, dexpected, axis, temperature=temperature)
    got, want = _as_rows("soft_argmax_backward", got, want, axis)
    mean, upstream = (np.abs(np.asarray(part).astype(np.longdouble)).reshape(-1, 1) for part in (expected, dexpected))
    factors = upstream * (np.arange(want.shape[1]) + mean) / oracle.row_temperature(temperature)
    return _compare_with_probs("soft_argmax_backward", got, want, factors, logits, axis, temperature)


@_quiet
def check_spatial_softmax_backward(got, features, coordinates, dcoordinates, temperature=1.0):
    """p (dx (x_c - x) + dy (y_c - y)) / T may be off by (32 + d) u p (2 |dx| (1 + |x|) + 2 |dy| (1 + |y|)) / T.

    x_c - x is formed from places, j - (x last + last) / 2, whose parts are up to last / 2 (1 + |x|) and last large.
    """
    want = oracle.spatial_softmax_backward(features, coordinates, dcoordinates, temperature=temperature)
    got, want = _as_rows("spatial_softmax_backward", got, want, (-2, -1))
    points, upstream = (
        np.abs(np.asarray(part).astype(np.longdouble)).reshape(-1, 2) for part in (coordinates, dcoordinates)
    )
    factors = (2 * upstream * (1 + points)).sum(axis=1, keepdims=True) / oracle.row_temperature(temperature)
    return _compare_with_probs("spatial_softmax_backward", got, want, factors, features, (-2, -1), temperature)


@_quiet
def check_spatial_softmax(got, features, temperature=1.0):
    """A coordinate 2 E / (size - 1) - 1 may be off by 2 / (size - 1) of what E, an expected place, may (see
    check_soft_argmax), by as much for E to have been rounded, and by u.
    """
    got = _checked("spatial_softmax", got, oracle.spatial_softmax(features, temperature=temperature))
    _, computed, _ = _formats(got)
    *_, height, width = np.shape(features)
    want = oracle.spatial_softmax(features, temperature=temperature).reshape(-1, 2)
    bounds = []
    for column, size, places in ((0, width, np.tile(np.arange(width), height)), (1, height, None)):
        places = np.repeat(np.arange(height), width) if places is None else places
        expected = (want[:, column : column + 1] * max(size - 1, 1) + size - 1) / 2
        bound = _moment_bound(places, expected, features, (-2, -1), temperature, computed)
        bounds.append((bound + computed.unit * expected) * 2 / max(size - 1, 1) + computed.unit)
    got = got.reshape(-1, 2)
    scale = np.ones_like(want)
    return _compare("spatial_softmax", got, want, _and_rounding(np.hstack(bounds), want, got), scale)


@_quiet
def check_loss(got, logits, target, weight=None, **options):
    """Cross-entropy, with the keyword options of oracle.cross_entropy, `axis` and `reduction` ("mean") among them.

    The bound of a row is relative to the magnitudes of the terms that make it up,

        S = |(1 - eps) w_y nll| + eps/V sum_c |w_c| (lse - x_c) + 2 eps/V sum|w| nll          nll = lse - x_y

    The first two are the loss itself as long as no weight is negative. The third is there because the library forms
    sum_c w_c (lse - x_c) as W nll - sum_c w_c (x_c - x_y), whose terms can exceed their difference by W nll each, since
    |x_c - x_y| <= (lse - x_c) + nll. It exceeds the first only where eps is above 1/3 or w_y far below the average.
    """
    reduction, ignore_index = options.get("reduction", "mean"), options.get("ignore_index", -100)
    name = f"loss ({reduction})"
    got, want = _as_column(name, got, oracle.cross_entropy(logits, target, weight, **options))
    _, computed, _ = _formats(got)
    terms, tolerance = _row_loss_bounds(logits, target, weight, computed, **options)
    if reduction != "none":
        tolerance = tolerance.sum() + 24 * computed.unit * terms.sum()
    if reduction == "mean":
        n_cols = np.shape(logits)[options.get("axis", -1)]
        tolerance = tolerance / np.abs(oracle.mean_denominator(np.ravel(target), weight, n_cols, ignore_index))
        if np.isposinf(_widened(got)).all() and terms.sum() >= computed.limit:
            return 0.0  # the rows add up to more than the type holds before the division, as in torch
    tolerance = _and_rounding(_or_flushed(tolerance, want, computed), want, got)
    if reduction == "none":
        tolerance = np.where(np.reshape(target, (-1, 1)) == ignore_index, 0, tolerance)
    return _compare(name, got, want, tolerance)


@_quiet
def check_dlogits(got, logits, target, weight=None, *, grad_scale=1.0, **options):
    """Gradient of cross-entropy, with the keyword options of oracle.cross_entropy_grad.

    upstream = |grad_scale / denominator| ((1 - eps) |w_y| + eps/V sum|w|) / T is what a row's probabilities and its
    one-hot label are multiplied by. The row sum (0 in truth) is bounded too: with enough columns the other entries of a
    gradient written at the target alone are all within the element bound.
    """
    axis = options.get("axis", -1)
    expected = oracle.cross_entropy_grad(logits, target, weight, grad_scale=grad_scale, **options)
    got, want = _as_rows("dlogits", got, expected, axis)
    _, computed, _ = _formats(got)
    upstream, exactly_zero = _upstream_and_zeros(logits, target, weight, grad_scale, **options)
    rounding = _and_rounding(np.zeros_like(want), want, got)
    tolerance = _or_flushed(32 * computed.unit * upstream + rounding, want, computed)
    worst = _compare("dlogits", got, want, np.where(exactly_zero, 0, tolerance), upstream)
    row_sum = (ROW_SUM / FORMATS["float32"].unit + 16) * computed.unit
    _compare_row_sums("dlogits", got, want, row_sum * upstream[:, 0] + rounding.sum(axis=1))
    return worst


@_quiet
def check_linear_cross_entropy(
    got, x, linear_weight, target, linear_bias=None, weight=None, *, grad_scale=1.0, **options
):
    """(loss, dinput, dlinear_weight, dlinear_bias), the last three or None. With K features, N rows and V classes,

        logits            may be off by (K + 2) u (|X| |W|^T + |b|), of which a row's largest is e
        loss              by what it may be for the exact logits (see check_loss), and by 2 e upstream
        their gradient    by (32 u + 2 e) upstream (p + [c = t] + eps), which is called T
        dinput            by T |W| + (V + 2) u |dZ| |W|
        dlinear_weight    by T^T |X| + (N + 2) u |dZ|^T |X|, dlinear_bias as for X = 1

    since moving the logits by at most e moves the loss and each probability p by 2 e and 2 e p at most.
    """
    target, (n_classes, n_features) = np.ravel(target), np.shape(linear_weight)
    grad_scale = np.asarray(grad_scale, np.longdouble).reshape(-1, 1)
    expected = oracle.linear_cross_entropy(
        x, linear_weight, target, linear_bias, weight, grad_scale=grad_scale, **options
    )
    ignored, _, safe = oracle.read_labels(target, n_classes, options.get("ignore_index", -100))
    rows = np.where(ignored[:, None], 0, np.reshape(x, (target.size, n_features)).astype(np.longdouble))
    layer = np.asarray(linear_weight).astype(np.longdouble)
    bias = np.zeros(n_classes) if linear_bias is None else np.asarray(linear_bias).astype(np.longdouble)
    logits = rows @ layer.T + bias
    unit = FORMATS["float64" if np.asarray(x).dtype == np.float64 else "float32"].unit
    moved = (n_features + 2) * unit * (np.abs(rows) @ np.abs(layer).T + np.abs(bias)).max(axis=1, keepdims=True)

    upstream, _ = _upstream_and_zeros(logits, target, weight, 1.0, **options)
    terms, own = _row_loss_bounds(logits, target, weight, _formats(got[0])[1], **options)
    by_logits = np.where(ignored[:, None], 0, 2 * moved * upstream)
    if options.get("reduction", "mean") == "none":
        tolerance = np.where(ignored[:, None], 0, own + by_logits)
    else:
        tolerance = own.sum() + 24 * unit * terms.sum()
        if options.get("reduction", "mean") == "mean":
            tolerance /= oracle.mean_denominator(target, weight, n_classes, options.get("ignore_index", -100))
        tolerance += by_logits.sum()
    worst = [_compare("loss", *_as_column("loss", got[0].reshape(expected[0].shape), expected[0]), tolerance)]

    upstream = np.abs(grad_scale) * upstream
    shares = oracle.softmax(logits) + (np.arange(n_classes) == safe[:, None]) + options.get("label_smoothing", 0.0)
    dlogits = oracle.cross_entropy_grad(logits, target, weight, grad_scale=grad_scale, **options)
    off, dlogits = np.where(ignored[:, None], 0, (32 * unit + 2 * moved) * upstream * shares), np.abs(dlogits)
    factors = np.abs(layer), np.abs(rows), np.ones((target.size, 1))
    bounds = [
        off @ factors[0] + (n_classes + 2) * unit * (dlogits @ factors[0]),
        *(off.T @ factor + (target.size + 2) * unit * (dlogits.T @ factor) for factor in factors[1:]),
    ]
    for name, one, want, bound in zip(("dinput", "dweight", "dbias"), got[1:], expected[1:], bounds, strict=True):
        if one is not None:
            one, want = one.reshape(bound.shape), want.reshape(bound.shape)
            bound = _or_flushed(bound, want, _formats(one)[1])
            worst.append(_compare(name, one, want, _and_rounding(bound, want, one), np.abs(want).max(initial=0)))
    return max(worst)


@_quiet
def check_kl_div(got, logits, target_logits, **options):
    """A divergence, with the keyword options of oracle.kl_div.

    The sum of t = p (d + expm1(-d)), where no term is negative, d = log p - log q and m, n = (max - x) / T of p and q:

        |d| <= 1    p is off by (24 + 3 m) u of itself, and so is t
        else        t = q + p (d - 1) by (24 + 3 n) u q + (24 + 3 m) u p |d - 1|: exponentials are cheap on the GPU
        d itself    is off by 4 u (|d + l| + |l|), l = log s_p - log s_q, which t shows p min(1, 2 |d|) times; for half
                    types by 4 u a more, a the difference of the maxima over T: theirs are exact, if not far apart
        l           is off by k = (8 + 2 log s_p + 2 log s_q) u. That moves all d alike, and t by k^2 / 2 only
    """
    reduction = options.get("reduction", "mean")
    name = f"kl_div ({reduction})"
    got, want = _as_column(name, got, oracle.kl_div(logits, target_logits, **options))
    _, computed, _ = _formats(got)
    axis, temperature = options.get("axis", -1), options.get("temperature", 1.0)
    weights = np.abs(oracle.kl_weights(logits, axis, options.get("row_weight")))
    rows = oracle.kl_div(logits, target_logits, axis=axis, temperature=temperature, reduction="none").reshape(-1)
    tolerance = np.where(weights == 0, 0, weights * _kl_bounds(logits, target_logits, axis, temperature, computed))
    if reduction != "none":
        total = np.where(weights == 0, 0, weights * rows).sum()
        divisor = oracle.kl_divisor(weights, reduction, options.get("normalizer"))
        tolerance = (tolerance.sum() + 24 * computed.unit * total) / divisor
    if reduction == "none":
        too_far = _too_far(logits, target_logits, axis, temperature, computed)
        want = np.where(too_far & np.isposinf(_widened(got)), np.inf, want)
    tolerance = _or_flushed(np.reshape(tolerance, want.shape), want, computed)
    return _compare(name, got, want, np.where(np.isfinite(want), tolerance, 0))


@_quiet
def check_kl_div_grads(dlogits, dtarget, logits, target_logits, **options):
    """Both gradients, with the keyword options of oracle.kl_div_grads; dtarget may be None.

    u (q - p) / T may be off by (32 + 3 n) u q and (32 + 3 m) u p, see check_kl_div; u p (d - KL) / T by (32 + 3 m) u of
    its terms, and p times what d and KL are off by.
    """
    axis, temperature = options.get("axis", -1), options.get("temperature", 1.0)
    expected = oracle.kl_div_grads(logits, target_logits, **options)
    weights = np.abs(oracle.kl_weights(logits, axis, options.get("row_weight")))
    factor = weights * abs(options.get("grad_scale", 1.0)) / temperature
    factor = factor / oracle.kl_divisor(weights, options.get("reduction", "mean"), options.get("normalizer"))
    factor = np.where(weights == 0, 0, factor)[:, None]
    kl, p, q, d = oracle.kl_rows(logits, target_logits, axis, temperature)
    of_q, _ = _distance_and_gap(logits, axis, temperature)
    of_p, _ = _distance_and_gap(target_logits, axis, temperature)
    got, want = _as_rows("dlogits", dlogits, expected[0], axis)
    _, computed, _ = _formats(got)
    terms = _weighted(32 + 3 * of_q, q) + _weighted(32 + 3 * of_p, p)
    tolerance = factor * (computed.unit * terms + 2 * computed.tiny * ((p > 0) | (q > 0)))
    tolerance = _or_flushed(tolerance, want, computed)
    worst = [_compare("dlogits", got, want, _and_rounding(tolerance, want, got), factor * (p + q))]
    if dtarget is not None:
        got, want = _as_rows("dtarget_logits", dtarget, expected[1], axis)
        own = _kl_bounds(logits, target_logits, axis, temperature, computed)[:, None]
        moved, common = _log_ratio_bounds(logits, target_logits, axis, temperature, computed)
        terms = _weighted((32 + 3 * of_p) * computed.unit * (np.abs(d) + kl[:, None]) + moved + common + own, p)
        flushed = np.where((p > 0) & (p < 2 * computed.tiny), computed.tiny * (1 + np.abs(d)), 0)
        tolerance = _or_flushed(factor * (terms + flushed), want, computed)
        too_far = _too_far(logits, target_logits, axis, temperature, computed)
        want = np.where(too_far & np.isnan(_widened(got)).all(axis=1, keepdims=True), np.longdouble("nan"), want)
        tolerance = np.where(np.isfinite(want), tolerance, 0)
        worst.append(_compare("dtarget_logits", got, want, _and_rounding(tolerance, want, got), factor * p))
    return max(worst)


def _too_far(logits, target_logits, axis, temperature, computed):
    """Rows whose divergence may be infinite, since a difference of logits is beyond the largest number, or (the GPU's
    probabilities get their common factor last) the divergence over the largest probability; (n_rows, 1).
    """
    kl, p, _, d = oracle.kl_rows(logits, target_logits, axis, temperature)
    beyond = ((p > 0) & (np.abs(d) >= computed.limit)).any(axis=1) | (2 * kl >= p.max(axis=1) * computed.limit)
    return beyond[:, None]


def _weighted(factor, probs):
    """factor times probs, and 0 where these are 0."""
    return np.where(probs == 0, 0, factor * probs)


def _log_ratio_bounds(logits, target_logits, axis, temperature, computed):
    """How far the d of a row may be off, one by one (n_rows, n_cols) and all alike (n_rows, 1)."""
    temperature = oracle.row_temperature(temperature)
    log_s = [
        oracle.logsumexp_rows(rows, temperature)[:, None] - rows.max(axis=1, keepdims=True) / temperature
        for rows in (oracle.to_rows(one, axis) for one in (logits, target_logits))
    ]
    _, _, _, d = oracle.kl_rows(logits, target_logits, axis, temperature)
    apart = log_s[1] - log_s[0]
    magnitudes = np.abs(d + apart) + np.abs(apart)
    if np.asarray(logits).dtype.name in ("float16", "bfloat16"):
        maxima = [oracle.to_rows(one, axis).max(axis=1, keepdims=True) for one in (logits, target_logits)]
        magnitudes = magnitudes + np.abs(maxima[1] - maxima[0]) / temperature
    return 4 * computed.unit * magnitudes, (8 + 2 * (log_s[0] + log_s[1])) * computed.unit


def _kl_bounds(logits, target_logits, axis, temperature, computed):
    """How far the divergence of each row may be off, see check_kl_div."""
    _, p, q, d = oracle.kl_rows(logits, target_logits, axis, temperature)
    of_q, _ = _distance_and_gap(logits, axis, temperature)
    of_p, _ = _distance_and_gap(target_logits, axis, temperature)
    near = _weighted((24 + 3 * of_p) * d * d, p)
    far = _weighted(24 + 3 * of_q, q) + _weighted((24 + 3 * of_p) * np.abs(d - 1), p)
    moved, common = _log_ratio_bounds(logits, target_logits, axis, temperature, computed)
    shown = _weighted(np.minimum(1, 2 * np.abs(d)) * moved, p)
    flushed = np.where((p > 0) & (p < 2 * computed.tiny), computed.tiny * np.abs(d), 0) + computed.tiny
    terms = computed.unit * np.where(np.abs(d) <= 1, near, far) + shown + flushed
    return np.where(np.isnan(terms), 0, terms).sum(axis=1) + common[:, 0] ** 2 / 2


@_quiet
def check_entropy(got, logits, axis=-1, temperature=1.0):
    """log s + sum_c p_c d_c, where exp(-d_c) may be off by (24 + 3 d_c) u: it is cheap on the GPU."""
    rows, scaled_by = oracle.to_rows(logits, axis), oracle.row_temperature(temperature)
    expected = oracle.entropy_rows(rows, scaled_by)
    got, want = _as_column("entropy", got, expected.reshape(np.shape(got)))
    _, computed, _ = _formats(got)
    distance, gap = _distance_and_gap(logits, axis, temperature)
    probs = oracle.softmax_rows(rows, scaled_by)
    mean = np.where(probs == 0, 0, (24 + 3 * distance) * probs * distance).sum(axis=1, keepdims=True)
    log_s = want - np.where(probs == 0, 0, probs * distance).sum(axis=1, keepdims=True)
    tolerance = computed.unit * (mean + _loss_units(gap, computed) * np.abs(log_s))
    return _compare("entropy", got, want, _or_flushed(tolerance, want, computed))


@_quiet
def check_token_logprobs_backward(got, logits, target, dlogprob, dentropy, axis=-1, temperature=1.0, **options):
    """32 u times the magnitudes of the terms that are added, with the error of cheap exponentials, 3 d_c u of p_c."""
    options = {"temperature": temperature, **options}
    expected = oracle.token_logprobs_backward(logits, target, dlogprob, dentropy, axis, **options)
    got, want = _as_rows("token_logprobs_backward", got, expected, axis)
    _, computed, _ = _formats(got)
    rows, scaled_by = oracle.to_rows(logits, axis), oracle.row_temperature(temperature)
    distance, _ = _distance_and_gap(logits, axis, temperature)
    probs = oracle.softmax_rows(rows, scaled_by)
    upstream = np.abs(np.reshape(dlogprob, (len(rows), -1)).astype(np.longdouble)).sum(axis=1, keepdims=True)
    slope = 0 if dentropy is None else np.abs(np.reshape(dentropy, (len(rows), 1)).astype(np.longdouble))
    mean = np.where(probs == 0, 0, probs * distance).sum(axis=1, keepdims=True)
    spread = np.where(probs == 0, 0, (32 + 3 * distance) * probs * (upstream + slope * (distance + mean)))
    labels = np.where(want != 0, 32 * upstream, 0) * _at_targets(target, rows.shape)
    tolerance = computed.unit * (spread + labels) / scaled_by
    return _compare(
        "token_logprobs_backward", got, want, _and_rounding(_or_flushed(tolerance, want, computed), want, got)
    )


def _at_targets(target, shape):
    """1 at the columns that are targets of their rows, else 0."""
    targets = np.reshape(target, (shape[0], -1))
    return (np.arange(shape[1]) == targets[:, :, None]).any(axis=1)


@_quiet
def check_softmax_backward(got, probs, dprobs, axis=-1, temperature=1.0):
    """p (g - sum p g) / T may be off by 32 u p (|g| + sum p |g|) / T."""
    expected = oracle.softmax_backward(probs, dprobs, axis, temperature=temperature)
    got, want = _as_rows("softmax_backward", got, expected, axis)
    _, computed, _ = _formats(got)
    p, g = (np.abs(oracle.to_rows(x, axis)) for x in (probs, dprobs))
    terms = p * (g + (p * g).sum(axis=1, keepdims=True)) / oracle.row_temperature(temperature)
    tolerance = _or_flushed(32 * computed.unit * terms, want, computed)
    return _compare("softmax_backward", got, want, _and_rounding(tolerance, want, got), terms)


@_quiet
def check_log_softmax_backward(got, log_probs, dlog_probs, axis=-1, temperature=1.0):
    """(g - exp(y) sum g) / T may be off by u (32 |g| + (32 + |y|) exp(y) sum |g|) / T; |y| is exp's own share."""
    expected = oracle.log_softmax_backward(log_probs, dlog_probs, axis, temperature=temperature)
    got, want = _as_rows("log_softmax_backward", got, expected, axis)
    _, computed, _ = _formats(got)
    y, g = oracle.to_rows(log_probs, axis), np.abs(oracle.to_rows(dlog_probs, axis))
    probs = (1 + np.abs(_finite(y)) / 32) * np.exp(y)
    terms = (g + probs * g.sum(axis=1, keepdims=True)) / oracle.row_temperature(temperature)
    tolerance = _or_flushed(32 * computed.unit * terms, want, computed)
    return _compare("log_softmax_backward", got, want, _and_rounding(tolerance, want, got), terms)


@_quiet
def worst_ulp(got, expected):
    """Largest |got - expected| in ulp of got's dtype at the expected value; infinite where NaN or infinities differ.

    Elements that may have been flushed to zero (below 2^-126; float64: 2^-1022) count only beyond that absolute error.
    """
    got, expected = np.asarray(got), np.asarray(expected, np.longdouble)
    error, _ = _errors(got, expected)
    return _largest(error, _formats(got)[0].ulp(_finite(expected)), got, expected)


# Bounds


def _distance_and_gap(logits, axis, temperature):
    """(max - x) / T as (n_rows, n_cols), and (max - second maximum) / T as (n_rows, 1), 0 where there is no second."""
    rows, temperature = oracle.to_rows(logits, axis), oracle.row_temperature(temperature)
    row_max = rows.max(axis=1, keepdims=True, initial=-np.inf)
    below = np.where(rows < row_max, rows, -np.inf).max(axis=1, keepdims=True, initial=-np.inf)
    tied = (rows == row_max).sum(axis=1, keepdims=True) > 1
    gap = np.where(tied, 0, _finite(row_max - below))
    return (row_max - rows) / temperature, gap / temperature


def _moment_bound(places, want, logits, axis, temperature, computed):
    """How far a sum of p_c `places`, which is `want`, may be off; (n_rows, 1)."""
    probs = oracle.to_rows(oracle.softmax(logits, axis, temperature=temperature), axis)
    distance, _ = _distance_and_gap(logits, axis, temperature)
    weighted = np.where(probs > 0, probs * distance, 0)
    spread = (weighted * places).sum(axis=1, keepdims=True) + want * weighted.sum(axis=1, keepdims=True)
    return computed.unit * (24 * want + 3 * spread) + computed.tiny * places.sum(dtype=np.longdouble)


def _compare_with_probs(name, got, want, factors, logits, axis, temperature):
    """Of elements p times something whose parts add up to `factors`: within (32 + d) u of the magnitudes."""
    _, computed, _ = _formats(got)
    probs = oracle.to_rows(oracle.softmax(logits, axis, temperature=temperature), axis)
    distance, _ = _distance_and_gap(logits, axis, temperature)
    terms = probs * factors
    tolerance = computed.unit * (32 + np.where(probs > 0, distance, 0)) * terms
    flushed = np.where(probs < 2 * computed.tiny, computed.tiny * factors, 0)  # probabilities that may be 0
    tolerance = np.where(np.isinf(distance), 0, _or_flushed(tolerance, want, computed) + flushed)
    return _compare(name, got, want, _and_rounding(tolerance, want, got), terms)


def _row_loss_bounds(logits, target, weight, computed, **options):
    """Magnitude S of each row's terms, and the bound that follows; each (n_rows, 1)."""
    magnitudes = None if weight is None else np.abs(oracle.class_weights(weight, len(weight)))
    options = {**options, "reduction": "none"}
    terms = oracle.cross_entropy(logits, target, magnitudes, **options)
    eps = np.longdouble(options.pop("label_smoothing", 0))
    if eps != 0:
        mean_weight = 1 if weight is None else magnitudes.mean()
        terms = terms + 2 * eps * mean_weight * oracle.cross_entropy(logits, target, **options)
    terms = terms.reshape(-1, 1)
    _, gap = _distance_and_gap(logits, options.get("axis", -1), options.get("temperature", 1.0))
    return terms, _loss_units(gap, computed) * computed.unit * terms


def _loss_units(gap, computed):
    """24 + gap; a gap counts until all but the maximum are flushed to zero, or huge logits would excuse anything."""
    return 24 + np.minimum(gap, -np.log(computed.tiny))


def _upstream_and_zeros(
    logits,
    target,
    weight,
    grad_scale,
    *,
    axis=-1,
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.0,
    temperature=1.0,
):
    """What each row's gradient is multiplied by, (n_rows, 1), and which elements are 0 by definition."""
    labels, n_cols = np.ravel(target), np.shape(logits)[axis]
    magnitudes = np.abs(oracle.class_weights(weight, n_cols))
    ignored, _, safe = oracle.read_labels(labels, n_cols, ignore_index)
    factor = np.abs(oracle.row_factor(labels, weight, n_cols, ignore_index, reduction, grad_scale))
    own = (1 - label_smoothing) * magnitudes[safe] + label_smoothing * magnitudes.mean()
    upstream = (factor * own)[:, None] / oracle.row_temperature(temperature)

    distance, _ = _distance_and_gap(logits, axis, temperature)
    masked = np.isinf(distance) & (np.arange(n_cols) != safe[:, None]) & (label_smoothing == 0)
    return upstream, ignored[:, None] | masked


def _or_flushed(tolerance, want, computed):
    """A result that may lie below the smallest normal number may also be 0."""
    return np.where(np.abs(want) - tolerance < computed.tiny, tolerance + computed.tiny, tolerance)


def _and_rounding(tolerance, want, got):
    result, _, half = _formats(got)
    return tolerance + HALF_ULP * result.ulp(_finite(want)) if half else tolerance


# Comparing


def _compare(name, got, want, tolerance, scale=None):
    """Both (n_rows, n_cols); tolerance absolute. Errors are counted in ulp at `scale`, which is `want` by default."""
    error, differs = _errors(got, want)
    tolerance = np.broadcast_to(tolerance, want.shape)
    spacing = _formats(got)[0].ulp(np.broadcast_to(_finite(want if scale is None else scale), want.shape))
    within = np.isfinite(tolerance) & (error <= tolerance)  # a bound gone wrong must not pass for a wide one
    outside = differs | (np.isfinite(want) & ~within)
    if outside.any():
        excess = np.where(outside, error / tolerance, -1)
        row, col = np.unravel_index(np.argmax(excess), excess.shape)
        off_by, bound = (float(part[row, col] / spacing[row, col]) for part in (error, tolerance))
        raise AssertionError(
            f"{name}: row {row}, column {col}: got {_digits(got[row, col])}, expected {_digits(want[row, col])}, "
            f"off by {off_by:.4g} ulp, bound {bound:.4g} ulp; {outside.sum()} of {outside.size} elements outside"
        )
    return _largest(error, spacing, got, want)


def _errors(got, want):
    """|got - want|, and where they differ in being NaN or infinite (there the error is infinite).

    An infinity got for a finite value counts as the first power of two that overflows, as it does when rounding.
    """
    limit = _formats(got)[0].limit
    got = _widened(got)
    error = np.abs(np.clip(got, -limit, limit) - np.clip(want, -limit, limit))
    special = ~np.isfinite(want)
    differs = (np.isnan(got) != np.isnan(want)) | (special & (got != want) & ~np.isnan(want))
    error[special] = 0
    error[differs] = np.inf
    return error, differs


def _largest(error, spacing, got, want):
    _, computed, _ = _formats(got)
    counted = (error > computed.tiny) | (np.abs(want) >= computed.tiny)  # the others may have been flushed to zero
    return float((error / spacing).max(initial=0, where=counted))


def _compare_row_sums(name, got, want, tolerance):
    """Rows with NaN or infinities have been judged by element."""
    usable = np.isfinite(want).all(axis=1) & np.isfinite(_widened(got)).all(axis=1)
    error = np.abs(_widened(got).sum(axis=1) - want.sum(axis=1))
    outside = usable & (error > tolerance)
    if outside.any():
        row = np.argmax(np.where(outside, error, -1))
        raise AssertionError(
            f"{name}: sum of row {row}: got {_digits(_widened(got[row]).sum())}, expected "
            f"{_digits(want[row].sum())}, bound {np.broadcast_to(tolerance, error.shape)[row]:.4g}; "
            f"{outside.sum()} of {outside.size} rows outside"
        )


def _as_rows(name, got, expected, axis):
    """Result and exact value as (n_rows, n_cols), the result still in its dtype."""
    got = _checked(name, got, expected)
    rows = oracle.to_rows(got, axis)
    return rows.astype(got.dtype), oracle.to_rows(expected, axis)


def _as_column(name, got, expected):
    return _checked(name, got, expected).reshape(-1, 1), np.asarray(expected).reshape(-1, 1)


def _checked(name, got, expected):
    if not hasattr(got, "dtype"):
        raise TypeError(f"{name}: got a {type(got).__name__}; its dtype is needed to know the bound")
    got = np.asarray(got)
    if got.shape != np.shape(expected):
        raise AssertionError(f"{name}: got shape {got.shape}, expected {np.shape(expected)}")
    if got.dtype.name not in FORMATS:
        raise AssertionError(f"{name}: got dtype {got.dtype}, expected one of {', '.join(FORMATS)}")
    return got


def _formats(got):
    """(format of the result, format it is computed in, whether they differ)."""
    half = got.dtype.name in ("float16", "bfloat16")
    return FORMATS[got.dtype.name], FORMATS["float32" if half else got.dtype.name], half


def _widened(got):
    return got.astype(np.longdouble)


def _finite(value):
    """Zero in place of NaN and infinities, where only finite elements are going to be used."""
    return np.where(np.isfinite(value), value, 0)


def _digits(value):
    return np.format_float_scientific(np.longdouble(value), precision=20, trim="-")
