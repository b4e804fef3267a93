"""The run directory: the name of every file in it, and readers that survive what a killed run
leaves.

experiment.json    the experiment with its overrides; device, source commit, data sets
command.sh         exactly what ran; ``HARNESS_RUN_DIR=… bash command.sh`` runs it again
environment.json   versions, GPU, driver, git commit, upstream commit, host, launch rate
logs.txt           everything that torchrun and the ranks printed
metrics.jsonl      one line a step          validation.jsonl   one line an evaluation
saves.jsonl        one line a checkpoint    checkpoints/       with SAVE=1
ranks/             <rank>.json (memory, coordinates), <rank>.error.json, <rank>.stacks.txt
traces/            <rank>.json.gz: Kineto traces of a profiled run; profile.json: their summary
gpus.jsonl         NVML samples
running.json       the launcher's process, its start, the rendezvous
lock               the process that uses the directory now (harness/system/locks.py)
result.json        written last: a directory without it and without a lock is of a killed run
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError

from harness.errors import first_line
from harness.run.checkpoints import Saving
from harness.run.schema import (
    Change,
    Rank,
    RankError,
    Result,
    Running,
    RunRecord,
    Save,
    State,
    StepMetrics,
    Validation,
    parse_line,
)
from harness.system import locks
from harness.system.files import complaint, read_object, text_lines, write_json

if TYPE_CHECKING:
    from harness.experiment.experiment import Experiment

RUN_DIR_VARIABLE = "HARNESS_RUN_DIR"
"""Environment variable with the run directory. It also identifies every process of a run."""

TURN_VARIABLE = "HARNESS_TURN"
"""Environment variable of a held run: the path of a file. Its ranks import everything, then wait
until the file exists."""

PROFILE_VARIABLE = "HARNESS_PROFILE"
"""Environment variable with the steps to trace: ``8-9``."""


class _Frozen(RunRecord):
    """What experiment.json holds in addition to the experiment and its device."""

    commit: str | None = None
    saving: Saving | None = None
    changed: tuple[Change, ...] = ()
    data_sets: dict[str, Any] = Field(default_factory=dict)


def _file(name: str) -> property:
    return property(lambda run_dir: run_dir.path / name)


@dataclass(frozen=True)
class RunDir:
    """The files of one run directory."""

    path: Path

    experiment_json = _file("experiment.json")
    command = _file("command.sh")
    environment = _file("environment.json")
    logs = _file("logs.txt")
    metrics = _file("metrics.jsonl")
    validation = _file("validation.jsonl")
    saves = _file("saves.jsonl")
    ranks = _file("ranks")
    traces = _file("traces")
    profile = _file("profile.json")
    gpus = _file("gpus.jsonl")
    running = _file("running.json")
    result = _file("result.json")
    wandb_run = _file("wandb.json")
    """The id of this run at Weights & Biases."""
    turn = _file("turn")
    """While a run is held, its ranks wait until this file exists."""

    @property
    def label(self) -> str:
        return self.path.name

    def logs_of_node(self, node_rank: int) -> Path:
        """The log of a further node that shares this directory."""
        return self.path / f"logs.node{node_rank}.txt"

    @property
    def checkpoints(self) -> Path:
        """The folder of its checkpoints: in this directory, unless SAVE= named another."""
        saving = self.read_saving()
        return saving.in_run(self.path) if saving else self.path / "checkpoints"

    def freeze_experiment(
        self,
        experiment: Experiment,
        device: str,
        commit: str | None,
        saving: Saving | None = None,
        changed: Iterable[Change] = (),
        data_sets: Mapping[str, Any] | None = None,
    ) -> None:
        """Write experiment.json.

        Args:
            commit: of the harness.
            saving: how checkpoints are kept.
            changed: settings that changed when the run was resumed.
            data_sets: fingerprints of its data sets, by name (harness/data/fingerprint.py).
        """
        more = _Frozen(
            commit=commit, saving=saving, changed=tuple(changed), data_sets=data_sets or {}
        )
        write_json(
            self.experiment_json,
            {
                **experiment.model_dump(mode="json"),
                "device": device,
                **more.model_dump(mode="json"),
            },
        )

    def read_saving(self) -> Saving | None:
        """How this run keeps checkpoints; None where it keeps none, or where that is unknown."""
        return self._frozen().saving

    def read_data_sets(self) -> dict[str, Any]:
        """Fingerprints of its data sets, by name; empty where they are unknown."""
        return self._frozen().data_sets

    def read_changes(self) -> tuple[Change, ...]:
        """Settings that changed when it was resumed; none where that is unknown."""
        return self._frozen().changed

    def _frozen(self) -> _Frozen:
        try:
            return _read(self.experiment_json, _Frozen)
        except ValueError:
            return _Frozen()

    def read_experiment(self) -> Experiment:
        """The experiment as it ran. Raises ValueError where experiment.json is not one."""
        return experiment_in(read_object(self.experiment_json))

    def read_device(self) -> str:
        """``cpu`` or ``cuda``. Raises ValueError where experiment.json does not say."""
        device = read_object(self.experiment_json).get("device")
        if device not in ("cpu", "cuda"):
            raise ValueError(f"{self.experiment_json}: device is {device!r}")
        return device

    def read_result(self) -> Result | None:
        """The result; None where there is none. Raises ValueError where it is corrupt."""
        return _read(self.result, Result) if self.result.exists() else None

    def read_running(self) -> Running | None:
        """The process that runs or ran it; None where that is unknown."""
        try:
            return _read(self.running, Running)
        except ValueError:
            return None

    def read_metrics(self) -> tuple[StepMetrics, ...]:
        """Every step of metrics.jsonl, without a last line that a kill left incomplete."""
        return tuple(_lines(self.metrics, StepMetrics))

    def read_validation(self) -> tuple[Validation, ...]:
        """Every evaluation; of two at one step the first, which decides whether a loss is reached.

        Upstream evaluates again after the last step, on other batches. Early runs kept both, and a
        run resumed at its last step has two.
        """
        found: dict[tuple[str, int], Validation] = {}
        for line in _lines(self.validation, Validation):
            found.setdefault((line.split, line.step), line)
        return tuple(found.values())

    def read_saves(self) -> tuple[Save, ...]:
        """Every checkpoint in saves.jsonl."""
        return tuple(_lines(self.saves, Save))

    def read_ranks(self) -> tuple[Rank, ...]:
        """The reports of all ranks, by rank."""
        return self._rank_files(r"\d+\.json", Rank)

    def read_rank_errors(self) -> tuple[RankError, ...]:
        """The exceptions that ended ranks, by rank."""
        return self._rank_files(r"\d+\.error\.json", RankError)

    def stacks(self) -> dict[int, Path]:
        """The files with stacks of a rank's threads, by rank."""
        return {
            int(path.name.split(".")[0]): path for path in sorted(self.ranks.glob("*.stacks.txt"))
        }

    def state(self) -> State:
        """``running`` while a process holds its lock, else how the run ended.

        Without a result it was killed. This is for listings, which do not wait to watch the lock of
        another machine (``locks.holder``); a command that deletes or resumes a run takes its lock.

        Raises:
            ValueError: result.json is corrupt.
        """
        if locks.holder(self.path, watch=False):
            return "running"
        result = self.read_result()
        return result.status if result else "killed"

    def _rank_files[Record: RunRecord](
        self, pattern: str, kind: type[Record]
    ) -> tuple[Record, ...]:
        found = []
        for path in self.ranks.glob("*.json"):
            if re.fullmatch(pattern, path.name):
                try:
                    found.append(_read(path, kind))
                except ValueError:
                    continue
        return tuple(sorted(found, key=lambda record: record.rank))


