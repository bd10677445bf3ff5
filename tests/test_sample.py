"""sample: the column that the noise says, the same on every target; never one without a probability; fair draws.

The long runs (`pytest -m fuzz tests/test_sample.py`) take 40 minutes: 10^6 draws of each of fifty distributions, which
have up to 2^20 columns.
"""

import ml_dtypes
import numpy as np
import pytest

import gpusoftmax
from tests import inputs, oracle, tolerances
from tests.emulator import emulated_gpu

F32 = np.dtype(np.float32)
N_COLS = [
    1,
    31,  # less than a warp; no whole block of random words
    1000,
    4099,  # five chunks of the GPU, three of the CPU
]


def seeds_of(n_rows, seed=0):
    return np.random.default_rng(seed).integers(-(2**63), 2**63, n_rows)


def check(ids, logits, seeds, step=0, temperature=1.0):
    """Every id is that of the largest exact score, or of one that rounding cannot tell from it."""
    assert ids.dtype == np.int64 and ids.shape == logits.shape[:-1]
    for row, seed, found in zip(logits, seeds, ids, strict=True):
        x = row.astype(np.float64)
        if not (x > -np.inf).any() or np.isnan(x).any() or (x == np.inf).any():
            assert found == -1
            continue
        assert 0 <= found < len(x) and x[found] > -np.inf
        if temperature == 0:
            assert found == np.argmax(x)
            continue
        scores = oracle.gumbel_scores(row, seed, step, temperature)
        assert scores.max() - scores[found] <= temperature * 2.0**-17


# ---------------------------------------------------------------- which column


@pytest.mark.parametrize("dtype", inputs.DTYPES, ids=str)
@pytest.mark.parametrize("n_cols", N_COLS)
def test_matches_oracle(target, dtype, n_cols):
    """Ids are those of the CPU, whatever the target."""
    logits = inputs.every_family(2, n_cols, dtype, seed=n_cols)
    seeds = seeds_of(len(logits), n_cols)
    ids = target.get(gpusoftmax.sample(target.array(logits), rng=(target.array(seeds), 5)))
    check(ids, logits, seeds, step=5)
    assert np.array_equal(ids, gpusoftmax.sample(logits, rng=(seeds, 5)))


@pytest.mark.parametrize("temperature", [0, 1e-37, 0.3, 1.0, 2.5, 1e5, 1e30, 3e38])
def test_temperature(target, temperature):
    logits = inputs.every_family(2, 300, F32)
    seeds = seeds_of(len(logits))
    ids = target.get(gpusoftmax.sample(target.array(logits), temperature=temperature, rng=(target.array(seeds), 0)))
    check(ids, logits, seeds, temperature=temperature)


def test_temperature_0_takes_the_first_of_the_largest(target):
    logits = np.full((4, 3000), -1, F32)
    for row, col in enumerate((0, 77, 1999, 2999)):
        logits[row, col:] = 5
    ids = target.get(gpusoftmax.sample(target.array(logits), temperature=0, rng=7))
    assert ids.tolist() == [0, 77, 1999, 2999]


