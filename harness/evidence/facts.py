"""What documents may quote: records on one hardware, references, and expressions over both."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from harness import ROOT
from harness.errors import UserError
from harness.evidence import quantities
from harness.evidence.claims import Evaluated, evaluate, load_claims, sources
from harness.evidence.quantities import NotMeasured, NumberSource
from harness.evidence.references import Reference, References, load_references
from harness.evidence.results import collect_records
from harness.evidence.rows import Row
from harness.experiment.catalog import Catalog, load_catalog

HARDWARE = "h200-141gb"
"""The folder of records that the chapters quote; README.md has a table for every hardware."""
CARD = "h100-80gb"
"""In tables, a run with this card's memory stands for its experiment where no other is recorded."""


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
        """Every record in the folder.

        Raises:
            UserError: a record cannot be read: its numbers would vanish from the pages.
        """
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
        """The records on HARDWARE of one upstream: numbers of two do not share a column.

        It is the upstream of most records; of two with equally many, that of the newest record.
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
    def columns(self) -> tuple[NumberSource, ...]:
        """Where numbers come from: our records on HARDWARE, then the published table."""
        return sources(self.of_hardware, self.catalog, self.references)

    @cached_property
    def claims(self) -> Sequence[Evaluated]:
        """Every claim evaluated on each of the columns."""
        return evaluate(load_claims(self.catalog), self.columns)

    @cached_property
    def _by_stem(self) -> Mapping[str, Row]:
        return {row.origin.stem: row for row in self.of_hardware}

    def row(self, id_: str) -> Row | None:
        """The record of this experiment on HARDWARE, else the one with CARD's memory.

        Raises:
            UserError: there is no such experiment.
        """
        self.catalog.find(id_)
        return self._by_stem.get(id_) or self.capped(id_)

    def capped(self, id_: str) -> Row | None:
        """The record of this experiment with CARD's memory on HARDWARE, where there is one."""
        return self._by_stem.get(f"{id_}_card{CARD}")

    def otherwise(self, id_: str) -> tuple[Row, ...]:
        """The records on HARDWARE of this experiment with other settings, such as ``601_args``."""
        return tuple(
            row
            for row in self.of_hardware
            if row.id == id_ and row.origin.stem not in (id_, f"{id_}_card{CARD}")
        )

    def published(self, id_: str) -> Reference | None:
        """The published row for this experiment. Raises UserError where there is no such one."""
        self.catalog.find(id_)
        published = self.references.published.matching(id_)
        return published and published.reference

    def value(self, expression: str) -> float:
        """The value of an expression over our records, as ``quantities.value`` reads it."""
        return quantities.value(expression, self.columns[0])

    def record_value(self, name: str, keys: str) -> Any:
        """The value at ``keys``, joined by dots, of record ``h200-141gb/101`` or ``benchmarks/…``.

        Raises:
            NotMeasured: there is no such record, or it has no value there.
            UserError: the record has no such key.
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
        if value is None:
            raise NotMeasured(name)
        return value
