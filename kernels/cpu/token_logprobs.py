"""Log-probabilities of given tokens, and what the same read of their row tells, on the CPU.

For one row x at temperature T, with m = max x, s = sum_c exp((x_c - m) / T), distances d_c = (m - x_c) / T >= 0 and the
mean distance D = sum_c p_c d_c, p_c = exp(-d_c) / s:

    logprob of t = -(d_t + log s)               log_softmax(x / T)_t
    lse          = m / T + log s                logsumexp(x / T)
    entropy      = log s + D                    -sum_c p_c log p_c; no term is negative
    rank of t    = 1 + how many x_c > x_t
    argmax       = the first column that holds m

    dlogits_c    = (sum_j g_j [c = t_j] - p_c (sum_j g_j - h (d_c - D))) / T

g_j and h are the gradients with respect to the log-probabilities and to the entropy: d entropy / d x_c
= -p_c (log p_c + entropy) / T, where log p_c + entropy = D - d_c.

D is summed beside the state, chunk by chunk relative to the chunk's maximum.

A target that is ignore_index has log-probability 0 and passes on no gradient; one out of range is NaN. No rank: -1.
"""

import math
from typing import NamedTuple

from gpusoftmax.kernels.cpu.arithmetic import (
    add,
    add_pair,
    anchor,
    div,
    exp_from,
    floor,
    fma,
    log_probability,
    log_sum,
    mul,
    negative,
    rise_to,
    row_inverse,
    weighted,
    weighted_distance,
)
from gpusoftmax.kernels.cpu.arithmetic import (
    logsumexp as logsumexp_of_state,
)
from gpusoftmax.kernels.cpu.cache import device, kernel
from gpusoftmax.kernels.cpu.call import arguments
from gpusoftmax.kernels.cpu.chunks import chunk_max_and_above, sum_of_distances, sum_of_exponentials, write_chunk
from gpusoftmax.kernels.cpu.first_max import chunk_of_max, first_max, logit_at
from gpusoftmax.kernels.cpu.here import index_in, pulled_back
from gpusoftmax.kernels.cpu.lanes import (
    add_at,
)
from gpusoftmax.kernels.cpu.memory import (
    load,
    load_cols,
    load_label,
    pointer_to,
    store,
)
from gpusoftmax.kernels.cpu.rows import chunk_range, count_of_chunks, element, row_offset, save_maxima
from gpusoftmax.kernels.cpu.run import run
from gpusoftmax.kernels.cpu.states import (
    FIELDS,
    MAX,
    OWN,
    SUM,
    TIES,
    chunk_ratio,
    fold_state,
    save,
    save_state,
    saved,
)
from gpusoftmax.kernels.cpu.vector import (
    is_across,
    lanes_of,
    number,
)
from gpusoftmax.kernels.cpu.walk import walk
from gpusoftmax.kernels.operands import Labels, Operand, Place, Rows, scale_of, unless_one

# What is kept of a chunk beside its state.
DISTANCES, ABOVE, THRESHOLD = range(OWN, OWN + 3)
# And of a row, where the chunks end.
LARGEST, LOG, LSE, ENTROPY, ALL_ABOVE, ALL_ABOVE_LOW = range(6)


def token_logprobs(
    rows: Rows,
    logits: Operand,
    labels: Labels,
    logprobs: Operand,
    lse: Operand,
    entropy: Operand,
    ranks: Labels,
    argmax: Labels,
    n_targets: int,
    target_stride: int,
    ignore_index: int,
    temperature: float,
    place: Place,
) -> None:
    """What is asked for of each row: a result whose pointer is 0 is not.

    A row has n_targets labels, target_stride elements apart, and as many log-probabilities, side by side; it has a rank
    (int64) only if it has one target. argmax is int64.
    """
    run(
        token_logprobs_and_entropy_rows if entropy.pointer else token_logprobs_rows,
        rows,
        logits,
        None,
        None,
        labels,
        logprobs,
        lse,
        entropy,
        ranks,
        argmax,
        n_targets,
        target_stride,
        ignore_index,
        *unless_one(scale_of(1.0, temperature, logprobs.dtype)),
    )


