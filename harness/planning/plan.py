"""What will run, here: an experiment with its overrides, on the device at hand, as one script. No
torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from harness import ROOT
from harness.data import data_sets
from harness.data.sources import definitions
from harness.data.splits import check_split
from harness.errors import UserError
from harness.experiment import command_line, extra_arguments, overrides
from harness.experiment.constraints import with_changes
from harness.experiment.experiment import Experiment
from harness.experiment.identity import Difference
from harness.planning import resume, resumed, start
from harness.planning.command import NOTHING_ELSE, Extras, Place, render
from harness.planning.miniature import describe, miniature
from harness.planning.resumed import Resumed
from harness.run import checkpoints
from harness.run.checkpoints import Loading, Saving
from harness.run.directory import RunDir
from harness.upstreams.megatron_lm.flags import Device
from harness.upstreams.megatron_lm.tracking import tracking

WITHOUT_WEIGHTS = (
    "adapters beside random weights learn little, this measures time and memory; WEIGHTS= names"
    " weights that know something: make import-hf brings some, make 801 trains some"
)

PLAIN_TEXT = (
    "DATA={} is no conversations: every token is learned, not answers only, and --sft is left out;"
    " DATA={} is what this row is about, make data-chat makes others"
)

GRAPHS_DROP = (
    "CUDA graphs do again what they did in training: losses on held-out data come with dropout,"
    " which makes them higher; DROPOUT=0 compares"
)


FOR_GPUS = ("GPUS_IDS", "CARD")
"""Settings that mean nothing to the CPU miniature."""


@dataclass(frozen=True)
class Plan:
    """One run, ready to launch. ``full`` is the experiment at full size, ``experiment`` what runs
    on ``device``."""

    full: Experiment
    experiment: Experiment
    device: Device
    place: Place
    outdir: Path
    headline: str | None
    memory_fraction: float | None
    extras: Extras = NOTHING_ELSE
    resumes: RunDir | None = None
    """The run directory in which it goes on."""
    changed: tuple[Difference, ...] = ()
    """Settings in which it differs from the run that it resumes."""
    notices: tuple[str, ...] = ()

    @property
    def first_step(self) -> int:
        """The step from which it goes on, 0 where it begins anew."""
        loading = self.extras.loading
        return loading.step if loading and not loading.only_weights else 0

    def script(self, gpu_ids: tuple[int, ...] | None = None) -> str:
        """The run's bash script, on these GPUs (by default those of ``place``)."""
        place = self.place if gpu_ids is None else replace(self.place, gpu_ids=gpu_ids)
        return render(
            self.experiment,
            self.device,
            place,
            headline=self.headline,
            memory_fraction=self.memory_fraction,
            apex=importlib.util.find_spec("apex") is not None,
            extras=self.extras,
        )


def choose_device(settings: Mapping[str, str], *, only_show: bool = False) -> Device:
    """``DEVICE`` where given, else cuda where NVML sees a GPU, else cpu.

    Raises:
        UserError: ``DEVICE`` is another word, or it is cuda where there is no GPU (unless the
        command is only shown).
    """
    wanted = settings.get("DEVICE")
    if wanted not in (None, "cpu", "cuda"):
        raise UserError(f"DEVICE={wanted}: expected cpu or cuda")
    if wanted == "cpu" or (wanted == "cuda" and only_show):
        return wanted
    from harness.machine.gpus import list_gpus

    if list_gpus():
        return "cuda"
    if wanted == "cuda":
        raise UserError(
            "DEVICE=cuda, but the NVIDIA driver shows no GPU here\n"
            "make doctor says what is missing; DEVICE=cpu runs the miniature"
        )
    return "cpu"


