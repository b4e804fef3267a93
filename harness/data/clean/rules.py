"""Reads cleaning rules from YAML: first those for single documents, then those that compare all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.data.clean.documents import (
    Alphabet,
    CleaningRule,
    DocumentRule,
    Language,
    Length,
    Normalise,
    OneLine,
    Repetition,
)
from harness.data.clean.duplicates import ExactDuplicates, NearDuplicates
from harness.errors import UserError, nearest
from harness.system import yaml_files

UNREADABLE = "unreadable"

KINDS: dict[str, type[CleaningRule]] = {
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
    """Rules in the order of their application, each kind at most once."""

    documents: tuple[DocumentRule, ...]
    exact: ExactDuplicates | None
    near: NearDuplicates | None

    @property
    def all(self) -> tuple[CleaningRule, ...]:
        return (*self.documents, *(rule for rule in (self.exact, self.near) if rule))

    @property
    def names(self) -> tuple[str, ...]:
        """Reasons for dropping a document; decision n is the n-th of them, 0 is kept."""
        return (UNREADABLE, *(rule.key for rule in self.all))

    def dump(self) -> list[dict[str, Any]]:
        """The rules as YAML would have them, with every threshold."""
        return [{rule.key: rule.model_dump(mode="json")} for rule in self.all]


def load_rules(path: Path) -> Rules:
    """Read a file of rules.

    Raises:
        UserError: the file is missing or no YAML, or a rule, its options or its position is wrong.
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


def _rule(entry: Any) -> CleaningRule:
    name, options = None, None
    if isinstance(entry, str):
        name = entry
    elif isinstance(entry, dict) and len(entry) == 1:
        ((name, options),) = entry.items()
    if not isinstance(name, str):
        raise UserError(
            f"{entry!r} is no rule: write `- name:` with its options below, or `- name` where it"
            " has none"
        )
    if name not in KINDS:
        raise UserError(f"no rule {name!r}; {nearest(name, KINDS)}")
    return yaml_files.build(KINDS[name], options or {}, name)


def _in_order(rules: Sequence[CleaningRule]) -> Rules:
    names = [rule.key for rule in rules]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{name} occurs {names.count(name)} times")
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
