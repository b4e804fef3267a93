"""``make verify-101``: runs an experiment again and compares it with its record.

``RUN=label`` compares a run that exists.

They agree where both ran out of memory, or both are ok and

    step time   |median here - median recorded| <= 2 sqrt(u1^2 + u2^2), u the standard uncertainty
                of each median (``step_noise_ms``): robust against single slow steps, and with
                the spread between runs of the same work
    memory      used memory of the fullest GPU (NVML) within 1 %
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.errors import UserError
from harness.evidence.records import same_work
from harness.evidence.references import load_references
from harness.evidence.results import collect_records, collect_runs
from harness.evidence.rows import Row, launch_rate_remark, metrics, upstream_name
from harness.experiment import command_line
from harness.experiment.catalog import load_catalog
from harness.experiment.experiment import Experiment
from harness.machine import gpus
from harness.machine.provenance import describe_upstream
from harness.planning import resolved
from harness.predict.rates import launch_rates_apart
from harness.run import step_statistics
from harness.run.schema import changes_in_words
from harness.system import screen

MEMORY_TOLERANCE = 0.01
"""Relative; the allocator's caching alone changes used memory by a few tenths of a percent."""


@dataclass(frozen=True)
class Line:
    """One quantity of the record and of the run: their difference and the allowed one."""

    name: str
    record: str
    run: str
    apart: str
    allowed: str
    agrees: bool


def verify(
    id_: str, settings: Mapping[str, str], outdir: Path, records: Path, prepare: Callable[[], None]
) -> int:
    """Run experiment ``id_`` again, or read RUN=, and compare with its record on the same hardware.

    ``settings`` that change the experiment (CARD=, ARGS=) select the record of that; STEPS and DATA
    are by default the record's. ``prepare`` is called before a run starts.

    Returns:
        the exit status: 0 where they agree, 1 where they do not or the run failed.

    Raises:
        UserError: there is no record, the run is of other work, or it cannot be compared: other
            hardware or upstream, fewer steps than the averaging window needs, or other runs on the
            node.
    """
    experiment = resolved.with_settings(load_catalog().find(id_), settings, outdir)
    rows = collect_records(records, load_references()).rows
    kept = [row for row in rows if same_work(row.experiment, experiment)]
    if not kept:
        raise UserError(
            f"{experiment.label} has no record\nmake {id_} runs it, make record RUN=… keeps it"
        )
    run = (
        _read(settings["RUN"], outdir, experiment)
        if "RUN" in settings
        else _run(kept, settings, prepare)
    )
    record = choose(kept, run)
    lines = compare(record, run)
    print(render(record, run, lines))
    return 0 if all(line.agrees for line in lines) else 1


def choose(records: Sequence[Row], run: Row) -> Row:
    """The one of ``records`` that ``run`` can be compared with: that of the host most like its own,
    then the newest. Raises UserError without one."""
    if run.experiment.miniature:
        raise UserError(
            f"{run.label} is a CPU miniature; {records[0].label} was measured on"
            f" {records[0].hardware}"
        )
    if not same_work(records[0].experiment, run.experiment):
        raise UserError(
            f"{run.label} is a run of {run.experiment.label}, not of the work of {records[0].label}"
        )
    if run.result and run.result.mixed:
        raise UserError(
            f"{run.label} is of more than one experiment: {changes_in_words(run.result.mixed)}"
        )
    here = _on_hardware(records, run.hardware)
    if run.state in ("running", "killed"):
        raise UserError(
            f"{run.label} is {run.state}: only a finished run can be compared with a record"
        )
    alike = [row for row in here if row.software == run.software]
    record = min(
        alike, key=lambda row: launch_rates_apart(row.operation_us, run.operation_us), default=None
    )
    if record is None:
        raise UserError(
            f"{run.label} ran {run.software}, the record {here[0].software}: their times do not"
            " compare"
        )
    for name, value_of in _CONDITIONS.items():
        if value_of(run) != value_of(record):
            raise UserError(
                f"{run.label}: {name} {value_of(run)}, but {value_of(record)} in the record: "
                "their times do not compare"
            )
    if run.state == "ok" == record.state and (run.step is None or run.memory_gib.nvml is None):
        raise UserError(
            f"{run.label} has no"
            f" {'step in its averaging window' if run.step is None else 'NVML reading'}\nlet it run"
            f" {record.experiment.steps} steps where NVML can be read"
        )
    return record


_CONDITIONS = {
    "runs on the node:": lambda row: row.runs_on_node,
    "attention:": lambda row: row.experiment.attention_backend,
}


