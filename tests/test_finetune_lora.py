"""LoRA against Hugging Face's PEFT, and under every layout against one process."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numpy", reason="the set-up stage `heavy` is not installed")

from harness.machine.upstream import locate
from harness.predict.flops import share_of_upstreams

sys.path.insert(0, str(Path(__file__).parent))
from tiny_chat import LORA, READ, STEPS, adapters, losses, make_data, make_weights, tune

from harness.experiment.constraints import with_changes

pytestmark = pytest.mark.cpu

LAYOUTS = {
    "tp2": {"tp": 2},
    "tp2+sp": {"tp": 2, "sequence_parallel": True},
    "pp2": {"pp": 2, "micro_batch_size": 1},
    "dp2": {"dp": 2, "micro_batch_size": 1, "sharding": "optim"},
}


def close(found: dict, expected: dict, within: float) -> None:
    assert found.keys() == expected.keys()
    worst = {name: float((found[name] - expected[name]).abs().max()) for name in found}
    assert max(worst.values()) < within, {name: far for name, far in worst.items() if far >= within}


def test_adapters_begin_as_nothing_and_leave_the_weights_alone(tmp_path):
    data = make_data(tmp_path)
    _, e = make_weights(tmp_path)
    alone = tune(e, data, tmp_path / "one")
    whole = tune(with_changes(e, lora=None, steps=1), data, tmp_path / "whole")
    assert losses(alone)[0] == losses(whole)[0], (
        "with B = 0 it is the model itself, to the last bit"
    )
    assert losses(alone)[-1] < losses(alone)[0]
    for run, least, most in ((alone, 0.6, share_of_upstreams(e)), (whole, 1, 1)):
        shares = [m.tflops / m.upstream_tflops for m in run.read_metrics()]
        assert all(least <= share <= most for share in shares), (
            "frozen weights have no gradient; packed attention is less"
        )
    parallel = tune(with_changes(e, **LAYOUTS["tp2+sp"]), data, tmp_path / "two")
    assert losses(parallel) == pytest.approx(losses(alone), abs=2e-5)
    close(adapters(parallel), adapters(alone), 2e-4)


@pytest.mark.skipif(
    locate() is None, reason="upstream's script is not here: git submodule update --init"
)
@pytest.mark.parametrize(
    "layout",
    [{}, *(pytest.param(LAYOUTS[name], marks=pytest.mark.full) for name in ("tp2+sp", "pp2"))],
)
def test_the_harnesss_own_script_tunes_as_upstreams(tmp_path, layout):
    """What the megatron-core wheel has no script for; to the last bit, and sequences of a micro-batch are joined."""
    data = make_data(tmp_path)
    _, e = make_weights(tmp_path)
    e = with_changes(e, **layout)
    own = tune(e, data, tmp_path / "own", script=("-m", "tests.own_script"))
    assert losses(own) == losses(tune(e, data, tmp_path / "upstream"))


@pytest.mark.full
def test_checkpoints_hold_adapters_alone_and_resume(tmp_path):
    data = make_data(tmp_path)
    _, e = make_weights(tmp_path)
    alone = tune(
        e, data, tmp_path / "one", "--save", str(tmp_path / "saved"), "--save-interval", "2"
    )
    resumed = tune(
        e,
        data,
        tmp_path / "resumed",
        "--load",
        str(tmp_path / "saved"),
        "--ckpt-step",
        "2",
        "--exit-on-missing-checkpoint",
    )
    assert losses(resumed) == losses(alone)[2:]
    close(adapters(resumed), adapters(alone), 1e-12)
    from harness.convert.torch_dist import TorchDistCheckpoint

    kept = {
        name
        for name in TorchDistCheckpoint(tmp_path / "saved" / "iter_0000004").shapes
        if not name.startswith("optimizer")
    }
    assert kept and all(".lora_" in name for name in kept)


@pytest.mark.full
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_layouts_train_the_same_adapters(tmp_path, kind, layout):
    data = make_data(tmp_path)
    _, e = make_weights(tmp_path, kind)
    alone, parallel = (
        tune(e, data, tmp_path / "one"),
        tune(with_changes(e, **layout), data, tmp_path / "two"),
    )
    assert losses(parallel) == pytest.approx(losses(alone), abs=2e-5)
    close(adapters(parallel), adapters(alone), 2e-4)


TARGETS = {
    "linear_qkv": "attn.c_attn",
    "linear_proj": "attn.c_proj",
    "linear_fc1": "mlp.c_fc",
    "linear_fc2": "mlp.c_proj",
}
PARENTS = {
    "linear_qkv": "self_attention",
    "linear_proj": "self_attention",
    "linear_fc1": "mlp",
    "linear_fc2": "mlp",
}


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param({}, id="tp1"),
        *(
            pytest.param(LAYOUTS[name], id=name, marks=pytest.mark.full)
            for name in ("tp2", "tp2+sp")
        ),
    ],
)
def test_adapters_are_those_of_peft(tmp_path, layout):
    data = make_data(
        tmp_path
    )  # puts upstream's tree on the path; the imports below find what is there
    model, e = make_weights(tmp_path)
    peft = pytest.importorskip("peft")
    import torch

    from harness.convert.transforms import FUSED_QKV, Sizes
    from harness.finetune.lora import first_factor

    run = tune(with_changes(e, **layout), data, tmp_path / "run")
    # c_proj names two layers of a block, in attention and in the MLP
    theirs = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=LORA.rank,
            lora_alpha=LORA.alpha,
            target_modules=["c_attn", "c_proj", "c_fc"],
            fan_in_fan_out=True,
        ),
    )
    blocks = theirs.base_model.model.transformer.h
    factors = {
        (n, name): block.get_submodule(TARGETS[name])
        for n, block in enumerate(blocks)
        for name in TARGETS
    }
    with torch.no_grad():
        for (n, name), linear in factors.items():
            weight = linear.lora_A["default"].weight
            weight.copy_(first_factor(1234, n, name, LORA.rank, weight.shape[1]))
            assert not linear.lora_B["default"].weight.any()
    assert losses(run) == pytest.approx(trained_by_peft(theirs, data), abs=2e-5)
    sizes = Sizes(e.model, e.seq_length, 0)
    expected = {}
    for (n, name), linear in factors.items():
        a, b = linear.lora_A["default"].weight.detach(), linear.lora_B["default"].weight.detach()
        b = FUSED_QKV.join([b.t()], sizes) if name == "linear_qkv" else b
        expected |= {
            f"decoder.layers.{n}.{PARENTS[name]}.{name}.lora_{f}": t
            for f, t in (("A", a), ("B", b))
        }
    close(adapters(run), expected, 2e-4)


def trained_by_peft(model, data) -> list[float]:
    """The losses of the same steps on the same packed sequences, by PyTorch's AdamW."""
    import torch
    from torch.nn.functional import cross_entropy

    samples = packed(data, STEPS * 4)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    model.train()
    found = []
    for step in range(STEPS):
        batch = [samples[step * 4 + n] for n in range(4)]
        total, tokens = 0.0, sum(sample["loss_mask"].sum() for sample in batch)
        for sample in batch:
            length = len(sample["tokens"])
            segment = torch.bucketize(
                torch.arange(length), sample["cu_seqlens"][1:].long(), right=True
            )
            seen = (segment[:, None] == segment) & torch.ones(
                length, length, dtype=torch.bool
            ).tril()
            mask = torch.zeros(length, length).masked_fill(~seen, torch.finfo(torch.float32).min)
            logits = model(
                input_ids=sample["tokens"][None],
                position_ids=sample["position_ids"][None],
                attention_mask=mask[None, None],
            ).logits[0]
            each = cross_entropy(logits, sample["labels"], reduction="none") * sample["loss_mask"]
            (each.sum() / tokens).backward()
            total += each.sum().item()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(total / tokens.item())
    return found


def packed(data, number: int) -> list[dict]:
    """The samples that a run reads, in its order; in a process of its own, which upstream's imports stay in."""
    done = subprocess.run([*READ, str(data), str(number)], capture_output=True, check=True)
    return pickle.loads(done.stdout)