@pytest.mark.parametrize("n_cols", [5, 3000])
def test_rows_without_a_softmax(target, n_cols):
    logits = np.zeros((7, n_cols), F32)
    logits[0] = -np.inf
    logits[1, -1], logits[2, 0], logits[3, n_cols // 2] = np.nan, np.inf, np.nan
    logits[4] = np.nan
    logits[5, :-1], logits[5, -1] = -np.inf, np.finfo(F32).min
    for temperature in (0, 1.0):
        ids = target.get(gpusoftmax.sample(target.array(logits), temperature=temperature, rng=1))
        assert ids[:6].tolist() == [-1, -1, -1, -1, -1, n_cols - 1]
        assert 0 <= ids[6] < n_cols


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_column_that_is_not_masked(target, dtype):
    """At every place of a granule, a lane, a warp, a chunk, a vector; and a few columns of each structure of masks."""
    n_cols = 4099
    places = [*range(9), *range(500, 530), 1023, 1024, 2047, 2048, 2049, 3071, 3072, 4095, 4096, 4097, 4098]
    logits = np.full((len(places), n_cols), -np.inf, dtype)
    logits[np.arange(len(places)), places] = -3
    assert target.get(gpusoftmax.sample(target.array(logits), rng=0)).tolist() == places
    masked = inputs.make("masked", (24, n_cols), dtype)
    seeds = seeds_of(24)
    check(target.get(gpusoftmax.sample(target.array(masked), rng=target.array(seeds))), masked, seeds)


# ---------------------------------------------------------------- seeds and steps


def test_forms_of_rng(target):
    """Ints, arrays of any integer dtype, one for each row or one for all."""
    logits = inputs.make("flat", (6, 500), F32)
    x = target.array(logits)
    expected = gpusoftmax.sample(logits, rng=(np.full(6, 9), np.full(6, 4)))
    for dtype in (np.int8, np.uint16, np.int32, np.uint64):
        for shape in ((6,), (), (1,)):
            seed, step = (target.array(np.full(shape, value, dtype)) for value in (9, 4))
            for rng in ((seed, step), (9, step), (seed, 4), (9, 4), (np.int32(9), np.uint8(4))):
                assert np.array_equal(target.get(gpusoftmax.sample(x, rng=rng)), expected), (dtype, shape)
    without_step = target.get(gpusoftmax.sample(x, rng=9))
    assert np.array_equal(without_step, gpusoftmax.sample(logits, rng=(9, 0)))
    assert not np.array_equal(without_step, expected)
    largest = target.get(gpusoftmax.sample(x, rng=2**64 - 1))
    assert np.array_equal(largest, gpusoftmax.sample(logits, rng=-1))
    assert np.array_equal(largest, target.get(gpusoftmax.sample(x, rng=target.array(np.full(6, 2**64 - 1, np.uint64)))))


def test_axes_and_results():
    logits = inputs.make("spread", (3, 40, 5), F32)
    seeds = seeds_of(15).reshape(3, 5)
    ids = gpusoftmax.sample(logits, axis=1, rng=seeds)
    assert ids.shape == (3, 5)
    rows = np.ascontiguousarray(logits.transpose(0, 2, 1))
    assert np.array_equal(ids, gpusoftmax.sample(rows, rng=seeds))
    one = gpusoftmax.sample(rows[1, 2], rng=int(seeds[1, 2]))
    assert isinstance(one, np.int64) and one == ids[1, 2]
    assert gpusoftmax.sample(np.zeros((0, 4), F32), rng=0).shape == (0,)


def test_a_row_is_drawn_alike_in_every_dtype():
    """Of logits that every format holds."""
    logits = np.random.default_rng(0).integers(-8, 8, (50, 3000)).astype(np.float32)
    seeds = seeds_of(50)
    expected = gpusoftmax.sample(logits, rng=seeds)
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float64):
        assert np.array_equal(gpusoftmax.sample(logits.astype(dtype), rng=seeds), expected)


def test_a_common_offset_hides_no_noise():
    """At 2^24 float32 has steps of 2: noise rounded to them would favour the first columns."""
    logits = np.broadcast_to(np.full(1000, 2.0**24, F32), (4000, 1000))
    ids = gpusoftmax.sample(logits, rng=np.arange(4000))
    assert np.array_equal(ids, gpusoftmax.sample(np.zeros_like(logits), rng=np.arange(4000)))


def test_an_array_that_changes_changes_a_replayed_call():
    """What a CUDA graph relies on: seeds and steps are read when the kernel runs."""
    logits = inputs.make("flat", (5, 300), F32)
    with emulated_gpu("sm_90", track=False) as gpu:
        x = gpu.array(logits)
        rngs = [(gpu.array(seeds_of(5)), gpu.array(np.array(step))) for step in range(3)]
        found = [gpu.get(gpusoftmax.sample(x, rng=rng)) for rng in rngs]
    for step, ids in enumerate(found):
        assert np.array_equal(ids, gpusoftmax.sample(logits, rng=(seeds_of(5), step)))
    assert not np.array_equal(found[0], found[1])


# ---------------------------------------------------------------- limits


LIMITS = {
    "top_k": {"top_k": 5},
    "top_k 1": {"top_k": 1},
    "all of top_k": {"top_k": 10**9},
    "all of top_k beyond 64 bits": {"top_k": 2**64},
    "top_p": {"top_p": 0.7},
    "a tiny top_p": {"top_p": 1e-30},
    "top_p 1": {"top_p": 1.0},
    "min_p": {"min_p": 0.05},
    "min_p 1": {"min_p": 1.0},
    "all three": {"top_k": 40, "top_p": 0.9, "min_p": 0.01},
}


