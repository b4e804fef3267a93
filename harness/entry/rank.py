"""The life of one rank: make upstream ready, add the instruments, train, leave."""

import os
import runpy
import sys

from harness.entry import failures, helpers, metrics, upstream
from harness.entry.report import report_of_this_run
from harness.entry.upstream import Upstream


def on_cpu() -> bool:
    """Whether the CPU stands in for GPUs (``HARNESS_DEVICE=cpu``)."""
    return os.environ.get("HARNESS_DEVICE") == "cpu"


def prepare() -> Upstream:
    """Import everything that ranks share and say which upstream it is: the costly part of a start.

    Raises:
        UserError: there is no whole Megatron-LM, its helpers cannot be compiled, or the CPU stand-in does not know it.
    """
    found = upstream.locate()
    upstream.put_on_path(found)
    if on_cpu():
        from harness import cpu

        cpu.install()
    import megatron.training.training  # noqa: F401

    helpers.ensure_compiled()
    return found


def run(found: Upstream | None = None) -> None:
    """Train as this rank of the job that torchrun's environment describes, with the arguments in ``sys.argv``.

    Without ``HARNESS_RUN_DIR`` no file is written.
    """
    report = report_of_this_run()
    with failures.ended_at_once(report):
        if report:
            report.start()
        found = found or prepare()
        if report:
            metrics.install(report)
        _train(found)
        if report:
            report.finished()
        _leave()


def _train(found: Upstream) -> None:
    try:
        if found.tree:
            sys.argv[0] = str(found.tree / upstream.SCRIPT)
            runpy.run_path(sys.argv[0], run_name="__main__")
        else:
            from harness.entry import pretrain

            pretrain.main()
    except SystemExit as stop:  # upstream leaves like this when --exit-interval and the like end the run
        if stop.code not in (None, 0):
            raise


def _leave() -> None:
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
