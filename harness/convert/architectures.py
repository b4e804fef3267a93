"""The supported architectures of Hugging Face, one table each.

A ``TensorRow`` maps tensors of Hugging Face to one tensor of Megatron-LM; a ``ConfigKey`` maps a
key of config.json to fields of the catalogue's ``Model``. Import and export read the same tables,
so that they cannot differ. Shapes are Megatron-LM's; Hugging Face's follow from the transform.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

from harness.convert.transforms import (
    FUSED_QKV,
    GATE_UP,
    INTERLEAVED_GATE_UP,
    QKV,
    SAME,
    TRANSPOSED,
    VOCABULARY,
    Sizes,
    Transform,
)
from harness.errors import UserError
from harness.experiment.model import Model, Yarn

Config = Mapping[str, Any]
"""config.json of Hugging Face, with transformers' defaults filled in."""

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

    ``positions``, the maximum sequence length, is treated like a field.
    """

    key: str
    fields: Callable[[Any, Config], Mapping[str, Any]]
    value: Callable[[Mapping[str, Any]], Any]
    says: str


def _is(key: str, field: str) -> ConfigKey:
    return ConfigKey(key, lambda value, config: {field: value}, lambda fields: fields[field], field)


def _ffn(*names: str) -> ConfigKey:
    return ConfigKey(
        "intermediate_size",
        lambda value, config: dict.fromkeys(names, value),
        lambda fields: fields[names[0]],
        ", ".join(names),
    )


_TIED = ConfigKey(
    "tie_word_embeddings",
    lambda value, config: {"untie_embeddings": not value},
    lambda fields: not fields["untie_embeddings"],
    "not untie_embeddings",
)
_GROUPS = ConfigKey(
    "num_key_value_heads",
    lambda value, config: {
        "num_query_groups": None if value == config["num_attention_heads"] else value
    },
    lambda fields: fields["num_query_groups"] or fields["num_attention_heads"],
    "num_query_groups",
)


def _own_width(value: int | None, config: Config) -> Mapping[str, Any]:
    usual = config["hidden_size"] // config["num_attention_heads"]
    return {"kv_channels": None if value in (None, usual) else value}


_HEAD = ConfigKey(
    "head_dim",
    _own_width,
    lambda fields: fields["kv_channels"] or fields["hidden_size"] // fields["num_attention_heads"],
    "kv_channels",
)
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


_ROPE = ConfigKey("rope_parameters", _rope, _rope_value, "rotary_base, rope_scaling_factor")


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


_WINDOW = ConfigKey("sliding_window", _window, lambda fields: fields["window_size"], "window_size")
_LAYER_TYPES = ConfigKey(
    "layer_types",
    _checked_layer_types,
    lambda fields: _alternating(fields["num_layers"]),
    "every other layer has a window, the first one too",
)


def _whole(value: float) -> int:
    if value != int(value):
        raise UserError(f"rope_theta {value}: upstream's --rotary-base takes whole numbers only")
    return int(value)


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
    needs: Mapping[str, tuple[Any, ...]]
    fixed: Mapping[str, Any]
    unused: tuple[str, ...] = field(default=())

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
        return [
            f"{name} is {getattr(model, name)}, not {value}"
            for name, value in self.fixed.items()
            if getattr(model, name) != value
        ]

    def rows_of(self, model: Model) -> Iterator[TensorRow]:
        """Its tensors, without an output layer that is tied to the embedding."""
        return (row for row in self.rows if model.untie_embeddings or row.megatron != OUTPUT)

    def unneeded(self, name: str, model: Model) -> bool:
        """Whether a tensor that no row has may be in the files."""
        return name.endswith(self.unused) or (name == LM_HEAD and not model.untie_embeddings)


def _layer(
    megatron: str,
    shape: str,
    *hf: str,
    how: Transform = SAME,
    also: tuple[str, ...] = (),
    of: str = "model.layers.{layer}.",
) -> TensorRow:
    """A tensor of each layer, with its names on both sides inside the layer."""
    return TensorRow(
        LAYERS + megatron,
        tuple(shape.split(", ")),
        tuple(of + name for name in hf),
        how,
        tuple(LAYERS + name for name in also),
    )


_OUTPUT = TensorRow(OUTPUT, ("vocabulary", "hidden"), (LM_HEAD,), VOCABULARY)


def _inner_value(fields: Mapping[str, Any]) -> int | None:
    usual = fields["ffn_hidden_size"] == 4 * fields["hidden_size"]
    return None if usual else fields["ffn_hidden_size"]


_INNER = ConfigKey(
    "n_inner", lambda value, config: {"ffn_hidden_size": value}, _inner_value, "ffn_hidden_size"
)
_gpt2_layer = partial(_layer, of="transformer.h.{layer}.")
GPT2 = Architecture(
    name="GPT2LMHeadModel",
    model_type="gpt2",
    prefix="transformer.",
    unused=(".attn.bias", ".attn.masked_bias"),
    rows=(
        TensorRow(EMBEDDING, ("vocabulary", "hidden"), ("transformer.wte.weight",), VOCABULARY),
        TensorRow(
            "embedding.position_embeddings.weight",
            ("positions", "hidden"),
            ("transformer.wpe.weight",),
        ),
        _gpt2_layer("self_attention.linear_qkv.layer_norm_weight", "hidden", "ln_1.weight"),
        _gpt2_layer("self_attention.linear_qkv.layer_norm_bias", "hidden", "ln_1.bias"),
        _gpt2_layer(
            "self_attention.linear_qkv.weight", "qkv, hidden", "attn.c_attn.weight", how=FUSED_QKV
        ),
        _gpt2_layer("self_attention.linear_qkv.bias", "qkv", "attn.c_attn.bias", how=FUSED_QKV),
        _gpt2_layer(
            "self_attention.linear_proj.weight",
            "hidden, queries",
            "attn.c_proj.weight",
            how=TRANSPOSED,
        ),
        _gpt2_layer("self_attention.linear_proj.bias", "hidden", "attn.c_proj.bias"),
        _gpt2_layer("mlp.linear_fc1.layer_norm_weight", "hidden", "ln_2.weight"),
        _gpt2_layer("mlp.linear_fc1.layer_norm_bias", "hidden", "ln_2.bias"),
        _gpt2_layer("mlp.linear_fc1.weight", "ffn, hidden", "mlp.c_fc.weight", how=TRANSPOSED),
        _gpt2_layer("mlp.linear_fc1.bias", "ffn", "mlp.c_fc.bias"),
        _gpt2_layer("mlp.linear_fc2.weight", "hidden, ffn", "mlp.c_proj.weight", how=TRANSPOSED),
        _gpt2_layer("mlp.linear_fc2.bias", "hidden", "mlp.c_proj.bias"),
        TensorRow("decoder.final_layernorm.weight", ("hidden",), ("transformer.ln_f.weight",)),
        TensorRow("decoder.final_layernorm.bias", ("hidden",), ("transformer.ln_f.bias",)),
        _OUTPUT,
    ),
    settings=(
        _is("n_layer", "num_layers"),
        _is("n_embd", "hidden_size"),
        _is("n_head", "num_attention_heads"),
        _INNER,
        _is("n_positions", "positions"),
        _is("vocab_size", "vocab_size"),
        _is("resid_pdrop", "dropout"),
        _is("initializer_range", "init_method_std"),
        _TIED,
    ),
    needs={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "layer_norm_epsilon": (1e-5,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    fixed={
        "normalization": "LayerNorm",
        "norm_epsilon": 1e-5,
        "activation": "gelu",
        "add_bias_linear": True,
        "position_embedding": "learned_absolute",
        "num_query_groups": None,
        "kv_channels": None,
        "num_experts": None,
        "attention_output_gate": False,
        "attention_sinks": False,
        "qk_norm": "none",
        "window_size": None,
    },
)

_EMBEDDING = TensorRow(
    EMBEDDING, ("vocabulary", "hidden"), ("model.embed_tokens.weight",), VOCABULARY
)
_FINAL_NORM = TensorRow("decoder.final_layernorm.weight", ("hidden",), ("model.norm.weight",))
_Q_K_V = tuple(f"self_attn.{part}_proj" for part in "qkv")
_ATTENTION = (
    _layer("self_attention.linear_qkv.layer_norm_weight", "hidden", "input_layernorm.weight"),
    _layer(
        "self_attention.linear_qkv.weight",
        "qkv, hidden",
        *(f"{name}.weight" for name in _Q_K_V),
        how=QKV,
    ),
    _layer("self_attention.linear_proj.weight", "hidden, queries", "self_attn.o_proj.weight"),
)
_PRE_EXPERTS_NORM = _layer(
    "mlp.linear_fc1.layer_norm_weight",
    "hidden",
    "post_attention_layernorm.weight",
    also=("pre_mlp_layernorm.weight",),
)
_LLAMA_SETTINGS = (
    _is("num_hidden_layers", "num_layers"),
    _is("hidden_size", "hidden_size"),
    _is("num_attention_heads", "num_attention_heads"),
    _GROUPS,
    _is("max_position_embeddings", "positions"),
    _is("vocab_size", "vocab_size"),
    _is("rms_norm_eps", "norm_epsilon"),
    _is("initializer_range", "init_method_std"),
    _is("attention_dropout", "dropout"),
    _TIED,
)
_LLAMA_NEEDS = {"hidden_act": ("silu",), "attention_bias": (False,)}
_LLAMA_FIXED = {
    "normalization": "RMSNorm",
    "activation": "swiglu",
    "add_bias_linear": False,
    "position_embedding": "rope",
    "attention_output_gate": False,
    "attention_sinks": False,
}

LLAMA = Architecture(
    name="LlamaForCausalLM",
    model_type="llama",
    prefix="model.",
    unused=("rotary_emb.inv_freq",),
    rows=(
        _EMBEDDING,
        *_ATTENTION,
        _layer("mlp.linear_fc1.layer_norm_weight", "hidden", "post_attention_layernorm.weight"),
        _layer(
            "mlp.linear_fc1.weight",
            "gated, hidden",
            "mlp.gate_proj.weight",
            "mlp.up_proj.weight",
            how=GATE_UP,
        ),
        _layer("mlp.linear_fc2.weight", "hidden, ffn", "mlp.down_proj.weight"),
        _FINAL_NORM,
        _OUTPUT,
    ),
    settings=(*_LLAMA_SETTINGS, _ffn("ffn_hidden_size"), _HEAD, _ROPE),
    needs={**_LLAMA_NEEDS, "mlp_bias": (False,)},
    fixed={**_LLAMA_FIXED, "qk_norm": "none", "num_experts": None, "window_size": None},
)

OLMOE = Architecture(
    name="OlmoeForCausalLM",
    model_type="olmoe",
    prefix="model.",
    unused=("rotary_emb.inv_freq",),
    rows=(
        _EMBEDDING,
        *_ATTENTION,
        _layer("self_attention.q_layernorm.weight", "queries", "self_attn.q_norm.weight"),
        _layer("self_attention.k_layernorm.weight", "keys", "self_attn.k_norm.weight"),
        _PRE_EXPERTS_NORM,
        _layer("mlp.router.weight", "experts, hidden", "mlp.gate.weight"),
        _layer(
            EXPERTS + "linear_fc1.weight",
            "gated expert, hidden",
            *(f"mlp.experts.{{expert}}.{part}_proj.weight" for part in ("gate", "up")),
            how=GATE_UP,
        ),
        _layer(
            EXPERTS + "linear_fc2.weight", "hidden, expert", "mlp.experts.{expert}.down_proj.weight"
        ),
        _FINAL_NORM,
        _OUTPUT,
    ),
    settings=(
        *_LLAMA_SETTINGS,
        _ffn("moe_ffn_hidden_size", "ffn_hidden_size"),
        _is("num_experts", "num_experts"),
        _is("num_experts_per_tok", "moe_router_topk"),
        _is("router_aux_loss_coef", "moe_aux_loss_coeff"),
        _ROPE,
    ),
    needs={**_LLAMA_NEEDS, "clip_qkv": (None,), "norm_topk_prob": (False,)},
    fixed={
        **_LLAMA_FIXED,
        "qk_norm": "projection",
        "kv_channels": None,
        "window_size": None,
        "moe_router_pre_softmax": True,
    },
)

GPT_OSS = Architecture(
    name="GptOssForCausalLM",
    model_type="gpt_oss",
    prefix="model.",
    unused=("rotary_emb.inv_freq",),
    rows=(
        _EMBEDDING,
        *_ATTENTION,
        _layer(
            "self_attention.linear_qkv.bias", "qkv", *(f"{name}.bias" for name in _Q_K_V), how=QKV
        ),
        _layer("self_attention.linear_proj.bias", "hidden", "self_attn.o_proj.bias"),
        _layer("self_attention.core_attention.softmax_offset", "heads", "self_attn.sinks"),
        _PRE_EXPERTS_NORM,
        _layer("mlp.router.weight", "experts, hidden", "mlp.router.weight"),
        _layer("mlp.router.bias", "experts", "mlp.router.bias"),
        _layer(
            EXPERTS + "linear_fc1.weight",
            "gated expert, hidden",
            "mlp.experts.gate_up_proj[{expert}]",
            how=INTERLEAVED_GATE_UP,
        ),
        _layer(
            EXPERTS + "linear_fc1.bias",
            "gated expert",
            "mlp.experts.gate_up_proj_bias[{expert}]",
            how=INTERLEAVED_GATE_UP,
        ),
        _layer(
            EXPERTS + "linear_fc2.weight",
            "hidden, expert",
            "mlp.experts.down_proj[{expert}]",
            how=TRANSPOSED,
        ),
        _layer(EXPERTS + "linear_fc2.bias", "hidden", "mlp.experts.down_proj_bias[{expert}]"),
        _FINAL_NORM,
        _OUTPUT,
    ),
    settings=(
        *_LLAMA_SETTINGS,
        _HEAD,
        _ffn("moe_ffn_hidden_size", "ffn_hidden_size"),
        _is("num_local_experts", "num_experts"),
        _is("num_experts_per_tok", "moe_router_topk"),
        _is("router_aux_loss_coef", "moe_aux_loss_coeff"),
        _WINDOW,
        _LAYER_TYPES,
        ConfigKey("rope_parameters", _yarn, _yarn_value, "rotary_base, yarn"),
    ),
    needs={
        **_LLAMA_NEEDS,
        "attention_bias": (True,),
        "swiglu_alpha": (1.702,),
        "swiglu_limit": (7.0,),
    },
    fixed={
        **_LLAMA_FIXED,
        "activation": "clamped_quick_geglu",
        "add_bias_linear": True,
        "position_embedding": "yarn",
        "attention_sinks": True,
        "qk_norm": "none",
        "moe_router_pre_softmax": False,
    },
)
ARCHITECTURES = {a.name: a for a in (GPT2, LLAMA, OLMOE, GPT_OSS)}


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
