"""Every YAML file that people write, damaged in every kind of place: it is read, or refused with its name; nothing else."""

import random
import shutil
from pathlib import Path

import pytest
import yaml

from harness import ROOT
from harness.data import definitions
from harness.errors import UserError
from harness.evidence import published, workloads
from harness.evidence.claims import load_claims
from harness.evidence.references import load_references
from harness.experiment.catalog import load_catalog
from harness.launching import clusters
from harness.pages.figures import load_panels
from harness.predict import calibrations, rates

EXPERIMENTS = ROOT / "experiments"
ODD = (
    None,
    [],
    ["x"],
    {},
    {"a": 1},
    {1: 2},
    5,
    -1,
    1.5,
    True,
    "x",
    "",
    [[1]],
    [None],
    {"x": ["y"]},
    10**30,
    float("nan"),
)


def catalog(path: Path):
    return load_catalog.__wrapped__(path.parent)


def rules(path: Path):
    pytest.importorskip("numpy", reason="the set-up stage `data` is not installed")
    from harness.data.clean.rules import load_rules

    return load_rules(path)


READERS = {
    EXPERIMENTS / "models.yaml": catalog,
    EXPERIMENTS / "100-data-parallel.yaml": catalog,
    EXPERIMENTS / "600-models.yaml": catalog,
    EXPERIMENTS / "references.yaml": load_references,
    EXPERIMENTS / "claims.yaml": lambda path: load_claims(load_catalog(), path),
    EXPERIMENTS / "plots.yaml": lambda path: load_panels(load_catalog(), path),
    EXPERIMENTS / "calibrations.yaml": lambda path: calibrations.load.__wrapped__(path),
    EXPERIMENTS / "published.yaml": published.load,
    EXPERIMENTS / "rates.yaml": rates.published.__wrapped__,
    EXPERIMENTS / "recipes.yaml": workloads.listed,
    clusters.FOLDER / "lumi-g.yaml": clusters.read,
    ROOT / "data" / "datasets.yaml": definitions.definitions,
    ROOT / "data" / "rules-sv.yaml": rules,
}


def test_every_yaml_file_is_here() -> None:
    chapters = set(EXPERIMENTS.glob("[1-9]*.yaml"))
    assert {*EXPERIMENTS.glob("*.yaml"), *(ROOT / "data").glob("*.yaml")} - chapters <= set(READERS)


@pytest.fixture
def place(tmp_path: Path, request) -> Path:
    """A copy of the file, chapters and models beside it where it is one of them."""
    for path in EXPERIMENTS.glob("*.yaml"):
        shutil.copy(path, tmp_path)
    return Path(shutil.copy(request.param, tmp_path))


def places(value, at=()):
    """The way to every value inside: keys and numbers."""
    yield at
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inside in items:
        yield from places(inside, (*at, key))


def changed(content, way, odd, as_key: bool):
    """``content`` with ``odd`` at the end of ``way``: as the value there, or as its key."""
    if not way:
        return odd
    first, *rest = way
    copy = dict(content) if isinstance(content, dict) else list(content)
    if rest or not as_key or isinstance(content, list):
        copy[first] = changed(content[first], rest, odd, as_key)
    else:
        copy[odd if not isinstance(odd, (list, dict)) else 7] = copy.pop(first)
    return copy


@pytest.mark.parametrize("place", READERS, indirect=True, ids=lambda path: path.stem)
def test_damage_is_refused_with_the_name_of_the_file(place: Path, request) -> None:
    read, content, chance = (
        READERS[request.node.callspec.params["place"]],
        yaml.safe_load(place.read_text()),
        random.Random(14),
    )
    ways = list(places(content))
    for _ in range(25):
        damaged = changed(content, chance.choice(ways), chance.choice(ODD), chance.random() < 0.3)
        place.write_text(yaml.safe_dump(damaged, sort_keys=False, allow_unicode=True))
        try:
            read(place)
        except UserError as error:
            named = place.name in str(error) or (
                place.name == "models.yaml" and ".yaml, line" in str(error)
            )
            assert named, "of a wrong model the row that it does not fit may be named"


@pytest.mark.parametrize("place", READERS, indirect=True, ids=lambda path: path.stem)
@pytest.mark.parametrize(("line", "said"), [
    ("? [a]\n: 1", "a sequence is no key; write `name: value`"), ("? {a: 1}\n: 1", "a mapping is no key"), ("{a: 1}: 2", "a mapping is no key"),
    ("yes: 1", "'yes' is no key but a bool; write 'yes': to make it a word"), ("1.5: 1", "'1.5' is no key but a float"),
    ("~: 1", "'~' is no key but a null"), ("2024-01-01: 1", "'2024-01-01' is no key but a timestamp"),
])  # fmt: skip
def test_a_key_that_is_none_is_refused_with_its_line(
    place: Path, request, line: str, said: str
) -> None:
    text = place.read_text(encoding="utf-8").rstrip("\n")
    place.write_text(f"{text}\n{line}\n", encoding="utf-8")
    with pytest.raises(UserError) as refused:
        READERS[request.node.callspec.params["place"]](place)
    number = len(text.splitlines()) + 1
    assert f"{place.name}, line {number}: {said}" in str(refused.value)


@pytest.mark.parametrize(("row", "said"), [
    ("model: [x]", "100-data-parallel.yaml: 999: model = ['x']: expected a word, such as gpt2-xl"),
    ("model: {a: 1}", "expected a word, such as gpt2-xl"), ("model: 5", "100-data-parallel.yaml: 999: model = 5: expected a word"),
    ("7: x", "unknown key"), ("seq: [1]", "seq = [1]"), ("slug: ~", "slug = None"),
])  # fmt: skip
def test_a_wrong_row_is_refused_with_its_line(tmp_path: Path, row: str, said: str) -> None:
    for path in EXPERIMENTS.glob("*.yaml"):
        shutil.copy(path, tmp_path)
    place = tmp_path / "100-data-parallel.yaml"
    text = place.read_text(encoding="utf-8").rstrip("\n")
    place.write_text(
        f"{text}\n  999: {{slug: a, mbs: 1, gbs: 1, shows: s, {row}}}\n".replace(
            "slug: a, mbs: 1, gbs: 1, shows: s, slug", "mbs: 1, gbs: 1, shows: s, slug"
        )
    )
    with pytest.raises(UserError) as refused:
        catalog(place)
    assert said in str(refused.value) and str(refused.value).endswith(
        f"100-data-parallel.yaml, line {len(text.splitlines()) + 1}"
    )
