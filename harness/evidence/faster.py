"""``make faster-408``: layouts that do the same work in less time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from harness.evidence.further import print_further
from harness.evidence.memory import heading
from harness.evidence.predictions import is_json, prediction, print_json
from harness.evidence.speed import machines_of, predictable
from harness.experiment.experiment import Experiment
from harness.planning import resolved
from harness.predict.calibrations import Machine
from harness.predict.capacity import verdict
from harness.predict.memory import predict
from harness.search.layouts import Search, faster
from harness.system.screen import say

SHOWN = 6
"""Number of faster layouts that are printed."""


def print_faster(id_: str, settings: Mapping[str, str]) -> int:
    """Print faster layouts of the same work on the same GPUs, or those that fit at all.

    Raises UserError as ``speed.print_speed``.
    """
    experiment = predictable(resolved.of_catalogue(id_, settings))
    machines = machines_of(experiment, settings)
    if is_json(settings):
        return print_json(one for machine, _ in machines for one in _objects(experiment, machine))
    say(heading(experiment))
    for machine, source in machines:
        now_ms = machine.predict(experiment).total
        fits = verdict(predict(experiment), machine.card)
        found = faster(experiment, machine, SHOWN)
        print(f"\n{machine.card.name}: predicted {now_ms:,.0f} ms per step; {fits}")
        if not found:
            print("  no layout that fits is faster" if fits == "fits" else "  no other layout fits")
            continue
        print(
            f"  layouts of the same work that fit{' and are faster' * (fits == 'fits')},"
            " the surest first"
        )
        print(f"  {'ms':>9} {'±':>4} {'ratio':>6} {'GiB':>6}   ≈: as fast as the first, perhaps")
        for layout in found:
            ms, gib = layout.step.total, layout.memory.in_all
            tied = layout is not found[0] and layout.ties_with(found[0])
            print(
                f"  {'≈' * tied:1} {ms:7,.0f} {layout.error:4.0%} {ms / now_ms:6.2f} {gib:6.1f}"
                f"  make {id_} {layout.settings}"
            )
        if fits == "fits" and found[0].slowest_ms > now_ms:
            say("  within the error of the prediction, none may be faster than what runs now")
        print_further(found[0], Search(experiment, experiment.world_size, machine.card, machine))
        say(f"  {machine.how_sure(*(layout.experiment for layout in found))}")
        say(f"  {source}")
        say("  measure the first few before a long run: make … STEPS=20")
    return 0


def _objects(experiment: Experiment, machine: Machine) -> Iterator[dict[str, Any]]:
    """Predictions of ``experiment`` and of the layouts that are faster."""
    card = machine.card
    yield prediction(experiment, card, predict(experiment), machine, machine.predict(experiment))
    for layout in faster(experiment, machine, SHOWN):
        yield prediction(layout.experiment, card, layout.memory, machine, layout.step)
