"""The run that ``RESUME=`` continues: the newest that froze the same experiment, and what may
differ from it.

Layout, speed, saving and the number of steps may change, and that is said. What changes the losses
is refused, unless ``FORCE=1`` asks for it: the run then keeps the step from which on it was so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from harness.data import fingerprint
from harness.errors import UserError, nearest
from harness.experiment import identity
from harness.experiment.experiment import Experiment
from harness.experiment.identity import Difference
from harness.planning import resume
from harness.run import checkpoints, finding
from harness.run.checkpoints import Checkpoint, Saving
from harness.run.directory import RunDir, still_runs
from harness.run.finding import Candidate
from harness.system import locks

ORDER = (
    "upstream shuffles data by the number of samples that a run is to draw: with more than one"
    " epoch, they come in another order from here on"
)


@dataclass(frozen=True)
class Resumed:
    """A run to continue, how it keeps checkpoints, and in which settings this is another than it
    froze."""

    run: RunDir
    saving: Saving | None
    changed: tuple[Difference, ...]


def choose(
    e: Experiment, device: str, outdir: Path, settings: Mapping[str, str], joins: bool
) -> Resumed | None:
    """The run that ``RESUME=1`` or ``RESUME=label`` continues as ``e``; None where RESUME= is not
    given.

    Args:
        joins: this is a further node of a run that node 0 may have resumed already.

    Raises:
        UserError: there is none, it still runs or kept no checkpoint; or settings differ that
        change the losses.
    """
    asked = settings.get("RESUME", "0")
    if asked == "0":
        return None
    found = (
        _labelled(asked, outdir, e, device)
        if asked != "1"
        else _of_experiment(e, device, outdir, settings)
    )
    changed = (*_data_changed(found, e), *identity.differences(found.experiment, e))
    _check(found, changed, e, outdir, settings, joins)
    return Resumed(found.dir, found.dir.read_saving(), changed)


def notices(resumed: Resumed, e: Experiment, step: int) -> list[str]:
    """What is said of a run that continues after ``step``: each setting that changes then."""
    lines = [
        f"{d.setting} was {d.before} and is {d.now} from step {step + 1} on"
        + (": FORCE=1" if d.curve else "")
        for d in resumed.changed
    ]
    if e.data != "mock" and any(d.setting == "STEPS" for d in resumed.changed):
        lines.append(ORDER)
    return lines


def newest_checkpoint(
    resumed: Resumed, e: Experiment, tell: Callable[[str], None]
) -> Checkpoint | None:
    """The newest whole checkpoint of a run to continue; None where it was ended before its first.

    Raises:
        UserError: it had some, and none can be used; or it is of another model or beyond the steps
        of ``e``.
    """
    run, folder = resumed.run, resumed.run.checkpoints
    skipped: list[str] = []
    found = checkpoints.newest_whole(folder, skipped.append)
    if found:
        for line in skipped:
            tell(line)
        resume.check_fits(found, e)
        if found.step > e.steps:
            raise UserError(
                f"RESUME: {run.label} has a checkpoint of step {found.step}, and STEPS={e.steps}\n"
                f"STEPS={2 * found.step} trains as long again; RESUME= never goes back"
            )
        return found
    if at_its_end(run, e):
        return None
    saved = [save.step for save in run.read_saves()]
    # killed in its first save
    torn_first = all(line.endswith(checkpoints.UNFINISHED) for line in skipped)
    if not torn_first or saved or (folder / checkpoints.TRACKER).exists():
        gone = f"{f'step {saved[-1]}' if saved else 'one'} was saved and is no longer there"
        raise UserError(
            "\n".join(
                [
                    (
                        f"RESUME: {run.label} kept checkpoints in {folder}, and none of them can be"
                        " used:"
                    ),
                    *(f"  {line}" for line in skipped or [gone]),
                    (
                        "put one back there from a copy; without RESUME= a new run begins at step"
                        " 1, and this one stays as it is"
                    ),
                ]
            )
        )
    tell(f"{run.label} was ended before its first checkpoint: it begins anew at step 1")
    return None


def at_its_end(resumed: RunDir, e: Experiment) -> bool:
    """Whether a run has nothing left to do as ``e``: it reached its steps, or its loss on held-out
    data."""
    try:
        result, frozen = resumed.read_result(), resumed.read_experiment()
    except ValueError:  # torn: it is computed again from its checkpoint
        return False
    if result is None or result.status not in ("ok", "target-missed"):
        return False
    reached = result.status == "ok" and result.steps_done < result.steps and frozen.until == e.until
    return reached or result.steps_done >= e.steps


def _data_changed(found: Candidate, e: Experiment) -> Iterator[Difference]:
    """Data sets of the same name that hold something else than when the run was started: prepared
    anew, or changed."""
    before = found.dir.read_data_sets()
    now = fingerprint.of(e.data) if before else {}
    for name in before.keys() & now.keys():
        there, here = before[name] if isinstance(before[name], dict) else {}, now[name]
        if differing := [key for key in there.keys() & here.keys() if there[key] != here[key]]:
            key = "tokens" if "tokens" in differing else min(differing)
            yield Difference(
                f"the contents of DATA={name}", f"{key} {there[key]}", f"{key} {here[key]}", True
            )


def _labelled(label: str, outdir: Path, e: Experiment, device: str) -> Candidate:
    """The run called ``label``, which must be one of ``e``'s row on this kind of device."""
    every, problems = finding.candidates(outdir)
    found = next((candidate for candidate in every if candidate.dir.label == label), None)
    if found is None:
        torn = next((problem for problem in problems if problem.startswith(f"{label}: ")), None)
        labels = [candidate.dir.label for candidate in every if candidate.experiment.id == e.id]
        raise UserError(
            f"RESUME={label}: expected 0 or 1, or the label of a run in {outdir}; "
            f"{torn or nearest(label, labels)}"
        )
    if found.experiment.id != e.id or (found.device, found.experiment.miniature) != (
        device,
        e.miniature,
    ):
        raise UserError(
            f"RESUME={label}: that is {_kind(found.experiment, found.device)}, and this is"
            f" {_kind(e, device)}\nLOAD={label} begins a new run with its checkpoint"
        )
    return found


