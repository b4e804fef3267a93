"""YAML files that people write, as checked values: what is wrong in one is said with the file, the key and the way out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from harness.errors import UserError, nearest


class _StrictLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """Refuses a key that occurs twice in one mapping, which YAML readers otherwise overwrite silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} occurs twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError where it is none, or has a key twice."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path.name} is not valid YAML: {error}") from None
    return mapping(content, path.name)


def mapping(value: Any, where: str) -> dict[str, Any]:
    """``value``, which must be a mapping. Raises UserError."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected key: value pairs, found {value!r}")
    return value


def build[Kind: BaseModel](kind: type[Kind], fields: Mapping[str, Any], where: str) -> Kind:
    """A ``kind`` of ``fields``. Raises UserError with a line for each that is wrong."""
    try:
        return kind(**fields)
    except ValidationError as error:
        raise UserError("\n".join(f"{where}: {_complaint(e, kind)}" for e in error.errors())) from None


def _complaint(error: Mapping[str, Any], kind: type[BaseModel]) -> str:
    key, said = ".".join(map(str, error["loc"])), error["msg"][0].lower() + error["msg"][1:]
    match error["type"]:
        case "extra_forbidden":
            return f"unknown key {key!r}; {nearest(str(error['loc'][-1]), _keys(kind, error['loc'][:-1]))}"
        case "missing":
            return f"{key!r} is missing"
        case "literal_error":
            return f"{key} = {error['input']!r}; valid: {error['ctx']['expected']}"
        case "string_pattern_mismatch":
            return f"{key} = {error['input']!r} must match {error['ctx']['pattern']}"
        case _:
            return f"{key} = {error['input']!r}: {said}" if key else said.removeprefix("value error, ")


def _keys(kind: type[BaseModel], at: tuple[int | str, ...]) -> list[str]:
    """The keys of ``kind``, or of the values inside it that lie ``at`` these keys."""
    for part in at:
        fields = [field for name, field in kind.model_fields.items() if part in (name, field.alias)]
        inside = [i for field in fields for i in (field.annotation, *get_args(field.annotation)) if _is_model(i)]
        kind = inside[0] if inside else kind
    return [key for name, field in kind.model_fields.items() for key in (field.alias, name) if key]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
