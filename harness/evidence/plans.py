"""``make plan``: how to lay a model out over GPUs, how fast it trains, and what that costs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from harness.errors import UserError
from harness.evidence.further import objects, print_further
from harness.evidence.predictions import is_json, prediction, print_json, say_extrapolated
from harness.experiment import identity, overrides
from harness.experiment.catalog import load_catalog, load_models
from harness.experiment.command_line import EXPERIMENT_SETTINGS, FIELDS, count, non_negative
from harness.experiment.experiment import Experiment
from harness.experiment.hardware import Card, peak_tflops, required_card
from harness.experiment.unlisted import MOST_GPUS, experiment_from, nodes_of, usual_batch
from harness.machine import gpus
from harness.predict.calibrations import machine_here
from harness.predict.flops import count_parameters, mfu, tflops_per_gpu
from harness.predict.step_time import StepTime
from harness.run import finding
from harness.search.layouts import COUNTED, SIZES, Layout, Search, best, smallest
from harness.search.space import LEVERS, legal
from harness.system.screen import say

SHOWN = 5
"""Number of layouts that are printed."""
LAID_OUT = {**SIZES, "sequence_parallel": "SP", "vpp": "VPP", "dp": "DP", **COUNTED, **LEVERS}
"""Fields that the search varies unless their setting is typed."""
OF_A_LAYOUT = (
    *(
        "TP_OVERLAP",
        "EP_OVERLAP",
        "DELAY_WGRAD",
        "MOE_DISPATCHER",
        "MOE_BACKEND",
        "SHARED_EXPERT_OVERLAP",
    ),
    *("OPTIM_INSTANCES", "RECOMPUTE_MODULES"),
    *("FIRST_STAGE_LAYERS", "LAST_STAGE_LAYERS", "PP_LAYOUT", "CROSS_ENTROPY_IMPL"),
)
"""Settings that one GPU may not have: layouts that cannot have them are left out."""
OWN = ("MODEL", "TOKENS", "FORMAT", "OUTDIR", "GPUS", "NODES")
NAMES = {"exchange": "communication", "gradients": "communication", "passes": "memory"}
"""What pieces of a step are called here where not by their own name."""
BOUNDS = 3
"""Number of pieces that are named as bounds."""
FARTHEST = 64
"""Counts of GPUs up or down that are tried where no layout divides the one asked for."""
SECONDS_A_DAY = 86_400


@dataclass(frozen=True)
class Cost:
    """What training costs at the speed of a step."""

    step_ms: float
    experiment: Experiment

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.experiment.global_batch_size * self.experiment.seq_length

    @property
    def tokens_per_day(self) -> float:
        return self.tokens * SECONDS_A_DAY / (self.step_ms / 1e3)

    def gpu_hours(self, tokens: float) -> float:
        """To train on ``tokens``."""
        return self.days(tokens) * 24 * self.experiment.world_size

    def days(self, tokens: float) -> float:
        return tokens / self.tokens_per_day


def print_plan(settings: Mapping[str, str]) -> int:
    """Print the best layouts of ``MODEL`` over ``GPUS`` of ``CARD``.

    Raises:
        UserError: a setting is invalid, no layout divides the GPUs, or none fits them; with what
            would.
    """
    as_json, tokens, search = is_json(settings), _tokens(settings), _search(settings)
    machine, source = machine_here(search.card, finding.outdir(settings), gpus.uuids())
    search = replace(search, machine=machine)
    found = list(islice(best(search), SHOWN))
    if not found:
        raise UserError(_way_out(search, settings))
    if as_json:
        first, *others = (_object(layout, search, tokens) for layout in found)
        return print_json([first | {"further": objects(found[0], search)}, *others])
    _print(found, search, settings, tokens)
    print_further(found[0], search)
    if machine and found[0].step:
        say(f"  {machine.how_sure(*(layout.experiment for layout in found))}")
        say(f"  {source}")
    say_extrapolated([found[0].experiment])
    return 0


def _search(settings: Mapping[str, str]) -> Search:
    """What is to be laid out. Raises UserError where a setting is invalid."""
    ranks, card = count("GPUS", settings["GPUS"]), required_card(settings["CARD"], "CARD")
    if ranks > MOST_GPUS:
        raise UserError(f"GPUS={ranks}: at most {MOST_GPUS:,}")
    typed = {key: value for key, value in settings.items() if key not in OWN}
    varied = {key for key in typed if key in LAID_OUT.values()}
    later = {key: value for key, value in typed.items() if key in OF_A_LAYOUT}
    work = {key: value for key, value in typed.items() if key not in varied | later.keys()}
    row = experiment_from(settings["MODEL"], work)
    if "GBS" not in work:
        batch = str(usual_batch(row.seq_length, ranks))
        row = experiment_from(settings["MODEL"], work | {"GBS": batch})
    read = {one.key: one.read for one in EXPERIMENT_SETTINGS}
    fixed = {field: read[key](key, typed[key]) for field, key in LAID_OUT.items() if key in varied}
    if "RECOMPUTE_MODULES" in later:
        fixed.setdefault("recompute", "selective")
    row = overrides.unchecked(row, later)
    nodes = count("NODES", settings["NODES"]) if "NODES" in settings else None
    return Search(row, ranks, card, None, fixed, nodes)


def _tokens(settings: Mapping[str, str]) -> float | None:
    tokens = non_negative("TOKENS", settings["TOKENS"]) if "TOKENS" in settings else None
    if tokens == 0:
        raise UserError("TOKENS=0: how many tokens is the model to be trained on?")
    return tokens


def _print(
    found: list[Layout], search: Search, settings: Mapping[str, str], tokens: float | None
) -> None:
    work, card, first = search.experiment, search.card, found[0]
    size, nodes = work.global_batch_size, first.experiment.nodes
    say(
        f"{work.id}: {count_parameters(work).total / 1e9:,.1f} billion parameters on"
        f" {search.ranks} x {card.name}, {nodes} node{'s' * (nodes > 1)}; {size:,}"
        f" sequences of {work.seq_length:,} tokens per step"
    )
    print()
    if first.step is None:
        say("  step time not predicted; layouts that fit, least model parallelism first")
    else:
        print(f"  {'ms/step':>9} {'±':>4} {'MFU':>4} {'GiB':>6} {'tokens/day':>10}  bound by")
    for layout in found:
        _print_layout(layout, card, tokens)
    print()
    for line in _how_to_run(first.experiment, search):
        say(line, hang=4)
    command = overrides.typed({key: settings[key] for key in settings if key != "FORMAT"})
    say(f"  another layout: make plan {command} TP=… PP=…")


def _print_layout(layout: Layout, card: Card, tokens: float | None) -> None:
    gib, settings = layout.memory.in_all, _laid_out(layout.experiment)
    if layout.step is None:
        say(f"  {gib:6.1f} GiB  {settings}", hang=4)
        return
    ms, cost = layout.step.total, Cost(layout.step.total, layout.experiment)
    share = _mfu(layout, card)
    shown = f"{share:4.0%}" if share else " " * 4
    bound = ", ".join(f"{name} {part:.0%}" for name, part in bounds(layout.step))
    day = f"{cost.tokens_per_day / 1e9:,.2f}B"
    print(f"  {ms:9,.0f} {layout.error:4.0%} {shown} {gib:6.1f} {day:>10}  {bound}")
    say(f"            {settings}", hang=14)
    if tokens:
        say(
            f"            {tokens:.3g} tokens: {cost.days(tokens):,.1f} days,"
            f" {cost.gpu_hours(tokens):,.0f} GPU-hours",
            hang=14,
        )


def bounds(step: StepTime) -> Iterator[tuple[str, float]]:
    """The largest pieces of a step, each with its share."""
    shares: dict[str, float] = {}
    for name, ms in step.pieces.items():
        name = NAMES.get(name, name)
        shares[name] = shares.get(name, 0.0) + ms / step.total
    largest = sorted(shares.items(), key=lambda piece: -piece[1])
    return ((name, share) for name, share in largest[:BOUNDS] if share >= 0.005)


def _mfu(layout: Layout, card: Card) -> float | None:
    peak = peak_tflops(card.name, layout.experiment.precision)
    return mfu(tflops_per_gpu(layout.experiment, layout.step.total), peak) if peak else None


def _object(layout: Layout, search: Search, tokens: float | None) -> dict[str, Any]:
    """What is predicted of ``layout``, as JSON has it."""
    found = prediction(layout.experiment, search.card, layout.memory, search.machine, layout.step)
    cost = Cost(layout.step.total, layout.experiment) if layout.step else None
    return found | {
        "tokens_per_day": cost and round(cost.tokens_per_day),
        "gpu_hours": cost and tokens and round(cost.gpu_hours(tokens)),
        "make": command_of(layout.experiment),
    }


def _laid_out(experiment: Experiment) -> str:
    """The settings of its layout."""
    kept = {key: value for key, value in experiment.overrides.items() if key in LAID_OUT.values()}
    return overrides.typed(kept) or "one GPU"


def _how_to_run(experiment: Experiment, search: Search) -> Iterator[str]:
    """The target that runs it; where no row has its model, a row for the catalogue."""
    if command := command_of(experiment):
        yield f"  to run the first: make {command}"
        return
    if experiment.model.name not in load_models():
        yield f"  to run the first, add {experiment.model.name} to experiments/models.yaml"
        return
    yield "  to run the first, add this row to a chapter in experiments/ and make targets:"
    yield f"  {row(experiment)}"


def command_of(experiment: Experiment) -> str | None:
    """What ``make`` takes for it: the first row of its model, with settings; None without one."""
    for listed in load_catalog().experiments:
        if listed.model.name != experiment.model.name:
            continue
        changed = overrides.admitted(listed, _all_settings(experiment))
        if changed and all(
            getattr(changed, name) == getattr(experiment, name) for name in WORK_FIELDS
        ):
            return overrides.command_of(changed)
    return None


ROW_OWN = ("id", "slug", "chapter", "shows", "overrides", "card")
"""Fields that a row writes in its own way, or does not have."""
WORK_FIELDS = tuple(Experiment.model_fields.keys() - {*ROW_OWN, *identity.AROUND_STEPS})


def _all_settings(experiment: Experiment) -> dict[str, str]:
    """Every setting of the step, those with the usual value as well."""
    plain = {
        key: getattr(experiment, field)
        for key, field in FIELDS.items()
        if field in WORK_FIELDS and field not in ("dp", "model", "lora", "extra_args")
    }
    plain |= {"FP8": experiment.fp8_recipe or "0", "FP4": experiment.fp4_recipe or "0"}
    plain |= {"GPUS": experiment.world_size}
    return {key: _typed(value) for key, value in plain.items() if value not in (None, ())} | {
        key: value for key, value in experiment.overrides.items() if key not in (*plain, "CARD")
    }


def _typed(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(value)
    return str(int(value) if isinstance(value, bool) else value)


def row(
    experiment: Experiment, number: str = "999", slug: str | None = None, shows: str | None = None
) -> str:
    """``experiment`` as a row of a chapter's file.

    Args:
        number: its id; by default one that is to be chosen.
        slug: by default the model and the number of GPUs.
        shows: by default that it was planned.
    """
    fields = {"slug": slug or f"{experiment.model.name}-{experiment.world_size}gpus"}
    for name, value in experiment:
        info = Experiment.model_fields[name]
        if name in ROW_OWN or value == info.get_default(call_default_factory=True):
            continue
        shown = value.name if name == "model" else value
        fields[info.alias or name] = _yaml(shown)
    shows = shows or f"planned for {experiment.world_size} GPUs"
    fields["shows"] = json.dumps(shows, ensure_ascii=False)
    return f"{number}: {{" + ", ".join(f"{name}: {value}" for name, value in fields.items()) + "}"


def _yaml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return "null" if value is None else str(value)


def _way_out(search: Search, settings: Mapping[str, str]) -> str:
    """Why there is no layout, and the nearest number of GPUs that has one."""
    name, ranks = search.experiment.id, search.ranks
    if not _divides(search, ranks):
        near = [
            one
            for apart in range(1, FARTHEST)
            for one in (ranks - apart, ranks + apart)
            if 1 <= one <= MOST_GPUS and _divides(search, one)
        ][:2]
        if not near:
            experiment_from(settings["MODEL"], _one_layout(settings))  # says which rule is broken
        counts = " or GPUS=".join(map(str, sorted(near)))
        nearest = f"nearest that do: GPUS={counts}" if near else f"nor does any number near {ranks}"
        return (
            f"GPUS={ranks}: no layout of {name} with batches of"
            f" {search.experiment.global_batch_size} divides them"
            f"{_asked(search)}\n{nearest}"
        )
    said = f"{name} does not fit {ranks} x {search.card.name} in any layout{_asked(search)}"
    if not (found := smallest(search)):
        return f"{said}, nor any larger number up to {MOST_GPUS:,}; choose a card with more memory"
    more, layout = found
    typed = {key: value for key, value in settings.items() if key != "NODES"}
    command = overrides.typed(typed | {"GPUS": str(more)})
    return (
        f"{said}\nsmallest that works: make plan {command}"
        f" ({_laid_out(layout.experiment)}: {layout.memory.in_all:.1f} GiB)"
    )


def _one_layout(settings: Mapping[str, str]) -> dict[str, str]:
    """The settings of an experiment among what was typed."""
    return {key: settings[key] for key in settings if key not in {*OWN} - {"GPUS", "NODES"}}


def _asked(search: Search) -> str:
    """What was typed and cannot vary."""
    typed = ", ".join(f"{LAID_OUT[name]}={value}" for name, value in search.fixed.items())
    return f" with {typed}" if typed else ""


def _divides(search: Search, ranks: int) -> bool:
    """Whether constraints admit a layout over so many GPUs."""
    nodes = search.given_nodes or nodes_of(ranks, search.gpus_of_a_node)
    base = search.experiment.model_copy(update={"nodes": nodes})
    fixed = {"micro_batch_size": 1, "recompute": "none", "sharding": "optim"} | search.fixed
    return len(legal(base, ranks, fixed)) > 0
