"""The benchmark suite itself, on small shapes: wrong answers are not timed, times are the calls' own."""

import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import benchmarks.__main__ as command
from benchmarks import (
    alignment,
    arrays,
    cases,
    cold_start,
    goals,
    gpu_timing,
    launch,
    layer,
    measure,
    providers,
    report,
    results,
    suites,
    timing,
)
from benchmarks.cases import OPS, Case
from benchmarks.measure import Effort
from benchmarks.providers import OURS
from gpusoftmax import _replay

QUICK = Effort(attempts=1, samples=3, seconds=0.01)


# ---------------------------------------------------------------- cases and their answers


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", *(pytest.param(one, marks=pytest.mark.matrix) for one in ("float64", "float16"))]
)
def test_our_answer_is_right_by_either_check(op, dtype):
    case = Case(op, 12, 100, dtype)
    result = providers.PROVIDERS["gpusoftmax"].calls()[op](arrays.on_cpu(case, "numpy"))()
    assert cases.worst_error(case, result, arrays.to_numpy) < 2**-8
    assert cases.hold_to_promise(case, result, arrays.to_numpy) < 30


@pytest.mark.parametrize("op", OPS)
def test_a_wrong_answer_is_seen_in_the_first_and_in_the_last_row(op):
    case = Case(op, 12, 100, "float32")
    for row in (0, -1):
        result = providers.PROVIDERS["NumPy"].calls()[op](arrays.on_cpu(case, "numpy"))()
        cases.worst_error(case, result, arrays.to_numpy)
        wrong = [np.array(part) for part in (result if isinstance(result, tuple) else (result,))]
        part = wrong[-1]
        off = {"sample": -1000, "sample_top_p": -1000, "argmax": 1, "token_logprobs_and_rank": 1}.get(
            op, 0.01 * (1 + np.abs(part).max())
        )
        part[(row, ...) if part.ndim else ...] += off
        with pytest.raises(ValueError, match="answer is wrong"):
            cases.worst_error(case, tuple(wrong), arrays.to_numpy)


def test_nan_is_a_wrong_answer():
    case = Case("softmax", 2, 8, "float32")
    with pytest.raises(ValueError, match="answer is wrong"):
        cases.worst_error(case, np.full((2, 8), np.nan, np.float32), arrays.to_numpy)


def test_a_case_repeats_a_block_that_divides_its_rows():
    case = Case("cross_entropy", 60, 2**17, "float32")
    assert case.block_rows == 2 and case.inputs["logits"].shape == (2, 2**17)
    assert Case("softmax", 7, 2**20, "float32").block_rows == 1
    given = arrays.on_cpu(case, "numpy")
    assert given.logits.shape == (60, 2**17) and given.target.shape == (60,)
    assert (given.logits[58:] == case.inputs["logits"]).all() and (given.target[2:4] == given.target[:2]).all()
    assert given.logits.ctypes.data % 64 == given.target.ctypes.data % 64 == 0


def test_bytes_count_each_input_and_each_result_once():
    assert Case("softmax", 4, 8, "bfloat16").bytes_moved == 2 * 4 * 8 * 2
    assert Case("logsumexp", 4, 8, "float64").bytes_moved == 4 * 8 * 8 + 4 * 8
    assert Case("cross_entropy_with_grad", 4, 8, "float32").bytes_moved == 2 * 4 * 8 * 4 + 4 * 8
    assert Case("softmax_backward", 4, 8, "float32").bytes_moved == 3 * 4 * 8 * 4


# ---------------------------------------------------------------- timing


class FakeTime:
    """A clock that only calls move: `call(3)` takes three seconds."""

    def __init__(self):
        self.now, self.log = 0.0, []

    def __call__(self):
        return self.now

    def call(self, name, *seconds):
        """A call that takes these times in turn, the last one from then on."""
        left = list(seconds)

        def run():
            self.log.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


def test_every_call_is_timed_by_itself():
    clock = FakeTime()
    calls = {"a": clock.call("a", 100, 1), "b": clock.call("b", 100, 3)}
    seconds, medians = timing.interleaved(calls, attempts=2, samples=4, seconds=1e3, clock=clock)
    assert seconds == {"a": [1] * 4, "b": [3] * 4} and medians == {"a": [1, 1], "b": [3, 3]}
    turns = clock.log[4:]  # after one call to warm up and one to see how long it takes, of each
    assert all(set(turns[k : k + 2]) == {"a", "b"} for k in range(0, len(turns), 2))


