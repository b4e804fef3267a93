"""Prepared data sets: what lies in data/<name>/ and is ready to train on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from harness.catalog import ROOT, Experiment
from harness.errors import UserError, nearest

DATA = ROOT / "data"


@dataclass(frozen=True)
class DataSet:
    """A data set in Megatron's IndexedDataset format and the tokenizer that made it.

    ``prefix`` is the path of the ``.bin``/``.idx`` pair without its ending; ``tokenizer`` is a folder with tokenizer.json.
    """

    name: str
    prefix: Path
    tokenizer: Path


def prepared(folder: Path = DATA) -> tuple[str, ...]:
    """Names of the data sets in ``folder`` whose .bin/.idx pair is there."""
    return tuple(sorted(p.parent.name for p in folder.glob("*/*_text_document.idx") if p.stem.startswith(p.parent.name)))


def find(name: str, folder: Path = DATA) -> DataSet:
    """The prepared data set ``name``. Raises UserError where it, its pair of files or its tokenizer is missing."""
    home = folder / name
    prefix = home / f"{name}_text_document"
    for path in (prefix.with_suffix(".idx"), prefix.with_suffix(".bin"), home / "tokenizer" / "tokenizer.json"):
        if not path.is_file():
            known = prepared(folder)
            others = nearest(name, [*known, "mock"]) if not home.is_dir() else "prepare it again"
            raise UserError(f"DATA={name}: {path} is missing; {others}")
    return DataSet(name, prefix, home / "tokenizer")


def default_for(experiment: Experiment, folder: Path = DATA) -> str:
    """The data an experiment runs on unless DATA= says else: the published set where it is prepared, mock otherwise."""
    published = experiment.published_data
    return published if published in prepared(folder) else experiment.data
