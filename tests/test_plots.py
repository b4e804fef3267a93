"""Figures, pictures and pipeline timelines, from records, runs and published numbers."""

import json
import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path

import pytest

from harness import ROOT
from harness.errors import UserError
from harness.evidence.references import load_references
from harness.evidence.results import collect_runs
from harness.experiment.catalog import load_catalog
from harness.experiment.experiment import Experiment
from harness.pages import plots, schedules
from harness.pages.axes import ticks
from harness.pages.figures import Figure, Panel, Point, Series, load_panels, sweeps, thinned
from harness.pages.report import data, page
from harness.predict.flops import tflops_per_gpu
from harness.predict.timeline import ChunkPass, Times, bubble_fraction, order, simulate
from harness.run.schema import Result, StepMetrics
from harness.run.step_statistics import measure

RECORDS = ROOT / "experiments" / "records"
SIZES = [
    (2, 2, 1),
    (4, 8, 1),
    (8, 1, 1),
    (8, 4, 1),
    (8, 32, 1),
    (4, 4, 2),
    (4, 8, 2),
    (4, 12, 3),
    (8, 8, 9),
    (4, 4, 18),
]


@pytest.mark.parametrize(("stages", "micro_batches", "chunks"), SIZES)
@pytest.mark.parametrize("backward", [1.0, 2.0, 3.5])
def test_the_bubble_is_the_papers(
    stages: int, micro_batches: int, chunks: int, backward: float
) -> None:
    found = simulate(micro_batches, Times.alike(stages, 1.0, backward), chunks)
    assert found.bubble_fraction == pytest.approx((stages - 1) / (chunks * micro_batches))
    assert found.bubble_fraction == pytest.approx(bubble_fraction(stages, micro_batches, chunks))
    assert found.end == pytest.approx((1 + backward) * (micro_batches + (stages - 1) / chunks))


