"""Figures of the results of one device: bars of ratios for a CPU; bandwidth and latency for a GPU."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.providers import COPY, OURS, PROVIDERS

_DECODE_ROWS = 64
"""Cases of at most so many rows are about latency, larger ones about bandwidth."""
_COLORS = dict(zip([OURS, *(name for name in PROVIDERS if name != OURS)], [f"C{k}" for k in range(10)], strict=False))


def write(directory: Path, ops: dict[str, list[dict[str, dict]]]) -> list[str]:
    """Writes the SVG files and returns their names. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "gpusoftmax"  # the same file from the same results
    written = []
    for name, draw in _figures(directory, ops):
        figure = draw(pyplot)
        figure.savefig(directory / name, metadata={"Date": None}, bbox_inches="tight")
        pyplot.close(figure)
        written.append(name)
    return written


def present(directory: Path, ops: dict[str, list[dict[str, dict]]]) -> list[str]:
    """The files that were written before, in the order of `write`. Needs no matplotlib."""
    return [name for name, _ in _figures(directory, ops) if (directory / name).exists()]


def _figures(directory: Path, ops: dict[str, list[dict[str, dict]]]) -> Iterator[tuple[str, Callable[[Any], Any]]]:
    """The name of each file, and what draws the figure with pyplot."""
    target = directory.name.partition("-")[0]
    for op, cases in ops.items():
        for name, draw in _figures_of(target, op, cases):
            yield f"{name}.svg", draw


def _figures_of(target: str, op: str, cases: Sequence[dict[str, dict]]) -> Iterator[tuple[str, Callable[[Any], Any]]]:
    if target == "cpu":
        yield op, partial(_ratios, op=op, cases=cases)
        return
    for dtype in dict.fromkeys(case[OURS]["dtype"] for case in cases):
        chosen = [case for case in cases if case[OURS]["dtype"] == dtype]
        large = [case for case in chosen if case[OURS]["n_rows"] > _DECODE_ROWS]
        small = [case for case in chosen if case[OURS]["n_rows"] <= _DECODE_ROWS]
        if large:
            yield f"{op}-{dtype}-bandwidth", partial(_bandwidth, title=f"{op}, {dtype}, about 1 GiB", cases=large)
        if small:
            yield f"{op}-{dtype}-latency", partial(_latency, title=f"{op}, {dtype}", cases=small)


def _ratios(pyplot, op: str, cases: Sequence[dict[str, dict]]) -> Any:
    """For every case a bar per library: its time over ours, on a logarithmic axis that starts at 1."""
    names = [name for name in (*PROVIDERS, COPY) if name != OURS and any(name in case for case in cases)]
    figure, axes = pyplot.subplots(figsize=(8, 0.6 + 0.14 * len(cases) * (len(names) + 1)))
    height = 1 / (len(names) + 1)
    for k, name in enumerate(names):
        bars = [(n, case[name]["median_ms"] / case[OURS]["median_ms"]) for n, case in enumerate(cases) if name in case]
        axes.barh(
            [n + (k + 0.5) * height - 0.5 for n, _ in bars],
            [ratio - 1 for _, ratio in bars],
            height,
            left=1,
            label=name,
            color="0.6" if name == COPY else _COLORS[name],
        )
    labels = [f"{case[OURS]['n_rows']}x{case[OURS]['n_cols']} {case[OURS]['dtype']}" for case in cases]
    axes.set_yticks(range(len(cases)), labels)
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("time / gpusoftmax's time (right of 1: slower than gpusoftmax)")
    axes.set_title(op)
    axes.legend(fontsize="small")
    return figure


def _bandwidth(pyplot, title: str, cases: Sequence[dict[str, dict]]) -> Any:
    figure, axes = pyplot.subplots(figsize=(7, 4))
    _lines(axes, cases, "n_cols", lambda record: record["bytes"] / record["median_ms"] / 1e6)
    axes.set_ylim(0)
    axes.set(title=title, xlabel="columns", ylabel="GB/s of the bytes that have to be moved")
    axes.legend(fontsize="small")
    return figure


def _latency(pyplot, title: str, cases: Sequence[dict[str, dict]]) -> Any:
    columns = sorted({case[OURS]["n_cols"] for case in cases})
    figure, panels = pyplot.subplots(1, len(columns), figsize=(3.2 * len(columns), 3.2), sharey=True, squeeze=False)
    for axes, n_cols in zip(panels[0], columns, strict=True):
        chosen = [case for case in cases if case[OURS]["n_cols"] == n_cols]
        _lines(axes, chosen, "n_rows", lambda record: 1e3 * record["median_ms"])
        axes.set_yscale("log")
        axes.set(title=f"{n_cols} columns", xlabel="rows")
    panels[0][0].set_ylabel("microseconds")
    panels[0][-1].legend(fontsize="small")
    figure.suptitle(title)
    return figure


def _lines(axes, cases: Sequence[dict[str, dict]], against: str, value: Callable[[dict], float]) -> None:
    """A line per library; the copy, which is the speed of light here, is dashed."""
    for name in (*_COLORS, COPY):
        points = sorted((case[name][against], value(case[name])) for case in cases if name in case)
        if points:
            style = {"color": "black", "linestyle": "--"} if name == COPY else {"color": _COLORS[name], "marker": "o"}
            axes.plot(*zip(*points, strict=True), label=name, **style)
    axes.set_xscale("log", base=2)
