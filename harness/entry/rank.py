"""The life of one rank: make upstream ready, add the instruments, train, leave."""

import atexit
import functools
import gc
import os
import runpy
import sys
import time
from pathlib import Path
from typing import NoReturn

from harness.entry import (
    build_helpers,
    checkpointing,
    evaluation,
    failures,
    finetune,
    handing_on,
    launch_rate,
    masked,
    metrics,
    on_cpu,
    profiler,
    tracking,
)
from harness.entry.report import report_of_this_run
from harness.machine import upstream
from harness.run import pickles
from harness.run.directory import TURN_VARIABLE


@functools.cache
def prepare() -> Path | None:
    """Import what all ranks share, the costly part of a start; returns upstream's source tree, None
    for the wheel.

    Raises:
        UserError: there is no whole Megatron-LM, its helpers cannot be compiled, or the CPU
        stand-in does not know it.
    """
    tree = upstream.locate()
    upstream.put_on_path(tree)
    if on_cpu():
        from harness import cpu

        cpu.install()
    pickles.guard()
    # every run imports it, late, and it takes as long as all the rest
    import megatron.core.tokenizers.text
    import megatron.training.training  # noqa: F401

    pickles.guard()  # Transformer Engine was imported
    handing_on.install()
    build_helpers.ensure_compiled()
    return tree


def prepare_for_forks() -> None:
    """Call ``prepare`` in the process that ranks are forked from; a failure is reported as rank
    0's."""
    with failures.ended_at_once(report_of_this_run()):
        prepare()
    gc.collect()
    gc.freeze()  # no later collection writes to what the forks share


def run(own_script: bool = False) -> NoReturn:
    """Train as this rank of the job that torchrun's environment describes, with the arguments in
    ``sys.argv``.

    Without ``HARNESS_RUN_DIR`` no file is written. ``own_script``: the harness's own script trains,
    though upstream's is there.
    """
    report = report_of_this_run()
    with failures.ended_at_once(report):
        if report:
            report.start()
        tree = prepare()
        masked.install()
        _wait_for_turn()
        if report:
            for instrument in (launch_rate, metrics, evaluation, profiler, checkpointing, tracking):
                instrument.install(report)
        finetune.install(report)
        train(None if own_script else tree)
        if report:
            for end in report.at_end:
                end()
            report.finished()
        leave()


def _wait_for_turn() -> None:
    """Wait until the file is there that ``HARNESS_TURN`` names: another run has the GPUs until
    then."""
    turn = os.environ.get(TURN_VARIABLE)
    while turn and not Path(turn).exists():
        time.sleep(0.05)


def train(tree: Path | None) -> None:
    """Run upstream's script in ``tree``, or the harness's own where there is none, with the
    arguments in ``sys.argv``."""
    try:
        if tree:
            sys.argv[0] = str(tree / upstream.SCRIPT)
            runpy.run_path(sys.argv[0], run_name="__main__")
        else:
            from harness.entry import pretrain

            pretrain.main()
    # upstream leaves like this when --exit-interval and the like end the run
    except SystemExit as stop:
        if stop.code not in (None, 0):
            raise


def leave() -> NoReturn:
    """End the process, done: to free every object of a forked rank one by one would copy its pages,
    for seconds."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
