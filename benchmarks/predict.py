"""Predicts every kernel's time on an H200 from what its machine code does: until there is a GPU to measure on.

A few rows of each case are run by the emulator, with the launch that the whole case would get; machine_code.py says
what instructions that takes, model.py what time. The records go to results/predicted-h200/, and tables of them into
kernels/README.md. Nothing of it is measured: it says where to look first.
"""

import dataclasses
import datetime
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np

import gpusoftmax
from benchmarks import machine_code, model, results
from benchmarks.cases import BFLOAT16
from benchmarks.measure import Report
from benchmarks.report import table
from benchmarks.suites import DECODE_ROWS, DECODE_VOCABULARIES, VOCABULARIES
from gpusoftmax import _dry_run, _imagined
from gpusoftmax.kernels.cuda import launch
from gpusoftmax.kernels.cuda.plan import OF_A_BATCH, Plan, Short
from tests import inputs
from tests.emulator import emulated_gpu
from tests.emulator.launch import Stats

README = Path(__file__).parents[1] / "kernels" / "README.md"
DIRECTORY = results.RESULTS / "predicted-h200"
_BEGIN, _END = "<!-- predictions: python -m benchmarks predict -->", "<!-- /predictions -->"
_ARCH = "sm_90"
_GIB = 2**30
DTYPES = ("bfloat16", "float32")
OPS = (
    *("softmax", "log_softmax", "cross_entropy", "cross_entropy_with_grad"),
    *("token_logprobs", "token_logprobs_and_entropy", "token_logprobs_and_rank"),  # with the rank there is the entropy
)
OTHERS = (
    "logsumexp",
    "softmax_backward",
    "log_softmax_backward",
    "top_logprobs",
    "sample",
    "sample_and_top_k",
    "kl_div",
    "kl_div_with_grad",
)
OPTIONS = {
    "token_logprobs_and_entropy": {"return_entropy": True},
    "token_logprobs_and_rank": {"return_entropy": True, "return_rank": True},
    "sample_and_top_k": {"top_k": 50},
}
_REGIMES = ("short", "held", "cluster", "online")
TYPICAL = (32000, 128256, 8192, 1000, 1048576)
"""Each regime is shown at the first of these lengths that gets it."""
TYPICAL_LOGITS = 32000
"""At least so many are looked at: what a row takes depends on its largest logits, a second look above all."""


class Case(NamedTuple):
    op: str
    dtype: str
    n_rows: int
    n_cols: int

    @classmethod
    def of(cls, record: dict) -> "Case":
        return cls(*(record[field] for field in cls._fields))

    @property
    def function(self) -> str:
        """The public function that is called, with OPTIONS."""
        return self.op.partition("_and_")[0]

    @property
    def numpy_dtype(self) -> np.dtype:
        return BFLOAT16 if self.dtype == "bfloat16" else np.dtype(self.dtype)

    @property
    def is_decode(self) -> bool:
        return self.n_rows in DECODE_ROWS

    @property
    def copy_seconds(self) -> float:
        """Of as many bytes as the op has to move."""
        one = ("cross_entropy", "logsumexp", "token_logprobs", "top_logprobs", "sample")
        three = self.op.endswith("_backward") or self.op == "kl_div_with_grad"
        arrays = 1 if self.function in one else 3 if three else 2
        return arrays * self.n_rows * self.n_cols * self.numpy_dtype.itemsize / model.COPY_BYTES_PER_SECOND


def run(report: Report, ops: Sequence[str] = ()) -> None:
    """Predicts the cases of these ops, or of all, and writes the tables anew from what is saved of the others too."""
    if unknown := sorted(set(ops) - {*OPS, *OTHERS}):
        raise SystemExit(f"predict: no op {unknown[0]!r}, expected some of {', '.join((*OPS, *OTHERS))}")
    records = []
    for case in cases():
        if not ops or case.op in ops:
            records.append(record(case))
            report(line(records[-1]))
    write(records)


def cases() -> Iterator[Case]:
    """About a GiB of logits for every length, and the few rows of a decoding step."""
    for dtype in DTYPES:
        yield from (_gibibyte(op, dtype, n_cols) for op in OPS for n_cols in VOCABULARIES)
        yield from (_gibibyte(op, dtype, n_cols) for op in OTHERS for n_cols in TYPICAL)
        yield from (Case("softmax", dtype, n_rows, n_cols) for n_rows in DECODE_ROWS for n_cols in DECODE_VOCABULARIES)
    yield from (_gibibyte("softmax", dtype, 32000) for dtype in ("float16", "float64"))


