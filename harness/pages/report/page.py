"""The report's page: style sheet, scripts and data in one file that loads nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, get_args

from harness import RECORDS
from harness.errors import UserError
from harness.evidence import results, verdicts
from harness.evidence.claims import Verdict, evaluate, load_claims, sources
from harness.evidence.references import References, load_references
from harness.evidence.rows import Row
from harness.experiment.catalog import Catalog, load_catalog
from harness.pages.report.data import page_values
from harness.pages.schedules import load_profiles
from harness.run import finding
from harness.system.files import told_if_unwritable, write_text

FOLDER = Path(__file__).parent
SCRIPTS = ("dom.js", "charts.js", "table.js", "compare.js", "sections.js", "main.js")


def report(settings: Mapping[str, str]) -> int:
    """``make report``: one page with tables, plots and comparisons, into the file REPORT."""
    outdir = finding.outdir(settings)
    path = Path(settings.get("REPORT") or outdir / "report.html").absolute()
    if path.is_dir():
        raise UserError(
            f"REPORT={settings['REPORT']} is a folder; name a file in it, such as report.html"
        )
    if settings.get("FORCE") != "1" and path.exists() and not is_report(path):
        raise UserError(
            f"REPORT={path} exists and was not written by make report\n"
            "FORCE=1 replaces it, REPORT=… names another file"
        )
    for warning in write(outdir, RECORDS, path):
        print(warning, file=sys.stderr)
    size_kib = path.stat().st_size / 1024
    print(f"{path} ({size_kib:.0f} KiB): open it in a browser; it needs no network")
    return 0


def write(outdir: Path, records: Path, path: Path) -> tuple[str, ...]:
    """Write the report to ``path`` and return a warning for each file that could not be read.

    Raises:
        UserError: ``path`` cannot be written, or the catalogue, the references or plots.yaml are
        wrong.
    """
    references, catalog = load_references(), load_catalog()
    found = results.collect(outdir, records, references)
    data = page_values(found, references, catalog, load_profiles(outdir, records))
    page = render(data | claims(found.records, references, catalog))
    with told_if_unwritable(path.parent, "REPORT"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, page)
    return found.warnings


def is_report(path: Path) -> bool:
    """Whether the file ``path`` is a report that ``write`` wrote."""
    # only the part before the colon, which reports of older versions have too
    title = re.search(r"<title>[^:]*:", (FOLDER / "page.html").read_text(encoding="utf-8"))[0]
    with path.open("rb") as file:
        return title.encode() in file.read(4096)


def claims(records: Sequence[Row], references: References, catalog: Catalog) -> dict[str, Any]:
    """Claims as `make claims FORMAT=json` has them, and the count of verdicts for each source."""
    found = evaluate(load_claims(catalog), sources(records, catalog, references))
    columns = zip(*(one.sides for one in found), strict=True)
    return {
        "claims": verdicts.values(found),
        "claim_sources": [
            {"title": sides[0].source.title, "counted": verdicts.counted(sides)}
            for sides in columns
        ],
        "verdicts": get_args(Verdict),
    }


def render(data: Mapping[str, Any]) -> str:
    """The page for ``data``.

    Text of runs cannot become markup. The data is JSON in which < is spelled \\u003c, the scripts
    only set text, and the content security policy allows no script but the one with its hash.
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
