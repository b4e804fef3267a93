"""Rows as text: terminal at several widths, Markdown, CSV, JSON; two runs side by side."""

import csv
import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from harness import ROOT
from harness.errors import UserError
from harness.evidence import columns, compare, tables
from harness.evidence.references import load_references
from harness.evidence.rows import Row
from harness.experiment import overrides
from harness.experiment.catalog import load_catalog
from harness.planning.miniature import miniature
from harness.run.schema import Result

CATALOG = load_catalog()
GROUP = load_references().published
OK = {
    "status": "ok",
    "exit_code": 0,
    "started": 1.0,
    "finished": 2.0,
    "steps": 100,
    "steps_done": 100,
    "window": [6, 100],
    "step_ms": {
        "median": 376.3,
        "q1": 375.0,
        "q3": 377.6,
        "mean": 377.0,
        "stdev": 1.5,
        "min": 370.0,
        "max": 390.0,
        "n": 95,
    },
    "tflops": 400.0,
    "memory_gib": {"allocated": 70.1, "reserved": 74.0, "nvml": 76.3},
    "loss": {"first": 10.9, "last": 9.1},
    "data": "mock",
    "device": "cuda",
    "upstream": {"version": "0.19.0", "source": "submodule"},
}


def row(id_="111", gpu="NVIDIA H200", settings=None, small=False, **changes) -> Row:
    e = overrides.apply(CATALOG.find(id_), settings or {})
    e = miniature(e) if small else e
    result = Result.model_validate(OK | {"status": changes.pop("state", "ok")} | changes)
    same = not small and not set(e.overrides) - {"STEPS", "CARD"}
    return Row(
        label=e.label,
        experiment=e,
        state=result.status,
        device="cpu" if small else "cuda",
        kind="run",
        origin=Path("outdir", e.label),
        gpu_name=None if small else gpu,
        result=result,
        steps_done=result.steps_done,
        published=GROUP.matching(id_) if same else None,
        against=GROUP if same else None,
        upstream=result.upstream,
    )


def line_of(text: str, start: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(start))


def test_a_run_is_printed_beside_the_published_row():
    text = tables.render([row()], width=160, titles={100: "Data parallelism"})
    foretold = f"{row().predicted_step_ms:.1f}"
    assert "formula: ms/step predicted" in text
    assert line_of(text, "111").split() == [
        "111",
        "gpt2xl-dp1-fit-80GB",
        "1",
        "76.3",
        "76.7",
        "0.99",
        "376.3",
        "1.3",
        "393",
        "0.96",
        foretold,
        "400",
        "40.4%",
        "6-100",
        "1",
        "mock",
        "ok",
    ]
    assert text.startswith("NVIDIA H200\n id  experiment")
    assert "\n100 Data parallelism\n" in text


def test_the_footer_says_how_numbers_were_made():
    text = re.sub(r"\s+", " ", tables.render([row()], width=100))
    for said in (
        "median over the steps named in column steps; ±: half their interquartile range",
        "MFU = TFLOP/s / 989.5, the dense bf16 peak of NVIDIA H200 (NVIDIA H200 Tensor Core GPU datasheet)",
        "Here: NVIDIA H200, Megatron-LM core 0.19.0.",
        "publ.: 8x H100 80GB SXM5, Megatron-LM core_v0.14",
        "Source: megatron-tutorials",
        "synthetic tokens in place of openwebtext-10k",
        "Ended as published: 1 of the 1 with a published row.",
    ):
        assert said in text
    unpredictable = row(settings={"ARGS": "--manual-gc"})
    assert "formula: ms/step" in text
    assert "formula: ms/step" not in tables.render([unpredictable])


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
def test_a_narrow_terminal_gets_the_important_columns(width):
    rows = [row(id_) for id_ in ("111", "443", "449", "458")]
    rows += [row("121", state="oom", settings={"CARD": "h100-80gb"})]
    lines = tables.render(rows, width=width).splitlines()
    assert max(map(len, lines)) <= max(width, 58)
    head = next(line for line in lines if "experiment" in line)
    assert all(title in head for title in ("id", "experiment", "ms/step", "status"))
    assert (f"Left out at {width} columns" in "\n".join(lines)) == (width < 140)


def test_a_record_says_so():
    kept = replace(row(), kind="record", label="h200-141gb/111_cardh100-80gb")
    assert "gpt2xl-dp1-fit-80GB_cardh100-80gb (record)" in line_of(
        tables.render([kept], width=200), "111"
    )


