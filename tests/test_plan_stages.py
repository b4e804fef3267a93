"""A run is planned in stages: each is made once, from the one before; and each refuses with its own values."""

import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import ROOT
from harness.errors import UserError
from harness.experiment.catalog import load_catalog
from harness.experiment.experiment import Experiment
from harness.planning.plan import Plan, plan

sys.path.insert(0, str(Path(__file__).parent))
from checkpoint_files import write
from test_checkpoints import TINY, run_in

CATALOG = load_catalog()
STAGES = ["request", "resolved", "fitted", "placed", "checked"]


def callers(frame) -> Iterator[str]:
    """The files of the functions that wait for ``frame``."""
    while frame := frame.f_back:
        yield frame.f_code.co_filename


def modules_of(settings: dict[str, str], id_: str, device: str) -> list[str]:
    """The modules of harness/ in the order in which planning enters them with the experiment, each named once a stay.

    A function counts where it takes the experiment, or a stage that holds it; properties and methods of the experiment do not, nor what a
    rule of constraints asks.
    """
    entered: list[str] = []

    def note(frame, event, _) -> None:
        code = frame.f_code
        folder = f"{ROOT}/harness/"
        if event != "call" or not code.co_filename.startswith(folder) or code.co_name[0] == "<":
            return
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        if any("/experiment/constraints.py" in file for file in callers(frame)):
            return
        if any(holds_experiment(frame.f_locals[name]) for name in names if name != "self"):
            module = code.co_filename.removeprefix(folder).removesuffix(".py")
            if entered[-1:] != [module]:
                entered.append(module)

    row = CATALOG.find(id_)
    sys.setprofile(note)
    try:
        plan(row, settings, device)
    finally:
        sys.setprofile(None)
    return entered


def holds_experiment(value: object) -> bool:
    if isinstance(value, Experiment):
        return True
    is_stage = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return is_stage and any(
        holds_experiment(getattr(value, field.name)) for field in dataclasses.fields(value)
    )


@pytest.mark.parametrize(
    ("id_", "settings", "device", "returns"),
    [
        ("101", {}, "cpu", 4),
        ("101", {}, "cuda", 1),
        ("408", {}, "cpu", 4),
        ("802", {"WEIGHTS": "before"}, "cpu", 4),
        ("101", {"LOAD": "before", "STEPS": "30"}, "cpu", 4),
        ("101", {"RESUME": "1"}, "cpu", 5),
    ],
)
def test_each_stage_is_entered_once_and_few_modules_twice(
    tmp_path, id_, settings, device, returns
) -> None:
    asked = TINY | {"OUTDIR": str(tmp_path)}
    before = run_in(tmp_path, plan(CATALOG.find("101"), asked, "cpu").experiment)
    write(before.checkpoints, 5)
    if "before" in settings.values():
        before.path.rename(tmp_path / "before")
    entered = modules_of(asked | settings, id_, device)
    stages = [name.removeprefix("planning/") for name in entered]
    in_order = list(dict.fromkeys(name for name in stages if name in STAGES))
    assert in_order == STAGES and stages[0] == "plan"
    assert len(entered) <= 20 and len(entered) - len(set(entered)) <= returns, entered


def planned(device: str = "cuda", id_: str = "101", **settings: str) -> Plan:
    return plan(CATALOG.find(id_), {"DATA": "mock", **settings}, device)


@pytest.mark.parametrize("setting", ["PARTITION=gpu", "ACCOUNT=team", "TIME=00:30:00"])
def test_what_only_a_batch_job_has_is_refused_without_one(setting) -> None:
    key, value = setting.split("=")
    said = (
        f"{setting} is for a batch job, and SLURM=1 is not given\nadd SLURM=1, or leave {key}= out"
    )
    for slurm in ({}, {"SLURM": "0"}):
        with pytest.raises(UserError, match=re.escape(said)):
            planned(**{key: value}, **slurm)
    assert planned(**{key: value}, SLURM="1").experiment.id == "101"


def test_the_command_for_several_nodes_keeps_the_settings_that_were_given() -> None:
    with pytest.raises(UserError) as refused:
        planned(id_="219", NODES="2", STEPS="20", ARGS="--clip-grad 2", NODE_RANK="1")
    assert (
        "make 219 NODES=2 NODE_RANK=0 RENDEZVOUS=first-node:29500 DATA=mock STEPS=20"
        " ARGS='--clip-grad 2'\nor SLURM=1 or K8S=1 for a batch job"
    ) in str(refused.value)
    with pytest.raises(UserError, match=r"NODE_RANK=0 RENDEZVOUS=first-node:29500\nor SLURM=1"):
        plan(CATALOG.find("219"), {"NODES": "2"}, "cpu")


def test_a_batch_job_keeps_the_card_that_it_behaves_as(monkeypatch, tmp_path) -> None:
    from harness.launching import slurm
    from harness.machine import gpus

    gpu = type("Gpu", (), {"total_mib": 143771.0})
    monkeypatch.setattr(gpus, "list_gpus", lambda: [gpu])
    settings = {"NODES": "2", "SLURM": "1", "CARD": "h100-80gb", "OUTDIR": str(tmp_path)}
    script = slurm.render_sbatch(planned(id_="219", **settings), settings)
    assert "per_process_memory_fraction:0.548" in script and "$RENDEZVOUS" in script
