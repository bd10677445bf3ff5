"""The command line: `gpusoftmax` or `python -m gpusoftmax`. One file per command.

A command's file has HELP, add_arguments(parser) and run(arguments). Errors become one line on stderr and exit code 2,
interrupts (Ctrl-C, SIGTERM, SIGHUP) exit code 130. `python -X dev -m gpusoftmax ...` shows the traceback instead.
"""

import argparse
import contextlib
import os
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from typing import NoReturn

import gpusoftmax
from gpusoftmax import _compile, _demo, _explain, _info, _normalize, _score

COMMANDS = {
    "info": _info,
    "demo": _demo,
    "normalize": _normalize,
    "score": _score,
    "compile": _compile,
    "explain": _explain,
}
FAILED = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells count
_CLEAN_UP_SECONDS = 1.0
"""To close and remove a temporary file; a system call that takes longer is not broken off by a signal."""


class _Parser(argparse.ArgumentParser):
    """argparse, with the error alone instead of the usage and the error."""

    def error(self, message: str) -> NoReturn:
        self.exit(FAILED, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed before Python started: what is said goes nowhere
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as exit:  # after --help, --version or an error
        return _flushed("gpusoftmax", exit.code or 0)
    with contextlib.suppress(AttributeError):  # a file name or a token may have letters that the terminal has not
        sys.stdout.reconfigure(errors="backslashreplace")
    name = f"gpusoftmax {arguments.command}"
    with warnings.catch_warnings(), _interrupts():
        warnings.showwarning = _show_warning
        try:
            COMMANDS[arguments.command].run(arguments)
            code = 0
        except KeyboardInterrupt:
            code = _fail(name, "interrupted", INTERRUPTED)
        except BrokenPipeError:  # the reader of our output, `head` for instance, has seen enough
            code = FAILED
        except Exception as error:
            if sys.flags.dev_mode:
                raise
            code = _fail(name, _describe(error), FAILED)
        return _flushed(name, code)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="gpusoftmax", description=gpusoftmax.__doc__)
    parser.add_argument("--version", action="version", version=f"gpusoftmax {gpusoftmax.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command", parser_class=_Parser)
    for name, command in COMMANDS.items():
        command.add_arguments(commands.add_parser(name, help=command.HELP, description=command.__doc__))
    return parser


def _fail(name: str, message: str, code: int) -> int:
    with contextlib.suppress(OSError):
        print(f"{name}: {message}", file=sys.stderr, flush=True)
    return code


def _flushed(name: str, code: int) -> int:
    """The exit code once the output is out. What cannot be written is dropped: at exit Python would try again, complain
    in its own words and end with a code of its own.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED if code or isinstance(error, BrokenPipeError) else _fail(name, _describe(error), FAILED)
    return code


def _describe(error: Exception) -> str:
    """The error on one line. Errors that the commands and the checks raise speak for themselves."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = " ".join(text.split())
    if text and isinstance(error, ValueError | TypeError | RuntimeError | OSError | MemoryError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    with contextlib.suppress(OSError):
        print(f"gpusoftmax: {message}", file=sys.stderr)


@contextlib.contextmanager
def _interrupts():
    """SIGTERM and SIGHUP end a command as Ctrl-C does, by an exception: `normalize` removes its temporary file."""
    deaf_until = 0.0

    def interrupt(number, frame):
        # A second Ctrl-C must not break into the clean-up after the first. Later ones count: Python drops exceptions in
        # finalisers, and the first may have come there.
        nonlocal deaf_until
        now = time.monotonic()
        if now >= deaf_until:
            deaf_until = now + _CLEAN_UP_SECONDS
            raise KeyboardInterrupt

    previous = {}
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        # Whoever set another disposition (nohup ignores SIGHUP) meant it; only the main thread may set one.
        with contextlib.suppress(ValueError):
            if number is not None and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                previous[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
