"""The comparison rules pass an honest kernel and reject planted mistakes, in every family in which these can show.

The honest kernel is written in NumPy below, in the working precision and in chunks of 64 columns merged online, as the
library does it. Each mistake is one change to it.
"""

import numpy as np
import pytest

from tests import inputs, oracle, tolerances

FAMILIES = sorted(inputs.FAMILIES)
SHAPE = (11, 397)  # rows for every masking structure; columns with an odd end and a last chunk that is not full
FLOAT16, BFLOAT16, FLOAT32, FLOAT64 = inputs.DTYPES
dtypes = pytest.mark.parametrize("dtype", inputs.DTYPES, ids=str)
two_dtypes = pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32], ids=str)  # where the type hardly matters
families = pytest.mark.parametrize("family", FAMILIES)
quiet = np.errstate(all="ignore")


def all_families_but(*names):
    return pytest.mark.parametrize("family", [family for family in FAMILIES if family not in names])


def only_families(*names):
    return pytest.mark.parametrize("family", names)


def rejects(check, *args, **options):
    with pytest.raises(AssertionError, match="off by|sum of row"):
        check(*args, **options)


# The honest kernel


def working_type(dtype):
    return FLOAT64 if dtype == FLOAT64 else FLOAT32


def exp_of(difference, temperature):
    """exp(difference / T) rounded once, as by an exp that takes 1/T, in two parts, into its range reduction."""
    if temperature == 1:
        return np.exp(difference)
    wide = np.longdouble if difference.dtype == FLOAT64 else np.float64
    return np.exp(difference.astype(wide) / wide(temperature)).astype(difference.dtype)


@quiet
def row_state(logits, temperature=1.0, *, chunk=64, rescale=True, sum_type=None):
    """(max, ties, tail) of each row as columns, in the working type."""
    work = working_type(logits.dtype).type
    sum_type = work if sum_type is None else sum_type
    x = logits.astype(work)
    row_max = np.full((len(x), 1), -np.inf, work)
    ties, tail = np.zeros((len(x), 1), work), np.zeros((len(x), 1), sum_type)
    for first in range(0, x.shape[1], chunk):
        part = x[:, first : first + chunk]
        part_max = part.max(axis=1, keepdims=True)
        part_ties = (part == part_max).sum(axis=1, keepdims=True).astype(work)
        terms = np.where(part == part_max, 0, exp_of(part - part_max, temperature))
        part_tail = terms.astype(sum_type).sum(axis=1, keepdims=True, dtype=sum_type)

        new_max = np.maximum(row_max, part_max)
        old_side = rescaled(ties, tail, row_max - new_max, temperature, rescale)
        new_side = rescaled(part_ties, part_tail, part_max - new_max, temperature, True)
        tail = (old_side + new_side).astype(sum_type)
        ties = np.where(row_max == new_max, ties, 0) + np.where(part_max == new_max, part_ties, 0)
        row_max = new_max
    return row_max, ties, tail.astype(work)


def rescaled(ties, tail, distance, temperature, rescale):
    """One side's share of the tail under the common maximum; nothing when it has seen only -inf."""
    if not rescale:
        return tail + np.where(distance == 0, 0, ties)
    factor = np.where(np.isnan(distance), 0, exp_of(distance, temperature))
    return np.where(factor == 1, tail, (ties + tail) * factor)


@quiet
def run_softmax(logits, temperature=1.0, result=None, state=None):
    work = working_type(logits.dtype).type
    row_max, ties, tail = row_state(logits, temperature) if state is None else state
    probs = exp_of(logits.astype(work) - row_max, temperature) / (ties + tail)
    return probs.astype(logits.dtype if result is None else result)


@quiet
def run_log_softmax(logits, temperature=1.0, state=None):
    work = working_type(logits.dtype).type
    row_max, ties, tail = row_state(logits, temperature) if state is None else state
    log_probs = (logits.astype(work) - row_max) * work(1 / temperature) - np.log1p(ties - 1 + tail)
    return log_probs.astype(logits.dtype)


@quiet
def run_logsumexp(logits, temperature=1.0, state=None):
    """The last step is done twice as wide: near lse = 0, max and log(s) cancel and their own rounding would show."""
    row_max, ties, tail = row_state(logits, temperature) if state is None else state
    wide = [part.astype(np.longdouble) for part in (row_max, ties, tail)]
    return (wide[0] / temperature + np.log(wide[1] + wide[2])).astype(row_max.dtype)[:, 0]


