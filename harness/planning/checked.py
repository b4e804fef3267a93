"""Fifth stage: check what the stages before brought together, the checkpoint's bytes last."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from harness.data import data_sets
from harness.data.splits import check_split
from harness.errors import UserError
from harness.experiment import extra_arguments, overrides
from harness.experiment.experiment import Experiment
from harness.planning import run_to_resume
from harness.planning.checkpoint_fits import check_fits, check_model
from harness.planning.placed import PlacedRun
from harness.planning.resolved import ResolvedRun
from harness.planning.script import Extras, Plan
from harness.run import checkpoints, finding, job
from harness.run.checkpoints import Loading
from harness.run.directory import still_runs

RANDOM_WEIGHTS = (
    "adapters on random weights learn little: this run measures time and memory; WEIGHTS= starts"
    " from trained weights, which make import-hf imports and make 801 trains"
)
GRAPHS_DROP = (
    "CUDA graphs repeat what they captured in training: losses on held-out data include dropout,"
    " which raises them; DROPOUT=0 makes them comparable"
)

FUSING = ("fused_weight_gradient_mlp_cuda", "transformer_engine")
"""Modules with products that add to gradients."""
CANNOT_FUSE = (
    "GRAD_FUSION=1 needs Transformer Engine, or Apex's fused_weight_gradient_mlp_cuda; neither is"
    " installed here"
)


def check(placed: PlacedRun) -> Plan:
    """Check ``placed``, and find the checkpoint that it begins with.

    Raises:
        UserError: two stages do not go together; the message has the values of both.
    """
    fitted = placed.fitted
    experiment = fitted.experiment
    full = fitted.resolved.experiment
    if full.cross_entropy_fusion_impl == "te":
        raise UserError(
            f"{full.id}: CROSS_ENTROPY_IMPL=te can be predicted, not run: upstream refuses"
            " Transformer Engine's loss as unstable; leave it out"
        )
    _check_data(fitted.resolved, experiment)
    _check_nodes(placed)
    _check_saving(placed)
    if placed.saving or experiment.load:
        _check_format(experiment)
    notices = []
    if experiment.lora and not experiment.weights and not experiment.load:
        notices.append(RANDOM_WEIGHTS)
    if experiment.cuda_graphs and experiment.model.dropout and experiment.eval_steps:
        notices.append(GRAPHS_DROP)
    on_gpus = fitted.resolved.request.device == "cuda"
    if experiment.gradient_fusion and on_gpus and not any(map(find_spec, FUSING)):
        notices.append(CANNOT_FUSE)
    loading = _resumed_checkpoint(placed, notices.append) if placed.resumed else None
    if loading is None and experiment.load:
        loading = _loaded_checkpoint(placed, notices.append)
    request, resumed = fitted.resolved.request, placed.resumed
    return Plan(
        full=fitted.resolved.experiment,
        experiment=experiment,
        device=request.device,
        place=placed.place,
        outdir=request.outdir,
        headline="; ".join(fitted.remarks) or None,
        extras=Extras(placed.saving, loading, request.tracking),
        resumes=resumed and resumed.run,
        changed=resumed.changed if resumed else (),
        notices=tuple(notices),
    )


def _check_data(resolved: ResolvedRun, experiment: Experiment) -> None:
    """Check the data set against weights, sizes and split."""
    full = resolved.experiment
    if resolved.weights:
        resolved.weights.check_data(full.data)
    if data_sets.is_chat(full.data):
        _check_conversations(full)
    if experiment.data != data_sets.MOCK:
        check_split(data_sets.blend(experiment.data), experiment.split)


def _check_conversations(full: Experiment) -> None:
    """Raise UserError where packed conversations do not go with the sizes of ``full``."""
    if full.cp > 1:
        raise UserError(
            f"{full.id}: conversations are packed, which is not tested with cp = {full.cp}; set"
            " CP=1"
        )
    if full.model.mamba:
        raise UserError(
            f"{full.id}: conversations are packed, which is not tested with Mamba layers: their"
            " state would have to begin anew with each; choose another model"
        )
    if full.cuda_graphs:
        raise UserError(
            f"{full.id}: packed conversations begin and end elsewhere in each sequence, which no"
            " CUDA graph follows; set CUDA_GRAPHS=0"
        )
    if full.pp > 1 and full.micro_batch_size > 1:
        raise UserError(
            f"{full.id}: upstream joins a micro-batch of packed sequences, and pipeline stages"
            f" expect them apart: mbs {full.micro_batch_size}, pp {full.pp}; set MBS=1 or PP=1"
        )


def _check_nodes(placed: PlacedRun) -> None:
    """Several nodes need a rendezvous, or Slurm, which brings one; and this is one of them."""
    request, e = placed.fitted.resolved.request, placed.fitted.experiment
    if e.nodes > 1 and not request.batch and not placed.place.rendezvous:
        others = {
            key: value
            for key, value in request.settings.items()
            if key not in ("NODES", "NODE_RANK")
        }
        command = (
            f"make {e.id} NODES={e.nodes} NODE_RANK=0 RENDEZVOUS=first-node:29500"
            f" {overrides.typed(others)}"
        ).rstrip()
        raise UserError(
            f"{e.id} runs on {e.nodes} nodes of {e.ranks_per_node} GPUs; on each of them, with rank"
            f" 0 to {e.nodes - 1}:\n    {command}\nor SLURM=1 or K8S=1 for a batch job"
        )
    rank = placed.place.node_rank
    if rank.isdecimal() and int(rank) >= e.nodes:
        raise UserError(
            f"NODE_RANK={rank}: {e.id} runs on nodes 0 to {e.nodes - 1}; NODES= sets their number"
        )


def _check_saving(placed: PlacedRun) -> None:
    """Check where checkpoints go: against the run to resume, what lies there, and the device."""
    request, experiment = placed.fitted.resolved.request, placed.fitted.experiment
    where, saving = request.settings.get("SAVE"), placed.saving
    if placed.resumed:
        _check_resumed_folder(placed, where)
    elif saving and saving.folder:
        there = checkpoints.in_folder(saving.folder)
        loads_them = experiment.load and Path(experiment.load).resolve() == saving.folder
        if there and not loads_them:
            raise UserError(
                f"SAVE={where} already holds checkpoints, the newest of step {there[-1].step}\n"
                f"name another folder, or begin with the newest of them: LOAD={where}"
            )
    if saving and request.device == "cpu" and experiment.sharding.startswith("fsdp"):
        raise UserError(
            f"{experiment.id}: Megatron-FSDP saves on GPUs only: on a CPU its ranks wait for each"
            " other for ever\nSAVE=0 trains without checkpoints, SHARDING=optim or torch_fsdp2"
            " saves here, too"
        )


def _check_resumed_folder(placed: PlacedRun, where: str | None) -> None:
    """A resumed run keeps its checkpoints where they are: ``RESUME=`` looks for them there."""
    run = placed.resumed.run
    if where == "0":
        raise UserError(
            f"SAVE=0: {run.label} keeps checkpoints, and RESUME= could not resume it once more"
            " without\nleave SAVE=0 out"
        )
    folder = run.path / "checkpoints" if where == "1" else Path(where or run.checkpoints)
    if folder.resolve() != run.checkpoints.resolve():
        raise UserError(
            f"SAVE={where}: {run.label} keeps its checkpoints in {run.checkpoints}, where RESUME="
            f" looks for them\nleave SAVE= out; LOAD={run.label} SAVE={where} begins a new run"
        )


def _check_format(experiment: Experiment) -> None:
    """Refuse another format of checkpoints than that of the sharding.

    Upstream trains, and fails in its first save: ``schedule_async_save`` of
    megatron/training/checkpointing.py takes distributed checkpoints alone. harness.run.checkpoints
    reads no others.
    """
    ours = "fsdp_dtensor" if experiment.sharding.startswith("fsdp") else "torch_dist"
    for argument in extra_arguments.arguments(experiment.extra_args):
        of_format = argument.option in ("--ckpt-format", "--dist-ckpt-format")
        if of_format and argument.values != (ours,):
            raise UserError(
                f"{experiment.id}: ARGS has {argument}, but checkpoints with sharding"
                f" {experiment.sharding} are {ours}: no other format can be saved while training,"
                f" nor resumed\nleave {argument.option} out"
            )


def _resumed_checkpoint(placed: PlacedRun, tell: Callable[[str], None]) -> Loading | None:
    """The newest whole checkpoint of the run to resume; None where it ended before its first, or
    has nothing left to do.

    The run must be over, of the same model, and, without ``FORCE=1``, of the same losses.
    """
    resumed, experiment = placed.resumed, placed.fitted.experiment
    request = placed.fitted.resolved.request
    # Node 0 may have resumed it already, and has its lock then.
    is_node_0 = placed.place.node_rank == "0" or bool(request.batch)
    if is_node_0 and (holder := job.holder_after_waiting(resumed.run.path)):
        raise UserError(f"RESUME={request.resume}: {still_runs(resumed.run, holder)}")
    check_model(resumed.run.path, resumed.trained.model, experiment)
    if resumed.curve_changes and request.settings.get("FORCE") != "1":
        run_to_resume.refuse_other_losses(resumed, placed.fitted)
    skipped: list[str] = []
    found = checkpoints.newest_whole(resumed.run.checkpoints, skipped.append)
    if found:
        for line in skipped:
            tell(line)
        check_fits(found, experiment)
    elif not run_to_resume.at_its_end(resumed.run, experiment):
        tell(run_to_resume.check_never_saved(resumed.run, skipped))
    for notice in resumed.notices(experiment.data, found.step if found else 0):
        tell(notice)
    if found and found.step > experiment.steps:
        raise UserError(
            f"RESUME: {resumed.run.label} has a checkpoint of step {found.step}, and"
            f" STEPS={experiment.steps}\nSTEPS={2 * found.step} trains as long again; RESUME= never"
            " goes back"
        )
    return Loading(found.path.parent, found.step) if found else None


def _loaded_checkpoint(placed: PlacedRun, tell: Callable[[str], None]) -> Loading:
    """The newest whole checkpoint of what ``LOAD=`` names."""
    experiment = placed.fitted.experiment
    found = finding.checkpoint(experiment.load, placed.fitted.resolved.request.outdir, tell)
    check_fits(found, experiment)
    only_weights = not found.contents.has_optimizer
    if not only_weights and found.step >= experiment.steps:
        raise UserError(
            f"LOAD={experiment.load}: its checkpoint is of step {found.step}, and"
            f" STEPS={experiment.steps}: nothing is left\nSTEPS={2 * found.step} trains as long"
            " again"
        )
    what = "the weights" if only_weights else f"step {found.step}"
    tell(f"begins with {what} of {found.path.parent}")
    return Loading(found.path.parent, found.step, only_weights)
