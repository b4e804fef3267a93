"""The parts of README.md and docs/ that are generated from records: tables and single numbers, between two comments."""

from __future__ import annotations

import json
import re
from pathlib import Path

from harness import ROOT
from harness.catalog import load_catalog

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
VALUE = re.compile(r"(<!-- value: (\S+) (\S+) (\S+) -->).*?(<!-- /value -->)", re.DOTALL)
"""``<!-- value: RECORD KEY.KEY FORMAT -->…<!-- /value -->``: one number of a record."""
PART = re.compile(r"(<!-- records: make docs -->\n).*?(<!-- /records -->)", re.DOTALL)


def render(page: str, records: Path) -> str:
    """``page`` with its marked parts made anew from the records in ``records``."""
    from harness import results, tables

    found = results.collect(records / "none", records, results.load_references())
    table = tables.render(found.rows, "markdown", titles=load_catalog().chapters) if found.rows else "No records yet."
    table = table.replace(" (record)", "")  # here, every row is one
    page = VALUE.sub(lambda v: f"{v[1]}{format(_number(records, v[2], v[3]), v[4])}{v[5]}", page)
    return PART.sub(lambda part: f"{part[1]}\n{table.strip()}\n\n{part[2]}", page)


def _number(records: Path, name: str, keys: str) -> float:
    value = json.loads((records / f"{name}.json").read_text(encoding="utf-8"))
    for key in keys.split("."):
        value = value[key]
    return value


def write(records: Path) -> list[Path]:
    """Bring every page up to date and return those that changed."""
    changed = []
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        if (fresh := render(page, records)) != page:
            path.write_text(fresh, encoding="utf-8")
            changed.append(path)
    return changed
