"""The rules of cleaning, read from YAML and checked: rules of documents, then those that compare
all documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from harness.data.clean.documents import (
    Alphabet,
    DocumentRule,
    Language,
    Length,
    Normalise,
    OneLine,
    Repetition,
    Rule,
)
from harness.data.clean.duplicates import ExactDuplicates, NearDuplicates
from harness.errors import UserError, nearest
from harness.system import yaml_files

UNREADABLE = "unreadable"

KINDS: dict[str, type[Rule]] = {
    kind.key: kind
    for kind in (
        Normalise,
        OneLine,
        Length,
        Repetition,
        Language,
        Alphabet,
        ExactDuplicates,
        NearDuplicates,
    )
}


@dataclass(frozen=True)
class Rules:
    """Rules in order: those of documents, then those of the corpus, each kind once at most."""

    documents: tuple[DocumentRule, ...]
    exact: ExactDuplicates | None
    near: NearDuplicates | None

    @property
    def all(self) -> tuple[Rule, ...]:
        return (*self.documents, *(rule for rule in (self.exact, self.near) if rule))

    @property
    def names(self) -> tuple[str, ...]:
        """The reasons for which a document is dropped, in order; a decision is a position in (kept,
        *names)."""
        return (UNREADABLE, *(rule.key for rule in self.all))

    def dump(self) -> list[dict[str, Any]]:
        """The rules as they stand in YAML, every threshold filled in."""
        return [{rule.key: rule.model_dump(mode="json")} for rule in self.all]


def load_rules(path: Path) -> Rules:
    """Read a file of rules.

    Raises:
        UserError: the file is missing or is no YAML, or a rule, its options or its place are wrong.
    """
    if not path.is_file():
        there = map(str, sorted(path.parent.glob("rules-*.yaml")))
        raise UserError(f"RULES={path}: no such file; {nearest(str(path), there)}")
    content = yaml_files.read(path)
    if set(content) != {"rules"} or not isinstance(content["rules"], list):
        raise UserError(
            f"{path}: it must hold one key, rules, with a list of rules (as data/rules-sv.yaml)"
        )
    try:
        return _in_order([_rule(entry) for entry in content["rules"]])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _rule(entry: Any) -> Rule:
    name, options = (
        (entry, {})
        if isinstance(entry, str)
        else next(iter(entry.items()))
        if _is_single(entry)
        else (None, None)
    )
    if not isinstance(name, str):
        raise UserError(
            f"{entry!r} is no rule: write `- name:` with its options below, or `- name` where it"
            " has none"
        )
    if name not in KINDS:
        raise UserError(f"no rule {name!r}; {nearest(name, KINDS)}")
    if not isinstance(options or {}, dict):
        raise UserError(f"{name}: {options!r} is no set of options (`option: value` lines)")
    kind = KINDS[name]
    try:
        return kind.model_validate(options or {})
    except ValidationError as error:
        raise UserError(
            "\n".join(f"{name}: {_explain(kind, one)}" for one in error.errors())
        ) from None


def _is_single(entry: Any) -> bool:
    return isinstance(entry, dict) and len(entry) == 1


def _explain(kind: type[Rule], error: Any) -> str:
    option = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"no option {option!r}; {nearest(option, kind.model_fields)}"
    if error["type"] == "missing":
        return f"{option} is missing"
    message = error["msg"].removeprefix("Value error, ")
    return f"{option} = {error['input']!r}: {message}" if option else message


def _in_order(rules: Sequence[Rule]) -> Rules:
    names = [rule.key for rule in rules]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{name} stands there {names.count(name)} times")
    documents = tuple(rule for rule in rules if isinstance(rule, DocumentRule))
    exact = next((rule for rule in rules if isinstance(rule, ExactDuplicates)), None)
    near = next((rule for rule in rules if isinstance(rule, NearDuplicates)), None)
    found = Rules(documents, exact, near)
    if found.all != tuple(rules):
        raise UserError(
            "exact-duplicates and then near-duplicates come last: they compare documents as the"
            " other rules leave them"
        )
    return found
