"""Cross-entropy over rows of logits and its fused gradient, on the CPU.

For one row x over V classes with row weight r, class weights w (1 where none are given), W = sum_c w_c and label
smoothing eps, in the words of loss_target.py:

    nll       = log s + (max - x_t)                                     = -log_softmax(x)_t, from the row state
    loss      = r ((1 - eps) w_t nll + eps/V (W log s + D) + z)         D = sum_c w_c (max - x_c)
              = r (G log s + sum_c g_c (max - x_c) + z)                 where labels have shares
    z         = z_loss S lse^2
    dlogits_c = u r (p_c (G + 2 z_loss S lse) - g_c)

(torch's LossNLL.cpp has eps/V sum_c w_c (lse - x_c), which is the same: no term is negative, so nothing cancels here.)
The distances are summed beside the state, chunk by chunk relative to the chunk's maximum.

u is grad_scale, divided for "mean" by the normaliser: the sum of r w_t over the rows that count, of r alone where
labels have shares. Where the losses are there already, p_c is exp(x_c - lse), and u the gradient with respect to a
row's loss: one read and one write.
"""

import math
from typing import NamedTuple

from gpusoftmax.kernels.cpu.cache import device, kernel
from gpusoftmax.kernels.cpu.call import arguments
from gpusoftmax.kernels.cpu.chunks import CHUNK_COLS, sum_chunk, sum_of_exponentials, write_chunk
from gpusoftmax.kernels.cpu.first_max import chunk_of_max, first_max
from gpusoftmax.kernels.cpu.here import index_in, pulled_back_cols, pulled_back_one, unless_empty, where_given
from gpusoftmax.kernels.cpu.loss_target import (
    COUNTED,
    label_at,
    label_of,
    mass_at,
    number_at,
    only_label,
    share_of_label,
    shares_at,
    status_of,
    sum_of_shares,
    unused,
    weight_of_row,
    weighted_share,
    weights_at,
)
from gpusoftmax.kernels.cpu.rows import (
    chunk_range,
    count_of_chunks,
    element,
    nothing_first,
    number_of_row,
    row_offset,
    save_maxima,
)
from gpusoftmax.kernels.cpu.run import run
from gpusoftmax.kernels.cpu.states import (
    FIELDS,
    MAX,
    MEASURED_FIELDS,
    OWN,
    WRITER,
    chunk_ratio,
    fold_state,
    save,
    save_state,
    saved,
)
from gpusoftmax.kernels.cpu.vector import (
    add,
    add_pair,
    anchor,
    distance,
    distance_of_mass,
    div,
    exp_from,
    floor,
    fma,
    lanes_of,
    load,
    load_cols,
    log_probability,
    log_sum,
    mul,
    negative,
    number,
    pointer_to,
    rise_to,
    row_inverse,
    store,
    sub,
)
from gpusoftmax.kernels.cpu.vector import logsumexp as logsumexp_of_state
from gpusoftmax.kernels.cpu.walk import walk
from gpusoftmax.kernels.operands import (
    STORAGE,
    Extras,
    Labels,
    Numbers,
    Operand,
    Place,
    Probs,
    Rows,
    Shares,
)


def cross_entropy(
    rows: Rows,
    logits: Operand,
    labels: Labels,
    losses: Operand,
    dlogits: Operand,
    weight: Numbers,
    weight_sum: Numbers,
    normaliser: Numbers,
    ignore_index: int,
    label_smoothing: float,
    grad_scale: float,
    place: Place,
    soft: Shares | Probs | None = None,
    extras: Extras | None = None,
) -> None:
    """The loss of each row and, unless dlogits.pointer is 0, the gradient; dlogits may be the logits themselves.

    weight (n_cols), weight_sum (1) and normaliser (1) are in the computation format; where there are none they stand
    for ones, n_cols and 1. Kernels are compiled without `soft` and `extras` where they are None.
    """
    number_of = STORAGE[weight.dtype]
    with_grad = dlogits.pointer != 0
    run(
        cross_entropy_with_grad_rows if with_grad else cross_entropy_rows,
        rows,
        logits,
        soft.probs if isinstance(soft, Probs) else None,
        dlogits if with_grad else None,
        labels,
        losses,
        weight,
        weight_sum,
        normaliser,
        ignore_index,
        number_of(1.0 - label_smoothing),
        number_of(label_smoothing / rows.n_cols),
        number_of(grad_scale),
        *_of_target(soft),
        *_of_extras(extras, number_of),
        keeps_exponentials=with_grad,
        numbers_of_row=soft.count if isinstance(soft, Shares) else 0,
    )


