"""From which logit on a row is kept, for top-k, top-p and min-p, on the CPU. A row is walked by one thread.

    top-k   the k-th largest logit: at least so many reach it
    top-p   the largest logit for which those that reach it have the part p of the probability, or more
    min-p   max + T log(min_p): exp((x - max) / T) >= min_p

All logits that equal the limit are kept. kernels/ordering.py tells how the first two are found.
"""

import math

from gpusoftmax.kernels import ordering
from gpusoftmax.kernels.cpu.arithmetic import (
    add,
    add_pair,
    anchor,
    div,
    exp_from,
    floor,
    formula,
    maximum,
    mul,
    sub,
)
from gpusoftmax.kernels.cpu.cache import device
from gpusoftmax.kernels.cpu.chunks import CHUNK_COLS, sum_chunk, sum_of_exponentials
from gpusoftmax.kernels.cpu.lanes import lowest_bit
from gpusoftmax.kernels.cpu.memory import load, load_cols, load_label, store
from gpusoftmax.kernels.cpu.noise import distance_of_ratio, scale_of_temperature
from gpusoftmax.kernels.cpu.orders import (
    between,
    halfway,
    lanes_between,
    lanes_reaching,
    of_order,
    order_of,
    order_step,
    where_reaching,
)
from gpusoftmax.kernels.cpu.rows import chunk_range, count_of_chunks, element, row_offset
from gpusoftmax.kernels.cpu.states import row_max
from gpusoftmax.kernels.cpu.vector import cols_of, number
from gpusoftmax.kernels.operands import ONE_VALUE

kept_from = formula(ordering.kept_from)
# One column of so many: they are gathered when no more are left (Zen 5; 64 to 1024 differ little).
FEW = 256
# So many steps divide by value: to a limit of 0 all of them would be hundreds, in float64 thousands (Zen 5, 4 x 151936
# float32 zeros: 9.9 ms without a bound, 1.8 with this one).
BY_VALUE = 16
# A sum over so many columns takes no longer than to look for a better way (Zen 5, 65536 rows of 64 columns: 19 ms so,
# 33 the other way; 4096 rows of 1000: 4.7 and 3.8).
SHORT = 512


@device
def nothing_measured(here, first, last, numbers):
    """Step 1 of an op for which a row has to be whole."""


@device
def limit_of(here, top_k, top_p, from_max, scale, scale_low):
    """The limit of a row whose chunks' maxima are saved. top_k 0, top_p 1 and from_max -inf keep everything.

    top_p counts the probability of what top_k leaves.
    """
    largest = row_max(here.states, count_of_chunks(here.n_cols), here.zero)
    limit = number(largest, -math.inf)
    if top_k > 0 and top_k < here.n_cols:
        limit = limit_of_count(here, top_k, largest)
    if top_p < number(largest, 1.0):
        limit = limit_of_mass(here, top_p, limit, largest, scale, scale_low)
    return maximum(limit, add(largest, from_max))


@device
def limit_of_own(here, rows, own):
    """(whether the row's own numbers are such as can be given for all rows, its temperature, its limit)

    own: as operands.own_numbers has them. At temperature 0 everything is kept.
    """
    temperatures, top_ks, top_ps, min_ps = own
    temperature, top_p = own_number(temperatures, here.row, rows), own_number(top_ps, here.row, rows)
    min_p, top_k = own_number(min_ps, here.row, rows), word_of(top_ks, here.row, rows)
    zero, one, limit = number(temperature, 0.0), number(temperature, 1.0), number(temperature, -math.inf)
    is_given = temperature >= zero and temperature < number(temperature, math.inf)
    is_given = is_given and top_p > zero and top_p <= one and min_p >= zero and min_p <= one
    if is_given and temperature > zero:
        scale, low = scale_of_temperature(one, temperature)
        limit = limit_of(here, top_k, top_p, distance_of_ratio(min_p, temperature), scale, low)
    return is_given, temperature, limit


