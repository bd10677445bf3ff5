"""The third step of a loss: the gradient of a row, a chunk at a time, see cross_entropy.py."""

from gpusoftmax.kernels.cpu.arithmetic import (
    add,
    exp_from,
    floor,
    mul,
    sub,
)
from gpusoftmax.kernels.cpu.cache import device
from gpusoftmax.kernels.cpu.chunks import write_chunk
from gpusoftmax.kernels.cpu.here import index_in, pulled_back_cols, pulled_back_one
from gpusoftmax.kernels.cpu.loss_rows import EXPONENT, LABEL_EXP, ON_MASS, ON_PROBS, ON_SHARE, SHIFT
from gpusoftmax.kernels.cpu.loss_target import (
    COUNTED,
    label_at,
    label_of,
    mass_at,
    only_label,
    share_of_label,
    status_of,
    unused,
    weight_of_class,
    weights_at,
)
from gpusoftmax.kernels.cpu.memory import (
    load,
    load_cols,
    prefetch_to_read,
    store,
)
from gpusoftmax.kernels.cpu.rows import chunk_range, count_of_chunks
from gpusoftmax.kernels.cpu.states import FIELDS, chunk_ratio, save
from gpusoftmax.kernels.cpu.vector import (
    lanes_of,
    number,
)


@device
def write_nothing(here, first, last, summary, loss):
    pass


@device
def write(here, first, last, summary, loss):
    for chunk in range(first, last):
        col, count = chunk_range(here, chunk)
        ratio = chunk_ratio(here.states, chunk, summary.shift, summary.exponent, here.zero, loss.scale, loss.scale_low)
        factor = mul(ratio, summary.on_probs)
        save_for_labels(here, chunk, factor, summary)
        save_exponentials(kept_exponential, here, chunk, col, count, loss)
        if is_used(here, loss):
            write_chunk(gradient_of, (factor, summary.on_mass, loss), here, col, count, label_in)
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
            write_chunk(gradient_from_lse, numbers, here, col, count, label_in)
        write_labels(here, chunk, col, count, loss)


@device
def is_used(here, loss):
    return lanes_of(here.zero) > 1 or status_of(only_label(here.row, loss), here.row, loss) == COUNTED


@device
def label_in(here, arguments):
    return only_label(here.row, arguments[-1])


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
    prefetch_to_read(here.ahead.first, col, here.zeros)
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
    value = sub(value, mul(on_mass, weight_of_class(label, loss)))
    value = pulled_back_one(sub(value, on_label), label, lane, here)
    store(here.target.pointer, index_in(here.target, lane, label), value)
