"""LogSumExpState: the same bits however columns are cut, in whatever order they come; on the CPU logsumexp's own."""

import doctest
import math
import pickle

import numpy as np
import pytest

import gpusoftmax
from gpusoftmax import LogSumExpState
from tests import inputs, tolerances
from tests.emulator import emulated_gpu

CHUNK = LogSumExpState.CHUNK_COLS
N_COLS = 3 * CHUNK + 77
ROW_DTYPE = {"float16": "float32", "bfloat16": "float32", "float32": "float32", "float64": "float64"}
# Where each part begins, in the order in which they come; a part ends where the next one of the row begins.
CUTS = [(0,), (0, 1, 2, 3), (2, 3, 0), (3, 1, 0)]


def parts(logits, cut):
    """(columns, first column) in the order of the cut."""
    starts = [chunk * CHUNK for chunk in cut]
    for first in starts:
        yield logits[:, first : min((one for one in starts if one > first), default=logits.shape[1])], first


def state_of(target, logits, cut=(0,), temperature=1.0):
    state = LogSumExpState.empty(len(logits), like=target.array(logits[:, :0].copy()), temperature=temperature)
    for columns, first in parts(logits, cut):
        state.update(target.array(columns), first)
    return state


def lse_of(target, state):
    return np.asarray(target.get(state.logsumexp()))


def awkward(dtype):
    """Every family of inputs and rows whose chunks are empty, infinite or NaN, N_COLS wide."""
    logits = inputs.every_family(1, N_COLS, dtype, seed=5)
    special = inputs.make("spread", (7, N_COLS), dtype, seed=6)
    special[0] = -np.inf
    special[1, : 2 * CHUNK] = -np.inf
    special[2, CHUNK:] = -np.inf
    special[3, 5000] = np.inf
    special[4, N_COLS - 1] = np.nan
    special[5, 3], special[5, 5000] = np.inf, np.nan
    special[6, [5, CHUNK + 5, N_COLS - 1]] = 60  # the maximum in several chunks
    return np.concatenate([logits, special])


@pytest.mark.parametrize("dtype", inputs.DTYPES, ids=str)
def test_any_cut_gives_the_same_bits(target, dtype):
    logits = awkward(dtype)
    found = [lse_of(target, state_of(target, logits, cut)) for cut in CUTS]
    assert found[0].dtype == ROW_DTYPE[dtype.name] and found[0].shape == (len(logits),)
    assert len({one.tobytes() for one in found}) == 1
    tolerances.check_logsumexp(found[0], logits)
    if target.name == "cpu":
        assert found[0].tobytes() == gpusoftmax.logsumexp(logits).tobytes()


@pytest.mark.parametrize("temperature", [1e-37, 0.7, 1e30])
def test_temperature(target, temperature):
    logits = awkward(np.float32)
    found = [lse_of(target, state_of(target, logits, cut, temperature)) for cut in CUTS[1:3]]
    assert found[0].tobytes() == found[1].tobytes()
    tolerances.check_logsumexp(found[0], logits, temperature=temperature)
    if target.name == "cpu":
        assert found[0].tobytes() == gpusoftmax.logsumexp(logits, temperature=temperature).tobytes()


def test_any_merge_gives_the_same_bits(target):
    logits = awkward(np.float32)
    whole = lse_of(target, state_of(target, logits))
    pieces = list(parts(logits, (0, 1, 2, 3)))

    def one(k):
        state = LogSumExpState.empty(len(logits), like=target.array(logits[:, :0].copy()))
        state.update(target.array(pieces[k][0]), pieces[k][1])
        return state

    from_left, from_right, by_pairs = one(0), one(3), one(2)
    for k in (1, 2, 3):
        from_left.merge(one(k))
        from_right.merge(one(3 - k))
    other = one(3)
    other.merge(one(0))
    other.logsumexp()  # its parts are joined by now
    by_pairs.merge(other)
    by_pairs.merge(one(1))
    for state in (from_left, from_right, by_pairs):
        assert state.columns == ((0, N_COLS),)
        assert lse_of(target, state).tobytes() == whole.tobytes()
    assert other.columns == ((0, CHUNK), (3 * CHUNK, N_COLS)), "a state is not changed by being merged"


def test_columns_that_are_not_there(target):
    """Those of one device of several: the log-sum-exp of the others being -inf."""
    logits = awkward(np.float32)
    state = state_of(target, logits[:, : 3 * CHUNK], (2, 0))  # all of them,
    some = LogSumExpState.empty(len(logits), like=target.array(logits[:, :0].copy()))
    for first in (2 * CHUNK, 0):  # and without the chunk between
        some.update(target.array(logits[:, first : first + CHUNK]), first)
    assert state.columns == ((0, 3 * CHUNK),) and some.columns == ((0, CHUNK), (2 * CHUNK, 3 * CHUNK))
    masked = logits[:, : 3 * CHUNK].copy()
    masked[:, CHUNK : 2 * CHUNK] = -np.inf
    lse = lse_of(target, some)
    tolerances.check_logsumexp(lse, masked)
    if target.name == "cpu":
        assert lse.tobytes() == gpusoftmax.logsumexp(masked).tobytes()