def cross_entropy_backward(
    rows: Rows,
    logits: Operand,
    labels: Labels,
    lse: Operand,
    dlosses: Operand,
    dlogits: Operand,
    weight: Numbers,
    weight_sum: Numbers,
    ignore_index: int,
    label_smoothing: float,
    place: Place,
    soft: Shares | Probs | None = None,
    extras: Extras | None = None,
) -> None:
    """dlogits, which may be the logits themselves, from the lse of each row and the gradient with respect to its loss.

    lse and dlosses are in the computation format. Of the extras, row_weight and z_loss are read.
    """
    number_of = STORAGE[weight.dtype]
    run(
        cross_entropy_backward_rows,
        rows,
        logits,
        soft.probs if isinstance(soft, Probs) else None,
        dlogits,
        labels,
        lse,
        dlosses,
        weight,
        weight_sum,
        ignore_index,
        number_of(1.0 - label_smoothing),
        number_of(label_smoothing / rows.n_cols),
        *_of_target(soft),
        *_of_extras(extras, number_of),
        numbers_of_row=soft.count if isinstance(soft, Shares) else 0,
    )


def _of_target(soft: Shares | Probs | None) -> tuple:
    """(shares, n_labels, label_stride, share_stride, is_dense)"""
    return (*soft, None) if isinstance(soft, Shares) else (None, 1, 0, 0, None if soft is None else 1)


def _of_extras(extras: Extras | None, number_of) -> tuple:
    return (None,) * len(Extras._fields) if extras is None else extras._replace(z_loss=number_of(extras.z_loss))


class Loss(NamedTuple):
    """What the steps need besides the logits."""

    rows: Rows
    labels: Labels
    weight: int  # addresses of numbers in the computation format, 0: none
    weight_sum: int
    ignore_index: int
    confidence: object  # 1 - eps
    share: object  # eps/V
    scale: object  # 1
    shares: object  # None unless a row has several labels, which have these shares,
    n_labels: int
    label_stride: int
    share_stride: int
    is_dense: object  # or unless a row has a share for each class
    row_weight: object  # None where there are no extras
    z_loss: object
    results: object  # arrays for what is told of each row
    upstream: object  # what the gradient of each row is multiplied by


class Results(NamedTuple):
    losses: object
    z_losses: object
    lse: object
    correct: object


class Summary(NamedTuple):
    """What the gradient of a row, or of one row per lane, is made of, see `gradient_of`."""

    shift: object
    exponent: object
    on_probs: object
    on_share: object
    on_mass: object


# What is kept of a chunk beside its state: the logit of its label, or its part of S; its distances and their mass.
LOGIT, DISTANCE, DISTANCE_LOW, MASS = range(OWN, OWN + 4)
PART_OF_S = LOGIT
# Of a row, where the chunks end.
LABEL_LOGIT, ROW_S, ROW_LOSS, Z_LOSS, ROW_LSE, UPSTREAM, ROW_WEIGHT = range(7)
# Known to whoever has the label's chunk: whether the label is the first of its largest logits.
IS_FIRST = MEASURED_FIELDS
# When a chunk is written: the label's exponential, and what the gradient of its logit is made of.
LABEL_EXP, ON_PROBS, ON_SHARE, ON_MASS, SHIFT, EXPONENT = range(WRITER, WRITER + 6)


@kernel
def cross_entropy_rows(call):
    way, job, logits, second, none, loss = unpacked(call)
    walk(way, job, loss.rows, logits, second, none, save_maxima, measure, fold, write_nothing, loss, loss.share)


@kernel
def cross_entropy_with_grad_rows(call):
    way, job, logits, second, dlogits, loss = unpacked(call)
    walk(way, job, loss.rows, logits, second, dlogits, save_maxima, measure_and_keep, fold, write, loss, loss.share)


