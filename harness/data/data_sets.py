"""Prepared data sets: what lies in data/<name>/ and is ready to train on. Reads headers only; needs
no numpy.

data/<name>/<name>_text_document.bin, .idx     what Megatron-LM reads
data/<name>/tokenizer/                         the tokenizer that made it
data/<name>/manifest.json                      where it came from
data/<name>/cache/                             upstream's index mappings
data/<name>/work/                              text on its way; may be deleted
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness import ROOT
from harness.data.header import FormatError, check_ends, idx_path, read_head
from harness.data.manifest import Manifest, read_manifest
from harness.data.tokenizer_files import DESCRIPTION, SENTENCE_PIECE, tokenizer_sha256
from harness.errors import UserError, nearest
from harness.system.files import read_object

if TYPE_CHECKING:
    from harness.experiment.experiment import Experiment

DATA = ROOT / "data"
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,79}")
MOCK = "mock"


@dataclass(frozen=True)
class DataSet:
    """A data set in Megatron's IndexedDataset format and the tokenizer that made it.

    Attributes:
        prefix: path of the ``.bin``/``.idx`` pair without its ending.
        tokenizer_type: upstream's name of its kind.
        tokenizer_model: a folder with tokenizer.json, or a SentencePiece model; none for a
        NullTokenizer.
        vocab_size: as upstream counts it.
        tokenizer_sha256: two data sets with the same one can be blended.
        fingerprint: changes with the pair's content.
        chat: whether documents are conversations: text to read and text to answer, in turn
        (harness/finetune/).
    """

    name: str
    prefix: Path
    tokenizer_type: str
    tokenizer_model: Path | None
    vocab_size: int
    tokenizer_sha256: str
    documents: int
    sequences: int
    tokens: int
    fingerprint: str
    chat: bool = False

    @property
    def home(self) -> Path:
        return self.prefix.parent


@dataclass(frozen=True)
class Blend:
    """Data sets to draw from, each with its weight as it was typed; a single one has none."""

    sets: tuple[DataSet, ...]
    weights: tuple[str, ...] = ()

    @property
    def data_path(self) -> tuple[str, ...]:
        """The words of upstream's ``--data-path``."""
        if not self.weights:
            return (str(self.sets[0].prefix),)
        pairs = zip(self.weights, self.sets, strict=True)
        return tuple(word for weight, chosen in pairs for word in (weight, str(chosen.prefix)))

    @property
    def cache(self) -> Path:
        """Upstream's ``--data-cache-path``, where index mappings are kept; another folder once a
        set has changed."""
        contents = " ".join(chosen.fingerprint for chosen in self.sets)
        return self.sets[0].home / "cache" / hashlib.sha256(contents.encode()).hexdigest()[:16]


def prefix_of(name: str, folder: Path = DATA) -> Path:
    """Path of the pair of data set ``name``, without its ending."""
    return folder / name / f"{name}_text_document"


def prepared(folder: Path = DATA) -> tuple[str, ...]:
    """Names of the data sets in ``folder`` whose .bin/.idx pair is there."""
    return tuple(
        sorted(
            p.parent.name
            for p in folder.glob("*/*_text_document.idx")
            if p.stem.startswith(p.parent.name)
        )
    )


def default_for(experiment: Experiment, folder: Path = DATA) -> str:
    """The data an experiment runs on unless DATA= says else: the published set where it is
    prepared, mock otherwise."""
    published = experiment.published_data
    return published if published in prepared(folder) else experiment.data


def find(name: str, folder: Path = DATA) -> DataSet:
    """The prepared data set ``name``, its headers, sizes and tokenizer checked.

    Raises:
        UserError: it, its pair of files or its tokenizer is missing, damaged, or not what its
        manifest says.
    """
    home, prefix = folder / name, prefix_of(name, folder)
    if not home.is_dir() or not idx_path(prefix).exists():
        known = (*prepared(folder), MOCK)
        raise UserError(f"DATA={name} is not prepared; {_hint(name, known)}")
    again = f"make data-check NAME={name} says more; preparing it again with FORCE=1 writes it anew"
    manifest = read_manifest(home)
    try:
        tokens = check_ends(prefix)
        head = read_head(idx_path(prefix))
    except FormatError as error:
        raise UserError(f"DATA={name}: {error}\n{again}") from None
    kind, model, digest, vocab_size = _tokenizer(name, home, manifest, again)
    if manifest is None:
        fingerprint = f"{idx_path(prefix).stat().st_size} {idx_path(prefix).stat().st_mtime_ns}"
    else:
        fingerprint = manifest.written.idx_sha256 + manifest.written.bin_sha256
        if (tokens, head.documents) != (manifest.counted.tokens, manifest.counted.documents):
            raise UserError(
                f"DATA={name}: the pair has {tokens:,} tokens in {head.documents:,} documents, its"
                f" manifest says {manifest.counted.tokens:,} in"
                f" {manifest.counted.documents:,}\n{again}"
            )
    chat = manifest is not None and manifest.chat is not None
    return DataSet(
        name,
        prefix,
        kind,
        model,
        vocab_size,
        digest,
        head.documents,
        head.sequences,
        tokens,
        fingerprint,
        chat,
    )


