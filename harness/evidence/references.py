"""Published results, and others measured separately: experiments/references.yaml."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from harness.errors import UserError, nearest
from harness.experiment import overrides
from harness.experiment.catalog import EXPERIMENTS, Catalog
from harness.experiment.experiment import Experiment
from harness.experiment.hardware import required_card
from harness.system import yaml_files

REFERENCES = EXPERIMENTS / "references.yaml"

Text = Annotated[str, Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Reference(_Strict):
    """One result of a group. Memory is in GiB, as nvidia-smi shows it on one GPU."""

    id: str | None = None
    """The experiment as its source labels it; None where the catalogue has no such experiment."""
    workload: str | None = None
    group: str
    hardware: str
    source: str
    gpus: int | None = None
    memory_gib: float | None = None
    step_ms: float | None = None
    tflops: float | None = None
    oom: bool = False
    ran: str | None = None
    """What it really ran where the label says otherwise (``vpp6``), or ``unknown``."""
    stands_for: str | None = None
    """The experiment that ran the same; ``id`` where the label is true."""
    variant: str | None = None
    make: str | None = None
    """The command that runs the same as a workload: ``420 GPUS=4 TP=4``."""
    environment: dict[str, str] = {}
    profiled_ms: dict[str, float] | None = None
    note: str | None = None

    @property
    def in_doubt(self) -> bool:
        """Whether nobody can tell what this row measured."""
        return self.ran == "unknown"

    def numbers(self) -> str:
        """Its step time and memory, for a sentence."""
        return "out of memory" if self.oom else f"{self.step_ms:g} ms, {self.memory_gib:g} GiB"


@dataclass(frozen=True)
class Published:
    """The reference for an experiment and remarks on it, or remarks on why there is none."""

    reference: Reference | None
    remarks: tuple[str, ...] = ()


class ReferenceGroup(_Strict):
    """Results of one source on one kind of hardware."""

    name: Text
    hardware: Text
    gpu: Text
    source: Text
    software: Text
    method: Text
    published: bool = False
    notes: tuple[str, ...] = ()
    rows: tuple[Reference, ...]

    def ran(self, catalog: Catalog) -> Iterator[tuple[Reference, Experiment]]:
        """Rows with a step time that a command here reproduces, each with its experiment."""
        for row in self.rows:
            command = row.make or (row.stands_for if row.variant is None else None)
            if command and row.step_ms and not row.in_doubt:
                yield row, overrides.experiment_of(command, catalog)

    def matching(self, id_: str) -> Published | None:
        """The row that ran what experiment ``id_`` runs; None where this source says nothing."""
        same = [row for row in self.rows if row.stands_for == id_ and row.variant is None]
        shown = next((row for row in same if row.id == id_), same[0] if same else None)
        labelled = next((row for row in self.rows if row.id == id_ and row.variant is None), None)
        remarks = []
        if shown and shown.in_doubt:
            remarks.append(f"published as {shown.id}, but what ran is unknown: {shown.note}")
        elif shown and shown.id != id_:
            remarks.append(f"published as {shown.id}, which ran {_spelled(shown.ran)}")
        if labelled and labelled.stands_for != id_:
            ran = "is in doubt" if labelled.in_doubt else f"ran {_spelled(labelled.ran)}"
            remarks.append(
                f"the row published as {id_} {ran} and stands beside {labelled.stands_for}"
            )
        remarks += [
            f"the row published as {row.id} ran the same: {row.numbers()}"
            for row in same
            if row is not shown
        ]
        return Published(shown, tuple(remarks)) if shown or remarks else None

    def named(self, name: str, variant: str = "") -> Reference:
        """The one row of this id or workload whose variant ends in ``variant``.

        Raises:
            UserError: no row, or more than one, is named so.
        """
        found = [
            row
            for row in self.rows
            if name in (row.id, row.workload)
            and (row.variant or "").endswith(variant)
            and bool(row.variant) == bool(variant)
        ]
        if len(found) != 1:
            raise UserError(
                f"[{self.name}, {name}, {variant or 'without variant'}]: {len(found)} rows are"
                " named so"
            )
        return found[0]


@dataclass(frozen=True)
class References:
    """Every group of references.yaml."""

    groups: tuple[ReferenceGroup, ...]

    @property
    def published(self) -> ReferenceGroup:
        return next(group for group in self.groups if group.published)

    def group(self, name: str) -> ReferenceGroup:
        """The group of this name. Raises UserError that suggests the nearest name."""
        for group in self.groups:
            if group.name == name:
                return group
        raise UserError(
            f"no references called {name}; {nearest(name, [g.name for g in self.groups])}"
        )


def load_references(path: Path = REFERENCES) -> References:
    """Read references.yaml.

    Raises:
        UserError: a key is unknown, a value has the wrong type, or two rows claim the same
        experiment.
    """
    raws, groups = yaml_files.read(path), []
    for name in raws:
        with yaml_files.entry(path, raws, name):
            groups.append(_group(f"{path.name}: {name}", str(name), raws[name]))
    published = [group.name for group in groups if group.published]
    if len(published) != 1:
        found = ", ".join(published) or "none"
        raise UserError(f"{path.name}: exactly one group must be published: true; found {found}")
    return References(tuple(groups))


def _group(where: str, name: str, raw: Any) -> ReferenceGroup:
    rows = yaml_files.mapping(raw, where).get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{where}: rows must be a list of key: value pairs")
    if not isinstance(raw.get("notes", []), list):
        raise UserError(f"{where}: notes must be a list of texts (- …)")
    common = {"group": name, "hardware": raw.get("hardware"), "source": raw.get("source")}
    parsed = tuple(_reference(where, row, common) for row in rows)
    fields = {**raw, "name": name, "notes": tuple(raw.get("notes", ())), "rows": parsed}
    group = yaml_files.build(ReferenceGroup, fields, where)
    card_gib = required_card(group.gpu, f"{where}: gpu = {group.gpu!r}").memory_mib / 1024
    for row in group.rows:
        # a value in MiB or in seconds is the mistake that nobody sees in a table
        if not row.oom and not (0 < row.memory_gib < card_gib and row.step_ms > 1):
            raise UserError(
                f"{where}: {row.id or row.workload}: {row.memory_gib:g} GiB of {card_gib:.1f} on"
                f" this GPU, {row.step_ms:g} ms: memory_gib is in GiB (MiB / 1024), step_ms in"
                " milliseconds"
            )
    labels = [row.id for row in group.rows if row.id and row.variant is None]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise UserError(f"{where}: {', '.join(twice)} has two rows; give one of them a variant")
    return group


def _reference(where: str, raw: dict[str, Any], common: dict[str, Any]) -> Reference:
    texts = {key: str(raw[key]) for key in ("id", "stands_for") if key in raw}
    at = f"{where}: {texts.get('id') or raw.get('workload')}"
    row = yaml_files.build(Reference, {"stands_for": texts.get("id"), **raw, **texts, **common}, at)
    if (row.id is None) == (row.workload is None):
        raise UserError(f"{at}: give either the id of an experiment or a workload")
    if [row.step_ms is None, row.memory_gib is None] != [row.oom, row.oom]:
        raise UserError(f"{at}: give step_ms and memory_gib, or oom: true")
    if row.stands_for != row.id and row.ran is None:
        raise UserError(f"{at}: stands_for {row.stands_for} needs ran: what it really ran")
    if row.in_doubt and row.note is None:
        raise UserError(f"{at}: ran: unknown needs a note that says why")
    return row


def _spelled(ran: str | None) -> str:
    return ran.replace("vpp", "VPP ") if ran else ""
