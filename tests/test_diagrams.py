"""Diagrams are well-formed, the same every time, and stay inside their cards."""

import xml.etree.ElementTree as ET

import pytest

from harness import RECORDS
from harness.evidence.facts import Facts
from harness.pages import diagrams, documents
from harness.predict import timeline

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def drawn() -> dict[str, str]:
    return documents.drawings(Facts.load(RECORDS))


def test_the_same_every_time(drawn: dict[str, str]) -> None:
    assert documents.drawings(Facts.load(RECORDS)) == drawn


@pytest.mark.parametrize("name", documents.DRAWINGS)
def test_nothing_leaves_its_card(drawn: dict[str, str], name: str) -> None:
    root = ET.fromstring(drawn[f"diagram-{name}.svg"])
    width, height = (float(root.get(key)) for key in ("width", "height"))
    assert root.find(f"{SVG}title").text == root.get("aria-label")
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


def test_names_are_escaped() -> None:
    drawing = diagrams.Drawing(100, 100, "a < b & c")
    drawing.text(10, 20, "x < y & z")
    root = ET.fromstring(drawing.svg())
    assert root.get("aria-label") == "a < b & c" and root.find(f"{SVG}text").text == "x < y & z"


def test_the_schedule_shows_the_bubbles_of_the_formula(drawn: dict[str, str]) -> None:
    for micro_batches, chunks in ((4, 1), (8, 1), (8, 2)):
        waits = timeline.bubble_fraction(4, micro_batches, chunks)
        assert f"waits {waits:.0%} of the time it works" in drawn["diagram-pp-schedule.svg"]


def test_the_memory_of_a_record_is_drawn_whole(drawn: dict[str, str]) -> None:
    facts = Facts.load(RECORDS)
    for id_ in ("101", "111", "304"):
        assert f"{facts.value(f'memory_gib[{id_}]'):.1f} GiB in use" in drawn["diagram-memory.svg"]


def test_without_records_the_formulas_are_drawn(tmp_path) -> None:
    assert "in use" not in documents.drawings(Facts.load(tmp_path))["diagram-memory.svg"].replace(
        "not in use", ""
    )
