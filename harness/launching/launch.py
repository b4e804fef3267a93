"""Launch a run: its directory, its processes, what they do meanwhile, how they end. Nothing
outlives its launcher."""

from __future__ import annotations

import os
import signal
import socket
import statistics
import subprocess
import textwrap
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from harness.data import fingerprint
from harness.data.content import check_content
from harness.errors import UserError, nearest
from harness.experiment.hardware import find_gpu, peak_tflops
from harness.launching import failed_load, outcome, processes
from harness.launching.failed_load import upstream_of
from harness.launching.meeting import SHARED_S, run_directory
from harness.launching.processes import LAUNCHER_VARIABLE, Signals
from harness.launching.reserve import Reservation, folders_of, give_back
from harness.launching.terminal import Progress, Terminal, open_terminal, phase_of, summary
from harness.machine import gpus
from harness.machine.provenance import describe_environment
from harness.machine.requirements import check_machine
from harness.planning import start
from harness.predict import calibrations, capacity
from harness.run import directory
from harness.run.directory import (
    RUN_DIR_VARIABLE,
    TURN_VARIABLE,
    Change,
    LaunchRate,
    MemoryGib,
    Result,
    RunDir,
    StepMetrics,
    Upstream,
)
from harness.run.step_statistics import measure
from harness.system import locks
from harness.system.files import told_if_unwritable, write_json, write_text
from harness.system.orphans import end_with
from harness.system.screen import say

if TYPE_CHECKING:
    import psutil

    from harness.planning.plan import Plan

WIDTH = 80
POLL_S = 0.05
LOOK_S = 1.0
"""How often memory is looked at."""
HANG_AT_START_S = 600
"""So long a run may be silent before its first step: imports, initialisation, compilation."""
HANG_S = 300
"""So long it may be silent afterwards, unless HANG= says otherwise."""
GRACE_S = 10
"""Time to end after SIGTERM, before SIGKILL."""
STACKS_S = 5
"""Time to write stacks after SIGUSR1."""
FOLLOW_S = 5
"""Another node has failed: ranks of this one notice within this time, or are ended."""
ENDINGS_S = 10
"""At its end a node waits this long for what the others say of theirs."""
STARTING = "starting torchrun"
LOG_TAIL_BYTES = 64 * 2**20
"""An error further from the end of the log is not looked for."""


@dataclass(frozen=True)
class Finished:
    """A run that is over."""

    dir: RunDir
    result: Result

    @property
    def exit_status(self) -> int:
        """0 ok, 2 bad configuration, 128 + signal where a signal ended it, else 1."""
        if self.result.status == "killed":
            return self.result.exit_code or 1
        return {"ok": 0, "bad-configuration": 2}.get(self.result.status, 1)


