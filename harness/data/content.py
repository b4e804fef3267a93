"""Whether the tokens of a data set are those that were prepared: looked at before a run, in well
under a second.

Headers and sizes are ``prepared``'s to check; a bit that flipped on the disk changes neither. A
token beyond the vocabulary ends a run somewhere in the middle, and one within it is learned without
a word.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from harness.data.data_sets import DATA, MOCK, DataSet, blend
from harness.data.header import bin_path, idx_path
from harness.data.manifest import read_manifest
from harness.errors import UserError

WHOLE_BYTES = 256 << 20
"""A file of so many bytes is compared with its checksum before every run; of a larger one, blocks
are looked at."""
BLOCKS, BLOCK_TOKENS = 512, 4096
"""So much of a larger .bin: 4 to 16 MiB, evenly spread, both ends included."""


def check_content(data: str, folder: Path = DATA) -> None:
    """Check the tokens of what ``DATA=data`` names.

    Raises:
        UserError: see ``blend``; or a file is not what its manifest says, or an id is outside the
        vocabulary.
    """
    if data != MOCK:
        for chosen in blend(data, folder).sets:
            _check(chosen)


def _check(chosen: DataSet) -> None:
    again = (
        f"make data-check NAME={chosen.name} says more; "
        "preparing it again with FORCE=1 writes it anew"
    )
    manifest = read_manifest(chosen.home)
    sampled = manifest is None
    if manifest:
        written = manifest.written
        for path, expected in (
            (idx_path(chosen.prefix), written.idx_sha256),
            (bin_path(chosen.prefix), written.bin_sha256),
        ):
            stat = path.stat()
            if stat.st_size > WHOLE_BYTES:
                sampled |= path.suffix == ".bin"
            elif _sha256(path, stat.st_size, stat.st_mtime_ns) != expected:
                raise UserError(
                    f"DATA={chosen.name}: {path} is damaged: its checksum is not what was"
                    f" prepared\n{again}"
                )
    if sampled and (wrong := _outside(chosen)):
        token, found = wrong
        raise UserError(
            f"DATA={chosen.name}: {bin_path(chosen.prefix)} is damaged: token {token:,} is id"
            f" {found:,}, the vocabulary is 0 to {chosen.vocab_size - 1:,}\n{again}"
        )


def _outside(chosen: DataSet) -> tuple[int, int] | None:
    """Place and id of a token that is outside the vocabulary, among those that are looked at."""
    import numpy as np

    from harness.data.header import read_head
    from harness.data.indexed import DTYPES

    dtype = DTYPES[read_head(idx_path(chosen.prefix)).code]
    starts = np.unique(
        np.linspace(0, max(0, chosen.tokens - BLOCK_TOKENS), BLOCKS).astype(np.int64)
    ).tolist()
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
    """The checksum of a file of this size, changed then; a chapter asks for each of its runs."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
