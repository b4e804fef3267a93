"""The one place that spells Megatron-LM's arguments (core_v0.19.0: megatron/training/arguments.py).

``megatron_flags`` gives them in groups, each group one line of the script that ``make show-<id>`` prints.
"""

from __future__ import annotations

from typing import Literal

from harness.catalog import Experiment
from harness.data import prepared

Device = Literal["cpu", "cuda"]

# As in every published script of github.com/vuiseng9/megatron-tutorials.
_OPTIMIZER = ("--lr 6.0e-5 --min-lr 6.0e-6 --lr-decay-style cosine --lr-decay-iters 430000 --lr-warmup-fraction .001",
              "--weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0 --init-method-std 0.006")
EVAL_ITERS = 10
_LOGGING = f"--log-interval 1 --log-throughput --eval-iters {EVAL_ITERS}"

# The core_v0.19.0 features that are CUDA kernels, switched off on a CPU.
_WITHOUT_CUDA = ("--transformer-impl local --distributed-backend gloo --use-cpu-initialization --num-workers 0",
                 "--no-persist-layer-norm --no-masked-softmax-fusion --no-rope-fusion",
                 "--no-bias-dropout-fusion --no-bias-gelu-fusion --no-bias-swiglu-fusion")

_SHARDING = {
    "no_shard": (),
    "optim": ("--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",),
    "fsdp_optim_grads": ("--use-megatron-fsdp --data-parallel-sharding-strategy optim_grads",
                         "--use-distributed-optimizer --ckpt-format fsdp_dtensor --init-model-with-meta-device"),
    "fsdp_optim_grads_params": ("--use-megatron-fsdp --data-parallel-sharding-strategy optim_grads_params",
                                "--use-distributed-optimizer --ckpt-format fsdp_dtensor --init-model-with-meta-device"),
    "torch_fsdp2": ("--use-torch-fsdp2 --ckpt-format torch_dist --untie-embeddings-and-output-weights",),
}
_RECOMPUTE = {
    "none": "",
    "full": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "selective": "--recompute-granularity selective",
}
_PRECISION = {"bf16": "--bf16", "fp32": ""}


def megatron_flags(e: Experiment, device: Device, *, apex: bool = False) -> list[list[str]]:
    """The arguments of ``pretrain_gpt.py`` for ``e``, grouped by what they are about.

    Args:
        device: ``cpu`` switches the CUDA-only features off.
        apex: whether Apex is installed; without it upstream cannot fuse gradient accumulation into the weight gradient.

    Raises:
        UserError: the experiment's data set is not prepared.
    """
    cuda = device == "cuda"
    groups = [
        _words(*_model(e)),
        _words(*_experts(e, cuda)),
        _words(*_parallel(e)),
        _words(*_SHARDING[e.sharding]),
        _words(_RECOMPUTE[e.recompute]),
        _words(f"--micro-batch-size {e.micro_batch_size} --global-batch-size {e.global_batch_size}",
               f"--train-iters {e.steps}", _PRECISION[e.precision]),
        _words(*_OPTIMIZER),
        [] if cuda else _words(*_WITHOUT_CUDA),
        [] if cuda and apex else ["--no-gradient-accumulation-fusion"],
        _data(e),
        _words(_LOGGING, f"--eval-interval {e.eval_interval}"),
        list(e.extra_args),
    ]
    return [group for group in groups if group]


def _model(e: Experiment) -> tuple[str, ...]:
    m = e.model
    return (
        f"--num-layers {m.num_layers} --hidden-size {m.hidden_size} --num-attention-heads {m.num_attention_heads}",
        *([f"--ffn-hidden-size {m.ffn_hidden_size}"] if m.ffn_hidden_size else []),
        *([f"--group-query-attention --num-query-groups {m.num_query_groups}"] if m.num_query_groups else []),
        *([] if m.add_bias_linear else ["--disable-bias-linear"]),
        f"--seq-length {e.seq_length} --max-position-embeddings {e.seq_length}",
        f"--attention-backend {e.attention_backend}",
    )


def _parallel(e: Experiment) -> tuple[str, ...]:
    return (
        f"--tensor-model-parallel-size {e.tp} --pipeline-model-parallel-size {e.pp} --context-parallel-size {e.cp}",
        *(["--sequence-parallel"] if e.sequence_parallel else []),
        *([f"--num-virtual-stages-per-pipeline-rank {e.vpp}"] if e.vpp > 1 else []),
        *([f"--cp-comm-type {e.cp_comm_type}"] if e.cp > 1 else []),
    )


def _experts(e: Experiment, cuda: bool) -> tuple[str, ...]:
    m = e.model
    if not m.num_experts:
        return ()
    return (
        f"--num-experts {m.num_experts} --moe-router-topk {m.moe_router_topk} --moe-ffn-hidden-size {m.moe_ffn}",
        f"--expert-model-parallel-size {e.ep} --expert-tensor-parallel-size {e.etp} --moe-token-dispatcher-type alltoall",
        "--moe-grouped-gemm",
        *(["--moe-permute-fusion"] if cuda else []),
        "--moe-router-force-load-balancing",
    )


def _data(e: Experiment) -> list[str]:
    if e.data == "mock":
        source = ["--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", str(e.model.vocab_size)]
    else:
        blend = prepared.blend(e.data)
        first = blend.sets[0]
        source = ["--data-path", *blend.data_path, "--data-cache-path", str(blend.cache)]
        source += ["--tokenizer-type", first.tokenizer_type]
        source += ["--tokenizer-model", str(first.tokenizer_model)] if first.tokenizer_model else []
        source += ["--vocab-size", str(first.vocab_size)] if first.tokenizer_type == "NullTokenizer" else []
    return [*source, "--split", e.split]


def _words(*parts: str) -> list[str]:
    return [word for part in parts for word in part.split()]
