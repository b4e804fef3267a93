"""``make checkpoints``: the checkpoints of one run, or of all, with step, loss and state."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from harness.run import checkpoints, finding
from harness.run.checkpoints import LARGE_BYTES, Checkpoint
from harness.run.directory import RunDir, runs


def print_list(outdir: Path, label: str | None, read_bytes: float = LARGE_BYTES) -> int:
    """Print the checkpoints of one run or folder, or of every run in ``outdir``. Returns the exit
    status.

    Args:
        read_bytes: how much is read to compare checksums; checkpoints beyond it are listed as not
        compared.

    Raises:
        UserError: there is no such run.
    """
    if label:
        folders = [run.checkpoints for run in finding.with_checkpoints(label, outdir)] or [
            finding.checkpoint_folder(label, outdir)
        ]
    else:
        folders = [run.dir.checkpoints for run in runs(outdir)[0]]
    found = {folder: checkpoints.in_folder(folder) for folder in dict.fromkeys(folders)}
    if not any(found.values()):
        print(f"no checkpoints in {label or outdir}: SAVE=1 makes a run keep some")
        return 1
    for folder, those in found.items():
        states = []
        for checkpoint in those:
            read_bytes -= checkpoint.size_bytes
            states.append((checkpoint, _state(checkpoint, read_bytes >= 0)))
        print(*_lines(folder, states), sep="\n", end="\n" * bool(states))
    return 0


def damaged_at_the_end(run: RunDir) -> str | None:
    """The damaged checkpoints of a run that are newer than its newest whole one, and that one;
    None: none is."""
    damaged: list[str] = []
    for found in reversed(checkpoints.in_folder(run.checkpoints)):
        if found.damage is None:
            way_out = (
                f"the newest whole one is of step {found.step}: LOAD={run.label} begins a new run"
                " with it"
            )
            break
        damaged.append(f"checkpoint of step {found.step} is damaged: {found.damage}")
    else:
        way_out = "none is whole: SAVE=1 without RESUME= trains anew"
    return "\n".join([*damaged, way_out]) if damaged else None


def _lines(folder: Path, states: list[tuple[Checkpoint, str]]) -> Iterator[str]:
    run = RunDir(folder.parent)
    losses = {m.step: m.loss for m in run.read_metrics()}
    held_out = {v.step: v.loss for v in run.read_validation() if v.split == "validation"}
    if states:
        name = run.label if run.experiment_json.exists() else str(folder)
        yield name
        yield f"  {'step':>8}  {'GiB':>8}  {'parameters':>14}  {'loss':>8}  {'held-out':>8}  state"
    for checkpoint, state in states:
        loss, validation = losses.get(checkpoint.step), held_out.get(checkpoint.step)
        cells = (
            f"{checkpoint.gib:.3f}",
            f"{checkpoint.contents.parameters:,}" if checkpoint.contents else "",
            "" if loss is None else f"{loss:.4f}",
            "" if validation is None else f"{validation:.4f}",
        )
        yield "  {:>8}  {:>8}  {:>14}  {:>8}  {:>8}  {}".format(checkpoint.step, *cells, state)


def _state(found: Checkpoint, read: bool) -> str:
    """Whether it is whole; where ``read`` allows it, its bytes are compared with its checksums."""
    if read:
        found = checkpoints.verify(found)
    if found.damage:
        return found.damage
    what = "whole" if found.contents and found.contents.has_optimizer else "whole, weights only"
    if not found.has_checksums:
        return f"{what}, saved without checksums"
    return what if read else f"{what}, checksums not compared (VERIFY=1)"
