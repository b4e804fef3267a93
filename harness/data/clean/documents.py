"""Rules that look at each document by itself: texts in, the texts they keep out, changed or not."""

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
from harness.data.clean.languages import code_of, name_of

Share = Annotated[float, Field(ge=0, le=1, strict=False)]
Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Outcome:
    """What a rule made of some texts: those it keeps, in order, and why it drops the others, by
    position."""

    texts: list[str]
    dropped: dict[int, str] = field(default_factory=dict)


class Rule(BaseModel):
    """One rule with its options. ``key`` is its name in YAML and in counts."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, ignored_types=(cached_property,)
    )
    key: ClassVar[str]


class DocumentRule(Rule):
    """A rule of documents."""

    def apply(self, texts: list[str]) -> Outcome:
        raise NotImplementedError


_PLAIN = bytes(range(0x20, 0x7F)) + b"\t\n"
"""Characters that never need normalising."""

_TRAILING = {
    character: byte
    for byte in range(0x80, 0xC0)
    for character in (chr(byte), bytes([byte]).decode("cp1252", errors="replace"))
    if character != "\ufffd"
}
"""What a UTF-8 continuation byte looks like when read as Latin-1 or as Windows-1252."""

# Ä and Å are letters that may stand before a quotation mark: only the leads of Latin-1's letters
# (Â, Ã) and of punctuation (â) count.
_TRAIL = f"[{re.escape(''.join(_TRAILING))}]"
_MOJIBAKE = re.compile(f"[ÂÃ]{_TRAIL}|â[€\u201a„†\u02c6\x80\x82\x84\x86\x88]{_TRAIL}")

# A text of characters below U+0300 is its own NFC.
_MAY_NOT_BE_NFC = re.compile("[\u0300-\U0010ffff]")


class Normalise(DocumentRule):
    """Unicode normal form, mojibake mended, unwanted characters removed; again until nothing
    changes."""

    key = "normalise"
    form: Literal["NFC", "NFKC"] = "NFC"
    mend_mojibake: bool
    remove: Characters

    @cached_property
    def _removed(self) -> re.Pattern[str]:
        return pattern(self.remove)

    def apply(self, texts: list[str]) -> Outcome:
        return Outcome([self._normalise(text) if self._may_need(text) else text for text in texts])

    def _may_need(self, text: str) -> bool:
        """Looks only at what is not plain ASCII, a small part of most text."""
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
    """Each run of white space becomes one space; none is left at the ends."""

    key = "one-line"

    def apply(self, texts: list[str]) -> Outcome:
        return Outcome([text if _is_one_line(text) else _one_line(text) for text in texts])


def _is_one_line(text: str) -> bool:
    # No white space but the space is printable.
    return text.isprintable() and "  " not in text and text[:1] != " " and text[-1:] != " "


def _one_line(text: str) -> str:
    # Most often only line breaks are to go; splitting into words costs ten times as much.
    joined = " ".join(filter(None, map(str.strip, text.splitlines())))
    return joined if _is_one_line(joined) else " ".join(joined.split())


class Length(DocumentRule):
    """Neither too short nor too long, in characters."""

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

    def apply(self, texts: list[str]) -> Outcome:
        wrong = (
            (i, len(text))
            for i, text in enumerate(texts)
            if not self.min_characters <= len(text) <= self.max_characters
        )
        return _without(texts, {i: f"{length} characters" for i, length in wrong})


class Repetition(DocumentRule):
    """zlib (level 1) must leave at least ``min_compressed`` of the document's first 4,096 bytes."""

    key = "repetition"
    min_compressed: Share

    def apply(self, texts: list[str]) -> Outcome:
        left = enumerate(map(_compressed, texts))
        return _without(
            texts,
            {i: f"{share:.2f} when compressed" for i, share in left if share < self.min_compressed},
        )


def _compressed(text: str) -> float:
    data = text.encode()[:4096]
    return len(zlib.compress(data, 1)) / max(1, len(data))


class Language(DocumentRule):
    """lid.176's probability of the language, over the whole document, must be above ``above``."""

    key = "language"
    name: str
    above: Share

    @model_validator(mode="after")
    def _known(self) -> Language:
        code_of(self.name)
        return self

    def apply(self, texts: list[str]) -> Outcome:
        wanted, dropped = code_of(self.name), {}
        for i, text in enumerate(texts):
            found = probabilities(text)
            if found.get(wanted, 0.0) <= self.above:
                likeliest = next(iter(found))
                dropped[i] = f"{name_of(likeliest)} {found[likeliest]:.2f}"
        return _without(texts, dropped)


class Alphabet(DocumentRule):
    """Only the characters of ``allow`` are left; a document with more than ``drop_above`` of others
    goes."""

    key = "alphabet"
    allow: Characters
    drop_above: Share

    @cached_property
    def _other(self) -> re.Pattern[str]:
        return pattern(self.allow, negate=True)

    @cached_property
    def _plain(self) -> bytes:
        return bytes(byte for byte in range(128) if not self._other.match(chr(byte)))

    def apply(self, texts: list[str]) -> Outcome:
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
        return Outcome(kept, dropped)


def _without(texts: list[str], dropped: dict[int, str]) -> Outcome:
    return Outcome(
        [text for i, text in enumerate(texts) if i not in dropped] if dropped else texts, dropped
    )
