"""Sorting networks for eight keys: LLVM instructions for both targets, the same whatever the keys are.

A key is an integer for a logit and its column, of which a larger one is a larger logit, or an equal one in a lower
column. Two sorted eights, x and y, have their eight largest among the larger of

    x0 and y7, x1 and y6, ... x7 and y0

which rise and then fall, or the other way round, and are sorted again by a shorter network (Batcher, "Sorting networks
and their applications", 1968).
"""

from collections.abc import Sequence

EIGHT = 8
SORT = (
    *((0, 1), (2, 3), (4, 5), (6, 7), (0, 2), (1, 3), (4, 6), (5, 7), (1, 2), (5, 6)),
    *((0, 4), (1, 5), (2, 6), (3, 7), (2, 4), (3, 5), (1, 2), (3, 4), (5, 6)),
)
"""Which two of eight are put in order, one pair after the other, until all are: Batcher's network."""
SORT_BITONIC = tuple((k, k + step) for step in (4, 2, 1) for k in range(EIGHT) if not k & step)
"""The same for what rises and then falls, or the other way round."""


def in_order(builder, keys: Sequence, pairs: Sequence[tuple[int, int]]) -> list:
    """The keys, integers or vectors of such, after the larger of each pair in turn came first."""
    keys = list(keys)
    for one, two in pairs:
        x, y = keys[one], keys[two]
        is_greater = builder.icmp_signed(">", x, y)
        keys[one], keys[two] = builder.select(is_greater, x, y), builder.select(is_greater, y, x)
    return keys


def merged(builder, x: Sequence, y: Sequence) -> list:
    """The eight largest of two sorted eights, sorted."""
    pairs = zip(x, reversed(y), strict=True)
    larger = [builder.select(builder.icmp_signed(">", a, b), a, b) for a, b in pairs]
    return in_order(builder, larger, SORT_BITONIC)
