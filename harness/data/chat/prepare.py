"""``make data-chat NAME=… INPUT=chat.jsonl``: conversations -> a data set of tokens, answers apart
from what they answer.

The ``.bin``/``.idx`` pair is upstream's; a document is a conversation, its sequences are text to
read and text to answer in turn, so that it needs no file of masks. Spans are tokenised one by one:
an answer gets the tokens that a model which is asked its question produces, whatever a tokenizer
would merge across the border.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from harness import ROOT
from harness.data import indexed
from harness.data.chat import conversations
from harness.data.chat.conversations import Skipped, Unfit
from harness.data.data_sets import DATA, check_name, prefix_of, prepared
from harness.data.manifest import Chat, Counted, Manifest, Source, SourceFile
from harness.data.prepare import check_free, discard, only_one, publish, tokenizer_used, written
from harness.data.sources import Definition
from harness.data.tokenizer import Tokenizer, find_tokenizer
from harness.errors import UserError
from harness.machine.provenance import package_version, source_commit

_BATCH = 256
_VERSIONS = ("numpy", "tokenizers", "transformers")


def prepare_chat(
    name: str, source: Path, tokenizer: str, *, folder: Path = DATA, force: bool = False
) -> tuple[Manifest, Skipped]:
    """Make the data set ``name`` of the conversations in ``source``, whole or not at all.

    Args:
        tokenizer: see ``harness.data.tokenizer.find_tokenizer``; ``bytes`` is made here.
        force: replace a data set of that name.

    Returns:
        Its manifest, and the lines that were no conversations.

    Raises:
        UserError: the name is taken, the input or the tokenizer cannot be had, or no line is a
        conversation.
    """
    home = folder / check_name(name)
    if not force:
        check_free(name, folder)
    vocabularies = folder / "tokenizers"
    used = find_tokenizer(tokenizer, vocabularies, choices=("bytes", "gpt2"))
    if used.kind != "HuggingFaceTokenizer":
        raise UserError(
            f"TOKENIZER={tokenizer}: conversations need bytes, gpt2, a folder with tokenizer.json,"
            " or Llama 3's tokenizer.model"
        )
    with only_one(home, name):
        part = home / "work" / "chat"
        shutil.rmtree(part, ignore_errors=True)
        (part / name).mkdir(parents=True)
        begun = time.monotonic()
        try:
            installed = used.install(part / "tokenizer")
            own = conversations.has_template(installed.model)
            if not own:
                template = conversations.simple_template(used.end or "")
                (installed.model / "chat_template.jinja").write_text(template, encoding="utf-8")
            skipped = Skipped()
            counted, answers, pair = _write(source, installed, prefix_of(name, part), skipped)
            manifest = _manifest(
                name,
                source,
                used,
                own,
                installed.model,
                counted,
                answers,
                pair,
                prefix_of(name, part),
                time.monotonic() - begun,
            )
            publish(part, home, manifest)
        finally:
            discard(part)
    return manifest, skipped


def _write(
    source: Path, tokenizer: Tokenizer, prefix: Path, skipped: Skipped
) -> tuple[Counted, int, indexed.Pair]:
    """Write the pair; what it holds, and how many of its tokens are answers'."""
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_file(str(tokenizer.model / "tokenizer.json"))
    writer = indexed.Writer(prefix, indexed.best_dtype(tokenizer.vocab_size))
    records = documents = answers = 0
    try:
        for batch in _batches(_conversations(source, tokenizer.model, skipped)):
            encoded = iter(
                backend.encode_batch(
                    [text for texts in batch for text in texts], add_special_tokens=False
                )
            )
            for texts in batch:
                ids = [np.asarray(next(encoded).ids, np.int64) for _ in texts]
                writer.append(
                    np.concatenate(ids),
                    np.asarray([len(part) for part in ids]),
                    np.asarray([len(ids)]),
                )
                answers += sum(len(part) for part in ids[1::2])
                documents += 1
        records = documents + skipped.by_rule.total()
        if not documents:
            raise UserError(
                "\n".join(
                    [
                        f"INPUT={source}: no conversation in {records:,} {skipped.unit}s",
                        *skipped.lines(),
                    ]
                )
            )
        pair = writer.finish()
    finally:
        writer.close()
    marks = pair.marks
    counted = Counted(
        records=records,
        documents=documents,
        empty=0,
        sequences=marks.sequences,
        tokens=marks.tokens,
        skipped=dict(skipped.by_rule),
    )
    return counted, answers, pair


