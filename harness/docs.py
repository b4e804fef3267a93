"""The parts of README.md and docs/ that are generated: tables from records, between two comments of a page."""

from __future__ import annotations

import re
from pathlib import Path

from harness.catalog import ROOT, load_catalog

PAGES = (ROOT / "README.md",)
PART = re.compile(r"(<!-- records: make docs -->\n).*?(<!-- /records -->)", re.DOTALL)


def render(page: str, records: Path) -> str:
    """``page`` with the table of the records in ``records`` in its marked part."""
    from harness import results, tables

    found = results.collect(records / "none", records, results.load_references())
    table = tables.render(found.rows, "markdown", titles=load_catalog().chapters) if found.rows else "No records yet."
    table = table.replace(" (record)", "")  # here, every row is one
    return PART.sub(lambda part: f"{part[1]}\n{table.strip()}\n\n{part[2]}", page)


def write(records: Path) -> list[Path]:
    """Bring every page up to date and return those that changed."""
    changed = []
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        if (fresh := render(page, records)) != page:
            path.write_text(fresh, encoding="utf-8")
            changed.append(path)
    return changed
