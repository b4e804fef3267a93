"""Progress of a long stage: rich's bar on a terminal, a line every ten seconds in a pipe."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import TextIO

from harness.system.screen import harmless, raw

ShowProgress = Callable[[str, int, int], None]
"""Called with the stage's name, how much of it is done, and its total."""

PIPE_EVERY_S = 10.0
_TERMINAL_EVERY_S = 0.1
_COUNTED_STAGES = ("compare", "write")
"""Stages of cleaning whose progress is a number of bands or files; the others count bytes."""


class StageProgress:
    """Shows on ``stream`` (standard error by default) how far the current stage is."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = raw(stream or sys.stderr)
        self._animated = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._bar = None
        self._stage = ""

    def show(self, stage: str, done: int, total: int, more: str = "") -> None:
        """Show that ``done`` of ``total`` bytes of ``stage`` are done; ``more`` is appended."""
        now = time.monotonic()
        if stage != self._stage:
            self._begin(stage, done, now)
        if now - self._shown < (_TERMINAL_EVERY_S if self._animated else PIPE_EVERY_S):
            return
        self._shown = now
        unit = "" if stage in _COUNTED_STAGES else "B"
        text = f"{amount(done, unit)} of {amount(total, unit)}"
        if now > self._begun and done > self._done_at_begin:
            rate = (done - self._done_at_begin) / (now - self._begun)
            text += f"  {amount(rate, unit)}/s  {duration((total - done) / rate)} left"
        text = harmless(f"{text}  {more}".rstrip())
        if self._bar is None:
            print(f"{stage}: {text}", file=self._stream, flush=True)
        else:
            self._bar.update(self._bar.task_ids[0], completed=done, total=total, text=text)
            self._bar.refresh()

    def say(self, line: str) -> None:
        """Print a line that stays."""
        self.end()
        print(harmless(line), file=self._stream, flush=True)

    def end(self) -> None:
        """Clear the bar."""
        if self._bar is not None:
            self._bar.stop()
        self._bar, self._stage = None, ""

    def __enter__(self) -> StageProgress:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def _begin(self, stage: str, done: int, now: float) -> None:
        self.end()
        # A resumed stage starts with what an earlier process did, which says nothing of the rate.
        self._stage, self._begun, self._done_at_begin = stage, now, done
        self._shown = now
        if self._animated:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            columns = (
                TextColumn(f"{stage}:", markup=False),
                BarColumn(20),
                TextColumn("{task.fields[text]}", markup=False),
            )
            # No refreshing thread and no redirection: only this class writes while the bar is up.
            self._bar = Progress(
                *columns,
                console=Console(file=self._stream, force_terminal=True),
                auto_refresh=False,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._bar.add_task(stage, text="")
            self._bar.start()
            self._shown = 0.0


def amount(number: float, unit: str = "B") -> str:
    """``number`` with an SI prefix and three digits: ``12.3 MB``, ``480 B``."""
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
