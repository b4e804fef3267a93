"""What others published of models on many GPUs, each as a model with settings: published.yaml."""

from __future__ import annotations

from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from harness.errors import UserError, nearest
from harness.experiment.catalog import EXPERIMENTS, load_models
from harness.experiment.experiment import Experiment
from harness.experiment.hardware import required_card
from harness.experiment.model import Checked, Model, Positive
from harness.experiment.unlisted import experiment_from
from harness.system import yaml_files

PUBLISHED = EXPERIMENTS / "published.yaml"

Text = Annotated[str, Field(min_length=1)]


_MEASURED = ("step_ms", "allocated_gib", "reserved_gib", "container")


class Result(Checked):
    """One published run: what ran, and what was measured of it."""

    model: Model
    settings: dict[str, str]
    """As ``make plan`` takes them."""
    own: frozenset[str] = frozenset()
    """Those of the row alone; the others are its group's."""
    step_ms: Positive | None = None
    allocated_gib: Positive | None = None
    """As torch.cuda.max_memory_allocated counts it, on the fullest rank."""
    reserved_gib: Positive | None = None
    container: Text | None = None
    """Release of NVIDIA's image, where several were measured."""
    unstated: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    """Settings that the source leaves out, and the values that each may have had."""

    @cached_property
    def possible(self) -> list[Experiment]:
        """What may have run: every choice of what is not stated that the sizes admit.

        Raises UserError where settings or sizes are wrong.
        """
        if not self.unstated:
            return [self.experiment]
        found, refused = [], None
        for values in product(*self.unstated.values()):
            chosen = dict(zip(self.unstated, map(str, values), strict=True))
            try:
                found.append(experiment_from(self.model, self.settings | chosen))
            except UserError as error:
                refused = error
        if not found:
            raise refused
        return found

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
    scatters_messages: bool = False
    """Whether tensor parallel ranks shared pipeline messages (work.Speed)."""
    results: tuple[Result, ...]


def load(path: Path = PUBLISHED) -> dict[str, Group]:
    """Every group by name.

    Raises:
        UserError: a name or a value is wrong; the message names the row.
    """
    found = {}
    for name, raw in (groups := yaml_files.read(path)).items():
        with yaml_files.entry(path, groups, name):
            found[name] = _group(name, raw)
    return found


def _group(name: str, raw: Any) -> Group:
    fields = dict(yaml_files.mapping(raw, name))
    required_card(str(fields.get("card")), f"{name}: card")
    common = yaml_files.mapping(fields.pop("settings", {}), f"{name}: settings")
    changed = yaml_files.mapping(fields.pop("models", {}), f"{name}: models")
    unstated = yaml_files.mapping(fields.pop("unstated", {}), f"{name}: unstated")
    open_ = {
        key: tuple(yaml_files.sequence(values, f"{name}: unstated: {key}"))
        for key, values in unstated.items()
    }
    rows = enumerate(yaml_files.sequence(fields.pop("rows", []), f"{name}: rows"), 1)
    results = tuple(_result(f"{name}: row {n}", row, common, changed, open_) for n, row in rows)
    return yaml_files.build(Group, {"name": name, **fields, "results": results}, name)


def _result(
    where: str,
    row: Any,
    common: dict[str, Any],
    changed: dict[str, Any],
    unstated: dict[str, tuple[int, ...]],
) -> Result:
    fields = dict(yaml_files.mapping(row, where))
    measured = {key: fields.pop(key) for key in _MEASURED if key in fields}
    models, name = load_models(), str(fields.pop("model", ""))
    if name not in models:
        raise UserError(f"{where}: unknown model {name!r}; {nearest(name, models)}")
    whole = {key: getattr(models[name], key) for key in Model.model_fields}
    other = yaml_files.mapping(changed.get(name, {}), f"{where}: models: {name}")
    model = yaml_files.build(Model, whole | other, f"{where}: models: {name}")
    settings = {key: str(value) for key, value in {**common, **fields}.items()}
    known = {"model": model, "settings": settings, "own": frozenset(fields), **measured}
    known["unstated"] = unstated
    return yaml_files.build(Result, known, where)
