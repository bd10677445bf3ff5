"""`python -m benchmarks predict`: instructions are those of the machine code, times follow from the model."""

import json
import sys
from collections import Counter

import pytest

if sys.platform != "linux":
    pytest.skip("needs what links and disassembles kernels", allow_module_level=True)

from benchmarks import model, predict, transforms
from benchmarks.model import Layout
from benchmarks.predict import Case


@pytest.fixture(scope="module")
def records():
    """A short, a held and a cluster's kernel, and one row of decoding."""
    chosen = [("bfloat16", 3000, 1000), ("float32", 4096, 8192), ("bfloat16", 4096, 128256), ("float32", 1, 32000)]
    return [predict.record(Case("softmax", *case)) for case in chosen]


def test_a_record_says_what_is_launched_and_that_nothing_is_measured(records):
    assert [one["regime"] for one in records] == ["short", "held", "cluster", "cluster"]
    assert [one["bytes_per_element"] for one in records] == [4, 8, 4, 8]
    for one in records:
        assert one["measured"] is False and one["commit"] and one["date"] and one["registers"] > 16
        # bfloat16 takes an exponential twice; a lane without a column has none, and the reciprocal is one for a lane.
        assert one["special_per_element"] == pytest.approx(2 if one["dtype"] == "bfloat16" else 1, rel=0.15)
        # The assembler drops moves and adds what 64-bit numbers take.
        assert 0.7 < one["instructions_per_element"] / one["ptx_instructions_per_element"] < 1.3
        assert one["predicted_us"] > max(one["part_us"].values())


def test_every_access_to_a_row_is_counted(records):
    """LDGSTS and STG of 16 bytes: once for each granule of a row."""
    from benchmarks import machine_code
    from gpusoftmax import _dry_run

    case = Case("softmax", "float32", 4096, 8192)
    (launch,) = _dry_run.launches(case.op, (case.n_rows, case.n_cols), case.dtype, "sm_90")
    stats, rows = predict._emulated(case, launch.plan)
    counted = machine_code.executed(launch.image.ptx, "sm_90", stats.warp_lines)
    granules = rows * case.n_cols * 4 // 16
    assert 32 * sum(n for one, n in counted.items() if one.startswith("LDGSTS") and ".128" in one) == granules
    assert 32 * sum(n for one, n in counted.items() if one.startswith("STG") and ".128" in one) == granules


@pytest.mark.parametrize(
    "op, dtype, n_cols, most",
    [
        ("softmax", "bfloat16", 32000, 22),
        ("softmax", "float32", 32000, 44),
        ("cross_entropy", "bfloat16", 32000, 16),
        ("cross_entropy", "float32", 32000, 19),
        ("cross_entropy", "bfloat16", 8192, 17),  # a warp has four chunks of such rows too
        ("cross_entropy", "bfloat16", 1000, 24),  # the logarithms of a block's rows are taken side by side
        ("cross_entropy_with_grad", "bfloat16", 8192, 29),
        ("token_logprobs", "bfloat16", 32000, 16),
        ("token_logprobs_and_entropy", "bfloat16", 32000, 18.5),
        ("token_logprobs_and_rank", "bfloat16", 32000, 19.5),
        ("sample", "bfloat16", 32000, 33),
        ("sample", "float32", 32000, 35),
        ("sample", "float32", 1000, 53),
        ("sample_and_top_k", "float32", 32000, 75),  # in a cluster whose chunks are fewer than 50
    ],
)
def test_instructions_per_logit(op, dtype, n_cols, most):
    """A copy of these bytes leaves an H200 time for 32 and 64 of softmax, 16 and 32 of the loss (kernels/README.md)."""
    assert predict.record(Case(op, dtype, 4096, n_cols))["instructions_per_element"] < most


@pytest.mark.parametrize(
    "way, n_cols, most",
    [
        ("packed mask", 50257, 33),
        pytest.param("packed mask", 1000, 45, marks=pytest.mark.matrix),
        pytest.param("mask", 50257, 37, marks=pytest.mark.matrix),
    ],
)
def test_masks_cost_little_wherever_rows_begin(way, n_cols, most):
    """21 to 24 instructions per logit without one."""
    assert transforms.counted("softmax", "bfloat16", way, n_cols)[0] < most


