"""Cleaning rules for single documents: each maps texts to the texts that it keeps."""

from __future__ import annotations

import re
import unicodedata
import zlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from harness.data.clean.characters import Characters, pattern
from harness.data.clean.identification import probabilities
from harness.data.clean.languages import LANGUAGES, code_of

Share = Annotated[float, Field(ge=0, le=1, strict=False)]
Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Filtered:
    """The result of a rule: the texts that it keeps, and by position why it drops the others."""

    texts: list[str]
    dropped: dict[int, str] = field(default_factory=dict)


class CleaningRule(BaseModel):
    """A rule with its options. ``key`` is its name in YAML and in counts."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, ignored_types=(cached_property,)
    )
    key: ClassVar[str]


class DocumentRule(CleaningRule):
    """A rule for single documents."""

    def apply(self, texts: list[str]) -> Filtered:
        raise NotImplementedError


_PLAIN = bytes(range(0x20, 0x7F)) + b"\t\n"
"""Bytes that never need normalising."""

_TRAILING = {
    character: byte
    for byte in range(0x80, 0xC0)
    for character in (chr(byte), bytes([byte]).decode("cp1252", errors="replace"))
    if character != "\ufffd"
}
"""UTF-8's continuation bytes as they look when decoded as Latin-1 or as Windows-1252."""

# First bytes of two or three: Â and Ã for Latin-1's letters, â for punctuation. Ä and Å are not
# among them: both are letters that may precede a quotation mark.
_TRAIL = f"[{re.escape(''.join(_TRAILING))}]"
_MOJIBAKE = re.compile(f"[ÂÃ]{_TRAIL}|â[€\u201a„†\u02c6\x80\x82\x84\x86\x88]{_TRAIL}")

# A text without characters from U+0300 on is in NFC.
_MAY_NOT_BE_NFC = re.compile("[\u0300-\U0010ffff]")


class Normalise(DocumentRule):
    """Normalises Unicode, repairs mojibake and removes characters, until nothing changes."""

    key = "normalise"
    form: Literal["NFC", "NFKC"] = "NFC"
    mend_mojibake: bool
    remove: Characters

    @cached_property
    def _removed(self) -> re.Pattern[str]:
        return pattern(self.remove)

    def apply(self, texts: list[str]) -> Filtered:
        return Filtered([self._normalise(text) if self._may_need(text) else text for text in texts])

    def _may_need(self, text: str) -> bool:
        """A quick test of what is not plain ASCII, a small part of most texts."""
        rare = text.encode().translate(None, _PLAIN).decode()
        return bool(rare) and bool(
            self.form != "NFC"
            or self._removed.search(rare)
            or _MAY_NOT_BE_NFC.search(rare)
            or (self.mend_mojibake and _MOJIBAKE.search(rare))
        )

    def _normalise(self, text: str) -> str:
        while True:
            new = unicodedata.normalize(self.form, self._removed.sub("", text))
            if self.mend_mojibake:
                new = _MOJIBAKE.sub(_mend, new)
            if new == text:
                return text
            text = new


def _mend(match: re.Match[str]) -> str:
    lead, *trail = match[0]
    return bytes([ord(lead), *(_TRAILING[character] for character in trail)]).decode(
        errors="replace"
    )


class OneLine(DocumentRule):
    """Replaces each run of white space by one space, and strips the ends."""

    key = "one-line"

    def apply(self, texts: list[str]) -> Filtered:
        return Filtered([text if _is_one_line(text) else _one_line(text) for text in texts])


def _is_one_line(text: str) -> bool:
    # Of white space, only the space is printable.
    return text.isprintable() and "  " not in text and text[:1] != " " and text[-1:] != " "


def _one_line(text: str) -> str:
    # Usually only line breaks have to go; splitting into words takes ten times as long.
    joined = " ".join(filter(None, map(str.strip, text.splitlines())))
    return joined if _is_one_line(joined) else " ".join(joined.split())


class Length(DocumentRule):
    """Drops documents that are too short or too long, in characters."""

    key = "length"
    min_characters: Count
    max_characters: Count

    @model_validator(mode="after")
    def _ordered(self) -> Length:
        if self.min_characters > self.max_characters:
            raise ValueError(
                f"min_characters {self.min_characters} is above max_characters"
                f" {self.max_characters}"
            )
        return self

    def apply(self, texts: list[str]) -> Filtered:
        wrong = (
            (i, len(text))
            for i, text in enumerate(texts)
            if not self.min_characters <= len(text) <= self.max_characters
        )
        return _without(texts, {i: f"{length} characters" for i, length in wrong})


class Repetition(DocumentRule):
    """Drops documents whose first 4,096 bytes compress below ``min_compressed`` (zlib, level 1)."""

    key = "repetition"
    min_compressed: Share

    def apply(self, texts: list[str]) -> Filtered:
        left = enumerate(map(_compressed, texts))
        return _without(
            texts,
            {i: f"{share:.2f} when compressed" for i, share in left if share < self.min_compressed},
        )


def _compressed(text: str) -> float:
    data = text.encode()[:4096]
    return len(zlib.compress(data, 1)) / max(1, len(data))


class Language(DocumentRule):
    """Keeps documents whose probability of the language, by lid.176, is above ``above``."""

    key = "language"
    name: str
    above: Share

    @model_validator(mode="after")
    def _known(self) -> Language:
        code_of(self.name)
        return self

    def apply(self, texts: list[str]) -> Filtered:
        wanted, dropped = code_of(self.name), {}
        for i, text in enumerate(texts):
            found = probabilities(text)
            if found.get(wanted, 0.0) <= self.above:
                likeliest = next(iter(found))
                dropped[i] = f"{LANGUAGES[likeliest]} {found[likeliest]:.2f}"
        return _without(texts, dropped)


class Alphabet(DocumentRule):
    """Removes characters outside ``allow``; more than a share ``drop_above`` drops the document."""

    key = "alphabet"
    allow: Characters
    drop_above: Share

    @cached_property
    def _other(self) -> re.Pattern[str]:
        return pattern(self.allow, negate=True)

    @cached_property
    def _plain(self) -> bytes:
        return bytes(byte for byte in range(128) if not self._other.match(chr(byte)))

    def apply(self, texts: list[str]) -> Filtered:
        kept, dropped = [], {}
        for i, text in enumerate(texts):
            others = self._other.findall(text.encode().translate(None, self._plain).decode())
            if len(others) > self.drop_above * len(text):
                dropped[i] = (
                    f"{len(others) / len(text):.1%} other characters: {''.join(others[:20])}"
                )
            else:
                kept.append(
                    re.sub("  +", " ", self._other.sub("", text)).strip(" ") if others else text
                )
        return Filtered(kept, dropped)


def _without(texts: list[str], dropped: dict[int, str]) -> Filtered:
    return Filtered(
        [text for i, text in enumerate(texts) if i not in dropped] if dropped else texts, dropped
    )
