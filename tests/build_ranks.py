"""Run by test_memory.py in a process of its own: what a rank of a large layout holds of its model, as upstream builds it.

Every rank but one is only imagined: PyTorch's fake process groups, weights on the meta device. Writes, as JSON into the
file named, {id: {stage: [parameters outside of experts, parameters in experts]}} for the ids that follow.
"""

import contextlib
import json
import sys
from pathlib import Path

import torch
from build_models import builder_of, parsed
from torch.testing._internal.distributed.fake_pg import FakeStore

from harness.entry import rank
from harness.experiment.catalog import load_catalog
from harness.experiment.constraints import with_changes

real_groups = torch.distributed.init_process_group, torch.distributed.new_group


@contextlib.contextmanager
def imagined(e, stage):
    """The process groups of the first (stage 0) or last rank of ``e``; there is no other."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    torch.distributed.init_process_group(
        "fake", store=FakeStore(), rank=rank_of(e, stage), world_size=e.world_size
    )
    try:
        parallel_state.initialize_model_parallel(
            e.tp,
            e.pp,
            e.vpp if e.vpp > 1 else None,
            context_parallel_size=e.cp,
            expert_model_parallel_size=e.ep,
            expert_tensor_parallel_size=e.etp,
            create_gloo_process_groups=False,
        )
        yield ProcessGroupCollection.use_mpu_process_groups()
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def rank_of(e, stage):
    return (e.world_size - 1) * (stage > 0)


def held(e, stage):
    """Parameters on the first or last rank of the world, which is of the first or last stage of ``e``."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    args = parsed(e, "cpu")
    build_tokenizer(args)
    with imagined(e, stage) as groups:
        model_parallel_cuda_manual_seed(1)
        builder, config = builder_of(args)
        config.transformer.perform_initialization = False
        with torch.device("meta"):
            model = builder(config).build_model(groups, stage == 0, stage == e.pp - 1)
        counts = [0, 0]
        for parameter in model.parameters():
            counts[not getattr(parameter, "allreduce", True)] += parameter.numel()
        return counts


def main(result, ids):
    rank.prepare()
    torch.distributed.init_process_group, torch.distributed.new_group = real_groups
    plain = {
        "precision": "fp32",
        "fp8_recipe": None,
        "sharding": "no_shard",
        "optimizer_state": "fp32",
        "gradients": "fp32",
        "recompute": "none",
        "recompute_modules": (),
        "optimizer": "adam",
        "vpp": 1,
    }
    experiments = [load_catalog().find(id_) for id_ in ids]
    found = {
        e.id: {stage: held(with_changes(e, **plain), stage) for stage in {0, e.pp - 1}}
        for e in experiments
    }
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