def token_logprobs_backward(
    rows: Rows,
    logits: Operand,
    labels: Labels,
    dlogprobs: Operand,
    dentropy: Operand,
    dlogits: Operand,
    n_targets: int,
    target_stride: int,
    gradient_stride: int,
    ignore_index: int,
    temperature: float,
    place: Place,
) -> None:
    """dlogits, which may be the logits themselves, from the gradients of a row's n_targets log-probabilities, which lie
    gradient_stride elements apart, and that of its entropy, if that has a pointer.
    """
    run(
        logprobs_and_entropy_backward_rows if dentropy.pointer else logprobs_backward_rows,
        rows,
        logits,
        None,
        dlogits,
        labels,
        dlogprobs,
        dentropy,
        n_targets,
        target_stride,
        gradient_stride,
        ignore_index,
        *unless_one(scale_of(1.0, temperature, dlogprobs.dtype)),
    )


class Query(NamedTuple):
    """What the steps need besides the logits."""

    rows: Rows
    labels: Labels
    logprobs: object
    lse: object
    entropy: object
    ranks: Labels
    argmax: Labels
    n_targets: int
    target_stride: int
    ignore_index: int
    scale: object
    scale_low: object


class Gradients(NamedTuple):
    """What the steps of the backward need besides the logits."""

    rows: Rows
    labels: Labels
    dlogprobs: object
    dentropy: object
    n_targets: int
    target_stride: int
    gradient_stride: int
    ignore_index: int
    scale: object
    scale_low: object


class Slope(NamedTuple):
    """dlogits_c = e_c (on_distance d_c - on_probs) + scale g_j [c = t_j], for a row or for one row per lane."""

    shift: object
    exponent: object
    largest: object
    on_probs: object
    on_distance: object


@kernel
def token_logprobs_rows(call):
    way, job, logits, none, query = query_of(call)
    walk(way, job, query.rows, logits, logits, none, prepare, measure, fold, write, query, query.scale)


@kernel
def token_logprobs_and_entropy_rows(call):
    way, job, logits, none, query = query_of(call)
    walk(way, job, query.rows, logits, logits, none, prepare, measure_both, fold_both, write, query, query.scale)


@kernel
def logprobs_backward_rows(call):
    way, job, logits, dlogits, given = gradients_of(call)
    rows, like = given.rows, given.scale
    walk(way, job, rows, logits, logits, dlogits, save_maxima, measure, fold_slope, write_slope, given, like)


@kernel
def logprobs_and_entropy_backward_rows(call):
    way, job, logits, dlogits, given = gradients_of(call)
    rows, like = given.rows, given.scale
    walk(way, job, rows, logits, logits, dlogits, save_maxima, measure_both, fold_slopes, write_slopes, given, like)


@device
def query_of(call):
    (
        way, job, rows, logits, same, none, labels, logprobs, lse, entropy, ranks, argmax, n_targets, target_stride,
        ignore_index, scale, scale_low,
    ) = arguments(call)  # fmt: skip
    query = Query(
        rows, labels, logprobs, lse, entropy, ranks, argmax, n_targets, target_stride, ignore_index, scale, scale_low
    )
    return way, job, logits, none, query


@device
def gradients_of(call):
    (
        way, job, rows, logits, same, dlogits, labels, dlogprobs, dentropy, n_targets, target_stride, gradient_stride,
        ignore_index, scale, scale_low,
    ) = arguments(call)  # fmt: skip
    given = Gradients(
        rows, labels, dlogprobs, dentropy, n_targets, target_stride, gradient_stride, ignore_index, scale, scale_low
    )
    return way, job, logits, dlogits, given