class Run:
    """A run from its start to its result. Its owner polls it until it is over, then finishes it; no
    call blocks."""

    def __init__(
        self,
        plan: Plan,
        reserved: Reservation,
        gpu_ids: tuple[int, ...] = (),
        hang_seconds: float | None = None,
        held: bool = False,
    ) -> None:
        """Start ``plan``.

        Args:
            reserved: its run directory, and the other nodes.
            gpu_ids: the GPUs it uses, by NVML index; none on a CPU.
            hang_seconds: silence after a step that counts as a hang (``HANG_S``); before,
            ``HANG_AT_START_S`` at least.
            held: its ranks import everything, half of a short run's time, and touch no GPU until
            ``release``.
        """
        run_dir, keeps_records = reserved.run_dir, reserved.keeps_records
        self.plan, self.dir, self.gpu_ids = plan, run_dir, gpu_ids
        self._others = reserved.others
        self._is_last_node = plan.place.node_rank == str(plan.experiment.nodes - 1)
        self._follow_at = 0.0
        self._follows = False
        self.packed_with: set[str] = set()
        self._hang_s = hang_seconds or HANG_S
        self._keeps_records = keeps_records
        self.held = held
        self._metrics: list[StepMetrics] = []
        self._resumed_at = _resumed_at(plan, run_dir)
        self._changed = _changed(plan, run_dir)
        self._upstream_before = upstream_of(run_dir)
        self._phase = STARTING
        self._memory_gib: float | None = None
        self._looked_at = self._kill_at = 0.0
        self._stopped_by: signal.Signals | None = None
        self._because_ended: str | None = None
        self._hang: str | None = None
        self._started_again = False
        self._finished: Finished | None = None

        log_path = (
            run_dir.logs if keeps_records else run_dir.logs_of_node(int(plan.place.node_rank))
        )
        self._log, self._steps, self._evaluations = (
            _Tail(log_path),
            _Tail(run_dir.metrics),
            _Tail(run_dir.validation),
        )
        self._script = plan.script(None if gpu_ids == tuple(range(len(gpu_ids))) else gpu_ids)
        self._environment = describe_environment(plan.device, gpu_ids)
        self._begin()
        if keeps_records:
            with told_if_unwritable(run_dir.path):
                if plan.resumes == run_dir:
                    directory.go_on(run_dir, plan.first_step)
                self._write_records()
        self._before = self._shown = len(run_dir.read_metrics()) if plan.resumes else 0
        self._process = self._spawn()
        self._sampler = self._new_sampler()

    @property
    def label(self) -> str:
        return self.dir.label

    def release(self) -> None:
        """Let a held run go on; its time, its memory and its silence count from now."""
        self.held = False
        self._begin()
        self._sampler = self._new_sampler()
        self.dir.turn.touch()

    def poll(self) -> bool:
        """Look after the run. Returns whether it still runs."""
        now = time.monotonic()
        self._read_news(now)
        self._hear(now)
        if now - self._looked_at > LOOK_S:
            self._look(now)
            if self._is_deleted and not self._kill_at:
                self._terminate()
        if self._process.poll() is not None:
            return self._started_anew()
        if self._kill_at and now > self._kill_at:
            processes.end(self._processes(), grace_s=0)
        elif not self._kill_at and not self.held and now - self._active_at > self._patience_s:
            self._give_up(now - self._active_at)
        return True

    def stop(self, number: signal.Signals, because_ended: str | None = None) -> None:
        """End every rank: SIGTERM, which torchrun passes on; SIGKILL after ``GRACE_S``, or at once
        when asked again.

        Args:
            because_ended: the process whose end was the reason.
        """
        self._because_ended = self._because_ended or because_ended
        if self._stopped_by:
            self._kill_at = time.monotonic()
        else:
            self._stopped_by = number
            self._terminate()

    def finish(self) -> Finished:
        """Write result.json of a run that is over, and see to it that nothing of it is left
        running.

        Raises:
            UserError: the run directory was deleted meanwhile, or cannot be written to.
        """
        if self._finished is None:
            processes.end(self._marked(), GRACE_S)
            self._sampler.stop()
            self.dir.turn.unlink(missing_ok=True)
            self._read_last_news()
            found = self._with_others(outcome.classify(self._evidence(), self.plan.experiment))
            result = self._result(found)
            if self._keeps_records:
                result = failed_load.note(
                    self.plan, result, self.dir.read_rank_errors(), self._upstream_before
                )
            self._finished = Finished(self.dir, result)
            try:
                if self._is_deleted:
                    raise UserError(
                        f"{self.dir.path} was deleted while the run went on: it was ended after"
                        f" step {result.steps_done}, and nothing of it is left\nmake"
                        f" {self.plan.experiment.id} runs it again"
                    )
                if self._keeps_records:
                    with told_if_unwritable(self.dir.path):
                        self._write_launch_rate()
                        write_json(self.dir.result, self._finished.result.model_dump(mode="json"))
            finally:
                give_back(self.dir)
        return self._finished

    def abort(self) -> None:
        """End and finish a run that nobody will look after any more. Does nothing to a finished
        one."""
        if self._finished is None:
            if not self._stopped_by:
                self.stop(signal.SIGTERM)
            while self.poll():
                time.sleep(POLL_S)
            self.finish()

    def progress(self) -> list[Progress]:
        """Every step since the last call, else where the run is now."""
        new, self._shown = self._metrics[self._shown :], len(self._metrics)
        latest = self._metrics[-1:] if self._has_stepped else []
        return [self._progress(m) for m in new or latest] or [self._progress(None)]

    def _progress(self, last: StepMetrics | None) -> Progress:
        from harness.predict.flops import mfu

        shown = Progress(
            label=self.label,
            steps=self.plan.experiment.steps,
            phase="ending" if self._kill_at else self._phase,
            elapsed_s=time.time() - self._started,
            memory_gib=self._memory_gib,
        )
        if last is None:
            return shown
        step_s = statistics.median(m.step_ms for m in self._metrics[-5:]) / 1000
        return replace(
            shown,
            step=last.step,
            loss=last.loss,
            step_ms=last.step_ms,
            tflops=last.tflops,
            mfu=mfu(last.tflops, self._peak_tflops) if last.tflops and self._peak_tflops else None,
            left_s=(shown.steps - last.step) * step_s,
        )

    def _begin(self) -> None:
        self._started = time.time()
        self._active_at = time.monotonic()
        self._least_free_share = 1.0
        self._oom_kills_before = processes.oom_kills()

    def _new_sampler(self) -> gpus.Sampler:
        return gpus.Sampler(
            self.dir.gpus, self.gpu_ids if self._keeps_records and not self.held else ()
        )

    def _write_records(self) -> None:
        running = {"pid": os.getpid(), "host": socket.gethostname(), "started": self._started}
        running |= {"rendezvous": self.plan.place.rendezvous, "resumed_at": self._resumed_at}
        write_json(self.dir.running, running)
        saving = self.plan.extras.saving
        frozen = (
            self.plan.experiment,
            self.plan.device,
            self._environment["commit"],
            saving,
            self._changed,
        )
        frozen += (fingerprint.of(self.plan.experiment.data),)
        self.dir.freeze_experiment(*frozen)
        if saving and saving.folder:
            with told_if_unwritable(saving.folder, "SAVE"):
                saving.folder.mkdir(parents=True, exist_ok=True)
                RunDir(saving.folder).freeze_experiment(*frozen)
        write_json(self.dir.environment, self._environment)
        write_text(self.dir.command, self._script)

    def _write_launch_rate(self) -> None:
        """Add to environment.json what the ranks measured: that of the slowest rank, which all
        others wait for."""
        measured = [rank.launch for rank in self.dir.read_ranks() if rank.launch]
        if measured:
            slowest = LaunchRate(
                add_us=max(m.add_us for m in measured),
                operation_us=max(m.operation_us for m in measured),
            )
            self._environment["launch"] = slowest.model_dump()
            write_json(self.dir.environment, self._environment)

    def _spawn(self) -> subprocess.Popen[bytes]:
        launcher = os.getpid()
        turn = {TURN_VARIABLE: str(self.dir.turn)} if self.held else {}
        with self._log.path.open("ab") as log:
            return subprocess.Popen(
                ["bash", self.dir.command] if self._keeps_records else ["bash", "-c", self._script],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={
                    **os.environ,
                    RUN_DIR_VARIABLE: str(self.dir.path),
                    LAUNCHER_VARIABLE: str(launcher),
                    **turn,
                },
                start_new_session=True,
                pass_fds=locks.descriptors(*folders_of(self.dir)),
                preexec_fn=lambda: end_with(launcher, signal.SIGTERM),
            )

    def _read_news(self, now: float) -> None:
        lines, steps = self._log.lines(), self._steps.lines()
        for line in lines:
            self._phase = phase_of(line) or self._phase
        self._metrics += filter(None, map(directory.parse_metrics, steps))
        if lines or steps:
            self._active_at = now
        if self._others and not self._others.shares:
            self._forward(steps)

    def _forward(self, steps: list[str]) -> None:
        """Tell node 0, which does not see them, what the last rank wrote here; node 0 tells others
        that steps are made."""
        if self._others.node == 0:
            if steps:
                self._others.tell({"steps": len(self._metrics)})
        elif self._is_last_node and (steps or (evaluations := self._evaluations.lines())):
            evaluations = self._evaluations.lines() if steps else evaluations
            self._others.tell(
                {"lines": {self.dir.metrics.name: steps, self.dir.validation.name: evaluations}}
            )

    def _hear(self, now: float) -> None:
        """Take in what other nodes say; end this node's part a while after another's has failed, if
        it has not by itself."""
        if self._others is None:
            return
        self._others.poll()
        if self._others.heard:
            self._active_at = now
        for path in (self.dir.metrics, self.dir.validation):
            if (lines := self._others.lines.get(path.name)) and self._keeps_records:
                with path.open("a", encoding="utf-8") as file:
                    file.writelines(f"{line}\n" for line in lines)
        if self._others.failure and not self._kill_at and not self._stopped_by:
            self._follow_at = self._follow_at or now + FOLLOW_S
            if now > self._follow_at and self._process.poll() is None:
                self._follows = True
                self._terminate()

    def _with_others(self, found: outcome.Outcome) -> outcome.Outcome:
        """Exchange with the other nodes how it ended; the outcome of the run as a whole, by the
        node that failed first."""
        if self._others is None:
            return found
        follows = self._follows or found.follows
        told = {
            "status": found.status,
            "detail": found.detail,
            "rank": found.rank,
            "follows": follows,
        }
        if not self._others.shares and self._others.node:
            told["ranks"] = [rank.model_dump(mode="json") for rank in self.dir.read_ranks()]
        self._others.tell({"ended": told})
        deadline = time.monotonic() + (0 if self._stopped_by else ENDINGS_S)
        while not self._others.all_ended and time.monotonic() < deadline:
            self._hear(time.monotonic())
            time.sleep(POLL_S)
        self._read_news(time.monotonic())
        self._others.close()
        failure = self._others.failure
        if (
            self._stopped_by
            or failure is None
            or not (follows or found.status in ("ok", "target-missed"))
        ):
            return found
        if failure.follows and found.status == "crash" and not self._follows:
            return found
        return outcome.Outcome(
            failure.status, str(failure), failure.rank, f"the log of node {failure.node} says more"
        )

    def _read_last_news(self) -> None:
        """Read to the end; steps of another node may arrive late on a shared file system."""
        deadline = time.monotonic() + (SHARED_S if self.plan.experiment.nodes > 1 else 0)
        self._read_news(time.monotonic())
        while (
            self._process.returncode == 0
            and time.monotonic() < deadline
            and not self._has_last_step
        ):
            time.sleep(POLL_S)
            self._read_news(time.monotonic())

    @property
    def _is_deleted(self) -> bool:
        return not self.dir.path.is_dir()

    @property
    def _has_last_step(self) -> bool:
        return bool(self._metrics) and self._metrics[-1].step >= self.plan.experiment.steps

    def _look(self, now: float) -> None:
        self._looked_at = now
        self._least_free_share = min(self._least_free_share, processes.free_memory_share())
        memory = self._memory()
        self._memory_gib = memory.nvml or memory.reserved or memory.rss
        if self._phase == STARTING and memory.rss:
            self._phase = "importing"

    @property
    def _patience_s(self) -> float:
        return self._hang_s if self._has_stepped else max(self._hang_s, HANG_AT_START_S)

    @property
    def _has_stepped(self) -> bool:
        """Whether there are steps of this start; a resumed run has older ones."""
        return len(self._metrics) > self._before

    def _give_up(self, quiet_s: float) -> None:
        """Have every rank of this machine write its stacks, then end the run."""
        ranks = {
            rank.pid: rank.rank
            for rank in self.dir.read_ranks()
            if rank.host == socket.gethostname()
        }
        pids = [
            p.pid
            for p in self._processes()
            if p.pid in ranks and processes.catches(p.pid, signal.SIGUSR1)
        ]
        for pid in pids:
            os.kill(pid, signal.SIGUSR1)
        deadline = time.monotonic() + STACKS_S
        while len(self._stacks()) < len(pids) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        stacks = self._stacks()
        silent = [
            f"rank {rank} does not answer" for rank in sorted(set(ranks.values()) - set(stacks))
        ]
        where = "; ".join(filter(None, [outcome.where_ranks_wait(stacks), *silent]))
        self._hang = f"no step and no output for {quiet_s:.0f} s" + (f": {where}" if where else "")
        self._terminate()

    def _stacks(self) -> dict[int, str]:
        texts = {rank: path.read_text(errors="replace") for rank, path in self.dir.stacks().items()}
        return {rank: text for rank, text in texts.items() if text}

    def _terminate(self) -> None:
        self._kill_at = time.monotonic() + GRACE_S
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)

    def _marked(self) -> list[psutil.Process]:
        return processes.marked(
            **{RUN_DIR_VARIABLE: str(self.dir.path), LAUNCHER_VARIABLE: str(os.getpid())}
        )

    def _processes(self) -> list[psutil.Process]:
        """torchrun, its descendants, and whoever else carries the mark of this run."""
        import psutil

        try:
            root = psutil.Process(self._process.pid)
            return list({root, *root.children(recursive=True), *self._marked()})
        except psutil.NoSuchProcess:
            return self._marked()

    def _started_anew(self) -> bool:
        """Start again, once, where a port was taken between torchrun's choosing and using it;
        whether that was so."""
        failed_early = self._process.returncode != 0 and not self._has_stepped and not self._kill_at
        if (
            not failed_early
            or self._started_again
            or self.plan.experiment.nodes > 1
            or self._is_deleted
        ):
            return False
        if not outcome.ADDRESS_IN_USE.search(self._log.text()):
            return False
        processes.end(self._marked(), GRACE_S)
        for path in self.dir.ranks.iterdir():
            path.unlink()
        self._phase = "a port was taken: starting again with another"
        with self._log.path.open("a", encoding="utf-8") as log:
            log.write(f"\nharness: {self._phase}\n\n")
        self._started_again = True
        self._process = self._spawn()
        return True

    def _evidence(self) -> outcome.Evidence:
        code = self._process.returncode
        return outcome.Evidence(
            exit_code=code,
            log=self._log.text() if code else "",
            errors=self.dir.read_rank_errors(),
            metrics=tuple(self._metrics),
            validation=self.dir.read_validation(),
            stopped_by=self._stopped_by,
            because_ended=self._because_ended,
            hang=self._hang,
            oom_kills=processes.oom_kills() - self._oom_kills_before,
            least_free_share=self._least_free_share,
        )

    def _result(self, found: outcome.Outcome) -> Result:
        e, metrics, code = self.plan.experiment, self._metrics, self._process.returncode
        validation = self.dir.read_validation()
        return Result(
            status=found.status,
            detail=found.detail
            or (None if metrics else "the last rank's node has the steps of this run"),
            rank=found.rank,
            advice=found.advice,
            exit_code=(
                128 + self._stopped_by if self._stopped_by else code if code >= 0 else 128 - code
            ),
            started=self._started,
            finished=time.time(),
            steps=e.steps,
            peak_tflops=self._peak_tflops,
            memory_gib=self._memory(),
            validation=next((v for v in reversed(validation) if v.split == "validation"), None),
            resumed_at=self._resumed_at,
            changed=self._changed,
            data=e.data,
            device=self.plan.device,
            gpu=self._environment["gpu"],
            gpus=self.gpu_ids,
            packed_with=tuple(sorted(self.packed_with)),
            miniature=e.miniature,
            upstream=Upstream.model_validate(self._environment["upstream"]),
            **measure(e, metrics, self._peak_tflops, self._changed),
        )

    def _memory(self) -> MemoryGib:
        ranks = (*self.dir.read_ranks(), *self._ranks_elsewhere())
        return MemoryGib(
            allocated=_most(rank.allocated_peak_gib for rank in ranks),
            reserved=_most(rank.reserved_peak_gib for rank in ranks),
            nvml=_most([self._sampler.peak_gib, *(rank.nvml_used_gib for rank in ranks)]),
            driver=self._driver_gib,
            rss=_most(rank.rss_peak_gib for rank in ranks),
        )

    def _ranks_elsewhere(self) -> list[directory.Rank]:
        """What ranks of nodes wrote about themselves whose files are not seen here."""
        endings = self._others.endings.values() if self._others else ()
        known = [(ending, rank) for ending in endings for rank in ending.ranks]
        return [rank for _, raw in known if (rank := directory.parse_rank(raw))]

    @cached_property
    def _driver_gib(self) -> float | None:
        return gpus.kept_by_driver_gib(self.gpu_ids)

    @cached_property
    def _peak_tflops(self) -> float | None:
        gpu = self._environment["gpu"]
        return peak_tflops(gpu, self.plan.experiment.precision) if gpu else None


