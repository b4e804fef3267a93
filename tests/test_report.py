"""The report: what is in it, and how it behaves in a real headless Chromium (skipped where there is none)."""

import base64
import hashlib
import json
import re
import shutil
from html import unescape
from importlib.util import find_spec
from pathlib import Path

import pytest

from harness import ROOT, cli
from harness.evidence import tables
from harness.evidence.references import load_references
from harness.evidence.results import collect
from harness.experiment.catalog import load_catalog
from harness.pages.report import page
from harness.pages.report.data import make_command, page_values
from harness.pages.schedules import load_profiles
from harness.run.schema import Result, StepMetrics
from harness.run.step_statistics import measure

RECORDS = ROOT / "experiments" / "records"
IDS = [e.id for e in load_catalog().experiments if e.chapter < 600]
RECORD = json.loads((RECORDS / "h200-141gb" / "101.json").read_text())
EVIL = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"


def run(
    outdir: Path,
    label: str,
    id_: str = "101",
    *,
    steps: int = 20,
    slower: float = 1.0,
    overrides: dict | None = None,
    sampled: bool = False,
    **result: object,
) -> Path:
    """A run directory of experiment ``id_`` with the numbers of record 101, a loss that falls, and step times."""
    e = load_catalog().find(id_)
    path = outdir / label
    path.mkdir(parents=True)
    frozen = e.model_dump(mode="json") | {
        "overrides": overrides or {},
        "device": "cuda",
        "commit": None,
    }
    (path / "experiment.json").write_text(json.dumps(frozen))
    measured = (
        RECORD
        | {
            "steps": steps,
            "steps_done": steps,
            "gpu": "NVIDIA H200",
            "started": RECORD["started"] + 1,
        }
        | result
    )
    lines = [
        StepMetrics(step=s, loss=10 / s**0.1, step_ms=100 * slower + s % 7, time=1e9 + s)
        for s in range(1, steps + 1)
    ]
    complete = Result.model_validate(measured | measure(e, lines, RECORD["peak_tflops"]))
    (path / "result.json").write_text(complete.model_dump_json())
    (path / "metrics.jsonl").write_text("".join(f"{line.model_dump_json()}\n" for line in lines))
    (path / "command.sh").write_text(
        "#!/usr/bin/env bash\nset -eu\ncd /somewhere/secret\nexport PATH=/somewhere/secret/bin:$PATH\n"
        f"exec torchrun --standalone -m harness.entry --train-iters {steps} --data-path /somewhere/secret/data/a\n"
    )
    if sampled:
        samples = [
            {
                "time": 1e9 + s,
                "gpus": [{"index": 0, "used_gib": 10 + s}, {"index": 1, "used_gib": 5.0}],
            }
            for s in range(30)
        ]
        (path / "gpus.jsonl").write_text(
            "".join(f"{json.dumps(sample)}\n" for sample in samples) + '{"time": 1e9, "gp'
        )
    return path


def read(outdir: Path, records: Path = RECORDS) -> dict:
    references = load_references()
    return page_values(
        collect(outdir, records, references),
        references,
        load_catalog(),
        load_profiles(outdir, records),
    )


def test_the_report_counts_what_ended_as_published_as_tables_do(tmp_path: Path) -> None:
    """The report counted rows: 25 of 25 beside 24 of the 24."""
    count = read(tmp_path)["ended"]
    printed = tables.render(collect(tmp_path, RECORDS, load_references()).rows)
    assert (
        f"Ended as published: {count['as_published']} of the {count['experiments']} with a published row"
        in printed
    )


def test_a_row_for_each_record_run_and_experiment(tmp_path: Path) -> None:
    run(tmp_path, "101-mine", sampled=True)
    rows = read(tmp_path)["rows"]
    assert len({len(column) for column in rows.values()}) == 1
    assert set(rows["id"]) == {e.id for e in load_catalog().experiments}
    assert rows["kind"].count("record") == len(list(RECORDS.glob("*/*.json")))
    assert [rows["label"][i] for i, kind in enumerate(rows["kind"]) if kind == "run"] == [
        "101-mine"
    ]
    never = [i for i, status in enumerate(rows["status"]) if status == "not run"]
    assert never and all(
        rows["step_ms"][i] is None and rows["make"][i] == f"make {rows['id'][i]}" for i in never
    )