@kernel
def cross_entropy_backward_rows(call):
    (
        way, job, rows, logits, second, dlogits, labels, lse, dlosses, weight, weight_sum, ignore_index, confidence,
        share, shares, n_labels, label_stride, share_stride, is_dense, row_weight, z_loss, z_losses, none, correct,
    ) = arguments(call)  # fmt: skip
    one = number(share, 1.0)
    loss = Loss(
        rows, labels, weight, weight_sum, ignore_index, confidence, share, one, shares, n_labels, label_stride,
        share_stride, is_dense, row_weight, z_loss, lse, dlosses,
    )  # fmt: skip
    walk(
        way, job, rows, logits, second, dlogits, nothing_first, measure_target_alone, fold_backward, write_backward,
        loss, share,
    )  # fmt: skip


@device
def unpacked(call):
    (
        way, job, rows, logits, second, dlogits, labels, losses, weight, weight_sum, normaliser, ignore_index,
        confidence, share, grad_scale, shares, n_labels, label_stride, share_stride, is_dense, row_weight, z_loss,
        z_losses, lse, correct,
    ) = arguments(call)  # fmt: skip
    one = number(share, 1.0)
    results = Results(losses, z_losses, lse, correct)
    loss = Loss(
        rows, labels, weight, weight_sum, ignore_index, confidence, share, one, shares, n_labels, label_stride,
        share_stride, is_dense, row_weight, z_loss, results, div(grad_scale, number_at(normaliser, 0, one)),
    )  # fmt: skip
    return way, job, logits, second, dlogits, loss


# ---------------------------------------------------------------- 1. measure


@device
def measure(here, first, last, loss):
    measure_chunks(here, False, first, last, loss)


@device
def measure_and_keep(here, first, last, loss):
    measure_chunks(here, True, first, last, loss)


@device
def measure_chunks(here, is_kept, first, last, loss):
    if lanes_of(here.zero) == 1 and status_of(only_label(here.row, loss), here.row, loss) != COUNTED:
        return  # a row that is not used is not read
    for chunk in range(first, last):
        col, count = chunk_range(here, chunk)
        largest = saved(here.states, chunk, MAX, here.zero)
        # Before exponentials take the place of the logits.
        measure_target(here, chunk, largest, col, count, loss, loss.is_dense)
        sums = sum_of_exponentials(here, is_kept, largest, largest, col, count, loss.scale, None, False)
        save_state(here.states, chunk, sums)


@device
def measure_target(here, chunk, largest, col, count, loss, is_dense):
    if is_dense is None:
        if loss.share != number(loss.scale, 0.0):
            measure_smoothing(here, chunk, largest, col, count, loss)
        measure_labels(here, chunk, col, count, loss, loss.shares)
    else:
        measure_mass(here, chunk, largest, col, count, loss)


@device
def measure_smoothing(here, chunk, largest, first, count, loss):
    total, low, _, _ = sum_chunk(weighted_distance, here, (loss, largest), first, count)
    save(here.states, chunk, DISTANCE, total)
    save(here.states, chunk, DISTANCE_LOW, low)
    save(here.states, chunk, MASS, mul(weights_of_chunk(here, first, count, loss), loss.share))


@device
def weights_of_chunk(here, first, count, loss):
    weights = add(here.zero, number(loss.scale, count))
    if loss.weight != 0:
        weights, _, _, _ = sum_chunk(only_weight, here, (loss,), first, count)
    return weights


@device
def weighted_distance(col, left, ties, here, arguments):
    """eps/V w_c (max - x_c). The factor is inside: the sum of the bare differences of large logits would overflow."""
    loss, largest = arguments
    x = load_cols(here.first, col, left, add(here.zeros, largest))
    return mul(distance(x, largest, loss.share), weights_at(col, left, here, loss)), ties, None


@device
def only_weight(col, left, ties, here, arguments):
    return weights_at(col, left, here, arguments[0]), ties, None


@device
def measure_labels(here, chunk, first, count, loss, shares):
    if shares is None:
        measure_label(here, chunk, first, count, loss, loss.row_weight)
    else:
        measure_shares(here, chunk, first, count, loss)


