"""Finds a Hugging Face model: a folder on this machine, or one downloaded from the hub."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from harness.convert.architectures import ARCHITECTURES, Architecture
from harness.errors import UserError, first_line
from harness.system.files import expanded

WANTED = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")
CONFIG = "config.json"
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
KEPT = (CONFIG, "generation_config.json", *TOKENIZER)
"""Files that an import copies unchanged."""
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def locate(named: str) -> Path:
    """The folder ``named``, or a download of the repository ``owner/name[@revision]``.

    Raises:
        UserError: it is neither, or cannot be downloaded.
    """
    folder = expanded(named)
    if folder.is_dir():
        return folder.resolve()
    if folder.is_file():
        raise UserError(
            f"HF={named} is a file; name the folder that holds config.json and the weights"
        )
    if not _REPOSITORY.fullmatch(named):
        raise UserError(
            f"HF={named}: no such folder, and no repository such as openai-community/gpt2"
        )
    from huggingface_hub import snapshot_download

    repository, _, revision = named.partition("@")
    print(f"fetching {named}")
    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision or None,
                allow_patterns=list(WANTED),
                ignore_patterns=["*/*"],
            )
        )
    except Exception as error:  # the hub's client raises what its transport does
        raise UserError(
            f"HF={named}: no such folder, and the hub does not give it: {first_line(error)}\n"
            "check the name; a gated model needs HF_TOKEN; without a network, give a folder"
        ) from None


def read_config(folder: Path) -> tuple[Architecture, dict[str, Any]]:
    """The architecture of the model in ``folder``, and its config.json with transformers' defaults.

    Raises:
        UserError: config.json is missing or damaged, or the architecture is not supported.
    """
    path = folder / CONFIG
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        names = [str(name) for name in raw.get("architectures") or []]
    except FileNotFoundError:
        raise UserError(
            f"{folder} has no {CONFIG}\nHF= wants a folder as save_pretrained writes it"
        ) from None
    except (ValueError, AttributeError, TypeError):
        raise UserError(f"{path} is damaged: no JSON object") from None
    known = [name for name in names if name in ARCHITECTURES]
    if not known:
        raise UserError(
            f"{path}: architecture {', '.join(names) or 'not named'}; supported are"
            f" {', '.join(ARCHITECTURES)}"
        )
    architecture = ARCHITECTURES[known[0]]
    if raw.get("model_type") != architecture.model_type:
        raise UserError(f"{path}: {architecture.name} with model_type {raw.get('model_type')!r}")
    quantised = (raw.get("quantization_config") or {}).get("quant_method")
    if quantised not in (None, "mxfp4"):
        raise UserError(
            f"{path}: quantised by {quantised}; only MXFP4 can be dequantised\nget the unquantised"
            " model"
        )
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False).to_dict()
    except Exception as error:  # transformers checks each key in its own way
        raise UserError(f"{path}: {str(error).strip().splitlines()[-1]}") from None
    return architecture, config


def vocabulary_of(folder: Path) -> dict[str, int] | None:
    """The tokens of ``folder``'s tokenizer.json and their ids; None if it has none.

    Raises:
        UserError: it is damaged.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the package raises plain Exception
        raise UserError(f"{path} is damaged: {error}") from None
