"""The data sets that can be prepared by their name: data/datasets.yaml, read and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from harness.data.names import DATA, NAME
from harness.errors import UserError, nearest
from harness.system import yaml_files

FILE = DATA / "datasets.yaml"


class _DefinitionPart(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Hub(_DefinitionPart):
    """Files (a pattern) in a repository of the Hugging Face hub at a revision."""

    repository: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
    revision: Annotated[str, Field(min_length=1)]
    files: Annotated[str, Field(min_length=1)]
    gated: bool = False


class Synthetic(_DefinitionPart):
    """Text that harness.data.synthetic generates."""

    mixture: Literal["plain", "damaged"] = "plain"
    seed: Annotated[int, Field(ge=0)] = 0
    size_mb: Annotated[int, Field(ge=1)]


class Definition(_DefinitionPart):
    """A data set that can be prepared by its name.

    Attributes:
        shows: what it is, for ``make data-list``.
        chat: a file of conversations in data/.
        key: the JSON key, or Parquet column, of the text.
        limit: only the first ``limit`` documents are used.
        clean: cleaning rules, data/rules-<clean>.yaml.
    """

    name: Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
    shows: Annotated[str, Field(min_length=1)]
    hub: Hub | None = None
    synthetic: Synthetic | None = None
    chat: Annotated[str, Field(pattern=r"^[\w.-]+\.jsonl$")] | None = None
    key: str = "text"
    limit: Annotated[int, Field(ge=1)] | None = None
    clean: str | None = None
    tokenizer: str = "gpt2"

    @model_validator(mode="after")
    def _one_source(self) -> Definition:
        if sum(source is not None for source in (self.hub, self.synthetic, self.chat)) != 1:
            raise ValueError("give either hub, synthetic or chat")
        return self


def definitions(path: Path = FILE) -> dict[str, Definition]:
    """Every data set that can be prepared by its name.

    Raises:
        UserError: the file is missing or no YAML, or a key or value is wrong.
    """
    found = {}
    for name, row in (rows := yaml_files.read(path)).items():
        where = f"{path.name}: {name}"
        with yaml_files.entry(path, rows, name):
            yaml_files.word(name, f"{where}: its name", "openwebtext")
            found[name] = yaml_files.build(
                Definition, {"name": name, **yaml_files.mapping(row, where)}, where
            )
    return found


def definition(name: str) -> Definition:
    """The definition of the data set ``name``.

    Raises:
        UserError: there is none; the message has the nearest names.
    """
    known = definitions()
    if name not in known:
        raise UserError(
            f"no data set {name}; {nearest(name, known)}\n"
            "for your own text: make data-prepare NAME=… INPUT=file-or-folder"
        )
    return known[name]
