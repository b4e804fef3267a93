"""How long `make report` takes for 200 runs, and how long the page takes to open in headless
Chromium.

    .venv/bin/python benchmarks/report.py        (needs Chromium and the test stage)

Writes benchmarks/report.json.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from playwright.sync_api import Browser, sync_playwright  # noqa: E402
from test_report import CHROMIUM, IDS, run  # noqa: E402

RUNS, OPENINGS = 200, 10
MARKS = """async () => {
  const painted = () => performance.getEntriesByName("first-contentful-paint").length;
  while (!painted()) await new Promise((resolve) => setTimeout(resolve, 20));
  const [page] = performance.getEntriesByType("navigation");
  const paint = performance.getEntriesByName("first-contentful-paint")[0];
  return { dom_content_loaded_ms: page.domContentLoadedEventEnd, load_ms: page.loadEventEnd, first_contentful_paint_ms: paint.startTime };
}"""


def main() -> None:
    results = {"machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        results["chromium"] = browser.version
        for steps in (20, 1000):
            with tempfile.TemporaryDirectory() as folder:
                for i in range(RUNS):
                    run(
                        Path(folder),
                        f"{IDS[i % len(IDS)]}-run{i}",
                        IDS[i % len(IDS)],
                        steps=steps,
                        sampled=True,
                    )
                results[f"{RUNS} runs of {steps} steps"] = measure(browser, Path(folder))
        browser.close()
    Path(__file__).with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


def measure(browser: Browser, outdir: Path) -> dict[str, object]:
    """Build the report of ``outdir`` once and open it several times, each in a browser context of
    its own."""
    begun = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "harness", "report", f"OUTDIR={outdir}"],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    built_s = time.perf_counter() - begun
    path, openings = outdir / "report.html", []
    for _ in range(OPENINGS):
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(path.as_uri())
        openings.append(page.evaluate(MARKS))
        page.close()
    return {
        "build_s": round(built_s, 2),
        "kib": round(path.stat().st_size / 1024),
        "openings": OPENINGS,
        **{
            mark: {
                "median": round(statistics.median(o[mark] for o in openings)),
                "max": round(max(o[mark] for o in openings)),
            }
            for mark in openings[0]
        },
    }


if __name__ == "__main__":
    main()
