"""Checks before a run that the tokens of a data set are undamaged, in well under a second.

``data_sets`` checks headers and sizes, which a bit that flipped on the disk leaves as they were. A
token outside the vocabulary ends a run in the middle; a wrong one inside it is learned unnoticed.
"""

from __future__ import annotations

import functools
from pathlib import Path

from harness.data.data_sets import DataSet, blend, remedy
from harness.data.header import bin_path, idx_path, sha256
from harness.data.manifest import read_manifest
from harness.data.names import DATA, MOCK
from harness.errors import UserError

WHOLE_BYTES = 256 << 20
"""Files up to this size are compared with their checksum before every run; of a larger .bin, blocks
are checked against the vocabulary."""
BLOCKS, BLOCK_TOKENS = 512, 4096
"""Blocks of a larger .bin: 4 to 16 MiB in all, evenly spread, with both ends."""


def check_content(data: str, folder: Path = DATA) -> None:
    """Check the tokens of the data sets in ``DATA=data``.

    Raises:
        UserError: see ``blend``; or a file differs from its manifest, or an id is outside the
            vocabulary.
    """
    if data != MOCK:
        for chosen in blend(data, folder).sets:
            _check(chosen)


def _check(chosen: DataSet) -> None:
    manifest, again = read_manifest(chosen.home), remedy(chosen.name)
    sampled = manifest is None
    if manifest:
        idx, bin_ = idx_path(chosen.prefix), bin_path(chosen.prefix)
        expected = {idx: manifest.written.idx_sha256, bin_: manifest.written.bin_sha256}
        for path, digest in expected.items():
            stat = path.stat()
            if stat.st_size > WHOLE_BYTES:
                sampled |= path == bin_
            elif _sha256(path, stat.st_size, stat.st_mtime_ns) != digest:
                raise UserError(
                    f"DATA={chosen.name}: {path} is damaged: its checksum is not the manifest's\n"
                    + again
                )
    if sampled and (wrong := _outside(chosen)):
        token, found = wrong
        raise UserError(
            f"DATA={chosen.name}: {bin_path(chosen.prefix)} is damaged: token {token:,} is id"
            f" {found:,}, the vocabulary is 0 to {chosen.vocab_size - 1:,}\n{again}"
        )


def _outside(chosen: DataSet) -> tuple[int, int] | None:
    """Position and id of a token outside the vocabulary, in the blocks that are read."""
    import numpy as np

    from harness.data.header import read_head
    from harness.data.indexed import DTYPES

    dtype = DTYPES[read_head(idx_path(chosen.prefix)).code]
    last_start = max(0, chosen.tokens - BLOCK_TOKENS)
    starts = np.unique(np.linspace(0, last_start, BLOCKS).astype(np.int64)).tolist()
    with bin_path(chosen.prefix).open("rb") as file:
        for start in starts:
            file.seek(start * dtype.itemsize)
            block = file.read(BLOCK_TOKENS * dtype.itemsize)
            ids = np.frombuffer(block, dtype, len(block) // dtype.itemsize)
            wrong = np.flatnonzero((ids < 0) | (ids >= chosen.vocab_size))
            if len(wrong):
                return start + int(wrong[0]), int(ids[wrong[0]])
    return None


@functools.lru_cache(64)
def _sha256(path: Path, size: int, changed_ns: int) -> str:
    """The checksum of a file of this size and time of change: all runs of a chapter ask for it."""
    return sha256(path).hexdigest()