@pytest.mark.parametrize(("stages", "micro_batches", "chunks"), SIZES)
def test_every_pass_runs_once_after_what_it_needs(
    stages: int, micro_batches: int, chunks: int
) -> None:
    found = simulate(micro_batches, Times.alike(stages), chunks)
    ends = {(span.stage, span.work): span for span in found.spans}
    assert len(found.spans) == len(ends) == 2 * stages * micro_batches * chunks
    for stage in range(stages):
        spans = found.of_stage(stage)
        assert all(a.end <= b.start + 1e-9 for a, b in pairwise(spans)), "one thing at a time"
        assert tuple(span.work for span in spans) == order(stage, stages, micro_batches, chunks)
    for (stage, work), span in ends.items():
        chain = work.chunk * stages + stage
        if work.kind == "forward" and chain:
            before = ends[
                (chain - 1) % stages, ChunkPass(work.micro_batch, (chain - 1) // stages, "forward")
            ]
        elif work.kind == "backward" and chain < chunks * stages - 1:
            before = ends[
                (chain + 1) % stages, ChunkPass(work.micro_batch, (chain + 1) // stages, "backward")
            ]
        else:
            before = (
                ends.get((stage, ChunkPass(work.micro_batch, work.chunk, "forward")))
                if work.kind == "backward"
                else None
            )
        assert before is None or before.end <= span.start + 1e-9


def test_warm_up_is_upstreams() -> None:
    """get_pp_rank_microbatches: p - rank - 1 forward passes first, or with chunks 2 (p - rank - 1) + (v - 1) p."""

    def warm_up(stage: int, chunks: int) -> int:
        return [work.kind for work in order(stage, 4, 8, chunks)].index("backward") - 1

    assert [warm_up(stage, 1) for stage in range(4)] == [3, 2, 1, 0]
    assert [warm_up(stage, 2) for stage in range(4)] == [10, 8, 6, 4]


@pytest.mark.cpu
@pytest.mark.parametrize(("stages", "micro_batches", "chunks"), [s for s in SIZES if s[2] > 1])
def test_order_of_chunks_is_upstreams(stages: int, micro_batches: int, chunks: int) -> None:
    schedules = pytest.importorskip("megatron.core.pipeline_parallel.schedules")
    table = schedules.get_schedule_table(micro_batches, chunks, stages)
    found = order(0, stages, micro_batches, chunks)
    assert [(w.micro_batch, w.chunk) for w in found if w.kind == "forward"] == table
    assert [(w.micro_batch, chunks - 1 - w.chunk) for w in found if w.kind == "backward"] == table


@pytest.mark.parametrize(
    ("stages", "micro_batches", "message"),
    [(4, 6, r"micro-batches \(6\) must be divisible by PP \(4\)"), (1, 4, "PP=1")],
)
def test_interleaving_that_upstream_refuses(stages: int, micro_batches: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        simulate(micro_batches, Times.alike(stages), chunks=2)


def test_a_slow_stage_holds_up_the_others() -> None:
    times = Times((1.0, 3.0), (2.0, 6.0))
    found = simulate(2, times)
    assert found.end == 1 + 2 * 9 + 2
    assert found.bubble_fraction == pytest.approx(3 / 18)


def run(outdir: Path, id_: str, changes: dict | None = None, step_ms: float | None = 162.8) -> Path:
    """A finished run of experiment ``id_`` with the numbers of record 101, but for ``changes`` ("gpu", "upstream.version" …).

    Each step takes ``step_ms``; with None, there are no steps.
    """
    content = json.loads((RECORDS / "h200-141gb" / "101.json").read_text())
    overrides = content["experiment"]["overrides"]
    content["experiment"] = load_catalog().find(id_).model_dump(mode="json") | {
        "overrides": overrides
    }
    for path, value in (changes or {}).items():
        *keys, last = path.split(".")
        at = content
        for key in keys:
            at = at[key]
        at[last] = value
    path = outdir / id_
    path.mkdir(parents=True)
    e = Experiment.model_validate_json(json.dumps(content["experiment"]))
    steps = [StepMetrics(step=n, step_ms=step_ms, time=n) for n in range(1, e.steps + 1) if step_ms]
    complete = Result.model_validate(content | measure(e, steps, content["peak_tflops"]))
    (path / "result.json").write_text(complete.model_dump_json())
    (path / "metrics.jsonl").write_text("".join(f"{step.model_dump_json()}\n" for step in steps))
    (path / "experiment.json").write_text(
        json.dumps(content["experiment"] | {"device": content["device"], "commit": None})
    )
    return path


def swept(outdir: Path) -> tuple[Figure, ...]:
    found = collect_runs(outdir, load_references())
    assert not found.warnings
    return sweeps(found, load_references(), load_catalog())


def panel(outdir: Path, title: str, name: str) -> Panel:
    figure = next(figure for figure in swept(outdir) if figure.name == name)
    return next(panel for panel in figure.panels if panel.title.startswith(title))


def line(panel: Panel, line: str, source: str) -> list[Series]:
    return [series for series in panel.series if (series.line, series.source) == (line, source)]


def test_a_companion_that_ran_out_of_memory_on_a_capped_card_is_drawn_and_told(
    tmp_path: Path,
) -> None:
    run(tmp_path, "281h", {"status": "oom", "experiment.card": "h100-80gb"}, step_ms=None)
    figure = next(figure for figure in swept(tmp_path) if figure.name == "200-memory")
    assert [
        note
        for note in figure.notes
        if note.startswith("281h ran out of memory with the GPU's memory capped")
    ]
    (series,) = line(panel(tmp_path, "Sequence parallelism", "200-memory"), "TP 8", "half")
    assert [(point.id, point.value) for point in series.points] == [("281h", None)]


def test_ours_beside_published(tmp_path: Path) -> None:
    run(tmp_path, "101")
    run(tmp_path, "104", {"memory_gib.nvml": 40.0}, step_ms=200.0)
    found = panel(tmp_path, "Replicas", "100-step")
    assert (found.x_title, found.y_title, found.ticks) == (
        "data-parallel size",
        "Step time, ms",
        ("1", "2", "4", "8"),
    )
    (ours,), (published,) = (
        line(found, "replicated, MBS 1", source) for source in ("here", "published")
    )
    assert [(p.id, p.tick, round(p.value, 1)) for p in ours.points] == [
        ("101", "1", 162.8),
        ("104", "4", 200.0),
    ]
    assert [p.value for p in published.points] == [220, 250]
    assert "H200" in ours.where and "H100" in published.where
    memory = panel(tmp_path, "Replicas", "100-memory")
    assert line(memory, "replicated, MBS 1", "here")[0].points[1].value == 40.0


def test_efficiency_is_relative_to_the_fewest_gpus(tmp_path: Path) -> None:
    run(tmp_path, "101")
    run(tmp_path, "104", step_ms=200.0)
    (ours,) = line(panel(tmp_path, "Replicas", "100-efficiency"), "replicated, MBS 1", "here")
    first, second = (
        tflops_per_gpu(load_catalog().find(id_), ms) for id_, ms in (("101", 162.8), ("104", 200.0))
    )
    assert [p.value for p in ours.points] == pytest.approx([100, 100 * second / first])


@pytest.mark.parametrize(
    "change", [{"gpu": "NVIDIA H100 80GB HBM3"}, {"upstream.version": "0.20.0"}]
)
def test_other_hardware_or_upstream_is_another_line(tmp_path: Path, change: dict) -> None:
    run(tmp_path, "101")
    run(tmp_path, "104", change)
    ours = line(panel(tmp_path, "Replicas", "100-step"), "replicated, MBS 1", "here")
    assert [[p.id for p in series.points] for series in ours] in (
        [["101"], ["104"]],
        [["104"], ["101"]],
    )
    assert len({series.where for series in ours}) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"experiment.miniature": True},
        {"experiment.overrides": {"MBS": "1"}},
        {"experiment.extra_args": ["--lr", "1"]},
        {"device": "cpu"},
        {"status": "crash"},
    ],
)
def test_what_does_not_compare_is_not_drawn(tmp_path: Path, change: dict) -> None:
    run(tmp_path, "101", change)
    assert not line(panel(tmp_path, "Replicas", "100-step"), "replicated, MBS 1", "here")


