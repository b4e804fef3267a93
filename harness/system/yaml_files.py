"""YAML files as checked values; errors name the file, the line, the key and the fix."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from harness.errors import UserError, nearest


class Located(dict):
    """A mapping with the ``lines`` of its keys in the file, from 1."""

    lines: dict[Any, int]


class _StrictLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """Refuses what YAML loaders accept silently: duplicate keys, and keys that are no names.

    Keys are words or whole numbers (ids). ``yes``, ``1.5`` and ``2024-01-01`` have other types in
    YAML.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if not isinstance(key, yaml.ScalarNode):
                raise self._wrong(
                    key,
                    f"a {key.id} is no key; write `name: value`, and no `?` or `{{` in front of a "
                    "name",
                )
            if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:int"):
                kind = key.tag.rpartition(":")[2]
                raise self._wrong(
                    key,
                    f"{key.value!r} is no key but a {kind}; write '{key.value}': to make it a word",
                )
            if key.value in seen:
                raise self._wrong(key, f"{key.value!r} occurs twice; leave one out")
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def located(self, node: yaml.MappingNode) -> Iterator[Located]:
        """A mapping with the lines of its keys; in two steps, since it may contain itself."""
        found = Located()
        yield found
        found.update(self.construct_mapping(node))
        found.lines = {self.construct_object(key): key.start_mark.line + 1 for key, _ in node.value}

    @staticmethod
    def _wrong(node: yaml.Node, message: str) -> yaml.constructor.ConstructorError:
        return yaml.constructor.ConstructorError(None, None, message, node.start_mark)


_StrictLoader.add_constructor("tag:yaml.org,2002:map", _StrictLoader.located)


def read(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError where there is none, or a key is not allowed."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except yaml.constructor.ConstructorError as error:
        raise UserError(
            f"{path.name}, line {error.problem_mark.line + 1}: {error.problem}"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{path.name} is not valid YAML: {error}") from None
    except RecursionError:
        raise UserError(
            f"{path.name} is not valid YAML: lists or mappings are nested too deep"
        ) from None
    return mapping(content, path.name)


def text_of(content: Mapping[str, Any]) -> str:
    """``content`` as YAML, its keys in their order."""
    return yaml.safe_dump(dict(content), sort_keys=False, width=100)


@contextlib.contextmanager
def entry(path: Path, content: Mapping[Any, Any], key: Any) -> Iterator[None]:
    """Add the line of ``content[key]`` in ``path`` to a UserError about it."""
    try:
        yield
    except UserError as error:
        line = getattr(content, "lines", {}).get(key)
        raise UserError(f"{error}\n{path.name}{f', line {line}' if line else ''}") from None


def mapping(value: Any, where: str) -> dict[str, Any]:
    """``value``, which must be a mapping. Raises UserError."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected key: value pairs, found {value!r}")
    return value


def sequence(value: Any, where: str) -> list[Any]:
    """``value``, which must be a list. Raises UserError."""
    if not isinstance(value, list):
        raise UserError(f"{where}: expected a list, found {value!r}")
    return value


def words(value: Any, where: str) -> dict[str, Any]:
    """``value``, which must be a mapping whose keys are words. Raises UserError."""
    if odd := [key for key in mapping(value, where) if not isinstance(key, str)]:
        raise UserError(f"{where}: unknown key {odd[0]!r}; keys are words, `name: value`")
    return value


def word(value: Any, where: str, example: str) -> str:
    """``value``, which must be text. Raises UserError."""
    if not isinstance(value, str):
        raise UserError(f"{where} = {value!r}: expected a word, such as {example}")
    return value


def build[Kind: BaseModel](kind: type[Kind], fields: Mapping[str, Any], where: str) -> Kind:
    """A ``kind`` from ``fields``. Raises UserError with a line for each wrong field."""
    try:
        return kind(**words(fields, where))
    except ValidationError as error:
        raise UserError(
            "\n".join(f"{where}: {_complaint(e, kind)}" for e in error.errors())
        ) from None


def _complaint(error: Mapping[str, Any], kind: type[BaseModel]) -> str:
    key, message = ".".join(map(str, error["loc"])), error["msg"][0].lower() + error["msg"][1:]
    match error["type"]:
        case "extra_forbidden":
            *at, name = error["loc"]
            return f"unknown key {key!r}; {nearest(str(name), _keys(kind, tuple(at)))}"
        case "missing":
            return f"{key!r} is missing"
        case "literal_error":
            return f"{key} = {error['input']!r}; valid: {error['ctx']['expected']}"
        case "string_pattern_mismatch":
            return f"{key} = {error['input']!r} must match {error['ctx']['pattern']}"
        case _:
            return (
                f"{key} = {error['input']!r}: {message}"
                if key
                else message.removeprefix("value error, ")
            )


def _keys(kind: type[BaseModel], at: tuple[int | str, ...]) -> list[str]:
    """The keys of ``kind``, or of the model nested in it ``at`` these keys."""
    for part in at:
        fields = [field for name, field in kind.model_fields.items() if part in (name, field.alias)]
        inside = [
            i
            for field in fields
            for i in (field.annotation, *get_args(field.annotation))
            if _is_model(i)
        ]
        kind = inside[0] if inside else kind
    return [key for name, field in kind.model_fields.items() for key in (field.alias, name) if key]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
