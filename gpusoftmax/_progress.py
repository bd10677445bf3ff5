"""A line on stderr that says how far a command is."""

import contextlib
import os
import shutil
import sys
import time

_TERMINAL_SECONDS = 0.1
_LOG_SECONDS = 5.0
_BAR = 24


class Progress:
    """A bar redrawn in place on a terminal; elsewhere (a log file) a plain line every few seconds.

    with Progress("training", total=200) as progress:
        progress.update(1, "perplexity 31820")
    """

    def __init__(self, title: str, total: int, stream=None):
        self._title = title
        self._total = total
        self._stream = sys.stderr if stream is None else stream
        self._live = False
        with contextlib.suppress(ValueError, AttributeError):  # closed, or none at all
            self._live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._shown = time.monotonic()
        self._began: tuple[float, int] | None = None
        self._width = 0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error) -> None:
        if self._width:  # whatever is printed next starts on a line of its own
            self._write("\n")

    def update(self, done: int, note: str = "") -> None:
        now = time.monotonic()
        if done and self._began is None:  # the first piece of work, which may include compiling, tells no rate
            self._began = now, done
        due = _TERMINAL_SECONDS if self._live else _LOG_SECONDS
        first = self._live and not self._width
        last = done >= self._total and self._live
        if not (first or last or now - self._shown >= due):
            return
        self._shown = now
        share = min(done / self._total, 1.0) if self._total else 1.0
        parts = [f"{share:4.0%}", note, self._left(now, done)]
        if self._live:
            filled = round(share * _BAR)
            parts.insert(0, "[" + "#" * filled + "." * (_BAR - filled) + "]")
            line = f"{self._title} {'  '.join(part for part in parts if part)}"
            line = line[: shutil.get_terminal_size().columns - 1]
            self._write("\r" + line.ljust(self._width))
            self._width = len(line)
        else:
            self._write(f"{self._title} {'  '.join(part for part in parts if part)}\n")

    def _left(self, now: float, done: int) -> str:
        if self._began is None or not self._began[1] < done < self._total:
            return ""
        return f"{(now - self._began[0]) / (done - self._began[1]) * (self._total - done):.0f} s left"

    def _write(self, text: str) -> None:
        # A closed or broken stderr must not end the work that it reports on.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self._stream.write(text)
            self._stream.flush()


def size_text(count: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} bytes"