def _gibibyte(op: str, dtype: str, n_cols: int) -> Case:
    return Case(op, dtype, _GIB // (n_cols * Case(op, dtype, 0, 0).numpy_dtype.itemsize), n_cols)


# ---------------------------------------------------------------- one case


def record(case: Case) -> dict:
    """What is predicted for a case, and from what. The loss is that of each row: the mean takes two kernels more."""
    shape = case.n_rows, case.n_cols
    launches = _dry_run.launches(case.function, shape, case.dtype, _ARCH, **OPTIONS.get(case.op, {}))
    whole = next(launch for launch in launches if launch.plan.regime not in OF_A_BATCH)
    facts = _dry_run.facts(whole)
    row = gpusoftmax.explain(case.function, shape, dtype=case.dtype, arch=_ARCH)["row"]
    n_bytes = case.n_rows * (row["read"] + row["written"])
    stats, rows = _emulated(case, whole.plan)
    instructions = machine_code.executed(whole.image.ptx, _ARCH, stats.warp_lines)
    share = case.n_rows / rows
    layout = model.Layout(facts["grid"], facts["cluster"], facts["block"] // 32, facts["blocks_per_multiprocessor"])
    found = model.predict(layout, Counter({one: share * count for one, count in instructions.items()}), n_bytes)
    per_element = 32 / (rows * case.n_cols)  # a warp instruction serves 32 lanes
    return {
        **case._asdict(),
        **facts,
        "bytes_per_element": n_bytes / (case.n_rows * case.n_cols),
        "instructions_per_element": per_element * instructions.total(),
        "special_per_element": per_element * sum(n for one, n in instructions.items() if one.startswith("MUFU")),
        "ptx_instructions_per_element": per_element * stats.warp_instructions.total(),
        "part_us": {name: 1e6 * seconds for name, seconds in found.parts.items()},
        "bound": found.bound,
        "predicted_us": 1e6 * found.seconds,
        "copy_us": 1e6 * case.copy_seconds,
        "measured": False,
        "commit": results.commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _emulated(case: Case, plan: Plan) -> tuple[Stats, int]:
    """The rows of one block, of as many as have enough logits to be typical, or of one cluster, launched as all are;
    and how many rows that is.
    """
    blocks = max(TYPICAL_LOGITS // case.n_cols, 1)
    rows = plan.threads // plan.split.lanes if isinstance(plan.split, Short) else blocks
    few = dataclasses.replace(plan, rows=rows, blocks=plan.cluster * (1 if isinstance(plan.split, Short) else blocks))
    logits = inputs.make("spread", (rows + 1, case.n_cols), case.numpy_dtype)[1:]  # as aligned as most rows are
    with (
        emulated_gpu(_ARCH, track=False, check_race=False) as gpu,
        mock.patch.object(launch, "row_plan", lambda *_: few),
    ):
        arguments, options = [gpu.array(logits)], dict(OPTIONS.get(case.op, {}))
        if case.op.endswith("_backward"):
            arguments.append(gpu.array(logits))
        if case.op.startswith(("cross_entropy", "token_logprobs")):
            arguments.append(gpu.array(inputs.targets(*logits.shape)))
        if case.op.startswith("kl_div"):
            arguments.append(gpu.array(inputs.make("spread", logits.shape, case.numpy_dtype, seed=1)))
        if case.op.startswith(("cross_entropy", "kl_div")):
            options["reduction"] = "none"
        if case.op == "top_logprobs":
            arguments.append(_imagined.TOP)
        if case.function == "sample":
            options["rng"] = 0
        getattr(gpusoftmax, case.function)(*arguments, **options)
        return gpu.stats[-1], rows


def line(record: dict) -> str:
    parts = ", ".join(f"{name} {us:.4g}" for name, us in record["part_us"].items() if us)
    case = f"{record['op']} {record['n_rows']}x{record['n_cols']} {record['dtype']}"
    return f"{case:48}{record['regime']:8} {record['predicted_us']:9.4g} us predicted ({record['bound']}: {parts})"


# ---------------------------------------------------------------- files


def write(records: Sequence[dict], directory: Path = DIRECTORY, readme: Path = README) -> None:
    """The records as JSON lines, a file for each op, and the tables between two marks of a page."""
    directory.mkdir(parents=True, exist_ok=True)
    for op in dict.fromkeys(one["op"] for one in records):
        lines = [json.dumps(one) + "\n" for one in records if one["op"] == op]
        (directory / f"{op}.jsonl").write_text("".join(lines))
    records = saved(directory)
    commits = dict.fromkeys(one["commit"] for one in sorted(records, key=lambda one: one["date"]))
    head = (
        f"Predicted, not measured: {max(one['date'] for one in records)[:10]}, commit "
        f"{', '.join(commits)}, for an H200: {model.MULTIPROCESSORS} multiprocessors (SM) at {model.CLOCK / 1e9} GHz "
        f"and a copy of {model.COPY_BYTES_PER_SECOND / 1e12} TB/s. `benchmarks/model.py` says what is assumed, "
        f"`benchmarks/machine_code.py` how instructions are counted; `benchmarks/results/{DIRECTORY.name}/` has all "
        f"numbers."
    )
    before, rest = readme.read_text().split(_BEGIN)
    after = rest.split(_END)[1]
    parts = [before + _BEGIN, head, *tables(records), _END]
    readme.write_text("\n\n".join(parts) + after)


def saved(directory: Path = DIRECTORY) -> list[dict]:
    """All records of a directory."""
    return [one for path in sorted(directory.glob("*.jsonl")) for one in results.load(path)]


def tables(records: Sequence[dict]) -> Iterator[str]:
    yield (
        "Each kernel in each regime, for 1 GiB of logits: blocks (of 256 threads) that fit on an SM, machine "
        "instructions of a lane for each logit (of them on the special units), and the microseconds for which it "
        "occupies each part of the device."
    )
    yield table(_kernels(records))
    yield (
        "1 GiB of logits, by the number of columns: percent of the speed of a copy of as many bytes. The losses are "
        "those of the rows: a mean takes two kernels more."
    )
    big = {(one["op"], one["dtype"], one["n_cols"]): one for one in records if not Case.of(one).is_decode}
    known = {one["op"] for one in records}
    keys = [(op, dtype) for op in OPS if op in known for dtype in DTYPES]
    yield table(_grid("", keys, VOCABULARIES, big, lambda one: f"{100 * one['copy_us'] / one['predicted_us']:.0f}"))
    yield f"softmax of few rows, microseconds, {1e6 * model.START_SECONDS:.0f} of them until the kernel has started."
    few = {(one["dtype"], one["n_rows"], one["n_cols"]): one for one in records if Case.of(one).is_decode}
    keys = [(dtype, n_rows) for dtype in DTYPES for n_rows in DECODE_ROWS]
    yield table(_grid("rows", keys, DECODE_VOCABULARIES, few, lambda one: f"{one['predicted_us']:.1f}"))


def _grid(head: str, keys: Sequence[tuple], columns: Sequence[int], records: dict, show) -> list[list[str]]:
    lines = [[head, *map(str, columns)]]
    for key in keys:
        found = [records.get((*key, column)) for column in columns]
        lines.append([" ".join(map(str, key)), *("" if one is None else show(one) for one in found)])
    return lines


_UNITS = ("memory", "issue", "integer", "special", "shared")


def _kernels(records: Sequence[dict]) -> list[list[str]]:
    heads = ["", "regime", "columns", "registers", "shared KiB", "blocks per SM", "bytes per logit"]
    lines = [[*heads, "instructions", *(f"{unit} us" for unit in _UNITS), "predicted us", "bound by"]]
    shown = {}
    for n_cols in TYPICAL:
        for one in records:
            if one["n_cols"] == n_cols and not Case.of(one).is_decode:
                shown.setdefault((one["op"], one["dtype"], one["regime"]), one)
    order = {name: k for k, name in enumerate((*OPS, *OTHERS, *DTYPES, "float16", "float64", *_REGIMES))}
    for (op, dtype, regime), one in sorted(shown.items(), key=lambda item: [order[name] for name in item[0]]):
        cluster = f" of {one['cluster']}" if one["cluster"] > 1 else ""
        numbers = one["registers"], round(one["shared_bytes"] / 1024), one["blocks_per_multiprocessor"]
        instructions = f"{one['instructions_per_element']:.0f} ({one['special_per_element']:.1f})"
        parts = [f"{one['part_us'][unit]:.0f}" for unit in _UNITS]
        lines.append(
            [
                f"{op} {dtype}",
                regime + cluster,
                str(one["n_cols"]),
                *map(str, numbers),
                f"{one['bytes_per_element']:.3g}",
            ]
            + [instructions, *parts, f"{one['predicted_us']:.0f}", one["bound"]]
        )
    return lines
