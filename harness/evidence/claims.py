"""Claims, experiments/claims.yaml: what the numbers must show, each a formula with a bound.

A claim is evaluated once for every hardware and upstream version that has records, on records of
nothing else, and once on the published table. Its verdict is one of

    holds          the bound holds over the whole spread of the value
    fails          the bound holds nowhere in the spread
    undecided      the bound holds in a part of the spread: the records cannot tell
    not measured   a record, or a number in one, is missing
    not asked      it compares our records with references, which alone say nothing

The spread is twice the standard uncertainty (about 95 %). Each quantity's own uncertainty
(quantities.py) is carried through the formula one at a time and added in quadrature, as if they
were independent. Published numbers state no uncertainty and count as exact.
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
from harness.evidence.quantities import (
    IN_DOUBT,
    UNITS,
    NotMeasured,
    Number,
    NumberSource,
    check,
    compares_with_references,
    ours,
    published,
    unit_of,
)
from harness.evidence.references import ReferenceGroup, References
from harness.evidence.rows import Row
from harness.experiment.catalog import EXPERIMENTS, Catalog
from harness.system import yaml_files

CLAIMS = EXPERIMENTS / "claims.yaml"

Verdict = Literal["holds", "fails", "undecided", "not measured", "not asked"]


@dataclass(frozen=True)
class Bound:
    """What must hold for a value: ``< 0.9``, ``> 1.5 GiB``, ``= 1``, ``0.9 .. 1.1``."""

    text: str
    low: float
    high: float
    unit: Unit

    def judge(self, value: float, spread: float) -> Verdict:
        """Whether the bound holds over all of ``value`` ± ``spread``, none of it, or a part."""
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
    """A claim on one source: its value with its spread, and the numbers that it follows from."""

    source: NumberSource
    verdict: Verdict
    value: float | None = None
    spread: float = 0.0
    numbers: Mapping[Quantity, float] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Claim:
    """One teaching point."""

    name: str
    chapter: int
    says: str
    expressions: tuple[Expression, ...]
    """The formula, then the same formula over the experiments that may stand in."""
    bound: Bound
    reason: Mapping[str, str]

    @property
    def formula(self) -> Expression:
        return self.expressions[0]

    @property
    def is_about_both(self) -> bool:
        """Whether it compares records with references, so that references alone say nothing."""
        return any(map(compares_with_references, self.formula.quantities))


@dataclass(frozen=True)
class Evaluated:
    """A claim with its side on every source, in their order."""

    claim: Claim
    sides: tuple[Side, ...]


class _Raw(BaseModel):
    """An entry of claims.yaml."""

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


def evaluate(claims: Sequence[Claim], sources: Sequence[NumberSource]) -> tuple[Evaluated, ...]:
    """Every claim on every source."""
    return tuple(
        Evaluated(claim, tuple(_side(claim, source) for source in sources)) for claim in claims
    )


def sources(
    rows: Sequence[Row],
    catalog: Catalog,
    references: References,
    group: ReferenceGroup | None = None,
) -> tuple[NumberSource, ...]:
    """One source for each hardware and upstream version with records, then the published table.

    ``group`` takes the published table's place. Miniatures and runs that are no records give no
    numbers.
    """
    kept = [row for row in rows if row.kind == "record" and not row.experiment.miniature]
    kinds: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(kept, key=lambda row: (row.hardware, row.software)):
        kinds.setdefault((row.hardware, row.software), []).append(row)
    found = [ours(", ".join(kind), alike, catalog, references) for kind, alike in kinds.items()]
    return (
        *(found or [ours("no records", [], catalog, references)]),
        published(group or references.published, catalog, references),
    )


def _side(claim: Claim, source: NumberSource) -> Side:
    """The claim over the first of its expressions whose numbers are all there."""
    if claim.is_about_both and source.key != "ours":
        return Side(source, "not asked")
    tried = []
    for expression in claim.expressions:
        found, missing = {}, []
        for quantity in expression.quantities:
            try:
                found[quantity] = source.find(quantity)
                if found[quantity].in_doubt:
                    missing.append(f"{quantity.of} ({IN_DOUBT})")
            except NotMeasured as error:
                missing.append(str(error))
        if not missing:
            return _judged(claim.bound, expression, found, source)
        tried.append(dict.fromkeys(missing))
    rest = [f"or {', '.join(missing)}" for missing in tried[1:]]
    return Side(source, "not measured", missing=(*tried[0], *rest))


def _judged(
    bound: Bound, expression: Expression, found: Mapping[Quantity, Number], source: NumberSource
) -> Side:
    numbers = {quantity: number.value for quantity, number in found.items()}
    value = expression.value(numbers.__getitem__)
    moved = [
        expression.value((numbers | {quantity: number.value + number.noise}).__getitem__) - value
        for quantity, number in found.items()
        if number.noise
    ]
    spread = 2 * math.hypot(*moved)
    remarks = dict.fromkeys(number.remark for number in found.values() if number.remark)
    verdict = bound.judge(value, spread)
    return Side(source, verdict, value, spread, numbers, remarks=tuple(remarks))


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
                check(quantity, catalog)
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
    """The same formula over the half-size companions of its experiments, or over those named."""
    if stand_in is None:
        return ()
    experiments = (one.of for one in expression.quantities if not one.names_reference)
    ids = {words.split()[0] for words in experiments}
    others = {id_: f"{id_}h" for id_ in ids} if stand_in == "half" else stand_in
    if unused := sorted(set(others) - ids):
        raise UserError(f"or: {', '.join(unused)} is not in the formula")
    replaced = re.sub(
        r"\[\s*([^\s\]]+)", lambda id_: f"[{others.get(id_[1], id_[1])}", expression.text
    )
    return (parse(replaced),)


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
