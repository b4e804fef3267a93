"""``TOKENIZER=bytes``: ids are bytes, and 256 ends a document. It needs no network."""

from __future__ import annotations

import json
from pathlib import Path

from harness.data.tiktoken_files import byte_letters
from harness.data.tokenizer_files import DESCRIPTION
from harness.system.files import write_text

END = "<|endoftext|>"


def byte_folder(home: Path) -> Path:
    """The folder ``home``/bytes with the tokenizer's files; written if it is missing."""
    folder = home / "bytes"
    if not (folder / DESCRIPTION).is_file():
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        made = Tokenizer(
            models.BPE(
                vocab={letter: byte for byte, letter in enumerate(byte_letters())}, merges=[]
            )
        )
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.decoder = decoders.ByteLevel()
        made.add_special_tokens([AddedToken(END, special=True, normalized=False)])
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END,
            "eos_token": END,
            "unk_token": None,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
        write_text(folder / DESCRIPTION, made.to_str())
    return folder
