"""Quantities of experiments that claims and documents name: measured, published or computed.

step_ms[101]                       the newest record of this work
memory_gib[121 CARD=h100-80gb]     of a run with settings, as typed after ``make``
published_step_ms[408]             the published row that ran what 408 runs
step_ms[h200-8gpu, 128]            a row of another group of references.yaml; a third word is
                                   the end of its variant
bubble[408h]                       computed from the experiment's sizes (predict/formulas.py)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from harness.errors import UserError, nearest
from harness.evidence.columns import VALUES
from harness.evidence.expressions import GROUP, Quantity, Unit, parse
from harness.evidence.records import work
from harness.evidence.references import Reference, ReferenceGroup, References, load_references
from harness.evidence.rows import Row, metrics
from harness.experiment import overrides
from harness.experiment.catalog import Catalog, Experiment
from harness.experiment.hardware import DRIVER_RESERVED_MIB, find_card, peak_tflops
from harness.predict.flops import mfu, tflops_per_gpu
from harness.predict.formulas import OF_EXPERIMENT
from harness.run import step_statistics

UNITS: Mapping[str, Unit] = {
    "ms": (("ms", 1),),
    "gib": (("GiB", 1),),
    "mib": (("MiB", 1),),
    "pflop": (("PFLOP", 1),),
    "us": (("µs", 1),),
    "b": (("10^9", 1),),
    "tflops": (("TFLOP/s", 1),),
    "tokens_per_s": (("tokens/s", 1),),
}
"""Unit of a quantity, by its whole name or by the name's last word: ``step_ms``."""

PUBLISHED = {f"published_{name}": name for name in ("step_ms", "memory_gib")}
STEP_TIMES = ("step_ms", "step_ms_min", "step_ms_max", "forward_backward_ms", "optimizer_ms")
ALLOCATOR_PEAKS = ("memory_gib", "reserved_gib", "allocated_gib")
RATES = ("tflops", "mfu", "tokens_per_s")
RATIOS = ("memory_ratio", "step_ratio")
LOSSES = ("loss_first", "loss_last", "validation_loss", "perplexity")
LAUNCH_RATES = ("launch_add_us", "launch_operation_us")
MEASURED = (
    *STEP_TIMES,
    *ALLOCATOR_PEAKS,
    *RATES,
    *RATIOS,
    *LOSSES,
    *LAUNCH_RATES,
    *PUBLISHED,
    "predicted_step_ms",
    "fits",
)
"""What is measured: names in columns.VALUES, published numbers, and ``fits``.

``fits`` is 1 where the experiment fits the published card, 0 where it runs out of memory on it.
``memory_gib`` is used memory of the fullest GPU, as NVML shows it.
"""
EXACT = ("allocated_gib", "predicted_step_ms", *LOSSES, *LAUNCH_RATES)
"""Counted without uncertainty.

Allocated memory is equal to the byte between runs of the same work; how much the others differ
between runs was not measured.
"""

IN_DOUBT = "what ran is in doubt"


class NotMeasured(Exception):
    """A source has no such number. Its text says of what, and why."""


class RanOutOfMemory(NotMeasured):
    """The run ran out of memory: what it held then is not what it needs."""


@dataclass(frozen=True)
class Number:
    """A number with its standard uncertainty, and what a reader must know about it."""

    value: float
    noise: float = 0.0
    remark: str | None = None
    in_doubt: bool = False
    """Whether it was published for a run of unknown settings."""


