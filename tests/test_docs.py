"""README.md, docs/ and the pages beside data and benchmarks: generated parts are fresh, links lead somewhere, and what is named exists."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from harness import ROOT
from harness.cli import COMMANDS, RECORDS
from harness.errors import UserError
from harness.evidence.facts import Facts, NotMeasured
from harness.evidence.results import Ended, ended
from harness.evidence.rows import Row
from harness.experiment.catalog import load_catalog
from harness.experiment.overrides import EXPERIMENT_SETTINGS, LAUNCH_SETTINGS
from harness.pages import documents
from harness.run.directory import Upstream

PAGES = [
    ROOT / "README.md",
    *(
        path
        for folder in ("docs", "benchmarks", "data")
        for path in sorted((ROOT / folder).glob("*.md"))
    ),
]
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
FENCE = re.compile(r"^( *)```.*?^\1```$", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
MAKE = re.compile(r"\bmake ([a-z0-9][\w.-]*)(<)?")
ID = re.compile(r"[1-9]\d\dh?")
WITH_UNIT = re.compile(r"\d[\d,.]*\s?(?:ms|GiB|MiB|TFLOP/s|GB/s|MB/s|%)(?!\w)")
TYPED = {
    "450 GB/s": "NVLink's, each way",
    "79.6 GiB": "an H100's",
    "77 %": "Shoeybi et al. 2019",
    "0.01 %": "a bound",
    "15 %": "a rule of thumb",
    "5 %": "a setting",
    "10 %": "an aim",
    "256 MiB": "WHOLE_BYTES of data/content.py",
    "8 GiB": "a bound of what `make checkpoints` reads",
}
"""Numbers with a unit that no run measured."""


@pytest.fixture(scope="module")
def facts() -> Facts:
    return Facts.load(RECORDS)


def each_page(test):
    return pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)(test)


def test_everything_generated_is_fresh() -> None:
    stale = [path.name for path in documents.write(RECORDS, check=True)]
    assert not stale, "run `make docs`"


def test_documents_quote_the_upstream_of_most_records_and_of_two_with_as_many_the_newest(
    facts: Facts,
) -> None:
    def ran(row: Row, version: str, started: float) -> Row:
        return replace(
            row,
            upstream=Upstream(version=version),
            result=row.result.model_copy(update={"started": started}),
        )

    a, b, c, d, e = facts.of_hardware[:5]
    tie = (ran(a, "0.19", 5), ran(b, "0.18", 7), ran(c, "0.18", 1), ran(d, "0.19", 6))
    for rows in (tie, tie[::-1]):
        assert {row.upstream.version for row in replace(facts, rows=rows).of_hardware} == {"0.18"}
    assert {
        row.upstream.version for row in replace(facts, rows=(*tie, ran(e, "0.19", 2))).of_hardware
    } == {"0.19"}


@each_page
def test_every_mark_is_closed(path: Path) -> None:
    text = path.read_text()
    opened = re.findall(r"<!-- (\w+): ", text)
    assert opened == re.findall(r"<!-- /(\w+) -->", text)
    assert len(documents.VALUE.findall(text)) == opened.count("value")
    assert not re.search(r"^ *<!-- value", text, re.MULTILINE), (
        "a line that begins so is HTML, not Markdown"
    )
    assert not [words for words in COMMENT.findall(text) if "--" in words[4:-3]], (
        "which Markdown takes for no comment"
    )


@each_page
def test_links_and_images_lead_somewhere(path: Path) -> None:
    dead = [target for target in LINK.findall(_prose(path)) if not _leads_somewhere(path, target)]
    assert not dead


def _leads_somewhere(page: Path, target: str) -> bool:
    if target.startswith("https://"):
        return True
    name, _, heading = target.partition("#")
    file = (page.parent / name).resolve() if name else page
    return file.exists() and (not heading or heading in _headings(file))


def _headings(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    lines = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@each_page
def test_every_make_target_named_exists(path: Path) -> None:
    known = _targets()
    named = {name + bool(tab) * "*" for words in _code(path) for name, tab in MAKE.findall(words)}
    added = re.findall(
        r"^ +([1-9]\d\dh?): \{", path.read_text(), re.MULTILINE
    )  # rows that a page adds to the catalogue
    known |= {
        word for id_ in added for word in (id_, f"show-{id_}", f"memory-{id_}", f"verify-{id_}")
    }
    assert not [
        name
        for name in named
        if not any(k.startswith(name[:-1]) if name[-1] == "*" else k == name for k in known)
    ]


@each_page
def test_every_setting_named_exists(path: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    known = {s.key for s in EXPERIMENT_SETTINGS + LAUNCH_SETTINGS} | set(
        re.findall(r"MORE = (.*)", makefile)
    ) - {""}
    known = {word for words in known for word in words.split()} | {
        "FORCE",
        "PACK",
        "MORE",
        "VENV",
        "PYTHON",
    }
    lines = [words for words in _code(path) if words.startswith(("make ", "$ make "))]
    used = {key for line in lines for key in re.findall(r"\b([A-Z_]+)=", line)}
    assert used <= known


@each_page
def test_every_experiment_named_exists(path: Path) -> None:
    ids = {e.id for e in load_catalog().experiments}
    assert {word for word in CODE.findall(_prose(path)) if ID.fullmatch(word)} <= ids


def test_every_experiment_of_a_chapter_is_in_its_page() -> None:
    for page in sorted((ROOT / "docs").glob("0[1-5]-*.md")):
        chapter = int(page.name[:2]) * 100
        listed = re.findall(r"<!-- experiments: (.*?) -->", page.read_text())
        full_size = [e.id for e in load_catalog().in_chapter(chapter) if not e.half_of]
        assert sorted(" ".join(listed).split()) == full_size, page.name


def test_every_page_and_diagram_is_reachable() -> None:
    pages = {path: _prose(path) for path in PAGES}
    links = [
        (path, name.partition("#")[0])
        for path, text in pages.items()
        for name in LINK.findall(text)
    ]
    linked = {(path.parent / name).resolve() for path, name in links}
    made = [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "images").glob("diagram-*.svg")]
    assert not [
        path.name for path in made if path not in linked and path != ROOT / "docs" / "README.md"
    ]


def test_a_number_that_a_run_measured_is_not_typed() -> None:
    pages = [
        CODE.sub(
            "", FENCE.sub("", documents.BLOCK.sub("", documents.VALUE.sub("", path.read_text())))
        )
        for path in documents.PAGES
    ]
    assert {number for page in pages for number in WITH_UNIT.findall(page)} == set(TYPED)


def test_values(facts: Facts) -> None:
    record = json.loads((RECORDS / "h200-141gb" / "101.json").read_text())
    assert facts.value("step_ms[101]") == record["step_ms"]["median"]
    assert facts.value("published_step_ms[101]") == 220
    assert (
        facts.value("2 * published_step_ms[101] / -published_step_ms[104] + 1")
        == 2 * 220 / -250 + 1
    )
    assert facts.value("published_step_ms[443]") == 665, (
        "the row labelled 446, which ran what 443 runs"
    )
    assert facts.value("step_ms[h200-8gpu, 128]") == 472.1
    assert facts.value("step_ms[h200-4gpu, 101, te-rng-tracker]") == 75.5
    assert facts.value("bubble[408]") == 7 / 8
    assert facts.value("bubble[408h]") == 3 / 8
    assert (
        documents.value("h200-141gb/101 memory_gib.nvml", ".3f", facts)
        == f"{record['memory_gib']['nvml']:.3f}"
    )


def test_what_no_run_measured_is_said_so(facts: Facts, tmp_path: Path) -> None:
    nothing = Facts.load(tmp_path)
    for expression in (
        "step_ms[101]",
        "step_ms[101] / published_step_ms[101]",
        "h200-141gb/101 loss.first",
    ):
        assert documents.value(expression, ".1f", nothing) == documents.MISSING
    with pytest.raises(NotMeasured):
        facts.value("published_step_ms[121]")  # ran out of memory
    for path in PAGES:
        documents.render(path.read_text(), nothing)


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("step_ms[199]", "no experiment 199"),
        ("step_s[101]", r"no such quantity; .*step_ms"),
        ("bubbel[101]", r"no such quantity; .*bubble"),
        ("speed[h200-8gpu, 128]", "a reference has no speed"),
        ("step_ms[h200-9gpu, 101]", "no references called"),
        ("step_ms[h200-4gpu, 199]", "0 rows are called so"),
        ("step_ms[101] / 0", "divides by zero"),
        ("step_ms(101)", "no arithmetic over quantities"),
        ("open[x].read()", "no arithmetic over quantities"),
        ("step_ms[101] +", "no arithmetic over quantities"),
        ("h200-141gb/101 step_ms.middle", r"has no step_ms\.middle"),
    ],
)
def test_a_value_that_makes_no_sense(facts: Facts, expression: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        documents.value(expression, ".1f", facts)


def test_a_format_that_makes_no_sense(facts: Facts) -> None:
    with pytest.raises(UserError, match="1q is no format of a number"):
        documents.value("published_step_ms[101]", ".1q", facts)


def test_blocks(facts: Facts) -> None:
    table = documents.block("table", "101 121 128 443", facts)
    assert f"| `101` | one GPU | 1 | {facts.value('memory_gib[101]'):.1f} | 32.5 |" in table
    assert "| `121` | ZeRO-2 | 1 | OOM | OOM |" in table
    assert "472 ms" in table and "A reference, not one of the records" in table
    assert "`443`: published as 446, which ran VPP 3" in table
    assert "8x H200" not in documents.block("table", "101", facts)
    assert "GiB, ms/step" not in documents.block("table", "505", replace(facts, rows=())), (
        "nothing is measured"
    )
    row = facts.row("111")
    companion = replace(
        row,
        experiment=facts.catalog.find("129h"),
        origin=row.origin.with_name("129h.json"),
        published=None,
    )
    assert "publ." not in documents.block("table", "129h", replace(facts, rows=(companion,))), (
        "nothing is published"
    )
    apart = row.result.model_copy(
        update={"memory_gib": row.memory_gib.model_copy(update={"driver": 0.6})}
    )
    for ran, said in (
        (row, "GiB (0.6 GiB are the driver's"),
        (replace(row, result=apart), "<sub>GiB, ms/step"),
    ):
        assert said in documents.block("table", "111", replace(facts, rows=(ran,)))
    memory = documents.block("memory", "111 500", facts).splitlines()
    assert memory[2].startswith("| `111` |") and memory[3].startswith("| `500` |")
    nothing = replace(facts, rows=())
    assert documents.block("memory", "111 500", nothing).endswith(
        "\n\nNone of these is measured yet."
    )
    assert documents.block("table", "601 602", nothing) == "Not measured yet: `601`, `602`.", (
        "no table without a number"
    )
    some = documents.block("table", "111 118 129h", replace(facts, rows=(row,)))
    assert (
        some.endswith("<sub>Not measured yet: `118`, `129h`.</sub><br>")
        and "| `118` |" in some
        and "| `129h` |" not in some
    )
    assert "| MFU" not in documents.block("table", "121 505", facts), "an empty column is left out"
    listed = documents.block("experiments", "408 438", facts)
    assert "The same for all: model gpt2-8.3b, GPUs 8, MBS 4, GBS 32, tokens 1,024." in listed
    assert "| `438` | pp8 vpp3 m8 |" in listed and "`438h` pp4 vpp3 m8" in listed
    assert "| `408` | 8 | 1 | 8 | 4 | 0.875 | 47% | 875 | 467 |" in documents.block(
        "pipeline", "408 498", facts
    )
    assert "**holds" in documents.block("claims", "100", facts)
    with pytest.raises(UserError, match=r"no such block; .*table"):
        documents.render("<!-- tabel: 101 -->\n<!-- /tabel -->", facts)
    with pytest.raises(UserError, match="no experiment 199"):
        documents.block("table", "199", facts)


def test_what_ran_out_of_memory(facts: Facts) -> None:
    memory = documents.block("memory", "121", facts)
    assert memory.endswith("| OOM |"), (
        "what it held when it failed is neither what it needs nor what the formula predicts"
    )
    assert documents.value("memory_gib[121] - allocated_gib[111]", ".1f", facts) == "out of memory"
    fits = replace(
        facts.row("111"),
        experiment=facts.catalog.find("121"),
        origin=RECORDS / "h200-141gb" / "121.json",
    )
    table = documents.block("table", "121", replace(facts, rows=(*facts.rows, fits)))
    assert (
        "| OOM | OOM |" not in table and "`121` runs out of memory with `CARD=h100-80gb`" in table
    )


def test_the_summary_counts_an_experiment_once(facts: Facts) -> None:
    row = facts.row("101")
    again = replace(row, origin=row.origin.with_name("101_cardh100-80gb.json"))
    summary = documents.block("summary", "records", facts)
    assert summary.startswith(
        f"* **Reproduced.** {len({row.id for row in facts.of_hardware})} experiments on 1, 2"
    )
    assert (
        documents.block("summary", "records", replace(facts, rows=(*facts.rows, again))) == summary
    )
    assert documents.block("summary", "records", replace(facts, rows=())) == "No records yet."


def test_pages_give_one_count_of_what_ended_as_published(facts: Facts) -> None:
    """README.md counted experiments and docs/records.md rows: 24 of 24 beside 25 of 25."""
    summary, records = (
        documents.block("summary", "records", facts),
        documents.block("records", "make docs", facts),
    )
    count = re.search(r"(\d+) of the (\d+) with a published row", summary)
    assert f"Ended as published: {count[1]} of the {count[2]} with a published row" in records
    row = facts.row("111")
    twice = [row, replace(row, label="again"), replace(row, state="crash")]
    assert [ended(twice[:n]) for n in (0, 1, 2, 3)] == [
        Ended(0, 0, 0),
        Ended(1, 1, 0),
        Ended(1, 1, 0),
        Ended(1, 0, 0),
    ]


def test_no_page_calls_unmeasured_what_another_quotes(facts: Facts) -> None:
    """601 with a learning rate of its own: docs/data.md quotes its record, docs/06-models.md called it unmeasured."""
    row = next(row for row in facts.rows if row.origin.stem == "601_args")
    ran = replace(facts, rows=(row,))
    said = "Not measured yet: `602`. Measured with other settings only: `601_args` (`docs/records.md`)."
    assert documents.block("table", "601 602", ran) == said
    assert documents.block("memory", "601 602", ran).endswith(f"\n\n{said}")
    for path in documents.PAGES:
        text = path.read_text(encoding="utf-8")
        named = {
            id_
            for line in re.findall(r"Not measured yet: ([^.]*)\.", text)
            for id_ in re.findall(r"`(\d+h?)`", line)
        }
        assert not named & {row.id for row in facts.of_hardware}, path.name


def test_other_hardware_and_another_upstream_have_no_place_in_a_chapter(facts: Facts) -> None:
    row = facts.row("104")
    newer = replace(row, upstream=row.upstream.model_copy(update={"version": "0.20.0"}))
    elsewhere = replace(
        facts.row("101"),
        origin=RECORDS / "h100-80gb" / "101.json",
        gpu_name="NVIDIA H100 80GB HBM3",
    )
    others = replace(facts, rows=(*(r for r in facts.rows if r is not row), newer, elsewhere))
    assert "<sub>Not measured yet: `104`.</sub>" in documents.block("table", "101 104", others)
    assert documents.value("step_ms[101]", ".6f", others) == documents.value(
        "step_ms[101]", ".6f", facts
    )
    assert "| claim | must hold | ours | published |" in documents.block("claims", "100", others)
    assert (
        "Megatron-LM core 0.20.0" in (listed := documents.block("records", "all", others))
        and "### NVIDIA H100" in listed
    )


def test_a_record_that_cannot_be_read_stops_the_documents(tmp_path: Path) -> None:
    folder = tmp_path / "h200-141gb"
    folder.mkdir()
    for path in (RECORDS / "h200-141gb").glob("101.*"):
        (folder / path.name).write_text(
            path.read_text().replace('"steps": 20', '"steps": "twenty"', 1)
        )
    with pytest.raises(
        UserError,
        match=r"cannot be read:\n.*101\.json: skipped: 101\.json: steps: Input should be a valid integer",
    ):
        Facts.load(tmp_path)


def test_check_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- value: published_step_ms[101] .0f -->0<!-- /value -->")
    monkeypatch.setattr(documents, "PAGES", (page,))
    monkeypatch.setattr(documents, "IMAGES", tmp_path)
    monkeypatch.setattr("harness.cli.ROOT", tmp_path)
    assert COMMANDS["docs"](["CHECK=1"]) == 1
    assert ">0<" in page.read_text() and "stale: page.md" in capsys.readouterr().out
    assert COMMANDS["docs"]([]) == 0
    assert ">220<" in page.read_text() and (tmp_path / "diagram-memory.svg").exists()
    assert COMMANDS["docs"](["CHECK=1"]) == 0


def _prose(path: Path) -> str:
    return FENCE.sub("", COMMENT.sub("", path.read_text()))


def _code(path: Path) -> list[str]:
    """Code spans, fenced lines and indented lines."""
    text = COMMENT.sub("", path.read_text())
    blocks = [line.strip() for block in FENCE.finditer(text) for line in block[0].splitlines()]
    return [
        *CODE.findall(FENCE.sub("", text)),
        *blocks,
        *re.findall(r"^    (\S.*)$", text, re.MULTILINE),
    ]


def _targets() -> set[str]:
    rules = (ROOT / "Makefile").read_text() + (ROOT / "experiments" / "targets.mk").read_text()
    return {e.id for e in load_catalog().experiments} | set(
        re.findall(r"^([a-z0-9][\w.-]*):", rules, re.MULTILINE)
    )
