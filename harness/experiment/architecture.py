"""What must hold of latent attention, routers, multi-token prediction and Mamba layers.

Checked before a run.

Sources: validate_args in megatron/training/arguments.py, ``__post_init__`` of TransformerConfig and
MLATransformerConfig in megatron/core/transformer/transformer_config.py, group_limited_topk in
megatron/core/transformer/moe/moe_utils.py, and MambaMixer and MambaContextParallel in
megatron/core/ssm, of core_v0.19.0.
"""

from __future__ import annotations

from collections.abc import Iterator

from harness.errors import indivisible
from harness.experiment.experiment import Experiment
from harness.experiment.model import ATTENTION, MAMBA, MLP, Model, Yarn

_ONLY_YARN = {
    "original_max_position_embeddings": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "correction_range_round_to_int": True,
}
"""Of latent attention's YaRN, fields for which upstream has no arguments, with its values."""


def violations(experiment: Experiment) -> Iterator[str]:
    """One sentence for each rule that ``experiment`` breaks."""
    model = experiment.model
    yield from _layers_with_experts(model)
    yield from _router(model)
    yield from _rotary(model)
    yield from _latent_attention(model)
    yield from _multi_token_prediction(experiment)
    yield from _layer_pattern(model)
    yield from _mamba(experiment)
    untested = {
        "latent attention": model.latent_attention,
        "multi-token prediction": model.predictors,
        "a shared expert": model.moe_shared_expert_intermediate_size,
        "first dense layers": model.first_dense_layers,
    }
    if experiment.lora and (names := [name for name, value in untested.items() if value]):
        yield f"LoRA: adapters are not tested with {', '.join(names)}; choose another model"


def _layers_with_experts(model: Model) -> Iterator[str]:
    first, shared = model.first_dense_layers, model.moe_shared_expert_intermediate_size
    if model.num_experts is None and (first or shared):
        yield "first_dense_layers and moe_shared_expert_intermediate_size need num_experts"
    elif model.num_experts and first >= model.num_layers:
        yield (
            f"first_dense_layers ({first}) must be below num_layers ({model.num_layers}), so that"
            " a layer has experts"
        )
    if shared and model.add_bias_linear:
        yield "upstream's shared expert has no biases; set add_bias_linear: false"