@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize(("n_cols", "dtype"), [(40, "bfloat16"), (1500, "float32")])
def test_only_what_is_kept_is_drawn(target, limits, n_cols, dtype):
    """And of that the column that the noise says. No temperature of 1: half of the rows have ties at every limit."""
    logits = inputs.every_family(2, n_cols, dtype, seed=n_cols)
    seeds, temperature = seeds_of(len(logits), n_cols), 1.7
    x, rng = target.array(logits), (target.array(seeds), 0)
    ids = target.get(gpusoftmax.sample(x, temperature=temperature, rng=rng, **limits))
    for row, seed, found in zip(logits, seeds, ids, strict=True):
        kept, doubtful = oracle.kept_columns(row, temperature, **limits)
        assert kept[found] or doubtful[found]
        scores = oracle.gumbel_scores(row, seed, 0, temperature)
        assert np.where(kept & ~doubtful, scores, -np.inf).max() - scores[found] <= temperature * 2.0**-17
    if "top_p" not in limits:
        assert np.array_equal(ids, gpusoftmax.sample(logits, temperature=temperature, rng=(seeds, 0), **limits))


@pytest.mark.parametrize("limits", [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5}])
def test_limits_of_rows_without_a_softmax(target, limits):
    logits = np.zeros((6, 700), F32)
    logits[0] = -np.inf
    logits[1, -1], logits[2, 0], logits[3, 350], logits[4] = np.nan, np.inf, np.nan, np.nan
    logits[5, :-1], logits[5, -1] = -np.inf, np.finfo(F32).min
    ids = target.get(gpusoftmax.sample(target.array(logits), rng=1, **limits))
    assert ids.tolist() == [-1, -1, -1, -1, -1, 699]


def test_held_rows_are_read_once_whatever_the_limits():
    logits = inputs.make("spread", (3, 5000), F32)
    with emulated_gpu("sm_90") as gpu:
        x = gpu.array(logits)
        gpusoftmax.sample(x, top_k=9, top_p=0.9, min_p=0.01, rng=0)
        assert gpu.stats[-1].plan.held and (gpu.reads(x) == 1).all()


def test_limits_leave_fair_draws():
    row = np.log(np.array([0.4, 0.3, 0.15, 0.1, 0.05])).astype(F32)
    rows, seeds = np.broadcast_to(row, (20_000, 5)), np.arange(20_000)
    for limits, kept in (({"top_k": 3}, 3), ({"top_p": 0.8}, 3), ({"min_p": 0.5}, 2), ({"top_k": 4, "top_p": 0.7}, 2)):
        counts = np.bincount(gpusoftmax.sample(rows, rng=seeds, **limits), minlength=5)
        probs = np.where(np.arange(5) < kept, np.exp(row.astype(float)), 0)
        assert counts[kept:].sum() == 0
        assert p_value(counts, probs / probs.sum()) > 1e-4


def test_limits_do_not_count_at_temperature_0():
    logits = inputs.make("spread", (5, 300), F32)
    ids = gpusoftmax.sample(logits, temperature=0, top_k=2, top_p=0.1, min_p=0.9, rng=0)
    assert np.array_equal(ids, logits.argmax(-1))


# ---------------------------------------------------------------- rows with numbers of their own


def own_numbers(n_rows, seed=0):
    """A temperature and limits for each row, among them those that are none, and what they are for a row by itself."""
    rng = np.random.default_rng(seed)
    return {
        "temperature": rng.choice(np.array([0, 1e-37, 0.3, 1, 1.7, 1e5, 3e38], F32), n_rows),
        "top_k": rng.choice([0, -1, 1, 5, 40, 10**6], n_rows),
        "top_p": rng.choice(np.array([1, 0.9, 0.5, 1e-6], F32), n_rows),
        "min_p": rng.choice(np.array([0, 0.01, 0.3, 1], F32), n_rows),
    }