def run_plan(
    plan: Plan, *, hang_seconds: float | None = None, terminal: Terminal | None = None
) -> Finished:
    """Run ``plan`` to its end: choose GPUs, show progress, print a summary.

    Args:
        hang_seconds: see ``Run``.

    Raises:
        UserError: the data is damaged.
        UserError: GPUs are busy, too few or unable, a package is missing, the output directory
            cannot be written, or upstream is half there.
        KeyboardInterrupt: it was interrupted before it began.
    """
    check_machine(plan.experiment, plan.device)
    check_start(plan)
    check_content(plan.experiment.data)
    gpu_ids = (
        gpus.choose(plan.experiment.ranks_per_node, plan.place.gpu_ids)
        if plan.device == "cuda"
        else ()
    )
    with Signals() as signals, terminal or open_terminal() as shown:
        reserved = run_directory(plan, signals, shown)
        run_dir = reserved.run_dir
        try:
            shown.print(opening(plan, run_dir))
            run = Run(plan, reserved, gpu_ids, hang_seconds)
        except BaseException as error:
            reserved.abandon(error)
            raise
        try:
            while run.poll():
                if number := signals.take():
                    run.stop(number, signals.ended)
                show_progress(run, shown)
                time.sleep(POLL_S)
            finished = run.finish()
            show_progress(run, shown)
            shown.finish(run.label)
        finally:
            run.abort()
        shown.print(summary(run.label, run_dir.path, finished.result))
    return finished