def _of_experiment(
    e: Experiment, device: str, outdir: Path, settings: Mapping[str, str]
) -> Candidate:
    """The newest run of the same experiment; else of one that differs in what may change."""
    every, problems = finding.candidates(outdir, e.id)
    every = [c for c in every if (c.device, c.experiment.miniature) == (device, e.miniature)]
    exact = [c for c in every if identity.same(c.experiment, e)]
    if exact:
        return next((c for c in exact if c.has_checkpoints), exact[0])
    kept = [c for c in every if c.has_checkpoints]
    alike = [c for c in kept if not any(d.curve for d in identity.differences(c.experiment, e))]
    chosen = alike or (kept if settings.get("FORCE") == "1" else [])
    if chosen:
        return finding.one(e.id, chosen, "RESUME=label names the one to continue")
    if kept:
        return kept[0]  # refused by _check, which says what differs
    if every:
        _refuse_without_checkpoints(every[0], e)
    there_is = "; ".join(problems) or f"there is no run {e.label} in {outdir}"
    raise UserError(
        f"RESUME=1: {there_is}\nstart one with SAVE=1, and SAVE_EVERY= steps; "
        "LOAD=label begins a new run with the checkpoint of another"
    )


def _check(
    found: Candidate,
    changed: Sequence[Difference],
    e: Experiment,
    outdir: Path,
    settings: Mapping[str, str],
    joins: bool,
) -> None:
    """Raise UserError where ``found`` cannot be continued as ``e``, or not without being asked
    twice."""
    run = found.dir
    if not joins and (holder := locks.holder(run.path)):
        raise UserError(f"RESUME={settings['RESUME']}: {still_runs(run, holder)}")
    if run.read_saving() is None:
        _refuse_without_checkpoints(found, e)
    resume.check_model(run.path, found.experiment.model, e)
    curve = [d for d in changed if d.curve]
    if not curve or settings.get("FORCE") == "1":
        return
    others = [
        c
        for c in finding.distinct(
            c for c in finding.candidates(outdir, e.id)[0] if c.has_checkpoints
        )
        if c.dir != run and c.device == found.device
    ]
    data = next((d for d in curve if d.setting == "DATA"), None)
    raise UserError(
        "\n".join(
            [
                (
                    f"RESUME={settings['RESUME']}: {run.label} ran with other settings, which"
                    " change its losses:"
                ),
                *(f"  {d}" for d in curve),
                *([f'DATA="{data.before}" continues on the same data'] if data else []),
                *(
                    [
                        "other runs of this id with checkpoints, and what they have:",
                        *finding.named(others, e),
                    ]
                    if others
                    else []
                ),
                _way_out(curve) + f"; LOAD={run.label} begins a new run with its checkpoint",
            ]
        )
    )


def _way_out(curve: Sequence[Difference]) -> str:
    """What a user can do about settings that change the losses. FORCE=1 is no way to other learning
    rates (check_fits)."""
    if any(d.setting in ("LR", "MIN_LR") for d in curve):
        return (
            "give the settings of before: upstream finds the optimizer's state by its learning"
            " rates"
        )
    return (
        "give the settings of before; or FORCE=1 continues with these and keeps the step in the run"
    )


def _refuse_without_checkpoints(found: Candidate, e: Experiment) -> NoReturn:
    raise UserError(
        f"RESUME: {found.dir.label} kept no checkpoints, there is nothing to go on from\n"
        f"start anew with SAVE=1: make {e.id} SAVE=1"
    )


def _kind(e: Experiment, device: str) -> str:
    return (
        f"{'a miniature of ' if e.miniature else ''}{e.id} on"
        f" {'a CPU' if device == 'cpu' else 'GPUs'}"
    )
