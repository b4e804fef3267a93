"""Where a formula's numbers come from: our records, one hardware and upstream version at a time, or
published tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from harness.errors import UserError, nearest
from harness.evidence.expressions import Quantity, Unit
from harness.evidence.records import work
from harness.evidence.references import Reference, ReferenceGroup
from harness.evidence.rows import Row, metrics
from harness.experiment import overrides
from harness.experiment.catalog import Catalog
from harness.experiment.experiment import Experiment
from harness.experiment.hardware import DRIVER_RESERVED_MIB, find_card, peak_tflops
from harness.predict.flops import mfu, tflops_per_gpu
from harness.predict.formulas import OF_EXPERIMENT
from harness.run import step_statistics

GIB: Unit = (("GiB", 1),)
UNITS: dict[str, Unit] = {
    "step_ms": (("ms", 1),),
    "memory_gib": GIB,
    "reserved_gib": GIB,
    "allocated_gib": GIB,
    "tflops": (("TFLOP/s", 1),),
    "mfu": (),
    "tokens_per_s": (("tokens/s", 1),),
    "fits": (),
    "memory_ratio": (),
    "step_ratio": (),
    "published_memory_gib": GIB,
    "published_step_ms": (("ms", 1),),
}
"""What is measured: of the step time the median; memory of the fullest GPU, ``memory_gib`` as NVML
shows it.

