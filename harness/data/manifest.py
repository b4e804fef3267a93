"""manifest.json of a data set: the source of its text, counts, tokenizer, and checksums."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from harness.data.progress import duration
from harness.errors import UserError, first_line
from harness.system.files import write_json

FILE = "manifest.json"


class _ManifestPart(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class SourceFile(_ManifestPart):
    """A file of the source. It has no ``sha256`` if only its beginning was read."""

    name: str
    bytes: int
    sha256: str | None


class TextSource(_ManifestPart):
    """The source of the text.

    Attributes:
        asked: the request: repository and revision, paths, seed and size, or other data sets.
        commit: the hub's commit for the requested revision.
        skipped: lines or rows without a document, by rule, if they were skipped before cleaning.
    """

    kind: Literal["hub", "files", "synthetic", "merged"]
    asked: dict[str, Any]
    commit: str | None = None
    files: tuple[SourceFile, ...] = ()
    skipped: Counter[str] = Counter()


class Counted(_ManifestPart, frozen=False):
    """Lines or rows that were tokenised, and what they became; counted up meanwhile.

    Attributes:
        empty: documents without tokens.
        skipped: lines or rows without a document, by rule.
    """

    records: int = 0
    documents: int = 0
    empty: int = 0
    sequences: int = 0
    tokens: int = 0
    skipped: Counter[str] = Counter()


class Cleaned(_ManifestPart):
    """The result of cleaning: documents in and out, dropped and changed by rule."""

    rules: str
    documents_in: int
    documents_out: int
    bytes_in: int
    bytes_out: int
    dropped: dict[str, int]
    changed: dict[str, int]


class TokenizerUsed(_ManifestPart):
    """The tokenizer; ``type`` is upstream's name, ``by`` the package that made the ids."""

    type: str
    name: str
    sha256: str
    vocab_size: int
    eod: int | None
    by: str


class Chat(_ManifestPart):
    """How conversations became text.

    Attributes:
        template: the tokenizer's own chat template, or ``conversations.simple_template``.
        answer_tokens: tokens of answers, which the loss is computed on.
    """

    template: Literal["own", "simple"]
    template_sha256: str
    answer_tokens: int


class Written(_ManifestPart):
    """The .bin/.idx pair on the disk."""

    dtype: str
    bin_bytes: int
    bin_sha256: str
    idx_bytes: int
    idx_sha256: str


class Manifest(_ManifestPart):
    """The content of manifest.json.

    Attributes:
        recipe: checksum of everything that determines the pair.
        created: Unix time.
        chat: set if documents are conversations.
        seconds: duration of each stage.
    """

    name: str
    recipe: str
    created: float
    source: TextSource
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
        """The source in a few words: ``from crawl.jsonl``."""
        asked = self.source.asked
        match self.source.kind:
            case "hub":
                revision = self.source.commit or asked.get("revision")
                return f"from {asked.get('repository')} at {revision}"
            case "files":
                return f"from {asked.get('input')}"
            case "synthetic":
                return f"generated, {asked.get('mixture')}, seed {asked.get('seed')}"
            case "merged":
                return f"joined from {', '.join(map(str, asked.get('from') or ['?']))}"

    def lines(self) -> list[str]:
        """Where the text is from, what was dropped and skipped, and how long each stage took."""
        files = self.source.files
        found = [f"  {self.origin}" + f", {len(files)} file{'s' * (len(files) != 1)}" * bool(files)]
        if cleaned := self.cleaned:
            found += [
                f"  cleaned by {cleaned.rules}: {cleaned.documents_out:,} of"
                f" {cleaned.documents_in:,} documents kept",
                f"  dropped: {by_rule(cleaned.dropped) or 'none'}",
            ]
        if skipped := self.source.skipped + self.counted.skipped:
            found.append(f"  skipped: {by_rule(dict(sorted(skipped.items())))}")
        took = ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in self.seconds.items())
        return [*found, f"  tokenizer {self.tokenizer.name} by {self.tokenizer.by}; {took}"]

    def write(self, folder: Path) -> None:
        """Write it into a data set's folder, completely or not at all."""
        write_json(folder / FILE, self.model_dump(mode="json"))


def by_rule(numbers: Mapping[str, int]) -> str:
    """Counts by rule as text, without those that are 0."""
    return ", ".join(f"{number:,} {rule}" for rule, number in numbers.items() if number)


def noted[Record: BaseModel](path: Path, kind: type[Record]) -> Record | None:
    """The record that an earlier process left in ``path``; None if it left none."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except (OSError, ValueError):
        return None


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of the data set in ``folder``; None if it has none.

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
