"""The Kullback-Leibler divergence between two rows of logits, and its gradients, on the CPU.

For a row x (logits, of the student) and a row y (target_logits, of the teacher), with q = softmax(x / T) and
p = softmax(y / T):

    KL(p || q)  = sum_c p_c d_c                       d_c = log p_c - log q_c
    dlogits_c   = u (q_c - p_c) / T
    dtarget_c   = u p_c (d_c - KL) / T

u is the row's weight times the gradient from above. Where p and q are nearly the same, the terms p_c d_c have both
signs and cancel. Since p and q both add up to 1,

    KL = sum_c (p_c d_c - p_c + q_c)                  p_c d_c - p_c + q_c = p_c (d_c + expm1(-d_c)) >= 0

where no term is negative: nothing cancels, and the divergence is not negative either. An error of log s, that moves all
d_c by k, moves this sum by k^2 / 2 only: its first derivative, sum_c (p_c - q_c), is 0. What a class adds to the sum
stands in kernels/divergences.py.

The d_c need the sums of both rows, so a row is gone over twice, by one thread: the first time for these sums, the
second time for the divergence and one of the gradients.

A row whose weight is 0 is left out: loss 0, gradients 0.
"""

from typing import NamedTuple

from gpusoftmax.kernels.cpu.arithmetic import (
    add,
    add_pair,
    div,
    divergence,
    exp_from,
    floor,
    half_difference,
    log_ratio,
    log_sum,
    mul,
    pull_on_target,
    row_inverse,
    sub,
)
from gpusoftmax.kernels.cpu.cache import device, kernel
from gpusoftmax.kernels.cpu.call import arguments
from gpusoftmax.kernels.cpu.chunks import chunk_max, fetch_both, sum_chunk, sum_of_exponentials, write_chunk
from gpusoftmax.kernels.cpu.here import Ahead, Here, index_in
from gpusoftmax.kernels.cpu.memory import (
    advance,
    load,
    load_cols,
    pointer_to,
    store,
    store_cols,
)
from gpusoftmax.kernels.cpu.rows import chunk_range, count_of_chunks, element, nothing_first, number_or
from gpusoftmax.kernels.cpu.run import run
from gpusoftmax.kernels.cpu.states import FIELDS, MAX, OWN, fold_state, save, save_state, saved
from gpusoftmax.kernels.cpu.vector import (
    lanes_of,
    number,
)
from gpusoftmax.kernels.cpu.walk import walk
from gpusoftmax.kernels.operands import STORAGE, Numbers, Operand, Place, Rows, scale_of, unless_one


def kl_div(
    rows: Rows,
    logits: Operand,
    target_logits: Operand,
    weight: Operand,
    losses: Operand,
    dlogits: Operand,
    normaliser: Numbers,
    upstream: float,
    temperature: float,
    place: Place,
) -> None:
    """The divergence of each row times its weight and, unless dlogits.pointer is 0, its gradient with respect to the
    logits times upstream / normaliser; dlogits may be either of the arrays that are read.

    weight.pointer 0 stands for ones, and so does normaliser.pointer 0; normaliser.dtype is the computation format.
    """
    numbers = weight, losses, *_numbers(normaliser, upstream, temperature)
    if dlogits.pointer:
        kernel, target = kl_div_with_grad_rows, dlogits
    else:
        kernel, target = kl_div_rows, None
    keeps = target is not None
    run(
        kernel, rows, logits, target_logits, target, *numbers, keeps_exponentials=keeps, in_blocks=False, in_parts=False
    )  # fmt: skip


def kl_div_target_grad(
    rows: Rows,
    logits: Operand,
    target_logits: Operand,
    weight: Operand,
    dtarget: Operand,
    normaliser: Numbers,
    upstream: float,
    temperature: float,
    place: Place,
) -> None:
    """The gradient with respect to the target's logits. dtarget shares no memory with what is read."""
    numbers = weight, *_numbers(normaliser, upstream, temperature)
    run(kl_div_target_grad_rows, rows, logits, target_logits, dtarget, *numbers, in_blocks=False, in_parts=False)


def _numbers(normaliser: Numbers, upstream: float, temperature: float) -> tuple:
    dtype = normaliser.dtype
    twice, _ = scale_of(2.0, temperature, dtype)
    return normaliser, STORAGE[dtype](upstream), twice, *unless_one(scale_of(1.0, temperature, dtype))


class Task(NamedTuple):
    """What the steps need besides the logits."""

    rows: Rows
    weight: object
    normaliser: int  # address of a number in the computation format, 0: none
    upstream: object
    twice: object  # 2 / T
    scale: object  # 1 / T
    scale_low: object


# Kept of a row, where the chunks end.
WEIGHT, LOSS = range(2)


