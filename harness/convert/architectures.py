"""The supported architectures of Hugging Face, from architectures.yaml.

A ``TensorRow`` maps tensors of Hugging Face to one tensor of Megatron-LM; a ``ConfigKey`` maps a
key of config.json to fields of the catalogue's ``Model``. Import and export read the same tables,
so that they cannot differ. Shapes are Megatron-LM's; Hugging Face's follow from the transform.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from harness.convert.transforms import SAME, TRANSFORMS, Sizes, Transform
from harness.errors import UserError
from harness.experiment.model import Model, Yarn
from harness.system import yaml_files

Config = Mapping[str, Any]
"""config.json of Hugging Face, with transformers' defaults filled in."""

TABLES = Path(__file__).with_name("architectures.yaml")
LAYERS = "decoder.layers."
EXPERTS = "mlp.experts.experts."
EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
LM_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class TensorRow:
    """A tensor of Megatron-LM's checkpoint, which may stack those of all layers and experts.

    Attributes:
        shape: names of ``Sizes``, for one layer and one expert.
        hf: names with ``{layer}`` and ``{expert}``; ``name[{expert}]`` is a slice of a tensor of
            all experts.
        also: other names of the same tensor in some of upstream's layer specs.
    """

    megatron: str
    shape: tuple[str, ...]
    hf: tuple[str, ...]
    how: Transform = SAME
    also: tuple[str, ...] = ()

    def stacked(self, sizes: Sizes) -> tuple[int, ...]:
        """Sizes of the leading axes: layers, and experts."""
        if not self.megatron.startswith(LAYERS):
            return ()
        layers = (sizes.model.num_layers,)
        return (*layers, sizes.model.num_experts) if EXPERTS in self.megatron else layers

    def places(self, sizes: Sizes) -> Iterator[tuple[int, ...]]:
        """Every layer, or layer and expert; the empty index for a single tensor."""
        return product(*map(range, self.stacked(sizes)))

    def names(self, index: tuple[int, ...]) -> tuple[str, ...]:
        """Hugging Face's names for layer, or layer and expert, ``index``."""
        where = dict(zip(("layer", "expert"), index, strict=False))
        return tuple(name.format(**where) for name in self.hf)


@dataclass(frozen=True)
class ConfigKey:
    """A key of config.json, converted to fields of ``Model`` and back.

    ``positions``, the maximum sequence length, is treated like a field. ``says``: the fields, for
    people; in architectures.yaml, together with the key, it selects one of ``CONVERSIONS``.
    """

    key: str
    fields: Callable[[Any, Config], Mapping[str, Any]]
    value: Callable[[Mapping[str, Any]], Any]
    says: str


@dataclass(frozen=True, eq=False)
class Architecture:
    """One of Hugging Face's model classes.

    Attributes:
        name: the class, config.json's ``architectures``.
        model_type: config.json's ``model_type``.
        prefix: of the base model's tensors; files of a base model do not have it.
        rows: every tensor.
        settings: every key of config.json that describes the model.
        needs: keys with the only values that upstream supports.
        fixed: fields of ``Model`` that all its models share, which identify it.
        unused: endings of tensors in some files that no model needs.
    """

    name: str
    model_type: str
    prefix: str
    rows: tuple[TensorRow, ...]
    settings: tuple[ConfigKey, ...]
    needs: Mapping[str, list[Any]]
    fixed: Mapping[str, Any]
    unused: tuple[str, ...]

    def read(self, config: Config, name: str) -> tuple[Model, int]:
        """The model that ``config`` describes, and its maximum sequence length.

        Raises:
            UserError: upstream does not support it, or sizes are missing or contradict each other.
        """
        from pydantic import ValidationError

        for key, known in self.needs.items():
            if key in config and config[key] not in known:
                one = " or ".join(map(repr, known))
                raise UserError(
                    f"config.json: {key} is {config[key]!r}; supported models have {one}"
                )
        fields: dict[str, Any] = dict(self.fixed)
        try:
            for setting in self.settings:
                fields |= setting.fields(config[setting.key], config)
            positions = fields.pop("positions")
            return Model(name=name, **fields), positions
        except KeyError as error:
            raise UserError(f"config.json has no {error}") from None
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(
                f"config.json: {first['loc'][0]} is {first['input']!r}: {first['msg']}"
            ) from None

    def write(self, model: Model, positions: int) -> dict[str, Any]:
        """The keys of config.json for ``model``."""
        fields = {name: getattr(model, name) for name in Model.model_fields}
        fields |= {
            "positions": positions,
            "ffn_hidden_size": model.ffn,
            "moe_ffn_hidden_size": model.moe_ffn,
        }
        known = {key: values[0] for key, values in self.needs.items()}
        said = {setting.key: setting.value(fields) for setting in self.settings}
        return {"architectures": [self.name], "model_type": self.model_type} | known | said

    def differences(self, model: Model) -> list[str]:
        """Fields of ``model`` that differ from the ``fixed`` ones, as text."""
        absent = {name: Model.model_fields[name].default for name in ABSENT}
        return [
            f"{name} is {getattr(model, name)}, not {value}"
            for name, value in (absent | dict(self.fixed)).items()
            if getattr(model, name) != value
        ]

    def rows_of(self, model: Model) -> Iterator[TensorRow]:
        """Its tensors, without an output layer that is tied to the embedding."""
        return (row for row in self.rows if model.untie_embeddings or row.megatron != OUTPUT)

    def unneeded(self, name: str, model: Model) -> bool:
        """Whether a tensor that no row has may be in the files."""
        return name.endswith(self.unused) or (name == LM_HEAD and not model.untie_embeddings)


