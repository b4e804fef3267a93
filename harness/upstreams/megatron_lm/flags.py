"""An experiment as Megatron-LM's arguments (core_v0.19.0: megatron/training/arguments.py).

``megatron_flags`` returns them in groups: each group is one line of the script that
``make show-<id>`` prints.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from harness.data import data_sets
from harness.experiment.experiment import Experiment
from harness.experiment.hybrid import layer_pattern
from harness.experiment.model import Model, Yarn
from harness.finetune.arguments import flags as lora_flags
from harness.predict.flops import padded_vocab_size
from harness.run.checkpoints import Loading, Saving
from harness.upstreams.megatron_lm.tracking import Tracking

Device = Literal["cpu", "cuda"]

EXIT_SIGNAL = signal.SIGUSR2
"""Ranks that keep checkpoints save one and end when one of them receives it."""

# As in every published script of github.com/vuiseng9/megatron-tutorials.
_OPTIMIZER = "--weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0"
_LOGGING = "--log-interval 1 --log-throughput --log-validation-ppl-to-tensorboard"

# Features of core_v0.19.0 that are CUDA kernels, switched off on a CPU.
_WITHOUT_CUDA = (
    "--transformer-impl local --distributed-backend gloo --use-cpu-initialization --num-workers 0",
    "--no-persist-layer-norm --no-masked-softmax-fusion --no-rope-fusion",
    "--no-bias-dropout-fusion --no-bias-swiglu-fusion --no-gradient-reduce-div-fusion",
)

_FSDP = (
    (
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --ckpt-format"
        " fsdp_dtensor"
    ),
)
_SHARDING = {
    "no_shard": (),
    "optim": ("--use-distributed-optimizer",),
    "fsdp_optim": ("--use-megatron-fsdp --data-parallel-sharding-strategy optim", *_FSDP),
    "fsdp_optim_grads": (
        "--use-megatron-fsdp --data-parallel-sharding-strategy optim_grads",
        *_FSDP,
    ),
    "fsdp_optim_grads_params": (
        "--use-megatron-fsdp --data-parallel-sharding-strategy optim_grads_params",
        *_FSDP,
    ),
    "torch_fsdp2": (
        "--use-torch-fsdp2 --ckpt-format torch_dist --untie-embeddings-and-output-weights",
    ),
}
_OVERLAP = "--overlap-grad-reduce --overlap-param-gather"
_RECOMPUTE = {
    "none": "",
    "full": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "selective": "--recompute-granularity selective",
}
# Packed conversations: attention gets their bounds from cu_seqlens, and every token of an answer
# has the same weight.
_WITHOUT_MASK = "--no-create-attention-mask-in-dataloader"
_CONVERSATIONS = f"--sft {_WITHOUT_MASK} --calculate-per-token-loss"
_PRECISION = {"bf16": "--bf16", "fp32": "", "fp8": "--bf16", "fp4": "--bf16"}
_FP8 = {
    # delayed: scale by the largest value of the last 1,024 steps, Transformer Engine's default;
    # blockwise: by blocks of 128 values, as DeepSeek-V3; mxfp8: by 32, in Blackwell's tensor cores
    "delayed": (
        "--fp8-format hybrid --fp8-recipe delayed --fp8-amax-history-len 1024"
        " --fp8-amax-compute-algo max"
    ),
    "tensorwise": "--fp8-format hybrid --fp8-recipe tensorwise",
    "blockwise": "--fp8-format e4m3 --fp8-recipe blockwise",
    "mxfp8": "--fp8-format e4m3 --fp8-recipe mxfp8",
}
_FP4 = {"nvfp4": "--fp4-format e2m1 --fp4-recipe nvfp4"}
# Muon's update is scaled to the size of Adam's, so that a learning rate serves both (Liu et al.
# 2025, arXiv:2502.16982)
_OPTIMIZERS = {
    "adam": "",
    "muon": "--optimizer muon --muon-momentum 0.95 --muon-nesterov --muon-extra-scale-factor 0.2",
}
_GRADIENTS = {"fp32": "", "bf16": "--grad-reduce-in-bf16"}
_FORCED_ROUTING = "--moe-router-force-load-balancing"
_POSITIONS = {
    "learned_absolute": "",
    "none": "--position-embedding-type none",
    "rope": "--position-embedding-type rope --rotary-base {}",
    # the fused kernel does not support YaRN's scaling
    "yarn": "--position-embedding-type yarn --rotary-base {} --no-rope-fusion",
}
# quick-GeGLU as in GPT-OSS: (up + 1) x gate x sigmoid(1.702 gate), both clamped at 7
_ACTIVATION = {
    "gelu": "",
    "squared_relu": "--squared-relu",
    "swiglu": "--swiglu",
    "clamped_quick_geglu": (
        "--quick-geglu --glu-linear-offset 1.0 --activation-func-clamp-value 7.0"
    ),
}
_QK_NORM = {
    "none": "",
    "head": "--qk-layernorm",
    "projection": "--qk-layernorm --spec harness.specs.projection_norm layer_spec",
}


def megatron_flags(e: Experiment, device: Device, *, apex: bool = False) -> list[list[str]]:
    """The arguments of ``pretrain_gpt.py`` for ``e``, grouped by subject.

    Args:
        device: ``cpu`` switches CUDA-only features off.
        apex: whether Apex is installed, which upstream needs to fuse gradient accumulation into the
            weight gradient; it does unless ``e`` says otherwise.

    Raises:
        UserError: the experiment's data set is not prepared.
    """
    cuda = device == "cuda"
    groups = [
        _words(*_model(e)),
        _words(*_experts(e, cuda)),
        _words(*_parallel(e), *_overlap(e, cuda)),
        _words(
            *_SHARDING[e.sharding],
            _OVERLAP if e.sharding == "optim" and e.overlap else "",
            *_instances(e),
            *_on_meta_device(e),
        ),
        _words(_RECOMPUTE[e.recompute], *_recompute_modules(e)),
        _words(
            f"--micro-batch-size {e.micro_batch_size} --global-batch-size {e.global_batch_size}",
            f"--train-iters {e.steps}",
            *_precision(e),
        ),
        _words(_schedule(e), _OPTIMIZER, f"--init-method-std {e.model.init_method_std}"),
        [
            *(["--pretrained-checkpoint", e.weights] if e.weights else []),
            *_words(*(lora_flags(e.lora) if e.lora else ())),
        ],
        _words(
            _OPTIMIZERS[e.optimizer],
            *_optimizer_state(e),
            _GRADIENTS[e.gradients],
            # without it the precision-aware optimizer would want a copy in fp32
            "--main-grads-dtype bf16" if e.gradients == "bf16" and e.precision_aware else "",
        ),
        ["--deterministic-mode"] if e.deterministic else [],
        _words(*_cuda_graphs(e)) if cuda else _words(*_WITHOUT_CUDA),
        [] if _fuses_gradients(e, cuda and apex) else ["--no-gradient-accumulation-fusion"],
        _data(e),
        _words(_LOGGING, f"--eval-interval {e.eval_interval} --eval-iters {e.eval_steps}"),
        list(e.extra_args),
    ]
    return [group for group in groups if group]


def flags_as_learned(e: Experiment, device: Device) -> list[str]:
    """The arguments of ``megatron_flags`` in one list, without forced balanced routing."""
    return [
        word for group in megatron_flags(e, device) for word in group if word != _FORCED_ROUTING
    ]


def model_flags(e: Experiment) -> list[str]:
    """The arguments of ``e``'s model, without those of its training."""
    return _words(
        *_model(e), *_experts(e, cuda=False), f"--init-method-std {e.model.init_method_std}"
    )