@quiet
def run_nll(logits, target, temperature=1.0, state=None):
    """log1p(s - 1) + (max - x[target]) for labels in range, (n_rows, 1)."""
    row_max, ties, tail = row_state(logits, temperature) if state is None else state
    at_target = np.take_along_axis(logits.astype(row_max.dtype), target[:, None], axis=1)
    return np.log1p(ties - 1 + tail) + (row_max - at_target) * row_max.dtype.type(1 / temperature)


@quiet
def run_loss(
    logits,
    target,
    weight=None,
    *,
    reduction="mean",
    label_smoothing=0.0,
    smoothing_classes=None,
    count_ignored=False,
    weigh_count=True,
    state=None,
):
    work = working_type(logits.dtype).type
    x, n_cols, eps = logits.astype(work), logits.shape[1], work(label_smoothing)
    weight = np.ones(n_cols, work) if weight is None else weight.astype(work)
    valid = target != -100
    safe = np.where(valid, target, 0)
    nll = run_nll(logits, safe, state=state)[:, 0]
    loss = (1 - eps) * weight[safe] * nll
    if label_smoothing:
        drift = (weight * (x - x[np.arange(len(x)), safe][:, None])).sum(axis=1)
        loss = loss + eps / work(smoothing_classes or n_cols) * (weight.sum() * nll - drift)
    loss = np.where(valid, loss, 0)
    if reduction == "none":
        return loss
    count = weight[safe] if weigh_count else np.ones_like(loss)
    total = count[valid | count_ignored].sum()
    return loss.sum() if reduction == "sum" else loss.sum() / total


@quiet
def run_dlogits(logits, target, weight=None, *, reduction="mean", label_smoothing=0.0, grad_scale=1.0, state=None):
    work = working_type(logits.dtype).type
    n_cols, eps = logits.shape[1], work(label_smoothing)
    weight = np.ones(n_cols, work) if weight is None else weight.astype(work)
    valid = target != -100
    safe = np.where(valid, target, 0)
    factor = work(grad_scale) / (weight[safe[valid]].sum() if reduction == "mean" else work(1))
    probs = run_softmax(logits, result=work, state=state)
    one_hot = np.arange(n_cols) == safe[:, None]
    dlogits = (1 - eps) * weight[safe][:, None] * (probs - one_hot)
    if label_smoothing:
        dlogits += eps / work(n_cols) * (probs * weight.sum() - weight)
    return np.where(valid[:, None], dlogits * factor, 0).astype(logits.dtype)


@quiet
def run_softmax_backward(probs, dprobs):
    p, g = (x.astype(working_type(x.dtype)) for x in (probs, dprobs))
    return (p * (g - (p * g).sum(axis=1, keepdims=True))).astype(probs.dtype)


@quiet
def run_log_softmax_backward(log_probs, dlog_probs):
    y, g = (x.astype(working_type(x.dtype)) for x in (log_probs, dlog_probs))
    return (g - np.exp(y) * g.sum(axis=1, keepdims=True)).astype(log_probs.dtype)


def class_weights(n_cols):
    return np.random.default_rng(1).uniform(0.25, 4, n_cols).astype(np.float32)


def some_ignored(target):
    target = target.copy()
    target[::4] = -100
    return target


# The honest kernel passes


@families
@dtypes
@pytest.mark.parametrize("n_cols", [1, SHAPE[1]])
def test_honest_kernel_passes(family, dtype, n_cols):
    logits = inputs.make(family, (SHAPE[0], n_cols), dtype)
    state = row_state(logits)
    tolerances.check_softmax(run_softmax(logits, state=state), logits)
    tolerances.check_log_softmax(run_log_softmax(logits, state=state), logits)
    tolerances.check_logsumexp(run_logsumexp(logits, state=state), logits)
    for target in (inputs.targets(*logits.shape, share_ignored=0.3), inputs.targets_at_max(logits)):
        for reduction in ("none", "mean"):
            loss = run_loss(logits, target, reduction=reduction, state=state)
            tolerances.check_loss(loss, logits, target, reduction=reduction)
        tolerances.check_dlogits(run_dlogits(logits, target, state=state), logits, target)