@kernel
def kl_div_rows(call):
    way, job, rows, logits, target_logits, none, weight, losses, normaliser, upstream, twice, scale, scale_low = (
        arguments(call)
    )
    task = Task(rows, weight, normaliser, upstream, twice, scale, scale_low), losses
    walk(way, job, rows, logits, target_logits, none, nothing_first, measure, fold, write_loss, task, scale)


@kernel
def kl_div_with_grad_rows(call):
    way, job, rows, logits, target_logits, dlogits, weight, losses, normaliser, upstream, twice, scale, scale_low = (
        arguments(call)
    )
    task = Task(rows, weight, normaliser, upstream, twice, scale, scale_low), losses
    walk(
        way, job, rows, logits, target_logits, dlogits, nothing_first, measure, fold, write_gradient, task, scale
    )  # fmt: skip


@kernel
def kl_div_target_grad_rows(call):
    way, job, rows, logits, target_logits, dtarget, weight, normaliser, upstream, twice, scale, scale_low = arguments(
        call
    )
    task = Task(rows, weight, normaliser, upstream, twice, scale, scale_low), None
    walk(
        way, job, rows, logits, target_logits, dtarget, nothing_first, measure, fold, write_target_gradient, task,
        scale,
    )  # fmt: skip


@device
def weight_of(row, task):
    return number_or(task.weight, row, task.rows, number(task.scale, 1.0))


@device
def is_left_out(here, task):
    """Whether a row is not even read. Across rows all are, and what comes of those that are left out is overwritten."""
    return lanes_of(here.zero) == 1 and weight_of(here.row, task) == number(task.scale, 0.0)


@device
def of_target(here):
    """The rows beside those that are read first, with the states of their own chunks."""
    states = advance(here.states, OWN * lanes_of(here.zero))
    ahead = Ahead(here.ahead.second, here.ahead.first, here.ahead.target)
    return Here(
        here.row, here.n_rows, here.n_cols, states, here.partials, here.stage, here.zeros, here.nothing, here.zero,
        here.second, here.first, here.target, here.home, ahead, here.streamed, here.is_cached, here.through,
    )  # fmt: skip


# ---------------------------------------------------------------- 1. measure


@device
def measure(here, first, last, numbers):
    task, _ = numbers
    if is_left_out(here, task):
        return
    for k in range(2 * (last - first)):  # both rows by the same code, which is compiled once
        rows = here if k % 2 == 0 else of_target(here)
        chunk = first + k // 2
        col, count = chunk_range(rows, chunk)
        largest = chunk_max(rows, col, count)
        save(rows.states, chunk, MAX, largest)
        sums = sum_of_exponentials(rows, False, largest, largest, col, count, task.scale, task.scale_low, False)
        save_state(rows.states, chunk, sums)


# ---------------------------------------------------------------- 2. fold


@device
def fold(here, numbers):
    task, _ = numbers
    n_chunks, beside = count_of_chunks(here.n_cols), of_target(here)
    state, row = fold_state(here.states, n_chunks, here.zero, task.scale, task.scale_low)
    target_state, target_row = fold_state(beside.states, n_chunks, here.zero, task.scale, task.scale_low)
    log, log_low = log_sum(state)
    target_log, target_log_low = log_sum(target_state)
    ahead, ahead_low = half_difference(target_state[0], state[0])
    # The exponentials of either row refer to (shift, exponent), are 0 below the floor, and become probabilities by the
    # inverse. Not a NamedTuple: Numba adds nothing to those.
    return (
        row.shift,
        row.exponent,
        floor(row.exponent),
        row_inverse(state[0], row.sum, row.low),
        target_row.shift,
        target_row.exponent,
        floor(target_row.exponent),
        row_inverse(target_state[0], target_row.sum, target_row.low),
        ahead,
        ahead_low,
        add(sub(target_log, log), sub(target_log_low, log_low)),
    )  # what `at_columns` takes apart


# ---------------------------------------------------------------- 3. write


@device
def at_columns(col, left, here, arguments):
    """(p, q, d) of the vector at a column, from what `fold` gives, two numbers of `target_gradient`, the Task."""
    (
        shift, exponent, low, inverse, target_shift, target_exponent, target_low, target_inverse, ahead, ahead_low, log,
        _, _, task,
    ) = arguments  # fmt: skip
    x = load_cols(here.first, col, left, here.nothing)
    y = load_cols(here.second, col, left, here.nothing)
    q = mul(exp_from(x, shift, exponent, low, task.scale, task.scale_low), inverse)
    p = mul(exp_from(y, target_shift, target_exponent, target_low, task.scale, task.scale_low), target_inverse)
    half = number(task.scale, 0.5)
    return p, q, log_ratio(mul(x, half), mul(y, half), ahead, ahead_low, task.twice, log)