def tokenizer_flags(model: Model, folder: Path) -> list[str]:
    """Arguments for the tokenizer in ``folder``; the model keeps its vocabulary."""
    return [
        "--tokenizer-type",
        "HuggingFaceTokenizer",
        "--tokenizer-model",
        str(folder),
        "--make-vocab-size-divisible-by",
        str(padded_vocab_size(model.vocab_size, 1)),
    ]


def saving_flags(e: Experiment, saving: Saving) -> list[str]:
    """Arguments for asynchronous saves that another parallel layout can load.

    Upstream ignores ``--async-save`` without its persistent worker, and its default strategy needs
    nvidia-resiliency-ext. Megatron-FSDP's format needs that package in any case, so those runs save
    synchronously.

    After a rank received ``EXIT_SIGNAL``, all save once more and end. Upstream's default is
    SIGTERM, with which torchrun ends ranks: one that waits for a failed rank would never end.
    """
    waits = e.sharding.startswith("fsdp")
    return _words(
        f"--save-interval {saving.every}",
        "" if waits else "--async-save --use-persistent-ckpt-worker --async-strategy mcore",
        "--dist-ckpt-optim-fully-reshardable" if e.sharding == "optim" else "",
        f"--exit-signal-handler --exit-signal {EXIT_SIGNAL.name}",
    )


