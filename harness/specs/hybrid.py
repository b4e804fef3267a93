"""The layers of upstream's HybridModel: attention, MLPs and Mamba layers are layers of their own.

Parts of attention and MLPs are those of upstream's GPT layer, so that a row without Mamba layers
has the same parameters in both models, and both save them alike: a checkpoint of one is a
checkpoint of the other. Upstream's own stack (megatron/core/models/hybrid/hybrid_layer_specs.py)
needs Transformer Engine and has no norms of queries and keys.
"""

from __future__ import annotations

from dataclasses import replace

from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.hybrid import hybrid_block, hybrid_layer_specs
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import LayerNormBuilder
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)
from megatron.core.transformer.utils import sharded_state_dict_default
from megatron.training import get_args
from megatron.training.arguments import core_transformer_config_from_args


class Stack(hybrid_block.HybridStack):
    """A HybridStack that saves what a GPT's TransformerBlock does, under the same names.

    Layers 2i and 2i + 1 are attention and MLP of layer i. Where all layers have the same parts a
    TransformerBlock saves them as one tensor (its ``sharded_state_dict`` in
    megatron/core/transformer/transformer_block.py).
    """

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple | None = None,
        metadata: dict | None = None,
    ) -> ShardedStateDict:
        known, found = metadata or {}, {}
        apart = (
            known.get("non_homogeneous_layers")
            or known.get("singleton_local_shards")
            or {"-", "E"} <= {*get_args().hybrid_layer_pattern}
        )
        for index, layer in enumerate(self.layers):
            number, own = (layer.layer_number - 1) // 2, f"{prefix}layers.{index}."
            offsets = [] if apart else [(0, number, self.config.num_layers // 2)]
            of_layer = layer.sharded_state_dict(own, offsets, metadata)
            as_gpt = f"{prefix}layers.{number}." if apart else f"{prefix}layers."
            replace_prefix_for_sharding(of_layer, own, as_gpt)
            found |= of_layer
        for name, module in self.named_children():
            if module is not self.layers:
                own = f"{prefix}{name}."
                of_module = sharded_state_dict_default(
                    module, own, sharded_offsets or (), metadata, tp_group=self.tp_group
                )
                if name == "final_norm":
                    replace_prefix_for_sharding(of_module, own, f"{prefix}final_layernorm.")
                found |= of_module
        return found


def stack_of(config: TransformerConfig) -> ModuleSpec:
    """The stack for ``config``: attention, dense MLPs, experts and Mamba layers.

    With Mamba layers it is upstream's HybridStack, which no GPT has the tensors of.
    """
    dense, experts = _layer(config, None), _layer(config, config.num_moe_experts)
    attention = _half(TransformerLayer, dense, "input_layernorm", "self_attention", "self_attn_bda")
    of_mlp = ("pre_mlp_layernorm", "mlp", "mlp_bda")
    if config.transformer_impl == "local":
        # the norm behind the last layer, which HybridStack takes from Transformer Engine
        hybrid_block.TENorm = dense.submodules.input_layernorm
    upstream = hybrid_layer_specs.hybrid_stack_spec
    mamba = upstream.submodules.mamba_layer
    if config.transformer_impl == "local":
        mamba = _local_mamba(mamba, dense.submodules.input_layernorm)
    return replace(
        upstream,
        module=upstream.module if "M" in get_args().hybrid_layer_pattern else Stack,
        submodules=replace(
            upstream.submodules,
            mamba_layer=mamba,
            attention_layer=attention,
            mla_layer=attention,
            mlp_layer=_half(MLPLayer, dense, *of_mlp),
            moe_layer=_half(MoETransformerLayer, experts, *of_mlp),
        ),
    )


def _layer(config: TransformerConfig, experts: int | None) -> ModuleSpec:
    """Upstream's layer of a GPT, with ``experts`` or a dense MLP."""
    same = {
        "num_experts": experts,
        "moe_grouped_gemm": config.moe_grouped_gemm,
        "qk_layernorm": config.qk_layernorm,
        "multi_latent_attention": config.multi_latent_attention,
    }
    if config.transformer_impl == "local":
        return get_gpt_layer_local_spec(**same, normalization=config.normalization)
    return get_gpt_layer_with_transformer_engine_spec(**same)


def _local_mamba(upstream: ModuleSpec, norm: LayerNormBuilder) -> ModuleSpec:
    """Upstream's Mamba layer without Transformer Engine, which fuses the norm with in_proj."""
    mixer = upstream.submodules.mixer
    linears = replace(mixer.submodules, in_proj=ColumnParallelLinear, out_proj=RowParallelLinear)
    own = replace(
        upstream.submodules,
        norm=norm,
        mixer=replace(mixer, submodules=linears),
        sharded_state_dict_keys_map={"norm.": "mixer.in_proj.layer_norm_"},
    )
    return replace(upstream, submodules=own)


def _half(module: type, layer: ModuleSpec, *parts: str) -> ModuleSpec:
    """A layer of these ``parts`` of ``layer``."""
    submodules = {part: getattr(layer.submodules, part) for part in parts}
    names = {
        before: after
        for before, after in layer.submodules.sharded_state_dict_keys_map.items()
        if before.partition(".")[0] in parts
    }
    return ModuleSpec(
        module=module,
        submodules=TransformerLayerSubmodules(**submodules, sharded_state_dict_keys_map=names),
    )


stack_spec = stack_of(core_transformer_config_from_args(get_args()))
"""What ``--spec harness.specs.hybrid stack_spec`` names: read after arguments are parsed."""