def test_out_of_memory_is_a_point_without_a_value(tmp_path: Path) -> None:
    run(tmp_path, "121", {"status": "oom", "experiment.card": "h100-80gb"}, step_ms=None)
    (ours,) = line(panel(tmp_path, "Replicas", "100-memory"), "ZeRO-2, MBS 16", "here")
    assert ours.points == (Point("121", "1", None),)


def test_a_half_size_row_is_a_line_of_its_own(tmp_path: Path) -> None:
    halves = [e for e in load_catalog().experiments if re.fullmatch(r"4\d\dh", e.id)]
    if not halves:
        pytest.skip("the catalogue has no half-size rows yet")
    for e in halves:
        run(tmp_path, e.id)
    found = [
        s
        for f in swept(tmp_path)
        for p in f.panels
        for s in p.series
        if f.name == "400-step" and s.source == "half"
    ]
    assert {p.id for s in found for p in s.points} <= {e.id for e in halves}
    assert found and all("half size, 4 GPUs" in s.where for s in found)


def test_measured_apart_only_where_nothing_else_is(tmp_path: Path) -> None:
    run(tmp_path, "408")
    found = panel(tmp_path, "Micro-batches", "400-step")
    assert line(found, "PP 8", "here") and not line(found, "PP 8", "reference")