@all_families_but("huge", "masked")  # huge: the sum of x - x[target] overflows; masked: infinite
@dtypes
def test_honest_smoothing_and_weights_pass(family, dtype):
    logits, weight = inputs.make(family, SHAPE, dtype), class_weights(SHAPE[1])
    for target in (inputs.targets(*SHAPE, share_ignored=0.3), inputs.targets_at_max(logits)):
        options = {"label_smoothing": 0.1}
        for reduction in ("none", "sum", "mean"):
            loss = run_loss(logits, target, weight, reduction=reduction, **options)
            tolerances.check_loss(loss, logits, target, weight, reduction=reduction, **options)
        dlogits = run_dlogits(logits, target, weight, grad_scale=128, **options)
        tolerances.check_dlogits(dlogits, logits, target, weight, grad_scale=128, **options)


@families
@dtypes
def test_honest_temperature_passes(family, dtype):
    logits, temperature = inputs.make(family, SHAPE, dtype), 3.0 if family == "huge" else 0.7
    state = row_state(logits, temperature)
    tolerances.check_softmax(run_softmax(logits, temperature, state=state), logits, temperature=temperature)
    tolerances.check_log_softmax(run_log_softmax(logits, temperature, state), logits, temperature=temperature)
    tolerances.check_logsumexp(run_logsumexp(logits, temperature, state), logits, temperature=temperature)


@all_families_but("huge")
@dtypes
def test_honest_backwards_pass(family, dtype):
    logits = inputs.make(family, SHAPE, dtype)
    upstream = inputs.make("spread", SHAPE, dtype, seed=1)
    probs, log_probs = run_softmax(logits), run_log_softmax(logits)
    tolerances.check_softmax_backward(run_softmax_backward(probs, upstream), probs, upstream)
    tolerances.check_log_softmax_backward(run_log_softmax_backward(log_probs, upstream), log_probs, upstream)


def test_other_axes_pass_and_fail():
    logits = inputs.make("spread", (4, 33, 6), FLOAT32)
    probs = np.moveaxis(run_softmax(np.moveaxis(logits, 1, -1).reshape(24, 33)).reshape(4, 6, 33), -1, 1)
    tolerances.check_softmax(probs, logits, axis=1)
    rejects(tolerances.check_softmax, probs, logits, axis=-1)


def test_flushing_to_zero_passes():
    logits = inputs.make("confident", (9, 200), FLOAT32) * 2  # gaps up to 160
    probs = run_softmax(logits)
    assert ((probs > 0) & (probs < 2.0**-126)).any()
    tolerances.check_softmax(np.where(probs < 2.0**-126, 0, probs), logits)


def test_infinity_next_to_the_limit_passes():
    logits = np.full((1, 4), np.finfo(np.float32).max)
    tolerances.check_logsumexp(np.array([np.inf], np.float32), logits, temperature=0.5)
    tolerances.check_log_softmax(np.array([[0, -np.inf]], np.float32), np.array([[3e38, -3e38]], np.float32))
    rejects(tolerances.check_logsumexp, np.array([np.inf], np.float32), np.float32([[3e38, 3e38]]))


def test_mean_whose_sum_overflows_passes():
    logits, target = np.array([[3e38, 0]] * 4, np.float32), np.ones(4, np.int64)
    tolerances.check_loss(np.float32(np.inf), logits, target)
    tolerances.check_loss(np.float32(3e38), logits, target)
    rejects(tolerances.check_loss, np.float32(np.inf), logits / 16, target)


# Planted mistakes: the sum


@all_families_but("flat")  # one value: no maximum is ever raised
@two_dtypes
def test_sum_not_rescaled_after_a_new_maximum(family, dtype):
    logits = inputs.make(family, SHAPE, dtype)
    state = row_state(logits, rescale=False)
    target = inputs.targets_at_max(logits)
    rejects(tolerances.check_softmax, run_softmax(logits, state=state), logits)
    rejects(tolerances.check_loss, run_loss(logits, target, state=state), logits, target)
    if family != "huge":  # next to max, log(s) is nothing
        rejects(tolerances.check_logsumexp, run_logsumexp(logits, state=state), logits)


