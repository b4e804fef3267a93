"""The files of a tokenizer, and a checksum of those that determine its ids."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

Kind = Literal["HuggingFaceTokenizer", "SentencePieceTokenizer", "NullTokenizer"]
"""Upstream's names (``--tokenizer-type``)."""

DESCRIPTION = "tokenizer.json"
SENTENCE_PIECE = "tokenizer.model"
DECIDING = (DESCRIPTION, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
OTHERS = ("chat_template.jinja",)


def tokenizer_sha256(kind: Kind, model: Path) -> str:
    """A checksum that changes with every vocabulary entry, merge or special token.

    Args:
        model: a folder with tokenizer.json, or a SentencePiece model.
    """
    sha = hashlib.sha256(kind.encode())
    files = [model / name for name in DECIDING] if kind == "HuggingFaceTokenizer" else [model]
    for path in files:
        if path.is_file():
            data = path.read_bytes()
            sha.update(
                f"\n{path.name if kind == 'HuggingFaceTokenizer' else ''} {len(data)}\n".encode()
                + data
            )
    return sha.hexdigest()
