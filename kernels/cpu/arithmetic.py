"""The formulas for kernels on the CPU, on vectors and on single numbers."""

import functools

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gpusoftmax.kernels import divergences, formulas, ieee, positions
from gpusoftmax.kernels.binding import bind
from gpusoftmax.kernels.cpu.vector import REGISTER_BYTES


class _Arithmetic(ieee.Arithmetic):
    def kept(self, value: float):
        """LLVM prefers loading a constant again in every step of a loop. What comes out of an assembler statement, even
        one without instructions, is no constant to it. Where there are 32 registers.
        """
        if not self.lanes or REGISTER_BYTES != 64:
            return self.number(value)
        element = self.type.element
        constant = ir.Constant(element, float(np.float32(value)) if self.format is ieee.SINGLE else value)
        number = self.builder.asm(ir.FunctionType(element, [element]), "", "=x,0", [constant], side_effect=False)
        number.attributes.add("readnone")
        number.attributes.add("nounwind")
        return self.splat(number)


formula = functools.partial(bind, intrinsic, types, _Arithmetic)
add = formula(ieee.Arithmetic.add)
sub = formula(ieee.Arithmetic.sub)
mul = formula(ieee.Arithmetic.mul)
div = formula(ieee.Arithmetic.div)
fma = formula(ieee.Arithmetic.fma)
negative = formula(ieee.Arithmetic.negative)
maximum = formula(ieee.Arithmetic.maximum)
kahan_add = formula(formulas.kahan_add, n_results=2)
compensated_add = formula(formulas.compensated_add, n_results=2)
add_pair = formula(formulas.add_pair_normalised, n_results=2)  # chunks and labels are added so, no single logits
finite_or_zero = formula(formulas.finite_or_zero)
where_finite = formula(formulas.where_finite)
anchor = formula(formulas.anchor, n_results=2)
floor = formula(formulas.floor)
exp_from = formula(formulas.exp_from)
coarse_exp_from = formula(formulas.coarse_exp_from)
inverse_pair = formula(formulas.inverse_pair, n_results=2)
ratio_of_anchors = formula(formulas.ratio_of_anchors)
power_of_two_ratio = formula(formulas.power_of_two_ratio)
exp = formula(formulas.exp)
set_ties_apart = formula(formulas.set_ties_apart, n_results=2)
tied_total = formula(formulas.tied_total, n_results=3)
log_sum = formula(formulas.log_sum, n_results=2)
weighted = formula(formulas.weighted)
weighted_distance = formula(formulas.weighted_distance)
finite_distance = formula(formulas.finite_distance)
distance_of_mass = formula(formulas.distance_of_mass)
weighted_nats = formula(formulas.weighted_nats)
counted_above = formula(formulas.counted_above)
rise_to = formula(formulas.rise_to)
row_inverse = formula(formulas.row_inverse)
scaled = formula(formulas.scaled)
inverse_temperature = formula(formulas.inverse_temperature, n_results=2)
near_softcap = formula(formulas.near_softcap)
softcap = formula(formulas.softcap)
pulled_through_softcap = formula(formulas.pulled_through_softcap)
pulled_through_mask = formula(formulas.pulled_through_mask)
zero_where_empty = formula(formulas.zero_where_empty)
log_probability = formula(formulas.log_probability)
logsumexp = formula(formulas.logsumexp)
leading = formula(formulas.leading, n_results=2)
exp_below = formula(positions.exp_below)
line_and_place = formula(positions.line_and_place, n_results=2)
moved_moment = formula(positions.moved_moment, n_results=2)
ratio_of_pairs = formula(positions.ratio_of_pairs)
coordinate = formula(positions.coordinate)
place_of = formula(positions.place_of)
per_place_of = formula(positions.per_place_of)
half_difference = formula(divergences.half_difference, n_results=2)
log_ratio = formula(divergences.log_ratio)
divergence = formula(divergences.divergence)
pull_on_target = formula(divergences.pull_on_target)
