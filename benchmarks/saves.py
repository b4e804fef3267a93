"""How much an asynchronous save slows the steps it overlaps: ``python benchmarks/saves.py outdir/LABEL``.

A save begun after step n and complete at step m overlaps steps n+1 to m. They are compared with the
steps of the same run without a save. The time that training waited for the save to start is added.
"""

import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from harness.run.directory import RunDir  # noqa: E402

FIRST = 6


def cost(run: RunDir) -> dict[str, float]:
    """Median step time with and without a save, in ms, and what a save adds, as a share."""
    steps = {m.step: m.step_ms for m in run.read_metrics() if m.step >= FIRST}
    saves = [save for save in run.read_saves() if save.asynchronous]
    beside = {
        step
        for save in saves
        for step in range(save.step + 1, save.whole_at_step + 1)
        if step in steps
    }
    alone = [ms for step, ms in steps.items() if step not in beside]
    if not beside or not alone:
        sys.exit(f"{run.label}: no step overlaps a save, or all do")
    alone_ms = statistics.median(alone)
    waited_ms = statistics.median(save.blocked_ms for save in saves[1:] or saves)
    each = statistics.median(max(save.whole_at_step - save.step, 1) for save in saves)
    slower_ms = statistics.median(steps[step] for step in beside) - alone_ms
    return {
        "saves": len(saves),
        "gib": saves[-1].gib,
        "step_ms": alone_ms,
        "beside_a_save_ms": alone_ms + slower_ms,
        "waited_ms": waited_ms,
        "first_waited_ms": saves[0].blocked_ms,
        "overlapped_steps": each,
        "slower": slower_ms / alone_ms,
        "added": (slower_ms * each + waited_ms) / (alone_ms * each),
    }


if __name__ == "__main__":
    print(json.dumps(cost(RunDir(Path(sys.argv[1]).resolve())), indent=1))
