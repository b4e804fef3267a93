"""What a template may call: tables, lists and single numbers made from records, references and
formulas.

    {{ value("memory_gib[115]", ".1f") }}     one number, in Python's format
    {{ recorded("benchmarks/data", "mb_per_s.ours", ".0f") }}
                                              one number of a JSON file of records or benchmarks
    {% set found = summary() %}               what all records show together: found.experiments, …
    {{ records() }}                           every record with its published row
    {{ experiments(chapter=100) }}            what each experiment isolates
    {{ table("101 104") }}                    measured and published memory and step time
    {{ memory("111 115") }}                   predicted memory by piece, and what was measured
    {{ speed("408", machine="h200") }}        predicted step time by piece
    {{ faster("408", machine="h200") }}       the fastest layout predicted for the same work
    {{ recipes() }}                           the fastest set-up measured of each workload
    {{ recipes_mean() }}                      geometric mean of what they bring
    {{ recipes_count() }}                     of how many workloads
    {{ best_ratio("632") }}                   what the fastest of one workload brings
    {{ ablations() }}                         what one setting brought in each
    {{ gpus("611", card="h100-80gb") }}       the best layout predicted for each number of GPUs
    {{ prediction_keys() }}                   keys of predictions as JSON
    {{ machines() }}                          the constants of the predictions and their errors
    {{ unseen("h200-4gpu") }}                 predictions for references outside the calibration
    {{ published("narayanan-2021") }}         a group of published steps, each with its prediction
    {{ published_errors() }}                  how far predictions of each such group are off
    {{ scale("batch") }}                      a number of benchmarks/scale.json
    {{ scale_table() }}                       the fastest layouts on 8 to 16,384 GPUs, from it
    {{ pipeline("401 408") }}                 waiting and working time of each pipeline step
    {{ claims(chapter=100) }}                 which teaching points the numbers confirm
    {{ profile("282h 101") }}                 where the time of a traced step goes
    {{ slow_steps() }}                        steps much longer than the median of their run
    {{ weights("LlamaForCausalLM") }}         which tensors correspond in both formats
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from harness.errors import UserError
from harness.evidence import (
    published_steps,
    scaling,
    step_time_tables,
    tables,
    verdicts,
    workloads,
)
from harness.evidence.facts import HARDWARE, Facts
from harness.evidence.predictions import KEYS
from harness.evidence.quantities import NotMeasured, RanOutOfMemory
from harness.pages import architectures, profiles, result_tables, scale
from harness.pages.result_tables import MISSING
from harness.pages.summary import summary


def functions(facts: Facts) -> dict[str, Callable[..., Any]]:
    """Every function by the name that templates use; all but ``summary`` return Markdown."""
    return {name: partial(function, facts) for name, function in FUNCTIONS.items()}


def value(facts: Facts, expression: str, form: str) -> str:
    """The number of an expression such as ``memory_gib[114] - memory_gib[115]``.

    Args:
        form: Python's format, such as ``.1f``.

    Returns:
        The formatted number; where no run has it, ``not measured yet`` or ``out of memory``.
    """
    return _number(partial(facts.value, expression), form)


def recorded(facts: Facts, name: str, keys: str, form: str) -> str:
    """A number of a JSON file: a record (``h200-141gb/101``) or one of ``benchmarks/``.

    Args:
        keys: where in the file, joined by dots: ``loss.first``.
        form: Python's format, such as ``.1f``.
    """
    return _number(partial(facts.record_value, name, keys), form)


def _number(find: Callable[[], float], form: str) -> str:
    try:
        number = find()
    except RanOutOfMemory:
        return "out of memory"
    except NotMeasured:
        return MISSING
    try:
        return format(number, form)
    except ValueError:
        raise UserError(f"{form} is no format of a number, such as .1f or .0%") from None


def records(facts: Facts) -> str:
    """Every record with its published row, a table for each chapter."""
    if not facts.rows:
        return "No records yet."
    text = tables.render(facts.rows, "markdown", titles=facts.catalog.chapters)
    return text.replace(" (record)", "")  # tables with runs mark records; here all are


def profile(facts: Facts, ids: str) -> str:
    """Where the time of a traced step goes, measured here and published."""
    wanted = ids.split()
    published = [facts.published(facts.catalog.find(id_).half_of or id_) for id_ in wanted]
    return profiles.profiles(facts.records / HARDWARE, wanted, published)


def claims(facts: Facts, chapter: int) -> str:
    """The claims of a chapter, each evaluated on our records and on the published table."""
    wanted = [one for one in facts.claims if one.claim.chapter == chapter]
    return verdicts.render(wanted, "markdown").partition("\n\n")[2]  # without its title


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "value": value,
    "recorded": recorded,
    "summary": summary,
    "records": records,
    "experiments": result_tables.experiments,
    "table": result_tables.results,
    "memory": result_tables.memory,
    "speed": step_time_tables.parts_table,
    "faster": lambda _, ids, machine: step_time_tables.faster_table(machine, *ids.split()),
    "tried": lambda _, commands, machine: step_time_tables.tried_table(machine, commands),
    "recipes": lambda facts: workloads.table(facts.rows),
    "recipes_mean": lambda facts: _number(
        lambda: workloads.mean_ratio(workloads.load(facts.rows)), ".2f"
    ),
    "recipes_count": lambda facts: str(len(workloads.load(facts.rows))),
    "best_ratio": lambda facts, command: _number(
        lambda: workloads.ratio_of(command, facts.rows), ".1f"
    ),
    "ablations": lambda facts: workloads.ablations(facts.rows),
    "gpus": lambda _, ids, card: scaling.table(card, *ids.split()),
    "prediction_keys": lambda _: "\n".join(f"| `{key}` | {does} |" for key, does in KEYS.items()),
    "machines": lambda _: step_time_tables.machines_table(),
    "unseen": step_time_tables.unseen_table,
    "bands": lambda _: step_time_tables.bands_table(),
    "published": lambda _, group: published_steps.rows_table(group),
    "published_errors": lambda _: published_steps.summary_table(),
    "scale": lambda _, key: scale.number(key),
    "scale_table": lambda _: scale.table(),
    "pipeline": result_tables.pipeline,
    "claims": claims,
    "profile": profile,
    "slow_steps": lambda facts: profiles.slow_steps(facts.of_hardware),
    "weights": lambda _, architecture: architectures.page(architecture),
}