@device
def measure_label(here, chunk, first, count, loss, row_weight):
    lanes = lanes_of(here.zero)
    for lane in range(here.n_rows):
        label = label_of(loss.labels, here.row + lane, loss.rows)
        if first <= label and label < first + count:
            x = load(here.first.pointer, index_in(here.first, lane, label), loss.scale)
            store(here.states, (chunk * FIELDS + LOGIT) * lanes + lane, x)
            note_first(here, chunk, lane, label, x, loss, row_weight)


@device
def note_first(here, chunk, lane, label, x, loss, row_weight):
    """Whether the label's logit is the largest of its chunk, and the first of those; never where none is left."""
    if row_weight is not None and loss.results.correct.pointer != 0:
        lanes = lanes_of(here.zero)
        largest = load(here.states, (chunk * FIELDS + MAX) * lanes + lane, loss.scale)
        is_first = x == largest and x > number(loss.scale, -math.inf)
        if is_first:
            is_first = first_max(here, chunk, lane, loss.scale) == label
        place = (count_of_chunks(here.n_cols) * FIELDS + IS_FIRST) * lanes + lane
        store(here.states, place, number(loss.scale, 1.0) if is_first else number(loss.scale, 0.0))


@device
def measure_shares(here, chunk, first, count, loss):
    """Adds the distances of the labels to those of smoothing."""
    lanes = lanes_of(here.zero)
    zero = number(loss.scale, 0.0)
    is_smoothed = loss.share != zero
    for lane in range(here.n_rows):
        row = here.row + lane
        place = chunk * FIELDS * lanes + lane
        largest = load(here.states, place + MAX * lanes, loss.scale)
        total, low, mass = zero, zero, zero
        if is_smoothed:
            total = load(here.states, place + DISTANCE * lanes, zero)
            low = load(here.states, place + DISTANCE_LOW * lanes, zero)
            mass = load(here.states, place + MASS * lanes, zero)
        for j in range(loss.n_labels):
            label = label_at(row, j, loss)
            if first <= label and label < first + count:
                more = mul(loss.confidence, weighted_share(row, j, label, loss))
                x = load(here.first.pointer, index_in(here.first, lane, label), loss.scale)
                total, low = add_pair(total, low, distance_of_mass(more, x, largest), zero)
                mass = add(mass, more)
        store(here.states, place + DISTANCE * lanes, total)
        store(here.states, place + DISTANCE_LOW * lanes, low)
        store(here.states, place + MASS * lanes, mass)


@device
def measure_mass(here, chunk, largest, first, count, loss):
    total, low, _, _ = sum_chunk(mass_and_distance, here, (loss, largest), first, count)
    save(here.states, chunk, DISTANCE, total)
    save(here.states, chunk, DISTANCE_LOW, low)
    save(here.states, chunk, MASS, sum_of_mass(here, chunk, first, count, loss))


@device
def mass_and_distance(col, left, ties, here, arguments):
    loss, largest = arguments
    x = load_cols(here.first, col, left, add(here.zeros, largest))
    return distance_of_mass(mass_at(col, left, here, loss), x, add(here.zeros, largest)), ties, None


@device
def sum_of_mass(here, chunk, first, count, loss):
    """Of a chunk, whose part of S is saved."""
    part, _, _, _ = sum_chunk(only_share, here, (loss,), first, count)
    save(here.states, chunk, PART_OF_S, part)
    mass = mul(part, loss.confidence)
    if loss.share != number(loss.scale, 0.0):
        mass = add(mass, mul(weights_of_chunk(here, first, count, loss), loss.share))
    return mass


@device
def only_share(col, left, ties, here, arguments):
    return mul(shares_at(col, left, here), weights_at(col, left, here, arguments[0])), ties, None


@device
def measure_target_alone(here, first, last, loss):
    measure_target_alone_by(here, first, last, loss, loss.is_dense)


@device
def measure_target_alone_by(here, first, last, loss, is_dense):
    if is_dense is not None:
        for chunk in range(first, last):
            col, count = chunk_range(here, chunk)
            sum_of_mass(here, chunk, col, count, loss)


# ---------------------------------------------------------------- 2. fold


