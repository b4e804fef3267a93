"""Texts that reveal differences between tokenizers: all scripts, long runs, odd white space."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from harness.system import yaml_files

_RUN_LENGTHS = (*range(1, 18), 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000, 4097)
_PIECES = yaml_files.read(Path(__file__).with_suffix(".yaml"))


def hard_texts(special: Iterable[str] = (), every_code_point: bool = False) -> Iterator[str]:
    """The texts, the same in every call; none has an unpaired surrogate.

    Args:
        special: the tokenizer's special tokens, to occur inside texts.
        every_code_point: all 17 planes of Unicode (4 MB) instead of the first two and samples of
            the others.
    """
    yield from (
        "",
        " ",
        "\n",
        "a",
        "Hello world",
        " Hello  world \n\n",
        "x" * 100_000,
        "ab " * 50_000,
        "漢字" * 20_000,
    )
    yield from (char * length for char in _PIECES["runs_of"] for length in _RUN_LENGTHS)
    yield from (
        f"x{char * length}y {char * length} y"
        for char in _PIECES["runs_of"]
        for length in (1, 2, 3, 5, 8)
    )
    yield from ("".join(parts) for parts in itertools.product(_PIECES["spaces"], repeat=3))
    yield from (
        f"{word}{end}{after}"
        for word in ("I", "we ", "", "å", "9")
        for end in _PIECES["contractions"]
        for after in ("", "x", " y", "1")
    )
    yield from _code_points(every_code_point)
    for token in itertools.islice(special, 40):
        yield from (
            token,
            token * 3,
            f"a{token}b",
            f" {token} ",
            f"\n{token}\n",
            token[:-1],
            f"<{token}>",
            token.upper(),
        )
    yield from _mixtures(random.Random(2019))


def _code_points(every: bool) -> Iterator[str]:
    for start in range(0, 0x110000, 64):
        if 0xD800 <= start < 0xE000 or not (every or start < 0x20000 or start % 4096 == 0):
            continue
        chars = [chr(code) for code in range(start, start + 64)]
        yield "".join(chars)
        yield " ".join(chars)
        if start < 0x3000 or every:
            yield "".join(f"a{char}b1{char}{char}." for char in chars)


def _mixtures(rng: random.Random) -> Iterator[str]:
    for _ in range(1500):
        words = []
        for _ in range(rng.randint(1, 60)):
            alphabet = "".join(rng.sample(_PIECES["scripts"], rng.choice((1, 1, 1, 2, 3))))
            words.append("".join(rng.choices(alphabet, k=rng.choice((1, 2, 3, 5, 8, 13, 30)))))
        yield rng.choice(("", " ", " ", "  ", "\n")).join(words)
    for _ in range(200):
        yield rng.randbytes(rng.randint(1, 800)).decode("utf-8", "replace")
    for _ in range(200):
        codes = (
            rng.choice((rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)))
            for _ in range(rng.randint(1, 200))
        )
        yield "".join(map(chr, codes))