@families
@two_dtypes
def test_last_column_missing_from_the_sum(family, dtype):
    logits = inputs.make(family, SHAPE, dtype)
    at_max, rows = inputs.targets_at_max(logits), np.arange(len(logits))
    logits[rows, at_max], logits[:, -1] = logits[:, -1].copy(), logits[rows, at_max]  # where it counts
    state = row_state(logits[:, :-1])
    if (family, dtype) != ("flat", BFLOAT16):  # 1/396 and 1/397 round to the same
        rejects(tolerances.check_softmax, run_softmax(logits, state=state), logits)
    rejects(tolerances.check_logsumexp, run_logsumexp(logits, state=state), logits)


@families
@two_dtypes
def test_last_column_not_written(family, dtype):
    logits = np.sort(inputs.make(family, SHAPE, dtype).astype(np.float64), axis=1).astype(dtype)
    target = np.zeros(len(logits), np.int64)
    for check, result, args in (
        (tolerances.check_softmax, run_softmax(logits), (logits,)),
        (tolerances.check_dlogits, run_dlogits(logits, target), (logits, target)),
    ):
        result[:, -1] = 0
        rejects(check, result, *args)


@only_families("spread", "ties", "flat", "offset", "masked", "sorted")  # in the others a few terms make the sum
def test_float16_accumulator(family):
    logits = inputs.make(family, (11, 4099), FLOAT32)  # flat: float16 stops counting at 2048
    row_max, ties, tail = row_state(logits, sum_type=np.float16)
    state = row_max, ties.astype(np.float16).astype(np.float32), tail
    if family == "flat":
        state = row_max, np.minimum(ties, 2048), tail
    rejects(tolerances.check_softmax, run_softmax(logits, state=state), logits)
    if family != "offset":  # next to 1e4 that is below the rounding of lse
        rejects(tolerances.check_logsumexp, run_logsumexp(logits, state=state), logits)


def test_all_masked_lane_poisons_the_merge():
    logits = inputs.make("masked", SHAPE, FLOAT32, structure="chunks")
    probs = run_softmax(logits)
    probs[0] = np.nan  # -inf - -inf in one lane
    rejects(tolerances.check_softmax, probs, logits)


# Planted mistakes: the loss


@all_families_but("flat")  # every column has the same loss
@two_dtypes
def test_off_by_one_target(family, dtype):
    logits = inputs.make(family, SHAPE, dtype)
    target = inputs.targets_unmasked(logits)
    beside = (target + 1) % SHAPE[1]
    rejects(tolerances.check_loss, run_loss(logits, beside, reduction="none"), logits, target, reduction="none")


@families
@two_dtypes
def test_off_by_one_target_in_the_gradient(family, dtype):
    logits = inputs.make(family, SHAPE, dtype)
    target = inputs.targets_unmasked(logits)
    beside = (target + 1) % SHAPE[1]
    rejects(tolerances.check_dlogits, run_dlogits(logits, beside), logits, target)


@only_families("offset", "confident", "peaked")  # where lse is much larger than the loss
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)
def test_loss_as_lse_minus_target(family, dtype):
    logits = inputs.make(family, SHAPE, dtype)
    target = inputs.targets_at_max(logits)
    loss = run_logsumexp(logits) - np.take_along_axis(logits, target[:, None], axis=1)[:, 0]
    rejects(tolerances.check_loss, loss, logits, target, reduction="none")


@only_families("confident", "peaked")
@dtypes
def test_log_of_the_sum_of_a_confident_row(family, dtype):
    logits = inputs.make(family, SHAPE, dtype)
    row_max, ties, tail = row_state(logits)
    loss = np.log(ties + tail)[:, 0]
    rejects(tolerances.check_loss, loss, logits, inputs.targets_at_max(logits), reduction="none")
    work = row_max.dtype
    log_probs = (logits.astype(work) - row_max - np.log(ties + tail)).astype(dtype)
    if dtype != FLOAT16:  # whose subnormal numbers are too coarse to show it
        rejects(tolerances.check_log_softmax, log_probs, logits)


@all_families_but("huge")  # the sum of the rows overflows
@two_dtypes
def test_mean_over_all_rows_instead_of_valid_ones(family, dtype):
    logits = inputs.make(family, SHAPE, dtype)
    target = some_ignored(inputs.targets_unmasked(logits))
    rejects(tolerances.check_loss, run_loss(logits, target, count_ignored=True), logits, target)
    share = np.mean(target != -100)
    rejects(tolerances.check_dlogits, run_dlogits(logits, target, grad_scale=share), logits, target)


