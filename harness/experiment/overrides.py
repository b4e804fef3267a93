"""An experiment changed from the command line: ``make 408 STEPS=20 VPP=3``."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Set
from math import prod
from typing import get_args

from harness.errors import UserError, indivisible, nearest
from harness.experiment.catalog import Catalog
from harness.experiment.command_line import (
    EXPERIMENT_SETTINGS,
    FIELDS,
    MINIATURE_STEPS,
    SAME_WORK,
    choice,
    count,
    non_negative,
    parse,
    share,
)
from harness.experiment.constraints import with_changes
from harness.experiment.experiment import RECOMPUTABLE, Experiment, Target
from harness.experiment.extra_arguments import Translation, translate
from harness.experiment.model import LinearLayer, Lora, Model
from harness.experiment.pipeline import EVEN_STAGES, layout_stages
from harness.system import yaml_files


def given(settings: Mapping[str, str]) -> dict[str, str]:
    """The experiment's settings among ``settings``, in the order of their declaration.

    Included are those with the row's own value and those that ARGS= translates to; ARGS= keeps the
    rest.

    Raises:
        UserError: ARGS= cannot be read, or contradicts a setting.
    """
    translation = translate(settings.get("ARGS", ""))
    for key, value in translation.settings.items():
        if settings.get(key, value) != value:
            raise UserError(f"{key}={settings[key]}, and ARGS says {key}={value}; leave one out")
    left = {**settings, **translation.settings} | {"ARGS": shlex.join(translation.kept)}
    return {one.key: left[one.key] for one in EXPERIMENT_SETTINGS if left.get(one.key)}


def apply(
    experiment: Experiment, settings: Mapping[str, str], brought: Mapping[str, object] | None = None
) -> Experiment:
    """``experiment`` with ``settings``; those that change nothing are not in its label.

    ``GPUS`` fixes the number of ranks, and the data-parallel size follows; without it the number
    of ranks follows from the sizes.

    Args:
        brought: fields that the weights to start from set, such as their model. Sizes are checked
            against these.

    Raises:
        UserError: a value cannot be read, or a constraint is broken.
    """
    if brought:
        experiment = experiment.model_copy(
            update={name: value for name, value in brought.items() if name != "weights"}
        )
    asked = given(settings)
    changes = _changes(experiment, asked)
    effective = {
        field: value for field, value in changes.items() if getattr(experiment, field) != value
    }
    if not effective and not brought and "ARGS" not in asked:
        return experiment
    kept = {key: value for key, value in asked.items() if FIELDS[key] in effective or key == "ARGS"}
    weights = {"weights": brought["weights"]} if brought else {}
    return with_changes(experiment, **effective | weights, overrides=kept)


def unchecked(experiment: Experiment, settings: Mapping[str, str]) -> Experiment:
    """``experiment`` with ``settings``, even if its layout breaks rules that another would keep.

    Raises UserError where a value cannot be read.
    """
    asked = given(settings)
    changes = _changes(experiment, asked)
    return experiment.model_copy(update={**changes, "overrides": experiment.overrides | asked})


def _changes(experiment: Experiment, given: Mapping[str, str]) -> dict[str, object]:
    """Every field that the ``given`` settings set, with its value, changed or not."""
    changes: dict[str, object] = {
        one.field: one.read(one.key, given[one.key])
        for one in EXPERIMENT_SETTINGS
        if one.read and one.key in given
    }
    changes |= _quantised(experiment, given)
    of_model = {}
    if "DROPOUT" in given:
        of_model["dropout"] = share("DROPOUT", given["DROPOUT"])
    if "MTP" in given:
        of_model["mtp_num_layers"] = count("MTP", given["MTP"], least=0) or None
    if of_model:
        changes["model"] = experiment.model.model_copy(update=of_model)
    if lora_keys := [key for key in given if key.startswith("LORA_")]:
        changes["lora"] = _lora(experiment, {key: given[key] for key in lora_keys})
    if "UNTIL" in given:
        changes["until"] = _target(experiment, non_negative("UNTIL", given["UNTIL"]))
    if "ARGS" in given:
        translation = _translation(experiment, given)
        changes |= {"extra_args": translation.rest, **translation.fields}
        changes["model"] = _changed_model(changes.get("model", experiment.model), translation.model)
    if "RECOMPUTE_MODULES" in given:
        changes["recompute_modules"] = _recompute_modules(given["RECOMPUTE_MODULES"])
        changes.setdefault("recompute", "selective")
    if "GPUS" in given:
        changes["dp"] = _data_parallel_size(experiment, changes, count("GPUS", given["GPUS"]))
    if changes.get("recompute", "selective") != "selective":
        changes["recompute_modules"] = ()
    if changes.get("tp") == 1 and "SP" not in given:
        changes["sequence_parallel"] = False
    if changes.get("pp") == 1 and "VPP" not in given:
        changes["vpp"] = 1
    if changes.get("pp_layout") and "VPP" not in given:
        stages = len(layout_stages(given["PP_LAYOUT"]))
        changes["vpp"] = max(stages // changes.get("pp", experiment.pp), 1)
    if changes.get("pp") == 1:
        changes = EVEN_STAGES | changes
    return changes


def explicit_model(experiment: Experiment, model: Model) -> Model:
    """``model`` with the fields that ARGS= of ``experiment`` sets."""
    return _changed_model(model, _translation(experiment, experiment.overrides).model)


def _changed_model(model: Model, fields: Mapping[str, object]) -> Model:
    """``model`` with ``fields`` of ARGS=. Raises UserError if a value is out of range."""
    before = {name: getattr(model, name) for name in Model.model_fields}
    return yaml_files.build(Model, before | fields, "ARGS")


def _translation(experiment: Experiment, settings: Mapping[str, str]) -> Translation:
    return translate(settings.get("ARGS", ""), experts=experiment.model.num_experts is not None)


def typed(settings: Mapping[str, object]) -> str:
    """``settings`` as they are typed after ``make <id>``, quoted for a shell."""
    return " ".join(f"{key}={shlex.quote(str(value))}" for key, value in settings.items())


def experiment_of(command: str, catalog: Catalog) -> Experiment:
    """What ``make COMMAND`` runs, such as ``420 GPUS=4 TP=4``. Raises UserError if nothing."""
    try:
        id_, *settings = shlex.split(command) or [""]
    except ValueError as error:
        raise UserError(f"{command}: {error}") from None
    return apply(catalog.find(id_), parse(settings))


def command_of(experiment: Experiment) -> str:
    """What ``make`` takes for the same step: the id and the settings that change its work."""
    kept = {key: value for key, value in experiment.overrides.items() if key not in SAME_WORK}
    return f"{experiment.id} {typed(kept)}".rstrip()


def is_same_work(experiment: Experiment, allowed: Set[str] = SAME_WORK) -> bool:
    """Whether its step does what the row's does: only ``allowed`` settings were changed."""
    return not experiment.extra_args and allowed >= experiment.overrides.keys()