def check_start(plan: Plan) -> None:
    """Raise UserError where the weights that ``plan`` starts from are damaged, or hold code."""
    e = plan.experiment
    if e.weights and (e.lora or not plan.resumes):
        start.check_whole(e.weights)


def show_progress(run: Run, shown: Terminal) -> None:
    """Show what is new of ``run``."""
    for progress in run.progress():
        shown.show(progress)


def opening(plan: Plan, run_dir: RunDir) -> str:
    """What is said before a run: its label, what it shows, what its miniature scaled, the memory
    that a GPU will need."""
    card = (
        find_gpu(plan.experiment.card or gpus.list_gpus()[0].name)
        if plan.device == "cuda"
        else None
    )
    going_on = f"goes on from step {plan.first_step}" if plan.resumes and plan.first_step else None
    foretold = (
        [capacity.in_a_line(plan.experiment, card), calibrations.in_a_line(plan.experiment, card)]
        if card
        else []
    )
    paragraphs = [
        f"{run_dir.label}: {plan.experiment.shows}",
        plan.headline,
        *plan.notices,
        going_on,
        *foretold,
    ]
    return "\n".join(
        textwrap.fill(
            text, WIDTH, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False
        )
        for text in paragraphs
        if text
    )


def stop(outdir: Path, label: str | None = None) -> int:
    """End every run of this machine in ``outdir``, orphans of dead launchers included, or the one
    called ``label``.

    Results so far are kept. Returns the exit status, 1 where a run of another machine goes on.

    Raises:
        UserError: no run is called ``label``.
    """
    import psutil

    runs, _ = directory.runs(outdir)
    labels = [run.dir.label for run in runs]
    if label and label not in labels:
        raise UserError(
            f"no run in {outdir} is called {label}"
            + (f"; {nearest(label, labels)}" if labels else "")
        )
    ended: dict[str, list[psutil.Process]] = {}
    elsewhere: list[str] = []
    for run in runs:
        if (run.state == "running" or run.result is None) and label in (None, run.dir.label):
            holder = locks.holder(run.dir.path, watch=False)
            launcher = (
                psutil.Process(holder.pid) if holder and holder.lives and label is None else None
            )
            found = (
                [launcher]
                if launcher
                else processes.marked(**{RUN_DIR_VARIABLE: str(run.dir.path.resolve())})
            )
            if found:
                ended[run.dir.label] = found
            elif holder:
                elsewhere.append(f"{run.dir.label} is not stopped: {holder} has it, stop it there")
    processes.end({p for found in ended.values() for p in found}, 2 * GRACE_S)
    if ended or not elsewhere:
        print(f"stopped {', '.join(ended)}" if ended else f"nothing runs in {outdir}")
    for line in elsewhere:
        say(line)
    return 1 if elsewhere else 0


