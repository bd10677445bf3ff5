"""Random words and Gumbel noise (kernels/noise.py): known answers, another implementation, and every extreme word."""

import numpy as np
import pytest
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from gpusoftmax.kernels import ieee, noise
from gpusoftmax.kernels.cpu.noise import words_of
from gpusoftmax.kernels.cpu.vector import (
    along,
    lanes_of,
)
from tests import oracle

# Random123 1.09, tests/kat_vectors: (counter, key, words).
KNOWN = [
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def test_the_oracle_gives_the_known_answers():
    for counter, key, expected in KNOWN:
        assert tuple(int(word) for word in oracle.philox(counter, key)) == expected


def test_the_oracle_agrees_with_randomgen():
    """Whose first block is that of counter 1."""
    randomgen = pytest.importorskip("randomgen")
    for seed in (0, 1, 2**63 + 12345):
        raw = randomgen.Philox(key=seed, number=4, width=32).random_raw(4000).astype(np.uint64)
        expected = oracle.words(4004, seed, 0)[4:]
        if len(np.unique(raw >> np.uint64(32))) > 1:  # two words at a time
            raw = np.stack([raw & np.uint64(0xFFFFFFFF), raw >> np.uint64(32)], axis=-1).reshape(-1)[:4000]
        assert np.array_equal(raw, expected)


# ---------------------------------------------------------------- words


@intrinsic
def store_words(typingctx, address, words):
    def codegen(context, builder, signature, args):
        builder.store(args[1], builder.inttoptr(args[0], args[1].type.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, words), codegen


@njit
def write_words(address, n_cols, seed, step, like):
    lanes = lanes_of(along(like))
    for col in range(0, n_cols, lanes):
        store_words(address + 4 * col, words_of(col, seed, step, along(like)))


@pytest.mark.parametrize("like", [np.float32(0), np.float64(0)], ids=["float32", "float64"])
def test_words_of_the_cpu(like):
    n_cols = 4096
    found = np.empty(n_cols, np.uint32)
    for seed, step in ((0, 0), (1, 2), (-1, -1), (2**40 + 7, 2**33 + 5), (-(2**63), 2**63 - 1)):
        write_words(found.ctypes.data, n_cols, seed, step, like)
        assert np.array_equal(found, oracle.words(n_cols, seed, step))


def _product(builder, word, multiplier: int):
    """(high, low) half of the product with a word of 32 bits."""
    product = builder.mul(builder.zext(word, noise.LONG), ir.Constant(noise.LONG, multiplier))
    high = builder.trunc(builder.lshr(product, ir.Constant(noise.LONG, 32)), noise.WORD)
    return high, builder.trunc(product, noise.WORD)


@intrinsic
def block_of_words(typingctx, block, seed, step):
    """As a thread of a GPU computes it, but for its own instruction for the product."""

    def codegen(context, builder, signature, args):
        halves = [
            builder.trunc(builder.lshr(value, ir.Constant(noise.LONG, shift)), noise.WORD)
            for value in args[1:]
            for shift in (0, 32)
        ]
        counter = builder.trunc(args[0], noise.WORD), *halves[2:], ir.Constant(noise.WORD, 0)
        found = noise.philox(builder, _product, counter, halves[:2])
        return context.make_tuple(builder, signature.return_type, found)

    return types.UniTuple(types.uint32, 4)(types.int64, types.int64, types.int64), codegen


@njit
def one_block(block, seed, step):
    return block_of_words(block, seed, step)


def test_words_of_a_thread():
    for block, seed, step in ((0, 0, 0), (5, -1, 2**40 + 3), (2**29 - 1, 2**63 - 1, -5)):
        halves = [(number & 0xFFFFFFFF, number >> 32 & 0xFFFFFFFF) for number in (seed, step)]
        expected = oracle.philox((block, *halves[1], 0), halves[0])
        assert one_block(block, seed, step) == tuple(int(word) for word in expected)


# ---------------------------------------------------------------- noise


@intrinsic
def noise_of(typingctx, word, like):
    """(noise, bound)"""

    def codegen(context, builder, signature, args):
        a = ieee.Arithmetic(builder, context.get_value_type(like))
        bound = noise.score_bound(a, a.number(0), args[0], a.number(1), a.number(1))
        found = noise.gumbel(a, args[0]), bound
        return context.make_tuple(builder, signature.return_type, found)

    return types.UniTuple(like, 2)(types.uint32, like), codegen


@njit
def write_noise(words, found, bounds, like):
    for k in range(len(words)):
        found[k], bounds[k] = noise_of(words[k], like)


def all_kinds_of_words():
    """Both ends, the neighbourhood of every power of two, and random ones."""
    near = np.arange(-3000, 3000)
    powers = np.concatenate([2**k + near for k in range(12, 33)])
    ends = np.concatenate([np.arange(20_000), 2**32 - 1 - np.arange(20_000)])
    # Where 1 - v crosses the square root of 1/2, and where the noise crosses 0.
    turns = np.concatenate([int((1 - 0.5**0.5) * 2**32) + near, int((1 - np.exp(-1)) * 2**32) + near])
    uniform = np.random.default_rng(0).integers(0, 2**32, 300_000)
    found = np.concatenate([powers, ends, turns, uniform])
    return found[(found >= 0) & (found < 2**32)].astype(np.uint32)


def test_noise_is_accurate_and_below_its_bound():
    words = all_kinds_of_words()
    found, bounds = np.empty((2, len(words)), np.float32)
    write_noise(words, found, bounds, np.float32(0))
    expected = oracle.gumbel(words)
    assert np.isfinite(found).all()
    error = np.abs(found - expected) / np.maximum(1, np.abs(expected))
    assert error.max() < 2.0**-22
    # p < bound is compared after one more rounding each: the bound has to lie above by more than that.
    assert (bounds > found + np.abs(found) * 2.0**-18).all()
    assert (bounds - expected)[(expected > 3) & (words > 8)].max() < 0.15


def test_noise_of_float64_is_that_of_float32():
    words = all_kinds_of_words()[::17].copy()
    single, double = np.empty((2, len(words)), np.float32), np.empty((2, len(words)), np.float64)
    write_noise(words, *single, np.float32(0))
    write_noise(words, *double, np.float64(0))
    assert np.array_equal(single[0].astype(np.float64), double[0])
    assert (double[1] > double[0]).all()


def test_a_larger_word_never_has_larger_noise_but_for_rounding():
    words = np.sort(all_kinds_of_words())
    found, bounds = np.empty((2, len(words)), np.float32)
    write_noise(words, found, bounds, np.float32(0))
    rise = np.diff(found.astype(np.float64))
    assert (rise <= 2.0**-22 * np.maximum(1, np.abs(found[1:]))).all()