@all_families_but("huge", "masked")
@two_dtypes
def test_smoothing_over_one_class_too_few(family, dtype):
    logits, options = inputs.make(family, SHAPE, dtype), {"reduction": "none", "label_smoothing": 0.1}
    target = inputs.targets_at_max(logits)
    loss = run_loss(logits, target, smoothing_classes=SHAPE[1] - 1, **options)
    rejects(tolerances.check_loss, loss, logits, target, **options)


@families
@two_dtypes
def test_smoothing_forgotten_in_the_gradient(family, dtype):
    logits = inputs.make(family, SHAPE, dtype)
    target = inputs.targets_at_max(logits)
    rejects(tolerances.check_dlogits, run_dlogits(logits, target), logits, target, label_smoothing=0.1)


@all_families_but("huge")
@two_dtypes
def test_weight_not_applied_in_the_denominator(family, dtype):
    logits, weight = inputs.make(family, SHAPE, dtype), class_weights(SHAPE[1])
    target = inputs.targets_unmasked(logits)
    rejects(tolerances.check_loss, run_loss(logits, target, weight, weigh_count=False), logits, target, weight)
    factor = weight[target].mean()
    rejects(tolerances.check_dlogits, run_dlogits(logits, target, weight, grad_scale=factor), logits, target, weight)


# Planted mistakes: the gradient


@families
@two_dtypes
def test_gradient_of_the_target_only(family, dtype):
    logits = inputs.make(family, SHAPE, dtype)
    target = inputs.targets_unmasked(logits)
    dlogits = run_dlogits(logits, target, reduction="none")
    dlogits[np.arange(SHAPE[1]) != target[:, None]] = 0
    rejects(tolerances.check_dlogits, dlogits, logits, target, reduction="none")


def test_gradient_of_the_target_only_among_half_a_million_columns():
    """Each missing entry is within the element bound; their sum is not."""
    logits, target = np.zeros((1, 1 << 19), np.float32), np.array([5])
    dlogits = np.zeros_like(logits)
    dlogits[0, 5] = -1
    with pytest.raises(AssertionError, match="dlogits: sum of row 0"):
        tolerances.check_dlogits(dlogits, logits, target)


@dtypes
def test_ignored_row_must_be_exactly_zero(dtype):
    logits, target = inputs.make("spread", SHAPE, dtype), inputs.targets(*SHAPE)
    target[3] = -100
    dlogits, loss = run_dlogits(logits, target), run_loss(logits, target, reduction="none")
    dlogits[3, 7] = loss[3] = ulp_of(dtype)
    rejects(tolerances.check_dlogits, dlogits, logits, target)
    rejects(tolerances.check_loss, loss, logits, target, reduction="none")


def ulp_of(dtype):
    return {FLOAT16: 2.0**-24, BFLOAT16: 2.0**-126, FLOAT32: 2.0**-126, FLOAT64: 2.0**-1022}[dtype]


@dtypes
def test_backward_without_its_row_sum(dtype):
    probs = run_softmax(inputs.make("spread", SHAPE, dtype))
    upstream = inputs.make("spread", SHAPE, dtype, seed=1)
    rejects(tolerances.check_softmax_backward, probs * upstream, probs, upstream)
    log_probs = run_log_softmax(inputs.make("spread", SHAPE, dtype))
    rejects(tolerances.check_log_softmax_backward, upstream, log_probs, upstream)


# Planted mistakes: tokens


def textbook_scores(logits, rows_dtype=FLOAT32):
    """(probs, log_probs, entropy) of each row by the textbook, rounded."""
    log_probs = oracle.log_softmax(logits)
    probs = np.exp(log_probs)
    entropy = -np.where(probs == 0, 0, probs * log_probs).sum(axis=1)
    return probs, log_probs, entropy.astype(rows_dtype)


@pytest.mark.parametrize("family", ["spread", "peaked", "flat", "ties", "offset", "confident"])
def test_entropies_that_are_a_little_wrong(family):
    logits = inputs.make(family, SHAPE, FLOAT32)
    _, _, entropy = textbook_scores(logits)
    tolerances.check_entropy(entropy, logits)
    rejects(tolerances.check_entropy, entropy * np.float32(1 + 2**-12), logits)
    rejects(tolerances.check_entropy, entropy / np.float32(np.log(2)), logits)  # bits


