"""The loss of a row and what else is told of it."""

import math
from typing import NamedTuple

from numpy import int64

from gpusoftmax.kernels.cuda.device._cuda import device
from gpusoftmax.kernels.cuda.device.arithmetic import (
    add,
    distance_of_mass,
    fma,
    logsumexp_of,
    mul,
    number,
    weighted_nats,
)
from gpusoftmax.kernels.cuda.device.exponential import negative_log_probability
from gpusoftmax.kernels.cuda.device.loss_target import tempered, unused, weight_of_row
from gpusoftmax.kernels.cuda.device.memory import is_null, row_offset, store, store_integer
from gpusoftmax.kernels.cuda.device.rows import row_of
from gpusoftmax.kernels.cuda.device.transform import unless_empty


class Results(NamedTuple):
    """Arrays for what is told of each row."""

    losses: object
    z_losses: object
    lse: object
    correct: object


@device
def loss_of_row(found, s, mass, distances, looked, all_weights, smoothed, loss, scale, shares, probs):
    """Without weight of the row and z."""
    half, log, log_low, _ = found
    if probs is None:
        if shares is None:
            nats = negative_log_probability(looked[0], half, log, scale)
            value = weighted_nats(mul(loss.confidence, s), nats)
            if smoothed:
                value = add(value, add(mul(mul(loss.share, all_weights), add(log, log_low)), distances))
            return value
        row_max = mul(half, number(half, 2.0))
        looked_mass = tempered(mul(loss.confidence, s), loss.per_logit)
        distances = add(distances, add(looked[1], distance_of_mass(looked_mass, looked[0], row_max)))
    return fma(mass, add(log, log_low), distances)


@device
def tell(row, rows, value, s, found, source, results, loss, params, row_weight):
    """Writes the numbers of a row that counts."""
    half, log, log_low, _ = found
    if row_weight is None:
        store(row_of(results.losses, row, rows).pointer, 0, unless_empty(value, half, log_low, source.through))
    else:
        factor = weight_of_row(row, rows, row_weight, value)
        lse = logsumexp_of(half, log, log_low, params[0], params[1])
        z = number(value, 0.0)
        if loss.z_loss != z:
            z = mul(mul(mul(s, loss.z_loss), lse), lse)
        value = unless_empty(mul(add(value, z), factor), half, log_low, source.through)
        if not is_null(results.losses.pointer):
            store(row_of(results.losses, row, rows).pointer, 0, value)
        if not is_null(results.z_losses.pointer):
            z = unless_empty(mul(z, factor), half, log_low, source.through)
            store(row_of(results.z_losses, row, rows).pointer, 0, z)
        if not is_null(results.lse.pointer):
            store(row_of(results.lse, row, rows).pointer, 0, lse)


@device
def tell_unused(row, rows, status, results, like, row_weight):
    """Writes those of a row that does not."""
    value = unused(status, like)
    if row_weight is None:
        store(row_of(results.losses, row, rows).pointer, 0, value)
    else:
        if not is_null(results.losses.pointer):  # it may have another format than the others
            store(row_of(results.losses, row, rows).pointer, 0, value)
        for array in (results.z_losses, results.lse):
            if not is_null(array.pointer):
                store(row_of(array, row, rows).pointer, 0, value)
        if results.correct.pointer != 0:
            store_integer(results.correct.pointer, row_offset(results.correct, row, rows), 0)


@device
def is_wanted(correct):
    if correct is None:
        return False
    return correct.pointer != 0


@device
def tell_correct(label, row, rows, column, found, correct, team):
    """Whether the label is the first of the largest logits. None is where the loss is NaN or no logit is left."""
    if correct is not None:
        half, log, _, _ = found
        if correct.pointer != 0 and team.lane == 0 and column >= 0:
            is_correct = column == label and log == log and half > number(half, -math.inf)
            place = row_offset(correct, row, rows)
            store_integer(correct.pointer, place, int64(1) if is_correct else int64(0))