def test_every_published_row_of_the_parallelism_chapters_is_drawn() -> None:
    catalog = load_catalog()
    drawn = {
        str(id_)
        for panels in load_panels(catalog).values()
        for p in panels
        for ids in p.lines.values()
        for id_ in ids
    }
    published = {row.id for row in load_references().published.rows}
    assert published <= drawn


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("100: [{title: A, axis: dp, lines: {a: [999]}}]", "no experiment 999"),
        ("100: [{title: A, axis: ddp, lines: {a: [101]}}]", "unknown axis ddp; known: dp"),
        ("100: [{title: A, lines: {a: [101]}}]", "no axis and words for each"),
        ("100: [{title: A, axis: dp, lines: {a: {101: x}}}]", "an axis and lists of ids"),
        ("100: [{title: A, axes: dp, lines: {a: [101]}}]", "axes"),
        ("100: {title: A}", "plots.yaml"),
        ("100: {title: A}", "100: expected a list of panels"),
        ("100: [5]", "100: expected key: value pairs, found 5"),
        ("[1, 2]", "plots.yaml: expected key: value pairs"),
        ("100: [", "not valid YAML"),
    ],
)
def test_mistakes_in_plots_yaml(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "plots.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_panels(load_catalog(), path)


def test_thinned_curves_keep_ends_and_spikes() -> None:
    values = dict.fromkeys(range(1, 5001), 1.0) | {2345: 9.0, 3456: -9.0}
    curve = thinned("a", values, most=100)
    assert len(curve.steps) <= 100
    assert (curve.steps[0], curve.steps[-1]) == (1, 5000)
    assert {9.0, -9.0} <= set(curve.values)
    assert list(curve.steps) == sorted(set(curve.steps))
    assert thinned("b", {1: 2.0, 2: 1.0}).values == (2.0, 1.0)


def test_pictures_are_whole_and_the_same_every_time(tmp_path: Path) -> None:
    drawn, warnings = plots.pictures(None, RECORDS)
    assert not warnings and drawn == plots.pictures(None, RECORDS)[0]
    for name, svg in drawn.items():
        root = ElementTree.fromstring(svg)
        assert root.get("aria-label") and len(svg) < 60_000, name
        width, height = (float(root.get(key)) for key in ("width", "height"))
        for text in root.iter("{http://www.w3.org/2000/svg}text"):
            if text.get("x"):
                assert 0 <= float(text.get("x")) <= width and 0 < float(text.get("y")) < height, (
                    name,
                    text.text,
                )
        assert not re.search(r'"[^"]*\b(nan|inf|None)\b[^"]*"', svg.partition("</style>")[2])


def test_pictures_without_any_record(tmp_path: Path) -> None:
    drawn, _ = plots.pictures(tmp_path, tmp_path)
    assert "400-step.svg" in drawn and "600-loss.svg" not in drawn


def test_a_timeline_by_formula_says_so(tmp_path: Path) -> None:
    drawn, _ = plots.pictures(tmp_path, tmp_path)
    for name in ("400-timeline-1f1b.svg", "400-timeline-interleaved.svg"):
        assert (
            "Times: by formula for NVIDIA H100 80GB HBM3" in drawn[name]
            and "time, ms" in drawn[name]
        )
    assert (
        "87.5%" in drawn["400-timeline-1f1b.svg"]
        and "29.2%" in drawn["400-timeline-interleaved.svg"]
    )


def profile(folder: Path, id_: str, forward_ms: float, **changes: object) -> None:
    """A recorded profile of ``id_`` in which each stage's backward takes 3 times its forward, stage by stage 1 ms longer."""
    e = load_catalog().find(id_)
    ranks = [
        {
            "rank": stage,
            "coordinates": {"pp": stage},
            "device": "cuda",
            "steps": 2,
            "step_ms": 1.0,
            "categories": {},
            "phases": {},
            "communication_ms": 0.0,
            "hidden_ms": 0.0,
            "kernels": [],
            "forward_pass": {
                "ms": (forward_ms + stage) / e.vpp,
                "calls": e.num_microbatches * e.vpp,
            },
            "backward_pass": {
                "ms": 3 * (forward_ms + stage) / e.vpp,
                "calls": e.num_microbatches * e.vpp,
            },
        }
        for stage in range(e.pp)
    ]
    content = {
        "label": id_,
        "gpu": "NVIDIA H200",
        "first_step": 8,
        "last_step": 9,
        "untraced_step_ms": None,
        "ranks": ranks,
        "experiment": e.model_dump(mode="json") | {"overrides": {"PROFILE": "1"}},
    } | changes
    path = folder / "h200-141gb" / "profiles" / f"{id_}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_timelines_are_drawn_from_measured_stage_times(tmp_path: Path) -> None:
    for id_ in ("408", "438"):
        profile(tmp_path, id_, 10.0)
    found = schedules.pair(load_catalog(), schedules.load_profiles(None, tmp_path))
    assert [one.timeline.chunks for one in found] == [1, 3] and len(
        {one.until for one in found}
    ) == 1
    for one in found:
        for stage in range(8):
            spans = one.timeline.of_stage(stage)
            assert sum(s.end - s.start for s in spans) == pytest.approx(8 * 4 * (10 + stage))
        svg = plots.timeline(one)
        assert (
            "measured: how long each stage computes in steps 8 to 9 of 4" in svg
            and "time, ms" in svg
            and "assumed" not in svg
        )


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 100, [0, 20, 40, 60, 80, 100]),
        (0, 77.3, [0, 20, 40, 60, 80]),
        (2.9, 10.8, [2, 4, 6, 8, 10, 12]),
        (0.001, 0.0042, [0.001, 0.002, 0.003, 0.004, 0.005]),
        (5, 5, [5, 5.2]),
        (0, 6e40, [0, 1e40, 2e40, 3e40, 4e40, 5e40, 6e40]),
    ],
)
def test_ticks_are_round_and_reach_both_ends(low, high, expected) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_plots_and_report_say_the_same_about_a_timeline() -> None:
    """Legend, ticks and bubble were written once in Python and once in JavaScript."""
    for one in schedules.pair(load_catalog(), {}):
        drawn, shown = plots.timeline(one), data._timeline(one)
        texts = re.findall(r"<text[^>]*>([^<]*)</text>", drawn)
        assert all(key["words"] in texts for key in shown["keys"])
        assert all(f"{tick:g}" in texts for tick in shown["ticks"]) and len(shown["ticks"]) > 3
        assert shown["axis_title"] in texts and set(one.caption) <= set(texts)
        assert shown["caption"] == " ".join(one.caption)
    scripts = "".join(path.read_text() for path in page.FOLDER.glob("*.js"))
    assert not re.search(r"Narayanan|OOM as published|odd chunk|2\.5", scripts)


