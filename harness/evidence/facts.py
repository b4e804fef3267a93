"""Numbers that a document quotes, each an expression over records, references and formulas
(evidence/expressions.py).

    memory_gib[114] - memory_gib[115]     two records, by id or by the base name of their files
    published_step_ms[408]                the published row that ran what 408 runs
    step_ms[h200-8gpu, 128]               a row of another group of references.yaml; a third word is
                                          the end of its variant
    bubble[408h]                          what harness/predict/formulas.py computes from the
                                          experiment's sizes

What no run has measured has no value yet.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from harness import ROOT
from harness.errors import UserError, nearest
from harness.evidence.claims import Evaluated, evaluate, load_claims, sources
from harness.evidence.expressions import Quantity, parse
from harness.evidence.quantities import Source
from harness.evidence.references import Reference, References, load_references
from harness.evidence.results import collect_records
from harness.evidence.rows import Row
from harness.evidence.tables import VALUES
from harness.experiment.catalog import Catalog, load_catalog
from harness.predict.formulas import OF_EXPERIMENT

HARDWARE = "h200-141gb"
"""The folder of records that the chapters talk about; README.md has a table for every hardware."""
CARD = "h100-80gb"
"""Where only a run with this card's memory is recorded, it stands for its experiment."""
PUBLISHED = {f"published_{name}": name for name in ("step_ms", "memory_gib")}


class NotMeasured(Exception):
    """There is no run yet that could say."""


class RanOutOfMemory(NotMeasured):
    """The run that could say ran out of memory: what it held then is not what it needs."""


@dataclass(frozen=True)
class Facts:
    """Everything a document may quote."""

    records: Path
    catalog: Catalog
    references: References
    rows: tuple[Row, ...]
    """Every record, on any hardware."""

    @classmethod
    def load(cls, records: Path) -> Facts:
        """Every record in the folder. Raises UserError where one cannot be read: its numbers would
        vanish from the pages."""
        references = load_references()
        found = collect_records(records, references)
        if found.warnings:
            raise UserError(
                "\n".join(
                    ("documents quote every record, and these cannot be read:", *found.warnings)
                )
            )
        return cls(records, load_catalog(), references, found.rows)

    @cached_property
    def of_hardware(self) -> tuple[Row, ...]:
        """The records on HARDWARE, of the upstream that most of them ran: numbers of two do not
        stand in one column.

        Of two that ran equally often it is the one of the newest record.
        """
        rows = [row for row in self.rows if row.origin.parent.name == HARDWARE]
        ran = Counter(row.software for row in rows)
        newest = {
            row.software: row.result.started
            for row in sorted(rows, key=lambda row: row.result.started)
        }
        chosen = max(ran, key=lambda software: (ran[software], newest[software]), default=None)
        return tuple(row for row in rows if row.software == chosen)

    @cached_property
    def claims(self) -> tuple[Sequence[Source], Sequence[Evaluated]]:
        """Where the chapters' numbers come from, and how every claim stands on each of them."""
        columns = sources(self.of_hardware, self.catalog, self.references)
        return columns, evaluate(load_claims(self.catalog), columns)

    @cached_property
    def _by_stem(self) -> Mapping[str, Row]:
        return {row.origin.stem: row for row in self.of_hardware}

    def row(self, name: str) -> Row | None:
        """The record of this id or base name (``601_args``) on HARDWARE, where there is one.

        Raises:
            UserError: there is no such experiment.
        """
        self.catalog.find(name.partition("_")[0])
        return self._by_stem.get(name) or self.capped(name)

    def capped(self, name: str) -> Row | None:
        """The record of this id with CARD's memory on HARDWARE, where there is one."""
        return self._by_stem.get(f"{name}_card{CARD}")

    def otherwise(self, id_: str) -> tuple[Row, ...]:
        """The records of this experiment on HARDWARE with settings of their own, such as
        ``601_args``."""
        return tuple(
            row
            for row in self.of_hardware
            if row.id == id_ and row.origin.stem not in (id_, f"{id_}_card{CARD}")
        )

    def published(self, id_: str) -> Reference | None:
        """What was published for this experiment. Raises UserError where there is no such
        experiment."""
        self.catalog.find(id_)
        published = self.references.published.beside(id_)
        return published and published.reference

    def value(self, expression: str) -> float:
        """The value of ``expression``.

        Raises:
            NotMeasured: it needs a record, or a number in one, that is not there.
            UserError: it makes no sense.
        """
        return parse(expression).value(self._quantity)

    def record_value(self, name: str, keys: str) -> Any:
        """The value at ``keys``, joined by dots, of record ``name`` (``h200-141gb/101``) or of
        ``benchmarks/…``.

        Raises NotMeasured.
        """
        folder = ROOT if name.startswith("benchmarks/") else self.records
        try:
            value = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
            for key in keys.split("."):
                value = value[int(key) if isinstance(value, list) else key]
        except (OSError, TypeError):
            raise NotMeasured(name) from None
        except (KeyError, IndexError, ValueError):
            raise UserError(f"record {name} has no {keys}") from None
        return _measured(value, name)

    def _quantity(self, quantity: Quantity) -> float:
        name, (of, *more) = quantity.name, (word.strip() for word in quantity.of.split(","))
        if more:
            return _measured(_of_reference(self._reference(of, *more), name), str(quantity))
        if name in OF_EXPERIMENT:
            return _measured(OF_EXPERIMENT[name](self.catalog.find(of)), str(quantity))
        if name in PUBLISHED:
            return _measured(_of_reference(self.published(of), PUBLISHED[name]), str(quantity))
        if name not in VALUES:
            raise UserError(
                f"{quantity}: no such quantity; {nearest(name, [*VALUES, *OF_EXPERIMENT])}"
            )
        row = self.row(of)
        if row and row.state == "oom":
            raise RanOutOfMemory(str(quantity))
        return _measured(row and VALUES[name](row), str(quantity))

    def _reference(self, group: str, name: str, variant: str = "") -> Reference:
        rows = [row for row in self.references.group(group).rows if name in (row.id, row.workload)]
        fits = [
            row
            for row in rows
            if (row.variant or "").endswith(variant) and bool(row.variant) == bool(variant)
        ]
        if len(fits) != 1:
            raise UserError(
                f"[{group}, {name}, {variant or 'without variant'}]: {len(fits)} rows are called so"
            )
        return fits[0]


def _of_reference(reference: Reference | None, name: str) -> Any:
    if name not in Reference.model_fields:
        raise UserError(f"a reference has no {name}; {nearest(name, Reference.model_fields)}")
    return reference and getattr(reference, name)


def _measured(value: Any, what: str) -> Any:
    if value is None:
        raise NotMeasured(what)
    return value
