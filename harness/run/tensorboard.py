"""``make tensorboard``: TensorBoard of run directories, at a port of localhost."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import webbrowser
from collections.abc import Mapping
from pathlib import Path

from harness.errors import UserError
from harness.experiment import command_line
from harness.run.directory import runs
from harness.system.files import expanded

FOLDER = "tensorboard"
USUAL_PORT = 6006
STARTS_WITHIN_S = 60
"""TensorBoard imports for seconds, and for many on a busy machine."""


def show(settings: Mapping[str, str], outdir: Path) -> int:
    """Serve the event files of RUN=, or of every run in ``outdir``, until Ctrl-C; the exit status.

    Raises:
        UserError: there are none, PORT= is taken, or TensorBoard does not start.
    """
    folder = logged(settings.get("RUN"), outdir)
    port = free_port(command_line.count_in(settings, "PORT"))
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        str(folder),
        "--host",
        "localhost",
        "--port",
        str(port),
    ]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
    ) as board:
        try:
            if not _answers(board, port):
                board.terminate()
                last = (board.stderr.read().strip().splitlines() or ["it did not answer"])[-1]
                raise UserError(f"TensorBoard did not start: {last}\nmake setup installs it")
            print(
                f"TensorBoard of {folder}: http://localhost:{port}/  (Ctrl-C ends it)\n"
                f"from another machine: ssh -L {port}:localhost:{port} {socket.gethostname()}",
                flush=True,
            )
            if (
                sys.platform == "darwin"
                or os.environ.get("DISPLAY")
                or os.environ.get("WAYLAND_DISPLAY")
            ):
                webbrowser.open(f"http://localhost:{port}/")
            board.communicate()  # reads its output: a full pipe would block it
        except KeyboardInterrupt:
            board.terminate()
            return 0
    return 1 if board.returncode else 0


def logged(wanted: str | None, outdir: Path) -> Path:
    """The folder to serve: of the run with this label, the newest run of this experiment, or all.

    Raises:
        UserError: no event files are there.
    """
    if wanted is None:
        if not next(outdir.glob(f"*/{FOLDER}/*tfevents*"), None):
            raise UserError(
                f"no run in {outdir} has written for TensorBoard yet\nmake 101 makes one"
            )
        return outdir
    of_it = [
        run.dir.path
        for run in runs(outdir)[0]
        if wanted in (run.experiment.id, run.experiment.name)
    ]
    newest = sorted(
        of_it, key=lambda path: (path / "experiment.json").stat().st_mtime, reverse=True
    )
    for path in (outdir / wanted, expanded(wanted), *newest):
        if next((path / FOLDER).glob("*tfevents*"), None):
            return (path / FOLDER).resolve()
    raise UserError(
        f"RUN={wanted}: no run of this label or experiment in {outdir} has written for TensorBoard"
    )


def free_port(wanted: int | None) -> int:
    """``wanted``, else the first free port from TensorBoard's default. Raises UserError."""
    for port in (wanted,) if wanted else range(USUAL_PORT, USUAL_PORT + 100):
        try:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("localhost", port))
            return port
        except (OSError, OverflowError):
            continue
    raise UserError(
        f"PORT={wanted} is in use, or no port; leave PORT= out, and a free one is taken"
        if wanted
        else f"no port from {USUAL_PORT} to {USUAL_PORT + 99} is free; PORT= names another"
    )


def _answers(board: subprocess.Popen[str], port: int) -> bool:
    """Wait until the server accepts connections; False where it ends or takes too long."""
    end = time.monotonic() + STARTS_WITHIN_S
    while board.poll() is None and time.monotonic() < end:
        try:
            socket.create_connection(("localhost", port), timeout=1).close()
            return True
        except OSError:
            time.sleep(0.1)
    return False
