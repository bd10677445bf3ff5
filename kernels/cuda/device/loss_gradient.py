"""The gradient of the loss of a row: what its exponentials are multiplied by, and what is taken from each column."""

from gpusoftmax.kernels.cuda.device._cuda import device
from gpusoftmax.kernels.cuda.device.arithmetic import fma, mul, number, sub
from gpusoftmax.kernels.cuda.device.exponential import cheap_exp_from, cheap_exp_gap
from gpusoftmax.kernels.cuda.device.loss_target import less_shares, less_shares_of_run, masses_of_run, number_at
from gpusoftmax.kernels.cuda.device.memory import granule_numbers, store
from gpusoftmax.kernels.cuda.device.piece_state import is_near
from gpusoftmax.kernels.cuda.device.rows import number_or
from gpusoftmax.kernels.cuda.device.split import split_lanes
from gpusoftmax.kernels.cuda.device.transform import pulled_back, unless_empty


@device
def times(upstream, row, rows, array):
    """The upstream gradient of a row times its number in an array."""
    if array is None:
        return upstream
    return mul(upstream, number_or(array, row, rows, number(upstream, 1.0)))


@device
def slope_of(s, lse, row_max, rest, source, z_loss):
    """2 z_loss S lse, what z adds to the slope of the lse."""
    if z_loss is None:
        return number(lse, 0.0)
    slope = number(lse, 0.0)
    if z_loss != slope:
        slope = mul(mul(s, lse), mul(z_loss, number(lse, 2.0)))
    return unless_empty(slope, row_max, rest, source.through)


@device
def plus_slope(mass, upstream, slope, z_loss):
    if z_loss is None:
        return mass
    return fma(upstream, slope, mass)


def factors_with(is_soft):
    @device
    def factors(s, mass, all_weights, slope, upstream, inverse, row_max, rest, loss, through):
        """(on_probs, on_share, on_mass): what probabilities, the shares of labels and masses are multiplied by."""
        inverse = unless_empty(inverse, row_max, rest, through)
        if is_soft:
            upstream = unless_empty(upstream, row_max, rest, through)
            on_probs = mul(inverse, plus_slope(mul(upstream, mass), upstream, slope, loss.z_loss))
            return on_probs, mul(upstream, loss.confidence), upstream
        on_label = mul(upstream, unless_empty(mul(loss.confidence, s), row_max, rest, through))
        on_mass = unless_empty(mul(upstream, loss.share), row_max, rest, through)
        on_probs = mul(inverse, plus_slope(fma(on_mass, all_weights, on_label), upstream, slope, loss.z_loss))
        return on_probs, on_label, on_mass

    return factors


@device
def to_exponentials(values, others, width, half, exponent, lowest, factor, params):
    """values[:width] times the factor; the logits stay in `others`."""
    scale, scale_low, c, c_low = params
    if is_near(exponent):
        for k in range(width):
            others[k] = values[k]
            values[k] = mul(cheap_exp_from(values[k], exponent, lowest, c, c_low), factor)
    else:
        for k in range(width):
            others[k] = values[k]
            values[k] = mul(cheap_exp_gap(values[k], half, scale, scale_low, c, c_low), factor)


def gradients_with(has_mass):
    @device
    def gradients(values, others, col, width, numbers):
        label, half, exponent, lowest, on_probs, on_label, on_mass, weight, params, through = numbers
        to_exponentials(values, others, width, half, exponent, lowest, on_probs, params)
        if label >= col and label < col + width:
            for k in range(width):
                if col + k == label:
                    values[k] = sub(values[k], on_label)
        if has_mass:
            for k in range(width):
                w = number_at(weight, col + k, number(half, 1.0))
                values[k] = sub(values[k], mul(on_mass, w))
        for k in range(width):
            values[k] = pulled_back(values[k], others[k], through)

    return gradients


def soft_gradients_with(less_shares):
    @device
    def soft_gradients(values, others, col, width, numbers):
        row, probs, half, exponent, lowest, on_probs, on_share, on_mass, (loss, rows), params, through = numbers
        to_exponentials(values, others, width, half, exponent, lowest, on_probs, params)
        less_shares(values, col, width, row, rows, loss, on_share, half, loss.shares)
        masses = granule_numbers(half)
        masses_of_run(masses, col, width, width, loss, probs)
        for k in range(width):
            values[k] = pulled_back(sub(values[k], mul(on_mass, masses[k])), others[k], through)

    return soft_gradients


soft_gradients = soft_gradients_with(less_shares), soft_gradients_with(less_shares_of_run)


@device
def fill_row(target, n_cols, value, team, split):
    for col in range(team.rank * split_lanes(split) + team.lane, n_cols, team.size * split_lanes(split)):
        store(target.pointer, col * target.stride, value)
