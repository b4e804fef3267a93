"""Fingerprint of a data set, by which a resumed run and other nodes know that they have the same.

It has sizes, tokenizer, the checksums in its manifest, and checksums of both ends of its files.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from harness.data import data_sets
from harness.data.data_sets import DataSet
from harness.data.manifest import read_manifest

ENDS_BYTES = 1 << 20
"""Bytes read at each end of a file: they reveal a change that left the manifest as it was."""


def of(data: str) -> dict[str, dict[str, Any]]:
    """The fingerprint of each data set of ``DATA=data``, by name; empty for mock data.

    Raises:
        UserError: one is not prepared, or damaged.
    """
    if data == data_sets.MOCK:
        return {}
    return {chosen.name: _fingerprint(chosen) for chosen in data_sets.blend(data).sets}


def _fingerprint(chosen: DataSet) -> dict[str, Any]:
    manifest = read_manifest(chosen.home)
    written = manifest and {
        "bin sha256": manifest.written.bin_sha256[:16],
        "idx sha256": manifest.written.idx_sha256[:16],
    }
    files = {end: Path(f"{chosen.prefix}.{end}") for end in ("bin", "idx")}
    return {
        "tokens": chosen.tokens,
        "documents": chosen.documents,
        "tokenizer": chosen.tokenizer_sha256[:16],
        **(written or {}),
        **{f"{end} bytes": path.stat().st_size for end, path in files.items()},
        **{f"{end} ends": _ends(path) for end, path in files.items()},
    }


def _ends(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(ENDS_BYTES))
        file.seek(max(path.stat().st_size - ENDS_BYTES, 0))
        digest.update(file.read(ENDS_BYTES))
    return digest.hexdigest()[:16]