def one_by_one(logits, seeds, own):
    """The samples of rows that are drawn by themselves, with numbers for all."""
    found = []
    for k, row in enumerate(logits):
        mine = {name: array[k].item() for name, array in own.items()}
        if mine.get("top_k", 1) <= 0:
            del mine["top_k"]
        found.append(gpusoftmax.sample(row, rng=int(seeds[k]), **mine))
    return np.array(found)


@pytest.mark.parametrize(
    "names",
    [("temperature",), ("top_k",), ("temperature", "min_p"), ("temperature", "top_k", "top_p", "min_p")],
    ids=str,
)
@pytest.mark.parametrize(("n_cols", "dtype"), [(40, "bfloat16"), (1500, "float32"), (300, "float64")])
def test_own_numbers_are_those_of_a_row_by_itself(target, names, n_cols, dtype):
    """Rows that share a warp or a block differ in what they are asked for."""
    logits = inputs.every_family(4, n_cols, dtype, seed=n_cols)
    seeds, own = seeds_of(len(logits)), own_numbers(len(logits))
    own = {name: own[name] for name in names}
    given = {name: target.array(array) for name, array in own.items()}
    ids = target.get(gpusoftmax.sample(target.array(logits), rng=target.array(seeds), **given))
    assert np.array_equal(ids, one_by_one(logits, seeds, own))


def test_own_numbers_side_by_side(target):
    """Rows along the first axis, whose columns a block of the GPU reads together."""
    logits = inputs.make("spread", (140, 40), F32)
    seeds, own = seeds_of(140), own_numbers(140)
    given = {name: target.array(array) for name, array in own.items()}
    side_by_side = target.array(np.ascontiguousarray(logits.T))
    ids = target.get(gpusoftmax.sample(side_by_side, axis=0, rng=target.array(seeds), **given))
    assert np.array_equal(ids, gpusoftmax.sample(logits, rng=seeds, **own))


def test_own_numbers_beside_those_of_all_rows(target):
    logits = inputs.make("spread", (6, 500), F32)
    seeds, top_k = seeds_of(6), np.array([1, 2, 3, 4, 5, 0])
    given = {"rng": target.array(seeds), "top_p": 0.8, "min_p": 0.01, "temperature": 1.5}
    ids = target.get(gpusoftmax.sample(target.array(logits), top_k=target.array(top_k), **given))
    limits = {"top_p": np.full(6, 0.8), "min_p": np.full(6, 0.01), "temperature": np.full(6, 1.5), "top_k": top_k}
    assert np.array_equal(ids, one_by_one(logits, seeds, limits))


def test_forms_of_own_numbers(target):
    """Any floating and integer dtype, any strides, one for each row or one for all."""
    logits = inputs.make("spread", (6, 500), F32)
    seeds = seeds_of(6)
    expected = gpusoftmax.sample(logits, temperature=1.5, top_k=20, rng=seeds)
    for dtype, integers in ((np.float16, np.uint8), (np.float64, np.int32), (F32, np.int64)):
        for shape in ((6,), (1,)):
            temperature, top_k = np.full((*shape, 2), 1.5, dtype)[:, 0], np.full((*shape, 2), 20, integers)[:, 1]
            given = {"temperature": target.array(temperature), "top_k": target.array(top_k)}
            ids = target.get(gpusoftmax.sample(target.array(logits), rng=target.array(seeds), **given))
            assert np.array_equal(ids, expected), (dtype, shape)


def test_numbers_that_are_none(target):
    """What a single number raises for, of whose value a GPU cannot be asked in time."""
    own = {
        "temperature": np.array([1, -1, np.nan, np.inf] + [1] * 6, F32),
        "top_p": np.array([1] * 4 + [0, 1.5, np.nan] + [1] * 3, F32),
        "min_p": np.array([0] * 7 + [-0.1, 1.5, np.nan], F32),
    }
    given = {name: target.array(array) for name, array in own.items()}
    for n_cols in (5, 3000):
        logits = np.zeros((10, n_cols), F32)
        ids = target.get(gpusoftmax.sample(target.array(logits), rng=3, **given))
        assert 0 <= ids[0] < n_cols and ids[1:].tolist() == [-1] * 9
        ids = target.get(gpusoftmax.sample(target.array(logits), rng=3, temperature=given["temperature"]))
        assert (ids[4:] >= 0).all() and ids[1:4].tolist() == [-1] * 3
        known = {"return_logprob": True, "return_entropy": True}
        drawn = target.get(gpusoftmax.sample(target.array(logits), rng=3, **given, **known))
        assert np.isnan(drawn.logprob).tolist() == [False] + [True] * 9
        # Limits do not touch the entropy, not even those that are none.
        assert np.isnan(drawn.entropy).tolist() == [False] + [True] * 3 + [False] * 6


