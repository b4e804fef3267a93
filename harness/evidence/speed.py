"""``make speed-408``: predicted step time, part by part, and what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from harness import RECORDS
from harness.errors import UserError
from harness.evidence.memory import cards_of, heading
from harness.evidence.predictions import is_json, prediction, print_json
from harness.evidence.records import same_work
from harness.evidence.references import References, load_references
from harness.evidence.results import collect_records
from harness.evidence.rows import Row
from harness.experiment import overrides
from harness.experiment.experiment import Experiment
from harness.experiment.hardware import find_card, peak_tflops
from harness.machine import gpus
from harness.planning import resolved
from harness.predict.calibrations import Machine, machine_here
from harness.predict.capacity import verdict
from harness.predict.flops import mfu, tflops_per_gpu
from harness.predict.memory import predict
from harness.predict.step_time import StepTime, unknown, without_effect
from harness.run import finding
from harness.system.screen import say

MEANING = {
    "products": "matrix products",
    "attention": "attention scores, their softmax, and weighted values",
    "passes": "bound by memory bandwidth: norms, activations, gradient sums, the loss",
    "exchange": "activations, keys and values, or tokens sent to other GPUs",
    "launches": "launch-bound: the GPU waits for the CPU",
    "bubble": "pipeline stages wait for each other",
    "gradients": "exposed communication of gradients and weights between replicas",
    "stragglers": "all ranks wait for the slowest of many nodes",
    "optimizer": "Adam, and other work once per step",
}


def print_speed(id_: str, settings: Mapping[str, str]) -> int:
    """Print the predicted step time of experiment ``id_``, part by part, with what was measured.

    Raises UserError where the experiment or a setting is invalid, or no constants cover it.
    """
    experiment = predictable(resolved.of_catalogue(id_, settings))
    machines, references = machines_of(experiment, settings), load_references()
    if is_json(settings):
        memory = predict(experiment)
        return print_json(
            prediction(experiment, machine.card, memory, machine, machine.predict(experiment))
            for machine, _ in machines
        )
    rows = collect_records(RECORDS, references).rows
    say(heading(experiment))
    for machine, source in machines:
        step, card = machine.predict(experiment), machine.card
        print(f"\nPredicted step time on {card.name}, ms")
        for line in _parts(step):
            say(line, hang=30)
        measured = _measured(experiment, machine, step, rows, references)
        say(f"  {'step':12}{step.total:8.1f}  {measured}".rstrip(), hang=24)
        tflops = tflops_per_gpu(experiment, step.total)
        share = mfu(tflops, peak_tflops(card.name, experiment.precision))
        say(f"  {tflops:.0f} model TFLOP/s per GPU, MFU {share:.0%}")
        for line in (machine.how_sure(experiment), *without_effect(experiment)):
            say(f"  {line}")
        say(f"  {source}")
        if verdict(predict(experiment), card) == "does not fit":
            command = f"make memory-{overrides.command_of(experiment)} CARD={machine.gpu}"
            say(f"  does not fit this card: {command} lists settings that fit")
    return 0


def predictable(experiment: Experiment) -> Experiment:
    if missing := unknown(experiment):
        command = overrides.command_of(experiment)
        raise UserError(
            f"{experiment.id}: its step time cannot be predicted: no measured row has"
            f" {' or '.join(missing)}\n"
            f"make memory-{command} predicts its memory;"
            f" make {command} STEPS=20 measures the step time"
        )
    return experiment


def machines_of(experiment: Experiment, settings: Mapping[str, str]) -> list[tuple[Machine, str]]:
    """The calibrated machines with the cards in question, each with where its rates come from."""
    cards = cards_of(experiment)
    found = [machine_here(card, finding.outdir(settings), gpus.uuids()) for card in cards]
    machines = [(machine, source) for machine, source in found if machine]
    if not machines:
        raise UserError(
            f"{' or '.join(card.name for card in cards)} has no bf16, and steps are predicted in"
            " bf16, fp8 and fp4 only; CARD= names another card"
        )
    return machines


def _parts(step: StepTime) -> Iterator[str]:
    largest = max(step.pieces.values())
    for name, ms in step.pieces.items():
        if ms >= 0.05:
            remark = f"{'largest; ' * (ms == largest)}{MEANING[name]}"
            yield f"  {name:12}{ms:8.1f}  {ms / step.total:4.0%}  {remark}"


def _measured(
    experiment: Experiment,
    machine: Machine,
    step: StepTime,
    rows: Sequence[Row],
    references: References,
) -> str:
    """Measured and published step times on this card, each with the prediction's error."""
    said = [
        f"measured {row.step.median:,.1f}: prediction {step.total / row.step.median - 1:+.1%}"
        for row in rows
        if row.gpu == machine.card
        and row.state == "ok"
        and row.step
        and same_work(row.experiment, experiment)
    ]
    published = references.published
    found = published.matching(experiment.id)
    row = found and found.reference
    comparable = find_card(published.gpu) == machine.card and overrides.is_same_work(experiment)
    if comparable and row and row.step_ms and not row.in_doubt:
        said.append(f"published {row.step_ms:,.0f}: prediction {step.total / row.step_ms - 1:+.1%}")
    return "; ".join(said)
