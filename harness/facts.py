"""Numbers that a document quotes, each an expression over records, published rows and formulas.

    ours(115).memory_gib - ours(114).memory_gib      two records, by id or by the base name of their files
    published(408).step_ms                           the published row that ran what 408 runs
    reference("h200-8gpu", 128).step_ms              a row of another group of references.yaml
    formula("408h").bubble                           what harness/formulas.py computes from the experiment's sizes

Ids with a letter are quoted, plain ones need not be. What no run has measured has no value yet.
"""

from __future__ import annotations

import ast
import json
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from harness.catalog import Catalog, load_catalog
from harness.errors import UserError, nearest
from harness.formulas import OF_EXPERIMENT
from harness.results import Reference, References, Row, collect, load_references
from harness.tables import VALUES

HARDWARE = "h200-141gb"
"""The folder of records that the chapters talk about; README.md has a table for every hardware."""
CARD = "h100-80gb"
"""Where only a run with this card's memory is recorded, it stands for its experiment."""

_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
              ast.Pow: operator.pow}


class NotMeasured(Exception):
    """There is no run yet that could say."""


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
        references = load_references()
        return cls(records, load_catalog(), references, collect(records / "none", records, references).rows)

    @cached_property
    def _by_stem(self) -> Mapping[str, Row]:
        return {row.origin.stem: row for row in self.rows if row.origin.parent.name == HARDWARE}

    def row(self, name: str) -> Row | None:
        """The record of this id or base name (``601_args``) on HARDWARE, where there is one.

        Raises:
            UserError: there is no such experiment.
        """
        self.catalog.find(name.partition("_")[0])
        return self._by_stem.get(name) or self._by_stem.get(f"{name}_card{CARD}")

    def published(self, id_: str) -> Reference | None:
        """What was published for this experiment."""
        self.catalog.find(id_)
        published = self.references.published.beside(id_)
        return published and published.reference

    def value(self, expression: str) -> Any:
        """The value of ``expression``.

        Raises:
            NotMeasured: it needs a record, or a number in one, that is not there.
            UserError: it makes no sense.
        """
        try:
            return self._evaluate(ast.parse(expression.strip(), mode="eval").body, expression)
        except SyntaxError:
            raise UserError(f"value {expression!r}: not an expression such as ours(101).step_ms") from None

    def record_value(self, name: str, keys: str) -> Any:
        """The value at ``keys``, joined by dots, of record ``name`` (``h200-141gb/101``). Raises NotMeasured."""
        try:
            value = json.loads((self.records / f"{name}.json").read_text(encoding="utf-8"))
            for key in keys.split("."):
                value = value[key]
        except (OSError, TypeError):
            raise NotMeasured(name) from None
        except KeyError:
            raise UserError(f"record {name} has no {keys}") from None
        return _measured(value, name)

    def _evaluate(self, node: ast.expr, whole: str) -> Any:
        match node:
            case ast.Constant(value=int() | float() as number):
                return number
            case ast.BinOp(left, operation, right) if type(operation) in _OPERATORS:
                return _OPERATORS[type(operation)](self._evaluate(left, whole), self._evaluate(right, whole))
            case ast.UnaryOp(ast.USub(), operand):
                return -self._evaluate(operand, whole)
            case ast.Attribute(ast.Call(ast.Name(name), arguments, []), key):
                words = [str(a.value) for a in arguments if isinstance(a, ast.Constant)]
                if name in _SOURCES and len(words) == len(arguments):
                    return _SOURCES[name](self, key, *words)
                raise UserError(f"value {whole!r}: {name}(…); {nearest(name, _SOURCES)}")
        raise UserError(f"value {whole!r}: cannot read {ast.unparse(node)!r}")


def _ours(facts: Facts, key: str, name: str) -> Any:
    if key not in VALUES:
        raise UserError(f"ours({name}).{key}: no such value; {nearest(key, VALUES)}")
    row = facts.row(name)
    return _measured(row and VALUES[key](row), name)


def _published(facts: Facts, key: str, id_: str) -> Any:
    return _of_reference(facts.published(id_), key, id_)


def _reference(facts: Facts, key: str, group: str, name: str, variant: str = "") -> Any:
    """``variant``: the end of the row's variant; without it, the plain row."""
    rows = [row for row in facts.references.group(group).rows if name in (row.id, row.workload)]
    fits = [row for row in rows if (row.variant or "").endswith(variant) and bool(row.variant) == bool(variant)]
    if len(fits) != 1:
        raise UserError(f"reference({group}, {name}, {variant or 'plain'}): {len(fits)} rows are called so")
    return _of_reference(fits[0], key, name)


def _formula(facts: Facts, key: str, id_: str) -> Any:
    if key not in OF_EXPERIMENT:
        raise UserError(f"formula({id_}).{key}: no such formula; {nearest(key, OF_EXPERIMENT)}")
    return _measured(OF_EXPERIMENT[key](facts.catalog.find(id_)), id_)


_SOURCES: dict[str, Callable[..., Any]] = {
    "ours": _ours, "published": _published, "reference": _reference, "formula": _formula,
}


def _of_reference(reference: Reference | None, key: str, name: str) -> Any:
    if key not in Reference.model_fields:
        raise UserError(f"{name}: a reference has no {key}; {nearest(key, Reference.model_fields)}")
    return _measured(reference and getattr(reference, key), name)


def _measured(value: Any, name: str) -> Any:
    if value is None:
        raise NotMeasured(name)
    return value