def loading_flags(loading: Loading) -> list[str]:
    """Arguments for the checkpoint a run starts from; the learning rate schedule is this run's."""
    return [
        "--load",
        str(loading.folder),
        *_words(
            f"--ckpt-step {loading.step}" if loading.step else "",
            (
                "--finetune --no-load-optim --no-load-rng"
                if loading.only_weights
                else "--override-opt_param-scheduler"
            ),
            "--exit-on-missing-checkpoint",
        ),
    ]


def tracking_flags(tracking: Tracking, label: str) -> list[str]:
    """Arguments for Weights & Biases: upstream's writer needs a project and a name."""
    entity = ["--wandb-entity", tracking.entity] if tracking.entity else []
    return [
        "--wandb-project",
        tracking.project,
        "--wandb-exp-name",
        tracking.name or label,
        *entity,
    ]


def _model(e: Experiment) -> tuple[str, ...]:
    m = e.model
    return (
        (
            f"{_layers(e)} --hidden-size {m.hidden_size} --num-attention-heads"
            f" {m.num_attention_heads}"
        ),
        *([f"--ffn-hidden-size {m.ffn_hidden_size}"] if m.ffn_hidden_size else []),
        *(
            [f"--group-query-attention --num-query-groups {m.num_query_groups}"]
            if m.num_query_groups
            else []
        ),
        *([f"--kv-channels {m.kv_channels}"] if m.kv_channels else []),
        *_mamba(m),
        *_latent_attention(m),
        *([] if m.add_bias_linear else ["--disable-bias-linear"]),
        *_published(e),
        f"--seq-length {e.seq_length} --max-position-embeddings {e.positions or e.seq_length}",
        f"--attention-backend {e.attention_backend}",
    )


def _layers(e: Experiment) -> str:
    if e.entry == "gpt":
        return f"--num-layers {e.model.num_layers}"
    return f"--hybrid-layer-pattern {layer_pattern(e)} --spec harness.specs.hybrid stack_spec"


def _mamba(m: Model) -> Iterator[str]:
    if mamba := m.mamba:
        yield f"--mamba-num-heads {mamba.num_heads} --mamba-head-dim {mamba.head_dim}"
        yield f"--mamba-state-dim {mamba.state_dim} --mamba-num-groups {mamba.num_groups}"


def _latent_attention(m: Model) -> Iterator[str]:
    """Its positions too: upstream names their type apart, and only YaRN's have a fused kernel,
    which is experimental (fused_apply_mla_rope_for_q)."""
    if latent := m.latent_attention:
        yield "--multi-latent-attention"
        yield f"--q-lora-rank {latent.q_lora_rank}" if latent.q_lora_rank else ""
        yield f"--kv-lora-rank {latent.kv_lora_rank} --qk-head-dim {latent.qk_head_dim}"
        yield f"--qk-pos-emb-head-dim {latent.qk_pos_emb_head_dim}"
        yield f"--v-head-dim {latent.v_head_dim}"
        yield f"--position-embedding-type rope --rope-type {m.position_embedding}"
        yield f"--rotary-base {m.rotary_base}"
        yield "--enable-experimental" if m.yarn else "--no-rope-fusion"