def test_own_numbers_change_a_replayed_call():
    logits = inputs.make("spread", (5, 300), F32)
    temperatures = [np.full(5, 0.1, F32), np.full(5, 50, F32)]
    with emulated_gpu("sm_90", track=False) as gpu:
        x, seeds = gpu.array(logits), gpu.array(seeds_of(5))
        found = [gpu.get(gpusoftmax.sample(x, temperature=gpu.array(one), rng=seeds)) for one in temperatures]
    for one, ids in zip(temperatures, found, strict=True):
        assert np.array_equal(ids, gpusoftmax.sample(logits, temperature=one, rng=seeds_of(5)))
    assert not np.array_equal(found[0], found[1])


# ---------------------------------------------------------------- what is known of a sample


@pytest.mark.parametrize("n_cols", [31, 4099])
def test_log_probability_and_entropy(target, n_cols):
    """Over all columns, whatever the limits: the bits of token_logprobs."""
    logits = inputs.every_family(1, n_cols, F32, seed=n_cols)
    logits[0], logits[1, 3] = -np.inf, np.nan
    x, rng = target.array(logits), target.array(seeds_of(len(logits)))
    options = {"temperature": 0.7, "top_k": 5, "rng": rng}
    drawn = target.get(gpusoftmax.sample(x, return_logprob=True, return_entropy=True, **options))
    assert isinstance(drawn, gpusoftmax.Sample)
    assert np.array_equal(drawn.index, target.get(gpusoftmax.sample(x, **options))) and drawn.index[:2].tolist() == [
        -1,
        -1,
    ]
    known = target.get(
        gpusoftmax.token_logprobs(
            x, target.array(np.maximum(drawn.index, 0)), temperature=0.7, return_entropy=True, ignore_index=-5
        )
    )
    assert np.isnan(drawn.logprob[:2]).all() and np.isnan(drawn.entropy[:2]).all()
    assert drawn.logprob[2:].tobytes() == known.logprob[2:].tobytes() and (drawn.logprob[2:] <= 0).all()
    assert drawn.entropy[2:].tobytes() == known.entropy[2:].tobytes()


def test_log_probability_at_own_temperatures(target):
    logits = inputs.make("spread", (4, 700), F32)
    temperatures = np.array([0.5, 1, 3, 0], F32)
    x, given = target.array(logits), target.array(temperatures)
    drawn = gpusoftmax.sample(x, rng=3, temperature=given, return_logprob=True, return_entropy=True)
    drawn = target.get(drawn)
    assert np.array_equal(drawn.index, target.get(gpusoftmax.sample(x, rng=3, temperature=given)))
    assert np.isnan(drawn.logprob[3]) and np.isnan(drawn.entropy[3])
    for k, temperature in enumerate(temperatures[:3].tolist()):
        row = logits[k : k + 1]
        tolerances.check_entropy(drawn.entropy[k : k + 1], row, temperature=temperature)
        loss = -drawn.logprob[k : k + 1]
        tolerances.check_loss(loss, row / F32.type(temperature), drawn.index[k : k + 1], reduction="none")


def test_either_of_them():
    logits = inputs.make("spread", (3, 40, 5), F32)
    both = gpusoftmax.sample(logits, 1, rng=4, return_logprob=True, return_entropy=True)
    assert both.index.shape == both.logprob.shape == both.entropy.shape == (3, 5)
    assert gpusoftmax.sample(logits, 1, rng=4, return_logprob=True).entropy is None
    entropy = gpusoftmax.sample(logits, 1, rng=4, return_entropy=True)
    assert entropy.logprob is None and np.array_equal(entropy.entropy, both.entropy)
    one = gpusoftmax.sample(logits[0, :, 0], rng=4, return_logprob=True)
    assert one.index == both.index[0, 0] and one.logprob == both.logprob[0, 0]
    with pytest.raises(ValueError, match="temperature is 0.0, expected a finite number above 0"):
        gpusoftmax.sample(logits, rng=4, temperature=0, return_entropy=True)