class _Tail:
    """What is new in a file that others append to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read = 0
        self._rest = b""

    def lines(self) -> list[str]:
        """Whole lines since the last call; a line that is still being written comes with the
        next."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._read)
                new = file.read()
        except FileNotFoundError:
            return []
        self._read += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        return [line.decode(errors="replace") for line in lines]

    def text(self) -> str:
        """The end of the file; nothing where it was deleted."""
        try:
            with self.path.open("rb") as file:
                file.seek(max(file.seek(0, os.SEEK_END) - LOG_TAIL_BYTES, 0))
                return file.read().decode(errors="replace")
        except FileNotFoundError:
            return ""


def _resumed_at(plan: Plan, run_dir: RunDir) -> tuple[int, ...]:
    """The steps from which the run was gone on with so far, this time included."""
    if not plan.resumes:
        return ()
    running = run_dir.read_running()
    return (*(running.resumed_at if running else ()), plan.first_step)


def _changed(plan: Plan, run_dir: RunDir) -> tuple[Change, ...]:
    """The settings that changed when the run was resumed, this time included; none where it begins
    anew."""
    if not plan.resumes or not plan.first_step:
        return ()
    step = plan.first_step
    earlier = (
        change.model_copy(update={"step": min(change.step, step)})
        for change in run_dir.read_changes()
    )
    fields = ("setting", "before", "now", "curve", "work")
    return (
        *earlier,
        *(Change(step=step, **{name: getattr(d, name) for name in fields}) for d in plan.changed),
    )


def _most(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)
