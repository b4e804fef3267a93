"""What upstream's model makes of some tokens, run as ranks of a CPU job: ``python tests/megatron_logits.py CASES.json``.

CASES.json is a list of {load, model, tp, pp, ep, tokens, out, arguments, steps, stored, own}; ``model`` is an import whose model
it is, by default ``load``. Ranks build and load the model by upstream's own training script, which goes on to train; here it
ends once the model has seen ``tokens`` [b, s], and ``out`` has the logits [b, s, v]. With ``steps`` it does go on to train,
and saves into ``out``. With ``stored``, upstream takes the model from the checkpoint's arguments. With ``own``, the
harness's own script trains.
"""

import json
import os
import socket
import sys
from pathlib import Path

from harness.convert import weights
from harness.parity import DENSE, tiny
from harness.upstreams.megatron_lm.environment import variables
from harness.upstreams.megatron_lm.flags import megatron_flags, model_flags


def main(cases: list[dict]) -> int:
    for variable in variables(tiny(DENSE, {}), "cpu"):
        os.environ[variable.name] = variable.value
    os.environ["OMP_NUM_THREADS"] = "1"
    from harness.entry import rank

    rank.prepare_for_forks()
    return max(run(case) for case in cases)


def run(case: dict) -> int:
    from harness.entry import warm

    found = weights.read(Path(case.get("model", case["load"])))
    ep = case.get("ep", 1)
    layout = {"tp": case.get("tp", 1), "pp": case.get("pp", 1), "ep": ep, "dp": ep}
    experiment = tiny(
        found.model, layout | {"seq_length": found.positions, "sequence_parallel": layout["tp"] > 1}
    )
    words = [word for group in megatron_flags(experiment, "cpu") for word in group]
    if case.get("stored"):
        words = [
            *without_model(words, experiment),
            "--use-checkpoint-args",
            "--seq-length",
            str(experiment.seq_length),
        ]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    ranks = experiment.world_size
    pids = []
    for rank in range(ranks):
        if pid := warm.fork():
            pids.append(pid)
            continue
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
        }
        os.environ |= {"MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(ranks)}
        sys.argv = [
            "pretrain_gpt.py",
            *words,
            "--load",
            case["load"],
            "--finetune",
            *case.get("arguments", []),
        ]
        if steps := case.get("steps"):
            sys.argv += [
                "--train-iters",
                str(steps),
                "--save",
                case["out"],
                "--save-interval",
                str(steps),
                "--eval-iters",
                "0",
            ]
        be_rank(case)
    return max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids)


def without_model(words: list[str], experiment) -> list[str]:
    """``words`` without what says what the model is."""
    said = " ".join(words)
    *model, option, value = model_flags(experiment)
    for part in (" ".join(model), f"{option} {value}"):
        assert part in said
        said = said.replace(part, "")
    return said.split()


def be_rank(case: dict) -> None:
    from megatron.training import training

    from harness.entry import rank

    if "steps" in case:
        rank.run()
    set_up = training.setup_model_and_optimizer

    def set_up_then_forward(*args, **kwargs):
        model, *_ = set_up(*args, **kwargs)
        forward(model, case)
        sys.stdout.flush()
        os._exit(0)

    training.setup_model_and_optimizer = set_up_then_forward
    rank.run(own_script=case.get("own", False))


def forward(model: list, case: dict) -> None:
    import torch
    from megatron.core import mpu
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    tokens = torch.tensor(case["tokens"])
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    for part in model:
        part.eval()
    with torch.no_grad():
        made = get_forward_backward_func()(
            forward_step_func=lambda _, part: (
                part(tokens, positions, None),
                lambda logits, non_loss_data: logits,
            ),
            data_iterator=None,
            model=model,
            num_microbatches=1,
            seq_length=tokens.shape[1],
            micro_batch_size=tokens.shape[0],
            forward_only=True,
            collect_non_loss_data=True,
        )
        if mpu.is_pipeline_last_stage():
            logits = gather_from_tensor_model_parallel_region(made[0])
            if mpu.get_tensor_model_parallel_rank() == 0 and mpu.get_data_parallel_rank() == 0:
                torch.save(logits, case["out"])
    torch.distributed.barrier()


if __name__ == "__main__":
    sys.exit(main(json.loads(Path(sys.argv[1]).read_text())))
