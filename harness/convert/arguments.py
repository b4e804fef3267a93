"""Converts between a catalogue's model and upstream's arguments as a checkpoint stores them."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

from harness.errors import UserError
from harness.experiment.constraints import with_changes
from harness.experiment.experiment import Experiment
from harness.experiment.model import Model, Yarn
from harness.upstreams.megatron_lm.arguments import import_upstream, upstream_parser
from harness.upstreams.megatron_lm.flags import model_flags

_UNSUPPORTED = {
    "multi_latent_attention": False,
    "heterogeneous_layers_config_path": None,
    "mtp_num_layers": None,
    "moe_shared_expert_intermediate_size": None,
    "moe_router_enable_expert_bias": False,
    "moe_latent_size": None,
    "moe_layer_freq": 1,
    "moe_router_score_function": "softmax",
    "moe_router_num_groups": None,
    "moe_router_topk_scaling_factor": None,
    "apply_layernorm_1p": False,
    "squared_relu": False,
    "rotary_interleaved": False,
    "rotary_percent": 1.0,
    "qk_l2_norm": False,
    "hybrid_layer_pattern": None,
}
"""Arguments that change the model, with the only values that the architectures here have."""
_PROJECTION_NORM = ["harness.specs.projection_norm", "layer_spec"]


def flags(model: Model, positions: int, tp: int = 1, pp: int = 1, ep: int = 1) -> list[str]:
    """Upstream's arguments for ``model`` under a layout, without ``--seq-length``.

    Raises:
        UserError: the model cannot be split like this.
    """
    one = Experiment(
        id="999",
        slug="weights",
        chapter=900,
        shows="weights",
        model=model,
        micro_batch_size=1,
        global_batch_size=1,
        seq_length=positions,
    )
    try:
        cut = with_changes(
            one, tp=tp, pp=pp, ep=ep, dp=ep, sequence_parallel=tp > 1, global_batch_size=ep
        )
    except UserError as error:
        raise UserError(str(error).replace(f"{one.id}: ", f"{model.name}: ")) from None
    words = model_flags(cut)
    at = words.index("--seq-length")
    return words[:at] + words[at + 2 :]


def parse(words: Sequence[str]) -> Namespace:
    """The arguments ``words`` as upstream's parser returns them, with its defaults."""
    return upstream_parser().parse_args(list(words))


def register_safe_globals() -> None:
    """Let ``torch.load(weights_only=True)`` open the classes that upstream lists as safe."""
    import_upstream()
    from megatron.core.safe_globals import register_safe_globals as register

    register()


def model_of(args: Namespace, name: str, vocab_size: int) -> tuple[Model, int]:
    """The model that ``args`` describe, and its maximum sequence length.

    Raises:
        UserError: the catalogue cannot describe it.
    """
    if not hasattr(args, "num_layers") or args.num_layers is None:
        raise UserError(
            f"{name}: the checkpoint has none of upstream's arguments, which describe its model"
        )
    if "M" in (pattern := getattr(args, "hybrid_layer_pattern", None) or ""):
        raise UserError(
            f"{name}: models with Mamba layers ({pattern}) are not converted; the checkpoint stays"
            " in Megatron-LM's format"
        )
    odd = [
        f"{key} = {getattr(args, key)}"
        for key, usual in _UNSUPPORTED.items()
        if getattr(args, key, usual) not in (usual, None)
    ]
    if odd:
        raise UserError(
            f"{name}: none of the supported architectures of Hugging Face has {', '.join(odd)}"
        )
    usual_head = args.hidden_size // args.num_attention_heads
    groups = args.num_query_groups if args.group_query_attention else None
    fields = {
        "num_layers": args.num_layers,
        "hidden_size": args.hidden_size,
        "num_attention_heads": args.num_attention_heads,
        "ffn_hidden_size": args.ffn_hidden_size,
        "num_query_groups": None if groups == args.num_attention_heads else groups,
        "kv_channels": None if args.kv_channels == usual_head else args.kv_channels,
        "vocab_size": vocab_size,
        "untie_embeddings": args.untie_embeddings_and_output_weights,
        "add_bias_linear": args.add_bias_linear,
        "normalization": args.normalization,
        "norm_epsilon": args.layernorm_epsilon,
        "activation": _activation(args),
        "position_embedding": args.position_embedding_type,
        "qk_norm": _qk_norm(args),
        "attention_output_gate": bool(args.attention_output_gate),
        "attention_sinks": args.softmax_type == "learnable",
        "window_size": _window(args),
        "dropout": args.attention_dropout,
        "init_method_std": args.init_method_std,
    }
    if args.position_embedding_type != "learned_absolute":
        fields["rotary_base"] = int(args.rotary_base)
    if args.use_rope_scaling:
        fields["rope_scaling_factor"] = args.rope_scaling_factor
    if args.position_embedding_type == "yarn":
        fields["yarn"] = Yarn(
            rotary_scaling_factor=args.rotary_scaling_factor,
            original_max_position_embeddings=args.yarn_original_max_position_embeddings or 4096,
            beta_fast=args.yarn_beta_fast or 32.0,
            beta_slow=args.yarn_beta_slow or 1.0,
            correction_range_round_to_int=args.yarn_correction_range_round_to_int is not False,
        )
    if args.num_experts:
        fields |= {
            "num_experts": args.num_experts,
            "moe_router_topk": args.moe_router_topk,
            "moe_ffn_hidden_size": args.moe_ffn_hidden_size,
            "moe_router_pre_softmax": args.moe_router_pre_softmax,
            "moe_aux_loss_coeff": _single(args.moe_aux_loss_coeff),
            "moe_z_loss_coeff": args.moe_z_loss_coeff,
        }
    return Model(name=name, **fields), args.max_position_embeddings


def _single(value: float | list[float]) -> float:
    """Upstream's parser returns a list if an argument takes several values."""
    return value[0] if isinstance(value, list) else value


def _activation(args: Namespace) -> str:
    if args.swiglu:
        return "swiglu"
    if not args.quick_geglu:
        return "gelu"
    if (args.glu_linear_offset, args.activation_func_clamp_value) != (1.0, 7.0):
        raise UserError(
            "--quick-geglu: only GPT-OSS's is supported, with --glu-linear-offset 1.0"
            " --activation-func-clamp-value 7.0"
        )
    return "clamped_quick_geglu"


def _qk_norm(args: Namespace) -> str:
    if args.spec not in (None, _PROJECTION_NORM):
        raise UserError(
            f"--spec {' '.join(args.spec)} is not supported; only {' '.join(_PROJECTION_NORM)} is"
        )
    if not args.qk_layernorm:
        return "none"
    return "projection" if args.spec else "head"


def _window(args: Namespace) -> int | None:
    if args.window_size is None:
        return None
    before, after = args.window_size
    if after or args.window_attn_skip_freq != 2:
        raise UserError(
            f"--window-size {before},{after} --window-attn-skip-freq {args.window_attn_skip_freq}:"
            " only windows into the past, on every other layer, are supported"
        )
    return before + 1