def test_a_copy_is_bound_by_memory_and_takes_its_bytes():
    layout = Layout(blocks=132 * 2 * 10, cluster=1, warps=8, blocks_per_multiprocessor=2)
    found = model.predict(layout, Counter({"FADD": 132 * 4 * 1000}), 4.3e9)
    assert found.bound == "memory"
    issue = 1000 / model.CLOCK
    assert found.parts["issue"] == pytest.approx(issue)
    assert found.seconds == pytest.approx(model.START_SECONDS + model.LATENCY_SECONDS + 1e-3 + issue / 10)


@pytest.mark.parametrize(
    "opcode, unit, clocks",
    [
        ("FFMA", "issue", 1 / 4),
        ("ISETP.GT.AND", "integer", 1 / 2),
        ("MUFU.EX2", "special", 2),
        ("DFMA", "double", 1 / 2),
    ]
    + [("LDS.U16", "shared", 1), ("LDS.128", "shared", 4), ("SHFL", "shared", 1), ("LDGSTS.E.BYPASS.128", "shared", 4)],
)
def test_units(opcode, unit, clocks):
    assert max(model.clocks_of(Counter({opcode: 1000})).items(), key=lambda item: item[1]) == (unit, 1000 * clocks)


def test_few_blocks_have_the_bandwidth_of_few_multiprocessors():
    one = model.predict(Layout(1, 1, 8, 2), Counter(), 1e6)
    assert one.parts["memory"] == pytest.approx(1e6 / (64 * model.CLOCK))
    many = model.predict(Layout(132, 1, 8, 2), Counter(), 1e6)
    assert many.parts["memory"] == pytest.approx(1e6 / 4.3e12) and many.bound == "latency"


def test_one_warp_cannot_fill_the_schedulers():
    lone, eight = (model.predict(Layout(132, 1, warps, 1), Counter({"FADD": 1320}), 0).parts for warps in (1, 8))
    assert lone["issue"] == pytest.approx(8 * eight["issue"])


def test_the_cases_are_those_of_the_suite():
    found = list(predict.cases())
    assert len(set(found)) == len(found)
    big = [one for one in found if not one.is_decode]
    assert all(0.9 < one.n_rows * one.n_cols * one.numpy_dtype.itemsize / 2**30 <= 1 for one in big)
    assert {one.n_cols for one in big if one.op == "softmax"} >= {1000, 50257, 1048576}


def test_tables_stand_between_the_marks(records, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{predict._BEGIN}\nold\n{predict._END}\nafter\n")
    for _ in range(2):  # the second time over the first
        predict.write(records, tmp_path / "predicted", readme)
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "Predicted, not measured" in text
    assert "| softmax bfloat16 | short | 1000 |" in text and "| softmax bfloat16 | cluster of 4 | 128256 |" in text
    assert f"| float32 1 | {records[-1]['predicted_us']:.1f} |  |" in text
    lines = (tmp_path / "predicted" / "softmax.jsonl").read_text().splitlines()
    assert [json.loads(one) for one in lines] == records


def test_ops_that_are_not_predicted_anew_stay_in_the_tables(records, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"{predict._BEGIN}{predict._END}")
    predict.write(records, tmp_path, readme)
    predict.write([{**records[0], "op": "logsumexp", "commit": "later", "date": "9999-01-01"}], tmp_path, readme)
    text = readme.read_text()
    assert "| softmax bfloat16 | short | 1000 |" in text and "| logsumexp bfloat16 | short | 1000 |" in text
    assert f"9999-01-01, commit {records[0]['commit']}, later," in text
    with pytest.raises(SystemExit, match="no op 'softmaxx', expected some of softmax, log_softmax"):
        predict.run(print, ["softmax", "softmaxx"])


def test_the_committed_predictions_are_the_ones_in_the_table():
    """Whoever changes one writes the other."""
    saved = predict.saved()
    assert saved and not any(one["measured"] for one in saved)
    text = predict.README.read_text()
    assert all(part in text for part in predict.tables(saved))
