"""The registers of each kernel leave room for the blocks that its launch plan counts on (sm_90)."""

import itertools

import pytest

from benchmarks.suites import VOCABULARIES
from gpusoftmax import _dry_run, _imagined
from gpusoftmax.kernels.cuda.plan import BLOCK_RESERVE, limits_of, row_plan

# Linking takes a second: each op in one dtype, and by the marker codegen_full in all of them.
DTYPES = ("bfloat16", "float32", "float16", "float64")
CASES = [
    pytest.param(op, dtype, marks=[] if k % 4 == number < 2 else pytest.mark.codegen_full)
    for (k, op), (number, dtype) in itertools.product(enumerate(_dry_run.OPS), enumerate(DTYPES))
]


def by_shared_memory(shared_bytes):
    return limits_of("sm_90").multiprocessor_bytes // (shared_bytes + BLOCK_RESERVE)


@pytest.mark.parametrize("op, dtype", CASES)
def test_registers_leave_room_for_the_blocks_of_the_plan(op, dtype):
    """As many as shared memory allows, up to 512 threads: one loads while another computes. float64: what it needs."""
    for n_rows, n_cols in itertools.product((1, 4096), VOCABULARIES):
        shape = (n_rows, 1, n_cols) if op in _imagined.IMAGES else (n_rows, n_cols)
        for launched in _dry_run.launches(op, shape, dtype, "sm_90"):
            facts = _dry_run.facts(launched)
            wanted = 1 if dtype == "float64" else 512 // facts["block"]
            claimed = min(wanted, by_shared_memory(facts["shared_bytes"]))
            assert claimed >= 1
            assert facts["blocks_per_multiprocessor"] >= claimed, facts


@pytest.mark.parametrize("sources", [1, 2])
@pytest.mark.parametrize("dtype, itemsize", [("bfloat16", 2), ("float32", 4)])
def test_two_blocks_share_a_multiprocessor_where_rows_are_held(dtype, itemsize, sources):
    """Up to 1 MiB of a row; a longer one takes all the shared memory of its cluster's multiprocessors."""
    held = [n_cols for n_cols in VOCABULARIES if n_cols * itemsize * sources <= 2**20]
    assert len(held) >= 5
    for n_cols in held:
        plan = row_plan(4096, n_cols, (dtype,) * sources, "float32", "sm_90", 132)
        assert plan.held and plan.regime in ("short", "held", "cluster")
        assert by_shared_memory(plan.shared_bytes) >= 2
