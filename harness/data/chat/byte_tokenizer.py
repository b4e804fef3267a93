"""``TOKENIZER=bytes``: a token a byte, whose id it is, and an end of document; for small models, made without a network."""

from __future__ import annotations

import json
from pathlib import Path

from harness.data.tokenizer_files import DESCRIPTION
from harness.files import write_text

END = "<|endoftext|>"


def byte_folder(home: Path) -> Path:
    """The folder with the tokenizer's files below ``home``, written where it is not there yet."""
    folder = home / "bytes"
    if not (folder / DESCRIPTION).is_file():
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        made = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in enumerate(_letters())}, merges=[]))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.decoder = decoders.ByteLevel()
        made.add_special_tokens([AddedToken(END, special=True, normalized=False)])
        folder.mkdir(parents=True, exist_ok=True)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END, "unk_token": None}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
        write_text(folder / DESCRIPTION, made.to_str())
    return folder


def _letters() -> list[str]:
    """What byte-level tokenizers write for each byte: itself where it is printable, else a letter from 256 on (GPT-2)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