def test_entropy_by_cancellation():
    """lse - sum p x loses what confident rows have, and all rows that lie far from 0."""
    for family in ("offset", "confident"):
        logits = inputs.make(family, SHAPE, FLOAT32)
        probs = run_softmax(logits)
        rejects(tolerances.check_entropy, run_logsumexp(logits) - (probs * logits).sum(axis=1), logits)


def test_gradients_of_tokens_that_lack_a_term():
    logits = inputs.make("spread", SHAPE, FLOAT32)
    rows = np.arange(SHAPE[0])
    target, upstream = inputs.targets(*SHAPE), np.linspace(0.5, 2, SHAPE[0]).astype(FLOAT32)
    probs, log_probs, entropy = textbook_scores(logits)
    of_logprob = -probs * upstream[:, None]
    of_logprob[rows, target] += upstream
    of_entropy = -upstream[:, None] * probs * (log_probs + entropy[:, None])
    check = tolerances.check_token_logprobs_backward
    check((of_logprob + of_entropy).astype(FLOAT32), logits, target, upstream, upstream)
    for wrong in (of_logprob, of_entropy, of_logprob - of_entropy, of_logprob + of_entropy * (1 + 2**-12)):
        rejects(check, wrong.astype(FLOAT32), logits, target, upstream, upstream)
    without_label = of_logprob.copy()
    without_label[rows, target] -= upstream
    rejects(check, without_label.astype(FLOAT32), logits, target, upstream, None)


# Planted mistakes: rounding


def rounded_wrongly(exact, dtype):
    """The neighbour on the far side of each exact value: up to one ulp off in place of a half."""
    nearest = exact.astype(dtype)
    return np.where(nearest > exact, np.nextafter(nearest, dtype.type(-1)), np.nextafter(nearest, dtype.type(1)))


@all_families_but("huge")  # zeros and, where it is not, ones
@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=str)
def test_one_ulp_too_many_in_half_types(family, dtype):
    logits = inputs.make(family, SHAPE, dtype)
    exact = oracle.softmax(logits)
    tolerances.check_softmax(exact.astype(dtype), logits)
    wrong = np.where(exact > 0, rounded_wrongly(exact, dtype), 0).astype(dtype)
    rejects(tolerances.check_softmax, wrong, logits)


@only_families("spread", "offset", "sorted")
def test_bfloat16_truncated_rounded_twice_or_computed_in_half(family):
    logits = inputs.make(family, SHAPE, BFLOAT16)
    probs = run_softmax(logits, result=FLOAT32)
    tolerances.check_softmax(probs.astype(BFLOAT16), logits)
    truncated = (probs.view(np.uint32) >> 16).astype(np.uint16).view(BFLOAT16)
    rejects(tolerances.check_softmax, truncated, logits)
    by_way_of_float16 = np.where(probs > 2.0**-14, probs.astype(np.float16).astype(np.float32), probs)
    rejects(tolerances.check_softmax, by_way_of_float16.astype(BFLOAT16), logits)
    state = [part.astype(BFLOAT16).astype(np.float32) for part in row_state(logits)]  # the sum rounded to half
    rejects(tolerances.check_softmax, run_softmax(logits, state=state), logits)


def test_goal_of_four_ulp():
    """float32 that rounds x - max misses the goal; the exact value, rounded, does not."""
    logits = inputs.make("spread", SHAPE, FLOAT32)
    assert tolerances.check_softmax(oracle.softmax(logits).astype(np.float32), logits, ulp=4) <= 0.5
    assert 4 < tolerances.check_softmax(run_softmax(logits), logits) < 24 + 40
    rejects(tolerances.check_softmax, run_softmax(logits), logits, ulp=4)


@all_families_but("huge")  # its probabilities are exact in any type
def test_float32_passed_off_as_float64(family):
    logits = inputs.make(family, SHAPE, FLOAT64)
    rejects(tolerances.check_softmax, run_softmax(logits.astype(np.float32), result=FLOAT64), logits)


# Planted mistakes: NaN and infinities


