"""Every argument of upstream's that the harness emits changes what upstream builds: one row each, at a value that is not its default.

Upstream accepts arguments that it does not wire: ``--rope-scaling-factor`` was one, and the tests stood at its default.
"""

import ast
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

from harness import ROOT
from harness.experiment.catalog import load_catalog
from harness.experiment.constraints import with_changes
from harness.run.checkpoints import Loading, Saving
from harness.upstreams.megatron_lm.flags import (
    loading_flags,
    megatron_flags,
    saving_flags,
    tracking_flags,
)
from harness.upstreams.megatron_lm.known_arguments import PINNED
from harness.upstreams.megatron_lm.tracking import Tracking

UPSTREAMS = {
    name: row
    for row in json.loads(PINNED.read_text(encoding="utf-8"))["arguments"]
    for name in row["names"]
}
ROPE, MOE = "--position-embedding-type rope", "--num-experts 4 --disable-bias-linear"
YARN = "--position-embedding-type yarn --rotary-scaling-factor 4.0 --yarn-original-max-position-embeddings 16"
SHARDED, FSDP = (
    "--use-distributed-optimizer",
    "--use-megatron-fsdp --use-distributed-optimizer --ckpt-format fsdp_dtensor --bf16",
)
TE, FP8 = (
    "--transformer-impl transformer_engine --attention-backend auto",
    "--bf16 --fp8-format hybrid",
)
MAMBA = (
    "--hybrid-layer-pattern M*M- --spec harness.specs.hybrid stack_spec --normalization RMSNorm"
    " --mamba-num-heads 8 --mamba-head-dim 16 --mamba-state-dim 16 --mamba-num-groups 2"
)
SAVES, BEHIND = "--save somewhere --save-interval 3", "--load somewhere"


class Row(NamedTuple):
    """``words`` added to a tiny command line, ``beside`` standing in it anyway, make a difference in ``section``.

    ``where``: what differs there, if it is not told by the argument's own name. ``without``: a word that it does not stand beside.
    """

    words: str
    section: str
    beside: str = ""
    where: str = ""
    world: int = 1
    without: str = ""
    version: str = ""
    """Of Transformer Engine, where upstream asks for one; it takes none to be installed otherwise."""

    @property
    def option(self) -> str:
        return self.words.split()[0]