def test_many_chunks(target):
    """More than a warp has lanes; on the CPU several threads fold parts of the row."""
    logits = inputs.make("spread", (1, 70 * CHUNK + 1), np.float32)
    lse = lse_of(target, state_of(target, logits, (35, 0)))
    assert lse.tobytes() == lse_of(target, state_of(target, logits)).tobytes()
    tolerances.check_logsumexp(lse, logits)
    if target.name == "cpu":
        assert lse.tobytes() == gpusoftmax.logsumexp(logits).tobytes()


def test_many_rows(target):
    """Several blocks of the GPU fold them; a row has the bits that it has alone."""
    logits = inputs.make("spread", (35, CHUNK + 40), np.float32)
    lse = lse_of(target, state_of(target, logits))
    assert lse[20:21].tobytes() == lse_of(target, state_of(target, logits[20:21])).tobytes()
    tolerances.check_logsumexp(lse, logits)


def test_strides(target):
    logits = inputs.make("spread", (5, CHUNK + 40), np.float32)
    expected = lse_of(target, state_of(target, logits)).tobytes()
    wide = np.full((10, 2 * CHUNK + 81), np.nan, np.float32)
    wide[::2, 1:-1:2] = logits
    for view in (np.asfortranarray(logits), wide[::2, 1:-1:2], logits[::-1, ::-1].copy()[::-1, ::-1]):
        assert lse_of(target, state_of(target, view)).tobytes() == expected


def test_each_logit_is_read_once():
    logits = inputs.make("spread", (3, 3 * CHUNK + 80), np.float32)  # rows begin at sixteen bytes
    with emulated_gpu("sm_90") as gpu:
        x = gpu.array(logits)
        state = LogSumExpState.empty(3, like=x)
        state.update(x)
        assert len(gpu.stats) == 2
        whole, rest = gpu.reads(x, 0), gpu.reads(x, 1)
        assert (whole[:, : 3 * CHUNK] == 1).all() and not whole[:, 3 * CHUNK :].any()
        assert (rest[:, 3 * CHUNK :] == 1).all() and not rest[:, : 3 * CHUNK].any()


@pytest.mark.parametrize("value", [-0.7, 0.3])
def test_a_row_of_very_many_chunks(value):
    """As many as 2^29 columns have: equal parts, whose rounding errors all have one sign, joined by a larger one."""
    n_chunks = 2**29 // CHUNK
    shift = np.float32(math.log(2**29))  # a logsumexp near 0 shows what the sum is off by
    logits = np.full((2, CHUNK), value, np.float32) - shift
    logits[0, 0] += 9
    state = LogSumExpState.empty(2, like=logits)
    state.update(logits)
    parts = state.table
    table = np.concatenate([parts[:1], np.broadcast_to(parts[1:], (1, n_chunks - 1, 4))], axis=1)
    whole = LogSumExpState.from_table(table, ((0, 2**29),))
    other = float(logits[1, 0])
    expected = other + math.log(2**29 - 1 + math.exp(float(logits[0, 0]) - other))
    assert abs(float(whole.logsumexp()[0]) - expected) <= 2 * 2.0**-23


@pytest.mark.parametrize("n_cols", [2**26, 2**31])
def test_a_row_of_very_many_ties(n_cols):
    """Each chunk has 2047 logits that equal the maximum: from 2^24 on, float32 does not hold every number of them."""
    n_chunks = n_cols // CHUNK
    logits = np.zeros((1, CHUNK), np.float32)
    logits[0, 5] = -20
    state = LogSumExpState.empty(1, like=logits)
    state.update(logits)
    table = np.broadcast_to(state.table, (1, n_chunks, 4))
    lse = LogSumExpState.from_table(table, ((0, n_cols),)).logsumexp()
    expected = math.log(n_chunks * (CHUNK - 1 + math.exp(-20)))
    assert abs(float(lse[0]) - expected) <= 2 * 2.0**-19  # two units in the last place


def test_ties_are_counted_exactly(target):
    """More for each chunk than there are columns, so that a few chunks are enough for what many would lose."""
    table = np.zeros((1, 128 * 32, 4), np.float32)
    table[0, :32, 3] = 2**30  # for each lane of a GPU
    table[0, 32:, 3] = 63  # less than half a unit in the last place of that
    state = LogSumExpState.from_table(target.array(table), ((0, 128 * 32 * CHUNK),))
    expected = math.log(32 * (2**30 + 127 * 63))
    assert abs(float(target.get(state.logsumexp())[0]) - expected) <= 2 * 2.0**-19


# ---------------------------------------------------------------- nothing


