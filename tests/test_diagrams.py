"""Diagrams are well-formed, the same every time, stay inside their cards and show what the formulas give."""

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from harness import RECORDS, ROOT
from harness.evidence.facts import Facts
from harness.experiment.catalog import load_catalog
from harness.experiment.constraints import with_changes
from harness.pages import diagrams, drawing
from harness.predict import timeline
from harness.predict.flops import state_of_parameter

SVG = "{http://www.w3.org/2000/svg}"
FILES = sorted((ROOT / "docs" / "images").glob("diagram-*.svg"))


@pytest.fixture(scope="module")
def facts() -> Facts:
    return Facts.load(RECORDS)


def by_hand(name: str) -> str:
    return (ROOT / "docs" / "images" / f"diagram-{name}.svg").read_text()


def test_the_same_every_time(facts: Facts) -> None:
    assert diagrams.drawings(Facts.load(RECORDS)) == diagrams.drawings(facts)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_nothing_leaves_its_card(path: Path) -> None:
    root = ET.fromstring(path.read_text())
    width, height = (float(root.get(key)) for key in ("width", "height"))
    assert root.find(f"{SVG}title").text == root.get("aria-label")
    assert "@media (prefers-color-scheme: dark)" in root.find(f"{SVG}style").text
    for shape in root.iter(f"{SVG}rect"):
        x, y, w, h = (float(shape.get(key)) for key in ("x", "y", "width", "height"))
        assert x >= 0 and y >= 0 and x + w <= width and y + h <= height and w >= 0 and h >= 0
    for text in root.iter(f"{SVG}text"):
        assert text.text
        size, x = float(text.get("font-size")), float(text.get("x"))
        length = 0.6 * size * len(text.text)
        left = {"start": x, "middle": x - length / 2, "end": x - length}[text.get("text-anchor")]
        assert left >= 0 and left + length <= width + 60, text.text
        assert size <= float(text.get("y")) <= height - 4


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_class_has_a_colour_in_light_and_in_dark(path: Path) -> None:
    root = ET.fromstring(path.read_text())
    light, dark = root.find(f"{SVG}style").text.split("@media")
    used = {name for shape in root.iter() for name in (shape.get("class") or "").split()}
    assert not [name for name in used if f".{name} {{" not in light]
    assert not [name for name in used - {"pale"} if f".{name} {{" not in dark]


def test_names_are_escaped() -> None:
    drawn = drawing.Drawing(100, "a < b & c")
    drawn.text(10, 20, "x < y & z")
    root = ET.fromstring(drawn.svg())
    assert root.get("aria-label") == "a < b & c" and root.find(f"{SVG}text").text == "x < y & z"


def test_the_schedule_shows_the_bubbles_of_the_formula() -> None:
    for micro_batches, chunks in ((4, 1), (8, 1), (8, 2)):
        bubble = timeline.bubble_fraction(4, micro_batches, chunks)
        assert f"bubble {bubble:.0%} of compute time" in by_hand("pp-schedule")


def test_the_shards_show_the_bytes_of_the_formula() -> None:
    experiment = load_catalog().find("114")
    shardings = ("no_shard", "optim", "fsdp_optim_grads", "fsdp_optim_grads_params")
    for sharding in shardings:
        state = state_of_parameter(with_changes(experiment, sharding=sharding), experiment.dp)
        assert f">{state.total:g} bytes a parameter<" in by_hand("dp-shards")


def test_the_memory_of_a_record_is_drawn_whole(facts: Facts) -> None:
    drawn = diagrams.memory(facts).svg()
    for id_ in ("101", "111", "304"):
        assert f"{facts.value(f'memory_gib[{id_}]'):.1f} GiB in use" in drawn


def test_without_records_the_formulas_are_drawn(tmp_path: Path) -> None:
    drawn = diagrams.memory(Facts.load(tmp_path)).svg()
    assert "in use" not in drawn and ">111<" in drawn
