"""How a run directory is created, and prepared to resume."""

from __future__ import annotations

import itertools
import math
import re
import shutil
from pathlib import Path

from harness.errors import UserError
from harness.run.directory import RunDir
from harness.system.files import (
    MAKE_ROOM,
    json_object,
    make_folder,
    sync_folder,
    text_lines,
    told_if_unwritable,
    write_text,
)

LEAST_FREE_MIB = 200
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=,-]{0,199}")


def create(outdir: Path, label: str) -> RunDir:
    """Create ``outdir/label``; where that exists, ``label.2``, ``label.3`` …

    Two launchers that do this at the same moment get different directories.

    Raises:
        UserError: the label is no file name, ``outdir`` cannot be written, or its disk is nearly
            full.
    """
    if not _LABEL.fullmatch(label):
        raise UserError(
            f"run label {label!r}: use letters, digits and . _ + = , - (at most 200), "
            "a letter or digit first"
        )
    with told_if_unwritable(outdir):
        make_folder(outdir)
        free_mib = shutil.disk_usage(outdir).free / 2**20
        if free_mib < LEAST_FREE_MIB:
            raise UserError(
                f"{outdir}: {free_mib:.0f} MiB free, a run needs {LEAST_FREE_MIB} MiB\n"
                f"{MAKE_ROOM}, or set OUTDIR= to another disk"
            )
        for name in itertools.chain([label], (f"{label}.{n}" for n in itertools.count(2))):
            path = outdir / name
            try:
                path.mkdir()  # atomic: it fails where another launcher was faster
            except FileExistsError:
                continue
            (path / "ranks").mkdir()
            sync_folder(outdir)
            return RunDir(path.resolve())


def prepare_to_resume(run_dir: RunDir, step: int) -> None:
    """Prepare ``run_dir`` for resuming after ``step``.

    Lines of later steps are cut off; the log and the result get a number in their names.
    """
    number = 1 + len(list(run_dir.path.glob("logs.[0-9]*.txt")))
    for path, numbered in (
        (run_dir.result, f"result.{number}.json"),
        (run_dir.logs, f"logs.{number}.txt"),
    ):
        if path.exists():
            path.rename(run_dir.path / numbered)
    for path in (run_dir.metrics, run_dir.validation, run_dir.saves):
        lines = [
            line
            for line in text_lines(path)
            if (json_object(line) or {}).get("step", math.inf) <= step
        ]
        if path.exists():
            write_text(path, "".join(f"{line}\n" for line in lines))
    for path in run_dir.ranks.iterdir():
        path.unlink()