def test_curves_are_those_of_the_run(tmp_path: Path) -> None:
    run(tmp_path, "101-mine", sampled=True)
    rows = read(tmp_path, tmp_path / "none")["rows"]
    curves = rows["curves"][rows["label"].index("101-mine")]
    assert curves["loss"]["y"][:2] == [10, round(10 / 2**0.1, 4)] and "x" not in curves["loss"]
    assert len(curves["step_ms"]["y"]) == 20
    assert curves["memory_gib"] == {"x": list(range(30)), "y": list(range(10, 40))}


def test_long_runs_are_thinned(tmp_path: Path) -> None:
    run(tmp_path, "101-long", steps=5000)
    rows = read(tmp_path, tmp_path / "none")["rows"]
    curve = rows["curves"][rows["label"].index("101-long")]["loss"]
    assert len(curve["x"]) == len(curve["y"]) <= 300 and curve["x"][-1] == 5000


def test_torn_files_and_runs_without_numbers(tmp_path: Path) -> None:
    torn = run(tmp_path, "101-torn")
    (torn / "result.json").unlink()
    (torn / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 3.5, "step_ms": 100, "time": 1}\n{"step": 2, "lo'
    )
    (torn / "command.sh").unlink()
    (run(tmp_path, "101-corrupt") / "result.json").write_text("{")
    data = read(tmp_path, tmp_path / "none")
    rows = data["rows"]
    at = rows["label"].index("101-torn")
    assert rows["curves"][at]["loss"]["y"] == [3.5]
    assert any("torchrun" in data["lines"][line] for line in rows["torchrun"][at])
    assert "101-corrupt" not in rows["label"] and "101-corrupt" in data["warnings"][0]


def test_commands_name_no_folder_of_this_machine(tmp_path: Path) -> None:
    run(tmp_path, "101-mine", steps=7)
    data = read(tmp_path)
    rows = data["rows"]
    at = rows["label"].index("101-mine")
    assert "\n".join(data["lines"][line] for line in rows["torchrun"][at]) == (
        "set -eu\nexec torchrun --standalone -m harness.entry --train-iters 7 --data-path data/a"
    )
    text = json.dumps(data)
    assert str(ROOT) not in text and "/somewhere/secret" not in text
    capped = rows["label"].index("h200-141gb/301_cardh100-80gb")
    assert any(
        "per_process_memory_fraction" in data["lines"][line] for line in rows["torchrun"][capped]
    )


def test_make_commands_quote_what_a_shell_would_take_apart() -> None:
    e = (
        load_catalog()
        .find("101")
        .model_copy(update={"overrides": {"STEPS": "20", "ARGS": "--lr 1e-4 --x 'y'"}})
    )
    assert make_command(e, "cuda") == """make 101 STEPS=20 ARGS='--lr 1e-4 --x '"'"'y'"'"''"""
    assert make_command(load_catalog().find("101"), "cpu") == "make 101 DEVICE=cpu"


def test_the_page_is_self_contained_and_runs_only_its_own_script() -> None:
    html = page.render(read(ROOT / "none"))
    assert not re.search(r"<(link|img|iframe|object|embed|base)\b|\bsrc=|@import|url\(", html)
    policy = unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1])
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    style, script = (
        re.search(r"<style>(.*?)</style>", html, re.S)[1],
        re.findall(r"<script>(.*?)</script>", html, re.S)[0],
    )
    for text in (style, script):
        assert (
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
            in policy
        )


def test_text_of_runs_is_no_markup() -> None:
    html = page.render({"evil": EVIL, "lines": ["\u2028", "&amp;", "{{SCRIPT}}"]})
    assert EVIL not in html and html.count("</script>") == 2
    embedded = re.search(r'id="data">(.*?)</script>', html, re.S)[1]
    assert json.loads(embedded) == {"evil": EVIL, "lines": ["\u2028", "&amp;", "{{SCRIPT}}"]}


