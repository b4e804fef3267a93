"""Examines a tokenizer, once a machine: its properties, and whether gigatoken gives upstream's ids.

python -m harness.data.examine KIND MODEL      prints the result as JSON
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import batched, chain
from pathlib import Path
from typing import Any

import numpy as np

from harness.data.hard_texts import hard_texts
from harness.data.tokenizer import (
    Encoder,
    Gigatoken,
    SentencePiece,
    Tokenizers,
    described,
    versions,
)
from harness.errors import UserError, first_line

Ids = list[list[int]]

_TEXTS_AT_ONCE = 500


def examine_hugging_face(folder: Path) -> dict[str, Any]:
    """Properties of the tokenizer in ``folder``, as upstream's HuggingFaceTokenizer loads it.

    Raises:
        UserError: transformers cannot load it, or its ids differ from those of tokenizer.json.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise UserError(
            "transformers is not installed, which upstream's tokenizers need: scripts/setup.sh data"
        ) from None
    try:
        upstream = AutoTokenizer.from_pretrained(str(folder))
        special = [
            token.content
            for token in upstream.backend_tokenizer.get_added_tokens_decoder().values()
        ]
    except Exception as error:
        raise UserError(
            f"transformers cannot load the tokenizer in {folder}: {first_line(error)}"
        ) from None
    eod = upstream.eos_token_id
    description = (folder / "tokenizer.json").read_text(encoding="utf-8")
    plain = Tokenizers(description, eod)
    texts = list(hard_texts(special))
    if first_difference(plain, texts, lambda some: upstream(some).input_ids) is not None:
        raise UserError(
            f"{folder}: transformers' AutoTokenizer, which upstream uses, gives other ids than its"
            " tokenizer.json\nsave it with save_pretrained() and give that folder"
        )
    before, after = plain.frame()
    end = plain.token(eod)
    facts = {"vocab_size": len(upstream), "eod": eod, "before": before, "after": after, "end": end}
    return facts | _examine_fast(
        lambda joined: Gigatoken(description, before, after, end, joined), texts, plain, eod
    )


def examine_sentence_piece(model: Path) -> dict[str, Any]:
    """Properties of a SentencePiece model, as upstream's SentencePieceTokenizer loads it."""
    reference = SentencePiece(model)
    processor = reference.processor
    eod = processor.eos_id() if processor.eos_id() >= 0 else None
    end = None if eod is None else processor.id_to_piece(eod)
    pieces = range(processor.get_piece_size())
    special = [
        processor.id_to_piece(i)
        for i in pieces
        if processor.is_control(i) or processor.is_unknown(i)
    ]
    facts = {"vocab_size": len(pieces), "eod": eod, "before": (), "after": (), "end": end}
    texts = list(hard_texts(special))
    return facts | _examine_fast(
        lambda joined: Gigatoken(described(model), (), (), end, joined), texts, reference, eod
    )


def first_difference(
    encoder: Encoder,
    texts: Iterable[str],
    expected: Callable[[list[str]], Ids],
    closed: bool = False,
) -> str | None:
    """The first of ``texts`` for which ``encoder`` and ``expected`` give different ids, if any."""
    for some in batched(texts, _TEXTS_AT_ONCE):
        wanted = expected(list(some))
        ids, lengths = encoder.encode(some, closed)
        if lengths.tolist() != [len(each) for each in wanted] or ids.tolist() != list(
            chain.from_iterable(wanted)
        ):
            return next(
                text
                for text, got, want in zip(some, _rows(ids, lengths), wanted, strict=True)
                if got != want
            )
    return None


def _examine_fast(
    make: Callable[[bool], Encoder], texts: list[str], reference: Encoder, eod: int | None
) -> dict[str, Any]:
    """Whether gigatoken gives the ids of ``reference``, without and with end-of-document tokens."""
    package = versions()["gigatoken"]
    slow = {"fast": None, "joined": False}
    if package is None:
        return slow | {"slow_because": "gigatoken is not installed"}

    def expected(some: list[str], closed: bool) -> Ids:
        return list(_rows(*reference.encode(some, closed)))

    try:
        for joined in (True, False):
            encoder = make(joined)
            for closed in (False,) if eod is None else (False, True):
                different = first_difference(
                    encoder, texts, partial(expected, closed=closed), closed
                )
                if different is not None:
                    break
            else:
                return {"fast": f"gigatoken {package}", "slow_because": None, "joined": joined}
    except Exception as error:
        return slow | {"slow_because": f"gigatoken {package} does not take it: {first_line(error)}"}
    return slow | {"slow_because": f"gigatoken {package} gives other ids for {different[:40]!r}"}


def _rows(ids: np.ndarray, lengths: np.ndarray) -> Iterator[list[int]]:
    return (row.tolist() for row in np.split(ids, np.cumsum(lengths)[:-1]))


def main(kind: str, model: str) -> int:
    """Print the result; returns the exit status."""
    try:
        examine = (
            examine_sentence_piece if kind == "SentencePieceTokenizer" else examine_hugging_face
        )
        print(json.dumps(examine(Path(model))))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
