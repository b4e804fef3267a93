"""Run by test_models.py in a process of its own, where the CPU stands in for CUDA: what upstream makes of the catalogue's models.

Writes, as JSON into the file named, {model: [parameters of the built model, FLOPs of a step]}; {id: complaint or null} of the parser, and the
same with CUDA graphs; and by how much attention with a window and sinks differs from a plain one.
"""

import contextlib
import io
import json
import os
import sys
from pathlib import Path

import torch

from harness.entry import rank
from harness.errors import UserError
from harness.experiment.catalog import load_catalog
from harness.experiment.constraints import with_changes
from harness.upstreams.megatron_lm.environment import variables
from harness.upstreams.megatron_lm.flags import megatron_flags

WITH_TRANSFORMER_ENGINE = ("--moe-permute-fusion",)


def parsed(e, device):
    """Upstream's arguments for ``e``, validated, as rank 0 of ``e`` would have them."""
    from megatron.training.arguments import parse_args, validate_args

    os.environ |= {variable.name: variable.value for variable in variables(e, device)}
    os.environ |= {"RANK": "0", "WORLD_SIZE": str(e.world_size), "LOCAL_RANK": "0"}
    words = (word for group in megatron_flags(e, device) for word in group)
    sys.argv = [
        "pretrain_gpt.py",
        *(word for word in words if word not in WITH_TRANSFORMER_ENGINE),
        "--no-rope-fusion",
    ]
    args = parse_args()
    validate_args(args)
    return args


def complaint(e):
    """What upstream's parser says against the GPU script of ``e``, or None."""
    from megatron.training.argument_utils import core_transformer_config_from_args

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            core_transformer_config_from_args(parsed(e, "cuda"))
    except (SystemExit, Exception) as error:
        return f"{type(error).__name__}: {error} {said.getvalue()[-300:]}"
    return None


def built(e):
    """Parameters and FLOPs of the whole model of ``e``, built by upstream on the meta device."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training.training import num_floating_point_operations

    args = parsed(e, "cpu")
    build_tokenizer(args)
    builder, config = builder_of(args)
    config.transformer.perform_initialization = False
    with torch.device("meta"):
        model = builder(config).build_model(
            ProcessGroupCollection.use_mpu_process_groups(), True, True
        )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return parameters, num_floating_point_operations(args, e.global_batch_size), config


def builder_of(args):
    """Upstream's builder of the model that ``args`` describe, and its configuration."""
    from megatron.training import argument_utils, global_vars
    from megatron.training.models.gpt import GPTModelBuilder
    from megatron.training.models.hybrid import HybridModelBuilder

    if not args.hybrid_layer_pattern:
        return GPTModelBuilder, argument_utils.gpt_config_from_args(args)
    global_vars._GLOBAL_ARGS = args  # harness/specs/hybrid.py reads them when it is imported
    return HybridModelBuilder, argument_utils.hybrid_config_from_args(args)


def attention_error(config):
    """The largest difference between upstream's attention in a layer with window and sinks, and the definition."""
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.transformer.enums import AttnMaskType

    heads, groups, width, length, batch = 64, 8, 64, 300, 2
    config.transformer.bf16, config.transformer.params_dtype = False, torch.float32
    attention = LocalSpecProvider().core_attention()(
        config.transformer, 1, AttnMaskType.causal, "self"
    )
    query, key, value = (torch.randn(length, batch, n, width) for n in (heads, groups, groups))
    with torch.no_grad():
        attention.softmax_offset.copy_(torch.randn(heads))
        theirs = attention(query, key, value, None)

    key, value = (tensor.repeat_interleave(heads // groups, dim=2) for tensor in (key, value))
    scores = torch.einsum("qbnh,kbnh->bnqk", query, key) / width**0.5
    distance = torch.arange(length)[:, None] - torch.arange(length)
    weights = scores.exp() * ((distance >= 0) & (distance < 128))
    weights /= weights.sum(-1, keepdim=True) + attention.softmax_offset.exp()[:, None, None]
    ours = torch.einsum("bnqk,kbnh->qbnh", weights, value).reshape(length, batch, -1)
    return (ours - theirs).abs().max().item()


def main(result):
    rank.prepare()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    catalog = load_catalog()
    experiments = [e for chapter in (600, 700) for e in catalog.in_chapter(chapter)]
    found = {"complaints": {e.id: complaint(e) for e in experiments}, "graphs": {}}
    for e in catalog.experiments:
        with contextlib.suppress(UserError):
            # without Transformer Engine upstream refuses experts in fp8, and moments in bf16
            plain = {"precision": "bf16", "fp8_recipe": None} if e.model.num_experts else {}
            found["graphs"][e.id] = complaint(with_changes(e, cuda_graphs=True, **plain))

    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    alone = {
        "dp": 1,
        "ep": 1,
        "tp": 1,
        "sequence_parallel": False,
        "sharding": "no_shard",
        "optimizer_state": "fp32",
        "gradients": "fp32",
        "precision": "fp32",
        "fp8_recipe": None,
    }
    found["models"] = {}
    for e in {e.model.name: e for e in experiments}.values():
        *counts, config = built(with_changes(e, **alone, global_batch_size=e.micro_batch_size))
        found["models"][e.model.name] = counts
        if e.model.attention_sinks:
            found["attention"] = attention_error(config)
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