@device
def own_number(given, row, rows):
    """A row's own number, or that of all rows."""
    array, of_all = given
    if array.address == 0:
        return of_all
    return load(element(array, row, rows), 0, of_all)


@device
def word_of(labels, row, rows):
    """A row's own integer, or the one of all rows."""
    if labels.code == ONE_VALUE:
        return labels.pointer
    return load_label(labels.pointer, row_offset(labels, row, rows), labels.code)


@device
def limit_of_count(here, top_k, largest):
    """The k-th largest logit, or a number between it and the next one."""
    step = order_step(here.first.pointer, largest)
    low, high = order_of(number(largest, -math.inf)), order_of(largest) + step
    middle = halfway(low, high, step)
    while middle != low:
        limit = of_order(middle, largest)
        n_reaching = count_reaching(here, limit)
        if n_reaching == top_k:
            return limit
        if n_reaching > top_k:
            low = middle
        else:
            high = middle
        middle = halfway(low, high, step)
    return of_order(low, largest)


@device
def limit_of_mass(here, top_p, limit, largest, scale, scale_low):
    step = order_step(here.first.pointer, largest)
    low, high = order_of(limit), order_of(largest) + step
    numbers = *anchor(largest, scale), scale, scale_low
    if limit > number(largest, -math.inf) and here.n_cols > SHORT:  # of what top_k leaves
        n_left = gather_between(here, limit, of_order(high, largest))
        wanted = mul(top_p, mass_of_gathered(here, n_left, limit, numbers))
        return limit_of_gathered(here, n_left, wanted, here.zero, low, high, step, 0, numbers)

    reaching, above = mass_of_row(here, limit, largest, scale, scale_low), here.zero  # what reaches low, and high
    wanted = mul(top_p, reaching)
    by_value = 0
    if here.n_cols > SHORT:
        bound = least_limit(here, top_p, largest, scale)
        if bound > limit:
            low, by_value = order_of(bound) & -step, BY_VALUE
    middle = between(low, high, step, by_value, part_of(wanted, reaching, above))
    while middle != low and are_many(sub(reaching, above), of_order(low, largest), here, numbers):
        mass = mass_reaching(here, of_order(middle, largest))
        if mass >= wanted:
            low, reaching = middle, mass
        else:
            high, above = middle, mass
        by_value -= 1
        middle = between(low, high, step, by_value, part_of(wanted, reaching, above))
    if middle == low:
        return of_order(low, largest)
    n_left = gather_between(here, of_order(low, largest), of_order(high, largest))
    return limit_of_gathered(here, n_left, wanted, above, low, high, step, by_value, numbers)


@device
def mass_of_row(here, limit, largest, scale, scale_low):
    """The sum of the exponentials whose logits are at least the limit. All exponentials go to `home`."""
    total, low = here.zero, here.zero
    for chunk in range(count_of_chunks(here.n_cols)):
        col, count = chunk_range(here, chunk)
        sums = sum_of_exponentials(here, True, largest, None, col, count, scale, scale_low, False)
        total, low = add_pair(total, low, sums[0], sums[1])
    total = add(total, low)
    # A NaN among the logits reaches no limit.
    is_of_all = limit == number(largest, -math.inf) and total == total
    return total if is_of_all else mass_reaching(here, limit)


@device
def are_many(mass, low, here, numbers):
    """Whether columns that reach low, with this sum, are too many to be gathered, or all of them few."""
    if here.n_cols <= SHORT:
        return True
    shift, exponent, scale, scale_low = numbers
    least = exp_from(low, shift, exponent, floor(exponent), scale, scale_low)
    # Of a row with +inf the sum is NaN, and its limit -inf, which what fills up the last vector would reach, too.
    return not mul(mass, number(mass, FEW)) <= mul(least, number(mass, here.n_cols))


