"""YAML files that people write: each mistake is said with the file, the key and what it could be."""

from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict, Field

from harness import ROOT
from harness.errors import UserError
from harness.system import yaml_files


class Inner(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    width: int


class Outer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    name: str
    inner: Inner | None = None
    size: int = Field(1, alias="gbs")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "x.yaml is not valid YAML"),
        ("- a", "x.yaml: expected key: value pairs, found ['a']"),
        ("", "x.yaml: expected key: value pairs, found None"),
        ("a: 1\na: 2", "'a' occurs twice"),
        ("a: {b: 1, b: 2}", "'b' occurs twice"),
        ("a: \udcff", "x.yaml is not valid YAML"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError) as caught:
        yaml_files.read(path)
    assert message in str(caught.value)
    with pytest.raises(UserError, match=r"cannot read .*absent\.yaml: No such file"):
        yaml_files.read(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "a", "gsb": 1}, "here: unknown key 'gsb'; did you mean gbs?"),
        (
            {"name": "a", "inner": {"width": 1, "widht": 1}},
            "here: unknown key 'inner.widht'; did you mean width?",
        ),
        ({"name": "a", "inner": {}}, "here: 'inner.width' is missing"),
        ({"name": 5}, "here: name = 5: input should be a valid string"),
        ({"gbs": "x"}, "here: 'name' is missing\nhere: gbs = 'x': input should be a valid integer"),
    ],
)
def test_each_wrong_key_is_a_line_with_its_place(fields: dict, message: str) -> None:
    with pytest.raises(UserError) as caught:
        yaml_files.build(Outer, fields, "here")
    assert str(caught.value).startswith(message)


def test_yaml_is_read_in_one_place() -> None:
    readers = {
        path.name
        for path in (ROOT / "harness").rglob("*.py")
        if "import yaml\n" in path.read_text(encoding="utf-8")
    }
    assert readers == {"yaml_files.py"}
