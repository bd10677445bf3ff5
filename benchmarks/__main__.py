"""python -m benchmarks softmax --shape 4096x1024 256x32768 --dtype float32: checks each answer, then times it."""

import argparse
import datetime
import importlib.metadata
import json
import platform
import re
import subprocess
from pathlib import Path

from benchmarks.providers import OPS
from benchmarks.timing import interleaved, summary

RESULTS = Path(__file__).parent / "results"
BASELINE = "numpy"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("op", choices=OPS)
    parser.add_argument("--shape", nargs="+", default=["4096x1024", "256x32768", "16x262144"], help="ROWSxCOLS ...")
    parser.add_argument("--dtype", nargs="+", default=["float32"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--attempts", type=int, default=3)
    parser.add_argument(
        "--save", action="store_true", help="append the results to benchmarks/results/<device>/<op>.jsonl"
    )
    arguments = parser.parse_args()
    rows = []
    for dtype in arguments.dtype:
        for shape in arguments.shape:
            n_rows, n_cols = map(int, shape.split("x"))
            rows += measure(arguments.op, n_rows, n_cols, dtype, arguments.repeats, arguments.attempts)
    if arguments.save:
        path = RESULTS / device_name() / f"{arguments.op}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        print(f"appended to {path}")


def measure(op: str, n_rows: int, n_cols: int, dtype: str, repeats: int, attempts: int) -> list[dict]:
    case = OPS[op](n_rows, n_cols, dtype)
    errors = {"gpusoftmax": case.check(case.calls["gpusoftmax"]())}
    seconds = interleaved(case.calls, repeats, attempts)
    rows = []
    for provider, times in seconds.items():
        row = {
            "op": op,
            "provider": provider,
            "n_rows": n_rows,
            "n_cols": n_cols,
            "dtype": dtype,
            **summary(times),
            "attempts": attempts,
            "bytes": case.bytes_moved,
            "worst_ulp": errors.get(provider),
            **environment(),
        }
        rows.append(row)
        ratio = summary(seconds[BASELINE])["median_ms"] / row["median_ms"]
        rate = case.bytes_moved / row["median_ms"] / 1e6
        print(
            f"{op} {n_rows}x{n_cols} {dtype:9} {provider:11} {row['median_ms']:9.3f} ms {rate:7.1f} GB/s "
            f"{ratio:6.2f} x {BASELINE}"
        )
    return rows


def environment() -> dict:
    packages = ("gpusoftmax", "numpy", "numba")
    return {
        "device": device_name(),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def device_name() -> str:
    """The processor's name as a folder name."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        name = re.search(r"model name\s*:\s*(.+)", text)[1]
    except (OSError, TypeError):
        name = platform.processor() or platform.machine()
    return "cpu-" + re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _commit() -> str | None:
    command = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    main()
