"""The run that ``RESUME=`` resumes: the newest of the same experiment, and what may differ from it.

Layout, speed, saving and the number of steps may change; a notice names each change. What changes
the losses is refused, unless ``FORCE=1`` asks for it: the run then records the step of the change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

from harness.data import data_sets, fingerprint
from harness.errors import UserError, nearest
from harness.experiment import identity
from harness.experiment.experiment import Experiment
from harness.experiment.identity import Difference
from harness.planning.fitted import FittedRun
from harness.run import checkpoints, finding
from harness.run.checkpoints import Saving
from harness.run.directory import RunDir
from harness.run.finding import Candidate

OTHER_ORDER = (
    "upstream shuffles data by the number of samples of a whole run: with more than one epoch, they"
    " come in another order from this step on"
)


@dataclass(frozen=True)
class RunToResume:
    """A run to resume.

    Attributes:
        trained: the experiment that it froze.
        saving: how it keeps checkpoints.
        changed: settings that are no longer those that it froze.
    """

    run: RunDir
    trained: Experiment
    saving: Saving
    changed: tuple[Difference, ...]

    @property
    def curve_changes(self) -> list[Difference]:
        """Those of ``changed`` that change the losses."""
        return [difference for difference in self.changed if difference.curve]

    def notices(self, data: str, step: int) -> list[str]:
        """A line for each setting that changes after ``step``; ``data``: what it trains on then."""
        lines = [
            f"{d.setting} was {d.before} and is {d.now} from step {step + 1} on"
            + (": FORCE=1" if d.curve else "")
            for d in self.changed
        ]
        other_steps = any(d.setting == "STEPS" for d in self.changed)
        if other_steps and data != data_sets.MOCK:
            lines.append(OTHER_ORDER)
        return lines


def find(fitted: FittedRun) -> RunToResume | None:
    """The run that ``RESUME=`` means: 1, auto or a label; None where ``auto`` finds none.

    Raises:
        UserError: there is none, or it kept no checkpoints.
    """
    request, experiment = fitted.resolved.request, fitted.experiment
    if request.resume == "auto":
        found = _same_and_saved(fitted)
        if found is None:
            return None
    else:
        found = _of_experiment(fitted) if request.resume == "1" else _labelled(fitted)
    saving = found.dir.read_saving()
    if saving is None:
        _refuse_without_checkpoints(found)
    changed = (
        *_data_changed(found.dir, experiment.data),
        *identity.differences(found.experiment, experiment),
    )
    return RunToResume(found.dir, found.experiment, saving, changed)


def refuse_other_losses(found: RunToResume, fitted: FittedRun) -> NoReturn:
    """Say which settings change the losses, and which other runs could be resumed instead."""
    request, label = fitted.resolved.request, found.run.label
    lines = [
        f"RESUME={request.resume}: {label} ran with other settings, which change its losses:",
        *(f"  {difference}" for difference in found.curve_changes),
    ]
    if data := next((d for d in found.curve_changes if d.setting == "DATA"), None):
        lines.append(f'DATA="{data.before}" resumes on the same data')
    every, _ = finding.candidates(request.outdir, fitted.experiment.id)
    others = [
        run
        for run in finding.distinct(run for run in every if run.has_checkpoints)
        if run.dir != found.run and run.device == request.device
    ]
    if others:
        lines.append("other runs of this id with checkpoints, and what they have:")
        lines += finding.named(others, fitted.experiment)
    way_out = _way_out(found.curve_changes)
    lines.append(f"{way_out}; LOAD={label} begins a new run with its checkpoint")
    raise UserError("\n".join(lines))


def check_never_saved(run: RunDir, skipped: Sequence[str]) -> str:
    """What to say of a run that has no whole checkpoint, because it was ended before its first.

    Args:
        skipped: what is wrong with each checkpoint that is there.

    Raises:
        UserError: it kept checkpoints, and none can be used.
    """
    saved = [save.step for save in run.read_saves()]
    killed_in_first_save = all(line.endswith(checkpoints.UNFINISHED) for line in skipped)
    tracker = run.checkpoints / checkpoints.TRACKER
    if killed_in_first_save and not saved and not tracker.exists():
        return f"{run.label} was ended before its first checkpoint: it begins anew at step 1"
    gone = f"{f'step {saved[-1]}' if saved else 'one'} was saved and is no longer there"
    lines = [
        f"RESUME: {run.label} kept checkpoints in {run.checkpoints}, and none of them can be used:",
        *(f"  {line}" for line in skipped or [gone]),
        "put one back there from a copy; without RESUME= a new run begins at step 1, and this one"
        " stays as it is",
    ]
    raise UserError("\n".join(lines))


def at_its_end(run: RunDir, experiment: Experiment) -> bool:
    """Whether a run has nothing left to do as ``experiment``: it reached its steps, or its loss on
    held-out data."""
    try:
        result, frozen = run.read_result(), run.read_experiment()
    except ValueError:  # torn: it is computed again from its checkpoint
        return False
    if result is None or result.status not in ("ok", "target-missed"):
        return False
    reached_its_loss = result.status == "ok" and result.steps_done < result.steps
    return result.steps_done >= experiment.steps or (
        reached_its_loss and frozen.until == experiment.until
    )


def _data_changed(run: RunDir, data: str) -> Iterator[Difference]:
    """Data sets of the same name whose contents changed since the run was started."""
    before = run.read_data_sets()
    now = fingerprint.of(data) if before else {}
    for name in before.keys() & now.keys():
        there, here = before[name] if isinstance(before[name], dict) else {}, now[name]
        if differing := [key for key in there.keys() & here.keys() if there[key] != here[key]]:
            key = "tokens" if "tokens" in differing else min(differing)
            yield Difference(
                f"the contents of DATA={name}", f"{key} {there[key]}", f"{key} {here[key]}", True
            )


def _labelled(fitted: FittedRun) -> Candidate:
    """The run with the label of ``RESUME=label``, which must be of this row and kind of device."""
    request, experiment = fitted.resolved.request, fitted.experiment
    label = request.resume
    every, problems = finding.candidates(request.outdir)
    found = next((candidate for candidate in every if candidate.dir.label == label), None)
    if found is None:
        torn = next((problem for problem in problems if problem.startswith(f"{label}: ")), None)
        labels = [run.dir.label for run in every if run.experiment.id == experiment.id]
        raise UserError(
            f"RESUME={label}: expected 0, 1 or auto, or the label of a run in {request.outdir}; "
            f"{torn or nearest(label, labels)}"
        )
    there, here = _kind(found.experiment, found.device), _kind(experiment, request.device)
    if there != here:
        raise UserError(
            f"RESUME={label}: that is {there}, and this is {here}\n"
            f"LOAD={label} begins a new run with its checkpoint"
        )
    return found


def _kind(experiment: Experiment, device: str) -> str:
    size = "a miniature of " if experiment.miniature else ""
    return f"{size}{experiment.id} on {'a CPU' if device == 'cpu' else 'GPUs'}"


def _same_and_saved(fitted: FittedRun) -> Candidate | None:
    """The newest run of exactly this experiment that keeps checkpoints, also before its first."""
    every, _ = _of_this_kind(fitted)
    return next(
        (
            run
            for run in every
            if identity.same(run.experiment, fitted.experiment) and run.dir.read_saving()
        ),
        None,
    )


def _of_this_kind(fitted: FittedRun) -> tuple[list[Candidate], list[str]]:
    """Runs of the same row, device and size, the newest first, and what is wrong with others."""
    request, experiment = fitted.resolved.request, fitted.experiment
    every, problems = finding.candidates(request.outdir, experiment.id)
    here = (request.device, experiment.miniature)
    return [run for run in every if (run.device, run.experiment.miniature) == here], problems


def _of_experiment(fitted: FittedRun) -> Candidate:
    """The newest run of the same experiment; else of one that differs in what may change."""
    request, experiment = fitted.resolved.request, fitted.experiment
    every, problems = _of_this_kind(fitted)
    exact = [run for run in every if identity.same(run.experiment, experiment)]
    if exact:
        return next((run for run in exact if run.has_checkpoints), exact[0])
    kept = [run for run in every if run.has_checkpoints]
    alike = [run for run in kept if not _loses_its_curve(run, experiment)]
    if chosen := alike or (kept if request.settings.get("FORCE") == "1" else []):
        return finding.one(experiment.id, chosen, "RESUME=label names the one to resume")
    if kept:
        return kept[0]  # refused where stages are checked, which says what differs
    if every:
        _refuse_without_checkpoints(every[0])
    there_is = "; ".join(problems) or f"there is no run {experiment.label} in {request.outdir}"
    raise UserError(
        f"RESUME=1: {there_is}\nstart one with SAVE=1, and SAVE_EVERY= steps; RESUME=auto starts it"
        " where there is none; LOAD=label begins a new run with the checkpoint of another"
    )


def _loses_its_curve(run: Candidate, experiment: Experiment) -> bool:
    return any(d.curve for d in identity.differences(run.experiment, experiment))


def _way_out(curve: Sequence[Difference]) -> str:
    """What a user can do about settings that change the losses. FORCE=1 is no way to other learning
    rates (``checkpoint_fits``)."""
    if any(d.setting in ("LR", "MIN_LR") for d in curve):
        return (
            "give the earlier settings: upstream finds the optimizer's state by its learning rates"
        )
    return "give the earlier settings; or FORCE=1 resumes with these, and the run records the step"


def _refuse_without_checkpoints(found: Candidate) -> NoReturn:
    raise UserError(
        f"RESUME: {found.dir.label} kept no checkpoints, there is nothing to resume from\n"
        f"start anew with SAVE=1: make {found.experiment.id} SAVE=1"
    )
