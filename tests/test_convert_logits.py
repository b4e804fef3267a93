"""Upstream's model with imported weights gives Hugging Face's logits, under every layout; what it trained comes back."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import tiny_hf

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-4
LENGTH = 64
ONE, TP2, PP2, EP2 = {}, {"tp": 2}, {"pp": 2}, {"ep": 2}
OWN_SCRIPT = {"own": 1}
QUICK = [("gpt2", TP2), ("llama", ONE), ("llama", OWN_SCRIPT), ("olmoe", TP2), ("gpt-oss", ONE)]
ALL = [(name, layout) for name in tiny_hf.MODELS for layout in (ONE, TP2, PP2, {"tp": 2, "pp": 2})]
ALL += [(name, layout) for name in ("olmoe", "gpt-oss") for layout in (EP2, {"pp": 2, "ep": 2})]


def tokens():
    import torch

    return torch.randint(
        0, tiny_hf.VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(3)
    )


def logits_of(model):
    import torch

    with torch.no_grad():
        return model(tokens()).logits


def imports(names, folder: Path) -> dict:
    """Make and import the models; return Hugging Face's logits of each."""
    from harness.convert.importing import import_folder

    expected = {}
    for name in names:
        expected[name] = logits_of(tiny_hf.make(name, folder / f"{name}-hf"))
        import_folder(str(folder / f"{name}-hf"), folder / name)
    return expected


def upstream(cases: list[dict], folder: Path) -> None:
    (folder / "cases.json").write_text(
        json.dumps([{"tokens": tokens().tolist(), **case} for case in cases])
    )
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "megatron_logits.py"), str(folder / "cases.json")],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def compare(
    pairs: list[tuple[str, dict]], folder: Path, *arguments: str
) -> dict[tuple[str, str], float]:
    """The largest difference of a logit, by model and layout."""
    import torch

    expected = imports(dict(pairs), folder)
    cases = [
        {
            "load": str(folder / name),
            "out": str(folder / f"{name}{label(layout)}.pt"),
            "arguments": arguments,
            **layout,
        }
        for name, layout in pairs
    ]
    upstream(cases, folder)
    found = {}
    for (name, layout), case in zip(pairs, cases, strict=True):
        ours = torch.load(case["out"])[..., : tiny_hf.VOCABULARY]
        assert expected[name].std() > 1
        found[name, label(layout)] = float((ours - expected[name]).abs().max())
    print(
        "\n".join(
            f"{name:12} {layout:8} {difference:.1e}" for (name, layout), difference in found.items()
        )
    )
    return found


def label(layout: dict) -> str:
    return " ".join(f"{axis}{size}" for axis, size in layout.items()) or "one"


def test_logits_equal_hugging_faces(tmp_path):
    differences = compare(QUICK, tmp_path)
    assert max(differences.values()) < TOLERANCE, differences


@pytest.mark.full
def test_logits_equal_hugging_faces_under_every_layout(tmp_path):
    differences = compare(ALL, tmp_path)
    assert max(differences.values()) < TOLERANCE, differences


@pytest.mark.full
def test_a_wrong_mapping_shows(tmp_path, monkeypatch):
    """Gate and up exchanged, in one model of four layers: the test above would see it."""
    from harness.convert import architectures, transforms

    llama = architectures.ARCHITECTURES["LlamaForCausalLM"]
    row = next(row for row in llama.rows if row.how is transforms.GATE_UP)
    rows = tuple(
        architectures.TensorRow(r.megatron, r.shape, r.hf[::-1], r.how) if r is row else r
        for r in llama.rows
    )
    monkeypatch.setitem(vars(llama), "rows", rows)
    assert compare([("llama", ONE)], tmp_path)["llama", "one"] > 100 * TOLERANCE


@pytest.mark.full
def test_what_upstream_trained_comes_back(tmp_path):
    """Import, train two steps under a layout, save, export: Hugging Face's model gives upstream's logits."""
    import torch
    from transformers import AutoModelForCausalLM

    from harness.convert.exporting import export_checkpoint

    layouts = {
        "gpt2": TP2,
        "llama": PP2,
        "llama-tied": {"tp": 2, "pp": 2},
        "olmoe": EP2,
        "gpt-oss": {"pp": 2, "ep": 2},
    }
    untrained = imports(layouts, tmp_path)
    cases = []
    for name, layout in layouts.items():
        run, first = str(tmp_path / f"{name}-run"), str(tmp_path / name)
        learn = ["--lr", "0.01", "--lr-warmup-fraction", "0"]
        cases.append({"load": first, "out": run, "steps": 2, "arguments": learn, **layout})
        cases.append({"load": run, "model": first, "out": run + ".pt"})
    upstream(cases, tmp_path)
    for name in layouts:
        done = export_checkpoint(tmp_path / f"{name}-run", tmp_path / f"{name}-back")
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / f"{name}-back", attn_implementation="eager"
        ).eval()
        theirs = logits_of(model)
        ours = torch.load(tmp_path / f"{name}-run.pt")[..., : tiny_hf.VOCABULARY]
        assert done.architecture == tiny_hf.MODELS[name][0] and theirs.shape == ours.shape
        assert (theirs - ours).abs().max() < TOLERANCE
        assert (theirs - untrained[name]).abs().max() > 1


@pytest.mark.full
def test_upstream_takes_the_arguments_from_the_checkpoint(tmp_path):
    """--use-checkpoint-args: no flag of the model is given."""
    import torch

    imports(["gpt2", "llama-tied"], tmp_path)
    cases = []
    for name in ("gpt2", "llama-tied"):
        for kind in ("given", "stored"):
            cases.append(
                {
                    "load": str(tmp_path / name),
                    "out": str(tmp_path / f"{name}-{kind}.pt"),
                    "stored": kind == "stored",
                }
            )
    upstream(cases, tmp_path)
    for name in ("gpt2", "llama-tied"):
        given, stored = (
            torch.load(tmp_path / f"{name}-{kind}.pt")[..., : tiny_hf.VOCABULARY]
            for kind in ("given", "stored")
        )
        assert torch.equal(given, stored)
