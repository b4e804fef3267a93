"""Run by test_saved_tensors.py and test_mamba.py in a process of its own: the tensors that upstream's latent attention, router,
prediction and Mamba layers keep.

Upstream's own modules run on the CPU; Transformer Engine's kernels, which need a GPU, are replaced by what they keep: a norm
its input and a statistic for each row, attention its inputs, its result and a statistic for each head and token, the fused
rotation nothing; the scan of a Mamba layer its input and its result before the gate, as in mamba_ssm. Prints, as JSON, the bytes that each case keeps.
"""

import json

import torch

from tests.one_process import initialize, kept_sizes

LENGTH, BATCH = 64, 2
SIZES = {
    "hidden_size": 96,
    "num_attention_heads": 4,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_head_dim": 16,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 24,
}
FFN, SHARED, EXPERTS, TOPK = 160, 80, 8, 2
MAMBA = {"num_heads": 12, "head_dim": 16, "state_dim": 8, "num_groups": 4}


class Norm(torch.nn.Module):
    """RMSNorm as Transformer Engine keeps it."""

    def __init__(self, hidden_size, **_):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=torch.bfloat16))

    def forward(self, x):
        return _Norm.apply(x, self.weight)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        statistic = x.float().pow(2).mean(-1).rsqrt()
        ctx.save_for_backward(x, weight, statistic)
        return (x * statistic[..., None].to(x.dtype)) * weight

    @staticmethod
    def backward(ctx, gradient):
        x, weight, _ = ctx.saved_tensors
        return gradient.expand_as(x), torch.zeros_like(weight)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value):
        context = value.clone()
        statistics = torch.zeros(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, context, statistics)
        return context

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, *_ = ctx.saved_tensors
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)


class Attention(torch.nn.Module):
    def __init__(self, *_, **__):
        super().__init__()

    def forward(self, query, key, value, *_, **__):
        return _Attention.apply(query, key, value).flatten(-2)


class _InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q):
        ctx.mark_dirty(q)
        return q

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class _KeysAndValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kv, shared, keys):
        positions = shared.expand(*kv.shape[:-1], -1)
        ctx.keys, ctx.width = keys, kv.shape[-1]
        return torch.cat([kv[..., :keys], positions], -1), kv[..., keys:].clone()

    @staticmethod
    def backward(ctx, keys, values):
        return torch.cat([keys[..., : ctx.keys], values], -1), keys[..., :1, ctx.keys :], None


class Unchanged(torch.nn.Module):
    """In place of a transformer layer."""

    def forward(self, hidden_states, **_):
        return hidden_states, None


def kept(function, *inputs, weights=()):
    """Bytes that autograd keeps of ``function(*inputs)``, parameters and ``weights`` left out."""
    return sum(kept_sizes(function, *inputs, weights=weights))


def config(**more):
    from megatron.core.transformer import MLATransformerConfig

    return MLATransformerConfig(
        num_layers=2,
        **SIZES,
        ffn_hidden_size=FFN,
        add_bias_linear=False,
        normalization="RMSNorm",
        qk_layernorm=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        rotary_scaling_factor=40.0,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=True,
        apply_rope_fusion=True,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        params_dtype=torch.bfloat16,
        bf16=True,
        **more,
    )


def attention():
    """Latent attention behind its norm: from the residual to the last projection."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import multi_latent_attention as mla
    from megatron.core.transformer.spec_utils import build_module

    mla.fused_apply_mla_rope_for_q = lambda q, *_: _InPlace.apply(q)
    mla.fused_apply_mla_rope_for_kv = lambda kv, shared, *_: _KeysAndValues.apply(
        kv, shared, SIZES["qk_head_dim"]
    )
    spec = get_gpt_layer_local_spec(
        qk_layernorm=True, multi_latent_attention=True, normalization="RMSNorm"
    ).submodules.self_attention
    spec.submodules.q_layernorm = spec.submodules.kv_layernorm = Norm
    spec.submodules.core_attention = Attention
    module = build_module(spec, config=config(), layer_number=1)
    norm, hidden = Norm(SIZES["hidden_size"]), SIZES["hidden_size"]
    x = torch.randn(LENGTH, BATCH, hidden, dtype=torch.bfloat16, requires_grad=True)
    return kept(lambda x: module(norm(x), None), x)


def router(**more):
    """DeepSeek's router: from the norm's output to weights and map."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe.router import TopKRouter

    module = TopKRouter(
        config(
            num_moe_experts=EXPERTS, moe_router_topk=TOPK, moe_router_dtype="fp32",
            moe_ffn_hidden_size=32, **more,
        ),
        ProcessGroupCollection.use_mpu_process_groups(),
    )  # fmt: skip
    module.train()
    module.set_layer_number(1)
    x = torch.randn(LENGTH, BATCH, SIZES["hidden_size"], dtype=torch.bfloat16, requires_grad=True)
    return kept(lambda x: module(x), x)


