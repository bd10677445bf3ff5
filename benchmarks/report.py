"""Tables and plots from the saved results: results/<device>/README.md, and a summary between two marks of README.md.

A number in the column of another library is its time over ours: 2.0 means that it takes twice as long, and less than 1
that it is faster. `copy` is the share of the speed of a plain copy of the same bytes that we reach.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from benchmarks import goals, layer, plots, results
from benchmarks.cases import OPS
from benchmarks.providers import COPY, OURS, PROVIDERS

README = Path(__file__).parents[1] / "README.md"
_BEGIN = "<!-- benchmarks: python -m benchmarks report -->"
_END = "<!-- /benchmarks -->"

Measured = dict[str, dict]
"""The records of one case: provider -> record."""


def write(root: Path = results.RESULTS, readme: Path = README) -> None:
    """Writes everything anew. The summary is of the CPU and the GPU that were measured last."""
    sections = {}
    for directory in sorted(root.glob("[cg]pu-*")):
        ops = {op: list(by_case(results.load(directory / f"{op}.jsonl"))) for op in OPS}
        ops = {op: found for op, found in ops.items() if found}
        try:
            figures = plots.write(directory, ops)
        except ImportError as error:
            print(f"no plots: pip install 'gpusoftmax[bench]' ({error})")
            figures = plots.present(directory, ops)
        text = "\n\n".join([f"# {directory.name}", _circumstances(ops), *_details(ops), *map(_figure, figures)])
        layers = results.load(directory / f"{layer.OP}.jsonl")
        if layers:
            text += f"\n\n## {layer.OP}"
        for _, records in itertools.groupby(layers, lambda record: (record["dtype"], record["n_cols"])):
            text += f"\n\n{_layer(list(records))}"
        text += f"\n\n{_goals(directory)}"
        (directory / "README.md").write_text(text + "\n")
        link = f"[{directory.name}](benchmarks/results/{directory.name}/README.md)"
        date = max(record["date"] for cases in ops.values() for case in cases for record in case.values())
        section = f"{link}: {_circumstances(ops)}\n\n" + table(_summary(ops))
        target = directory.name[:3]
        sections[target] = max(sections.get(target, ("", "")), (date, section))
    text = readme.read_text()
    before, rest = text.split(_BEGIN)
    after = rest.split(_END)[1]
    readme.write_text("\n\n".join([before + _BEGIN, *(section for _, section in sections.values()), _END]) + after)


def tell_goals(say: Callable[[str], None], root: Path = results.RESULTS) -> None:
    """The figures that the project has set itself, of every device."""
    for directory in sorted(root.glob("[cg]pu-*")):
        say(f"# {directory.name}\n\n{_goals(directory)}\n")


def _goals(directory: Path) -> str:
    found = goals.of_device(directory)
    return f"## Goals\n\n{goals.summary(found)}.\n\n{table(goals.lines(found))}"


def by_case(records: Iterable[dict]) -> Iterator[Measured]:
    """The records, which are sorted, case by case; a case without a measurement of our own is left out."""
    cases: dict[tuple, Measured] = {}
    for record in records:
        key = tuple(record.get(name) for name in ("op", "dtype", "n_cols", "n_rows", "threads"))
        cases.setdefault(key, {})[record["provider"]] = record
    return (case for case in cases.values() if OURS in case)


def ratio(case: Measured, provider: str) -> float | None:
    """A provider's time over ours."""
    if provider not in case:
        return None
    return case[provider]["median_ms"] / case[OURS]["median_ms"]


def _circumstances(ops: dict[str, list[Measured]], chosen: str = "quietest") -> str:
    """When and with what, in a line; the extremes where cases differ."""
    records = [case[OURS] for cases in ops.values() for case in cases]
    days = sorted({record["date"][:10] for record in records})
    versions = {f"{name} {version}" for record in records for name, version in record["versions"].items()}
    threads = {f"{record['threads']} threads" for record in records if "threads" in record}
    attempts = sorted({len(record["attempts_ms"]) for record in records})
    counted = f"{chosen} of {attempts[0]}" + (f" to {attempts[-1]}" if len(attempts) > 1 else "") + " attempts"
    commits = sorted({str(record["commit"]) for record in records})
    shown = commits[0] if len(commits) == 1 else f"{len(commits)} commits"
    when = " to ".join(dict.fromkeys((days[0], days[-1])))
    return ", ".join([when, shown, *sorted(threads), counted, *sorted(versions)])


def _layer(records: Sequence[dict]) -> str:
    first = records[0]
    shape = f"{first['n_rows']} rows x {first['n_features']} features x {first['n_cols']} classes, {first['dtype']}"
    circumstances = _circumstances({layer.OP: [{OURS: record} for record in records]}, "best and median")
    return f"{shape}: {circumstances}\n\n{table(layer.lines(records))}"


def _rivals(ops: dict[str, list[Measured]]) -> list[str]:
    """In the order of providers.py."""
    present = {name for cases in ops.values() for case in cases for name in case}
    return [name for name in PROVIDERS if name in present and name != OURS]


def _details(ops: dict[str, list[Measured]]) -> Iterator[str]:
    for op, cases in ops.items():
        rivals = _rivals({op: cases})
        lines = [["rows x columns", "dtype", "ms", "GB/s", COPY, *rivals]]
        for case in cases:
            ours = case[OURS]
            milliseconds = ours["median_ms"]
            lines.append(
                [
                    f"{ours['n_rows']}x{ours['n_cols']}",
                    ours["dtype"],
                    f"{milliseconds:.4g}",
                    f"{ours['bytes'] / milliseconds / 1e6:.4g}",
                    _percent(ratio(case, COPY)),
                    *(_times(ratio(case, name)) for name in rivals),
                ]
            )
        yield f"## {op}\n\n{table(lines)}"


def _summary(ops: dict[str, list[Measured]]) -> list[list[str]]:
    """A line per op and dtype: the geometric mean over its shapes, and the worst and the best of them."""
    rivals = [name for name in _rivals(ops) if not name.startswith(OURS)]
    lines = [["", "shapes", f"of a {COPY}'s speed", *(f"{name} / ours" for name in rivals)]]
    for op, cases in ops.items():
        for dtype in dict.fromkeys(case[OURS]["dtype"] for case in cases):
            chosen = [case for case in cases if case[OURS]["dtype"] == dtype]
            cells = [_range([ratio(case, name) for case in chosen], _times) for name in rivals]
            lines.append(
                [f"{op} {dtype}", str(len(chosen)), _range([ratio(c, COPY) for c in chosen], _percent), *cells]
            )
    return lines


def _range(ratios: Sequence[float | None], show) -> str:
    known = [one for one in ratios if one is not None]
    if not known:
        return ""
    mean = math.exp(sum(map(math.log, known)) / len(known))
    return show(mean) if len(known) == 1 else f"{show(mean)} ({show(min(known))} to {show(max(known))})"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 10 else f"{value:.0f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f}%"


def table(lines: Sequence[Sequence[str]]) -> str:
    """In Markdown; the first line is the head."""
    head, *body = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([head, "|---" * len(lines[0]) + "|", *body])


def _figure(name: str) -> str:
    return f"![{name.removesuffix('.svg')}]({name})"