@device
def label_of(row, j, numbers):
    """Target number j of a row."""
    index = row_offset(numbers.labels, row, numbers.rows) + j * numbers.target_stride
    return load_label(numbers.labels.pointer, index, numbers.labels.code)


@device
def is_class(label, numbers):
    return label != numbers.ignore_index and label >= 0 and label < numbers.rows.n_cols


# ---------------------------------------------------------------- 1. measure


@device
def prepare(here, first, last, query):
    if query.ranks.pointer == 0:
        save_maxima(here, first, last, query)
        return
    lanes = lanes_of(here.zero)
    for chunk in range(first, last):
        for lane in range(here.n_rows):
            label, threshold = label_of(here.row + lane, 0, query), number(query.scale, math.nan)
            if is_class(label, query):
                threshold = logit_at(here, label, lane, query.scale)
            store(here.states, (chunk * FIELDS + THRESHOLD) * lanes + lane, threshold)
        col, count = chunk_range(here, chunk)
        largest, above = chunk_max_and_above(here, col, count, saved(here.states, chunk, THRESHOLD, here.zero))
        save(here.states, chunk, MAX, largest)
        save(here.states, chunk, ABOVE, above)


@device
def measure(here, first, last, numbers):
    for chunk in range(first, last):
        col, count = chunk_range(here, chunk)
        largest = saved(here.states, chunk, MAX, here.zero)
        sums = sum_of_exponentials(
            here, False, largest, largest, col, count, numbers.scale, numbers.scale_low, False
        )  # fmt: skip
        save_state(here.states, chunk, sums)


@device
def measure_both(here, first, last, numbers):
    for chunk in range(first, last):
        col, count = chunk_range(here, chunk)
        largest = saved(here.states, chunk, MAX, here.zero)
        sums = sum_of_distances(here, largest, col, count, numbers.scale, numbers.scale_low)
        save_state(here.states, chunk, sums)
        save(here.states, chunk, DISTANCES, sums[3])


# ---------------------------------------------------------------- 2. fold


@device
def fold(here, query):
    state, _ = fold_state(here.states, count_of_chunks(here.n_cols), here.zero, query.scale, query.scale_low)
    log, _ = log_sum(state)
    return summary_of(here, state, log, log, query)


@device
def fold_both(here, query):
    state, row = fold_state(here.states, count_of_chunks(here.n_cols), here.zero, query.scale, query.scale_low)
    log, log_low = log_sum(state)
    entropy = add(log, add(mean_distance(here, row, state[0], query), log_low))
    return summary_of(here, state, log, entropy, query)


@device
def summary_of(here, state, log, entropy, query):
    lse = logsumexp_of_state(state, query.scale, query.scale_low)
    above, low = here.zero, here.zero
    if query.ranks.pointer != 0:
        for chunk in range(count_of_chunks(here.n_cols)):
            above, low = add_pair(above, low, saved(here.states, chunk, ABOVE, here.zero), here.zero)
    return state[0], log, lse, entropy, above, low


@device
def mean_distance(here, row, largest, numbers):
    """D, with the distances brought from the maxima of the chunks to that of the row."""
    n_chunks = count_of_chunks(here.n_cols)
    total, low = saved(here.states, 0, DISTANCES, here.zero), here.zero
    if n_chunks > 1:
        total = here.zero
        for chunk in range(n_chunks):
            own = saved(here.states, chunk, MAX, here.zero)
            factor = chunk_ratio(
                here.states, chunk, row.shift, row.exponent, here.zero, numbers.scale, numbers.scale_low
            )  # fmt: skip
            rise = weighted(all_exponentials(here, chunk, own, numbers), rise_to(own, largest, numbers.scale))
            part = add(saved(here.states, chunk, DISTANCES, here.zero), rise)
            total, low = add_pair(total, low, mul(part, factor), here.zero)
    return div(add(total, low), add(row.sum, row.low))