``fits``: 1 where the experiment fits the published card, 0 where it runs out of memory on it.
``memory_ratio``, ``step_ratio``: here over published.
"""
BOTH = ("memory_ratio", "step_ratio", "published_memory_gib", "published_step_ms")
"""Those that stand between our records and the published table."""


@dataclass(frozen=True)
class Number:
    """A number with its standard uncertainty, and what a reader must know about it."""

    value: float
    noise: float = 0.0
    remark: str | None = None


@dataclass(frozen=True)
class Source:
    """Where the numbers of one column come from; ``find`` gives a quantity's number, or says why
    there is none."""

    key: str
    """``ours`` or ``published``, as under ``reason``."""
    title: str
    find: Callable[[Quantity], Number | str]


def unit_of(name: str) -> Unit:
    """The unit of a quantity. Raises UserError where there is none of this name."""
    if name in UNITS:
        return UNITS[name]
    if name not in OF_EXPERIMENT:
        raise UserError(f"unknown quantity {name}; {nearest(name, [*UNITS, *OF_EXPERIMENT], 8)}")
    suffix = name.rpartition("_")[2]
    return {"gib": GIB, "mib": (("MiB", 1),), "pflop": (("PFLOP", 1),), "b": (("10^9", 1),)}.get(
        suffix, ()
    )


def ours(title: str, rows: Sequence[Row], catalog: Catalog, card_mib: int) -> Source:
    """Numbers of these records, the newest of an experiment; ``card_mib``: memory of the published
    card."""
    by_age = [
        (work(row.experiment), row)
        for row in sorted(rows, key=lambda row: row.result.started, reverse=True)
    ]

    def find(quantity: Quantity) -> Number | str:
        experiment = overrides.made(quantity.of, catalog)
        if quantity.name in OF_EXPERIMENT and quantity.name not in UNITS:
            return _computed(quantity, experiment)
        wanted = work(experiment)
        row = next((row for done, row in by_age if done == wanted), None)
        if row is None:
            return quantity.of
        if quantity.name == "fits":
            taken = row.memory_gib.nvml and row.memory_gib.nvml + (row.memory_gib.driver or 0)
            return _fits(row.state == "oom", taken, row.memory_mib, card_mib, quantity.of)
        value = _MEASURED[quantity.name](row)
        if value is None:
            return _without(quantity, row.state == "oom")
        return Number(value, value * _relative_noise(quantity.name, row), _shared(quantity, row))

    return Source("ours", title, find)


def published(catalog: Catalog, group: ReferenceGroup, card_mib: int) -> Source:
    """Numbers of a group of references; ``card_mib``: memory of the published card."""
    there_mib = find_card(group.gpu).memory_mib

    def find(quantity: Quantity) -> Number | str:
        experiment = overrides.made(quantity.of, catalog)
        if quantity.name in OF_EXPERIMENT and quantity.name not in UNITS:
            return _computed(quantity, experiment)
        whole = experiment.model_copy(update={"card": None})
        beside = (
            group.beside(experiment.id)
            if work(whole) == work(catalog.find(experiment.id))
            else None
        )
        reference = beside and beside.reference
        if reference is None:
            return quantity.of
        if reference.in_doubt:
            return f"{quantity.of} (what ran is in doubt)"
        if quantity.name == "fits":
            taken = reference.memory_gib and reference.memory_gib + DRIVER_RESERVED_MIB / 1024
            return _fits(reference.oom, taken, there_mib, card_mib, quantity.of)
        value = _of_reference(quantity.name, reference, experiment, group)
        return _without(quantity, reference.oom) if value is None else Number(value)

    title = f"{group.hardware}, {group.software}"
    return Source("published" if group.published else group.name, title, find)


_MEASURED: dict[str, Callable[[Row], float | None]] = {
    "step_ms": lambda row: row.step and row.step.median,
    "memory_gib": lambda row: row.memory_gib.nvml if row.state == "ok" else None,
    "reserved_gib": lambda row: row.memory_gib.reserved if row.state == "ok" else None,
    "allocated_gib": lambda row: row.memory_gib.allocated if row.state == "ok" else None,
    "tflops": lambda row: row.tflops,
    "mfu": lambda row: row.mfu,
    "tokens_per_s": lambda row: row.result.tokens_per_s,
    "memory_ratio": lambda row: row.memory_ratio,
    "step_ratio": lambda row: row.step_ratio,
    "published_memory_gib": lambda row: _certain(row.reference, "memory_gib"),
    "published_step_ms": lambda row: _certain(row.reference, "step_ms"),
}


def _certain(reference: Reference | None, name: str) -> float | None:
    return None if reference is None or reference.in_doubt else getattr(reference, name)


def _of_reference(
    name: str, reference: Reference, e: Experiment, group: ReferenceGroup
) -> float | None:
    """A quantity of a published row; rates follow from its step time, by model FLOPs."""
    if name in ("step_ms", "memory_gib") or not reference.step_ms:
        return getattr(reference, name, None)
    tflops = tflops_per_gpu(e, reference.step_ms)
    peak = peak_tflops(group.gpu, e.precision)
    rates = {
        "tflops": tflops,
        "mfu": mfu(tflops, peak) if peak else None,
        "tokens_per_s": e.global_batch_size * e.seq_length / reference.step_ms * 1000,
    }
    return rates.get(name)


def _without(quantity: Quantity, oom: bool) -> str:
    return f"{quantity.of} ({'ran out of memory: ' * oom}no {quantity.name})"


def _shared(quantity: Quantity, row: Row) -> str | None:
    """That other runs on the node may have slowed it down, where the number is a time or a rate."""
    is_timed = quantity.name not in ("memory_gib", "reserved_gib", "allocated_gib", "memory_ratio")
    return (
        f"{quantity.of} shared its node with {row.runs_on_node - 1} runs"
        if is_timed and row.runs_on_node > 1
        else None
    )


def _computed(quantity: Quantity, experiment: Experiment) -> Number | str:
    value = OF_EXPERIMENT[quantity.name](experiment)
    return f"{quantity.of} (no {quantity.name})" if value is None else Number(float(value))


def _fits(
    oom: bool, taken_gib: float | None, here_mib: int | None, card_mib: int, words: str
) -> Number | str:
    """Whether what ran on a card of ``here_mib`` fits the published one of ``card_mib``; emulated
    cards count as real.

    Args:
        taken_gib: used memory, and what the driver keeps for itself.
    """
    if oom:
        return (
            Number(0)
            if here_mib and here_mib >= card_mib
            else f"{words} (out of memory on a smaller card)"
        )
    if (here_mib and here_mib <= card_mib) or (taken_gib and taken_gib * 1024 < card_mib):
        return Number(1)
    return f"{words} (a larger card holds it: CARD= emulates the published one)"


def _relative_noise(name: str, row: Row) -> float:
    """Relative standard uncertainty of a recorded number."""
    if name in ("allocated_gib", "published_memory_gib", "published_step_ms"):
        return 0.0
    if name in ("memory_gib", "reserved_gib", "memory_ratio"):
        return step_statistics.MEMORY_BETWEEN_RUNS
    window = step_statistics.window(row.experiment, metrics(row))
    return step_statistics.step_noise_ms([m.step_ms for m in window]) / row.step.median