def test_calls_apart_take_their_turns_after_the_others():
    clock = FakeTime()
    calls = {name: clock.call(name, 100) for name in ("NumPy", "ours", "SciPy", "torch")}
    attempts = timing.attempts_at(calls, 3, 1e3, ("SciPy", "NumPy"), clock)
    for _ in range(2):
        clock.log.clear()
        assert next(attempts) == {name: [100] * 3 for name in calls}
        turns = [set(clock.log[k : k + 2]) for k in range(len(clock.log) - 12, len(clock.log), 2)]
        assert turns == [{"ours", "torch"}] * 3 + [{"SciPy", "NumPy"}] * 3


def test_short_calls_are_repeated_within_a_sample_and_slow_ones_sampled_less():
    clock = FakeTime()
    calls = {"short": clock.call("short", 1e-6), "slow": clock.call("slow", 10.0)}
    seconds, _ = timing.interleaved(calls, attempts=1, samples=9, seconds=20.0, clock=clock)
    assert seconds["short"] == pytest.approx([1e-6] * 9) and clock.log.count("short") == 2 + 9 * 300
    assert seconds["slow"] == [10.0] * 3


def test_the_quietest_attempt_is_the_one_nearest_to_every_calls_best():
    assert timing._quietest([[1.0, 1.1], [100.0, 300.0]]) == 0
    assert timing._quietest([[1.0, 0.5], [100.0, 110.0]]) == 1  # not the one with the smallest sum


def test_summary():
    assert timing.summary([0.005, 0.001, 0.003, 0.002, 0.004, 0.006]) == pytest.approx(
        {"median_ms": 3.5, "p20_ms": 2.0, "p80_ms": 5.0}
    )


class FakeGPU:
    """A stream: work is put in at host time and runs one after the other, never before it was put in."""

    def __init__(self):
        self.host = self.device = 0.0
        self.runs = []

    def call(self, name, host, device):
        def run():
            self.host += host
            self.device = max(self.device, self.host) + device
            self.runs.append(name)

        return run

    def clock(self, l2_bytes=60_000_000):
        def mark():
            self.host += 1e-6
            self.device = max(self.device, self.host)
            return self.device

        def synchronize():
            self.host = max(self.host, self.device)

        occupy = self.call("occupy", 5e-6, 250e-6)
        return gpu_timing.Clock(mark, lambda a, b: b - a, synchronize, occupy, l2_bytes, lambda: self.host)


