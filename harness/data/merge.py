"""Prepared data sets joined into one, such as shards of several machines: make data-merge NAME=…
FROM="a b"."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from harness.data import indexed
from harness.data.data_sets import DATA, Blend, blend, check_name, prefix_of, prepared
from harness.data.header import FormatError, bin_path, idx_path
from harness.data.manifest import Chat, Counted, Manifest, Source, read_manifest
from harness.data.prepare import only_one, written
from harness.data.tokenizer import Tokenizer
from harness.errors import UserError

WORK = "work/merge"
"""Where in its folder a data set is joined; what an interrupted merge left there is replaced by the
next."""


def merge(names: Sequence[str], name: str, folder: Path = DATA) -> Manifest:
    """Join the data sets ``names``, in order, into ``name``, and return its manifest.

    The tokens are checked against the checksums of their manifests on the way, and the finished
    pair against its index.

    Raises:
        UserError: one is missing, damaged, of another tokenizer or kind, or without a manifest; or
            ``name`` is there, or its folder holds something else.
    """
    home = folder / check_name(name)
    if name in prepared(folder):
        raise UserError(f"NAME={name} is prepared already; give another one")
    chosen, manifests = _chosen(names, folder)
    if other := _others(home, name):
        raise UserError(
            f"{home} holds {', '.join(other)}, which a merge does not make\ngive another NAME="
        )
    chat = _chat(manifests)
    try:
        with only_one(home, name):
            return _merge(chosen, manifests, name, home, chat)
    except FormatError as error:
        raise UserError(f"{error}\nmake data-check NAME=… of each says more") from None
    except OSError as error:
        raise UserError(f"merging into {home}: {error.strerror}") from None


def _merge(
    chosen: Blend, manifests: Sequence[Manifest], name: str, home: Path, chat: Chat | None
) -> Manifest:
    work, begun, used = home / WORK, time.monotonic(), manifests[0].tokenizer
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        prefix = prefix_of(name, work)
        prefix.parent.mkdir()
        pair = indexed.merge(
            [each.prefix for each in chosen.sets], prefix, [m.written.bin_sha256 for m in manifests]
        )
        index = indexed.check_pair(prefix)
        manifest = Manifest(
            name=name,
            recipe="",
            created=time.time(),
            source=Source(kind="merged", asked={"from": [each.name for each in chosen.sets]}),
            cleaned=None,
            counted=_sum(manifests),
            tokenizer=used,
            append_eod=all(each.append_eod for each in manifests),
            chat=chat,
            written=written(prefix, index.dtype.name, pair),
            seconds={"merge": round(time.monotonic() - begun, 3)},
            versions=manifests[0].versions,
        )
        tokenizer = Tokenizer(
            used.type,
            used.name,
            chosen.sets[0].tokenizer_model,
            used.sha256,
            used.vocab_size,
            used.eod,
        )
        tokenizer.install(home / "tokenizer")
        final = prefix_of(name, home.parent)
        for path in (bin_path, idx_path):  # the index last: it makes the set a prepared one
            path(prefix).replace(path(final))
        manifest.write(home)
    finally:
        shutil.rmtree(home / Path(WORK).parts[0], ignore_errors=True)
        if not idx_path(prefix_of(name, home.parent)).exists():
            shutil.rmtree(home / "tokenizer", ignore_errors=True)
    return manifest


def _chosen(names: Sequence[str], folder: Path) -> tuple[Blend, list[Manifest]]:
    """The data sets to join, each once, of one tokenizer, kind and dtype, and their manifests."""
    if len(names) < 2:
        raise UserError('FROM= names the data sets to join, two or more, such as FROM="a b"')
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise UserError(f"FROM= names {', '.join(twice)} twice")
    if weighted := [name for name in names if ":" in name]:
        raise UserError(
            f"FROM= takes names without weights, not {weighted[0]}\n"
            'DATA="a:0.7 b:0.3" blends data sets without joining them'
        )
    blended = " ".join(f"{name}:1" for name in names)
    try:
        chosen = blend(blended, folder)
    except UserError as error:
        said = str(error).replace(f'DATA="{blended}"', f'FROM="{" ".join(names)}"')
        raise UserError(said.replace("DATA=", "FROM=")) from None
    manifests = []
    for each in chosen.sets:
        manifest = read_manifest(each.home)
        if manifest is None:
            raise UserError(
                f"{each.name} has no manifest, which says how it was made; prepare it again"
            )
        manifests.append(manifest)
    for each, manifest in zip(chosen.sets, manifests, strict=True):
        if manifest.written.dtype != manifests[0].written.dtype:
            raise UserError(
                f"{each.name} is stored as {manifest.written.dtype}, {chosen.sets[0].name} as"
                f" {manifests[0].written.dtype}\nprepare one of them again: a merge copies tokens"
                " as they are"
            )
    return chosen, manifests


def _others(home: Path, name: str) -> list[str]:
    """What lies in a folder that a merge into it would not make or replace."""
    there = sorted(path.name for path in home.iterdir()) if home.is_dir() else []
    work = (
        sorted(path.name for path in (home / "work").iterdir()) if (home / "work").is_dir() else []
    )
    mine = (".lock", "work", "tokenizer", bin_path(prefix_of(name, home.parent)).name)
    return [entry for entry in there if entry not in mine] + [
        f"work/{entry}" for entry in work if entry != "merge"
    ]


def _chat(manifests: Sequence[Manifest]) -> Chat | None:
    """What makes the joined set one of conversations; ``blend`` has seen that all or none are."""
    chats = [manifest.chat for manifest in manifests if manifest.chat]
    if not chats:
        return None
    if len({chat.template_sha256 for chat in chats}) > 1:
        raise UserError(
            "these conversations were made with different templates; prepare them again with one"
            " tokenizer"
        )
    return chats[0].model_copy(update={"answer_tokens": sum(chat.answer_tokens for chat in chats)})


def _sum(manifests: Sequence[Manifest]) -> Counted:
    names = ("records", "documents", "empty", "sequences", "tokens")
    totals = {
        name: sum(getattr(manifest.counted, name) for manifest in manifests) for name in names
    }
    skipped = sum((Counter(manifest.counted.skipped) for manifest in manifests), Counter())
    return Counted(**totals, skipped=dict(skipped))
