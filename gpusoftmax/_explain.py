"""Show how a call on a GPU is launched: kernels, registers, shared memory, traffic, expected time. Needs no GPU."""

import argparse
import json
from typing import Any

from gpusoftmax import _checks, _dry_run, _options
from gpusoftmax.explain import explain

HELP = "how a call on a GPU is launched and how long its traffic takes, without a GPU too"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    archs = tuple(_dry_run.DEVICES)
    parser.add_argument("op", choices=_dry_run.OPS, metavar="OP", help=", ".join(_dry_run.OPS))
    parser.add_argument("--shape", type=_options.shape, required=True, metavar="ROWSxCOLS", help="of the logits")
    parser.add_argument("--dtype", choices=_checks.FLOATING, default="float32", help="of the logits (float32)")
    parser.add_argument(
        "--arch", choices=archs, metavar="ARCH", help=f"{', '.join(archs)} (default: this machine's GPU, or sm_90)"
    )
    _options.add_argument(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> None:
    options = dict(arguments.options)
    facts = explain(arguments.op, arguments.shape, dtype=arguments.dtype, arch=arguments.arch, **options)
    print(json.dumps(facts, indent=2) if arguments.json else _text(facts))


def _text(facts: dict[str, Any]) -> str:
    device, row = facts["device"], facts["row"]
    n_rows, shared = facts["n_rows"], facts["shared"]
    lines = [
        f"{facts['op']} {'x'.join(map(str, facts['shape']))} {facts['dtype']} on {facts['arch']} ({device['name']}, "
        f"{device['multiprocessors']} multiprocessors, {device['bytes_per_second'] / 1e9:.0f} GB/s {device['source']})",
        *(f"  {name} {given}" for name, given in facts["options"].items()),
        "",
        *_table(facts["kernels"]),
        "",
        f"a row    {_size(row['read'])} read{', each logit once' if row['once'] else ''}, "
        f"{_size(row['written'])} written",
        *([f"together {_size(shared)} read, once for all rows"] if shared else []),
        f"in all   {_size(n_rows * row['read'] + shared)} read, {_size(n_rows * row['written'])} written",
        f"expected {1e6 * facts['expected_seconds']:.4g} us for that traffic",
    ]
    busiest = max(kernel["grid"] for kernel in facts["kernels"])
    if busiest < device["multiprocessors"]:
        lines.append(f"         and longer: {busiest} of {device['multiprocessors']} multiprocessors have work")
    return "\n".join(lines)


def _table(kernels: list[dict[str, Any]]) -> list[str]:
    heads = {
        "kernel": "kernel",
        "regime": "regime",
        "grid": "blocks",
        "cluster": "cluster",
        "block": "threads",
        "registers": "registers",
        "shared_bytes": "shared bytes",
        "blocks_per_multiprocessor": "blocks per multiprocessor",
    }
    lines = [list(heads.values()), *([str(kernel[key]) for key in heads] for kernel in kernels)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(heads))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def _size(n_bytes: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if n_bytes < 1000:
            return f"{n_bytes:.4g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.4g} GB"
