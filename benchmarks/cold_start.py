"""What the first call of a process takes on the CPU, to import gpusoftmax and to run the op.

Numba is imported already, and the kernel is in the cache on disk.
"""

import json
import statistics
import subprocess
import sys

from benchmarks import results
from benchmarks.cases import OPS, Case
from benchmarks.measure import Report

OP = "cold_start"
CASES = tuple(Case(op, 64, 4096, dtype) for op in OPS for dtype in ("float32", "bfloat16"))
_CHILD = """
import json, sys, time
import numba
start = time.perf_counter()
import gpusoftmax
imported = time.perf_counter() - start
from benchmarks import arrays
from benchmarks.cases import Case
from benchmarks.providers import PROVIDERS
call = PROVIDERS["gpusoftmax"].calls()[sys.argv[1]](arrays.on_cpu(Case(*json.loads(sys.argv[2])), "numpy"))
start = time.perf_counter()
call()
print(imported + time.perf_counter() - start)
"""


def run(attempts: int, save: bool, report: Report, cases: tuple[Case, ...] = CASES) -> None:
    for case in cases:
        seconds_of_a_process(case)  # compiles what is not in the cache
        taken = [1e3 * seconds_of_a_process(case) for _ in range(attempts)]
        record = {
            "op": OP,
            "n_rows": case.n_rows,
            "n_cols": case.n_cols,
            "dtype": case.dtype,
            "provider": case.op,
            "median_ms": statistics.median(taken),
            "attempts_ms": taken,
            **results.environment("cpu"),
        }
        report(f"{str(case):50}{record['median_ms'] / 1e3:.3f} s")
        if save:
            results.save([record])


def seconds_of_a_process(case: Case) -> float:
    command = [sys.executable, "-c", _CHILD, case.op, json.dumps(case)]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