@dataclass(frozen=True)
class NumberSource:
    """Where the numbers of one column of claims come from."""

    key: str
    """``ours`` or ``published``, as under ``reason`` in claims.yaml; else a group's name."""
    title: str
    catalog: Catalog
    references: References
    measured: Callable[[Quantity, Experiment], Number]

    def find(self, quantity: Quantity) -> Number:
        """The quantity here.

        Raises:
            NotMeasured: there is no such number.
            UserError: the quantity names something that does not exist.
        """
        name = quantity.name
        if quantity.names_reference:
            reference = _of_group(quantity, self.references)
            return _present(getattr(reference, name), quantity, reference.oom)
        experiment = overrides.experiment_of(quantity.of, self.catalog)
        if name in OF_EXPERIMENT:
            return _present(OF_EXPERIMENT[name](experiment), quantity)
        if name in PUBLISHED:
            reference = _published_run(experiment, self.references.published, self.catalog)
            if reference is None:
                raise NotMeasured(quantity.of)
            number = getattr(reference, PUBLISHED[name])
            return _present(number, quantity, reference.oom, in_doubt=reference.in_doubt)
        return self.measured(quantity, experiment)


def value(expression: str, source: NumberSource) -> float:
    """The value of ``expression``.

    Raises:
        NotMeasured: it needs a number that no run or reference has.
        UserError: it cannot be read, mixes units, or names something that does not exist.
    """
    parsed = parse(expression)
    parsed.unit(unit_of)
    return parsed.value(lambda quantity: source.find(quantity).value)


def unit_of(name: str) -> Unit:
    """The unit of a quantity. Raises UserError where there is none of this name."""
    if name not in MEASURED and name not in OF_EXPERIMENT:
        raise UserError(f"unknown quantity {name}; {nearest(name, [*MEASURED, *OF_EXPERIMENT], 8)}")
    last_word = re.sub(r"_(min|max)$", "", name).rpartition("_")[2]
    return UNITS.get(name) or UNITS.get(last_word, ())


def check(quantity: Quantity, catalog: Catalog) -> None:
    """Raise UserError where the quantity names an experiment or a row that does not exist."""
    if quantity.names_reference:
        _of_group(quantity, load_references())
    else:
        overrides.experiment_of(quantity.of, catalog)


def compares_with_references(quantity: Quantity) -> bool:
    """Whether it sets our records against references, so that references alone say nothing."""
    return quantity.name in (*RATIOS, *PUBLISHED) or quantity.names_reference


def ours(title: str, rows: Sequence[Row], catalog: Catalog, references: References) -> NumberSource:
    """Numbers of these records, the preferred one of each work."""
    preferred = [
        (work(row.experiment), row)
        for row in sorted(rows, key=lambda row: row.preference, reverse=True)
    ]
    card_mib = find_card(references.published.gpu).memory_mib

    def measured(quantity: Quantity, experiment: Experiment) -> Number:
        wanted = work(experiment)
        row = next((row for done, row in preferred if done == wanted), None)
        if row is None:
            raise NotMeasured(quantity.of)
        if quantity.name == "fits":
            used = row.memory_gib.nvml and row.memory_gib.nvml + (row.memory_gib.driver or 0)
            return _fits(quantity, row.state == "oom", used, row.memory_mib, card_mib)
        found = None if row.state == "oom" else VALUES[quantity.name](row)
        value = _present(found, quantity, row.state == "oom").value
        noise = value * _relative_noise(quantity.name, row)
        return Number(value, noise, _shared_node(quantity, row))

    return NumberSource("ours", title, catalog, references, measured)


def published(group: ReferenceGroup, catalog: Catalog, references: References) -> NumberSource:
    """Numbers of a group of references."""
    there_mib = find_card(group.gpu).memory_mib
    card_mib = find_card(references.published.gpu).memory_mib

    def measured(quantity: Quantity, experiment: Experiment) -> Number:
        reference = _published_run(experiment, group, catalog)
        if reference is None:
            raise NotMeasured(quantity.of)
        if quantity.name == "fits" and not reference.in_doubt:
            # nvidia-smi, which published numbers were read from, leaves the driver's memory out
            used = reference.memory_gib and reference.memory_gib + DRIVER_RESERVED_MIB / 1024
            return _fits(quantity, reference.oom, used, there_mib, card_mib)
        number = _rate_or_number(quantity.name, reference, experiment, group)
        return _present(number, quantity, reference.oom, in_doubt=reference.in_doubt)

    title = f"{group.hardware}, {group.software}"
    key = "published" if group.published else group.name
    return NumberSource(key, title, catalog, references, measured)


