"""What the numbers must show: experiments/claims.yaml, each claim a formula over records, and over the published table.

A claim is evaluated once for every hardware and upstream version that has records, on records of nothing else, and once on
the published table. It

    holds          its value meets what must hold, as far as its spread reaches
    fails          nowhere within its spread does it
    is undecided   what must hold begins within the spread: the records cannot tell
    not measured   a record is missing, or a number in one
    not asked      it compares our records with the published table, which alone says nothing

The spread is twice the standard uncertainty (about 95 %): each quantity's own (harness/measured.py), carried through the
formula one at a time and added in quadrature, as if independent. Published numbers state none: they count as exact.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from harness import measured, overrides
from harness.catalog import EXPERIMENTS, Catalog, Experiment, read_yaml
from harness.errors import UserError, nearest
from harness.expressions import Expression, Quantity, Unit, parse, spell
from harness.flops import mfu, tflops_per_gpu
from harness.formulas import OF_EXPERIMENT
from harness.hardware import find_gpu, peak_tflops
from harness.records import work
from harness.results import Reference, ReferenceGroup, References, Row, metrics

CLAIMS = EXPERIMENTS / "claims.yaml"

Verdict = Literal["holds", "fails", "undecided", "not measured", "not asked"]


@dataclass(frozen=True)
class Number:
    """A number with its standard uncertainty, and what a reader must know about it."""

    value: float
    noise: float = 0.0
    remark: str | None = None


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
    """A claim on one source of numbers: its own value there with its spread, and the numbers that made it."""

    verdict: Verdict
    value: float | None = None
    spread: float = 0.0
    numbers: Mapping[Quantity, float] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Claim:
    """One teaching point. ``expressions``: its formula, then the same over the rows that may stand in."""

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
        """Whether it compares records with the published table, so that the table alone says nothing."""
        return any(quantity.name in BOTH for quantity in self.formula.quantities)


@dataclass(frozen=True)
class Source:
    """Where the numbers of one column come from; ``find`` gives a quantity's number, or says why there is none."""

    key: str
    """``ours`` or ``published``, as under ``reason``."""
    title: str
    find: Callable[[Quantity], Number | str]


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
        UserError: a key, an experiment or a quantity is unknown, a formula cannot be read, or units are mixed.
    """
    return tuple(_claim(f"{path.name}: {name}", str(name), raw, catalog) for name, raw in read_yaml(path).items())


def evaluate(claims: Sequence[Claim], sources: Sequence[Source]) -> tuple[Evaluated, ...]:
    """Every claim on every source."""
    return tuple(Evaluated(claim, tuple(_side(claim, source) for source in sources)) for claim in claims)


def sources(
    rows: Sequence[Row], catalog: Catalog, references: References, group: ReferenceGroup | None = None
) -> tuple[Source, ...]:
    """One source for each hardware and upstream version that has records, then the published table (or another ``group``).

    Miniatures and runs that are no records give no numbers.
    """
    kept = [row for row in rows if row.kind == "record" and not row.experiment.miniature]
    kinds = sorted({(row.hardware, row.software) for row in kept})
    card_mib = find_gpu(references.published.gpu).memory_mib
    found = [_ours(", ".join(kind), [row for row in kept if (row.hardware, row.software) == kind], catalog, card_mib)
             for kind in kinds]
    ours = found or [_ours("no records", [], catalog, card_mib)]
    return (*ours, _published(catalog, group or references.published, card_mib))


# ---- quantities

GIB: Unit = (("GiB", 1),)
UNITS: dict[str, Unit] = {
    "step_ms": (("ms", 1),), "memory_gib": GIB, "reserved_gib": GIB, "allocated_gib": GIB, "tflops": (("TFLOP/s", 1),),
    "mfu": (), "tokens_per_s": (("tokens/s", 1),), "fits": (),
    "memory_ratio": (), "step_ratio": (), "published_memory_gib": GIB, "published_step_ms": (("ms", 1),),
}
"""What is measured: of the step time the median; memory of the fullest GPU, ``memory_gib`` as NVML shows it.