def plan(experiment: Experiment, settings: Mapping[str, str], device: Device) -> Plan:
    """Apply ``settings`` to ``experiment`` and fit it to ``device``.

    Raises:
        UserError: sizes do not fit together, the data set is not prepared, or nodes have no place
        to meet.
    """
    if device == "cpu":
        _check_for_gpus(settings)
    outdir = Path(settings.get("OUTDIR") or ROOT / "outdir").resolve()
    full = start.with_settings(experiment, settings, outdir)
    if "DATA" not in settings:
        full = with_changes(
            full,
            data=_data_of_its_target(full, device) if full.until else data_sets.default_for(full),
        )
    headlines = []
    if device == "cuda" and full.attention_backend == "flash" and _lacks_flash_attention():
        full = with_changes(full, attention_backend="auto")
        headlines.append("attention by cuDNN: the published run's flash-attn is not installed here")
    if full.weights:
        start.check_data(full, settings.get("WEIGHTS") or full.weights, outdir)
    if data_sets.is_chat(full.data):
        _check_conversations(full)
    elif (published := definitions().get(full.published_data or "")) and published.chat:
        headlines.append(PLAIN_TEXT.format(full.data, published.name))
    nodes = full.nodes if "NODES" in settings else 1
    small = miniature(full, nodes, overrides.given(settings)) if device == "cpu" else full
    if device == "cpu":
        headlines.append(describe(full, small))
    place = _place(small, settings)
    if small.data != data_sets.MOCK:
        check_split(data_sets.blend(small.data), small.split)
    notices = [WITHOUT_WEIGHTS] if small.lora and not small.weights and not small.load else []
    if small.cuda_graphs and small.model.dropout and small.eval_steps:
        notices.append(GRAPHS_DROP)
    before = resumed.choose(
        small, device, outdir, settings, joins=place.node_rank not in ("0", "$SLURM_NODEID")
    )
    saving = _saving(small, settings, before)
    if saving and device == "cpu" and small.sharding.startswith("fsdp"):
        raise UserError(
            f"{small.id}: Megatron-FSDP saves on GPUs only: on a CPU its ranks wait for each other"
            " for ever\nSAVE=0 trains without checkpoints, SHARDING=optim or torch_fsdp2 saves"
            " here, too"
        )
    loading = _loading(small, outdir, before, notices.append)
    if saving or loading:
        _check_format(small)
    return Plan(
        full=full,
        experiment=small,
        device=device,
        place=place,
        outdir=outdir,
        headline="; ".join(headlines) or None,
        memory_fraction=_memory_fraction(full) if device == "cuda" and full.card else None,
        extras=Extras(saving, loading, tracking(settings)),
        resumes=before and before.run,
        changed=before.changed if before else (),
        notices=tuple(notices),
    )


def _check_for_gpus(settings: Mapping[str, str]) -> None:
    """Raise UserError where ``settings`` ask for what a CPU has not.

    ``FP8=``, ``CUDA_GRAPHS=`` and ``OPTIMIZER_STATE=`` are none of these: the miniature says by
    what it replaces them.
    """
    for key in FOR_GPUS:
        if key in settings:
            raise UserError(
                f"{key}={settings[key]} needs a GPU, and this would run the miniature on the CPU\n"
                f"leave {key}= out, or run it where the NVIDIA driver shows a GPU (make doctor)"
            )


def _check_format(e: Experiment) -> None:
    """Refuse another format than that of the sharding: upstream saves no other while training, and
    fails after all steps.

    ``schedule_async_save`` of megatron/training/checkpointing.py takes distributed checkpoints
    alone; harness.run.checkpoints reads no others.
    """
    ours = "fsdp_dtensor" if e.sharding.startswith("fsdp") else "torch_dist"
    for argument in extra_arguments.arguments(e.extra_args):
        if argument.option in ("--ckpt-format", "--dist-ckpt-format") and argument.values != (
            ours,
        ):
            raise UserError(
                f"{e.id}: ARGS has {argument}, but checkpoints with sharding {e.sharding} are"
                f" {ours}: other formats cannot be saved beside training, nor resumed\nleave"
                f" {argument.option} out"
            )


def _check_conversations(e: Experiment) -> None:
    """Raise UserError where packed conversations do not go with the sizes of ``e``."""
    if e.cp > 1:
        raise UserError(
            f"{e.id}: conversations are packed, which is not tested with cp = {e.cp}; set CP=1"
        )
    if e.cuda_graphs:
        raise UserError(
            f"{e.id}: packed conversations begin and end elsewhere in each sequence, which no CUDA"
            " graph follows; set CUDA_GRAPHS=0"
        )
    if e.pp > 1 and e.micro_batch_size > 1:
        raise UserError(
            f"{e.id}: upstream joins a micro-batch of packed sequences, and pipeline stages expect"
            f" them apart: mbs {e.micro_batch_size}, pp {e.pp}; set MBS=1 or PP=1"
        )


def _data_of_its_target(full: Experiment, device: Device) -> str:
    """A loss to reach is one on certain data: the published set, which must be there; for a
    miniature, mock data."""
    if device == "cpu" or full.published_data is None:
        return full.data
    return data_sets.find(full.published_data).name