def admitted(experiment: Experiment, settings: Mapping[str, int | str]) -> Experiment | None:
    """``experiment`` with ``settings``; None where a constraint forbids them."""
    try:
        return apply(experiment, {key: str(value) for key, value in settings.items()})
    except UserError:
        return None


def _target(experiment: Experiment, loss: float) -> Target:
    """UNTIL= holds for a miniature as well, within the steps that the row gives it."""
    if not loss:
        raise UserError("UNTIL=0: no loss ever reaches 0")
    steps = experiment.until.miniature_steps if experiment.until else MINIATURE_STEPS
    return Target(validation_loss=loss, miniature_loss=loss, miniature_steps=steps)


def _recompute_modules(value: str) -> tuple[str, ...]:
    modules = tuple(value.replace(",", " ").split())
    for module in modules:
        if module not in RECOMPUTABLE:
            raise UserError(f"RECOMPUTE_MODULES={value}; {nearest(module, RECOMPUTABLE)}")
    return modules


def _quantised(experiment: Experiment, given: Mapping[str, str]) -> dict[str, str | None]:
    """The recipes that FP8= and FP4= name, and the precision that follows from both."""
    changes: dict[str, str | None] = {}
    for key in ("FP8", "FP4"):
        if key in given:
            recipes = get_args(get_args(Experiment.model_fields[FIELDS[key]].annotation)[0])
            recipe = choice(key, given[key], (*recipes, "0"))
            changes[FIELDS[key]] = None if recipe == "0" else recipe
    if not changes:
        return {}
    precision = "bf16" if experiment.quantised else experiment.precision
    for name in ("fp8", "fp4"):
        if changes.get(f"{name}_recipe", getattr(experiment, f"{name}_recipe")):
            precision = name
    return {**changes, "precision": precision}


def _lora(experiment: Experiment, given: Mapping[str, str]) -> Lora | None:
    """The adapters that ``LORA_…`` settings make of the experiment's own."""
    rank = count("LORA_RANK", given["LORA_RANK"], least=0) if "LORA_RANK" in given else None
    known = experiment.lora
    if rank is None and known is None:
        raise UserError(
            f"{', '.join(given)}: {experiment.id} has no adapters; give LORA_RANK=, such as"
            " LORA_RANK=16"
        )
    if rank == 0:
        if len(given) > 1:
            raise UserError(
                "LORA_RANK=0 trains the weights; leave out"
                f" {', '.join(sorted(set(given) - {'LORA_RANK'}))}"
            )
        return None
    rank = rank or known.rank
    targets = (
        tuple(given["LORA_TARGETS"].replace(",", " ").split()) if "LORA_TARGETS" in given else None
    )
    for target in targets or ():
        if target not in get_args(LinearLayer):
            raise UserError(
                f"LORA_TARGETS={given['LORA_TARGETS']}: {nearest(target, get_args(LinearLayer))}"
            )
    if targets and len(set(targets)) != len(targets):
        raise UserError(f"LORA_TARGETS={given['LORA_TARGETS']}: a layer gets one adapter")
    alpha = non_negative("LORA_ALPHA", given["LORA_ALPHA"]) if "LORA_ALPHA" in given else None
    dropout = share("LORA_DROPOUT", given["LORA_DROPOUT"]) if "LORA_DROPOUT" in given else None
    if alpha == 0:
        raise UserError(f"LORA_ALPHA={given['LORA_ALPHA']}: expected a number above 0")
    fields = {"rank": rank, "alpha": alpha or (known.scale if known else 2) * rank}
    fields |= {"dropout": known.dropout} | {"targets": known.targets} if known else {}
    fields |= {} if dropout is None else {"dropout": dropout}
    return Lora(**fields | ({"targets": targets} if targets else {}))


def _data_parallel_size(experiment: Experiment, changes: Mapping[str, object], gpus: int) -> int:
    axes = [changes.get(axis, getattr(experiment, axis)) for axis in ("tp", "pp", "cp")]
    ranks = prod(axes)
    if broken := indivisible("GPUS", gpus, "TP x PP x CP", *axes):
        raise UserError(
            f"{experiment.id}: {broken}; try GPUS={-(-gpus // ranks) * ranks}, or smaller TP=, PP="
            " or CP="
        )
    dp = gpus // ranks
    if changes.get("dp", dp) != dp:
        raise UserError(
            f"{experiment.id}: GPUS={gpus} makes DP={dp}, but DP={changes['dp']} is given; leave"
            " one out"
        )
    return dp