``fits``: 1 where the experiment fits the published card, 0 where it runs out of memory on it.
``memory_ratio``, ``step_ratio``: here over published.
"""
BOTH = ("memory_ratio", "step_ratio", "published_memory_gib", "published_step_ms")
"""Those that stand between our records and the published table."""


def unit_of(name: str) -> Unit:
    """The unit of a quantity. Raises UserError where there is none of this name."""
    if name in UNITS:
        return UNITS[name]
    if name not in OF_EXPERIMENT:
        raise UserError(f"unknown quantity {name}; {nearest(name, [*UNITS, *OF_EXPERIMENT], 8)}")
    suffix = name.rpartition("_")[2]
    return {"gib": GIB, "mib": (("MiB", 1),), "pflop": (("PFLOP", 1),), "b": (("10^9", 1),)}.get(suffix, ())


def _experiment(catalog: Catalog, words: str) -> Experiment:
    """The experiment in brackets: an id, and settings as one types them after ``make``."""
    try:
        id_, *settings = shlex.split(words) or [""]
    except ValueError as error:
        raise UserError(f"[{words}]: {error}") from None
    return overrides.apply(catalog.find(id_), overrides.parse(settings))


def _ours(title: str, rows: Sequence[Row], catalog: Catalog, card_mib: int) -> Source:
    by_age = [(work(row.experiment), row) for row in sorted(rows, key=lambda row: row.result.started, reverse=True)]

    def find(quantity: Quantity) -> Number | str:
        experiment = _experiment(catalog, quantity.of)
        if quantity.name in OF_EXPERIMENT and quantity.name not in UNITS:
            return _computed(quantity, experiment)
        wanted = work(experiment)
        row = next((row for done, row in by_age if done == wanted), None)
        if row is None:
            return quantity.of
        if quantity.name == "fits":
            return _fits(row.state == "oom", row.memory_gib.nvml, row.memory_mib, card_mib, quantity.of)
        value = _MEASURED[quantity.name](row)
        if value is None:
            return _without(quantity, row.state == "oom")
        return Number(value, value * _relative_noise(quantity.name, row), _shared(quantity, row))

    return Source("ours", title, find)


def _published(catalog: Catalog, group: ReferenceGroup, card_mib: int) -> Source:
    there_mib = find_gpu(group.gpu).memory_mib

    def find(quantity: Quantity) -> Number | str:
        experiment = _experiment(catalog, quantity.of)
        if quantity.name in OF_EXPERIMENT and quantity.name not in UNITS:
            return _computed(quantity, experiment)
        whole = experiment.model_copy(update={"card": None})
        beside = group.beside(experiment.id) if work(whole) == work(catalog.find(experiment.id)) else None
        reference = beside and beside.reference
        if reference is None:
            return quantity.of
        if reference.in_doubt:
            return f"{quantity.of} (what ran is in doubt)"
        if quantity.name == "fits":
            return _fits(reference.oom, reference.memory_gib, there_mib, card_mib, quantity.of)
        value = _of_reference(quantity.name, reference, experiment, group)
        return _without(quantity, reference.oom) if value is None else Number(value)

    title = f"{group.hardware}, {group.software}"
    return Source("published" if group.published else group.name, title, find)


_MEASURED: dict[str, Callable[[Row], float | None]] = {
    "step_ms": lambda row: row.step and row.step.median,
    "memory_gib": lambda row: row.memory_gib.nvml if row.state == "ok" else None,
    "reserved_gib": lambda row: row.memory_gib.reserved if row.state == "ok" else None,
    "allocated_gib": lambda row: row.memory_gib.allocated if row.state == "ok" else None,
    "tflops": lambda row: row.tflops,
    "mfu": lambda row: row.mfu,
    "tokens_per_s": lambda row: row.result.tokens_per_s,
    "memory_ratio": lambda row: row.memory_ratio,
    "step_ratio": lambda row: row.step_ratio,
    "published_memory_gib": lambda row: _certain(row.reference, "memory_gib"),
    "published_step_ms": lambda row: _certain(row.reference, "step_ms"),
}


def _certain(reference: Reference | None, name: str) -> float | None:
    return None if reference is None or reference.in_doubt else getattr(reference, name)


def _of_reference(name: str, reference: Reference, e: Experiment, group: ReferenceGroup) -> float | None:
    """A quantity of a published row; rates follow from its step time as upstream counts them."""
    if name in ("step_ms", "memory_gib") or not reference.step_ms:
        return getattr(reference, name, None)
    tflops = tflops_per_gpu(e, reference.step_ms)
    peak = peak_tflops(group.gpu, e.precision)
    rates = {"tflops": tflops, "mfu": mfu(tflops, peak) if peak else None,
             "tokens_per_s": e.global_batch_size * e.seq_length / reference.step_ms * 1000}
    return rates.get(name)


def _without(quantity: Quantity, oom: bool) -> str:
    return f"{quantity.of} ({'ran out of memory: ' * oom}no {quantity.name})"


def _shared(quantity: Quantity, row: Row) -> str | None:
    """That other runs on the node may have slowed it down, where the number is a time or a rate."""
    is_timed = quantity.name not in ("memory_gib", "reserved_gib", "allocated_gib", "memory_ratio")
    return f"{quantity.of} shared its node with {row.runs_on_node - 1} runs" if is_timed and row.runs_on_node > 1 else None


def _computed(quantity: Quantity, experiment: Experiment) -> Number | str:
    value = OF_EXPERIMENT[quantity.name](experiment)
    return f"{quantity.of} (no {quantity.name})" if value is None else Number(float(value))


def _fits(oom: bool, used_gib: float | None, here_mib: int | None, card_mib: int, words: str) -> Number | str:
    """Whether what ran on a card of ``here_mib`` fits the published one of ``card_mib``; emulated cards count as real."""
    if oom:
        return Number(0) if here_mib and here_mib >= card_mib else f"{words} (out of memory on a smaller card)"
    if (here_mib and here_mib <= card_mib) or (used_gib and used_gib * 1024 < card_mib):
        return Number(1)
    return f"{words} (a larger card holds it: CARD= emulates the published one)"


def _relative_noise(name: str, row: Row) -> float:
    """Relative standard uncertainty of a recorded number."""
    if name in ("allocated_gib", "published_memory_gib", "published_step_ms"):
        return 0.0
    if name in ("memory_gib", "reserved_gib", "memory_ratio"):
        return measured.MEMORY_BETWEEN_RUNS
    window = measured.window(row.experiment, metrics(row))
    return measured.step_noise_ms([m.step_ms for m in window]) / row.step.median


# ---- evaluation


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
    moved = [expression.value((numbers | {quantity: number.value + number.noise}).__getitem__) - value
             for quantity, number in found.items() if number.noise]
    spread = 2 * math.hypot(*moved)
    remarks = dict.fromkeys(number.remark for number in found.values() if number.remark)
    return Side(bound.judge(value, spread), value, spread, numbers, remarks=tuple(remarks))


def _claim(where: str, name: str, raw: Any, catalog: Catalog) -> Claim:
    if not isinstance(raw, dict):
        raise UserError(f"{where}: expected key: value pairs, found {raw!r}")
    if isinstance(raw.get("or"), dict):
        raw = {**raw, "or": {str(key): str(value) for key, value in raw["or"].items()}}
    try:
        parsed = _Raw(**raw)
    except ValidationError as error:
        keys = [info.alias or key for key, info in _Raw.model_fields.items()]
        complaints = [
            f"{where}: unknown key {e['loc'][-1]!r}; {nearest(str(e['loc'][-1]), keys)}" if e["type"] == "extra_forbidden"
            else f"{where}: {'.'.join(map(str, e['loc']))}: {e['msg'].lower()}" for e in error.errors()
        ]
        raise UserError("\n".join(dict.fromkeys(complaints))) from None
    try:
        if parsed.chapter not in catalog.chapters:
            raise UserError(f"no chapter {parsed.chapter}; {nearest(str(parsed.chapter), map(str, catalog.chapters))}")
        expressions = (first := parse(parsed.formula), *_stand_ins(first, parsed.stand_in))
        bound = _bound(parsed.must)
        for expression in expressions:
            unit = expression.unit(unit_of)
            for quantity in expression.quantities:
                _experiment(catalog, quantity.of)
        if unit != bound.unit:
            raise UserError(f"the formula is in {spell(unit)}, but what must hold, {parsed.must}, in {spell(bound.unit)}")
        if not first.quantities:
            raise UserError(f"{parsed.formula} names no experiment")
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return Claim(name, parsed.chapter, parsed.says, expressions, bound, dict(parsed.reason))


def _stand_ins(expression: Expression, stand_in: str | Mapping[str, str] | None) -> tuple[Expression, ...]:
    """The same formula over other experiments: the half-size companions of all, or those named instead."""
    if stand_in is None:
        return ()
    ids = {quantity.of.split()[0] for quantity in expression.quantities}
    others = {id_: f"{id_}h" for id_ in ids} if stand_in == "half" else stand_in
    if unused := sorted(set(others) - ids):
        raise UserError(f"or: {', '.join(unused)} is not in the formula")
    return (parse(re.sub(r"\[\s*([^\s\]]+)", lambda row: f"[{others.get(row[1], row[1])}", expression.text)),)


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
    return Bound(" ".join(text.split()), float(ends[0]), float(ends[1]), known[unit] if unit else ())
