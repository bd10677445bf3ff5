"""Compile the CUDA kernels ahead of time, into the cache of compiled kernels. Needs no GPU."""

import argparse

from gpusoftmax import _checks, _dry_run, _options
from gpusoftmax._progress import Progress

HELP = "compile the CUDA kernels ahead of time, without a GPU too"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    archs = tuple(_dry_run.DEVICES)
    parser.add_argument(
        "--arch", nargs="+", choices=archs, metavar="ARCH", help=f"{', '.join(archs)} (default: this machine's GPUs)"
    )
    parser.add_argument("--ops", nargs="+", choices=_dry_run.OPS, metavar="OP", help=f"{', '.join(_dry_run.OPS)} (all)")
    parser.add_argument(
        "--dtypes", nargs="+", choices=_checks.FLOATING, metavar="DTYPE", help=f"{', '.join(_checks.FLOATING)} (all)"
    )
    _options.add_argument(parser)


def run(arguments: argparse.Namespace) -> None:
    images = _dry_run.images(arguments.arch, arguments.ops, arguments.dtypes, **dict(arguments.options))
    with Progress("compiling", len(images)) as progress:
        for done, image in enumerate(images):
            progress.update(done, f"{image.kernel} for {image.arch}")
            image.make()
        progress.update(len(images))
    archs = ", ".join(sorted({image.arch for image in images}))
    print(f"{len(images)} kernels for {archs} are in the cache")