def blend(data: str, folder: Path = DATA) -> Blend:
    """What ``DATA=data`` names: ``a``, or several with their weights, ``a:0.7 b:0.3``.

    Raises:
        UserError: see ``find``; or a weight is missing or no number above 0, or tokenizers differ.
    """
    words = data.replace(",", " ").split()
    if len(words) == 1 and ":" not in words[0]:
        return Blend((find(words[0], folder),))
    names, weights = [], []
    for word in words:
        name, _, weight = word.partition(":")
        try:
            right = 0 < float(weight) < float("inf")
        except ValueError:
            right = False
        if not right:
            raise UserError(
                f'DATA="{data}": give each data set a weight above 0, such as "a:0.7 b:0.3"'
            )
        if name == MOCK:
            raise UserError(f'DATA="{data}": mock data cannot be blended')
        names.append(name)
        weights.append(weight)
    if not names:
        raise UserError(
            f'DATA="{data}" names no data set; {nearest("", (*prepared(folder), MOCK))}'
        )
    sets = tuple(find(name, folder) for name in names)
    for other in sets[1:]:
        if other.tokenizer_sha256 != sets[0].tokenizer_sha256:
            raise UserError(
                f'DATA="{data}": {sets[0].name} and {other.name} were made by different'
                " tokenizers\n"
                f"prepare {other.name} again with TOKENIZER={sets[0].home / 'tokenizer'}"
            )
    if len({chosen.chat for chosen in sets}) > 1:
        raise UserError(
            f'DATA="{data}": conversations (make data-chat) and plain text cannot be blended'
        )
    return Blend(sets, tuple(weights))


def is_chat(data: str) -> bool:
    """Whether ``DATA=data`` names conversations. Raises UserError as ``blend``."""
    return data != MOCK and blend(data).sets[0].chat


def check_name(name: str) -> str:
    """``name`` where it can name a data set. Raises UserError otherwise."""
    if not NAME.fullmatch(name) or name == MOCK:
        raise UserError(
            f"NAME={name}: use lower-case letters, digits and . _ - (not {MOCK}), a letter or digit"
            " first"
        )
    return name


def _hint(name: str, known: tuple[str, ...]) -> str:
    from harness.data.sources import definitions

    if name in definitions():
        return f"make data-{name} does that"
    meant = nearest(name, [*known, *(other for other in definitions() if other not in known)])
    return f"{meant}\nmake data-list says what is there"


def _tokenizer(
    name: str, home: Path, manifest: Manifest | None, again: str
) -> tuple[str, Path | None, str, int]:
    """Type, model, fingerprint and size of the data set's tokenizer; its files are as they were
    when it was used."""
    used = manifest.tokenizer if manifest else None
    kind = used.type if used else "HuggingFaceTokenizer"
    if kind == "NullTokenizer":
        return kind, None, used.sha256, used.vocab_size
    model = (
        home / "tokenizer" / SENTENCE_PIECE
        if kind == "SentencePieceTokenizer"
        else home / "tokenizer"
    )
    needed = model if kind == "SentencePieceTokenizer" else model / DESCRIPTION
    if not needed.is_file():
        raise UserError(f"DATA={name}: {needed} is missing\n{again}")
    digest = tokenizer_sha256(kind, model)
    if used and digest != used.sha256:
        raise UserError(
            f"DATA={name}: the tokenizer in {home / 'tokenizer'} changed since it made the"
            f" tokens\n{again}"
        )
    try:
        return kind, model, digest, used.vocab_size if used else _vocab_size(needed)
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"DATA={name}: {needed} is damaged, or of a kind that is not known\n{again}"
        ) from None


def _vocab_size(description: Path) -> int:
    """The tokens of a tokenizer.json, added ones included, as upstream counts them: ``len`` of
    transformers' tokenizer."""
    content = read_object(description)
    vocabulary = content["model"]["vocab"]
    tokens = vocabulary if isinstance(vocabulary, dict) else (token for token, _ in vocabulary)
    return len({*tokens, *(added["content"] for added in content.get("added_tokens", ()))})
