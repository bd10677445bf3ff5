"""The random numbers of `gpusoftmax.kernels.noise` for vectors along a row."""

import math

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

from gpusoftmax.kernels import ieee, noise
from gpusoftmax.kernels.cpu.arithmetic import (
    formula,
)


class Words(types.Type):
    """A random word for each lane of a vector along a row."""

    def __init__(self, lanes: int):
        self.lanes = lanes
        super().__init__(name=f"Words(x {lanes})")


@register_model(Words)
class _WordsModel(models.PrimitiveModel):
    def __init__(self, manager, type):
        super().__init__(manager, type, ir.VectorType(noise.WORD, type.lanes))


@intrinsic
def words_of(typingctx, col, seed, step, like):
    """The words of the columns from `col` on, a multiple of 4: one for each lane of `like`."""
    lanes = like.lanes

    def codegen(context, builder, signature, args):
        return _words(builder, *args[:3], lanes // noise.COLS_OF_BLOCK)

    return Words(lanes)(types.intp, types.int64, types.int64, like), codegen


def _words(builder, col, seed, step, n_blocks):
    longs = ir.VectorType(noise.LONG, n_blocks)

    def everywhere(long):
        first = builder.insert_element(ir.Constant(longs, ir.Undefined), long, ir.Constant(noise.WORD, 0))
        return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(noise.WORD, n_blocks), None))

    half = ir.Constant(noise.LONG, 32)
    block = builder.lshr(col, ir.Constant(noise.LONG, noise.COLS_OF_BLOCK.bit_length() - 1))
    blocks = builder.add(everywhere(block), ir.Constant(longs, list(range(n_blocks))))
    counter = blocks, everywhere(step), everywhere(builder.lshr(step, half)), ir.Constant(longs, None)
    key = everywhere(seed), everywhere(builder.lshr(seed, half))
    a, b, c, d = noise.philox(builder, noise.product_of_longs, counter, key)
    # Block by block in the order of their columns: a b c d, a b c d, ...
    pairs = _pair(builder, a, b), _pair(builder, c, d)
    order = [position for block in range(n_blocks) for position in (block, n_blocks + block)]
    both = builder.shuffle_vector(*pairs, ir.Constant(ir.VectorType(noise.WORD, 2 * n_blocks), order))
    return builder.bitcast(both, ir.VectorType(noise.WORD, noise.COLS_OF_BLOCK * n_blocks))


def _pair(builder, low, high):
    low = builder.and_(low, noise.constant(low.type, 0xFFFFFFFF))
    return builder.or_(low, builder.shl(high, noise.constant(high.type, 32)))


def _of_words(emit, n_results=1):
    """An intrinsic that emits a formula of vectors x, words, and numbers that are the same in every lane."""

    @intrinsic
    def formula(typingctx, x, words, unit, scale):
        result = types.UniTuple(x, n_results) if n_results > 1 else x

        def codegen(context, builder, signature, args):
            a = ieee.Arithmetic(builder, context.get_value_type(x))
            found = emit(a, args[0], args[1], a.splat(args[2]), a.splat(args[3]))
            return context.make_tuple(builder, result, found) if n_results > 1 else found

        return result(x, words, unit, scale), codegen

    return formula


score_bound = _of_words(noise.score_bound)
score = _of_words(noise.score, n_results=2)


# ---------------------------------------------------------------- lanes


def _mask(builder, condition):
    return builder.bitcast(condition, ir.IntType(condition.type.count))


@intrinsic
def any_reaches(typingctx, x, number):
    """Whether a lane of x is at least the number, or NaN."""

    def codegen(context, builder, signature, args):
        limit = ieee.Arithmetic(builder, context.get_value_type(x)).splat(args[1])
        mask = _mask(builder, builder.fcmp_unordered(">=", args[0], limit))
        return builder.icmp_unsigned("!=", mask, ir.Constant(mask.type, 0))

    return types.boolean(x, number), codegen


@intrinsic
def lowest(typingctx, like):
    """The lowest finite number."""
    value = float(np.finfo(like.name).min)
    return like(like), lambda context, builder, signature, args: context.get_constant(like, value)


@intrinsic
def where_equal(typingctx, x, number, y):
    """y in the lanes in which x is the number, -inf in the others."""

    def codegen(context, builder, signature, args):
        a = ieee.Arithmetic(builder, context.get_value_type(x))
        return a.select(a.equal(args[0], a.splat(args[1])), args[2], a.number(-math.inf))

    return x(x, number, x), codegen


@intrinsic
def first_equal(typingctx, x, number):
    """The first lane in which x is the number; there is one."""

    def codegen(context, builder, signature, args):
        a = ieee.Arithmetic(builder, context.get_value_type(x))
        mask = _mask(builder, a.equal(args[0], a.splat(args[1])))
        lane = builder.cttz(mask, ir.Constant(ir.IntType(1), 1))
        return lane if lane.type == noise.LONG else builder.zext(lane, noise.LONG)

    return types.intp(x, number), codegen


# ---------------------------------------------------------------- rows with numbers of their own

noise_scales_of = formula(noise.noise_scales, n_results=2)
scale_of_temperature = formula(noise.scale_of, n_results=2)
distance_of_ratio = formula(noise.distance_of_ratio)
