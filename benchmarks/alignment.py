"""What it costs that arrays on the CPU begin an element, or a byte, behind a boundary of 64 bytes.

Every array of a call, results included, begins there. The calls take turns in one process (timing.py).
"""

from benchmarks import arrays, measure, results, timing
from benchmarks.cases import Case
from benchmarks.measure import Effort, Report
from benchmarks.providers import OURS, PROVIDERS

OP = "alignment"
ALIGNED = "aligned"
OFF = "an element off", "a byte off"
CASES = tuple(
    Case(op, *shape, dtype)
    for op in ("softmax", "log_softmax", "logsumexp", "cross_entropy_with_grad", "softmax_backward")
    for dtype in ("float32", "float64", "bfloat16")
    for shape in ((4096, 1024), (256, 32768))
)


def run(effort: Effort, save: bool, report: Report, cases: tuple[Case, ...] = CASES) -> None:
    ours = PROVIDERS[OURS].calls()
    for case in cases:
        behind = dict(zip((ALIGNED, *OFF), (0, case.numpy_dtype.itemsize, 1), strict=True))
        calls = {place: ours[case.op](arrays.on_cpu(case, "numpy", offset)) for place, offset in behind.items()}
        with measure.threads(effort.threads):
            seconds, medians = timing.interleaved(calls, effort.attempts, effort.samples, effort.seconds)
        records = [
            {
                "op": OP,
                "n_rows": case.n_rows,
                "n_cols": case.n_cols,
                "dtype": case.dtype,
                "provider": f"{case.op}, {place}",
                **timing.summary(taken),
                "attempts_ms": [1e3 * median for median in medians[place]],
                "threads": effort.threads,
                **results.environment("cpu"),
            }
            for place, taken in seconds.items()
        ]
        aligned, *off = (record["median_ms"] for record in records)
        costs = ", ".join(f"{place} {ms / aligned:.3f} times" for place, ms in zip(OFF, off, strict=True))
        report(f"{str(case):50}{ALIGNED} {aligned:.4f} ms, {costs}")
        if save:
            results.save(records)
