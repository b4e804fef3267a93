"""The commands ``make import-hf`` and ``make export-hf``."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path

from harness import ROOT
from harness.convert.weights import WEIGHTS
from harness.data import data_sets
from harness.errors import UserError
from harness.experiment import command_line
from harness.finetune.adapters import FOLDER, read_record
from harness.run import finding
from harness.run.checkpoints import METADATA, TRACKER
from harness.system.files import expanded

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def import_hf(settings: Mapping[str, str], folder: Path = WEIGHTS) -> int:
    """Import HF= into ``folder``/NAME and print a summary.

    Raises:
        UserError: see ``importing.import_folder``; NAME= exists already, or DATA= was made by
            another tokenizer.
    """
    source = settings["HF"]
    name = settings.get("NAME") or Path(source.partition("@")[0]).name
    if not _NAME.fullmatch(name):
        raise UserError(f"NAME={name}: use letters, digits and . _ -, a letter or digit first")
    target = folder / name
    if target.exists() and settings.get("FORCE") != "1":
        raise UserError(f"{target} exists already\nFORCE=1 replaces it, NAME=… writes another one")
    layout = {
        axis.lower(): command_line.count(axis, settings[axis])
        for axis in ("TP", "PP", "EP")
        if axis in settings
    }
    from harness.convert.importing import import_folder

    data = (
        data_sets.blend(settings["DATA"])
        if settings.get("DATA", data_sets.MOCK) != data_sets.MOCK
        else None
    )
    begun = time.monotonic()
    weights = import_folder(source, target, data=data, **layout)
    print(
        f"{target}: {weights.architecture}, {weights.parameters:,} parameters,"
        f" {weights.bytes / 2**30:.2f} GiB in {time.monotonic() - begun:.0f} s"
    )
    if weights.dequantized:
        print(
            f"  {weights.dequantized} tensors were MXFP4 and are bf16 now: the same values, nearly"
            " four times the bytes"
        )
    if not weights.tokenizer:
        print("  the folder has no tokenizer")
    print(f"  make <id> WEIGHTS={name} continues training from them")
    print(f"  upstream's arguments: --load {target} --seq-length … {' '.join(weights.flags)}")
    return 0


def export_hf(settings: Mapping[str, str], outdir: Path | None = None) -> int:
    """Export RUN=, a run in ``outdir`` or a folder, to OUT= and print a summary.

    Raises:
        UserError: see ``exporting.export_checkpoint``; or OUT= is not empty.
    """
    outdir = outdir or finding.outdir(settings)
    target = expanded(settings["OUT"]).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(
            f"OUT={settings['OUT']} exists already and is not empty; name another one, or remove it"
        )
    from harness.convert import hub
    from harness.convert.exporting import export_checkpoint

    like = hub.locate(settings["HF"]) if "HF" in settings else None
    begun = time.monotonic()
    run = finding.label_of(settings["RUN"], outdir)
    adapters = outdir / run / FOLDER
    trained = read_record(adapters)
    folder = ROOT / trained.base if trained and trained.base else saved(run, outdir)
    if command_line.switch("ADAPTERS", settings.get("ADAPTERS", "0")):
        return _export_adapters(adapters, folder, target, like)
    done = export_checkpoint(folder, target, like=like, adapters=adapters if trained else None)
    if trained:
        print(
            f"  adapters of rank {trained.lora.rank}, step {trained.iteration}, are merged into"
            f" {folder}"
        )
    print(
        f"{target}: {done.architecture}, {done.parameters:,} parameters, {done.bytes / 2**30:.2f}"
        f" GiB in {done.files} file{'s' if done.files > 1 else ''},"
        f" {time.monotonic() - begun:.0f} s"
    )
    if done.tokenizer is None:
        print("  no tokenizer was found; HF=folder takes one from there")
    return 0


def _export_adapters(adapters: Path, base: Path, target: Path, like: Path | None) -> int:
    from harness.convert.adapters import export_peft
    from harness.convert.weights import read

    start = read(base)
    named = str(like) if like else start.source if start else str(base)
    parameters = export_peft(adapters, base, target, named)
    print(f"{target}: PEFT's adapters, {parameters:,} parameters, for {named}")
    return 0


def saved(run: str, outdir: Path) -> Path:
    """The folder with checkpoints of ``run``: a run's label, a name in weights/, or any folder.

    Raises:
        UserError: there is none, or it has no checkpoint.
    """
    places = [place for place in (outdir / run, WEIGHTS / run, expanded(run)) if place.is_dir()]
    if not places:
        raise UserError(
            f"RUN={run}: no run of this label in {outdir}, no weights of this name, and no such"
            " folder"
        )
    for place in places:
        for folder in (place, *sorted(tracker.parent for tracker in place.glob(f"*/{TRACKER}"))):
            if (folder / TRACKER).exists() or (folder / METADATA).exists():
                return folder.resolve()
    raise UserError(f"RUN={run}: {places[0]} has no checkpoint\nSAVE=1 makes a run keep some")
