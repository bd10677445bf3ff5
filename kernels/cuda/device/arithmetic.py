"""The formulas of `gpusoftmax.kernels.formulas` for one number per thread, with every rounding explicit.

NVVM contracts a plain product and sum into a fused multiply-add and has no switch against it, so additions and products
are asked for by the intrinsics that name their rounding.
"""

import functools

from gpusoftmax.kernels import divergences, formulas, ieee, positions
from gpusoftmax.kernels.binding import bind
from gpusoftmax.kernels.cuda.device._cuda import intrinsic, types


class Rounded(ieee.Arithmetic):
    def _nvvm(self, name, x, y):
        return self.call(f"llvm.nvvm.{name}.{'d' if self.format is ieee.DOUBLE else 'f'}", x, y)

    def add(self, x, y):
        return self._nvvm("add.rn", x, y)

    def sub(self, x, y):
        return self._nvvm("add.rn", x, self.negative(y))

    def mul(self, x, y):
        return self._nvvm("mul.rn", x, y)

    def div(self, x, y):
        return self._nvvm("div.rn", x, y)

    def maximum(self, x, y):
        """The larger one; a NaN loses."""
        return self._nvvm("fmax", x, y)

    def minimum(self, x, y):
        """The smaller one; a NaN loses."""
        return self._nvvm("fmin", x, y)


formula = functools.partial(bind, intrinsic, types, Rounded)

add = formula(Rounded.add)
sub = formula(Rounded.sub)
mul = formula(Rounded.mul)
div = formula(Rounded.div)
fma = formula(Rounded.fma)
maximum = formula(Rounded.maximum)
minimum = formula(Rounded.minimum)
negative = formula(Rounded.negative)
two_sum = formula(formulas.two_sum, n_results=2)
add_pair = formula(formulas.add_pair, n_results=2)
finite_or_zero = formula(formulas.finite_or_zero)
where_finite = formula(formulas.where_finite)
gap = formula(formulas.gap, n_results=2)
exp = formula(formulas.exp)
exp_gap = formula(formulas.exp_gap)
tie = formula(formulas.tie)
weighted = formula(formulas.weighted)
distance_of_mass = formula(formulas.distance_of_mass)
weighted_nats = formula(formulas.weighted_nats)
is_above = formula(formulas.is_above)
inverse_temperature = formula(formulas.inverse_temperature, n_results=2)
pulled_through_mask = formula(formulas.pulled_through_mask)
zero_where_empty = formula(formulas.zero_where_empty)
reference = formula(formulas.reference)
# Those of exponential.py are quicker; these are what states have that may come from a CPU.
anchor_of_formulas = formula(formulas.anchor, n_results=2)
floor = formula(formulas.floor)
exp_from = formula(formulas.exp_from)
ratio_of_anchors = formula(formulas.ratio_of_anchors)
tied_total = formula(formulas.tied_total, n_results=3)
inverse_sum = formula(formulas.inverse_sum)
power_of_two_ratio = formula(formulas.power_of_two_ratio)
row_inverse = formula(formulas.row_inverse)
log_sum = formula(formulas.log_sum, n_results=2)
logsumexp = formula(formulas.logsumexp)
logsumexp_of = formula(formulas.logsumexp_of)
coordinate = formula(positions.coordinate)
place_of = formula(positions.place_of)
per_place_of = formula(positions.per_place_of)
leading = formula(formulas.leading, n_results=2)
line_and_place = formula(positions.line_and_place, n_results=2)
moved_moment = formula(positions.moved_moment, n_results=2)
ratio_of_pairs = formula(positions.ratio_of_pairs)
first_leading = formula(formulas.first_leading, n_results=2)
half_difference = formula(divergences.half_difference, n_results=2)
log_ratio = formula(divergences.log_ratio)
short_log_ratio = formula(divergences.short_log_ratio)
divergence = formula(divergences.divergence)
pull_on_target = formula(divergences.pull_on_target)


@intrinsic
def number(typingctx, like, value):
    """A literal in the computation format of `like`: a bare Python float would drag the kernel into float64."""

    def codegen(context, builder, signature, args):
        return context.get_constant(like, value.literal_value)

    if isinstance(value, types.Literal):
        return like(like, value), codegen

    def cast(context, builder, signature, args):
        return context.cast(builder, args[1], signature.args[1], like)

    return like(like, value), cast
