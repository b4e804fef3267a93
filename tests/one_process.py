"""Upstream's own modules in one process of their own, on the CPU: how a test starts it, and what it needs there."""

import json
import os
import subprocess
import sys

from harness import ROOT


def answer(module: str, *words: str):
    """What ``python -m module`` prints last, as JSON; its ``main`` begins with ``initialize``."""
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    done = subprocess.run(
        [sys.executable, "-m", module, *words],
        cwd=ROOT,
        env=os.environ | {"HARNESS_DEVICE": "cpu"} | ranks,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def initialize() -> None:
    """Let the CPU stand in for CUDA, and begin upstream's groups of one rank."""
    from harness.entry import rank

    rank.prepare()
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)


def kept_sizes(function, *inputs, weights=()) -> list[int]:
    """Bytes of each memory that autograd keeps of ``function(*inputs)``, once.

    Parameters are left out, also where views of the ``weights`` are kept.
    """
    import torch

    found = {}
    left_out = {weight.untyped_storage().data_ptr() for weight in weights}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if not isinstance(tensor, torch.nn.Parameter) and storage.data_ptr() not in left_out:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.compiler.set_stance("force_eager"),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        outputs = function(*inputs)
    assert outputs is not None  # alive while counted
    return list(found.values())
