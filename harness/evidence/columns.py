"""What a row shows: its values by name, for programs, and its columns, for people."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from harness.data.data_sets import MOCK
from harness.evidence.references import Reference
from harness.evidence.rows import Row
from harness.run.schema import changes_in_words, perplexity

VALUES: dict[str, Callable[[Row], Any]] = {
    "hardware": lambda row: row.hardware,
    "chapter": lambda row: row.experiment.chapter,
    "id": lambda row: row.id,
    "slug": lambda row: row.experiment.slug,
    "label": lambda row: row.label,
    "kind": lambda row: row.kind,
    "miniature": lambda row: row.experiment.miniature,
    "gpus": lambda row: row.experiment.world_size,
    "nodes": lambda row: row.experiment.nodes,
    "card": lambda row: row.experiment.card,
    "precision": lambda row: row.experiment.precision,
    "data": lambda row: row.experiment.data,
    "status": lambda row: row.state,
    "as_published": lambda row: row.as_published,
    "steps_done": lambda row: row.steps_done,
    "steps": lambda row: row.experiment.steps,
    "window_first_step": lambda row: row.window and row.window[0],
    "window_last_step": lambda row: row.window and row.window[1],
    "step_ms": lambda row: row.step and row.step.median,
    "step_ms_half_iqr": lambda row: row.step and row.step.half_iqr,
    "step_ms_min": lambda row: row.step and row.step.min,
    "step_ms_max": lambda row: row.step and row.step.max,
    "forward_backward_ms": lambda row: row.result and row.result.forward_backward_ms,
    "optimizer_ms": lambda row: row.result and row.result.optimizer_ms,
    "predicted_step_ms": lambda row: row.predicted_step_ms,
    "published_step_ms": lambda row: row.reference and row.reference.step_ms,
    "step_ratio": lambda row: row.step_ratio,
    "memory_gib": lambda row: row.memory_gib.nvml,
    "reserved_gib": lambda row: row.memory_gib.reserved,
    "allocated_gib": lambda row: row.memory_gib.allocated,
    "published_memory_gib": lambda row: row.reference and row.reference.memory_gib,
    "memory_ratio": lambda row: row.memory_ratio,
    "published_oom": lambda row: row.reference and row.reference.oom,
    "published_as": lambda row: row.reference and row.reference.id,
    "published_ran": lambda row: row.reference and row.reference.ran,
    "published_hardware": lambda row: row.reference and row.reference.hardware,
    "tflops": lambda row: row.tflops,
    "peak_tflops": lambda row: row.peak_tflops,
    "mfu": lambda row: row.mfu,
    "tokens_per_s": lambda row: row.result and row.result.tokens_per_s,
    "loss_first": lambda row: row.result and row.result.loss.first,
    "loss_last": lambda row: row.result and row.result.loss.last,
    "validation_loss": lambda row: row.validation and row.validation.loss,
    "perplexity": lambda row: row.validation and perplexity(row.validation.loss),
    "validation_step": lambda row: row.validation and row.validation.step,
    "resumed_at": lambda row: " ".join(map(str, row.result.resumed_at)) if row.result else "",
    "changed": lambda row: changes_in_words(row.result.changed) if row.result else "",
    "launch_add_us": lambda row: row.launch and row.launch.add_us,
    "launch_operation_us": lambda row: row.launch and row.launch.operation_us,
    "runs_on_node": lambda row: row.runs_on_node,
    "notes": lambda row: "; ".join(notes(row)),
    "origin": lambda row: str(row.origin),
}
"""Everything about a row as plain values, units in the names: what CSV and JSON hold."""


def values(row: Row) -> dict[str, Any]:
    """Everything about a row as plain values (see VALUES)."""
    return {name: value(row) for name, value in VALUES.items()}


def notes(row: Row) -> list[str]:
    """What a reader must know about this row alone."""
    experiment, result = row.experiment, row.result
    found = []
    if row.published and row.published.remarks:
        found.append(f"{row.id}: {'; '.join(row.published.remarks)}")
    if result and row.state != "ok" and not (row.state == "oom" and row.as_published):
        rank = "" if result.rank is None else f"rank {result.rank}: "
        said = "; ".join(filter(None, (result.detail, result.advice)))
        found.append(f"{row.label}: {rank}{' '.join(said.split())}")
    if row.other_memory_decided:
        than = "less than published" if row.state == "oom" else "more than published"
        emulate = "" if row.state == "oom" else f"; CARD={row.against.gpu} emulates that card"
        found.append(f"{row.memory_mib:,} MiB here, {than}{emulate}")
    if row.state == "ok" and row.device == "cuda" and row.memory_gib.nvml is None:
        found.append(f"{row.label}: NVML could not be read: the used memory is unknown")
    if experiment.card:
        found.append(f"CARD={experiment.card}: memory capped as on that card")
    if result and result.mixed:
        found.append(f"{row.label}: {changes_in_words(result.mixed)}")
    elif not row.against and not experiment.miniature:
        changed = " ".join(f"{key}={value}" for key, value in experiment.overrides.items())
        found.append(f"{changed}: not the published work, so nothing to compare with")
    return found


@dataclass(frozen=True)
class Column:
    """A column for people. A narrow terminal leaves out the least important ones."""

    title: str
    text: Callable[[Row], str]
    importance: int
    left: bool = False


def number(value: float | None, digits: int = 0) -> str:
    """``value`` with its thousands separated; nothing for None."""
    return "" if value is None else f"{value:,.{digits}f}"


def milliseconds(value: float | None) -> str:
    """A time in ms, with a digit behind the point below a second."""
    return number(value, 1 if value is not None and value < 1000 else 0)


def published_text(reference: Reference | None, number: str) -> str:
    """A published number: ``OOM`` for a run out of memory, with ``?`` where it is in doubt."""
    if not reference:
        return ""
    return "OOM" if reference.oom else number + "?" * reference.in_doubt


def _window(row: Row) -> str:
    return f"{row.window[0]}-{row.window[1]}" if row.window and row.step else ""


def _loss(row: Row) -> str:
    loss = row.result and row.result.loss
    return (
        f"{loss.first:.3f} → {loss.last:.3f}"
        if loss and None not in (loss.first, loss.last)
        else ""
    )


def _held_out(row: Row) -> str:
    """Loss and perplexity on held-out data; on mock data only where UNTIL set a loss to reach."""
    if not row.validation or (row.experiment.data == MOCK and not row.experiment.until):
        return ""
    return f"{row.validation.loss:.3f} ({number(perplexity(row.validation.loss), 1)})"


def _name(row: Row) -> str:
    """The run's label without its id, or the record's experiment and what was changed."""
    if row.kind == "run":
        return row.label.removeprefix(f"{row.id}-")
    changes = row.label.rpartition("/")[2].removeprefix(row.id)
    return f"{row.experiment.slug}{changes} (record)"


def status_text(row: Row) -> str:
    """How it ended, and whether the published run ended otherwise."""
    state, reference = row.state, row.certain_reference
    if state == "oom" and reference:
        return "OOM as published" if reference.oom else "OOM (publ. ran)"
    if state == "oom":
        return "OOM"
    if state == "ok":
        return "ok (publ. OOM)" if reference and reference.oom else "ok"
    spelled = {"nan": "NaN", "oom-host": "host OOM", "bad-configuration": "bad configuration"}
    return f"{spelled.get(state, state)} at {row.steps_done}/{row.experiment.steps}"


_ID = Column("id", lambda row: row.id, 100)
EXPERIMENT = Column("experiment", _name, 99, left=True)
_STEP = Column("ms/step", lambda row: milliseconds(row.step and row.step.median), 95)
_SPREAD = Column("±", lambda row: milliseconds(row.step and row.step.half_iqr), 50)
_STEPS = Column("steps", _window, 40, left=True)
_HELD_OUT = Column("held-out loss (perplexity)", _held_out, 75, left=True)
_SHARED = Column("shared", lambda row: number(row.runs_on_node), 20)
_DATA = Column("data", lambda row: row.experiment.data, 30, left=True)
STATUS = Column("status", status_text, 98, left=True)

GPU_COLUMNS = (
    _ID,
    EXPERIMENT,
    Column("GPUs", lambda row: str(row.experiment.world_size), 60),
    Column("GiB", lambda row: number(row.memory_gib.nvml, 1), 90),
    Column(
        "publ.",
        lambda row: published_text(
            row.reference, number(row.reference and row.reference.memory_gib, 1)
        ),
        70,
    ),
    Column("ratio", lambda row: number(row.memory_ratio, 2), 80),
    _STEP,
    _SPREAD,
    Column(
        "publ.",
        lambda row: published_text(row.reference, number(row.reference and row.reference.step_ms)),
        71,
    ),
    Column("ratio", lambda row: number(row.step_ratio, 2), 85),
    Column("formula", lambda row: milliseconds(row.step and row.predicted_step_ms), 55),
    Column("TFLOP/s", lambda row: number(row.tflops), 65),
    Column("MFU", lambda row: f"{row.mfu:.1%}" if row.mfu else "", 66),
    _HELD_OUT,
    _STEPS,
    _SHARED,
    _DATA,
    STATUS,
)
MINIATURE_COLUMNS = (
    _ID,
    EXPERIMENT,
    Column("ranks", lambda row: str(row.experiment.world_size), 60),
    _STEP,
    _SPREAD,
    _STEPS,
    Column("loss", _loss, 80, left=True),
    _HELD_OUT,
    _SHARED,
    _DATA,
    STATUS,
)