def _conversations(source: Path, tokenizer: Path, skipped: Skipped) -> Iterator[list[str]]:
    render = conversations.template_of(tokenizer)
    for number, found in conversations.conversations_of(source, skipped):
        try:
            yield conversations.spans(conversations.read_messages(found), render)
        except Unfit as error:
            skipped.add(error.rule, number)


def _batches(texts: Iterator[list[str]]) -> Iterator[list[list[str]]]:
    batch: list[list[str]] = []
    for each in texts:
        batch.append(each)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _manifest(
    name: str,
    source: Path,
    tokenizer: Tokenizer,
    own: bool,
    installed: Path,
    counted: Counted,
    answers: int,
    pair: indexed.Pair,
    prefix: Path,
    seconds: float,
) -> Manifest:
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    template = _template_sha256(installed)
    recipe = json.dumps(["chat", digest, tokenizer.sha256, template])
    return Manifest(
        name=name,
        recipe=hashlib.sha256(recipe.encode()).hexdigest()[:16],
        created=time.time(),
        source=Source(
            kind="files",
            asked={"input": source.name},
            files=(SourceFile(name=source.name, bytes=source.stat().st_size, sha256=digest),),
        ),
        cleaned=None,
        counted=counted,
        tokenizer=tokenizer_used(tokenizer, f"tokenizers {package_version('tokenizers')}"),
        append_eod=False,
        chat=Chat(
            template="own" if own else "simple", template_sha256=template, answer_tokens=answers
        ),
        written=written(prefix, indexed.best_dtype(tokenizer.vocab_size).name, pair),
        seconds={"chat": round(seconds, 3)},
        versions={"harness": source_commit(ROOT)[0]}
        | {package: package_version(package) for package in _VERSIONS},
    )


def _template_sha256(tokenizer: Path) -> str:
    found = [
        tokenizer / name
        for name in ("chat_template.jinja", "tokenizer_config.json")
        if (tokenizer / name).is_file()
    ]
    return hashlib.sha256(b"\n".join(path.read_bytes() for path in found)).hexdigest()


def prepare_known(known: Definition, settings: Mapping[str, str] = MappingProxyType({})) -> int:
    """Prepare conversations of data/datasets.yaml and say what they are; what is prepared stays,
    unless FORCE=1.

    Args:
        settings: TOKENIZER, NAME and FORCE.

    Raises:
        UserError: see ``prepare_chat``; or another setting is given.
    """
    if unused := sorted({*settings} - {"TOKENIZER", "NAME", "FORCE"}):
        raise UserError(
            f"{', '.join(unused)}: conversations of {known.name} have no such setting\n"
            f"make data-{known.name} takes TOKENIZER=, NAME= and FORCE=1"
        )
    name, force = settings.get("NAME", known.name), settings.get("FORCE") == "1"
    if name == known.name and name in prepared() and not force and "TOKENIZER" not in settings:
        print(f"{known.name} is prepared already; FORCE=1 prepares it again")
        return 0
    tell(
        *prepare_chat(
            name, DATA / known.chat, settings.get("TOKENIZER", known.tokenizer), force=force
        )
    )
    return 0


def tell(manifest: Manifest, skipped: Skipped) -> None:
    """Print what was prepared, and what was skipped."""
    share = manifest.chat.answer_tokens / manifest.counted.tokens
    print(
        f"{manifest.name}: {manifest.counted.documents:,} conversations,"
        f" {manifest.counted.tokens:,} tokens, {share:.0%} of them to be learned"
    )
    template = "the tokenizer's own" if manifest.chat.template == "own" else "User: …, Assistant: …"
    print(
        f"  chat template: {template}; tokenizer {manifest.tokenizer.name} by"
        f" {manifest.tokenizer.by}"
    )
    for line in skipped.lines():
        print(f"  {line}")
