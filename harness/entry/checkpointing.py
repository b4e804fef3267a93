"""Saving checkpoints: asynchronous, checked for room, synced to disk, recorded, and pruned.

A thread of rank 0 syncs each checkpoint and writes its checksums while training continues. Only
then is the checkpoint recorded in saves.jsonl, and older ones are deleted. Lines of metrics.jsonl
are synced before the checkpoint they belong to.

Wrapped are ``save_checkpoint`` in megatron/training/checkpointing.py and the request that it passes
to its writer process. Upstream stops that writer before it saves once more after the last step, so
that last save is synchronous.
"""

import multiprocessing
import os
import shutil
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from harness.entry import on_cpu
from harness.entry.report import RankReport
from harness.errors import UserError
from harness.run import checkpoints
from harness.run.schema import Save
from harness.system.files import sync_file, sync_folder
from harness.system.orphans import end_with
from harness.upstreams.megatron_lm.environment import KEEP_VARIABLE

SERVER = "harness.entry.writer"


def install(report: RankReport) -> None:
    """Wrap upstream's saving."""
    from megatron.training import checkpointing, training

    from harness.entry import remainders

    _start_writer_here()
    _regroup_experts()
    _count_steps_of_fsdp2()
    _survive_a_bad_tracker()
    _tell_who_was_asked_to_end(report)
    remainders.install()
    saves = _Saves(report)
    save, schedule, train = (
        training.save_checkpoint,
        checkpointing.schedule_async_save,
        training.train,
    )

    def save_checkpoint(iteration, model, *args, **kwargs):
        if saves.begin(iteration, model):
            save(iteration, model, *args, **kwargs)
            saves.handed_over(iteration)

    def schedule_async_save(request):
        step = saves.step
        request.finalize_fns.insert(0, saves.lines_are_synced)  # before metadata.json is written
        request.add_finalize_fn(lambda: saves.whole(step))
        schedule(request)

    def train_and_settle(forward_step, model, *args, **kwargs):
        saves.check_room_for_all(model)
        result = train(forward_step, model, *args, **kwargs)
        training.get_args().async_save = False
        return result

    training.save_checkpoint = save_checkpoint
    training.train = train_and_settle
    checkpointing.schedule_async_save = schedule_async_save
    report.at_end.append(saves.finish)


def _start_writer_here() -> None:
    """Have upstream's writer, and the manager of its results, end with this rank.

    On a CPU the writer is forked: it then has the stand-in for CUDA, and starts at once. With CUDA
    a fork is not possible, because the context does not survive it.
    """
    from megatron.training import initialize

    start, rank, starting = initialize.init_persistent_async_worker, os.getpid(), False

    def end_with_rank() -> None:
        if starting and os.getppid() == rank:
            end_with(rank)

    def start_worker(number: int, mode: str) -> None:
        nonlocal starting
        starting = True
        start(number, "fork" if on_cpu() else mode)
        starting = False

    if not on_cpu():
        multiprocessing.set_forkserver_preload([SERVER])
    os.register_at_fork(after_in_child=end_with_rank)
    initialize.init_persistent_async_worker = start_worker


def _tell_who_was_asked_to_end(report: RankReport) -> None:
    """Report that the run ends early because a rank received ``EXIT_SIGNAL``.

    Upstream asks all ranks after each step, so that every node hears of it.
    """
    from megatron.training.dist_signal_handler import DistributedSignalHandler

    ask = DistributedSignalHandler.signals_received

    def signals_received(self) -> list[int]:
        received = ask(self)
        report.asked_to_end = report.asked_to_end or any(received)
        return received

    DistributedSignalHandler.signals_received = signals_received


def _regroup_experts() -> None:
    """Let a run with expert parallelism resume without it, and the other way round.

    Upstream has one optimizer without expert parallelism and two with it, the second for experts
    (``ChainedOptimizer``), and loads only a checkpoint of the same number. Moments are stored by
    parameter name, like weights, so only the entries of parameter groups are converted.
    """
    from megatron.core.optimizer.optimizer import ChainedOptimizer

    load = ChainedOptimizer.load_state_dict

    def load_state_dict(self, state) -> None:
        load(self, _regrouped(state, len(self.chained_optimizers)))

    ChainedOptimizer.load_state_dict = load_state_dict


