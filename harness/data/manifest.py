"""manifest.json of a data set: where its text came from, what became of it, and the checksums of
what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from harness.errors import UserError, first_line
from harness.system.files import write_json

FILE = "manifest.json"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class SourceFile(_Record):
    """A file that text came from. ``sha256`` is none where only its front was read."""

    name: str
    bytes: int
    sha256: str | None


class Source(_Record):
    """Where text came from.

    Attributes:
        asked: how it was named: a repository and its revision, or paths, or a seed and a size, or
        other data sets.
        commit: what a hub's revision stood for.
        skipped: lines or rows that were no documents, by rule, where they were left out before
        cleaning.
    """

    kind: Literal["hub", "files", "synthetic", "merged"]
    asked: dict[str, Any]
    commit: str | None = None
    files: tuple[SourceFile, ...] = ()
    skipped: dict[str, int] = {}


class Counted(_Record):
    """Lines or rows of the source, or of the cleaning's output, and what they became. ``skipped``
    is by rule."""

    records: int
    documents: int
    empty: int
    sequences: int
    tokens: int
    skipped: dict[str, int]


class Cleaned(_Record):
    """What cleaning did: documents in and out, dropped and changed by rule."""

    rules: str
    documents_in: int
    documents_out: int
    bytes_in: int
    bytes_out: int
    dropped: dict[str, int]
    changed: dict[str, int]


class TokenizerUsed(_Record):
    """The tokenizer, by upstream's name of its kind. ``by`` is the package that made the ids."""

    type: str
    name: str
    sha256: str
    vocab_size: int
    eod: int | None
    by: str


class Chat(_Record):
    """What made text of conversations.

    ``template``: the tokenizer's own, or the simple one; ``answer_tokens``: those learned.
    """

    template: Literal["own", "simple"]
    template_sha256: str
    answer_tokens: int


class Written(_Record):
    """The pair on the disk."""

    dtype: str
    bin_bytes: int
    bin_sha256: str
    idx_bytes: int
    idx_sha256: str


class Manifest(_Record):
    """All of it.

    ``chat``: set where documents are conversations. ``recipe``: checksum of all that decides the
    pair.
    ``seconds``: by stage. ``created``: Unix time.
    """

    name: str
    recipe: str
    created: float
    source: Source
    cleaned: Cleaned | None
    counted: Counted
    tokenizer: TokenizerUsed
    append_eod: bool
    chat: Chat | None = None
    written: Written
    seconds: dict[str, float]
    versions: dict[str, str | None]

    @property
    def origin(self) -> str:
        """Where its text came from, in a few words: ``from crawl.jsonl``."""
        asked = self.source.asked
        match self.source.kind:
            case "hub":
                return f"from {asked.get('repository')} at {self.source.commit or asked.get('revision')}"  # noqa: E501
            case "files":
                return f"from {asked.get('input')}"
            case "synthetic":
                return f"made here, {asked.get('mixture')}, seed {asked.get('seed')}"
            case "merged":
                return f"joined from {', '.join(map(str, asked.get('from') or ['?']))}"

    def write(self, folder: Path) -> None:
        """Write it into a data set's folder, whole or not at all."""
        write_json(folder / FILE, self.model_dump(mode="json"))


def noted[Record: BaseModel](path: Path, kind: type[Record]) -> Record | None:
    """What an earlier process noted in ``path``, if it did."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except (OSError, ValueError):
        return None


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of the data set in ``folder``; none where it has none.

    Raises:
        UserError: it is damaged.
    """
    path = folder / FILE
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise UserError(
            f"{path} is damaged: {first_line(error)}\nprepare the data set again: make data-…"
        ) from None