@device
def all_exponentials(here, chunk, own_max, numbers):
    """The sum of a chunk's exponentials, ties and all."""
    shift, exponent = anchor(own_max, numbers.scale)
    at_max = exp_from(own_max, shift, exponent, floor(exponent), numbers.scale, numbers.scale_low)
    return fma(saved(here.states, chunk, TIES, here.zero), at_max, saved(here.states, chunk, SUM, here.zero))


# ---------------------------------------------------------------- 3. write


@device
def write(here, first, last, summary, query):
    if first == 0:
        write_numbers(here, summary, query)
    if query.argmax.pointer != 0:
        for lane in range(here.n_rows):
            chunk = chunk_of_max(here, lane, query.scale)
            if first <= chunk and chunk < last:
                store_integer(query.argmax, here.row + lane, query.rows, first_max(here, chunk, lane, query.scale))
            elif chunk < 0 and first == 0:
                store_integer(query.argmax, here.row + lane, query.rows, -1)


@device
def write_numbers(here, summary, query):
    """What the thread that has a row's first chunk writes."""
    lanes = lanes_of(here.zero)
    n_chunks = count_of_chunks(here.n_cols)
    of_row = n_chunks * FIELDS
    for field in range(6):
        save(here.states, n_chunks, field, summary[field])
    for lane in range(here.n_rows):
        row = here.row + lane
        largest = load(here.states, (of_row + LARGEST) * lanes + lane, query.scale)
        log = load(here.states, (of_row + LOG) * lanes + lane, query.scale)
        for j in range(query.n_targets):
            label = label_of(row, j, query)
            value = number(query.scale, 0.0)
            if is_class(label, query):
                value = log_probability(logit_at(here, label, lane, query.scale), largest, log, query.scale)
            elif label != query.ignore_index:
                value = number(query.scale, math.nan)
            store(element(query.logprobs, row, query.rows), j, value)
            if query.ranks.pointer != 0:
                rank = -1
                if is_class(label, query) and value == value:
                    above = load(here.states, (of_row + ALL_ABOVE) * lanes + lane, query.scale)
                    above_low = load(here.states, (of_row + ALL_ABOVE_LOW) * lanes + lane, query.scale)
                    rank = 1 + int(above) + int(above_low)
                store_integer(query.ranks, row, query.rows, rank)
        if query.lse.address != 0:
            lse = load(here.states, (of_row + LSE) * lanes + lane, query.scale)
            store(element(query.lse, row, query.rows), 0, lse)
        if query.entropy.address != 0:
            entropy = load(here.states, (of_row + ENTROPY) * lanes + lane, query.scale)
            store(element(query.entropy, row, query.rows), 0, entropy)


@device
def store_integer(array, row, rows, value):
    pointer_to(array.pointer, row)[row_offset(array, row, rows)] = value


# ---------------------------------------------------------------- the gradient


@device
def fold_slope(here, given):
    state, row = fold_state(here.states, count_of_chunks(here.n_cols), here.zero, given.scale, given.scale_low)
    inverse = mul(row_inverse(state[0], row.sum, row.low), given.scale)
    return Slope(row.shift, row.exponent, state[0], mul(inverse, sum_of_gradients(here, given)), here.zero)


@device
def fold_slopes(here, given):
    state, row = fold_state(here.states, count_of_chunks(here.n_cols), here.zero, given.scale, given.scale_low)
    inverse = mul(row_inverse(state[0], row.sum, row.low), given.scale)
    n_chunks, lanes = count_of_chunks(here.n_cols), lanes_of(here.zero)
    for lane in range(here.n_rows):
        dentropy = load(element(given.dentropy, here.row + lane, given.rows), 0, given.scale)
        store(here.states, n_chunks * FIELDS * lanes + lane, dentropy)
    dentropy = saved(here.states, n_chunks, 0, here.zero)
    on_probs = fma(dentropy, mean_distance(here, row, state[0], given), sum_of_gradients(here, given))
    return Slope(row.shift, row.exponent, state[0], mul(inverse, on_probs), mul(inverse, dentropy))


