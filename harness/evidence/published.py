"""What others published of models on many GPUs, each as a model with settings: published.yaml."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from harness.errors import UserError, nearest
from harness.experiment.catalog import EXPERIMENTS, load_models
from harness.experiment.experiment import Experiment
from harness.experiment.hardware import required_card
from harness.experiment.model import Checked, Model
from harness.experiment.unlisted import experiment_from
from harness.system import yaml_files

PUBLISHED = EXPERIMENTS / "published.yaml"

Text = Annotated[str, Field(min_length=1)]
Positive = Annotated[float, Field(gt=0, strict=False)]


_MEASURED = ("step_ms", "allocated_gib", "reserved_gib")


class Result(Checked):
    """One published run: what ran, and what was measured of it."""

    model: Model
    settings: dict[str, str]
    """As ``make plan`` takes them."""
    step_ms: Positive | None = None
    allocated_gib: Positive | None = None
    """As torch.cuda.max_memory_allocated counts it, on the fullest rank."""
    reserved_gib: Positive | None = None

    @cached_property
    def experiment(self) -> Experiment:
        """What ran. Raises UserError where settings or sizes are wrong."""
        return experiment_from(self.model, self.settings)

    @property
    def name(self) -> str:
        return " ".join(
            [self.model.name, *(f"{key}={self.settings[key]}" for key in self.settings)]
        )


class Group(Checked):
    """Results of one source on one kind of GPU."""

    name: Text
    source: Text
    software: Text
    card: Text
    results: tuple[Result, ...]


def load(path: Path = PUBLISHED) -> dict[str, Group]:
    """Every group by name.

    Raises:
        UserError: a name or a value is wrong; the message names the row.
    """
    return {name: _group(name, raw) for name, raw in yaml_files.read(path).items()}


def _group(name: str, raw: Any) -> Group:
    fields = dict(yaml_files.mapping(raw, name))
    required_card(str(fields.get("card")), f"{PUBLISHED.name}: {name}: card")
    common = yaml_files.mapping(fields.pop("settings", {}), f"{name}: settings")
    changed = yaml_files.mapping(fields.pop("models", {}), f"{name}: models")
    rows = enumerate(fields.pop("rows", ()), 1)
    results = tuple(_result(f"{name}: row {n}", row, common, changed) for n, row in rows)
    return yaml_files.build(Group, {"name": name, **fields, "results": results}, name)


def _result(where: str, row: Any, common: dict[str, Any], changed: dict[str, Any]) -> Result:
    fields = dict(yaml_files.mapping(row, where))
    measured = {key: fields.pop(key) for key in _MEASURED if key in fields}
    models, name = load_models(), fields.pop("model", "")
    if name not in models:
        raise UserError(
            f"{PUBLISHED.name}: {where}: unknown model {name!r}; {nearest(name, models)}"
        )
    whole = {key: getattr(models[name], key) for key in Model.model_fields}
    model = yaml_files.build(Model, whole | changed.get(name, {}), f"{where}: models: {name}")
    settings = {key: str(value) for key, value in {**common, **fields}.items()}
    return yaml_files.build(Result, {"model": model, "settings": settings, **measured}, where)
