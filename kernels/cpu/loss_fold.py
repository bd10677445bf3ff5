"""The second step of a loss: the chunks of a row become its loss, and what its gradient is made of."""

from gpusoftmax.kernels.cpu.arithmetic import (
    add,
    add_pair,
    anchor,
    exp_from,
    floor,
    fma,
    log_probability,
    log_sum,
    mul,
    negative,
    rise_to,
    row_inverse,
    weighted_nats,
)
from gpusoftmax.kernels.cpu.arithmetic import (
    logsumexp as logsumexp_of_state,
)
from gpusoftmax.kernels.cpu.cache import device
from gpusoftmax.kernels.cpu.chunks import CHUNK_COLS
from gpusoftmax.kernels.cpu.first_max import chunk_of_max
from gpusoftmax.kernels.cpu.here import unless_empty, where_given
from gpusoftmax.kernels.cpu.loss_rows import (
    DISTANCE,
    DISTANCE_LOW,
    IS_FIRST,
    LABEL_LOGIT,
    LOGIT,
    MASS,
    PART_OF_S,
    ROW_LOSS,
    ROW_LSE,
    ROW_S,
    ROW_WEIGHT,
    UPSTREAM,
    Z_LOSS,
    Summary,
)
from gpusoftmax.kernels.cpu.loss_target import (
    COUNTED,
    number_at,
    only_label,
    status_of,
    sum_of_shares,
    unused,
    weight_of_class,
    weight_of_row,
)
from gpusoftmax.kernels.cpu.memory import (
    load,
    pointer_to,
    store,
)
from gpusoftmax.kernels.cpu.rows import count_of_chunks, element, number_of_row, row_offset
from gpusoftmax.kernels.cpu.states import FIELDS, MAX, fold_state, save, saved
from gpusoftmax.kernels.cpu.vector import (
    lanes_of,
    number,
)


@device
def fold(here, loss):
    n_chunks = count_of_chunks(here.n_cols)
    save_numbers_of_rows(here, n_chunks, loss, loss.shares, loss.is_dense)
    state, row = fold_state(here.states, n_chunks, here.zero, loss.scale, loss.scale_low)
    largest = state[0]
    log, log_low = log_sum(state)
    all_weights = number_at(loss.weight_sum, 0, number(loss.scale, here.n_cols))
    s = mass_of_target(here, n_chunks, loss.is_dense)
    confident = unless_empty(mul(s, loss.confidence), largest, log_low, here.through)
    numbers = confident, all_weights, log, log_low, largest
    value = loss_of_target(here, n_chunks, numbers, loss, loss.shares, loss.is_dense)
    lse = logsumexp_of_state(state, loss.scale, loss.scale_low)
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
        store(here.states, place + ROW_S * lanes, weight_of_class(label, loss))
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
    value = weighted_nats(confident, negative(log_probability(logit, largest, log, loss.scale)))
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
