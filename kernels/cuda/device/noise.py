"""The random numbers of `gpusoftmax.kernels.noise` for the columns of one thread."""

import numpy as np
from llvmlite import ir

from gpusoftmax.kernels import noise
from gpusoftmax.kernels.cuda.device._cuda import intrinsic, types
from gpusoftmax.kernels.cuda.device.arithmetic import Rounded, formula
from gpusoftmax.kernels.cuda.device.memory import VECTOR_BYTES


@intrinsic
def granule_words(typingctx):
    """A word for each number of `memory.granule_numbers`; in registers, as those."""

    def codegen(context, builder, signature, args):
        with builder.goto_entry_block():
            array = builder.alloca(ir.ArrayType(noise.WORD, VECTOR_BYTES // 2))
        return builder.bitcast(array, noise.WORD.as_pointer())

    return types.CPointer(types.int32)(), codegen


@intrinsic
def draw_words(typingctx, words, col, seed, step, pointer):
    """words[:] = those of the columns from `col` on that a granule of the pointer's format holds. `col` is a multiple
    of their number.
    """
    width = VECTOR_BYTES * 8 // pointer.dtype.bitwidth

    def codegen(context, builder, signature, args):
        into, col, seed, step, _ = args
        halves = [
            builder.trunc(builder.lshr(value, ir.Constant(noise.LONG, shift)), noise.WORD)
            for value in (seed, step)
            for shift in (0, 32)
        ]
        bits = noise.COLS_OF_BLOCK.bit_length() - 1
        block = builder.lshr(builder.trunc(col, noise.WORD), ir.Constant(noise.WORD, bits))
        found = []
        for k in range(max(width // noise.COLS_OF_BLOCK, 1)):
            counter = builder.add(block, ir.Constant(noise.WORD, k)), *halves[2:], ir.Constant(noise.WORD, 0)
            found += noise.philox(builder, _product, counter, halves[:2])
        if width < noise.COLS_OF_BLOCK:
            second = builder.trunc(builder.lshr(col, ir.Constant(noise.LONG, 1)), ir.IntType(1))
            found = [builder.select(second, found[width + k], found[k]) for k in range(width)]
        for k, word in enumerate(found):
            builder.store(word, builder.gep(into, [ir.Constant(noise.WORD, k)]))
        return context.get_dummy_value()

    return types.void(words, types.int64, types.int64, types.int64, pointer), codegen


def _product(builder, word, multiplier: int):
    """(high, low) half of the product with a word, by one instruction: a product of 64 bits has another one, which adds
    0 to its high half.
    """
    product = ir.InlineAsm(ir.FunctionType(noise.LONG, [noise.WORD]), f"mul.wide.u32 $0, $1, {multiplier};", "=l,r")
    found = builder.call(product, [word])
    high = builder.trunc(builder.lshr(found, ir.Constant(noise.LONG, 32)), noise.WORD)
    return high, builder.trunc(found, noise.WORD)


def _of_word(emit, n_results=1):
    """An intrinsic that emits a formula of a logit, its word, and what they are scaled with."""

    @intrinsic
    def formula(typingctx, x, word, unit, scale):
        result = types.UniTuple(x, n_results) if n_results > 1 else x

        def codegen(context, builder, signature, args):
            found = emit(Rounded(builder, context.get_value_type(x)), *args)
            return context.make_tuple(builder, result, found) if n_results > 1 else found

        return result(x, types.int32, unit, scale), codegen

    return formula


noise_scales_of = formula(noise.noise_scales, n_results=2)
scale_of_temperature = formula(noise.scale_of, n_results=2)
distance_of_ratio = formula(noise.distance_of_ratio)
score_bound = _of_word(noise.score_bound)
score = _of_word(noise.score, n_results=2)


@intrinsic
def lowest(typingctx, like):
    """The lowest finite number."""
    value = float(np.finfo(like.name).min)
    return like(like), lambda context, builder, signature, args: context.get_constant(like, value)