@dataclass(frozen=True)
class StoredRun:
    """A run directory that could be read."""

    dir: RunDir
    experiment: Experiment
    device: str
    state: State
    result: Result | None


def experiment_in(frozen: Mapping[str, Any]) -> Experiment:
    """The experiment in ``frozen``, without fields that this version does not know.

    Raises:
        ValidationError: it describes none.
    """
    from harness.experiment.experiment import Experiment

    return Experiment.model_validate_json(
        json.dumps({k: v for k, v in frozen.items() if k in Experiment.model_fields})
    )


def still_runs(run_dir: RunDir, holder: locks.Holder | None) -> str:
    """A message: ``holder`` uses ``run_dir``, and how to end it."""
    if holder and holder.is_here:
        way_out = f"make stop RUN={run_dir.label} OUTDIR={run_dir.path.parent} ends it"
    else:
        way_out = "wait until it is over" + (f", or end it on {holder.host}" if holder else "")
    return f"{run_dir.label} still runs: {holder or 'another process'} has it\n{way_out}"


def runs(outdir: Path) -> tuple[tuple[StoredRun, ...], tuple[str, ...]]:
    """Every run in ``outdir`` by label, and a warning for each corrupt directory, which is left
    out."""
    found, warnings = [], []
    for path in sorted(outdir.iterdir()) if outdir.is_dir() else []:
        run_dir = RunDir(path)
        if not run_dir.experiment_json.exists() and not run_dir.result.exists():
            continue
        try:
            found.append(
                StoredRun(
                    run_dir,
                    run_dir.read_experiment(),
                    run_dir.read_device(),
                    run_dir.state(),
                    run_dir.read_result(),
                )
            )
        except ValueError as error:
            warnings.append(f"{path}: skipped: {first_line(error)}")
    return tuple(found), tuple(warnings)


def _read[Record: RunRecord](path: Path, kind: type[Record]) -> Record:
    try:
        return kind.model_validate(read_object(path))
    except ValidationError as error:
        raise ValueError(complaint(path, error)) from None


def _lines[Record: RunRecord](path: Path, kind: type[Record]) -> Iterator[Record]:
    return (record for line in text_lines(path) if (record := parse_line(line, kind)))