@pytest.mark.parametrize("host, device", [(2e-6, 500e-6), (100e-6, 5e-6), (5e-6, 1e-6)])
def test_a_burst_measures_the_device_even_where_the_host_is_slower(host, device):
    gpu = FakeGPU()
    times = gpu_timing.burst([gpu.call("a", host, device), gpu.call("b", host, device)], gpu.clock())
    assert 3 <= len(times) <= 50 and times == pytest.approx([device] * len(times))
    measured = gpu.runs[len(gpu.runs) - len(times) :]
    assert measured == ["a", "b"] * (len(times) // 2) + ["a"] * (len(times) % 2)
    assert gpu.runs[-len(times) - 1] == "occupy"


def test_arrays_are_rotated_through_twice_the_cache():
    for size in (1_000_000_000, 100_000_000, 40_000_000):
        assert gpu_timing.rotation(size, 60_000_000) * size >= 2 * 60_000_000
    assert gpu_timing.rotation(1_000_000_000, 60_000_000) == 1
    assert gpu_timing.rotation(1000, 60_000_000) == 50  # the length of a burst, before which the cache is emptied


def test_the_gpu_path_on_an_emulated_device(monkeypatch):
    """The measuring itself: arrays, checks and records, with a device that is emulated and a clock that is not one."""
    from tests.emulator import emulated_gpu

    with emulated_gpu("sm_90", track=False) as gpu:

        def on_gpu(case, library):
            made = {name: gpu.array(block) for name, block in case.inputs.items()}
            return arrays.Arrays(case, made, lambda shape, dtype: gpu.array(np.zeros(shape, dtype)))

        monkeypatch.setattr(arrays, "on_gpu", on_gpu)
        monkeypatch.setattr(measure, "_copy_on_gpu", lambda size, library: lambda: None)
        monkeypatch.setattr(results, "environment", lambda target: {"device": "gpu-emulated"})
        monkeypatch.setattr(cases, "_blocks", lambda case, result, to_numpy: 2 * [gpu.get(result)])
        case = Case("softmax", 2, 64, "float32")
        ours = {"gpusoftmax": providers.PROVIDERS["gpusoftmax"].calls()}
        clock = FakeGPU().clock()
        records = measure.on_gpu(case, ours, QUICK, clock, "torch", pytest.fail)
    assert [record["provider"] for record in records] == ["gpusoftmax", "copy", "one number"]
    assert records[0]["rotations"] == 50 and records[0]["worst_ulp"] < 4
    assert records[0]["samples"] == 50 and records[0]["bytes"] == 2 * 2 * 64 * 4


# ---------------------------------------------------------------- the command


@pytest.fixture
def saved(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(results.save, "__defaults__", (tmp_path,))
    return tmp_path


@pytest.mark.parametrize("op", OPS)
def test_every_op_is_measured_beside_those_that_are_installed(op, saved, capsys):
    command.main([op, "--shape", "16x40", "--attempts", "1", "--save"])
    text = capsys.readouterr().out
    (path,) = saved.glob(f"cpu-*/{op}.jsonl")
    records = {record["provider"]: record for record in map(json.loads, path.read_text().splitlines())}
    assert {"gpusoftmax", "NumPy", "copy"} <= set(records)
    for name, record in records.items():
        assert record["median_ms"] > 0 and len(record["attempts_ms"]) == 1 and record["bytes"] > 0
        assert name in text and record["device"] == path.parent.name and record["versions"]["numpy"]
        assert name == "copy" or record["error"] < 1e-5


def test_a_missing_library_is_said_to_be_missing(monkeypatch):
    def missing():
        raise ImportError("No module named 'scipy'")

    monkeypatch.setitem(providers.PROVIDERS, "SciPy", providers.Provider(missing, {"cpu": "numpy"}))
    said = []
    assert "SciPy" not in measure.available("cpu", said.append)
    assert "SciPy is skipped: it is not installed (No module named 'scipy')" in said


def test_a_rival_with_a_wrong_answer_is_left_out_and_named():
    rivals = {
        "gpusoftmax": providers.PROVIDERS["gpusoftmax"].calls(),
        "NumPy": {"softmax": lambda a: lambda: np.zeros_like(a.logits)},
    }
    said = []
    (records,) = measure.on_cpu([Case("softmax", 4, 8, "float32")], rivals, QUICK, said.append)
    assert [record["provider"] for record in records] == ["gpusoftmax", "copy"]
    assert len(said) == 1 and "softmax 4x8 float32: NumPy is left out: ValueError: its answer is wrong" in said[0]


def test_attempts_of_cases_take_turns(monkeypatch):
    """Each is of another time: attempts at once would all be of the same."""
    turns = []

    def attempts_at(calls, *_):
        while True:
            turns.append(calls["gpusoftmax"])
            yield {name: [1.0, float(len(turns))] for name in calls}

    monkeypatch.setattr(timing, "attempts_at", attempts_at)
    ours = {"gpusoftmax": providers.PROVIDERS["gpusoftmax"].calls()}
    given = [Case("softmax", 4, 8, "float32"), Case("softmax", 3, 8, "float32")]
    short, long = measure.on_cpu(given, ours, QUICK._replace(attempts=3), pytest.fail)
    assert turns == turns[:2] * 3 and turns[0] != turns[1]
    assert [record["n_rows"] for record in (short[0], long[0])] == [4, 3]
    assert short[0]["attempts_ms"] == [1e3, 2e3, 3e3] and long[0]["attempts_ms"] == [1.5e3, 2.5e3, 3.5e3]
    assert short[0]["median_ms"] == 1e3 and long[0]["median_ms"] == 1.5e3


def test_our_own_wrong_answer_ends_the_run():
    ours = {"gpusoftmax": {"softmax": lambda a: lambda: np.zeros_like(a.logits)}}
    with pytest.raises(ValueError, match="answer is wrong"):
        measure.on_cpu([Case("softmax", 4, 8, "float32")], ours, QUICK, pytest.fail)


def test_what_the_budget_leaves_out_is_named(capsys, monkeypatch):
    monkeypatch.setattr(measure, "on_cpu", lambda *_: pytest.fail("measured after the deadline"))
    command.run("cpu", [Case("softmax", 4, 8, "float32")], QUICK, 1e-12, [], False)
    assert "softmax 4x8 float32: not measured" in capsys.readouterr().out


def test_newer_results_replace_older_ones_of_the_same_case(tmp_path):
    record = {"op": "softmax", "dtype": "float32", "n_cols": 8, "n_rows": 4, "provider": "torch", "device": "cpu-x"}
    other = {**record, "provider": "gpusoftmax"}
    results.save([{**record, "median_ms": 1.0}, other], tmp_path)
    (path,) = results.save([{**record, "median_ms": 2.0}], tmp_path)
    assert results.load(path) == [other, {**record, "median_ms": 2.0}]


@pytest.mark.parametrize("suite", [suites.cpu, suites.gpu])
@pytest.mark.parametrize("quick", [False, True])
def test_suites_name_each_case_once(suite, quick):
    found = suite(quick)
    assert len(set(found)) == len(found) and {case.op for case in found} <= set(OPS)
    if suite is suites.gpu and not quick:
        big = [case for case in found if case.n_rows > 64]
        assert all(0.8 < case.n_rows * case.n_cols * case.numpy_dtype.itemsize / 2**30 <= 1 for case in big)


def test_torch_tensors_share_the_inputs_and_keep_bfloat16():
    torch = pytest.importorskip("torch")
    case = Case("softmax", 4, 8, "bfloat16")
    tensors, given = arrays.on_cpu(case, "torch"), arrays.on_cpu(case, "numpy")
    assert tensors.logits.dtype == torch.bfloat16 and tensors.logits.data_ptr() == given.logits.ctypes.data
    assert (arrays.to_numpy(tensors.logits) == given.logits).all()
    assert arrays.to_numpy(tensors.result()).dtype == cases.BFLOAT16


def test_launch_cost_is_measured_without_a_gpu(monkeypatch):
    """With stand-ins for CuPy's arrays; the driver is never reached."""
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(launch, "_ATTEMPTS", 1)
    monkeypatch.setattr(launch, "_SAMPLES", 2)
    said = []
    launch.run(said.append)
    # What was imported meanwhile is still there: a second copy of the host half would record calls of the first.
    assert sys.modules["gpusoftmax.kernels.cuda.launch"] is _replay._cuda("launch")
    costs = [line for line in said if line.endswith("us until the driver")]
    assert len(costs) == 7 and all(0 < float(line.split()[-5]) < 10_000 for line in costs)
    assert said[-1].startswith("whole calls") or "torch softmax" in "".join(said)


# ---------------------------------------------------------------- a layer with its loss


def test_a_layer_is_measured(monkeypatch, capsys):
    saved = []
    monkeypatch.setattr(results, "save", saved.extend)
    monkeypatch.setattr(layer, "peak_bytes", lambda call: 2**20)
    command.main(["layer", "--attempts", "1", "--save", "--shape", "300x64x500"])
    names = {record["provider"] for record in saved}
    assert {"gpusoftmax", "NumPy"} <= names
    assert all(record["error"] < 1e-5 and len(record["attempts_ms"]) == 1 for record in saved)
    output = capsys.readouterr().out
    assert all(name in output for name in names) and "median / ours" in output


def test_wrong_answers_of_a_layer_are_not_timed(monkeypatch):
    def wrong(x, weight, target):
        loss, *gradients = layer._plain(x, weight, target)
        return loss, *(1.001 * gradient for gradient in gradients)

    monkeypatch.setattr(layer, "_calls", lambda *problem: {"gpusoftmax": lambda: wrong(*problem)})
    with pytest.raises(ValueError, match="answer is wrong: off by 0.001"):
        layer.run(1, 2, False, pytest.fail, "cpu", (300, 8, 500))


def test_the_peak_of_memory():
    """Of what is freed before the end, too. Linux counts pages to some hundreds."""
    peak = layer.peak_bytes(lambda: np.ones(2**25, np.uint8).sum())
    assert 0.9 * 2**25 < peak < 1.1 * 2**25


def test_a_page_on_a_layer(reported):
    def of(provider, milliseconds, mebibytes):
        peak = {"peak_bytes": mebibytes * 2**20, "n_features": 8}
        return {**record(provider, milliseconds, op=layer.OP), **peak}

    page, _ = reported(record("gpusoftmax", 2.0), of("torch", 3000.0, 500), of("gpusoftmax", 2000.0, 50))
    assert "1000 rows x 8 features x 1024 classes, float32" in page and "best and median of 2 attempts" in page
    assert "| gpusoftmax | 2 | 2 | 50 | 1.00 | 1.00 | 1.00 |" in page
    assert "| torch | 3 | 3 | 500 | 1.50 | 1.50 | 10.00 |" in page


# ---------------------------------------------------------------- odd addresses, cold starts, goals


def test_what_odd_addresses_cost(saved):
    said, case = [], Case("softmax", 8, 64, "float32")
    alignment.run(QUICK, True, said.append, (case,))
    (path,) = saved.glob("cpu-*/alignment.jsonl")
    found = {record["provider"]: record["median_ms"] for record in results.load(path)}
    assert set(found) == {"softmax, aligned", "softmax, an element off", "softmax, a byte off"}
    assert (
        min(found.values()) > 0
        and f"a byte off {found['softmax, a byte off'] / found['softmax, aligned']:.3f}" in said[0]
    )


@pytest.mark.parametrize("offset", [0, 1, 4])
def test_arrays_begin_behind_a_boundary(offset):
    given = arrays.on_cpu(Case("softmax", 8, 64, "float32"), "numpy", offset)
    assert given.logits.ctypes.data % 64 == given.result().ctypes.data % 64 == offset
    aligned = arrays.on_cpu(Case("softmax", 8, 64, "float32"), "numpy")
    np.testing.assert_array_equal(given.logits, aligned.logits)


def test_a_cold_start_is_that_of_a_new_process(saved):
    said = []
    cold_start.run(1, True, said.append, (Case("softmax", 8, 64, "float32"),))
    (path,) = saved.glob("cpu-*/cold_start.jsonl")
    (found,) = results.load(path)
    assert found["provider"] == "softmax" and 10 < found["median_ms"] < 60_000
    assert f"{found['median_ms'] / 1e3:.3f} s" in said[0]


def test_goals_are_reached_missed_or_not_measured(tmp_path):
    shape = {"n_rows": 4096, "n_cols": 1024}
    results.save([record("gpusoftmax", 1.0, **shape), record("torch", 1.75, **shape)], tmp_path)
    slow = {"op": alignment.OP, **shape}
    results.save([record("softmax, aligned", 1.0, **slow), record("softmax, a byte off", 1.5, **slow)], tmp_path)
    found = {goal.what: goal for goal in goals.of_device(tmp_path / "cpu-x")}
    faster = found["softmax 4096x1024 float32: torch's time over ours"]
    assert faster.is_reached and (faster.wanted, faster.found) == (1.7, 1.75)
    odd = found["softmax 4096x1024 float32: its time a byte off over aligned"]
    assert not odd.is_reached and (odd.wanted, odd.found) == (1.15, 1.5)
    assert found["softmax 1024x8192 float32: torch's time over ours"].found is None
    assert goals.summary(list(found.values())) == f"1 reached of 2 that were measured; {len(found) - 2} were not"
    rows = goals.lines(list(found.values()))
    assert [faster.what, "at least 1.7", "1.75", "yes"] in rows and [odd.what, "at most 1.15", "1.50", "no"] in rows


@pytest.mark.parametrize("later", [{"threads": 4}, {"threads": 2}])
def test_goals_compare_what_one_run_has_measured(later, tmp_path):
    """A later run without torch says nothing about torch, whose time of an earlier run is kept in the file."""
    shape, day = {"n_rows": 4096, "n_cols": 1024}, "2026-11-2{}T03:00:00+00:00"
    runs = [{**record(OURS, 4.0, **shape), **later, "date": day.format(3)}, record("torch", 7.0, **shape)]
    results.save(runs, tmp_path)
    (found,) = (
        one.found
        for one in goals.of_device(tmp_path / "cpu-x")
        if one.what.startswith("softmax 4096x1024 float32: torch")
    )
    assert found is None
    results.save([{**record("torch", 8.0, **shape), **later, "date": day.format(3)}], tmp_path)
    assert goals.of_device(tmp_path / "cpu-x")[0].found == 2


def test_goals_of_a_layer_are_for_its_number_of_features(tmp_path):
    n_rows, n_features, n_cols = layer.SHAPES["cpu"]
    of_layer = {"op": layer.OP, "n_rows": n_rows, "n_cols": n_cols}
    for features, milliseconds in ((n_features, 1.0), (2 * n_features, 3.0)):
        both = record(OURS, milliseconds, **of_layer), record("torch", 2.0, **of_layer)
        results.save([{**one, "n_features": features, "peak_bytes": 1} for one in both], tmp_path)
    (time,) = (
        one for one in goals.of_device(tmp_path / "cpu-x") if f"x{n_features}x" in one.what and "time" in one.what
    )
    assert time.found == 2


def test_the_suites_measure_every_goal_that_is_theirs():
    """A goal for a case that no suite has would stay unmeasured for ever."""
    of_suites = {(case.op, case.n_rows, case.n_cols, case.dtype) for case in suites.cpu()}
    for (op, dtype), shapes in goals._TIMES_OF_TORCH.items():
        assert {(op, *shape, dtype) for shape in shapes} <= of_suites


def test_the_goals_of_the_committed_results(capsys):
    command.main(["goals"])
    told = capsys.readouterr().out
    assert told.count("| yes |") > 40 and "# gpu-" in told and "linear_cross_entropy" in told


# ---------------------------------------------------------------- the report


def record(provider, milliseconds, n_rows=1000, n_cols=1024, dtype="float32", target="cpu", op="softmax"):
    return {
        "op": op, "dtype": dtype, "n_rows": n_rows, "n_cols": n_cols, "provider": provider, "bytes": 8_000_000,
        "median_ms": milliseconds, "attempts_ms": [milliseconds, 2 * milliseconds], "commit": "abc",
        "date": "2026-11-22T03:00:00+00:00", "versions": {"numpy": "2.4.0"}, "device": f"{target}-x",
        **({"threads": 2} if target == "cpu" else {}),
    }  # fmt: skip


@pytest.fixture
def reported(tmp_path):
    """Writes records and the report; gives the device's page and the project's."""
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report._BEGIN}\nold\n{report._END}\nafter\n")

    def write(*records):
        root = tmp_path / "results"
        results.save(records, root)
        report.write(root, readme)
        (page,) = root.glob("*/README.md")
        return page.read_text(), readme.read_text()

    return write


def test_tables_show_gains_and_losses(reported):
    page, summary = reported(
        *(record(*each) for each in (("gpusoftmax", 2.0), ("torch", 6.0), ("SciPy", 1.5), ("copy", 1.0))),
        *(record(*each, n_cols=64) for each in (("gpusoftmax", 1.0), ("torch", 12.0))),
        *(record(*each, op="logsumexp") for each in (("torch", 1.0),)),  # nothing of ours: no line
    )
    assert "| 1000x1024 | float32 | 2 | 4 | 50% | 3.00 | 0.75 |" in page
    assert "| 1000x64 | float32 | 1 | 8 |  | 12 |  |" in page
    assert "2 threads, quietest of 2 attempts, numpy 2.4.0" in page and "## logsumexp" not in page
    assert "| softmax float32 | 2 | 50% | 6.00 (3.00 to 12) | 0.75 |" in summary
    assert summary.startswith("before\n") and summary.endswith("\nafter\n") and "old" not in summary


def test_the_report_is_the_same_when_nothing_new_was_measured(reported):
    given = record("gpusoftmax", 2.0), record("torch", 6.0)
    assert reported(*given) == reported(*given)


def test_the_summary_is_of_the_newest_results(reported, tmp_path):
    reported(record("gpusoftmax", 2.0), record("torch", 6.0))
    newer = [
        {**record(*each), "device": "cpu-y", "date": "2026-12-01T03:00:00+00:00"} for each in (("gpusoftmax", 1.0),)
    ]
    results.save(newer, tmp_path / "results")
    report.write(tmp_path / "results", tmp_path / "README.md")
    summary = (tmp_path / "README.md").read_text()
    assert "cpu-y" in summary and "cpu-x" not in summary
    assert "| 1000x1024 | float32 | 2 |" in (tmp_path / "results/cpu-x/README.md").read_text()


@pytest.mark.parametrize(
    "name, expected", [("AMD EPYC", "cpu-amd-epyc-family-26-model-2"), ("Xeon Gold 6230", "cpu-xeon-gold-6230")]
)
def test_processors_whose_names_are_alike_are_told_apart(name, expected, monkeypatch):
    text = f"processor\t: 0\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: {name}\n"
    monkeypatch.setattr(Path, "read_text", lambda path: text)
    assert results.device_name("cpu") == expected


@pytest.mark.parametrize("target, names", [("cpu", ["softmax"]), ("gpu", ["bandwidth", "latency"])])
def test_plots(reported, tmp_path, target, names):
    pytest.importorskip("matplotlib")
    shapes = [(1000, 4096), (1000, 1024), (1, 4096), (16, 4096)]
    page, _ = reported(*(record(p, 1.0, *s, target=target) for s in shapes for p in ("gpusoftmax", "torch", "copy")))
    figures = {path.name for path in tmp_path.glob("results/*/*.svg")}
    assert len(figures) == len(names)
    assert all(any(name in figure for figure in figures) for name in names)
    assert all(f"({figure})" in page for figure in figures)


def test_without_matplotlib_the_tables_are_written_and_the_plots_missed(reported, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page, _ = reported(record("gpusoftmax", 2.0))
    assert "1000x1024" in page and "no plots: pip install 'gpusoftmax[bench]'" in capsys.readouterr().out


def test_the_committed_pages_are_those_of_the_committed_results(monkeypatch, tmp_path):
    """Without matplotlib too, by whose files the pages keep their figures, in the order of the tables."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    root, readme = tmp_path / "results", tmp_path / "README.md"
    shutil.copytree(results.RESULTS, root)
    shutil.copy(report.README, readme)
    report.write(root, readme)
    assert readme.read_text() == report.README.read_text()
    pages = sorted(results.RESULTS.glob("*/README.md"))
    assert pages
    for page in pages:
        assert (root / page.parent.name / "README.md").read_text() == page.read_text(), page


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["softmax", "--shape", "4096"], "--shape of softmax has 2 sizes"),
        (["softmax", "--shape", "4x5x6"], "--shape of softmax has 2 sizes"),
        (["softmax", "--shape", "4xb"], "argument --shape: 'b' is no number above 0"),
        (["softmax", "--shape", "0x4"], "argument --shape: '0' is no number above 0"),
        (["softmax", "--dtype", "float8"], "invalid choice: 'float8'"),
        (["softmax", "--provider", "tourch"], "invalid choice: 'tourch'"),
        (["softmax", "--attempts", "0"], "argument --attempts: '0' is no number above 0"),
        (["softmax", "--op", "softmax"], "softmax takes no --op: it is for predict, transforms"),
        (["cpu", "--op", "softmax"], "cpu takes no --op: it is for predict, transforms"),
        (["cpu", "--shape", "4x5"], "cpu takes no --shape: it is for layer, an OP"),
        (["goals", "--dtype", "float64"], "goals takes no --dtype: it is for an OP"),
        (["report", "--save"], "report takes no --save"),
        (["layer", "--dtype", "bfloat16"], "layer takes no --dtype"),
        (["layer", "--shape", "4x5"], "--shape of layer has 3 sizes"),
        (["layer", "--shape", "4x5x6", "5x6x7"], "--shape of layer is one"),
        (["transforms", "--op", "softmx"], "transforms: no op 'softmx', expected some of softmax,"),
        (["predict", "--op", "softmx"], "predict: no op 'softmx', expected some of softmax,"),
    ],
)
def test_arguments_that_would_be_ignored_or_fit_nothing(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(command, "run", lambda *_: pytest.fail("something is measured"))
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert message in f"{ended.value.code} {capsys.readouterr().err}"


def test_torch_compile_gives_way_when_time_runs_short(monkeypatch, capsys):
    seen = []

    def on_cpu(cases, taking_part, *_):
        seen.append(sorted(taking_part))
        time.sleep(0.3)
        return [[record("gpusoftmax", 1.0)] for _ in cases]

    monkeypatch.setattr(measure, "available", lambda target, say: {"gpusoftmax": {}, "torch.compile": {}})
    monkeypatch.setattr(measure, "on_cpu", on_cpu)
    monkeypatch.setattr(measure, "SIDE_BY_SIDE", 1)
    command.run("cpu", [Case("softmax", 4, n, "float32") for n in range(9)], QUICK, 1.0, [], False)
    assert seen[0] == ["gpusoftmax", "torch.compile"] and seen[1] == ["gpusoftmax"]
    text = capsys.readouterr().out
    assert "softmax 4x1 float32: torch.compile is left out" in text and "softmax 4x8 float32: not measured" in text
