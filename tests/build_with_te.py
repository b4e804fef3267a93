"""Run by test_transformer_engine.py in a process of its own: what a GPU's ranks build, on a machine without one.

Transformer Engine's modules need a GPU to compute, not to be built on the meta device; every rank but one is only imagined
(PyTorch's fake process groups). Writes, as JSON into the file named, {id: complaint, or {stage: what the first or last rank
holds}}: ``weights`` of all, of ``adapters``, of ``experts`` where they are split, and the ``keys`` of its checkpoint.
"""

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import transformer_engine.pytorch  # noqa: F401  it links to libraries that torch brings, and asks for the driver itself
from build_ranks import imagined, rank_of
from torch.overrides import TorchFunctionMode

from harness.entry import finetune
from harness.experiment.catalog import load_catalog
from harness.machine import upstream
from harness.upstreams.megatron_lm.environment import variables
from harness.upstreams.megatron_lm.flags import megatron_flags


class OnMeta(TorchFunctionMode):
    """Tensors wanted on a CUDA device, which upstream names as ``"cuda"`` or by its number, have no memory instead."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if type(device) is int or str(device).startswith("cuda"):
            kwargs["device"] = "meta"
        return function(*args, **kwargs)


def pretend_hopper():
    """Answer what upstream asks of the driver before it computes."""
    answers = {
        "is_available": True,
        "device_count": 8,
        "current_device": 0,
        "get_device_capability": (9, 0),
        "get_device_properties": SimpleNamespace(major=9, minor=0, multi_processor_count=132),
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
        "Stream": None,
        "Event": None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)


def built(e, stage):
    """What the first (stage 0) or last rank of ``e`` holds, built as its GPU script says."""
    from megatron.core.fp8_utils import get_fp8_recipe
    from megatron.core.tensor_parallel import random
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.models.gpt import GPTModelBuilder

    os.environ |= {variable.name: variable.value for variable in variables(e, "cuda")}
    os.environ |= {
        "RANK": str(rank_of(e, stage)),
        "WORLD_SIZE": str(e.world_size),
        "LOCAL_RANK": "0",
    }
    sys.argv = ["pretrain_gpt.py", *(word for group in megatron_flags(e, "cuda") for word in group)]
    args = parse_args()
    validate_args(args)
    build_tokenizer(args)
    with imagined(e, stage) as groups:
        random.initialize_rng_tracker(force_reset=True)
        config = gpt_config_from_args(args)
        config.transformer.perform_initialization = False
        config.transformer.init_model_with_meta_device = True
        if args.fp8:
            get_fp8_recipe(config.transformer)
        builder = GPTModelBuilder(config)
        with torch.device("meta"), OnMeta():
            chunks = [
                builder.build_model(groups, vp_stage=chunk if e.vpp > 1 else None)
                for chunk in range(e.vpp)
            ]
        for hook in config.pre_wrap_hooks:
            hook(chunks)
        return held(chunks)


def held(chunks):
    from harness.finetune import lora

    found = {"weights": 0, "adapters": 0, "experts": 0, "keys": []}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            found["adapters" if lora.PREFIX in name else "weights"] += parameter.numel()
            if not getattr(parameter, "allreduce", True):
                found["experts"] += parameter.numel()
    if len(chunks) == 1:
        found["keys"] = sorted(keys(chunks[0].sharded_state_dict()))
    return found


def keys(state):
    if isinstance(state, dict):
        return {key for part in state.values() for key in keys(part)}
    return {state.key} if hasattr(state, "key") else set()


def main(result):
    upstream.put_on_path(upstream.locate())
    pretend_hopper()
    finetune.install(None)
    before, found = dict(os.environ), {}
    for e in load_catalog().experiments:
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
                found[e.id] = {stage: built(e, stage) for stage in {0, e.pp - 1}}
        except (SystemExit, Exception) as error:
            found[e.id] = f"{type(error).__name__}: {error}\n{said.getvalue()[-300:]}"
        os.environ.clear()
        os.environ |= before
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
