"""Third stage: what the device runs, the experiment on GPUs and its miniature on a CPU."""

from __future__ import annotations

from dataclasses import dataclass

from harness.errors import UserError
from harness.experiment.experiment import Experiment
from harness.experiment.hardware import allocator_fraction
from harness.planning.miniature import describe, miniature
from harness.planning.resolved import ResolvedRun


@dataclass(frozen=True)
class FittedRun:
    """What the device runs.

    Attributes:
        remarks: those of ``resolved``, and what the miniature scaled.
        memory_fraction: share of a GPU's memory that PyTorch may allocate; None: all of it.
    """

    resolved: ResolvedRun
    experiment: Experiment
    remarks: tuple[str, ...]
    memory_fraction: float | None = None


def fit(resolved: ResolvedRun) -> FittedRun:
    """Fit ``resolved`` to the device of its request.

    Raises:
        UserError: ``CARD=`` is given where there is no GPU, or the miniature's sizes do not fit
        together.
    """
    request, full = resolved.request, resolved.experiment
    if request.device == "cuda":
        return FittedRun(resolved, full, resolved.remarks, _memory_fraction(full.card))
    nodes = full.nodes if "NODES" in request.settings else 1
    small = miniature(full, nodes, request.given)
    return FittedRun(resolved, small, (*resolved.remarks, describe(full, small)))


def _memory_fraction(card: str | None) -> float | None:
    """The share of the GPU at hand that is as much as ``card`` has."""
    from harness.machine.gpus import list_gpus

    if card is None:
        return None
    gpus = list_gpus()
    if not gpus:
        raise UserError(f"CARD={card} caps the memory of the GPU at hand, but there is none here")
    return allocator_fraction(card, gpus[0].total_mib)
