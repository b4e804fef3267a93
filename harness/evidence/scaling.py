"""``make gpus-408``: the best layout of an experiment's work for each number of GPUs, predicted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from harness.evidence import markdown
from harness.evidence.further import print_further
from harness.evidence.memory import cards_of
from harness.evidence.predictions import is_json, prediction, print_json, say_extrapolated
from harness.experiment.catalog import load_catalog
from harness.experiment.experiment import Experiment
from harness.experiment.hardware import GPUS_OF_A_NODE, Card, find_card, peak_tflops
from harness.machine import gpus
from harness.planning import resolved
from harness.predict.calibrations import Machine, machine_here, machine_of
from harness.predict.flops import mfu, tflops_per_gpu
from harness.predict.step_time import unknown
from harness.run import finding
from harness.search.layouts import Layout, Search, by_gpus
from harness.system.screen import say

HEAD = ("GPUs", "ms/step", "efficiency", "MFU", "GiB")
Layouts = Iterable[tuple[int, Layout | None]]
"""For each number of GPUs the best layout; None where none fits."""


def print_gpus(id_: str, settings: Mapping[str, str]) -> int:
    """Print the best layout of experiment ``id_`` per number of GPUs, on each card in question.

    Raises UserError where the experiment or a setting is invalid.
    """
    experiment = resolved.of_catalogue(id_, settings)
    if is_json(settings):
        return print_json(_objects(experiment, settings))
    size = experiment.global_batch_size
    say(
        f"{experiment.label}: {experiment.model.name}, {size} sample{'s' * (size > 1)} of"
        f" {experiment.seq_length:,} tokens per step, on any number of GPUs"
    )
    for card in cards_of(experiment):
        machine, source = machine_here(card, finding.outdir(settings), gpus.uuids())
        layouts = tuple(by_gpus(experiment, card, machine))
        timed = [best.experiment for _, best in layouts if best and best.step]
        print()
        if timed:
            say(f"{card.name}: the fastest layout that fits, predicted")
        else:
            say(f"{card.name}: the layout that fits with the least model parallelism, predicted")
        for cells, command in ((HEAD, ""), *_lines(layouts, card)):
            print(_row(cells, command))
        if timed:
            _print_further(layouts, experiment, card, machine)
            say(f"  {machine.how_sure(*timed)}")
            say(f"  {source}")
            say_extrapolated(timed)
        if reason := _untimed(layouts, card, machine):
            say(f"  step time not predicted: {reason}")
    return 0


def _print_further(layouts: Layouts, experiment: Experiment, card: Card, machine: Machine) -> None:
    """What more settings would bring, on as many GPUs as the experiment has, or the next count."""
    timed = [(ranks, best) for ranks, best in layouts if best and best.step]
    more = (one for one in timed if one[0] >= experiment.world_size)
    ranks, best = next(more, timed[-1])
    print_further(best, Search(experiment, ranks, card, machine), f"the layout of {ranks}")


def _objects(experiment: Experiment, settings: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Predictions of the best layout for each number of GPUs that holds the work."""
    for card in cards_of(experiment):
        machine, _ = machine_here(card, finding.outdir(settings), gpus.uuids())
        for _, best in by_gpus(experiment, card, machine):
            if best:
                yield prediction(best.experiment, card, best.memory, machine, best.step)


@cache
def table(card: str, *ids: str) -> str:
    """Markdown: the same for some experiments of the catalogue, on one kind of card."""
    gpu, lines = find_card(card), []
    for experiment in map(load_catalog().find, ids):
        layouts = by_gpus(experiment, gpu, machine_of(gpu), GPUS_OF_A_NODE)
        for i, (cells, command) in enumerate(_lines(layouts, gpu)):
            first = [f"`{experiment.id}`", experiment.model.name] if i == 0 else ["", ""]
            lines.append([*first, *cells, f"`{command}`" if cells[-1] else command])
    return markdown.table(["id", "model", *HEAD, "command"], lines, "llrrrrrl")


def _lines(layouts: Layouts, card: Card) -> Iterator[tuple[tuple[str, ...], str]]:
    """The cells below HEAD and the command, for each number of GPUs.

    Efficiency: a GPU's share of the work per second, relative to the fewest GPUs whose step time is
    predicted.
    """
    fewest_gpu_ms: float | None = None
    for ranks, best in layouts:
        if best is None:
            yield (str(ranks), "", "", "", ""), "no layout divides them and fits"
            continue
        step, shown = best.step, ("", "", "")
        if step:
            gpu_ms = ranks * step.total
            fewest_gpu_ms = fewest_gpu_ms or gpu_ms
            peak = peak_tflops(card.name, best.experiment.precision)
            share = mfu(tflops_per_gpu(best.experiment, step.total), peak)
            shown = f"{step.total:,.0f}", f"{fewest_gpu_ms / gpu_ms:.2f}", f"{share:.0%}"
        command = f"make {best.experiment.id} {best.settings}".strip()
        yield (str(ranks), *shown, f"{best.memory.in_all:.1f}"), command


def _row(cells: Sequence[str], command: str) -> str:
    return ("  {:>5} {:>8} {:>10} {:>5} {:>6}".format(*cells) + f"  {command}").rstrip()


def _untimed(layouts: Layouts, card: Card, machine: Machine | None) -> str:
    """Why step times are missing; empty where none is."""
    if machine is None:
        return f"no machine with {card.name} was calibrated"
    kinds = dict.fromkeys(
        what for _, best in layouts if best and not best.step for what in unknown(best.experiment)
    )
    return f"no measured row has {', '.join(kinds)}" if kinds else ""