def _of_group(quantity: Quantity, references: References) -> Reference:
    """The row of references.yaml that ``GROUP, NAME[, VARIANT]`` names."""
    if quantity.name not in ("step_ms", "memory_gib", "tflops"):
        raise UserError(f"{quantity}: a reference has no {quantity.name}")
    group, rest = GROUP.fullmatch(quantity.of).groups()
    name, _, variant = (word.strip() for word in rest.partition(","))
    return references.group(group).named(name, variant)


def _published_run(
    experiment: Experiment, group: ReferenceGroup, catalog: Catalog
) -> Reference | None:
    """The group's row of the same work; an emulated card is the card that it emulates."""
    whole = experiment.model_copy(update={"card": None})
    if work(whole) != work(catalog.find(experiment.id)):
        return None
    found = group.matching(experiment.id)
    return found and found.reference


def _rate_or_number(
    name: str, reference: Reference, experiment: Experiment, group: ReferenceGroup
) -> float | None:
    """A quantity of a published row; rates follow from its step time, by model FLOPs."""
    if name not in RATES or not reference.step_ms:
        return getattr(reference, name, None)
    tflops = tflops_per_gpu(experiment, reference.step_ms)
    peak = peak_tflops(group.gpu, experiment.precision)
    tokens = experiment.global_batch_size * experiment.seq_length
    return {
        "tflops": tflops,
        "mfu": mfu(tflops, peak) if peak else None,
        "tokens_per_s": tokens / reference.step_ms * 1000,
    }[name]


def _present(
    number: float | None, quantity: Quantity, oom: bool = False, *, in_doubt: bool = False
) -> Number:
    if number is None and in_doubt:
        raise NotMeasured(f"{quantity.of} ({IN_DOUBT})")
    if number is None and oom:
        raise RanOutOfMemory(f"{quantity.of} (ran out of memory: no {quantity.name})")
    if number is None:
        raise NotMeasured(f"{quantity.of} (no {quantity.name})")
    return Number(float(number), in_doubt=in_doubt)


def _fits(
    quantity: Quantity, oom: bool, used_gib: float | None, here_mib: int | None, card_mib: int
) -> Number:
    """Whether what ran on a card of ``here_mib`` fits the published card of ``card_mib``.

    ``used_gib`` includes what the driver keeps for itself. Emulated cards count as real ones.
    """
    if oom and here_mib and here_mib >= card_mib:
        return Number(0)
    if oom:
        raise RanOutOfMemory(f"{quantity.of} (out of memory on a smaller card)")
    if (here_mib and here_mib <= card_mib) or (used_gib and used_gib * 1024 < card_mib):
        return Number(1)
    raise NotMeasured(f"{quantity.of} (a larger card holds it: CARD= emulates the published one)")


def _shared_node(quantity: Quantity, row: Row) -> str | None:
    """That other runs on the node may have slowed it down, for a time or a rate."""
    timed = (*STEP_TIMES, *RATES, *LAUNCH_RATES, "step_ratio")
    if row.runs_on_node == 1 or quantity.name not in timed:
        return None
    return f"{quantity.of} shared its node with {row.runs_on_node - 1} runs"


def _relative_noise(name: str, row: Row) -> float:
    """Relative standard uncertainty of a recorded number."""
    if name in EXACT:
        return 0.0
    if name in ("memory_gib", "reserved_gib", "memory_ratio"):
        return step_statistics.MEMORY_BETWEEN_RUNS
    window = step_statistics.window(row.experiment, metrics(row))
    return step_statistics.step_noise_ms([m.step_ms for m in window]) / row.step.median