def test_out_of_memory_as_published_counts():
    oom = row("121", state="oom", settings={"CARD": "h100-80gb"}, step_ms=None, window=None)
    text = tables.render([oom, row()])
    assert "OOM as published" in line_of(text, "121")
    assert "Ended as published: 2 of the 2 with a published row, 1 of them out of memory." in text


@pytest.mark.parametrize(
    ("id_", "state", "settings", "status", "note"),
    [
        ("111", "oom", {}, "OOM (publ. ran) [1]", "rank 3: it broke; mend it"),
        ("115", "oom", {}, "  OOM [1] [2]", "115: published as 115, but what ran is unknown"),
        (
            "121",
            "ok",
            {},
            "ok (publ. OOM) [1]",
            "143,771 MiB here, more than published; CARD=h100-80gb",
        ),
        ("408", "crash", {}, "crash at 7/100 [1]", "rank 3: it broke; mend it"),
        ("408", "hang", {}, "hang at 7/100 [1]", "rank 3: it broke; mend it"),
        ("408", "nan", {}, "NaN at 7/100 [1]", "rank 3: it broke; mend it"),
        ("111", "ok", {"MBS": "5"}, "ok [1]", "MBS=5: not the published work"),
        ("443", "ok", {}, "ok [1]", "443: published as 446, which ran VPP 3"),
    ],
)
def test_what_a_reader_must_know_stands_in_notes(id_, state, settings, status, note):
    odd = row(
        id_,
        settings=settings,
        state=state,
        rank=3,
        detail="it broke",
        advice="mend it",
        steps_done=7,
    )
    text = tables.render([odd if state != "ok" else row(id_, settings=settings)], width=200)
    assert line_of(text, id_).endswith(status)
    assert note in line_of(text, "[1]")


def test_numbers_in_doubt_are_marked_and_get_no_ratio():
    text = tables.render([row("115")], width=200)
    assert "63.3?" in text and "415?" in text
    assert "0.9" not in line_of(text, "115")
    assert "A number with ? is in doubt" in text


def test_a_run_without_nvml_says_so_and_gets_no_ratio():
    text = tables.render(
        [row(memory_gib={"allocated": 70.1, "reserved": 74.0}), row("114")], width=200
    )
    assert "NVML could not be read: the used memory is unknown" in line_of(text, "[1]")
    assert line_of(text, "111").split()[2:5] == ["1", "76.7", "376.3"]  # no GiB, no ratio


def test_two_runs_of_other_upstream_versions_do_not_compare():
    older = row(upstream={"version": "0.14.0", "source": "submodule"})
    said = compare.render_compare(row(), older)
    assert "Different upstream (Megatron-LM core 0.19.0, Megatron-LM core 0.14.0)" in said
    assert "Different upstream" not in compare.render_compare(row(), row())


def test_runs_that_shared_the_node_say_so():
    text = tables.render([row(packed_with=["101", "104"])], width=200)
    assert line_of(text, "111").split()[14] == "3"
    assert "runs on the node at the same time" in text


def test_miniatures_and_kinds_of_gpu_never_share_a_table():
    rows = [row(small=True, device="cpu"), row(gpu="NVIDIA L40S"), row(), row("101")]
    text = tables.render(rows, width=200)
    blocks = text.split("\n\n")
    titles = [block.splitlines()[0] for block in blocks if "experiment" in block]
    assert titles == ["NVIDIA H200", "NVIDIA L40S", "CPU miniature (not comparable with GPU runs)"]
    cpu = blocks[-2]
    assert "MFU" not in cpu and "publ." not in cpu and "ranks" in cpu and "10.900 → 9.100" in cpu


def test_an_unknown_gpu_says_why_there_is_no_mfu():
    assert "No MFU: harness/experiment/hardware.py has no peak of NVIDIA X1" in tables.render(
        [row(gpu="NVIDIA X1")]
    )


def test_running_and_killed_show_how_far_they_came():
    unfinished = replace(row("408"), result=None, steps_done=12)
    assert line_of(tables.render([replace(unfinished, state="running")]), "408").endswith(
        "running at 12/100"
    )
    assert line_of(tables.render([replace(unfinished, state="killed")]), "408").endswith(
        "killed at 12/100"
    )


def test_colour_changes_nothing_but_colour():
    rows = [row(), row("121"), row("408", state="crash", detail="x")]
    plain, painted = tables.render(rows), tables.render(rows, colour=True)
    assert plain != painted
    assert re.sub(r"\033\[\d+m", "", painted) == plain


