"""How many GPUs an experiment's work needs, and what more of them would bring, by formula: ``make
gpus-408``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache

from harness.evidence import markdown
from harness.evidence.memory import cards_of
from harness.experiment.catalog import load_catalog
from harness.experiment.hardware import Card, find_card, peak_tflops
from harness.planning import resolved
from harness.predict.calibrations import Machine, machine_of
from harness.predict.flops import mfu, tflops_per_gpu
from harness.predict.layouts import Layout, by_gpus
from harness.predict.step_time import unknown
from harness.system.screen import say

HEAD = ("GPUs", "ms/step", "efficiency", "MFU", "GiB")


def print_gpus(id_: str, settings: Mapping[str, str]) -> int:
    """Print the best layout of experiment ``id_`` with ``settings`` for each number of GPUs, on
    each card in question.

    Raises UserError where the experiment or a setting makes no sense.
    """
    e = resolved.of_catalogue(id_, settings)
    samples = (
        f"{e.global_batch_size} sample{'s' * (e.global_batch_size > 1)} of {e.seq_length:,} tokens"
        " a step"
    )
    say(f"{e.label}: {e.model.name}, {samples}, however many GPUs share them")
    for card in cards_of(e):
        machine = machine_of(card)
        found = tuple(by_gpus(e, card, machine))
        known = any(best and best.step for _, best in found)
        best = (
            "the fastest layout that fits"
            if known
            else "of the layouts that fit, the one that splits least"
        )
        print()
        say(f"{card.name}, by formula: {best}")
        print(_row(HEAD, ""))
        for cells, command in _lines(found, card):
            print(_row(cells, command))
        if known:
            say(
                f"  {machine.how_sure(*(best.experiment for _, best in found if best and best.step))}:"  # noqa: E501
                " run the first few"
            )
        if missing := _not_known(found, card, machine):
            say(f"  no formula for a step {missing}")
    return 0


@cache
def table(card: str, *ids: str) -> str:
    """Markdown: the same for some experiments of the catalogue, on one kind of card."""
    gpu, lines = find_card(card), []
    for e in map(load_catalog().find, ids):
        for i, (cells, command) in enumerate(_lines(by_gpus(e, gpu, machine_of(gpu)), gpu)):
            first = [f"`{e.id}`", e.model.name] if i == 0 else ["", ""]
            lines.append([*first, *cells, f"`{command}`" if cells[-1] else command])
    return markdown.table(["id", "model", *HEAD, "command"], lines, "llrrrrrl")


def _lines(
    found: Iterable[tuple[int, Layout | None]], card: Card
) -> Iterator[tuple[tuple[str, ...], str]]:
    """The cells below HEAD and what to type, for each number of GPUs.

    Efficiency: a GPU's share of the work in a second, against that of the fewest GPUs whose step is
    known.
    """
    fewest: float | None = None
    for gpus, best in found:
        if best is None:
            yield (str(gpus), "", "", "", ""), "nothing fits, even fully recomputed"
            continue
        step, shown = best.step, ("", "", "")
        if step:
            fewest = fewest or gpus * step.total
            share = mfu(
                tflops_per_gpu(best.experiment, step.total),
                peak_tflops(card.name, best.experiment.precision),
            )
            shown = f"{step.total:,.0f}", f"{fewest / (gpus * step.total):.2f}", f"{share:.0%}"
        yield (
            (str(gpus), *shown, f"{best.memory.total:.1f}"),
            f"make {best.experiment.id} {best.settings}".strip(),
        )


def _row(cells: Sequence[str], command: str) -> str:
    return ("  {:>5} {:>8} {:>10} {:>5} {:>6}".format(*cells) + f"  {command}").rstrip()


def _not_known(
    found: Iterable[tuple[int, Layout | None]], card: Card, machine: Machine | None
) -> str:
    """Why steps are missing, ready to follow a sentence; empty where none is."""
    if machine is None:
        return f"on {card.name}"
    kinds = dict.fromkeys(
        what for _, best in found if best and not best.step for what in unknown(best.experiment)
    )
    return f"with {', '.join(kinds)}" if kinds else ""
