"""``make tensorboard``: TensorBoard of run directories, at a port of localhost."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import webbrowser
from collections.abc import Mapping
from pathlib import Path

from harness.errors import UserError
from harness.experiment import command_line
from harness.run.directory import runs
from harness.system.files import expanded

FOLDER = "tensorboard"
PATIENCE = 5  # seconds for TensorBoard to end before it is killed


def show(settings: Mapping[str, str], outdir: Path) -> int:
    """Serve the event files of RUN=, or of every run in ``outdir``, until Ctrl-C; the exit status.

    Raises:
        UserError: there are none, or TensorBoard does not start, as where PORT= is taken.
    """
    folder = logged(settings.get("RUN"), outdir)
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        str(folder),
        "--host",
        "localhost",
    ]
    if port := command_line.count_in(settings, "PORT"):
        command += ["--port", str(port)]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
    ) as board:
        try:
            port = _port_of(board)
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
            try:
                board.wait(timeout=PATIENCE)
            except subprocess.TimeoutExpired:  # its gRPC threads can hang as Python ends
                board.kill()
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


def _port_of(board: subprocess.Popen[str]) -> str:
    """The port at which TensorBoard says that it listens. Raises UserError where it ends before."""
    line = "it said nothing"
    for line in board.stderr:
        if found := re.search(r"http://localhost:(\d+)/", line):
            return found[1]
    raise UserError(
        f"TensorBoard did not start: {line.strip()}\n"
        "PORT= names another port; make setup installs TensorBoard"
    )
