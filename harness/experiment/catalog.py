"""The catalogue: models and experiments, read from experiments/*.yaml."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from pydantic import Field

from harness import ROOT
from harness.errors import UserError, nearest
from harness.experiment.constraints import checked
from harness.experiment.experiment import ID, Experiment
from harness.experiment.model import Checked, Count, Model
from harness.system import yaml_files

EXPERIMENTS = ROOT / "experiments"


class Chapter(Checked):
    """One file of experiments, with the settings that they share."""

    chapter: Count
    title: str
    defaults: dict[str, Any] = Field(default_factory=dict)
    experiments: dict[str, dict[str, Any]]


class Catalog(Checked):
    """Every experiment, by id."""

    chapters: dict[int, str]
    experiments: tuple[Experiment, ...]

    @cached_property
    def _by_name(self) -> dict[str, Experiment]:
        return {e.id: e for e in self.experiments} | {e.name: e for e in self.experiments}

    def find(self, wanted: str) -> Experiment:
        """The experiment with this id (``101``) or full name. Raises UserError with nearest ids."""
        found = self._by_name.get(wanted) or self._by_name.get(wanted.split("-")[0])
        if found and wanted in (found.id, found.name):
            return found
        if found:
            raise UserError(f"no experiment is called {wanted}; {found.id} is {found.name}")
        ids = [e.id for e in self.experiments if not e.half_of]
        if re.fullmatch(r"\d+", wanted):
            close = sorted(sorted(ids, key=lambda i: abs(int(i) - int(wanted)))[:5])
            raise UserError(
                f"no experiment {wanted}; nearest ids: {', '.join(close)} (make list shows all)"
            )
        raise UserError(f"no experiment {wanted}; {nearest(wanted, ids)} (make list shows all)")

    def in_chapter(self, number: int) -> tuple[Experiment, ...]:
        """The experiments of one chapter, in order. Raises UserError for an unknown chapter."""
        if number not in self.chapters:
            raise UserError(f"no chapter {number}; {nearest(str(number), map(str, self.chapters))}")
        return tuple(e for e in self.experiments if e.chapter == number)


@cache
def load_catalog(folder: Path = EXPERIMENTS) -> Catalog:
    """Read models.yaml and every NNN-*.yaml in ``folder``, once a process.

    Raises:
        UserError: a key or name is unknown, a value has the wrong type, a constraint is broken, or
            an id occurs twice.
    """
    models = load_models(folder)
    chapters: dict[int, str] = {}
    experiments: dict[str, Experiment] = {}
    for path in sorted(folder.glob("[0-9]*.yaml")):
        raw = yaml_files.read(path)
        rows = yaml_files.mapping(raw.get("experiments"), f"{path.name}: experiments")
        raw["experiments"] = {}
        for key, row in rows.items():
            with yaml_files.entry(path, rows, key):
                raw["experiments"][str(key)] = yaml_files.words(row, f"{path.name}: {key}")
        chapter = yaml_files.build(Chapter, raw, path.name)
        chapters[chapter.chapter] = chapter.title
        for key in rows:
            with yaml_files.entry(path, rows, key):
                experiment = _row(chapter, str(key), models, path.name)
                if experiment.id in experiments:
                    raise UserError(
                        f"{path.name}: experiment {experiment.id} is already in chapter"
                        f" {experiments[experiment.id].chapter}"
                    )
                experiments[experiment.id] = experiment
    return Catalog(
        chapters=dict(sorted(chapters.items())),
        experiments=tuple(experiments[i] for i in sorted(experiments)),
    )


@cache
def load_models(folder: Path = EXPERIMENTS) -> Mapping[str, Model]:
    """Every model of models.yaml in ``folder``, by name. Raises UserError as ``load_catalog``."""
    path = folder / "models.yaml"
    rows, models = yaml_files.read(path), {}
    for name in rows:
        with yaml_files.entry(path, rows, name):
            where = f"model {yaml_files.word(name, f'{path.name}: model', 'gpt2-xl')}"
            models[name] = yaml_files.build(
                Model, {"name": name, **yaml_files.mapping(rows[name], where)}, where
            )
    return models


def _row(chapter: Chapter, id_: str, models: Mapping[str, Model], file: str) -> Experiment:
    """One row of a chapter's file. Raises UserError if it is not valid."""
    if not re.fullmatch(ID, id_):
        raise UserError(f"{file}: {id_}: an id has three digits, the first not 0, and perhaps an h")
    fields = {**chapter.defaults, **chapter.experiments[id_], "id": id_, "chapter": chapter.chapter}
    name = yaml_files.word(
        fields.get("model", ""), f"{file}: {id_}: model", next(iter(models), "gpt2-xl")
    )
    if name not in models:
        raise UserError(f"{file}: {id_}: unknown model {name!r}; {nearest(name, models)}")
    return checked({**fields, "model": models[name]}, id_)
