"""``make targets``."""

from __future__ import annotations

from harness import ROOT
from harness.experiment.catalog import load_catalog
from harness.make import targets


def write_targets() -> int:
    """Bring the generated rules up to date with the catalogue."""
    changed = targets.write(load_catalog())
    print(f"{targets.FILE.relative_to(ROOT)} {'written' if changed else 'is up to date'}")
    return 0