def _router(model: Model) -> Iterator[str]:
    groups, chosen = model.moe_router_num_groups, model.moe_router_group_topk
    experts, topk = model.num_experts, model.moe_router_topk
    if model.moe_router_enable_expert_bias and model.moe_router_score_function != "sigmoid":
        yield "moe_router_enable_expert_bias needs moe_router_score_function: sigmoid"
    if (groups is None) != (chosen is None):
        yield "moe_router_num_groups and moe_router_group_topk: set both or neither"
    if not (groups and chosen and experts and topk):
        return
    if experts % groups:
        yield f"experts ({experts}) must be divisible by moe_router_num_groups ({groups})"
    if chosen > groups or chosen > topk:
        yield (
            f"moe_router_group_topk ({chosen}) must be at most moe_router_num_groups ({groups})"
            f" and moe_router_topk ({topk})"
        )
    elif topk > chosen * (experts // groups) or topk // chosen > experts // groups:
        yield (
            f"moe_router_topk ({topk}) exceeds the experts in {chosen} of {groups} groups"
            f" ({chosen} x {experts // groups})"
        )


def _rotary(model: Model) -> Iterator[str]:
    if not model.rotates:
        return
    latent = model.latent_attention
    name, turned = "head size", model.head_size
    if latent:
        name, turned = "qk_pos_emb_head_dim", latent.qk_pos_emb_head_dim
    elif model.rotary_percent < 1:
        name, turned = "head size x rotary_percent", int(turned * model.rotary_percent)
    if turned % 2:
        yield f"rotary positions turn pairs: the {name} ({turned}) must be even"
    if model.rotary_percent < 1 and (latent or model.position_embedding != "rope"):
        yield (
            f"rotary_percent {model.rotary_percent:g} needs position_embedding rope and plain"
            " attention"
        )


def _latent_attention(model: Model) -> Iterator[str]:
    if not model.latent_attention:
        return
    absent = ("num_query_groups", "kv_channels", "attention_output_gate", "attention_sinks")
    if given := [name for name in (*absent, "window_size") if getattr(model, name)]:
        yield f"upstream's latent attention has no {', '.join(given)}; leave them out"
    if not model.rotates:
        yield "latent_attention needs position_embedding rope or yarn"
    if model.qk_norm == "projection":
        yield "latent_attention needs qk_norm head or none, not projection"
    yarn = model.yarn or Yarn(rotary_scaling_factor=1.0, original_max_position_embeddings=4096)
    for name, value in _ONLY_YARN.items():
        if getattr(yarn, name) != value:
            yield f"yarn: upstream's latent attention has {name} {value}, not {getattr(yarn, name)}"


def _multi_token_prediction(experiment: Experiment) -> Iterator[str]:
    model = experiment.model
    if not model.predictors:
        return
    if model.position_embedding != "rope" and not model.latent_attention:
        yield (
            "MTP: upstream predicts several tokens with position_embedding rope, not"
            f" {model.position_embedding}"
        )
    if model.window_size:
        yield "MTP is not tested with window_size; leave it out"
    if experiment.cuda_graphs:
        yield "MTP is not tested with CUDA graphs; set CUDA_GRAPHS=0"


def _layer_pattern(model: Model) -> Iterator[str]:
    """A pattern that upstream's parser reads, of layers that predictions know."""
    pattern = model.layer_pattern
    if pattern is None:
        if model.mamba:
            yield "mamba: layer_pattern says which layers they are; set both or neither"
        return
    letters = f"{MAMBA} (Mamba), {ATTENTION} (attention), {MLP} (an MLP)"
    if unknown := sorted({*pattern} - {MAMBA, ATTENTION, MLP}):
        yield f"layer_pattern {pattern}: {unknown[0]!r} is none of {letters}; PP and VPP divide it"
    if (layers := len(pattern)) != model.num_layers:
        yield f"num_layers ({model.num_layers}) must equal the letters of layer_pattern ({layers})"
    if MAMBA not in pattern or not model.mamba:
        yield (
            f"layer_pattern {pattern} is of a model with Mamba layers, {MAMBA}, whose sizes mamba"
            " says: set both or neither"
        )
    if pattern.startswith(MLP):
        yield f"layer_pattern {pattern}: upstream's parser takes it for an option; begin with M, *"
    absent = ("num_experts", "latent_attention", "mtp_num_layers", "window_size")
    if given := [name for name in absent if getattr(model, name)]:
        yield f"layer_pattern is not tested with {', '.join(given)}; leave that out"


def _mamba(experiment: Experiment) -> Iterator[str]:
    model, mamba, tp, cp = experiment.model, experiment.model.mamba, experiment.tp, experiment.cp
    if mamba is None:
        return
    if experiment.entry != "hybrid":
        yield f"{model.name}: only upstream's HybridModel has Mamba layers; set ENTRY=hybrid"
    heads, groups = mamba.num_heads, mamba.num_groups
    if broken := indivisible("mamba num_heads", heads, "mamba num_groups", groups):
        yield broken
    for name, number in {"num_heads": heads, "num_groups": groups}.items():
        if broken := indivisible(f"mamba {name}", number, "TP", tp):
            yield f"{broken}; each rank has whole heads and groups"
    of_rank = groups // tp
    if cp > 1 and (broken := indivisible("mamba num_heads", heads, "TP x CP", tp, cp)):
        yield f"{broken}, since CP ranks share out the heads of a TP rank"
    elif of_rank and of_rank % cp and cp % of_rank:
        yield (
            f"of mamba num_groups / TP ({of_rank}) and CP ({cp}), one must be divisible by the"
            " other"
        )
    untested = {
        f"OPTIMIZER={experiment.optimizer}": experiment.optimizer != "adam",
        "TP_OVERLAP=1": experiment.tp_overlap,
    }
    for what in (name for name, given in untested.items() if given):
        yield f"Mamba layers are not tested with {what}; leave it out"