def compare(record: Row, run: Row) -> list[Line]:
    """The quantities of a run and of a record, compared."""
    if record.state != "ok" or run.state != "ok":
        return [Line("ended as", record.state, run.state, "", "", record.state == run.state)]
    (median, noise), (here, noise_here) = _step(record), _step(run)
    allowed = 2 * math.hypot(noise, noise_here)
    used, used_here = _used_gib(record, run), _used_gib(run, record)
    apart = abs(used_here - used) / used
    return [
        Line(
            "step time, ms",
            f"{median:,.1f} ± {2 * noise:.1f}",
            f"{here:,.1f} ± {2 * noise_here:.1f}",
            f"{abs(here - median):.1f}",
            f"{allowed:.1f}",
            abs(here - median) <= allowed,
        ),
        Line(
            "used memory, GiB",
            f"{used:.2f}",
            f"{used_here:.2f}",
            f"{apart:.2%}",
            f"{MEMORY_TOLERANCE:.0%}",
            apart <= MEMORY_TOLERANCE,
        ),
    ]


def render(record: Row, run: Row, lines: Sequence[Line]) -> str:
    """The comparison as text."""
    measured_on = time.strftime("%Y-%m-%d", time.gmtime(record.result.started))
    table = [("", "record", "this run", "apart", "allowed", "")]
    table += [
        (x.name, x.record, x.run, x.apart, x.allowed, f"{'agrees' if x.agrees else 'DIFFERS':7}")
        for x in lines
    ]
    agrees = all(line.agrees for line in lines)
    return "\n".join(
        [
            (
                f"{run.label} against {record.label} of {measured_on}: {record.hardware},"
                f" {record.software}"
            ),
            *screen.grid(table),
            *filter(None, [launch_rate_remark(run, record)]),
            (
                f"{run.id} agrees with its record"
                if agrees
                else f"{run.id} does not agree with its record"
            ),
        ]
    )


def _step(row: Row) -> tuple[float, float]:
    """Median step time and its standard uncertainty, in ms."""
    steps_ms = [m.step_ms for m in step_statistics.window(row.experiment, metrics(row))]
    return statistics.median(steps_ms), step_statistics.step_noise_ms(steps_ms)


def _used_gib(row: Row, other: Row) -> float:
    """Used memory, including what the driver reserves where that of ``other`` includes it."""
    includes_driver = other.memory_gib.driver is None
    return row.memory_gib.nvml + (row.memory_gib.driver or 0.0 if includes_driver else 0.0)


def _on_hardware(records: Sequence[Row], hardware: str) -> list[Row]:
    """The records of this hardware, the newest first. Raises UserError where there is none."""
    found = sorted(
        (row for row in records if row.hardware == hardware),
        key=lambda row: row.result.started,
        reverse=True,
    )
    if not found:
        names = ", ".join(sorted({row.hardware for row in records}))
        raise UserError(
            f"{records[0].id} is recorded on {names}; {hardware} cannot verify that\n"
            "RUN=label compares a run that was made there"
        )
    return found


def _read(label: str, outdir: Path, experiment: Experiment) -> Row:
    results = collect_runs(outdir, load_references())
    found = next((row for row in results.rows if row.label == label), None) or _newest_of(
        label, results.rows, experiment
    )
    if skipped := [
        warning for warning in results.warnings if warning.startswith(f"{outdir / label}: ")
    ]:
        raise UserError(f"{skipped[0]}\nrun it again")
    if found is None:
        there = ", ".join(row.label for row in results.rows[:5]) or "none"
        raise UserError(f"RUN={label}: no such run in {outdir}; there: {there}")
    return found


def _newest_of(wanted: str, rows: Sequence[Row], experiment: Experiment) -> Row | None:
    """The newest run with this id or name; finished runs of the work of ``experiment`` first."""
    of_it = [row for row in rows if wanted in (row.experiment.id, row.experiment.name)]

    def order(row: Row) -> tuple[bool, bool, float]:
        started = row.result.started if row.result else 0.0
        return same_work(row.experiment, experiment), row.state in ("ok", "oom"), started

    return max(of_it, key=order, default=None)


def _run(records: Sequence[Row], settings: Mapping[str, str], prepare: Callable[[], None]) -> Row:
    """Run the record's experiment on this machine."""
    from harness.launching.launch import run_plan
    from harness.planning.plan import choose_device, plan
    from harness.planning.request import batch_of

    id_ = records[0].id
    if settings.get("DRY_RUN") == "1" or batch_of(settings):
        raise UserError(
            f"make verify-{id_} runs here and now\nmake show-{id_} prints the command; make {id_}"
            f" SLURM=1 submits it, then make verify-{id_} RUN=label compares"
        )
    device = choose_device(settings)
    here = gpus.list_gpus()
    record, *others = _on_hardware(
        records, here[0].name if device == "cuda" else "a machine without a GPU"
    )
    if (software := upstream_name(describe_upstream())) not in {
        row.software for row in (record, *others)
    }:
        raise UserError(
            f"here is {software}, {record.label} ran {record.software}: their times would not"
            " compare\nMEGATRON_LM=folder names another checkout"
        )
    wanted = {**record.experiment.overrides, "DATA": record.experiment.data, **settings}
    hang = command_line.count_in(settings, "HANG")
    planned = plan(load_catalog().find(record.id), wanted, "cuda")
    prepare()
    finished = run_plan(planned, hang_seconds=hang)
    return _read(finished.dir.label, planned.outdir, planned.experiment)
