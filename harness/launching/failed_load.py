"""Marks a checkpoint that passed every check but that upstream could not load.

The next RESUME= then takes the one before it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from harness.errors import UserError
from harness.run import checkpoints
from harness.run.directory import RunDir
from harness.run.schema import RankError, Result, Upstream
from harness.system.files import read_object, told_if_unwritable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from harness.planning.plan import Plan

_LOADING = re.compile(r"\bin (load_checkpoint|_load_base_checkpoint)$", re.MULTILINE)
_NOT_FROM_DATA = (
    "AssertionError",
    "AttributeError",
    "ImportError",
    "ModuleNotFoundError",
    "NotImplementedError",
    "TypeError",
    "UserError",
)
"""Errors that come from arguments or upstream's version rather than from a checkpoint's bytes."""


def mark(
    plan: Plan, result: Result, errors: Sequence[RankError], before: Upstream | None
) -> Result:
    """Mark the checkpoint if the run crashed while loading it; ``result`` with advice about that.

    Nothing is marked where settings or upstream changed since the checkpoint was saved, because the
    change may be the reason.

    Args:
        before: the upstream with which the run ran before it was resumed.
    """
    loading = plan.extras.loading
    if not (plan.resumes and loading and result.status == "crash") or any(
        d.work for d in plan.changed
    ):
        return result
    error = next((e for e in errors if _LOADING.search(e.traceback)), None)
    if error is None or error.type in _NOT_FROM_DATA or before != result.upstream:
        return result
    path = loading.folder / f"iter_{loading.step:07d}"
    try:
        with told_if_unwritable(path):
            checkpoints.mark_failed(path, f"{error.type}: {_cause(error.message)}")
    except UserError:
        return result
    there = checkpoints.newest_whole(loading.folder)
    advice = f"the checkpoint of step {loading.step} could not be loaded and is marked: " + (
        f"RESUME=1 falls back to that of step {there.step}"
        if there
        else "no earlier one is complete"
    )
    return result.model_copy(update={"advice": advice})


def upstream_of(run: RunDir) -> Upstream | None:
    """The upstream of a run, from its environment.json; None where that is unknown."""
    try:
        return Upstream.model_validate(read_object(run.environment)["upstream"])
    except (KeyError, ValueError):
        return None


def _cause(message: str) -> str:
    """The exception inside upstream's CheckpointException, else the first line."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    inner = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b.*: ", line)]
    return (inner or lines or ["no message"])[-1 if inner else 0][:100]