def test_make_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "runs", "101-mine")
    assert cli.main(["report", f"OUTDIR={tmp_path / 'runs'}"]) == 0
    assert "101-mine" in (tmp_path / "runs" / "report.html").read_text()
    assert (
        cli.main(
            ["report", f"OUTDIR={tmp_path / 'runs'}", f"REPORT={tmp_path / 'new' / 'page.html'}"]
        )
        == 0
    )
    assert (tmp_path / "new" / "page.html").exists()
    (tmp_path / "file").write_text("")
    assert cli.main(["report", f"REPORT={tmp_path / 'file' / 'page.html'}"]) == 2
    assert "cannot write" in capsys.readouterr().err
    assert cli.main(["report", f"REPORT={tmp_path}"]) == 2


def test_make_report_says_what_it_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run(tmp_path, "101-corrupt") / "result.json").write_text("{")
    assert cli.main(["report", f"OUTDIR={tmp_path}"]) == 0
    assert "101-corrupt: skipped" in capsys.readouterr().err


# In Chromium


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
WITHOUT = (
    "no Playwright: scripts/setup.sh test"
    if not find_spec("playwright")
    else None
    if CHROMIUM
    else "no Chromium: apt install chromium"
)
in_chromium = pytest.mark.skipif(WITHOUT is not None, reason=WITHOUT or "")


LONG_MS = 120_000
"""For a machine that does other things, too: with a twelfth of a core, opening the page of 200 runs takes 13 s."""


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


def test_texts_of_runs_cannot_become_markup(tmp_path: Path) -> None:
    """Labels, details, ARGS and GPU names that try to end the script in which they stand."""
    evil = f"{EVIL}<!--<script>\u2028 & &lt;/script&gt;"
    run(
        tmp_path,
        "101-<img src=x onerror=window.hacked=3>",
        overrides={"ARGS": evil},
        gpu=evil,
        status="crash",
        detail=evil,
        advice=evil,
    )
    found = read(tmp_path)
    text = page.render(found | {"claims": [{"says": evil}]})
    begin = text.index('<script type="application/json" id="data">') + len(
        '<script type="application/json" id="data">'
    )
    data = text[begin : text.index("</script>", begin)]
    assert not set("<>&\u2028\u2029") & set(data)
    assert json.loads(data) == json.loads(json.dumps(found | {"claims": [{"says": evil}]})), (
        "and says the same"
    )
    assert any(evil.split()[0] in str(cell) for cell in json.loads(data)["rows"]["notes"]), (
        "details are on the page"
    )
    assert text.count("<script") == text.count("</script>") == 2


