"""Measures gpusoftmax beside other libraries. Every answer is checked before it is timed.

python -m benchmarks cpu | gpu [--quick]                      the whole suite for a target
python -m benchmarks softmax --shape 4096x1024 --dtype float32 [--target gpu]
python -m benchmarks layer [--target gpu]                     a linear layer with its loss: seconds and memory
python -m benchmarks alignment                                what odd addresses cost on the CPU
python -m benchmarks cold_start                               what a process's first call takes on the CPU
python -m benchmarks launch                                   what a call on a GPU costs on the host; needs no GPU
python -m benchmarks predict [--op OP ...]                    what an H200 should do: predicted on paper, not measured
python -m benchmarks transforms [--op OP ...]             instructions that a transform of logits costs; needs no GPU
python -m benchmarks report                                   tables and plots from the saved results
python -m benchmarks goals                                    which of the project's figures the saved results reach
"""

import argparse
import importlib
import time
from collections.abc import Sequence

from benchmarks import alignment, cold_start, gpu_timing, launch, layer, measure, report, results, suites
from benchmarks.cases import OPS, Case
from benchmarks.measure import Effort
from benchmarks.providers import DTYPES, PROVIDERS

_GPU_BUDGET = {False: 7 * 60.0, True: 45.0}
"""Seconds for the whole suite and for the quick one: what is left then is named instead of measured."""
_WITHOUT_CASES = {
    "alignment": lambda arguments: alignment.run(
        Effort(arguments.attempts or 5, threads=arguments.threads), arguments.save, print
    ),
    "cold_start": lambda arguments: cold_start.run(arguments.attempts or 5, arguments.save, print),
    "goals": lambda _: report.tell_goals(print),
    "layer": lambda arguments: layer.run(
        arguments.attempts or 7, arguments.threads, arguments.save, print, arguments.target, _layer_shape(arguments)
    ),
    "launch": lambda _: launch.run(print),
    "predict": lambda arguments: importlib.import_module("benchmarks.predict").run(
        print, arguments.op
    ),  # links kernels
    "report": lambda _: report.write(),
    "transforms": lambda arguments: importlib.import_module("benchmarks.transforms").run(print, arguments.op),
}
_ATTEMPTS = {"cpu": 15, "gpu": 5}
"""On a CPU that others share, some may be of quiet seconds: 3 of 15 were, of softmax 4096x1024 at 363e88b."""
_COMPILED = "torch.compile"
_MEASURED = "provider", "attempts", "threads", "budget", "save"
_OPTIONS = {
    "cpu": ("quick", *_MEASURED),
    "gpu": ("quick", *_MEASURED),
    **dict.fromkeys(OPS, ("target", "shape", "dtype", *_MEASURED)),
    "alignment": ("attempts", "threads", "save"),
    "cold_start": ("attempts", "save"),
    "layer": ("target", "shape", "attempts", "threads", "save"),
    "predict": ("op",),
    "transforms": ("op",),
}
"""What each command takes; the others nothing."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = _parser()
    arguments = parser.parse_args(argv)
    if problem := _misfit(arguments, parser):
        parser.error(problem)
    if arguments.what in _WITHOUT_CASES:
        _WITHOUT_CASES[arguments.what](arguments)
        return
    if arguments.what in ("cpu", "gpu"):
        target = arguments.what
        cases = getattr(suites, target)(arguments.quick)
    else:
        target = arguments.target
        cases = [
            Case(arguments.what, *shape, dtype)
            for dtype in arguments.dtype
            for shape in arguments.shape or [(4096, 1024)]
        ]
    effort = Effort(arguments.attempts or (2 if arguments.quick else _ATTEMPTS[target]), threads=arguments.threads)
    budget = arguments.budget or (_GPU_BUDGET[arguments.quick] if arguments.what == "gpu" else float("inf"))
    run(target, cases, effort, budget, arguments.provider, arguments.save)


def run(target: str, cases: Sequence[Case], effort: Effort, budget: float, names: Sequence[str], save: bool) -> None:
    start = time.monotonic()
    providers = measure.available(target, print)
    if names:
        providers = {name: calls for name, calls in providers.items() if name in (*names, "gpusoftmax")}
    if target == "gpu":
        library = "torch" if "torch" in providers else "cupy"
        clock = gpu_timing.torch_clock() if library == "torch" else gpu_timing.cupy_clock()
    side_by_side = measure.SIDE_BY_SIDE if target == "cpu" else 1
    for first in range(0, len(cases), side_by_side):
        some = cases[first : first + side_by_side]
        which = ", ".join(map(str, some))
        spent = (time.monotonic() - start) / budget
        if spent > 1:
            print(f"{which}: not measured, the {budget:.0f} seconds are over")
            continue
        if _COMPILED in providers and spent > 0.1 + first / len(cases):
            print(f"{which}: {_COMPILED} is left out: its compilations take too much of the {budget:.0f} seconds")
            taking_part = {name: calls for name, calls in providers.items() if name != _COMPILED}
        else:
            taking_part = providers
        if target == "cpu":
            measured = measure.on_cpu(some, taking_part, effort, print)
        else:
            measured = [measure.on_gpu(case, taking_part, effort, clock, library, print) for case in some]
        for records in measured:
            for line in measure.line(records):
                print(line, flush=True)
            if save:
                results.save(records)


def _layer_shape(arguments: argparse.Namespace) -> tuple[int, int, int] | None:
    return arguments.shape[0] if arguments.shape else None


def _misfit(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> str | None:
    """What was given that would be ignored, or fits nothing, after hours of measuring perhaps."""
    what = arguments.what
    for name, given in vars(arguments).items():
        if name not in ("what", *_OPTIONS.get(what, ())) and given != parser.get_default(name):
            commands = [command for command in ("cpu", "gpu", *_WITHOUT_CASES) if name in _OPTIONS.get(command, ())]
            takers = [*commands, *(["an OP"] if name in _OPTIONS[OPS[0]] else [])]
            return f"{what} takes no --{name}: it is for {', '.join(takers)}"
    sizes = 3 if what == "layer" else 2
    if any(len(shape) != sizes for shape in arguments.shape or ()):
        return f"--shape of {what} has {sizes} sizes"
    if what == "layer" and arguments.shape and len(arguments.shape) > 1:
        return "--shape of layer is one"
    return None


def _shape(text: str) -> tuple[int, ...]:
    return tuple(map(_positive, text.split("x")))


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what",
        choices=("cpu", "gpu", *_WITHOUT_CASES, *OPS),
        metavar=" | ".join(("cpu", "gpu", *_WITHOUT_CASES, "OP")),
    )
    parser.add_argument("--quick", action="store_true", help="a few cases of the suite, in less than a minute")
    parser.add_argument("--target", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--shape", nargs="+", type=_shape, help="ROWSxCOLS; of a layer one ROWSxFEATURESxCLASSES")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument(
        "--provider", nargs="+", choices=PROVIDERS, default=[], help="these beside gpusoftmax instead of all"
    )
    parser.add_argument("--op", nargs="+", default=[], help="what is predicted or counted (default: all)")
    parser.add_argument(
        "--attempts",
        type=_positive,
        help="the quietest of so many is reported (default 15 on the CPU, 5 on a GPU, quick 2)",
    )
    parser.add_argument("--threads", type=_positive, default=2, help="of every provider on the CPU (default 2)")
    parser.add_argument("--budget", type=float, help="seconds after which no further case is begun")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<device>/<op>.jsonl")
    return parser


if __name__ == "__main__":
    main()