@device
def limit_of_gathered(here, n_gathered, wanted, above, low, high, step, by_value, numbers):
    """The limit between two orders, where all logits between these have been gathered. above: the sum of the others.
    by_value: how many more steps divide by value.
    """
    half = number(wanted, 0.5)
    middle = between(low, high, step, by_value, half)
    while middle != low:
        if add(above, mass_of_gathered(here, n_gathered, of_order(middle, half), numbers)) >= wanted:
            low = middle
        else:
            high = middle
        by_value -= 1
        middle = between(low, high, step, by_value, half)
    return of_order(low, half)


@device
def least_limit(here, top_p, largest, scale):
    """What the limit is not below: columns that have less than (1 - top_p) / (e n_cols) each have less than 1 - top_p
    together. -inf where that tells nothing.
    """
    rest = sub(number(largest, 1.0), top_p)
    share = div(rest, number(largest, math.e * here.n_cols))
    bound = add(largest, distance_of_ratio(share, div(number(largest, 1.0), scale)))
    # So little is left that rounding errors count; rows of infinities, and of NaN.
    tells = rest > number(largest, 2.0**-16) and bound < largest and largest < number(largest, math.inf)
    return bound if tells else number(largest, -math.inf)


@device
def part_of(wanted, reaching, above):
    """Where between two limits a third may have the wanted sum, as a part of their distance: half way to it."""
    return mul(add(div(sub(reaching, wanted), sub(reaching, above)), number(wanted, 0.5)), number(wanted, 0.5))


@device
def count_reaching(here, limit):
    """How many logits are at least the limit, which is not -inf."""
    cols = cols_of(here.zeros)
    full = here.n_cols - here.n_cols % cols
    found = 0
    for col in range(0, full, cols):
        found += lanes_reaching(load_cols(here.first, col, None, here.nothing), limit)
    if full < here.n_cols:
        found += lanes_reaching(load_cols(here.first, full, here.n_cols - full, here.nothing), limit)
    return found


@device
def mass_reaching(here, limit):
    """The sum of the exponentials in `home` whose logits are at least the limit."""
    total, low = here.zero, here.zero
    for chunk in range(count_of_chunks(here.n_cols)):
        col, count = chunk_range(here, chunk)
        part, part_low, _, _ = sum_chunk(exponential_reaching, here, (limit,), col, count)
        total, low = add_pair(total, low, part, part_low)
    return add(total, low)


@device
def exponential_reaching(col, left, others, here, arguments):
    x = load_cols(here.first, col, left, here.nothing)
    return where_reaching(x, arguments[0], load_cols(here.home, col, left, here.zeros)), others, None


@device
def gather_between(here, low, high):
    """How many logits reach low and not high: they go to the front of `home`, in the place of exponentials."""
    step = cols_of(here.zeros)
    found = 0
    for col in range(0, here.n_cols, step):
        left = here.n_cols - col
        x = load_cols(here.first, col, left, here.nothing)
        lanes = lanes_between(x, low, high, left)
        while lanes != 0:
            store(here.home.pointer, found, load(here.first.pointer, col + lowest_bit(lanes), here.zero))
            lanes &= lanes - 1
            found += 1
    return found


@device
def mass_of_gathered(here, n_gathered, limit, numbers):
    """The sum of the exponentials of those that are at least the limit."""
    total, low = here.zero, here.zero
    for first in range(0, n_gathered, CHUNK_COLS):
        count = min(CHUNK_COLS, n_gathered - first)
        part, part_low, _, _ = sum_chunk(exponential_of_gathered, here, (limit, *numbers), first, count)
        total, low = add_pair(total, low, part, part_low)
    return add(total, low)


@device
def exponential_of_gathered(col, left, others, here, arguments):
    limit, shift, exponent, scale, scale_low = arguments
    x = load_cols(here.home, col, left, here.nothing)
    e = exp_from(x, shift, exponent, floor(exponent), scale, scale_low)
    return where_reaching(x, limit, e), others, None