def shared_expert():
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.process_groups_config import ProcessGroupCollection

    build = get_moe_module_spec(use_te=False, num_experts=EXPERTS).keywords["submodules"]
    module = build.shared_experts(
        config=config(moe_shared_expert_intermediate_size=SHARED, num_moe_experts=EXPERTS),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        gate=False,
    )
    x = torch.randn(LENGTH, BATCH, SIZES["hidden_size"], dtype=torch.bfloat16, requires_grad=True)
    return kept(lambda x: module(x), x)


def predictor():
    """A layer of multi-token prediction without its transformer layer, and the output layer's input."""
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.multi_token_prediction import get_mtp_layer_spec_for_backend
    from megatron.core.transformer.spec_utils import build_module

    spec = get_mtp_layer_spec_for_backend(torch.nn.Identity, LocalSpecProvider())
    parts = spec.submodules
    parts.enorm = parts.hnorm = parts.layer_norm = Norm
    module = build_module(
        spec,
        config=config(mtp_num_layers=1),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    module.mtp_model_layer = Unchanged()
    ids, shape = torch.zeros(BATCH, LENGTH, dtype=torch.long), (LENGTH, BATCH, SIZES["hidden_size"])
    output = torch.nn.Parameter(torch.randn(32, SIZES["hidden_size"], dtype=torch.bfloat16))

    def predicted(hidden):
        embedded = torch.randn(shape, dtype=torch.bfloat16, requires_grad=True)
        more, *_ = module(ids, ids, hidden, None, embedding=lambda **_: embedded)
        return torch.nn.functional.linear(torch.cat([hidden, more]), output)

    hidden = torch.randn(shape, dtype=torch.bfloat16, requires_grad=True)
    return kept(predicted, hidden, weights=[output])


class _Scan(torch.autograd.Function):
    """What MambaSplitConv1dScanCombinedFn of mamba_ssm saves, parameters left out."""

    @staticmethod
    def forward(ctx, projected):
        width = MAMBA["num_heads"] * MAMBA["head_dim"]
        result = projected[..., :width].clone()
        ctx.save_for_backward(projected, result.clone())
        return result

    @staticmethod
    def backward(ctx, gradient):
        return torch.zeros_like(ctx.saved_tensors[0])


class _GroupNorm(torch.autograd.Function):
    """What LayerNormFn of mamba_ssm saves."""

    @staticmethod
    def forward(ctx, x):
        statistics = x.unflatten(-1, (MAMBA["num_groups"], -1)).float().pow(2).mean(-1).rsqrt()
        ctx.save_for_backward(x, statistics)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class GroupNorm(torch.nn.Module):
    def forward(self, x):
        return _GroupNorm.apply(x)


def mamba():
    """A Mamba layer behind its norm: from the residual to the last projection."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.ssm import mamba_mixer
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    mamba_mixer.mamba_split_conv1d_scan_combined = lambda projected, *_, **__: _Scan.apply(
        projected
    )
    sizes = {f"mamba_{name}": size for name, size in MAMBA.items()}
    parts = mamba_mixer.MambaMixerSubmodules(ColumnParallelLinear, RowParallelLinear)
    module = mamba_mixer.MambaMixer(
        config(**sizes),
        parts,
        SIZES["hidden_size"],
        layer_number=1,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    module.norm = GroupNorm()
    norm, hidden = Norm(SIZES["hidden_size"]), SIZES["hidden_size"]
    x = torch.randn(LENGTH, BATCH, hidden, dtype=torch.bfloat16, requires_grad=True)
    return kept(lambda x: module(norm(x)), x)


def main():
    initialize()
    sigmoid = {"moe_router_score_function": "sigmoid", "moe_router_pre_softmax": True}
    found = {
        "attention": attention(),
        "shared_expert": shared_expert(),
        "predictor": predictor(),
        "mamba": mamba(),
        "router softmax": router(moe_aux_loss_coeff=0.0),
        "router sigmoid": router(moe_aux_loss_coeff=0.0, **sigmoid),
        "router sigmoid aux": router(
            moe_aux_loss_coeff=0.01, moe_router_load_balancing_type="seq_aux_loss", **sigmoid
        ),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
