"""Prepared data sets joined into one, such as shards of several machines: make data-merge NAME=… FROM="a b"."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from harness.data import indexed
from harness.data.header import FormatError
from harness.data.manifest import Counted, Manifest, Source, read_manifest
from harness.data.prepare import written
from harness.data.prepared import DATA, Blend, blend, check_name, prefix_of, prepared
from harness.data.tokenizer import Tokenizer
from harness.errors import UserError


def merge(names: Sequence[str], name: str, folder: Path = DATA) -> Manifest:
    """Join the data sets ``names``, in order, into ``name``, and return its manifest.

    Raises:
        UserError: one is missing, damaged, of another tokenizer or without a manifest; or ``name`` is there.
    """
    home, prefix = folder / check_name(name), prefix_of(name, folder)
    if name in prepared(folder):
        raise UserError(f"NAME={name} is prepared already; give another one")
    if len(names) < 2:
        raise UserError('FROM= names the data sets to join, such as FROM="a b"')
    chosen = blend(" ".join(f"{each}:1" for each in names), folder)
    manifests = _manifests(chosen)
    used, begun = manifests[0].tokenizer, time.monotonic()
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    tokenizer = Tokenizer(used.type, used.name, chosen.sets[0].tokenizer_model, used.sha256, used.vocab_size, used.eod)
    tokenizer.install(home / "tokenizer")
    try:
        pair = indexed.merge([each.prefix for each in chosen.sets], prefix)
    except FormatError as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(f"merging into {home}: {error.strerror}") from None
    manifest = Manifest(
        name=name,
        recipe="",
        created=time.time(),
        source=Source(kind="merged", asked={"from": list(names)}),
        cleaned=None,
        counted=_sum(manifests),
        tokenizer=used,
        append_eod=all(each.append_eod for each in manifests),
        written=written(prefix, manifests[0].written.dtype, pair),
        seconds={"merge": round(time.monotonic() - begun, 3)},
        versions=manifests[0].versions,
    )
    manifest.write(home)
    return manifest


def _manifests(chosen: Blend) -> list[Manifest]:
    found = []
    for each in chosen.sets:
        manifest = read_manifest(each.home)
        if manifest is None:
            raise UserError(f"{each.name} has no manifest, which says how it was made; prepare it again")
        found.append(manifest)
    return found


def _sum(manifests: Sequence[Manifest]) -> Counted:
    names = ("records", "documents", "empty", "sequences", "tokens")
    totals = {name: sum(getattr(manifest.counted, name) for manifest in manifests) for name in names}
    skipped = sum((Counter(manifest.counted.skipped) for manifest in manifests), Counter())
    return Counted(**totals, skipped=dict(skipped))
