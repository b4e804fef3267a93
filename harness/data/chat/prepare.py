"""Prepares conversations as a data set: ``make data-chat NAME=… INPUT=chat.jsonl``.

A document of the ``.bin``/``.idx`` pair is a conversation. Its sequences alternate between prompts
and answers, so that no file of loss masks is needed. Each span is tokenised alone: an answer gets
the tokens that a model produces after the prompt, where a tokenizer given both could merge across
the border.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from itertools import batched
from pathlib import Path
from types import MappingProxyType

import numpy as np

from harness import ROOT
from harness.data import indexed
from harness.data.chat import conversations
from harness.data.chat.conversations import Skipped, Unfit
from harness.data.data_sets import prepared_names
from harness.data.definitions import Definition
from harness.data.manifest import Chat, Counted, Manifest, SourceFile, TextSource
from harness.data.names import DATA, check_name, prefix_of
from harness.data.publishing import check_free, new_part, publish, tokenizer_used, written
from harness.data.tokenizer import Tokenizer, find_tokenizer
from harness.errors import UserError
from harness.machine.provenance import package_version, source_commit

_BATCH = 256
_VERSIONS = ("numpy", "tokenizers", "transformers")


def prepare_chat(
    name: str, source: Path, tokenizer: str, *, folder: Path = DATA, force: bool = False
) -> tuple[Manifest, Skipped]:
    """Prepare the data set ``name`` from the conversations in ``source``, completely or not at all.

    Args:
        tokenizer: see ``harness.data.tokenizer.find_tokenizer``.
        force: replace a data set of this name.

    Returns:
        The manifest, and the lines that hold no usable conversation.

    Raises:
        UserError: the name is in use, the input or the tokenizer is missing, or no line holds a
            conversation.
    """
    home = folder / check_name(name)
    if not force:
        check_free(name, folder)
    used = find_tokenizer(tokenizer, folder / "tokenizers")
    if used.kind != "HuggingFaceTokenizer":
        raise UserError(
            f"TOKENIZER={tokenizer}: conversations need bytes, gpt2, a folder with tokenizer.json,"
            " or Llama 3's tokenizer.model"
        )
    with new_part(home, name, "chat") as part:
        installed = used.install(part / "tokenizer")
        skipped = Skipped()
        manifest = _prepare(name, source, installed, part, skipped)
        publish(part, home, manifest, installed)
    return manifest, skipped


def _prepare(
    name: str, source: Path, tokenizer: Tokenizer, part: Path, skipped: Skipped
) -> Manifest:
    """Write the pair into ``part``, where ``tokenizer`` is installed; returns its manifest."""
    begun = time.monotonic()
    own = conversations.has_template(tokenizer.model)
    if not own:
        simple = conversations.simple_template(tokenizer.end or "")
        (tokenizer.model / "chat_template.jinja").write_text(simple, encoding="utf-8")
    prefix, dtype = prefix_of(name, part), indexed.best_dtype(tokenizer.vocab_size)
    writer = indexed.PairWriter(prefix, dtype)
    try:
        answer_tokens = _write(_conversations(source, tokenizer.model, skipped), tokenizer, writer)
        marks = writer.marks
        records = marks.documents + skipped.by_rule.total()
        if not marks.documents:
            nothing = f"INPUT={source}: no conversation in {records:,} {skipped.unit}s"
            raise UserError("\n".join([nothing, *skipped.lines()]))
        pair = writer.finish()
    finally:
        writer.close()
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    template = _template_sha256(tokenizer.model)
    recipe = json.dumps(["chat", digest, tokenizer.sha256, template])
    return Manifest(
        name=name,
        recipe=hashlib.sha256(recipe.encode()).hexdigest()[:16],
        created=time.time(),
        source=TextSource(
            kind="files",
            asked={"input": source.name},
            files=(SourceFile(name=source.name, bytes=source.stat().st_size, sha256=digest),),
        ),
        cleaned=None,
        counted=Counted(
            records=records,
            documents=marks.documents,
            empty=0,
            sequences=marks.sequences,
            tokens=marks.tokens,
            skipped=skipped.by_rule,
        ),
        tokenizer=tokenizer_used(tokenizer, f"tokenizers {package_version('tokenizers')}"),
        append_eod=False,
        chat=Chat(
            template="own" if own else "simple",
            template_sha256=template,
            answer_tokens=answer_tokens,
        ),
        written=written(prefix, dtype.name, pair),
        seconds={"chat": round(time.monotonic() - begun, 3)},
        versions={"harness": source_commit(ROOT)[0]}
        | {package: package_version(package) for package in _VERSIONS},
    )


def _write(texts: Iterator[list[str]], tokenizer: Tokenizer, writer: indexed.PairWriter) -> int:
    """Tokenise and append conversations; returns how many of their tokens belong to answers."""
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_file(str(tokenizer.model / "tokenizer.json"))
    answer_tokens = 0
    for batch in batched(texts, _BATCH):
        spans = [span for conversation in batch for span in conversation]
        encoded = iter(backend.encode_batch(spans, add_special_tokens=False))
        for conversation in batch:
            ids = [np.asarray(next(encoded).ids, np.int64) for _ in conversation]
            lengths = np.asarray([len(span) for span in ids])
            writer.append(np.concatenate(ids), lengths, np.asarray([len(ids)]))
            answer_tokens += int(lengths[1::2].sum())
    return answer_tokens


def _conversations(source: Path, tokenizer: Path, skipped: Skipped) -> Iterator[list[str]]:
    render = conversations.template_of(tokenizer)
    for number, found in conversations.conversations_of(source, skipped):
        try:
            yield conversations.spans(conversations.read_messages(found), render)
        except Unfit as error:
            skipped.add(error.rule, number)


def _template_sha256(tokenizer: Path) -> str:
    found = [
        tokenizer / name
        for name in ("chat_template.jinja", "tokenizer_config.json")
        if (tokenizer / name).is_file()
    ]
    return hashlib.sha256(b"\n".join(path.read_bytes() for path in found)).hexdigest()


def prepare_known(known: Definition, settings: Mapping[str, str] = MappingProxyType({})) -> int:
    """Prepare conversations of data/datasets.yaml, unless they are, and print what they hold.

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
    if (
        name == known.name
        and name in prepared_names()
        and not force
        and "TOKENIZER" not in settings
    ):
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