def test_one_profiled_pipeline_of_the_pair_is_not_enough(tmp_path: Path) -> None:
    profile(tmp_path, "408", 10.0)
    assert all(
        "by formula" in one.times_from
        for one in schedules.pair(load_catalog(), schedules.load_profiles(tmp_path, tmp_path))
    )


@pytest.mark.parametrize(
    "other",
    [
        {"overrides": {"PROFILE": "1", "RECOMPUTE": "full"}},
        {"extra_args": ["--x"]},
        {"miniature": True},
    ],
)
def test_profiles_of_other_work_are_not_drawn(tmp_path: Path, other: dict) -> None:
    for id_ in ("408", "438"):
        profile(
            tmp_path, id_, 10.0, experiment=load_catalog().find(id_).model_dump(mode="json") | other
        )
    assert all(
        "by formula" in one.times_from
        for one in schedules.pair(load_catalog(), schedules.load_profiles(tmp_path, tmp_path))
    )


@pytest.mark.parametrize(
    "changes", [{"ranks": []}, {"ranks": "?"}, {"experiment": {}}, {"experiment": None}]
)
def test_profiles_that_say_nothing_about_stages(tmp_path: Path, changes: dict) -> None:
    for id_ in ("408", "438"):
        profile(tmp_path, id_, 10.0, **changes)
    assert all(
        "by formula" in one.times_from
        for one in schedules.pair(load_catalog(), schedules.load_profiles(tmp_path, tmp_path))
    )


def test_runs_out_of_memory_are_marked_in_the_order_of_their_ticks() -> None:
    """A set of ticks had another order in each process, and the picture other bytes."""
    sizes = ("1", "2", "4", "8", "16", "32", "64")
    points = tuple(Point(tick, tick, None) for tick in sizes)
    series = Series("line", "here", "NVIDIA H200", points)
    panel = Panel("title", "dp", "GiB", sizes, True, (series,))
    svg = plots.sweep(Figure("name", 100, "title", (panel,)))
    places = [float(x) for x in re.findall(r'<text x="([\d.]+)"[^>]*>OOM<', svg)]
    assert len(places) == len(sizes) and places == sorted(places)


def test_only_what_changed_is_written(tmp_path: Path) -> None:
    assert [
        p.name for p in plots.write(tmp_path / "new", {"a.svg": "<svg/>", "b.svg": "<svg/>"})
    ] == ["a.svg", "b.svg"]
    assert [
        p.name for p in plots.write(tmp_path / "new", {"a.svg": "<svg/>", "b.svg": "<svg></svg>"})
    ] == ["b.svg"]


def test_a_file_that_was_not_drawn_here_stays(tmp_path: Path) -> None:
    (tmp_path / "b.svg").write_text("mine")
    with pytest.raises(UserError, match=r"b\.svg is no picture that was drawn here"):
        plots.write(tmp_path, {"a.svg": "<svg/>", "b.svg": "<svg/>"})
    assert (tmp_path / "b.svg").read_text() == "mine"


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        plots.write(tmp_path / "file" / "plots", {"a.svg": "<svg/>"})


def test_the_pictures_in_docs_are_fresh() -> None:
    drawn, _ = plots.pictures(None, RECORDS)
    for name, svg in drawn.items():
        path = plots.IMAGES / name
        assert path.exists() and path.read_text() == svg, f"{path.name} is stale: run `make docs`"