ROWS = (
    # the model as it is built
    Row("--num-layers 6", "model", where="decoder.layers.5.mlp.linear_fc1"), Row("--hidden-size 96", "model", where="decoder.final_layernorm.weight"),
    Row("--num-attention-heads 8", "model", where="num_attention_heads_per_partition"), Row("--ffn-hidden-size 80", "model", where="linear_fc1.weight"),
    Row("--group-query-attention", "model", "--num-query-groups 2", "linear_qkv.weight"),
    Row("--num-query-groups 2", "model", "--group-query-attention", "linear_qkv.weight"), Row("--kv-channels 24", "model", where="linear_qkv.weight"),
    Row("--disable-bias-linear", "model", where="linear_fc1.bias"), Row("--normalization RMSNorm", "model", where="final_layernorm"),
    Row("--norm-epsilon 1e-3", "model", where="eps"), Row("--swiglu", "model", where="linear_fc2.weight"),
    Row("--quick-geglu", "model", "--disable-bias-linear --no-bias-gelu-fusion", where="activation_func"),
    Row("--glu-linear-offset 1.0", "transformer", "--quick-geglu --no-bias-gelu-fusion"),
    Row("--activation-func-clamp-value 7.0", "transformer", "--quick-geglu --no-bias-gelu-fusion"),
    Row("--position-embedding-type rope", "model", where="rotary_pos_emb"), Row("--rotary-base 77", "model", ROPE, "rotary_pos_emb.inv_freq"),
    Row("--use-rope-scaling", "model", f"{ROPE} --rotary-base 500000", "rotary_pos_emb.inv_freq"),
    Row("--rope-scaling-factor 32", "model", f"{ROPE} --rotary-base 500000 --use-rope-scaling", "rotary_pos_emb.inv_freq"),
    Row("--rotary-scaling-factor 8.0", "model", YARN, "rotary_pos_emb"), Row("--yarn-original-max-position-embeddings 64", "model", YARN, "rotary_pos_emb"),
    Row("--yarn-beta-fast 9", "model", YARN, "rotary_pos_emb"), Row("--yarn-beta-slow 3", "model", YARN, "rotary_pos_emb"),
    Row("--no-yarn-correction-range-round-to-int", "model", YARN, "rotary_pos_emb"),
    Row("--qk-layernorm", "model", where="q_layernorm"),
    Row("--spec harness.specs.projection_norm layer_spec", "model", "--qk-layernorm --normalization RMSNorm", "q_layernorm"),
    Row("--mamba-num-heads 16", "model", MAMBA, "mixer.A_log"), Row("--mamba-head-dim 32", "model", MAMBA, "mixer.norm.weight"),
    Row("--mamba-state-dim 32", "model", MAMBA, "mixer.conv1d_weight"), Row("--mamba-num-groups 4", "model", MAMBA, "mixer.conv1d_weight"),
    Row("--untie-embeddings-and-output-weights", "model", where="output_layer.weight"),
    Row("--attention-output-gate", "model", where="linear_qkv.weight"), Row("--softmax-type learnable", "model", where="softmax_offset"),
    Row("--window-size 7,0", "transformer"), Row("--window-attn-skip-freq 2", "transformer", "--window-size 7,0"),
    Row("--attention-dropout 0.3", "model", where="attention_dropout.p"), Row("--hidden-dropout 0.3", "model", where="embedding_dropout.p"),
    Row("--init-method-std 0.2", "model", where="std"), Row("--max-position-embeddings 64", "model", where="position_embeddings.weight"),
    Row("--vocab-size 999", "model", where="word_embeddings.weight"), Row("--make-vocab-size-divisible-by 500", "model", where="word_embeddings.weight"),
    Row("--num-experts 4", "model", "--disable-bias-linear", "mlp.router.weight"), Row("--moe-router-topk 3", "model", MOE, "mlp.router.topk"),
    Row("--moe-ffn-hidden-size 48", "model", MOE, "linear_fc1.weight"), Row("--bf16", "arguments", where="params_dtype"),
    Row("--moe-grouped-gemm", "transformer", MOE), Row("--moe-permute-fusion", "transformer", MOE),
    Row("--moe-token-dispatcher-type alltoall", "transformer", MOE), Row("--moe-router-pre-softmax", "transformer", MOE),
    Row("--moe-router-force-load-balancing", "transformer", MOE), Row("--moe-router-load-balancing-type sinkhorn", "transformer", MOE),
    Row("--moe-aux-loss-coeff 0.01", "transformer", MOE), Row("--moe-z-loss-coeff 0.01", "transformer", MOE),
    Row("--moe-router-dtype fp32", "transformer", MOE), Row("--tensor-model-parallel-size 2", "model", where="linear_qkv.weight", world=2),
    Row("--pipeline-model-parallel-size 2", "model", where="decoder.layers.3", world=2),
    Row("--num-virtual-stages-per-pipeline-rank 2", "model", "--pipeline-model-parallel-size 2", "decoder.layers.1.mlp", 2),
    Row("--decoder-first-pipeline-num-layers 1", "model", "--pipeline-model-parallel-size 2", "decoder.layers.1.mlp", 2),
    Row("--decoder-last-pipeline-num-layers 1", "model", "--pipeline-model-parallel-size 2", "decoder.layers.2.mlp", 2),
    Row("--pipeline-model-parallel-layout Ettt|tL", "model", "--pipeline-model-parallel-size 2", "decoder.layers.2.mlp", 2),
    Row("--account-for-embedding-in-pipeline-split", "transformer"), Row("--account-for-loss-in-pipeline-split", "transformer"),
    Row("--expert-model-parallel-size 2", "model", f"{MOE} --moe-token-dispatcher-type alltoall", "mlp.experts", 2),
    Row("--expert-tensor-parallel-size 1", "model", f"{MOE} --tensor-model-parallel-size 2 --sequence-parallel --moe-token-dispatcher-type alltoall",
        "mlp.experts", 2),
    Row("--moe-expert-capacity-factor 1.5", "transformer", MOE), Row("--moe-router-fusion", "transformer", MOE),
    Row("--moe-shared-expert-overlap", "transformer", f"{MOE} --moe-shared-expert-intermediate-size 32 --moe-token-dispatcher-type alltoall"),
    Row("--moe-flex-dispatcher-backend hybridep", "transformer", f"{MOE} --expert-model-parallel-size 2 --moe-token-dispatcher-type flex", world=2),
    Row("--deterministic-mode", "transformer"),
    Row("--sequence-parallel", "model", "--tensor-model-parallel-size 2", "sequence_parallel", 2),
    Row("--tp-comm-overlap", "transformer", "--tensor-model-parallel-size 2 --sequence-parallel", world=2),
    # the transformer's configuration
    Row("--context-parallel-size 2", "transformer", world=2),
    Row("--cp-comm-type a2a", "transformer", "--context-parallel-size 2", world=2),
    Row("--hierarchical-context-parallel-sizes 2 2", "transformer", "--context-parallel-size 4", world=4), Row("--attention-backend flash", "transformer"),
    Row("--recompute-granularity full", "transformer", "--recompute-method uniform --recompute-num-layers 1"),
    Row("--recompute-method block", "transformer", "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"),
    Row("--recompute-num-layers 2", "transformer", "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"),
    Row("--recompute-modules mlp", "transformer", "--recompute-granularity selective"),
    Row("--cross-entropy-loss-fusion", "transformer"), Row("--cross-entropy-fusion-impl te", "transformer"),
    Row("--calculate-per-token-loss", "transformer"), Row("--cuda-graph-impl local", "transformer", f"{TE} --te-rng-tracker"),
    Row("--cuda-graph-modules attn", "transformer", f"{TE} --cuda-graph-impl local --te-rng-tracker"),
    Row("--fp8-format hybrid", "transformer", f"--bf16 {TE}", "fp8"), Row("--fp8-recipe tensorwise", "transformer", f"{FP8} {TE}"),
    Row("--fp4-format e2m1", "transformer", f"--bf16 {TE}", "fp4", version="2.7.0"),
    Row("--fp4-recipe custom", "transformer", f"--bf16 {TE} --fp4-format e2m1 --fp4-quantizer-factory a.b", version="2.7.0"),
    Row("--delay-wgrad-compute", "transformer", f"--bf16 {TE} {MOE} --expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall"
        " --overlap-moe-expert-parallel-comm", world=2, version="2.7.0"),
    Row("--fp8-amax-history-len 7", "transformer", f"{FP8} {TE}"), Row("--fp8-amax-compute-algo max", "transformer", f"{FP8} {TE}"),
    Row("--no-persist-layer-norm", "transformer"), Row("--no-masked-softmax-fusion", "transformer"), Row("--no-rope-fusion", "transformer", ROPE, "apply_rope_fusion"),
    Row("--no-bias-dropout-fusion", "transformer"), Row("--no-bias-swiglu-fusion", "transformer", "--swiglu", "bias_activation_fusion"),
    Row("--no-gradient-accumulation-fusion", "transformer"), Row("--use-cpu-initialization", "transformer"),
    Row("--init-model-with-meta-device", "transformer", FSDP), Row("--transformer-impl transformer_engine", "transformer"),
    # optimizer, schedule, gradients
    Row("--optimizer muon", "optimizer"), Row("--weight-decay 0.3", "optimizer"), Row("--adam-beta1 0.7", "optimizer"), Row("--adam-beta2 0.7", "optimizer"),
    Row("--clip-grad 0.3", "optimizer"), Row("--muon-momentum 0.7", "muon", "--optimizer muon", "momentum"), Row("--muon-nesterov", "muon", "--optimizer muon", "nesterov"),
    Row("--muon-extra-scale-factor 0.2", "muon", "--optimizer muon", "extra_scale_factor"),
    Row("--use-precision-aware-optimizer", "optimizer", f"{SHARDED} --bf16"),
    Row("--exp-avg-dtype bf16", "optimizer", f"{SHARDED} --bf16 --use-precision-aware-optimizer"),
    Row("--exp-avg-sq-dtype bf16", "optimizer", f"{SHARDED} --bf16 --use-precision-aware-optimizer"),
    Row("--optimizer-cpu-offload", "optimizer", f"{SHARDED} --bf16 --use-precision-aware-optimizer"),
    Row("--optimizer-offload-fraction 0.5", "optimizer", f"{SHARDED} --bf16 --use-precision-aware-optimizer --optimizer-cpu-offload"),
    Row("--overlap-cpu-optimizer-d2h-h2d", "optimizer", f"{SHARDED} --bf16 --use-precision-aware-optimizer --optimizer-cpu-offload"),
    Row("--main-grads-dtype bf16", "optimizer", f"{SHARDED} --bf16 --use-precision-aware-optimizer --grad-reduce-in-bf16"),
    Row("--lr 3e-3", "schedule", where="max_lr"), Row("--min-lr 1e-4", "schedule"), Row("--lr-decay-style cosine", "schedule"),
    Row("--lr-decay-iters 7", "schedule", where="lr_decay_steps"), Row("--lr-warmup-fraction 0.3", "schedule", where="lr_warmup_steps"),
    Row("--lr-warmup-iters 3", "schedule", where="lr_warmup_steps"), Row("--override-opt_param-scheduler", "schedule"),
    Row("--grad-reduce-in-bf16", "ddp", "--bf16", "grad_reduce_in_fp32"), Row(SHARDED, "ddp"), Row("--no-gradient-reduce-div-fusion", "arguments"),
    Row("--overlap-grad-reduce", "ddp"), Row("--overlap-param-gather", "ddp", f"{SHARDED} --overlap-grad-reduce"),
    Row("--num-distributed-optimizer-instances 2", "ddp", SHARDED, world=2),
    Row("--fp8-param-gather", "transformer", f"{FP8} {TE} {SHARDED}", "fp8_param"),
    Row("--data-parallel-sharding-strategy optim", "ddp", FSDP), Row(FSDP, "dist", where="use_megatron_fsdp"),
    Row("--use-torch-fsdp2", "dist", "--untie-embeddings-and-output-weights"), Row("--distributed-backend nccl", "dist"),
    # steps, batches, data
    Row("--train-iters 20", "train"), Row("--micro-batch-size 4", "train"), Row("--global-batch-size 16", "train"),
    Row("--eval-interval 3", "validation"), Row("--eval-iters 7", "validation"), Row("--seed 7", "rng"), Row("--te-rng-tracker", "rng"),
    Row("--skip-train", "arguments"), Row("--seq-length 16", "dataset", where="sequence_length"), Row("--split 90,9,1", "dataset", "--data-path here", without="--mock-data"),
    Row("--data-path there", "dataset", "--data-path here", "blend", without="--mock-data"), Row("--data-cache-path somewhere", "dataset", where="path_to_cache"),
    Row("--no-create-attention-mask-in-dataloader", "dataset", where="create_attention_mask"), Row("--mock-data", "arguments"),
    Row("--sft", "arguments", "--tokenizer-type HuggingFaceTokenizer --tokenizer-model somewhere"), Row("--num-workers 0", "arguments"),
    Row("--tokenizer-type HuggingFaceTokenizer", "tokenizer", "--tokenizer-model somewhere"), Row("--tokenizer-model somewhere", "tokenizer"),
    # checkpoints and logs
    Row("--save elsewhere", "checkpoint", SAVES), Row("--save-interval 5", "checkpoint", SAVES), Row("--load somewhere", "checkpoint"),
    Row("--ckpt-step 3", "checkpoint", BEHIND), Row("--finetune", "checkpoint", BEHIND), Row("--no-load-optim", "arguments", BEHIND),
    Row("--no-load-rng", "arguments", BEHIND), Row("--exit-on-missing-checkpoint", "checkpoint", BEHIND),
    Row("--pretrained-checkpoint somewhere", "checkpoint"), Row("--ckpt-format torch", "checkpoint"),
    Row("--async-save", "arguments", f"{SAVES} --use-persistent-ckpt-worker --async-strategy mcore"),
    Row("--use-persistent-ckpt-worker", "arguments", f"{SAVES} --async-save --async-strategy mcore", "async_save"),
    Row("--async-strategy mcore", "arguments", f"{SAVES} --async-save --use-persistent-ckpt-worker"),
    Row("--dist-ckpt-optim-fully-reshardable", "checkpoint", f"{SAVES} {SHARDED}"),
    Row("--exit-signal-handler", "arguments", SAVES), Row("--exit-signal SIGUSR2", "arguments", f"{SAVES} --exit-signal-handler"),
    Row("--log-interval 1", "logger"), Row("--log-throughput", "logger"), Row("--log-validation-ppl-to-tensorboard", "logger"),
    Row("--tensorboard-dir somewhere", "logger"), Row("--wandb-project p", "logger"), Row("--wandb-exp-name n", "logger", "--wandb-project p"),
    Row("--wandb-entity e", "logger"), Row("--wandb-save-dir d", "logger"),
    # the harness's own
    *(Row(words, "lora", "--lora-rank 4 --lora-alpha 8 --lora-targets linear_qkv", "lora")
      for words in ("--lora-rank 8", "--lora-alpha 9", "--lora-dropout 0.5", "--lora-targets linear_proj")),
)  # fmt: skip
ONLY_NAMED = {
    "--dist-ckpt-format": "an old name that ARGS may have",
    "--fp4-param-gather": "ARGS may have it, with FP4= only",
}
OF_TRANSFORMER_ENGINE = {
    "--use-transformer-engine-op-fuser",
    "--moe-single-grouped-weight",
    "--moe-single-grouped-bias",
}
"""Upstream asks for its version, 2.14, before it takes them."""
OF_LARGE_MODELS = {
    "--enable-experimental",
    "--kv-lora-rank",
    "--moe-layer-freq",
    "--moe-router-enable-expert-bias",
    "--moe-router-group-topk",
    "--moe-router-num-groups",
    "--moe-router-score-function",
    "--moe-router-topk-scaling-factor",
    "--moe-shared-expert-intermediate-size",
    "--mscale",
    "--mscale-all-dim",
    "--mtp-loss-scaling-factor",
    "--mtp-num-layers",
    "--multi-latent-attention",
    "--overlap-moe-expert-parallel-comm",
    "--q-lora-rank",
    "--qk-head-dim",
    "--qk-pos-emb-head-dim",
    "--rope-type",
    "--rotary-percent",
    "--squared-relu",
    "--v-head-dim",
}
"""Compared elsewhere: with upstream's own script of DeepSeek-V3 and its models (test_published_models.py)."""
OF_HYBRIDS = {"--hybrid-layer-pattern"}
"""Compared elsewhere: with the GPT of the same layers (test_hybrid.py)."""
MAPPED = ("extra_arguments.py", "known_arguments.py")
"""Modules that name arguments of ARGS=; what they name is emitted by flags.py, or not at all."""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arguments")
    (folder / "rows.json").write_text(
        json.dumps([{**row._asdict(), "option": row.option} for row in ROWS])
    )
    # what another test's use of upstream left in this process would be upstream's answer here
    clean = {key: value for key, value in os.environ.items() if not key.startswith("NVTE_")}
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "upstream_builds.py"), str(folder / "rows.json"), str(folder / "answer.json")],
                          cwd=ROOT, env=clean | {"PYTHONPATH": str(ROOT), "HARNESS_DEVICE": "cpu", "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(zip(ROWS, json.loads((folder / "answer.json").read_text()), strict=True))


@pytest.mark.cpu
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.words)
def test_an_argument_changes_what_upstream_builds(row, built):
    found = built[row]
    assert "failure" not in found, found["failure"]
    name = row.option.removeprefix("--").replace("-", "_")
    wanted = (row.where,) if row.where else (name, name.removeprefix("no_"))
    named = [key for key in found["difference"] if any(one in key for one in wanted)]
    assert named, (
        f"{row.section} is the same with and without {row.words}, or differs elsewhere: {found['difference']}"
    )
    if row.section not in ("model", "muon", "lora"):
        assert {key.rpartition(".")[2] for key in named} & set(found["read"]), (
            f"no code of upstream reads {', '.join(named)}"
        )