def _saving(e: Experiment, settings: Mapping[str, str], before: Resumed | None) -> Saving | None:
    """How checkpoints are kept: as said now, else as the resumed run did, else as the experiment's
    row says."""
    where = settings.get("SAVE")
    asked = [key for key in ("SAVE_EVERY", "KEEP") if key in settings]
    if where == "0":
        if asked:
            raise UserError(
                f"SAVE=0 keeps no checkpoints, but {' and '.join(asked)} is given; leave one out"
            )
        if before:
            raise UserError(
                f"SAVE=0: {before.run.label} keeps checkpoints, and RESUME= could not continue it"
                " once more without\nleave SAVE=0 out"
            )
        return None
    earlier = before and before.saving
    if where is None and not asked and not earlier and e.save_every is None:
        return None
    every, keep = (
        command_line.count_in(settings, "SAVE_EVERY"),
        command_line.count_in(settings, "KEEP"),
    )
    folder = Path(where).resolve() if where not in (None, "1") else None
    if earlier:
        label, kept = before.run.label, before.run.checkpoints
        if where is not None and kept.resolve() != (folder or before.run.path / "checkpoints"):
            raise UserError(
                f"SAVE={where}: {label} keeps its checkpoints in {kept}, where RESUME= looks for"
                f" them\nleave SAVE= out; LOAD={label} SAVE={where} begins a new run"
            )
        return Saving(every or earlier.every, keep or earlier.keep, earlier.folder)
    saving = Saving(every or e.save_every or e.steps, keep or e.keep, folder)
    if (
        folder
        and (there := checkpoints.in_folder(folder))
        and not (e.load and Path(e.load).resolve() == folder)
    ):
        raise UserError(
            f"SAVE={where} already holds checkpoints, the newest of step {there[-1].step}\n"
            f"name another folder, or go on from them: LOAD={where}"
        )
    return saving


def _loading(
    e: Experiment, outdir: Path, before: Resumed | None, tell: Callable[[str], None]
) -> Loading | None:
    """The checkpoint to begin with: the resumed run's newest whole one, else the one that LOAD=
    names."""
    if before:
        found = resumed.newest_checkpoint(before, e, tell)
        for notice in resumed.notices(before, e, found.step if found else 0):
            tell(notice)
        if found:
            return Loading(found.path.parent, found.step)
    if not e.load:
        return None
    found = resume.find(e.load, outdir, tell)
    resume.check_fits(found, e)
    only_weights = not found.contents.has_optimizer
    if not only_weights and found.step >= e.steps:
        raise UserError(
            f"LOAD={e.load}: its checkpoint is of step {found.step}, and STEPS={e.steps}: nothing"
            f" is left\nSTEPS={2 * found.step} trains as long again"
        )
    tell(
        f"begins with {'the weights' if only_weights else f'step {found.step}'} of"
        f" {found.path.parent}"
    )
    return Loading(found.path.parent, found.step, only_weights)


def _place(e: Experiment, settings: Mapping[str, str]) -> Place:
    ids = settings.get("GPUS_IDS")
    gpu_ids = (
        tuple(command_line.count("GPUS_IDS", i, least=0) for i in ids.split(",")) if ids else None
    )
    slurm = settings.get("SLURM") == "1"
    if e.nodes > 1 and not slurm and not settings.get("RENDEZVOUS"):
        raise UserError(
            f"{e.id} runs on {e.nodes} nodes of {e.ranks_per_node} GPUs; on each of them, with rank"
            f" 0 to {e.nodes - 1}:\n    make {e.id} NODES={e.nodes} NODE_RANK=0"
            " RENDEZVOUS=first-node:29500\nor SLURM=1 for a batch job"
        )
    node_rank = command_line.count("NODE_RANK", settings.get("NODE_RANK", "0"), least=0)
    if node_rank >= e.nodes:
        raise UserError(
            f"NODE_RANK={node_rank}: {e.id} runs on nodes 0 to {e.nodes - 1}; NODES= sets their"
            " number"
        )
    rendezvous = settings.get("RENDEZVOUS")
    if rendezvous and not (
        rendezvous.rpartition(":")[0] and rendezvous.rpartition(":")[2].isdigit()
    ):
        raise UserError(f"RENDEZVOUS={rendezvous}: expected host:port, such as node0:29500")
    return Place("$SLURM_NODEID" if slurm else str(node_rank), rendezvous, gpu_ids)


def _lacks_flash_attention() -> bool:
    from harness.machine.gpus import list_gpus

    return bool(list_gpus()) and importlib.util.find_spec("flash_attn") is None


def _memory_fraction(e: Experiment) -> float:
    from harness.experiment.hardware import allocator_fraction
    from harness.machine.gpus import list_gpus

    gpus = list_gpus()
    if not gpus:
        raise UserError(f"CARD={e.card} caps the memory of the GPU at hand, but there is none here")
    return allocator_fraction(e.card, gpus[0].total_mib)
