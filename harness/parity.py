"""``make parity``: under every parallelism a tiny model has the losses of a single process.

All runs load the same weights, one ``torch_dist`` checkpoint that upstream reshards, and train on
the same micro-batches: fp32, no dropout, no forced routing, no dropped tokens. Only the order of
sums differs. The learning rate is high enough that a wrong gradient shows in the next loss.
Gradient norms are compared as well, because Adam hides a wrong factor common to all gradients.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from harness.experiment.constraints import with_changes
from harness.experiment.experiment import Experiment
from harness.experiment.model import Mamba, Model
from harness.run.directory import RUN_DIR_VARIABLE, RunDir
from harness.run.schema import StepMetrics
from harness.upstreams.megatron_lm.environment import variables
from harness.upstreams.megatron_lm.flags import flags_as_learned

STEPS = 10
LOSS_TOLERANCE = 2e-6
NORM_TOLERANCE = 2e-5
LIMIT_S = 300
"""A run takes less than a tenth of this; a longer one hangs."""

DENSE = Model(name="tiny", num_layers=4, hidden_size=64, num_attention_heads=4, vocab_size=255)
MOE = Model(
    name="tiny-moe",
    num_layers=2,
    hidden_size=64,
    num_attention_heads=4,
    vocab_size=255,
    add_bias_linear=False,
    num_experts=4,
    moe_router_topk=2,
    moe_ffn_hidden_size=64,
)

HYBRID = DENSE.model_copy(update={"name": "tiny-hybrid"})
HYBRID_MOE = MOE.model_copy(update={"name": "tiny-hybrid-moe", "first_dense_layers": 1})
MAMBA = DENSE.model_copy(
    update={
        "name": "tiny-mamba",
        "layer_pattern": "M-M*",
        "mamba": Mamba(num_heads=8, head_dim=16, state_dim=16, num_groups=2),
        "normalization": "RMSNorm",
        "position_embedding": "none",
    }
)
BASES = {model.name: {"entry": "hybrid"} for model in (HYBRID, HYBRID_MOE, MAMBA)}
"""Fields of every run of a model, of one process too."""

SETTINGS = """
    --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.02
    --moe-router-load-balancing-type none --eval-iters 0
    --lr 1e-3 --min-lr 1e-3 --lr-decay-style constant --lr-warmup-fraction 0