def test_no_columns_and_no_rows(target):
    logits = inputs.make("spread", (3, 100), np.float64)
    state = LogSumExpState.empty(3, like=target.array(logits))
    assert lse_of(target, state).tolist() == [-np.inf] * 3 and state.columns == ()
    state.update(target.array(logits[:, :0].copy()), 4 * CHUNK)
    assert state.columns == () and target.get(state.table).shape == (3, 0, 4)
    state.merge(LogSumExpState.empty(3, like=target.array(logits)))
    assert lse_of(target, state).tolist() == [-np.inf] * 3
    state.update(target.array(logits))
    tolerances.check_logsumexp(lse_of(target, state), logits)
    none = LogSumExpState.empty(0, like=target.array(logits))
    none.update(target.array(logits[:0]))
    assert none.columns == ((0, 100),) and lse_of(target, none).shape == (0,)


# ---------------------------------------------------------------- sent elsewhere


def test_a_table_and_its_columns_are_the_state(target):
    logits = awkward(np.float32)
    expected = lse_of(target, state_of(target, logits, temperature=0.7)).tobytes()
    sent = state_of(target, logits[:, : 2 * CHUNK], (0,), temperature=0.7)
    table, columns = target.get(sent.table), sent.columns
    assert table.shape == (len(logits), 2, 4) and table.dtype == np.float32 and columns == ((0, 2 * CHUNK),)
    here = LogSumExpState.empty(len(logits), like=target.array(logits[:, :0].copy()), temperature=0.7)
    here.update(target.array(logits[:, 2 * CHUNK :]), 2 * CHUNK)
    received = np.asfortranarray(table)  # any strides
    here.merge(LogSumExpState.from_table(target.array(received), columns, temperature=0.7))
    assert here.columns == ((0, N_COLS),) and lse_of(target, here).tobytes() == expected
    empty = LogSumExpState.from_table(target.array(table[:, :0]), ())
    assert lse_of(target, empty).tolist() == [-np.inf] * len(logits)


def test_a_table_has_parts_at_both_ends(target):
    """Of a state that has parted columns, one table."""
    logits = inputs.make("spread", (4, N_COLS), np.float32)
    state = LogSumExpState.empty(4, like=target.array(logits))
    state.update(target.array(logits[:, 3 * CHUNK :]), 3 * CHUNK)
    state.update(target.array(logits[:, :CHUNK]))
    table, columns = target.get(state.table), state.columns
    assert table.shape == (4, 2, 4) and columns == ((0, CHUNK), (3 * CHUNK, N_COLS))
    again = LogSumExpState.from_table(target.array(table), columns)
    for one in (state, again):
        one.update(target.array(logits[:, CHUNK : 3 * CHUNK]), CHUNK)
        assert lse_of(target, one).tobytes() == lse_of(target, state_of(target, logits)).tobytes()


def test_states_of_both_targets_together():
    logits = awkward(np.float32)
    host = LogSumExpState.empty(len(logits), like=logits)
    host.update(logits[:, :CHUNK])
    with emulated_gpu("sm_90", track=False) as gpu:
        x = gpu.array(logits[:, CHUNK:])
        device = LogSumExpState.empty(len(logits), like=x)
        device.update(x, CHUNK)
        table, columns = gpu.get(device.table), device.columns
        device.merge(LogSumExpState.from_table(gpu.array(host.table), host.columns))
        tolerances.check_logsumexp(gpu.get(device.logsumexp()), logits)
    host.merge(LogSumExpState.from_table(table, columns))
    tolerances.check_logsumexp(host.logsumexp(), logits)


def test_pickled():
    logits = inputs.make("spread", (4, N_COLS), np.float32)
    state = LogSumExpState.empty(4, like=logits)
    state.update(logits[:, CHUNK:], CHUNK)
    state = pickle.loads(pickle.dumps(state))
    state.update(logits[:, :CHUNK])
    assert state.logsumexp().tobytes() == gpusoftmax.logsumexp(logits).tobytes()


def test_examples():
    runner = doctest.DocTestRunner()
    for example in doctest.DocTestFinder().find(LogSumExpState, "LogSumExpState", globs={}):
        runner.run(example)
    assert runner.tries and not runner.failures


# ---------------------------------------------------------------- what is refused


def test_after_an_error_a_state_is_what_it_was(target):
    logits = inputs.make("spread", (4, N_COLS), np.float32)
    x = target.array(logits)
    state = state_of(target, logits[:, CHUNK:], ())
    state.update(target.array(logits[:, CHUNK:]), CHUNK)
    before = lse_of(target, state).tobytes()
    other = LogSumExpState.empty(4, like=x)
    other.update(x)
    wide = LogSumExpState.empty(4, like=target.array(logits.astype(np.float64)))
    for call in (
        lambda: state.update(x),
        lambda: state.update(x, CHUNK // 2),
        lambda: state.update(target.array(logits[:, : CHUNK // 2])),
        lambda: state.update(target.array(logits[:3, :CHUNK])),
        lambda: state.update(target.array(logits[:, :CHUNK].astype(np.float64))),
        lambda: state.update(x, 4 * CHUNK),
        lambda: state.merge(other),
        lambda: state.merge(wide),
    ):
        with pytest.raises((TypeError, ValueError)):
            call()
    assert state.columns == ((CHUNK, N_COLS),) and lse_of(target, state).tobytes() == before
