"""Run by test_upstream_arguments.py in a process of its own: what upstream builds of a command line, with and without one argument.

Reads from the file named first a list of {option, words, beside, without, section, world, version}; writes into the second, as JSON, a list of {difference, read} or {failure}.
``difference`` is what differs between both command lines in ``section``: of the model built, of a configuration that upstream makes,
of the schedule of learning rates, of the data set's configuration, or of the arguments as upstream's validation leaves them.
``read`` are those of the differing names that code of upstream reads, outside of the files that parse and pass arguments.
"""

import contextlib
import io
import json
import os
import re
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from harness.entry import finetune, rank

real_groups = torch.distributed.init_process_group, torch.distributed.new_group
BASE = """
    --num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 --micro-batch-size 2
    --global-batch-size 8 --train-iters 10 --lr 1e-3 --mock-data --tokenizer-type NullTokenizer --vocab-size 255 --transformer-impl local
    --distributed-backend gloo --use-cpu-initialization --no-persist-layer-norm --no-masked-softmax-fusion --no-rope-fusion
    --no-gradient-accumulation-fusion --attention-backend unfused --eval-interval 5 --split 949,50,1
"""
PASSED_ON = {
    "arguments.py",
    "argument_utils.py",
    "yaml_arguments.py",
    "training_config.py",
    "common_config.py",
    "resilience_config.py",
}


def words_of(case, with_it):
    """The command line of ``case``, with or without its argument; what both begin with says nothing of it."""
    words = [
        word
        for word in BASE.split()
        if word != case["without"] and (word != case["option"] or len(case["words"].split()) > 1)
    ]
    return [*words, *case["beside"].split(), *(case["words"].split() if with_it else ())]


def validated(words, world):
    """Upstream's arguments of ``words``, as rank 0 of ``world`` has them."""
    from megatron.training.arguments import parse_args, validate_args

    fsdp = any(
        "fsdp" in word for word in words
    )  # upstream wants several connections for these, one for the others
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(world),
        "CUDA_DEVICE_MAX_CONNECTIONS": "8" if fsdp else "1",
    }
    sys.argv = ["pretrain_gpt.py", *words]
    args = parse_args()
    validate_args(args)
    return args


@contextlib.contextmanager
def imagined(args):
    """The process groups of rank 0; there is no other rank."""
    from megatron.core import parallel_state

    torch.distributed.init_process_group(
        "fake", store=FakeStore(), rank=0, world_size=args.world_size
    )
    try:
        parallel_state.initialize_model_parallel(
            args.tensor_model_parallel_size,
            args.pipeline_model_parallel_size,
            args.virtual_pipeline_model_parallel_size,
            context_parallel_size=args.context_parallel_size,
            expert_model_parallel_size=args.expert_model_parallel_size,
            expert_tensor_parallel_size=args.expert_tensor_parallel_size,
            create_gloo_process_groups=False,
        )
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def transformer_engine(version):
    """What upstream's checks look for in Transformer Engine, which a machine without a GPU has not.

    ``version``: which one they find; none where it is empty.
    """
    from megatron.core import utils
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.transformer.moe import moe_utils

    class FusedAdam:
        def __init__(
            self, master_weight_dtype, exp_avg_dtype, exp_avg_sq_dtype, use_decoupled_grad
        ): ...

    names = (
        "transformer_engine",
        "transformer_engine.pytorch",
        "transformer_engine.pytorch.optimizers",
    )
    fakes = dict.fromkeys(names, SimpleNamespace(FusedAdam=FusedAdam))
    kernels = ("fused_permute", "fused_permute_with_probs", "fused_sort_chunks_by_index", "fused_sort_chunks_by_index_with_probs",
               "fused_unpermute")  # fmt: skip
    found = utils.PkgVersion(version or "0.0.0")
    with (mock.patch.object(utils, "_te_version", found), mock.patch.dict(sys.modules, fakes), mock.patch.object(rope_utils, "fused_apply_rotary_pos_emb", object()),
          mock.patch.multiple(moe_utils, **dict.fromkeys(kernels, object()))):  # fmt: skip
        yield


