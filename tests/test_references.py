"""experiments/references.yaml and its reader."""

import re

import pytest
import yaml

from harness.errors import UserError
from harness.evidence.references import REFERENCES, load_references
from harness.experiment.catalog import load_catalog
from harness.experiment.hardware import find_card

CATALOG = load_catalog()
GROUPS = load_references().groups
PUBLISHED = load_references().published


def test_every_published_experiment_has_its_row_and_219_none():
    tutorials = {e.id for e in CATALOG.experiments if e.chapter <= 500 and not e.half_of}
    assert {row.id for row in PUBLISHED.rows} == tutorials - {"219"}


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.name)
def test_rows_name_experiments_of_the_catalogue(group):
    for row in group.rows:
        for id_ in filter(None, (row.id, row.stands_for)):
            assert CATALOG.find(id_).id == id_
        if row.id and row.gpus:
            assert CATALOG.find(row.id).world_size == row.gpus, row.id


def test_rows_stand_beside_the_experiment_that_ran_the_same():
    for row in PUBLISHED.rows:
        if ran := re.fullmatch(r"vpp(\d+)", row.ran or ""):
            assert CATALOG.find(row.stands_for).vpp == int(ran[1]), row.id
        elif row.ran is None:
            assert row.stands_for == row.id


def test_the_intended_443_is_compared_with_the_run_that_had_three_virtual_stages():
    beside = PUBLISHED.matching("443")
    assert (beside.reference.id, beside.reference.ran, beside.reference.step_ms) == (
        "446",
        "vpp3",
        665,
    )
    assert "published as 446, which ran VPP 3" in beside.remarks[0]
    assert "the row published as 443 ran VPP 6 and stands beside 446" in beside.remarks[1]


def test_an_experiment_whose_published_run_was_another_has_none():
    beside = PUBLISHED.matching("458")
    assert beside.reference is None
    assert "ran VPP 1 and stands beside 424" in beside.remarks[0]
    assert PUBLISHED.matching("424").reference.id == "424"
    assert "the row published as 458 ran the same: 895 ms" in PUBLISHED.matching("424").remarks[0]


@pytest.mark.parametrize("id_", ["115", "449", "498"])
def test_rows_of_unknown_settings_are_in_doubt_and_say_why(id_):
    beside = PUBLISHED.matching(id_)
    assert beside.reference.in_doubt
    assert "unknown" in beside.remarks[0] and beside.reference.note in beside.remarks[0]


def test_out_of_memory_rows_are_those_published():
    assert {row.id for row in PUBLISHED.rows if row.oom} == {"121", "281", "301", "505"}


def test_numbers_are_possible_on_the_hardware_they_are_from():
    for group in GROUPS:
        for row in group.rows:
            assert row.oom or 0 < row.memory_gib * 1024 < find_card(group.gpu).memory_mib


def test_variants_are_never_shown_beside_the_plain_experiment():
    group = load_references().group("h200-4gpu")
    assert group.matching("101") is None
    assert group.matching("111").reference.step_ms == 376.3


def broken(tmp_path, change):
    content = yaml.safe_load(REFERENCES.read_text(encoding="utf-8"))
    change(content["h100-tutorial"])
    path = tmp_path / "references.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_references(path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": 101, "memory_gb": 1}, "101: unknown key 'memory_gb'; did you mean memory_gib"),
        ({"id": 102, "memory_gib": "32", "step_ms": 1}, "102: memory_gib = '32': input should be"),
        ({"id": 102, "step_ms": 1}, "102: give step_ms and memory_gib, or oom: true"),
        ({"id": 102, "step_ms": 1, "oom": True}, "102: give step_ms and memory_gib, or oom: true"),
        (
            {"id": 102, "step_ms": 1, "memory_gib": 1, "oom": True},
            "102: give step_ms and memory_gib, or oom",
        ),
        ({"id": 101, "oom": True}, "101 has two rows"),
        ({"id": 102, "oom": True, "stands_for": 104}, "102: stands_for 104 needs ran"),
        ({"id": 102, "oom": True, "ran": "unknown"}, "102: ran: unknown needs a note"),
        ({"oom": True}, "give either the id of an experiment or a workload"),
    ],
)
def test_a_wrong_row_is_refused(tmp_path, row, message):
    assert message in broken(tmp_path, lambda group: group["rows"].append(row))


def test_a_wrong_group_is_refused(tmp_path):
    assert "gpu = 'h100': unknown GPU" in broken(tmp_path, lambda group: group.update(gpu="h100"))
    assert "exactly one group must be published: true; found none" in broken(
        tmp_path, lambda group: group.pop("published")
    )
    assert "h100-tutorial: 'software' is missing" in broken(
        tmp_path, lambda group: group.pop("software")
    )
    assert "rows must be a list" in broken(tmp_path, lambda group: group.update(rows={"101": {}}))


@pytest.mark.parametrize(
    "text", ["- 1\n", "a: [", "a: 1\n", "a: {hardware: x}\na: {hardware: y}\n"]
)
def test_a_file_that_is_something_else_is_refused(tmp_path, text):
    path = tmp_path / "references.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"references\.yaml"):
        load_references(path)
    with pytest.raises(UserError, match="cannot read"):
        load_references(tmp_path / "absent.yaml")
