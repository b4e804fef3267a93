"""What the numbers must show: experiments/claims.yaml, each claim a formula over records, and over
the published table.

A claim is evaluated once for every hardware and upstream version that has records, on records of
nothing else, and once on the published table. It

    holds          its value meets what must hold, as far as its spread reaches
    fails          nowhere within its spread does it
    is undecided   what must hold begins within the spread: the records cannot tell
    not measured   a record is missing, or a number in one
    not asked      it compares our records with the published table, which alone says nothing

The spread is twice the standard uncertainty (about 95 %): each quantity's own
(evidence/measured.py), carried through the formula one at a time and added in quadrature, as if
independent. Published numbers state none: they count as exact.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from harness.errors import UserError, nearest
from harness.evidence.expressions import Expression, Quantity, Unit, parse, spell
from harness.evidence.quantities import BOTH, UNITS, Number, Source, ours, published, unit_of
from harness.evidence.references import ReferenceGroup, References
from harness.evidence.rows import Row
from harness.experiment import overrides
from harness.experiment.catalog import EXPERIMENTS, Catalog
from harness.experiment.hardware import find_card
from harness.system import yaml_files

CLAIMS = EXPERIMENTS / "claims.yaml"

Verdict = Literal["holds", "fails", "undecided", "not measured", "not asked"]


@dataclass(frozen=True)
class Bound:
    """What must hold of a value: ``< 0.9``, ``> 1.5 GiB``, ``= 1``, ``0.9 .. 1.1``."""

    text: str
    low: float
    high: float
    unit: Unit

    def judge(self, value: float, spread: float) -> Verdict:
        """Whether it holds all over ``value`` ± ``spread``, nowhere there, or neither."""
        low, high = value - spread, value + spread
        if self._allows(low) and self._allows(high):
            return "holds"
        reached = self._allows(low) or self._allows(high) or low < self.low <= self.high < high
        return "undecided" if reached and spread else "fails"

    def _allows(self, value: float) -> bool:
        if self.low == self.high:
            return math.isclose(value, self.low, rel_tol=1e-9, abs_tol=1e-9)
        open_ended = math.inf in (self.high, -self.low)
        return self.low < value < self.high if open_ended else self.low <= value <= self.high


@dataclass(frozen=True)
class Side:
    """A claim on one source of numbers: its own value there with its spread, and the numbers that
    made it."""

    verdict: Verdict
    value: float | None = None
    spread: float = 0.0
    numbers: Mapping[Quantity, float] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Claim:
    """One teaching point. ``expressions``: its formula, then the same over the rows that may stand
    in."""

    name: str
    chapter: int
    says: str
    expressions: tuple[Expression, ...]
    bound: Bound
    reason: Mapping[str, str]

    @property
    def formula(self) -> Expression:
        return self.expressions[0]

    @property
    def is_about_both(self) -> bool:
        """Whether it compares records with the published table, so that the table alone says
        nothing."""
        return any(quantity.name in BOTH for quantity in self.formula.quantities)


@dataclass(frozen=True)
class Evaluated:
    """A claim and how it stands on every source, in their order."""

    claim: Claim
    sides: tuple[Side, ...]


class _Raw(BaseModel):
    """A claim as claims.yaml has it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    chapter: int
    says: str = Field(min_length=1)
    formula: str
    must: str
    stand_in: Literal["half"] | dict[str, str] | None = Field(None, alias="or")
    reason: dict[Literal["ours", "published"], str] = {}


def load_claims(catalog: Catalog, path: Path = CLAIMS) -> tuple[Claim, ...]:
    """Read claims.yaml.

    Raises:
        UserError: a key, an experiment or a quantity is unknown, a formula cannot be read, or units
        are mixed.
    """
    raws, found = yaml_files.read(path), []
    for name in raws:
        with yaml_files.entry(path, raws, name):
            found.append(_claim(f"{path.name}: {name}", str(name), raws[name], catalog))
    return tuple(found)


def evaluate(claims: Sequence[Claim], sources: Sequence[Source]) -> tuple[Evaluated, ...]:
    """Every claim on every source."""
    return tuple(
        Evaluated(claim, tuple(_side(claim, source) for source in sources)) for claim in claims
    )


