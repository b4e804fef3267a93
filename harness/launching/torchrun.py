"""torchrun and the processes it starts: how they are started, found and ended."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harness.launching import processes
from harness.launching.processes import LAUNCHER_VARIABLE
from harness.run.directory import RUN_DIR_VARIABLE, TURN_VARIABLE, RunDir
from harness.system import locks
from harness.system.orphans import end_with
from harness.upstreams.megatron_lm.flags import EXIT_SIGNAL

if TYPE_CHECKING:
    import psutil

GRACE_S = 10
"""Time to end after SIGTERM, before SIGKILL."""


class Torchrun:
    """The processes of one run on this node.

    Attributes:
        kill_at: monotonic time of SIGKILL; 0 while the run was not asked to end.
    """

    def __init__(
        self, run_dir: RunDir, command: Sequence[str | Path], log: Path, locked: Sequence[Path]
    ) -> None:
        """
        Args:
            command: starts torchrun.
            log: standard output and error of all processes are appended to it.
            locked: folders whose locks the processes inherit.
        """
        self._run_dir, self._command, self._log, self._locked = run_dir, command, log, locked
        self.kill_at = 0.0

    def start(self, held: bool = False) -> None:
        """Start torchrun; ``held``: its ranks wait for ``RunDir.turn`` before they use a GPU."""
        launcher = os.getpid()
        environment = os.environ | {
            RUN_DIR_VARIABLE: str(self._run_dir.path),
            LAUNCHER_VARIABLE: str(launcher),
        }
        if held:
            environment[TURN_VARIABLE] = str(self._run_dir.turn)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                # Ctrl-C reaches a terminal's foreground group: in a session of its own, torchrun
                # gets no SIGINT of its own and ends when the launcher says so.
                start_new_session=True,
                # flock belongs to the open file: the folders stay locked while any process of the
                # run lives, even where the launcher was killed.
                pass_fds=locks.descriptors(*self._locked),
                # torchrun passes SIGTERM on to its ranks; SIGKILL would leave them behind
                preexec_fn=lambda: end_with(launcher, signal.SIGTERM),
            )

    @property
    def returncode(self) -> int | None:
        """Exit status, negative for a signal; None while torchrun runs."""
        return self._process.poll()

    @property
    def is_ending(self) -> bool:
        return bool(self.kill_at)

    def terminate(self) -> None:
        """SIGTERM to torchrun's process group; ``kill_if_due`` sends SIGKILL after ``GRACE_S``."""
        self.kill_at = time.monotonic() + GRACE_S
        if self.returncode is None:
            os.killpg(self._process.pid, signal.SIGTERM)

    def save_and_end(self) -> None:
        """``EXIT_SIGNAL`` to the ranks of this node: all save after the step, and end."""
        ranks = {rank.pid for rank in self._run_dir.read_ranks()}
        for process in self._marked():
            if process.pid in ranks:
                processes.send(process, EXIT_SIGNAL)

    def kill_if_due(self) -> None:
        if self.kill_at and time.monotonic() > self.kill_at:
            processes.end(self.processes(), grace_s=0)

    def end_orphans(self) -> None:
        """End processes that outlived torchrun."""
        processes.end(self._marked(), GRACE_S)

    def processes(self) -> list[psutil.Process]:
        """torchrun, its descendants, and all others whose environment names this run."""
        import psutil

        try:
            root = psutil.Process(self._process.pid)
            return list({root, *root.children(recursive=True), *self._marked()})
        except psutil.NoSuchProcess:
            return self._marked()

    def _marked(self) -> list[psutil.Process]:
        # the launcher's pid too: two nodes may share a run directory on one machine
        return processes.marked(
            **{RUN_DIR_VARIABLE: str(self._run_dir.path), LAUNCHER_VARIABLE: str(os.getpid())}
        )
