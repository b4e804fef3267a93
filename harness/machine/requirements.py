"""What an experiment needs of a machine beside enough GPUs."""

from __future__ import annotations

from importlib.util import find_spec

from harness.errors import UserError
from harness.experiment.experiment import Experiment
from harness.experiment.hardware import find_card
from harness.machine.gpus import list_gpus


def check_machine(e: Experiment, device: str) -> None:
    """Raise UserError where this machine lacks what ``e`` needs; a GPU that hardware.py does not
    know has it."""
    for gpu in filter(
        None, (find_card(gpu.name) for gpu in (list_gpus() if device == "cuda" else ()))
    ):
        if e.precision == "fp8" and gpu.fp8_tflops is None:
            raise UserError(
                f"{e.id} computes in fp8, which {gpu.name} does not (Ada, Hopper and later do)\n"
                f"a bf16 row: make list CHAPTER={e.chapter}"
            )
    if e.optimizer == "muon" and find_spec("emerging_optimizers") is None:
        raise UserError(
            f"{e.id}: upstream's {e.optimizer} is in the package emerging-optimizers, which is not"
            " installed\nmake setup installs the version that pyproject.toml pins; OPTIMIZER=adam"
            " does without"
        )