@device
def fold(here, loss):
    n_chunks = count_of_chunks(here.n_cols)
    save_numbers_of_rows(here, n_chunks, loss, loss.shares, loss.is_dense)
    state, row = fold_state(here.states, n_chunks, here.zero, loss.scale, None)
    largest = state[0]
    log, log_low = log_sum(state)
    all_weights = number_at(loss.weight_sum, 0, number(loss.scale, here.n_cols))
    s = mass_of_target(here, n_chunks, loss.is_dense)
    confident = unless_empty(mul(s, loss.confidence), largest, log_low, here.through)
    numbers = confident, all_weights, log, log_low, largest
    value = loss_of_target(here, n_chunks, numbers, loss, loss.shares, loss.is_dense)
    lse = logsumexp_of_state(state, loss.scale, None)
    value, slope = with_extras(here, n_chunks, value, s, lse, log_low, loss, loss.row_weight)
    save(here.states, n_chunks, ROW_LOSS, unless_empty(value, largest, log_low, here.through))
    store_results(here, n_chunks, loss, loss.row_weight)
    upstream = times_row_weight(loss.upstream, here, n_chunks, loss.row_weight)
    inverse = row_inverse(largest, row.sum, row.low)
    return summary_of(here, row.shift, row.exponent, inverse, confident, slope, upstream, largest, log_low, loss)


@device
def fold_backward(here, loss):
    n_chunks = count_of_chunks(here.n_cols)
    lse = number_of_row(loss.results, loss.rows, here, ROW_LSE, loss.scale)
    upstream = number_of_row(loss.upstream, loss.rows, here, UPSTREAM, loss.scale)
    save_numbers_of_rows(here, n_chunks, loss, loss.shares, loss.is_dense)
    s = mass_of_target(here, n_chunks, loss.is_dense)
    slope = slope_of(here, mul(s, lse), lse, here.zero, loss, loss.row_weight)
    upstream = times_row_weight(upstream, here, n_chunks, loss.row_weight)
    shift, exponent = anchor(lse, loss.scale)
    at_lse = exp_from(lse, shift, exponent, floor(exponent), loss.scale, None)
    confident = unless_empty(mul(s, loss.confidence), lse, here.zero, here.through)
    inverse = row_inverse(lse, at_lse, here.zero)
    return summary_of(here, shift, exponent, inverse, confident, slope, upstream, lse, here.zero, loss)


@device
def save_numbers_of_rows(here, n_chunks, loss, shares, is_dense):
    """What is known of the labels and the weight of each row, of those that count."""
    lanes = lanes_of(here.zero)
    for lane in range(here.n_rows):
        row = here.row + lane
        place = n_chunks * FIELDS * lanes + lane
        save_row_weight(here, place + ROW_WEIGHT * lanes, row, loss, loss.row_weight)
        if is_dense is None:
            label = only_label(row, loss)
            if status_of(label, row, loss) == COUNTED:
                save_label(here, place, lane, row, label, loss, shares)
            else:
                store(here.states, place + LABEL_LOGIT * lanes, number(loss.scale, 0.0))
                store(here.states, place + ROW_S * lanes, number(loss.scale, 1.0))


@device
def save_row_weight(here, place, row, loss, row_weight):
    if row_weight is not None:
        store(here.states, place, weight_of_row(row, loss, row_weight))


