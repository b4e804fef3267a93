"""Prepared data sets: finds and checks them, by headers only and without numpy.

data/<name>/<name>_text_document.bin, .idx     the pair that Megatron-LM reads
data/<name>/tokenizer/                         the tokenizer that made the tokens
data/<name>/manifest.json                      the source of the text, and checksums
data/<name>/cache/                             upstream's index mappings
data/<name>/work/                              unfinished stages; may be deleted
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.data.definitions import definitions
from harness.data.header import FormatError, check_ends, idx_path, read_head
from harness.data.manifest import Manifest, read_manifest
from harness.data.names import DATA, MOCK, prefix_of
from harness.data.tokenizer_files import DESCRIPTION, SENTENCE_PIECE, tokenizer_sha256
from harness.errors import UserError, nearest
from harness.system.files import read_object

if TYPE_CHECKING:
    from harness.experiment.experiment import Experiment


@dataclass(frozen=True)
class DataSet:
    """A data set in Megatron's IndexedDataset format and the tokenizer that made it.

    Attributes:
        prefix: path of the ``.bin``/``.idx`` pair without its suffix.
        tokenizer_type: upstream's name (``--tokenizer-type``).
        tokenizer_model: a folder with tokenizer.json, or a SentencePiece model; None for a
            NullTokenizer.
        vocab_size: as upstream counts it.
        tokenizer_sha256: only data sets with the same one can be blended.
        fingerprint: changes with the pair's content.
        chat: whether documents are conversations, whose sequences alternate between prompts and
            answers (harness/finetune/).
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
    """Data sets to draw from, each with its weight as given; a single set has no weight."""

    sets: tuple[DataSet, ...]
    weights: tuple[str, ...] = ()

    @property
    def data_path(self) -> tuple[str, ...]:
        """The values of upstream's ``--data-path``."""
        if not self.weights:
            return (str(self.sets[0].prefix),)
        pairs = zip(self.weights, self.sets, strict=True)
        return tuple(word for weight, chosen in pairs for word in (weight, str(chosen.prefix)))

    @property
    def cache(self) -> Path:
        """Upstream's ``--data-cache-path``, of index mappings; changes with the sets' content."""
        contents = " ".join(chosen.fingerprint for chosen in self.sets)
        return self.sets[0].home / "cache" / hashlib.sha256(contents.encode()).hexdigest()[:16]


def prepared_names(folder: Path = DATA) -> tuple[str, ...]:
    """Names of the data sets in ``folder`` that have a .bin/.idx pair."""
    return tuple(
        sorted(
            p.parent.name
            for p in folder.glob("*/*_text_document.idx")
            if p.stem.startswith(p.parent.name)
        )
    )


def default_for(experiment: Experiment, folder: Path = DATA) -> str:
    """The data of an experiment without DATA=: the published set if it is prepared, else mock."""
    published = experiment.published_data
    return published if published in prepared_names(folder) else experiment.data


def find(name: str, folder: Path = DATA) -> DataSet:
    """The prepared data set ``name``, with headers, sizes and tokenizer checked.

    Raises:
        UserError: the set, its pair or its tokenizer is missing, damaged, or differs from the
            manifest.
    """
    home, prefix = folder / name, prefix_of(name, folder)
    if not home.is_dir() or not idx_path(prefix).exists():
        known = (*prepared_names(folder), MOCK)
        raise UserError(f"DATA={name} is not prepared; {_hint(name, known)}")
    manifest, again = read_manifest(home), remedy(name)
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


def remedy(name: str) -> str:
    """What to do about the damaged data set ``name``."""
    return f"make data-check NAME={name} says more; preparing it again with FORCE=1 replaces it"


def blend(data: str, folder: Path = DATA) -> Blend:
    """The data sets of ``DATA=data``: one name, or several with weights, ``a:0.7 b:0.3``.

    Raises:
        UserError: see ``find``; or a weight is missing or not above 0, or tokenizers differ.
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
            f'DATA="{data}" names no data set; {nearest("", (*prepared_names(folder), MOCK))}'
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
    """Whether the data sets of ``DATA=data`` are conversations.

    Raises:
        UserError: see ``blend``.
    """
    return data != MOCK and blend(data).sets[0].chat


def _hint(name: str, known: tuple[str, ...]) -> str:
    if name in definitions():
        return f"make data-{name} does that"
    meant = nearest(name, [*known, *(other for other in definitions() if other not in known)])
    return f"{meant}\nmake data-list lists all"


def _tokenizer(
    name: str, home: Path, manifest: Manifest | None, again: str
) -> tuple[str, Path | None, str, int]:
    """Type, model, checksum and vocabulary size of the data set's tokenizer.

    Its files must be those that made the tokens.
    """
    used = manifest.tokenizer if manifest else None
    kind = used.type if used else "HuggingFaceTokenizer"
    if kind == "NullTokenizer":
        return kind, None, used.sha256, used.vocab_size
    if kind == "SentencePieceTokenizer":
        model = needed = home / "tokenizer" / SENTENCE_PIECE
    else:
        model = home / "tokenizer"
        needed = model / DESCRIPTION
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
            f"DATA={name}: {needed} is damaged, or of an unknown kind\n{again}"
        ) from None


def _vocab_size(description: Path) -> int:
    """Tokens of a tokenizer.json with the added ones, as ``len`` of transformers' tokenizer."""
    content = read_object(description)
    vocabulary = content["model"]["vocab"]
    tokens = vocabulary if isinstance(vocabulary, dict) else (token for token, _ in vocabulary)
    return len({*tokens, *(added["content"] for added in content.get("added_tokens", ()))})