@device
def term(col, left, others, here, arguments):
    """What the columns add to the divergence."""
    fetch_both(here, col)
    return divergence(*at_columns(col, left, here, arguments)), others, None


@device
def term_and_change(col, left, others, here, arguments):
    """Beside it, q - p takes the place of what was read, perhaps."""
    fetch_both(here, col)
    p, q, d = at_columns(col, left, here, arguments)
    store_cols(here.home, col, left, sub(q, p))
    return divergence(p, q, d), others, None


@device
def scaled(col, left, here, arguments):
    return mul(load_cols(here.home, col, left, here.zeros), arguments[0])


@device
def target_gradient(col, left, here, arguments):
    p, _, d = at_columns(col, left, here, arguments)
    return mul(pull_on_target(p, d, arguments[11]), arguments[12])


@device
def nan_without(pair):
    """0, but NaN if either row has no probabilities: each of its terms is NaN, or +inf."""
    _, _, _, inverse, _, _, _, target_inverse, _, _, _ = pair
    return add(sub(inverse, inverse), sub(target_inverse, target_inverse))


@device
def save_weights(here, task):
    """The weights of the rows, for `saved`."""
    lanes, n_chunks = lanes_of(here.zero), count_of_chunks(here.n_cols)
    for lane in range(here.n_rows):
        store(here.states, (n_chunks * FIELDS + WEIGHT) * lanes + lane, weight_of(here.row + lane, task))
    return saved(here.states, n_chunks, WEIGHT, here.zero)


@device
def factor_of(weight, task):
    """What q - p, or p (d - KL), is multiplied by."""
    one = number(task.scale, 1.0)
    divisor = one if task.normaliser == 0 else load(pointer_to(task.normaliser, one), 0, one)
    return mul(mul(weight, div(task.upstream, divisor)), task.scale)


@device
def write_loss(here, first, last, pair, numbers):
    task, losses = numbers
    weight = save_weights(here, task)
    if is_left_out(here, task):
        store(element(losses, here.row, task.rows), 0, number(task.scale, 0.0))
        return
    total, low = here.zero, here.zero
    for chunk in range(first, last):
        col, count = chunk_range(here, chunk)
        part, part_low, _, _ = sum_chunk(term, here, (*pair, here.zero, here.zero, task), col, count)
        total, low = add_pair(total, low, part, part_low)
    store_losses(here, weight, add(add(total, low), nan_without(pair)), task, losses)


@device
def write_gradient(here, first, last, pair, numbers):
    task, losses = numbers
    weight = save_weights(here, task)
    factor = factor_of(weight, task)
    total, low = here.zero, here.zero
    if not is_left_out(here, task):
        for chunk in range(first, last):
            col, count = chunk_range(here, chunk)
            part, part_low, _, _ = sum_chunk(term_and_change, here, (*pair, here.zero, here.zero, task), col, count)
            total, low = add_pair(total, low, part, part_low)
            write_chunk(scaled, (factor, task), here, col, count)
    clear_left_out(here, task)
    store_losses(here, weight, add(add(total, low), nan_without(pair)), task, losses)


@device
def write_target_gradient(here, first, last, pair, numbers):
    task, _ = numbers
    factor = factor_of(save_weights(here, task), task)
    if not is_left_out(here, task):
        total, low = here.zero, here.zero
        for chunk in range(first, last):
            col, count = chunk_range(here, chunk)
            part, part_low, _, _ = sum_chunk(term, here, (*pair, here.zero, here.zero, task), col, count)
            total, low = add_pair(total, low, part, part_low)
        of_row = add(add(total, low), nan_without(pair))
        for chunk in range(first, last):
            col, count = chunk_range(here, chunk)
            write_chunk(target_gradient, (*pair, of_row, factor, task), here, col, count)
    clear_left_out(here, task)


@device
def clear_left_out(here, task):
    for lane in range(here.n_rows):
        if weight_of(here.row + lane, task) == number(task.scale, 0.0):
            for col in range(here.n_cols):
                store(here.target.pointer, index_in(here.target, lane, col), number(task.scale, 0.0))


@device
def store_losses(here, weight, divergence, task, losses):
    lanes = lanes_of(here.zero)
    n_chunks = count_of_chunks(here.n_cols)
    save(here.states, n_chunks, LOSS, mul(divergence, weight))
    for lane in range(here.n_rows):
        value = load(here.states, (n_chunks * FIELDS + LOSS) * lanes + lane, task.scale)
        if weight_of(here.row + lane, task) == number(task.scale, 0.0):
            value = number(task.scale, 0.0)
        store(element(losses, here.row + lane, task.rows), 0, value)