def _published(e: Experiment) -> Iterator[str]:
    """What a model has that GPT-2 has not."""
    m = e.model
    if m.normalization == "RMSNorm":
        yield f"--normalization RMSNorm --norm-epsilon {m.norm_epsilon}"
    elif m.norm_epsilon != 1e-5:
        yield f"--norm-epsilon {m.norm_epsilon}"
    yield _ACTIVATION[m.activation]
    if m.latent_attention is None:
        yield _POSITIONS[m.position_embedding].format(m.rotary_base)
    if m.rope_scaling_factor:
        yield f"--use-rope-scaling --rope-scaling-factor {m.rope_scaling_factor}"
    if m.rotary_percent != 1.0:
        yield f"--rotary-percent {m.rotary_percent}"
    if m.yarn:
        yield from _yarn(m.yarn, only_factors=m.latent_attention is not None)
    yield _QK_NORM[m.qk_norm]
    if m.untie_embeddings and e.sharding != "torch_fsdp2":
        yield "--untie-embeddings-and-output-weights"
    if m.attention_output_gate:
        yield "--attention-output-gate"
    if m.attention_sinks:
        yield "--softmax-type learnable"
    if m.window_size:
        yield f"--window-size {m.window_size - 1},0 --window-attn-skip-freq 2"
    if m.predictors:
        yield f"--mtp-num-layers {m.predictors}"
        yield f"--mtp-loss-scaling-factor {m.mtp_loss_scaling_factor}"
    if m.dropout != 0.1:
        yield f"--attention-dropout {m.dropout} --hidden-dropout {m.dropout}"


def _yarn(yarn: Yarn, *, only_factors: bool) -> Iterator[str]:
    if not only_factors:
        yield f"--yarn-original-max-position-embeddings {yarn.original_max_position_embeddings}"
    yield f"--rotary-scaling-factor {yarn.rotary_scaling_factor}"
    if not only_factors:
        yield f"--yarn-beta-fast {yarn.beta_fast} --yarn-beta-slow {yarn.beta_slow}"
    if not (only_factors or yarn.correction_range_round_to_int):
        yield "--no-yarn-correction-range-round-to-int"
    if (yarn.mscale, yarn.mscale_all_dim) != (1.0, 0.0):
        yield f"--mscale {yarn.mscale} --mscale-all-dim {yarn.mscale_all_dim}"


def _instances(e: Experiment) -> Iterator[str]:
    if e.optimizer_instances > 1:
        yield f"--num-distributed-optimizer-instances {e.optimizer_instances}"


def _optimizer_state(e: Experiment) -> Iterator[str]:
    if not e.precision_aware:
        return
    yield "--use-precision-aware-optimizer"
    if e.optimizer_state == "bf16":
        yield "--exp-avg-dtype bf16 --exp-avg-sq-dtype bf16"
    if e.offload:
        yield "--optimizer-cpu-offload --overlap-cpu-optimizer-d2h-h2d"
        yield f"--optimizer-offload-fraction {e.offload:g}"


def _on_meta_device(e: Experiment) -> tuple[str, ...]:
    """Have Megatron-FSDP create weights sharded, unless positions are learned.

    Those would then have PyTorch's standard deviation, 1, in place of the model's.
    """
    learned = e.model.position_embedding == "learned_absolute"
    return (
        ("--init-model-with-meta-device",) if e.sharding.startswith("fsdp") and not learned else ()
    )


def _recompute_modules(e: Experiment) -> tuple[str, ...]:
    return (f"--recompute-modules {' '.join(e.recompute_modules)}",) if e.recompute_modules else ()


def _precision(e: Experiment) -> Iterator[str]:
    yield _PRECISION[e.precision]
    if e.fp8_recipe:
        yield _FP8[e.fp8_recipe]
    if e.fp4_recipe:
        yield _FP4[e.fp4_recipe]
    if e.fp8_params:
        yield "--fp8-param-gather"
    if e.cross_entropy_fusion:
        yield "--cross-entropy-loss-fusion --cross-entropy-fusion-impl"
        yield e.cross_entropy_fusion_impl


