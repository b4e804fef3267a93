"""Llama 3's ``tokenizer.model`` in tiktoken's format, converted to Hugging Face's tokenizer.json.

Each line of the file is a token in base64 and its rank. Upstream's tokenizers cannot read it. The
file holds neither the pattern that splits text into pieces nor the 256 special tokens that follow
the ranks: both are from Llama 3's code (meta-llama/llama-models, models/llama3/tokenizer.py).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from pathlib import Path

from harness.errors import UserError
from harness.system.files import write_json

RANKS = 128_000
"""Tokens in Llama 3's file. A file with another number belongs to another model, whose pattern and
special tokens are unknown here."""
SPECIAL = 256
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
_NAMED = (
    BEGIN,
    END,
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)
"""Names since Llama 3.1; Llama 3.0 has other names for some tokens that it never uses."""
_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\s*")


def is_tiktoken(path: Path) -> bool:
    """Whether the file ``path`` begins like tiktoken's format; a SentencePiece model does not."""
    with path.open("rb") as file:
        return bool(_LINE.fullmatch(file.readline(4096)))


def special_tokens() -> list[str]:
    """The special tokens in the order of their ids, which follow the ranks."""
    reserved = [
        f"<|reserved_special_token_{number}|>" for number in range(3, 3 + SPECIAL - len(_NAMED))
    ]
    return [*_NAMED, *reserved]


def tiktoken_folder(path: Path, home: Path) -> Path:
    """The folder in ``home`` with ``path`` as tokenizer.json; written if it is missing.

    Raises:
        UserError: the file is damaged, or is not Llama 3's.
    """
    data = path.read_bytes()
    folder = home / f"tiktoken-{hashlib.sha256(data).hexdigest()[:16]}"
    if not ((folder / "tokenizer.json").is_file() and (folder / "tokenizer_config.json").is_file()):
        ranks = _read(path, data)
        if len(ranks) != RANKS:
            raise UserError(
                f"{path} has {len(ranks):,} tokens, Llama 3's tokenizer.model {RANKS:,}: it is"
                " another model's, and the file does not say how to split text into pieces\n"
                "give that model's folder with tokenizer.json"
            )
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BEGIN,
            "eos_token": END,
            "model_max_length": 131072,
            "clean_up_tokenization_spaces": False,
        }
        write_json(folder / "tokenizer_config.json", config)
        write_json(folder / "tokenizer.json", tokenizer_json(ranks))
    return folder


def tokenizer_json(ranks: dict[bytes, int]) -> dict:
    """Hugging Face's description of the tokenizer with these ranks.

    A token's rank is its id and its priority in byte-pair merging.
    """
    from tokenizers import processors
    from transformers.convert_slow_tokenizer import TikTokenConverter

    converter = TikTokenConverter(pattern=PATTERN, extra_special_tokens=special_tokens())
    # It would read the file again, with the package tiktoken.
    converter.load_tiktoken_bpe = lambda _: ranks
    made = converter.converted()
    made.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                f"{BEGIN} $A", f"{BEGIN} $A {BEGIN}:1 $B:1", [(BEGIN, len(ranks))]
            ),
        ]
    )
    return json.loads(made.to_str())


def byte_letters() -> list[str]:
    """The character that byte-level tokenizers write for each byte (GPT-2's bytes_to_unicode).

    A printable byte is written as itself, any other as a letter from code point 256 on.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _read(path: Path, data: bytes) -> dict[bytes, int]:
    """Token -> rank. Raises UserError where a line is no token, or the ranks are not 0, 1, 2, …"""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise UserError(
                f"{path}: line {number:,} is no token in base64 with its rank\nfetch the file again"
            ) from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise UserError(
            f"{path}: the ranks of its {len(ranks):,} tokens are not 0, 1, 2, … one each\nfetch the"
            " file again"
        )
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise UserError(f"{path} has no token for byte {missing[0]}\nfetch the file again")
    return ranks
