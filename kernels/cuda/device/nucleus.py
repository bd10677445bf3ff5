"""Where top-p ends among the few largest logits of a long row: a guess, which threshold.py confirms by two passes."""

import math

from numpy import int32

from gpusoftmax.kernels.cuda.device._cuda import cuda, device
from gpusoftmax.kernels.cuda.device.arithmetic import add, maximum, negative, number
from gpusoftmax.kernels.cuda.device.largest import bound_place, limit_place, ordered, tell
from gpusoftmax.kernels.cuda.device.reduce import FULL_WARP, first_lane, lanes_where, leads_block, warp_max
from gpusoftmax.kernels.cuda.device.row_barriers import exchange_states
from gpusoftmax.kernels.cuda.device.shared_numbers import get
from gpusoftmax.kernels.cuda.device.split import n_parts
from gpusoftmax.kernels.cuda.plan import WARP_SIZE


def nucleus_with(mass_of):
    """A device function: (the logit at which the k largest, 2 WARP_SIZE at most, add up to the wanted mass, and the
    next larger one), for all threads of the row; +inf where they do not, or where there is none. mass_of(x, mass):
    the exponential of a logit. Before it there was `kth_largest`, which has found them.
    """

    @device
    def nucleus(k, wanted, mass, team, split):
        if team.rank < n_parts(split) and leads_block():
            none, other_place = number(wanted, math.inf), int32(team.lane + WARP_SIZE)
            one = logit_of_rank(team.lane, k, split, wanted)
            other = logit_of_rank(other_place, k, split, wanted)
            sums = sums_up_to(mass_of(one, mass), team.lane)
            whole = cuda.shfl_sync(FULL_WARP, sums, WARP_SIZE - 1)
            other_sums = add(whole, sums_up_to(mass_of(other, mass), team.lane))
            lanes, other_lanes = lanes_where(sums >= wanted), lanes_where(other_sums >= wanted)
            limit = none
            if lanes != 0:
                limit = cuda.shfl_sync(FULL_WARP, one, int32(first_lane(lanes)))
            elif other_lanes != 0:
                limit = cuda.shfl_sync(FULL_WARP, other, int32(first_lane(other_lanes)))
            above = maximum(
                negative(one) if one > limit else negative(none), negative(other) if other > limit else negative(none)
            )
            above = negative(warp_max(above, WARP_SIZE))
            if team.lane == 0:
                tell(limit_place(split, wanted), limit, split)
                tell(bound_place(split, wanted), above, split)
        exchange_states(split)  # both have arrived
        return get(limit_place(split, wanted), wanted), get(bound_place(split, wanted), wanted)

    return nucleus


@device
def logit_of_rank(j, k, split, like):
    return ordered(j, split, like) if j < k else number(like, -math.inf)


@device
def sums_up_to(value, lane):
    """The sum of a number over the lanes up to this one."""
    offset = int32(1)
    while offset < WARP_SIZE:
        before = cuda.shfl_up_sync(FULL_WARP, value, offset)
        if lane >= offset:
            value = add(value, before)
        offset = int32(offset + offset)
    return value
