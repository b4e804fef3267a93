"""A run from its start to its result: its processes, its progress, and what ends it."""

from __future__ import annotations

import math
import signal
import statistics
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from harness.errors import UserError
from harness.launching import failed_load, hangs, outcome, processes
from harness.launching.rendezvous.handshake import VISIBLE_S
from harness.launching.rendezvous.reports import Reports
from harness.launching.reservation import Reservation
from harness.launching.run_files import RunFiles, exit_code
from harness.launching.tails import Tail
from harness.launching.terminal import Snapshot, phase_of
from harness.launching.torchrun import Torchrun
from harness.machine import gpus
from harness.run.directory import RunDir
from harness.run.job import MOVED
from harness.run.schema import MemoryGib, Result, StepMetrics, parse_metrics
from harness.run.writing import prepare_to_resume
from harness.system.files import told_if_unwritable

if TYPE_CHECKING:
    from harness.planning.plan import Plan

POLL_S = 0.05
SAVES_S = 60.0
"""Asked to end by SIGTERM, ranks have this long to finish their step and save a checkpoint."""
MEMORY_EVERY_S = 1.0
STARTING = "starting torchrun"


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


class ActiveRun:
    """A run that was started. Its owner polls it until it is over, then finishes it.

    Attributes:
        held: its ranks have imported everything, and wait for ``release`` before they use a GPU.
        packed_with: labels of runs that shared this machine's GPUs with it.
    """

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
            hang_seconds: silence after a step that counts as a hang (HANG=).
            held: start it held. Importing takes half the time of a short run, and no GPU.
        """
        self.plan, self.dir, self.gpu_ids = plan, reserved.run_dir, gpu_ids
        self.held, self.packed_with = held, set[str]()
        self._reserved, self._keeps_records = reserved, reserved.keeps_records
        self._hang_seconds = hang_seconds
        self._metrics: list[StepMetrics] = []
        self._upstream_before = failed_load.upstream_of(self.dir)
        self._phase = STARTING
        self._memory_gib: float | None = None
        self._memory_read_at = 0.0
        self._stopped_by: signal.Signals | None = None
        self._because_ended: str | None = None
        self._reason: str | None = None
        self._saves_until = 0.0
        self._hang: str | None = None
        self._restarted = False
        self._finished: Finished | None = None

        node = int(plan.place.node_rank)
        self._log = Tail(self.dir.logs if self._keeps_records else self.dir.logs_of_node(node))
        self._new_metrics = Tail(self.dir.metrics)
        self._reports = Reports(reserved.peers, plan, self.dir, self._keeps_records)
        self._files = RunFiles(plan, self.dir, gpu_ids)
        script = plan.script(None if gpu_ids == tuple(range(len(gpu_ids))) else gpu_ids)
        self._start_clocks()
        if self._keeps_records:
            with told_if_unwritable(self.dir.path):
                if plan.resumes == self.dir:
                    prepare_to_resume(self.dir, plan.first_step)
                self._files.write_start(self._started, script)
        self._steps_before = len(self.dir.read_metrics()) if plan.resumes else 0
        self._steps_shown = self._steps_before
        command = ["bash", self.dir.command] if self._keeps_records else ["bash", "-c", script]
        self._torchrun = Torchrun(self.dir, command, self._log.path, reserved.locked)
        self._torchrun.start(held)
        self._sampler = self._start_sampler()

    @property
    def label(self) -> str:
        return self.dir.label

    def release(self) -> None:
        """Let a held run use its GPUs; its time, memory and silence count from now."""
        self.held = False
        self._start_clocks()
        self._sampler = self._start_sampler()
        self.dir.turn.touch()

    def poll(self) -> bool:
        """Read what is new and end a run that hangs, without blocking; whether it still runs."""
        self._read_output()
        self._read_reports()
        if time.monotonic() - self._memory_read_at > MEMORY_EVERY_S:
            self._read_memory()
            if self._is_deleted and not self._torchrun.is_ending:
                self._torchrun.terminate()
        if self._torchrun.returncode is not None:
            return self._start_again_if_a_port_was_taken()
        if self._torchrun.is_ending:
            self._torchrun.kill_if_due()
        elif self._saves_until:
            if time.monotonic() > self._saves_until:
                self._torchrun.terminate()
        elif not self.held:
            self._end_if_hanging()
        return True

    def stop(self, number: signal.Signals, because_ended: str | None = None) -> None:
        """Ask all ranks to end, after SIGTERM with a checkpoint if the run keeps some; when called
        again, kill them at once.

        Args:
            because_ended: the process whose end is the reason.
        """
        self._because_ended = self._because_ended or because_ended
        if self._stopped_by:
            self._torchrun.kill_at = time.monotonic()
            return
        self._stopped_by = number
        if number != signal.SIGTERM or not self._save_and_end(SAVES_S):
            self._torchrun.terminate()

    def end(self, reason: str) -> None:
        """Ask all ranks to end, with a checkpoint if the run keeps some, for which they may take
        any time; called again, it does nothing.

        Args:
            reason: such as ``before the time limit of its job``.
        """
        if not self._stopped_by:
            self._stopped_by, self._reason = signal.SIGTERM, reason
            if not self._save_and_end(math.inf):
                self._torchrun.terminate()

    def finish(self) -> Finished:
        """End what is left of a run that is over, and write result.json.

        Raises:
            UserError: the run directory was deleted meanwhile, or cannot be written to.
        """
        if self._finished is None:
            self._torchrun.end_orphans()
            self._sampler.stop()
            self.dir.turn.unlink(missing_ok=True)
            self._read_last_output()
            found = self._reports.exchange_ends(
                outcome.classify(self._evidence(), self.plan.experiment),
                stopped=bool(self._stopped_by),
                poll=self._read_reports,
            )
            self._read_output()
            self._finished = Finished(self.dir, self._result(found))
            try:
                self._write_result()
            finally:
                self._reserved.release()
        return self._finished

    def abort(self) -> None:
        """End and finish a run that its owner abandons; does nothing to a finished one."""
        if self._finished is None:
            if not self._stopped_by:
                self.stop(signal.SIGTERM)
            while self.poll():
                time.sleep(POLL_S)
            self.finish()

    def snapshots(self) -> list[Snapshot]:
        """Every step since the last call; where there is none, the run as it is now."""
        new, self._steps_shown = self._metrics[self._steps_shown :], len(self._metrics)
        latest = self._metrics[-1:] if self._has_stepped else []
        return [self._snapshot(step) for step in new or latest] or [self._snapshot(None)]

    def _snapshot(self, last: StepMetrics | None) -> Snapshot:
        from harness.predict.flops import mfu

        now = Snapshot(
            label=self.label,
            steps=self.plan.experiment.steps,
            phase="ending" if self._torchrun.is_ending else self._phase,
            elapsed_s=time.time() - self._started,
            memory_gib=self._memory_gib,
        )
        if last is None:
            return now
        step_s = statistics.median(step.step_ms for step in self._metrics[-5:]) / 1000
        peak = self._files.peak_tflops
        return replace(
            now,
            step=last.step,
            loss=last.loss,
            step_ms=last.step_ms,
            tflops=last.tflops,
            mfu=mfu(last.tflops, peak) if last.tflops and peak else None,
            left_s=(now.steps - last.step) * step_s,
        )

    def _start_clocks(self) -> None:
        self._started = time.time()
        self._active_at = time.monotonic()
        self._least_free_share = 1.0
        self._oom_kills_before = processes.oom_kills()

    def _start_sampler(self) -> gpus.Sampler:
        sampled = self.gpu_ids if self._keeps_records and not self.held else ()
        return gpus.Sampler(self.dir.gpus, sampled)

    def _read_output(self) -> None:
        lines, steps = self._log.lines(), self._new_metrics.lines()
        for line in lines:
            self._phase = phase_of(line) or self._phase
        self._metrics += filter(None, map(parse_metrics, steps))
        if lines or steps:
            self._active_at = time.monotonic()
        self._reports.send_steps(steps, len(self._metrics))

    def _read_last_output(self) -> None:
        """Read to the end; steps of another node arrive late on a shared file system."""
        deadline = time.monotonic() + (VISIBLE_S if self.plan.experiment.nodes > 1 else 0)
        self._read_output()
        while self._torchrun.returncode == 0 and not self._has_last_step:
            if time.monotonic() > deadline:
                return
            time.sleep(POLL_S)
            self._read_output()

    def _read_reports(self) -> None:
        """Read the reports of other nodes; end this node's ranks after another node failed."""
        if self._reports.receive():
            self._active_at = time.monotonic()
        running = not self._torchrun.is_ending and not self._stopped_by
        if running and self._reports.must_end_ranks() and self._torchrun.returncode is None:
            self._reports.ended_ranks = True
            self._torchrun.terminate()

    def _read_memory(self) -> None:
        self._memory_read_at = time.monotonic()
        self._least_free_share = min(self._least_free_share, processes.free_memory_share())
        memory = self._memory()
        self._memory_gib = memory.nvml or memory.reserved or memory.rss
        if self._phase == STARTING and memory.rss:
            self._phase = "importing"

    def _save_and_end(self, within_s: float) -> bool:
        """Whether ranks were asked to save a checkpoint and to end; not before their first step."""
        if not self.plan.extras.saving or not self._has_stepped or self._torchrun.is_ending:
            return False
        self._saves_until = time.monotonic() + within_s
        self._torchrun.save_and_end()
        return True

    def _end_if_hanging(self) -> None:
        silent_s = time.monotonic() - self._active_at
        if silent_s > hangs.limit_s(self._hang_seconds, self._has_stepped):
            where = hangs.where_ranks_wait(self.dir, self._torchrun.processes())
            found = f"no step and no output for {silent_s:.0f} s"
            self._hang = f"{found}: {where}" if where else found
            self._torchrun.terminate()

    def _start_again_if_a_port_was_taken(self) -> bool:
        """Whether the run was started again, which is done once.

        torchrun chooses a free port some time before it listens there: another program may take the
        port in between.
        """
        failed_early = self._torchrun.returncode != 0 and not self._has_stepped
        if not failed_early or self._torchrun.is_ending or self._restarted:
            return False
        if self.plan.experiment.nodes > 1 or self._is_deleted:
            return False
        if not outcome.address_in_use(self._log.text()):
            return False
        self._torchrun.end_orphans()
        for path in self.dir.ranks.iterdir():
            path.unlink()
        self._phase = "a port was taken: starting again with another"
        with self._log.path.open("a", encoding="utf-8") as log:
            log.write(f"\nharness: {self._phase}\n\n")
        self._restarted = True
        self._torchrun.start(self.held)
        return True

    @property
    def _is_deleted(self) -> bool:
        return not self.dir.path.is_dir()

    @property
    def made_progress(self) -> bool:
        """Whether a checkpoint was saved since this start."""
        return self._saved_step > self.plan.first_step

    @property
    def should_start_again(self) -> bool:
        """Whether the same command would do more: it ended before a limit, or lost a node."""
        if self._finished.result.status == "ok" or self._reason == MOVED:
            return False
        ended_early = self._reason is not None and self.made_progress
        return ended_early or self._reports.lost_a_node

    @property
    def _saved_step(self) -> int:
        """The step of the newest checkpoint; 0 where there is none."""
        return max((save.step for save in self.dir.read_saves()), default=0)

    @property
    def _has_stepped(self) -> bool:
        """Whether there are steps since this start; a resumed run has older ones."""
        return len(self._metrics) > self._steps_before

    @property
    def _has_last_step(self) -> bool:
        return bool(self._metrics) and self._metrics[-1].step >= self.plan.experiment.steps

    def _memory(self) -> MemoryGib:
        ranks = (*self.dir.read_ranks(), *self._reports.ranks_elsewhere())
        return self._files.memory_gib(ranks, self._sampler.peak_gib)

    def _evidence(self) -> outcome.Evidence:
        code = self._torchrun.returncode
        return outcome.Evidence(
            exit_code=code,
            log=self._log.text() if code else "",
            errors=self.dir.read_rank_errors(),
            metrics=tuple(self._metrics),
            validation=self.dir.read_validation(),
            stopped_by=self._stopped_by,
            because_ended=self._because_ended,
            reason=self._reason,
            saved=self._saved_step,
            asked_to_end=any(rank.asked_to_end for rank in self.dir.read_ranks()),
            hang=self._hang,
            oom_kills=processes.oom_kills() - self._oom_kills_before,
            least_free_share=self._least_free_share,
        )

    def _result(self, found: outcome.RunOutcome) -> Result:
        result = self._files.result(
            found,
            self._metrics,
            self._memory(),
            started=self._started,
            exit_code=exit_code(
                self._torchrun.returncode, None if found.status == "ok" else self._stopped_by
            ),
            packed_with=tuple(sorted(self.packed_with)),
        )
        if self._keeps_records:
            errors = self.dir.read_rank_errors()
            return failed_load.mark(self.plan, result, errors, self._upstream_before)
        return result

    def _write_result(self) -> None:
        result = self._finished.result
        if self._is_deleted:
            raise UserError(
                f"{self.dir.path} was deleted during the run: the run was ended after step "
                f"{result.steps_done}, and nothing of it is left\n"
                f"make {self.plan.experiment.id} runs it again"
            )
        if self._keeps_records:
            with told_if_unwritable(self.dir.path):
                self._files.write_result(result)