def model_of(args):
    """Of every module of the model: its class, its numbers and words, its functions; of every tensor: its shape, small ones whole."""
    from build_models import builder_of
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    build_tokenizer(args)
    found = {}
    with imagined(args):
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        chunk = 0 if args.virtual_pipeline_model_parallel_size else None
        builder, config = builder_of(args)
        model = builder(config).build_model(
            ProcessGroupCollection.use_mpu_process_groups(), vp_stage=chunk
        )
        for path, module in model.named_modules():
            found[path] = type(module).__name__
            for name, value in vars(module).items():
                if isinstance(value, torch.Tensor):
                    found[f"{path}.{name}"] = value.tolist()
                elif isinstance(value, (bool, int, float, str, tuple)):
                    found[f"{path}.{name}"] = str(value)
                elif callable(value) and hasattr(value, "__name__"):
                    found[f"{path}.{name}"] = value.__name__
        for name, parameter in model.named_parameters():
            found[name] = f"{tuple(parameter.shape)} {parameter.dtype}"
        embedding = getattr(model, "embedding", None)
        found["std"] = (
            round(float(embedding.word_embeddings.weight.float().std()), 2) if embedding else None
        )
    return found


def plain(config, prefix=""):
    """The fields of a configuration, by name."""
    found = {}
    for field in fields(config):
        value = getattr(config, field.name, None)
        if is_dataclass(value) and not isinstance(value, type):
            found |= plain(value, f"{prefix}{field.name}.")
        else:
            found[prefix + field.name] = (
                getattr(value, "__qualname__", repr(value)) if callable(value) else repr(value)
            )
    return found


def section_of(args, name):
    from megatron.training import argument_utils, training

    if name == "arguments":
        return {key: repr(value) for key, value in vars(args).items()}
    if name == "model":
        return model_of(args)
    if name == "muon":
        from megatron.core.optimizer import emerging_optimizers

        config, _ = training.get_megatron_optimizer_config(args)
        return emerging_optimizers._kwargs_from_config(
            emerging_optimizers.TensorParallelMuon, "muon", config
        )
    if name == "lora":
        from harness.finetune.arguments import lora_of

        return {"lora": repr(lora_of(args))}
    if name == "schedule":
        from megatron.training import global_vars

        global_vars._GLOBAL_ARGS = args
        optimizer = type("Optimizer", (), {"param_groups": [{"lr": 0.0, "weight_decay": 0.0}]})()
        schedule = training.get_optimizer_param_scheduler(optimizer)
        return {key: repr(value) for key, value in vars(schedule).items() if key != "optimizer"}
    if name == "dataset":
        from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

        from harness.entry import pretrain

        pretrain.build_tokenizer = build_tokenizer
        return {
            key: value
            for key, value in plain(pretrain._dataset_config(args)).items()
            if key != "tokenizer"
        }
    if name == "transformer":
        return plain(argument_utils.core_transformer_config_from_args(args))
    return plain(getattr(argument_utils.pretrain_cfg_container_from_args(args, object()), name))


def names_read():
    """Every name that code of upstream, or the script that trains, reads as an attribute, or asks for by ``getattr``."""
    import megatron.core

    from harness.entry import pretrain
    from harness.machine import upstream

    found, tree = set(), upstream.locate()
    script = tree / upstream.SCRIPT if tree else Path(pretrain.__file__)
    for path in (script, *Path(megatron.core.__file__).parents[1].rglob("*.py")):
        if path.name not in PASSED_ON:
            text = path.read_text(encoding="utf-8")
            found |= set(re.findall(r"\.([a-z]\w*)\b(?!\s*=[^=])", text)) | set(
                re.findall(r"""getattr\([\w.]+, ['"](\w+)""", text)
            )
    return found


def main(asked, answer):
    rank.prepare()
    torch.distributed.init_process_group, torch.distributed.new_group = real_groups
    finetune.install(None)
    read, found, before, known = names_read(), [], dict(os.environ), {}
    for case in json.loads(Path(asked).read_text()):
        said = io.StringIO()
        try:
            with (
                contextlib.redirect_stderr(said),
                contextlib.redirect_stdout(said),
                transformer_engine(case["version"]),
            ):
                sides = [
                    (case["version"], case["section"], case["world"], *words_of(case, with_it))
                    for with_it in (False, True)
                ]
                for side in sides:
                    if side not in known:
                        known[side] = section_of(
                            validated(side[3:], case["world"]), case["section"]
                        )
                without, with_it = (known[side] for side in sides)
            keys = sorted(
                key for key in {*without, *with_it} if without.get(key) != with_it.get(key)
            )
            found.append(
                {
                    "difference": {
                        key: [str(side.get(key))[:60] for side in (without, with_it)]
                        for key in keys
                    },
                    "read": sorted({key.rpartition(".")[2] for key in keys} & read),
                }
            )
        except (SystemExit, Exception) as error:
            found.append({"failure": f"{type(error).__name__}: {error} {said.getvalue()[-300:]}"})
        os.environ.clear()
        os.environ |= before
    Path(answer).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