"""

SP2 = {"tp": 2, "sequence_parallel": True}
ZERO = {"sharding": "optim"}
LAYOUTS: dict[str, tuple[Model, dict[str, object]]] = {
    "dp2": (DENSE, {"dp": 2}),
    "dp2 zero": (DENSE, {"dp": 2} | ZERO),
    "tp2": (DENSE, {"tp": 2}),
    "tp2 sp": (DENSE, SP2),
    "pp2": (DENSE, {"pp": 2}),
    "pp2 vpp2": (DENSE, {"pp": 2, "vpp": 2}),
    "pp2 uneven": (DENSE, {"pp": 2, "first_stage_layers": 1}),
    "pp2 vpp2 layout": (DENSE, {"pp": 2, "vpp": 2, "pp_layout": "Et|t*2|t|L"}),
    "cp2 p2p": (DENSE, {"cp": 2, "cp_comm_type": "p2p"}),
    "cp2 all_gather": (DENSE, {"cp": 2, "cp_comm_type": "all_gather"}),
    "cp2 a2a": (DENSE, {"cp": 2, "cp_comm_type": "a2a"}),
    "cp4 a2a+p2p": (DENSE, {"cp": 4, "cp_comm_type": "a2a+p2p"}),
    "recompute": (DENSE, {"recompute": "full"}),
    "tp2 pp2": (DENSE, {"tp": 2, "pp": 2}),
    "tp2 sp cp2": (DENSE, SP2 | {"cp": 2}),
    "tp2 sp dp2 zero": (DENSE, SP2 | {"dp": 2} | ZERO),
    "pp2 vpp2 dp2 zero recompute": (
        DENSE,
        {"pp": 2, "vpp": 2, "dp": 2, "recompute": "full"} | ZERO,
    ),
    "tp2 sp dp2 zero fused gradients": (
        DENSE,
        SP2 | {"dp": 2, "gradient_fusion": True} | ZERO,
    ),
    "pp2 vpp2 fused gradients": (DENSE, {"pp": 2, "vpp": 2, "gradient_fusion": True}),
    "ep2 fused gradients": (MOE, {"dp": 2, "ep": 2, "gradient_fusion": True}),
    "tp2 sp dp2 zero of a hybrid": (HYBRID, SP2 | {"dp": 2} | ZERO),
    "pp2 vpp2 of a hybrid": (HYBRID, {"pp": 2, "vpp": 2}),
    "ep2 of a hybrid": (HYBRID_MOE, {"dp": 2, "ep": 2}),
    "dp2 zero of Mamba layers": (MAMBA, {"dp": 2} | ZERO),
    "tp2 of Mamba layers": (MAMBA, {"tp": 2}),
    "tp2 sp of Mamba layers": (MAMBA, SP2),
    "pp2 vpp2 of Mamba layers": (MAMBA, {"pp": 2, "vpp": 2}),
    "cp2 p2p of Mamba layers": (MAMBA, {"cp": 2, "cp_comm_type": "p2p"}),
    "recompute of Mamba layers": (MAMBA, {"recompute": "full"}),
    "ep2": (MOE, {"dp": 2, "ep": 2}),
    "ep2 zero": (MOE, {"dp": 2, "ep": 2} | ZERO),
    "tp2 sp etp2": (MOE, SP2 | {"etp": 2}),
    "tp2 sp ep2": (MOE, SP2 | {"ep": 2}),
    "tp2 sp dp2 ep2 etp2": (MOE, SP2 | {"dp": 2, "ep": 2, "etp": 2}),
    "pp2 ep2": (MOE, {"pp": 2, "dp": 2, "ep": 2}),
}
ROW = "{:36} {:>5} {:>5}  {:16} {:>10} {:>10}  {}"


@dataclass
class ParityRun:
    """A training run whose ranks are forked from this process, which has imported everything.

    Attributes:
        arguments: upstream's, beyond what the experiment says.
        tolerance: relative difference up to which its losses count as equal.
        own_script: whether harness/entry/pretrain.py trains, even where upstream's script is there.
    """

    name: str
    experiment: Experiment
    folder: Path
    arguments: tuple[str, ...] = ()
    tolerance: float = LOSS_TOLERANCE
    own_script: bool = False
    failure: str | None = None
    _pids: set[int] = field(default_factory=set)
    _started_s: float = 0.0

    @property
    def ranks(self) -> int:
        return self.experiment.world_size

    def start(self) -> None:
        """Fork the ranks."""
        from harness.entry import warm

        self.folder.mkdir(parents=True)
        self._started_s = time.monotonic()
        port = _free_port()
        for rank in range(self.ranks):
            pid = warm.fork()
            if pid == 0:
                self._train(rank, port)
            self._pids.add(pid)

    def ended(self) -> bool:
        """Whether all ranks have ended; after a failure or ``LIMIT_S`` the others are killed."""
        for pid in tuple(self._pids):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self._pids.remove(pid)
            if status and not self.failure:
                ended_with = os.waitstatus_to_exitcode(status)
                self.failure = self._first_error() or f"a rank ended with status {ended_with}"
        if time.monotonic() - self._started_s > LIMIT_S and not self.failure:
            self.failure = f"hangs: not at its end after {LIMIT_S} s"
        if self.failure:
            for pid in self._pids:
                os.kill(pid, signal.SIGKILL)
        return not self._pids

    def metrics(self) -> tuple[StepMetrics, ...]:
        """One entry per step."""
        return RunDir(self.folder).read_metrics()

    def _train(self, rank: int, port: int) -> NoReturn:
        """Train as rank ``rank``, with the environment that torchrun would set."""
        from harness.entry.rank import run

        log = os.open(self.folder / "logs.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for output in (1, 2):
            os.dup2(log, output)
        ranks = str(self.ranks)
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": ranks,
            "LOCAL_WORLD_SIZE": ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            RUN_DIR_VARIABLE: str(self.folder),
        }
        sys.argv = ["pretrain_gpt.py", *flags(self.experiment), *self.arguments]
        run(self.own_script)

    def _first_error(self) -> str | None:
        errors = sorted(RunDir(self.folder).read_rank_errors(), key=lambda error: error.time)
        return next((f"rank {e.rank}: {e.type}: {e.message[:200]}" for e in errors), None)


def _free_port() -> int:
    """A free port below the range that the kernel assigns, from which gloo takes ports any time."""
    try:
        lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:
        lowest = 32768
    while True:
        port = max(lowest, 20_000) - 1 - secrets.randbelow(10_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def main(only: Collection[str] | None = None) -> int:
    """Compare every layout with one process, a line each; the exit status, 0 where all are equal.

    Args:
        only: names in ``LAYOUTS``; by default all of them, and the harness's own script.
    """
    for variable in variables(tiny(DENSE, {}), "cpu"):
        os.environ[variable.name] = variable.value
    os.environ["OMP_NUM_THREADS"] = "1"
    warnings.simplefilter("ignore")  # upstream warns of features that need a GPU
    from harness.entry import rank

    rank.prepare_for_forks()
    folder = Path(tempfile.mkdtemp(prefix="parity-"))
    wanted = {name: LAYOUTS[name] for name in only or LAYOUTS}
    equal = _compare(wanted, folder, with_own_script=not only and rank.prepare() is not None)
    if equal:
        print(f"every loss of every step within {LOSS_TOLERANCE:.0e} of one process's")
        shutil.rmtree(folder)
    else:
        print(f"not equal; logs and metrics of every run: {folder}")
    return 0 if equal else 1


def _compare(
    layouts: dict[str, tuple[Model, dict[str, object]]], folder: Path, with_own_script: bool
) -> bool:
    """Train one step for the weights, then one process per model, then all layouts.

    Returns:
        whether all losses are equal.
    """
    initial, single, runs = [], [], []
    for model in dict.fromkeys(model for model, _ in layouts.values()):
        weights = str(folder / f"{model.name} weights")
        load = ("--load", weights, "--finetune", "--no-load-optim", "--no-load-rng")
        one_step = "--save-interval 1 --lr 0 --min-lr 0 --train-iters 1"
        save = ("--save", weights, *one_step.split())
        initial.append(_run("initial weights", model, {}, folder, save))
        single.append(_run("one process", model, {}, folder, load))
        runs += [
            _run(name, model, changes, folder, load)
            for name, (used, changes) in layouts.items()
            if used is model
        ]
        if with_own_script:
            runs.append(
                _run(
                    "harness's own script", model, {}, folder, load, tolerance=0.0, own_script=True
                )
            )

    for run in _finished(initial):
        if run.failure:
            print(f"{run.name}: {run.failure}")
            return False
    print(ROW.format("", "ranks", "steps", "loss", "difference", "grad norm", ""))
    references: dict[str, tuple[StepMetrics, ...]] = {}
    equal = True
    for run in _finished(single):
        references[run.experiment.model.name] = run.metrics()
        equal &= _judge(run)
    for run in _finished(runs):
        equal &= _judge(run, references[run.experiment.model.name])
    return equal


def _run(
    name: str,
    model: Model,
    changes: dict[str, object],
    folder: Path,
    arguments: tuple[str, ...],
    **more,
) -> ParityRun:
    name = f"{model.name}, {name}"
    return ParityRun(name, tiny(model, changes), folder / name, arguments, **more)


def tiny(model: Model, changes: dict[str, object]) -> Experiment:
    """``model`` on one process for a few seconds, with ``changes`` (fields of Experiment)."""
    one_process = Experiment(
        id="999",
        slug="parity",
        chapter=900,
        shows="parity",
        model=model,
        precision="fp32",
        steps=STEPS,
        micro_batch_size=2,
        global_batch_size=8,
        seq_length=32,
    )
    return with_changes(one_process, **BASES.get(model.name, {}) | changes)


def flags(experiment: Experiment) -> list[str]:
    """Upstream's arguments for ``experiment``, without anything random."""
    return flags_as_learned(experiment, "cpu") + SETTINGS.split()


