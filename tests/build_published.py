"""Run by test_published_models.py in a process of its own: what upstream makes of models of models.yaml, cut to few layers.

Writes, as JSON into the file named, {model: [parameters of the built model, FLOPs of a step]} for the models that follow.
"""

import json
import sys
from pathlib import Path

from harness.entry import rank
from harness.experiment.catalog import load_models
from harness.experiment.constraints import with_changes
from harness.experiment.unlisted import row_of

LAYERS = 5


def tiny_row(name):
    """``name`` with the first LAYERS layers, on one rank, for one sequence."""
    row = row_of(load_models()[name], LAYERS)
    return with_changes(
        row, sharding="no_shard", precision="fp32", seq_length=128, global_batch_size=1
    )


def main(result, names):
    rank.prepare()
    import torch
    from build_models import built
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    found = {name: built(tiny_row(name))[:2] for name in names}
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