@families
@two_dtypes
def test_nan_swallowed(family, dtype):
    logits = inputs.make(family, SHAPE, dtype)
    logits[2, 5] = np.nan
    swallowed = np.where(np.isnan(logits), -np.inf, logits).astype(dtype)  # max(x, NaN) = x
    target = np.zeros(SHAPE[0], np.int64)
    rejects(tolerances.check_softmax, run_softmax(swallowed), logits)
    rejects(tolerances.check_log_softmax, run_log_softmax(swallowed), logits)
    rejects(tolerances.check_logsumexp, run_logsumexp(swallowed), logits)
    rejects(tolerances.check_loss, run_loss(swallowed, target, reduction="none"), logits, target, reduction="none")
    rejects(tolerances.check_dlogits, run_dlogits(swallowed, target), logits, target)


def test_nan_in_a_neighbouring_row():
    logits = inputs.make("spread", SHAPE, FLOAT32)
    probs = run_softmax(logits)
    probs[4, 1] = np.nan
    rejects(tolerances.check_softmax, probs, logits)


@dtypes
def test_zero_in_place_of_minus_inf(dtype):
    logits = inputs.make("masked", SHAPE, dtype, whole_rows=1)
    masked = np.isneginf(logits.astype(np.float64))
    log_probs, lse = run_log_softmax(logits), run_logsumexp(logits)
    tolerances.check_log_softmax(log_probs, logits)
    rejects(tolerances.check_log_softmax, np.where(masked, 0, log_probs).astype(dtype), logits)
    tolerances.check_logsumexp(np.where(masked.all(axis=1), -np.inf, lse).astype(lse.dtype), logits)
    rejects(tolerances.check_logsumexp, np.where(masked.all(axis=1), 0, lse).astype(lse.dtype), logits)
    rejects(tolerances.check_softmax, np.where(masked, 0, run_softmax(logits)).astype(dtype), logits)


@dtypes
def test_masked_column_must_be_exactly_zero(dtype):
    logits, target = inputs.make("masked", SHAPE, dtype), np.zeros(SHAPE[0], np.int64)
    probs, dlogits = run_softmax(logits), run_dlogits(logits, target)
    index = tuple(np.argwhere(np.isneginf(logits[:, 1:].astype(np.float64)))[0] + [0, 1])
    probs[index] = dlogits[index] = ulp_of(dtype)
    rejects(tolerances.check_softmax, probs, logits)
    rejects(tolerances.check_dlogits, dlogits, logits, target)


@dtypes
def test_finite_loss_of_a_masked_target(dtype):
    logits = inputs.make("masked", SHAPE, dtype, structure="random")
    target = np.argmin(logits.astype(np.float64), axis=1)
    loss = run_loss(logits, target, reduction="none")
    tolerances.check_loss(loss, logits, target, reduction="none")
    rejects(tolerances.check_loss, np.zeros_like(loss), logits, target, reduction="none")


# What a failure says, and what the checks insist on


def test_message_names_the_worst_element():
    logits = inputs.make("spread", (3, 8), FLOAT32)
    probs = run_softmax(logits)
    probs[1, 2] *= 2
    probs[2, 5] *= 1.00001
    with pytest.raises(AssertionError, match=r"softmax: row 1, column 2: got .*, expected .*, off by .* ulp, bound "):
        tolerances.check_softmax(probs, logits)


def test_shape_and_dtype_are_insisted_on():
    logits = inputs.make("spread", (3, 8), FLOAT32)
    with pytest.raises(AssertionError, match="shape"):
        tolerances.check_softmax(run_softmax(logits)[:2], logits)
    with pytest.raises(AssertionError, match="dtype"):
        tolerances.check_softmax(np.zeros((3, 8), np.int64), logits)
    with pytest.raises(TypeError, match="dtype"):
        tolerances.check_loss(0.5, logits, np.zeros(3, np.int64))


@families
def test_worst_ulp(family):
    logits = inputs.make(family, SHAPE, FLOAT32)
    exact = oracle.softmax(logits)
    probs = exact.astype(np.float32)
    assert tolerances.worst_ulp(probs, exact) <= 0.5
    at_max = inputs.targets_at_max(probs)[0]
    probs[0, at_max] += 3 * np.spacing(probs[0, at_max])
    assert 2.5 <= tolerances.worst_ulp(probs, exact) <= 6.5  # across a power of two a step counts twice
    probs[0, 0] = np.nan
    assert tolerances.worst_ulp(probs, exact) == np.inf
    assert tolerances.worst_ulp(probs[:0], exact[:0]) == 0


# Expected positions


