"""What a run shows: live progress on a terminal, plain lines in a pipe, a summary at the end."""

from __future__ import annotations

import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from harness.run.schema import changes_in_words, perplexity
from harness.system.screen import harmless, raw

if TYPE_CHECKING:
    from harness.run.schema import Result

REFRESH_S = 0.5
LINE_EVERY_S = 1.0
FEW_STEPS = 25
"""A run of at most so many steps prints all of them into a pipe."""
MANY_RUNS = 3
"""From so many runs at once, each gets one line in place of three."""

PHASES = tuple(
    (re.compile(pattern), words)
    for pattern, words in (
        (r"using world size: \d+", "reading arguments"),
        (r"initializing torch distributed", "connecting ranks"),
        (
            r"compiling dataset index builder|compiling and loading fused kernels",
            "compiling helpers",
        ),
        (r"setting random seeds", "initialising"),
        (r"building \S+ model", "building the model"),
        (r"number of parameters on", "building the model"),
        (r"loading (release )?(distributed )?checkpoint", "loading the checkpoint"),
        (r"building train, validation, and test datasets", "building data"),
        (r"done with setup|^training \.\.\.", "first step"),
        (r"saving checkpoint|Saving.* checkpoint", "saving a checkpoint"),
        (r"Evaluating (on|iter)", "evaluating"),
        (r"after training is done", "finishing"),
    )
)
"""Phases of a run before its steps, and the lines of upstream's log that begin them."""


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment. ``tflops`` is per GPU, ``mfu`` a fraction; ``memory_gib`` is of the
    fullest rank."""

    label: str
    steps: int
    phase: str
    elapsed_s: float
    step: int = 0
    loss: float | None = None
    step_ms: float | None = None
    tflops: float | None = None
    mfu: float | None = None
    memory_gib: float | None = None
    left_s: float | None = None


def phase_of(line: str) -> str | None:
    """The phase that a line of upstream's log begins, or None."""
    return next((words for pattern, words in PHASES if pattern.search(line)), None)


