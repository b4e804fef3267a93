"""Run one plan to its end: choose GPUs, show progress, print a summary."""

from __future__ import annotations

import textwrap
import time
from typing import TYPE_CHECKING

from harness.data.content import check_content
from harness.experiment.hardware import find_card
from harness.launching.active_run import POLL_S, ActiveRun, Finished
from harness.launching.processes import Signals
from harness.launching.rendezvous.handshake import reserve_run_directory
from harness.launching.terminal import Terminal, open_terminal, summary
from harness.machine import gpus
from harness.machine.requirements import check_machine
from harness.planning import starting_weights
from harness.predict import calibrations, capacity
from harness.run import job

if TYPE_CHECKING:
    from harness.planning.plan import Plan
    from harness.run.directory import RunDir

WIDTH = 80


def run_plan(
    plan: Plan, *, hang_seconds: float | None = None, terminal: Terminal | None = None
) -> Finished:
    """Run ``plan`` to its end.

    Args:
        hang_seconds: see ``ActiveRun``.

    Raises:
        UserError: see ``check_ready``; GPUs are busy or too few; the output directory cannot be
            written; upstream is incomplete.
        KeyboardInterrupt: a signal arrived before the run started.
    """
    check_ready(plan)
    own_job = job.current()
    gpu_ids = ()
    if plan.device == "cuda":
        gpu_ids = gpus.choose(plan.experiment.ranks_per_node, plan.place.gpu_ids)
    with Signals() as signals, terminal or open_terminal() as terminal:
        reserved = reserve_run_directory(plan, signals, terminal)
        try:
            terminal.print(opening(plan, reserved.run_dir))
            run = ActiveRun(plan, reserved, gpu_ids, hang_seconds)
        except BaseException as error:
            reserved.abandon(error)
            raise
        try:
            while run.poll():
                if number := signals.take():
                    run.stop(number, signals.ended)
                if own_job and (reason := own_job.ends):
                    run.end(reason)
                show_progress(run, terminal)
                time.sleep(POLL_S)
            finished = run.finish()
            if own_job and run.should_start_again:
                own_job.start_again(run.made_progress)
            show_progress(run, terminal)
            terminal.finish(run.label)
        finally:
            run.abort()
        terminal.print(summary(run.label, finished.dir.path, finished.result))
    return finished


def check_ready(plan: Plan) -> None:
    """Check this machine: packages, GPUs, weights, data.

    Raises:
        UserError: a package is missing, a GPU lacks a feature, the weights that ``plan`` starts
            from or the data are damaged.
    """
    experiment = plan.experiment
    check_machine(experiment, plan.device)
    if experiment.weights and (experiment.lora or not plan.resumes):
        starting_weights.check_whole(experiment.weights)
    check_content(experiment.data)


def show_progress(run: ActiveRun, terminal: Terminal) -> None:
    """Show what is new of ``run``."""
    for snapshot in run.snapshots():
        terminal.show(snapshot)


def opening(plan: Plan, run_dir: RunDir) -> str:
    """What is printed before a run: what it shows, what its miniature scaled, predicted memory."""
    experiment = plan.experiment
    paragraphs = [f"{run_dir.label}: {experiment.shows}", plan.headline, *plan.notices]
    if plan.resumes and plan.first_step:
        paragraphs.append(f"resumes at step {plan.first_step}")
    if plan.device == "cuda":
        card = find_card(experiment.card or gpus.list_gpus()[0].name)
        if card:
            paragraphs.append(capacity.summary(experiment, card))
            paragraphs.append(
                calibrations.summary(experiment, card, run_dir.path.parent, gpus.uuids())
            )
    return "\n".join(
        textwrap.fill(
            text, WIDTH, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False
        )
        for text in paragraphs
        if text
    )
