"""The first step of a loss: what a chunk of a row adds to it, see cross_entropy.py."""

import math

from gpusoftmax.kernels.cpu.arithmetic import (
    add,
    add_pair,
    distance_of_mass,
    mul,
)
from gpusoftmax.kernels.cpu.cache import device
from gpusoftmax.kernels.cpu.chunks import sum_chunk, sum_of_exponentials
from gpusoftmax.kernels.cpu.first_max import first_max
from gpusoftmax.kernels.cpu.here import index_in
from gpusoftmax.kernels.cpu.loss_rows import DISTANCE, DISTANCE_LOW, IS_FIRST, LOGIT, MASS, PART_OF_S
from gpusoftmax.kernels.cpu.loss_target import (
    COUNTED,
    label_at,
    label_of,
    mass_at,
    only_label,
    shares_at,
    status_of,
    times_scale,
    weighted_share,
    weights_at,
)
from gpusoftmax.kernels.cpu.memory import (
    load,
    load_cols,
    store,
)
from gpusoftmax.kernels.cpu.rows import chunk_range, count_of_chunks
from gpusoftmax.kernels.cpu.states import FIELDS, MAX, save, save_state, saved
from gpusoftmax.kernels.cpu.vector import (
    lanes_of,
    number,
)


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
        sums = sum_of_exponentials(here, is_kept, largest, largest, col, count, loss.scale, loss.scale_low, False)
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
    mass = mul(weights_of_chunk(here, first, count, loss), loss.share)
    save(here.states, chunk, MASS, times_scale(mass, loss.scale, loss.scale_low))


@device
def weights_of_chunk(here, first, count, loss):
    weights = add(here.zero, number(loss.scale, count))
    if loss.weight != 0:
        weights, _, _, _ = sum_chunk(only_weight, here, (loss,), first, count)
    return weights


@device
def weighted_distance(col, left, others, here, arguments):
    """eps/V w_c (max - x_c) / T"""
    loss, largest = arguments
    x = load_cols(here.first, col, left, add(here.zeros, largest))
    mass = mul(weights_at(col, left, here, loss), add(here.zeros, loss.share))
    mass = times_scale(mass, loss.scale, loss.scale_low)
    return distance_of_mass(mass, x, add(here.zeros, largest)), others, None


@device
def only_weight(col, left, others, here, arguments):
    return weights_at(col, left, here, arguments[0]), others, None


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
                more = times_scale(more, loss.scale, loss.scale_low)
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
    mass = sum_of_mass(here, chunk, first, count, loss)
    save(here.states, chunk, MASS, times_scale(mass, loss.scale, loss.scale_low))


@device
def mass_and_distance(col, left, others, here, arguments):
    loss, largest = arguments
    x = load_cols(here.first, col, left, add(here.zeros, largest))
    mass = times_scale(mass_at(col, left, here, loss), loss.scale, loss.scale_low)
    return distance_of_mass(mass, x, add(here.zeros, largest)), others, None


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
def only_share(col, left, others, here, arguments):
    return mul(shares_at(col, left, here), weights_at(col, left, here, arguments[0])), others, None


@device
def measure_target_alone(here, first, last, loss):
    measure_target_alone_by(here, first, last, loss, loss.is_dense)


@device
def measure_target_alone_by(here, first, last, loss, is_dense):
    if is_dense is not None:
        for chunk in range(first, last):
            col, count = chunk_range(here, chunk)
            sum_of_mass(here, chunk, col, count, loss)