def expected_positions(logits, temperature=1.0, first=0):
    """The expected column, summed in the working precision and counted from `first`."""
    work = working_type(logits.dtype).type
    row_max, ties, tail = row_state(logits, temperature)
    e = exp_of(logits.astype(work) - row_max, temperature)
    return ((e * np.arange(first, first + e.shape[1]).astype(work)).sum(axis=1) / e.sum(axis=1)).astype(work)


@quiet
@families
@dtypes
def test_honest_expected_positions_pass(family, dtype):
    logits = inputs.make(family, SHAPE, dtype)
    expected = expected_positions(logits)
    tolerances.check_soft_argmax(expected, logits)
    upstream = np.linspace(-3, 3, len(logits)).astype(expected.dtype)
    dlogits = oracle.soft_argmax_backward(logits, expected, upstream).astype(dtype)
    tolerances.check_soft_argmax_backward(dlogits, logits, expected, upstream)


@quiet
@all_families_but("huge", "masked", "flat")  # where one column may be all there is, or all are alike
@two_dtypes
def test_expected_positions_gone_wrong(family, dtype):
    logits = inputs.make(family, SHAPE, dtype)
    rejects(tolerances.check_soft_argmax, expected_positions(logits, first=1), logits)
    rejects(tolerances.check_soft_argmax, expected_positions(logits, temperature=1.01), logits)
    rejects(tolerances.check_soft_argmax, expected_positions(logits) * np.float32(1 + 2e-5), logits)
    upstream = np.ones(len(logits), np.float32)
    expected = oracle.soft_argmax(logits).astype(np.float32)
    for wrong in (expected + 1, expected * np.float32(1.001)):
        dlogits = oracle.soft_argmax_backward(logits, wrong, upstream).astype(np.float32)
        rejects(tolerances.check_soft_argmax_backward, dlogits, logits, expected, upstream)


@quiet
@two_dtypes
def test_divergences_gone_wrong(dtype):
    """The difference of two sums, exponentials of another row, a factor that is a little off."""
    x, y = (inputs.make("spread", SHAPE, dtype, seed) for seed in (0, 1))
    near = (x.astype(np.float64) + 1e-2 * np.random.default_rng(0).standard_normal(SHAPE)).astype(dtype)
    for target_logits in (y, near):
        loss = oracle.kl_div(x, target_logits, reduction="none").astype(np.float32)
        tolerances.check_kl_div(loss, x, target_logits, reduction="none")
        rejects(tolerances.check_kl_div, loss * np.float32(1 + 2e-4), x, target_logits, reduction="none")
        rejects(tolerances.check_kl_div, loss[::-1], x, target_logits, reduction="none")
        grads = [one.astype(np.float32) for one in oracle.kl_div_grads(x, target_logits, reduction="none")]
        tolerances.check_kl_div_grads(*grads, x, target_logits, reduction="none")
        for wrong in (grads[::-1], (grads[0] * np.float32(1.01), grads[1]), (grads[0], grads[1] * np.float32(1.01))):
            rejects(tolerances.check_kl_div_grads, *wrong, x, target_logits, reduction="none")
    log_q, log_p = (oracle.log_softmax(one).astype(np.float32) for one in (x, near))
    naive = (np.exp(log_p) * (log_p - log_q)).sum(axis=1, dtype=np.float32)
    rejects(tolerances.check_kl_div, naive, x, near, reduction="none")


@quiet
@two_dtypes
def test_coordinates_gone_wrong(dtype):
    features = inputs.make("spread", (11, 20, 30), dtype)
    points = oracle.spatial_softmax(features).astype(np.float32)
    tolerances.check_spatial_softmax(points, features)
    upstream = np.linspace(-3, 3, points.size).reshape(points.shape).astype(np.float32)
    gradient = oracle.spatial_softmax_backward(features, points, upstream)
    tolerances.check_spatial_softmax_backward(gradient.astype(dtype), features, points, upstream)
    for wrong in (points[:, ::-1], points * np.float32([1, 1.001]), points + np.float32([0, 1e-5])):
        rejects(tolerances.check_spatial_softmax, wrong, features)
    for wrong in (upstream[:, ::-1], upstream * np.float32([1, 1.01])):
        gradient = oracle.spatial_softmax_backward(features, points, wrong).astype(np.float32)
        rejects(tolerances.check_spatial_softmax_backward, gradient, features, points, upstream)
