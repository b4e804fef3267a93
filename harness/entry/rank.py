"""One rank from start to end: prepare upstream, install instruments, train, exit."""

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
    dropped_arguments,
    evaluation,
    failures,
    finetune,
    gradient_fusion,
    grouped_products,
    hybrid,
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
    """Import what every rank needs, the slow part of a start.

    Returns:
        upstream's source tree; None where the wheel is used.

    Raises:
        UserError: Megatron-LM is missing or incomplete, its helpers cannot be compiled, or the CPU
            stand-in was not written for its version.
    """
    tree = upstream.locate()
    upstream.put_on_path(tree)
    gradient_fusion.install()
    if on_cpu():
        from harness import cpu

        cpu.install()
    pickles.guard()
    # every run imports this later, and it takes as long as all the rest: forks share it
    import megatron.core.tokenizers.text
    import megatron.training.training  # noqa: F401

    pickles.guard()  # again, for Transformer Engine's modules
    dropped_arguments.install()
    grouped_products.install()
    build_helpers.ensure_compiled()
    return tree


def prepare_for_forks() -> None:
    """Call ``prepare`` in the process that ranks are forked from; rank 0 reports its failure."""
    with failures.ended_at_once(report_of_this_run()):
        prepare()
    gc.collect()
    # A collection writes to the header of every object it visits, which would copy the page.
    # Frozen objects are not visited, so the forks keep sharing memory.
    gc.freeze()


def run(own_script: bool = False) -> NoReturn:
    """Train as the rank in torchrun's environment, with the arguments in ``sys.argv``.

    Without ``HARNESS_RUN_DIR`` no file is written.

    Args:
        own_script: train by harness/entry/pretrain.py even where upstream's script is there.
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
        hybrid.install()
        train(None if own_script else tree)
        if report:
            for end in report.at_end:
                end()
            report.finished()
        leave()


def _wait_for_turn() -> None:
    """In a held run, wait for the file that ``HARNESS_TURN`` names: then the GPUs are free."""
    turn = os.environ.get(TURN_VARIABLE)
    while turn and not Path(turn).exists():
        time.sleep(0.05)


def train(tree: Path | None) -> None:
    """Run upstream's script in ``tree``, or the harness's own script where ``tree`` is None."""
    try:
        if tree:
            script = upstream.HYBRID_SCRIPT if hybrid.is_asked_for() else upstream.SCRIPT
            sys.argv[0] = str(tree / script)
            runpy.run_path(sys.argv[0], run_name="__main__")
        else:
            from harness.entry import pretrain

            pretrain.main()
    # upstream exits like this when --exit-interval or --exit-duration-in-mins ends the run
    except SystemExit as stop:
        if stop.code not in (None, 0):
            raise


def leave() -> NoReturn:
    """Exit at once: freeing every object of a forked rank would copy shared pages, for seconds."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