def emitted() -> set[str]:
    """The arguments of upstream's that strings in harness/ spell, apart from those in docstrings."""
    found = set()
    for path in (ROOT / "harness").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        documentation = {
            id(statement.value)
            for node in ast.walk(tree)
            for statement in _body(node)
            if isinstance(statement, ast.Expr)
        }
        for node in ast.walk(tree) if path.name not in MAPPED else ():
            if (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and id(node) not in documentation
            ):
                found |= set(re.findall(r"(?<![\w-])--[a-z][\w-]*", node.value)) & UPSTREAMS.keys()
    return found


def _body(node: ast.AST) -> list[ast.stmt]:
    body = getattr(node, "body", [])
    return body if isinstance(body, list) else []


def test_every_argument_that_the_harness_emits_has_a_row():
    rows = {row.option for row in ROWS}
    assert len(rows) > 140 and not rows & ONLY_NAMED.keys()
    assert emitted() - rows - OF_LARGE_MODELS - OF_HYBRIDS - OF_TRANSFORMER_ENGINE == set(
        ONLY_NAMED
    ), "add a row to ROWS: what must differ, at a value that is not the default"
    assert rows - emitted() == set(), "the harness emits these no longer"


def test_what_the_catalogue_emits_has_a_row(tmp_path):
    rows, words = {row.option for row in ROWS}, set()
    for e in load_catalog().experiments:
        e = with_changes(e, data="mock")
        words |= {
            word
            for device in ("cpu", "cuda")
            for group in megatron_flags(e, device)
            for word in group
        }
        words |= {
            *saving_flags(e, Saving(3, None, None)),
            *loading_flags(Loading(tmp_path, 3, False)),
            *loading_flags(Loading(tmp_path, 3, True)),
        }
    words |= {*tracking_flags(Tracking("offline", "p", "e", "n"), "label")}
    assert {word for word in words if word.startswith("--")} <= rows | OF_LARGE_MODELS | OF_HYBRIDS


def test_an_argument_has_one_row():
    assert len({row.option for row in ROWS}) == len(ROWS)


def test_upstream_leaves_layers_in_bf16_where_fp4_is_refused_or_counted_so():
    """EP_OVERLAP=1 enters contexts of fp8 only, and so does multi-token prediction: FP4= is refused with one, and counted in bf16 in the other."""
    core = Path(find_spec("megatron.core").origin).parent
    schedule = core / "models" / "common" / "model_chunk_schedule_plan.py"
    passes = core / "pipeline_parallel" / "combined_1f1b.py"
    predictors = core / "transformer" / "multi_token_prediction.py"
    for path in (schedule, passes, predictors):
        assert "get_fp4_context(" not in path.read_text(encoding="utf-8"), path.name
    # megatron-core 0.19.2 enters fp8's context of EP_OVERLAP=1 in the second, core_v0.19.0 in both
    for path in (passes, predictors):
        assert "get_fp8_context" in path.read_text(encoding="utf-8"), path.name
    block = (core / "transformer" / "transformer_block.py").read_text(encoding="utf-8")
    assert "get_fp4_context(" in block