def _regrouped(state, optimizers: int):
    """A loaded ``state`` of one optimizer, or of two {0: …, 1: …}, for ``optimizers`` of them."""
    if not isinstance(state, dict):
        return state
    numbered = {key: value for key, value in state.items() if isinstance(key, int)}
    rest = {key: value for key, value in state.items() if key not in numbered}
    if optimizers == 1 and numbered:
        return {**numbered[0], **rest}
    if optimizers == 2 and "optimizer" in rest:
        known = rest["optimizer"]
        groups = [
            [{**group, "is_expert_parallel": bool(n)} for group in known["param_groups"]]
            for n in (0, 1)
        ]
        return {
            n: {**rest, "optimizer": {**known, "param_groups": groups[n]}, **numbered[n]}
            for n in (0, 1)
        }
    return state


def _count_steps_of_fsdp2() -> None:
    """Set Adam's step count where upstream loads an optimizer in place, which it does for FSDP2.

    There (``skip_load_to_model_and_opt`` in megatron/training/training.py) the count is not loaded:
    Transformer Engine's Adam would correct the bias of old moments as if they were new, and
    PyTorch's Adam raises. In bf16 every iteration is a step.
    """
    from megatron.training import get_args, training

    load = training.load_checkpoint

    def load_checkpoint(model, optimizer, *args, skip_load_to_model_and_opt=False, **kwargs):
        found = load(
            model, optimizer, *args, skip_load_to_model_and_opt=skip_load_to_model_and_opt, **kwargs
        )
        with_optimizer = optimizer is not None and not (
            get_args().finetune or get_args().no_load_optim
        )
        if skip_load_to_model_and_opt and with_optimizer and found[0]:
            _set_steps(optimizer.optimizer, found[0])
        return found

    training.load_checkpoint = load_checkpoint


def _set_steps(adam, steps: int) -> None:
    import torch

    if isinstance(adam, torch.optim.Adam):
        for state in adam.state.values():
            state["step"] = torch.tensor(float(steps))
    else:
        for group in adam.param_groups:
            group["step"] = steps


def _survive_a_bad_tracker() -> None:
    """Where upstream's tracker file is empty or damaged, take the newest whole checkpoint.

    Upstream's ``read_metadata`` (megatron/training/checkpointing.py) would exit, even where
    ``--ckpt-step`` names the checkpoint.
    """
    from megatron.training import checkpointing

    read = checkpointing.read_metadata

    def read_metadata(tracker):
        if checkpoints.tracked(Path(tracker).parent):
            return read(tracker)
        newest = checkpoints.newest_whole(Path(tracker).parent)
        if newest is None:
            raise UserError(f"{tracker} is empty, and no checkpoint in its folder is complete")
        print(
            f"WARNING: {tracker} is empty; the newest whole checkpoint is {newest.path.name}",
            flush=True,
        )
        # upstream's reader also makes all ranks agree: give it a tracker with the step found
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as instead:
            instead.write("release" if newest.path.name == "release" else str(newest.step))
            instead.flush()
            return read(instead.name)

    checkpointing.read_metadata = read_metadata


