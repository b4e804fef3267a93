"""The page itself: a template, a style sheet and scripts of this folder, with the data inside. It
loads nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from harness.evidence import results, verdicts
from harness.evidence.claims import evaluate, load_claims
from harness.evidence.claims import sources as all_sources
from harness.evidence.references import References, load_references
from harness.evidence.rows import Row
from harness.experiment.catalog import Catalog, load_catalog
from harness.pages.figures import load_profiles
from harness.pages.report.data import page_values
from harness.system.files import told_if_unwritable, write_text

FOLDER = Path(__file__).parent
SCRIPTS = ("dom.js", "charts.js", "table.js", "compare.js", "sections.js", "main.js")


def write(outdir: Path, records: Path, path: Path) -> tuple[str, ...]:
    """Write the report of ``outdir`` and ``records`` to ``path`` and return warnings of what could
    not be read.

    Raises:
        UserError: ``path`` cannot be written, or the catalogue, the references or plots.yaml are
        wrong.
    """
    references, catalog = load_references(), load_catalog()
    found = results.collect(outdir, records, references)
    data = page_values(found, references, catalog, load_profiles(outdir, records))
    page = render(data | {"claims": claims(found.records, references, catalog)})
    with told_if_unwritable(path.parent, "REPORT"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, page)
    return found.warnings


def is_report(path: Path) -> bool:
    """Whether the file ``path`` is a report that ``write`` wrote."""
    title = re.search(r"<title>.*</title>", (FOLDER / "page.html").read_text(encoding="utf-8"))[0]
    with path.open("rb") as file:
        return title.encode() in file.read(4096)


def claims(
    records: Sequence[Row], references: References, catalog: Catalog
) -> list[dict[str, Any]]:
    """Every claim as `make claims FORMAT=json` has it: on the records alone, and on the published
    table."""
    sources = all_sources(records, catalog, references)
    return verdicts.values(evaluate(load_claims(catalog), sources), sources)


def render(data: Mapping[str, Any]) -> str:
    """The page for ``data``.

    Text of runs cannot become markup: the data is JSON in which < is spelled \\u003c, the scripts
    only set text, and the content security policy runs no other script than the one whose hash it
    names.
    """
    style = (FOLDER / "report.css").read_text(encoding="utf-8")
    code = "\n".join((FOLDER / name).read_text(encoding="utf-8") for name in SCRIPTS)
    script = f'(() => {{\n"use strict";\n{code}\n}})();'
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    json_text = json.dumps(data, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        json_text = json_text.replace(character, f"\\u{ord(character):04x}")
    parts = {"POLICY": escape(policy), "STYLE": style, "DATA": json_text, "SCRIPT": script}
    before, *rest = (FOLDER / "page.html").read_text(encoding="utf-8").split("{{")
    pieces = (piece.split("}}", 1) for piece in rest)
    return before + "".join(parts[name] + after for name, after in pieces)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
