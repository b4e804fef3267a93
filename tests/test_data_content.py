"""Damaged tokens are found before a run, whatever the damage and however large the file."""

import json
import shutil
from pathlib import Path

import pytest

from harness.errors import UserError

np = pytest.importorskip("numpy", reason="the set-up stage `data` is not installed")
pytest.importorskip("orjson", reason="the set-up stage `data` is not installed")
from harness.data import content, data_sets  # noqa: E402
from harness.data.header import bin_path, idx_path  # noqa: E402
from harness.data.prepare import Means, Recipe, prepare  # noqa: E402


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    texts = [" ".join(str((7 * n * k) % 97) for k in range(50)) for n in range(400)]
    (folder / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for name in ("mine", "other"):
        prepare(
            Recipe(name, str(folder / "in.jsonl"), tokenizer="null:100"),
            Means(folder=folder / "data", workers=1),
        )
    return folder / "data"


@pytest.fixture
def data(made, tmp_path) -> Path:
    shutil.copytree(made, tmp_path / "data")
    return tmp_path / "data"


def put(path: Path, at: int, value: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(value)


def test_what_is_whole_passes(data) -> None:
    for name in ("mine", "mine:0.7 other:0.3", "mock"):
        content.check_content(name, data)


@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_a_changed_byte_is_found_by_the_checksum(data, ending) -> None:
    """Ids within the vocabulary too, which a run would learn without a word; in a blend the set is named."""
    path = (bin_path if ending == "bin" else idx_path)(data_sets.prefix_of("other", data))
    put(path, 100, bytes([path.read_bytes()[100] ^ 1]))
    with pytest.raises(
        UserError,
        match=rf"^DATA=other: .*other_text_document.{ending} is damaged: its checksum is not the manifest's\nmake data-check NAME=other",
    ):
        content.check_content("mine:0.5 other:0.5", data)
    content.check_content("mine", data)


@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("manifest", [True, False])
def test_an_id_beyond_the_vocabulary_is_found_in_a_file_too_large_for_checksums(
    data, monkeypatch, place, manifest
) -> None:
    monkeypatch.setattr(content, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(content, "BLOCKS", 5)
    monkeypatch.setattr(content, "BLOCK_TOKENS", 64)
    path = bin_path(data_sets.prefix_of("mine", data))
    tokens = path.stat().st_size // 2
    at = {"first": 0, "middle": (tokens - 64) // 2 + 1, "last": tokens - 1}[place]
    if not manifest:  # made elsewhere: no checksum is known, the tokenizer is
        chosen = data_sets.find("mine", data)
        monkeypatch.setattr(
            data_sets,
            "_tokenizer",
            lambda *_: ("NullTokenizer", None, chosen.tokenizer_sha256, chosen.vocab_size),
        )
        (data / "mine" / "manifest.json").unlink()
    content.check_content("mine", data)
    put(path, 2 * at, (100).to_bytes(2, "little"))
    with pytest.raises(
        UserError,
        match=rf"DATA=mine: .*is damaged: token {at:,} is id 100, the vocabulary is 0 to 99\nmake data-check",
    ):
        content.check_content("mine", data)


def test_a_run_on_damaged_data_is_refused_and_leaves_nothing(data, tmp_path, monkeypatch) -> None:
    from harness.experiment.catalog import load_catalog
    from harness.launching import launch
    from harness.planning.plan import plan

    planned = plan(
        load_catalog().find("101"), {"DEVICE": "cpu", "OUTDIR": str(tmp_path / "outdir")}, "cpu"
    )
    monkeypatch.setattr(launch, "check_machine", lambda *_: None)
    monkeypatch.setattr(
        launch, "check_content", lambda data: content.check_content("mine", tmp_path / "data")
    )
    put(bin_path(data_sets.prefix_of("mine", data)), 0, b"\x01")
    with pytest.raises(UserError, match="is damaged"):
        launch.run_plan(planned)
    assert not (tmp_path / "outdir").exists()