class _Saves:
    """The saves of this rank; rank 0 records them and deletes old checkpoints."""

    def __init__(self, report: RankReport) -> None:
        self.step = 0
        self._report = report
        self._keep = int(os.environ.get(KEEP_VARIABLE, 0))
        self._size_bytes = 0.0
        self._begun_s: dict[int, float] = {}
        self._blocked_s: dict[int, float] = {}
        self._settling: list[Future] = []
        self._syncing: list[Future] = []
        self._settler, self._syncer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    def check_room_for_all(self, model) -> None:
        """Raise UserError before the first step where all saves of the run cannot fit the disk."""
        from megatron.training import get_args

        args = get_args()
        if not args.save:
            return
        self._size_bytes = _expected_bytes(model)
        done = args.iteration // args.save_interval if args.load == args.save else 0
        saves = -(-args.train_iters // args.save_interval) - done
        saving = checkpoints.Saving(args.save_interval, self._keep or None, Path(args.save))
        checkpoints.check_room(saving, saves, self._size_bytes, self._free_bytes())

    def begin(self, step: int, model) -> bool:
        """Whether there is room for the checkpoint of ``step``; if not, warn and continue training.

        Raises:
            UserError: it is the last one, without which the run's work would be lost.
        """
        from megatron.training import get_args

        args = get_args()
        self.step = step
        self._begun_s[step] = time.monotonic()
        if self._report.is_last:  # the rank that writes metrics
            self._syncing.append(self._syncer.submit(self._sync_lines))
        if not args.async_save:
            self.lines_are_synced()
        if not self._size_bytes:
            self._size_bytes = _expected_bytes(model)
        free = self._free_bytes()
        if free < self._size_bytes:
            room = f"it needs {checkpoints.gib(self._size_bytes)}, {checkpoints.gib(free)} are free"
            what = f"checkpoint of step {step} not saved to {args.save}: {room}"
            if step >= args.train_iters:
                raise UserError(
                    f"{what}\nmake room there; RESUME=1 then resumes at the checkpoint before"
                )
            if self._report.rank == 0:
                print(f"WARNING: {what}", flush=True)
            return False
        folder = self._path(step)
        # files of a save that was killed would count as part of this one
        if self._report.rank == 0 and folder.exists():
            checkpoints.remove(folder)
        return True

    def lines_are_synced(self) -> None:
        """Wait until the metrics so far are on the disk, on the rank that writes them."""
        while self._syncing:
            self._syncing.pop().result()

    def handed_over(self, step: int) -> None:
        """Upstream's save returned: a synchronous checkpoint is complete."""
        from megatron.training import get_args

        self._blocked_s[step] = time.monotonic() - self._begun_s[step]
        if not get_args().async_save:
            self.whole(step)

    def whole(self, step: int) -> None:
        """All ranks have written the checkpoint of ``step``: settle it, delete old ones."""
        if self._report.rank != 0:
            return
        from megatron.training import get_args

        begun_s, blocked_s = self._begun_s.pop(step), self._blocked_s.pop(step, None)
        asynchronous = get_args().async_save
        self._settling.append(
            self._settler.submit(self._settle, step, asynchronous, begun_s, blocked_s)
        )

    def _settle(
        self, step: int, asynchronous: bool, begun_s: float, blocked_s: float | None
    ) -> None:
        path = self._path(step)
        try:
            checkpoints.settle(path)
        except OSError as error:
            print(
                f"WARNING: the checkpoint of step {step} may not be on the disk: {path}: {error}",
                flush=True,
            )
            raise
        line = Save(
            step=step,
            asynchronous=asynchronous,
            blocked_ms=(blocked_s or 0.0) * 1e3,
            whole_after_s=time.monotonic() - begun_s,
            whole_at_step=max(self._report.step, step),
            gib=sum(file.stat().st_size for file in path.iterdir()) / 2**30,
            time=time.time(),
        )
        with self._report.run_dir.saves.open("a") as lines:
            lines.write(line.model_dump_json() + "\n")
        sync_file(self._report.run_dir.saves)
        sync_folder(self._report.run_dir.path)
        if self._keep:
            checkpoints.prune(path.parent, self._keep)

    def _sync_lines(self) -> None:
        for path in (self._report.run_dir.metrics, self._report.run_dir.validation):
            sync_file(path)
        sync_folder(self._report.run_dir.path)

    def finish(self) -> None:
        """Wait until every checkpoint is on the disk and old ones are deleted.

        Raises:
            UserError: one could not be written: the disk is full or broken.
        """
        for settling in self._settling:
            try:
                settling.result()
            except OSError as error:
                raise UserError(
                    f"a checkpoint in {self._path(self.step).parent} may not be on the disk: "
                    f"{error}\n"
                    "make checkpoints says which are whole; SAVE= names a folder on another disk"
                ) from None

    def _path(self, step: int) -> Path:
        from megatron.training import get_args

        return Path(get_args().save) / f"iter_{step:07d}"

    def _free_bytes(self) -> float:
        """Free bytes on the disk as rank 0 sees it, so that all ranks decide alike."""
        import torch
        from megatron.training import get_args

        folder = Path(get_args().save)
        folder.mkdir(parents=True, exist_ok=True)
        free = torch.tensor(
            [float(shutil.disk_usage(folder).free)], dtype=torch.float64, device="cuda"
        )
        torch.distributed.broadcast(free, src=0)
        return free.item()


def _expected_bytes(model) -> float:
    """Bytes of a checkpoint: weights, two fp32 moments, and fp32 weights where the model's are not.

    Each rank counts its parameters divided by the number of data-parallel replicas. Norms, which
    tensor-parallel ranks replicate, are counted several times; they are small.
    """
    import torch
    from megatron.core import parallel_state as ranks
    from megatron.training import get_args

    args = get_args()
    optimizer = 0 if args.no_save_optim else 8 + 4 * (args.bf16 or args.fp16)
    dense = ranks.get_data_parallel_world_size(with_context_parallel=True)
    expert = ranks.get_expert_data_parallel_world_size()
    here = 0.0
    for parameter in (parameter for chunk in model for parameter in chunk.parameters()):
        replicas = dense if getattr(parameter, "allreduce", True) else expert
        here += parameter.numel() * (parameter.element_size() + optimizer) / replicas
    total = torch.tensor([here], dtype=torch.float64, device="cuda")
    torch.distributed.all_reduce(total)
    return total.item()