def test_scripts_only_ever_set_text() -> None:
    code = "".join((page.FOLDER / name).read_text(encoding="utf-8") for name in page.SCRIPTS)
    assert not re.findall(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|srcdoc|eval\(|new Function|javascript:",
        code,
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of 200 runs, some of them with texts that try to be markup."""
    outdir = tmp_path_factory.mktemp("runs")
    for i in range(197):
        status = {3: "oom", 5: "crash"}.get(i % 40, "ok")
        run(
            outdir,
            f"{IDS[i % len(IDS)]}-run{i}",
            IDS[i % len(IDS)],
            slower=1 + i / 50,
            sampled=i % 2 == 0,
            status=status,
        )
    run(outdir, "601-long", "601", steps=3000)
    run(outdir, "101-<img src=x onerror=window.hacked=3>", overrides={"ARGS": EVIL}, gpu=EVIL)
    run(outdir, "104-other-card", "104", gpu="NVIDIA A100-SXM4-80GB")
    page.write(outdir, RECORDS, outdir / "report.html")
    return outdir / "report.html"


@pytest.fixture
def view(browser, report):
    """Opens the report with these options of Playwright's context; complaints and requests end the test in failure."""
    contexts, complaints = [], []

    def open_(path: Path = report, **options: object):
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
        context.set_default_timeout(LONG_MS)
        contexts.append(context)
        shown = context.new_page()
        shown.on("console", lambda message: complaints.append(message.text))
        shown.on("pageerror", lambda error: complaints.append(str(error)))
        shown.on(
            "request",
            lambda request: (
                complaints.append(request.url) if request.url != path.as_uri() else None
            ),
        )
        shown.goto(path.as_uri())
        return shown

    yield open_
    for context in contexts:
        context.close()
    assert not complaints


def column(shown, title: str) -> list[str]:
    """The cells of a column of the table, in the order shown."""
    return shown.evaluate(
        """(title) => {
      const at = [...document.querySelectorAll("#every-row thead th")].findIndex((head) => head.textContent === title);
      return [...document.querySelectorAll("#every-row tbody tr[data-id]")].map((row) => row.cells[at].textContent); }""",
        title,
    )


def numbers(cells: list[str]) -> list[float]:
    return [float(cell.replace(",", "")) for cell in cells if cell]


@in_chromium
def test_opens_with_every_row(view) -> None:
    shown = view()
    assert len(column(shown, "id")) == int(shown.inner_text("#count").split()[0]) > 200
    assert shown.locator("main section").count() == 7
    assert "NVIDIA H200" in shown.inner_text("#summary")
    assert re.search(
        r"\d+ of the \d+ experiments with a published row", shown.inner_text("#summary")
    )


@in_chromium
def test_sorts(view) -> None:
    shown = view()
    head = shown.locator("#every-row th", has_text="ms/step")
    for direction, down in (("ascending", False), ("descending", True)):
        head.get_by_role("button").click()
        assert head.get_attribute("aria-sort") == direction
        cells = column(shown, "ms/step")
        assert numbers(cells) == sorted(numbers(cells), reverse=down) and len(set(cells)) > 50
        assert "" in cells and not any(cells[cells.index("") :]), "rows without a number come last"
    shown.locator("#every-row th", has_text="id").first.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "none"
    assert column(shown, "id") == sorted(column(shown, "id"))


@in_chromium
def test_filters(view) -> None:
    shown = view()
    shown.fill("#filter", "a2a cp8")
    assert column(shown, "id") and all("cp8" in cell for cell in column(shown, "layout"))
    shown.fill("#filter", "")
    shown.select_option("#filter-chapter", "400")
    assert {id_[0] for id_ in column(shown, "id")} == {"4"}
    shown.select_option("#filter-gpus", "4")
    assert set(column(shown, "GPUs")) == {"4"}
    shown.select_option("#filter-gpus", "")
    shown.select_option("#filter-status", "not run")
    assert set(column(shown, "status")) <= {"not run"}
    shown.select_option("#filter-status", "oom")
    shown.select_option("#filter-chapter", "")
    assert column(shown, "status") and all(
        status.startswith("OOM") for status in column(shown, "status")
    )
    shown.select_option("#filter-status", "")
    shown.select_option("#filter-hardware", "NVIDIA A100-SXM4-80GB")
    assert column(shown, "id") == ["104"]
    shown.fill("#filter", "no such words")
    assert column(shown, "id") == [] and shown.inner_text("#count").startswith("0 of")


@in_chromium
def test_a_chapters_link_shows_its_rows(view) -> None:
    shown = view()
    shown.get_by_role("link", name="Show its rows").nth(2).click()
    assert {id_[0] for id_ in column(shown, "id")} == {"3"}


@in_chromium
def test_copies_commands(view) -> None:
    shown = view(permissions=["clipboard-read", "clipboard-write"])
    shown.fill("#filter", "301_card")
    shown.get_by_role("button", name="Commands of").click()
    detail = shown.locator("tr.detail")
    detail.get_by_role("button", name="Copy: make").click()
    detail.get_by_text("Copied").wait_for()
    assert shown.evaluate("navigator.clipboard.readText()") == "make 301 STEPS=20 CARD=h100-80gb"
    detail.get_by_role("button", name="Copy: torchrun").click()
    shown.wait_for_function(
        "navigator.clipboard.readText().then((text) => text.includes('exec torchrun'))"
    )
    shown.get_by_role("button", name="Commands of").click()
    assert detail.count() == 0


@in_chromium
def test_selects_a_command_where_the_clipboard_is_refused(view) -> None:
    shown = view()
    shown.evaluate(
        "navigator.clipboard.writeText = () => Promise.reject(new Error('refused')); document.execCommand = () => false"
    )
    shown.fill("#filter", "301_card")
    shown.get_by_role("button", name="Commands of").click()
    shown.get_by_role("button", name="Copy: make").click()
    shown.get_by_text("Selected: press Ctrl+C").wait_for()
    assert shown.evaluate("getSelection().toString()") == "make 301 STEPS=20 CARD=h100-80gb"


@in_chromium
def test_compares_runs(view) -> None:
    shown = view()
    section = shown.locator("#compare")
    assert section.locator(".chips button").count() == 2
    labels = [f"{IDS[i]}-run{i}" for i in (1, 4)]
    for label in labels:
        shown.fill("#filter", label)
        shown.get_by_label(f"Compare {label}", exact=True).check()
    section.scroll_into_view_if_needed()
    assert section.locator(".chips button").all_text_contents()[2:] == [
        f"{label} \N{MULTIPLICATION SIGN}" for label in labels
    ]
    titles = section.locator("figcaption").all_text_contents()
    assert titles == ["Loss", "Step time", "Memory of the fullest GPU"]
    for figure in section.locator("figure").all():
        assert figure.locator(".legend button").count() == 4
        figure.scroll_into_view_if_needed()
        figure.locator(".join").nth(5).wait_for(state="attached")
    assert all(text in shown.text_content("#differences") for text in ("layout", "(1.0"))
    section.get_by_role("button", name=f"Remove {labels[0]}").click()
    assert section.locator(".chips button").count() == 3
    shown.fill("#filter", labels[0])
    assert not shown.get_by_label(f"Compare {labels[0]}", exact=True).is_checked()
    shown.select_option("#compare-add", label="104-other-card, NVIDIA A100-SXM4-80GB")
    assert "Different hardware" in section.text_content()


@in_chromium
def test_at_most_six_runs_at_once(view) -> None:
    shown = view()
    picker = shown.locator("#compare-add")
    labels = [text for text in picker.locator("option").all_text_contents() if "run1" in text][:5]
    for label in labels:
        picker.select_option(label=label)
    assert shown.locator(".chips button").count() == 6
    assert "At most 6" in shown.text_content("#compare")


@in_chromium
def test_hovering_and_arrow_keys_tell_values(view) -> None:
    shown = view()
    figure = shown.locator("#chapters figure").first
    figure.scroll_into_view_if_needed()
    plot, tip = figure.locator(".plot"), figure.locator(".tip")
    point = plot.locator("g circle").last
    point.hover(force=True)
    assert re.search(r"\d+: [\d.,]+ .*GiB", tip.inner_text())
    shown.mouse.move(0, 0)
    plot.focus()
    shown.keyboard.press("ArrowRight")
    first = tip.inner_text()
    shown.keyboard.press("ArrowRight")
    assert first and tip.inner_text() and tip.inner_text() != first
    shown.keyboard.press("Escape")
    assert tip.inner_text() == ""


@in_chromium
def test_the_legend_switches_lines(view) -> None:
    shown = view()
    figure = shown.locator("#chapters figure").first
    figure.scroll_into_view_if_needed()
    figure.locator(".plot circle").first.wait_for()
    before = figure.locator(".plot circle").count()
    button = figure.locator(".legend button", has_text="published")
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    assert 0 < figure.locator(".plot circle").count() < before
    button.click()
    assert figure.locator(".plot circle").count() == before


@in_chromium
def test_curves_tell_all_runs_at_a_step(view) -> None:
    shown = view()
    figure = shown.locator("#compare figure").first
    figure.scroll_into_view_if_needed()
    figure.locator(".plot").hover()
    assert re.match(
        r"training step \d+\n.*: [\d.]+\n.*: [\d.]+", figure.locator(".tip").inner_text()
    )


@in_chromium
def test_claims(view) -> None:
    shown = view()
    lines = shown.locator("#every-claim tbody tr")
    everything = lines.count()
    assert (
        everything >= 20
        and "holds" in lines.first.text_content()
        and "memory_gib[115]" in lines.first.text_content()
    )
    shown.select_option("#verdict", "fails")
    assert 0 < lines.count() < everything
    assert all("fails" in text for text in lines.all_text_contents())


@in_chromium
def test_timelines(view) -> None:
    shown = view()
    section = shown.locator("#timelines")
    section.scroll_into_view_if_needed()
    section.locator("rect.own").first.wait_for()
    assert (
        section.locator(".plot rect.own").count() == 2 * 8 * 8 and "87.5%" in section.text_content()
    )
    shown.select_option("#timeline", label="438: pp8 vpp3 m8")
    assert (
        section.locator(".plot rect.own").count() == 2 * 8 * 3 * 8
        and "by formula for NVIDIA H100" in section.text_content()
    )


@in_chromium
def test_dark_mode_follows_the_system_and_the_button(view) -> None:
    def becomes(shown, least: int, most: int) -> None:
        """Wait until the background has this luminance: when a style is computed anew, no browser promises."""
        shown.wait_for_function(
            """([least, most]) => {
          const [red, green, blue] = getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number);
          const luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue;
          return least <= luminance && luminance <= most; }""",
            arg=[least, most],
        )

    becomes(view(color_scheme="light"), 200, 255)
    shown = view(color_scheme="dark")
    becomes(shown, 0, 50)
    shown.click("#theme")
    becomes(shown, 200, 255)
    shown.reload()
    becomes(shown, 200, 255)
    assert "light" in shown.inner_text("#theme")
    shown.click("#theme")
    becomes(shown, 0, 50)


@in_chromium
@pytest.mark.parametrize("width", [320, 390])
def test_a_phone_scrolls_tables_inside_their_box(view, width: int) -> None:
    shown = view(
        viewport={"width": width, "height": 844},
        has_touch=True,
        is_mobile=True,
        device_scale_factor=2,
    )
    shown.locator("#every-row").wait_for()
    shown.get_by_role("button", name="Commands of").first.click()
    shown.evaluate("dispatchEvent(new Event('beforeprint'))")  # draws every plot
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
    assert shown.evaluate("document.querySelector('#rows .scroll').scrollWidth") > width
    assert shown.evaluate(
        "[...document.querySelectorAll('figure')].every((f) => f.getBoundingClientRect().right <= innerWidth)"
    )


@in_chromium
def test_by_keyboard(view) -> None:
    shown = view()
    shown.keyboard.press("Tab")
    assert shown.evaluate("document.activeElement.className") == "skip"
    shown.keyboard.press("Enter")
    assert shown.evaluate("location.hash") == "#rows"
    reached = []
    for _ in range(14):
        shown.keyboard.press("Tab")
        reached.append(
            shown.evaluate("document.activeElement.id || document.activeElement.textContent")
        )
        outline = shown.evaluate(
            "getComputedStyle(document.activeElement).outlineStyle + getComputedStyle(document.activeElement).outlineWidth"
        )
        assert outline == "solid3px", reached
    assert reached[:5] == [
        "filter",
        "filter-chapter",
        "filter-gpus",
        "filter-hardware",
        "filter-status",
    ]
    assert "id" in reached and "ms/step" not in reached[:6]
    shown.locator("#every-row th button", has_text="GPUs").focus()
    shown.keyboard.press("Enter")
    cells = numbers(column(shown, "GPUs"))
    assert cells == sorted(cells)


@in_chromium
def test_texts_of_runs_are_inert(view) -> None:
    shown = view()
    shown.fill("#filter", "onerror")
    assert column(shown, "id") == ["101"]
    shown.get_by_role("button", name="Commands of").click()
    assert "<script>window.hacked = 1</script>" in shown.inner_text("tr.detail")
    assert EVIL in column(shown, "hardware")
    shown.locator("#every-row .check").check()
    assert shown.evaluate("window.hacked") is None and shown.locator("main img").count() == 0


@in_chromium
def test_prints_every_plot_and_no_controls(view) -> None:
    shown = view()
    assert shown.pdf().startswith(b"%PDF")
    assert shown.locator("figure .plot:not(:has(*))").count() == 0
    shown.emulate_media(media="print")
    assert (
        not shown.locator(".controls").first.is_visible() and not shown.locator("nav").is_visible()
    )


@in_chromium
def test_opens_without_a_single_run(view, tmp_path: Path) -> None:
    page.write(tmp_path, tmp_path, tmp_path / "report.html")
    shown = view(tmp_path / "report.html")
    assert "nothing yet" in shown.inner_text("#summary")
    assert set(column(shown, "status")) == {"not run"}
