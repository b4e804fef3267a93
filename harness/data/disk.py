"""What to tell when a stage that can be resumed cannot write its files."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from harness.errors import UserError


@contextmanager
def resumable(doing: str) -> Iterator[None]:
    """Turn an OSError into a UserError with the way out; ``doing`` names the work and its place."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what, way_out = "the disk is full", "make room"
        else:
            what, way_out = error.strerror or str(error), "correct that"
        raise UserError(
            f"{doing}: {what}\n{way_out} and start again: it resumes where it stopped"
        ) from None