@device
def save_label(here, place, lane, row, label, loss, shares):
    lanes = lanes_of(here.zero)
    if shares is None:
        logit = load(here.states, (label // CHUNK_COLS * FIELDS + LOGIT) * lanes + lane, loss.scale)
        store(here.states, place + LABEL_LOGIT * lanes, logit)
        store(here.states, place + ROW_S * lanes, number_at(loss.weight, label, loss.scale))
    else:
        store(here.states, place + ROW_S * lanes, sum_of_shares(row, loss))


@device
def mass_of_target(here, n_chunks, is_dense):
    """S"""
    if is_dense is None:
        return saved(here.states, n_chunks, ROW_S, here.zero)
    s, low = here.zero, here.zero
    for chunk in range(n_chunks):
        s, low = add_pair(s, low, saved(here.states, chunk, PART_OF_S, here.zero), here.zero)
    return add(s, low)


@device
def loss_of_target(here, n_chunks, numbers, loss, shares, is_dense):
    if is_dense is None and shares is None:
        return loss_of_label(here, n_chunks, numbers, loss)
    confident, all_weights, log, log_low, largest = numbers
    mass = fma(add(here.zero, all_weights), add(here.zero, loss.share), confident)
    return add(mul(add(log, log_low), mass), fold_distances(here, n_chunks, largest))


@device
def loss_of_label(here, n_chunks, numbers, loss):
    confident, all_weights, log, log_low, largest = numbers
    logit = saved(here.states, n_chunks, LABEL_LOGIT, here.zero)
    value = mul(confident, negative(log_probability(logit, largest, log, loss.scale)))
    if loss.share != number(loss.scale, 0.0):
        smoothing = mul(add(log, log_low), mul(loss.share, all_weights))
        value = add(value, add(smoothing, fold_distances(here, n_chunks, largest)))
    return value


@device
def fold_distances(here, n_chunks, largest):
    """The distances of all chunks, brought from the maxima of the chunks to that of the row."""
    d, d_low = here.zero, here.zero
    for chunk in range(n_chunks):
        own = saved(here.states, chunk, MAX, here.zero)
        part = saved(here.states, chunk, DISTANCE, here.zero)
        d, d_low = add_pair(d, d_low, part, saved(here.states, chunk, DISTANCE_LOW, here.zero))
        d, d_low = add_pair(d, d_low, rise_to(own, largest, saved(here.states, chunk, MASS, here.zero)), here.zero)
    return add(d, d_low)


@device
def with_extras(here, n_chunks, value, s, lse, log_low, loss, row_weight):
    """(loss, 2 z_loss S lse): the loss with z and row weight; the latter is what z adds to the slope of the lse."""
    if row_weight is None:
        return value, here.zero
    save(here.states, n_chunks, ROW_LSE, lse)
    weights = saved(here.states, n_chunks, ROW_WEIGHT, here.zero)
    z = here.zero
    if loss.z_loss != number(loss.scale, 0.0):
        z = mul(mul(mul(s, loss.z_loss), lse), lse)
    value = add(value, z)
    save(here.states, n_chunks, Z_LOSS, unless_empty(mul(z, weights), lse, log_low, here.through))
    return mul(value, weights), slope_of(here, mul(s, lse), lse, log_low, loss, row_weight)


@device
def slope_of(here, s_lse, lse, rest, loss, row_weight):
    if row_weight is None:
        return here.zero
    slope = here.zero
    if loss.z_loss != number(loss.scale, 0.0):
        slope = mul(s_lse, mul(loss.z_loss, number(loss.scale, 2.0)))
    return unless_empty(slope, lse, rest, here.through)


def _times_row_weight(upstream, here, n_chunks, row_weight):
    return mul(saved(here.states, n_chunks, ROW_WEIGHT, here.zero), upstream)


def _upstream_alone(upstream, here, n_chunks, row_weight):
    return upstream


# Without row weights a number for all rows stays one.
times_row_weight = where_given("row_weight", _times_row_weight, _upstream_alone)


@device
def plus_slope(mass, upstream, slope, row_weight):
    if row_weight is None:
        return mass
    return fma(upstream, slope, mass)


@device
def summary_of(here, shift, exponent, inverse, confident, slope, upstream, largest, rest, loss):
    inverse = unless_empty(inverse, largest, rest, here.through)
    all_weights = number_at(loss.weight_sum, 0, number(loss.scale, here.n_cols))
    on_label = mul(confident, upstream)
    on_weight = unless_empty(mul(upstream, loss.share), largest, rest, here.through)
    mass = plus_slope(fma(all_weights, on_weight, on_label), upstream, slope, loss.row_weight)
    on_share, on_mass = of_target(here, upstream, on_label, on_weight, largest, rest, loss, loss.shares, loss.is_dense)
    return Summary(shift, exponent, mul(inverse, mass), on_share, on_mass)


@device
def of_target(here, upstream, on_label, on_weight, largest, rest, loss, shares, is_dense):
    """(on_share, on_mass), what the shares of labels and the masses at all columns are multiplied by."""
    if is_dense is None:
        if shares is None:
            return on_label, on_weight
        return unless_empty(mul(upstream, loss.confidence), largest, rest, here.through), on_weight
    return on_label, unless_empty(upstream, largest, rest, here.through)


@device
def store_results(here, n_chunks, loss, row_weight):
    lanes = lanes_of(here.zero)
    for lane in range(here.n_rows):
        row = here.row + lane
        label = only_label(row, loss)
        status = status_of(label, row, loss)
        place = n_chunks * FIELDS * lanes + lane
        value = load(here.states, place + ROW_LOSS * lanes, loss.scale)
        if status != COUNTED:
            value = unused(status, loss)
        store(element(loss.results.losses, row, loss.rows), 0, value)
        store_extras(here, place, lane, row, label, status, loss, row_weight)


@device
def store_extras(here, place, lane, row, label, status, loss, row_weight):
    if row_weight is not None:
        lanes = lanes_of(here.zero)
        results = loss.results
        if results.z_losses.address != 0:
            z = load(here.states, place + Z_LOSS * lanes, loss.scale) if status == COUNTED else unused(status, loss)
            store(element(results.z_losses, row, loss.rows), 0, z)
        if results.lse.address != 0:
            lse = load(here.states, place + ROW_LSE * lanes, loss.scale) if status == COUNTED else unused(status, loss)
            store(element(results.lse, row, loss.rows), 0, lse)
        if results.correct.pointer != 0:
            is_correct = 0
            if status == COUNTED:
                chunk = chunk_of_max(here, lane, loss.scale)
                is_first = load(here.states, place + IS_FIRST * lanes, loss.scale) != number(loss.scale, 0.0)
                value = load(here.states, place + ROW_LOSS * lanes, loss.scale)
                if chunk == label // CHUNK_COLS and is_first and value == value:
                    is_correct = 1
            pointer_to(results.correct.pointer, row)[row_offset(results.correct, row, loss.rows)] = is_correct


# ---------------------------------------------------------------- 3. write


@device
def write_nothing(here, first, last, summary, loss):
    pass


@device
def write(here, first, last, summary, loss):
    for chunk in range(first, last):
        col, count = chunk_range(here, chunk)
        ratio = chunk_ratio(here.states, chunk, summary.shift, summary.exponent, here.zero, loss.scale, None)
        factor = mul(ratio, summary.on_probs)
        save_for_labels(here, chunk, factor, summary)
        save_exponentials(kept_exponential, here, chunk, col, count, loss)
        if is_used(here, loss):
            write_chunk(gradient_of, (factor, summary.on_mass, loss), here, col, count)
        write_labels(here, chunk, col, count, loss)


@device
def write_backward(here, first, last, summary, loss):
    for chunk in range(first, last):
        col, count = chunk_range(here, chunk)
        save_for_labels(here, chunk, summary.on_probs, summary)
        save(here.states, chunk, SHIFT, summary.shift)
        save(here.states, chunk, EXPONENT, summary.exponent)
        save_exponentials(exponential_at, here, chunk, col, count, loss)
        if is_used(here, loss):
            numbers = summary.on_probs, summary.on_mass, summary.shift, summary.exponent, loss
            write_chunk(gradient_from_lse, numbers, here, col, count)
        write_labels(here, chunk, col, count, loss)


@device
def is_used(here, loss):
    return lanes_of(here.zero) > 1 or status_of(only_label(here.row, loss), here.row, loss) == COUNTED


@device
def save_for_labels(here, chunk, factor, summary):
    save(here.states, chunk, ON_PROBS, factor)
    save(here.states, chunk, ON_SHARE, summary.on_share)
    save(here.states, chunk, ON_MASS, add(here.zero, summary.on_mass))


@device
def kept_exponential(here, chunk, lane, label, loss):
    return load(here.home.pointer, index_in(here.home, lane, label), loss.scale)


@device
def exponential_at(here, chunk, lane, label, loss):
    lanes = lanes_of(here.zero)
    x = load(here.first.pointer, index_in(here.first, lane, label), loss.scale)
    shift = load(here.states, (chunk * FIELDS + SHIFT) * lanes + lane, loss.scale)
    exponent = load(here.states, (chunk * FIELDS + EXPONENT) * lanes + lane, loss.scale)
    return exp_from(x, shift, exponent, floor(exponent), loss.scale, None)


@device
def save_exponentials(exponential, here, chunk, first, count, loss):
    """Those of the labels, before the gradient takes the place of what they are made of."""
    save_exponentials_by(exponential, here, chunk, first, count, loss, loss.shares, loss.is_dense)


@device
def save_exponentials_by(exponential, here, chunk, first, count, loss, shares, is_dense):
    if is_dense is None:
        lanes = lanes_of(here.zero)
        for lane in range(here.n_rows):
            if shares is None:
                label = label_of(loss.labels, here.row + lane, loss.rows)
                if first <= label and label < first + count:
                    e = exponential(here, chunk, lane, label, loss)
                    store(here.states, (chunk * FIELDS + LABEL_EXP) * lanes + lane, e)
            else:
                for j in range(loss.n_labels):
                    label = label_at(here.row + lane, j, loss)
                    if first <= label and label < first + count:
                        e = exponential(here, chunk, lane, label, loss)
                        store(here.states, place_of_label(here, lane, j), e)


@device
def place_of_label(here, lane, j):
    """Where the exponential of one of several labels stays: behind the record of the row."""
    return ((count_of_chunks(here.n_cols) + 1) * FIELDS + j) * lanes_of(here.zero) + lane


@device
def gradient_of(col, left, here, arguments):
    """exp(x_c) on_probs - on_mass g_c; what the labels have is taken from their columns afterwards."""
    factor, on_mass, loss = arguments
    value = mul(load_cols(here.home, col, left, here.zeros), factor)
    return pulled_back_cols(less_mass(value, col, left, here, on_mass, loss, loss.is_dense), col, left, here)


@device
def gradient_from_lse(col, left, here, arguments):
    """Likewise."""
    factor, on_mass, shift, exponent, loss = arguments
    x = load_cols(here.first, col, left, here.nothing)
    value = mul(exp_from(x, shift, exponent, floor(exponent), loss.scale, None), factor)
    return pulled_back_cols(less_mass(value, col, left, here, on_mass, loss, loss.is_dense), col, left, here)


@device
def less_mass(value, col, left, here, on_mass, loss, is_dense):
    if is_dense is not None:
        return sub(value, mul(mass_at(col, left, here, loss), on_mass))
    if loss.share != number(loss.scale, 0.0):
        value = sub(value, mul(weights_at(col, left, here, loss), on_mass))
    return value


@device
def write_labels(here, chunk, first, count, loss):
    for lane in range(here.n_rows):
        label = only_label(here.row + lane, loss)
        status = status_of(label, here.row + lane, loss)
        if status == COUNTED:
            write_labels_of_row(here, chunk, lane, label, first, count, loss, loss.shares, loss.is_dense)
        else:
            for k in range(first, first + count):
                store(here.target.pointer, index_in(here.target, lane, k), unused(status, loss))


@device
def write_labels_of_row(here, chunk, lane, label, first, count, loss, shares, is_dense):
    if is_dense is None:
        lanes = lanes_of(here.zero)
        row = here.row + lane
        place = chunk * FIELDS * lanes + lane
        on_share = load(here.states, place + ON_SHARE * lanes, loss.scale)
        if shares is None:
            if first <= label and label < first + count:
                e = load(here.states, place + LABEL_EXP * lanes, loss.scale)
                write_label(here, place, lane, label, e, on_share, loss)
        else:
            for j in range(loss.n_labels):
                label = label_at(row, j, loss)
                if first <= label and label < first + count:
                    e = load(here.states, place_of_label(here, lane, j), loss.scale)
                    # A label may stand there twice, with two shares.
                    write_label(here, place, lane, label, e, mul(on_share, share_of_label(row, label, loss)), loss)


@device
def write_label(here, place, lane, label, e, on_label, loss):
    lanes = lanes_of(here.zero)
    value = mul(e, load(here.states, place + ON_PROBS * lanes, loss.scale))
    on_mass = load(here.states, place + ON_MASS * lanes, loss.scale)
    value = sub(value, mul(on_mass, number_at(loss.weight, label, loss.scale)))
    value = pulled_back_one(sub(value, on_label), label, lane, here)
    store(here.target.pointer, index_in(here.target, lane, label), value)