class PlainTerminal:
    """Lines for a pipe or a file: every phase, the first and the last step, one step a second.

    ``finish``: the run is over, its last step is shown if it was not yet.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._shown: dict[str, Snapshot] = {}
        self._latest: dict[str, Snapshot] = {}
        self._printed_at: dict[str, float] = {}

    def __enter__(self) -> PlainTerminal:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def show(self, snapshot: Snapshot) -> None:
        label, shown = snapshot.label, self._shown.get(snapshot.label)
        self._latest[label] = snapshot
        if snapshot.step == 0:
            if shown is None or shown.phase != snapshot.phase:
                self._print(snapshot, f"{_clock(snapshot.elapsed_s)}  {snapshot.phase}")
        elif shown is None or shown.step < snapshot.step:
            due = time.monotonic() - self._printed_at.get(label, 0) >= LINE_EVERY_S
            edge = snapshot.step == snapshot.steps or shown is None or shown.step == 0
            if due or edge or snapshot.steps <= FEW_STEPS:
                self._print(snapshot, step_line(snapshot))

    def finish(self, label: str) -> None:
        latest, shown = self._latest.pop(label, None), self._shown.pop(label, None)
        if latest and latest.step and (shown is None or shown.step < latest.step):
            self._print(latest, step_line(latest))
            del self._shown[label]

    def _print(self, snapshot: Snapshot, text: str) -> None:
        several = len(self._latest) > 1
        self.print(f"{_id(snapshot.label)}  {text}" if several else text)
        self._shown[snapshot.label] = snapshot
        self._printed_at[snapshot.label] = time.monotonic()


class LiveTerminal:
    """Progress bars, redrawn in place at most every ``REFRESH_S`` and removed at the end."""

    def __init__(self, stream: TextIO):
        from rich.console import Console
        from rich.live import Live

        self._console = Console(file=raw(stream), highlight=False)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._runs: dict[str, Snapshot] = {}
        self._drawn_at = 0.0

    def __enter__(self) -> LiveTerminal:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.update("", refresh=True)
        self._live.stop()

    def print(self, text: str) -> None:
        self._console.print(harmless(text), markup=False, soft_wrap=True)

    def show(self, snapshot: Snapshot) -> None:
        self._runs[snapshot.label] = snapshot
        if time.monotonic() - self._drawn_at >= REFRESH_S:
            self._draw()

    def finish(self, label: str) -> None:
        self._runs.pop(label, None)
        self._draw()

    def _draw(self) -> None:
        from rich.console import Group

        draw = self._one_line if len(self._runs) >= MANY_RUNS else self._block
        self._live.update(Group(*(draw(p) for p in self._runs.values())), refresh=True)
        self._drawn_at = time.monotonic()

    def _one_line(self, p: Snapshot) -> Any:
        return _text((f"{_id(p.label)}  ", "bold"), (_state(p), ""))

    def _block(self, p: Snapshot) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        bar = Table.grid(padding=(0, 2))
        ends = f"{_clock(p.left_s)} left" if p.left_s is not None else _clock(p.elapsed_s)
        bar.add_row(
            ProgressBar(total=p.steps, completed=p.step, width=40), f"{p.step}/{p.steps}", ends
        )
        return Group(
            _text((p.label, "bold")), bar, _text((_numbers(p) if p.step else p.phase, "cyan"))
        )


Terminal = PlainTerminal | LiveTerminal


def open_terminal(stream: TextIO | None = None) -> Terminal:
    """Live progress where ``stream`` (by default stdout) is a terminal, else plain lines."""
    stream = stream or sys.stdout
    live = stream.isatty() and os.environ.get("TERM") != "dumb"
    return LiveTerminal(stream) if live else PlainTerminal(stream)


def step_line(p: Snapshot) -> str:
    """One step: ``12/20  loss 10.8312  186.8 ms  54 TFLOP/s/GPU  MFU 5.5%  32.2 GiB  0:12
    left``."""
    left = f"  {_clock(p.left_s)} left" if p.left_s is not None and p.step < p.steps else ""
    return f"{p.step:>{len(str(p.steps))}}/{p.steps}  {_numbers(p)}{left}"


def summary(label: str, path: Path, result: Result) -> str:
    """What a run prints at its end: status, medians and where its files are, or what went
    wrong."""
    r = result
    took = _clock(r.finished - r.started)
    where = f" on rank {r.rank}" if r.rank is not None else ""
    lines = [f"{label}: {r.status}{where}, {r.steps_done} of {r.steps} steps, {took}"]
    lines += [f"  {line}" for line in (r.detail or "").splitlines()]
    if r.advice:
        lines.append(f"  -> {r.advice}")
    if r.step_ms:
        s = r.step_ms
        lines.append(
            f"  step    {s.median:.1f} ± {s.half_iqr:.1f} ms, median ± half IQR of steps "
            f"{r.window[0]}-{r.window[1]} ({s.min:.1f} to {s.max:.1f})"
        )
    elif r.status == "ok":
        lines.append(f"  step    no median: the averaging window begins after step {r.steps_done}")
    lines += _rates(r)
    lines += _memory(r)
    if r.loss.first is not None and r.loss.last is not None:
        lines.append(f"  loss    {r.loss.first:.4f} -> {r.loss.last:.4f}")
    if r.validation:
        word = (
            "" if (value := perplexity(r.validation.loss)) is None else f", perplexity {value:,.2f}"
        )
        lines.append(
            f"  eval    loss {r.validation.loss:.4f}{word} on held-out data after step"
            f" {r.validation.step}"
        )
    if r.resumed_at:
        lines.append(f"  resumed after step {', '.join(map(str, r.resumed_at))}")
    if r.changed:
        lines.append(f"  changed {changes_in_words(r.changed)}")
    if r.packed_with:
        lines.append(f"  shared  the node with {', '.join(map(_id, r.packed_with))}")
    if r.miniature:
        lines.append("  note    a CPU miniature: not comparable with a GPU run")
    lines.append(f"  files   {_relative(path)}/")
    return "\n".join(lines)


def _rates(r: Result) -> list[str]:
    parts = []
    if r.tflops is not None and r.mfu is not None:
        parts.append(f"{r.tflops:.1f} TFLOP/s/GPU, MFU {r.mfu:.1%} of {r.peak_tflops:g}")
    elif r.tflops is not None and not r.miniature:
        parts.append(f"{r.tflops:.1f} TFLOP/s/GPU")
    if r.tokens_per_s is not None:
        parts.append(f"{r.tokens_per_s:,.0f} tokens/s")
    counted = "; of model FLOPs" if r.mfu is not None else ""
    return [f"  rate    {', '.join(parts)}{counted}"] if parts else []


def _memory(r: Result) -> list[str]:
    m = r.memory_gib
    named = (("allocated", m.allocated), ("reserved", m.reserved), ("in all", m.nvml))
    parts = [f"{gib:.2f} {name}" for name, gib in named if gib is not None]
    if not parts and m.rss is not None:
        parts = [f"{m.rss:.2f} resident"]
    return [f"  memory  GiB of the fullest rank: {', '.join(parts)}"] if parts else []


def _numbers(p: Snapshot) -> str:
    parts = [
        p.loss is not None and f"loss {p.loss:.4f}",
        p.step_ms is not None and f"{p.step_ms:.1f} ms",
        p.tflops is not None and p.tflops >= 0.5 and f"{p.tflops:.0f} TFLOP/s/GPU",
        p.mfu is not None and f"MFU {p.mfu:.1%}",
        p.memory_gib is not None and f"{p.memory_gib:.1f} GiB",
    ]
    return "  ".join(part for part in parts if part)


def _state(p: Snapshot) -> str:
    return step_line(p) if p.step else f"{p.phase}  {_clock(p.elapsed_s)}"


def _text(*parts: tuple[str, str]) -> Any:
    from rich.text import Text

    text = Text(no_wrap=True, overflow="ellipsis")
    for words, style in parts:
        text.append(harmless(words), style)
    return text


def _id(label: str) -> str:
    return label.split("-")[0]


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _relative(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
