"""Second stage: the experiment at full size, with settings, model, weights and data filled in."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from harness.data import data_sets
from harness.data.definitions import definitions
from harness.errors import UserError
from harness.experiment import extra_arguments, overrides
from harness.experiment.catalog import load_catalog
from harness.experiment.constraints import with_changes
from harness.experiment.experiment import Experiment
from harness.planning import starting_weights
from harness.planning.request import RunRequest
from harness.planning.starting_weights import StartingWeights
from harness.run import finding
from harness.upstreams.megatron_lm.flags import Device

PLAIN_TEXT = (
    "DATA={} holds no conversations: every token is learned, not only answers, and --sft is left"
    " out; DATA={} has the conversations of this row, and make data-chat prepares others"
)
NO_FLASH_ATTENTION = "attention by cuDNN: the published run's flash-attn is not installed here"


@dataclass(frozen=True)
class ResolvedRun:
    """The experiment at full size.

    Attributes:
        weights: those that it starts from; None: random weights.
        remarks: in what it differs from the published run, for the script and the terminal.
    """

    request: RunRequest
    experiment: Experiment
    weights: StartingWeights | None
    remarks: tuple[str, ...]


def resolve(request: RunRequest) -> ResolvedRun:
    """Apply the settings of ``request``, and choose its data and its attention kernels.

    Raises:
        UserError: sizes do not fit together, or weights or data are not there.
    """
    changed, weights = _with_weights(request.row, request.settings, request.outdir)
    fields, remarks = {}, []
    if "DATA" not in request.settings:
        fields["data"] = _default_data(changed, request.device)
    if request.device == "cuda" and changed.attention_backend == "flash" and _lacks_flash():
        fields["attention_backend"] = "auto"
        remarks.append(NO_FLASH_ATTENTION)
    experiment = with_changes(changed, **fields) if fields else changed
    published = definitions().get(experiment.published_data or "")
    if published and published.chat and not data_sets.is_chat(experiment.data):
        remarks.append(PLAIN_TEXT.format(experiment.data, published.name))
    return ResolvedRun(request, experiment, weights, tuple(remarks))


def with_settings(row: Experiment, settings: Mapping[str, str], outdir: Path) -> Experiment:
    """``row`` with ``settings``, on the model of the weights that ``WEIGHTS=`` names, if it does.

    The model is known before sizes are checked: what 25 heads forbid, a model of 4 may allow.
    Dropout stays that of ``row``. Sequences are at most as long as there are learned positions,
    unless ``SEQ=`` says how long.

    Raises:
        UserError: see ``starting_weights.find`` and ``overrides.apply``.
    """
    return _with_weights(row, settings, outdir)[0]


def of_catalogue(id_: str, settings: Mapping[str, str]) -> Experiment:
    """Experiment ``id_`` with ``settings``, as predictions take it.

    Raises:
        UserError: as ``with_settings``; or ``ARGS=`` has an argument that no formula knows.
    """
    experiment = with_settings(load_catalog().find(id_), settings, finding.outdir(settings))
    if reason := extra_arguments.refusal(experiment.id, experiment.extra_args):
        raise UserError(reason)
    return experiment


def _with_weights(
    row: Experiment, settings: Mapping[str, str], outdir: Path
) -> tuple[Experiment, StartingWeights | None]:
    """``row`` with ``settings``, and the weights that it starts from."""
    _check_recomputation(settings)
    named = settings.get("WEIGHTS", row.weights)
    if not named:
        return overrides.apply(row, settings), None
    weights = starting_weights.find(named, outdir)
    experiment = overrides.apply(row, settings, weights.fields_for(row))
    weights.check_model(experiment)
    return experiment, weights


def _check_recomputation(settings: Mapping[str, str]) -> None:
    """Refuse modules to recompute in ``ARGS=`` where ``RECOMPUTE=`` recomputes no modules."""
    modules = extra_arguments.translate(settings.get("ARGS", "")).fields.get("recompute_modules")
    how = settings.get("RECOMPUTE", "selective")
    if modules and how != "selective":
        raise UserError(
            f"RECOMPUTE={how} recomputes no single modules, but ARGS names {', '.join(modules)}\n"
            "set RECOMPUTE=selective, or leave --recompute-modules out"
        )


def _default_data(experiment: Experiment, device: Device) -> str:
    """The published data set where it is prepared, else mock data.

    A run to a loss needs the data set on which that loss was published (UserError where it is not
    prepared); its miniature, which has a loss of its own to reach, trains on mock data.
    """
    if not experiment.until:
        return data_sets.default_for(experiment)
    if device == "cpu" or experiment.published_data is None:
        return experiment.data
    return data_sets.find(experiment.published_data).name


def _lacks_flash() -> bool:
    """Whether there is a GPU here, and flash-attn is not installed."""
    from harness.machine.gpus import list_gpus

    return bool(list_gpus()) and importlib.util.find_spec("flash_attn") is None
