"""A launcher in a process of its own: ``launcher.py OUTDIR BEHAVIOUR RANKS STEPS [SECONDS_A_STEP]``.

In the environment: GRACE_S, SAVES_S, HANG, SAVE, RESUMES (a run directory), CHANGES (JSON, fields of the experiment), and for one of two nodes NODE_RANK,
RENDEZVOUS and TIMEOUT_S.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from harness.errors import UserError
from harness.experiment.experiment import Experiment
from harness.experiment.model import Model
from harness.launching import active_run, launch, torchrun
from harness.launching.rendezvous import handshake
from harness.planning.plan import Plan
from harness.planning.script import Extras, Place
from harness.run.checkpoints import Saving
from harness.run.directory import RunDir
from harness.system.streams import lasting_output

TORCHRUN = Path(__file__).with_name("torchrun.py")


@dataclass(frozen=True)
class Scripted(Plan):
    """A plan with a script of its own."""

    text: str = ""

    def script(self, gpu_ids=None) -> str:
        ids = (
            ""
            if gpu_ids is None
            else f"export CUDA_VISIBLE_DEVICES={','.join(map(str, gpu_ids))}\n"
        )
        return f"{ids}exec {self.text}\n"


def make_plan(
    outdir: Path, behaviour: str, ranks: int = 2, steps: int = 8, step_s: float = 0.0, **changes
) -> Scripted:
    """A plan whose script runs torchrun.py; ``changes`` are fields of the plan or of its experiment."""
    model = Model(name="tiny", num_layers=2, hidden_size=64, num_attention_heads=4)
    sizes = {"mbs": 1, "gbs": ranks, "seq": 64, "dp": ranks, "steps": steps, "miniature": True}
    fields = {
        "id": "101",
        "slug": f"tiny-dp{ranks}",
        "chapter": 100,
        "shows": "a test",
        "model": model,
        **sizes,
    }
    experiment = Experiment(
        **{**fields, **{k: v for k, v in changes.items() if k not in Plan.__dataclass_fields__}}
    )
    plan = {
        "full": experiment,
        "experiment": experiment,
        "device": "cpu",
        "place": Place(),
        "outdir": outdir,
    }
    plan["headline"] = None
    text = f"{sys.executable} {TORCHRUN} {behaviour} {ranks} {steps} {step_s}"
    return Scripted(
        **{**plan, **{k: v for k, v in changes.items() if k in Plan.__dataclass_fields__}},
        text=text,
    )


if __name__ == "__main__":
    outdir, behaviour, *numbers = sys.argv[1:]
    torchrun.GRACE_S = float(os.environ.get("GRACE_S", torchrun.GRACE_S))
    active_run.SAVES_S = float(os.environ.get("SAVES_S", active_run.SAVES_S))
    sizes = [int(n) for n in numbers[:2]]
    changes = {}
    if "NODE_RANK" in os.environ:
        changes = {"nodes": 2, "place": Place(os.environ["NODE_RANK"], os.environ["RENDEZVOUS"])}
        handshake.TIMEOUT_S = float(os.environ.get("TIMEOUT_S", handshake.TIMEOUT_S))
    if "RESUMES" in os.environ:
        changes["resumes"] = RunDir(Path(os.environ["RESUMES"]))
    changes |= json.loads(os.environ.get("CHANGES", "{}"))
    if "SAVE" in os.environ:
        changes["extras"] = Extras(saving=Saving(every=2, folder=Path(os.environ["SAVE"])))
    plan = make_plan(Path(outdir), behaviour, *sizes, *[float(n) for n in numbers[2:]], **changes)
    try:
        with lasting_output():
            status = launch.run_plan(
                plan, hang_seconds=float(os.environ.get("HANG", 0)) or None
            ).exit_status
        sys.exit(status)
    except UserError as error:
        print(f"error: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