# ---------------------------------------------------------------- fair draws


def p_value(counts, probs):
    """Of Pearson's chi-square test, with columns that are expected less than ten times put together."""
    stats = pytest.importorskip("scipy.stats")
    order = np.argsort(-probs)
    expected, counts = probs[order] * counts.sum(), counts[order]
    whole = int((expected >= 10).sum())
    if expected[whole:].sum() < 10:  # too few for a column of their own
        whole = max(whole - 1, 0)
    tail = expected[whole:]
    # The tail in bins of ten expected draws; what is left over joins the last of them.
    bins = np.minimum(tail.cumsum() // 10, max(tail.sum() // 10 - 1, 0)).astype(int)
    together = np.concatenate([expected[:whole], np.bincount(bins, tail)])
    found = np.concatenate([counts[:whole], np.bincount(bins, counts[whole:])])
    together, found = together[together > 0], found[together > 0]
    return stats.chisquare(found, together * (found.sum() / together.sum())).pvalue if len(together) > 1 else 1.0


def draw(row, n_draws, first_seed=0, temperature=1.0):
    """How often each column of a row is drawn."""
    rows = np.broadcast_to(row, (n_draws, len(row)))
    ids = gpusoftmax.sample(rows, temperature=temperature, rng=first_seed + np.arange(n_draws))
    assert ids.min() >= 0 and ids.max() < len(row)
    return np.bincount(ids, minlength=len(row))


def distribution(number, n_cols):
    """Logits of many shapes: flat, peaked, heavy tails, ramps, and some -inf in every third of them."""
    rng = np.random.default_rng(number)
    x = [
        lambda: np.zeros(n_cols),
        lambda: rng.standard_normal(n_cols) * 3,
        lambda: -1.2 * np.log(1 + rng.permutation(n_cols)),
        lambda: np.linspace(-12, 0, n_cols),
        lambda: rng.exponential(2.0, n_cols),
    ][number % 5]()
    if number % 3 == 2 and n_cols > 2:
        x[inputs.mask((1, n_cols), rng=rng, structure="random")[0]] = -np.inf
    return x.astype(np.float32)


def check_fairness(numbers, sizes, n_draws):
    failed = []
    for number in numbers:
        n_cols = sizes[(number + number // 5) % len(sizes)]  # each shape of logits meets each size
        if fairness(number, n_cols, n_draws(n_cols)) < 1e-3:
            failed.append(number)
    assert len(failed) <= len(numbers) // 50, failed


def fairness(number, n_cols, n_draws):
    """The p-value of so many draws."""
    row, temperature = distribution(number, n_cols), (1.0, 0.7, 1.6)[number % 3]
    counts = draw(row, n_draws, 10**9 * number, temperature)
    assert counts[row == -np.inf].sum() == 0
    return p_value(counts, np.asarray(oracle.softmax(row, temperature=temperature), float))


def test_draws_are_fair():
    check_fairness(range(10), (2, 7, 300, 4100), lambda n_cols: 20_000 if n_cols < 4000 else 4000)


def test_seeds_and_steps_that_follow_each_other_are_independent():
    """Pairs of draws of 8 equal columns: all 64 are as likely."""
    n_draws = 40_000
    x = np.zeros((n_draws, 8), F32)
    first = gpusoftmax.sample(x, rng=(np.arange(n_draws), 0))
    for others in ((np.arange(n_draws) + 1, 0), (np.arange(n_draws), 1), (np.arange(n_draws), 2**32)):
        pairs = np.bincount(8 * first + gpusoftmax.sample(x, rng=others), minlength=64)
        assert p_value(pairs, np.full(64, 1 / 64)) > 1e-4


@pytest.mark.fuzz
def test_fifty_distributions_are_fair():
    """Fifty of 10^6 draws, ten of them of 2^20 columns: 40 minutes on two cores."""
    check_fairness(range(50), (3, 60, 1000, 32_768, 2**20), lambda n_cols: 10**6)


@pytest.mark.fuzz
def test_ten_million_draws_without_a_zero_probability():
    for number in range(10):
        row = distribution(3 * number + 2, 64)
        assert draw(row, 10**6, number * 10**7)[row == -np.inf].sum() == 0
