"""The few largest logits of a short row, in order: sorted by eights, without a branch that logits decide.

    key    order of the logit | LAST_COLUMN - column       see kernels/sorting.py

A vector has the keys of eight columns, eight vectors those of 64. What is sorted are eight keys of one lane each, at
once in all lanes; the eights of further columns are merged into them, and at last those of the lanes. Orders of float64
leave no room for a column.
"""

import math

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

from gpusoftmax.kernels import ieee, ordering, sorting
from gpusoftmax.kernels.cpu.cache import device
from gpusoftmax.kernels.cpu.memory import load, load_cols, store
from gpusoftmax.kernels.cpu.vector import Vector

COLUMN_BITS = 9
LAST_COLUMN = (1 << COLUMN_BITS) - 1
FEW = sorting.EIGHT
COLS = FEW * FEW
_LONG = ordering.LONG


class Keys(types.Type):
    """A vector of the keys of eight columns."""

    def __init__(self):
        super().__init__(name="Keys")


KEYS = Keys()
_VECTOR = ir.VectorType(_LONG, FEW)


@register_model(Keys)
class _KeysModel(models.PrimitiveModel):
    def __init__(self, manager, type):
        super().__init__(manager, type, _VECTOR)


@intrinsic
def no_columns(typingctx, like):
    """Eight columns that are none: -inf."""
    vector = Vector(like, False, FEW * like.bitwidth // 8)

    def codegen(context, builder, signature, args):
        return ir.Constant(context.get_value_type(vector), [-math.inf] * FEW)

    return vector(like), codegen


@intrinsic
def keys_of(typingctx, x, col):
    """The keys of eight float32 logits from a column on."""

    def codegen(context, builder, signature, args):
        orders = ordering.order_of(ieee.Arithmetic(builder, context.get_value_type(x)), args[0])
        columns = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), args[1], ir.Constant(_LONG, 0))
        columns = builder.shuffle_vector(columns, columns, ir.Constant(ir.VectorType(ir.IntType(32), FEW), None))
        left = builder.sub(ir.Constant(_VECTOR, [LAST_COLUMN - lane for lane in range(FEW)]), columns)
        return builder.or_(builder.shl(orders, ir.Constant(_VECTOR, [COLUMN_BITS] * FEW)), left)

    return KEYS(x, types.intp), codegen


EIGHT_KEYS = types.UniTuple(KEYS, FEW)


def _members(builder, keys):
    return [builder.extract_value(keys, k) for k in range(FEW)]


@intrinsic
def sorted_keys(typingctx, keys):
    """Eight vectors, sorted lane by lane."""

    def codegen(context, builder, signature, args):
        found = sorting.in_order(builder, _members(builder, args[0]), sorting.SORT)
        return context.make_tuple(builder, EIGHT_KEYS, found)

    return EIGHT_KEYS(EIGHT_KEYS), codegen


@intrinsic
def merged_keys(typingctx, one, other):
    """The eight largest of each lane."""

    def codegen(context, builder, signature, args):
        found = sorting.merged(builder, *(_members(builder, keys) for keys in args))
        return context.make_tuple(builder, EIGHT_KEYS, found)

    return EIGHT_KEYS(EIGHT_KEYS, EIGHT_KEYS), codegen


@intrinsic
def columns_of_lanes(typingctx, keys):
    """The columns of the eight largest keys of all lanes, in order."""
    result = types.UniTuple(types.intp, FEW)

    def codegen(context, builder, signature, args):
        found = _members(builder, args[0])
        for step in (4, 2, 1):
            partner = ir.Constant(ir.VectorType(ir.IntType(32), FEW), [lane ^ step for lane in range(FEW)])
            found = sorting.merged(builder, found, [builder.shuffle_vector(key, key, partner) for key in found])
        last = ir.Constant(_LONG, LAST_COLUMN)
        first = [builder.extract_element(key, ir.Constant(_LONG, 0)) for key in found]
        return context.make_tuple(builder, result, [builder.sub(last, builder.and_(key, last)) for key in first])

    return result(EIGHT_KEYS), codegen


@device
def sorted_columns(line, col, left, nothing):
    """The 64 columns from `col` on, of which `left` are there."""
    return sorted_keys(
        (
            keys_of(load_cols(line, col, left, nothing), col),
            keys_of(load_cols(line, col + 8, left - 8, nothing), col + 8),
            keys_of(load_cols(line, col + 16, left - 16, nothing), col + 16),
            keys_of(load_cols(line, col + 24, left - 24, nothing), col + 24),
            keys_of(load_cols(line, col + 32, left - 32, nothing), col + 32),
            keys_of(load_cols(line, col + 40, left - 40, nothing), col + 40),
            keys_of(load_cols(line, col + 48, left - 48, nothing), col + 48),
            keys_of(load_cols(line, col + 56, left - 56, nothing), col + 56),
        )
    )


@device
def take_few(here, values, columns, k, like):
    """The k largest logits, FEW at most, of a row of LAST_COLUMN + 1 columns at most, and their columns."""
    nothing = no_columns(like)
    best = sorted_columns(here.first, 0, here.n_cols, nothing)
    for col in range(COLS, here.n_cols, COLS):
        best = merged_keys(best, sorted_columns(here.first, col, here.n_cols - col, nothing))
    found = columns_of_lanes(best)
    for j in range(k):
        at = found[j] if found[j] < here.n_cols else 0  # in a row of NaN, of which some are below -inf
        columns[j] = at
        store(values, j, load(here.first.pointer, at, like))
