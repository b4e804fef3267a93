"""Joins prepared data sets, such as shards of several machines: make data-merge NAME=… FROM=…"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from harness.data import indexed
from harness.data.data_sets import Blend, blend, prepared_names
from harness.data.header import FormatError
from harness.data.manifest import FILE as MANIFEST
from harness.data.manifest import Chat, Counted, Manifest, TextSource, read_manifest
from harness.data.names import DATA, check_name, prefix_of
from harness.data.publishing import new_part, publish, written
from harness.data.tokenizer import tokenizer_of
from harness.errors import UserError


def merge(names: Sequence[str], name: str, folder: Path = DATA) -> Manifest:
    """Join the data sets ``names``, in order, into ``name``; returns its manifest.

    Tokens are checked against the checksums in the manifests while they are copied.

    Raises:
        UserError: a set is missing, damaged, of another tokenizer or kind, or without a manifest;
            or ``name`` is in use.
    """
    home = folder / check_name(name)
    if name in prepared_names(folder) or (home / MANIFEST).exists():
        raise UserError(f"NAME={name} is prepared already; give another one")
    chosen, manifests = _chosen(names, folder)
    chat = _chat(manifests)
    try:
        with new_part(home, name, "merge") as part:
            return _merge(chosen, manifests, part, home, chat)
    except FormatError as error:
        raise UserError(f"{error}\nmake data-check NAME=… of each says more") from None
    except OSError as error:
        raise UserError(f"merging into {home}: {error.strerror}") from None


def _merge(
    chosen: Blend, manifests: Sequence[Manifest], part: Path, home: Path, chat: Chat | None
) -> Manifest:
    begun, prefix = time.monotonic(), prefix_of(home.name, part)
    pair = indexed.merge(
        [each.prefix for each in chosen.sets], prefix, [m.written.bin_sha256 for m in manifests]
    )
    index = indexed.check_pair(prefix)
    manifest = Manifest(
        name=home.name,
        recipe="",
        created=time.time(),
        source=TextSource(kind="merged", asked={"from": [each.name for each in chosen.sets]}),
        cleaned=None,
        counted=_sum(manifests),
        tokenizer=manifests[0].tokenizer,
        append_eod=all(each.append_eod for each in manifests),
        chat=chat,
        written=written(prefix, index.dtype.name, pair),
        seconds={"merge": round(time.monotonic() - begun, 3)},
        versions=manifests[0].versions,
    )
    publish(part, home, manifest, tokenizer_of(chosen.sets[0]))
    return manifest


def _chosen(names: Sequence[str], folder: Path) -> tuple[Blend, list[Manifest]]:
    """The data sets to join, with their manifests, after checking that they fit together."""
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


def _chat(manifests: Sequence[Manifest]) -> Chat | None:
    """The joined record of conversations; None for plain text. ``blend`` refuses a mixture."""
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
    skipped = sum((manifest.counted.skipped for manifest in manifests), Counter())
    return Counted(**totals, skipped=skipped)