@device
def sum_of_gradients(here, given):
    """sum_j g_j"""
    n_chunks, lanes = count_of_chunks(here.n_cols), lanes_of(here.zero)
    for lane in range(here.n_rows):
        total = number(given.scale, 0.0)
        for j in range(given.n_targets):
            total = add(total, gradient_of_target(here.row + lane, j, given))
        store(here.states, (n_chunks * FIELDS + 1) * lanes + lane, total)
    return saved(here.states, n_chunks, 1, here.zero)


@device
def gradient_of_target(row, j, given):
    """g_j; 0 where the target is ignored, NaN where it is out of range."""
    label = label_of(row, j, given)
    if label == given.ignore_index:
        return number(given.scale, 0.0)
    if not is_class(label, given):
        return number(given.scale, math.nan)
    return load(element(given.dlogprobs, row, given.rows), j * given.gradient_stride, given.scale)


@device
def write_slope(here, first, last, slope, given):
    write_chunks(gradient_of_logprobs, here, first, last, slope, given)
    for lane in range(here.n_rows):
        if not counts(here.row + lane, given):  # whatever the row holds
            for chunk in range(first, last):
                col, count = chunk_range(here, chunk)
                for k in range(col, col + count):
                    store(here.target.pointer, index_in(here.target, lane, k), number(given.scale, 0.0))


@device
def write_slopes(here, first, last, slope, given):
    write_chunks(gradient_of_both, here, first, last, slope, given)


@device
def counts(row, given):
    """Whether any of a row's targets is not ignored."""
    n_counted = 0
    for j in range(given.n_targets):
        n_counted += label_of(row, j, given) != given.ignore_index
    return n_counted > 0


@device
def write_chunks(gradient, here, first, last, slope, given):
    for chunk in range(first, last):
        col, count = chunk_range(here, chunk)
        of_rows = slope.shift, slope.exponent, slope.largest, slope.on_probs, slope.on_distance, given
        write_chunk(gradient, of_rows, here, col, count)
        if is_across(here.zeros):  # in the copy, which is in the computation format
            for lane in range(here.n_rows):
                for j in range(given.n_targets):
                    label = label_of(here.row + lane, j, given)
                    if col <= label and label < col + count:
                        place = index_in(here.target, lane, label)
                        g = mul(gradient_of_target(here.row + lane, j, given), given.scale)
                        store(here.target.pointer, place, add(load(here.target.pointer, place, given.scale), g))


@device
def gradient_of_logprobs(col, left, here, arguments):
    shift, exponent, largest, on_probs, on_distance, given = arguments
    x, e = logit_and_exponential(col, left, here, shift, exponent, given)
    return pulled_back(with_targets(negative(mul(e, on_probs)), col, here, given), x, here.through)


@device
def gradient_of_both(col, left, here, arguments):
    shift, exponent, largest, on_probs, on_distance, given = arguments
    x, e = logit_and_exponential(col, left, here, shift, exponent, given)
    d = weighted_distance(e, x, largest, given.scale, given.scale_low)
    value = with_targets(fma(d, on_distance, negative(mul(e, on_probs))), col, here, given)
    return pulled_back(value, x, here.through)


@device
def logit_and_exponential(col, left, here, shift, exponent, given):
    x = load_cols(here.first, col, left, here.nothing)
    return x, exp_from(x, shift, exponent, floor(exponent), given.scale, given.scale_low)


@device
def with_targets(value, col, here, given):
    """Along rows, the gradients of the targets are added before anything is rounded to the result's format."""
    if not is_across(here.zeros):
        for j in range(given.n_targets):
            lane = label_of(here.row, j, given) - col
            if lane >= 0 and lane < lanes_of(here.zeros):
                value = add_at(value, lane, mul(gradient_of_target(here.row, j, given), given.scale))
    return value