def test_markdown_is_a_table_for_each_chapter():
    text = tables.render([row(), row("408")], "markdown", titles={100: "Data"})
    assert "**100 Data**" in text and "**400**" in text
    head = line_of(text, "| id ")
    assert all(
        line.count("|") == head.count("|") for line in text.splitlines() if line.startswith("|")
    )


def test_csv_and_json_hold_the_same_plain_values():
    rows = [
        row(),
        row("115"),
        row("121", state="oom", step_ms=None),
        replace(row("408"), result=None),
        row("611"),
    ]
    parsed = json.loads(tables.render(rows, "json"))
    assert [line["id"] for line in parsed] == ["111", "115", "121", "408", "611"]
    assert parsed[0]["step_ms"] == 376.3 and parsed[0]["published_step_ms"] == 393
    assert parsed[0]["as_published"] is True
    assert parsed[0]["mfu"] == pytest.approx(400 / 989.5)
    assert parsed[1]["step_ratio"] is None and parsed[1]["published_ran"] == "unknown"
    lines = list(csv.DictReader(io.StringIO(tables.render(rows, "csv"))))
    assert [line["published_oom"] for line in lines] == ["False", "False", "True", "False", ""]
    assert lines[0].keys() == parsed[0].keys() == columns.VALUES.keys()


def test_without_runs_it_says_how_to_make_one():
    assert tables.render([]) == tables.render([], "markdown") == "no runs yet: make 101"
    assert json.loads(tables.render([], "json")) == []
    assert tables.render([], "csv").startswith("hardware,chapter,id")


def test_unknown_formats_are_refused():
    with pytest.raises(UserError, match="FORMAT=markdwon; did you mean markdown"):
        tables.render([], "markdwon")
    with pytest.raises(UserError, match="FORMAT=csv"):
        compare.render_compare(row(), row(), "csv")


def with_losses(folder: Path, name: str, values: list[float], **changes) -> Row:
    run = folder / name
    run.mkdir()
    lines = [{"step": n, "loss": loss, "step_ms": 1, "time": 1} for n, loss in enumerate(values, 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return replace(row(**changes), origin=run, label=name)


def test_compare_shows_what_differs(tmp_path):
    a = with_losses(tmp_path, "one", [11.0, 10.0], id_="443")
    b = with_losses(tmp_path, "two", [11.0, 10.0], id_="446", tflops=300.0)
    text = compare.render_compare(a, b)
    assert line_of(text, "vpp").split() == ["vpp", "3", "6"]
    assert line_of(text, "tflops").split() == ["tflops", "400", "300", "0.750"]
    assert not re.search("^hidden_size|^tp ", text, re.MULTILINE)
    assert "losses: equal over steps 1 to 2" in text
    assert line_of(compare.render_compare(a, b, "markdown"), "| vpp ") == "| vpp | 3 | 6 |  |"
    values = json.loads(compare.render_compare(a, b, "json"))
    assert values["settings"]["vpp"] == {"a": 3, "b": 6}
    assert values["numbers"]["tflops"]["ratio"] == 0.75


def test_compare_says_from_where_losses_part(tmp_path):
    a = with_losses(tmp_path, "one", [11.0, 10.0, 9.0])
    b = with_losses(tmp_path, "two", [11.0, 10.00001, 9.001, 8.0])
    assert "settings: the same" in compare.render_compare(a, a)
    text = compare.render_compare(a, b)
    assert "losses: equal" not in text
    assert "over steps 1 to 3 the largest relative difference is 1.1e-04, at step 3" in text
    assert "no step in common" in compare.render_compare(row(), row())


def test_compare_warns_of_different_hardware():
    assert "Different hardware" in compare.render_compare(row(), row(small=True))


def test_make_table_prints_the_rest_where_a_file_is_corrupt(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tables, "RECORDS", tmp_path)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "result.json").write_text("{")
    assert tables.print_table({"OUTDIR": str(tmp_path)}) == 1
    out, err = capsys.readouterr()
    assert out == "no runs yet: make 101\n"
    assert err.startswith("warning: ") and "skipped" in err
    with pytest.raises(UserError, match="CHAPTER=x: expected a number"):
        tables.print_table({"OUTDIR": str(tmp_path), "CHAPTER": "x"})


def test_tables_are_made_without_torch_matplotlib_or_rich():
    code = "import sys, harness.evidence.tables; print({'torch', 'matplotlib', 'rich'} & sys.modules.keys())"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "set()"


def test_make_compare_names_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RECORDS", tmp_path)
    with pytest.raises(UserError, match="no run or record is called 101; no runs yet: make 101"):
        compare.print_compare({"OUTDIR": str(tmp_path), "A": "101", "B": "111"})