def _fuses_gradients(e: Experiment, apex: bool) -> bool:
    return apex if e.gradient_fusion is None else e.gradient_fusion


def _cuda_graphs(e: Experiment) -> Iterator[str]:
    if not e.cuda_graphs:
        return
    yield f"--cuda-graph-impl {e.graphs_by} --te-rng-tracker"
    if e.graphs_by == "transformer_engine":
        yield f"--cuda-graph-modules {' '.join(e.graphed)}"


def _schedule(e: Experiment) -> str:
    warmup = f"--lr-warmup-iters {e.lr_warmup_steps}"
    if e.lr_warmup_steps is None:
        warmup = f"--lr-warmup-fraction {'.001' if e.lr is None else '.05'}"
    return (
        f"--lr {e.highest_lr:g} --min-lr {e.lowest_lr:g} --lr-decay-style {e.lr_decay} "
        f"--lr-decay-iters {e.lr_decay_steps} {warmup}"
    )


def _parallel(e: Experiment) -> tuple[str, ...]:
    return (
        (
            f"--tensor-model-parallel-size {e.tp} --pipeline-model-parallel-size {e.pp}"
            f" --context-parallel-size {e.cp}"
        ),
        *(["--sequence-parallel"] if e.sequence_parallel else []),
        *_stages(e),
        *_context_parallel(e),
    )


def _context_parallel(e: Experiment) -> Iterator[str]:
    if e.cp > 1:
        yield f"--cp-comm-type {e.cp_comm_type}"
        if e.cp_comm_type == "a2a+p2p":
            yield f"--hierarchical-context-parallel-sizes {e.cp_levels[0]} {e.cp_levels[1]}"


def _stages(e: Experiment) -> Iterator[str]:
    """Virtual stages, and what each stage holds; upstream derives the former from a layout."""
    if e.entry == "hybrid":
        return  # the pattern says it
    if e.pp_layout:
        yield f"--pipeline-model-parallel-layout {e.pp_layout}"
    elif e.vpp > 1:
        yield f"--num-virtual-stages-per-pipeline-rank {e.vpp}"
    if e.first_stage_layers:
        yield f"--decoder-first-pipeline-num-layers {e.first_stage_layers}"
    if e.last_stage_layers:
        yield f"--decoder-last-pipeline-num-layers {e.last_stage_layers}"
    if e.embedding_as_layer:
        yield "--account-for-embedding-in-pipeline-split"
    if e.loss_as_layer:
        yield "--account-for-loss-in-pipeline-split"


def _overlap(e: Experiment, cuda: bool) -> tuple[str, ...]:
    """Overlap by Transformer Engine, which a CPU does without."""
    if not (cuda and e.tp_overlap):
        return ()
    return ("--tp-comm-overlap",)


def _dispatcher(e: Experiment, cuda: bool) -> str:
    """DeepEP and HybridEP are kernels; a CPU exchanges the same tokens by all-to-all."""
    return "alltoall" if e.moe_dispatcher == "flex" and not cuda else e.moe_dispatcher


def _experts(e: Experiment, cuda: bool) -> tuple[str, ...]:
    m = e.model
    if not m.num_experts:
        return ()
    return (
        (
            f"--num-experts {m.num_experts} --moe-router-topk {m.moe_router_topk}"
            f" --moe-ffn-hidden-size {m.moe_ffn}"
        ),
        (
            f"--expert-model-parallel-size {e.ep} --expert-tensor-parallel-size {e.etp}"
            f" --moe-token-dispatcher-type {_dispatcher(e, cuda)}"
        ),
        *_other_layers(e),
        *([f"--moe-expert-capacity-factor {e.moe_capacity:g}"] if e.moe_capacity else []),
        "--moe-grouped-gemm",
        *(_only_on_gpus(e) if cuda else ()),
        *(["--no-bias-dropout-fusion"] if cuda and m.add_bias_linear else []),
        *_router(e),
    )


