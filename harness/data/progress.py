"""Progress of a long stage: one line that changes on a terminal, a line now and then in a pipe."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from harness.system.screen import harmless, raw

PLAIN_EVERY_S = 10.0
_DRAW_EVERY_S = 0.1


class Progress:
    """Shows how far stages are, on ``stream``."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = raw(stream or sys.stderr)
        self._tty = self._stream.isatty()
        self._stage = ""
        self._begun = self._drawn = 0.0
        self._at_begin = 0
        self._width = 0

    def show(self, stage: str, done: int, total: int, more: str = "") -> None:
        """``done`` of ``total`` bytes of ``stage``; ``more`` is put behind."""
        now = time.monotonic()
        if stage != self._stage:
            self.end()
            self._stage, self._begun, self._drawn, self._at_begin = (
                stage,
                now,
                now if not self._tty else 0.0,
                done,
            )
        if now - self._drawn < (_DRAW_EVERY_S if self._tty else PLAIN_EVERY_S):
            return
        self._drawn = now
        rate = (done - self._at_begin) / (now - self._begun) if now > self._begun else 0.0
        parts = [f"{stage}: {amount(done)} of {amount(total)}"]
        if rate:
            parts += [f"{amount(rate)}/s", f"{duration((total - done) / rate)} left"]
        self._write(harmless("  ".join([*parts, *([more] if more else [])])))

    def say(self, line: str) -> None:
        """A line that stays."""
        self.end()
        print(harmless(line), file=self._stream, flush=True)

    def end(self) -> None:
        """Clear the line that changes."""
        if self._tty and self._width:
            print("\r" + " " * self._width + "\r", end="", file=self._stream, flush=True)
        self._stage, self._width = "", 0

    def _write(self, line: str) -> None:
        if self._tty:
            print(f"\r{line:{self._width}}", end="", file=self._stream, flush=True)
            self._width = len(line)
        else:
            print(line, file=self._stream, flush=True)


def amount(number: float, unit: str = "B") -> str:
    """``12.3 MB``, ``480 B``."""
    for prefix in ("", "k", "M", "G"):
        if number < 999.5:
            return f"{number:.3g} {prefix}{unit}".rstrip()
        number /= 1000
    return f"{number:.3g} T{unit}"


def duration(seconds: float) -> str:
    """``45 s``, ``3:05 min``, ``2:10 h``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02} h"