def _finished(runs: list[ParityRun]) -> Iterator[ParityRun]:
    """Run all, at most one rank per core at the same time; yield each run at its end."""
    waiting, running = list(runs), []
    free = max(os.cpu_count() or 1, 2)
    while waiting or running:
        while waiting and (not running or waiting[0].ranks <= free):
            running.append(waiting.pop(0))
            free -= running[-1].ranks
            running[-1].start()
        for run in [run for run in running if run.ended()]:
            running.remove(run)
            free += run.ranks
            yield run
        time.sleep(0.02)


def _judge(run: ParityRun, reference: tuple[StepMetrics, ...] | None = None) -> bool:
    """Print the row of ``run``; whether it equals ``reference``, or can be one, at every step."""
    steps = run.metrics()
    reference = reference or steps
    losses = [step.loss for step in steps]
    span = f"{losses[0]:.5f} -> {losses[-1]:.5f}" if losses else ""
    if run.failure or None in losses or len(steps) != STEPS or len(reference) != STEPS:
        verdict = run.failure or f"{len(steps)} of {STEPS} steps, {len(reference)} in the reference"
        print(ROW.format(run.name, run.ranks, len(steps), span, "", "", verdict), flush=True)
        return False
    loss, norm = (
        max(
            abs(getattr(a, name) / getattr(b, name) - 1)
            for a, b in zip(steps, reference, strict=True)
        )
        for name in ("loss", "grad_norm")
    )
    equal = loss <= run.tolerance and norm <= NORM_TOLERANCE
    verdict = "equal" if equal else f"DIFFERS: allowed {run.tolerance:.0e} and {NORM_TOLERANCE:.0e}"
    print(
        ROW.format(run.name, run.ranks, STEPS, span, f"{loss:.1e}", f"{norm:.1e}", verdict),
        flush=True,
    )
    return equal
