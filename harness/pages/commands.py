"""``make plots``, ``make report`` and ``make docs``."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from harness import RECORDS
from harness.errors import UserError
from harness.run import finding
from harness.system import screen


def plots(settings: Mapping[str, str]) -> int:
    """Draw the plots of runs and records as SVG files."""
    from harness.pages import plots

    outdir = finding.outdir(settings)
    folder = outdir / "plots"
    drawn, warnings = plots.pictures(outdir, RECORDS)
    _warn(warnings)
    plots.write(folder, drawn)
    screen.say(f"{len(drawn)} pictures in {folder}: {', '.join(drawn)}")
    return 0


def report(settings: Mapping[str, str]) -> int:
    """Write one page with tables, plots and comparisons; it needs no network."""
    from harness.pages.report import page

    outdir = finding.outdir(settings)
    path = Path(settings.get("REPORT") or outdir / "report.html").absolute()
    if path.is_dir():
        raise UserError(
            f"REPORT={settings['REPORT']} is a folder; name a file in it, such as report.html"
        )
    if settings.get("FORCE") != "1" and path.exists() and not page.is_report(path):
        raise UserError(
            f"REPORT={path} exists and was not written by make report\n"
            "FORCE=1 replaces it, REPORT=… names another file"
        )
    _warn(page.write(outdir, RECORDS, path))
    print(
        f"{path} ({path.stat().st_size / 1024:.0f} KiB): open it in a browser; it needs no network"
    )
    return 0


def docs(settings: Mapping[str, str]) -> int:
    """Write README.md and docs/ anew; CHECK=1 only names the stale ones and returns 1."""
    from harness.pages import documents

    return documents.write(RECORDS, check=settings.get("CHECK") == "1")


def _warn(warnings: Iterable[str]) -> None:
    for warning in warnings:
        print(warning, file=sys.stderr)