def _only_on_gpus(e: Experiment) -> Iterator[str]:
    """Experts' kernels and streams, which a CPU does without."""
    yield "--moe-permute-fusion"
    if e.moe_dispatcher == "flex":
        yield f"--moe-flex-dispatcher-backend {e.moe_backend}"
    if e.ep_overlap:
        yield "--overlap-moe-expert-parallel-comm"
    if e.delay_wgrad:
        yield "--delay-wgrad-compute"
    if e.grouped_gemm == "fused":
        yield "--use-transformer-engine-op-fuser"
        yield "--moe-single-grouped-weight"
        if e.model.add_bias_linear:
            yield "--moe-single-grouped-bias"
    if e.router_fusion:
        yield "--moe-router-fusion"
    if e.shared_expert_overlap:
        yield "--moe-shared-expert-overlap"


def _other_layers(e: Experiment) -> Iterator[str]:
    """The layers without experts, and the expert of every token."""
    m = e.model
    if (dense := m.first_dense_layers) and e.entry == "gpt":
        yield f"--moe-layer-freq [0]*{dense}+[1]*{m.num_layers - dense}"
    if shared := m.moe_shared_expert_intermediate_size:
        yield f"--moe-shared-expert-intermediate-size {shared}"


def _router(e: Experiment) -> Iterator[str]:
    m = e.model
    if m.moe_router_pre_softmax:
        yield "--moe-router-pre-softmax"
    if m.moe_router_score_function != "softmax":
        yield f"--moe-router-score-function {m.moe_router_score_function}"
    if m.moe_router_enable_expert_bias:
        yield "--moe-router-enable-expert-bias"
    if m.moe_router_num_groups:
        yield f"--moe-router-num-groups {m.moe_router_num_groups}"
        yield f"--moe-router-group-topk {m.moe_router_group_topk}"
    if m.moe_router_topk_scaling_factor:
        yield f"--moe-router-topk-scaling-factor {m.moe_router_topk_scaling_factor}"
    if m.moe_aux_loss_coeff is None:
        yield _FORCED_ROUTING
    else:
        yield f"--moe-router-load-balancing-type {m.moe_router_load_balancing_type}"
        yield f"--moe-aux-loss-coeff {m.moe_aux_loss_coeff}"
        yield "--moe-router-dtype fp32"
    if m.moe_z_loss_coeff is not None:
        yield f"--moe-z-loss-coeff {m.moe_z_loss_coeff}"


def _data(e: Experiment) -> list[str]:
    if e.data == data_sets.MOCK:
        source = [
            "--mock-data",
            "--tokenizer-type",
            "NullTokenizer",
            "--vocab-size",
            str(e.model.vocab_size),
        ]
    else:
        blend = data_sets.blend(e.data)
        first = blend.sets[0]
        source = ["--data-path", *blend.data_path, "--data-cache-path", str(blend.cache)]
        source += ["--tokenizer-type", first.tokenizer_type]
        source += ["--tokenizer-model", str(first.tokenizer_model)] if first.tokenizer_model else []
        source += (
            ["--vocab-size", str(first.vocab_size)]
            if first.tokenizer_type == "NullTokenizer"
            else []
        )
        source += _whole_vocabulary(e, first.vocab_size)
        source += _CONVERSATIONS.split() if first.chat else []
    if not e.attention_mask and _WITHOUT_MASK not in source:
        source.append(_WITHOUT_MASK)
    return [*source, "--split", e.split]


def _whole_vocabulary(e: Experiment, vocab_size: int) -> list[str]:
    """Keep the model's vocabulary where the data set's tokenizer has fewer tokens.

    Upstream would shrink the model to the tokenizer. With more tokens, the model grows.
    """
    padded = padded_vocab_size(e.model.vocab_size, e.tp)
    return (
        ["--make-vocab-size-divisible-by", str(padded // e.tp)]
        if padded_vocab_size(vocab_size, e.tp) < padded
        else []
    )


def _words(*parts: str) -> list[str]:
    return [word for part in parts for word in part.split()]
