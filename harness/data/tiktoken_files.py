"""Llama 3's ``tokenizer.model`` as Meta publishes it: lines of a token in base64 and its rank,
tiktoken's format.

Upstream's tokenizers do not read it; here it becomes the tokenizer.json that Hugging Face's
conversion makes of it. What the file does not hold is Llama 3's own (meta-llama/llama-models,
models/llama3/tokenizer.py): the pattern that cuts text into pieces, and 256 special tokens behind
the ranks.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from pathlib import Path

from harness.errors import UserError
from harness.system.files import write_json

RANKS = 128_000
"""Tokens in Llama 3's file; other models' have others, with other patterns and special tokens."""
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
"""As Llama 3.1 and later call them; Llama 3 has other names for some that it does not use, at the
same ids."""
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
    """A folder below ``home`` with tokenizer.json and tokenizer_config.json for the file ``path``;
    made where it is missing.

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
                " another model's, and the file does not say how it cuts text into pieces\ngive"
                " that model's folder with tokenizer.json"
            )
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BEGIN,
            "eos_token": END,
        }
        config |= {"model_max_length": 131072, "clean_up_tokenization_spaces": False}
        write_json(folder / "tokenizer_config.json", config)
        write_json(folder / "tokenizer.json", tokenizer_json(ranks))
    return folder


def tokenizer_json(ranks: dict[bytes, int]) -> dict:
    """Hugging Face's description of the tokenizer with these ranks.

    A rank is what byte-pair merging prefers, and the token's id. The merges that lead to a token
    are all pairs of tokens that make it up, in the order of the pairs' ranks (TikTokenConverter in
    transformers/convert_slow_tokenizer.py).
    """
    letters = byte_letters()
    text = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        pairs = ((token[:at], token[at:]) for at in range(1, len(token)))
        found = [(left, right) for left, right in pairs if left in ranks and right in ranks]
        found.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [[text[left], text[right]] for left, right in found]
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special = enumerate(special_tokens(), len(ranks))
    added = [{"id": number, "content": name, **plain, "special": True} for number, name in special]
    bytes_only = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    begin = {"SpecialToken": {"id": BEGIN, "type_id": 0}}
    first, second = (
        {"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB")
    )
    template = {
        "type": "TemplateProcessing",
        "single": [begin, first],
        "pair": [begin, first, {"SpecialToken": {"id": BEGIN, "type_id": 1}}, second],
        "special_tokens": {BEGIN: {"id": BEGIN, "ids": [len(ranks)], "tokens": [BEGIN]}},
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": PATTERN},
                    "behavior": "Isolated",
                    "invert": False,
                },
                bytes_only,
            ],
        },
        "post_processor": {"type": "Sequence", "processors": [bytes_only, template]},
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {text[token]: rank for token, rank in ranks.items()},
            "merges": merges,
        },
    }


def byte_letters() -> list[str]:
    """What byte-level tokenizers write for each byte: itself where it is printable, else a letter
    from 256 on (GPT-2)."""
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
