"""What will run, here: an experiment with its overrides, on the device at hand, as one script. No torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from harness import ROOT, overrides
from harness.catalog import Experiment
from harness.command import Place, render
from harness.data import prepared
from harness.data.splits import check_split
from harness.errors import UserError
from harness.flags import Device
from harness.miniature import describe, miniature


@dataclass(frozen=True)
class Plan:
    """One run, ready to launch. ``full`` is the experiment at full size, ``experiment`` what runs on ``device``."""

    full: Experiment
    experiment: Experiment
    device: Device
    place: Place
    outdir: Path
    headline: str | None
    memory_fraction: float | None

    def script(self, gpu_ids: tuple[int, ...] | None = None) -> str:
        """The run's bash script, on these GPUs (by default those of ``place``)."""
        place = self.place if gpu_ids is None else Place(self.place.node_rank, self.place.rendezvous, gpu_ids)
        return render(self.experiment, self.device, place, headline=self.headline,
                      memory_fraction=self.memory_fraction, apex=importlib.util.find_spec("apex") is not None)


def choose_device(settings: Mapping[str, str], *, only_show: bool = False) -> Device:
    """``DEVICE`` where given, else cuda where NVML sees a GPU, else cpu.

    Raises:
        UserError: ``DEVICE`` is another word, or it is cuda where there is no GPU (unless the command is only shown).
    """
    wanted = settings.get("DEVICE")
    if wanted not in (None, "cpu", "cuda"):
        raise UserError(f"DEVICE={wanted}: expected cpu or cuda")
    if wanted == "cpu" or (wanted == "cuda" and only_show):
        return wanted
    from harness.gpus import list_gpus

    if list_gpus():
        return "cuda"
    if wanted == "cuda":
        raise UserError("DEVICE=cuda, but the NVIDIA driver shows no GPU here\n"
                        "make doctor says what is missing; DEVICE=cpu runs the miniature")
    return "cpu"


def plan(experiment: Experiment, settings: Mapping[str, str], device: Device) -> Plan:
    """Apply ``settings`` to ``experiment`` and fit it to ``device``.

    Raises:
        UserError: sizes do not fit together, the data set is not prepared, or nodes have no place to meet.
    """
    full = overrides.apply(experiment, settings)
    if "DATA" not in settings:
        full = full.with_changes(data=prepared.default_for(full))
    headlines = []
    if device == "cuda" and full.attention_backend == "flash" and _lacks_flash_attention():
        full = full.with_changes(attention_backend="auto")
        headlines.append("attention by cuDNN: the published run's flash-attn is not installed here")
    nodes = full.nodes if "NODES" in settings else 1
    small = miniature(full, nodes) if device == "cpu" else full
    if device == "cpu":
        headlines.append(describe(full, small))
    place = _place(small, settings)
    if small.data != "mock":
        check_split(prepared.blend(small.data), small.split)
    return Plan(
        full=full,
        experiment=small,
        device=device,
        place=place,
        outdir=Path(settings.get("OUTDIR") or ROOT / "outdir").resolve(),
        headline="; ".join(headlines) or None,
        memory_fraction=_memory_fraction(full) if device == "cuda" and full.card else None,
    )


def _place(e: Experiment, settings: Mapping[str, str]) -> Place:
    ids = settings.get("GPUS_IDS")
    gpu_ids = tuple(overrides.count("GPUS_IDS", i, least=0) for i in ids.split(",")) if ids else None
    slurm = settings.get("SLURM") == "1"
    if e.nodes > 1 and not slurm and not settings.get("RENDEZVOUS"):
        raise UserError(
            f"{e.id} runs on {e.nodes} nodes of {e.ranks_per_node} GPUs; on each of them, with rank 0 to {e.nodes - 1}:\n"
            f"    make {e.id} NODES={e.nodes} NODE_RANK=0 RENDEZVOUS=first-node:29500\n"
            "or SLURM=1 for a batch job"
        )
    node_rank = overrides.count("NODE_RANK", settings.get("NODE_RANK", "0"), least=0)
    if node_rank >= e.nodes:
        raise UserError(f"NODE_RANK={node_rank}: {e.id} runs on nodes 0 to {e.nodes - 1}; NODES= sets their number")
    rendezvous = settings.get("RENDEZVOUS")
    if rendezvous and not (rendezvous.rpartition(":")[0] and rendezvous.rpartition(":")[2].isdigit()):
        raise UserError(f"RENDEZVOUS={rendezvous}: expected host:port, such as node0:29500")
    return Place("$SLURM_NODEID" if slurm else str(node_rank), rendezvous, gpu_ids)


def _lacks_flash_attention() -> bool:
    from harness.gpus import list_gpus

    return bool(list_gpus()) and importlib.util.find_spec("flash_attn") is None


def _memory_fraction(e: Experiment) -> float:
    from harness.gpus import list_gpus
    from harness.hardware import allocator_fraction

    gpus = list_gpus()
    if not gpus:
        raise UserError(f"CARD={e.card} caps the memory of the GPU at hand, but there is none here")
    return allocator_fraction(e.card, gpus[0].total_mib)