ABSENT = (
    "latent_attention",
    "mtp_num_layers",
    "first_dense_layers",
    "moe_shared_expert_intermediate_size",
    "moe_router_score_function",
    "moe_router_num_groups",
    "moe_router_topk_scaling_factor",
    "rotary_percent",
)
"""Fields of a model that are set in none of the supported architectures."""


def architecture_of(model: Model) -> Architecture:
    """The architecture of ``model``.

    Raises:
        UserError: none of the supported ones fits.
    """
    reasons = {a: a.differences(model) for a in ARCHITECTURES.values()}
    nearest = min(reasons, key=lambda a: len(reasons[a]))
    if reasons[nearest]:
        raise UserError(
            f"{model.name} is none of the supported architectures of Hugging Face"
            f" ({', '.join(ARCHITECTURES)})\nnearest is {nearest.name}, but "
            + "; ".join(reasons[nearest])
        )
    return nearest


def _groups(value: int, config: Config) -> Mapping[str, Any]:
    return {"num_query_groups": None if value == config["num_attention_heads"] else value}


def _own_width(value: int | None, config: Config) -> Mapping[str, Any]:
    usual = config["hidden_size"] // config["num_attention_heads"]
    return {"kv_channels": None if value in (None, usual) else value}


def _inner_value(fields: Mapping[str, Any]) -> int | None:
    usual = fields["ffn_hidden_size"] == 4 * fields["hidden_size"]
    return None if usual else fields["ffn_hidden_size"]


_LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""Constants of upstream's ``--use-rope-scaling``
(megatron/core/models/common/embeddings/rotary_pos_embedding.py)."""
_ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


def _rope(value: Config, config: Config) -> Mapping[str, Any]:
    kind = value.get("rope_type", "default")
    read = _ROPE_KEYS | ({"factor", *_LLAMA3_ROPE} if kind == "llama3" else set())
    fixed = {"partial_rotary_factor": 1.0} | (_LLAMA3_ROPE if kind == "llama3" else {})
    given = {"partial_rotary_factor": 1.0} | {
        key: one for key, one in value.items() if one is not None
    }
    wrong = [f"{key} {given.get(key)}" for key in fixed if given.get(key) != fixed[key]]
    wrong += [f"{key} {one}" for key, one in given.items() if key not in read]
    if kind not in ("default", "llama3") or wrong:
        raise UserError(
            f"config.json: rope_parameters {dict(value)}: upstream cannot do"
            f" {', '.join(wrong) or kind}; supported are default, and llama3 with any factor and"
            f" {_LLAMA3_ROPE}"
        )
    scaling = {"rope_scaling_factor": float(value["factor"])} if kind == "llama3" else {}
    return {"rotary_base": _whole(value["rope_theta"])} | scaling


def _rope_value(fields: Mapping[str, Any]) -> dict[str, Any]:
    base = {"rope_theta": float(fields["rotary_base"])}
    if fields["rope_scaling_factor"] is None:
        return {"rope_type": "default"} | base
    return {"rope_type": "llama3", "factor": fields["rope_scaling_factor"]} | _LLAMA3_ROPE | base


def _yarn(value: Config, config: Config) -> Mapping[str, Any]:
    if value.get("rope_type") != "yarn" or value.get("attention_factor") or value.get("mscale"):
        raise UserError(
            f"rope_parameters {dict(value)}: only yarn without attention_factor and mscale is"
            " supported"
        )
    yarn = Yarn(
        rotary_scaling_factor=float(value["factor"]),
        original_max_position_embeddings=value["original_max_position_embeddings"],
        beta_fast=float(value.get("beta_fast") or 32),
        beta_slow=float(value.get("beta_slow") or 1),
        correction_range_round_to_int=value.get("truncate", True),
    )
    return {"rotary_base": _whole(value["rope_theta"]), "yarn": yarn}


def _yarn_value(fields: Mapping[str, Any]) -> dict[str, Any]:
    yarn = fields["yarn"]
    return {
        "rope_type": "yarn",
        "rope_theta": float(fields["rotary_base"]),
        "factor": yarn.rotary_scaling_factor,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "truncate": yarn.correction_range_round_to_int,
        "original_max_position_embeddings": yarn.original_max_position_embeddings,
    }


def _window(value: int | None, config: Config) -> Mapping[str, Any]:
    if value is None:
        raise UserError("config.json: sliding_window is null; GPT-OSS has one on every other layer")
    return {"window_size": value}


def _alternating(layers: int) -> list[str]:
    return [("sliding_attention", "full_attention")[layer % 2] for layer in range(layers)]


def _checked_layer_types(value: list[str], config: Config) -> Mapping[str, Any]:
    if value != _alternating(config["num_hidden_layers"]):
        raise UserError(
            "config.json: layer_types must alternate sliding_attention and full_attention, for"
            f" all {config['num_hidden_layers']} layers: upstream's --window-attn-skip-freq 2"
        )
    return {}


def _whole(value: float) -> int:
    if value != int(value):
        raise UserError(f"rope_theta {value}: upstream's --rotary-base takes whole numbers only")
    return int(value)


CONVERSIONS = {
    ("tie_word_embeddings", "not untie_embeddings"): (
        lambda value, config: {"untie_embeddings": not value},
        lambda fields: not fields["untie_embeddings"],
    ),
    ("num_key_value_heads", "num_query_groups"): (
        _groups,
        lambda fields: fields["num_query_groups"] or fields["num_attention_heads"],
    ),
    ("head_dim", "kv_channels"): (
        _own_width,
        lambda fields: (
            fields["kv_channels"] or fields["hidden_size"] // fields["num_attention_heads"]
        ),
    ),
    ("n_inner", "ffn_hidden_size"): (
        lambda value, config: {"ffn_hidden_size": value},
        _inner_value,
    ),
    ("rope_parameters", "rotary_base, rope_scaling_factor"): (_rope, _rope_value),
    ("rope_parameters", "rotary_base, yarn"): (_yarn, _yarn_value),
    ("sliding_window", "window_size"): (_window, lambda fields: fields["window_size"]),
    ("layer_types", "every other layer has a window, the first one too"): (
        _checked_layer_types,
        lambda fields: _alternating(fields["num_layers"]),
    ),
}
"""Keys of config.json that are not simply a field: to fields of ``Model``, and back."""


def _setting(key: str, says: str) -> ConfigKey:
    names = says.split(", ")
    read, write = CONVERSIONS.get((key, says)) or (
        lambda value, config: dict.fromkeys(names, value),
        lambda fields: fields[names[0]],
    )
    return ConfigKey(key, read, write, says)


def _row(megatron: str, entry: Mapping[str, str]) -> TensorRow:
    return TensorRow(
        megatron,
        tuple(entry["shape"].split(", ")),
        tuple(entry["hf"].split()),
        TRANSFORMS[entry["how"]] if "how" in entry else SAME,
        tuple(entry.get("also", "").split()),
    )


def _load() -> dict[str, Architecture]:
    tables = yaml_files.read(TABLES)
    del tables["shared"]
    return {
        name: Architecture(
            name=name,
            model_type=table["model_type"],
            prefix=table["prefix"],
            rows=tuple(_row(*pair) for pair in table["tensors"].items()),
            settings=tuple(_setting(*pair) for pair in table["settings"].items()),
            needs=table["needs"],
            fixed=table["fixed"],
            unused=tuple(table["unused"]),
        )
        for name, table in tables.items()
    }


ARCHITECTURES = _load()