def sources(
    rows: Sequence[Row],
    catalog: Catalog,
    references: References,
    group: ReferenceGroup | None = None,
) -> tuple[Source, ...]:
    """One source for each hardware and upstream version that has records, then the published table
    (or another ``group``).

    Miniatures and runs that are no records give no numbers.
    """
    kept = [row for row in rows if row.kind == "record" and not row.experiment.miniature]
    kinds = sorted({(row.hardware, row.software) for row in kept})
    card_mib = find_card(references.published.gpu).memory_mib
    found = [
        ours(
            ", ".join(kind),
            [row for row in kept if (row.hardware, row.software) == kind],
            catalog,
            card_mib,
        )
        for kind in kinds
    ]
    columns = found or [ours("no records", [], catalog, card_mib)]
    return (*columns, published(catalog, group or references.published, card_mib))


def _side(claim: Claim, source: Source) -> Side:
    """The claim over the first of its expressions that is measured in full, else over none."""
    if claim.is_about_both and source.key != "ours":
        return Side("not asked")
    tried = []
    for expression in claim.expressions:
        found = {quantity: source.find(quantity) for quantity in expression.quantities}
        missing = tuple(dict.fromkeys(why for why in found.values() if isinstance(why, str)))
        if not missing:
            return _judged(claim.bound, expression, found)
        tried.append(missing)
    rest = [f"or {', '.join(missing)}" for missing in tried[1:]]
    return Side("not measured", missing=(*tried[0], *rest))


def _judged(bound: Bound, expression: Expression, found: Mapping[Quantity, Number]) -> Side:
    numbers = {quantity: number.value for quantity, number in found.items()}
    value = expression.value(numbers.__getitem__)
    moved = [
        expression.value((numbers | {quantity: number.value + number.noise}).__getitem__) - value
        for quantity, number in found.items()
        if number.noise
    ]
    spread = 2 * math.hypot(*moved)
    remarks = dict.fromkeys(number.remark for number in found.values() if number.remark)
    return Side(bound.judge(value, spread), value, spread, numbers, remarks=tuple(remarks))


def _claim(where: str, name: str, raw: Any, catalog: Catalog) -> Claim:
    if isinstance(yaml_files.mapping(raw, where).get("or"), dict):
        raw = {**raw, "or": {str(key): str(value) for key, value in raw["or"].items()}}
    parsed = yaml_files.build(_Raw, raw, where)
    try:
        if parsed.chapter not in catalog.chapters:
            raise UserError(
                f"no chapter {parsed.chapter};"
                f" {nearest(str(parsed.chapter), map(str, catalog.chapters))}"
            )
        expressions = (first := parse(parsed.formula), *_stand_ins(first, parsed.stand_in))
        bound = _bound(parsed.must)
        for expression in expressions:
            unit = expression.unit(unit_of)
            for quantity in expression.quantities:
                overrides.made(quantity.of, catalog)
        if unit != bound.unit:
            raise UserError(
                f"the formula is in {spell(unit)}, but what must hold, {parsed.must}, in"
                f" {spell(bound.unit)}"
            )
        if not first.quantities:
            raise UserError(f"{parsed.formula} names no experiment")
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return Claim(name, parsed.chapter, parsed.says, expressions, bound, dict(parsed.reason))


def _stand_ins(
    expression: Expression, stand_in: str | Mapping[str, str] | None
) -> tuple[Expression, ...]:
    """The same formula over other experiments: the half-size companions of all, or those named
    instead."""
    if stand_in is None:
        return ()
    ids = {quantity.of.split()[0] for quantity in expression.quantities}
    others = {id_: f"{id_}h" for id_ in ids} if stand_in == "half" else stand_in
    if unused := sorted(set(others) - ids):
        raise UserError(f"or: {', '.join(unused)} is not in the formula")
    return (
        parse(
            re.sub(
                r"\[\s*([^\s\]]+)", lambda row: f"[{others.get(row[1], row[1])}", expression.text
            )
        ),
    )


def _bound(text: str) -> Bound:
    number = r"(-?\d+(?:\.\d+)?)"
    found = re.fullmatch(rf"\s*(?:([<>=])\s*{number}|{number}\s*\.\.\s*{number})\s*(\S*)\s*", text)
    if not found:
        raise UserError(f"must: {text}: expected < 0.9, > 1.5 GiB, = 1 or 0.9 .. 1.1")
    sign, one, low, high, unit = found.groups()
    known = {spell(unit): unit for unit in UNITS.values()}
    if unit and unit not in known:
        raise UserError(f"must: {text}: unknown unit {unit}; {nearest(unit, known)}")
    ends = {"<": (-math.inf, one), ">": (one, math.inf), "=": (one, one), None: (low, high)}[sign]
    if float(ends[0]) > float(ends[1]):
        raise UserError(f"must: {text}: the first number is the larger one")
    return Bound(
        " ".join(text.split()), float(ends[0]), float(ends[1]), known[unit] if unit else ()
    )
