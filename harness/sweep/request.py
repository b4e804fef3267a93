"""What ``make sweep`` was asked for: a row, what varies, and on which device."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from harness.errors import UserError
from harness.evidence.memory import cards_of
from harness.evidence.tables import FORMATS
from harness.experiment.catalog import load_catalog
from harness.experiment.command_line import EXPERIMENT_SETTINGS, choice, count, count_in
from harness.experiment.experiment import Experiment
from harness.experiment.hardware import Card, required_card
from harness.machine import gpus
from harness.planning import resolved
from harness.planning.plan import choose_device
from harness.planning.request import read_request
from harness.predict.calibrations import Machine, machine_here
from harness.run import finding
from harness.sweep import grid
from harness.sweep.grid import Grid
from harness.upstreams.megatron_lm.flags import Device

OWN = ("ID", "GRID", "TOP", "METHOD", "TRIALS", "SEED", "FORMAT")
"""Settings of the command itself; all others are those of every run."""
OF_THE_BATCH = ("DRY_RUN", "PACK", "FORCE")
"""Settings of how runs are started together, not of each."""
USAGE = 'make sweep ID=111 GRID="TP=1,2 MBS=5,15", or make sweep ID=111 TOP=10'
TRIALS = 20
"""Runs of an adaptive search, unless TRIALS= is given."""
SEED = 1
"""Of an adaptive search, unless SEED= is given."""
FOLDER = "sweeps"
"""Where in OUTDIR every sweep has a folder."""


@dataclass(frozen=True)
class Search:
    """An adaptive search: how many runs, and the seed of its choices."""

    trials: int
    seed: int


@dataclass(frozen=True)
class SweepRequest:
    """What varies around a row.

    Attributes:
        row: as the catalogue has it.
        base: settings of every run, such as STEPS.
        grid: what varies; None: the predictor's best ``top`` set-ups.
        search: an adaptive search of ``grid``; None: all of its points.
        card: predictions are for this one.
        source: where the rates of ``machine`` come from.
        outdir: where run directories go.
    """

    row: Experiment
    base: Mapping[str, str]
    grid: Grid | None
    top: int | None
    search: Search | None
    device: Device
    card: Card
    machine: Machine | None
    source: str
    outdir: Path

    @property
    def experiment(self) -> Experiment:
        """The row with the settings of every run, at full size."""
        return resolved.with_settings(self.row, self.base, self.outdir)

    @property
    def changed(self) -> dict[str, str]:
        """The settings of every run that change the experiment."""
        kinds = {one.key for one in EXPERIMENT_SETTINGS}
        return {key: value for key, value in self.base.items() if key in kinds}

    @property
    def folder(self) -> Path:
        """Where this sweep keeps its table: the same for the same command."""
        """Where this sweep keeps its table: the same for the same command."""
        varied = "_".join(self.grid).lower() if self.grid else f"top{self.top}"
        asked = {
            "grid": self.grid,
            "top": self.top,
            "base": self.changed,
            "device": self.device,
            "seed": self.search and self.search.seed,
        }
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:6]
        return self.outdir / FOLDER / f"{self.row.id}_{varied[:60]}-{digest}"

    @property
    def command(self) -> str:
        """What it varies, for headings."""
        if self.grid:
            return grid.in_words(self.grid)
        return f"the predictor's best {self.top}"


def read_sweep(settings: Mapping[str, str]) -> SweepRequest:
    """The request in the ``settings`` of the command line.

    Raises:
        UserError: a setting is invalid, or does not go with the others.
    """
    choice("FORMAT", settings.get("FORMAT", "terminal"), FORMATS)
    row = load_catalog().find(settings["ID"])
    base = {key: value for key, value in settings.items() if key not in (*OWN, *OF_THE_BATCH)}
    _refuse_settings_of_one_run(settings)
    if ("GRID" in settings) == ("TOP" in settings):
        given = "both are given; leave one out" if "GRID" in settings else "neither is given"
        raise UserError(f"GRID= or TOP= says what varies; {given}\n{USAGE}")
    varied = grid.read(settings["GRID"], row, base) if "GRID" in settings else None
    only_show = settings.get("DRY_RUN") == "1"
    device = _device(settings, only_show)
    read_request(row, base, device)
    outdir = finding.outdir(settings)
    _check_steps(row, base)
    # where nothing says which, the largest: no point is left out that a card might hold
    card = max(
        cards_of(row.model_copy(update={"card": base.get("CARD")})),
        key=lambda card: card.memory_mib,
    )
    if "CARD" in base:
        required_card(base["CARD"], "CARD")
    machine, source = machine_here(card, outdir, gpus.uuids())
    top = count("TOP", settings["TOP"]) if "TOP" in settings else None
    search = _search(settings, varied)
    return SweepRequest(row, base, varied, top, search, device, card, machine, source, outdir)


def _refuse_settings_of_one_run(settings: Mapping[str, str]) -> None:
    """Raise UserError for settings that several runs cannot share."""
    id_ = settings["ID"]
    if settings.get("K8S", "0") != "0":
        raise UserError(
            f"K8S={settings['K8S']} is for one experiment; a sweep runs here, or as a job array"
            " with SLURM=1"
        )
    if settings.get("RESUME", "0") != "0":
        raise UserError(
            "RESUME=1 resumes one run from its checkpoint; a sweep resumes by itself: the same"
            " command runs what has no result yet"
        )
    if settings.get("SAVE", "0") not in ("0", "1"):
        raise UserError(
            f"SAVE={settings['SAVE']}: runs cannot keep their checkpoints in one folder; SAVE=1"
            " keeps them in each run's directory"
        )
    for key in ("NODE_RANK", "RENDEZVOUS"):
        if key in settings:
            raise UserError(
                f"{key}= is for one run on several nodes: make {id_} {key}={settings[key]}\n"
                "SLURM=1 makes a sweep a job array, whose tasks may have several nodes"
            )


def _device(settings: Mapping[str, str], only_show: bool) -> Device:
    if settings.get("SLURM") != "1":
        return choose_device(settings, only_show=only_show)
    if settings.get("DEVICE", "cuda") != "cuda":
        raise UserError(
            f"SLURM=1 DEVICE={settings['DEVICE']}: jobs run on GPUs; leave one of them out"
        )
    return "cuda"


def _check_steps(row: Experiment, base: Mapping[str, str]) -> None:
    """Raise UserError where too few steps are run for a step time."""
    first, steps = row.window_first_step, count_in(base, "STEPS")
    if steps and steps < first:
        raise UserError(
            f"STEPS={steps}: step times are averaged from step {first} on, so nothing"
            f" would be measured; set STEPS={2 * first} or more"
        )


def _search(settings: Mapping[str, str], varied: Grid | None) -> Search | None:
    if "METHOD" not in settings:
        for key in ("TRIALS", "SEED"):
            if key in settings:
                raise UserError(f"{key}= is for METHOD=optuna; add it, or leave {key}= out")
        return None
    choice("METHOD", settings["METHOD"], ("optuna",))
    if varied is None:
        raise UserError("METHOD=optuna searches GRID=; TOP= lists what to run already")
    if settings.get("SLURM") == "1":
        raise UserError(
            "METHOD=optuna chooses each run by the results before it, which a job array does not"
            " have; leave METHOD= or SLURM= out"
        )
    trials = count("TRIALS", settings.get("TRIALS", str(TRIALS)))
    return Search(trials, count("SEED", settings.get("SEED", str(SEED)), least=0))
